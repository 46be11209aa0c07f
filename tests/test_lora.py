"""LoRA: which layers get adapters, merged equals unmerged, checkpoints with the adapter alone, its base, peft's format."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.documents import TINY, VOCABULARY, batches, few, times_of, with_all_logits
from tests.language_models import write_language_model
from tests.profile import THOROUGH
from tests.test_cli import command, fails
from tests.test_language_models import FAST_FITTED, FAST_LANGUAGE_MODEL, NO_LEARNING
from tests.test_parallel import assert_same, tensors_of, train_alone
from tests.test_parallel import train as train_on_ranks
from tests.test_training import copy_tensors, new_trainer, resumed_trainer, stop_at_step
from tests.tiny import small_run
from transfusion import parallel
from transfusion.checkpoint.open import open_checkpoint
from transfusion.checkpoint.read import find_newest_checkpoint
from transfusion.checkpoint.start import OtherRunStart, open_start
from transfusion.config import LoraConfig, Machines, ModelConfig, ParallelConfig, Run
from transfusion.disk import OpenError, read_json, sha256_of
from transfusion.model import transfusion as network
from transfusion.model.lora import BLOCKS, add_adapters, is_trained, list_adapted, merge, plain_name, trained_shapes
from transfusion.model.untied import side_of, text_name
from transfusion.parallel import SINGLE_PROCESS
from transfusion.plan import plan
from transfusion.report.command import training_command
from transfusion.sequence import Document, Image, Row, Text, collate, encode_document

peft = pytest.importorskip("peft", reason="the extra lora is not installed")

ATTENTION, FEED_FORWARD = ("query", "key", "value", "out"), ("gate", "up", "down")
KINDS = [("none", "all"), ("feed_forward", "image"), ("feed_forward", "text"), ("feed_forward", "all"), ("full", "image"),
         ("full", "text"), ("full", "all")]  # fmt: skip
kinds = st.sampled_from(KINDS)
CONFIGS = {
    "plain": TINY, "tied head, biases": replace(TINY, tie_word_embeddings=True, qkv_bias=True),
    "unet": replace(TINY, patches="unet", unet_width=16), "chameleon": replace(TINY, qk_norm=True, post_norm=True),
}  # fmt: skip


def untie(config: ModelConfig, untied: str) -> ModelConfig:
    return replace(config, untied=untied, text_vocab_size=VOCABULARY.text_size)


def build_adapted(config: ModelConfig, lora: LoraConfig, seed: int = 0) -> network.Transfusion:
    """A network with adapters, and random weights everywhere, also in norms and in B."""
    model = network.build_on_meta(config)
    add_adapters(model, lora)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_("norm" in name, 0.2, generator=generator)
    return model.requires_grad_(False)


def base_and_adapter(adapted: nn.Module, lora: LoraConfig) -> tuple[network.Transfusion, dict[str, Tensor]]:
    """The network without adapters and with other parts in place of those that are trained in full; and the adapter."""
    base = network.build(adapted.config, 7)
    weights = {plain_name(name): value for name, value in adapted.state_dict().items()}
    adapter = {name: value for name, value in weights.items() if is_trained(name, lora)}
    base.load_state_dict({name: value for name, value in weights.items() if name not in adapter}, strict=False)
    return base.requires_grad_(False), adapter


def predict(model: nn.Module, batch) -> list[Tensor]:
    """Logits and images, without gradients."""
    with torch.no_grad():
        logits, images = model(batch, [group.x0 for group in batch.groups], times_of(batch))
    return [logits, *images]


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1, other.abs().max()) if len(other) else len(one) == 0


# Networks


@pytest.mark.parametrize(("untied", "on"), KINDS)
def test_adapted_layers_are_the_matrices_of_blocks_of_these_sides(untied, on):
    prefixes = {
        ("none", "all"): ["attention", "feed_forward"],
        ("feed_forward", "image"): ["image_feed_forward"], ("feed_forward", "text"): ["feed_forward"],
        ("feed_forward", "all"): ["attention", "feed_forward", "image_feed_forward"],
        ("full", "image"): ["image_attention", "image_feed_forward"], ("full", "text"): ["attention", "feed_forward"],
        ("full", "all"): ["attention", "feed_forward", "image_attention", "image_feed_forward"],
    }[untied, on]  # fmt: skip
    expected = {
        f"{BLOCKS}{layer}.{prefix}.{word}" for layer in range(2) for prefix in prefixes
        for word in (ATTENTION if "attention" in prefix else FEED_FORWARD)
    }  # fmt: skip
    for config in CONFIGS.values():
        config, lora = untie(config, untied), LoraConfig(3, on)
        plain = network.build_on_meta(config)
        assert {*list_adapted(plain, lora)} == expected
        adapted = network.build_on_meta(config)
        add_adapters(adapted, lora)
        assert {name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)} == expected
        shapes = {plain_name(name): tuple(parameter.shape) for name, parameter in adapted.named_parameters()}
        trained = trained_shapes(plain, lora)
        assert trained == {name: shape for name, shape in shapes.items() if is_trained(name, lora)}
        whole = {name.partition(".")[0] for name in trained if ".lora_" not in name}
        image_parts = {"patches", *({"image_tokens", "image_head"} if untied != "none" else ())}
        assert whole == (set() if on == "text" else image_parts - ({"image_head"} if config.tie_word_embeddings else set()))
        sides = {side_of(name, untied) for name in trained}
        assert sides == {*lora.sides(untied)}


@few
@given(kinds, st.sampled_from(sorted(CONFIGS)), batches(), st.integers(0, 99))
def test_merged_equals_unmerged_and_peft(kind, name, rows_and_batch, seed):
    (untied, on), (_, batch) = kind, rows_and_batch
    lora = LoraConfig(3, on)
    adapted = build_adapted(untie(CONFIGS[name], untied), lora, seed)
    base, adapter = base_and_adapter(adapted, lora)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merge(base, adapter)
    assert_close(predict(base, batch), predict(adapted, batch))
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {re.sub(r"\.lora_[AB]\.", ".", name) for name in adapter}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
            assert_close([base.get_parameter(f"{name}.weight")], [module.base_layer.weight], 1e-6)


def test_adapter_of_zero_changes_nothing_and_weights_do_not_depend_on_it():
    """At the start B is 0, and the other weights are those of a network without adapters."""
    config = untie(TINY, "full")
    plain, adapted = network.build(config, 5), network.build_on_meta(config)
    add_adapters(adapted, LoraConfig(3))
    adapted.to_empty(device="cpu")
    network.init_weights(adapted, 5)
    weights, others = dict(plain.named_parameters()), dict(adapted.named_parameters())
    for name, parameter in others.items():
        if ".lora_B." in name:
            assert not parameter.any()
        elif ".lora_A." in name:
            assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.5)
        else:
            assert torch.equal(parameter, weights[plain_name(name)])


# Training


def lora_run(untied: str = "full", on: str = "all", steps: int = 4, rank: int = 3, **training) -> Run:
    run = small_run(steps, **training)
    return replace(run, model=replace(run.model, untied=untied), lora=LoraConfig(rank, on))


@pytest.mark.parametrize(("untied", "on", "optimizer"), [
    *((*kind, "adamw") for kind in (KINDS if THOROUGH else [("none", "all"), ("full", "image")])),
    ("full", "text", "muon"),  # for all that is trained: A and B are matrices of blocks
])  # fmt: skip
def test_only_the_adapter_is_trained_saved_and_averaged_and_resumes_exactly(tmp_path, untied, on, optimizer):
    run = lora_run(untied, on, optimizer=optimizer)
    trainer = new_trainer(tmp_path / "whole", run)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    before, averages = copy_tensors(trainer), dict(trainer.ema.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert (averages[name] is parameter) == (name in frozen)  # frozen weights exist once
    assert trainer.train()
    after = copy_tensors(trainer)
    for name, parameter in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    assert {key.split(" ")[1] for key in after if key.startswith("model")} == {
        name for name in map(plain_name, averages) if is_trained(name, run.lora)
    }  # fmt: skip
    for key, value in after.items():
        if not key.startswith("optimizer") and value.dim() > 1:
            assert not torch.equal(value, before[key]), key
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").glob("step-*")
    shapes = trained_shapes(network.build_on_meta(trainer.run.model), run.lora)
    for part in ("model", "ema"):
        tensors = load_file(checkpoint / part / "model.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    stop_at_step(new_trainer(tmp_path / "stopped", run), 2).train()
    again = resumed_trainer(tmp_path / "stopped", run)
    assert again.train()
    assert all(torch.equal(value, after[key]) for key, value in copy_tensors(again).items())


@pytest.mark.parametrize("parallel_", [
    ParallelConfig(micro_batch_size=1), ParallelConfig(activation_checkpointing=True), ParallelConfig(compile=True),
], ids=["micro batches", "checkpointing", "compiled"])  # fmt: skip
def test_how_it_is_computed_does_not_matter(tmp_path, parallel_):
    """Blocks with adapters are compiled once."""
    torch._dynamo.reset()
    counters.clear()
    run, results = lora_run("none", "all", steps=2), []
    for folder, one in (("plain", run), ("other", replace(run, parallel=parallel_))):
        with mock.patch.object(parallel, "COMPILE_BACKEND", "eager"):
            trainer = new_trainer(tmp_path / folder, one)
            assert trainer.train()
        tensors = copy_tensors(trainer)
        results.append([tensors[key] for key in sorted(tensors) if key.startswith("model")])
    assert_close(*results, 1e-4)
    assert counters["stats"]["unique_graphs"] == bool(parallel_.compile) and not counters["graph_break"]


def test_two_ranks_train_like_one_process(pair, tmp_path):
    """In float64, and with checkpoints that one process resumes from."""
    run = lora_run("full", "all")
    expected = train_alone(run, torch.float64)
    outcome, other_outcome = pair(train_on_ranks, tmp_path / "two", run, torch.float64)
    assert_same(outcome, expected, 1e-9)
    assert_same(other_outcome, outcome, 0)
    pair(train_on_ranks, tmp_path / "both", run, torch.float64, 2)
    assert_same(train_on_ranks(SINGLE_PROCESS, tmp_path / "both", run, torch.float64), expected, 1e-9)


@pytest.mark.parametrize(("untied", "on"), [("none", "all"), ("full", "image"), ("feed_forward", "text")])
def test_plan_counts_the_adapter_exactly(tmp_path, untied, on):
    run = lora_run(untied, on)
    trainer = new_trainer(tmp_path, run)
    model, estimate = trainer.model, plan(trainer.run, Machines(device="cpu"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert estimate.trained == sum(parameter.numel() for parameter in trained)
    assert sum(estimate.parameters.values()) == network.count_parameters(model)
    assert estimate.parameters["adapter"] == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    moments = [value for key, value in trainer.tensors()["optimizer"].items() if not key.endswith("step")]
    averages = {parameter for parameter in trainer.ema.parameters()} - {*model.parameters()}
    sizes = {"weights": model.parameters(), "gradients": trained, "moments": moments, "ema": averages}
    assert {name: sum(t.nbytes for t in each) for name, each in sizes.items()} == {
        name: getattr(estimate.memory, name) for name in sizes
    }  # fmt: skip
    tensors = [t for part in trainer.tensors().values() for key, t in part.items() if not key.endswith(".step")]
    assert estimate.checkpoint == sum(t.nbytes for t in tensors)


# Runs


@pytest.fixture(scope="module")
def adapted(trained, made_once) -> Path:
    """A run with an adapter to `trained` on the image side."""
    options = ("--model.untied", "full", "--lora.rank", 3, "--lora.on", "image", "--training.steps", 2)
    start = ("train", "digits", "--from", trained)
    return made_once("lora", lambda folder: command(*start, "--out", folder, *FAST_FITTED, *options))


def with_base(adapted: Path, base: Path, folder: Path) -> tuple[Path, Path]:
    """Copies of a run with an adapter and of its base."""
    shutil.copytree(base, folder / "base")
    shutil.copytree(adapted, folder / "run")
    note = read_json(folder / "run" / "run.json")
    note["notes"]["start"]["place"] = str(folder / "base")
    (folder / "run" / "run.json").write_text(json.dumps(note))
    return folder / "run", folder / "base"


def adapter_of(run: Path, part: str) -> dict[str, Tensor]:
    return load_file(find_newest_checkpoint(run) / part / "model.safetensors")


@pytest.mark.parametrize(("weights", "part"), [("ema", "ema"), ("raw", "model")])
def test_opened_run_is_its_base_with_the_adapter(adapted, trained, weights, part):
    """Text weights are the base's bit for bit, and image weights those of its averaged weights with the adapter."""
    base, adapter = dict(open_checkpoint(trained).model.named_parameters()), adapter_of(adapted, part)
    opened = open_checkpoint(adapted, weights)
    size, changed = opened.vocabulary.text_size, set()
    for name, parameter in opened.model.named_parameters():
        layer = name.removesuffix(".weight")
        if name in adapter:
            expected = adapter[name]
        else:
            expected = base[text_name(name)][:size] if "tokens" in name or "head" in name else base[text_name(name)]
        if f"{layer}.lora_A.weight" in adapter:
            changed.add(layer)
            assert not torch.equal(parameter, expected)
            expected = expected + adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            assert_close([parameter], [expected], 1e-6)
        else:
            assert torch.equal(parameter, expected), name
    assert len(changed) == 14 and all(".image_" in name for name in changed)


