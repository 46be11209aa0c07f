"""A run's folder for training: drafted for a new run, checked for one that exists, and written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from transfusion.checkpoint.read import RunDescription, describe_run
from transfusion.checkpoint.save import create_run_folder, list_checkpoints, update_settings
from transfusion.checkpoint.start import (
    OtherRunStart,
    describe_start,
    fixed_model_fields,
    open_base,
    open_start,
    reopen_start,
    resolve_source,
)
from transfusion.cli.ignored import changed, check_untied
from transfusion.cli.screen import UsageError, print_status
from transfusion.config import ChatLayout, Run, to_json
from transfusion.data.loader import DocumentEncoder, contains_edits, document_weights, heldout_batches
from transfusion.data.sources import chat_layout, fit, has_tokenizer_and_codec, hash_sources, open_sources, reuse
from transfusion.disk import RUN, run_name
from transfusion.model.transfusion import Transfusion
from transfusion.parallel import Ranks
from transfusion.sequence import Batch

HELDOUT = 256  # documents of each source for the held-out losses
Start = tuple[str, str]  # the kind of the initial weights, "run" or "language_model", and their folder or name on the hub
FREE = (  # settings that a trained run may change, by the beginning of their names: they do not change what a step learns
    "training.steps", "training.checkpoint_every", "training.keep_checkpoints", "training.validate_every",
    "training.preview_every", "training.log", "data.prepared", "generation.", "parallel.",
    "fault_tolerance.",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: the content of its run.json, and the encoder of its data."""

    path: Path
    description: RunDescription
    encoder: DocumentEncoder

    @property
    def run(self) -> Run:
        return self.description.run

    def with_run(self, run: Run) -> "RunFolder":
        """The same folder with other settings."""
        return self._of(self.path, replace(self.description, run=run))

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that was written."""
        return cls._of(path, describe_run(path))

    @classmethod
    def draft(cls, run: Run, path: Path, start: Start | None) -> "RunFolder":
        """The folder as `write` leaves it. With a checkpoint it keeps its tokenizer, codec and fixed settings: UsageError
        when the command changes one, or has other data. Without one, all settings are the command's."""
        known = describe_run(path) if (path / RUN).exists() else None
        if known is not None and list_checkpoints(path):
            return cls._of(path, _resume(known, run, path, start))
        changes = _describe_changes(known.run, run, fixed_model_fields(known.notes.get("start"))) if known else {}
        if changes:
            print_status(f"{path} has no checkpoint, so it takes this command's settings: {'; '.join(changes.values())}")
        drafted = _create(cls, run, path, start)
        before, after = (about.notes.get("start") for about in (known or drafted.description, drafted.description))
        if before != after:
            print_status(f"{path} has no checkpoint, so it starts from {_name_start(after)}, not from {_name_start(before)}")
        return drafted

    @classmethod
    def _of(cls, path: Path, about: RunDescription) -> "RunFolder":
        run = about.run
        return cls(path, about, DocumentEncoder(about.tokenizer, about.codec, about.vocabulary, run.data, run.training.seed))

    def write(self) -> None:
        """Write a new run, or the changed settings of one with a checkpoint."""
        about = self.description
        if not list_checkpoints(self.path):
            create_run_folder(self.path, self.run, about.tokenizer, about.codec, about.vocabulary, about.notes)
        elif describe_run(self.path).run != self.run:
            update_settings(self.path, self.run)

    def heldout_batches(self, rows: int) -> dict[str, list[Batch]]:
        """The held-out batches of each source, of so many rows."""
        sources = open_sources(self.run.data, "heldout")
        return {source.name: heldout_batches(source, self.encoder, HELDOUT, rows) for source in sources}

    @property
    def base_sha256(self) -> str | None:
        """Of the first weights of a run with an adapter, whose checkpoints do not hold them; else None."""
        return self.description.notes.get("start", {}).get("sha256")

    def first_weights(self, ranks: Ranks) -> Callable[[Transfusion], None] | None:
        """The function that fills in the weights of another run or model. None when seed or checkpoint decide them all."""
        note = self.description.notes.get("start")
        if note is None or (list_checkpoints(self.path) and self.base_sha256 is None):
            return None
        origin = open_base(note, self.path) if self.base_sha256 else reopen_start(note, self.path)
        return lambda model: origin.fill(model, self.run.training.seed, ranks)


def _name_start(note: dict | None) -> str:
    """The initial weights as text: their place, and the step of a run."""
    if note is None:
        return "random weights"
    return note["place"] if note["step"] is None else f"{note['place']} at step {note['step']}"


def _create(cls: type[RunFolder], run: Run, path: Path, start: Start | None) -> RunFolder:
    """A new run: its data and its start decide the sizes of the model. UsageError or ValueError when they do not suit."""
    origin = open_start(*start) if start else None
    encoder = _create_encoder(run, origin)
    # Data without conversations keep the layout of the run that this one starts from.
    chat = chat_layout(run.data) or (origin.description.chat if isinstance(origin, OtherRunStart) else None)
    encoder = _end_answers(encoder, chat)
    vocabulary, channels = encoder.vocabulary, encoder.codec.channels
    other = origin.description.run.model if isinstance(origin, OtherRunStart) else None
    check_untied(run.model, other, has_images=bool(vocabulary.boi))
    model = replace(
        run.model, vocab_size=vocabulary.size, text_vocab_size=vocabulary.text_size, latent_channels=channels
    )
    run = replace(run, model=origin.adapt_config(model) if origin else model)
    notes = _describe_data(run, encoder) | {"chat": chat and to_json(chat)}
    notes |= {"start": describe_start(origin, resolve_source(*start), run.lora.rank is not None)} if origin else {}
    about = RunDescription(run_name(path), run, encoder.tokenizer, encoder.codec, encoder.vocabulary, notes)
    return cls(path, about, encoder)


