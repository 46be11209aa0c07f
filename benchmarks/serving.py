"""A server under load: mixed requests, 16 at a time, against the same one at a time; and how long the first sign takes.

`python -m benchmarks.serving RUN` starts a server of its own on this machine's loopback. Every answer is compared with what
the engine alone gives for the same request and seed: pixels may differ by 2 of 255; text not at all, unless the two best
scores of some token were less than 1e-4 apart (a batch adds in another order). Times are wall times; beside them stands
what the server's process computed, which other work on the machine hardly changes.
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
from PIL import Image as Picture

from benchmarks.measuring import Setting, load, machine
from transfusion.disk import write_json
from transfusion.inference import text_mode
from transfusion.inference.engine import Engine, Request, open_run

CLOSE = 1e-4  # between the two best scores
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Options:
    """A server under load, and beside it the same server, one request at a time."""

    run: tyro.conf.Positional[Path]
    """The run's folder, for example of `transfusion train digits --training.steps 30`."""
    requests: int = 200
    at_once: int = 16
    json: Path = Path("runs/serving.json")
    """Where all figures go."""


@dataclass(frozen=True)
class Asked:
    """One request, for the server and for the engine."""

    kind: str
    path: str
    body: dict
    request: Request


@dataclass
class Took:
    """What it took to answer all."""

    wall: float = 0.0
    processor: float = 0.0
    seconds: list[float] = field(default_factory=list)
    answers: list[httpx2.Response | Exception] = field(default_factory=list)


def main(options: Options) -> None:
    engine = open_run(options.run)
    asked = [mixed(engine, number) for number in range(options.requests)]
    with serving(options.run) as (client, process):
        for one in asked[:6]:
            client.post(one.path, json=one.body)
        many = ask_all(client, process, asked, options.at_once)
        single = ask_all(client, process, asked, 1)
        first = first_signs(client, process)
    about = machine(Setting(torch.device("cpu")))
    found, verdicts = summary(many, single, options), check_all(engine, asked, many.answers + single.answers)
    print(f"{about['commit']}, {about['cores']} cores of {about['processor']}, load {load()[0]}")
    for line in (*found, *first):
        print(f"  {line}")
    print(f"  answers, {2 * len(asked)} in all: " + ", ".join(f"{n} {what}" for what, n in verdicts.items()))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.json, about | {"load_at_end": load(), "figures": found + first, "answers": dict(verdicts)})
    if verdicts.keys() - {"right", "parted where two scores were equal"}:
        sys.exit("benchmarks.serving: some answers were lost or wrong")


def mixed(engine: Engine, number: int) -> Asked:
    """In turn: text to write, an image to draw, an image to caption."""
    greedy = replace(engine.run.generation, temperature=0.0, max_tokens=16)
    word, common = WORDS[number % 10], {"seed": number, "temperature": 0, "max_tokens": 16}
    match number % 3:
        case 0:
            request = Request((f"the {word}",), seed=number, generation=greedy, allow_images=False)
            return Asked("text", "/v1/completions", {"prompt": f"the {word}", **common}, request)
        case 1:
            return Asked("drawing", "/v1/images/generations", {"prompt": word, "seed": number}, Request((word,), 1, number))
    (width, height), colours = engine.sizes[0], engine.opened.codec.image_channels
    pixels = np.random.default_rng(number).integers(256, size=(height, width, colours), dtype=np.uint8)
    file = io.BytesIO()
    Picture.fromarray(pixels.squeeze()).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], **common}
    return Asked(
        "caption", "/v1/chat/completions", body, Request((pixels,), seed=number, generation=greedy, allow_images=False)
    )


