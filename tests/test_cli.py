"""The command line, with right and wrong arguments. Promise 10 for the commands that need no long training."""

import json
import re
import shlex
import shutil
import struct
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image as Picture

import transfusion
from tests import processes
from tests.profile import few_samples
from tests.sources import write_photos, write_texts
from transfusion.cli import COMMANDS, main
from transfusion.cli.options import parse
from transfusion.cli.output import OutputFolder
from transfusion.cli.screen import UsageError
from transfusion.config import RopeScaling

TINY_TRAINING = (
    "--training.steps 4 --training.warmup-steps 2 --training.checkpoint-every 2 --training.validate-every 4 "
    "--training.preview-every 4 --training.batch-size 2 --data.shuffle-block 64 --generation.steps 2"
).split()
TINY_MODEL = "--model.width 32 --model.layers 2 --model.heads 2 --model.intermediate-size 64".split()
TINY_FITTED = [*TINY_MODEL, *TINY_TRAINING]  # for data whose tokenizer and codec are fitted already
TINY = [*TINY_FITTED, *"--data.tokenizer-size 260 --data.fit-documents 100".split()]


def command(*arguments: object) -> None:
    """Execute a command in this process, with few held-out documents. An exit with code 0 is a return."""
    with mock.patch("transfusion.cli.run_folder.HELDOUT", 24), few_samples():
        try:
            main([str(a) for a in arguments])
        except SystemExit as exit_:
            if exit_.code:
                raise


def fails(capsys, code: int, *arguments: object) -> str:
    """The stderr of a command that fails with this exit code and without a traceback."""
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    stderr = capsys.readouterr().err
    assert error.value.code == code, stderr
    assert "Traceback" not in stderr
    return stderr


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained


@pytest.fixture
def run_copy(run, tmp_path) -> Path:
    """For `train`, which writes status.json also when it refuses: another worker may copy the shared run meanwhile."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_run_folder_has_all_files(run):
    assert (run / "checkpoints" / "latest").read_text() == "step-000004"
    for name in ("run.json", "tokenizer.json", "codec.safetensors", "metrics.jsonl", "samples/step-000004.png"):
        assert (run / name).exists()
    values = json.loads((run / "run.json").read_text())
    assert values["run"]["model"]["width"] == 32
    ids = values["vocabulary"]
    assert len({ids["bos"], ids["eos"], ids["pad"], ids["eoi"], *ids["boi"].values()}) == 5


def test_run_folder_has_no_pickle(run):
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".png", ".lock", ""}


def test_trained_run_is_not_trained_again(run_copy, capsys):
    command("train", "digits", "--out", run_copy, *TINY)
    assert "trained to its last step" in capsys.readouterr().err


def test_changed_settings_are_refused(run_copy, capsys):
    stderr = fails(capsys, 2, "train", "digits", "--out", run_copy, *TINY, "--training.seed", 1)
    assert "training.seed is 0 in the folder, 1 in this command" in stderr
    assert "shapes" in fails(capsys, 2, "train", "shapes", "--out", run_copy)


def test_training_from_a_run_json(run, tmp_path):
    command("train", run / "run.json", "--out", tmp_path / "copy", "--training.steps", 1)
    copy = json.loads((tmp_path / "copy" / "run.json").read_text())["run"]
    assert copy["model"] == json.loads((run / "run.json").read_text())["run"]["model"]


def calls_of(folder: Path) -> list[dict]:
    """The entries of a folder's output.json."""
    return json.loads((folder / "output.json").read_text())["calls"]


def test_generate_draws_images(run, tmp_path, capsys):
    command("generate", run, "three", "--num-images", 3, "--steps", 2, "--out", tmp_path)
    (call,) = calls_of(tmp_path)
    assert [answer["parts"] for answer in call["answers"]] == [[{"image": f"00{n}.png"}] for n in range(3)]
    assert Picture.open(tmp_path / "002.png").size == (8, 8)
    assert capsys.readouterr().out.count(".png") == 3


