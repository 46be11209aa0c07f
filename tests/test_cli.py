"""The command line: what a user types, rightly and wrongly. Promise 10 for the commands that need no long training."""

import json
import re
import shlex
import shutil
import struct
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image as Picture

from tests import processes
from tests.profile import few_samples
from tests.sources import write_photos, write_texts
from transfusion.cli import main

TINY = (
    "--model.width 32 --model.layers 2 --model.heads 2 --model.intermediate-size 64 --training.steps 4 "
    "--training.warmup-steps 2 "
    "--training.checkpoint-every 2 --training.validate-every 4 --training.preview-every 4 --data.rows 2 "
    "--data.tokenizer-size 260 --data.shuffle-block 64 --data.fit-documents 100 --generation.steps 2"
).split()


def command(*arguments: object) -> None:
    """The command in this process, which looks at few documents before it trains; a zero exit is a return."""
    with mock.patch("transfusion.cli.runs.HELDOUT", 24), few_samples():
        try:
            main([str(a) for a in arguments])
        except SystemExit as exit_:
            if exit_.code:
                raise


def fails(capsys, code: int, *arguments: object) -> str:
    """What the command says when it fails with that code: no traceback, and our own words in one line."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    said = capsys.readouterr().err
    assert caught.value.code == code, said
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained


def test_a_run_has_the_files_it_promises(run):
    assert (run / "checkpoints" / "latest").read_text() == "step-000004"
    for name in ("run.json", "tokenizer.json", "codec.safetensors", "metrics.jsonl", "samples/step-000004.png"):
        assert (run / name).exists()
    values = json.loads((run / "run.json").read_text())
    assert values["run"]["model"]["width"] == 32
    ids = values["vocabulary"]
    assert len({ids["bos"], ids["eos"], ids["pad"], ids["eoi"], *ids["boi"].values()}) == 5


def test_no_pickle_lies_in_a_run(run):
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".png", ""}


def test_training_again_says_that_it_is_done(run, capsys):
    command("train", "digits", "--out", run, *TINY)
    assert "trained to its last step" in capsys.readouterr().err


def test_other_settings_for_the_same_folder_are_refused(run, capsys):
    said = fails(capsys, 2, "train", "digits", "--out", run, *TINY, "--training.seed", 1)
    assert "training.seed is 0 there, 1 here" in said
    assert "shapes" in fails(capsys, 2, "train", "shapes", "--out", run)


def test_training_from_a_run_json(run, tmp_path):
    command("train", run / "run.json", "--out", tmp_path / "again", "--training.steps", 1)
    again = json.loads((tmp_path / "again" / "run.json").read_text())["run"]
    assert again["model"] == json.loads((run / "run.json").read_text())["run"]["model"]


def test_images_from_a_prompt(run, tmp_path, capsys):
    command("generate", run, "three", "--num-images", 3, "--steps", 2, "--out", tmp_path)
    output = json.loads((tmp_path / "output.json").read_text())
    assert [answer["parts"] for answer in output["answers"]] == [[{"image": f"00{n}.png"}] for n in range(3)]
    assert Picture.open(tmp_path / "002.png").size == (8, 8)
    assert capsys.readouterr().out.count(".png") == 3


def test_the_same_seed_draws_the_same(run, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        command("generate", run, "--num-images", 1, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (np.asarray(Picture.open(tmp_path / name / "000.png")) for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
def test_any_picture_can_be_part_of_the_prompt(run, tmp_path, mode):
    picture = Picture.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) % 256)
    suffix = "jpg" if mode == "CMYK" else "png"
    (picture if mode == "I;16" else picture.convert("L").convert(mode)).save(tmp_path / f"photo.{suffix}")
    command("generate", run, f"@{tmp_path}/photo.{suffix}", "--max-tokens", 3, "--out", tmp_path)
    assert (tmp_path / "output.json").exists()


def test_text_that_begins_with_an_at(run, tmp_path):
    command("generate", run, "@@home", "--max-tokens", 2, "--out", tmp_path)
    assert json.loads((tmp_path / "output.json").read_text())["prompt"] == ["@@home"]


def test_text_that_spells_special_tokens_is_text(run, tmp_path):
    command("generate", run, "<bos><eos><boi 8x8><|endoftext|></s>\x00", "--max-tokens", 2, "--out", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the prompt is empty"),
        (("three", "--steps", 0), "steps must be at least 1"),
        (("three", "--num-images", 0), "num_images must be at least 1"),
        (("three", "--top-p", 0), "top_p"),
        (("three", "--temperature", -1), "temperature"),
        (("three", "--num-images", 1, "--size", "9x9"), "can draw 8x8"),
        (("three", "--num-images", 1, "--size", "big"), "width x height"),
        (("three", "--sampler", "euler"), "ddim"),
        (("word " * 500,), "positions"),
        (("three", "--sampler", "magic"), "ddpm"),
        (("three", "--step", 3), "--steps"),
        (("three", "--seed", "one"), "seed"),
    ],
)
def test_what_cannot_be_generated(run, capsys, arguments, words):
    assert words in fails(capsys, 2, "generate", run, *arguments)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that promises so many grey pixels, which is all that may be read of it."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_pictures_that_cannot_be_read(run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("not a picture")
    picture = Picture.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "wide.png").write_bytes(png_header(50_000, 50_000))
    for name, words in {
        "text.png": "not an image", "short.png": "short.png", "wide.png": "pixels", "missing.png": "No such file",
    }.items():  # fmt: skip
        said = fails(capsys, 1, "generate", run, f"@{tmp_path}/{name}")
        assert words in said
        assert said.count("\n") == 1
    assert "directory" in fails(capsys, 1, "generate", run, f"@{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), "did you mean train"),
        (("train", "digit"), "did you mean digits"),
        (("train", "0.16b"), "--data.sources"),
        (("train", "digits", "--model.widht", "3"), "--model.width"),
        (("train", "digits", "--model.width", "many"), "many"),
        (("train", "digits", "--model.heads", "5"), "not a multiple"),
        (("train", "digits", "--training.steps", "0"), "at least 1"),
        (("train", "digits", "--data.image-first", "1.5"), "between 0 and 1"),
        (("train", "digits", "--diffusion.noise-schedule", "curved"), "cosine"),
        (("train",), ""),
        ((), ""),
    ],
)
def test_what_cannot_be_trained(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    said = capsys.readouterr()
    assert caught.value.code in (1, 2)
    assert words in said.err + said.out
    assert "Traceback" not in said.err
    assert not (tmp_path / "runs").exists()


def test_folders_that_are_no_runs(run, tmp_path, capsys):
    assert "is not a run" in fails(capsys, 1, "generate", tmp_path, "three")
    assert "is not a run" in fails(capsys, 1, "evaluate", tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{")
    assert "cannot read" in fails(capsys, 1, "report", tmp_path)
    values = json.loads((run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(values | {"format": 99}))
    assert "format 99" in fails(capsys, 1, "generate", tmp_path, "three")


def test_a_flipped_byte_is_found_and_the_run_stays_as_it_was(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    path = next((run / "checkpoints" / "step-000004" / "ema").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    said = fails(capsys, 1, "generate", run, "three", "--out", tmp_path)
    assert path.name in said
    assert "SHA-256" in said
    path.write_bytes(whole)
    command("generate", run, "three", "--num-images", 1, "--out", tmp_path)


@pytest.mark.parametrize("verb", ["", "demo", "train digits", "generate", "evaluate", "report", "export"])
def test_every_command_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_a_full_disk_ends_in_one_line_and_a_good_run(run, tmp_path):
    """Files may not grow beyond a limit that the first checkpoint's parts exceed: as a full disk, it stops the write."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000002")
    done = processes.run(main, ["train", "digits", "--out", str(tmp_path / "run"), *TINY], largest_file=102_400)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not save step 4" in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000002"]
    command("generate", tmp_path / "run", "three", "--num-images", 1, "--out", tmp_path / "out")


