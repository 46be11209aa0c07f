"""What the tables measure of a trained run. The code of this file and of all that it imports is part of the key of a cell;
the rows, columns and claims of the tables are in other files, and are not.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from transfusion.checkpoint.start import open_start
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.built_in.topics import Topics
from transfusion.data.sources import open_raw
from transfusion.disk import read_json
from transfusion.evaluation.captions import caption_heldout
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.perplexity import heldout_topics, split_windows
from transfusion.evaluation.scenes import draw_scenes
from transfusion.evaluation.small_network import SmallFeatureNetwork
from transfusion.inference.engine import Engine
from transfusion.model.transfusion import build_on_meta
from transfusion.parallel import SINGLE_PROCESS, lower_weights
from transfusion.report.record import Record
from transfusion.sequence import Document, Row, Text, collate, encode_document

NUM_SCENES = 400  # held-out captions; one image is drawn for each
NUM_TRAINING_SCENES = 2_000  # for the small network that computes features
NUM_CAPTIONS = 400
ATTRIBUTES = "count", "colour", "shape", "size", "place"


def measure_scenes(level: int, engine: Engine) -> dict[str, Any]:
    """Accuracy of drawn scenes, image metrics against real scenes, caption accuracy and the conditioning gap.

    `level` is that of `shapes`. Real scenes are the rendered pixels, without the run's codec. Scenes, captions and starting
    noise are a function of the run's seed, and the same for all variants. `..._by_caption`: how many of a caption's images
    are right, and how many it has.
    """
    seed = engine.run.training.seed
    source = Shapes(level, split="heldout", seed=seed)
    accuracy, drawn = draw_scenes(engine, source, NUM_SCENES, seed * NUM_SCENES)
    real = [source[n].pair[1] for n in range(NUM_SCENES)]
    features = small_network(level)
    scores = image_scores(features(real), features([pixels for _, pixels, _ in drawn]))
    captions = caption_heldout(engine, source, NUM_SCENES)
    attributes = [accuracy[name] for name in ATTRIBUTES]
    return {
        "right": accuracy["everything"], "attributes": sum(attributes) / len(attributes),
        **{name: accuracy[name] for name in ATTRIBUTES},
        **{name: scores[name] for name in ("fid", "kid", "precision", "recall", "density", "coverage")},
        "captions": captions["exact"], "cider": captions.get("cider", float("nan")),
        "right_by_caption": _count_by_caption((caption, is_right) for caption, _, is_right in drawn),
        "captions_by_caption": _count_by_caption((it["reference"], it["reference"] == it["prediction"])
                                                 for it in captions["answers"]),
        "gap": conditioning_gap(engine, source, NUM_SCENES)["gap"],
    }  # fmt: skip


def _count_by_caption(images: Iterable[tuple[str, bool]]) -> dict[str, tuple[int, int]]:
    """(caption, right) of each image -> for each distinct caption the number of right images and of all."""
    counts: dict[str, tuple[int, int]] = {}
    for caption, is_right in images:
        right, count = counts.get(caption, (0, 0))
        counts[caption] = right + is_right, count + 1
    return counts


@cache
def small_network(level: int) -> SmallFeatureNetwork:
    """Train the feature network: the same for all tables of a preset, in less than half a minute."""
    scenes = Shapes(level, split="train")
    captions, images = zip(*(scenes[n].pair for n in range(NUM_TRAINING_SCENES)), strict=True)
    with torch.random.fork_rng(devices=[]):
        return SmallFeatureNetwork("shapes", images, captions)


def measure_text_and_scenes(level: int, engine: Engine) -> dict[str, Any]:
    """Bits per byte of held-out text; for runs trained on scenes also everything that `measure_scenes` returns, and for runs
    that began from another one `count_changed_logits`."""
    values = {"bits_per_byte": heldout_topics(engine)["bits_per_byte"]}
    if "start" in engine.opened.notes:
        values["changed_logits"] = count_changed_logits(engine)
    return values | (measure_scenes(level, engine) if "shapes" in engine.run.data.sources else {})


@torch.inference_mode()
def count_changed_logits(engine: Engine) -> int:
    """The number of logits of held-out text, over the ids of text, that the training of a run changed in any bit. They are
    compared with those of its first weights in a network of the same shapes: another number of rows of the head can change
    the last bit of a product."""
    opened, vocabulary, note, count = engine.opened, engine.vocabulary, engine.opened.notes["start"], 0
    first = lower_weights(build_on_meta(engine.run.model), opened.precision).to_empty(device=engine.device).eval()
    open_start(note["kind"], note["place"]).fill(first, engine.run.training.seed, SINGLE_PROCESS)
    for text in Topics("heldout").texts:
        chunk = encode_document(Document((Text(opened.tokenizer.encode(text)),)), vocabulary)
        for window in split_windows(chunk, engine.max_positions):
            batch = collate([Row((window,))], engine.max_positions, vocabulary).to(engine.device)
            with opened.lower_precision():
                before, after = (model(batch, [], []).logits for model in (first, engine.model))  # (T, V)
            count += int((before != after)[:, : vocabulary.text_size].sum())
    return count


def measure_captions(name: str, engine: Engine) -> dict[str, float]:
    """Accuracy of greedy captions of held-out images of this source."""
    source = next(source for source in open_raw(engine.run.data, "heldout") if source.name == name)
    return {"captions": caption_heldout(engine, source, NUM_CAPTIONS)["exact"]}


def final_losses(folder: Path) -> dict[str, float]:
    """Held-out losses and velocity error at the last step, trained positions, and training time in minutes.

    With several sources the name of each figure starts with its source.
    """
    record = Record.read(folder)
    heldout = {(metric, source): values[-1] for metric in ("text_loss", "image_loss", "velocity_error")
               for source, (_, values) in record.heldout(metric).items()}  # fmt: skip
    sources = {source for _, source in heldout}
    losses = {name if len(sources) == 1 else f"{source}_{name}": value for (name, source), value in heldout.items()}
    positions = read_json(max((folder / "checkpoints").glob("*/state.json")))["num_seen"]
    return {**losses, "positions": positions, "minutes": record.trained[-1]["seconds"] / 60}
