"""All that a run can be asked, by the data it was trained on; the answers go to results.json."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from transfusion.checkpoint.open import newest
from transfusion.data.prepare import open_sources
from transfusion.disk import read_json, write_json
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.digits import draw_digits
from transfusion.evaluation.perplexity import heldout_topics
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import Engine

SCENES = 200  # drawn and captioned


def evaluate(engine: Engine, folder: Path, say: Callable[[str], None] = print) -> dict:
    """Measure what the run supports, write `results.json` into its folder, and return it."""
    state = read_json(newest(folder) / "state.json")
    results = {
        "run": engine.run.name, "step": engine.opened.step,
        "parameters": engine.opened.parameters,
        "training_seconds": round(state["seconds"]), "training_positions": state["positions"],
    }  # fmt: skip
    sources = {source.name: source for source in open_sources(engine.run.data, "heldout")}
    tasks: dict[str, Callable[[], dict]] = {}
    if "digits" in sources:
        tasks["digits captions"] = lambda: caption_heldout(engine, sources["digits"], len(sources["digits"]))
        tasks["digits drawings"] = lambda: draw_digits(engine)[0]
    if "shapes" in sources:
        tasks["shapes captions"] = lambda: caption_heldout(engine, sources["shapes"], SCENES)
        tasks["shapes drawings"] = lambda: draw_scenes(engine, SCENES)[0]
    if "topics" in sources:
        tasks["topics text"] = lambda: heldout_topics(engine)
    for name, task in tasks.items():
        source, what = name.split()
        results.setdefault(source, {})[what] = values = task()
        say(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items() if isinstance(v, float)))
    results["manifest"] = _manifest(engine)
    write_json(folder / "results.json", results)
    return results


def _manifest(engine: Engine) -> dict:
    """What another machine needs to repeat the figures."""
    return {
        "seed": 0, "weights": "average", "dtype": "float32", "device": str(engine.device),
        "generation": asdict(engine.run.generation), "captions": "greedy, exact match",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "torch": torch.__version__, "transfusion": version("transfusion"),
    }  # fmt: skip
