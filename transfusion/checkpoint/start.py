"""The first weights of a run, if they are not its seed's: those of another run, maybe exported, or of a language model."""

from dataclasses import fields, replace
from pathlib import Path

from transfusion.checkpoint.open import (
    RunDescription,
    check_exported,
    describe_run,
    fill_tensors,
    newest_checkpoint,
    step_of,
    verify_checkpoint,
    weights_part,
)
from transfusion.codecs.text import Tokenizer
from transfusion.config import ModelConfig
from transfusion.disk import CONFIG, OpenError, find_folder, is_exported, read_json
from transfusion.model.llama import LLAMA_FIELDS, Llama
from transfusion.model.transfusion import Transfusion, build_on_meta, init_weights
from transfusion.model.weights import Weights
from transfusion.parallel import Ranks


class OtherRunStart:
    """A run's folder, or an exported one, here or on the hub: its moving average (an exported one has what it has).

    Tokenizer, codec and ids of the new run must be its own: `described` has them.
    """

    kind = "run"
    decides = ("vocab_size", "latent_channels")

    def __init__(self, place: str):
        self.folder = find_folder(place)
        self.described: RunDescription = describe_run(self.folder)
        self.exported = is_exported(self.folder)
        about = read_json(self.folder / CONFIG)["weights"] if self.exported else {}
        self.step = about["step"] if self.exported else step_of(newest_checkpoint(self.folder))

    def model(self, model: ModelConfig) -> ModelConfig:
        """The config with what the other run's data decided. ValueError when its weights are of other shapes."""
        theirs = self.described.run.model
        model = replace(model, **{name: getattr(theirs, name) for name in self.decides})
        if _shapes(model) != _shapes(theirs):
            names = [f.name for f in fields(ModelConfig) if getattr(model, f.name) != getattr(theirs, f.name)]
            differ = [f"model.{name} is {getattr(theirs, name)} there, {getattr(model, name)} here" for name in names]
            raise ValueError(f"the weights of {self.folder} are of other shapes: {'; '.join(differ)}")
        return model

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Put its weights into the model, of each rank its part."""
        if self.exported:
            check_exported(self.folder, "ema")
            weights = Weights(self.folder)
            init_weights(model, seed, lambda name, values: values.copy_(weights.read(name)))
        else:
            found = newest_checkpoint(self.folder)
            verify_checkpoint(found, ranks)
            fill_tensors(found, {weights_part("ema"): model.state_dict()}, ranks)


class LlamaStart:
    """A folder with a language model of the Llama architecture, and its tokenizer: the text side of the new run."""

    kind = "llama"
    decides = ("vocab_size", "latent_channels", *LLAMA_FIELDS)
    step = None

    def __init__(self, place: str):
        self.folder = Path(place)
        self.llama = Llama(self.folder)
        if not (self.folder / "tokenizer.json").exists():
            raise OpenError(f"{self.folder} has no tokenizer.json")
        self.tokenizer = Tokenizer.from_file(self.folder / "tokenizer.json")

    def model(self, model: ModelConfig) -> ModelConfig:
        """The config with the folder's sizes. OpenError when its weights are not of these."""
        model = self.llama.config(model)
        self.llama.check_weights(model, self.tokenizer.size)
        return model

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Put its weights into the model; what it has not (patches, new ids) begins as in any run."""
        init_weights(model, seed, lambda name, values: self.llama.fill(model.config, self.tokenizer.size, name, values))


Start = OtherRunStart | LlamaStart


def open_start(kind: str, place: str) -> Start:
    """Where a run is to begin."""
    return OtherRunStart(place) if kind == OtherRunStart.kind else LlamaStart(place)


def name_place(kind: str, place: str) -> str:
    """The folder in full; a name on the hub as it is."""
    return str(Path(place).resolve()) if kind == LlamaStart.kind or Path(place).exists() else place


def note_of(start: Start, place: str) -> dict:
    """What run.json remembers of it."""
    return {"kind": start.kind, "place": place, "name": Path(place).name, "step": start.step}


def reopen(note: dict, folder: Path) -> Start:
    """The same once more, for a run that was begun but has no checkpoint yet. OpenError when it is no longer the same."""
    start = open_start(note["kind"], note["place"])
    if start.step != note["step"]:
        raise OpenError(f"{note['place']} was at step {note['step']} when {folder} began from it, and is at {start.step} "
                        "now: give another --out")  # fmt: skip
    return start


def decided_by(note: dict | None) -> tuple[str, ...]:
    """Fields of a run's ModelConfig that its data, and where it began, have decided."""
    return LlamaStart.decides if note and note["kind"] == LlamaStart.kind else OtherRunStart.decides


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build_on_meta(model).named_parameters()}