def _create_encoder(run: Run, origin) -> DocumentEncoder:
    """Tokenizer, codec and ids of a new run. UsageError when its model cannot take the images of its data."""
    if isinstance(origin, OtherRunStart):
        other = origin.description
        encoder = reuse(run.data, other.tokenizer, other.codec, other.vocabulary, run.training.seed)
    else:
        if not run.data.prepared:
            print_status(f"fitting the {'codec' if origin else 'tokenizer and the codec'} of {run.recipe}")
        encoder = fit(run.data, run.model.patch_size, run.training.seed, origin and origin.tokenizer)
    has_codes = encoder.vocabulary.num_image_codes > 0
    if has_codes != (run.model.patches == "codes"):
        needed = "codes" if has_codes else "linear or unet"
        raise UsageError(f"the images of these data are {encoder.codec.kind}: they need --model.patches {needed}")
    return encoder


def _end_answers(encoder: DocumentEncoder, chat: ChatLayout | None) -> DocumentEncoder:
    """With the special token of the assistant's suffix among the ids that end an answer."""
    ends, vocabulary = encoder.tokenizer.find_special(chat.assistant_suffix)[:1] if chat else [], encoder.vocabulary
    other_eos_ids = *vocabulary.other_eos_ids, *(id_ for id_ in ends if id_ not in vocabulary.eos_ids)
    return replace(encoder, vocabulary=replace(vocabulary, other_eos_ids=other_eos_ids))


def _describe_data(run: Run, encoder: DocumentEncoder) -> dict:
    """The notes of run.json about the data: the length of the documents of each source, and the hash of its content."""
    sources = open_sources(run.data, "train")
    notes = {source.name: source.describe() for source in sources if hasattr(source, "describe")}
    weights = document_weights(sources, encoder)
    notes["document_weights"] = {source.name: weight for source, weight in zip(sources, weights, strict=True)}
    notes["edits"] = any(map(contains_edits, sources))
    return notes | {"prepared": bool(run.data.prepared), "sources": hash_sources(run.data)}


def _resume(known: RunDescription, run: Run, path: Path, start: Start | None) -> RunDescription:
    """The run of the folder with the free settings of the command. UsageError when another setting or the data differ."""
    note, remedy = known.notes.get("start"), f"--from {path} with another --out starts a new run from its weights"
    if start and (not note or (note["kind"], note["place"]) != (start[0], resolve_source(*start))):
        first = f"from {note['place']}" if note else "from random weights"
        raise UsageError(f"{path} started {first}, not from {start[1]}: give another --out")
    if known.run.recipe != run.recipe:
        raise UsageError(f"{path} has the recipe {known.run.recipe}, not {run.recipe}: give another --out")
    fixed_sizes = fixed_model_fields(note)
    changes = _describe_changes(known.run, run, fixed_sizes)
    if fixed := [text for name, text in changes.items() if not name.startswith(FREE)]:
        raise UsageError(f"{path} is trained with other settings ({'; '.join(fixed)}), which a run keeps: transfusion train "
                         f"{path} resumes it; {remedy}")  # fmt: skip
    step = int(list_checkpoints(path)[-1].stem.partition("-")[2])
    if run.training.steps < step:
        raise UsageError(f"--training.steps {run.training.steps}: {path} is at step {step} already; give at least {step}")
    _check_data(known, run, path, remedy)
    if changes:
        print_status(f"{path} resumes with other settings: {'; '.join(changes.values())}")
    if known.run.training.steps != run.training.steps:
        print_status(f"from here on the learning rate follows the schedule of {run.training.steps} steps")
    return replace(known, run=replace(run, model=known.run.model))


def _describe_changes(before: Run, after: Run, ignored: tuple[str, ...]) -> dict[str, str]:
    """The settings that differ, by name, as text. `ignored`: fields of the model that data and start decide."""
    names = (n for n in changed(before, after) if n.removeprefix("model.") not in ignored)
    return {n: f"{n} is {attrgetter(n)(before)} in the folder, {attrgetter(n)(after)} in this command" for n in names}


def _check_data(known: RunDescription, run: Run, path: Path, remedy: str) -> None:
    """UsageError when the content of the data, or their tokenizer or codec, are not those of the run."""
    data, place = run.data, " and ".join(run.data.prepared)
    if data.prepared and not has_tokenizer_and_codec(data, known.tokenizer, known.codec):
        raise UsageError(f"{place} does not hold the data of {path}: it has another tokenizer or codec; prepare it with "
                         f"--like {path}")  # fmt: skip
    hashes = hash_sources(data)
    others = [name for name, digest in known.notes.get("sources", {}).items() if hashes.get(name) != digest]
    if others and data.prepared:
        raise UsageError(f"{place} does not hold the data of {path}: {', '.join(others)} has other documents; {remedy}")
    if others:
        raise UsageError(f"the built-in source {others[0]} has other documents than those of {path}: use the versions of "
                         f"Python and transfusion that its {RUN} names; {remedy}")  # fmt: skip
