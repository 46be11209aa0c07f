"""Runs on disk: complete or absent, verified before use, and nothing in them is ever executed."""

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
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.read import describe_run, fill_tensors, find_newest_checkpoint, restore_newest, verify_checkpoint
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
    """A checkpoint's tensors; read only."""
    return run_tensors(tiny(), seed)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with two checkpoints. Tests that damage it restore it."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, (1, 2))
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    return shutil.copytree(folder, tmp_path / "run")


def one_line(error) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)


def opens_step(folder: Path, step: int) -> bool:
    """The newest checkpoint is this step, bit for bit."""
    opened = open_checkpoint(folder)
    return opened.step == step and same(opened.model.state_dict(), weights(step)["ema"])


# Round trips


def test_run_opens_as_saved(folder):
    run, encoder = prepared(small_run())
    description = describe_run(folder)
    assert (description.run, description.vocabulary, description.notes) == (run, encoder.vocabulary, {"made": "for a test"})
    text = "three <s> é\n"
    assert description.tokenizer.encode(text) == encoder.tokenizer.encode(text)
    for name, value in encoder.codec.tensors().items():
        assert (description.codec.tensors()[name] == value).all()
    for kind, part in (("ema", "ema"), ("raw", "model")):
        opened = open_checkpoint(folder, kind)
        assert opened.step == 2
        assert same(opened.model.state_dict(), weights(2)[part])
        assert not opened.model.training
        assert not any(p.requires_grad for p in opened.model.parameters())


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
shapes = st.lists(st.integers(1, 4), max_size=3)
generators = st.integers(0, 99).map(torch.Generator().manual_seed)
tensors = st.builds(
    lambda shape, dtype, generator: torch.randn(shape, generator=generator).mul(9).to(dtype),
    shapes, st.sampled_from(DTYPES), generators,
)  # fmt: skip
names = st.text("abc.", min_size=1, max_size=6)
parts = st.dictionaries(st.sampled_from("xyz"), st.dictionaries(names, tensors, min_size=1, max_size=4), min_size=1)


@few
@given(parts, st.dictionaries(names, st.integers() | st.floats(allow_nan=False) | st.none()))
def test_tensors_and_state_are_restored_bit_for_bit(values, state):
    """Of any dtype and shape, also 0-d tensors."""
    with TemporaryDirectory() as folder:
        checkpoint = save(Path(folder), 7, values, state, keep=1)
        verify_checkpoint(checkpoint)
        restored = {part: {n: torch.zeros_like(v) for n, v in tensors.items()} for part, tensors in values.items()}
        fill_tensors(checkpoint, restored)
        assert all(same(restored[part], tensors) for part, tensors in values.items())
        assert read_json(checkpoint / "state.json") == state


@pytest.fixture
def sharded(copy) -> Path:
    """A run whose checkpoint several ranks wrote, with torch's DCP."""
    from torch.distributed import checkpoint as dcp

    for part, values in weights(2).items():
        folder = find_newest_checkpoint(copy) / part
        (folder / "model.safetensors").unlink()
        dcp.save(dict(values), storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True), no_dist=True)
        assert [path.name for path in folder.iterdir()] == ["shard-00001-model-00001-of-00001.safetensors"]
    return copy


def test_one_process_opens_dcp_shards(sharded):
    restored = zero_tensors()
    fill_tensors(find_newest_checkpoint(sharded), restored)
    assert all(same(restored[part], weights(2)[part]) for part in restored)


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_run_opens_in_the_precision_of_the_device(request, layout, monkeypatch):
    """As on CUDA: matrices in bfloat16 from the start, without a copy in float32; all else in float32."""
    allocated, to_empty = [], torch.nn.Module.to_empty

    def counted(self, **options):
        allocated.extend(parameter.nbytes for parameter in to_empty(self, **options).parameters())
        return self

    monkeypatch.setattr("transfusion.checkpoint.open.precision", lambda device: torch.bfloat16)
    monkeypatch.setattr("transfusion.checkpoint.open.verify_checkpoint", lambda checkpoint: None)  # of other files
    monkeypatch.setattr(torch.nn.Module, "to_empty", counted)
    model = open_checkpoint(request.getfixturevalue(layout)).model
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    values = model.state_dict()
    assert matrices and sum(allocated) == sum(value.nbytes for value in values.values())
    for name, value in weights(2)["ema"].items():
        lowered = name in matrices or name.removesuffix("bias") + "weight" in matrices
        assert values[name].equal(value.bfloat16() if lowered else value), name


