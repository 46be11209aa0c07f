"""All that a run can be asked; the answers go to results.json, with what it takes to repeat them."""

import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np

from transfusion.checkpoint.open import is_exported, newest
from transfusion.config import QUICK, EvaluationConfig, from_json
from transfusion.data.loader import Source
from transfusion.data.raw import RawText
from transfusion.data.sources import open_raw
from transfusion.data.topics import Topics
from transfusion.disk import OpenError, read_json, write_json
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.coco import Captioned, read_coco, read_pictures
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.evaluation.digits import draw_digits
from transfusion.evaluation.perplexity import bits_per_byte, heldout_topics
from transfusion.evaluation.scenes import draw_captions, judge_scenes
from transfusion.inference.engine import Engine

SEEN = 2_000  # training pictures that the small network for features learns from
PROMPTS = 25  # of each of GenEval's questions about shapes
CIRCUMSTANCES = "dtype", "device", "machine", "python", "versions"  # of a manifest: they may change the last digits
CLOSE = 1e-6  # relative: figures that lie no farther apart agree
PACKAGES = ("transfusion", "torch", "numpy", "tokenizers", "transformers", "lm_eval")

COCO = "Karpathy's dataset_coco.json, or COCO's annotations"
NEEDS = (  # task or option, the option that it needs, what that is
    ("clip", "clip", "the folder of a CLIP model, or owner/name"), ("coco", "coco", COCO), ("coco-images", "coco", COCO),
    ("coco-images", "features", "Inception's weights (a file), or a vision model"),
    ("detector", "clip", "the folder of a CLIP model, or owner/name, which tells colours"),
)  # fmt: skip
AT_ONCE = 64  # pictures of COCO: 30,000 would not fit into memory

Say = Callable[[str], None]


def evaluate(engine: Engine, folder: Path, asked: EvaluationConfig | None = None, say: Say = print) -> dict:
    """Measure a run, write `results.json` into its folder, and return it. ValueError when it cannot be asked that."""
    results = measure(engine, folder, asked or EvaluationConfig(), say)
    write_json(folder / "results.json", results)
    return results


