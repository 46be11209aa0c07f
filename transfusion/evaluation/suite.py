"""All that a run can be asked, by the data it was trained on; the answers go to results.json."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from transfusion.checkpoint.open import newest
from transfusion.data.loader import Source
from transfusion.data.raw import RawText
from transfusion.data.sources import open_raw
from transfusion.disk import read_json, write_json
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.evaluation.digits import draw_digits
from transfusion.evaluation.perplexity import bits_per_byte, heldout_topics
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import Engine

SCENES = 200  # drawn and captioned
TEXTS = 200  # held-out texts of a source of one's own


def evaluate(engine: Engine, folder: Path, say: Callable[[str], None] = print) -> dict:
    """Measure what the run supports, write `results.json` into its folder, and return it."""
    state = read_json(newest(folder) / "state.json")
    results = {
        "run": engine.run.name, "step": engine.opened.step,
        "parameters": engine.opened.parameters,
        "training_seconds": round(state["seconds"]), "training_positions": state["seen"],
    }  # fmt: skip
    sources = {source.name: source for source in open_raw(engine.run.data, "heldout")}
    tasks: dict[str, Callable[[], dict]] = {}
    for name, source in sources.items():
        tasks |= _tasks(engine, name, source)
    for name, task in tasks.items():
        source, _, what = name.rpartition(" ")
        results.setdefault(source, {})[what] = values = task()
        say(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items() if isinstance(v, float)))
    results["manifest"] = _manifest(engine)
    write_json(folder / "results.json", results)
    return results


def _tasks(engine: Engine, name: str, source: Source) -> dict[str, Callable[[], dict]]:
    """What can be asked about a source: by its name, or else by what its first document holds."""
    first = source[0]
    conditioning = {f"{name} conditioning": lambda: conditioning_gap(engine, source, SCENES)}
    match name:
        case "digits":
            return {"digits captions": lambda: caption_heldout(engine, source, len(source)),
                    "digits drawings": lambda: draw_digits(engine)[0], **conditioning}  # fmt: skip
        case "shapes":
            return {"shapes captions": lambda: caption_heldout(engine, source, SCENES),
                    "shapes drawings": lambda: draw_scenes(engine, source, SCENES)[0], **conditioning}  # fmt: skip
        case "topics":
            return {"topics text": lambda: heldout_topics(engine)}
        case _ if first.pairs:
            return {f"{name} captions": lambda: caption_heldout(engine, source, SCENES), **conditioning}
        case _ if all(isinstance(part, RawText) for part in first.segments):
            return {f"{name} text": lambda: bits_per_byte(engine, _texts(source, TEXTS))}
        case _:
            return {}


def _texts(source: Source, count: int) -> list[str]:
    """The first texts of a source that holds nothing else."""
    raws = (source[n] for n in range(min(count, len(source))))
    return ["".join(part.text for part in raw.segments if isinstance(part, RawText)) for raw in raws]


def _manifest(engine: Engine) -> dict:
    """What another machine needs to repeat the figures."""
    return {
        "seed": 0, "weights": "average", "dtype": str(engine.opened.precision).removeprefix("torch."),
        "device": str(engine.device),
        "generation": asdict(engine.run.generation), "captions": "greedy, exact match",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "torch": torch.__version__, "transfusion": version("transfusion"),
    }  # fmt: skip
