"""The agreement of the checker of `shapes` with readers: pictures, forms, and the figures."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import checker
from experiments.blobs import KINDS
from experiments.checker import PLACES, Label, match, measure, read_labels, read_pictures, write_pictures
from experiments.page import END, write_output
from transfusion.data.built_in.shapes import render, sample_scene

RED = Label("red", "large", "square", "top left")
BLUE = Label("blue", "small", "circle", "middle")
NONE = Label("green", "none", "none", "bottom")


def images(count: int) -> list[np.ndarray]:
    return [render(sample_scene(n % 3, n)) for n in range(count)]


def write_form(path, labels):
    """The form as a reader fills it: a picture without an object keeps its empty line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["number", *Label._fields])
        for number, objects in enumerate(labels, 1):
            rows.writerows([number, *label] for label in objects or [("",) * 4])


def test_pictures_keep_their_pixels_and_order(tmp_path):
    expected = images(40)
    write_pictures(expected, ["run"] * 40, tmp_path)
    np.testing.assert_array_equal(read_pictures(tmp_path), expected)


def test_drawings_are_of_all_runs_with_other_captions_each_and_shuffled(tmp_path, monkeypatch):
    """A fake run draws an image whose first value counts the captions."""
    captions = []

    def draw(engine, some, seed):
        captions.extend(some)
        return [np.full((32, 32, 3), len(captions) - len(some) + n, np.uint8) for n in range(len(some))]

    run = SimpleNamespace(data=SimpleNamespace(shapes=SimpleNamespace(level=2)))
    monkeypatch.setattr(checker, "open_run", lambda folder: SimpleNamespace(run=run))
    monkeypatch.setattr(checker, "draw_captions", draw)
    checker.main(checker.Options("draw", ("one", "two", "three"), out=tmp_path))
    numbers = [int(pixels[0, 0, 0]) for pixels in read_pictures(tmp_path)]
    sources = json.loads((tmp_path / "checker-drawings.json").read_text(encoding="utf-8"))
    assert sorted(numbers) == list(range(200)) != numbers
    assert sources == [("one", "two", "three")[(number > 65) + (number > 132)] for number in numbers]
    assert len(set(captions)) > 150  # few recur


def test_form_holds_the_labels(tmp_path):
    labels = [[RED, BLUE], [], [NONE]]
    write_form(tmp_path / "form.csv", labels)
    assert read_labels(tmp_path / "form.csv", 3) == labels
    write_form(tmp_path / "form.csv", [[RED], [RED._replace(shape="oval")]])
    with pytest.raises(ValueError, match=r"form.csv, line 3: shape is 'oval'; use one of circle, square, triangle, none"):
        read_labels(tmp_path / "form.csv", 2)


def test_objects_are_matched_by_place_and_then_by_colour():
    near = RED._replace(place="top")
    assert match([RED, BLUE], [BLUE, near]) == [(RED, near), (BLUE, BLUE)]
    purple = RED._replace(colour="purple")
    assert match([RED, purple], [purple, RED]) == [(RED, RED), (purple, purple)]
    assert match([RED], [NONE]) == [(RED, None), (None, NONE)]  # too far apart
    assert match([], [BLUE]) == [(None, BLUE)]
    assert match([], []) == []


def test_agreement_of_equal_and_of_changed_labels():
    first = [[RED, BLUE], [], [NONE], [BLUE], [RED]]
    same = measure(first, first)
    assert [same[name] for name in ("shape", "colour", "size", "place")] == ["1.00"] * 4
    assert (same["equal shapes"], same["equal pictures"], same["objects"]) == ("100.0%", "100.0%", "5")
    second = [[RED, BLUE], [BLUE], [NONE], [BLUE._replace(shape="none", size="none")], [RED._replace(size="small")]]
    changed = measure(first, second)
    assert (changed["equal shapes"], changed["equal pictures"], changed["objects"]) == ("66.7%", "40.0%", "6")
    assert changed["shape"] == "0.54"  # (4 / 6 - 10 / 36) / (1 - 10 / 36)
    assert changed["colour"] == changed["place"] == "1.00"


def test_checker_agrees_with_true_labels_and_the_tables_are_written_into_the_page(tmp_path, monkeypatch):
    scenes = [sample_scene(n % 2, n) for n in range(40)]
    write_pictures([render(scene) for scene in scenes], ["run"] * 40, tmp_path)
    labels = [[Label(item.colour, item.size, item.shape, PLACES[3 * int(y * 3 / 32) + int(x * 3 / 32)])
               for item, (x, y) in zip(scene.objects, scene.centres, strict=True)] for scene in scenes]  # fmt: skip
    for name in "ab":
        write_form(tmp_path / f"checker-reader-{name}.csv", labels)
    monkeypatch.setattr(checker, "DOCS", tmp_path)
    page = tmp_path / "evaluation.md"
    begin = "<!-- begin: python -m experiments.checker compare -->\n"
    page.write_text(f"before\n{begin}old\n{END}after\n{END}", encoding="utf-8")
    checker.main(checker.Options("compare", out=tmp_path))
    table = page.read_text(encoding="utf-8").removeprefix(f"before\n{begin}").removesuffix(f"{END}after\n{END}")
    assert table.startswith("| Cohen's kappa |") and "old" not in table
    assert "| reader a and reader b | 1.00 | 1.00 | 1.00 | 1.00 | 100.0% | 100.0% |" in table
    assert "| reader a and checker | 1.00 | 1.00 | 1.00 |" in table
    checker.main(checker.Options("sheets", out=tmp_path, sheets=tmp_path / "sheets"))
    names = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert names == ["form.csv", "legend.png", "sheet-01.png", "sheet-02.png"]
    assert read_labels(tmp_path / "sheets" / "form.csv", 40) == [[]] * 40


def test_limits_have_a_row_for_each_kind_and_each_degradation(monkeypatch):
    monkeypatch.setattr(checker, "NUM_BLOBS", 3)
    monkeypatch.setattr(checker, "COUNT", 6)
    blobs, scenes = checker.measure_limits().split("\n\n")
    assert [line.split(" | ")[0] for line in blobs.splitlines()[2::2]] == [f"| {kind}" for kind in KINDS]
    assert "| half disc | 0.0% | 0.0% | 0.0% | 100.0% |" in blobs
    assert "| 0 | 0 | 0 | 100.0% |" in scenes and len(scenes.splitlines()) == 2 + len(checker.DEGRADATIONS)


def test_page_without_a_place_for_the_output_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("text\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no place for the output of 'python -m x'"):
        write_output(tmp_path / "page.md", "python -m x", "new")
