"""All that a run can be asked, by task: what it takes is opened before the first one begins."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np

from transfusion.config import QUICK, EvaluationConfig
from transfusion.data.built_in.topics import Topics
from transfusion.data.loader import Source
from transfusion.data.raw import RawText
from transfusion.data.sources import fingerprint, name_sources, open_raw
from transfusion.evaluation.captions import by_words, caption_heldout, caption_pictures
from transfusion.evaluation.clip_score import ClipScore
from transfusion.evaluation.coco import CaptionedPicture, find_missing, middle, read_coco, read_pictures
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.evaluation.detector import InstanceDetector
from transfusion.evaluation.digits import SIDE, draw_digits
from transfusion.evaluation.edits import edit_heldout, is_edit
from transfusion.evaluation.features import Extractor, open_extractor
from transfusion.evaluation.geneval import Prompt, draw_geneval
from transfusion.evaluation.geneval_prompts import published_prompts, read_prompts
from transfusion.evaluation.geneval_shapes import find_things, shapes_prompts
from transfusion.evaluation.image_scores import check_numbers, image_scores
from transfusion.evaluation.multiple_choice import (
    Question,
    choose,
    continuation_questions,
    llama_suite,
    read_questions,
)  # fmt: skip
from transfusion.evaluation.perplexity import bits_per_byte, heldout_topics
from transfusion.evaluation.scenes import AT_ONCE, draw_captions, judge_scenes
from transfusion.evaluation.small_network import SmallNetwork
from transfusion.inference.engine import Engine

SEEN = 2_000  # training pictures that the small network for features learns from
PROMPTS = 25  # of each of GenEval's questions about shapes
PACKAGES = ("open-transfusion", "torch", "numpy", "tokenizers", "transformers", "lm_eval")
COCO = "Karpathy's dataset_coco.json, or COCO's annotations"
NEEDS = {  # by task: options, and what they are
    "clip": {"clip": "the folder of a CLIP model, or owner/name"},
    "coco": {"coco": COCO},
    "coco-images": {"coco": COCO, "features": "Inception's weights (a file), or a vision model"},
}
OPENED = {  # by task, what of the suite it uses
    "images": ("features",), "clip": ("clip",), "coco": ("captioned",), "coco-images": ("captioned", "features", "clip"),
    "geneval": ("detector", "prompts"), "choice": ("questions",),
}  # fmt: skip

Task = Callable[[], dict]


@dataclass
class Suite:
    """A run, what is asked of it, and what several tasks share."""

    engine: Engine
    asked: EvaluationConfig
    drawn: dict[str, tuple[list[str], list[np.ndarray], list[np.ndarray]]] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)  # whose features were used, by task and source

    def __post_init__(self):
        chosen = {name: getattr(self.asked, name) for name in ("sampler", "steps", "guidance_scale")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        run = replace(self.engine.run, generation=self.engine.generation(**chosen))
        if self.asked.data:
            run = replace(
                run, data=name_sources(replace(run.data, prepared=self.asked.data, sources=(), mixture_weights=()))
            )
        self.engine.run = run

    @cached_property
    def sources(self) -> list[Source]:
        """The held-out half of the run's data."""
        data = self.engine.run.data
        if self.engine.opened.notes.get("prepared") and not data.prepared:
            raise ValueError("the data that this run was trained on are not with it: name them, or others like them: --data")
        return open_raw(data, "heldout")

    @cached_property
    def features(self) -> Extractor | None:
        return open_extractor(self.asked.features, self.engine.device) if self.asked.features else None

    @cached_property
    def clip(self) -> ClipScore | None:
        return ClipScore(self.asked.clip, self.engine.device) if self.asked.clip else None

    @cached_property
    def detector(self) -> InstanceDetector | None:
        return InstanceDetector(self.asked.detector, self.asked.clip, self.engine.device) if self.asked.detector else None

    @cached_property
    def prompts(self) -> list[Prompt]:
        """What a detector answers; `shapes` has questions of its own."""
        if not self.asked.detector:
            return []
        return read_prompts(Path(self.asked.prompts)) if self.asked.prompts else published_prompts()

    @cached_property
    def questions(self) -> list[Question] | None:
        if not self.asked.questions:
            return None
        found = read_questions(Path(self.asked.questions))
        if not found:
            raise ValueError(f"{self.asked.questions} holds no question")
        return found

    @cached_property
    def captioned(self) -> list[CaptionedPicture]:
        """COCO's pictures, all of which are there."""
        found = read_coco(Path(self.asked.coco), self.asked.count, self.asked.seed)
        find_missing(found, Path(self.asked.coco), self.asked.pictures)
        return found

    def tasks(self) -> dict[tuple[str, str], Task]:
        """By source and name, what was asked for and can be done. ValueError names what cannot, or is not there."""
        wanted = self.asked.tasks or QUICK
        for name in wanted:
            for option, what in NEEDS.get(name, {}).items():
                if getattr(self.asked, option) is None:
                    raise ValueError(f"the task {name} needs --{option}: {what}")
        if "geneval" in wanted and self.asked.detector and not self.asked.clip:
            raise ValueError("--detector needs --clip, which tells colours: the folder of a CLIP model, or owner/name")
        with_pictures = [name for name in wanted if name.startswith("coco") or name == "geneval" and self.asked.detector]
        if with_pictures and not self.engine.sizes:
            raise ValueError(f"this run does not support images, which these tasks need: {', '.join(with_pictures)}")
        alone = self._tasks_alone()
        found = {pair: task for pair, task in alone.items() if pair[1] in wanted}
        left = [name for name in wanted if name not in {what for _, what in found}]
        for source in self.sources if left else ():
            tasks = self._tasks_of(source)
            found |= {(source.name, name): tasks[name] for name in left if name in tasks}
        missing = [name for name in self.asked.tasks or () if name not in {what for _, what in found}]
        if missing:
            sources = ", ".join(self.engine.run.data.sources)
            hint = " without --detector" if missing[0] == "geneval" else ""
            raise ValueError(f"{sources}: there is nothing in the data of this run for the task {missing[0]}{hint}")
        if not found:
            raise ValueError(f"nothing in the data of this run can be asked for {', '.join(wanted)}")
        for name in dict.fromkeys(what for _, what in found):
            for part in OPENED.get(name, ()):
                getattr(self, part)
        if "coco-images" in wanted:
            check_numbers(len(self.captioned), len(self.captioned))
        return found

    def _tasks_alone(self) -> dict[tuple[str, str], Task]:
        """What asks nothing of the run's data."""
        tasks: dict[tuple[str, str], Task] = {
            ("coco", "coco"): self._coco, ("coco", "coco-images"): self._coco_images,
            ("lm_eval", "llama"): lambda: llama_suite(self.engine),
        }  # fmt: skip
        if self.asked.detector:
            tasks["geneval", "geneval"] = self._geneval
        if self.asked.questions:
            tasks["questions", "choice"] = lambda: choose(self.engine, self.questions)
        return tasks

    def _tasks_of(self, source: Source) -> dict[str, Task]:
        """What can be asked about a source: by its name, or by what its first document holds."""
        first, count, engine = source[0], min(self.asked.count, len(source)), self.engine
        if all(isinstance(part, RawText) for part in first.segments):
            topics = source.name == "topics"
            return {
                "text": lambda: heldout_topics(engine) if topics else bits_per_byte(engine, _texts(source, count)),
                "choice": lambda: self._go_on(Topics("heldout").texts if topics else _texts(source, len(source))),
            }  # fmt: skip
        if is_edit(first):
            return {"edits": lambda: edit_heldout(engine, source, count, self.asked.seed)}
        if not first.pairs:
            return {}
        tasks = {
            "captions": lambda: caption_heldout(engine, source, len(source) if source.name == "digits" else count),
            "conditioning": lambda: conditioning_gap(engine, source, count),
            "images": lambda: self._images(source, count),
            "clip": lambda: self._clip(source),
        }
        if source.name == "digits" and engine.draws_by_default((SIDE, SIDE), 1):
            tasks["drawings"] = lambda: draw_digits(engine, self.asked.seed)[0]
        if source.name == "shapes":
            tasks["drawings"] = lambda: judge_scenes(*self._draw(source)[:2])[0]
            tasks["geneval"] = lambda: self._geneval_of_shapes(source)
        return tasks

    def _go_on(self, texts: list[str]) -> dict:
        """How these texts go on, of several ways."""
        questions = continuation_questions(texts, self.asked.count)
        if not questions:
            raise ValueError("held-out texts are too short, or too few, to ask how they go on: name --questions")
        return choose(self.engine, questions)

    def _draw(self, source: Source) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        """Held-out captions, what is drawn from each, and the pictures that they are of; drawn once for all tasks."""
        if source.name not in self.drawn:
            pairs = [source[n].pair for n in range(min(self.asked.count, len(source)))]
            captions, pictures = map(list, zip(*pairs, strict=True))
            self.drawn[source.name] = captions, draw_captions(self.engine, captions, self.asked.seed), pictures
        return self.drawn[source.name]

    def _images(self, source: Source, count: int) -> dict:
        check_numbers(count, count)
        features = self.features
        if features is None:
            train = next(one for one in open_raw(self.engine.run.data, "train") if one.name == source.name)
            captions, pictures = zip(*(train[n].pair for n in range(min(SEEN, len(train)))), strict=True)
            features = SmallNetwork(source.name, pictures, captions, self.asked.seed)
        self.networks[f"{source.name} images"] = features.name
        _, drawn, real = self._draw(source)
        scores = image_scores(features(real), features(drawn), self.asked.seed)
        return {"features": features.name, **scores}

    def _clip(self, source: Source) -> dict:
        self.networks[f"{source.name} clip"] = self.clip.name
        captions, drawn, real = self._draw(source)
        return {"network": self.clip.name, "score": self.clip(drawn, captions), "score_of_real": self.clip(real, captions)}

    def _geneval_of_shapes(self, source: Source) -> dict:
        prompts = shapes_prompts((source[n].pair[0] for n in range(len(source))), PROMPTS)
        return draw_geneval(self.engine, prompts, find_things, self.asked.seed)[0]

    def _geneval(self) -> dict:
        self.networks["geneval geneval"] = self.detector.name
        return draw_geneval(self.engine, self.prompts, self.detector, self.asked.seed)[0]

    def _coco(self) -> dict:
        said = caption_pictures(self.engine, self._read_pictures())
        references = [one.references for one in self.captioned]
        answers = [{"picture": one.path, "said": text} for one, text in zip(self.captioned, said, strict=True)]
        return {**by_words(said, references), "count": len(said), "answers": answers}

    def _coco_images(self) -> dict:
        """A drawing from the first of each picture's captions, beside the pictures, cut to the size of the drawings; some at
        a time, for 30,000 would not fit into memory."""
        clip, features = self.clip, self.features
        self.networks["coco coco-images"] = " and ".join(network.name for network in (features, clip) if network)
        pictures, size = self._read_pictures(), self.engine.sizes[0]
        real, drawn, scores = [], [], []  # features twice, and CLIP's
        for first in range(0, len(self.captioned), AT_ONCE):
            captions = [one.references[0] for one in self.captioned[first : first + AT_ONCE]]
            real.append(features([middle(pixels, size) for pixels in islice(pictures, len(captions))]))
            made = draw_captions(self.engine, captions, self.asked.seed + first)
            drawn.append(features(made))
            scores += [clip.each(made, captions)] if clip else []
        found = image_scores(np.concatenate(real), np.concatenate(drawn), self.asked.seed)
        about = {"features": features.name, "real_pictures": f"their middle, {size[0]}x{size[1]}"}
        return about | found | ({"clip": float(np.concatenate(scores).mean())} if clip else {})

    def _read_pictures(self) -> Iterator[np.ndarray]:
        return read_pictures(self.captioned, Path(self.asked.coco), self.asked.pictures)

    def manifest(self) -> dict:
        """What another machine needs to repeat the figures, and what they depend on."""
        opened, run = self.engine.opened, self.engine.run
        return {
            "asked": asdict(self.asked), "data": fingerprint(run.data),
            "generation": asdict(run.generation), "captions": "greedy", "networks": dict(self.networks),
            "dtype": str(opened.precision).removeprefix("torch."), "device": str(self.engine.device),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
            "versions": {name.removeprefix("open-"): found for name in PACKAGES if (found := _version(name))},
        }  # fmt: skip


def _texts(source: Source, count: int) -> list[str]:
    """The first texts of a source that holds nothing else."""
    raws = (source[n] for n in range(min(count, len(source))))
    return ["".join(part.text for part in raw.segments if isinstance(part, RawText)) for raw in raws]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
