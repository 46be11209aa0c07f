"""The data commands: output, files, bad input, training on prepared data, and processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

from tests import processes
from tests.profile import THOROUGH
from tests.sources import picture, png, write_lines, write_photos
from tests.test_cli import TINY_FITTED, command, fails
from tests.test_prepare import files_of
from transfusion.cli import main
from transfusion.data.prepare import ShardEncoder
from transfusion.data.reading.account import counted
from transfusion.data.store import open_prepared

PREPARE = ("--tokenizer-size", 300, "--records-per-shard", 16)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(prepared) -> Path:
    return prepared


def test_prepare_reports_left_out_records_and_their_list(folder, tmp_path, capsys):
    command("data", "prepare", folder / "photos", "--out", tmp_path / "out", *PREPARE)
    stderr = capsys.readouterr().err
    assert re.search(r"photos: \d+ to train on, \d+ held out; 1 left out \(1 unreadable image\): see .*quarantine", stderr)
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "metadata.jsonl:8"
    command("data", "prepare", folder / "photos", "--out", tmp_path / "out", *PREPARE)
    assert "was prepared already" in capsys.readouterr().err


def test_validate_lists_faults_by_file_and_row(folder, tmp_path, capsys):
    sources, faults = [str(folder / name) for name in ("photos", "texts.jsonl")], tmp_path / "all.jsonl"
    with pytest.raises(SystemExit) as caught:
        main(["data", "validate", *sources, "--faults", str(faults)])
    captured = capsys.readouterr()
    assert caught.value.code == 1
    assert "photos: 120 records, 119 documents, 1 fault" in captured.out
    assert "metadata.jsonl:8: cannot read the image 0007.png" in captured.out
    assert "texts: 90 records, 90 documents, 0 faults" in captured.out
    assert [json.loads(line)["where"] for line in faults.read_text().splitlines()] == ["metadata.jsonl:8"]


def test_validate_passes_intact_data(folder, capsys):
    command("data", "validate", folder / "texts.jsonl", folder / "prepared")
    assert "all shards match their SHA-256" in capsys.readouterr().out


def test_validate_of_nothing_fails(folder, tmp_path, capsys):
    """All records are passed over for a reason that is no fault."""
    path = write_lines(tmp_path / "others.jsonl", [{"key": "1", "text": "a", "status": "failed_to_download"}] * 2)
    assert "transfusion: others: no documents" in fails(capsys, 1, "data", "validate", folder / "texts.jsonl", path)


def test_validate_reports_a_changed_byte_in_prepared_data(folder, tmp_path, capsys):
    shutil.copytree(folder / "prepared", tmp_path / "out")
    path = tmp_path / "out" / "photos" / "train-00000.arrow"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert "train-00000.arrow was changed" in fails(capsys, 1, "data", "validate", tmp_path / "out")


def test_inspect_writes_a_page_of_images_and_texts(folder, tmp_path, capsys):
    command("data", "inspect", folder / "photos", "--count", 9, "--out", tmp_path / "new" / "page.html")
    html = (tmp_path / "new" / "page.html").read_text()
    assert html.count("data:image/png;base64,") == 8
    assert "number 3" in html
    assert "metadata.jsonl:8" in html  # where the fault is
    assert "unreadable image" in html
    command("data", "inspect", folder / "prepared", "--count", 5, "--out", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert html.count("data:image/png;base64,") == 5
    assert "passed" not in html
    assert "texts" in html


def test_every_command_ends_with_the_account(tmp_path, capsys):
    write_photos(tmp_path / "mine", 20)
    (tmp_path / "mine" / "more.heic").write_bytes(b"x")
    (tmp_path / "mine" / "0019.png").rename(tmp_path / "mine" / "other.png")
    for arguments in (("validate",), ("stats",), ("inspect", "--out", tmp_path / "page.html"),
                      ("prepare", "--out", tmp_path / "out", *PREPARE, "--max-faults", 0.1)):  # fmt: skip
        verb, *options = arguments
        if verb == "validate":
            with pytest.raises(SystemExit):
                command("data", verb, tmp_path / "mine")
        else:
            command("data", verb, tmp_path / "mine", *options)
        captured = capsys.readouterr()
        lines = [line.strip() for line in (captured.out + captured.err).splitlines()]
        for line in ("records: 19 of 20 read; not read:", "1 missing image: metadata.jsonl:20", "1 .heic: more.heic",
                     "files: 20 of 22 read; not read:", "1 named by no record: other.png"):  # fmt: skip
            assert line in lines, verb
    assert "1 named by no record: other.png" in (tmp_path / "page.html").read_text()


def test_stats_counts_documents_sizes_and_tokens(folder, capsys):
    command("data", "stats", folder / "photos", folder / "texts.jsonl", folder / "prepared")
    stdout = capsys.readouterr().out
    assert "119: 119 one text, one image" in stdout
    assert "119 16x16" in stdout
    assert "90: 90 text only" in stdout
    prepared = open_prepared(folder / "prepared")
    train = prepared.source("photos", "train")
    tokens = sum(len(train[n].segments[0].tokens) for n in range(len(train)))
    assert f"tokens        {tokens:,}" in stdout
    assert f"{len(train):,} latent 4x4" in stdout


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (("data",), 2, ""), (("data", "prepair"), 2, "did you mean prepare"), (("data", "validate"), 2, "name a source"),
    (("data", "validate", "nowhere/at/all"), 1, "nowhere/at/all does not exist"),
    (("data", "validate", "FOLDER/photos", "--form", "novel"), 1, "there is no form 'novel'"),
    (("data", "validate", "FOLDER/photos", "--columns", "caption"), 2, "FIELD=COLUMN"),
    (("data", "validate", "FOLDER/photos", "--limit", "0"), 2, "at least 1"),
    (("data", "inspect", "FOLDER/photos", "--count", "0"), 2, "at least 1"),
    (("data", "prepare", "FOLDER/photos"), 2, "--out"),
    (("data", "prepare", "FOLDER/photos", "--out", "x", "--sizes", "big"), 2, "width x height"),
    (("data", "prepare", "FOLDER/photos", "--out", "x", "--max-faults", "2"), 2, "between 0 and 1"),
    (("data", "prepare", "FOLDER/photos", "--out", "x", "--like", "FOLDER/prepared", "--codec", "pixels"), 2, "like"),
    (("data", "prepare", "FOLDER/photos", "--out", "x", "--like", "FOLDER/photos"), 1, "not prepared data"),
    (("data", "prepare", "FOLDER/photos", "--out", "x", "--sizes", "18x18"), 1, "blocks of 4x4"),
    (("data", "prepare", "FOLDER/photos", "--out", "x", "--tokenizer", "FOLDER/photos/0000.png"), 1, "tokenizer"),
    (("data", "prepare", "FOLDER/photos", "--out", "FOLDER/texts.jsonl/x"), 1, "Not a directory"),
    (("data", "prepare", "FOLDER/photos", "--out", "FOLDER/prepared", *PREPARE), 1, "its sources are photos, texts"),
    (("data", "stats", "FOLDER/texts.jsonl", "--tokenizer", "FOLDER/texts.jsonl"), 1, "not a tokenizer"),
    (("train", "small"), 1, "--data DIR"), (("train", "small", "--data", "FOLDER/photos"), 1, "not prepared data"),
    (("train", "small", "--data", "FOLDER/nowhere"), 1, "no such folder; if it was moved, give its new path"),
    (("train", "small", "--data", "FOLDER/prepared", "--data.sources", "films"), 1, "no source 'films'"),
    (("train", "small", "--data", "FOLDER/prepared", "--data.seq-len", "9"), 1, "raise data.seq_len"),
    (("train", "small", "--data", "FOLDER/prepared", "--data.mixture-weights", "1", "2", "3"), 1, "3 numbers for 2 sources"),
    (("train", "small", "--data", "FOLDER/prepared", "--model.patch-size", "3"), 1, "patches of side 3"),
])  # fmt: skip
def test_bad_input_is_a_message_without_traceback(folder, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([str(value).replace("FOLDER", str(folder)) for value in arguments])
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()


def test_too_many_faults_list_the_first_ten(tmp_path, capsys):
    records = [{"image": f"{n}.png", "caption": "red"} for n in range(40)]
    (tmp_path / "0.png").write_bytes(png(picture(0)[1]))
    write_lines(tmp_path / "lost.jsonl", records)
    stderr = fails(capsys, 1, "data", "prepare", tmp_path / "lost.jsonl", "--out", tmp_path / "out", "--codec", "pixels")
    assert "39 of 40 records of lost, so far, cannot be used" in stderr
    assert stderr.count("lost.jsonl:") == 10


@pytest.mark.parametrize("verb", ["validate", "inspect", "stats", "prepare"])
def test_every_data_command_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", verb, "--help"])
    assert caught.value.code == 0
    assert "--columns" in capsys.readouterr().out


# Runs on prepared data


def test_text_only_run_generates_text_and_refuses_images(folder, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for n in range(150):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"text {n} about red and blue things " * 5)
    command("data", "prepare", tmp_path / "texts", "--like", folder / "prepared", "--out", tmp_path / "data")
    run = tmp_path / "run"
    command("train", "small", "--data", tmp_path / "data", "--out", run, *TINY_FITTED)
    command("evaluate", run, "--tasks", "text")
    command("generate", run, "text", "--out", tmp_path / "out")
    assert "this run does not support images" in fails(capsys, 2, "generate", run, "text", "--num-images", 1)
    (tmp_path / "a.png").write_bytes(png(picture(0)[1]))
    assert "this run does not support images" in fails(capsys, 2, "generate", run, f"@{tmp_path / 'a.png'}")
    (tmp_path / "none.json").write_text("{}")
    coco = ("--tasks", "coco-images", "--coco", tmp_path / "none.json", "--features", "none.pth")
    assert "this run does not support images, which these tasks need: coco-images" in fails(
        capsys, 1, "evaluate", run, *coco
    )
    assert "too short or too few for multiple choice" in fails(capsys, 1, "evaluate", run, "--tasks", "choice")
    (tmp_path / "none.jsonl").write_text("")
    questions = ("--tasks", "choice", "--questions", tmp_path / "none.jsonl")
    assert "none.jsonl holds no question" in fails(capsys, 1, "evaluate", run, *questions)


def test_run_on_prepared_data_supports_all_commands(folder, tmp_path, capsys):
    """Train, evaluate, export, report and generate; then train again with the data moved, and with other data."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder / "prepared", data)
    arguments = ("train", "small", "--data", data, "--out", run, *TINY_FITTED, "--training.preview-every", 4)
    command(*arguments)
    values = json.loads((run / "run.json").read_text())
    assert values["run"]["data"]["sources"] == ["photos", "texts"]
    assert set(values["notes"]["document_weights"]) == {"photos", "texts"}
    assert values["notes"]["edits"] is False
    before = open_prepared(data)
    assert values["codec"]["sha256"] == before.metadata["codec"]["sha256"]
    assert values["tokenizer"]["sha256"] == before.metadata["tokenizer"]["sha256"]
    assert (run / "samples" / "step-000004.png").exists()
    command("evaluate", run)
    results = json.loads((run / "results.json").read_text())
    assert results["photos"]["captions"]["count"] > 3
    assert results["texts"]["text"]["bits_per_byte"] > 0
    exported = tmp_path / "exported"
    command("export", run, "--out", exported)
    assert "--data" in fails(capsys, 1, "evaluate", exported)  # data is not exported
    command("evaluate", exported, "--data", data)
    assert json.loads((exported / "results.json").read_text())["photos"] == results["photos"]
    command("report", run)
    assert "photos" in (run / "report.html").read_text()
    command("generate", run, "red above blue", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out")
    assert PILImage.open(tmp_path / "out" / "000.png").size == (16, 16)
    capsys.readouterr()
    shutil.move(data, tmp_path / "moved")
    assert "not prepared data" in fails(capsys, 1, *arguments)
    command(*arguments[:3], tmp_path / "moved", *arguments[4:])
    assert "trained to its last step" in capsys.readouterr().err
    other = tmp_path / "other"
    other_shards = *PREPARE[:2], "--records-per-shard", 32
    command("data", "prepare", folder / "photos", folder / "texts.jsonl", "--out", other, *other_shards)
    assert "does not hold the data" in fails(capsys, 2, *arguments[:3], other, *arguments[4:])


def test_one_run_draws_images_of_several_sizes(tmp_path, capsys):
    """An image is cropped to the nearest shape. Each size has its boi, chosen by the model or by --size."""
    for name, (width, height) in {"square": (24, 24), "wide": (50, 24), "tall": (20, 41)}.items():
        write_photos(tmp_path / "photos" / name, 20, width, height)
        lines = (tmp_path / "photos" / name / "metadata.jsonl").read_text().replace('"00', f'"{name}/00')
        (tmp_path / "photos" / name / "metadata.jsonl").unlink()
        with (tmp_path / "photos" / "metadata.jsonl").open("a") as file:
            file.write(lines)
    sizes = ("16x16", "32x16", "16x32")
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "data", "--sizes", *sizes, *PREPARE)
    run = tmp_path / "run"
    command("train", "small", "--data", tmp_path / "data", "--out", run, *TINY_FITTED, "--model.patches", "unet")
    assert len(json.loads((run / "run.json").read_text())["vocabulary"]["boi"]) == 3
    for size in sizes:
        arguments = ("--num-images", 2, "--size", size, "--steps", 2, "--out", tmp_path / size)
        command("generate", run, "red above blue", *arguments, "--sampler", "dpm")
        assert "{}x{}".format(*PILImage.open(tmp_path / size / "001.png").size) == size
    stderr = fails(capsys, 2, "generate", run, "red", "--num-images", 1, "--size", "32x32")
    assert all(size in stderr for size in sizes)
    PILImage.new("RGB", (90, 50), "red").save(tmp_path / "wide.png")
    command("generate", run, f"@{tmp_path / 'wide.png'}", "--max-tokens", 4, "--out", tmp_path / "text")


