"""Every field of every config has a rule, which holds in Python, in JSON and on the command line."""

import json
import random
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import configurations
from tests.profile import THOROUGH, examples
from transfusion.cli import codec, data, evaluate, export, plan, runs, serve, sources
from transfusion.cli.options import parse
from transfusion.cli.screen import UsageError
from transfusion.cli.settings import parse_run
from transfusion.config import GenerationConfig, ModelConfig, RopeScaling, Run, from_json, to_json
from transfusion.fields import Config, PositiveInt, Range, check_value, field_types, range_of
from transfusion.model.transfusion import build
from transfusion.runs import named_run
from transfusion.sequence import Document, Image, Row, Text, Vocabulary, collate, encode_document
from transfusion.serving.schemas import ImageOptions

CLASSES = configurations.config_classes()
COMMANDS = [
    cls for module in (codec, data, evaluate, export, plan, runs, serve, sources) for cls in vars(module).values()
    if is_dataclass(cls) and cls.__module__ == module.__name__ and not issubclass(cls, Config)
]  # fmt: skip


def without_rule(hint: Any) -> bool:
    """Whether there is a number without a range in an annotation."""
    if get_origin(hint) is Annotated:
        inner, *rules = get_args(hint)
        return without_rule(inner) and not (inner in (int, float) and any(isinstance(rule, Range) for rule in rules))
    if get_origin(hint) is Literal:
        return False
    return hint in (int, float) or any(without_rule(argument) for argument in get_args(hint))


@pytest.mark.parametrize("cls", [*CLASSES, *COMMANDS], ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    assert [name for name, hint in field_types(cls).items() if without_rule(hint)] == []


def test_numbers_without_a_range_are_found():
    """The test above is only valid if it sees all classes, and numbers anywhere in an annotation."""
    assert {"ModelConfig", "RopeScaling", "AutoencoderConfig", "Limits", "Machines", "Run"} <= {c.__name__ for c in CLASSES}
    assert {"Generate", "Reading", "FitCodec", "PlanOptions", "Serve"} <= {c.__name__ for c in COMMANDS}
    wrong = int, float | None, tuple[int, ...], Annotated[int, "no range"], tuple[PositiveInt, float]
    assert all(map(without_rule, wrong))
    assert not any(map(without_rule, (PositiveInt, PositiveInt | None, tuple[PositiveInt, ...], bool, str, Literal[1, 3])))


def test_odd_configurations_are_constructed_or_refused_in_one_line():
    counts = configurations.count_by_kind(50_000 if THOROUGH else 20_000)  # every odd value of every field, and more
    assert all(counts[kind, "refused"] > 30 for kind in configurations.KINDS), counts
    assert all(counts[kind, "constructed"] for kind in configurations.KINDS if kind not in ("nan", "inf")), counts
    assert not counts["nan", "constructed"] + counts["inf", "constructed"]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_refuses_another_type(cls):
    """Also of a class that does not call the check."""
    for f in fields(cls):
        with pytest.raises(ValueError, match=f"{cls.part}{f.name} must be "):
            cls(**{**configurations.required(cls), f.name: object()})


@examples(2_000, 200)
@given(st.fixed_dictionaries({"patches": st.sampled_from(("linear", "unet", "codes"))}, optional={
    "width": st.sampled_from((4, 8, 12, 24)), "heads": st.integers(1, 4), "kv_heads": st.integers(1, 4),
    "head_dim": st.integers(1, 6), "intermediate_size": st.integers(1, 9), "norm_eps": st.sampled_from((1e-12, 0.1)),
    "latent_channels": st.integers(1, 3), "patch_size": st.integers(1, 4), "unet_width": st.sampled_from((8, 12, 16, 32)),
    "qk_norm": st.booleans(), "post_norm": st.booleans(), "tie_word_embeddings": st.booleans(),
}))  # fmt: skip
def test_constructed_models_compute_finite_values(values):
    values = {"width": 8, "layers": 1, "heads": 2, "unet_width": 16, "patch_size": 1, "vocab_size": 16, **values}
    try:
        config = ModelConfig(**values)
    except ValueError:
        return
    shape = 2 * config.patch_size, 2 * config.patch_size
    vocabulary = Vocabulary.build(5, [shape], config.patch_size)
    images = [] if config.patches == "codes" else [Image(np.zeros((config.latent_channels, *shape), np.float32))]
    document = encode_document(Document((Text((1, 2)), *images)), vocabulary)
    batch = collate([Row((document,))], len(document), vocabulary)
    with torch.inference_mode():
        prediction = build(config, 0)(batch, [group.x0 for group in batch.groups], [torch.full((1,), 0.5)] * len(images))
    assert all(tensor.isfinite().all() for tensor in (prediction.logits, *prediction.images))


# Values


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ModelConfig(patches="Unet"), "model.patches must be one of linear, unet, codes, not 'Unet'"),
    (lambda: ModelConfig(kv_heads=0), "model.kv_heads must be at least 1, not 0"),
    (lambda: ModelConfig(layers=10**12), "model.layers must be at most 10,000, not 1000000000000"),
    (lambda: GenerationConfig(steps=2.5), "steps must be a whole number, not 2.5"),
    (lambda: GenerationConfig(steps=True), "steps must be a whole number, not True"),
    (lambda: GenerationConfig(top_p=0), "top_p must be above 0 and at most 1, not 0.0"),
    (lambda: Run("a", model={"width": 8}), "model must be a ModelConfig, not {'width': 8}"),
    (lambda: RopeScaling(8, 4, 4), "high_frequency_factor must be above low_frequency_factor, 4.0, not 4.0"),
    (lambda: from_json(Run, {}), "the field recipe is missing"),
    (lambda: from_json(Run, []), "the config must be an object, not a list"),
    (lambda: from_json(Run, {"recipe": "a", "model": {"hidden": 8}}), "unknown field model.hidden"),
    (lambda: from_json(Run, {"recipe": "a", "training": {"betas": [0.9]}}), "training.betas must be 2 numbers, not [0.9]"),
    (lambda: from_json(Run, {"recipe": "a", "training": {"max_grad_norm": 0}}), "max_grad_norm must be above 0, not 0.0"),
])  # fmt: skip
def test_messages(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).endswith(message)


