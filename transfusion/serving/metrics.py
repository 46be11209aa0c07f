"""What the server counts, for /metrics in Prometheus' text format. Never what was said."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry for each server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "transfusion_requests", "Answered requests.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "transfusion_request_seconds", "From a request's arrival to the end of its answer.", ("path",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "transfusion_first_seconds", "From a request's arrival at the engine to the first that it writes or draws.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter("transfusion_tokens", "Tokens written.", registry=self.registry)
        self.images = Counter("transfusion_images", "Images drawn.", registry=self.registry)
        self.steps = Counter("transfusion_engine_steps", "Steps of the engine.", registry=self.registry)
        self.failures = Counter("transfusion_engine_failures", "Steps that failed.", registry=self.registry)
        self.gone = Counter("transfusion_gone", "Requests whose client went away.", registry=self.registry)
        self.rows = Gauge("transfusion_rows", "Rows in flight.", ("kind",), registry=self.registry)
        self.waiting = Gauge("transfusion_waiting", "Answers that wait for a row.", registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
