"""Options that a command would ignore beside its other options: a UsageError instead. An option is given if its value is not
the default."""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from transfusion.cli.screen import UsageError
from transfusion.codecs.config import CodecTrainingConfig
from transfusion.config import EvaluationConfig, ModelConfig, Run, TrainingConfig
from transfusion.data.config import PrepareConfig

Rule = tuple[bool, str, str]  # whether it applies, the names of fields, and the words after "has no effect"

FITTED = "data.tokenizer_size data.fit_documents data.codec data.codec_block data.codec_components"
DRAWING = "sampler steps t_shift guidance_scale guidance_interval guidance_rescale image_guidance_scale"
USED_BY = {  # options of evaluate -> the tasks that read them
    "features": ("images", "coco-images"), "clip": ("clip", "coco-images", "geneval"), "detector": ("geneval",),
    "prompts": ("geneval",), "questions": ("choice",), **dict.fromkeys(("coco", "pictures"), ("coco", "coco-images")),
    **dict.fromkeys(
        ("sampler", "steps", "guidance_scale"), ("drawings", "images", "clip", "edits", "geneval", "coco-images"),
    ),
}  # fmt: skip


def refuse(given: Iterable[str], rules: Iterable[Rule]) -> None:
    """UsageError for the first given field, such as "model.width", with a rule that applies."""
    for applies, names, reason in rules:
        for name in given if applies else ():
            if name in names.split():
                raise UsageError(f"--{name.replace('_', '-')} has no effect {reason}")


def changed(before: Any, after: Any, prefix: str = "") -> list[str]:
    """The names of the fields that differ between two configs of one class, as "model.width" for a config in a config."""
    names = []
    for f in fields(before):
        old, new = getattr(before, f.name), getattr(after, f.name)
        if is_dataclass(old) and is_dataclass(new):
            names += changed(old, new, f"{prefix}{f.name}.")
        elif old != new:
            names.append(prefix + f.name)
    return names


def check_train(before: Run, run: Run, start: str | None) -> None:
    """The settings of a run that `train` changes; `start` is "run" or "language_model" when its weights are not random."""
    data, given = run.data, changed(before, run)
    diffusion, sizes = " ".join(f"diffusion.{f.name}" for f in fields(run.diffusion)), ""
    if start == "language_model":
        from transfusion.model.language_model import DECIDED_FIELDS

        sizes = " ".join(f"model.{name}" for name in DECIDED_FIELDS)
    unread = [name for name in ("digits", "shapes") if data.prepared or name not in data.sources]
    refuse(given, [
        (True, "model.vocab_size model.text_vocab_size", "in training: the tokenizer decides it"),
        (True, "model.latent_channels", "in training: the codec decides it"),
        (start == "language_model", f"{sizes} data.tokenizer_size", "with --init-from: the language model decides it"),
        (start == "run", FITTED, "with --from: the other run decides tokenizer and codec"),
        (bool(data.prepared), FITTED, "on prepared data, which decide tokenizer and codec"),
        (data.codec != "block_pca", "data.codec_block data.codec_components", "without --data.codec block_pca"),
        *((True, f"data.{name}.interleaved data.{name}.level data.{name}.size",
           f"on these data, which do not read the built-in source {name}") for name in unread),
        (data.clean_copies, "data.image_first_max_t", "with --data.clean-copies: what follows an image reads it clean"),
        (run.lora.rank is None, "lora.on", "without --lora.rank"),
        (run.lora.rank is not None, " ".join(idle_scales(run)),
         f"with --lora.on {run.lora.on}, which trains none of these weights"),
        (run.model.untied == "none", "model.image_init", "without --model.untied: images have no such weights"),
        (run.model.untied == "full", "training.transformer_lr_scale", "with --model.untied full: nothing is shared"),
        (run.model.untied == "none" and not run.training.transformer_lr_scale, "training.optimizer",
         "with frozen blocks: Muon is for their matrices"),
        (run.model.patches == "codes", diffusion, "with --model.patches codes: codes are sampled like text"),
        (run.model.patches == "codes" and run.model.untied == "none", "training.image_lr_scale",
         "with --model.patches codes: images have no weights of their own without --model.untied"),
    ])  # fmt: skip


