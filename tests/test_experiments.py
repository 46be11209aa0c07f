"""Experiments: cells are made once, stored and shown; the arguments of every table are valid."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as PILImage

from experiments import (
    attention,
    code_hash,
    continuous,
    copies,
    drawings,
    editing,
    edits,
    fault_tolerance,
    lab,
    measures,
    multimodal,
    noise,
    optimizers,
    patches,
    positions,
    results,
    scaling,
    scenes,
    text,
    towers,
    two_pictures,
)  # fmt: skip
from experiments.code_hash import ROOT, find_modules, hash_source
from experiments.emoji import families
from experiments.lab import Claim, Column, Options, Table, Variant, cell_folder
from tests.processes import Process, run
from tests.profile import THOROUGH
from tests.reading import read_at
from tests.test_cli import TINY, TINY_FITTED, command
from transfusion.cli.ignored import changed, check_train
from transfusion.cli.runs import Train
from transfusion.cli.settings import parse_run, read_run
from transfusion.config import GenerationConfig, Run
from transfusion.data.built_in.shapes import Shapes, caption, render
from transfusion.data.lengths import EDIT, OTHER, PAIRS, kind_of
from transfusion.data.raw import RawText
from transfusion.disk import read_json, write_json
from transfusion.evaluation import small_network
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.parallel import share_batch
from transfusion.sequence import Vocabulary


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    arguments = ("digits", *TINY, "--data.sources", "digits", "--data.mixture-weights", "1")
    return [Variant(f"Width {width}", (*arguments, "--model.width", str(width))) for width in (32, 48)]


def measure_width(engine) -> dict:
    return {"width": engine.run.model.width}


def measure_nothing(engine) -> dict:
    raise AssertionError("a cell is measured that exists")


def make_table(variants, measure=measure_width, **more) -> Table:
    return Table("widths", variants, {"width": Column("width", ".0f"), "text_loss": Column("text loss", ".3f", "lower")},
                 measure, **more)  # fmt: skip


@pytest.fixture(scope="module")
def filled(variants, tmp_path_factory) -> tuple[Options, list[str]]:
    """A table of two variants and two seeds with three of its cells made, and the files whose code was executed for it."""
    options, files = Options(tmp_path_factory.mktemp("table"), seeds=(0, 1)), set()
    before = sys.gettrace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "run_command", command)  # in this process: starting a new one takes longer than training
        sys.settrace(lambda frame, event, _: files.add(frame.f_code.co_filename))
        lab.fill_cells(replace(options, seeds=(0,)), make_table(variants))
        sys.settrace(before)
        lab.fill_cells(replace(options, variants=("Width 48",)), make_table(variants))
    return options, files


def test_each_cell_is_made_once_under_any_row_name(filled, variants):
    options, table = filled[0], make_table(variants)
    folders = {path.parent for path in options.out.rglob("measured.json")}
    assert folders == {cell_folder(options, table, variants[n], seed) for n, seed in ((0, 0), (1, 0), (1, 1))}
    lab.fill_cells(replace(options, seeds=(0,)), make_table([replace(variants[0], name="Narrow")], measure_nothing))
    changed = replace(options, train=("--training.steps=5",))
    assert cell_folder(changed, table, variants[0], 0) != cell_folder(options, table, variants[0], 0)


def test_train_options_are_appended(monkeypatch):
    arguments = "--train=--training.steps=5", "--seeds", "0", "1", "--train=--training.warmup-steps=2"
    monkeypatch.setattr("sys.argv", ["table", *arguments])
    options = lab.parse_options("A table.")
    assert (options.train, options.seeds) == (("--training.steps=5", "--training.warmup-steps=2"), (0, 1))


def test_cell_contains_measurements_and_heldout_losses(filled, variants):
    folder = cell_folder(filled[0], make_table(variants), variants[0], 0)
    values = json.loads((folder / "measured.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "heldout_text_loss/digits" in line][-1]
    assert values["text_loss"] == last["heldout_text_loss/digits"]
    assert values["image_loss"] == last["heldout_image_loss/digits"]
    assert values["velocity_error"] == last["heldout_velocity_error/digits"]
    assert not [name for name in values if "by_t" in name]
    assert values["parameters"] > 0 and values["minutes"] > 0 and values["positions"] > 0
    assert values["machine"] and re.fullmatch(r"[0-9a-f]{7,}(\+changes)?|unknown", values["commit"])


def test_commit_is_marked_when_the_code_has_changed_not_when_the_docs_have(tmp_path):
    for name in "docs/results.md", "experiments/text.py", "transfusion/config.py":
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    assert lab.describe_commit(tmp_path) == "unknown"
    for words in ("init",), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a", "commit", "-m", "a"):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    clean = lab.describe_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "docs" / "results.md").write_text("2")
    assert lab.describe_commit(tmp_path) == clean
    (tmp_path / "transfusion" / "new.py").write_text("2")
    assert lab.describe_commit(tmp_path) == f"{clean}+changes"
    (tmp_path / "transfusion" / "new.py").unlink()
    (tmp_path / "experiments" / "text.py").write_text("2")
    assert lab.describe_commit(tmp_path) == f"{clean}+changes"


def test_table_shows_means_and_standard_deviations(filled, variants, capsys):
    options, _ = filled
    rows = [variants[0], replace(variants[1], paper={"width": "768"}), Variant("Not made", ())]
    claims = [Claim("wide is better", "text_loss", "Width 48", "Width 32"), Claim("none", "width", "Not made", "Width 32")]
    table = make_table(rows, claims=claims)
    cells = [*lab.read_cells(options, table, variants[1]).values()]
    lab.show_table(options, table)
    printed = capsys.readouterr().out
    assert printed == (options.out / "widths.md").read_text()
    head, _, narrow, wide, paper, *rest = printed.splitlines()
    assert head == "|  | seeds | width | text loss | parameters | training FLOPs | minutes |"
    first, second = (cell["text_loss"] for cell in cells)
    std = abs(first - second) / 2**0.5
    parameters, flops = cells[0]["parameters"], statistics.mean(6 * cell["parameters"] * cell["positions"] for cell in cells)
    figures = ["2", "48 ± 0", f"{(first + second) / 2:.3f} ± {std:.3f}", f"{parameters:,}", f"{flops:.2e}"]
    assert wide.split(" | ")[1:-1] == figures
    assert narrow.startswith("| Width 32 | 1 | ") and "±" not in narrow
    assert paper == "| *paper* |  | 768 |  |  |  |  |"
    assert rest[-3].startswith("| wide is better | ") and rest[-3].endswith(" | one seed: no interval |")
    assert rest[-1] == "1 comparison without a figure: rows not run yet"
    contents = json.loads((options.out / "widths.json").read_text())
    assert contents["cells"]["Width 48"] == cells


def test_rows_begin_from_the_run_of_another_row(copied, variants, monkeypatch):
    """All its weights are trained, or images have weights of their own and text is frozen: then its logits do not change.
    Without arguments the row is that run, measured again. What it begins from is part of a cell's key."""
    monkeypatch.setattr(lab, "run_command", command)
    monkeypatch.setattr(measures, "heldout_topics", lambda engine: {"bits_per_byte": 2.0})
    monkeypatch.setattr(measures, "Topics", lambda split: SimpleNamespace(texts=["two digits, one text", "one"]))
    start = make_table(variants), variants[0]
    arguments = "digits", *TINY_FITTED, "--data.sources", "digits", "--data.mixture-weights", "1", "--model.width", "32"
    frozen = "--model.untied", "full", "--training.text-lr-scale", "0"
    rows = [Variant("all", arguments, start=start), Variant("frozen", (*arguments, *frozen), start=start),
            Variant("again", (), start=start)]  # fmt: skip
    table, options = make_table(rows, partial(measures.measure_text_and_scenes, 0)), replace(copied, seeds=(0,))
    lab.fill_cells(options, table)
    values = {row.name: lab.read_cells(options, table, row)[0] for row in rows}
    assert values["all"]["changed_logits"] > 0 == values["frozen"]["changed_logits"]
    assert "changed_logits" not in values["again"] and values["again"]["arguments"] == []
    base = read_json(cell_folder(options, *start, 0) / "measured.json")
    assert values["again"]["minutes"] == base["minutes"] and values["all"]["start"] == variants[0].describe()
    assert values["frozen"]["parameters"] > values["all"]["parameters"] == base["parameters"]
    assert values["frozen"]["flops"] == values["all"]["flops"] == 6 * base["parameters"] * values["all"]["positions"]
    alone = replace(rows[0], start=None)
    assert lab.find_cell(options, table, alone, 0) is None
    assert [seed for _, seed in lab.cells_due(options, replace(table, variants=[alone, *rows]))] == [0]