def measure(engine: Engine, folder: Path, asked: EvaluationConfig, say: Say = print) -> dict:
    """All figures that were asked for, by source and task, and the manifest; nothing is written."""
    suite = Suite(engine, asked)
    tasks = suite.tasks()
    results: dict = {"run": engine.run.name, "step": engine.opened.step, "parameters": engine.opened.parameters}
    if not is_exported(folder):
        state = read_json(newest(folder) / "state.json")
        results |= {"training_seconds": round(state["seconds"]), "training_positions": state["seen"]}
    for (source, what), task in tasks.items():
        results.setdefault(source, {})[what] = values = task()
        say(f"{source} {what}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items() if isinstance(v, float)))
    results["manifest"] = suite.manifest()
    return results


def repeat(engine: Engine, folder: Path, path: Path, say: Say = print) -> tuple[list[str], list[str]]:
    """Measure again what a results.json holds, by its manifest: in what the figures differ, in words, and what else is not
    as it was, which may be why. OpenError when it holds no manifest that can be followed."""
    before = read_json(path)
    try:
        asked = from_json(EvaluationConfig, before["manifest"]["asked"])
    except (KeyError, TypeError, ValueError) as error:
        raise OpenError(f"{path} does not say how it was measured: {error}") from None
    now = measure(engine, folder, asked, say)
    others = before["manifest"].get("data") != now["manifest"]["data"]
    found = (["the run's data are others than they were"] if others else []) + list(differences(before, now))
    then, today = ({name: one["manifest"].get(name) for name in CIRCUMSTANCES} for one in (before, now))
    return found, list(differences(then, today))


def differences(before: object, now: object, where: str = ""):
    """What two results say differently, but for the machine they were made on and how long training took."""
    if where in ("manifest", "training_seconds"):
        return
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
        self.engine.run = replace(self.engine.run, generation=self.engine.generation(**chosen))

    def tasks(self) -> dict[tuple[str, str], Callable[[], dict]]:
        """By source and name, what was asked for and can be done. ValueError names what cannot."""
        wanted = self.asked.tasks or QUICK
        found: dict[tuple[str, str], Callable[[], dict]] = {}
        for source in open_raw(self.engine.run.data, "heldout"):
            tasks = self._tasks_of(source)
            found |= {(source.name, name): tasks[name] for name in wanted if name in tasks}
        for name, task in (("coco", self._coco), ("coco-images", self._coco_images)):
            if name in wanted:
                found["coco", name] = task
        if "geneval" in wanted and self.asked.detector is not None:
            found["geneval", "geneval"] = self._geneval_published
        if "llama" in wanted:
            found["lm_eval", "llama"] = self._llama
        missing = [name for name in self.asked.tasks or () if name not in {what for _, what in found}]
        if missing:
            sources = ", ".join(self.engine.run.data.sources)
            hint = " without --detector" if missing[0] == "geneval" else ""
            raise ValueError(f"{sources}: there is nothing in the data of this run for the task {missing[0]}{hint}")
        if not found:
            raise ValueError(f"nothing in the data of this run can be asked for {', '.join(wanted)}")
        asked_for = {*wanted, "detector"} if self.asked.detector else wanted
        for name, option, what in NEEDS:
            if name in asked_for and getattr(self.asked, option) is None:
                raise ValueError(f"{name} needs --{option}: {what}")
        return found

    def _tasks_of(self, source: Source) -> dict[str, Callable[[], dict]]:
        """What can be asked about a source: by its name, or by what its first document holds."""
        first, count, engine = source[0], min(self.asked.count, len(source)), self.engine
        if all(isinstance(part, RawText) for part in first.segments):
            topics = source.name == "topics"
            return {
                "text": lambda: heldout_topics(engine) if topics else bits_per_byte(engine, _texts(source, count)),
                "choice": lambda: self._choice(source),
            }
        if not first.pairs:
            return {}
        tasks = {
            "captions": lambda: caption_heldout(engine, source, len(source) if source.name == "digits" else count),
            "conditioning": lambda: conditioning_gap(engine, source, count),
            "images": lambda: self._images(source),
            "clip": lambda: self._clip(source),
        }
        match source.name:
            case "digits":
                tasks["drawings"] = lambda: draw_digits(engine, self.asked.seed)[0]
            case "shapes":
                tasks["drawings"] = lambda: judge_scenes(*self._draw(source)[:2])[0]
                tasks["geneval"] = lambda: self._geneval(source)
        return tasks

    def _draw(self, source: Source) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        """Held-out captions, what is drawn from each, and the pictures that they are of; drawn once for all tasks."""
        if source.name not in self.drawn:
            pairs = [source[n].pair for n in range(min(self.asked.count, len(source)))]
            captions, pictures = map(list, zip(*pairs, strict=True))
            self.drawn[source.name] = captions, draw_captions(self.engine, captions, self.asked.seed), pictures
        return self.drawn[source.name]

    def _images(self, source: Source) -> dict:
        from transfusion.evaluation.features import open_extractor
        from transfusion.evaluation.image_scores import image_scores
        from transfusion.evaluation.small_network import SmallNetwork

        if self.asked.features is None:
            train = next(one for one in open_raw(self.engine.run.data, "train") if one.name == source.name)
            captions, pictures = zip(*(train[n].pair for n in range(min(SEEN, len(train)))), strict=True)
            features = SmallNetwork(source.name, pictures, captions, self.asked.seed)
        else:
            features = open_extractor(self.asked.features, self.engine.device)
        self.networks[f"{source.name} images"] = features.name
        _, drawn, real = self._draw(source)
        scores = image_scores(features(real), features(drawn), self.asked.seed)
        return {"features": features.name, "real_pictures": self._pictures(), **scores}

    def _clip(self, source: Source) -> dict:
        from transfusion.evaluation.clip_score import ClipScore

        network = ClipScore(self.asked.clip, self.engine.device)
        self.networks[f"{source.name} clip"] = network.name
        captions, drawn, real = self._draw(source)
        return {"network": network.name, "score": network(drawn, captions), "score_of_real": network(real, captions)}

    def _choice(self, source: Source) -> dict:
        from transfusion.evaluation.multiple_choice import choose, continuation_questions, read_questions

        if self.asked.questions is not None:
            return choose(self.engine, read_questions(Path(self.asked.questions)))
        texts = Topics("heldout").texts if source.name == "topics" else _texts(source, len(source))
        return choose(self.engine, continuation_questions(texts, self.asked.count))

    def _geneval(self, source: Source) -> dict:
        from transfusion.evaluation.geneval import draw_geneval
        from transfusion.evaluation.geneval_shapes import find_things, shapes_prompts

        prompts = shapes_prompts((source[n].pair[0] for n in range(len(source))), PROMPTS)
        return draw_geneval(self.engine, prompts, find_things, self.asked.seed)[0]

    def _geneval_published(self) -> dict:
        from transfusion.evaluation.detector import InstanceDetector
        from transfusion.evaluation.geneval import draw_geneval
        from transfusion.evaluation.geneval_prompts import published_prompts

        detect = InstanceDetector(self.asked.detector, self.asked.clip, self.engine.device)
        self.networks["geneval geneval"] = detect.name
        return draw_geneval(self.engine, published_prompts(), detect, self.asked.seed)[0]

    def _coco(self) -> dict:
        from transfusion.evaluation.captions import by_words, caption_pictures

        captioned, pictures = self._read_coco()
        said = caption_pictures(self.engine, pictures)
        references = [one.references for one in captioned]
        answers = [{"picture": one.path, "said": text} for one, text in zip(captioned, said, strict=True)]
        return {**by_words(said, references), "count": len(said), "answers": answers}

    def _coco_images(self) -> dict:
        """A drawing from the first of each picture's captions, beside the pictures."""
        from transfusion.evaluation.clip_score import ClipScore
        from transfusion.evaluation.features import open_extractor
        from transfusion.evaluation.image_scores import image_scores

        captioned, pictures = self._read_coco()
        features = open_extractor(self.asked.features, self.engine.device)
        clip = ClipScore(self.asked.clip, self.engine.device) if self.asked.clip else None
        self.networks["coco coco-images"] = " and ".join(network.name for network in (features, clip) if network)
        real, drawn, scores = [], [], []  # features twice, and CLIP's
        for first in range(0, len(captioned), AT_ONCE):
            captions = [one.references[0] for one in captioned[first : first + AT_ONCE]]
            made = draw_captions(self.engine, captions, self.asked.seed + first)
            drawn.append(features(made))
            real.append(features(list(islice(pictures, len(made)))))
            scores += [clip.each(made, captions)] if clip else []
        found = image_scores(np.concatenate(real), np.concatenate(drawn), self.asked.seed)
        return {"features": features.name, **found} | ({"clip": float(np.concatenate(scores).mean())} if clip else {})

    def _read_coco(self) -> tuple[list[Captioned], Iterator[np.ndarray]]:
        path = Path(self.asked.coco)
        captioned = read_coco(path, self.asked.count)
        return captioned, read_pictures(captioned, path, self.asked.pictures)

    def _llama(self) -> dict:
        from transfusion.evaluation.multiple_choice import llama_suite

        return llama_suite(self.engine)

    def manifest(self) -> dict:
        """What another machine needs to repeat the figures, and what they depend on."""
        opened = self.engine.opened
        return {
            "asked": asdict(self.asked), "data": opened.notes.get("prepared"), "real_pictures": self._pictures(),
            "generation": asdict(self.engine.run.generation),
            "captions": "greedy", "networks": self.networks,
            "dtype": str(opened.precision).removeprefix("torch."), "device": str(self.engine.device),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
        }  # fmt: skip

    def _pictures(self) -> str:
        """What stands for real pictures: of prepared data, which hold nothing else, what the codec gives back."""
        return f"as {self.engine.opened.codec.kind} gives them back" if self.engine.run.data.prepared else "as they are"


def _texts(source: Source, count: int) -> list[str]:
    """The first texts of a source that holds nothing else."""
    raws = (source[n] for n in range(min(count, len(source))))
    return ["".join(part.text for part in raw.segments if isinstance(part, RawText)) for raw in raws]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
