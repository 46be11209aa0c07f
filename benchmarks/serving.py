"""A server under load: mixed requests, 16 concurrent against one at a time, and the latency of the first output.

`python -m benchmarks.serving RUN` starts a server on the loopback interface. Every answer is compared with the engine's
answer to the same request and seed. Pixels may differ by 2 of 255. Text must be equal, unless the two largest logits of some
token differ by less than 1e-4 (a batch adds numbers in another order). Times are wall-clock times. Next to them stands the
CPU time of the server process, which depends little on other load on the machine.
"""

import base64
import io
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
import numpy as np
import torch
import tyro
from PIL import Image as PILImage

from benchmarks.timing import Setting, describe_machine, load_average
from transfusion.disk import write_json
from transfusion.inference import text_mode
from transfusion.inference.engine import Engine, Request, open_run

TIE = 1e-4  # between the two largest logits
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Options:
    """Measure a server under load, and the same server with one request at a time."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, for example of `transfusion train digits --training.steps 30`."""
    requests: int = 200
    """Number of requests."""
    concurrency: int = 16
    """Number of concurrent requests."""
    json: Path = Path("runs/serving.json")
    """File for all figures."""


@dataclass(frozen=True)
class LoadRequest:
    """One request, as an HTTP request and for the engine."""

    kind: str
    path: str
    body: dict
    request: Request


@dataclass
class LoadResult:
    """Total wall-clock and CPU seconds, and the seconds and the answer of each request."""

    wall: float = 0.0
    cpu: float = 0.0
    seconds: list[float] = field(default_factory=list)
    answers: list[httpx2.Response | Exception] = field(default_factory=list)


def main(options: Options) -> None:
    engine = open_run(options.run)
    requests = [make_request(engine, number) for number in range(options.requests)]
    with start_server(options.run) as (client, pid):
        for request in requests[:6]:
            client.post(request.path, json=request.body)
        concurrent = send_all(client, pid, requests, options.concurrency)
        sequential = send_all(client, pid, requests, 1)
        latencies = measure_first_output(client, pid)
    machine = describe_machine(Setting(torch.device("cpu")))
    summary = summarize(concurrent, sequential, options)
    verdicts = check_answers(engine, requests, concurrent.answers + sequential.answers)
    print(f"{machine['commit']}, {machine['cores']} cores of {machine['processor']}, load {load_average()[0]}")
    for line in (*summary, *latencies):
        print(f"  {line}")
    print(f"  {2 * len(requests)} answers: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    contents = {"load_at_end": load_average(), "figures": summary + latencies, "answers": dict(verdicts)}
    write_json(options.json, machine | contents)
    if verdicts.keys() - {"correct", "different after a tie"}:
        sys.exit("benchmarks.serving: some answers were lost or wrong")


def make_request(engine: Engine, number: int) -> LoadRequest:
    """In turn: a text completion, an image to draw, an image to caption."""
    greedy = replace(engine.run.generation, temperature=0.0, max_tokens=16)
    word, common = WORDS[number % 10], {"seed": number, "temperature": 0, "max_tokens": 16}
    match number % 3:
        case 0:
            request = Request((f"the {word}",), seed=number, generation=greedy, allow_images=False)
            return LoadRequest("text", "/v1/completions", {"prompt": f"the {word}", **common}, request)
        case 1:
            body = {"prompt": word, "seed": number}
            return LoadRequest("drawing", "/v1/images/generations", body, Request((word,), 1, number))
    (width, height), channels = engine.sizes[0], engine.opened.codec.image_channels
    pixels = np.random.default_rng(number).integers(256, size=(height, width, channels), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels.squeeze()).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], **common}
    request = Request((pixels,), seed=number, generation=greedy, allow_images=False)
    return LoadRequest("caption", "/v1/chat/completions", body, request)


