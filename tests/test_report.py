"""The page: it escapes all text, and loads and runs nothing. The report: one page about a whole run."""

import json
import math
import re
import shlex
import shutil
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from tests.profile import examples
from tests.test_cli import command, fails
from tests.tiny import build_engine, save
from transfusion import cli
from transfusion.checkpoint.save import create_run_folder
from transfusion.cli.runs import Train
from transfusion.cli.settings import parse_run
from transfusion.config import (
    DataConfig,
    DiffusionConfig,
    DigitsConfig,
    GenerationConfig,
    ModelConfig,
    RopeScaling,
    Run,
    TrainingConfig,
    to_json,
)
from transfusion.data.built_in.digits import NAMES, load_scans
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.loader import read_pairs
from transfusion.data.sources import fit, name_sources
from transfusion.inference.engine import Request, open_run
from transfusion.model.transfusion import build
from transfusion.page import SERIES, Axis, Cell, Line, Page
from transfusion.report.command import training_command
from transfusion.report.compare import write_comparison
from transfusion.report.drawings import denoising_frames
from transfusion.report.record import Record
from transfusion.report.write import write_report
from transfusion.runs import named_run

HOSTILE = "<script>alert(1)</script> \"a\" 'b' &amp; <img src=x onerror=alert(2)> </pre></style> `code<b>`"
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)


class ParsedPage(HTMLParser):
    """The tags with their attributes, the text, and the images with their alt texts."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = self.style = ""
        self.feed(html)
        self.close()
        images = [attributes for tag, attributes in self.tags if tag == "img"]
        self.pictures = [(image["alt"], pixels_of(image["src"])) for image in images]
        self.addresses = [attributes[key] for _, attributes in self.tags for key in ("src", "href") if key in attributes]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "style" and not self.style:
            self.style = data
        else:
            self.text += data


def pixels_of(address: str) -> np.ndarray:
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.array(Picture.open(BytesIO(b64decode(data))))


def test_hostile_text_is_escaped():
    page = Page(HOSTILE, subtitle=HOSTILE)
    page.paragraph(HOSTILE)
    page.heading(HOSTILE)
    page.paragraph(HOSTILE, muted=True)
    page.figures([(HOSTILE, HOSTILE, HOSTILE)])
    page.bars(HOSTILE, [(HOSTILE, 1.0, "text")], HOSTILE)
    page.table([(HOSTILE, HOSTILE)], (HOSTILE, HOSTILE))
    page.matrix(GREY, (HOSTILE, HOSTILE), {HOSTILE: (0, 0, 0)}, HOSTILE, HOSTILE)
    page.pictures([(HOSTILE, GREY, mark) for mark in (True, False, None)], title=HOSTILE)
    page.pairs([(HOSTILE, GREY, GREY)])
    page.strip([(HOSTILE, [GREY])], column_titles=(HOSTILE, HOSTILE))
    page.sequence([Cell(HOSTILE, HOSTILE), Cell([GREY], HOSTILE, "image", "image")])
    page.passage([(HOSTILE, HOSTILE), (GREY, HOSTILE)])
    page.code(HOSTILE, prompt=HOSTILE)
    page.fold(HOSTILE, HOSTILE)
    page.plot(HOSTILE, {HOSTILE: Line([0, 1], [1, 2])}, x_label=HOSTILE, y_label=HOSTILE)
    parsed = ParsedPage(page.html())
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "iframe", "object", "embed", "form", "base"})
    assert not [key for _, attributes in parsed.tags for key in attributes if key.startswith("on")]
    assert len(parsed.pictures) == 9
    assert parsed.text.count("<script>alert(1)</script>") >= 25
    assert_self_contained(page.html())


def assert_self_contained(html: str) -> None:
    """Nothing is fetched and nothing runs."""
    parsed = ParsedPage(html)
    assert parsed.addresses
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert "url(" not in parsed.style
    assert "@import" not in parsed.style
    assert "<script" not in html.lower()
    links = {address[1:] for address in parsed.addresses if address.startswith("#")}
    assert links <= {attributes.get("id") for _, attributes in parsed.tags}


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (5, 9, 3), (4, 4, 4)])
def test_pictures_decode_back_to_their_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    page = Page("pictures")
    page.pictures([("caption", pixels, None)])
    page.strip([("row", [pixels, pixels])])
    for alt, decoded in ParsedPage(page.html()).pictures:
        assert alt in ("caption", "row, number 1", "row, number 2")
        assert np.array_equal(decoded, pixels.squeeze())


def test_marks_have_a_symbol_as_well_as_a_colour():
    page = Page("marks")
    page.pictures([("good", GREY, True), ("bad", GREY, False), ("neither", GREY, None)])
    assert all(shown in ParsedPage(page.html()).text for shown in ("✓ good", "✗ bad", "neither"))


def test_unknown_colour_is_refused():
    with pytest.raises(ValueError, match="no colour 'pink'; choose one of text"):
        Page("colours").bars("title", [("name", 1.0, "pink")])


def test_plot_omits_points_that_no_axis_can_show():
    page = Page("plot")
    page.plot("nothing", {"line": Line([0, 1], [math.nan, -1.0])}, log=True)
    assert "<svg" not in page.html()
    lines = {"line": Line([0, 1, 2], [math.nan, 4.0, 2.0]), "other": Line([5], [3.0])}
    page.plot("something", lines, log=True)
    labels = [attributes["aria-label"] for _, attributes in ParsedPage(page.html()).tags if "aria-label" in attributes]
    assert labels == ["something: line: from 4 to 2; other: from 3 to 3"]


@examples(200)
@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.booleans())
def test_ticks_lie_inside_the_axis(low, factor, log):
    axis = Axis.covering([low, low * factor], log)
    percents = [axis.to_percent(tick) for tick in axis.ticks]
    assert 2 <= len(percents) <= 24
    assert percents == sorted(percents)
    assert all(-1e-3 <= percent <= 100 + 1e-3 for percent in percents)
    assert 0 <= axis.to_percent(low) < axis.to_percent(low * factor) <= 100 + 1e-9


def test_failed_write_keeps_the_previous_page(tmp_path, monkeypatch):
    path = Page("first").write(tmp_path / "page.html")
    monkeypatch.setattr(Page, "html", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Page("second").write(path)
    assert "first" in path.read_text()


def make_run(folder: Path, name: str, **data) -> Run:
    """A run's folder with a checkpoint of initial weights."""
    run = Run(
        name,
        ModelConfig(width=32, layers=2, heads=2, intermediate_size=48),
        DiffusionConfig(prediction="velocity"),
        DataConfig(tokenizer_size=260, fit_documents=30, image_first_max_t=0.0, **data),
        TrainingConfig(image_weight=1.0),
        generation=GenerationConfig(sampler="ddim", steps=2, guidance_scale=2.0, max_tokens=4),
    )
    encoder = fit(run.data, run.model.patch_size, seed=0)
    fitted = {"vocab_size": encoder.vocabulary.size, "latent_channels": encoder.codec.channels}
    run = replace(run, model=replace(run.model, **fitted))
    create_run_folder(folder, run, encoder.tokenizer, encoder.codec, encoder.vocabulary, {})
    save(folder, 7, {"ema": build(run.model, 0).state_dict()}, {"step": 7, "seconds": 9.0, "num_seen": 9}, keep=1)
    return run


