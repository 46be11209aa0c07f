"""The data commands as they are typed: what they say, what they leave, and what they do with bad input."""

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
from PIL import Image as Picture
from safetensors.torch import load_file

from tests import processes
from tests.profile import THOROUGH
from tests.sources import picture, png, write_lines, write_photos
from tests.test_cli import TINY, command, fails
from tests.test_prepare import files_of
from transfusion.cli import main
from transfusion.data.store import open_prepared

PREPARE = ("--tokenizer-size", 300, "--records-per-shard", 16)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(prepared) -> Path:
    return prepared


def test_prepare_says_what_it_left_out_and_where_that_is_listed(place, tmp_path, capsys):
    command("data", "prepare", place / "photos", "--out", tmp_path / "out", *PREPARE)
    said = capsys.readouterr().err
    assert re.search(r"photos: \d+ to train on, \d+ held out; 1 left out \(1 unreadable image\): see .*quarantine", said)
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "metadata.jsonl:8"
    command("data", "prepare", place / "photos", "--out", tmp_path / "out", *PREPARE)
    assert "was prepared already" in capsys.readouterr().err


def test_validate_lists_faults_by_file_and_row(place, tmp_path, capsys):
    sources, listed = [str(place / name) for name in ("photos", "texts.jsonl")], tmp_path / "all.jsonl"
    with pytest.raises(SystemExit) as caught:
        main(["data", "validate", *sources, "--faults", str(listed)])
    said = capsys.readouterr()
    assert caught.value.code == 1
    assert "photos: 120 records, 119 documents, 1 faults" in said.out
    assert "metadata.jsonl:8: cannot read the image 0007.png" in said.out
    assert "texts: 90 records, 90 documents, 0 faults" in said.out
    assert [json.loads(line)["where"] for line in listed.read_text().splitlines()] == ["metadata.jsonl:8"]


def test_validate_of_sound_data_ends_well(place, capsys):
    command("data", "validate", place / "texts.jsonl", place / "prepared")
    assert "all shards match their SHA-256" in capsys.readouterr().out


def test_validate_finds_a_flipped_byte_in_what_is_prepared(place, tmp_path, capsys):
    shutil.copytree(place / "prepared", tmp_path / "out")
    path = tmp_path / "out" / "photos" / "train-00000.arrow"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert "train-00000.arrow was changed" in fails(capsys, 1, "data", "validate", tmp_path / "out")


