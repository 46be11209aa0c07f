"""What training and evaluation wrote into a run's folder: settings, metrics and results. Imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transfusion.config import Run, from_json
from transfusion.disk import RUN, OpenError, read_json, read_json_lines

Series = tuple[list[int], list[float]]  # steps and values
WINDOW = 9  # points in a running mean
VELOCITY_ERROR = (
    "Velocity error: the mean squared error of the velocity that the prediction of a held-out image stands for, with fixed "
    "noise, at each t from 0.05 to 0.95 and their mean. It does not depend on what a run predicts and how its loss is "
    "weighted: runs with the same codec and noise schedule can be compared by it."
)
RISE = 0.02  # of a held-out loss above its lowest value, as a share of it, from which a run overfits


@dataclass(frozen=True)
class Record:
    """The files of a run's folder; without metrics.jsonl and results.json they are empty."""

    folder: Path
    saved: dict  # run.json
    metrics: list[dict]
    results: dict

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """OpenError when run.json or results.json cannot be read."""
        results = folder / "results.json"
        return cls(folder, read_json(folder / RUN), read_json_lines(folder / "metrics.jsonl"),
                   read_json(results) if results.exists() else {})  # fmt: skip

    @property
    def run(self) -> Run:
        """The settings. One that a later version added has its default, which is what earlier versions did. OpenError when
        they are not settings of this version."""
        try:
            return from_json(Run, self.saved.get("run"))
        except ValueError as error:
            raise OpenError(f"cannot read {self.folder / RUN}: {error}") from None

    @property
    def trained(self) -> list[dict]:
        """The metrics of training steps."""
        return [line for line in self.metrics if "positions_per_second" in line]

    def series(self, name: str) -> Series:
        """The steps that have this metric, and its values."""
        points = [(line["step"], line[name]) for line in self.metrics if name in line]
        return [step for step, _ in points], [value for _, value in points]

    def heldout(self, metric: str) -> dict[str, Series]:
        """A held-out metric, such as text_loss, by source."""
        start = f"heldout_{metric}/"
        names = dict.fromkeys(name for line in self.metrics for name in line if name.startswith(start))
        return {name.removeprefix(start): self.series(name) for name in names}

    def velocity_errors_by_t(self) -> dict[str, tuple[list[float], list[float]]]:
        """The velocity errors of the last evaluation by source: values of t, and the error at each."""
        errors: dict[str, tuple[list[float], list[float]]] = {}
        for name, (_, values) in self.heldout("velocity_error_by_t").items():
            source, _, t = name.rpartition("/t")
            for numbers, value in zip(errors.setdefault(source, ([], [])), (float(t), values[-1]), strict=True):
                numbers.append(value)
        return errors

    def overfitting(self) -> list[str]:
        """A sentence for each held-out loss that is now more than `RISE` above its lowest value."""
        sentences = []
        for kind in ("text", "image"):
            for source, (steps, losses) in self.heldout(f"{kind}_loss").items():
                lowest = min(losses)
                if losses[-1] > (1 + RISE) * lowest:
                    best = steps[losses.index(lowest)]
                    sentences.append(
                        f"The {kind}s of `{source}` overfit: their held-out loss was lowest at step {best:,} ({lowest:.3f}) "
                        f"and is {losses[-1]:.3f} at step {steps[-1]:,}. Train fewer steps, or on more data."
                    )
        return sentences


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of the `WINDOW` values around each one."""
    return [fmean(values[max(0, n - WINDOW // 2) : n + WINDOW // 2 + 1]) for n in range(len(values))]


def format_duration(seconds: float) -> str:
    """3 h 20 min, 7 min 5 s or 12 s, with spaces that do not break."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    words = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return words.replace(" ", "\u00a0")
