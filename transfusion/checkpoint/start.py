"""First weights from another source than the seed: another run, an exported run, or a language model."""

from dataclasses import fields, replace
from pathlib import Path

from transfusion.checkpoint.open import (
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
from transfusion.disk import CONFIG, OpenError, find_folder, is_exported, read_json, to_name
from transfusion.model.llama import LLAMA_FIELDS, Llama
from transfusion.model.transfusion import Transfusion, build_on_meta, init_weights
from transfusion.model.weights import Weights
from transfusion.parallel import Ranks


class OtherRunStart:
    """The averaged weights of a run's folder, or the weights of an exported run, a folder or on the hub. The new run must
    use its tokenizer, codec and ids, which are in `description`."""

    kind = "run"
    fixed_fields = ("vocab_size", "latent_channels")

    def __init__(self, source: str):
        self.folder = find_folder(source)
        self.description: RunDescription = describe_run(self.folder)
        self.name = self.description.name
        self.exported = is_exported(self.folder)
        about = read_json(self.folder / CONFIG)["weights"] if self.exported else {}
        self.step = about["step"] if self.exported else read_step(find_newest_checkpoint(self.folder))

    def adapt_config(self, model: ModelConfig) -> ModelConfig:
        """The config with the other run's `fixed_fields`. ValueError when its weights have other shapes."""
        other = self.description.run.model
        model = replace(model, **{name: getattr(other, name) for name in self.fixed_fields})
        if _shapes(model) != _shapes(other):
            names = [f.name for f in fields(ModelConfig) if getattr(model, f.name) != getattr(other, f.name)]
            changes = [f"model.{n} is {getattr(other, n)} in the folder, {getattr(model, n)} in this command" for n in names]
            raise ValueError(f"the weights of {self.folder} have other shapes: {'; '.join(changes)}")
        return model

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Load the weights into the model, on each rank its part."""
        if self.exported:
            check_exported(self.folder, "ema")
            weights = Weights(self.folder)
            init_weights(model, seed, lambda name, values: values.copy_(weights.read(name)))
        else:
            checkpoint = find_newest_checkpoint(self.folder)
            verify_checkpoint(checkpoint, ranks)
            fill_tensors(checkpoint, {checkpoint_part("ema"): model.state_dict()}, ranks)


class LlamaStart:
    """A folder with a language model of the Llama architecture and its tokenizer: the text weights of the new run."""

    kind = "llama"
    fixed_fields = ("vocab_size", "latent_channels", *LLAMA_FIELDS)
    step = None

    def __init__(self, source: str):
        self.folder, self.name = Path(source), to_name(Path(source).resolve().name)
        self.llama = Llama(self.folder)
        if not (self.folder / "tokenizer.json").exists():
            raise OpenError(f"{self.folder} has no tokenizer.json")
        self.tokenizer = Tokenizer.from_file(self.folder / "tokenizer.json")

    def adapt_config(self, model: ModelConfig) -> ModelConfig:
        """The config with the language model's sizes. OpenError when its weights do not have them."""
        model = self.llama.config(model)
        self.llama.check_weights(model, self.tokenizer.size)
        return model

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Load the weights into the model. Patch layers and new ids, which it lacks, are initialised from the seed."""
        init_weights(model, seed, lambda name, values: self.llama.fill(model.config, self.tokenizer.size, name, values))


Start = OtherRunStart | LlamaStart


def open_start(kind: str, source: str) -> Start:
    """Open the source of a run's first weights; `kind` is "run" or "llama"."""
    return OtherRunStart(source) if kind == OtherRunStart.kind else LlamaStart(source)


def resolve_source(kind: str, source: str) -> str:
    """The absolute path of a folder; a name on the hub unchanged."""
    return str(Path(source).resolve()) if kind == LlamaStart.kind or Path(source).exists() else source


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
    return LlamaStart.fixed_fields if note and note["kind"] == LlamaStart.kind else OtherRunStart.fixed_fields


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build_on_meta(model).named_parameters()}