def test_inspect_writes_a_page_of_pictures_and_texts(place, tmp_path, capsys):
    command("data", "inspect", place / "photos", "--count", 9, "--out", tmp_path / "new" / "page.html")
    html = (tmp_path / "new" / "page.html").read_text()
    assert html.count("data:image/png;base64,") == 8
    assert "number 3" in html
    assert "metadata.jsonl:8" in html  # the fault has its place, too
    assert "unreadable image" in html
    command("data", "inspect", place / "prepared", "--count", 5, "--out", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert html.count("data:image/png;base64,") == 5
    assert "passed" not in html
    assert "texts" in html


def test_stats_counts_what_is_there(place, capsys):
    command("data", "stats", place / "photos", place / "texts.jsonl", place / "prepared")
    said = capsys.readouterr().out
    assert "119: 119 one text, one image" in said
    assert "119 16x16" in said
    assert "90: 90 text only" in said
    prepared = open_prepared(place / "prepared")
    train = prepared.source("photos", "train")
    tokens = sum(len(train[n].segments[0].tokens) for n in range(len(train)))
    assert f"tokens        {tokens:,}" in said
    assert f"{len(train):,} latent 4x4" in said


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("data",), 2, ""), (("data", "prepair"), 2, "did you mean prepare"), (("data", "validate"), 2, "name a source"),
    (("data", "validate", "nowhere/at/all"), 1, "nowhere/at/all does not exist"),
    (("data", "validate", "PLACE/photos", "--form", "novel"), 1, "there is no form 'novel'"),
    (("data", "validate", "PLACE/photos", "--columns", "caption"), 2, "FIELD=COLUMN"),
    (("data", "validate", "PLACE/photos", "--limit", "0"), 2, "at least 1"),
    (("data", "inspect", "PLACE/photos", "--count", "0"), 2, "at least 1"),
    (("data", "prepare", "PLACE/photos"), 2, "--out"),
    (("data", "prepare", "PLACE/photos", "--out", "x", "--sizes", "big"), 2, "width x height"),
    (("data", "prepare", "PLACE/photos", "--out", "x", "--max-faults", "2"), 2, "between 0 and 1"),
    (("data", "prepare", "PLACE/photos", "--out", "x", "--like", "PLACE/prepared", "--codec", "pixels"), 2, "like"),
    (("data", "prepare", "PLACE/photos", "--out", "x", "--like", "PLACE/photos"), 1, "not prepared data"),
    (("data", "prepare", "PLACE/photos", "--out", "x", "--sizes", "18x18"), 1, "blocks of 4x4"),
    (("data", "prepare", "PLACE/photos", "--out", "x", "--tokenizer", "PLACE/photos/0000.png"), 1, "tokenizer"),
    (("data", "prepare", "PLACE/photos", "--out", "PLACE/texts.jsonl/x"), 1, "Not a directory"),
    (("data", "prepare", "PLACE/photos", "--out", "PLACE/prepared", *PREPARE), 1, "its sources are photos, texts"),
    (("data", "stats", "PLACE/texts.jsonl", "--tokenizer", "PLACE/texts.jsonl"), 1, "not a tokenizer"),
    (("train", "small"), 1, "--data DIR"), (("train", "small", "--data", "PLACE/photos"), 1, "not prepared data"),
    (("train", "small", "--data", "PLACE/nowhere"), 1, "not prepared data"),
    (("train", "small", "--data", "PLACE/prepared", "--data.sources", "films"), 1, "no source 'films'"),
    (("train", "small", "--data", "PLACE/prepared", "--data.seq-len", "9"), 1, "raise data.seq_len"),
    (("train", "small", "--data", "PLACE/prepared", "--data.mixture-weights", "1", "2", "3"), 1, "3 numbers for 2 sources"),
    (("train", "small", "--data", "PLACE/prepared", "--model.patch-size", "3"), 1, "patches of side 3"),
])  # fmt: skip
def test_bad_input_is_one_line(place, tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([str(word).replace("PLACE", str(place)) for word in arguments])
    said = capsys.readouterr()
    assert caught.value.code == code, said.err
    assert words in said.err + said.out
    assert "Traceback" not in said.err
    assert not (tmp_path / "runs").exists()


def test_too_many_faults_name_the_first_ten(tmp_path, capsys):
    records = [{"image": f"{n}.png", "caption": "red"} for n in range(40)]
    (tmp_path / "0.png").write_bytes(png(picture(0)[1]))
    write_lines(tmp_path / "lost.jsonl", records)
    said = fails(capsys, 1, "data", "prepare", tmp_path / "lost.jsonl", "--out", tmp_path / "out", "--codec", "pixels")
    assert "39 of 40 records of lost, so far, cannot be used" in said
    assert said.count("lost.jsonl:") == 10


@pytest.mark.parametrize("verb", ["validate", "inspect", "stats", "prepare"])
def test_every_data_command_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", verb, "--help"])
    assert caught.value.code == 0
    assert "--columns" in capsys.readouterr().out


# A run on prepared data


def test_a_run_of_text_alone_writes_and_knows_no_pictures(place, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for n in range(150):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"text {n} about red and blue things " * 5)
    command("data", "prepare", tmp_path / "texts", "--like", place / "prepared", "--out", tmp_path / "data")
    run = tmp_path / "run"
    command("train", "small", "--data", tmp_path / "data", "--out", run, *TINY)
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


def test_a_run_learns_from_what_was_prepared(place, tmp_path, capsys):
    """Trained, moved, gone on with, evaluated, shown, and drawn from."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(place / "prepared", data)
    words = ("train", "small", "--data", data, "--out", run, *TINY, "--training.preview-every", 4)
    command(*words)
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
    assert "--data" in fails(capsys, 1, "evaluate", exported)  # they are not part of what is exported
    command("evaluate", exported, "--data", data)
    assert json.loads((exported / "results.json").read_text())["photos"] == results["photos"]
    command("report", run)
    assert "photos" in (run / "report.html").read_text()
    command("generate", run, "red above blue", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out")
    assert Picture.open(tmp_path / "out" / "000.png").size == (16, 16)
    capsys.readouterr()
    shutil.move(data, tmp_path / "moved")
    assert "not prepared data" in fails(capsys, 1, *words)
    command(*words[:3], tmp_path / "moved", *words[4:])
    assert "trained to its last step" in capsys.readouterr().err
    other = tmp_path / "other"
    other_shards = *PREPARE[:2], "--records-per-shard", 32
    command("data", "prepare", place / "photos", place / "texts.jsonl", "--out", other, *other_shards)
    assert "does not hold the data" in fails(capsys, 2, *words[:3], other, *words[4:])


def test_one_run_draws_pictures_of_several_sizes(tmp_path, capsys):
    """Each picture goes to the nearest shape; each size has its own boi, chosen by the model or by who asks."""
    for name, (width, height) in {"square": (24, 24), "wide": (50, 24), "tall": (20, 41)}.items():
        write_photos(tmp_path / "photos" / name, 20, width, height)
        lines = (tmp_path / "photos" / name / "metadata.jsonl").read_text().replace('"00', f'"{name}/00')
        (tmp_path / "photos" / name / "metadata.jsonl").unlink()
        with (tmp_path / "photos" / "metadata.jsonl").open("a") as file:
            file.write(lines)
    sizes = ("16x16", "32x16", "16x32")
    command("data", "prepare", tmp_path / "photos", "--out", tmp_path / "data", "--sizes", *sizes, *PREPARE)
    run = tmp_path / "run"
    command("train", "small", "--data", tmp_path / "data", "--out", run, *TINY, "--model.patches", "unet")
    assert len(json.loads((run / "run.json").read_text())["vocabulary"]["boi"]) == 3
    for size in sizes:
        words = ("--num-images", 2, "--size", size, "--steps", 2, "--out", tmp_path / size)
        command("generate", run, "red above blue", *words, "--sampler", "dpm")
        assert "{}x{}".format(*Picture.open(tmp_path / size / "001.png").size) == size
    said = fails(capsys, 2, "generate", run, "red", "--num-images", 1, "--size", "32x32")
    assert all(size in said for size in sizes)
    Picture.new("RGB", (90, 50), "red").save(tmp_path / "wide.png")
    command("generate", run, f"@{tmp_path / 'wide.png'}", "--max-tokens", 4, "--out", tmp_path / "said")


def test_a_run_that_is_interrupted_ends_as_one_that_is_not(place, tmp_path):
    words = ("train", "small", "--data", place / "prepared", *TINY)
    command(*words, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-000004")
    (tmp_path / "half" / "checkpoints" / "latest").write_text("step-000002")
    command(*words, "--out", tmp_path / "half")
    whole, half = (tmp_path / name / "checkpoints" / "step-000004" for name in ("whole", "half"))
    for path in whole.rglob("*.safetensors"):
        tensors, others = load_file(path), load_file(half / path.relative_to(whole))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_damaged_shard_ends_training_in_one_line(place, tmp_path, capsys):
    shutil.copytree(place / "prepared", tmp_path / "data")
    for path in (tmp_path / "data" / "photos").glob("train-*.arrow"):
        path.write_bytes(path.read_bytes()[:3000])
    said = fails(capsys, 1, "train", "small", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert "transfusion data validate" in said


# Processes


def words_for(place: Path, out: Path) -> list[str]:
    """What prepares the same once more."""
    words = ("data", "prepare", place / "photos", place / "texts.jsonl", "--out", out, *PREPARE)
    return list(map(str, words))


def torchrun_prepare(place: Path, out: Path) -> subprocess.Popen:
    """As it is typed, on two processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "transfusion"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*words, *words_for(place, out)], text=True, env=ENVIRONMENT, **pipes)


