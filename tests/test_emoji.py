"""The emoji experiment without the network: four archives that the test draws itself."""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from experiments.emoji import dataset, edits, evaluate, interleaved, judge, packages, pictures, recipe
from experiments.emoji.dataset import Cell, assign_splits, to_cells
from experiments.emoji.packages import STYLES, DataError, Drawing, Emoji, fetch, read_drawings
from experiments.lab import run_command
from tests.profile import THOROUGH
from transfusion.inference.answer import Answer

pytest.importorskip("resvg_py")

COLOURS = "red", "green", "blue", "orange", "purple"
SHAPES = "disc", "square", "bar", "cross"
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def draw(colour: str, shape: str, side: int, background: str | None) -> Image.Image:
    image = Image.new("RGBA", (side, side), background or (0, 0, 0, 0))
    canvas, a, b = ImageDraw.Draw(image), side // 5, side - side // 5
    match shape:
        case "disc":
            canvas.ellipse((a, a, b, b), fill=colour)
        case "square":
            canvas.rectangle((a, a, b, b), fill=colour)
        case "bar":
            canvas.rectangle((a, side // 3, b, side // 2), fill=colour)
        case "cross":
            canvas.line((a, a, b, b), fill=colour, width=side // 8)
            canvas.line((a, b, b, a), fill=colour, width=side // 8)
    return image


def svg(colour: str, shape: str) -> bytes:
    body = {"disc": '<circle cx="36" cy="36" r="20" fill="{}"/>',
            "square": '<rect x="16" y="16" width="40" height="40" fill="{}"/>',
            "bar": '<rect x="16" y="30" width="40" height="8" fill="{}"/>',
            "cross": '<path d="M16 16L56 56M56 16L16 56" stroke="{}" stroke-width="8"/>'}[shape].format(colour)  # fmt: skip
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{body}</svg>'.encode()


def encode(image: Image.Image, format: str) -> bytes:
    image.save(file := io.BytesIO(), format, lossless=True)
    return file.getvalue()


def write_archive(path, files: dict[str, bytes]) -> str:
    """An archive as `npm pack` writes it; its integrity."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Folder of the four archives with twenty emoji, and their packages with the right integrity."""
    folder = tmp_path_factory.mktemp("packages")
    codes = {name: f"1F{n:03X}" for n, name in enumerate(NAMES)}
    rows = [{"unified": f"{code}-FE0F", "name": name.upper(), "subcategory": "geometric", "sort_order": -n}
            for n, (name, code) in enumerate(codes.items())]  # fmt: skip
    annotations = [{"hexcode": code, "annotation": name} for name, code in codes.items()]
    drawn = {name: name.split() for name in NAMES}
    files = {
        "noto": {"emoji.json": json.dumps(rows).encode()}
        | {f"img/google/64/{codes[n].lower()}-fe0f.png": encode(draw(*drawn[n], 64, None), "PNG") for n in NAMES},
        "twemoji": {f"img/twitter/64/{codes[n].lower()}.png": encode(draw(*drawn[n], 72, "#eeeeee"), "PNG") for n in NAMES},
        "fluent": {f"assets/{codes[n].lower()}.webp": encode(draw(*drawn[n], 128, "#ffffdd"), "WEBP") for n in NAMES[1:]},
        "openmoji": {"data/openmoji.json": json.dumps(annotations).encode()}
        | {f"color/svg/{codes[n]}.svg": svg(*drawn[n]) for n in NAMES},
    }
    given = {style: replace(packages.PACKAGES[style], integrity="") for style in STYLES}
    return folder, {style: replace(given[style], integrity=write_archive(folder / given[style].archive, files[style]))
                    for style in STYLES}  # fmt: skip


@pytest.fixture
def packed(archives, monkeypatch):
    monkeypatch.setattr(packages, "PACKAGES", archives[1])
    return archives[0]


def test_every_style_is_read_from_its_archive_and_stands_on_white(packed):
    drawings = list(read_drawings(packed))
    assert {style: sum(drawing.style == style for drawing in drawings) for style in STYLES} == {
        "noto": 20, "twemoji": 20, "fluent": 19, "openmoji": 20}  # fmt: skip
    assert [drawing.emoji.name for drawing in drawings if drawing.style == "noto"] == NAMES[::-1]  # in the packages' order
    for drawing in drawings:
        assert drawing.image.mode == "RGB"
        if drawing.style in {"noto", "openmoji"}:  # transparent in the package
            assert drawing.image.getpixel((0, 0)) == (255, 255, 255)
        colour = np.array(drawing.image.resize((33, 33)))[16, 16] if "bar" not in drawing.emoji.name else None
        if colour is not None and drawing.emoji.name.startswith("red"):
            assert colour[0] > 200 and colour[1:].max() < 60, drawing


def test_the_data_set_has_captions_and_two_splits_and_nothing_is_overwritten(packed, tmp_path, capsys):
    out = tmp_path / "emoji"
    options = dataset.Options(out, packed, side=16)
    dataset.main(options)
    pictures = out / "pictures"
    rows = {split: read_lines(pictures / split / "metadata.jsonl") for split in ("train", "validation")}
    assert sum(map(len, rows.values())) == 79
    splits = assign_splits(to_cells(list(read_drawings(packed))))
    assert {"train", "cell"} <= {*splits.values()}
    for split, listed in rows.items():
        names = {path.name for path in (pictures / split).iterdir()}
        assert {row["file_name"] for row in listed} | {"metadata.jsonl"} == names
        for row in listed:
            assert row["text"] == f"{row['concept']}, {row['style']}"
            kind = row.get("heldout", "train")
            assert kind == splits[row["concept"], row["style"]] and (kind == "train") == (split == "train")
            assert Image.open(pictures / split / row["file_name"]).size == (16, 16)
    trained = {row["concept"] for row in rows["train"]}
    for row in rows["validation"]:
        assert (row["heldout"] == "cell") == (row["concept"] in trained)
    with pytest.raises(DataError, match="is not empty"):
        dataset.main(options)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_interleaved_documents_and_edits_hold_one_concept_and_no_held_out_cell(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "HELDOUT_CONCEPTS", 0.2)
    out = tmp_path / "emoji"
    dataset.main(dataset.Options(out, packed, side=16))
    shown = {}  # path -> its row
    for split in ("train", "validation"):
        for row in read_lines(out / "pictures" / split / "metadata.jsonl"):
            shown[(out / "pictures" / split / row["file_name"]).resolve()] = row
    for split, heldout in (("train", None), ("validation", "concept")):
        documents, edits = (read_lines(out / source / f"{split}.jsonl") for source in ("interleaved", "edits"))
        assert documents and edits
        for document in documents:
            rows = [shown[(out / "interleaved" / path).resolve()] for path in document["images"]]
            assert document["text"] == "".join(f"{row['text']}<image>" for row in rows)
            assert len({row["concept"] for row in rows}) == 1 and 2 <= len({row["style"] for row in rows}) == len(rows)
            assert {row.get("heldout") for row in rows} == {heldout}
        for edit in edits:
            source, target = (shown[(out / "edits" / edit[name]).resolve()] for name in ("source", "target"))
            assert source["concept"] == target["concept"] and source["style"] != target["style"]
            assert edit["instruction"] == f"in the style of {target['style']}"
            assert {source.get("heldout"), target.get("heldout")} == {heldout}


def test_a_changed_archive_and_a_missing_npm_are_one_line_each(packed, tmp_path, monkeypatch):
    archive = packed / packages.PACKAGES["noto"].archive
    (tmp_path / archive.name).write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match="is not the published emoji-datasource-google 16.0.0"):
        list(read_drawings(tmp_path))
    with pytest.raises(DataError, match="cannot read .*: No such file"):
        list(read_drawings(tmp_path / "absent"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed.*emoji-datasource-twitter-16.0.0.tgz"):
        fetch(tmp_path)


def test_the_command_ends_with_one_line_without_npm(tmp_path):
    words = [sys.executable, "-m", "experiments.emoji.dataset", tmp_path / "out", "--packages", tmp_path / "none"]
    result = subprocess.run(words, capture_output=True, text=True, env={"PATH": ""})
    assert result.returncode == 1
    assert result.stderr.startswith("error: npm is not installed") and result.stderr.count("\n") == 1


# concepts


def drawing(name: str, style: str, identity: str, is_flag: bool = True) -> Drawing:
    return Drawing(Emoji(name, name, is_flag), style, Image.new("RGB", (4, 4)), identity)


def test_emoji_that_most_styles_draw_alike_are_one_concept_with_the_shortest_name():
    drawings = [drawing(name, style, "cross" if style != "twemoji" or name != "Bouvet Island" else "other")
                for name in ("Bouvet Island", "Norway") for style in ("noto", "twemoji", "openmoji")]  # fmt: skip
    cells = to_cells(drawings)
    assert [(cell.concept, cell.style, cell.code) for cell in cells] == [
        ("Norway", "noto", "Norway"), ("Norway", "twemoji", "Norway"), ("Norway", "openmoji", "Norway")]  # fmt: skip


def test_a_picture_that_one_style_uses_for_two_concepts_is_left_out():
    drawings = [drawing(name, style, "same" if style == "noto" else f"{name} {style}")
                for name in ("Sark", "Saudi Arabia") for style in ("noto", "twemoji")]  # fmt: skip
    assert {(cell.concept, cell.style) for cell in to_cells(drawings)} == {("Sark", "twemoji"), ("Saudi Arabia", "twemoji")}


@given(st.dictionaries(st.text(min_size=1, max_size=6), st.sets(st.sampled_from(STYLES), min_size=1), max_size=30))
def test_a_concept_is_held_out_whole_or_in_one_style_beside_others(styles_of):
    cells = [Cell(name, style, False, name, None) for name, styles in styles_of.items() for style in sorted(styles)]
    splits = assign_splits(cells)
    for name, styles in styles_of.items():
        kinds = [splits[name, style] for style in styles]
        assert kinds.count("concept") in {0, len(kinds)}
        assert kinds.count("cell") <= 1 and kinds != ["cell"]
        assert assign_splits(cell for cell in cells if cell.concept == name).items() <= splits.items()


def test_the_shares_of_the_splits():
    cells = (Cell(f"concept {n}", style, False, "", None) for n in range(5000) for style in STYLES)
    kinds = list(assign_splits(cells).values())
    assert abs(kinds.count("concept") / 20000 - 0.03) < 0.01
    assert abs(kinds.count("cell") / 20000 - 0.097) < 0.01


# judge


def random_cells(rng, count: int) -> judge.Cells:
    concepts = [f"concept {n}" for n in rng.integers(0, 5, count)]
    styles = [STYLES[n] for n in rng.integers(0, 4, count)]
    return judge.Cells(torch.zeros(count, 3, 32, 32), concepts, styles, ["train"] * count, [False] * count)


@given(st.integers(0, 10**6))
def test_the_rank_of_a_concept_is_that_of_its_nearest_picture_in_another_style(seed):
    rng = np.random.default_rng(seed)
    asked, gallery = random_cells(rng, 6), random_cells(rng, 20)
    vectors, others = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 3))).float()) for n in (6, 20))
    asked = asked.where([concept in set(gallery.concepts) for concept in asked.concepts])
    for n, rank in enumerate(judge.rank_concepts(vectors[: len(asked)], asked, judge.Gallery(gallery, others))):
        near = {}
        for m, concept in enumerate(gallery.concepts):
            if gallery.styles[m] != asked.styles[n]:
                near[concept] = max(near.get(concept, -2.0), float(others[m] @ vectors[n]))
        own = near.get(asked.concepts[n])
        if own is None:
            assert rank >= len(near)
        else:
            assert rank == sum(value > own + 1e-6 for value in near.values())


