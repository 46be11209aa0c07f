"""First weights from another source than the seed: another run, an exported run, or a language model. They are also the base
of a run with an adapter, whose checkpoints do not hold them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion.checkpoint.read import (
    RunDescription,
    check_adapter,
    check_exported,
    checkpoint_part,
    describe_run,
    fill_tensors,
    find_checkpoint,
    read_step,
    verify_checkpoint,
)
from transfusion.codecs.text import Tokenizer
from transfusion.config import ModelConfig
from transfusion.disk import CONFIG, OpenError, find_folder, is_exported, is_on_hub, read_json, sha256_of, to_name
from transfusion.model.language_model import DECIDED_FIELDS, LanguageModel
from transfusion.model.lora import is_of_adapter, merge, plain_name, trained_shapes
from transfusion.model.transfusion import Transfusion, build_on_meta, build_uninitialized, init_weights
from transfusion.model.untied import IMAGE, first_name
from transfusion.model.weights import Weights
from transfusion.parallel import SINGLE_PROCESS, Ranks


class OtherRunStart:
    """The averaged weights of a run's folder, or the weights of an exported run, a folder or on the hub. The new run must
    use its tokenizer, codec and ids, which are in `description`."""

    kind = "run"
    fixed_fields = ("vocab_size", "text_vocab_size", "latent_channels")

    def __init__(self, source: str, step: int | None = None):
        """`step`: of the checkpoint; None: the newest."""
        self.folder = find_folder(source)
        self.description: RunDescription = describe_run(self.folder)
        self.name = self.description.name
        self.exported = is_exported(self.folder)
        about = read_json(self.folder / CONFIG)["weights"] if self.exported else {}
        self.checkpoint = None if self.exported else find_checkpoint(self.folder, step)
        self.step = about["step"] if self.exported else read_step(self.checkpoint)

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the weights, from the recorded ones of their files."""
        if self.exported:
            return _hash(read_json(self.folder / CONFIG)["weights"]["sha256"])
        files = read_json(self.checkpoint / "manifest.json").items()
        base = self.description.notes["start"]["sha256"] if self.has_adapter else None
        return _hash([base, {name: digest for name, digest in files if name.startswith(checkpoint_part("ema"))}])

    @property
    def has_adapter(self) -> bool:
        return self.description.run.lora.rank is not None

    def adapt_config(self, model: ModelConfig) -> ModelConfig:
        """The config with the other run's `fixed_fields`. ValueError when its weights have other shapes; weights that are
        shared in the other run may be untied in this one."""
        other, text_size = self.description.run.model, self.description.vocabulary.text_size
        model = replace(model, vocab_size=other.vocab_size, text_vocab_size=text_size, latent_channels=other.latent_channels)
        untied = model.untied if other.untied == "none" else other.untied
        expected = replace(other, untied=untied, text_vocab_size=text_size)
        if _shapes(model) != _shapes(expected):
            names = [f.name for f in fields(ModelConfig)
                     if getattr(model, f.name) != getattr(expected, f.name) and f.name not in self.fixed_fields]  # fmt: skip
            changes = [f"model.{n} is {getattr(other, n)} in the folder, {getattr(model, n)} in this command" for n in names]
            raise ValueError(f"the weights of {self.folder} have other shapes: {'; '.join(changes)}")
        return model

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Load the weights into the model, on each rank its part."""
        if self.exported:
            check_exported(self.folder, "ema")
            weights = Weights(self.folder)
            return self._init_weights(model, seed, weights.names, weights.read)
        config, state = self.description.run.model, model.state_dict()
        verify_checkpoint(self.checkpoint, ranks)
        if self.has_adapter:
            whole = load_with_base(self.description, self.checkpoint, "ema", self.folder).state_dict()  # on each rank
            return self._init_weights(model, seed, {*whole}, whole.get)
        if config.untied == model.config.untied:
            init_weights(model, seed, is_chosen=is_of_adapter)
            state = {plain_name(name): tensor for name, tensor in state.items() if not is_of_adapter(name)}
            return fill_tensors(self.checkpoint, {checkpoint_part("ema"): state}, ranks)
        shared = build_uninitialized(config).requires_grad_(False).state_dict()  # whole, on each rank
        fill_tensors(self.checkpoint, {checkpoint_part("ema"): shared})
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

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the weights, from those of their files, which are read in whole."""
        return _hash({path.name: sha256_of(path) for path in self.language_model.weights.files})

    def adapt_config(self, model: ModelConfig) -> ModelConfig:
        """The config with the language model's sizes."""
        return self.language_model.config(model)

    def fill(self, model: Transfusion, seed: int, ranks: Ranks) -> None:
        """Load the weights into the model. Patch layers and new ids, which it lacks, are initialised from the seed."""
        def overwrite(name: str, values: Tensor) -> None:
            self.language_model.fill(self.tokenizer.size, first_name(name, model.config.image_init), values)

        init_weights(model, seed, overwrite)


