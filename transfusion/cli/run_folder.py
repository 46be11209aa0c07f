"""A run's folder for training: created for a new run, opened and checked for one that exists."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transfusion.checkpoint.open import RunDescription, describe_run
from transfusion.checkpoint.save import create_run_folder, list_checkpoints
from transfusion.checkpoint.start import (
    OtherRunStart,
    describe_start,
    fixed_model_fields,
    open_start,
    reopen_start,
    resolve_source,
)
from transfusion.cli.screen import UsageError, print_status
from transfusion.config import ChatLayout, Run, to_json
from transfusion.data.loader import DocumentEncoder, contains_edits, document_weights
from transfusion.data.sources import chat_layout, fingerprint, fit, open_sources, reuse
from transfusion.disk import RUN
from transfusion.model.transfusion import Transfusion
from transfusion.parallel import Ranks

Start = tuple[str, str]  # the kind of the initial weights, "run" or "llama", and their folder or name on the hub


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: the content of its run.json, the run with the settings of this command, and its encoder."""

    path: Path
    description: RunDescription
    run: Run
    encoder: DocumentEncoder

    @classmethod
    def open_or_create(cls, run: Run, path: Path, start: Start | None) -> "RunFolder":
        """Open the folder, or create it for a new run. UsageError when it holds another run or other settings."""
        if (path / RUN).exists():
            known = describe_run(path)
            _refuse_changes(known, run, path, start)
            run = replace(known.run, data=run.data, parallel=run.parallel, fault_tolerance=run.fault_tolerance)
            encoder = DocumentEncoder(known.tokenizer, known.codec, known.vocabulary, run.data, run.training.seed)
            return cls(path, known, run, encoder)
        origin = open_start(*start) if start else None
        encoder = _create_encoder(run, origin)
        # Data without conversations keep the layout of the run that this one starts from.
        chat = chat_layout(run.data) or (origin.description.chat if isinstance(origin, OtherRunStart) else None)
        encoder = _end_answers(encoder, chat)
        model = replace(run.model, vocab_size=encoder.vocabulary.size, latent_channels=encoder.codec.channels)
        run = replace(run, model=origin.adapt_config(model) if origin else model)
        notes = _describe_data(run, encoder) | {"chat": chat and to_json(chat)}
        notes |= {"start": describe_start(origin, resolve_source(*start))} if origin else {}
        create_run_folder(path, run, encoder.tokenizer, encoder.codec, encoder.vocabulary, notes)
        return cls(path, RunDescription(run, encoder.tokenizer, encoder.codec, encoder.vocabulary, notes), run, encoder)

    def first_weights(self, ranks: Ranks) -> Callable[[Transfusion], None] | None:
        """The function that fills in the weights of another run or model. None when seed or checkpoint decide them."""
        note = self.description.notes.get("start")
        if note is None or list_checkpoints(self.path):
            return None
        origin = reopen_start(note, self.path)
        return lambda model: origin.fill(model, self.run.training.seed, ranks)


def _create_encoder(run: Run, origin) -> DocumentEncoder:
    """Tokenizer, codec and ids of a new run. UsageError when its model cannot take the images of its data."""
    if isinstance(origin, OtherRunStart):
        other = origin.description
        encoder = reuse(run.data, other.tokenizer, other.codec, other.vocabulary, run.training.seed)
    else:
        if not run.data.prepared:
            print_status(f"fitting the {'codec' if origin else 'tokenizer and the codec'} of {run.name}")
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
    """The notes of run.json about the data: its sources, the length of their documents, and a hash of prepared data."""
    sources = open_sources(run.data, "train")
    notes = {source.name: source.describe() for source in sources if hasattr(source, "describe")}
    weights = document_weights(sources, encoder)
    notes["document_weights"] = {source.name: weight for source, weight in zip(sources, weights, strict=True)}
    notes["edits"] = any(map(contains_edits, sources))
    return notes | ({"prepared": fingerprint(run.data)} if run.data.prepared else {})


def _refuse_changes(known: RunDescription, run: Run, path: Path, start: Start | None) -> None:
    """UsageError when a resumed run differs. Not compared: `parallel`, `fault_tolerance`, the place of prepared data, and
    fields that data and start decide (vocab_size, latent_channels)."""
    note = known.notes.get("start")
    if start and (not note or (note["kind"], note["place"]) != (start[0], resolve_source(*start))):
        first = f"from {note['place']}" if note else "from random weights"
        raise UsageError(f"{path} started {first}, not from {start[1]}: give another --out")
    before = replace(known.run, parallel=run.parallel, fault_tolerance=run.fault_tolerance)
    after = replace(run, model=replace(run.model, **{n: getattr(before.model, n) for n in fixed_model_fields(note)}))
    if before.data.prepared and after.data.prepared:
        before = replace(before, data=replace(before.data, prepared=after.data.prepared))
    if before.name != after.name:
        raise UsageError(f"{path} holds the run {before.name}, not {after.name}: give another --out")
    values, changed = dict(_flatten(to_json(before))), []
    for name, value in _flatten(to_json(after)):
        if value != values.get(name):
            changed.append(f"{name} is {values.get(name)} in the folder, {value} in this command")
    if changed:
        raise UsageError(f"{path} has other settings ({'; '.join(changed)}): give another --out")
    if known.notes.get("prepared") != fingerprint(run.data):
        raise UsageError(f"{' and '.join(run.data.prepared)} does not hold the data of {path}: give another --out")


def _flatten(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("model.width", 192) and so on: every setting with the name of its option."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