def digits_run(folder: Path) -> Run:
    """A run on digits and topics, with metrics and results in the format of training and evaluation."""
    run = make_run(folder, "digits", sources=("digits", "topics"), seq_len=128, digits=DigitsConfig(interleaved=0.15))
    heldout = {"heldout_text_loss/digits": 6.0, "heldout_image_loss/digits": 1.0, "heldout_text_loss/topics": 6.0}
    heldout |= {"heldout_velocity_error/digits": 0.4, "heldout_velocity_error_by_t/digits/t0.05": 0.9,
                "heldout_velocity_error_by_t/digits/t0.95": 0.8}  # fmt: skip
    lines = [{"step": 0, "event": "start"}, {"step": 0, **heldout}]
    for n in range(1, 8):
        speed = {"positions_per_second": 9, "seconds": 61.0 * n}
        lines.append({"step": n, "text_loss": 6 / n, "image_loss": 1 / n, **speed})
    lines.append({"step": 7, **heldout, "heldout_text_loss/topics": 6.3, "heldout_image_loss/digits": 1.01,
                  "heldout_velocity_error/digits": 0.3, "heldout_velocity_error_by_t/digits/t0.95": 0.2})  # fmt: skip
    complete = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(complete + '{"step": 8, "text_lo')  # incomplete after a crash
    answers = [{"document": n, "reference": "six", "prediction": "six" if n % 3 else HOSTILE} for n in range(60)]
    results = {
        "digits": {
            "captions": {"exact": 2 / 3, "count": 60, "answers": answers},
            "drawings": {"recognised": 1.0, "count": 200, "classifier_on_heldout_scans": 0.9865,
                         "nearest_training_scan": 1.1187, "nearest_training_scan_of_heldout": 1.0351},
        },
        "topics": {"text": {"bits_per_byte": 2.4516, "bytes": 18025,
                            "xz_alone": 2.9523, "xz_after_training_text": 1.747}},
        "manifest": [{"machine": "x86_64, 2 cores", "device": "cpu"}],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return run


def headings(html: str) -> list[str]:
    return [part.partition("</h2>")[0] for part in html.split("<h2>")[1:]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, Run, str]:
    folder = tmp_path_factory.mktemp("digits")
    run = digits_run(folder)
    return folder, run, write_report(folder, open_run(folder, device="cpu")).read_text()


def test_report_of_digits_has_all_sections(digits):
    folder, _, html = digits
    assert (folder / "report.html").read_text() == html
    assert headings(html) == [
        "What this is", "How good it is", "Training curves", "Drawn from a word", "Held-out scans and drawings",
        "From noise to an image", "Captions of held-out scans", "Interleaved text and images", "Text only",
        "How to reproduce it",
    ]  # fmt: skip
    assert_self_contained(html)
    text = ParsedPage(html).text
    figures = ("66.7%", "100%", "98.7%", "2.45", "2.95", "1.75", "1.12", "1.04", "7\u00a0min\u00a07\u00a0s")
    assert [figure for figure in figures if figure not in text] == []
    assert "40 right, 20 wrong." in text and "Wrong: 20 of 20" in text and "Right: 20 of 40" in text
    assert f"predicted {HOSTILE},\nactual six" in text
    assert "Held-out data, not used in training: 297 scans of digits, " in text
    assert (
        "The texts of topics overfit: their held-out loss was lowest at step 0 (6.000) and is 6.300 at step 7." in text
    )
    assert text.count("overfit") == 1  # 1 % is no overfitting
    assert "<title>digits0</title>" in html and "A Transfusion run of the recipe digits" in text
    plots = [attributes["aria-label"] for _, attributes in ParsedPage(html).tags if "aria-label" in attributes]
    assert {"Velocity error: digits: from 0.4 to 0.3", "Velocity error by t: digits: from 0.9 to 0.2"} <= {*plots}
    labels = ("query position", "key position", "training step", "loss (nats per token), log scale", "guidance scale")
    assert [label for label in labels if label not in text] == []


def test_report_embeds_the_drawings_and_the_scans(digits):
    folder, _, html = digits
    pictures = ParsedPage(html).pictures
    drawn = [pixels for alt, pixels in pictures if alt == "nine, number 10"]
    _, *captioned = [pixels for alt, pixels in pictures if alt == "six"]  # the first one is a drawing
    engine = open_run(folder, device="cpu")
    answers = engine.generate([Request(parts=(name,), num_images=10) for name in NAMES])
    assert np.array_equal(drawn, [answers[9][9].parts[0][..., 0]])
    right = [n for n in range(60) if n % 3][:20]
    assert np.array_equal(captioned, load_scans("heldout")[0][right, :, :, 0])


def test_report_is_deterministic(digits):
    folder, _, html = digits
    assert write_report(folder, open_run(folder, device="cpu")).read_text() == html


@pytest.mark.parametrize("call_number", [1, 3])
def test_failed_image_is_not_a_shorter_strip(call_number):
    engine, calls = build_engine(), iter(range(100))
    draw = engine._draw
    engine._draw = lambda sequences: 1 / 0 if next(calls) == call_number - 1 else draw(sequences)
    with pytest.raises(RuntimeError, match="request 1 failed: ZeroDivisionError"):
        denoising_frames(engine, "a")


def test_command_of_the_report_trains_an_equal_run(digits, monkeypatch):
    folder, run, html = digits
    command = shlex.split(html.partition("<pre>transfusion ")[2].partition("</pre>")[0])
    calls = []
    monkeypatch.setattr("transfusion.cli.runs.train_run", lambda run, folder, *_: not calls.append((run, folder)))
    cli.main(command)
    [(parsed, out)] = calls
    assert out == folder
    ids = {name: getattr(run.model, name) for name in ("vocab_size", "text_vocab_size")}
    assert replace(parsed.model, **ids) == run.model
    assert (parsed.data, parsed.training, parsed.generation) == (run.data, run.training, run.generation)


def test_report_of_shapes_without_results(tmp_path):
    folder = tmp_path / "my shapes"
    make_run(folder, "shapes <b>", sources=("shapes",), codec="block_pca", seq_len=128)
    html = write_report(folder, open_run(folder, device="cpu")).read_text()
    assert headings(html) == [
        "What this is", "How good it is", "Drawn from a caption", "Held-out scenes and drawings", "From noise to an image",
        "Captions of held-out scenes", "How to reproduce it",
    ]  # fmt: skip
    assert_self_contained(html)
    parsed = ParsedPage(html)
    assert "not measured yet" in parsed.text and f"transfusion evaluate '{folder}'" in parsed.text
    assert "<p>A Transfusion run of the recipe shapes &lt;b&gt;</p><h1>my-shapes</h1>" in html
    assert sum(pixels.shape == (32, 32, 3) for _, pixels in parsed.pictures) == 8 + 64 + 2 * 16 + 2 * 2 + 32
    drawn = [pixels for alt, pixels in parsed.pictures if alt.endswith(", right")]
    scenes = [pixels for alt, pixels in parsed.pictures if pixels.shape == (32, 32, 3)][8:]
    assert np.array_equal(drawn, scenes[:16])  # the gallery has the same drawings
    real = [pixels for alt, pixels in parsed.pictures if alt.endswith(", left")]
    assert np.array_equal(real, [pixels for _, _, pixels in read_pairs(Shapes(split="heldout"), 16)])


# The command


@examples(60, quick=10)
@given(st.sampled_from(("digits", "small", "0.16b", "chameleon-0.16b")), st.data())
def test_command_is_read_as_the_run(name, data):
    """For any settings: the options of the command give the run back."""
    run = named_run(name)
    values = {
        "model": {"layers": st.integers(1, 9), "kv_heads": st.sampled_from((None, 1)), "qk_norm": st.booleans(),
                  "rope_scaling": st.sampled_from((None, RopeScaling(8.0, 1.0, 4.0, 8192)))},
        "diffusion": {"prediction": st.sampled_from(("epsilon", "x0"))},
        "data": {"caption_dropout": st.floats(0, 1), "codec": st.just("block_pca"),
                 "digits": st.builds(DigitsConfig, st.floats(0, 1))},
        "training": {"betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), "learning_rate": st.floats(0, 1),
                     "batch_size": st.integers(1, 9)},
        "parallel": {"compile": st.sampled_from((None, True, False)), "activation_checkpointing": st.booleans(),
                     "micro_batch_size": st.sampled_from((None, 3))},
        "fault_tolerance": {"skip_spikes_above": st.sampled_from((None, 6.0))},
        "generation": {"guidance_interval": st.just((0.2, 0.7)), "t_shift": st.sampled_from((None, 3.0))},
    }  # fmt: skip
    for part, fields in values.items():
        chosen = data.draw(st.sets(st.sampled_from(sorted(fields))))
        config = replace(getattr(run, part), **{field: data.draw(fields[field]) for field in sorted(chosen)})
        run = replace(run, **{part: config})
    folder = Path(data.draw(st.sampled_from(("runs/a", "runs/with space"))))
    program, command, named, *words = shlex.split(training_command(run, folder))
    assert (program, command, named) == ("transfusion", "train", name)
    parsed, args = parse_run(Train, "train", named_run(name), words)
    assert parsed == run
    assert args.out == folder


def test_command_of_a_run_on_prepared_data_that_starts_from_another(prepared):
    """The data by --data alone, --from, and no setting that data or start decide."""
    data = name_sources(DataConfig(prepared=(str(prepared / "prepared"),), seq_len=128))
    run = replace(named_run("small"), data=replace(named_run("small").data, **vars(data)))
    run = replace(run, model=replace(run.model, vocab_size=999, latent_channels=3))
    start = {"kind": "run", "place": "runs/first run", "name": "first run", "step": 7}
    words = shlex.split(training_command(run, Path("runs/second"), start))
    assert words[words.index("--data") + 1] == str(prepared / "prepared")
    assert words[words.index("--from") + 1] == "runs/first run"
    assert not {"--data.sources", "--model.vocab-size", "--model.latent-channels", "--data.mixture-weights"} & {*words}
    parsed, args = parse_run(Train, "train", named_run("small"), words[3:])
    assert name_sources(parsed.data) == run.data
    assert args.start == "runs/first run"
    other = replace(run, recipe="mine", data=replace(run.data, sources=("photos",)))
    assert training_command(other, Path("runs/mine")) == "transfusion train runs/mine/run.json --out runs/mine"
    assert "--data.sources photos" in training_command(replace(other, recipe="small"), Path("runs/mine"))


# Overfitting


@examples(100)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.sampled_from((0.99, 1.0, 1.019, 1.021, 2.0)))
def test_overfitting_is_a_rise_above_the_lowest_loss(losses, factor):
    losses.append(factor * min(losses))
    lines = [{"step": 10 * n, "heldout_image_loss/a/b": loss} for n, loss in enumerate(losses)]
    sentences = Record(Path(), {}, lines, {}).overfitting()
    assert len(sentences) == (factor > 1.02)
    for sentence in sentences:
        best = 10 * losses.index(min(losses))
        assert sentence.startswith(f"The images of `a/b` overfit: their held-out loss was lowest at step {best} (")


# Comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[list[Path], str]:
    """Two runs, one with other settings, losses and without results; and the page of both."""
    root = tmp_path_factory.mktemp("compared")
    for name, width, factor in (("first", 192, 1.0), ("second <b>", 256, 0.5)):  # the page calls it second-b
        run = named_run("digits")
        run = replace(run, model=replace(run.model, width=width, heads=4), training=replace(run.training, steps=900))
        lines = [{"step": 0, "heldout_text_loss/digits": 6.0}, {"step": 0, "event": "start"}]
        lines += [{"step": n, "text_loss": factor * 6 / n, "positions_per_second": 100.0 * n, "seconds": 61.0 * n,
                   "peak_memory_bytes": 2**30} for n in range(1, 5)]
        lines.append({"step": 4, "heldout_text_loss/digits": factor * 3, f"heldout_image_loss/{name}": 0.5})
        (root / name).mkdir()
        (root / name / "run.json").write_text(json.dumps({"run": to_json(run), "versions": {"torch": "2"}, "notes": {}}))
        (root / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"run": "digits", "parameters": 1234, "manifest": [], "digits": {"captions": {"exact": 0.75, "count": 9}}}
    (root / "first" / "results.json").write_text(json.dumps(results))
    folders = [root / "first", root / "second <b>"]
    command("compare", *folders, "--out", root / "page.html")
    return folders, (root / "page.html").read_text()


