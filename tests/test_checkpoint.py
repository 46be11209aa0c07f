"""A run on disk: whole or not there, checked before use, and nothing in it is ever executed."""

import ast
import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import threading
import time
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.processes import Process, run
from tests.profile import examples
from tests.test_architecture import files as package
from tests.test_architecture import without_allowed_load
from tests.tiny import begin_run, prepared, run_tensors, save, small_run, write_run
from transfusion.checkpoint.open import (
    describe_run,
    fill_tensors,
    newest_checkpoint,
    open_checkpoint,
    restore_newest,
    verify_checkpoint,
)
from transfusion.checkpoint.save import SaveError, Saver, hash_config
from transfusion.config import Run
from transfusion.disk import OpenError, read_json
from transfusion.model.transfusion import build
from transfusion.parallel import SINGLE_PROCESS

few = examples(12)
many = examples(80)



def tiny() -> Run:
    return prepared(small_run())[0]


@cache
def weights(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint's tensors, not to be written to."""
    return run_tensors(tiny(), seed)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with two checkpoints. Tests that damage it put back what they changed."""
    place = tmp_path_factory.mktemp("run")
    write_run(place, (1, 2))
    return place


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy of it that a test may break."""
    return shutil.copytree(folder, tmp_path / "run")


def one_line(error) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def holds_step(place: Path, step: int) -> bool:
    """What opens is step `step`, to the last bit."""
    opened = open_checkpoint(place)
    return opened.step == step and same(opened.model.state_dict(), weights(step)["ema"])


# Round trips


def test_a_run_comes_back_as_it_was(folder):
    run, encoder = prepared(small_run())
    found = describe_run(folder)
    assert (found.run, found.vocabulary, found.notes) == (run, encoder.vocabulary, {"made": "for a test"})
    text = "three <s> é\n"
    assert found.tokenizer.encode(text) == encoder.tokenizer.encode(text)
    for name, value in encoder.codec.tensors().items():
        assert (found.codec.tensors()[name] == value).all()
    for which, part in (("ema", "ema"), ("raw", "model")):
        opened = open_checkpoint(folder, which)
        assert opened.step == 2
        assert same(opened.model.state_dict(), weights(2)[part])
        assert not opened.model.training
        assert not any(p.requires_grad for p in opened.model.parameters())


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
shapes = st.lists(st.integers(1, 4), max_size=3)
chance = st.integers(0, 99).map(torch.Generator().manual_seed)
tensors = st.builds(
    lambda shape, dtype, generator: torch.randn(shape, generator=generator).mul(9).to(dtype),
    shapes, st.sampled_from(DTYPES), chance,
)  # fmt: skip
names = st.text("abc.", min_size=1, max_size=6)
inside = st.dictionaries(names, tensors, min_size=1, max_size=4)
parts = st.dictionaries(st.sampled_from("xyz"), inside, min_size=1)


@few
@given(parts, st.dictionaries(names, st.integers() | st.floats(allow_nan=False) | st.none()))
def test_tensors_and_state_come_back_to_the_last_bit(values, state):
    """Of any dtype and shape, single numbers too."""
    with TemporaryDirectory() as place:
        found = save(Path(place), 7, values, state, keep=1)
        verify_checkpoint(found)
        empty = {part: {n: torch.zeros_like(v) for n, v in inside.items()} for part, inside in values.items()}
        fill_tensors(found, empty)
        assert all(same(empty[part], inside) for part, inside in values.items())
        assert read_json(found / "state.json") == state


def test_one_process_reads_alone_what_several_would_write_or_an_earlier_version_wrote(own):
    """Shards, as torch's DCP writes them, even if it is one."""
    from torch.distributed import checkpoint as dcp

    for part, values in weights(2).items():
        folder = newest_checkpoint(own) / part
        (folder / "model.safetensors").unlink()
        dcp.save(dict(values), storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True), no_dist=True)
        assert [path.name for path in folder.iterdir()] == ["shard-00001-model-00001-of-00001.safetensors"]
    found = {part: {name: torch.zeros_like(value) for name, value in inside.items()} for part, inside in weights(0).items()}
    fill_tensors(newest_checkpoint(own), found)
    assert all(same(found[part], weights(2)[part]) for part in found)


