"""results.json: a run's figures by source and task, each with what it takes to repeat it, written as they come."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from transfusion.checkpoint.open import find_newest_checkpoint
from transfusion.config import EvaluationConfig, from_json
from transfusion.disk import OpenError, is_exported, read_json, write_json
from transfusion.evaluation.suite import Suite
from transfusion.inference.engine import Engine

NAME = "results.json"
CLOSE = 1e-6  # relative: figures that lie no farther apart agree
SAID = "features", "network", "no_fid"  # what figures are of, and why one is not there
CIRCUMSTANCES = "generation", "networks", "dtype", "device", "machine", "python", "versions"

Say = Callable[[str], None]


def evaluate(engine: Engine, folder: Path, asked: EvaluationConfig | None = None, say: Say = print) -> dict:
    """Measure a run, keep each task's figures in its `results.json` as soon as they are there, and return all that it holds.

    What it holds already of the same step stays, but for the tasks that are measured anew. ValueError, before anything is
    measured, when the run cannot be asked that.
    """
    suite = Suite(engine, asked or EvaluationConfig())
    results = _begun(engine, folder)
    earlier, done = results["manifest"], []
    for source, task, values in _measured(suite, say):
        done.append([source, task])
        earlier = [left for entry in earlier if (left := _without(entry, source, task))]
        results.setdefault(source, {})[task] = values
        results["manifest"] = [*earlier, {"measured": done, **suite.manifest()}]
        write_json(folder / NAME, results)
    return results


def repeat(
    engine: Engine, folder: Path, path: Path, data: tuple[str, ...] | None = None, say: Say = print
) -> tuple[list[str], list[str]]:
    """Measure again what a results.json holds, by its manifests: in what the figures differ, in words, and what else is not
    as it was, which may be why. `data`: where the run's data are now. OpenError when it does not say how it was measured.
    """
    before = read_json(path)
    try:
        if not before["manifest"]:
            raise KeyError("manifest")
        entries = [(entry, from_json(EvaluationConfig, entry["asked"]), entry["measured"]) for entry in before["manifest"]]
    except (KeyError, TypeError, ValueError) as error:
        raise OpenError(f"{path} does not say how it was measured: {error}") from None
    found, why = list(differences(_of_run(before), _of_run(_begun(engine, folder)))), {}
    run = engine.run
    for then, asked, measured in entries:
        engine.run = run
        suite = Suite(engine, replace(asked, data=data or asked.data))
        now = {(source, task): values for source, task, values in _measured(suite, say)}
        for source, task in measured:
            found += differences(before.get(source, {}).get(task), now.get((source, task)), f"{source} {task}")
        today = suite.manifest()
        if then.get("data") != today["data"]:
            found.append("the run's data are others than they were")
        changed = differences(*({name: one.get(name) for name in CIRCUMSTANCES} for one in (then, today)))
        why |= dict.fromkeys(changed)
    return list(dict.fromkeys(found)), list(why)


def differences(before: object, now: object, where: str = "") -> Iterator[str]:
    """What two results say differently."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from differences(before.get(name), now.get(name), f"{where} {name}".strip())
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for n, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{where} {n}")
    elif isinstance(before, float) and isinstance(now, float):
        same = math.isclose(before, now, rel_tol=CLOSE, abs_tol=1e-12) or (math.isnan(before) and math.isnan(now))
        if not same:
            yield f"{where}: {before:.6g} there, {now:.6g} here"
    elif before != now:
        yield f"{where}: {before!r} there, {now!r} here"


def _measured(suite: Suite, say: Say) -> Iterator[tuple[str, str, dict]]:
    """Source, task and figures, one after the other."""
    for (source, name), task in suite.tasks().items():
        values = task()
        say(f"{source} {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items() if isinstance(v, float)))
        for what in SAID:
            if what in values:
                say(f"  {what.replace('_', ' ')}: {values[what]}")
        yield source, name, values


def _begun(engine: Engine, folder: Path) -> dict:
    """The results that are there of this step of the run, or none yet."""
    results: dict = {"run": engine.run.name, "step": engine.opened.step, "parameters": engine.opened.parameters}
    path = folder / NAME
    known = read_json(path) if path.exists() else {}
    if _of_run(known) == results and isinstance(known.get("manifest"), list):
        return known
    if not is_exported(folder):
        state = read_json(find_newest_checkpoint(folder) / "state.json")
        results |= {"training_seconds": round(state["seconds"]), "training_positions": state["num_seen"]}
    return results | {"manifest": []}


def _of_run(results: dict) -> dict:
    return {name: results.get(name) for name in ("run", "step", "parameters")}


def _without(entry: dict, source: str, task: str) -> dict | None:
    """The manifest of what it was measured with, less one task; None when nothing is left."""
    left = [pair for pair in entry["measured"] if pair != [source, task]]
    if len(left) == len(entry["measured"]):
        return entry
    asked = entry["asked"] | {"tasks": list(dict.fromkeys(name for _, name in left))}
    return entry | {"measured": left, "asked": asked} if left else None
