"""transfusion evaluate: which tasks a run supports, how its results are measured again, and what is said of a bad wish."""

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture
from PIL import ImageOps

from tests.profile import examples
from tests.test_cli import TINY, command, fails
from tests.test_features import clip, dino
from transfusion.config import QUICK, TASKS, EvaluationConfig, from_json
from transfusion.disk import OpenError, read_json, write_json
from transfusion.evaluation import scenes, small_network, suite
from transfusion.evaluation.clip_score import ClipScore
from transfusion.evaluation.coco import read_coco, read_pictures
from transfusion.evaluation.features import open_extractor
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.perplexity import cut_windows
from transfusion.evaluation.results import differences
from transfusion.inference.engine import open_run
from transfusion.sequence import NO_TARGET, Document, Text, Vocabulary, encode_document

DIGITS = ("digits", *TINY, "--generation.steps", "2")
SHAPES = (
    "shapes", *TINY, "--data.sources", "shapes", "--data.mixture-weights", "1",
    "--data.fit-documents", "50", "--data.shapes.level", "2",
    "--model.latent-channels", "6", "--data.tokenizer-size", "300", "--generation.steps", "1", "--data.seq-len", "128",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """A small network that learns nothing worth while, and few prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_network, "STEPS", 3)
        patch.setattr(suite, "SEEN", 100)
        patch.setattr(suite, "PROMPTS", 1)
        yield


@pytest.fixture(scope="module")
def digits(trained, tmp_path_factory):
    return shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def measured(digits):
    """All that this run can be asked without a network."""
    words = "--count", "50", "--seed", "3", "--guidance-scale", "1.5", "--tasks", *QUICK, "choice", "images"
    command("evaluate", digits, *words)
    return digits


def test_every_task_of_a_run_is_in_its_results(measured):
    results = read_json(measured / "results.json")
    assert results["digits"].keys() == {"captions", "drawings", "conditioning", "images"}
    assert results["topics"].keys() == {"text", "choice"}
    assert results["digits"]["images"]["drawn"] == results["digits"]["images"]["real"] == 50
    assert "small network of digits" in results["digits"]["images"]["features"]
    assert results["digits"]["conditioning"]["count"] == 50
    assert results["topics"]["choice"]["count"] == 50
    text = results["topics"]["text"]
    assert text["perplexity"] == pytest.approx(2 ** (text["bits_per_byte"] * text["bytes"] / text["tokens"]))


def test_the_manifest_says_what_it_takes_to_repeat_them(measured):
    (manifest,) = read_json(measured / "results.json")["manifest"]
    asked = from_json(EvaluationConfig, manifest["asked"])
    assert asked == EvaluationConfig(tasks=(*QUICK, "choice", "images"), count=50, seed=3, guidance_scale=1.5)
    assert manifest["generation"]["guidance_scale"] == 1.5 and manifest["generation"]["steps"] == 2
    assert manifest["networks"]["digits images"].startswith("small network of digits")
    assert manifest["dtype"] == "float32" and manifest["versions"]["torch"]


def test_what_was_measured_is_measured_again_and_agrees(measured, tmp_path, capsys):
    before = (measured / "results.json").read_bytes()
    command("evaluate", "--from", measured / "results.json")
    assert "all figures agree" in capsys.readouterr().err
    assert (measured / "results.json").read_bytes() == before
    results = json.loads(before)
    results["topics"]["text"]["bits_per_byte"] += 0.01
    results["manifest"][0]["versions"]["torch"] = "1.0"
    write_json(tmp_path / "changed.json", results)
    said = fails(capsys, 1, "evaluate", measured, "--from", tmp_path / "changed.json")
    assert "1 figures differ" in said and "topics text bits_per_byte" in said
    assert "versions torch: '1.0' there" in said


def test_of_shapes_geneval_is_asked_from_the_pixels(tmp_path, monkeypatch):
    command("train", *SHAPES, "--out", tmp_path / "run")
    asked = []
    real = scenes.draw_captions
    monkeypatch.setattr(suite, "draw_captions", lambda *given: asked.append(1) or real(*given))
    command("evaluate", tmp_path / "run", "--count", "50", "--tasks", "drawings", "images", "geneval")
    results = read_json(tmp_path / "run" / "results.json")["shapes"]
    assert results["geneval"].keys() >= {"counting", "colors", "position", "overall"}
    assert results["drawings"]["count_drawn"] == 50
    assert len(asked) == 1  # both tasks look at the same drawings


def test_without_tasks_it_is_the_quick_ones(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink(missing_ok=True)
    command("evaluate", tmp_path / "run", "--count", "20")
    results = read_json(tmp_path / "run" / "results.json")
    assert {*results["digits"], *results["topics"]} == set(QUICK)


def test_figures_stay_until_they_are_measured_anew(digits, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(digits, run)
    write_json(run / "results.json", {"run": "digits", "step": 1, "digits": {"drawings": {}}, "manifest": []})
    command("evaluate", run, "--count", "20", "--tasks", "conditioning", "text")  # those of another step are gone
    assert read_json(run / "results.json").keys() & {"digits", "topics", "shapes"} == {"digits", "topics"}
    command("evaluate", run, "--count", "30", "--tasks", "conditioning")
    results = read_json(run / "results.json")
    assert results["digits"].keys() == {"conditioning"} and results["digits"]["conditioning"]["count"] == 30
    assert [entry["measured"] for entry in results["manifest"]] == [[["topics", "text"]], [["digits", "conditioning"]]]
    assert [entry["asked"]["tasks"] for entry in results["manifest"]] == [["text"], ["conditioning"]]
    command("evaluate", "--from", run / "results.json")
    assert "all figures agree" in capsys.readouterr().err
    monkeypatch.setattr(suite, "heldout_topics", lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("evaluate", run, "--count", "25", "--tasks", "conditioning", "text")
    after = read_json(run / "results.json")
    assert after["digits"]["conditioning"]["count"] == 25 and after["topics"] == results["topics"]  # kept as they come


def test_figures_are_told_with_what_they_are_of(digits, capsys):
    """With fewer pictures than features there is no FID, and the screen says why."""
    command("evaluate", digits, "--count", "20", "--tasks", "images")
    said = capsys.readouterr().err
    assert "features: small network of digits" in said
    assert "no fid: FID over 48 features needs at least 49 pictures" in said


def test_what_is_not_there_is_said_before_anything_is_measured(digits, monkeypatch, capsys):
    monkeypatch.setattr(suite, "conditioning_gap", lambda *given: 1 / 0)
    for words in (("choice", "--questions", "nowhere.jsonl"), ("images", "--features", "nowhere.pth")):
        assert words[-1] in fails(capsys, 1, "evaluate", digits, "--tasks", "conditioning", *words)


def test_questions_need_nothing_but_the_run(tmp_path):
    """A run of pictures alone can read."""
    command("train", *SHAPES, "--out", tmp_path / "run")
    (tmp_path / "q.jsonl").write_text('{"context": "a red", "choices": [" disc", " square"], "answer": 0}\n')
    command("evaluate", tmp_path / "run", "--tasks", "choice", "--questions", tmp_path / "q.jsonl")
    assert read_json(tmp_path / "run" / "results.json")["questions"]["choice"]["count"] == 1


def test_captions_of_coco_stand_beside_all_that_people_said(digits, tmp_path, capsys):
    """Karpathy's file and COCO's own name the same pictures, which are of any size."""
    (tmp_path / "val").mkdir()
    for n in range(3):
        Picture.fromarray(np.full((10 + n, 20, 3), 60 * n, np.uint8)).save(tmp_path / "val" / f"{n}.png")
    texts = [[f"there are {n} things in it", f"a picture of {n} small things"] for n in range(3)]
    write_json(tmp_path / "dataset_coco.json", {"images": [
        {"filepath": "val", "filename": f"{n}.png", "split": "test" if n else "train",
         "sentences": [{"raw": text} for text in texts[n]]} for n in range(3)]})  # fmt: skip
    write_json(tmp_path / "val" / "captions.json", {
        "images": [{"id": 7 * n, "file_name": f"{n}.png"} for n in range(3)],
        "annotations": [{"image_id": 7 * n, "caption": text} for n in (1, 2) for text in texts[n]]})  # fmt: skip
    found = []
    for path in (tmp_path / "dataset_coco.json", tmp_path / "val" / "captions.json"):
        captioned = read_coco(path, 10)
        assert [list(one.references) for one in captioned] == texts[1:]
        assert [pixels.shape for pixels in read_pictures(captioned, path, None)] == [(11, 20, 3), (12, 20, 3)]
        command("evaluate", digits, "--tasks", "coco", "--coco", path)
        found.append(read_json(digits / "results.json")["coco"]["coco"])
    assert found[0]["cider"] == found[1]["cider"] and found[0]["count"] == 2
    (tmp_path / "val" / "2.png").unlink()
    for name in ("dataset_coco.json", "val/captions.json"):
        assert "2.png" in fails(capsys, 1, "evaluate", digits, "--tasks", "coco", "--coco", tmp_path / name)


def test_drawings_from_cocos_captions_are_scored_some_at_a_time(digits, tmp_path, monkeypatch):
    """30,000 do not fit into memory; the figures are those of all at once. Real ones are cut to what is drawn: a model that
    draws them just so is no way off."""
    count = 30
    real = list(np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), np.uint8))
    for n, pixels in enumerate(real):
        Picture.fromarray(pixels).save(tmp_path / f"{n}.png")
    captions = [("a red", "a blue", "a green circle")[n % 3] for n in range(count)]
    write_json(tmp_path / "captions.json", {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(count)],
        "annotations": [{"image_id": n, "caption": text} for n in range(count) for text in (captions[n], "the second")]})
    monkeypatch.setattr(suite, "AT_ONCE", 7)
    words = "--coco", tmp_path / "captions.json", "--features", dino(), "--clip", clip(), "--seed", 2
    command("evaluate", digits, "--tasks", "coco-images", *words)
    results = read_json(digits / "results.json")
    found, features = results["coco"]["coco-images"], open_extractor(str(dino()), torch.device("cpu"))
    drawn = scenes.draw_captions(open_run(digits, device="cpu"), captions, seed=2)
    cut = [np.asarray(ImageOps.fit(Picture.fromarray(pixels), (8, 8), Picture.Resampling.LANCZOS)) for pixels in real]
    for name, value in image_scores(features(cut), features(drawn), seed=2).items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    assert found["fid"] > 0 and found["drawn"] == count
    assert found["clip"] == pytest.approx(ClipScore(str(clip()), torch.device("cpu"))(drawn, captions))
    assert "Dinov2Model" in results["manifest"][-1]["networks"]["coco coco-images"]
    left = iter(cut)
    monkeypatch.setattr(suite, "draw_captions", lambda engine, captions, seed: [next(left) for _ in captions])
    command("evaluate", digits, "--tasks", "coco-images", *words)
    assert read_json(digits / "results.json")["coco"]["coco-images"]["fid"] == pytest.approx(0, abs=1e-4)


def test_pictures_of_coco_are_taken_at_random(tmp_path):
    """By the seed, in the order of the file; all of them whatever the seed."""
    write_json(tmp_path / "captions.json", {
        "images": [{"id": n, "file_name": f"{n:02}.png"} for n in range(50)],
        "annotations": [{"image_id": n, "caption": "a thing"} for n in range(50)]})  # fmt: skip
    first, again, other, whole = (
        [one.path for one in read_coco(tmp_path / "captions.json", *asked)] for asked in ((10, 1), (10, 1), (10, 2), (99, 3))
    )
    assert first == again == sorted(first) != other and len({*first}) == 10
    assert whole == [f"{n:02}.png" for n in range(50)]


NO_COCO = {}, {"images": 3}, {"images": [{}]}, {"images": [], "annotations": [{}]}, {"images": []}


@pytest.mark.parametrize("values", NO_COCO)
def test_what_is_no_file_of_coco_is_refused(tmp_path, values):
    write_json(tmp_path / "coco.json", values)
    with pytest.raises(OpenError, match="coco"):
        read_coco(tmp_path / "coco.json", 10)


@pytest.mark.parametrize(("words", "code", "said"), [
    (("--tasks", "drawing"), 2, "there is no task 'drawing'"),
    (("--tasks",), 2, "name at least one task"),
    (("--count", "1"), 2, "count must be at least 2"),
    (("--tasks", "geneval"), 1, "nothing in the data of this run for the task geneval"),
    (("--tasks", "clip"), 1, "--clip"),
    (("--tasks", "clip", "--clip", "no/such folder"), 1, "no vision model can be opened"),
    (("--tasks", "images", "--features", "nowhere.safetensors"), 1, "nowhere.safetensors"),
    (("--tasks", "choice", "--questions", "nowhere.jsonl"), 1, "nowhere.jsonl"),
    (("--tasks", "coco"), 1, "--coco"),
    (("--tasks", "coco", "--coco", "nowhere.json"), 1, "nowhere.json"),
    (("--tasks", "coco-images", "--coco", __file__), 1, "--features"),
    (("--tasks", "edits"), 1, "nothing in the data of this run for the task edits"),
    (("--tasks", "text", "--sampler", "best"), 1, "there is no sampler 'best'"),
    (("--from", "nowhere.json"), 1, "nowhere.json"),
])  # fmt: skip
def test_a_bad_wish_is_answered_in_a_line(digits, capsys, words, code, said):
    found = fails(capsys, code, "evaluate", digits, *words)
    assert said in found
    assert not (digits / "results.json.tmp").exists()


def test_results_without_a_manifest_are_refused(digits, tmp_path, capsys):
    for asked in ({}, {"tasks": ["nothing"]}, {"wish": 1}, None):
        manifest = [] if asked is None else [{"asked": asked, "measured": []}] if asked else [{}]
        write_json(tmp_path / "results.json", {"manifest": manifest})
        said = fails(capsys, 1, "evaluate", digits, "--from", tmp_path / "results.json")
        assert "does not say how it was measured" in said
    assert "name a run's folder" in fails(capsys, 2, "evaluate")
    assert "name nothing else" in fails(capsys, 2, "evaluate", digits, "--from", "results.json", "--count", "7")


def test_an_exported_run_is_measured_where_it_lies(digits, tmp_path):
    command("export", digits, "--out", tmp_path / "exported")
    command("evaluate", tmp_path / "exported", "--count", "20", "--tasks", "captions")
    results = read_json(tmp_path / "exported" / "results.json")
    assert results["digits"]["captions"]["count"] and "training_seconds" not in results


numbers = st.floats(allow_nan=True, allow_infinity=False) | st.integers() | st.text(max_size=3) | st.none()
values = st.recursive(numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text("abc", min_size=1, max_size=2), inner, max_size=3), max_leaves=8)  # fmt: skip


@examples(100)
@given(values, values)
def test_differences_are_none_of_equals_and_some_of_others(one, other):
    assert not list(differences(one, json.loads(json.dumps(one))))
    alike = json.dumps(one) == json.dumps(other)
    close = isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)
    if not alike and not isinstance(one, dict | list) and not close and one != other:
        assert list(differences(one, other, "x"))


@examples(60)
@given(st.integers(2, 40), st.integers(0, 200))
def test_windows_count_each_target_once_behind_half_a_window(length, tokens):
    chunk = encode_document(Document((Text(tuple(range(tokens))),)), Vocabulary.build(300, [(2, 2)], 1))
    windows, counted = cut_windows(chunk, length), Counter()
    for window in windows:
        assert len(window) <= length
        targets = window.targets[window.targets != NO_TARGET]
        counted.update(targets.tolist())
        assert window is windows[0] or (window.targets[: length // 2] == NO_TARGET).all()
    assert counted == Counter(chunk.targets[chunk.targets != NO_TARGET].tolist())


def test_the_quick_tasks_are_tasks():
    assert set(QUICK) <= set(TASKS)
    assert asdict(EvaluationConfig())["tasks"] is None
