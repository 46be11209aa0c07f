"""Sources to a prepared data set: fit the tokenizer and the codec, encode everything once, list what was left out.

The work is divided into units that depend only on the files. Each unit becomes one shard. Rank r writes the shards of
units r, r + world, ... A shard is finished when its `00000.json` exists. So a killed run resumes where it stopped, and the
result does not depend on the number of processes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import compress
from pathlib import Path

import pyarrow as pa
import torch

from transfusion.chat import describe_layout
from transfusion.codecs.codec import move_to
from transfusion.codecs.vq import VQ
from transfusion.config import ChatLayout
from transfusion.data import fitting
from transfusion.data.config import PrepareConfig
from transfusion.data.fitting import PrepareError, TokenizerAndCodec
from transfusion.data.heldout import MAX_FRACTION, SplitDocument, hash_bytes
from transfusion.data.leaks import count_leaks, find_copies
from transfusion.data.lengths import MAX_SHAPES, find_copied_images
from transfusion.data.raw import CUT_SHORT, Fault, RawDocument, RawText
from transfusion.data.reading.account import Account, counted
from transfusion.data.reading.readers import Reader, Unit
from transfusion.data.shards import ShardWriter
from transfusion.data.store import FORMAT, SPLITS, shapes_of, write_sizes
from transfusion.disk import check_format, find_folder, read_json, write_json, write_whole
from transfusion.sequence import Document, Image, Text

BATCH_SIZE, MAX_BATCH_CHARS = 32, 1_000_000  # documents encoded at a time, and characters after which fewer are
DUPLICATE_ID, ALSO_HELD_OUT = "duplicate id", "also held out"  # kinds of records that are left out
NUM_SHOWN_FAULTS = 10  # in the error that stops the work


@dataclass(frozen=True)
class ShardJob:
    """One unit of a source, and the number of its shard."""

    reader: Reader
    number: int
    unit: Unit
    chat: ChatLayout

    def read(self, account: Account | None = None) -> Iterator[RawDocument | Fault]:
        return self.reader.read(self.unit, account, self.chat)


def prepare(
    readers: Sequence[Reader], config: PrepareConfig, folder: Path, rank: int = 0, world: int = 1,
    barrier: Callable[[], None] = lambda: None, on_progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda line: None, device: str | torch.device = "cpu",
) -> dict:  # fmt: skip
    """Prepare a data set, or resume its preparation; returns its dataset.json. Each of `world` processes calls this with its
    rank; `barrier` returns when all processes have called it. Images are encoded on the `device`. `on_progress` gets the
    number of records that are done, and their total. PrepareError or OSError when the work stops early."""
    check_not_nested(readers, folder)
    config = _choose_chat(readers, config)
    jobs = list_jobs(readers, config)
    fraction = heldout_fraction(jobs, config)
    if rank == 0:
        for reader in readers:
            if splits := reader.describe_splits():
                report(f"{reader.name}: {splits}")
        with _wrap_os_errors("the tokenizer and the codec could not be fitted"):
            folder.mkdir(parents=True, exist_ok=True)
            _check_recipe(folder, _build_recipe(readers, config, jobs))
            if not (folder / "fitted.json").exists():
                report("fitting the tokenizer and the codec on the first documents" if config.like is None
                       else f"using the tokenizer and the codec of {config.like}")  # fmt: skip
                streams = [partial(_read_documents, reader, jobs) for reader in readers]
                fitting.fit(streams, config, fraction, folder)
    barrier()
    if not (folder / "dataset.json").exists():
        tokenizer_and_codec = fitting.open_tokenizer_and_codec(folder)
        move_to(tokenizer_and_codec.codec, device)
        encoder = ShardEncoder(tokenizer_and_codec, fraction)
        _write_shards(jobs, config, encoder, folder, rank, world, on_progress)
        barrier()
        if rank == 0:
            with _wrap_os_errors("dataset.json could not be written"):
                _write_dataset(readers, config, jobs, fraction, folder)
        barrier()
    return read_json(folder / "dataset.json")


@contextmanager
def _wrap_os_errors(failure: str) -> Iterator[None]:
    """Turn the OSError of a full disk or a failed network into a PrepareError."""
    try:
        yield
    except OSError as error:
        raise PrepareError(f"{failure}: {error.strerror or error}; the same command resumes") from None


def check_not_nested(readers: Sequence[Reader], folder: Path) -> None:
    """PrepareError when the output folder contains a source or is inside one: the output would be read next time."""
    out = folder.resolve()
    for reader in readers:
        if reader.files is not None and reader.files.is_local:
            root = Path(reader.files.root.partition("*")[0]).resolve()
            if out == root or out in root.parents or (root.is_dir() and root in out.parents):
                raise PrepareError(f"--out {folder} contains the source {reader.address} or is inside it: choose another")


def _choose_chat(readers: Sequence[Reader], config: PrepareConfig) -> PrepareConfig:
    """The config with the chat layout of the folder `like`, if it has one. PrepareError when the command declares another
    one, or declares one without conversations to use it for."""
    is_declared = config.chat != ChatLayout()
    if is_declared and not any(reader.has_conversations() for reader in readers):
        raise PrepareError("--chat has no effect: no source has conversations (the form conversation or messages)")
    chat = fitting.read_like_info(find_folder(config.like))["chat"] if config.like is not None else None
    if chat is None or chat == config.chat:
        return config
    if is_declared:
        raise PrepareError(f"--chat declares another layout than {config.like}, which has {describe_layout(chat)}: leave "
                           "--chat out, or prepare without --like")  # fmt: skip
    return replace(config, chat=chat)


def list_jobs(readers: Sequence[Reader], config: PrepareConfig) -> list[ShardJob]:
    names = Counter(reader.name for reader in readers)
    for name, count in names.items():
        if count > 1:
            raise PrepareError(f"{count} sources are called {name}: give each a different name, NAME=PATH")
    return [ShardJob(reader, number, unit, config.chat) for reader in readers
            for number, unit in enumerate(reader.units(config.records_per_shard))]  # fmt: skip


def heldout_fraction(jobs: Sequence[ShardJob], config: PrepareConfig) -> float:
    """The share of pictures and texts that are held out. It is the same for all sources, because one picture may be in
    several of them. Sources that declare their splits do not count."""
    hashed = [job for job in jobs if not job.reader.declares_split]
    sources = len({job.reader.name for job in hashed})
    return min(MAX_FRACTION, config.heldout * sources / max(1, sum(job.unit.rows for job in hashed)))


def _read_documents(reader: Reader, jobs: Sequence[ShardJob]) -> Iterator[RawDocument]:
    """The documents of a source."""
    records = (record for job in jobs if job.reader is reader for record in job.read())
    return (record for record in records if not isinstance(record, Fault))


# The recipe


def _build_recipe(readers: Sequence[Reader], config: PrepareConfig, jobs: Sequence[ShardJob]) -> dict:
    """Everything that decides the content of the data set."""
    sources = {}
    for reader in readers:
        sources[reader.name] = {
            "form": reader.form, "records": sum(job.unit.rows for job in jobs if job.reader is reader),
            "options": asdict(reader.options), "files": reader.fingerprint(),
        }  # fmt: skip
    settings = asdict(config)
    del settings["max_faults"], settings["allow_cut"]  # they do not change finished shards
    if config.like is not None:
        settings["like"] = fitting.read_like_info(find_folder(config.like))["codec"]["sha256"]
    if fitting.is_codec_folder(config.codec):
        settings["codec"] = fitting.read_codec_info(Path(config.codec)).get("sha256")
    if config.tokenizer is not None:
        settings["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    return {"format": FORMAT, "settings": settings, "sources": sources}


def _check_recipe(folder: Path, recipe: dict) -> None:
    """Write the recipe. PrepareError when the folder already has a different one, with the differences."""
    path = folder / "recipe.json"
    recipe = json.loads(json.dumps(recipe))
    if not path.exists() or not (folder / "fitted.json").exists():
        write_json(path, recipe)
        return
    existing = read_json(path)
    if existing == recipe:
        return
    finished = read_json(folder / "dataset.json") if (folder / "dataset.json").exists() else {}
    check_format(folder, finished | existing, FORMAT, "choose another --out")
    before, now = (list(values.get("sources", {})) for values in (existing, recipe))
    changes = [f"its sources are {', '.join(before)}"] if before != now else [
        f"{name}: {key} is {existing['sources'][name].get(key)} in the folder, {value} in this command"
        for name, source in recipe["sources"].items() for key, value in source.items()
        if existing["sources"][name].get(key) != value
    ]  # fmt: skip
    changes += [
        f"{name} is {existing.get('settings', {}).get(name)} in the folder, {value} in this command"
        for name, value in recipe["settings"].items() if existing.get("settings", {}).get(name) != value
    ]  # fmt: skip
    raise PrepareError(f"{folder} was started with other files or settings ({'; '.join(changes)}): choose another --out")


# Shards


def _write_shards(
    jobs: Sequence[ShardJob], config: PrepareConfig, encoder: "ShardEncoder", folder: Path,
    rank: int, world: int, on_progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Write the unfinished shards of this rank."""
    rank_jobs = jobs[rank::world]
    total, done = sum(job.unit.rows for job in rank_jobs), 0
    records, num_faults = Counter(), Counter()
    for job in jobs:
        records[job.reader.name] += job.unit.rows
    shown: dict[str, list[dict]] = {}
    for job in rank_jobs:
        path = folder / job.reader.name / f"{job.number:05d}.json"
        if not path.exists():
            with _wrap_os_errors(f"shard {job.number} of {job.reader.name} could not be written"):
                path.parent.mkdir(exist_ok=True)
                encoder.write_shard(job, path, lambda rows, before=done: on_progress(before + rows, total))
        faults = read_json(path)["faults"]
        name = job.reader.name
        _check_cut(name, faults, config)
        num_faults[name] += len(faults)
        shown.setdefault(name, []).extend(faults[: NUM_SHOWN_FAULTS - len(shown.get(name, ()))])
        _check_faults(f"{name}, so far,", num_faults[name], records[name], shown[name], config)
        done += job.unit.rows
        on_progress(done, total)