@contextmanager
def start_server(run: Path):
    """Start a server; yield a client and the process id."""
    command = [sys.executable, "-m", "transfusion", "serve", str(run), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", server.stderr.readline())[0]
        with httpx2.Client(base_url=url, timeout=600) as client:
            yield client, server.pid
    finally:
        server.terminate()
        server.wait()


def send_all(client: httpx2.Client, pid: int, requests: list[LoadRequest], concurrency: int) -> LoadResult:
    result = LoadResult()

    def send(request: LoadRequest) -> tuple[httpx2.Response | Exception, float]:
        start = time.perf_counter()
        try:
            answer = client.post(request.path, json=request.body)
        except httpx2.HTTPError as error:
            answer = error
        return answer, time.perf_counter() - start

    start, cpu_start = time.perf_counter(), cpu_seconds(pid)
    with ThreadPoolExecutor(concurrency) as pool:
        for answer, seconds in pool.map(send, requests):
            result.answers.append(answer)
            result.seconds.append(seconds)
    result.wall, result.cpu = time.perf_counter() - start, cpu_seconds(pid) - cpu_start
    return result


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, over all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def measure_first_output(client: httpx2.Client, pid: int, rounds: int = 15) -> list[str]:
    """Milliseconds from a request to the first token and to the first preview, without other requests."""
    chat = {"messages": [{"role": "user", "content": "three"}], "stream": True, "max_tokens": 8}
    draw = {"prompt": "three", "stream": True, "preview_every": 1, "steps": 20}
    lines = []
    for name, path, body, marker in (
        ("first token", "/v1/chat/completions", chat, '"content": "'),
        ("first preview", "/v1/images/generations", draw, "partial_image"),
    ):
        wall, cpu = [], []
        for _ in range(rounds):
            start, cpu_start = time.perf_counter(), cpu_seconds(pid)
            with client.stream("POST", path, json=body) as answer:
                next(line for line in answer.iter_lines() if marker in line)
                wall.append(1e3 * (time.perf_counter() - start))
            cpu.append(1e3 * (cpu_seconds(pid) - cpu_start))
        lines.append(
            f"{name}: {statistics.median(wall):.0f} ms (median; fastest {min(wall):.0f}, slowest {max(wall):.0f}; "
            f"CPU time of the server until the client disconnected: {statistics.median(cpu):.0f})"
        )
    return lines


def summarize(concurrent: LoadResult, sequential: LoadResult, options: Options) -> list[str]:
    lines = []
    for result, name in ((concurrent, f"{options.concurrency} concurrent"), (sequential, "one at a time")):
        p50, p95 = np.percentile(result.seconds, [50, 95])
        num_requests = len(result.seconds)
        lines.append(
            f"{name}: {num_requests / result.wall:.1f} requests/s, {num_requests / result.cpu:.1f} per second of CPU time; "
            f"p50 {1e3 * p50:.0f} ms, p95 {1e3 * p95:.0f} ms"
        )
    ratios = sequential.wall / concurrent.wall, sequential.cpu / concurrent.cpu
    lines.append(f"{ratios[0]:.2f} times the throughput of one at a time ({ratios[1]:.2f} times by CPU time)")
    return lines


def check_answers(engine: Engine, requests: list[LoadRequest], answers: list[httpx2.Response | Exception]) -> Counter:
    """Compare each answer with the engine's and count the verdicts. `answers` is one or more rounds of all requests."""
    expected_parts = [engine.generate([request.request])[0][0].parts for request in requests]
    verdicts = Counter()
    for number, answer in enumerate(answers):
        request, expected = requests[number % len(requests)], expected_parts[number % len(requests)]
        if isinstance(answer, Exception) or answer.status_code != 200:
            verdicts["lost"] += 1
        elif request.kind == "drawing":
            png = base64.b64decode(answer.json()["data"][0]["b64_json"])
            pixels = np.asarray(PILImage.open(io.BytesIO(png))).reshape(expected[0].shape).astype(int)
            verdicts["correct" if np.abs(pixels - expected[0]).max() <= 2 else "wrong image"] += 1
        else:
            choice = answer.json()["choices"][0]
            text = choice["text"] if request.kind == "text" else choice["message"]["content"]
            if text.rstrip("\ufffd") == "".join(expected).rstrip("\ufffd"):
                verdicts["correct"] += 1
            else:
                verdicts["different after a tie" if has_tie(engine, request) else "wrong text"] += 1
    return verdicts


def has_tie(engine: Engine, request: LoadRequest) -> bool:
    """True if the two largest logits of any generated token are so close that rounding may decide."""
    gaps, sample_tokens = [], text_mode.sample_tokens

    def record_gaps(logits, generations, seeds, allowed):
        largest = torch.stack(logits).masked_fill(~torch.stack(allowed), -np.inf).topk(2).values  # (B, 2)
        gaps.extend((largest[:, 0] - largest[:, 1]).tolist())
        return sample_tokens(logits, generations, seeds, allowed)

    text_mode.sample_tokens = record_gaps
    try:
        engine.generate([request.request])
    finally:
        text_mode.sample_tokens = sample_tokens
    return min(gaps) < TIE


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.serving"))
