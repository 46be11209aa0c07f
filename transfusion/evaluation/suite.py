"""All evaluation tasks that a run supports. Their files and networks are opened before the first task begins."""

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
from transfusion.data.loader import Source, read_pairs
from transfusion.data.raw import RawDocument, RawText
from transfusion.data.sources import hash_sources, name_sources, open_raw
from transfusion.evaluation.captions import caption_heldout, caption_images, word_scores
from transfusion.evaluation.clip_score import ClipScore
from transfusion.evaluation.coco import CaptionedImage, center_crop, check_images, read_coco, read_images
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.evaluation.detector import InstanceDetector
from transfusion.evaluation.digits import SIDE, draw_digits
from transfusion.evaluation.edits import edit_heldout, is_edit
from transfusion.evaluation.features import Extractor, open_extractor
from transfusion.evaluation.geneval import Prompt, draw_geneval
from transfusion.evaluation.geneval_prompts import published_prompts, read_prompts
from transfusion.evaluation.geneval_shapes import choose_detector, shapes_prompts
from transfusion.evaluation.image_scores import check_counts, image_scores
from transfusion.evaluation.multiple_choice import (
    Question,
    answer_questions,
    continuation_questions,
    llama_suite,
    read_questions,
)  # fmt: skip
from transfusion.evaluation.perplexity import bits_per_byte, heldout_topics
from transfusion.evaluation.scenes import BATCH_SIZE, caption_scenes, draw_captions, judge_scenes
from transfusion.evaluation.small_network import SmallFeatureNetwork
from transfusion.inference.engine import Engine

NUM_TRAINING_IMAGES = 2_000  # of the small feature network
NUM_PROBED_DOCUMENTS = 16  # held-out documents of a source that decide its tasks
PROMPTS_PER_CATEGORY = 25  # of GenEval on shapes
PACKAGES = ("open-transfusion", "torch", "numpy", "tokenizers", "transformers", "lm_eval")
COCO = "Karpathy's dataset_coco.json, or COCO's annotations"
REQUIRED_OPTIONS = {  # by task: options and their meanings
    "clip": {"clip": "the folder of a CLIP model, or owner/name"},
    "coco": {"coco": COCO},
    "coco-images": {"coco": COCO, "features": "Inception's weights (a file), or a vision model"},
}
RESOURCES = {  # by task: the attributes of the suite that it uses
    "images": ("extractor",), "clip": ("clip",), "coco": ("captioned",), "coco-images": ("captioned", "extractor", "clip"),
    "geneval": ("detector", "prompts"), "choice": ("questions",),
}  # fmt: skip

Task = Callable[[], dict]