@pytest.mark.slow
def test_torchrun_spreads_the_work_and_the_result_is_the_same(place, tmp_path):
    process = torchrun_prepare(place, tmp_path / "out")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert files_of(tmp_path / "out") == files_of(place / "prepared")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs a list of processes")
def test_when_torchrun_is_killed_its_processes_end_and_the_work_goes_on(place, tmp_path):
    agent = processes.Process(processes.torchrun_agent, main, (words_for(place, tmp_path / "out"),), 2, 0)
    try:
        while agent.poll() is None and not list((tmp_path / "out").rglob("0*.json")):
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            time.sleep(0.01)
    finally:
        agent.kill()
        agent.wait()
    assert len(children) >= 2, agent.stderr

    def alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:  # gone
            return False

    until = time.monotonic() + 60
    while any(map(alive, children)):
        assert time.monotonic() < until
        time.sleep(0.1)
    command("data", "prepare", place / "photos", place / "texts.jsonl", "--out", tmp_path / "out", *PREPARE)
    assert files_of(tmp_path / "out") == files_of(place / "prepared")


@pytest.mark.slow
def test_killed_for_good_it_goes_on(place, tmp_path):
    """As the kernel kills: at some moment after the first shard is there."""
    process = processes.Process(main, words_for(place, tmp_path / "out"))
    while process.poll() is None and not list((tmp_path / "out").rglob("0*.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # else it was done before
    assert not (tmp_path / "out" / "dataset.json").exists()
    command("data", "prepare", place / "photos", place / "texts.jsonl", "--out", tmp_path / "out", *PREPARE)
    assert files_of(tmp_path / "out") == files_of(place / "prepared")


@pytest.mark.slow
def test_a_disk_that_fills_ends_it_in_one_line(place, tmp_path):
    """Files may not grow beyond a limit that a shard exceeds: as a full disk, it stops the write."""
    big = [{"image": f"{place}/photos/0001.png", "caption": f"number {n} " + "word " * 400} for n in range(200)]
    path = write_lines(tmp_path / "big.jsonl", big)
    words = ["data", "prepare", str(path), "--out", str(tmp_path / "out"), "--codec", "pixels"]
    done = processes.run(main, words, largest_file=102_400)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written: File too large" in done.stderr
    assert not list((tmp_path / "out").rglob("*.tmp"))


# what is held in memory at once, for few or many records
ALIKE = "--codec pixels --tokenizer-size 300 --records-per-shard 250 --fit-documents 500".split()


def peak_of(*words: str) -> int:
    """Peak memory of a command in bytes. A new process: a forked one would reuse memory that its server has freed."""
    code = (
        "import resource, sys\nfrom transfusion.cli import main\nmain(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split()[-1])


@pytest.mark.slow
def test_what_is_held_does_not_grow_with_what_is_read(tmp_path):
    """Six times as many documents, validated and prepared, take as much memory: less than a picture's for each more."""
    chance = np.random.default_rng(0)
    for n in range(50):
        (tmp_path / f"{n}.png").write_bytes(png(chance.integers(0, 255, (32, 32, 3), dtype=np.uint8)))
    few, many = (5_000, 30_000) if THOROUGH else (1_000, 4_000)
    peaks: dict[str, list[int]] = {}
    for count in (few, many):
        captions = (f"number {n * 7919 % 1000} of many" for n in range(count))
        lines = (json.dumps({"id": n, "image": f"{n % 50}.png", "caption": said}) for n, said in enumerate(captions))
        (tmp_path / f"{count}.jsonl").write_text("\n".join(lines))
        out = tmp_path / f"out-{count}"
        for verb in (["validate"], ["prepare", "--out", str(out), *ALIKE]):
            peaks.setdefault(verb[0], []).append(peak_of("data", verb[0], str(tmp_path / f"{count}.jsonl"), *verb[1:]))
        assert sum(open_prepared(out).metadata["sources"][str(count)]["documents"].values()) == count
    for before, after in peaks.values():
        assert after - before < 32 * 32 * 3 * (many - few)
