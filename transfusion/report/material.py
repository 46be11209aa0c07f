"""What the sections of a report share: the record of the run, the opened model, its held-out data, and its drawings."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from transfusion.data.built_in.digits import NAMES
from transfusion.data.loader import Source, read_pairs
from transfusion.evaluation.scenes import draw_captions, draw_scenes
from transfusion.inference.engine import Engine
from transfusion.inference.request import Request
from transfusion.report.record import Record

DRAWINGS = 10  # of each digit
NUM_SCENES = 64
GALLERY = 16  # held-out pictures of a source, each beside a drawing from its caption
PICTURE = {"digits": "scan", "shapes": "scene"}  # the word for an image of the source


@dataclass(frozen=True)
class Material:
    """The data of a report."""

    record: Record
    engine: Engine
    sources: dict[str, Source]  # held out

    @property
    def pictured(self) -> list[Source]:
        """Sources of captioned images."""
        return [source for source in self.sources.values() if any(read_pairs(source, 1))]

    @cached_property
    def digits(self) -> list[tuple[str, list[np.ndarray]]]:
        """Each digit's name and the images drawn from it."""
        answers = self.engine.generate([Request(parts=(name,), num_images=DRAWINGS) for name in NAMES])
        return [(name, [draw.parts[0] for draw in draws]) for name, draws in zip(NAMES, answers, strict=True)]

    @cached_property
    def scenes(self) -> list[tuple[str, np.ndarray, bool]]:
        """One image for each of the first held-out captions: (caption, pixels, is it right?)."""
        return draw_scenes(self.engine, self.sources["shapes"], NUM_SCENES)[1]

    @cached_property
    def galleries(self) -> dict[str, list[tuple[str, np.ndarray, np.ndarray]]]:
        """For each source of captioned images: (caption, held-out picture, drawing) of the first; drawing n has seed n."""
        galleries = {}
        for source in self.pictured:
            _, captions, pictures = zip(*read_pairs(source, GALLERY), strict=True)
            if source.name == "shapes":
                drawings = [pixels for _, pixels, _ in self.scenes[: len(captions)]]
            else:
                drawings = draw_captions(self.engine, captions)
            galleries[source.name] = list(zip(captions, pictures, drawings, strict=True))
        return galleries

    def result(self, source: str, task: str) -> dict:
        """The values of a task in results.json; empty when they are missing."""
        return self.record.results.get(source, {}).get(task, {}) if source in self.sources else {}
