"""Several runs on one page: figures side by side, curves in the same plots, and the settings that differ."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from transfusion.config import to_json
from transfusion.disk import run_name
from transfusion.page import SERIES, Line, Page
from transfusion.report.record import VELOCITY_ERROR, Record, format_duration, running_mean

NONE = "–"  # a cell without a value
MAX_POINTS = 600  # of a line in a plot
SCALES = {  # what the values of a held-out metric depend on besides the weights and the documents
    "text_loss": ("tokenizer",), "image_loss": ("codec", "diffusion settings"),
    "velocity_error": ("codec", "noise schedule"),
}  # fmt: skip
HELDOUT = {  # held-out metrics, with the label of the y axis
    "text_loss": "nats per token", "image_loss": "mean squared error per value, or nats per code",
    "velocity_error": "mean squared error per value",
}  # fmt: skip
CURVES = {  # metrics of training steps -> title, label of the y axis, and whether it is logarithmic
    "text_loss": ("Text loss, training", HELDOUT["text_loss"], True),
    "image_loss": ("Image loss, training", HELDOUT["image_loss"], True),
    "gradient_norm": ("Gradient norm", "", True), "learning_rate": ("Learning rate", "", False),
    "positions_per_second": ("Speed", "positions per second", False),
    "data_wait_share": ("Waiting for data", "share of the time", False),
}  # fmt: skip


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page about the runs in these folders and return its path. A run without results.json or metrics.jsonl has
    empty cells. OpenError when a run.json cannot be read."""
    names = [run_name(folder) for folder in folders]
    names = [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
    runs = {name: Record.read(folder) for name, folder in zip(names, folders, strict=True)}
    page = Page("Comparison of " + " and ".join(runs) if len(runs) == 2 else f"Comparison of {len(runs)} runs")
    page.heading("Figures")
    page.table(_side_by_side([dict(_figures(run)) for run in runs.values()]), ("figure", *runs))
    for name, run in runs.items():
        for sentence in run.overfitting():
            page.paragraph(f"`{name}`: {sentence}")
    page.heading("Curves")
    _add_curves(page, runs)
    page.heading("Settings that differ")
    settings = [dict(_flatten(_settings(run))) for run in runs.values()]
    differing = [row for row in _side_by_side(settings) if len({*row[1:]}) > 1]
    if differing:
        page.table(differing, ("setting", *runs))
    else:
        page.paragraph("All settings are equal.")
    return page.write(path)


def _side_by_side(columns: Sequence[dict[str, str]]) -> list[tuple[str, ...]]:
    """A row for each name that one of the columns has, in their order."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, *(column.get(name, NONE) for column in columns)) for name in names]


def _figures(run: Record) -> Iterator[tuple[str, str]]:
    """The figures of a run with their names: of training, the held-out losses, and those of results.json."""
    if trained := run.trained:
        last = trained[-1]
        yield "steps", f"{last['step']:,}"
        yield "training time", format_duration(last["seconds"])
        yield "positions per second, median", f"{median(line['positions_per_second'] for line in trained):,.0f}"
        for name in ("mfu_exact", "mfu_usual", "data_wait_share"):
            if values := [line[name] for line in trained if name in line]:
                yield f"{name}, median", f"{median(values):.1%}"
        if "peak_memory_bytes" in last:
            yield "peak memory", f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"
    if "parameters" in run.results:
        yield "parameters", f"{run.results['parameters']:,}"
    for metric in HELDOUT:
        for source, (_, values) in run.heldout(metric).items():
            yield f"held-out {metric.replace('_', ' ')} of {source}", f"{values[-1]:.4f}"
    for source, tasks in run.results.items():
        for task, values in tasks.items() if isinstance(tasks, dict) else ():
            for name, value in values.items():
                if isinstance(value, float):
                    yield f"{source} {task}: {name}", f"{value:.4g}"


def _add_curves(page: Page, runs: dict[str, Record]) -> None:
    """A plot for each metric that one of the runs has, held-out losses first, with a line for each run."""
    for metric, unit in HELDOUT.items():
        for source in dict.fromkeys(source for run in runs.values() for source in run.heldout(metric)):
            series = {name: run.series(f"heldout_{metric}/{source}") for name, run in runs.items()}
            title = f"Held-out {metric.replace('_', ' ')} of {source}"
            page.plot(title, _lines(series, dots=True), "training step", unit, log=True)
    by_t = {name: run.velocity_errors_by_t() for name, run in runs.items()}
    for source in dict.fromkeys(source for errors in by_t.values() for source in errors):
        series = {name: errors.get(source, ([], [])) for name, errors in by_t.items()}
        title, unit = f"Held-out velocity error of {source} by t", HELDOUT["velocity_error"]
        page.plot(title, _lines(series, dots=True), "t, from image to noise", unit, log=True)
    if any(by_t.values()):
        page.paragraph(VELOCITY_ERROR, muted=True)
    for metric in HELDOUT:
        if differing := _differing_scales([run for run in runs.values() if run.heldout(metric)], metric):
            sentence = f"The held-out {metric.replace('_', ' ')} cannot be compared between these runs"
            page.paragraph(f"{sentence}: they differ in {' and '.join(differing)}.")
    for metric, (title, unit, log) in CURVES.items():
        series = {}
        for name, run in runs.items():
            steps, values = run.series(metric)
            stride = -(-len(steps) // MAX_POINTS) or 1
            series[name] = steps[::stride], running_mean(values)[::stride]
        page.plot(title, _lines(series), "training step", unit, log)
    page.paragraph("Curves of training steps are running means. Held-out losses are those of the EMA weights.", muted=True)


def _lines(series: dict, dots: bool = False) -> dict[str, Line]:
    """A line for each run, which has the same colour in all plots; beyond the number of colours the lines are dashed."""
    return {
        name: Line(steps, values, SERIES[n % len(SERIES)], dots=dots, dashed=n >= len(SERIES))
        for n, (name, (steps, values)) in enumerate(series.items())
    }


def _differing_scales(runs: Sequence[Record], metric: str) -> list[str]:
    """What makes the values of a held-out metric of these runs incomparable: their SCALES and their held-out documents. Of
    sources that not all runs have, nothing is compared."""
    sources = [run.saved.get("notes", {}).get("sources", {}) for run in runs]
    shared = set.intersection(*map(set, sources)) if runs else ()
    scales = [_scales(run) | {"documents": sorted((name, hashes[name]) for name in shared)}
              for run, hashes in zip(runs, sources, strict=True)]  # fmt: skip
    names = *SCALES[metric], "documents", "data.image_first"
    return [name for name in names if any(scale[name] != scales[0][name] for scale in scales)]


def _scales(run: Record) -> dict[str, object]:
    """The settings of a run on which its held-out values depend, by their names in SCALES. Images before their caption have
    no loss, so `data.image_first` decides which images are measured."""
    digests = {name: run.saved.get(name, {}).get("sha256", "") for name in ("tokenizer", "codec")}
    diffusion = run.run.diffusion
    return digests | {
        "diffusion settings": diffusion, "noise schedule": diffusion.noise_schedule,
        "data.image_first": run.run.data.image_first,
    }  # fmt: skip


def _settings(run: Record) -> dict:
    """The settings of a run, the start of its weights, and the versions."""
    start = run.saved.get("notes", {}).get("start")
    return {**to_json(run.run), **({"start": start} if start else {}), "versions": run.saved.get("versions", {})}


def _flatten(settings: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("model.width", "192") and so on."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
