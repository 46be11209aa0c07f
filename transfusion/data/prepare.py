"""Sources to a prepared data set: fit the tokenizer and the codec, encode everything once, note what was left out.

The work is cut into units that follow from the files alone. A unit becomes one shard, whichever process writes it, and is
finished when its `00000.json` is there: so a killed run goes on where it stopped, and the result does not depend on how
many processes there were.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pyarrow as pa

from transfusion.codecs.vq import VQ
from transfusion.config import PrepareConfig
from transfusion.data.fitting import Encoders, PrepareError, about_codec, about_like, fit, is_brought, open_tools
from transfusion.data.raw import Fault, RawDocument, RawImage
from transfusion.data.reading.readers import Reader, Unit
from transfusion.data.store import FORMAT, SPLITS, ShardWriter
from transfusion.disk import read_json, write_json, write_whole
from transfusion.seeding import uniform_from
from transfusion.sequence import Document, Image, Text

TOGETHER = 32  # documents that are encoded at a time
SHOWN = 10  # faults that are named where the work stops


@dataclass(frozen=True)
class Job:
    """One unit of a source, and the number of the shard that it becomes."""

    reader: Reader
    number: int
    unit: Unit
    heldout: float  # share of the documents of its source


def prepare(
    readers: Sequence[Reader], config: PrepareConfig, folder: Path, rank: int = 0, world: int = 1,
    wait: Callable[[], None] = lambda: None, tick: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """Make a prepared data set, or go on with one; returns its dataset.json.

    Each of `world` processes calls this with its rank; `wait` returns when all have called it. `tick` hears how many
    records are done. PrepareError and OSError say what stopped it.
    """
    check_places(readers, folder)
    jobs = _jobs(readers, config)
    if rank == 0:
        with _goes_on("the tokenizer and the codec could not be fitted"):
            folder.mkdir(parents=True, exist_ok=True)
            _check_recipe(folder, _recipe(readers, config, jobs))
            if not (folder / "fitted.json").exists():
                say("fitting the tokenizer and the codec on the first documents")
                fit([partial(_first_documents, reader, config, jobs) for reader in readers], config, folder)
    wait()
    if not (folder / "dataset.json").exists():
        tools = open_tools(folder)
        _write_shards(jobs, config, tools, folder, rank, world, tick)
        wait()
        if rank == 0:
            with _goes_on("dataset.json could not be written"):
                _finish(readers, config, jobs, folder)
        wait()
    return read_json(folder / "dataset.json")


@contextmanager
def _goes_on(what: str) -> Iterator[None]:
    """A full disk, or a network that failed, ends the work in words."""
    try:
        yield
    except OSError as error:
        raise PrepareError(f"{what}: {error.strerror or error}; the same command goes on from what is finished") from None


def check_places(readers: Sequence[Reader], folder: Path) -> None:
    """What is made may not lie among what it is made from, nor the other way round: it would be read the next time."""
    out = folder.resolve()
    for reader in readers:
        if reader.files is not None and reader.files.local:
            root = Path(reader.files.root.partition("*")[0]).resolve()
            if out == root or out in root.parents or (root.is_dir() and root in out.parents):
                raise PrepareError(f"{folder} and the source {reader.address} lie in one another: give an --out elsewhere")


def _jobs(readers: Sequence[Reader], config: PrepareConfig) -> list[Job]:
    names = Counter(reader.name for reader in readers)
    for name, count in names.items():
        if count > 1:
            raise PrepareError(f"{count} sources are called {name}: give each a name of its own, NAME=PATH")
    jobs = []
    for reader in readers:
        units = reader.units(config.shard)
        heldout = min(0.05, config.heldout / sum(unit.rows for unit in units))
        jobs += [Job(reader, number, unit, heldout) for number, unit in enumerate(units)]
    return jobs


def _split(job: Job, document: RawDocument) -> str:
    """Chance decides, from the name of a document's kin: nothing else of the data set matters."""
    if document.split:
        return document.split
    return SPLITS[uniform_from("heldout", job.reader.name, document.kin) < job.heldout]


def _first_documents(reader: Reader, config: PrepareConfig, jobs: Sequence[Job]) -> Iterator[RawDocument]:
    """The first training documents of a source."""
    mine = [job for job in jobs if job.reader is reader]
    found = (one for job in mine for one in reader.read(job.unit)
             if not isinstance(one, Fault) and _split(job, one) == "train")  # fmt: skip
    return islice(found, config.fit_documents)


# The recipe