def test_exports_merged_or_for_peft(adapted, trained, tmp_path, capsys):
    command("export", adapted, "--out", tmp_path / "merged")
    command("export", adapted, "--out", tmp_path / "adapter", "--adapter")
    opened, merged = open_checkpoint(adapted), open_checkpoint(tmp_path / "merged")
    assert merged.run.lora == LoraConfig() and merged.run.model == opened.run.model
    weights = opened.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in merged.model.state_dict().items())
    assert "with LoRA of rank 3 on image, which is merged" in (tmp_path / "merged" / "README.md").read_text()

    base = network.build_uninitialized(opened.run.model)
    OtherRunStart(str(trained)).fill(base, 0, SINGLE_PROCESS)
    vocabulary = opened.vocabulary
    latent = np.ones((opened.run.model.latent_channels, *next(iter(vocabulary.boi))), np.float32)
    chunk = encode_document(Document((Text((7, 8)), Image(latent))), vocabulary)
    batch = with_all_logits(collate([Row((chunk,))], len(chunk), vocabulary))
    before = predict(base, batch)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    unmerged = predict(model, batch)
    with model.disable_adapter():  # also of parts that are trained in full
        assert_close(predict(model, batch), before, 0)
    assert_close(unmerged, predict(opened.model, batch))
    assert_close(predict(model.merge_and_unload(), batch), unmerged)
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "digits"
    assert read_json(adapted / "run.json")["notes"]["start"]["sha256"] in (tmp_path / "adapter" / "README.md").read_text()

    capsys.readouterr()
    for arguments in (("generate", tmp_path / "adapter", "three"), ("train", "digits", "--from", tmp_path / "adapter"),
                      ("export", tmp_path / "adapter", "--out", tmp_path / "x")):  # fmt: skip
        assert "adapter holds an adapter alone, not a run: give the run" in fails(capsys, 1, *arguments)
    out = ("--out", tmp_path / "x", "--adapter")
    assert "has no adapter: it was trained without --lora.rank" in fails(capsys, 1, "export", trained, *out)
    assert "has no adapter" in fails(capsys, 1, "export", tmp_path / "merged", *out)
    assert "--dtype has no effect with --adapter" in fails(capsys, 2, "export", adapted, *out, "--dtype", "float16")
    assert not (tmp_path / "x").exists()