def test_tied_weights_are_restored(tmp_path):
    config = replace(tiny().model, tie_word_embeddings=True)
    model, other = build(config, 0), build(config, 1)
    fill_tensors(save(tmp_path, 1, {"model": model.state_dict()}, {}, 1), {"model": other.state_dict()})
    assert same(other.state_dict(), model.state_dict())
    assert "head.weight" not in other.state_dict()


OTHER_SHAPES = [("width", 64), ("layers", 3), ("intermediate_size", 64), ("vocab_size", 512), ("kv_heads", 1)]


@pytest.mark.parametrize(("field", "value"), OTHER_SHAPES)
def test_weights_of_another_shape_are_refused(folder, field, value):
    model = build(replace(tiny().model, **{field: value}), 0)
    with pytest.raises(OpenError, match="ema does not fit this run") as error:
        fill_tensors(find_newest_checkpoint(folder), {"ema": model.state_dict()})
    assert "ema" in one_line(error)


# Which checkpoint is opened


@few
@given(st.sets(st.integers(0, 999_999), min_size=1, max_size=6), st.integers(1, 4))
def test_newest_checkpoints_are_kept_and_the_last_is_opened(steps, keep):
    with TemporaryDirectory() as folder:
        for step in sorted(steps):
            save(Path(folder), step, {"a": {"b": torch.tensor(step)}}, {}, keep)
            names = sorted(path.name for path in (Path(folder) / "checkpoints").glob("step-*"))
            assert names == [f"step-{s:06d}" for s in sorted(steps) if s <= step][-keep:]
            assert find_newest_checkpoint(Path(folder)).name == f"step-{step:06d}"


@few
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.integers(1, 2))
def test_last_saved_checkpoint_is_the_newest(steps, keep):
    """Also when the folder has later steps, of a run that was restarted from an earlier one."""
    with TemporaryDirectory() as folder:
        for number, step in enumerate(steps):
            checkpoint = save(Path(folder), step, {"a": {"b": torch.tensor(number)}}, {"number": number}, keep)
            assert find_newest_checkpoint(Path(folder)) == checkpoint
            verify_checkpoint(checkpoint)
            assert read_json(checkpoint / "state.json") == {"number": number}


def test_steps_above_a_million_are_sorted_and_deleted_correctly(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, {"a": {"b": torch.tensor(step)}}, {}, keep=2)
    names = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert names == {"step-1000000", "step-1000001"}
    (tmp_path / "checkpoints" / "latest").unlink()
    assert find_newest_checkpoint(tmp_path).name == "step-1000001"


