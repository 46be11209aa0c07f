"""Requests drawn over every field of every path: each is answered, or refused with a 4xx and one clear sentence.

`python -m tests.drawn_requests RUN` starts a server, sends 5,000 of them, and prints the answers by kind of value. It fails
for an answer of 5xx, for an error without one clear sentence, and for a traceback in the server's log.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import httpx2

from tests.abuse import CHAT, DRAW, EDIT, TEXT, assert_clear_error, form_request, make_picture, to_data_url, valid_body
from transfusion.serving import schemas

MODELS = {CHAT: schemas.ChatRequest, TEXT: schemas.CompletionRequest, DRAW: schemas.ImageRequest, EDIT: schemas.ImageRequest}
MESSAGE = {"role": "user", "content": "three"}
PICTURE = {"type": "image_url", "image_url": {"url": to_data_url(make_picture())}}
NESTED = {  # objects inside of a request: the model of their fields, a right one, and the field of a request that has it
    "message": (schemas.Message, MESSAGE, lambda it: {"messages": [it]}),
    "text part": (schemas.TextPart, {"type": "text", "text": "a"}, lambda it: {"messages": [MESSAGE | {"content": [it]}]}),
    "image part": (schemas.ImagePart, PICTURE, lambda it: {"messages": [MESSAGE | {"content": [it]}]}),
    "image_url": (schemas.ImageURL, PICTURE["image_url"],
                  lambda it: {"messages": [MESSAGE | {"content": [PICTURE | {"image_url": it}]}]}),
    "output part": (schemas.OutputPart, {"type": "image", "image": 0},
                    lambda it: {"messages": [MESSAGE | {"images": [PICTURE], "parts": [it]}]}),
    "stream_options": (schemas.StreamOptions, {"include_usage": True}, lambda it: {"stream_options": it, "stream": True}),
}  # fmt: skip
RIGHT = {
    "model": ["tiny"], "n": [1, 2], "seed": [7, -(2**63)], "stream": [True, False], "max_tokens": [1, 3],
    "max_completion_tokens": [2], "temperature": [0, 0.7], "top_p": [0, 0.5, 1], "stop": ["a", ["a", "b"]],
    "stream_options": [{"include_usage": True}], "steps": [1, 2], "num_inference_steps": [1], "guidance_scale": [0, 1.5],
    "negative_prompt": ["no"], "preview_every": [1], "logprobs": [True, 2], "top_logprobs": [2], "echo": [True, False],
    "prompt": ["a", ["a", "b"], [1, 2], [[1], [2, 3]]], "messages": [[MESSAGE]], "modalities": [["text"], ["image"]],
    "best_of": [1], "size": ["auto"], "partial_images": [0, 1], "response_format": ["url", {"type": "text"}],
    "output_format": ["webp"], "output_compression": [50], "role": ["assistant"], "content": ["a", [PICTURE]],
    "images": [[PICTURE]], "parts": [[]], "type": ["text", "image_url"], "text": ["a"], "url": [to_data_url(make_picture())],
    "image_url": [PICTURE["image_url"]["url"]], "image": [0], "include_usage": [True], "quality": ["auto"],
}  # fmt: skip
VALUES = {  # by kind
    "null": [None], "zero": [0, 0.0, False], "one": [1, 1.0, True], "negative": [-1, -0.5, -(2**70)],
    "huge": [2**31, 2**63, 10**300, 1e300], "not finite": [float("nan"), float("inf"), -float("inf")],
    "wrong type": ["x", 1.5, {"a": 1}, [None], [{}], [[[]]], {"type": 5}, [["a", 1]]], "empty": ["", [], {}],
    "wrong choice": ["none of these", "\x00\u2028", "ÄÖ" * 20, "../..", ["x"]],
    "very long": ["x" * 50_000, ["x"] * 2000, [0] * 20_000, {f"x{n}": 1 for n in range(100)}],
}  # fmt: skip
KINDS = (*VALUES, "right", "absent")


@dataclass(frozen=True)
class Drawn:
    """A request, and the kinds of the values that were changed in it, each as "path field: kind"."""

    path: str
    fields: dict
    changes: tuple[tuple[str, str], ...]  # (field, kind)

    def send(self, client: httpx2.Client) -> httpx2.Response:
        if self.path == EDIT:
            fields = {name: it if isinstance(it, str) else json.dumps(it) for name, it in self.fields.items()}
            return form_request(fields, [make_picture()]).send(client)
        headers = {"content-type": "application/json"}
        return client.post(self.path, content=json.dumps(self.fields).encode(), headers=headers)


def field_names(model: type[schemas.StrictModel]) -> list[str]:
    return sorted({*model.model_fields, *model.UNSUPPORTED, *model.IGNORED, "unknown"})


def draw_requests(seed: int) -> Iterator[Drawn]:
    """Endless. The first ones have every kind of value in every field once, used fields before others; some have other
    changes too."""
    rng = random.Random(seed)
    places = [(path, None, model, name) for path, model in MODELS.items() for name in field_names(model)]
    places += [(CHAT, place, model, name) for place, (model, _, _) in NESTED.items() for name in field_names(model)]
    while True:
        combinations = list(product(places, KINDS))
        rng.shuffle(combinations)
        combinations.sort(key=lambda it: it[0][3] not in it[0][2].model_fields)  # stable
        for (path, place, _, name), kind in combinations:
            fields = {name: str(it) for name, it in valid_body(path).items()} if path == EDIT else valid_body(path)
            changes = [(name, kind)]
            if place is None:
                _change(fields, name, kind, rng)
            else:
                _, right, wrap = NESTED[place]
                nested = dict(right)
                _change(nested, name, kind, rng)
                fields |= wrap(nested)
                changes = [(f"{place}.{name}", kind)]
            for _ in range(rng.choice((0, 0, 0, 1, 2))):
                changes.append((rng.choice(field_names(MODELS[path])), rng.choice(("right", *KINDS))))
                _change(fields, *changes[-1], rng)
            yield Drawn(path, fields, tuple(changes))


def _change(fields: dict, name: str, kind: str, rng: random.Random) -> None:
    if kind == "absent":
        fields.pop(name, None)
    else:
        fields[name] = rng.choice(VALUES.get(kind) or RIGHT.get(name, ["x"]))


def check(drawn: Drawn, response: httpx2.Response) -> str:
    """"answered", or "refused"."""
    if response.status_code != 200:
        assert_clear_error(response)
        return "refused"
    assert "event: error" not in response.text, response.text[-500:]
    if drawn.fields.get("stream") in (True, "true"):
        assert response.text.endswith("\n\n") and "data: " in response.text
    else:
        assert response.json().keys() >= {"created", "usage"}
    return "answered"


def send_drawn(client: httpx2.Client, count: int, seed: int = 0) -> dict[str, Counter]:
    """Counts of answered and refused requests by kind of changed value. AssertionError names a request that fails."""
    results: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for drawn in islice(draw_requests(seed), count):
        try:
            result = check(drawn, drawn.send(client))
        except Exception as error:
            body = json.dumps(drawn.fields)[:1000]
            raise AssertionError(f"{drawn.path} {drawn.changes}: {type(error).__name__}: {error}\n{body}") from error
        for _, kind in drawn.changes:
            results[kind][result] += 1
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = [sys.executable, "-m", "transfusion", "serve", str(args.run), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        base_url = re.search(r"http://\S+", server.stderr.readline())[0]
        with httpx2.Client(base_url=base_url, timeout=120) as client:
            (model,) = client.get("/v1/models").json()["data"]
            RIGHT["model"], RIGHT["size"] = [model["id"]], ["auto", *model["sizes"]]
            results = send_drawn(client, args.count, args.seed)
    finally:
        server.terminate()
        log = server.communicate()[1]
    for kind, counts in results.items():
        print(f"{kind:<14}{counts['answered']:>7} answered{counts['refused']:>7} refused")
    assert not log, f"the server's log:\n{log[-3000:]}"
    print(f"{args.count} requests, each answered or refused in one sentence; no answer of 5xx, nothing in the log")


if __name__ == "__main__":
    main()
