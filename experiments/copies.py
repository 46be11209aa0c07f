"""Clean copies of images, at small scale: documents of two captioned pictures, and edits.

In the paper's setting text and images that follow an image see it with the noise of its loss. Claim (BAGEL, 2505.14683):
they should see a clean copy, as in a prompt. All rows begin from the run "Transfusion M" of `experiments.scaling` of the
same seed, and train on as many positions: half of them in documents of two captioned pictures, half in edits. The second
picture is the first one with another colour or shape; captions do not say where the object is. In half of the documents
with captions each picture is before its caption.

- "noised context": as in the paper.
- "noise limit 0.5": `data.image_first_max_t` 0.5 limits the noise of pictures that are before their caption. It does not
  reach pictures after their caption, nor edits: these are trained as in the first row.
- "clean copies": `data.clean_copies`. A copy costs positions, so this row sees fewer documents.
- "clean sources": as in the first row, but the first picture of an edit has no noise and no loss (the package's form of
  edits, as in `experiments.editing`), and a tenth of the edits lose their text or their conditions, for guidance. In the
  other rows first pictures of edits are trained without a prompt.

"Captions" are those of second pictures after the first picture with its caption, exactly right; "drawings" are second
pictures after the same and their caption, all right and the object in place. Edits as in `experiments.editing`. The costs of
these rows are in addition to those of the first run.

    python -m experiments.copies
"""

from experiments import lab, multimodal, scaling
from experiments.lab import Claim, Column, Options, Table, Variant
from experiments.noise import LIMIT
from experiments.scenes import PRESETS
from experiments.two_pictures import CAPTIONED, CLEAN_EDITS, EDITS, measure_two_pictures, write_documents

NOISED, LIMITED, COPIES, SOURCES = "noised context", "noise limit 0.5", "clean copies", "clean sources"
TRAINING = (
    "--training.learning-rate", "1e-3", "--training.warmup-steps", "50", "--data.mixture-weights", "1", "1",
    "--data.image-first", "0.5",
)  # fmt: skip
COLUMNS = {
    "captions": Column("captions", ".1%"), "drawings": Column("drawings", ".1%"),
    "drawings_stayed": Column("drawings in place", ".1%"), "right": Column("edits correct", ".1%"),
    "changed": Column("instruction applied", ".1%"), "stayed": Column("object in place", ".1%"),
}  # fmt: skip
COMPARED = "captions", "drawings", "right"  # columns


def build_table(preset: str) -> Table:
    level, base = PRESETS[preset].level, scaling.build_table(preset)
    data = multimodal.data_name(preset, "two-pictures", level)
    (start,) = (variant for variant in base.variants if variant.name == "Transfusion M")
    limit = start.arguments.index(LIMIT)  # which has no effect on clean copies, so each row gives its own
    steps = "--training.steps", str(PRESETS[preset].steps)
    common = *start.arguments[:limit], *start.arguments[limit + 2 :], *steps, *TRAINING

    def make_row(name: str, edits: str, *more: str) -> Variant:
        return Variant(name, (*common, "--data.sources", CAPTIONED, edits, *more), data, start=(base, start))

    def compare(first: str, second: str, columns: tuple[str, ...] = COMPARED) -> list[Claim]:
        return [Claim(f"{first} is better than {second}, by {COLUMNS[name].title}", name, first, second) for name in columns]

    return Table(
        "copies",
        (
            make_row(NOISED, EDITS, LIMIT, "1"),
            make_row(LIMITED, EDITS, LIMIT, "0.5"),
            make_row(COPIES, EDITS, "--data.clean-copies"),
            make_row(SOURCES, CLEAN_EDITS, LIMIT, "1"),
        ),
        COLUMNS,
        measure_two_pictures,
        (
            *compare(COPIES, NOISED), *compare(LIMITED, NOISED, ("captions",)), *compare(COPIES, LIMITED, ("captions",)),
            *compare(SOURCES, NOISED, ("right",)), *compare(COPIES, SOURCES, ("right",)),
        ),
        prepare,
    )  # fmt: skip


def prepare(options: Options) -> None:
    """Prepare the documents with the codec and tokenizer of the first run. Skip what exists."""
    multimodal.prepare_documents(options, "two-pictures", write_documents)


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
