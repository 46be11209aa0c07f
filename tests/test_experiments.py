"""The room of the tables: cells are made once, kept and shown; what a table types is understood."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import emoji, lab, patches
from experiments.lab import Options, Variant
from tests.test_cli import TINY
from transfusion.cli.codec import NAMED, FitCodec
from transfusion.cli.runs import Train, named, parse_run
from transfusion.cli.screen import parse
from transfusion.config import SurvivalConfig
from transfusion.model.transfusion import blueprint, count_parameters
from transfusion.sequence import Vocabulary

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    one = ("digits", *TINY, "--data.sources", "digits", "--data.shares", "1")
    return [Variant(f"Width {width}", (*one, "--model.width", str(width))) for width in (32, 48)]


@pytest.fixture(scope="module")
def filled(variants, tmp_path_factory) -> tuple[Options, list[str]]:
    """A table of two variants by two seeds, three cells of it made; and the folders that were measured."""
    asked, seen = Options(tmp_path_factory.mktemp("table"), seeds=(0, 1)), []

    def measure(engine):
        seen.append(f"{engine.run.model.width} {engine.run.training.seed}")
        return {"parameters": engine.opened.parameters}

    lab.fill(Options(asked.out, seeds=(0,)), variants, measure)
    lab.fill(Options(asked.out, ("Width 48",), (0, 1)), variants, measure)
    return asked, seen


def test_each_cell_is_made_once(filled):
    asked, seen = filled
    assert seen == ["32 0", "48 0", "48 1"]
    found = {path.parent.relative_to(asked.out).as_posix() for path in asked.out.rglob("measured.json")}
    assert found == {"width-32/seed-0", "width-48/seed-0", "width-48/seed-1"}


def test_a_cell_says_what_was_measured_and_what_was_held_out(filled):
    cell = filled[0].out / "width-32" / "seed-0"
    values = json.loads((cell / "measured.json").read_text())
    last = json.loads((cell / "metrics.jsonl").read_text().splitlines()[-1])["heldout"]["digits"]
    assert {name: values[name] for name in last} == last
    assert values["parameters"] > 0 and values["minutes"] > 0


def test_the_table_shows_means_and_spreads_of_what_is_there(filled, variants, capsys):
    asked, _ = filled
    cells = [json.loads((asked.out / "width-48" / f"seed-{n}" / "measured.json").read_text()) for n in (0, 1)]
    lab.show(asked, [*variants, Variant("Not made", ())], {"parameters": ".0f", "text_loss": ".3f"})
    shown = capsys.readouterr().out
    assert shown == (asked.out / "table.md").read_text()
    head, _, narrow, wide = shown.splitlines()
    assert head == "|  | seeds | parameters | text loss |"
    one, other = (cell["text_loss"] for cell in cells)
    spread = abs(one - other) / 2**0.5
    assert wide.split(" | ")[1:] == ["2", f"{cells[0]['parameters']} ± 0", f"{(one + other) / 2:.3f} ± {spread:.3f} |"]
    assert narrow.startswith("| Width 32 | 1 | ") and "±" not in narrow


def test_an_unknown_variant_is_named(filled, variants):
    with pytest.raises(SystemExit, match="there is no variant 'Width 64'"):
        lab.fill(Options(filled[0].out, ("Width 64",)), variants, lambda engine: {})


def test_what_was_stopped_is_not_measured(filled, variants, tmp_path):
    """A stopped command leaves a checkpoint and exit code 0; its cell has to wait for the rest."""
    shutil.copytree(filled[0].out / "width-32", tmp_path / "width-32")
    (tmp_path / "width-32" / "seed-0" / "measured.json").unlink()
    shutil.rmtree(tmp_path / "width-32" / "seed-0" / "checkpoints" / "step-000004")
    (tmp_path / "width-32" / "seed-0" / "checkpoints" / "latest").write_text("step-000002")
    before = lab.transfusion
    try:
        lab.transfusion = lambda *arguments: None
        with pytest.raises(SystemExit, match="stopped"):
            lab.fill(Options(tmp_path, seeds=(0,)), variants[:1], lambda engine: {})
    finally:
        lab.transfusion = before
    assert not (tmp_path / "width-32" / "seed-0" / "measured.json").exists()


def test_a_command_that_fails_ends_the_table_with_its_code():
    with pytest.raises(SystemExit) as caught:
        lab.transfusion("train", "nobody")
    assert caught.value.code == 2


SIDES = {(1, 2): 8, (2, 4): 16}  # of patches: of the latents that they cut


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("number", range(4))
def test_the_patches_are_what_their_names_say(sides, number):
    """The words are options of `train`, and cut latents into as many patches."""
    variant, side = patches.variants(sides, "--data", "data")[number], SIDES[sides]
    run, _ = parse_run(Train, "train", *named("train", list(variant.arguments)))
    found = Vocabulary.build(300, [(side, side)], run.model.patch_size).patches((side, side))
    assert found == int(variant.name.split()[1])
    kind = type(blueprint(run.model).patches).__name__
    assert kind == {"linear": "LinearPatches", "U-Net": "UNetPatches"}[variant.name.split(",")[0]]


def test_the_words_for_emoji_are_options_and_make_what_is_said():
    """On two cores and on a GPU; the path itself takes minutes, and is a run's folder beside a page."""
    for words, millions in ((emoji.SMALL, 2), (emoji.LARGE, 40)):
        run, _ = parse_run(Train, "train", *named("train", ["small", "--data", "data", *words]))
        built = blueprint(replace(run.model, vocabulary=640, latent_channels=8))
        assert round(count_parameters(built) / 1e6) == millions
        assert run.data.row_length % 128 == 0  # whole blocks: FlexAttention's, on a GPU
    parsed = parse(FitCodec, "data fit-codec small", [*emoji.LARGE_CODEC, "--size", emoji.SIZE], FitCodec(
        Path("codec"), NAMED["small"].network, NAMED["small"].training, SurvivalConfig(), ("emoji",)))  # fmt: skip
    assert (parsed.network.width, parsed.network.scale) == (64, 4)


@pytest.mark.slow
def test_a_run_withstands_a_fault(tmp_path):
    """The script itself; a hundred faults are for whoever has the time."""
    command = [sys.executable, "-m", "experiments.survival", "--faults", "2", "--out", str(tmp_path / "survival")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 faults: 0 runs did not go on, 0 ended with other weights" in done.stdout
