"""docs/recipes.md: each command runs on small data, `train` with --dry-run; the figures are those that `plan` prints."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser, parse_min_max_nnodes

from tests import layouts
from tests.processes import ROOT
from tests.sources import picture, png
from tests.test_cli import command
from tests.tiny import tokenizer
from transfusion.cli import measure
from transfusion.cli.plan import NAME_WIDTH

PAGE = (ROOT / "docs" / "recipes.md").read_text()
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:] if "```\n" in section}
TINY_CODEC = (
    "--network.width 8 --network.blocks 1 --training.steps 1 --training.batch-size 2 --max-images 8"
).split()
CHECKED_AT = {  # commands that are too slow: what they call when their options have been checked
    "data fit-codec paper": "transfusion.cli.codec.open_readers", "evaluate": "transfusion.cli.evaluate.measure",
    "report": "transfusion.cli.runs._write_report", "export": "transfusion.checkpoint.export.export",
    "serve": "transfusion.inference.engine.open_run",
}  # fmt: skip


class Checked(Exception):
    """Instead of the work of a command."""


def commands(section: str) -> list[list[str]]:
    """The words of each command of a section: the lines of its blocks without a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.M | re.S)
    return [shlex.split(line) for language, block in blocks if not language for line in block.splitlines()]


def output_block(section: str) -> list[str]:
    """The lines of its block of output."""
    (block,) = re.findall(r"^```text\n(.*?)^```$", section, re.M | re.S)
    return block.splitlines()


def split_launcher(words: list[str]) -> tuple[list[str], list[str]]:
    """The options of torchrun, [] without it, and the words after `transfusion`."""
    place = words.index("transfusion")
    assert words[:place] in ([], ["torchrun", *words[1 : place - 1], "-m"]), words
    return words[1 : place - 1] if place else [], words[place + 1 :]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def options(words: list[str]) -> set[str]:
    """Each option with its values, as one text."""
    return set(re.split(r" (?=--)", " ".join(words))[1:])


def write_sources(root: Path) -> None:
    """What the commands read, small: sources of their formats, a tokenizer, and files for the evaluation."""
    drawn = [picture(number, 32, 32) for number in range(24)]
    files = {f"{number:09d}": (caption, png(pixels)) for number, (caption, pixels) in enumerate(drawn)}
    members = [(f"{key}.{suffix}", content) for key, (caption, image) in files.items()
               for suffix, content in (("png", image), ("txt", caption))]  # fmt: skip
    texts = [{"text": f"{caption}, and so on. " * 9, "id": f"<{caption}>"} for caption, _ in files.values()]
    listed = [layouts.downloaded(number) for number in range(24)]
    layouts.write(root, {
        **{f"photos/{name}": content for name, content in members},
        **{f"{source}/00000.tar": members for source in ("cc3m", "cc12m", "pictures")},
        **{f"{source}/00000.parquet": listed for source in ("cc3m", "cc12m")},
        **{f"{source}/000_00000.parquet": texts for source in ("fineweb/sample/10BT", "text")},
        "models/llama2/tokenizer.json": tokenizer().to_json(),
        **dict.fromkeys(("annotations/captions_val2014.json", "dataset_coco.json", "val2014/1.jpg", "COCO/1.jpg"), b""),
    })  # fmt: skip


@pytest.fixture(scope="session")
def world(made_once) -> Path:
    """The sources, and an autoencoder with f = 8."""

    def make(root: Path) -> None:
        write_sources(root)
        words = "--size", "32x32", *TINY_CODEC, "--network.multipliers", 1, 1, 1, 1
        command("data", "fit-codec", "small", root / "photos", "--out", root / "codecs" / "sd-vae", *words)

    return made_once("recipes", make)


def execute(words: list[str], launcher: list[str], world: Path, runs: dict[str, Path], monkeypatch) -> None:
    """A command on small data, as far as it is cheap; then what it leaves is there for the next ones."""
    verb = next((name for name in CHECKED_AT if words[: len(name.split())] == name.split()), None)
    with monkeypatch.context() as patch:
        if verb is not None:
            patch.setattr(CHECKED_AT[verb], raise_checked)
            with pytest.raises(Checked):
                command(*words)
        elif words[0] == "train":
            torchrun = get_args_parser().parse_args([*launcher, "script"])
            per_machine = int(torchrun.nproc_per_node)
            patch.setenv("WORLD_SIZE", str(per_machine * parse_min_max_nnodes(torchrun.nnodes)[1]))
            patch.setenv("LOCAL_WORLD_SIZE", str(per_machine))
            command(*words, "--dry-run")
        else:
            for limit, value in {"WARM_UP": 0, "MAX_STEPS": 1, "PREVIEW_STEPS": 1}.items():  # of plan --device
                patch.setattr(measure, limit, value)
            command(*words, *(TINY_CODEC if words[1] == "fit-codec" else ()))
    if verb == "data fit-codec paper":
        shutil.copytree(world / "codecs" / "sd-vae", option(words, "--out"))
    if words[0] in runs:
        shutil.copytree(runs[words[0]], option(words, "--out"))


def raise_checked(*arguments: object, **options: object) -> None:
    raise Checked


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_commands_run_in_order(name, world, written, exported, tmp_path, monkeypatch, capsys):
    """Each finds what the ones before it wrote, under the names of the page."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for words in commands(SECTIONS[name]):
        launcher, words = split_launcher(words)
        execute(words, launcher, world, {"train": written, "export": exported}, monkeypatch)
        printed = capsys.readouterr().out.splitlines()
        if "--device" in words:  # figures differ, names do not
            assert {*output_block(SECTIONS[name])} <= {line[:NAME_WIDTH].rstrip() for line in printed}
    assert {"prepare", "plan", "train", "evaluate", "report", "serve"} <= {w for ws in commands(SECTIONS[name]) for w in ws}


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if " --gpu " in section])
def test_figures_are_those_of_plan(name, capsys):
    """Each line of the section's block of output. The `train` after it has the settings that `plan` prints."""
    (words,) = [words for words in commands(SECTIONS[name]) if words[:2] == ["transfusion", "plan"]]
    command(*words[1:])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in output_block(SECTIONS[name]) if line not in printed] == []
    launcher, planned = split_launcher(shlex.split(printed[-1]))
    *_, words = [words for words in commands(SECTIONS[name]) if "train" in words]  # (others are trials)
    actual_launcher, actual = split_launcher(words)
    assert actual[:2] == planned[:2] and options(planned) - {"--data DIR"} <= options(actual)
    assert options(launcher) <= options(actual_launcher)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_launchers_are_torchruns(page):
    """torchrun reads its options; on several machines the rendezvous is c10d, or each would take itself for the first."""
    for line in re.findall(r"^ *(torchrun .*-m transfusion .*)$", (ROOT / page).read_text(), re.M):
        launcher, _ = split_launcher(shlex.split(line, comments=True))
        arguments = get_args_parser().parse_args([*launcher, "script"])
        assert arguments.nnodes == "1:1" or arguments.rdzv_backend == "c10d", line