def test_second_save_of_a_step_replaces_the_first(tmp_path):
    begin_run(tmp_path)
    for seed in (5, 1):
        save(tmp_path, 1, weights(seed), {"step": 1}, keep=2)
    assert opens_step(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["step-000001"]


@pytest.mark.parametrize("content", [None, b"", b"step-000009", b"step-0000", b"nonsense\n"])
def test_highest_step_is_opened_without_a_valid_latest_file(copy, content):
    latest = copy / "checkpoints" / "latest"
    latest.unlink() if content is None else latest.write_bytes(content)
    assert opens_step(copy, 2)


def test_latest_file_selects_the_checkpoint_and_tmp_folders_are_ignored(copy):
    (copy / "checkpoints" / "latest").write_text("step-000001\n")
    assert opens_step(copy, 1)
    (copy / "checkpoints" / "latest").unlink()
    shutil.copytree(find_newest_checkpoint(copy), copy / "checkpoints" / "step-000003.tmp")
    assert opens_step(copy, 2)


def test_folder_without_run_or_checkpoint_is_refused(tmp_path):
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


def flip_bit(path: Path, offset: float, bit: int) -> bytes:
    """The file's content with one bit flipped; `offset` is from 0, the start, to 1, the end."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(offset * len(content)))] ^= 1 << bit
    return bytes(content)


WITH_DIGEST = ["tokenizer.json", "codec.safetensors"] + [
    f"checkpoints/step-000002/{name}"
    for name in ("state.json", *(f"{part}/model.safetensors" for part in ("ema", "model", "optimizer")))
]  # fmt: skip
WITHOUT_DIGEST = ["run.json", "checkpoints/latest", "checkpoints/step-000002/manifest.json"]


def test_file_lists_are_complete(folder):
    """The two tests below use all files of a run."""
    names = {str(path) for path in files(folder) if "step-000001" not in path.parts}
    assert names == {*WITH_DIGEST, *WITHOUT_DIGEST}


@many
@given(st.sampled_from(WITH_DIGEST), st.floats(0, 1), st.integers(0, 7))
def test_flipped_bit_is_detected_and_its_file_named(folder, name, offset, bit):
    path = folder / name
    before = path.read_bytes()
    write(path, flip_bit(path, offset, bit))
    try:
        with pytest.raises(OpenError) as error:
            open_checkpoint(folder)
        assert str(path) in one_line(error)
        if "checkpoints" in name:
            with pytest.raises(OpenError, match=path.name):
                verify_checkpoint(find_newest_checkpoint(folder))
            describe_run(folder)  # does not need the checkpoint
        else:
            with pytest.raises(OpenError, match=path.name):
                describe_run(folder)
    finally:
        write(path, before)


@many
@given(st.sampled_from(WITHOUT_DIGEST), st.floats(0, 1), st.integers(0, 7))
def test_flipped_bit_in_a_file_without_digest_is_an_error_or_harmless(folder, name, offset, bit):
    """Users may read and edit these files; their values are checked."""
    path = folder / name
    before = path.read_bytes()
    write(path, flip_bit(path, offset, bit))
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
def test_changed_model_config_is_detected(folder, data):
    """One flipped bit in run.json's model, diffusion or vocabulary is refused, or the values are the same as before."""
    path, expected = folder / "run.json", describe_run(folder)
    before = path.read_bytes()
    text = before.decode()
    spans = []
    for start, end in (('"model"', '"data"'), ('"vocabulary": {', '"versions"')):
        first = text.index(start)
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
    assert (opened.run.model, opened.run.diffusion) == (expected.run.model, expected.run.diffusion)
    assert opened.vocabulary == expected.vocabulary


@pytest.mark.parametrize("name", [*WITH_DIGEST, "run.json", "checkpoints/step-000002/manifest.json"])
@pytest.mark.parametrize("size", [None, 0, 0.5, -1])
def test_missing_or_truncated_file_is_named(copy, name, size):
    path = copy / name
    if size is None:
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: int(size * len(content)) if 0 <= size < 1 else size - 1])
    with pytest.raises(OpenError) as error:
        open_checkpoint(copy)
    assert path.name in one_line(error)


@pytest.mark.parametrize("number", [0, 1, 99, "2", None])
def test_another_format_is_refused_with_both_numbers(copy, number):
    values = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(values | {"format": number, "versions": {"transfusion": "9.8"}}))
    message = f"format {number}, written by transfusion 9.8; this version reads format 3"
    with pytest.raises(OpenError, match=message) as error:
        open_checkpoint(copy)
    one_line(error)


@pytest.mark.parametrize("where", ["", "model", "training", "data", "generation", "diffusion"])
def test_unknown_field_is_named(copy, where):
    values = json.loads((copy / "run.json").read_text())
    (values["run"][where] if where else values["run"])["depth"] = 3
    (copy / "run.json").write_text(json.dumps(values))
    name = f"{where}.depth" if where else "depth"
    with pytest.raises(OpenError, match=f"run.json: unknown field {name}") as error:
        describe_run(copy)
    one_line(error)