@contextmanager
def serving(run: Path):
    """A client of a new server, and its process."""
    command = [sys.executable, "-m", "transfusion", "serve", str(run), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", server.stderr.readline())[0]
        with httpx2.Client(base_url=url, timeout=600) as client:
            yield client, server.pid
    finally:
        server.terminate()
        server.wait()


def ask_all(client: httpx2.Client, process: int, asked: list[Asked], at_once: int) -> Took:
    took = Took()

    def ask(one: Asked) -> tuple[httpx2.Response | Exception, float]:
        begun = time.perf_counter()
        try:
            answer = client.post(one.path, json=one.body)
        except httpx2.HTTPError as error:
            answer = error
        return answer, time.perf_counter() - begun

    begun, before = time.perf_counter(), processor_seconds(process)
    with ThreadPoolExecutor(at_once) as pool:
        for answer, seconds in pool.map(ask, asked):
            took.answers.append(answer)
            took.seconds.append(seconds)
    took.wall, took.processor = time.perf_counter() - begun, processor_seconds(process) - before
    return took


def processor_seconds(process: int) -> float:
    """That a process has computed so far, all its threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def first_signs(client: httpx2.Client, process: int, rounds: int = 15) -> list[str]:
    """Milliseconds from a request to the first token and to the first preview, nothing else being asked."""
    chat = {"messages": [{"role": "user", "content": "three"}], "stream": True, "max_tokens": 8}
    draw = {"prompt": "three", "stream": True, "preview_every": 1, "steps": 20}
    lines = []
    for what, path, body, sign in (
        ("first token", "/v1/chat/completions", chat, '"content": "'),
        ("first preview", "/v1/images/generations", draw, "partial_image"),
    ):
        wall, computed = [], []
        for _ in range(rounds):
            begun, before = time.perf_counter(), processor_seconds(process)
            with client.stream("POST", path, json=body) as answer:
                next(line for line in answer.iter_lines() if sign in line)
                wall.append(1e3 * (time.perf_counter() - begun))
            computed.append(1e3 * (processor_seconds(process) - before))
        lines.append(
            f"{what}: {statistics.median(wall):.0f} ms (median; fastest {min(wall):.0f}, slowest {max(wall):.0f}; "
            f"the process computed {statistics.median(computed):.0f} until the client had gone)"
        )
    return lines


def summary(many: Took, single: Took, options: Options) -> list[str]:
    lines = []
    for took, name in ((many, f"{options.at_once} at once"), (single, "one at a time")):
        p50, p95 = np.percentile(took.seconds, [50, 95])
        lines.append(
            f"{name}: {len(took.seconds) / took.wall:.1f} requests a second, {len(took.seconds) / took.processor:.1f} a "
            f"second of computing; p50 {1e3 * p50:.0f} ms, p95 {1e3 * p95:.0f} ms"
        )
    ratios = single.wall / many.wall, single.processor / many.processor
    lines.append(f"{ratios[0]:.2f} times the throughput of one at a time ({ratios[1]:.2f} times by time computed)")
    return lines


def check_all(engine: Engine, asked: list[Asked], answers: list[httpx2.Response | Exception]) -> Counter:
    """What became of each answer, by kind of verdict."""
    alone = [engine.generate([one.request])[0][0].parts for one in asked]
    verdicts = Counter()
    for number, answer in enumerate(answers):
        one, expected = asked[number % len(asked)], alone[number % len(asked)]
        if isinstance(answer, Exception) or answer.status_code != 200:
            verdicts["lost"] += 1
        elif one.kind == "drawing":
            encoded = base64.b64decode(answer.json()["data"][0]["b64_json"])
            pixels = np.asarray(Picture.open(io.BytesIO(encoded))).reshape(expected[0].shape).astype(int)
            verdicts["right" if np.abs(pixels - expected[0]).max() <= 2 else "wrong image"] += 1
        else:
            choice = answer.json()["choices"][0]
            text = choice["text"] if one.kind == "text" else choice["message"]["content"]
            wanted = "".join(expected)
            if text.rstrip("\ufffd") == wanted.rstrip("\ufffd"):
                verdicts["right"] += 1
            else:
                verdicts["parted where two scores were equal" if is_close(engine, one) else "wrong text"] += 1
    return verdicts


def is_close(engine: Engine, one: Asked) -> bool:
    """Whether the two best scores of any token of this text lie so close that the order of adding may decide."""
    gaps, choose = [], text_mode.sample_token

    def watched(logits, allowed, *rest):
        best = logits.masked_fill(~allowed, -np.inf).topk(2).values
        gaps.append((best[0] - best[1]).item())
        return choose(logits, allowed, *rest)

    text_mode.sample_token = watched
    try:
        engine.generate([one.request])
    finally:
        text_mode.sample_token = choose
    return min(gaps) < CLOSE


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.serving"))