def test_as_many_key_heads_as_heads_only_if_not_set():
    assert ModelConfig(width=8, heads=4).num_kv_heads == 4
    assert ModelConfig(width=8, heads=4, kv_heads=2).num_kv_heads == 2


bounds = st.integers(-2, 2)


@examples(500, 200)
@given(bounds, bounds, bounds, bounds, st.integers(-3, 3) | st.floats(-3, 3))
def test_range_equals_its_words(at_least, above, at_most, below, value):
    allowed = Range(at_least, at_most, above, below)
    is_inside = at_least <= value <= at_most and above < value < below
    if is_inside:
        assert check_value(Annotated[float, allowed], value, "x") == value
    else:
        with pytest.raises(ValueError, match="x must be"):
            check_value(Annotated[float, allowed], value, "x")


@pytest.mark.parametrize(("hint", "words"), [
    (Annotated[int, Range(at_least=1, limit=9)], "at least 1"), (Annotated[float, Range(0, 1)] | None, "between 0 and 1"),
    (Annotated[float, Range(above=0, at_most=1)], "above 0 and at most 1"), (str, ""), (Annotated[int, Range()], ""),
    (tuple[Annotated[float, Range(at_least=0, below=1)], ...], "each at least 0 and below 1"),
])  # fmt: skip
def test_words_of_a_range(hint, words):
    assert range_of(hint) == words