def test_tied_weights_come_back(tmp_path):
    config = replace(tiny().model, tie_word_embeddings=True)
    model, other = build(config, 0), build(config, 1)
    fill_tensors(save(tmp_path, 1, {"model": model.state_dict()}, {}, 1), {"model": other.state_dict()})
    assert same(other.state_dict(), model.state_dict())
    assert "head.weight" not in other.state_dict()


OTHERS = [("width", 64), ("layers", 3), ("intermediate_size", 64), ("vocab_size", 512), ("kv_heads", 1)]


@pytest.mark.parametrize(("field", "value"), OTHERS)
def test_weights_of_another_shape_are_refused(folder, field, value):
    model = build(replace(tiny().model, **{field: value}), 0)
    with pytest.raises(OpenError, match="ema does not fit this run") as error:
        fill_tensors(newest_checkpoint(folder), {"ema": model.state_dict()})
    assert "ema" in one_line(error)


# Which checkpoint


@few
@given(st.sets(st.integers(0, 999_999), min_size=1, max_size=6), st.integers(1, 4))
def test_the_newest_are_kept_and_the_last_is_opened(steps, keep):
    with TemporaryDirectory() as place:
        for step in sorted(steps):
            save(Path(place), step, {"a": {"b": torch.tensor(step)}}, {}, keep)
            kept = sorted(path.name for path in (Path(place) / "checkpoints").glob("step-*"))
            assert kept == [f"step-{s:06d}" for s in sorted(steps) if s <= step][-keep:]
            assert newest_checkpoint(Path(place)).name == f"step-{step:06d}"


@few
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.integers(1, 2))
def test_what_was_just_saved_is_there_and_is_the_newest(steps, keep):
    """Also where the folder holds later steps: of a run that was begun again, or went back."""
    with TemporaryDirectory() as place:
        for number, step in enumerate(steps):
            found = save(Path(place), step, {"a": {"b": torch.tensor(number)}}, {"number": number}, keep)
            assert newest_checkpoint(Path(place)) == found
            verify_checkpoint(found)
            assert read_json(found / "state.json") == {"number": number}


def test_a_million_steps_are_numbered_and_thrown_away_like_others(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, {"a": {"b": torch.tensor(step)}}, {}, keep=2)
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {"step-1000000", "step-1000001"}
    (tmp_path / "checkpoints" / "latest").unlink()
    assert newest_checkpoint(tmp_path).name == "step-1000001"