def test_comparison_has_figures_curves_and_settings_that_differ(compared):
    folders, html = compared
    assert headings(html) == ["Figures", "Curves", "Settings that differ"]
    assert_self_contained(html)
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in html.split("<tr>")[1:]]
    assert ["figure", "first", "second-b"] in rows
    assert ["held-out text loss of digits", "3.0000", "1.5000"] in rows
    assert ["digits captions: exact", "0.75", "–"] in rows and ["parameters", "1,234", "–"] in rows
    assert ["positions per second, median", "250", "250"] in rows and ["peak memory", "1.00 GiB", "1.00 GiB"] in rows
    settings = rows[rows.index(["setting", "first", "second-b"]) + 1 :]
    assert settings == [["model.width", "192", "256"]]
    plots = [attributes["aria-label"] for _, attributes in ParsedPage(html).tags if "aria-label" in attributes][1:]
    assert "Held-out text loss of digits: first: from 6 to 3; second-b: from 6 to 1.5" in plots
    assert [plot.partition(":")[0] for plot in plots] == [
        "Held-out text loss of digits", "Held-out image loss of first", "Held-out image loss of second <b>",
        "Text loss, training", "Speed",
    ]  # fmt: skip


def test_comparison_of_runs_with_equal_names_and_more_runs_than_colours(compared, tmp_path):
    folders, _ = compared
    copies = []
    for n in range(len(SERIES) + 2):
        copies.append(tmp_path / str(n) / "run")
        shutil.copytree(folders[0], copies[-1])
    html = write_comparison(copies, tmp_path / "page.html").read_text()
    assert "All settings are equal." in html
    assert all(str(folder) in html for folder in copies)
    assert html.count('<li class="series-1 dashed">') == html.count('<li class="series-1">') > 0