def _recipe(readers: Sequence[Reader], config: PrepareConfig, jobs: Sequence[Job]) -> dict:
    """All that the data set follows from."""
    sources = {}
    for reader in readers:
        sources[reader.name] = {
            "form": reader.form, "records": sum(job.unit.rows for job in jobs if job.reader is reader),
            "options": asdict(reader.options), "files": reader.fingerprint(),
        }  # fmt: skip
    settings = asdict(config)
    del settings["max_faults"]  # what is finished stays as it is, however many of the rest may be left out
    if config.like is not None:
        settings["like"] = about_like(Path(config.like))["codec"]["sha256"]
    if is_brought(config.codec):
        settings["codec"] = about_codec(Path(config.codec)).get("sha256")
    if config.tokenizer is not None:
        settings["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    return {"format": FORMAT, "settings": settings, "sources": sources}


def _check_recipe(folder: Path, recipe: dict) -> None:
    """Write the recipe, or see that what the folder holds already follows the same one."""
    path = folder / "recipe.json"
    recipe = json.loads(json.dumps(recipe))
    if not path.exists() or not (folder / "fitted.json").exists():
        write_json(path, recipe)
        return
    known = read_json(path)
    if known == recipe:
        return
    before, now = (list(found.get("sources", {})) for found in (known, recipe))
    changed = [f"its sources are {', '.join(before)}"] if before != now else [
        f"{name}: {what} is {known['sources'][name].get(what)} there, {value} here"
        for name, source in recipe["sources"].items() for what, value in source.items()
        if known["sources"][name].get(what) != value
    ]  # fmt: skip
    changed += [
        f"{name} is {known.get('settings', {}).get(name)} there, {value} here"
        for name, value in recipe["settings"].items() if known.get("settings", {}).get(name) != value
    ]  # fmt: skip
    raise PrepareError(f"{folder} was begun from other files or settings ({'; '.join(changed)}): give another --out")


# Shards


def _write_shards(
    jobs: Sequence[Job], config: PrepareConfig, tools: Encoders, folder: Path, rank: int, world: int,
    tick: Callable[[int, int], None],
) -> None:  # fmt: skip
    """This process's shards, as far as they are not finished."""
    mine = jobs[rank::world]
    total, done = sum(job.unit.rows for job in mine), 0
    records, faults = Counter(), Counter()
    for job in jobs:
        records[job.reader.name] += job.unit.rows
    named: dict[str, list[dict]] = {}
    for job in mine:
        path = folder / job.reader.name / f"{job.number:05d}.json"
        if not path.exists():
            with _goes_on(f"shard {job.number} of {job.reader.name} could not be made"):
                path.parent.mkdir(exist_ok=True)
                _write_shard(job, tools, path, lambda rows, before=done: tick(before + rows, total))
        found = read_json(path)["faults"]
        name = job.reader.name
        faults[name] += len(found)
        named.setdefault(name, []).extend(found[: SHOWN - len(named.get(name, ()))])
        _check_faults(f"{name}, so far,", faults[name], records[name], named[name], config)
        done += job.unit.rows
        tick(done, total)


def _write_shard(job: Job, tools: Encoders, path: Path, tick: Callable[[int], None]) -> None:
    """One unit, encoded and written: the Arrow files, then what is in them. Nothing half done stays."""
    codes = isinstance(tools.codec, VQ)
    writers = {split: ShardWriter(path.with_name(f"{split}-{path.stem}.arrow"), codes) for split in SPLITS}
    about = Contents()
    try:
        done = 0
        # each is cut as it is read: a photograph as it was taken may have a hundred times the pixels
        reading = (one if isinstance(one, Fault) else tools.cut(one) for one in job.reader.read(job.unit))
        while found := list(islice(reading, TOGETHER)):
            faults = [one for one in found if isinstance(one, Fault)]
            about.faults += [{"kind": one.kind, "where": one.where, "message": one.message} for one in faults]
            raws = [one for one in found if not isinstance(one, Fault)]
            for raw, document in zip(raws, tools.encode(raws), strict=True):
                split = _split(job, raw)
                pictures = [part.pixels for part in raw.segments if isinstance(part, RawImage)] if split == "heldout" else ()
                writers[split].add(document, raw.where, raw.name, pictures)
                about.add(document, split, bool(raw.name))
            done += len(found)
            tick(min(done, job.unit.rows))
        digests = {writer.path.name: writer.close() for writer in writers.values()}
        write_json(path, {**asdict(about), "sha256": digests})
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


@dataclass
class Contents:
    """What is in a shard, by split: what a run must know before it reads any of it."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    caption_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # of single pairs
    images: dict[str, dict[str, int]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    unbreakable: dict[str, int] = field(default_factory=dict)  # most positions that stay with an image, by its shape
    named: bool = False  # has any document an id of its own?
    faults: list[dict] = field(default_factory=list)

    def add(self, document: Document, split: str, named: bool) -> None:
        segments = document.segments
        texts = sum(len(part.tokens) for part in segments if isinstance(part, Text))
        self.documents[split] += 1
        self.tokens[split] += texts
        self.caption_tokens[split] += texts if document.pairs and len(segments) == 2 else 0
        self.named |= named
        for number, part in enumerate(segments):
            if isinstance(part, Image):
                name = "{}x{}".format(*part.shape)
                self.images[split][name] = self.images[split].get(name, 0) + 1
                caption = len(segments[number - 1].tokens) if document.pairs else 0
                last = number + 1 == len(segments)  # eos stays with it
                self.unbreakable[name] = max(self.unbreakable.get(name, 0), caption + 2 + last)


# The end


def _finish(readers: Sequence[Reader], config: PrepareConfig, jobs: Sequence[Job], folder: Path) -> None:
    """All shards are written: find ids that stand twice, write quarantine.jsonl and dataset.json."""
    sources, quarantine = {}, []
    for reader in readers:
        shards = [read_json(folder / reader.name / f"{job.number:05d}.json") for job in jobs if job.reader is reader]
        _skip_duplicates(shards, folder / reader.name)
        faults = [fault for shard in shards for fault in shard.pop("faults")]
        records = sum(job.unit.rows for job in jobs if job.reader is reader)
        _check_faults(reader.name, len(faults), records, faults, config)
        quarantine += [{"source": reader.name, **fault} for fault in faults]
        totals = {split: sum(shard["documents"][split] for shard in shards) for split in SPLITS}
        if not totals["train"]:
            raise PrepareError(f"nothing of {reader.name} is left to train on ({records} records, {len(faults)} faults)")
        sources[reader.name] = {
            "address": reader.address, "form": reader.form, "records": records, "documents": totals,
            "faults": dict(Counter(fault["kind"] for fault in faults).most_common()), "shards": shards,
        }  # fmt: skip
    fitted, recipe = read_json(folder / "fitted.json"), read_json(folder / "recipe.json")
    lines = "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in quarantine)
    write_whole(folder / "quarantine.jsonl", lines.encode(errors="replace"))
    write_json(folder / "dataset.json", {
        "format": FORMAT, **fitted, "settings": recipe["settings"], "sources": sources,
        "versions": {"transfusion": version("open-transfusion"), "pyarrow": pa.__version__},
    })  # fmt: skip


def _skip_duplicates(shards: Sequence[dict], folder: Path) -> None:
    """Of documents with one id the first stays; the others become faults, and are skipped where they lie.

    Documents of one id are kin and so of one split; within it shards and rows stand in the order of the source.
    """
    seen: set[int] = set()  # hashes: a set of the names themselves would be several times as large
    for number, shard in enumerate(shards):
        shard["skipped"] = {split: [] for split in SPLITS}
        for split in SPLITS if shard.pop("named") else ():
            row = 0
            for batch in pa.ipc.open_stream(pa.memory_map(str(folder / f"{split}-{number:05d}.arrow"))):
                for name, where in zip(batch.column("name").to_pylist(), batch.column("where").to_pylist(), strict=True):
                    if name is not None and hash(name) in seen:
                        shard["skipped"][split].append(row)
                        shard["faults"].append(duplicate_id(name, where))
                    elif name is not None:
                        seen.add(hash(name))
                    row += 1
            shard["documents"][split] -= len(shard["skipped"][split])


def duplicate_id(name: str, where: str) -> dict:
    """The fault of a document whose id another has already."""
    return {"kind": "duplicate id", "where": where, "message": f"another document before it has the id {name!r}"}


def _check_faults(source: str, count: int, records: int, faults: Sequence[dict], config: PrepareConfig) -> None:
    """PrepareError with the first faults when there are more than may be left out."""
    if count > config.max_faults * records:
        first = "".join(f"\n  {fault['where']}: {fault['message']}" for fault in faults[:SHOWN])
        raise PrepareError(
            f"{count:,} of {records:,} records of {source} cannot be used, and max_faults {config.max_faults:g} lets "
            f"{int(config.max_faults * records):,} pass; the first:{first}"
        )
