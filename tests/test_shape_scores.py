"""The fit of the checker's weights: labels, made objects, and figures out of fold."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from experiments import checker, shape_scores
from experiments.checker import Label, write_pictures
from experiments.page import END
from experiments.shape_scores import WORDS, fit, fit_codec, label_rows, lossy, predict, scene_rows
from tests.test_agreement import write_form
from transfusion.data.built_in.shapes import SHAPES, render, sample_scene
from transfusion.evaluation.shapes import FEATURES, SCORES, find_objects, measure

CIRCLE = Label("red", "large", "circle", "top left")
SQUARE = Label("blue", "small", "square", "bottom right")


def test_weights_have_a_row_for_each_feature_and_a_column_for_each_shape():
    (covered, _), *_ = find_objects(render(sample_scene(0, 0)))
    assert SCORES.shape == (len(FEATURES), len(SHAPES)) and measure(covered).shape == (len(FEATURES),)


def test_fitted_table_has_the_scores_of_the_regression():
    """The table is for raw features, with a score of 0 for none; the regression has standardised ones and four scores."""
    rng = np.random.default_rng(0)
    shapes, weights = rng.choice(WORDS, 300), rng.uniform(0.5, 2, 300)
    features = rng.normal(3, [0.1, 1, 2, 1], (300, 4)) + [[word == shape for shape in SHAPES] + [0] for word in shapes]
    features[:, -1] = 1  # the constant
    table = fit(list(zip(features, shapes, weights, strict=True)))
    scaled = StandardScaler().fit_transform(features[:, :-1])
    model = LogisticRegression(C=shape_scores.INVERSE_PENALTY, max_iter=2000).fit(scaled, shapes, sample_weight=weights)
    expected = model.decision_function(scaled)[:, [list(model.classes_).index(word) for word in WORDS]]  # (300, 4)
    rounding = 0.0051 * abs(features).sum(1, keepdims=True)
    assert (abs(features @ table - (expected[:, :3] - expected[:, 3:])) < rounding).all()
    predicted = [predict(row, table) for row in features]
    assert {*predicted} == {*WORDS} and np.mean(predicted == model.predict(scaled)) > 0.95  # near ties may be rounded


def test_labels_of_readers_become_rows_of_the_objects_that_the_checker_finds():
    absent = SQUARE._replace(place="top right", shape="triangle")  # two places away
    none = CIRCLE._replace(shape="none")
    features = [np.array([1.0]), np.array([2.0])]
    rows = list(label_rows([SQUARE._replace(shape="none"), CIRCLE], features, [CIRCLE, SQUARE], [none, absent]))
    weight = shape_scores.SHAPED_WEIGHT
    assert sorted((row[0], shape, w) for row, shape, w in rows) == [
        (1, "none", 1), (1, "square", weight), (2, "circle", weight), (2, "none", 1)
    ]  # fmt: skip


def test_objects_of_a_scene_have_their_own_shapes():
    seed = next(n for n in range(1, 99) if len({item.shape for item in sample_scene(n % 3, n).objects}) > 1)
    rows = list(scene_rows("scene", [seed], lambda pixels: pixels, ()))
    assert sorted(shape for _, shape, _ in rows) == sorted(item.shape for item in sample_scene(seed % 3, seed).objects)
    assert all(predict(features, SCORES) == shape for features, shape, _ in rows)


def test_lossy_scene_is_the_nearest_with_six_components(monkeypatch):
    centre, basis = fit_codec()
    pixels = render(sample_scene(1, 7001))
    image = lossy(pixels, centre, basis)
    assert basis.shape == (48, 6) and 0 < abs(image.astype(float) - pixels).mean() < 10
    assert abs(lossy(image, centre, basis).astype(float) - image).mean() < 0.5  # a projection
    monkeypatch.setattr(shape_scores, "COMPONENTS", 48)
    np.testing.assert_array_equal(lossy(pixels, *fit_codec()), pixels)


def test_each_run_is_read_with_weights_fitted_without_it(tmp_path, monkeypatch):
    """The weights of the folds are right here, and those of all runs read no shape: the figures are of the folds."""
    images = [render(sample_scene(0, n)) for n in range(20)]
    write_pictures(images, ["one", "two"] * 10, tmp_path)
    labels = [checker.read_picture(pixels) for pixels in images]
    for name in "ab":
        write_form(tmp_path / f"checker-reader-{name}.csv", labels)
    fitted = []

    def fake_fit(rows):
        fitted.append({tuple(features) for features, _, _ in rows})
        return np.zeros_like(SCORES) if len(fitted) == 1 else SCORES

    monkeypatch.setattr(shape_scores, "TUNING", tmp_path)
    monkeypatch.setattr(shape_scores, "DOCS", tmp_path)
    monkeypatch.setattr(shape_scores, "make_rows", lambda: [])
    monkeypatch.setattr(shape_scores, "fit", fake_fit)
    page = tmp_path / "evaluation.md"
    page.write_text(f"<!-- begin: python -m experiments.shape_scores -->\n{END}", encoding="utf-8")
    shape_scores.main()
    parts = [{tuple(measure(covered)) for pixels in images[n::2] for covered, _ in find_objects(pixels)} for n in (0, 1)]
    assert fitted == [parts[0] | parts[1], parts[1], parts[0]]
    assert page.read_text(encoding="utf-8").count(" and checker | 1.00 |") == 2