@dataclass(frozen=True)
class ShardEncoder:
    """Encodes units into shards: the tokenizer, the codec, and the share of pictures and texts that are held out."""

    tokenizer_and_codec: TokenizerAndCodec
    heldout_fraction: float

    def write_shard(self, job: ShardJob, path: Path, on_progress: Callable[[int], None]) -> None:
        """Encode one unit and write its Arrow files, then its JSON file. An error leaves no partial file."""
        is_vq = isinstance(self.tokenizer_and_codec.codec, VQ)
        writers = {split: ShardWriter(path.with_name(f"{split}-{path.stem}.arrow"), is_vq) for split in SPLITS}
        info, account, done = ShardInfo(), Account(), 0
        try:
            for records in self._read_batches(job, account):
                info.faults += [_describe_fault(record) for record in records if isinstance(record, Fault)]
                items = [record for record in records if isinstance(record, SplitDocument)]
                raws = [item.document for item in items]
                for item, raw, document in zip(items, raws, self.tokenizer_and_codec.encode(raws), strict=True):
                    writers[raw.split].add(document, item)
                    info.add(document, raw.split, bool(raw.name))
                done += len(records)
                on_progress(min(done, job.unit.rows))
            digests = {writer.path.name: writer.close() for writer in writers.values()}
            write_json(path, {**asdict(info), "account": account.to_json(), "sha256": digests})
        except BaseException:
            for writer in writers.values():
                writer.abort()
            raise

    def _read_batches(self, job: ShardJob, account: Account) -> Iterator[list[SplitDocument | Fault]]:
        """The unit's documents with cropped images, and its faults, in batches of limited size."""
        batch, size, ids = [], 0, set()
        for record in job.read(account):
            record = check_id(record, ids)
            if isinstance(record, RawDocument):
                # crop each image as it is read: the original photograph may have a hundred times the pixels
                record = SplitDocument.of(self.tokenizer_and_codec.crop(record), self.heldout_fraction)
                size += sum(len(part.text) for part in record.document.segments if isinstance(part, RawText))
            batch.append(record)
            if len(batch) == BATCH_SIZE or size >= MAX_BATCH_CHARS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


