"""First weights from another source than the seed: another run, an exported run, or a language model."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from transfusion.checkpoint.read import (
    RunDescription,
    check_exported,
    checkpoint_part,
    describe_run,
    fill_tensors,
    find_newest_checkpoint,
    read_step,
    verify_checkpoint,
)
from transfusion.codecs.text import Tokenizer
from transfusion.config import ModelConfig
from transfusion.disk import CONFIG, OpenError, find_folder, is_exported, is_on_hub, read_json, to_name
from transfusion.model.language_model import DECIDED_FIELDS, LanguageModel
from transfusion.model.transfusion import Transfusion, build_on_meta, build_uninitialized, init_weights
from transfusion.model.untied import IMAGE, first_name
from transfusion.model.weights import Weights
from transfusion.parallel import Ranks


class OtherRunStart:
    """The averaged weights of a run's folder, or the weights of an exported run, a folder or on the hub. The new run must
    use its tokenizer, codec and ids, which are in `description`."""

    kind = "run"
    fixed_fields = ("vocab_size", "text_vocab_size", "latent_channels")

    def __init__(self, source: str):
        self.folder = find_folder(source)
        self.description: RunDescription = describe_run(self.folder)
        self.name = self.description.name
        self.exported = is_exported(self.folder)
        about = read_json(self.folder / CONFIG)["weights"] if self.exported else {}
        self.step = about["step"] if self.exported else read_step(find_newest_checkpoint(self.folder))

    def adapt_config(self, model: ModelConfig) -> ModelConfig:
        """The config with the other run's `fixed_fields`. ValueError when its weights have other shapes; weights that are
        shared in the other run may be untied in this one."""
        other, text_size = self.description.run.model, self.description.vocabulary.text_size
        model = replace(model, vocab_size=other.vocab_size, text_vocab_size=text_size, latent_channels=other.latent_channels)
        untied = model.untied if other.untied == "none" else other.untied
        if _shapes(model) != _shapes(replace(other, untied=untied, text_vocab_size=text_size)):
            names = [f.name for f in fields(ModelConfig)
                     if getattr(model, f.name) != getattr(other, f.name) and f.name not in self.fixed_fields]  # fmt: skip
            changes = [f"model.{n} is {getattr(other, n)} in the folder, {getattr(model, n)} in this command" for n in names]
            raise ValueError(f"the weights of {self.folder} have other shapes: {'; '.join(changes)}")
        return model

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Load the weights into the model, on each rank its part."""
        if self.exported:
            check_exported(self.folder, "ema")
            weights = Weights(self.folder)
            return self._init_weights(model, seed, weights.names, weights.read)
        checkpoint, config = find_newest_checkpoint(self.folder), self.description.run.model
        verify_checkpoint(checkpoint, ranks)
        if config.untied == model.config.untied:
            return fill_tensors(checkpoint, {checkpoint_part("ema"): model.state_dict()}, ranks)
        shared = build_uninitialized(config).requires_grad_(False).state_dict()  # whole, on each rank
        fill_tensors(checkpoint, {checkpoint_part("ema"): shared})
        return self._init_weights(model, seed, {*shared}, shared.get)

    def _init_weights(self, model: Transfusion, seed: int, names: set[str], read: Callable[[str], Tensor]) -> None:
        """With the weights of these names. An untied model that begins from a shared one splits the rows of its ids."""
        num_text_rows = model.config.num_text_rows

        def overwrite(name: str, values: Tensor) -> None:
            if name in names:
                values.copy_(read(name)[: len(values)])
            elif name.startswith(IMAGE):
                values.copy_(read(name.removeprefix(IMAGE))[num_text_rows:])
            elif (source := first_name(name, model.config.image_init)) in names:
                values.copy_(read(source))

        init_weights(model, seed, overwrite)


class LanguageModelStart:
    """A language model and its tokenizer, in a folder or on the hub: the text weights of the new run."""

    kind = "language_model"
    fixed_fields = (*OtherRunStart.fixed_fields, *DECIDED_FIELDS)
    step = None

    def __init__(self, source: str):
        self.folder, self.name = find_folder(source), to_name(Path(source).resolve().name)
        self.language_model = LanguageModel(self.folder)
        if not (self.folder / "tokenizer.json").exists():
            raise OpenError(f"{self.folder} has no tokenizer.json: open its tokenizer with AutoTokenizer of transformers, "
                            "and save it into the folder with save_pretrained")  # fmt: skip
        self.tokenizer = Tokenizer.from_file(self.folder / "tokenizer.json")
        self.language_model.check_weights(self.tokenizer.size)

    def adapt_config(self, model: ModelConfig) -> ModelConfig:
        """The config with the language model's sizes."""
        return self.language_model.config(model)

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Load the weights into the model. Patch layers and new ids, which it lacks, are initialised from the seed."""
        def overwrite(name: str, values: Tensor) -> None:
            self.language_model.fill(self.tokenizer.size, first_name(name, model.config.image_init), values)

        init_weights(model, seed, overwrite)


Start = OtherRunStart | LanguageModelStart


def open_start(kind: str, source: str) -> Start:
    """Open the source of a run's first weights; `kind` is "run" or "language_model"."""
    return OtherRunStart(source) if kind == OtherRunStart.kind else LanguageModelStart(source)


def resolve_source(kind: str, source: str) -> str:
    """The absolute path of a folder; the name of a model in the package or on the hub unchanged."""
    is_name = is_on_hub(source) if kind == LanguageModelStart.kind else not Path(source).exists()
    return source if is_name else str(Path(source).resolve())


def describe_start(start: Start, source: str) -> dict:
    """The entry "start" in the notes of run.json."""
    return {"kind": start.kind, "place": source, "name": start.name, "step": start.step}


def reopen_start(note: dict, folder: Path) -> Start:
    """Open the start of a run that has no checkpoint yet. OpenError when the source is at another step by now."""
    start = open_start(note["kind"], note["place"])
    if start.step != note["step"]:
        raise OpenError(f"{note['place']} was at step {note['step']} when {folder} was created from it, and is at step "
                        f"{start.step} now: give another --out")  # fmt: skip
    return start


def fixed_model_fields(note: dict | None) -> tuple[str, ...]:
    """The fields of ModelConfig that a run's data and its start (None: the seed) determine."""
    is_language_model = note and note["kind"] == LanguageModelStart.kind
    return LanguageModelStart.fixed_fields if is_language_model else OtherRunStart.fixed_fields


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build_on_meta(model).named_parameters()}