def test_the_second_save_of_a_step_takes_the_place_of_the_first(tmp_path):
    begin_run(tmp_path)
    for seed in (5, 1):
        save(tmp_path, 1, weights(seed), {"step": 1}, keep=2)
    assert holds_step(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["step-000001"]


@pytest.mark.parametrize("content", [None, b"", b"step-000009", b"step-0000", b"nonsense\n"])
def test_without_a_usable_latest_the_highest_step_is_opened(own, content):
    latest = own / "checkpoints" / "latest"
    latest.unlink() if content is None else latest.write_bytes(content)
    assert holds_step(own, 2)


def test_latest_says_which_and_nothing_half_written_is_taken(own):
    (own / "checkpoints" / "latest").write_text("step-000001\n")
    assert holds_step(own, 1)
    (own / "checkpoints" / "latest").unlink()
    shutil.copytree(newest_checkpoint(own), own / "checkpoints" / "step-000003.tmp")
    assert holds_step(own, 2)


def test_a_folder_that_is_no_run_or_has_no_checkpoint_yet_is_said_so(tmp_path):
    with pytest.raises(OpenError, match="is not a run: it has no run.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(OpenError, match="is not a run"):
        open_checkpoint(tmp_path / "nowhere")
    begin_run(tmp_path)
    with pytest.raises(OpenError, match="has no checkpoint yet"):
        open_checkpoint(tmp_path)


# Damage


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def flipped(path: Path, offset: float, bit: int) -> bytes:
    """The file's content with one bit turned, somewhere between its start (0) and its end (1)."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(offset * len(content)))] ^= 1 << bit
    return bytes(content)


WITH_DIGEST = ["tokenizer.json", "codec.safetensors"] + [
    f"checkpoints/step-000002/{name}"
    for name in ("state.json", *(f"{part}/model.safetensors" for part in ("ema", "model", "optimizer")))
]  # fmt: skip
WITHOUT = ["run.json", "checkpoints/latest", "checkpoints/step-000002/manifest.json"]


def test_these_are_all_the_files_of_a_run(folder):
    """The two tests below go through all of them."""
    found = {str(path) for path in files(folder) if "step-000001" not in path.parts}
    assert found == {*WITH_DIGEST, *WITHOUT}


@many
@given(st.sampled_from(WITH_DIGEST), st.floats(0, 1), st.integers(0, 7))
def test_a_flipped_bit_is_found_and_its_file_named(folder, name, offset, bit):
    path = folder / name
    before = path.read_bytes()
    write(path, flipped(path, offset, bit))
    try:
        with pytest.raises(OpenError) as error:
            open_checkpoint(folder)
        assert str(path) in one_line(error)
        if "checkpoints" in name:
            with pytest.raises(OpenError, match=path.name):
                verify_checkpoint(newest_checkpoint(folder))
            describe_run(folder)  # which does not need it
        else:
            with pytest.raises(OpenError, match=path.name):
                describe_run(folder)
    finally:
        write(path, before)


@many
@given(st.sampled_from(WITHOUT), st.floats(0, 1), st.integers(0, 7))
def test_a_flipped_bit_where_there_is_no_digest_is_an_error_or_harmless(folder, name, offset, bit):
    """These are read by people too; what they say is checked, and never taken for something else."""
    path = folder / name
    before = path.read_bytes()
    write(path, flipped(path, offset, bit))
    try:
        opened = open_checkpoint(folder)
    except OpenError as error:
        assert len(str(error).splitlines()) == 1
        assert str(folder) in str(error)
    else:
        assert opened.step == 2 or name == "checkpoints/latest"
        assert same(opened.model.state_dict(), weights(opened.step)["ema"])
    finally:
        write(path, before)


@many
@given(st.data())
def test_what_the_weights_were_trained_with_cannot_change_unseen(folder, data):
    """One bit of run.json's model, diffusion or ids: refused, or it means the same as before."""
    path, was = folder / "run.json", describe_run(folder)
    before = path.read_bytes()
    text = before.decode()
    spans = []
    for begin, end in (('"model"', '"data"'), ('"vocabulary": {', '"versions"')):
        first = text.index(begin)
        spans += range(first, text.index(end, first))
    changed = bytearray(before)
    changed[data.draw(st.sampled_from(spans))] ^= 1 << data.draw(st.integers(0, 7))
    write(path, bytes(changed))
    try:
        opened = open_checkpoint(folder)
    except OpenError:
        return
    finally:
        write(path, before)
    assert (opened.run.model, opened.run.diffusion) == (was.run.model, was.run.diffusion)
    assert opened.vocabulary == was.vocabulary


@pytest.mark.parametrize("name", [*WITH_DIGEST, "run.json", "checkpoints/step-000002/manifest.json"])
@pytest.mark.parametrize("size", [None, 0, 0.5, -1])
def test_a_missing_or_cut_file_is_named(own, name, size):
    path = own / name
    if size is None:
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: int(size * len(content)) if 0 <= size < 1 else size - 1])
    with pytest.raises(OpenError) as error:
        open_checkpoint(own)
    assert path.name in one_line(error)


@pytest.mark.parametrize("number", [0, 1, 99, "2", None])
def test_another_format_is_refused_with_both_numbers(own, number):
    values = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps(values | {"format": number, "versions": {"transfusion": "9.8"}}))
    message = f"format {number} by transfusion 9.8; this one reads format 2"
    with pytest.raises(OpenError, match=message) as error:
        open_checkpoint(own)
    one_line(error)


@pytest.mark.parametrize("where", ["", "model", "training", "data", "generation", "diffusion"])
def test_an_unknown_field_is_named(own, where):
    values = json.loads((own / "run.json").read_text())
    (values["run"][where] if where else values["run"])["depth"] = 3
    (own / "run.json").write_text(json.dumps(values))
    name = f"{where}.depth" if where else "depth"
    with pytest.raises(OpenError, match=f"run.json: unknown field {name}") as error:
        describe_run(own)
    one_line(error)


