"""Counts and times for /metrics, in Prometheus' text format. They never contain content of requests."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MAX_AGE = 0.2  # seconds


class Metrics:
    """One registry for each server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.text, self.written = b"", -MAX_AGE
        self.requests = Counter("transfusion_requests", "Answered requests.", ("path", "status"), registry=self.registry)
        self.request_seconds = Histogram(
            "transfusion_request_seconds", "Seconds from a request's arrival to the end of its answer.", ("path",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_event_seconds = Histogram(
            "transfusion_first_event_seconds", "Seconds from a request's arrival at the engine to its first output.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter("transfusion_tokens", "Generated tokens.", registry=self.registry)
        self.images = Counter("transfusion_images", "Drawn images.", registry=self.registry)
        self.steps = Counter("transfusion_engine_steps", "Steps of the engine.", registry=self.registry)
        self.failures = Counter("transfusion_engine_failures", "Failed steps of the engine.", registry=self.registry)
        self.disconnects = Counter("transfusion_disconnects", "Clients that disconnected early.", registry=self.registry)
        self.sequences = Gauge("transfusion_sequences", "Sequences in generation.", ("kind",), registry=self.registry)
        self.waiting = Gauge("transfusion_waiting", "Requests that wait for the engine.", registry=self.registry)

    def to_text(self) -> bytes:
        """At most MAX_AGE seconds old: to write it takes milliseconds, however often it is asked for."""
        if time.monotonic() - self.written > MAX_AGE:
            self.text, self.written = generate_latest(self.registry), time.monotonic()
        return self.text