def test_same_seed_draws_same_image(run, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        command("generate", run, "--num-images", 1, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (np.asarray(Picture.open(tmp_path / name / "000.png")) for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_calls_into_one_folder_keep_the_images_of_earlier_ones(run, tmp_path):
    drawn = []
    for seed in range(2):
        command("generate", run, "three", "--num-images", 2, "--seed", seed, "--out", tmp_path)
        drawn.append([(tmp_path / f"00{n}.png").read_bytes() for n in range(2 * seed + 2)])
    assert drawn[1][:2] == drawn[0] and drawn[1][2:] != drawn[0]
    assert [call["seed"] for call in calls_of(tmp_path)] == [0, 1]
    assert calls_of(tmp_path)[1]["answers"][1]["parts"] == [{"image": "003.png"}]


def test_images_are_numbered_after_the_largest_number(tmp_path):
    for name in ("007.png", "1000.png", "notes.png", "0012.png", "٣٣٣.png", "999.jpg", "output.txt"):
        (tmp_path / name).write_bytes(b"")
    folder = OutputFolder(tmp_path, overwrite=False)
    (tmp_path / "1001.png").write_bytes(b"of another call")
    assert folder.save(np.zeros((2, 2, 1), np.uint8)) == "1002.png"
    assert (tmp_path / "1001.png").read_bytes() == b"of another call"


def test_calls_at_one_time_are_all_recorded(tmp_path):
    a, b = (OutputFolder(tmp_path, overwrite=False) for _ in range(2))
    assert [folder.save(np.zeros((2, 2, 1), np.uint8)) for folder in (a, b)] == ["000.png", "001.png"]
    a.add({"seed": 1})
    b.add({"seed": 2})
    assert [call["seed"] for call in calls_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1, 1)])
def test_images_of_one_row_or_column_are_saved(tmp_path, shape):
    name = OutputFolder(tmp_path, overwrite=False).save(np.full(shape, 7, np.uint8))
    assert Picture.open(tmp_path / name).size == shape[1::-1]


def test_prompt_that_is_not_utf8_is_one_line(run, tmp_path, capsys):
    for options in (("\udcff",), ("three", "--negative-prompt", "\udcff")):
        line = fails(capsys, 2, "generate", run, *options, "--num-images", 1, "--out", tmp_path / "out")
        assert "is not valid Unicode" in line
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_only_what_generate_wrote(run, tmp_path, capsys):
    kept = "notes.png", "0012.png", "000.jpg", "run.json"
    for name in (*kept, "005.png", "output.json"):
        (tmp_path / name).write_text("{}")
    call = "generate", run, "--num-images", 1, "--out", tmp_path
    assert "output.json was not written by generate" in fails(capsys, 2, *call)
    assert "cannot draw" in fails(capsys, 2, *call, "--size", "9x9", "--overwrite")  # a refused call removes nothing
    assert (tmp_path / "005.png").exists()
    command(*call, "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "000.png", "output.json"}
    assert all((tmp_path / name).read_text() == "{}" for name in kept)
    assert len(calls_of(tmp_path)) == 1


def test_negative_prompt_changes_the_image_and_is_recorded(run, tmp_path):
    for name, options in (("a", ()), ("b", ("--negative-prompt", "two"))):
        command("generate", run, "three", "--num-images", 1, *options, "--out", tmp_path / name)
    a, b = ((tmp_path / name / "000.png").read_bytes() for name in "ab")
    assert a != b
    assert [calls_of(tmp_path / name)[0]["negative_prompt"] for name in "ab"] == [None, "two"]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
def test_prompt_takes_all_image_modes(run, tmp_path, mode):
    picture = Picture.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) % 256)
    suffix = "jpg" if mode == "CMYK" else "png"
    (picture if mode == "I;16" else picture.convert("L").convert(mode)).save(tmp_path / f"photo.{suffix}")
    command("generate", run, f"@{tmp_path}/photo.{suffix}", "--max-tokens", 3, "--out", tmp_path)
    assert (tmp_path / "output.json").exists()


def test_double_at_is_text(run, tmp_path):
    command("generate", run, "@@home", "--max-tokens", 2, "--out", tmp_path)
    assert calls_of(tmp_path)[0]["prompt"] == ["@@home"]