def test_changed_or_missing_base_and_adapter_of_another_run_are_refused(adapted, trained, tmp_path):
    run, base = with_base(adapted, trained, tmp_path)
    expected = open_checkpoint(run).model.state_dict()
    newest = find_newest_checkpoint(base)
    further = newest.with_name("step-000009")  # the base is trained further, and keeps the adapter's checkpoint
    shutil.copytree(newest, further)
    rewrite(further, "ema", 0.5)
    (further.parent / "latest").write_text(further.name)
    (further / "state.json").write_text(json.dumps(read_json(newest / "state.json") | {"step": 9}))
    assert all(torch.equal(value, expected[name]) for name, value in open_checkpoint(run).model.state_dict().items())

    rewrite(newest, "ema", 0.5)
    with pytest.raises(OpenError, match=f"{run} holds only an adapter to {base} at step 4, .* have changed since; put it"):
        open_checkpoint(run)
    shutil.rmtree(newest)
    with pytest.raises(OpenError, match="cannot be used: .* has no checkpoint of step 4, only of step .*9; put it back"):
        open_checkpoint(run)
    shutil.rmtree(base)
    with pytest.raises(OpenError, match=f"{run} holds only .*: {base} is not a run: there is no such folder"):
        open_checkpoint(run)
    shutil.copytree(trained, base)
    open_checkpoint(run)
    checkpoint = find_newest_checkpoint(run)
    state = read_json(checkpoint / "state.json")
    assert state["base_sha256"] == read_json(run / "run.json")["notes"]["start"]["sha256"]
    rewrite(checkpoint, None, 0, state | {"base_sha256": "0" * 64})
    with pytest.raises(OpenError, match="belongs to another run: its adapter was trained on other weights than those that"):
        open_checkpoint(run)