def places(value, at=()):
    """The way to everything inside a JSON value."""
    yield at
    if isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inside, (*at, key))


ODD = st.sampled_from((None, 0, -1, 3, 0.5, "", "x", "8x8x8", [], ["x"], {}, {"x": 1}, True))


@many
@given(st.data())
def test_whatever_stands_in_run_json_is_an_error_in_one_line_or_opens(folder, data):
    """Any value in any place: a number where a list was, no heads, an empty object."""
    path = folder / "run.json"
    before = path.read_bytes()
    values = json.loads(before)
    *way, last = data.draw(st.sampled_from(list(places(values))[1:]))
    inside = values
    for key in way:
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[last] = data.draw(ODD)
    else:
        del inside[last]
    path.write_text(json.dumps(values))
    try:
        open_checkpoint(folder)
    except OpenError as error:
        assert len(str(error).splitlines()) == 1
    finally:
        write(path, before)


NO_JSON = [b"", b"{", b"[]", b"3", b"\xff\xfe", b"null", b"[" * 100_000, b'{"format": ' + b"1" * 5000 + b"}"]


@pytest.mark.parametrize("content", NO_JSON, ids=range(len(NO_JSON)))
@pytest.mark.parametrize("name", ["run.json", "checkpoints/step-000002/manifest.json"])
def test_what_is_no_json_object_is_refused(own, name, content):
    (own / name).write_bytes(content)
    with pytest.raises(OpenError) as error:
        open_checkpoint(own)
    assert Path(name).name in one_line(error)


# Hostile


def sign(checkpoint: Path) -> None:
    """A manifest that is right, whatever lies there."""
    digests = {
        str(path): hashlib.sha256((checkpoint / path).read_bytes()).hexdigest()
        for path in files(checkpoint) if path.name != "manifest.json"
    }  # fmt: skip
    (checkpoint / "manifest.json").write_text(json.dumps(digests))