Start = OtherRunStart | LanguageModelStart


def open_start(kind: str, source: str, step: int | None = None) -> Start:
    """Open the source of a run's first weights; `kind` is "run" or "language_model". `step`: see OtherRunStart."""
    return OtherRunStart(source, step) if kind == OtherRunStart.kind else LanguageModelStart(source)


def resolve_source(kind: str, source: str) -> str:
    """The absolute path of a folder; the name of a model in the package or on the hub unchanged."""
    is_name = is_on_hub(source) if kind == LanguageModelStart.kind else not Path(source).exists()
    return source if is_name else str(Path(source).resolve())


def describe_start(start: Start, source: str, is_base: bool) -> dict:
    """The entry "start" in the notes of run.json; if it is the base of an adapter, with the SHA-256 of its weights."""
    note = {"kind": start.kind, "place": source, "name": start.name, "step": start.step}
    return note | ({"sha256": start.weights_sha256} if is_base else {})


def reopen_start(note: dict, folder: Path) -> Start:
    """Open the start of a run that has no checkpoint yet. OpenError when the source is at another step by now."""
    start = open_start(note["kind"], note["place"])
    if start.step != note["step"]:
        raise OpenError(f"{note['place']} was at step {note['step']} when {folder} was created from it, and is at step "
                        f"{start.step} now: give another --out")  # fmt: skip
    return start


def open_base(note: dict, folder: Path) -> Start:
    """The start of a run with an adapter. OpenError when it is not there, or has other weights by now."""
    try:
        base = open_start(note["kind"], note["place"], note["step"])
        problem = None if base.weights_sha256 == note["sha256"] else "its weights have changed since"
    except OpenError as error:
        problem = str(error)
    if problem is not None:
        at_step = "" if note["step"] is None else f" at step {note['step']}"
        raise OpenError(f"{folder} holds only an adapter to {note['place']}{at_step}, which cannot be used: {problem}; put "
                        "it back as it was")  # fmt: skip
    return base


def load_with_base(description: RunDescription, checkpoint: Path, weights: str, folder: Path) -> Transfusion:
    """The model of a run with an adapter, in float32 on the CPU: the weights of its base, with the adapter merged. The
    checkpoint is verified already. OpenError when the base or the adapter is another one."""
    run, note = description.run, description.notes["start"]
    adapter = read_adapter(description, checkpoint, weights)
    model = build_uninitialized(run.model).requires_grad_(False)
    open_base(note, folder).fill(model, run.training.seed, SINGLE_PROCESS)
    merge(model, adapter)
    return model


def read_adapter(description: RunDescription, checkpoint: Path, weights: str) -> dict[str, Tensor]:
    """The tensors of an adapter by name. OpenError when it is one to other weights than those of the start."""
    check_adapter(checkpoint, read_json(checkpoint / "state.json"), description.notes["start"]["sha256"])
    shapes = trained_shapes(build_on_meta(description.run.model), description.run.lora)
    adapter = {name: torch.empty(shape) for name, shape in shapes.items()}
    fill_tensors(checkpoint, {checkpoint_part(weights): adapter})
    return adapter


def fixed_model_fields(note: dict | None) -> tuple[str, ...]:
    """The fields of ModelConfig that a run's data and its start (None: the seed) determine."""
    is_language_model = note and note["kind"] == LanguageModelStart.kind
    return LanguageModelStart.fixed_fields if is_language_model else OtherRunStart.fixed_fields


def _hash(values: Any) -> str:
    """The SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build_on_meta(model).named_parameters()}