def rewrite(checkpoint: Path, part: str | None, change: float, state: dict | None = None) -> None:
    """Change the weights of a part, or state.json, and its hash in the manifest."""
    path = checkpoint / (f"{part}/model.safetensors" if part else "state.json")
    if part:
        save_file({name: value + change for name, value in load_file(path).items()}, path)
    else:
        path.write_text(json.dumps(state))
    manifest = read_json(checkpoint / "manifest.json")
    manifest[path.relative_to(checkpoint).as_posix()] = sha256_of(path)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("source", ["run", "language_model"])
def test_command_resumes_exactly_and_refuses_a_changed_base(adapted, trained, tmp_path, source, capsys):
    if source == "run":
        shutil.copytree(trained, tmp_path / "base")
        options = (*FAST_FITTED, "--from", tmp_path / "base")
    else:
        write_language_model(tmp_path / "base", "qwen2", shard="20KB")
        options = (*FAST_LANGUAGE_MODEL, "--init-from", tmp_path / "base")
    options = (*options, "--lora.rank", 2)
    command("train", "digits", "--out", tmp_path / "run", *options)
    expected = tensors_of(tmp_path / "run")
    for step in (4, 2):  # of its checkpoints
        shutil.copytree(tmp_path / "run", tmp_path / f"at {step}")
    shutil.rmtree(find_newest_checkpoint(tmp_path / "at 2"))
    command("train", tmp_path / "at 2")
    resumed = tensors_of(tmp_path / "at 2")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.items())
    opened = open_checkpoint(tmp_path / "run")
    start = open_start(source, str(tmp_path / "base"))
    model = network.build_uninitialized(opened.run.model)
    start.fill(model, opened.run.training.seed, SINGLE_PROCESS)
    merge(model, {key.removeprefix("ema "): value for key, value in resumed.items() if key.startswith("ema ")})
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in opened.model.state_dict().items())
    if source == "run":
        rewrite(find_newest_checkpoint(tmp_path / "base"), "ema", 0.1)
    else:
        path = min((tmp_path / "base").glob("*.safetensors"))
        save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    capsys.readouterr()
    assert "weights have changed since; put it back" in fails(capsys, 1, "train", tmp_path / "at 4", "--training.steps", 5)