def json_paths(value, path=()):
    """The path of keys to every value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from json_paths(child, (*path, key))


ODD_VALUES = st.sampled_from((None, 0, -1, 3, 0.5, "", "x", "8x8x8", [], ["x"], {}, {"x": 1}, True))


@many
@given(st.data())
def test_any_value_in_run_json_opens_or_is_a_one_line_error(folder, data):
    """Any value at any path: a number instead of a list, no heads, an empty object."""
    path = folder / "run.json"
    before = path.read_bytes()
    values = json.loads(before)
    *keys, last = data.draw(st.sampled_from(list(json_paths(values))[1:]))
    parent = values
    for key in keys:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = data.draw(ODD_VALUES)
    else:
        del parent[last]
    path.write_text(json.dumps(values))
    try:
        open_checkpoint(folder)
    except OpenError as error:
        assert len(str(error).splitlines()) == 1
    finally:
        write(path, before)


NOT_JSON = [b"", b"{", b"[]", b"3", b"\xff\xfe", b"null", b"[" * 100_000, b'{"format": ' + b"1" * 5000 + b"}"]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
@pytest.mark.parametrize("name", ["run.json", "checkpoints/step-000002/manifest.json"])
def test_file_without_a_json_object_is_refused(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(OpenError) as error:
        open_checkpoint(copy)
    assert Path(name).name in one_line(error)


# Hostile files


def write_manifest(checkpoint: Path) -> None:
    """Write a correct manifest of the present files."""
    digests = {
        str(path): hashlib.sha256((checkpoint / path).read_bytes()).hexdigest()
        for path in files(checkpoint) if path.name != "manifest.json"
    }  # fmt: skip
    (checkpoint / "manifest.json").write_text(json.dumps(digests))


@pytest.mark.parametrize("name", ["../secret", "average/../../secret", "../../../../secret", "{absolute}"])
def test_manifest_with_a_path_outside_is_refused(copy, name):
    """Even with the right digest: else a run could test the content of any file on the user's machine."""
    checkpoint, content = find_newest_checkpoint(copy), b"not yours"
    name = name.format(absolute=copy.parent / "outside")
    (checkpoint / name).resolve().write_bytes(content)
    values = read_json(checkpoint / "manifest.json")
    values[name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(OpenError) as error:
        open_checkpoint(copy)
    one_line(error)


@pytest.mark.parametrize("digest", [None, 3, [], {}, "", "0" * 64])
def test_manifest_with_invalid_digests_is_refused(copy, digest):
    values = read_json(find_newest_checkpoint(copy) / "manifest.json")
    (find_newest_checkpoint(copy) / "manifest.json").write_text(json.dumps(dict.fromkeys(values, digest)))
    with pytest.raises(OpenError):
        open_checkpoint(copy)


@pytest.mark.parametrize("latest", ["../../elsewhere", "{absolute}", ".", ".."])
def test_latest_file_cannot_point_outside(copy, latest):
    """It must name a checkpoint of the same folder; else the highest step is opened."""
    outside = copy.parent / "elsewhere"
    shutil.copytree(copy / "checkpoints" / "step-000001", outside)
    (copy / "checkpoints" / "latest").write_text(latest.format(absolute=outside))
    assert opens_step(copy, 2)


def test_latest_file_that_is_not_text_is_an_error_or_ignored(copy):
    (copy / "checkpoints" / "latest").write_bytes(b"step-00000\xff")
    try:
        assert opens_step(copy, 2)
    except OpenError as error:
        assert "latest" in str(error)


def test_tensor_file_missing_from_the_manifest_is_not_read(copy):
    part = find_newest_checkpoint(copy) / "ema"
    (shard,) = part.iterdir()
    changed = {name: value + 1 for name, value in load_file(shard).items()}
    save_file(changed, part / "shard-00000-model-00001-of-00001.safetensors")
    save_file(changed, part / "shard-99999-model-00001-of-00001.safetensors")
    try:
        assert opens_step(copy, 2)
    except OpenError as error:
        assert "shard-" in str(error)


@pytest.mark.parametrize("name", ["state.json", "ema/model.safetensors"])
def test_required_file_missing_from_the_manifest_is_refused(copy, name):
    values = read_json(find_newest_checkpoint(copy) / "manifest.json")
    del values[name]
    (find_newest_checkpoint(copy) / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(OpenError):
        open_checkpoint(copy)


@pytest.mark.parametrize("state", [{}, [], {"step": "two"}, 3])
def test_state_without_a_step_is_refused(copy, state):
    (find_newest_checkpoint(copy) / "state.json").write_text(json.dumps(state))
    write_manifest(find_newest_checkpoint(copy))
    with pytest.raises(OpenError) as error:
        open_checkpoint(copy)
    assert "state.json" in one_line(error)


class Trap:
    """Unpickling it creates a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("replace_weights", [False, True])
def test_pickles_are_never_loaded(copy, replace_weights):
    """Next to the weights or instead of them, under every name that some library would unpickle."""
    executed = copy.parent / "executed"
    trap = pickle.dumps(Trap(executed))
    checkpoint = find_newest_checkpoint(copy)
    for parent in (copy, checkpoint, checkpoint / "ema", checkpoint / "model"):
        for name in ("model.pt", "pytorch_model.bin", ".metadata", "__0_0.distcp", "codec.pkl", "codec.npy"):
            (parent / name).write_bytes(trap)
    if replace_weights:
        for shard in checkpoint.rglob("*.safetensors"):
            shard.write_bytes(trap)
    write_manifest(checkpoint)
    if replace_weights:
        with pytest.raises(OpenError) as error:
            open_checkpoint(copy)
        one_line(error)
    else:
        assert opens_step(copy, 2)
    assert not executed.exists()
    pickle.loads(trap)  # noqa: S301 (the trap works)
    assert executed.exists()


UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "eval", "exec", "compile", "__import__"}
SAFE_YAML = ("safe_load", "safe_dump")


def test_package_never_unpickles():
    """Except tensors only, in one function."""
    assert len(package()) > 30
    for path, tree in package().items():
        for node in without_allowed_load(path, tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert getattr(node, "module", "") != "yaml", path  # only with its name before each call
                modules = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {m.split(".")[0] for m in modules} & UNSAFE_MODULES, path
                assert not (getattr(node, "module", "") == "torch" and "load" in modules), path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNSAFE_CALLS, path
                assert not ast.unparse(node.func).startswith("yaml.") or node.func.attr in SAFE_YAML, path
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "weights_only", "trust_remote_code"), path


# Failed saves


class Killed(BaseException):
    """Simulates the end of the process."""


class Disk:
    """While open, records all file operations; those from number `first_failure` on (or `only` that one) fail.

    `failure`: an errno, raised by writes but not by deletions; or `Killed`, raised by both.
    """

    def __init__(self, first_failure: int | None = None, failure: int | type = errno.ENOSPC, only: bool = False):
        self.first_failure, self.failure, self.only, self.operations = first_failure, failure, only, []

    def __enter__(self):
        self.patches = ExitStack()
        names = ("fsync", "rename", "replace", "mkdir", *(("unlink", "rmdir") if self.failure is Killed else ()))
        for name in names:
            self._patch(os, name)
        self._patch(io, "open", lambda path, mode="r", *_, **__: not set(mode).isdisjoint("wax+"))
        return self

    def __exit__(self, *_):
        self.patches.close()

    def _patch(self, module, name: str, counts=lambda *_, **__: True) -> None:
        original = getattr(module, name)

        def operation(*args, **kwargs):
            if counts(*args, **kwargs):
                self.operations.append(name)
                number = len(self.operations) - 1
                first = self.first_failure
                if first is not None and (number == first if self.only else number >= first):
                    raise Killed if self.failure is Killed else OSError(self.failure, os.strerror(self.failure))
            return original(*args, **kwargs)

        self.patches.enter_context(mock.patch.object(module, name, operation))


def save_step(folder: Path, step: int, seed: int | None = None, keep: int = 2) -> Path:
    return save(folder, step, weights(step if seed is None else seed), {"step": step}, keep)


def operations(step: int, failure=errno.ENOSPC, keep: int = 2) -> list[str]:
    """The file operations of one save of this step, in a run that has step 1."""
    with TemporaryDirectory() as folder:
        save_step(Path(folder), 1, keep=keep)
        with Disk(failure=failure) as disk:
            save_step(Path(folder), step, keep=keep)
        return disk.operations


def test_file_operations_are_recorded():
    """A check of the tests below: three tensor files, state, manifest and latest are opened."""
    names = operations(2)
    assert names.count("open") == 6
    assert names.count("fsync") >= 6
    assert names.count("rename") + names.count("replace") == 2


@pytest.mark.parametrize(("code", "only"), [(errno.ENOSPC, False), (errno.EACCES, True)])
def test_save_that_fails_at_any_operation_raises_and_the_earlier_checkpoint_opens(tmp_path, only, code):
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    for number, operation in enumerate(operations(2)):
        with Disk(number, code, only), pytest.raises(SaveError) as error:
            save_step(tmp_path, 2)
        message = one_line(error)
        assert os.strerror(code) in message, operation
        assert "step 2" in message
        assert opens_step(tmp_path, 1), operation
    save_step(tmp_path, 2)
    assert opens_step(tmp_path, 2)


def test_failed_save_leaves_no_files(tmp_path):
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    before = files(tmp_path)
    for number, operation in enumerate(operations(2)):
        with Disk(number), pytest.raises(SaveError):
            save_step(tmp_path, 2)
        assert files(tmp_path) == before, (number, operation)
        assert not list(tmp_path.rglob("*.tmp"))


def test_intact_checkpoint_opens_after_a_kill_at_any_operation(folder, tmp_path):
    """keep = 1, so that the earlier checkpoint is deleted too."""
    shutil.copytree(folder, tmp_path / "before")
    shutil.rmtree(tmp_path / "before" / "checkpoints")
    save_step(tmp_path / "before", 1)
    for number, operation in enumerate(operations(2, Killed, keep=1)):
        run_folder = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        with Disk(number, Killed), pytest.raises(Killed):
            save_step(run_folder, 2, keep=1)
        assert opens_step(run_folder, 1) or opens_step(run_folder, 2), (number, operation)
        save_step(run_folder, 2, keep=1)  # leftovers do not disturb the next save
        assert opens_step(run_folder, 2)


@pytest.mark.parametrize("keep", [1, 2])
def test_intact_checkpoint_opens_after_a_kill_in_a_second_save_of_a_step(folder, tmp_path, keep):
    """A run saves a step twice when it is stopped at a checkpoint, or trained again when finished."""
    before = shutil.copytree(folder, tmp_path / "before")
    if keep == 1:
        shutil.rmtree(before / "checkpoints" / "step-000001")
    counted = shutil.copytree(before, tmp_path / "counted")
    with Disk(failure=Killed) as disk:
        save_step(counted, 2, keep=keep)
    for number, operation in enumerate(disk.operations):
        run_folder = shutil.copytree(before, tmp_path / str(number))
        with Disk(number, Killed), pytest.raises(Killed):
            save_step(run_folder, 2, keep=keep)
        assert opens_step(run_folder, 2) or (keep == 2 and opens_step(run_folder, 1)), (number, operation)


# Background saves


def test_save_stores_the_values_at_the_time_of_the_call(tmp_path):
    """Changes during the writing have no effect."""
    tensors, state = {"a": {"b": torch.zeros(1000), "c": torch.zeros(())}}, {"step": 1}
    with delay_writing(Saver(tmp_path, 3, SINGLE_PROCESS)) as (saver, release):
        saver.save(1, tensors, state)
        for value in tensors["a"].values():
            value += 1
        state["step"] = 2
        assert not (tmp_path / "checkpoints" / "step-000001").exists()  # `save` has not waited
        release.set()
    verify_checkpoint(find_newest_checkpoint(tmp_path))
    restored = {"a": {"b": torch.ones(1000), "c": torch.ones(())}}
    assert restore_newest(tmp_path, restored, SINGLE_PROCESS) == (find_newest_checkpoint(tmp_path), {"step": 1})
    assert not any(value.any() for value in restored["a"].values())


@contextmanager
def delay_writing(saver: Saver):
    """The saver's thread starts to write when `release` is set."""
    release, original_write = threading.Event(), saver._write

    def write(*args):
        assert release.wait(60)
        original_write(*args)

    saver._write = write
    with saver:
        yield saver, release
        release.set()


@pytest.mark.parametrize("where", ["save", "finish", "exit"])
def test_failed_save_raises_at_the_next_call(tmp_path, where):
    """At the next save, which then does not start; at `finish`; or at the exit of the context."""
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
            assert where == "exit"
    one_line(error)
    assert opens_step(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-000001"]


def test_first_exception_is_not_hidden_by_a_save_error(tmp_path):
    with pytest.raises(KeyError, match="first"), Saver(tmp_path, 2, SINGLE_PROCESS) as saver:
        with Disk(0):
            saver.save(2, weights(2), {"step": 2})
            wait([saver.writing])
        raise KeyError("first")


@pytest.mark.parametrize("first", [None, KeyError("first")])
def test_save_error_when_another_rank_has_stopped(tmp_path, first):
    """The other ranks fail this way when one is killed during a save."""
    failure = RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore")
    peer_failure = mock.patch.object(Saver, "_write_part", side_effect=failure)
    raises = pytest.raises(SaveError if first is None else KeyError)
    with peer_failure, raises as error, Saver(tmp_path, 2, SINGLE_PROCESS) as saver:
        saver.save(2, weights(2), {"step": 2})
        if first is not None:
            raise first
    assert ("could not save step 2 in" in one_line(error)) == (first is None)


def test_save_works_after_a_failed_one(tmp_path):
    begin_run(tmp_path)
    with Saver(tmp_path, 2, SINGLE_PROCESS) as saver:
        with Disk(0), pytest.raises(SaveError):
            saver.save(1, weights(1), {"step": 1})
            saver.finish()
        saver.save(2, weights(2), {"step": 2})
    assert opens_step(tmp_path, 2)


@many
@given(st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(0, 12), st.booleans()), min_size=1, max_size=7),
       st.integers(1, 3))  # fmt: skip
def test_last_intact_checkpoint_survives_any_failed_or_killed_saves(saves, keep):
    """Each save writes some step; from operation `first_failure` on the disk is full, or the process is killed."""
    with TemporaryDirectory() as folder:
        written = None
        for number, (step, first_failure, killed) in enumerate(saves):
            with Disk(first_failure, Killed if killed else errno.ENOSPC) as disk:
                try:
                    save(Path(folder), step, {"a": {"b": torch.tensor(number)}}, {"number": number}, keep)
                except (SaveError, Killed):
                    pass
            if first_failure is None or len(disk.operations) <= first_failure:
                written = number
            if written is None:
                continue
            tensors = {"a": {"b": torch.tensor(-1)}}
            verify_checkpoint(find_newest_checkpoint(Path(folder)))
            _, state = restore_newest(Path(folder), tensors, SINGLE_PROCESS, pytest.fail)
            assert tensors["a"]["b"] == state["number"]
            newest = read_json(find_newest_checkpoint(Path(folder)) / "state.json")["number"]
            assert newest in (written, number)  # `number` when it was killed after the last rename
            written = newest


# Damaged checkpoints

DAMAGES = {
    "a flipped bit": lambda path: write(path, flip_bit(path, 0.7, 3)),
    "a truncated file": lambda path: write(path, path.read_bytes()[:-2]),
    "an empty file": lambda path: write(path, b""),
    "a missing file": Path.unlink,
    "all files of its folder missing": lambda path: [file.unlink() for file in path.parent.iterdir() if file.is_file()],
}
IN_CHECKPOINT = [name for name in (*WITH_DIGEST, *WITHOUT_DIGEST) if "step-000002" in name]


def zero_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors to restore a checkpoint into."""
    return {part: {name: torch.zeros_like(value) for name, value in tensors.items()} for part, tensors in weights(0).items()}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_damaged_checkpoint_is_renamed_and_the_one_before_is_used(copy, name, damage):
    """It is reported in one line. The damaged one stays for inspection, until its step is damaged again."""
    damage(copy / name)
    lines, tensors = [], zero_tensors()
    path, state = restore_newest(copy, tensors, SINGLE_PROCESS, lines.append)
    assert (path.name, state) == ("step-000001", {"step": 1})
    assert all(same(tensors[part], weights(1)[part]) for part in tensors)
    (line,) = lines
    assert len(line.splitlines()) == 1
    assert line.endswith("it was renamed to step-000002.damaged, and the checkpoint before it is used")
    assert (copy / "checkpoints" / "step-000002.damaged").is_dir()
    assert opens_step(copy, 1)  # though `latest` still names step 2
    save_step(copy, 2)
    assert opens_step(copy, 2)
    (find_newest_checkpoint(copy) / "manifest.json").unlink()
    assert restore_newest(copy, tensors, SINGLE_PROCESS, lines.append)[0].name == "step-000001"


def test_error_when_all_checkpoints_are_damaged(copy):
    """A trained run must not silently start again."""
    for step in (1, 2):
        path = copy / "checkpoints" / f"step-00000{step}" / "state.json"
        write(path, path.read_bytes() + b" ")
    lines = []
    with pytest.raises(OpenError, match="no checkpoint of .* is intact") as error:
        restore_newest(copy, zero_tensors(), SINGLE_PROCESS, lines.append)
    one_line(error)
    assert [line.split(" was changed")[0].split("/")[-2] for line in lines] == ["step-000002", "step-000001"]


def test_restore_without_a_checkpoint_returns_none(tmp_path):
    begin_run(tmp_path)
    assert restore_newest(tmp_path, zero_tensors(), SINGLE_PROCESS, pytest.fail) is None
    (tmp_path / "checkpoints" / "step-000001.tmp").mkdir(parents=True)
    assert restore_newest(tmp_path, zero_tensors(), SINGLE_PROCESS, pytest.fail) is None


def test_failed_run_creation_leaves_the_old_run_or_none(tmp_path):
    with Disk() as disk:
        begin_run(tmp_path / "counted")
    for number in range(len(disk.operations)):
        with Disk(number), pytest.raises(OSError, match="No space"):
            begin_run(tmp_path / "new")
        with pytest.raises(OpenError, match="not a run"):
            describe_run(tmp_path / "new")
    begin_run(tmp_path / "new")
    for number in range(len(disk.operations)):
        with Disk(number), pytest.raises(OSError, match="No space"):
            begin_run(tmp_path / "new")
        assert describe_run(tmp_path / "new").run == tiny()


def save_with_limits(folder: Path, limits: list[int]) -> None:
    """Save step 2 with each of these limits on the size of a file in bytes, and then without a limit."""
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        outcome = "saved"
        try:
            save_step(folder, 2)
        except SaveError as error:
            outcome = f"refused {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(outcome)
        print("intact" if opens_step(folder, 1) else "damaged")
    save_step(folder, 2)
    print("intact" if opens_step(folder, 2) else "damaged")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_save_error_with_a_real_limit_on_file_size(tmp_path):
    """Each kind of file is in turn the one that is too large."""
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    sizes = sorted({path.stat().st_size for path in find_newest_checkpoint(tmp_path).rglob("*") if path.is_file()})
    limits = [0, *(size - 1 for size in sizes)]
    result = run(save_with_limits, tmp_path, limits)
    lines = (output := result.stdout).splitlines()
    assert result.returncode == 0, result.stderr
    assert len(lines) == 2 * len(limits) + 1, output
    assert all(line.startswith("refused could not save step 2 in ") for line in lines[:-1:2]), output
    assert all("File too large" in line for line in lines[:-1:2]), output
    assert set(lines[1::2]) | {lines[-1]} == {"intact"}


def save_repeatedly(folder: Path) -> None:
    ballast = {"a": torch.zeros(2_000_000)}
    for step in range(2, 1000):
        save(folder, step, {"ballast": ballast, **run_tensors(tiny(), step)}, {"step": step}, 2)


def test_real_kill_during_a_save_leaves_the_checkpoint_before(tmp_path):
    begin_run(tmp_path)
    save_step(tmp_path, 1)
    process = Process(save_repeatedly, tmp_path)
    try:
        deadline = time.monotonic() + 90
        while not (unfinished := [*tmp_path.glob("checkpoints/step-*[2-9].tmp/ballast")]):
            assert process.poll() is None, process.stderr
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()
    step = open_checkpoint(tmp_path).step
    assert step >= int(unfinished[0].parent.name[5:11]) - 1
    assert opens_step(tmp_path, step)
    save_step(tmp_path, step + 1)
    assert opens_step(tmp_path, step + 1)


def test_run_written_before_a_field_existed_opens(tmp_path):
    write_run(tmp_path)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["run"]["model"]["patches"]  # as in a version without this field
    values["config_sha256"] = hash_config(values["run"], values["vocabulary"])
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path).run.model.patches == "linear"
    values["run"]["model"]["heads"] = 1
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(OpenError, match="no longer match the weights"):
        open_checkpoint(tmp_path)