def test_stopped_run_is_not_measured(filled, variants, tmp_path, monkeypatch):
    """Under torchrun a stopped command ends with exit code 0, but training is not complete."""
    table = make_table(variants[:1])
    folder = cell_folder(Options(tmp_path), table, variants[0], 0)
    shutil.copytree(cell_folder(filled[0], table, variants[0], 0), folder)
    (folder / "measured.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    (folder / "checkpoints" / "latest").write_text("step-000002")
    monkeypatch.setattr(lab, "run_command", lambda *arguments: None)
    monkeypatch.setattr(lab, "check_cell", lambda *arguments: None)
    with pytest.raises(SystemExit, match="stopped"):
        lab.fill_cells(Options(tmp_path, seeds=(0,)), table)
    assert not (folder / "measured.json").exists()


def test_failed_command_exits_with_its_code():
    with pytest.raises(SystemExit) as error:
        lab.run_command("train", "unknown")
    assert error.value.code == 2


# The code of a cell


SOURCE = """
import os  # a comment
def rate(step: int, most: float = 4e-3) -> float:
    '''The learning rate.'''
    text = f"{step:{os.sep}>10} of {most}" "" 'x'
    return most * min(1, step / 100) if step else 0
"""


def test_hash_of_code_ignores_how_it_is_written():
    """Neither comments, docstrings, quotes, brackets nor empty lines change it; a constant, a name or an order does."""
    same = [
        ast.unparse(ast.parse(SOURCE)), SOURCE.replace("  # a comment", ""), SOURCE.replace("The learning", "Another"),
        SOURCE.replace("    '''The learning rate.'''\n", ""), SOURCE.replace("4e-3", "0.0040"),
        SOURCE.replace("step: int,", "\n\n  step: int, # steps\n"), SOURCE.replace("step / 100)", "(step / 100))"),
    ]  # fmt: skip
    others = [SOURCE.replace(*pair) for pair in (("4e-3", "5e-3"), ("min", "max"), ("1, step / 100", "step / 100, 1"),
                                                 ("'x'", "'y'"), (">10", ">11"), ("else 0", "else None"))]  # fmt: skip
    assert {hash_source(text.encode()) for text in same} == {hash_source(SOURCE.encode())}
    assert len({hash_source(text.encode()) for text in [SOURCE, *others]}) == 7


def test_hash_of_code_is_the_same_in_every_version_of_python():
    assert hash_source(SOURCE.encode())[:8] == "07c0c538"


def test_code_of_a_cell_is_what_trains_and_measures(filled):
    """All code that is executed for a cell is in its hash. What only serves or shows is not, nor are the tables."""
    code = make_table([]).code(Variant("", ()))[:2]  # without the measure, which is in this file
    found = {str(path) for path in find_modules(*code).values()}
    executed = {name for name in filled[1] if name.startswith((f"{ROOT}/transfusion/", f"{ROOT}/experiments/"))}
    starting = {str(ROOT / "experiments" / name) for name in ("lab.py", "code_hash.py")}
    assert len(executed) > 30 and executed - found <= starting, executed - found
    image_table, table_of_edits = noise.build_table("cpu"), editing.build_table("cpu")
    modules = find_modules(*image_table.code(Variant("", ())), *table_of_edits.code(Variant("", (), "prepared data")))
    assert {name for name in modules if name.startswith("experiments.")} == {"experiments.measures", "experiments.edits"}
    assert {"transfusion.objective", "transfusion.evaluation.fid", "transfusion.data.prepare"} <= modules.keys()
    assert not [name for name in modules if "serving" in name] and "transfusion.report.write" not in modules


@pytest.fixture
def copied(filled, tmp_path) -> Options:
    """The cells of `filled`, to be changed."""
    shutil.copytree(filled[0].out, tmp_path / "table")
    return replace(filled[0], out=tmp_path / "table")


def change_code(monkeypatch) -> None:
    """As if a constant had changed since the cells were made."""
    monkeypatch.setattr(lab, "hash_code", lambda *modules: "0a1b2c3d")


def test_cell_of_older_code_is_marked_until_it_is_made_again(copied, variants, monkeypatch, capsys):
    table, old = make_table(variants, measure_nothing), lab.find_cell(copied, make_table(variants), variants[1], 0)
    path = old / "measured.json"
    write_json(path, read_json(path) | {"commit": "abc1234+changes"})
    lab.fill_cells(replace(copied, seeds=(0,)), table)
    lab.show_table(copied, table)
    assert "abc1234" not in capsys.readouterr().out
    change_code(monkeypatch)
    lab.fill_cells(replace(copied, seeds=(0,)), table)  # none is missing
    lab.show_table(copied, table)
    printed = capsys.readouterr().out
    commit = read_json(copied.out / "widths.json")["cells"]["Width 48"][1]["commit"]
    assert f"| Width 48 | 2 (1 of abc1234+changes, 1 of {commit}) | 48 ± 0 |" in printed and lab.STALE in printed

    trained = []
    monkeypatch.setattr(lab, "check_code", lambda *modules: None)
    monkeypatch.setattr(lab, "check_cell", lambda *arguments: None)
    monkeypatch.setattr(lab, "run_command", lambda *words: (trained.append(words[-1]), shutil.copytree(old, words[-1])))
    again = replace(copied, seeds=(0,), variants=("Width 48",), rerun_stale=True)
    for _ in range(2):  # the second time it is of this code
        lab.fill_cells(again, make_table(variants))
    assert trained == [lab.cell_folder(copied, table, variants[1], 0)] != [old]
    capsys.readouterr()
    lab.show_table(copied, table)
    assert f"| Width 48 | 2 (1 of {commit}) |" in capsys.readouterr().out  # seed 1 is older
    lab.show_table(replace(copied, seeds=(0,)), make_table(variants[1:]))
    assert "| Width 48 | 1 |" in capsys.readouterr().out


def test_newest_cell_of_older_code_is_shown(copied, variants, monkeypatch):
    """Also one without a hash of its code in its name."""
    table, old = make_table(variants), cell_folder(copied, make_table(variants), variants[0], 0)
    without = old.parent.with_name(old.parent.name.partition("-")[0]) / old.name
    without.mkdir(parents=True)
    write_json(without / "measured.json", {"commit": "1", "width": 7})
    os.utime(old / "measured.json", (1, 1))
    assert lab.find_cell(copied, table, variants[0], 0) == old  # of this code, whatever its age
    change_code(monkeypatch)
    assert lab.find_cell(copied, table, variants[0], 0) == without
    os.utime(without / "measured.json", (0, 0))
    assert lab.find_cell(copied, table, variants[0], 0) == old


def test_code_that_changes_while_a_table_is_made_stops_it(tmp_path, monkeypatch):
    (tmp_path / "changing.py").write_text("rate = 1")
    monkeypatch.setattr(code_hash, "ROOT", tmp_path)
    code_hash.check_code("changing")
    (tmp_path / "changing.py").write_text("rate = 1  # per step")
    code_hash.check_code("changing")
    (tmp_path / "changing.py").write_text("rate = 2")
    with pytest.raises(SystemExit, match="the code has changed"):
        code_hash.check_code("changing")


@pytest.mark.parametrize(("change", "message"), [
    ({"variants": 2}, "variant 'Width 32' is given twice"),
    ({"seeds": (0, 1, 0)}, "seed 0 is given twice"),
    ({"chosen": ("Width 64",)}, "unknown variant 'Width 64'; use 'Width 32', 'Width 48'"),
    ({"claim": ("width", "Width 48", "Width 64")}, "claim 'c': unknown variant 'Width 64'; use 'Width 32', 'Width 48'"),
    ({"claim": ("widht", "Width 48", "Width 32")}, "claim 'c': unknown column 'widht'; use 'width', 'text_loss'"),
    ({"words": ("--model.widht", "48")}, "variant 'Width 48': there is no option --model.widht"),
    ({"words": ("--model.heads", "5")}, "variant 'Width 48': --model.heads 5: width 48 is not divisible by 5"),
    ({"words": ("--training.seed", "7")}, "variant 'Width 48': --training.seed is set for each cell; use --seeds"),
    ({"train": ("--out=x",)}, "variant 'Width 32': --out is set for each cell; use --seeds, --device or --out"),
    ({"words": ("--data.sources", "shape"), "needs_data": True}, "variant 'Width 48': there is no source 'shape'"),
    ({"words": ("--model.patch-size", "3"), "needs_data": True},
     "variant 'Width 48': a latent of 8x8 cannot be divided into patches of side 3"),
])  # fmt: skip
def test_wrong_table_is_refused_before_anything_is_trained(variants, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(lab, "run_command", lambda *arguments: pytest.fail("something was trained"))
    rows = [variants[0], replace(variants[1], arguments=(*variants[1].arguments, *change.get("words", ())))]
    claims = [Claim("c", *change["claim"])] if "claim" in change else []
    prepared = []
    table = make_table(rows * change.get("variants", 1), claims=claims, prepare=prepared.append)
    options = Options(tmp_path, change.get("chosen", ()), change.get("seeds", (0,)), change.get("train", ()))
    with pytest.raises(SystemExit) as error:
        lab.fill_cells(options, table)
    assert message in error.value.code and "\n" not in error.value.code
    assert prepared == ([options] if "needs_data" in change else [])


# Tables


TABLES = [attention, patches, noise, text, scaling, continuous, positions]
PRESET_NAMES = ["cpu", "gpu"]


@cache
def parse_arguments(*arguments: str) -> Run:
    """The run of these arguments, none of which is without effect; cached because tables share variants."""
    chosen = read_run("train", list(arguments))
    run, _ = parse_run(Train, "train", chosen.run, chosen.arguments)
    check_train(chosen.run, run, None)
    return run


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("module", TABLES, ids=lambda module: module.__name__)
def test_variants_and_claims_of_a_table_are_valid(module, preset):
    """Every variant is a run; every claim names existing rows and columns."""
    table, numbers = module.build_table(preset), scenes.PRESETS[preset]
    names = [variant.name for variant in table.variants]
    assert len(set(names)) == len(names)
    for variant in table.variants:
        run = parse_arguments(*variant.arguments, *(("--data", "data") if variant.data else ()))
        model = build_on_meta(run.model)
        kind = {"linear": "LinearPatches", "unet": "UNetPatches", "codes": "NoneType"}[run.model.patches]
        assert type(model.patches).__name__ == kind
        assert (run.data.seq_len, run.training.steps) == (320, (2 if run.data.prepared else 1) * numbers.steps)
        assert run.training.batch_size == numbers.rows // (3 if run.data.sources == ("topics",) else 1)
    for claim in table.claims:
        assert {claim.first, claim.second} <= set(names) and claim.column in table.columns


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_rows_of_towers_differ_in_one_setting(preset):
    """In untied weights, in steps, or in how the language model is trained. All have equal FLOPs per position."""
    table, steps = towers.build_table(preset), 2 * scenes.PRESETS[preset].steps
    rows = {row.name: parse_arguments(*row.arguments, "--data", "data") for row in table.variants}
    shared, tuned, base = (rows[name] for name in (towers.SHARED, towers.FINE_TUNED, towers.LANGUAGE_MODEL))
    assert changed(shared, rows["feed_forward"]) == changed(shared, rows["full"]) == ["model.untied"]
    for share, name in towers.FEWER_STEPS.items():
        assert changed(rows["full"], rows[name]) == ["training.steps"] and rows[name].training.steps == share * steps
    assert changed(tuned, rows[towers.FROZEN]) == ["model.untied", "training.text_lr_scale"]
    assert changed(base, tuned) == ["data.sources", "training.steps", "training.batch_size"] and base.model == tuned.model
    assert base.data.sources == ("topics",) and tuned.data.sources == ("shapes",)
    assert {lab.count_used_parameters(run.model) for run in rows.values()} == {count_parameters(build_on_meta(shared.model))}
    assert {row.name for row in table.variants if row.start} == towers.WAYS.keys()
    for claim in table.claims:
        assert {claim.first, claim.second} <= rows.keys() and claim.column in table.columns


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_rows_of_copies_and_positions_differ_in_one_setting(preset):
    """In what text and images see of the images before them, or in the positions of patches."""
    table = copies.build_table(preset)
    _, start = table.variants[0].start
    assert all(row.start[1] == start and row.data != start.data for row in table.variants) and start.name == "Transfusion M"
    base = parse_arguments(*start.arguments, "--data", "data")
    noised, limited, clean, sources = (parse_arguments(*row.arguments, "--data", "data") for row in table.variants)
    assert changed(noised, limited) == ["data.image_first_max_t"] and limited.data.image_first_max_t == 0.5
    assert changed(noised, sources) == ["data.sources"] and {*sources.data.sources} == {"captioned", "edits"}
    assert changed(noised, replace(clean, data=replace(clean.data, image_first_max_t=1.0))) == ["data.clean_copies"]
    assert noised.data.image_first_max_t == 1 and base.model == noised.model and base.data.seq_len == noised.data.seq_len
    assert all({claim.first, claim.second} <= {row.name for row in table.variants} for claim in table.claims)
    first, second = (parse_arguments(*row.arguments) for row in positions.build_table(preset).variants)
    assert changed(first, second) == ["model.image_rope"] and second.model.image_rope == "2d"
    assert Vocabulary.build(300, [(8, 8)], first.model.patch_size).num_patches((8, 8)) == 64
    assert len({count_parameters(build_on_meta(run.model)) for run in (first, second)}) == 1


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_number_of_patches_matches_the_variant_name(preset):
    for variant in patches.build_table(preset).variants:
        run = parse_arguments(*variant.arguments)
        num_patches = Vocabulary.build(300, [(8, 8)], run.model.patch_size).num_patches((8, 8))
        assert num_patches == int(variant.name.split()[1])


@pytest.mark.parametrize("module, write, files", [(editing, "write_edits", 1), (copies, "write_documents", 3)])
def test_documents_are_prepared_like_the_scenes_and_once(monkeypatch, tmp_path, module, write, files):
    calls, options = [], Options(tmp_path)
    paths = [tmp_path / f"{n}.jsonl" for n in range(files)]
    monkeypatch.setattr(module, write, lambda folder: paths if files > 1 else paths[0])
    monkeypatch.setattr(multimodal, "prepare", lambda level, options: None)

    def prepare(*words):
        calls.append([*map(str, words)])
        words[-1].mkdir(parents=True)
        (words[-1] / "dataset.json").touch()

    monkeypatch.setattr(multimodal, "run_command", prepare)
    module.prepare(options)
    module.prepare(options)
    ((*words, out),) = calls
    latents = multimodal.lab_folder(options, "latents", scenes.PRESETS["cpu"].level)
    assert words == ["data", "prepare", *map(str, paths), "--like", str(latents), "--out"]
    assert out == str(lab.data_folder(options, module.build_table("cpu").variants[-1].data))


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_tables_share_common_cells(preset):
    def cells(module) -> set[Path]:
        table = module.build_table(preset)
        return {cell_folder(Options(), table, variant, 0) for variant in table.variants}

    for first, second, num_common in (
        (attention, patches, 2), (attention, noise, 1), (text, scaling, 2), (scaling, continuous, 0), (towers, text, 2),
        (patches, positions, 1),
    ):  # fmt: skip
        assert len(cells(first) & cells(second)) == num_common


@pytest.mark.parametrize("module", [it for it in results.TABLES if it not in (continuous, families)],  # none yet
                         ids=lambda module: module.__name__)  # fmt: skip
def test_committed_cells_have_the_arguments_of_their_variant(module):
    """The arguments decide the key of a cell: with other ones the committed runs would be trained again."""
    table = module.build_table("cpu")
    cells = json.loads((lab.DOCS / "results" / f"{table.name}.json").read_text())["cells"]
    assert list(cells) == [variant.name for variant in table.variants]
    for variant in table.variants:
        for cell in cells[variant.name]:
            assert {name: cell.get(name) for name in ("arguments", "data", "start")} == {"start": None} | variant.describe()
        assert {*re.findall(r"\d+ of (\w+)", lab.mark_stale(table, variant, cells[variant.name]))} == {
            cell["commit"] for cell in cells[variant.name] if "code" not in cell}  # written before cells had a hash


def test_learning_rates_are_formatted_without_padding():
    assert [scenes.format_rate(value) for value in (4e-3, 2e-3, 1e-3, 5e-4)] == ["4e-3", "2e-3", "1e-3", "5e-4"]


def test_scenes_are_measured_and_drawn(tmp_path, monkeypatch):
    """All measurements and drawings of a run that is trained for two steps."""
    monkeypatch.setattr(measures, "NUM_SCENES", 60)
    monkeypatch.setattr(measures, "NUM_TRAINING_SCENES", 200)
    monkeypatch.setattr(small_network, "STEPS", 10)
    monkeypatch.setattr(lab, "run_command", command)
    measures.small_network.cache_clear()
    variant = scenes.make_variant("cpu", "tiny", "linear", 4, "S", "--generation.steps", "2", "--data.fit-documents", "50",
                                  "--training.batch-size", "1", "--data.shuffle-block", "16")  # fmt: skip
    options = Options(tmp_path, seeds=(3,), train=("--training.steps=2", "--training.warmup-steps=1"))
    table = Table("t", [variant], scenes.COLUMNS, scenes.measure("cpu"))
    noise_seeds = []
    draw = measures.draw_scenes
    monkeypatch.setattr(measures, "draw_scenes", lambda *args: (noise_seeds.append(args[3]), draw(*args))[1])
    lab.fill_cells(options, table)
    measures.small_network.cache_clear()
    (values,) = lab.read_cells(options, table, variant).values()
    assert scenes.COLUMNS.keys() <= values.keys()
    source = Shapes(0, split="heldout", seed=3)  # captions and noise of the run's seed
    captions = Counter(source[n].pair[0] for n in range(60))
    for name in ("right", "captions"):
        counts = values[f"{name}_by_caption"]
        assert {caption: count for caption, (_, count) in counts.items()} == captions
        assert sum(right for right, _ in counts.values()) == pytest.approx(60 * values[name])
    assert noise_seeds == [180]
    assert statistics.mean(values[name] for name in ("count", "colour", "shape", "size", "place")) == values["attributes"]

    variants = [variant, replace(variant, name="same run"), replace(variant, name="not made", arguments=())]
    table = replace(table, variants=variants)
    monkeypatch.setattr(drawings, "FIGURES", {"drawings": [SimpleNamespace(build_table=lambda preset: table)]})
    rows = drawings.draw_rows(options, "drawings")
    assert {name: len(row) for name, row in rows.items()} == {"tiny": drawings.IMAGES_PER_ROW}
    drawings.plot_rows(rows, tmp_path / "drawings.png")
    assert PILImage.open(tmp_path / "drawings.png").width > 1000


@pytest.mark.parametrize("run", optimizers.LOSSES if THOROUGH else ["digits"])
def test_cells_of_optimizers_have_all_columns(run, tmp_path, monkeypatch, capsys):
    """Of both optimizers, trained for two steps."""
    monkeypatch.setattr(measures, "NUM_CAPTIONS", 4)
    monkeypatch.setattr(lab, "run_command", command)
    tiny = "--data.fit-documents=50", "--data.shuffle-block=16", "--model.width=32", "--model.heads=2"
    train = *tiny, "--training.batch-size=1", "--training.steps=2", "--training.warmup-steps=1"
    options = Options(tmp_path, seeds=(0,), train=train)
    table = optimizers.build_table(run)
    lab.run_table(options, table)
    for variant, optimizer in zip(table.variants, ("adamw", "muon"), strict=True):
        (values,) = lab.read_cells(options, table, variant).values()
        assert table.columns.keys() <= values.keys()
        assert read_json(cell_folder(options, table, variant, 0) / "run.json")["run"]["training"]["optimizer"] == optimizer
    assert capsys.readouterr().out.count("one seed: no interval") == len(table.columns)


@pytest.mark.parametrize("level", [0, multimodal.JUDGED_LEVEL])
def test_codecs_differ_only_in_the_codebook(level, tmp_path, monkeypatch):
    """They are trained for equal steps on scenes of the level, which both data sets have."""
    commands = []
    monkeypatch.setattr(multimodal, "run_command", lambda *arguments: commands.append(list(map(str, arguments))))
    multimodal.prepare(level, Options(tmp_path))
    lab_folder = partial(multimodal.lab_folder, Options(tmp_path), level=level)
    fits, prepares = ([arguments for arguments in commands if arguments[1] == verb] for verb in ("fit-codec", "prepare"))
    assert len(fits) == len(prepares) == 2
    assert [word for word in fits[1] if word not in fits[0]] == ["--network.codes", "512", str(lab_folder("vq"))]
    assert prepares[1][prepares[1].index("--tokenizer") + 1] == str(lab_folder("latents") / "tokenizer.json")
    assert {arguments[arguments.index("--shapes-level") + 1] for arguments in commands} == {str(level)}
    variants = [multimodal.make_variant("cpu", level, "", family) for family in ("transfusion", "chameleon")]
    assert [lab.data_folder(Options(tmp_path), variant.data) for variant in variants] == [
        lab_folder("latents"), lab_folder("codes")]  # fmt: skip
    codes = lab_folder("codes")
    monkeypatch.setattr(multimodal, "CODEC", (*multimodal.CODEC, "--training.seed", "1"))
    assert lab_folder("codes") != codes  # another recipe has another folder


def test_edit_changes_one_attribute_and_names_it(tmp_path, monkeypatch):
    first, second = ([before for before, *_ in edits.generate_edits("heldout", 20, seed)] for seed in (0, 1))
    assert not any(a == b for a, b in zip(first, second, strict=True))
    for before, instruction, after in edits.generate_edits("heldout", 50):
        (old,), (new,) = before.objects, after.objects
        assert before.centres == after.centres and old.size == new.size
        value = instruction.split()[3] if instruction.startswith("make it a ") else instruction.split()[2]
        assert value in (new.colour, new.shape) and value not in (old.colour, old.shape)
        assert (old.colour == new.colour) != (old.shape == new.shape)
    monkeypatch.setattr(edits, "NUM_EDITS", 3)
    lines = edits.write_edits(tmp_path / "files").read_text().splitlines()
    assert len(lines) == 3 and (tmp_path / "files" / json.loads(lines[2])["target"]).exists()


def test_documents_of_two_pictures_are_pairs_documents_and_edits(tmp_path, monkeypatch):
    """The noise limit is for pairs alone; the source of an edit has neither noise nor loss."""
    monkeypatch.setattr(edits, "NUM_EDITS", 3)
    paths = two_pictures.write_documents(tmp_path / "files")
    assert [path.stem for path in paths] == [two_pictures.CAPTIONED, two_pictures.EDITS, two_pictures.CLEAN_EDITS]
    captioned, plain, clean = map(read_at, paths)
    assert [{kind_of(raw) for raw in raws} for raws in (captioned, plain, clean)] == [{PAIRS}, {OTHER}, {EDIT}]
    known = [*edits.generate_edits("train", 3)]
    assert len(captioned) == len(plain) == len(clean) == 3
    for pair, open_edit, clean_edit, (before, instruction, after) in zip(captioned, plain, clean, known, strict=True):
        pictures = [render(before), render(after)]
        assert [part.text for part in pair.segments[::2]] == [caption(before), caption(after)]
        for segments in (pair.segments[1::2], open_edit.segments[::2], clean_edit.segments[::2]):
            assert all(map(np.array_equal, [part.pixels for part in segments], pictures))
        assert all(part.loss for part in (*pair.segments, *open_edit.segments[::2], clean_edit.segments[2]))
        assert (open_edit.segments[1], clean_edit.segments[1]) == (RawText(instruction, loss=False),) * 2
        assert (open_edit.segments[0].max_t, clean_edit.segments[0].max_t, clean_edit.segments[0].loss) == (1, 0, False)


def test_second_pictures_are_measured_after_the_first(monkeypatch):
    """An engine that answers right, one that repeats the first picture and its caption, and one that moves the object."""
    monkeypatch.setattr(edits, "NUM_HELDOUT", 20)
    known = [*edits.generate_edits("heldout", 20, 3)]
    prompts, seeds = [], []

    def measure(answer) -> dict[str, float]:
        def generate(requests):
            if requests[0].num_images:
                seeds.append([request.seed for request in requests])
            prompts.append([tuple(part if isinstance(part, str) else part.tobytes() for part in request.parts)
                            for request in requests])  # fmt: skip
            answers = [answer(*edit) for edit in known]
            return [[SimpleNamespace(parts=(picture,) if request.num_images else (text,) * bool(text))]
                    for request, (text, picture) in zip(requests, answers, strict=True)]  # fmt: skip

        run = SimpleNamespace(training=SimpleNamespace(seed=3), generation=GenerationConfig())
        return two_pictures.measure_two_pictures(SimpleNamespace(run=run, generate=generate))

    right = measure(lambda before, instruction, after: (caption(after), render(after)))
    assert right == dict.fromkeys(("right", "changed", "stayed", "drawings", "drawings_stayed", "captions"), 1.0)
    assert seeds == [[*range(60, 80)]] * 2
    assert prompts == [
        [(caption(before), render(before).tobytes(), caption(after)) for before, _, after in known],
        [(render(before).tobytes(), caption(before), render(after).tobytes()) for before, _, after in known],
        [(render(before).tobytes(), instruction) for before, instruction, _ in known],
    ]
    repeated = measure(lambda before, instruction, after: (caption(before), render(before)))
    assert [repeated[name] for name in ("right", "drawings", "captions", "stayed", "drawings_stayed")] == [0, 0, 0, 1, 1]

    def move(scene):
        ((x, y),) = scene.centres
        return replace(scene, centres=((x + (4 if x < 16 else -4), y),))

    moved = measure(lambda before, instruction, after: ("", render(move(after))))  # no caption: an answer without parts
    assert [moved[name] for name in ("right", "drawings", "captions", "changed", "stayed", "drawings_stayed")] == [
        0, 0, 0, 1, 0, 0]  # fmt: skip


def test_edits_begin_from_a_run_of_table_3(tmp_path, monkeypatch):
    trained, measured = [], []
    monkeypatch.setattr(lab, "check_cell", lambda *arguments: None)
    monkeypatch.setattr(lab, "run_command", lambda *words: trained.append(words))
    monkeypatch.setattr(lab, "measure_run", lambda options, table, variant, seed, run: measured.append((variant.name, run)))
    options, table, base = Options(tmp_path, seeds=(3,)), editing.build_table("cpu"), scaling.build_table("cpu")
    lab.fill_cells(options, replace(table, prepare=None))
    (large,) = (variant for variant in base.variants if variant.name == "Transfusion L")
    folder, tuned = cell_folder(options, base, large, 3), cell_folder(options, table, table.variants[1], 3)
    assert measured == [("without fine-tuning", folder), ("fine-tuned on 8,000 edits", tuned)]
    assert [words[-1] for words in trained] == [folder, folder, tuned]
    assert trained[2][trained[2].index("--from") + 1] == folder


def inject_faults(folder: Path, monkeypatch, faults: int, steps: int, seed: int) -> object:
    """Run the script on a tiny run in forked processes; the interrupted runs have this seed. Return the exit code."""
    run(print)  # warm-up: the first start is slower, and the script measures the duration of a run
    arguments = ("train", *fault_tolerance.RUN, *TINY, "--training.steps", steps, "--training.seed")
    monkeypatch.setattr(fault_tolerance, "_start", lambda options, folder: Process(
        command, *arguments, 0 if folder.name == "reference" else seed, "--out", folder))  # fmt: skip
    with pytest.raises(SystemExit) as error:
        fault_tolerance.main(fault_tolerance.Options(folder, faults))
    return error.value.code


@pytest.mark.parametrize("world", [1, 2])
def test_interrupted_run_trains_on_one_and_on_two_processes(world):
    batch_size = parse_arguments(*fault_tolerance.RUN).training.batch_size
    assert share_batch(batch_size, world) * world == batch_size


@pytest.mark.slow
def test_runs_resume_exactly_after_faults(tmp_path, monkeypatch, capsys):
    """A few faults only; the script itself is for many."""
    code = inject_faults(tmp_path / "runs", monkeypatch, 10 if THOROUGH else 2, 12, 0)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "faults: 0 runs did not resume, 0 ended with different weights" in printed


def test_different_final_weights_are_reported(tmp_path, monkeypatch, capsys):
    assert inject_faults(tmp_path / "runs", monkeypatch, 1, 2, 1) == 1
    assert re.search(r"1 faults: 0 runs did not resume, [1-9]\d* ended with different weights", capsys.readouterr().out)