@dataclass
class ShardInfo:
    """Counts of a shard by split, needed before any of it is read."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    caption_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # of documents with one pair
    images: dict[str, dict[str, int]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    # latent shape -> most positions that must stay in one row with an image's patches: caption, boi, eoi, eos; of all
    # images, and of those with a noisy copy (`lengths.find_copied_images`: in this order, with images first), 0 without any
    max_image_overhead: dict[str, list[int]] = field(default_factory=dict)
    has_ids: bool = False  # whether any document has an id in its source
    faults: list[dict] = field(default_factory=list)

    def add(self, document: Document, split: str, has_id: bool) -> None:
        segments = document.segments
        tokens = sum(len(part.tokens) for part in segments if isinstance(part, Text))
        self.documents[split] += 1
        self.tokens[split] += tokens
        self.caption_tokens[split] += tokens if document.pairs and len(segments) == 2 else 0
        self.has_ids |= has_id
        are_copied = zip(*find_copied_images(document), strict=True)
        for number, part in enumerate(segments):
            if isinstance(part, Image):
                name = "{}x{}".format(*part.shape)
                self.images[split][name] = self.images[split].get(name, 0) + 1
                caption = len(segments[number - 1].tokens) if document.pairs else 0
                is_last = number + 1 == len(segments)  # then eos follows
                overheads = self.max_image_overhead.setdefault(name, [0, 0, 0])
                for n in compress(range(3), (True, *next(are_copied))):
                    overheads[n] = max(overheads[n], caption + 2 + is_last)


# dataset.json


def _write_dataset(
    readers: Sequence[Reader], config: PrepareConfig, jobs: Sequence[ShardJob], fraction: float, folder: Path
) -> None:
    """After all shards are written: skip documents with a duplicate id, and training documents with a picture or text that
    is held out; write quarantine.jsonl and dataset.json."""
    sources, accounts, left_out = {}, {}, {}
    for reader in readers:
        shards = [read_json(folder / reader.name / f"{job.number:05d}.json") for job in jobs if job.reader is reader]
        _skip_duplicates(shards, folder / reader.name)
        faults = [fault for shard in shards for fault in shard.pop("faults")]
        _check_cut(reader.name, faults, config)
        accounts[reader.name] = _close_account(reader, [shard.pop("account") for shard in shards], faults)
        records = sum(job.unit.rows for job in jobs if job.reader is reader)
        _check_faults(reader.name, len(faults), records, faults, config)
        left_out[reader.name] = faults
        sources[reader.name] = {
            "address": reader.address, "form": reader.form, "records": records,
            "declares_split": reader.declares_split, "shards": shards,
        }  # fmt: skip
    for fault, source in _skip_copies(folder, sources, fraction):
        left_out[source].append(fault)
        accounts[source].reject("records", "document", ALSO_HELD_OUT, fault["where"])
    for name, source in sources.items():
        totals = {split: sum(shard["documents"][split] for shard in source["shards"]) for split in SPLITS}
        if not totals["train"]:
            heldout = f"{counted(totals['heldout'], 'document')} held out"
            counts = "; ".join((counted(source["records"], "record"), *accounts[name].lines(), heldout))
            raise PrepareError(f"{name} has no training documents ({counts}): add documents, or use --heldout 0")
        kinds = Counter(fault["kind"] for fault in left_out[name])
        source |= {"documents": totals, "account": accounts[name].to_json(), "faults": dict(kinds.most_common())}
        num_shapes = len(shapes_of(source["shards"]))
        if num_shapes > MAX_SHAPES:
            raise PrepareError(f"{name} has latents of {num_shapes} shapes; at most {MAX_SHAPES}: use fewer --sizes")
        source["sha256"] = {}
        for split in SPLITS:
            source["sha256"] |= write_sizes(folder / name, split, source["shards"])
    fitted, recipe = read_json(folder / "fitted.json"), read_json(folder / "recipe.json")
    quarantine = ({"source": name, **fault} for name, faults in left_out.items() for fault in faults)
    lines = "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in quarantine)
    write_whole(folder / "quarantine.jsonl", lines.encode(errors="replace"))
    dataset = {
        "format": FORMAT, **fitted, "settings": recipe["settings"], "heldout_fraction": fraction, "sources": sources,
        "versions": {"transfusion": version("open-transfusion"), "pyarrow": pa.__version__},
    }  # fmt: skip
    write_json(folder / "dataset.json", {**dataset, "leaks": asdict(count_leaks([(folder, dataset)]))})


def _close_account(reader: Reader, parts: Sequence[dict], faults: Sequence[dict]) -> Account:
    """The account of a source, from those of its shards. Duplicate ids are only known after all shards are written."""
    account = Account()
    for part in parts:
        account.add(Account.from_json(part))
    for fault in faults:
        if fault["kind"] == DUPLICATE_ID:
            account.reject("records", "document", DUPLICATE_ID, fault["where"])
    reader.close_account(account)
    return account


def _skip_duplicates(shards: Sequence[dict], folder: Path) -> None:
    """Keep the first document of each id. The others become faults, and their rows are listed as skipped: here those whose
    id an earlier shard has. Shards follow the source's order."""
    seen: set[int] = set()
    for number, shard in enumerate(shards):
        shard["skipped"] = {split: [] for split in SPLITS}
        ids: set[int] = set()
        for split in SPLITS if shard.pop("has_ids") else ():
            row, skipped = 0, []
            for batch in pa.ipc.open_stream(pa.memory_map(str(folder / f"{split}-{number:05d}.arrow"))):
                for name, where in zip(batch.column("name").to_pylist(), batch.column("where").to_pylist(), strict=True):
                    key = None if name is None else hash_bytes(name.encode())
                    if key in seen:
                        skipped.append(row)
                        shard["faults"].append(_describe_fault(_duplicate_id(name, where)))
                    ids |= {key} - {None}
                    row += 1
            _skip(shard, split, skipped, folder / f"{split}-{number:05d}.arrow")
        seen |= ids


