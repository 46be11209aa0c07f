"""The data set: 1,911 emoji drawn by four groups of artists, on white, with captions "pizza, openmoji".

    python -m experiments.emoji.dataset data/emoji            # fetches four packages with npm, about 200 MB
    transfusion data prepare data/emoji/pictures data/emoji/interleaved --out ...

OUT/pictures/train and OUT/pictures/validation hold the pictures and a metadata.jsonl each. A *concept* is what a picture
shows, in all styles; a *cell* is one concept in one style. `validation` holds

- 3 % of the concepts in all styles (`heldout: concept`): the model never saw the concept;
- 10 % of the other cells (`heldout: cell`), at most one of a concept: the model saw the concept in other styles.

Emoji that most of their styles draw with equal pixels (flags of one country) are one concept, with the shortest of their
names. A picture that a style uses for two concepts is left out: its caption would be one of two.

Two more sources are made of the same pictures, with train.jsonl and validation.jsonl each:

- OUT/interleaved: documents of two to four captioned pictures of one concept, in random order of the styles;
- OUT/edits: a picture, "in the style of STYLE", and the picture of the same concept in that style.

Their training documents hold training cells alone, their validation documents held-out concepts alone.

Pictures are under CC BY-SA 4.0, the licence of OpenMoji; NOTICE names the four sources.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import tyro
from PIL import Image

from experiments.emoji.packages import DataError, Drawing, Emoji, fetch, read_drawings
from transfusion.seeding import derive_seed, uniform_from

HELDOUT_CONCEPTS = 0.03
HELDOUT_CELLS = 0.10
INTERLEAVED_PER_CONCEPT = 2

Series = Mapping[str, Sequence[tuple[str, str]]]  # concept -> the styles that have it, each with its picture's path


@dataclass(frozen=True)
class Options:
    out: tyro.conf.Positional[Path] = Path("data/emoji")
    """Folder to write; it must be new or empty."""
    packages: Path = Path("data/emoji-packages")
    """Folder of the four archives of `npm pack`; missing ones are fetched into it."""
    side: int = 32
    """Height and width of the pictures in pixels."""


@dataclass(frozen=True)
class Cell:
    """One concept in one style."""

    concept: str
    style: str
    is_flag: bool
    code: str
    image: Image.Image


def main(options: Options) -> None:
    if options.out.exists() and any(options.out.iterdir()):
        raise DataError(f"{options.out} is not empty: delete it, or give another folder")
    fetch(options.packages)
    drawings = list(read_drawings(options.packages))
    cells = to_cells(drawings)
    counts = write(cells, options.out, options.side)
    print(f"{len(drawings):,} drawings, {len(drawings) - len(cells)} left out as copies or under two names; "
          f"{len({cell.concept for cell in cells}):,} concepts")  # fmt: skip
    print("; ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))
    print(f"wrote {options.out}")


def to_cells(drawings: Sequence[Drawing]) -> list[Cell]:
    """One cell for each concept and style, in the order of the drawings."""
    concepts = merge_emoji(drawings)
    shown_as = defaultdict(set)  # the concepts of one picture
    for drawing in drawings:
        shown_as[drawing.style, drawing.identity].add(concepts[drawing.emoji])
    cells = {}
    for drawing in sorted(drawings, key=lambda drawing: drawing.emoji.name != concepts[drawing.emoji]):  # the namesake first
        if len(shown_as[drawing.style, drawing.identity]) == 1:
            concept, emoji = concepts[drawing.emoji], drawing.emoji
            cell = Cell(concept, drawing.style, emoji.is_flag, emoji.code, drawing.image)
            cells.setdefault((concept, drawing.style), cell)
    return list(cells.values())


def merge_emoji(drawings: Iterable[Drawing]) -> dict[Emoji, str]:
    """Each emoji -> the name of its concept. Two emoji are one concept when most styles that have both draw them alike."""
    pictures, alike = defaultdict(dict), defaultdict(list)
    for drawing in drawings:
        pictures[drawing.emoji][drawing.style] = drawing.identity
        alike[drawing.style, drawing.identity].append(drawing.emoji)
    groups = {emoji: {emoji} for emoji in pictures}
    for same in alike.values():
        for first, second in combinations(same, 2):
            shared = pictures[first].keys() & pictures[second].keys()
            equal = sum(pictures[first][style] == pictures[second][style] for style in shared)
            if 2 * equal > len(shared) and groups[first] is not groups[second]:
                groups[first] |= groups[second]
                for emoji in groups[second]:
                    groups[emoji] = groups[first]
    return {emoji: min(sorted(member.name for member in group), key=len) for emoji, group in groups.items()}


def assign_splits(cells: Iterable[Cell]) -> dict[tuple[str, str], str]:
    """(concept, style) -> "train", "cell" or "concept" (held out). The name and styles of a concept decide: other concepts
    change nothing."""
    styles = defaultdict(list)
    for cell in cells:
        styles[cell.concept].append(cell.style)
    splits = {}
    for concept, drawn in styles.items():
        whole = uniform_from("emoji concept", concept) < HELDOUT_CONCEPTS
        one = len(drawn) > 1 and uniform_from("emoji cell", concept) < HELDOUT_CELLS * len(drawn)
        chosen = sorted(drawn)[int(uniform_from("emoji style", concept) * len(drawn))] if one else None
        splits |= {(concept, style): "concept" if whole else "cell" if style == chosen else "train" for style in drawn}
    return splits


def write(cells: Sequence[Cell], out: Path, side: int) -> Counter:
    """Write the pictures and the three sources; the number of cells of each kind."""
    splits = assign_splits(cells)
    rows = {"train": [], "validation": []}
    series = {"train": defaultdict(list), "validation": defaultdict(list)}  # split -> concept -> (style, path)
    for cell in cells:
        kind = splits[cell.concept, cell.style]
        split, name = "train" if kind == "train" else "validation", f"{cell.style}-{cell.code}.png"
        row = {"file_name": name, "text": f"{cell.concept}, {cell.style}",
               "concept": cell.concept, "style": cell.style, "flag": cell.is_flag}  # fmt: skip
        rows[split].append(row if kind == "train" else row | {"heldout": kind})
        if kind != "cell":
            series[split][cell.concept].append((cell.style, f"../pictures/{split}/{name}"))
        (out / "pictures" / split).mkdir(parents=True, exist_ok=True)
        cell.image.resize((side, side), Image.Resampling.LANCZOS).save(out / "pictures" / split / name)
    for split in rows:
        write_lines(out / "pictures" / split / "metadata.jsonl", rows[split])
        write_lines(out / "interleaved" / f"{split}.jsonl", interleave(series[split]))
        write_lines(out / "edits" / f"{split}.jsonl", pair_edits(series[split]))
    return Counter(splits.values())


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def interleave(series: Series) -> Iterator[dict]:
    """INTERLEAVED_PER_CONCEPT documents of each concept that has two styles: two of them or more, each after its caption."""
    for concept, drawn in series.items():
        rng = random.Random(derive_seed("emoji interleaved", concept))
        for _ in range(INTERLEAVED_PER_CONCEPT if len(drawn) > 1 else 0):
            chosen = rng.sample(drawn, rng.randint(2, len(drawn)))
            text = "".join(f"{concept}, {style}<image>" for style, _ in chosen)
            yield {"text": text, "images": [path for _, path in chosen]}


def pair_edits(series: Series) -> Iterator[dict]:
    """Every ordered pair of styles of each concept."""
    for drawn in series.values():
        for (_, source), (style, target) in permutations(drawn, 2):
            yield {"source": source, "instruction": f"in the style of {style}", "target": target}


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except DataError as error:
        sys.exit(f"error: {error}")