def test_special_tokens_in_text_are_text(run, tmp_path):
    command("generate", run, "<bos><eos><boi 8x8><|endoftext|></s>\x00", "--max-tokens", 2, "--out", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the prompt is empty"),
        (("three", "--steps", 0), "--steps must be at least 1, not 0\n"),
        (("three", "--num-images", 0), "--num-images must be at least 1, not 0\n"),
        (("three", "--top-p", 0), "--top-p must"),
        (("three", "--temperature", -1), "--temperature must"),
        (("three", "--t-shift", 0), "--t-shift must"),
        (("three", "--num-images", 1, "--size", "9x9"), "can draw 8x8"),
        (("three", "--num-images", 1, "--size", "big"), "--size must be width x height in pixels"),
        (("three", "--size", "8x8"), "--size has no effect without --num-images"),
        (("three", "--num-images", 1, "--top-p", 0.5), "--top-p has no effect with --num-images: the answers are images"),
        (("three", "--num-images", 1, "--max-tokens", 5), "--max-tokens has no effect with --num-images"),
        (("three", "--image-guidance-scale", 2), "--image-guidance-scale has no effect on a prompt without images"),
        (("three", "--guidance-scale", 1, "--guidance-interval", 0, 0.5), "--guidance-interval has no effect at"),
        (("three", "--guidance-scale", 1, "--negative-prompt", "two"), "--negative-prompt has no effect at"),
        (("three", "--guidance-scale", -1), "--guidance-scale must be between 0 and 100, not -1.0\n"),
        (("three", "--sampler", "euler"), "ddim"),
        (("word " * 500,), "positions"),
        (("three", "--sampler", "magic"), "--sampler magic: must be one of ddpm, ddim, dpm, dpm-sde, euler, heun\n"),
        (("three", "--step", 3), "--steps"),
        (("three", "--seed", "one"), "--seed one: must be a whole number\n"),
        (("three", "--num-images", "four"), "--num-images four: must be a whole number\n"),
        (("three", "--guidance-interval", 0, "x"), "--guidance-interval 0 x: must be 2 numbers\n"),
        (("three", "--guidance-interval", 0), "a value is missing: generate needs RUN, a value after each option;"),
        (("three", "--steps"), "a value is missing"),
    ],
)
def test_wrong_generate_is_one_line(run, capsys, arguments, message):
    stderr = fails(capsys, 2, "generate", run, *arguments)
    assert message in stderr
    assert stderr.count("\n") == 1