def _skip_copies(folder: Path, sources: dict[str, dict], fraction: float) -> Iterator[tuple[dict, str]]:
    """Skip the training documents with a picture or text that is held out; each as a fault, and its source. The held-out
    document is kept: figures of a declared split can be compared only if all of it is measured."""
    rows: dict[tuple[str, int], list[int]] = {}
    for copy, place in find_copies(folder, sources, fraction):
        rows.setdefault((copy.source, copy.shard), []).append(copy.row)
        yield _describe_fault(Fault(ALSO_HELD_OUT, f"its {copy.kind} is held out in {place}", copy.where)), copy.source
    for (source, number), skipped in rows.items():
        _skip(sources[source]["shards"][number], "train", skipped, folder / source / f"train-{number:05d}.arrow")


def _skip(shard: dict, split: str, rows: Sequence[int], path: Path) -> None:
    """List rows of a shard as skipped, and subtract them from its counts."""
    if not rows:
        return
    shard["skipped"][split] = sorted([*shard["skipped"][split], *rows])
    shard["documents"][split] -= len(rows)
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().select(["pairs", "segments"])
    for pairs, segments in zip(*(column.to_pylist() for column in table.take(rows)), strict=True):
        tokens = sum(part["tokens"] for part in segments if not part["image"])
        shard["tokens"][split] -= tokens
        shard["caption_tokens"][split] -= tokens if pairs and len(segments) == 2 else 0
        for part in segments:
            if part["image"]:
                shard["images"][split]["{height}x{width}".format(**part)] -= 1