def commands_of(page: str) -> list[str]:
    """Every command of ours in a fenced block of the README, or of a page up to its first heading, in their order.

    Where torchrun starts it on many machines, here is one process. `serve` has its own test, in test_server.py.
    """
    text = (processes.ROOT / page).read_text()
    text = text if page == "README.md" else text.partition("\n## ")[0]
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [re.sub(r"^torchrun .*-m transfusion", "transfusion", line) for line in lines]
    return [line for line in lines if line.startswith("transfusion ") and not line.startswith("transfusion serve ")]


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/training.md"])
def test_the_commands_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """With tiny settings where they train; what a page takes for granted is there: pictures, texts, prepared data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transfusion.evaluation.small_network.STEPS", 3)
    monkeypatch.setattr("transfusion.evaluation.suite.NUM_TRAINING_IMAGES", 100)
    monkeypatch.setattr("transfusion.report.DRAWINGS", 2)
    monkeypatch.setattr("transfusion.report.MAX_SEEDS", 2)
    Picture.new("L", (20, 20), 128).save(tmp_path / "photo.png")
    write_photos(tmp_path / "photos", 40)
    write_texts(tmp_path / "texts.jsonl", 40)
    granted = set()
    for _, *words in map(shlex.split, commands_of(page)):
        if "--data" in words and not Path(data := words[words.index("--data") + 1]).exists():
            command("data", "prepare", "photos", "--out", data)
            granted.add(data)
        if words[:2] == ["data", "prepare"] and (out := words[words.index("--out") + 1]) in granted:
            shutil.rmtree(out)  # what was taken for granted is made here
        if words[0] == "train":
            words += [*TINY, "--data.seq-len", "256"]
        command(*words)


def test_commands_are_found_on_every_page():
    """Else the test above would test nothing."""
    found = {line.split()[1] for line in commands_of("README.md")}
    assert found >= {"train", "plan", "generate", "evaluate", "report", "export", "data"}
    assert all(commands_of(f"docs/{page}.md") for page in ("data", "training"))