@pytest.mark.parametrize("name", ["../secret", "average/../../secret", "../../../../secret", "{absolute}"])
def test_a_manifest_that_leads_outside_is_refused(own, name):
    """Even with the right digest: else a run could ask about any file of whoever opens it."""
    checkpoint, content = newest_checkpoint(own), b"not yours"
    name = name.format(absolute=own.parent / "outside")
    (checkpoint / name).resolve().write_bytes(content)
    values = read_json(checkpoint / "manifest.json")
    values[name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(OpenError) as error:
        open_checkpoint(own)
    one_line(error)


@pytest.mark.parametrize("digest", [None, 3, [], {}, "", "0" * 64])
def test_a_manifest_with_odd_digests_is_refused(own, digest):
    values = read_json(newest_checkpoint(own) / "manifest.json")
    (newest_checkpoint(own) / "manifest.json").write_text(json.dumps(dict.fromkeys(values, digest)))
    with pytest.raises(OpenError):
        open_checkpoint(own)


@pytest.mark.parametrize("latest", ["../../elsewhere", "{absolute}", ".", ".."])
def test_latest_cannot_lead_outside(own, latest):
    """It names one of the checkpoints beside it; else the highest step is opened, or nothing."""
    outside = own.parent / "elsewhere"
    shutil.copytree(own / "checkpoints" / "step-000001", outside)
    (own / "checkpoints" / "latest").write_text(latest.format(absolute=outside))
    assert holds_step(own, 2)


def test_latest_that_is_no_text_is_an_error_or_passed_over(own):
    (own / "checkpoints" / "latest").write_bytes(b"step-00000\xff")
    try:
        assert holds_step(own, 2)
    except OpenError as error:
        assert "latest" in str(error)


def test_a_tensor_file_that_the_manifest_does_not_name_is_not_read(own):
    place = newest_checkpoint(own) / "ema"
    (shard,) = place.iterdir()
    changed = {name: value + 1 for name, value in load_file(shard).items()}
    save_file(changed, place / "shard-00000-model-00001-of-00001.safetensors")
    save_file(changed, place / "shard-99999-model-00001-of-00001.safetensors")
    try:
        assert holds_step(own, 2)
    except OpenError as error:
        assert "shard-" in str(error)


@pytest.mark.parametrize("forgotten", ["state.json", "ema/model.safetensors"])
def test_a_file_that_the_manifest_forgets_is_not_trusted(own, forgotten):
    values = read_json(newest_checkpoint(own) / "manifest.json")
    del values[forgotten]
    (newest_checkpoint(own) / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(OpenError):
        open_checkpoint(own)


@pytest.mark.parametrize("state", [{}, [], {"step": "two"}, 3])
def test_a_state_that_says_nothing_is_an_error(own, state):
    (newest_checkpoint(own) / "state.json").write_text(json.dumps(state))
    sign(newest_checkpoint(own))
    with pytest.raises(OpenError) as error:
        open_checkpoint(own)
    assert "state.json" in one_line(error)


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("instead", [False, True])
def test_pickles_are_never_loaded(own, instead):
    """Beside the weights, or in their place, under every name that some library would unpickle."""
    mark = own.parent / "executed"
    trap = pickle.dumps(Trap(mark))
    checkpoint = newest_checkpoint(own)
    for place in (own, checkpoint, checkpoint / "ema", checkpoint / "model"):
        for name in ("model.pt", "pytorch_model.bin", ".metadata", "__0_0.distcp", "codec.pkl", "codec.npy"):
            (place / name).write_bytes(trap)
    if instead:
        for shard in checkpoint.rglob("*.safetensors"):
            shard.write_bytes(trap)
    sign(checkpoint)
    if instead:
        with pytest.raises(OpenError) as error:
            open_checkpoint(own)
        one_line(error)
    else:
        assert holds_step(own, 2)
    assert not mark.exists()
    pickle.loads(trap)  # noqa: S301 (the trap works)
    assert mark.exists()


UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "eval", "exec", "compile", "__import__"}


def test_no_file_of_the_package_could_unpickle():
    """But for tensors alone, in one place."""
    assert len(package()) > 30
    for path, tree in package().items():
        for node in without_allowed_load(path, tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {m.split(".")[0] for m in modules} & UNSAFE_MODULES, path
                assert not (getattr(node, "module", "") == "torch" and "load" in modules), path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNSAFE_CALLS, path
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "weights_only", "trust_remote_code"), path


# Saves that fail


class Killed(BaseException):
    """What a process that is no longer there would have done next."""


class Disk:
    """All that is done to files while it is open, counted; from number `last` on (or `only` then) it fails.

    `how`: the error that a disk gives to all who write, but not to who deletes; or `Killed`: nothing happens.
    """

    def __init__(self, last: int | None = None, how: int | type = errno.ENOSPC, only: bool = False):
        self.last, self.how, self.only, self.done = last, how, only, []

    def __enter__(self):
        self.patches = ExitStack()
        names = ("fsync", "rename", "replace", "mkdir", *(("unlink", "rmdir") if self.how is Killed else ()))
        for name in names:
            self._patch(os, name)
        self._patch(io, "open", lambda path, mode="r", *_, **__: not set(mode).isdisjoint("wax+"))
        return self

    def __exit__(self, *_):
        self.patches.close()

    def _patch(self, module, name: str, counts=lambda *_, **__: True) -> None:
        real = getattr(module, name)

        def instead(*args, **named):
            if counts(*args, **named):
                self.done.append(name)
                now = len(self.done) - 1
                if self.last is not None and (now == self.last if self.only else now >= self.last):
                    raise Killed if self.how is Killed else OSError(self.how, os.strerror(self.how))
            return real(*args, **named)

        self.patches.enter_context(mock.patch.object(module, name, instead))


def save_step(place: Path, step: int, seed: int | None = None, keep: int = 2) -> Path:
    return save(place, step, weights(step if seed is None else seed), {"step": step}, keep)


def operations(step: int, how=errno.ENOSPC, keep: int = 2) -> list[str]:
    """What one save of this step does to files, in a run that has step 1."""
    with TemporaryDirectory() as place:
        save_step(Path(place), 1, keep=keep)
        with Disk(how=how) as disk:
            save_step(Path(place), step, keep=keep)
        return disk.done


def test_operations_are_counted():
    """Else the tests below would test nothing: three tensor files, state, manifest and latest are opened."""
    done = operations(2)
    assert done.count("open") == 6
    assert done.count("fsync") >= 6
    assert done.count("rename") + done.count("replace") == 2


@pytest.mark.parametrize(("code", "only"), [(errno.ENOSPC, False), (errno.EACCES, True)])
def test_wherever_a_save_fails_it_says_so_and_the_earlier_checkpoint_opens(tmp_path, only, code):
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    for number, what in enumerate(operations(2)):
        with Disk(number, code, only), pytest.raises(SaveError) as error:
            save_step(tmp_path, 2)
        message = one_line(error)
        assert os.strerror(code) in message, what
        assert "step 2" in message
        assert holds_step(tmp_path, 1), what
    save_step(tmp_path, 2)
    assert holds_step(tmp_path, 2)


def test_nothing_is_left_of_a_save_that_failed(tmp_path):
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    before = files(tmp_path)
    for number, what in enumerate(operations(2)):
        with Disk(number), pytest.raises(SaveError):
            save_step(tmp_path, 2)
        assert files(tmp_path) == before, (number, what)
        assert not list(tmp_path.rglob("*.tmp"))


def test_wherever_a_process_is_killed_a_whole_checkpoint_opens(folder, tmp_path):
    """keep = 1, so that the earlier one is also thrown away."""
    shutil.copytree(folder, tmp_path / "before")
    shutil.rmtree(tmp_path / "before" / "checkpoints")
    save_step(tmp_path / "before", 1)
    for number, what in enumerate(operations(2, Killed, keep=1)):
        place = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        with Disk(number, Killed), pytest.raises(Killed):
            save_step(place, 2, keep=1)
        assert holds_step(place, 1) or holds_step(place, 2), (number, what)
        save_step(place, 2, keep=1)  # and the next try is not disturbed by what lies about
        assert holds_step(place, 2)


@pytest.mark.parametrize("keep", [1, 2])
def test_wherever_a_second_save_of_a_step_is_killed_a_whole_checkpoint_opens(folder, tmp_path, keep):
    """A run stopped in a step with a checkpoint saves it twice; so does one begun again when done."""
    before = shutil.copytree(folder, tmp_path / "before")
    if keep == 1:
        shutil.rmtree(before / "checkpoints" / "step-000001")
    counted = shutil.copytree(before, tmp_path / "counted")
    with Disk(how=Killed) as disk:
        save_step(counted, 2, keep=keep)
    for number, what in enumerate(disk.done):
        place = shutil.copytree(before, tmp_path / str(number))
        with Disk(number, Killed), pytest.raises(Killed):
            save_step(place, 2, keep=keep)
        assert holds_step(place, 2) or (keep == 2 and holds_step(place, 1)), (number, what)


# In the background


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path):
    """Whatever becomes of it while it is written."""
    tensors, state = {"a": {"b": torch.zeros(1000), "c": torch.zeros(())}}, {"step": 1}
    with held(Saver(tmp_path, 3, SINGLE_PROCESS)) as (saver, release):
        saver.save(1, tensors, state)
        for value in tensors["a"].values():
            value += 1
        state["step"] = 2
        assert not (tmp_path / "checkpoints" / "step-000001").exists()  # it has not waited
        release.set()
    verify_checkpoint(newest_checkpoint(tmp_path))
    found = {"a": {"b": torch.ones(1000), "c": torch.ones(())}}
    assert restore_newest(tmp_path, found, SINGLE_PROCESS) == (newest_checkpoint(tmp_path), {"step": 1})
    assert not any(value.any() for value in found["a"].values())