def test_a_judge_learns_concepts_across_styles_and_a_copy_of_the_picture_is_no_help(packed, tmp_path):
    out = tmp_path / "emoji"
    dataset.main(dataset.Options(out, packed, side=32))
    cells = judge.read_cells(out)
    network = judge.train(cells.where([kind == "train" for kind in cells.kinds]), 60, seed=0)
    gallery = judge.Gallery(cells, network.features(cells.pixels)[0])
    real = judge.judge_pictures(network, cells.pixels, cells, gallery)
    blank = judge.judge_pictures(network, torch.ones_like(cells.pixels), cells, gallery)
    assert real.top5 > 0.7 > blank.top5 and real.count == len(cells)
    alone = cells.where([style == "noto" for style in cells.styles])
    gallery = judge.Gallery(alone, network.features(alone.pixels)[0])
    assert judge.judge_pictures(network, alone.pixels, alone, gallery).top5 == 0  # the gallery has no other style


# figures


def test_pairs_of_styles_have_one_concept_two_styles_and_the_asked_kinds():
    rng = np.random.default_rng(0)
    kinds = ["train", "cell", "concept"]
    cells = replace(random_cells(rng, 60), kinds=[kinds[n] for n in rng.integers(0, 3, 60)])
    for source_kind, target_kind in (("train", "cell"), ("concept", "concept"), ("train", "train")):
        given, asked = edits.pair_styles(cells, source_kind, target_kind, 1000)
        possible = sum(a != b and cells.concepts[a] == cells.concepts[b]
                       and (cells.kinds[a], cells.kinds[b]) == (source_kind, target_kind)
                       for a in range(60) for b in range(60))  # fmt: skip
        assert len(given) == len(asked) == possible > 0 and given.concepts == asked.concepts
        assert {*given.kinds} == {source_kind} and {*asked.kinds} == {target_kind}
    assert len(edits.pair_styles(cells, "train", "cell", 3)[0]) == 3