def test_setting_that_an_earlier_version_did_not_have_does_not_differ(compared, tmp_path):
    saved = json.loads((compared[0][0] / "run.json").read_text())
    del saved["run"]["training"]["log"], saved["run"]["parallel"]
    (tmp_path / "run.json").write_text(json.dumps(saved))
    assert "All settings are equal." in write_comparison([compared[0][0], tmp_path], tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("other", "expected"), [
    ("", {}),
    ("tokenizer", {"text loss": "tokenizer"}),
    ("codec", {"image loss": "codec", "velocity error": "codec"}),
    ("noise schedule", {"image loss": "diffusion settings", "velocity error": "noise schedule"}),
    ("prediction", {"image loss": "diffusion settings"}),
    ("image first", dict.fromkeys(("text loss", "image loss", "velocity error"), "data.image_first")),
    ("documents", dict.fromkeys(("text loss", "image loss", "velocity error"), "documents")),
    ("another source", {}),
])  # fmt: skip
def test_comparison_says_which_heldout_figures_can_be_compared(compared, tmp_path, other, expected):
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder, error in zip(folders, (0.5, 0.25, None), strict=True):
        shutil.copytree(compared[0][0], folder)
        saved = json.loads((folder / "run.json").read_text())
        saved |= {"codec": {"sha256": "1"}, "tokenizer": {"sha256": "1"}, "notes": {"sources": {"digits": "1"}}}
        if folder.name == "c":  # it has no held-out figures
            saved |= {"codec": {"sha256": "2"}, "tokenizer": {"sha256": "2"}, "notes": {"sources": {"digits": "2"}}}
        elif folder.name == "b":
            match other:
                case "codec" | "tokenizer":
                    saved[other]["sha256"] = "2"
                case "noise schedule":
                    saved["run"]["diffusion"]["noise_schedule"] = "rectified_flow"
                case "prediction":
                    saved["run"]["diffusion"]["prediction"] = "x0"
                case "image first":
                    saved["run"]["data"]["image_first"] = 0.5
                case "documents":
                    saved["notes"]["sources"]["digits"] = "2"
                case "another source":
                    saved["notes"]["sources"]["topics"] = "2"
        (folder / "run.json").write_text(json.dumps(saved))
        (folder / "metrics.jsonl").unlink()
        if error is not None:
            losses = {f"heldout_{name}/digits": error for name in ("text_loss", "image_loss", "velocity_error")}
            by_t = {f"heldout_velocity_error_by_t/digits/t{t}": error + t for t in (0.05, 0.95)}
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 4} | losses | by_t) + "\n")
    html = write_comparison(folders, tmp_path / "page.html").read_text()
    assert '<th scope="row">held-out velocity error of digits</th><td>0.5000</td><td>0.2500</td><td>–</td>' in html
    plots = [attributes["aria-label"] for _, attributes in ParsedPage(html).tags if "aria-label" in attributes]
    assert "Held-out velocity error of digits by t: a: from 0.55 to 1.45; b: from 0.3 to 1.2" in plots
    sentences = re.findall(r"The held-out (.*?) cannot be compared between these runs: they differ in (.*?)\.</p>", html)
    assert dict(sentences) == expected