def check_untied(model: ModelConfig, start: ModelConfig | None, has_images: bool) -> None:
    """The options of untied weights that the data of a new run, or the run that it starts from, make useless."""
    refuse(changed(ModelConfig(), model, "model."), [
        (not has_images, "model.untied", "on data without images"),
        (start is not None and start.untied != "none", "model.image_init",
         "with --from a run whose weights are untied: its image weights are read"),
    ])  # fmt: skip


def idle_scales(run: Run) -> list[str]:
    """The learning rate scales of sides without trained weights, in a run with an adapter."""
    sides = run.lora.sides(run.model.untied)
    return [f"training.{side}_lr_scale" for side in run.training.lr_scales if side not in sides]


def check_generate(engine: Any, num_images: int | None, size: Any, has_pictures: bool, options: dict[str, Any]) -> None:
    """The options of `generate`: those that replace settings of the run, and --size."""
    generation, draws = engine.make_generation_config(**options), num_images is not None
    is_unguided = generation.guidance_scale == 1 and not (has_pictures and generation.image_guidance_scale not in (None, 1))
    refuse([*options, *(["size"] if size else [])], [
        (not draws, "size", "without --num-images"),
        (not engine.sizes, DRAWING, "in a run without images"),
        (draws, "max_tokens", "with --num-images: the answers are images"),
        (draws and not engine.uses_image_codes, "temperature top_p", "with --num-images: the answers are images"),
        (not has_pictures, "image_guidance_scale", "on a prompt without images"),
        (is_unguided, "guidance_interval guidance_rescale", "at --guidance-scale 1, which disables guidance"),
    ])  # fmt: skip


def check_evaluate(config: EvaluationConfig, tasks: Iterable[str]) -> None:
    """The options for tasks that are not among those to run."""
    with_detector = "prompts" if {"clip", "coco-images"} & {*tasks} else "clip prompts"
    refuse(changed(EvaluationConfig(), config), [
        *((not {*readers} & {*tasks}, name, f"on these tasks: it is for {', '.join(readers)}")
          for name, readers in USED_BY.items()),
        (config.detector is None, with_detector, "without --detector"),
    ])  # fmt: skip


def check_prepare(config: PrepareConfig) -> None:
    """The options of `data prepare`."""
    refuse(changed(PrepareConfig(), config), [
        (config.tokenizer is not None, "tokenizer_size", "with --tokenizer, whose size is fixed"),
        (config.codec not in ("auto", "block_pca"), "codec_block codec_components", f"with --codec {config.codec}"),
    ])  # fmt: skip


def check_fit_codec(before: Any, after: Any) -> None:
    """The options of `data fit-codec` beside a named codec's: its `network` and `training`."""
    training = after.training
    refuse(changed(before, after), [
        (after.network.codes is not None, "training.kl_weight", "on a VQ codec, which has no KL loss"),
        (after.network.codes is None, "training.codebook_weight training.commitment training.revive_after",
         "without --network.codes"),
        (training.identity is None, "training.identity_weight", "without --training.identity"),
        (training.gan_from is None, "training.gan_weight", "without --training.gan-from"),
    ])  # fmt: skip


def warn_about_warmup(training: TrainingConfig | CodecTrainingConfig, print_line: Callable[[str], None]) -> None:
    """One line when training ends before its warm-up."""
    if training.warmup_steps > training.steps:
        share = training.steps / training.warmup_steps
        print_line(f"training.warmup_steps {training.warmup_steps} is above training.steps {training.steps}: the learning "
                   f"rate reaches only {share:.2g} of its peak")  # fmt: skip