def test_only_a_caption_of_the_concept_in_a_third_style_counts_as_a_continuation():
    picture = np.zeros((32, 32, 3), np.uint8)
    first = judge.Cells(torch.zeros(5, 3, 32, 32), ["key"] * 5, ["noto"] * 5, ["train"] * 5, [False] * 5)
    second = replace(first, styles=["fluent"] * 5)
    answers = [Answer([text, picture]) for text in ("key, twemoji", "key, noto", "lock, twemoji", "key twemoji")]
    network = judge.Judge()
    gallery = judge.Gallery(first, network.features(first.pixels)[0])
    shares = interleaved.measure_continued(network, gallery, (first, second), [*answers, Answer(["key, openmoji"])])
    assert (shares["pairs"], shares["captions"], shares["count"]) == (0.8, 0.2, 1)


def test_a_copy_of_a_training_picture_is_told_from_a_drawing(monkeypatch):
    pixels = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cells = replace(random_cells(np.random.default_rng(0), 40), pixels=pixels, kinds=["train"] * 20 + ["cell"] * 20)
    for drawn, copies in ((pixels[:20], 1.0), (torch.ones(20, 3, 32, 32), 0.0)):
        monkeypatch.setattr(evaluate, "draw", lambda engine, asked, drawn=drawn: drawn)
        assert evaluate.measure_copies(None, cells, 20)["copies"] == copies


