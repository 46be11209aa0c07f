"""transfusion evaluate: the tasks of a run, repeated measurements, and one-line errors."""

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
from transfusion.evaluation.coco import read_coco, read_images
from transfusion.evaluation.features import open_extractor
from transfusion.evaluation.image_scores import image_scores
from transfusion.evaluation.perplexity import split_windows
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
def shortened():
    """A feature network with 3 training steps, and few prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_network, "STEPS", 3)
        patch.setattr(suite, "NUM_TRAINING_IMAGES", 100)
        patch.setattr(suite, "PROMPTS_PER_CATEGORY", 1)
        yield


@pytest.fixture(scope="module")
def digits(trained, tmp_path_factory):
    return shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def measured(digits):
    """The run with the results of all tasks that need no pretrained network."""
    options = "--count", "50", "--seed", "3", "--guidance-scale", "1.5", "--tasks", *QUICK, "choice", "images"
    command("evaluate", digits, *options)
    return digits


def test_results_hold_every_task(measured):
    results = read_json(measured / "results.json")
    assert results["digits"].keys() == {"captions", "drawings", "conditioning", "images"}
    assert results["topics"].keys() == {"text", "choice"}
    assert results["digits"]["images"]["drawn"] == results["digits"]["images"]["real"] == 50
    assert "small network of digits" in results["digits"]["images"]["features"]
    assert results["digits"]["conditioning"]["count"] == 50
    assert results["topics"]["choice"]["count"] == 50
    text = results["topics"]["text"]
    assert text["perplexity"] == pytest.approx(2 ** (text["bits_per_byte"] * text["bytes"] / text["tokens"]))


def test_manifest_holds_the_settings(measured):
    (manifest,) = read_json(measured / "results.json")["manifest"]
    config = from_json(EvaluationConfig, manifest["config"])
    assert config == EvaluationConfig(tasks=(*QUICK, "choice", "images"), count=50, seed=3, guidance_scale=1.5)
    assert manifest["generation"]["guidance_scale"] == 1.5 and manifest["generation"]["steps"] == 2
    assert manifest["networks"]["digits images"].startswith("small network of digits")
    assert manifest["dtype"] == "float32" and manifest["versions"]["torch"]


def test_repeated_measurement_agrees(measured, tmp_path, capsys):
    before = (measured / "results.json").read_bytes()
    command("evaluate", "--from", measured / "results.json")
    assert "all figures agree" in capsys.readouterr().err
    assert (measured / "results.json").read_bytes() == before
    results = json.loads(before)
    results["topics"]["text"]["bits_per_byte"] += 0.01
    results["manifest"][0]["versions"]["torch"] = "1.0"
    write_json(tmp_path / "changed.json", results)
    output = fails(capsys, 1, "evaluate", measured, "--from", tmp_path / "changed.json")
    assert "1 figures differ" in output and "topics text bits_per_byte" in output
    assert "versions torch: '1.0' there" in output


def test_geneval_of_shapes_uses_the_checker(tmp_path, monkeypatch):
    command("train", *SHAPES, "--out", tmp_path / "run")
    calls = []
    draw_captions = scenes.draw_captions
    monkeypatch.setattr(suite, "draw_captions", lambda *args: calls.append(1) or draw_captions(*args))
    command("evaluate", tmp_path / "run", "--count", "50", "--tasks", "drawings", "images", "geneval")
    results = read_json(tmp_path / "run" / "results.json")["shapes"]
    assert results["geneval"].keys() >= {"counting", "colors", "position", "overall"}
    assert results["drawings"]["count_drawn"] == 50
    assert len(calls) == 1  # both tasks use the same drawings


def test_quick_tasks_are_the_default(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink(missing_ok=True)
    command("evaluate", tmp_path / "run", "--count", "20")
    results = read_json(tmp_path / "run" / "results.json")
    assert {*results["digits"], *results["topics"]} == set(QUICK)


def test_figures_of_other_tasks_are_kept(digits, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(digits, run)
    write_json(run / "results.json", {"run": "digits", "step": 1, "digits": {"drawings": {}}, "manifest": []})
    command("evaluate", run, "--count", "20", "--tasks", "conditioning", "text")  # figures of another step are removed
    assert read_json(run / "results.json").keys() & {"digits", "topics", "shapes"} == {"digits", "topics"}
    command("evaluate", run, "--count", "30", "--tasks", "conditioning")
    results = read_json(run / "results.json")
    assert results["digits"].keys() == {"conditioning"} and results["digits"]["conditioning"]["count"] == 30
    assert [entry["measured"] for entry in results["manifest"]] == [[["topics", "text"]], [["digits", "conditioning"]]]
    assert [entry["config"]["tasks"] for entry in results["manifest"]] == [["text"], ["conditioning"]]
    command("evaluate", "--from", run / "results.json")
    assert "all figures agree" in capsys.readouterr().err
    monkeypatch.setattr(suite, "heldout_topics", lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("evaluate", run, "--count", "25", "--tasks", "conditioning", "text")
    after = read_json(run / "results.json")
    assert after["digits"]["conditioning"]["count"] == 25 and after["topics"] == results["topics"]  # written after each task


def test_network_and_missing_fid_are_printed(digits, capsys):
    """With fewer images than features there is no FID; the output gives the reason."""
    command("evaluate", digits, "--count", "20", "--tasks", "images")
    output = capsys.readouterr().err
    assert "features: small network of digits" in output
    assert "no fid: FID over 48 features needs at least 49 real and as many drawn images" in output


def test_missing_files_fail_before_any_measurement(digits, monkeypatch, capsys):
    monkeypatch.setattr(suite, "conditioning_gap", lambda *args: 1 / 0)
    for options in (("choice", "--questions", "nowhere.jsonl"), ("images", "--features", "nowhere.pth")):
        assert options[-1] in fails(capsys, 1, "evaluate", digits, "--tasks", "conditioning", *options)


def test_questions_need_only_the_run(tmp_path):
    """A run on captioned images supports multiple choice."""
    command("train", *SHAPES, "--out", tmp_path / "run")
    (tmp_path / "q.jsonl").write_text('{"context": "a red", "choices": [" disc", " square"], "answer": 0}\n')
    command("evaluate", tmp_path / "run", "--tasks", "choice", "--questions", tmp_path / "q.jsonl")
    assert read_json(tmp_path / "run" / "results.json")["questions"]["choice"]["count"] == 1


def test_coco_captions_are_scored_with_all_references(digits, tmp_path, capsys):
    """Karpathy's file and COCO's own annotations list the same images, of different sizes."""
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
    results = []
    for path in (tmp_path / "dataset_coco.json", tmp_path / "val" / "captions.json"):
        captioned = read_coco(path, 10)
        assert [list(image.references) for image in captioned] == texts[1:]
        assert [pixels.shape for pixels in read_images(captioned, path, None)] == [(11, 20, 3), (12, 20, 3)]
        command("evaluate", digits, "--tasks", "coco", "--coco", path)
        results.append(read_json(digits / "results.json")["coco"]["coco"])
    assert results[0]["cider"] == results[1]["cider"] and results[0]["count"] == 2
    (tmp_path / "val" / "2.png").unlink()
    for name in ("dataset_coco.json", "val/captions.json"):
        assert "2.png" in fails(capsys, 1, "evaluate", digits, "--tasks", "coco", "--coco", tmp_path / name)


def test_coco_images_are_scored_in_batches(digits, tmp_path, monkeypatch):
    """30,000 images do not fit into memory; batches do not change the figures. Real images are cropped to the size of the
    drawings: a model that draws exactly those has FID 0."""
    count = 30
    real = list(np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), np.uint8))
    for n, pixels in enumerate(real):
        Picture.fromarray(pixels).save(tmp_path / f"{n}.png")
    captions = [("a red", "a blue", "a green circle")[n % 3] for n in range(count)]
    write_json(tmp_path / "captions.json", {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(count)],
        "annotations": [{"image_id": n, "caption": text} for n in range(count) for text in (captions[n], "the second")]})
    monkeypatch.setattr(suite, "BATCH_SIZE", 7)
    options = "--coco", tmp_path / "captions.json", "--features", dino(), "--clip", clip(), "--seed", 2
    command("evaluate", digits, "--tasks", "coco-images", *options)
    results = read_json(digits / "results.json")
    scores, extract = results["coco"]["coco-images"], open_extractor(str(dino()), torch.device("cpu"))
    drawn = scenes.draw_captions(open_run(digits, device="cpu"), captions, seed=2)
    cropped = [np.asarray(ImageOps.fit(Picture.fromarray(pixels), (8, 8), Picture.Resampling.LANCZOS)) for pixels in real]
    for name, value in image_scores(extract(cropped), extract(drawn), seed=2).items():
        assert scores[name] == pytest.approx(value, rel=1e-5)
    assert scores["fid"] > 0 and scores["drawn"] == count
    assert scores["clip"] == pytest.approx(ClipScore(str(clip()), torch.device("cpu"))(drawn, captions))
    assert "Dinov2Model" in results["manifest"][-1]["networks"]["coco coco-images"]
    remaining = iter(cropped)
    monkeypatch.setattr(suite, "draw_captions", lambda engine, captions, seed: [next(remaining) for _ in captions])
    command("evaluate", digits, "--tasks", "coco-images", *options)
    assert read_json(digits / "results.json")["coco"]["coco-images"]["fid"] == pytest.approx(0, abs=1e-4)


def test_coco_images_are_a_seeded_random_sample(tmp_path):
    """In the order of the file; all images for a large count."""
    write_json(tmp_path / "captions.json", {
        "images": [{"id": n, "file_name": f"{n:02}.png"} for n in range(50)],
        "annotations": [{"image_id": n, "caption": "a thing"} for n in range(50)]})  # fmt: skip
    path = tmp_path / "captions.json"
    first, again, other, all_paths = (
        [image.path for image in read_coco(path, count, seed)] for count, seed in ((10, 1), (10, 1), (10, 2), (99, 3))
    )
    assert first == again == sorted(first) != other and len({*first}) == 10
    assert all_paths == [f"{n:02}.png" for n in range(50)]


NOT_COCO = {}, {"images": 3}, {"images": [{}]}, {"images": [], "annotations": [{}]}, {"images": []}


@pytest.mark.parametrize("values", NOT_COCO)
def test_other_files_than_coco_are_refused(tmp_path, values):
    write_json(tmp_path / "coco.json", values)
    with pytest.raises(OpenError, match="coco"):
        read_coco(tmp_path / "coco.json", 10)


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--tasks", "drawing"), 2, "--tasks must be some of captions, drawings, "),
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
    (("--sampler", "best"), 2, "--sampler best: must be one of ddpm"),
    (("--from", "nowhere.json"), 1, "nowhere.json"),
])  # fmt: skip
def test_wrong_options_are_one_line(digits, capsys, options, code, message):
    output = fails(capsys, code, "evaluate", digits, *options)
    assert message in output
    assert not (digits / "results.json.tmp").exists()


def test_results_without_a_manifest_are_refused(digits, tmp_path, capsys):
    for config in ({}, {"tasks": ["nothing"]}, {"unknown": 1}, None):
        manifest = [] if config is None else [{"config": config, "measured": []}] if config else [{}]
        write_json(tmp_path / "results.json", {"manifest": manifest})
        output = fails(capsys, 1, "evaluate", digits, "--from", tmp_path / "results.json")
        assert "does not say how it was measured" in output
    assert "name a run's folder" in fails(capsys, 2, "evaluate")
    assert "name nothing else" in fails(capsys, 2, "evaluate", digits, "--from", "results.json", "--count", "7")


def test_exported_run_is_measured(digits, tmp_path):
    command("export", digits, "--out", tmp_path / "exported")
    command("evaluate", tmp_path / "exported", "--count", "20", "--tasks", "captions")
    results = read_json(tmp_path / "exported" / "results.json")
    assert results["digits"]["captions"]["count"] and "training_seconds" not in results


numbers = st.floats(allow_nan=True, allow_infinity=False) | st.integers() | st.text(max_size=3) | st.none()
values = st.recursive(numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text("abc", min_size=1, max_size=2), inner, max_size=3), max_leaves=8)  # fmt: skip


@examples(100)
@given(values, values)
def test_differences_are_empty_only_for_equal_values(a, b):
    assert not list(differences(a, json.loads(json.dumps(a))))
    is_equal = json.dumps(a) == json.dumps(b)
    is_close = isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    if not is_equal and not isinstance(a, dict | list) and not is_close and a != b:
        assert list(differences(a, b, "x"))


@examples(60)
@given(st.integers(2, 40), st.integers(0, 200))
def test_windows_count_each_target_once(length, tokens):
    chunk = encode_document(Document((Text(tuple(range(tokens))),)), Vocabulary.build(300, [(2, 2)], 1))
    windows, counted = split_windows(chunk, length), Counter()
    for window in windows:
        assert len(window) <= length
        targets = window.targets[window.targets != NO_TARGET]
        counted.update(targets.tolist())
        assert window is windows[0] or (window.targets[: length // 2] == NO_TARGET).all()
    assert counted == Counter(chunk.targets[chunk.targets != NO_TARGET].tolist())


def test_quick_tasks_are_valid_tasks():
    assert set(QUICK) <= set(TASKS)
    assert asdict(EvaluationConfig())["tasks"] is None