@dataclass
class Suite:
    """A run, the configuration of its evaluation, and what several tasks share."""

    engine: Engine
    config: EvaluationConfig
    drawn: dict[str, tuple[list[str], list[np.ndarray], list[np.ndarray]]] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)  # names of the feature networks by source and task

    def __post_init__(self):
        options = {name: getattr(self.config, name) for name in ("sampler", "steps", "guidance_scale")}
        options = {name: value for name, value in options.items() if value is not None}
        run = replace(self.engine.run, generation=self.engine.make_generation_config(**options))
        if self.config.data:
            data = replace(run.data, prepared=self.config.data, sources=(), mixture_weights=())
            run = replace(run, data=name_sources(data))
        self.engine.run = run

    @cached_property
    def sources(self) -> list[Source]:
        """The held-out part of the run's data."""
        data = self.engine.run.data
        if self.engine.opened.notes.get("prepared") and not data.prepared:
            raise ValueError("the training data of this run are not included in it: give them, or similar ones, with --data")
        return open_raw(data, "heldout")

    @cached_property
    def extractor(self) -> Extractor | None:
        return open_extractor(self.config.features, self.engine.device) if self.config.features else None

    @cached_property
    def clip(self) -> ClipScore | None:
        return ClipScore(self.config.clip, self.engine.device) if self.config.clip else None

    @cached_property
    def detector(self) -> InstanceDetector | None:
        source, clip = self.config.detector, self.config.clip
        return InstanceDetector(source, clip, self.engine.device) if source else None

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts for the detector; GenEval on `shapes` has its own."""
        if not self.config.detector:
            return []
        return read_prompts(Path(self.config.prompts)) if self.config.prompts else published_prompts()

    @cached_property
    def questions(self) -> list[Question] | None:
        if not self.config.questions:
            return None
        questions = read_questions(Path(self.config.questions))
        if not questions:
            raise ValueError(f"{self.config.questions} holds no question")
        return questions

    @cached_property
    def captioned(self) -> list[CaptionedImage]:
        """COCO's images, after a check that all exist."""
        captioned = read_coco(Path(self.config.coco), self.config.count, self.config.seed)
        check_images(captioned, Path(self.config.coco), self.config.pictures)
        return captioned

    def tasks(self) -> dict[tuple[str, str], Task]:
        """The requested tasks that the run supports, by source and name. ValueError if one is not supported, or needs an
        option or a file that is missing."""
        config, requested = self.config, self.config.tasks or QUICK
        for name in requested:
            for option, meaning in REQUIRED_OPTIONS.get(name, {}).items():
                if getattr(config, option) is None:
                    raise ValueError(f"the task {name} needs --{option}: {meaning}")
        if "geneval" in requested and config.detector and not config.clip:
            raise ValueError("--detector needs --clip for colours: the folder of a CLIP model, or owner/name")
        with_images = [name for name in requested if name.startswith("coco") or name == "geneval" and config.detector]
        if with_images and not self.engine.sizes:
            raise ValueError(f"this run does not support images, which these tasks need: {', '.join(with_images)}")
        tasks = {pair: task for pair, task in self._tasks_without_source().items() if pair[1] in requested}
        remaining = [name for name in requested if name not in {task for _, task in tasks}]
        for source in self.sources if remaining else ():
            of_source = self._tasks_of_source(source)
            tasks |= {(source.name, name): of_source[name] for name in remaining if name in of_source}
        names = dict.fromkeys(name for _, name in tasks)
        missing = [name for name in config.tasks or () if name not in names]
        if missing:
            sources = ", ".join(self.engine.run.data.sources)
            hint = " without --detector" if missing[0] == "geneval" else ""
            raise ValueError(f"{sources}: there is nothing in the data of this run for the task {missing[0]}{hint}")
        if not tasks:
            raise ValueError(f"the data of this run support none of the tasks {', '.join(requested)}")
        for name in names:
            for resource in RESOURCES.get(name, ()):
                getattr(self, resource)
        if "coco-images" in requested:
            check_counts(len(self.captioned), len(self.captioned))
        return tasks

    def _tasks_without_source(self) -> dict[tuple[str, str], Task]:
        """Tasks that do not use the run's data."""
        tasks: dict[tuple[str, str], Task] = {
            ("coco", "coco"): self._coco, ("coco", "coco-images"): self._coco_images,
            ("lm_eval", "llama"): lambda: llama_suite(self.engine),
        }  # fmt: skip
        if self.config.detector:
            tasks["geneval", "geneval"] = self._geneval
        if self.config.questions:
            tasks["questions", "choice"] = lambda: answer_questions(self.engine, self.questions)
        return tasks

    def _tasks_of_source(self, source: Source) -> dict[str, Task]:
        """Tasks that a source supports, by its name or by its first documents."""
        first = [source[n] for n in range(min(NUM_PROBED_DOCUMENTS, len(source)))]
        count, engine, tasks = min(self.config.count, len(source)), self.engine, {}
        if any(map(is_text, first)):
            is_topics = source.name == "topics"
            tasks |= {
                "text": lambda: heldout_topics(engine) if is_topics else bits_per_byte(engine, _texts(source, count)),
                "choice": lambda: self._choice(Topics("heldout").texts if is_topics else _texts(source, len(source))),
            }  # fmt: skip
        if any(map(is_edit, first)):
            tasks["edits"] = lambda: edit_heldout(engine, source, count, self.config.seed)
        if all(document.pair is None for document in first):
            return tasks
        tasks |= {
            "captions": lambda: caption_heldout(engine, source, len(source) if source.name == "digits" else count),
            "conditioning": lambda: conditioning_gap(engine, source, count),
            "images": lambda: self._images(source, count),
            "clip": lambda: self._clip(source),
        }
        if source.name == "digits" and engine.is_default_image((SIDE, SIDE), 1):
            tasks["drawings"] = lambda: draw_digits(engine, self.config.seed)[0]
        if source.name == "shapes":
            tasks["captions"] = lambda: caption_scenes(engine, source, count)
            tasks["drawings"] = lambda: judge_scenes(*self._draw(source)[:2])[0]
            tasks["geneval"] = lambda: self._geneval_of_shapes(source)
        return tasks

    def _choice(self, texts: list[str]) -> dict:
        """Multiple choice of the continuations of held-out texts."""
        questions = continuation_questions(texts, self.config.count)
        if not questions:
            raise ValueError("the held-out texts are too short or too few for multiple choice: give --questions")
        return answer_questions(self.engine, questions)

    def _draw(self, source: Source) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        """Held-out captions, an image drawn from each, and the real images; drawn once for all tasks."""
        if source.name not in self.drawn:
            _, captions, real = map(list, zip(*read_pairs(source, self.config.count), strict=True))
            self.drawn[source.name] = captions, draw_captions(self.engine, captions, self.config.seed), real
        return self.drawn[source.name]

    def _images(self, source: Source, count: int) -> dict:
        check_counts(count, count)
        extractor = self.extractor
        if extractor is None:
            train = next(it for it in open_raw(self.engine.run.data, "train") if it.name == source.name)
            _, captions, images = zip(*read_pairs(train, NUM_TRAINING_IMAGES), strict=True)
            extractor = SmallFeatureNetwork(source.name, images, captions, self.config.seed)
        self.networks[f"{source.name} images"] = extractor.name
        _, drawn, real = self._draw(source)
        return {"features": extractor.name, **image_scores(extractor(real), extractor(drawn), self.config.seed)}

    def _clip(self, source: Source) -> dict:
        self.networks[f"{source.name} clip"] = self.clip.name
        captions, drawn, real = self._draw(source)
        return {"network": self.clip.name, "score": self.clip(drawn, captions), "score_of_real": self.clip(real, captions)}

    def _geneval_of_shapes(self, source: Source) -> dict:
        prompts = shapes_prompts((caption for _, caption, _ in read_pairs(source, len(source))), PROMPTS_PER_CATEGORY)
        return draw_geneval(self.engine, prompts, choose_detector(prompts), self.config.seed)[0]

    def _geneval(self) -> dict:
        self.networks["geneval geneval"] = self.detector.name
        return draw_geneval(self.engine, self.prompts, self.detector, self.config.seed)[0]

    def _coco(self) -> dict:
        predictions = caption_images(self.engine, self._read_images())
        references = [image.references for image in self.captioned]
        pairs = zip(self.captioned, predictions, strict=True)
        answers = [{"picture": image.path, "prediction": prediction} for image, prediction in pairs]
        return {**word_scores(predictions, references), "count": len(predictions), "answers": answers}

    def _coco_images(self) -> dict:
        """An image drawn from the first caption of each COCO image, compared with the COCO images, which are cropped to the
        size of the drawings. In batches: 30,000 images do not fit into memory."""
        clip, extractor = self.clip, self.extractor
        self.networks["coco coco-images"] = " and ".join(network.name for network in (extractor, clip) if network)
        images, size = self._read_images(), self.engine.sizes[0]
        real_features, drawn_features, clip_scores = [], [], []
        for first in range(0, len(self.captioned), BATCH_SIZE):
            captions = [image.references[0] for image in self.captioned[first : first + BATCH_SIZE]]
            real_features.append(extractor([center_crop(pixels, size) for pixels in islice(images, len(captions))]))
            drawn = draw_captions(self.engine, captions, self.config.seed + first)
            drawn_features.append(extractor(drawn))
            clip_scores += [clip.score_each(drawn, captions)] if clip else []
        scores = image_scores(np.concatenate(real_features), np.concatenate(drawn_features), self.config.seed)
        about = {"features": extractor.name, "real_pictures": f"their middle, {size[0]}x{size[1]}"}
        return about | scores | ({"clip": float(np.concatenate(clip_scores).mean())} if clip else {})

    def _read_images(self) -> Iterator[np.ndarray]:
        return read_images(self.captioned, Path(self.config.coco), self.config.pictures)

    def manifest(self) -> dict:
        """The settings that reproduce the figures, and the environment that they depend on."""
        opened, run = self.engine.opened, self.engine.run
        return {
            "config": asdict(self.config), "data": hash_sources(run.data) if run.data.prepared else None,
            "generation": asdict(run.generation), "captions": "greedy", "networks": dict(self.networks),
            "dtype": str(opened.precision).removeprefix("torch."), "device": str(self.engine.device),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
            "versions": {name.removeprefix("open-"): number for name in PACKAGES if (number := _version(name))},
        }  # fmt: skip


def _texts(source: Source, count: int) -> list[str]:
    """The texts of the first documents of text alone."""
    documents = (document for n in range(len(source)) if is_text(document := source[n]))
    return ["".join(part.text for part in document.segments) for document in islice(documents, count)]


def is_text(raw: RawDocument) -> bool:
    """Whether all its segments are text."""
    return all(isinstance(part, RawText) for part in raw.segments)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