def test_run_starts_from_a_run_with_an_adapter(adapted, tmp_path):
    """From its merged weights; they are also the base of another adapter."""
    untied = ("--from", adapted, "--model.untied", "full")
    command("train", "digits", "--out", tmp_path / "whole", *FAST_FITTED, *untied, *NO_LEARNING, "--training.steps", 1)
    command("train", "digits", "--out", tmp_path / "again", *FAST_FITTED, *untied, *NO_LEARNING, "--training.steps", 1,
            "--lora.rank", 2)  # fmt: skip
    expected = open_checkpoint(adapted).model.state_dict()
    for name in ("whole", "again"):
        assert_close([*open_checkpoint(tmp_path / name).model.state_dict().values()], [*expected.values()], 1e-6)
    run, before = tmp_path / "again", OtherRunStart(str(tmp_path / "again")).weights_sha256
    values = read_json(run / "run.json")
    values["notes"]["start"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(values))
    assert OtherRunStart(str(run)).weights_sha256 != before  # the same adapter to other weights


def test_generate_dry_run_plan_and_report_take_a_run_with_an_adapter(adapted, trained, tmp_path, capsys):
    command("generate", adapted, "three", "--num-images", 1, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "000.png").exists()
    capsys.readouterr()
    command("plan", adapted, "--json")
    values = json.loads(capsys.readouterr().out)
    model, lora = open_checkpoint(adapted).model, LoraConfig(3, "image")
    assert values["parameters"]["trained"] == sum(map(prod, trained_shapes(model, lora).values()))
    options = ("--lora.rank", 3, "--lora.on", "image", "--model.untied", "full")
    command("train", "digits", "--from", trained, "--out", tmp_path / "new", *FAST_FITTED, *options, "--dry-run")
    assert f"{values['parameters']['adapter']:,}" in capsys.readouterr().out and not (tmp_path / "new").exists()
    words = training_command(open_checkpoint(adapted).run, adapted, read_json(adapted / "run.json")["notes"]["start"])
    assert "--lora.rank 3 --lora.on image" in words