@contextmanager
def held(saver: Saver):
    """The saver's thread begins to write when it is let go."""
    release, real = threading.Event(), saver._write

    def write(*args):
        assert release.wait(60)
        real(*args)

    saver._write = write
    with saver:
        yield saver, release
        release.set()


@pytest.mark.parametrize("where", ["save", "finish", "leaving"])
def test_a_save_that_failed_is_told_when_next_one_asks(tmp_path, where):
    """At the next save, which is not begun then; or when it is waited for; or when the saver is left."""
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    disk = Disk(0)
    with pytest.raises(SaveError, match="could not save step 2 in .*: No space left") as error:
        with Saver(tmp_path, 2, SINGLE_PROCESS) as saver:
            with disk:
                saver.save(2, weights(2), {"step": 2})
                assert wait([saver.writing]).done
            if where == "save":
                saver.save(3, weights(3), {"step": 3})
            elif where == "finish":
                saver.finish()
            assert where == "leaving"
    one_line(error)
    assert holds_step(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-000001"]


def test_an_error_that_came_first_is_not_hidden_by_one_of_the_disk(tmp_path):
    with pytest.raises(KeyError, match="first"), Saver(tmp_path, 2, SINGLE_PROCESS) as saver:
        with Disk(0):
            saver.save(2, weights(2), {"step": 2})
            wait([saver.writing])
        raise KeyError("first")


@pytest.mark.parametrize("first", [None, KeyError("first")])
def test_another_rank_that_has_gone_is_no_traceback_either(tmp_path, first):
    """It is how most end when one of them is killed while they save."""
    gone = mock.patch.object(Saver, "_write_part", side_effect=RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore"))
    with gone, pytest.raises(SaveError if first is None else KeyError) as error, Saver(tmp_path, 2, SINGLE_PROCESS) as saver:
        saver.save(2, weights(2), {"step": 2})
        if first is not None:
            raise first
    assert ("could not save step 2 in" in one_line(error)) == (first is None)


def test_after_a_save_that_failed_the_next_one_works(tmp_path):
    begin_run(tmp_path)
    with Saver(tmp_path, 2, SINGLE_PROCESS) as saver:
        with Disk(0), pytest.raises(SaveError):
            saver.save(1, weights(1), {"step": 1})
            saver.finish()
        saver.save(2, weights(2), {"step": 2})
    assert holds_step(tmp_path, 2)


@many
@given(st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(0, 12), st.booleans()), min_size=1, max_size=7),
       st.integers(1, 3))  # fmt: skip