def png_header(width: int, height: int) -> bytes:
    """The start of a grey PNG of this size, without its pixels: only the header may be read."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_unreadable_image_is_one_line(run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("not a picture")
    picture = Picture.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "wide.png").write_bytes(png_header(50_000, 50_000))
    for name, message in {
        "text.png": "not an image", "short.png": "short.png", "wide.png": "pixels", "missing.png": "No such file",
    }.items():  # fmt: skip
        stderr = fails(capsys, 1, "generate", run, f"@{tmp_path}/{name}")
        assert message in stderr
        assert stderr.count("\n") == 1
    assert "directory" in fails(capsys, 1, "generate", run, f"@{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "did you mean train"),
        (("train", "digit"), "did you mean digits"),
        (("train", "0.16b"), "--data.sources"),
        (("train", "digits", "--model.widht", "3"), "--model.width"),
        (("train", "digits", "--model.width", "many"), "--model.width many: must be a whole number\n"),
        (("train", "digits", "--model.heads", "5"),
         "--model.heads 5: width 192 is not divisible by 5; use 1, 2, 3, 4, 6 or 8\n"),
        (("train", "digits", "--model.kv-heads", "2"), "--model.kv-heads 2: heads 3 is not divisible by 2; use 1 or 3\n"),
        (("train", "digits", "--model.heads", "4", "--model.kv-heads", "3"),
         "--model.kv-heads 3: heads 4 is not divisible by 3; use 1, 2 or 4\n"),
        (("train", "digits", "--model.rope-scaling", "8", "1"), "--model.rope-scaling 8 1: must be 4 numbers\n"),
        (("train", "digits", "--training.steps", "0"), "--training.steps must be at least 1, not 0\n"),
        (("train", "digits", "--training.steps", "1e4"), "--training.steps 1e4: must be a whole number\n"),
        (("train", "digits", "--data.image-first", "1.5"), "--data.image-first must be between 0 and 1, not 1.5\n"),
        (("train", "digits", "--diffusion.noise-schedule", "curved"),
         "--diffusion.noise-schedule curved: must be one of cosine, rectified_flow\n"),
        (("train", "digits", "--parallel.compile", "maybe"), "--parallel.compile maybe: must be one of True, False\n"),
        (("export", "runs"), "a value is missing: export needs RUN, --out, a value after each option;"),
        (("report",), "report needs RUN"),
        (("train",), ""),
        ((), ""),
    ],
)  # fmt: skip
def test_wrong_command_is_an_error(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    output = capsys.readouterr()
    assert error.value.code in (1, 2)
    assert message in output.err + output.out
    assert "Traceback" not in output.err
    assert output.err.count("\n") == (1 if message else 0)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ("train digits --model.vocab-size 5", "--model.vocab-size has no effect in training: the tokenizer decides it"),
    ("train digits --model.latent-channels 3", "--model.latent-channels has no effect in training: the codec decides it"),
    ("train digits --data.clean-copies --data.image-first-max-t 0.5",
     "--data.image-first-max-t has no effect with --data.clean-copies: what follows an image reads it clean"),
    ("train chameleon-0.16b --data.sources digits --data.clean-copies",
     "data.clean_copies cannot be used with model.patches codes: image codes have no noise"),
    ("train digits --data.codec-block 2", "--data.codec-block has no effect without --data.codec block_pca"),
    ("train digits --training.transformer-lr-scale 0 --training.optimizer muon", "--training.optimizer has no effect with"),
    ("train digits --data.shapes.size 8", "--data.shapes.size has no effect on these data, which do not read"),
    ("train shapes --data.digits.interleaved 0.1", "--data.digits.interleaved has no effect on these data"),
    ("train digits --model.patches codes --model.patch-size 1 --diffusion.t-shift 2", "--diffusion.t-shift has no effect"),
    ("train digits --model.patches codes --model.patch-size 1 --training.image-lr-scale 0",
     "--training.image-lr-scale has no effect"),
    ("train digits --data DATA --data.codec block_pca", "--data.codec has no effect on prepared data"),
    ("train digits --data DATA --data.digits.interleaved 0", "--data.digits.interleaved has no effect on these data"),
    ("train digits --from RUN --data.tokenizer-size 300", "--data.tokenizer-size has no effect with --from"),
    ("train digits --init-from RUN --model.width 8 --model.heads 1", "--model.width has no effect with --init-from"),
    ("train digits --init-from RUN --data.tokenizer-size 300", "--data.tokenizer-size has no effect with --init-from"),
    ("evaluate RUN --features x", "--features has no effect on these tasks: it is for images, coco-images"),
    ("evaluate RUN --tasks text --steps 3", "--steps has no effect on these tasks: it is for drawings, images"),
    ("evaluate RUN --tasks geneval --clip x", "--clip has no effect without --detector"),
    ("evaluate RUN --tasks clip --clip x --prompts RUN", "--prompts has no effect on these tasks: it is for geneval"),
    ("data prepare digits --out x --shapes-size 8", "--shapes-size has no effect without the source shapes"),
    ("data prepare digits --out x --tokenizer RUN --tokenizer-size 300", "--tokenizer-size has no effect with --tokenizer"),
    ("data prepare digits --out x --codec pixels --codec-block 2", "--codec-block has no effect with --codec pixels"),
    ("data prepare digits --out x --like RUN --fit-documents 9", "like and --fit-documents cannot be combined"),
    ("data validate DATA --limit 5", "--limit has no effect on prepared folders"),
    ("data stats DATA --tokenizer RUN", "--tokenizer has no effect on prepared folders"),
    ("data fit-codec small digits --training.commitment 1", "--training.commitment has no effect without --network.codes"),
    ("data fit-codec small digits --network.codes 8 --training.kl-weight 1", "--training.kl-weight has no effect on a VQ"),
    ("data fit-codec small digits --training.gan-weight 1", "--training.gan-weight has no effect without"),
    ("data fit-codec small digits --training.identity-weight 1", "--training.identity-weight has no effect without"),
])  # fmt: skip
def test_options_without_effect_are_refused(run, prepared, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    words = {"RUN": run, "DATA": prepared / "prepared"}
    stderr = fails(capsys, 2, *(words.get(word, word) for word in arguments.split()))
    assert message in stderr and stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_options_count_as_given_only_with_another_value_than_the_default(run_copy, capsys):
    command("train", "digits", "--out", run_copy, *TINY, "--model.vocab-size", 32_000, "--data.codec-block", 4)
    assert "trained to its last step" in capsys.readouterr().err


def test_warmup_beyond_the_last_step_is_one_line(tmp_path, capsys):
    command("train", "digits", *TINY, "--training.steps", 1, "--training.warmup-steps", 4, "--out", tmp_path)
    line = "training.warmup_steps 4 is above training.steps 1: the learning rate reaches only 0.25 of its peak\n"
    assert line in capsys.readouterr().err
    command("train", "digits", *TINY, "--training.steps", 2, "--training.warmup-steps", 2, "--out", tmp_path / "whole")
    assert "warmup_steps" not in capsys.readouterr().err


def test_rope_scaling_is_four_numbers(monkeypatch):
    parsed = []
    monkeypatch.setattr("transfusion.cli.runs.train_run", lambda run, *_: not parsed.append(run.model.rope_scaling))
    command("train", "digits", "--model.rope-scaling", 4, 1, 4, 16)
    command("train", "digits", "--model.rope-scaling", "None")
    assert parsed == [RopeScaling(4.0, 1.0, 4.0, 16), None]
    assert isinstance(parsed[0].original_length, int)


def test_folder_without_a_run_is_refused(run, tmp_path, capsys):
    assert "is not a run" in fails(capsys, 1, "generate", tmp_path, "three")
    assert "is not a run" in fails(capsys, 1, "evaluate", tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{")
    assert "cannot read" in fails(capsys, 1, "report", tmp_path)
    values = json.loads((run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(values | {"format": 99}))
    assert "format 99" in fails(capsys, 1, "generate", tmp_path, "three")


def test_changed_weights_are_refused(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    path = next((run / "checkpoints" / "step-000004" / "ema").iterdir())
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    stderr = fails(capsys, 1, "generate", run, "three", "--out", tmp_path)
    assert path.name in stderr
    assert "SHA-256" in stderr
    path.write_bytes(content)
    command("generate", run, "three", "--num-images", 1, "--out", tmp_path)


def test_version(capsys):
    command("--version")
    assert capsys.readouterr().out == f"open-transfusion {version('open-transfusion')}\n"
    assert transfusion.__version__ == version("open-transfusion")
    assert {"open_run", "Request", "Transfusion", "Engine", "__version__"} <= {*dir(transfusion)}
    assert transfusion.Engine.__name__ == "Engine"


OVERVIEWS = ["", "data", "data fit-codec", "train", "plan"]  # help without options
OPTION_HELP = [
    *(verb for verb in COMMANDS if verb not in OVERVIEWS), "train digits", "plan 7b",
    *(f"data {verb}" for verb in ("validate", "inspect", "stats", "prepare", "fit-codec small")),
]  # fmt: skip


@pytest.mark.parametrize("verb", OVERVIEWS)
def test_overview_help(verb, capsys):
    with pytest.raises(SystemExit) as error:
        main([*verb.split(), "--help"])
    assert error.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3


def help_texts(page: str) -> dict[str, str]:
    """The text of each option and positional argument on a help page without box characters, without range and default."""
    texts, name, positional = {}, None, False
    for line in page.splitlines():
        if re.match(r" [a-z]", line):  # the title of a group
            positional = line.strip() == "positional arguments"
        content = line[2:].rstrip()
        if re.match(r"--[a-z]", content) or (positional and content[:1].isupper()):
            name, *text = re.split(r"  +", content, maxsplit=1)
            texts[name] = "".join(text)
        elif content.startswith(" ") and name:
            texts[name] += f" {content.strip()}"
        else:
            name = None  # a title, or the description of a group
    return {name: re.sub(r" ?\(([^()]*; )?(default: .*|required)\)$", "", text).strip() for name, text in texts.items()}


def help_faults(page: str) -> list[str]:
    """Options without a whole sentence, and internals of types."""
    texts = help_texts(page)
    faults = [name for name, text in texts.items() if not re.fullmatch(r"[A-Z\d].*\.", text)]
    return faults + [word for word in ("None}|", "{None", "subcommands") if word in page]


@pytest.mark.parametrize("verb", OPTION_HELP)
def test_help_describes_every_option(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    command(*verb.split(), "--help")
    page = capsys.readouterr().out
    assert help_faults(page) == []
    defaults = re.findall(r"[(;]\s*default:|\(required\)", page.replace("│", " "))
    assert len(help_texts(page)) == len(defaults) >= 2


@dataclass
class WrongHelp:
    """A dataclass whose help has faults."""

    first: Path  # No full stop
    second: Path
    third: int = 3  # A whole sentence.


def test_faults_of_help_are_found(monkeypatch, capsys):
    """Otherwise the test above would test nothing."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(WrongHelp, "wrong", ["--help"])
    page = capsys.readouterr().out
    assert help_faults(page) == ["--first PATH", "--second PATH"]
    assert "None}|" in help_faults(page.replace("--third INT", "--third {None}|INT"))