def test_options_that_make_no_sense_are_refused(trained, tmp_path, capsys, monkeypatch):
    args = ("train", "digits", "--out", tmp_path / "run", *FAST_FITTED)
    rank = ("--from", trained, "--lora.rank", 4)
    untied = ("--model.untied", "full")
    cases = [
        (("--lora.rank", 0), "--lora.rank must be at least 1, not 0"),
        (("--lora.rank", 4), "--lora.rank needs --from or --init-from"),
        (("--lora.on", "text", *untied), "--lora.on has no effect without --lora.rank"),
        ((*rank, "--lora.on", "image"), "lora.on image with model.untied none: .* would change text too; use lora.on all"),
        ((*rank, "--lora.on", "text"), "lora.on text with model.untied none: .* would change images too; use"),
        ((*rank, *untied, "--model.image-init", "fresh"), "model.image_init fresh with lora.rank: additions to random"),
        ((*rank, *untied, "--lora.on", "image", "--training.image-lr-scale", 0), "training.image_lr_scale 0: nothing would"),
        ((*rank, "--training.image-lr-scale", 0, "--training.transformer-lr-scale", 0),
         "training.image_lr_scale and training.transformer_lr_scale 0: nothing would"),
        ((*rank, "--training.text-lr-scale", 0.5), "--training.text-lr-scale has no effect with --lora.on all, which"),
    ]  # fmt: skip
    for options, message in cases:
        assert re.search(message, fails(capsys, 2, *args, *options)), options
    assert not (tmp_path / "run").exists()


def test_missing_peft_is_named_where_it_is_needed(adapted, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    out = ("--out", tmp_path / "out")
    for arguments in (
        ("train", "digits", *out, *FAST_FITTED, "--from", trained, "--lora.rank", 4), ("export", adapted, *out, "--adapter"),
        ("plan", adapted, "--device", "cpu"),
    ):  # fmt: skip
        message = "transfusion: --lora.rank needs peft: pip install '.[lora]' in a clone of the repository\n"
        assert fails(capsys, 1, *arguments).endswith(message)
        assert not (tmp_path / "out").exists()
    command("plan", adapted)
    command("export", adapted, *out)