def test_resumed_run_equals_uninterrupted(folder, tmp_path):
    arguments = ("train", "small", "--data", folder / "prepared", *TINY_FITTED)
    command(*arguments, "--out", tmp_path / "uninterrupted")
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000004")
    (tmp_path / "resumed" / "checkpoints" / "latest").write_text("step-000002")
    command(*arguments, "--out", tmp_path / "resumed")
    uninterrupted, resumed = (tmp_path / name / "checkpoints" / "step-000004" for name in ("uninterrupted", "resumed"))
    for path in uninterrupted.rglob("*.safetensors"):
        tensors, expected = load_file(resumed / path.relative_to(uninterrupted)), load_file(path)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_damaged_shard_ends_training_with_one_message(folder, tmp_path, capsys):
    shutil.copytree(folder / "prepared", tmp_path / "data")
    for path in (tmp_path / "data" / "photos").glob("train-*.arrow"):
        path.write_bytes(path.read_bytes()[:3000])
    stderr = fails(capsys, 1, "train", "small", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY_FITTED)
    assert "transfusion data validate" in stderr


# Processes


def prepare_arguments(folder: Path, out: Path) -> list[str]:
    """The arguments that prepare the data of `folder` again."""
    arguments = ("data", "prepare", folder / "photos", folder / "texts.jsonl", "--out", out, *PREPARE)
    return list(map(str, arguments))