def check_id(record: RawDocument | Fault, seen: set[int]) -> RawDocument | Fault:
    """The record, or a Fault when it has an id that is in `seen`; otherwise its id is added there. `seen` has hashes of ids:
    the ids themselves would need several times the memory."""
    if isinstance(record, Fault) or not record.name:
        return record
    key = hash_bytes(record.name.encode())
    if key in seen:
        return _duplicate_id(record.name, record.where)
    seen.add(key)
    return record


def _duplicate_id(name: str, where: str) -> Fault:
    return Fault(DUPLICATE_ID, f"an earlier document has the same id {name!r}", where)


def _describe_fault(fault: Fault) -> dict:
    return {"kind": fault.kind, "where": fault.where, "message": fault.message}


def _check_cut(source: str, faults: Sequence[dict], config: PrepareConfig) -> None:
    """PrepareError when the rest of a file cannot be read: `max_faults` cannot limit an unknown number of records."""
    for fault in faults:
        if fault["kind"] == CUT_SHORT and not config.allow_cut:
            raise PrepareError(f"{source}: {fault['where']}: {fault['message']}. An unknown number of records is missing: "
                               "repair the file, or prepare without its rest, with --allow-cut")  # fmt: skip


def _check_faults(source: str, count: int, records: int, faults: Sequence[dict], config: PrepareConfig) -> None:
    """PrepareError with the first faults when there are more than `max_faults` allows."""
    if count > config.max_faults * records:
        first = "".join(f"\n  {fault['where']}: {fault['message']}" for fault in faults[:NUM_SHOWN_FAULTS])
        raise PrepareError(
            f"{count:,} of {records:,} records of {source} cannot be used; --max-faults {config.max_faults:g} allows "
            f"{int(config.max_faults * records):,}. The first faults:{first}"
        )