def test_however_saves_fail_and_die_the_last_whole_one_is_found_and_never_thrown_away(saves, keep):
    """Each of them writes some step, and from its `last` operation on the disk is full, or the process is no more."""
    with TemporaryDirectory() as place:
        written = None
        for number, (step, last, killed) in enumerate(saves):
            with Disk(last, Killed if killed else errno.ENOSPC) as disk:
                try:
                    save(Path(place), step, {"a": {"b": torch.tensor(number)}}, {"number": number}, keep)
                except (SaveError, Killed):
                    pass
            if last is None or len(disk.done) <= last:
                written = number
            if written is None:
                continue
            tensors = {"a": {"b": torch.tensor(-1)}}
            verify_checkpoint(newest_checkpoint(Path(place)))
            _, state = restore_newest(Path(place), tensors, SINGLE_PROCESS, pytest.fail)
            assert tensors["a"]["b"] == state["number"]
            found = read_json(newest_checkpoint(Path(place)) / "state.json")["number"]
            assert found in (written, number)  # killed behind the last rename, it is there all the same
            written = found


# Damaged, and the one before

DAMAGES = {
    "a flipped bit": lambda path: write(path, flipped(path, 0.7, 3)),
    "a cut file": lambda path: write(path, path.read_bytes()[:-2]),
    "an empty file": lambda path: write(path, b""),
    "a missing file": Path.unlink,
    "all files beside it missing too": lambda path: [one.unlink() for one in path.parent.iterdir() if one.is_file()],
}
IN_CHECKPOINT = [name for name in (*WITH_DIGEST, *WITHOUT) if "step-000002" in name]