def prepare_one_shard(arguments: list[str]) -> None:
    """Prepare shard 0, and wait in the next one, so that it does not end before a test on a busy machine kills it."""
    original = ShardEncoder.write_shard

    def write_shard(encoder, job, path, on_progress):
        original(encoder, job, path, (lambda rows: time.sleep(600)) if job.number else on_progress)

    ShardEncoder.write_shard = write_shard
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ranks that torch forks get it when their agent ends, others do not
    main(arguments)


def has_shard(out: Path) -> bool:
    return any(out.rglob("0*.json"))


def torchrun_prepare(folder: Path, out: Path) -> subprocess.Popen:
    """torchrun with two processes, as a user starts it."""
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "transfusion"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*arguments, *prepare_arguments(folder, out)], text=True, env=ENVIRONMENT, **pipes)


@pytest.mark.slow
def test_prepare_under_torchrun_equals_one_process(folder, tmp_path):
    process = torchrun_prepare(folder, tmp_path / "out")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert files_of(tmp_path / "out") == files_of(folder / "prepared")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs a list of processes")
def test_killed_torchrun_ends_its_processes_and_prepare_resumes(folder, tmp_path):
    arguments = prepare_arguments(folder, tmp_path / "out")
    agent = processes.Process(processes.torchrun_agent, prepare_one_shard, (arguments,), 2, 0)
    try:
        while agent.poll() is None and not has_shard(tmp_path / "out"):
            time.sleep(0.01)
        assert agent.poll() is None, agent.stderr
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    finally:
        agent.kill()
        agent.wait()
    assert len(children) >= 2, agent.stderr

    def is_alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:  # it has ended
            return False

    deadline = time.monotonic() + 60
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    command("data", "prepare", folder / "photos", folder / "texts.jsonl", "--out", tmp_path / "out", *PREPARE)
    assert files_of(tmp_path / "out") == files_of(folder / "prepared")