def test_required_options_are_named():
    with pytest.raises(UsageError, match="wrong needs --first, --second, a value after each option"):
        parse(WrongHelp, "wrong", ["--third", "4"])


def test_full_disk_is_one_line_and_keeps_the_run(run, tmp_path):
    """A limit on the size of files stops the write of a checkpoint, as a full disk does."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000002")
    process = processes.run(main, ["train", "digits", "--out", str(tmp_path / "run"), *TINY], largest_file=102_400)
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert "could not save step 4" in process.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000002"]
    command("generate", tmp_path / "run", "three", "--num-images", 1, "--out", tmp_path / "out")


def commands_of(page: str) -> list[str]:
    """The transfusion commands in the fenced blocks of the README, or of a page up to its first heading, in order.

    One process replaces torchrun. `serve` is tested in test_server.py.
    """
    text = (processes.ROOT / page).read_text()
    text = text if page == "README.md" else text.partition("\n## ")[0]
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [re.sub(r"^torchrun .*-m transfusion", "transfusion", line) for line in lines]
    return [line for line in lines if line.startswith("transfusion ") and not line.startswith("transfusion serve ")]


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/training.md"])
def test_commands_of_a_page_work_in_order(page, tmp_path, monkeypatch):
    """Training has tiny settings. Files that a page assumes exist: images, texts, prepared data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transfusion.evaluation.small_network.STEPS", 3)
    monkeypatch.setattr("transfusion.evaluation.suite.NUM_TRAINING_IMAGES", 100)
    monkeypatch.setattr("transfusion.report.material.DRAWINGS", 2)
    monkeypatch.setattr("transfusion.report.texts.MAX_SEEDS", 2)
    Picture.new("L", (20, 20), 128).save(tmp_path / "photo.png")
    write_photos(tmp_path / "photos", 40)
    write_texts(tmp_path / "texts.jsonl", 40)
    assumed = set()
    for _, *words in map(shlex.split, commands_of(page)):
        if "--data" in words and not Path(data := words[words.index("--data") + 1]).exists():
            command("data", "prepare", "photos", "--out", data)
            assumed.add(data)
        if words[:2] == ["data", "prepare"] and (out := words[words.index("--out") + 1]) in assumed:
            shutil.rmtree(out)  # created by the page itself
        if words[0] == "train":
            words += [*(TINY_FITTED if {"--data", "--from"} & {*words} else TINY), "--data.seq-len", "256"]
        command(*words)


def test_commands_of_all_pages_are_found():
    """Otherwise the test above would test nothing."""
    names = {line.split()[1] for line in commands_of("README.md")}
    assert names >= {"train", "plan", "generate", "evaluate", "report", "export", "data"}
    assert all(commands_of(f"docs/{page}.md") for page in ("data", "training"))