def test_comparison_of_wrong_folders_is_one_line(compared, tmp_path, capsys):
    first, old = str(compared[0][0]), tmp_path / "old"
    old.mkdir()
    (old / "run.json").write_text(json.dumps({"run": {"lr": 1}}))
    for words, code, message in (
        ((first,), 2, "compare needs two or more different runs"), ((first, first), 2, "two or more different runs"),
        ((first, str(tmp_path)), 1, f"{tmp_path} is not the folder of a run: it has no run.json"),
        ((first, str(old)), 1, f"cannot read {old / 'run.json'}: unknown field lr"),
    ):  # fmt: skip
        assert message in fails(capsys, code, "compare", *words)


# Progress


def test_report_and_evaluation_show_their_progress(tmp_path, capsys, monkeypatch):
    """Where there is no terminal: lines, here without the pause between them."""
    monkeypatch.setattr("transfusion.cli.screen.PAUSE", 0.0)
    monkeypatch.setattr("transfusion.report.material.GALLERY", 2)
    monkeypatch.setattr("transfusion.report.texts.NUM_CAPTIONS", 2)
    make_run(tmp_path, "mine", sources=("digits",), seq_len=128)
    monkeypatch.setattr("transfusion.report.material.DRAWINGS", 1)
    command("report", tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "report: 0 of 12, now introduction"
    assert "report: 6 of 12, now gallery, 2 answers" in lines
    assert lines[-1] == f"wrote {tmp_path / 'report.html'}"
    command("evaluate", tmp_path, "--tasks", "captions", "conditioning", "--count", 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluate: 0 of 2, now digits captions"
    assert "evaluate: 0 of 2, now digits captions, 256 answers" in lines  # of one batch
    assert "evaluate: 1 of 2, now digits conditioning" in lines