@pytest.mark.slow
def test_prepare_resumes_after_sigkill(folder, tmp_path):
    """SIGKILL, in the middle of the second shard."""
    process = processes.Process(prepare_one_shard, prepare_arguments(folder, tmp_path / "out"))
    while process.poll() is None and not has_shard(tmp_path / "out"):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()
    command("data", "prepare", folder / "photos", folder / "texts.jsonl", "--out", tmp_path / "out", *PREPARE)
    assert files_of(tmp_path / "out") == files_of(folder / "prepared")


@pytest.mark.slow
def test_full_disk_is_an_error_without_traceback(folder, tmp_path):
    """A limit on the file size, below the size of a shard, stops the write as a full disk does."""
    big = [{"image": f"{folder}/photos/0001.png", "caption": f"number {n} " + "word " * 400} for n in range(200)]
    path = write_lines(tmp_path / "big.jsonl", big)
    arguments = ["data", "prepare", str(path), "--out", str(tmp_path / "out"), "--codec", "pixels"]
    result = processes.run(main, arguments, largest_file=102_400)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "could not be written: File too large" in result.stderr
    assert not list((tmp_path / "out").rglob("*.tmp"))


MEMORY_OPTIONS = "--codec pixels --tokenizer-size 300 --records-per-shard 250 --fit-documents 500".split()