@pytest.mark.skipif(not THOROUGH, reason="make test-all: the chain from the archives to the pictures takes minutes")
def test_the_whole_chain_with_thirty_steps(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "HELDOUT_CONCEPTS", 0.2)
    data, out, verdicts = tmp_path / "emoji", tmp_path / "runs", tmp_path / "judge"
    dataset.main(dataset.Options(data, packed))
    recipe.main(recipe.Options(data, out, codec_steps=30, steps=30, edit_steps=30))
    exported = tmp_path / "exported"
    run_command("export", out / "run", "--out", exported, "--dtype", "float16", "--name", "emoji")
    judge.main(judge.Options(data, verdicts, steps=30))
    evaluate.main(evaluate.Options(str(exported), data, verdicts, tmp_path / "figures.json", count=8))
    edits.main(edits.Options(str(out / "edits"), str(out / "run"), data, verdicts, tmp_path / "edits.json", count=8))
    interleaved.main(interleaved.Options(str(exported), data, verdicts, tmp_path / "interleaved.json", count=8))
    pictures.main(pictures.Options(data, str(exported), str(out / "edits"), tmp_path))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"training cells", "held-out cells", "held-out concepts", "codec", "captions", "copies"} <= figures.keys()
    assert figures["held-out cells"]["real"]["count"] == figures["held-out cells"]["drawn"]["count"] > 0
    assert {"fine-tuned", "not fine-tuned", "the source"} <= json.loads((tmp_path / "edits.json").read_text()).keys()
    assert {"held-out cells", "on its own"} <= json.loads((tmp_path / "interleaved.json").read_text()).keys()
    assert all((tmp_path / f"{name}.png").exists() for name in ("emoji", "emoji-styles", "edits", "interleaved"))
