"""results.json: a run's scores by source and task, with the settings that reproduce them; written after each task."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from transfusion.checkpoint.read import find_newest_checkpoint
from transfusion.config import EvaluationConfig, from_json
from transfusion.disk import OpenError, is_exported, read_json, write_json
from transfusion.evaluation.follow import OnProgress, follow, ignore
from transfusion.evaluation.suite import Suite
from transfusion.inference.engine import Engine

NAME = "results.json"
REL_TOLERANCE = 1e-6  # figures within it agree
PRINTED = "features", "network", "no_fid"  # text values that are printed with the figures
ENVIRONMENT = "generation", "networks", "dtype", "device", "machine", "python", "versions"  # compared, but not required

PrintLine = Callable[[str], None]


def evaluate(
    engine: Engine, folder: Path, config: EvaluationConfig | None = None, print_line: PrintLine = print,
    out: Path | None = None, on_progress: OnProgress = ignore,
) -> dict:  # fmt: skip
    """Measure the run in a folder, write each task's figures as soon as they are known to `results.json` in `out` (default:
    the run's folder), and return all of them. Other tasks' figures of the same step are kept. ValueError before any
    measurement if the run does not support a task. `on_progress`: see `follow`; the parts are tasks."""
    suite, out = Suite(engine, config or EvaluationConfig()), out or folder
    results = _load_results(engine, folder, out)
    earlier, done = results["manifest"], []
    for source, task, values in _run_tasks(suite, print_line, on_progress):
        done.append([source, task])
        earlier = [rest for entry in earlier if (rest := _remove_task(entry, source, task))]
        results.setdefault(source, {})[task] = values
        results["manifest"] = [*earlier, {"measured": done, **suite.manifest()}]
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / NAME, results)
    return results


def repeat(
    engine: Engine, folder: Path, path: Path, data: tuple[str, ...] | None = None, print_line: PrintLine = print,
    on_progress: OnProgress = ignore,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """Repeat the measurements of a results.json by its manifests. The differences between the figures as text, and those
    between the environments, which may explain them. `data`: the present folders of the run's data. OpenError if the file
    has no valid manifest."""
    before = read_json(path)
    try:
        if not before["manifest"]:
            raise KeyError("manifest")
        entries = [(entry, from_json(EvaluationConfig, entry["config"]), entry["measured"]) for entry in before["manifest"]]
    except (KeyError, TypeError, ValueError) as error:
        raise OpenError(f"{path} does not say how it was measured: {error}") from None
    changed = list(differences(_identity(before), _identity(_load_results(engine, folder, folder))))
    reasons, run = {}, engine.run
    for then, config, measured in entries:
        engine.run = run
        suite = Suite(engine, replace(config, data=data or config.data))
        repeated = {(source, task): values for source, task, values in _run_tasks(suite, print_line, on_progress)}
        for source, task in measured:
            changed += differences(before.get(source, {}).get(task), repeated.get((source, task)), f"{source} {task}")
        now = suite.manifest()
        if then.get("data") != now["data"]:
            changed.append("the run's data differ from the data that were measured")
        environments = ({name: manifest.get(name) for name in ENVIRONMENT} for manifest in (then, now))
        reasons |= dict.fromkeys(differences(*environments))
    return list(dict.fromkeys(changed)), list(reasons)


def differences(before: object, now: object, name: str = "") -> Iterator[str]:
    """A line for each value that differs between two results."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for n, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{name} {n}")
    elif isinstance(before, float) and isinstance(now, float):
        is_close = math.isclose(before, now, rel_tol=REL_TOLERANCE, abs_tol=1e-12)
        if not (is_close or math.isnan(before) and math.isnan(now)):
            yield f"{name}: {before:.6g} there, {now:.6g} here"
    elif before != now:
        yield f"{name}: {before!r} there, {now!r} here"


def _run_tasks(suite: Suite, print_line: PrintLine, on_progress: OnProgress) -> Iterator[tuple[str, str, dict]]:
    """(source, task, values) of one task after another; prints the values."""
    tasks = {f"{source} {name}": (source, name, task) for (source, name), task in suite.tasks().items()}
    for source, name, task in map(tasks.get, follow(suite.engine, tasks, on_progress)):
        values = task()
        print_line(f"{source} {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items() if isinstance(v, float)))
        for key in PRINTED:
            if key in values:
                print_line(f"  {key.replace('_', ' ')}: {values[key]}")
        yield source, name, values


def _load_results(engine: Engine, folder: Path, out: Path) -> dict:
    """The results saved in `out`, if they are of this step of the run in `folder`; otherwise new ones without tasks."""
    results: dict = {
        "run": engine.opened.name, "recipe": engine.run.recipe, "step": engine.opened.step,
        "parameters": engine.opened.parameters,
    }  # fmt: skip
    path = out / NAME
    saved = read_json(path) if path.exists() else {}
    is_same = _identity(saved) == _identity(results) and (out == folder or saved.get("run") == results["run"])
    if is_same and isinstance(saved.get("manifest"), list):
        return saved | results
    if not is_exported(folder):
        state = read_json(find_newest_checkpoint(folder) / "state.json")
        results |= {"training_seconds": round(state["seconds"]), "training_positions": state["num_seen"]}
    return results | {"manifest": []}


def _identity(results: dict) -> dict:
    """What a run keeps when its folder is renamed or exported under another name."""
    return {name: results.get(name) for name in ("recipe", "step", "parameters")}


def _remove_task(entry: dict, source: str, task: str) -> dict | None:
    """A manifest entry without one task; None if no task remains."""
    rest = [pair for pair in entry["measured"] if pair != [source, task]]
    if len(rest) == len(entry["measured"]):
        return entry
    config = entry["config"] | {"tasks": list(dict.fromkeys(name for _, name in rest))}
    return entry | {"measured": rest, "config": config} if rest else None