def peak_memory(*arguments: str) -> int:
    """Peak memory of a command in bytes. In a new process: a forked one would reuse memory freed by its server."""
    code = (
        "import resource, sys\nfrom transfusion.cli import main\nmain(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    return 1024 * int(result.stdout.split()[-1])


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_data(tmp_path):
    """Validate and prepare: every further document adds less to the peak than the size of its image."""
    rng = np.random.default_rng(0)
    for n in range(50):
        (tmp_path / f"{n}.png").write_bytes(png(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)))
    few, many = (5_000, 30_000) if THOROUGH else (1_000, 4_000)
    peaks: dict[str, list[int]] = {}
    for count in (few, many):
        captions = (f"number {n * 7919 % 1000} of many" for n in range(count))
        lines = (json.dumps({"id": n, "image": f"{n % 50}.png", "caption": caption}) for n, caption in enumerate(captions))
        (tmp_path / f"{count}.jsonl").write_text("\n".join(lines))
        out = tmp_path / f"out-{count}"
        for verb in (["validate"], ["prepare", "--out", str(out), *MEMORY_OPTIONS]):
            peaks.setdefault(verb[0], []).append(peak_memory("data", verb[0], str(tmp_path / f"{count}.jsonl"), *verb[1:]))
        assert sum(open_prepared(out).metadata["sources"][str(count)]["documents"].values()) == count
    for before, after in peaks.values():
        assert after - before < 32 * 32 * 3 * (many - few)


# Held-out data


def test_leaks_and_duplicates_are_printed(tmp_path, capsys):
    """By `prepare`, `validate` and `inspect`; and a warning if nothing of a source is held out."""
    photos = write_photos(tmp_path / "photos", 60)
    (photos / "again.png").write_bytes((photos / "0007.png").read_bytes())
    lines = (photos / "metadata.jsonl").read_text()
    (photos / "metadata.jsonl").write_text(lines + lines.splitlines()[7].replace("0007", "again") + "\n")
    few = write_photos(tmp_path / "few", 2)
    command("data", "prepare", photos, few, "--out", tmp_path / "out", "--heldout", 30, *PREPARE)
    stderr = capsys.readouterr().err
    heldout = re.search(r"photos: \d+ to train on, (\d+) held out", stderr)[1]
    assert f"{counted(int(heldout), 'picture')} and 0 texts are held out; none of them is trained on" in stderr
    assert "warning: nothing of few is held out" in stderr
    assert "nothing of photos" not in stderr
    command("data", "validate", photos, few, tmp_path / "out")
    stdout = capsys.readouterr().out
    assert f"{counted(int(heldout), 'picture')} and 0 texts are held out; none of them is trained on" in stdout
    assert "duplicates: 3 documents (same pixels and text as an earlier one), 3 pictures (same pixels)" in stdout
    command("data", "inspect", tmp_path / "out", "--out", tmp_path / "page.html")
    assert "none of them is trained on" in (tmp_path / "page.html").read_text()


def test_like_fits_no_tokenizer(folder, tmp_path, capsys):
    command("data", "prepare", folder / "texts.jsonl", "--out", tmp_path / "out", "--like", folder / "prepared")
    stderr = capsys.readouterr().err
    assert "fitting" not in stderr
    assert f"using the tokenizer and the codec of {folder / 'prepared'}" in stderr