def test_server_and_command_line_have_one_range_of_guidance():
    (bounds,) = (rule for rule in get_args(field_types(GenerationConfig)["guidance_scale"]) if isinstance(rule, Range))
    limits = {name: getattr(rule, name) for rule in _leaves(ImageOptions.model_fields["guidance_scale"].annotation)
              for name in ("ge", "le") if hasattr(rule, name)}  # fmt: skip
    assert limits == {"ge": bounds.at_least, "le": bounds.at_most}


def _leaves(hint: Any) -> list:
    """The annotations anywhere in a hint."""
    leaves = [[argument, *getattr(argument, "metadata", ()), *_leaves(argument)] for argument in get_args(hint)]
    return [leaf for group in leaves for leaf in group]


# The command line


def options_of(cls: type, prefix: str = "--") -> list[tuple[str, Any]]:
    """The options of a config with a value, each with the annotation of its field."""
    options = []
    for name, hint in field_types(cls).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        options += options_of(hint, f"{flag}.") if is_dataclass(hint) else [(flag, hint)] if hint is not bool else []
    return [(flag, hint) for flag, hint in options if flag != "--name"]


def test_help_has_the_range_of_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        runs.train(["digits", "--help"])
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    ranges = {flag: range_of(hint) for flag, hint in options_of(Run)}
    assert sum(map(bool, ranges.values())) > 50
    for flag, words in ranges.items():
        text = page.partition(f"{flag} ")[2].partition(" --")[0]
        assert not words or f"({words}; default: " in text, (flag, text)


WORDS = "-1", "0", "1", "2", "1e300", str(10**30), "nan", "inf", "-inf", "x", "", "None", "0.5", "Unet", "True"


def test_odd_words_are_parsed_or_refused_in_one_line():
    twice = {flag: 2 for flag, hint in options_of(Run) if get_origin(hint) is tuple and get_args(hint)[-1] is not ...}
    choices = [(flag, [word] * twice.get(flag, 1)) for flag, _ in options_of(Run) for word in WORDS]
    random.Random(0).shuffle(choices)
    refused = 0
    for flag, words in choices[: 300 if THOROUGH else 25]:
        try:
            run, _ = parse_run(runs.Train, "train digits", named_run("digits"), [flag, *words])
            assert from_json(Run, json.loads(json.dumps(to_json(run)))) == run
        except UsageError as error:
            refused += 1
            assert flag in str(error) and "\n" not in str(error), (flag, words, error)
    assert refused > 10


@dataclass
class Counts:
    """Options of a command."""

    images: PositiveInt = 1  # Number of images.
    sizes: tuple[PositiveInt, ...] = ()  # Sizes.


@pytest.mark.parametrize(("words", "message"), [
    (["--images", "0"], "--images must be at least 1, not 0"), (["--images=-1"], "--images must be at least 1, not -1"),
    (["--sizes", "1", "0"], "--sizes must be at least 1, not 0"),
])  # fmt: skip
def test_options_of_a_command_are_checked(words, message):
    with pytest.raises(UsageError) as error:
        parse(Counts, "count", words)
    assert str(error.value) == message
    assert parse(Counts, "count", ["--images=2", "--sizes=1", "--sizes=3", "4", "--images", "5"]) == Counts(5, (3, 4))


@pytest.mark.parametrize("words", ["--data a b", "--data=a b", "--data.prepared a b", "--data.prepared=a b"])
def test_data_is_a_short_name_of_prepared_data(words):
    run, args = parse_run(runs.Train, "train", named_run("digits"), [*words.split(), "--from=c"])
    assert run.data.prepared == ("a", "b")
    assert run.data.sources == run.data.mixture_weights == ()  # those of the recipe are replaced
    assert args.start == "c"
    chosen, _ = parse_run(runs.Train, "train", named_run("digits"), [*words.split(), "--data.sources=d"])
    assert chosen.data.sources == ("d",)


def test_sources_replace_those_of_the_recipe_with_their_weights():
    run, _ = parse_run(runs.Train, "train", named_run("digits"), ["--data.sources", "digits"])
    assert run.data.sources == ("digits",) and run.data.mixture_weights == ()