def empty() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors to be filled in."""
    return {part: {name: torch.zeros_like(value) for name, value in inside.items()} for part, inside in weights(0).items()}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(own, name, damage):
    """One line says so; what was damaged stays to be looked at, until its step is damaged again."""
    damage(own / name)
    said, tensors = [], empty()
    path, state = restore_newest(own, tensors, SINGLE_PROCESS, said.append)
    assert (path.name, state) == ("step-000001", {"step": 1})
    assert all(same(tensors[part], weights(1)[part]) for part in tensors)
    (line,) = said
    assert len(line.splitlines()) == 1
    assert line.endswith("it is set aside as step-000002.damaged, and the checkpoint before it is taken")
    assert (own / "checkpoints" / "step-000002.damaged").is_dir()
    assert holds_step(own, 1)  # for everybody else too, though `latest` names the other
    save_step(own, 2)
    assert holds_step(own, 2)
    (newest_checkpoint(own) / "manifest.json").unlink()
    assert restore_newest(own, tensors, SINGLE_PROCESS, said.append)[0].name == "step-000001"


def test_when_all_are_damaged_it_is_said_in_one_line_and_nothing_is_begun_anew(own):
    """Nor the next time: a run that has been trained shall not silently start from nothing."""
    for step in (1, 2):
        spoilt = own / "checkpoints" / f"step-00000{step}" / "state.json"
        write(spoilt, spoilt.read_bytes() + b" ")
    said = []
    with pytest.raises(OpenError, match="no checkpoint of .* is whole") as error:
        restore_newest(own, empty(), SINGLE_PROCESS, said.append)
    one_line(error)
    assert [line.split(" was changed")[0].split("/")[-2] for line in said] == ["step-000002", "step-000001"]


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    begin_run(tmp_path)
    assert restore_newest(tmp_path, empty(), SINGLE_PROCESS, pytest.fail) is None
    (tmp_path / "checkpoints" / "step-000001.tmp").mkdir(parents=True)
    assert restore_newest(tmp_path, empty(), SINGLE_PROCESS, pytest.fail) is None


def test_wherever_begin_fails_the_run_is_as_it_was_or_not_there(tmp_path):
    with Disk() as disk:
        begin_run(tmp_path / "counted")
    for number in range(len(disk.done)):
        with Disk(number), pytest.raises(OSError, match="No space"):
            begin_run(tmp_path / "new")
        with pytest.raises(OpenError, match="not a run"):
            describe_run(tmp_path / "new")
    begin_run(tmp_path / "new")
    for number in range(len(disk.done)):
        with Disk(number), pytest.raises(OSError, match="No space"):
            begin_run(tmp_path / "new")
        assert describe_run(tmp_path / "new").run == tiny()


def save_under(folder: Path, limits: list[int]) -> None:
    """Save step 2 where no file may have more than so many bytes, one limit after the other, and then without any."""
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        outcome = "saved"
        try:
            save_step(folder, 2)
        except SaveError as error:
            outcome = f"refused {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(outcome)
        print("whole" if holds_step(folder, 1) else "broken")
    save_step(folder, 2)
    print("whole" if holds_step(folder, 2) else "broken")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_disk_that_really_takes_no_more_is_said_in_one_line(tmp_path):
    """Files may have no more than so many bytes: each kind of file is in turn the one that does not fit."""
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    sizes = sorted({path.stat().st_size for path in newest_checkpoint(tmp_path).rglob("*") if path.is_file()})
    limits = [0, *(size - 1 for size in sizes)]
    done = run(save_under, tmp_path, limits)
    lines = (said := done.stdout).splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 2 * len(limits) + 1, said
    assert all(line.startswith("refused could not save step 2 in ") for line in lines[:-1:2]), said
    assert all("File too large" in line for line in lines[:-1:2]), said
    assert set(lines[1::2]) | {lines[-1]} == {"whole"}


def save_again_and_again(folder: Path) -> None:
    ballast = {"a": torch.zeros(2_000_000)}
    for step in range(2, 1000):
        save(folder, step, {"ballast": ballast, **run_tensors(tiny(), step)}, {"step": step}, 2)


def test_a_process_that_is_really_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path):
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    process = Process(save_again_and_again, tmp_path)
    try:
        until = time.monotonic() + 90
        while not (found := [*tmp_path.glob("checkpoints/step-*[2-9].tmp/ballast")]):
            assert process.poll() is None, process.stderr
            assert time.monotonic() < until
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()
    step = open_checkpoint(tmp_path).step
    assert step >= int(found[0].parent.name[5:11]) - 1
    assert holds_step(tmp_path, step)
    save_step(tmp_path, step + 1)
    assert holds_step(tmp_path, step + 1)


def test_a_field_that_a_later_version_adds_changes_no_earlier_run(tmp_path):
    write_run(tmp_path)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["run"]["model"]["patches"]  # as if it were written before there was a choice
    values["config_sha256"] = hash_config(values["run"], values["vocabulary"])
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path).run.model.patches == "linear"
    values["run"]["model"]["heads"] = 1
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(OpenError, match="no longer those of its weights"):
        open_checkpoint(tmp_path)
