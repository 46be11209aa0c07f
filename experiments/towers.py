"""Weights of their own for images, at small scale: from the start, and beside a frozen language model.

Neither is in the paper. Claim (Mixture-of-Transformers, 2411.04996): in the paper's setting a 7B model with weights of their
own for images draws as well after a third of the FLOPs, and its text is as good. Rows none, feed_forward and full have these
`model.untied`; they train on the same data for the same steps, with equal FLOPs per position. A row of fewer steps has its
whole learning rate schedule in them.

Claim (LMFusion, 2412.15188): a language model learns images with weights of their own while its text stays as it is. Here
the language model is Table 4's run on text alone, which has never read a caption. It is then trained on captioned images
alone: all its weights ("fine-tuned"), image weights that begin as copies of the frozen ones of text ("frozen tower"), or
patch layers and additions of rank 16 to the matrices of the blocks, all else frozen ("LoRA").
The costs of these rows are in addition to those of the language model. "Changed logits" are those of held-out text, over the
ids of text, that this training changed in any bit. Bits per byte can change without them, since the softmax also has the ids
that mark images.

    python -m experiments.towers
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from experiments import lab, multimodal
from experiments.judge import LEVEL, NUM_RESAMPLES, Interval
from experiments.lab import Claim, Column, Options, Table, Variant
from experiments.multimodal import COLUMNS, make_variant, measure
from experiments.scenes import PRESETS

SHARED, FEED_FORWARD, FULL = "none", "feed_forward", "full"  # rows, by `model.untied`
FEWER_STEPS = {0.25: "full, a quarter of the steps", 0.5: "full, half of the steps"}  # rows by their share of the steps
LANGUAGE_MODEL, FINE_TUNED, FROZEN, LORA = "language model", "fine-tuned", "frozen tower", "LoRA"
WAYS = {  # to train the language model on captioned images
    FINE_TUNED: (),
    FROZEN: ("--model.untied", "full", "--training.text-lr-scale", "0"),
    LORA: ("--lora.rank", "16", "--lora.on", "all"),
}  # fmt: skip


def build_table(preset: str) -> Table:
    steps, level = PRESETS[preset].steps, PRESETS[preset].level
    language_model = make_variant(preset, level, LANGUAGE_MODEL, "llama")
    pairs = "--data.sources", "shapes", "--data.mixture-weights", "1", "--training.steps", str(steps)
    start = Table("language model", (language_model,), {}, measure(level)), language_model

    def make_row(name: str, *more: str) -> Variant:
        return make_variant(preset, level, name, "transfusion", "M", *more)

    def compare(columns: Sequence[str], first: str, second: str) -> list[Claim]:
        return [Claim(f"{first} is better than {second}, by {COLUMNS[name].title}", name, first, second) for name in columns]

    return Table(
        "towers",
        (
            make_row(SHARED),
            *(make_row(untied, "--model.untied", untied) for untied in (FEED_FORWARD, FULL)),
            *(make_row(name, "--model.untied", "full", "--training.steps", str(round(2 * steps * share)))
              for share, name in FEWER_STEPS.items()),
            language_model,
            *(replace(make_row(name, *pairs, *more), start=start) for name, more in WAYS.items()),
        ),
        {
            **{name: COLUMNS[name] for name in ("bits_per_byte", "right", "attributes", "fid", "captions")},
            "changed_logits": Column("changed logits", ",.0f", "lower"), "positions": COLUMNS["positions"],
        },
        measure(level),
        (
            *(claim for name in (FEED_FORWARD, FULL)
              for claim in compare(("bits_per_byte", "right", "captions"), name, SHARED)),
            *(claim for name in FEWER_STEPS.values() for claim in compare(("right",), name, SHARED)),
            *(claim for name in WAYS for claim in compare(("bits_per_byte",), LANGUAGE_MODEL, name)),
            *(claim for name in WAYS if name != FINE_TUNED
              for claim in (
                  Claim(f"{name} is non-inferior to {FINE_TUNED}, by images correct within 10 %", "right", name, FINE_TUNED,
                        margin=0.1),
                  *compare(("bits_per_byte", "captions"), name, FINE_TUNED),
              )),
        ),
        partial(multimodal.prepare, level),
    )  # fmt: skip


def describe_steps(options: Options) -> str:
    """After which share of its steps `full` reaches the images correct of `none` at the end, as Markdown."""
    table = build_table(options.preset)
    rows = {row.name: [cell["right"] for cell in lab.read_cells(options, table, row).values() if "right" in cell]
            for row in table.variants}  # fmt: skip
    curve = {share: rows[name] for share, name in (*FEWER_STEPS.items(), (1.0, FULL))}
    if not all((rows[SHARED], *curve.values())):
        return f"After how many steps {FULL} draws as well as {SHARED} at the end: rows not run yet.\n"
    share = share_of_steps(curve, rows[SHARED])
    estimate, low, high = (f"{value:.2f}" if value <= 1 else "above 1" for value in (share.estimate, share.low, share.high))
    bounds = "no interval: one seed of each row" if math.isnan(share.low) else f"95 % interval {low} to {high}"
    return (
        f"{FULL} reaches the images correct of {SHARED} after **{estimate}** of its steps ({bounds}): where the line from 0 "
        "through the rows of fewer steps does; a bootstrap over seeds.\n"
    )


def share_of_steps(curve: Mapping[float, Sequence[float]], target: Sequence[float]) -> Interval:
    """Where the line from 0 through the means of `curve`, values of seeds by share of the steps in ascending order, first
    reaches the mean of `target`; inf if nowhere. The interval is a bootstrap over seeds, as in `parity`: each mean moves by
    Student's t times s / sqrt(number of its seeds), s pooled over all rows. Without two seeds anywhere it is NaN."""
    rows = [np.array(values) for values in (*curve.values(), target)]
    means, counts = np.array([row.mean() for row in rows]), np.array([len(row) for row in rows])  # (S + 1,)
    estimate, degrees = _cross([*curve], means), int((counts - 1).sum())
    if not degrees:
        return Interval(estimate, math.nan, math.nan)
    std = math.sqrt(sum(((row - row.mean()) ** 2).sum() for row in rows) / degrees)
    noise = np.random.default_rng(0).standard_t(degrees, (NUM_RESAMPLES, len(rows))) * std / np.sqrt(counts)
    crossings = [_cross([*curve], row) for row in means + noise]
    low, high = np.quantile(crossings, [LEVEL / 2, 1 - LEVEL / 2], method="inverted_cdf")  # never between a number and inf
    return Interval(estimate, float(low), float(high))


def _cross(shares: Sequence[float], means: np.ndarray) -> float:
    """The share at which the line from (0, 0) through the means first reaches the last one, the target; inf if nowhere."""
    *line, target = means.clip(min=0).tolist()
    x, y = 0.0, 0.0
    for share, mean in zip(shares, line, strict=True):
        if mean >= target > y:
            return x + (share - x) * (target - y) / (mean - y)
        x, y = share, mean
    return math.inf if target else 0.0


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
    print(describe_steps(options), end="")
