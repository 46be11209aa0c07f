"""`plan` against measurements of a training step: bytes of weights, saved activations and shards."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.memory import MemoryCounter
from tests.processes import ROOT
from tests.profile import THOROUGH, examples
from tests.test_cli import command, fails
from transfusion import objective, parallel, plan
from transfusion.cli import measure as measure_module
from transfusion.cli.run_folder import RunFolder
from transfusion.cli.runs import Train
from transfusion.cli.settings import parse_run
from transfusion.config import DataConfig, Machines, ModelConfig, ParallelConfig, Run, TrainingConfig, to_json
from transfusion.gpus import GPUS, find_gpu
from transfusion.inference.cache import Cache
from transfusion.model.mask import packed_mask
from transfusion.model.transformer import Block, RMSNorm, rope_cos_sin
from transfusion.model.transfusion import build, build_on_meta, count_parameters
from transfusion.model.untied import Routing
from transfusion.paper import PAPER
from transfusion.parallel import Ranks, lower_weights, parallelize
from transfusion.plan import BF16, FP32
from transfusion.runs import NAMES, SIZES, named_run
from transfusion.sequence import Sides
from transfusion.training.optimizer import build_optimizer, freeze, optimizer_tensors

SAVED_ERROR, PEAK_ERROR = 0.05, 0.1  # relative; the plan ignores indices, noise, timesteps and tensors freed early


def one_row(length: int = 512, parallel: ParallelConfig = ParallelConfig(compile=False), **model) -> Run:  # noqa: B008
    """A run like `digits` with one row in a batch, as in the plan."""
    digits = named_run("digits")
    config = replace(digits.model, **{"vocab_size": 640} | model)
    return replace(digits, model=config, parallel=parallel, data=replace(digits.data, seq_len=length),
                   training=replace(digits.training, batch_size=1))


def measure(run: Run) -> tuple[int, int]:
    """Bytes that a forward pass saves, and the peak of the step, without the mask, which only a CPU creates in full."""
    model, batch = build(run.model, 0), plan.typical_row(run.model, run.data.seq_len, run.data.clean_copies)
    model.transformer.activation_checkpointing = run.parallel.activation_checkpointing
    noise = objective.sample_noise(batch, run.diffusion)
    with MemoryCounter() as memory:
        losses = objective.compute_losses(model, batch, noise, run.diffusion)
        loss = objective.total_loss(losses, batch.text_count, batch.image_count, 1.0)
        saved = memory.current
        loss.backward()
    mask = (FP32 + 1) * run.data.seq_len**2
    return saved - mask, memory.peak - mask


def planned(run: Run) -> tuple[int, int]:
    """The same from the plan for fp32, without gradients."""
    memory = plan.plan(run, Machines(device="cpu")).memory
    positions = plan.typical_row(run.model, run.data.seq_len, run.data.clean_copies).text_count
    assert memory.gathered == memory.cuda == 0
    gradients = FP32 * run.model.width * (run.model.vocab_size + positions)  # of the head and its input
    return memory.activations + gradients, memory.activations + memory.backward


# Memory


CHANGES = [
    {}, {"text_lr_scale": 0.0}, {"image_lr_scale": 0.0}, {"transformer_lr_scale": 0.0}, {"optimizer": "muon"},
    {"optimizer": "muon", "image_lr_scale": 0.0},
]  # fmt: skip


@pytest.mark.parametrize(("untied", "changes"), [
    *(("none", changes) for changes in CHANGES), ("feed_forward", CHANGES[3]), ("full", CHANGES[1]), ("full", CHANGES[5]),
], ids=str)  # fmt: skip
def test_weights_gradients_moments_and_ema_are_exact(untied, changes):
    run = named_run("shapes")
    run = replace(run, model=replace(run.model, untied=untied, text_vocab_size=300))
    run = replace(run, training=replace(run.training, **changes))
    model = build(run.model, 0)
    freeze(model, run.training.lr_scales, run.lora)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer = build_optimizer(model, run.training, kind=run.training.optimizer)
    optimizer.step()
    moments = [value for name, value in optimizer_tensors(model, optimizer).items() if not name.endswith("step")]
    memory = plan.plan(run, Machines()).memory
    tensors = {
        "weights": list(model.parameters()), "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "moments": moments, "ema": [p for p in model.parameters() if p.requires_grad],  # a frozen one is the weight itself
    }  # fmt: skip
    sizes = {name: sum(t.nbytes for t in part) for name, part in tensors.items()}
    assert sizes == {name: getattr(memory, name) for name in tensors}
    assert plan.plan(run, Machines()).checkpoint == 2 * sizes["weights"] + sizes["moments"]


@pytest.mark.parametrize("model", [
    {}, {"qk_norm": False, "qkv_bias": True}, {"heads": 4, "kv_heads": 2, "head_dim": 48}, {"post_norm": True},
    {"layers": 2}, {"intermediate_size": 2048}, {"vocab_size": 8192}, {"patches": "unet"},
    {"patches": "unet", "unet_width": 128, "patch_size": 4},
    {"patches": "unet", "patch_size": 1}, {"untied": "feed_forward"}, {"untied": "full"},
], ids=str)  # fmt: skip
def test_activations_and_logits_match_a_step(model):
    run = one_row(**model)
    (saved, peak), (planned_saved, planned_peak) = measure(run), planned(run)
    assert planned_saved == pytest.approx(saved, rel=SAVED_ERROR)
    assert planned_peak == pytest.approx(peak, rel=PEAK_ERROR)


def test_activations_of_a_row_with_copies_match_a_step():
    run = one_row(256, patches="unet", layers=1)
    run = replace(run, data=replace(run.data, clean_copies=True))
    (saved, peak), (planned_saved, planned_peak) = measure(run), planned(run)
    assert planned_saved == pytest.approx(saved, rel=SAVED_ERROR)
    assert planned_peak == pytest.approx(peak, rel=PEAK_ERROR)


@pytest.mark.parametrize("model", [{}, {"layers": 12}, {"vocab_size": 8192}, {"intermediate_size": 2048}], ids=str)
def test_activation_checkpointing_saves_block_inputs(model):
    run = one_row(**model, parallel=ParallelConfig(compile=False, activation_checkpointing=True))
    (saved, peak), (planned_saved, planned_peak) = measure(run), planned(run)
    assert planned_saved == pytest.approx(saved, rel=SAVED_ERROR)
    gradients = FP32 * count_parameters(build_on_meta(run.model))  # some exist at the peak
    assert planned_peak * (1 - PEAK_ERROR) < peak < (planned_peak + gradients) * (1 + PEAK_ERROR)


@pytest.mark.parametrize("model", [{"qk_norm": True, "kv_heads": 2}, *([{}] if THOROUGH else [])], ids=str)
def test_compiled_bfloat16_block_matches_the_plan(model, monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward", nn.RMSNorm.forward)  # as on CUDA
    config = ModelConfig(width=256, layers=1, heads=4, intermediate_size=768, **model)
    run = Run("", config, data=DataConfig(seq_len=64))
    block = Block(config, 0).bfloat16()
    block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    x = torch.randn(2, 64, 256, dtype=torch.bfloat16, requires_grad=True)
    rotation = rope_cos_sin(torch.arange(64).expand(2, 64), config, x.dtype)
    mask = packed_mask(torch.zeros(2, 64, dtype=torch.int32), torch.full((2, 64), -1))
    mask.prepare()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        block([x.flatten(0, 1)], Routing(Sides(torch.arange(128), torch.arange(0))), rotation, mask, None)
    excluded = {t.data_ptr() for t in (*block.parameters(), *rotation)}
    bias = BF16 * mask.attn_bias.numel()  # on a CPU only
    size = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in excluded) - bias
    assert plan.saved_by_block(run) * 2 * 64 == pytest.approx(size, rel=0.02)


@pytest.fixture
def shard_bytes(request):
    """Bytes that one rank of a process group without other processes holds of a model on the meta device."""

    def count_bytes(config: ModelConfig, rank: int, ranks: int, shard: str = "full", per_machine: int = 8) -> int:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            group = Ranks(rank, ranks)
            group.per_machine = per_machine
            model = build_on_meta(config)
            parallelize(model, model.transformer.blocks, torch.device("cpu"), group.mesh("cpu", shard), compiled=False)
            return sum(FP32 * parameter.to_local().numel() for parameter in model.parameters())
        finally:
            dist.destroy_process_group()

    return count_bytes


@pytest.mark.parametrize(("size", "gpus", "shard"), [
    ("7b", 64, "full"), ("7b", 64, "hybrid"), ("0.16b", 7, "full"), ("1.4b", 48, "full"),
])  # fmt: skip
def test_first_rank_holds_the_planned_bytes(shard_bytes, size, gpus, shard):
    run = Run(size, SIZES[size], training=TrainingConfig(batch_size=gpus), parallel=ParallelConfig(shard=shard))
    assert shard_bytes(run.model, 0, gpus, shard) == plan.estimate_memory(run, Machines(gpus)).weights


def test_ranks_hold_every_weight_once(shard_bytes):
    config = replace(SIZES["0.16b"], layers=2)
    run, sizes = Run("", config, training=TrainingConfig(batch_size=7)), [shard_bytes(config, rank, 7) for rank in range(7)]
    assert sum(sizes) == FP32 * count_parameters(build_on_meta(config))
    assert max(sizes) == sizes[0] == plan.estimate_memory(run, Machines(7)).weights
    assert sizes[0] > sizes[-1]  # sizes are not divisible by 7: the last rank holds less


# Memory for generation


@pytest.mark.parametrize(("dtype", "model"), [
    ("float32", {}), ("bfloat16", {"kv_heads": 1}), ("float16", {"patches": "unet"}),
    ("bfloat16", {"patches": "codes", "patch_size": 1, "tie_word_embeddings": True}),
], ids=str)  # fmt: skip
def test_memory_for_generation_is_that_of_weights_and_cache(dtype, model):
    run = one_row(**model)
    network = lower_weights(build(run.model, 0), plan.PRECISIONS[dtype])
    cache = Cache(run.model, torch.device("cpu"), plan.PRECISIONS[dtype])
    slots = [cache.acquire()]
    while cache.free:
        slots.append(cache.acquire())
    cache.view(slots, run.data.seq_len)
    batch = plan.typical_row(run.model, run.data.seq_len)
    estimate = plan.plan(run, Machines()).generation[dtype]
    assert estimate.weights == sum(parameter.nbytes for parameter in network.parameters())
    assert estimate.cache == cache.keys.nbytes + cache.values.nbytes
    assert estimate.latents == (0 if run.model.patches == "codes" else batch.groups[0].x0[:1].nbytes)
    assert estimate.all == estimate.weights + estimate.cache + estimate.latents


# Known GPUs


@pytest.mark.parametrize(("device", "name"), [
    ("NVIDIA GeForce RTX 3090", "rtx-3090"), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 5090", "rtx-5090"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA L40", None),
    ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-PCIE-40GB", "a100-40"), ("A100-SXM4-40GB", "a100-40"),
    ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100 80GB PCIe", "a100-80"), ("NVIDIA A10", None),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H100 NVL", "h100-nvl"),
    ("NVIDIA H200", "h200"), ("NVIDIA H200 NVL", "h200-nvl"), ("NVIDIA GH200 480GB", None), ("NVIDIA H20", None),
    ("NVIDIA B200", "b200"), ("NVIDIA GB200", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("", None),
])  # fmt: skip
def test_known_gpus_are_found_by_the_name_of_the_driver(device, name):
    assert find_gpu(device) == GPUS.get(name)


def test_gpu_decides_memory_and_peak(capsys):
    def machines(*options: object) -> dict:
        command("plan", "7b", "--json", *options)
        return json.loads(capsys.readouterr().out)["machines"]

    for name in ("l4", "h100-nvl", "b200"):
        gpu = GPUS[name]
        values = machines("--gpu", name)
        assert (values["memory"], values["tflops"]) == (gpu.memory, gpu.tflops)
    assert machines() == machines("--gpu", "h100")
    values = machines("--gpu", "l4", "--memory", "20GB", "--tflops", 100)
    assert (values["memory"], values["tflops"]) == (20 * 10**9, 100)


HARDWARE = (ROOT / "docs" / "hardware.md").read_text()


@pytest.mark.parametrize(("memory", "time", "arguments"), re.findall(
    r"^\|.*\| ([\d.]+) GB.*\| ([\d.]+ days) \| `transfusion plan (.*)` \|$", HARDWARE, re.M
))  # fmt: skip
def test_documented_runs_need_what_the_plan_prints(memory, time, arguments, capsys):
    command("plan", *arguments.split())
    printed = capsys.readouterr().out
    assert re.search(r"  fits in .* yes\n", printed) and f" {time}   " in printed
    assert f"{float(re.search(r'^  all +([0-9.]+)$', printed, re.M)[1]):.1f}" == memory


def test_documented_lines_are_printed(capsys):
    for arguments in ("0.76b --gpu rtx-4090", "7b"):
        command("plan", *arguments.split())
    printed = capsys.readouterr().out.splitlines()
    lines = [line for block in re.findall(r"```text\n(.*?)```", HARDWARE, re.S) for line in block.splitlines()]
    assert len(lines) == 4 and [line for line in lines if line not in printed] == []


def test_documented_gpus_are_the_known_ones():
    rows = re.findall(r"^\| `(\S+)` \| (\d+) \| ([\d.,]+) \| (.+) \|$", HARDWARE, re.M)
    known = [(name, str(gpu.memory // 10**9), f"{gpu.tflops:,}", gpu.source) for name, gpu in GPUS.items()]
    assert rows == known


# Parameters, FLOPs, time


@pytest.mark.parametrize("name", NAMES)
def test_parameters_match_the_model(name):
    run = named_run(name)
    parameters = plan.plan(run, Machines()).parameters
    model = build_on_meta(run.model)
    assert sum(parameters.values()) == count_parameters(model)
    assert parameters["transformer"] == count_parameters(model.transformer)
    assert parameters["patches"] == (count_parameters(model.patches) if model.patches is not None else 0)


def test_flops_of_a_row_of_half_images():
    run = named_run("1.4b")
    config, length, patches = run.model, 4096, 256
    estimate, batch = plan.plan(run, Machines()), plan.typical_row(run.model, 4096)
    images = length // 2 // (patches + 4)
    assert (batch.positions, batch.image_count, batch.groups[0].index.shape[1]) == (length, images, patches)
    text = length - images * (patches + 4)
    pairs = text * (text + 1) // 2 + images * (1 + 2 + patches * (patches + 2) + (patches + 3) + (patches + 4))
    products = 2048 * (4 * 2048 + 3 * 5632) * 24
    patch_layers = images * 2048 * (2 * 32 * patches + 256 + 2048)
    head = 2048 * 32_000 * (text + 2 * images)
    forward = 2 * (products * length + head + patch_layers) + 4 * 2048 * 24 * pairs
    assert estimate.flops == pytest.approx(3 * forward / length, rel=1e-12)
    assert estimate.usual_flops == 6 * count_parameters(build_on_meta(config)) + 12 * 24 * 2048 * length


def test_flops_of_a_row_with_copies():
    """A copy attends to bos, boi and itself; what follows an image has no more keys than without a copy."""
    run = named_run("1.4b")
    run = replace(run, data=replace(run.data, clean_copies=True))
    length, patches, images = 4096, 256, 3
    estimate, batch = plan.plan(run, Machines()), plan.typical_row(run.model, 4096, clean_copies=True)
    assert (batch.positions, batch.image_count, len(batch.groups[0].index)) == (length, images, 2 * images)
    text = length - images * (2 * patches + 5)
    document = 1 + 2 + patches * (patches + 2) + sum(patches + n for n in (3, 4, 5))
    pairs = text * (text + 1) // 2 + images * (document + patches * (patches + 2))
    products = 2048 * (4 * 2048 + 3 * 5632) * 24
    patch_layers = 2 * images * 2048 * (2 * 32 * patches + 256 + 2048)
    head = 2048 * 32_000 * batch.text_count
    forward = 2 * (products * length + head + patch_layers) + 4 * 2048 * 24 * pairs
    assert estimate.flops == pytest.approx(3 * forward / length, rel=1e-12)
    assert estimate.copies == images * patches / length
    assert plan.plan(named_run("1.4b"), Machines()).copies == 0


@pytest.mark.parametrize(("length", "patch_size", "patches"), [
    (4096, 2, 256), (4096, 1, 1024), (4096, 8, 16), (128, 2, 16), (256, 2, 64), (8, 2, 0), (1, 2, 0),
])  # fmt: skip
def test_typical_row_is_full_at_any_length(length, patch_size, patches):
    batch = plan.typical_row(ModelConfig(patch_size=patch_size), length)
    assert batch.positions == length
    assert [group.index.shape[1] for group in batch.groups] == [patches] * bool(patches)
    assert plan.typical_row(ModelConfig(patch_size=patch_size), length, clean_copies=True).positions == length


def test_time_and_disk():
    run, machines = named_run("7b"), Machines(gpus=64, mfu=0.5, tflops=1000)
    estimate = plan.plan(run, machines)
    assert estimate.positions == 250_000 * 512 * 4096
    assert estimate.seconds == pytest.approx(estimate.positions * estimate.flops / (0.5 * 1e15 * 64))
    assert estimate.checkpoint == 16 * count_parameters(build_on_meta(run.model))
    assert estimate.usual_mfu * estimate.flops == pytest.approx(0.5 * estimate.usual_flops)


# Ways to fit


@pytest.mark.parametrize(("name", "gpus", "memory"), [("7b", 64, 80), ("7b", 8, 40), ("1.4b", 1, 40), ("7b", 1, 80)])
def test_every_way_to_fit_fits(name, gpus, memory, capsys):
    estimate = plan.plan(named_run(name), Machines(gpus, memory=memory * 10**9))
    ways = [*plan.ways_to_fit(estimate.run, estimate.machines)]
    assert not estimate.fits
    assert ways
    for way in ways:
        command("plan", name, "--gpus", gpus, "--memory", f"{memory}GB", *way.split(), "--json")
        assert json.loads(capsys.readouterr().out)["fits"], way


def test_no_way_to_fit():
    assert not [*plan.ways_to_fit(named_run("7b"), Machines(8, memory=3_000_000_000))]


@examples(100, quick=20)
@given(st.sampled_from(("7b", "0.37b-unet", "shapes")), st.sampled_from((1, 2, 8)), st.integers(1, 24),
       st.sampled_from((None, 1, 6, 8, 100)), st.integers(0, 24))  # fmt: skip
@example("7b", 2, 10, None, 9)
def test_fitted_micro_batch_is_the_largest_that_fits(name, gpus, share, own, num_fitting):
    """Of a GPU with memory for `num_fitting` rows: up to the run's own, and with passes of one shape if it is not that."""
    run = named_run(name)
    training = replace(run.training, batch_size=gpus * share)
    run = replace(run, training=training, parallel=ParallelConfig(micro_batch_size=own))
    with_rows = [replace(run, parallel=ParallelConfig(micro_batch_size=n)) for n in range(1, share + 1)]
    memory = [0, *(plan.estimate_memory(rows, Machines(gpus)).all for rows in with_rows)]
    num_fitting, own = min(num_fitting, share), min(own or share, share)
    fitted = plan.fit_micro_batch(run, Machines(gpus, memory=max(1, memory[num_fitting])))
    if own <= num_fitting:
        assert fitted == run
    else:
        smaller = [n for n in range(1, num_fitting + 1) if share % n == 0]
        assert fitted == (with_rows[max(smaller, default=1) - 1] if own > 1 else run)


# The command


@pytest.mark.parametrize(("arguments", "expected"), [
    (["0.16b"], "transfusion train 0.16b --data DIR"),
    (["0.16b", "--lora.rank", "8"], "transfusion train 0.16b --lora.rank 8 --data DIR --from RUN"),
    (["0.37b", "--memory=24GB", "--tflops", "165"],
     "transfusion train 0.37b --data DIR --parallel.micro-batch-size 4"),
    (["7b", "--data.sources", "shapes", "--gpus", "8", "--model.width=2048", "--parallel.micro_batch_size", "2"],
     "torchrun --nproc-per-node 8 -m transfusion train 7b --data.sources shapes --model.width=2048 "
     "--parallel.micro_batch_size 2"),
    (["7b", "--gpus", "64", "--gpus_per_machine", "4", "--parallel.shard", "hybrid", "--parallel.activation-checkpointing"],
     "torchrun --nnodes 16 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m transfusion train 7b "
     "--parallel.shard hybrid --parallel.activation-checkpointing --data DIR"),
    (["0.16b", "--gpus", "20", "--training.batch-size", "40"],
     "torchrun --nnodes 4 --nproc-per-node 5 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m transfusion train 0.16b "
     "--training.batch-size 40 --data DIR"),
])  # fmt: skip
def test_command_to_type(capsys, arguments, expected):
    """With the settings of the plan, for `train` and as many processes as GPUs."""
    command("plan", *arguments)
    assert f"Train it with:\n  {expected}\n" in capsys.readouterr().out
    command("plan", *arguments, "--json")
    values = json.loads(capsys.readouterr().out)
    assert (values["command"], values["fits"]) == (expected, True)
    name, *words = expected.partition("transfusion train ")[2].split()
    run, _ = parse_run(Train, "train", named_run(name), words)
    assert parallel.rows_per_pass(run, values["machines"]["gpus"]) == values["rows_per_pass"]
    assert run.training.batch_size * run.data.seq_len == values["positions_per_step"]


def test_table_equals_json(capsys):
    arguments = ("plan", "7b", "--gpus", 64, "--memory", "80GB", "--parallel.micro_batch_size", 8)
    command(*arguments)
    table = capsys.readouterr().out
    command(*arguments, "--json")
    values = json.loads(capsys.readouterr().out)
    assert max(map(len, table.splitlines())) <= 100
    assert f"{values['parameters']['all']:,}" in table
    assert f"{values['memory']['activations'] / 1e9:.2f}" in table
    assert values["memory"]["all"] == sum(v for name, v in values["memory"].items() if name != "all")
    assert not values["fits"] and "command" not in values and "Train it" not in table
    assert "with --parallel.activation-checkpointing\n  or --parallel.micro-batch-size 4\n  or --gpus 128\n" in table


def test_tables_lists_the_papers_rows(capsys):
    command("plan", "--tables", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(PAPER)
    unet = next(row for row in rows if row["label"] == "0.16b, U-Net")
    assert (unet["table"], unet["run"], unet["guidance_scale"], unet["fid_images"]) == (7, "0.16b-unet", 3.0, 5000)
    command("plan", "--tables")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(PAPER) and max(map(len, lines)) <= 120
    assert any("0.16b, U-Net" in line and f"{unet['parameters']:,}" in line for line in lines)
    for arguments in (("digits", "--tables"), ("--tables", "--gpus", "64")):
        assert "nothing but --json" in fails(capsys, 2, "plan", *arguments)


def test_plan_without_a_run_shows_five_sizes(capsys):
    command("plan", "--gpus", 64)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == list(SIZES)
    assert max(map(len, lines)) <= 100
    assert not any("train" in line for line in lines)  # a command for each would be too much
    command("plan", "--training.batch-size", 2, "--json")
    plans = json.loads(capsys.readouterr().out)
    assert [values["run"] for values in plans] == list(SIZES)
    assert {values["positions_per_step"] for values in plans} == {2 * 4096}


def test_plan_tells_the_share_of_copies(capsys):
    command("plan", "1.4b", "--data.clean-copies")
    output = capsys.readouterr().out
    assert re.search(r"of these, noisy copies +18\.8%", output)
    assert "images of 256 patches (32x32 latents), each with a noisy copy, half is text" in output
    command("plan", "1.4b")
    assert "noisy cop" not in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_plan_names_the_moments_of_its_optimizer(optimizer, capsys):
    command("plan", "digits", "--training.optimizer", optimizer)
    output = capsys.readouterr().out
    assert ("moments of Muon and AdamW" in output) == (optimizer == "muon")
    assert ("two moments" in output) == (optimizer == "adamw")


def test_plan_takes_a_run_as_train_does(tmp_path, capsys):
    command("plan", "digits", "--json")
    assert json.loads(capsys.readouterr().out)["parameters"]["all"] == 2_105_604  # with the vocabulary fitted to its text
    data = DataConfig(prepared=("/elsewhere",), seq_len=64)
    run = Run("mine", ModelConfig(width=64, layers=2, heads=2, vocab_size=384), data=data)
    (tmp_path / "run.json").write_text(json.dumps(to_json(run)))
    command("plan", tmp_path / "run.json", "--model.layers", 3, "--training.batch-size", 16, "--json")
    values = json.loads(capsys.readouterr().out)
    config = replace(run.model, layers=3)
    assert values["parameters"]["all"] == count_parameters(build_on_meta(config))
    assert (values["positions_per_step"], values["rows_per_pass"]) == (16 * 64, 16)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpus", "0"], "--gpus must be at least 1, not 0"),
    (["--gpus-per-machine", "0"], "--gpus-per-machine must be at least 1"),
    (["--memory", "80 apples"], "--memory takes a size, for example 80GB or 40GiB, not '80 apples'"),
    (["--memory", "80"], "not '80'"), (["--memory", "0GB"], "not '0GB'"), (["--memory=-1GB"], "not '-1GB'"),
    (["--memory", "9" * 400 + "GB"], "--memory takes a size"),
    (["--gpus", "12"], "--training.batch-size 512 is not divisible by 12 processes: use a batch size of 504 or 516, or 8 "),
    (["--parallel.cpu-matmul", "bfloat16"], "--parallel.cpu-matmul has no effect on a plan for GPUs: add --device cpu"),
    (["--gpu", "h1000"], "there is no GPU 'h1000' (did you mean h100"),
    *((["--device", "cpu", f"--{name}", value], f"--{name} has no effect with --device, which measures the run on this")
      for name, value in (("gpus", "8"), ("gpus-per-machine", "4"), ("gpu", "l4"), ("memory", "80GB"), ("tflops", "9"),
                          ("mfu", "0.3"))),
    (["--device", "gpu"], "there is no device gpu"),
    (["--gpus-per-machine", "4"], "--gpus-per-machine has no effect without --parallel.shard hybrid"),
    (["--mfu", "40"], "--mfu must be between 0.001 and 1"), (["--tflops", "0"], "--tflops must be at least 0.001"),
    (["--gpus", "12", "--training.batch-size", "12", "--parallel.shard", "hybrid"], "12 is not a multiple of 8"),
    (["--gpus", "8", "--training.optimizer", "muon", "--lora.rank", "4"],
     "--training.optimizer muon: 8 processes share matrices of 4 rows; use a lora.rank of at least 8, or"),
])  # fmt: skip
def test_wrong_options_are_one_line(capsys, arguments, message):
    stderr = fails(capsys, 2, "plan", "7b", *arguments)
    assert message in stderr
    assert stderr.count("\n") == 1


def test_device_needs_one_run_and_its_data(capsys):
    assert "--device measures one run: name it" in fails(capsys, 2, "plan", "--device", "cpu")
    assert "this run names no data: give --data DIR" in fails(capsys, 1, "plan", "7b", "--device", "cpu")


def test_unknown_run_is_reported(capsys):
    assert "there is no recipe or folder '8b'" in fails(capsys, 2, "plan", "8b")


# On this machine


def test_plan_is_called_as_the_folder_of_the_run(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "my digits")
    command("plan", folder)
    assert capsys.readouterr().out.startswith("my-digits on 1 GPU, recipe digits\n")
    command("plan", folder, "--json")
    values = json.loads(capsys.readouterr().out)
    assert (values["run"], values["recipe"]) == ("my-digits", "digits")
    command("plan", folder, "--memory", "1MB")
    assert "\nmy-digits does not fit" in capsys.readouterr().out
    command("train", folder, "--dry-run")
    assert capsys.readouterr().out.startswith("my-digits on 1 GPU, recipe digits\n")


def test_measured_plan(trained, tmp_path, monkeypatch, capsys):
    """The time of the run is that of its steps, evaluations and previews; the run's folder stays as it is."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    words = "plan", trained, "--device", "cpu", "--training.steps", 100, "--training.validate-every", 30
    command(*words, "--json")
    values = json.loads(capsys.readouterr().out)
    measured = values["measured"]
    assert (measured["evaluations"], measured["previews"]) == (5, 26)  # at 0, 30, 60, 90, 100; at 0, 4, ..., 100
    assert min(measured[part] for part in ("step", "evaluation", "preview")) > 0 and measured["steps"] >= 1
    pauses = 5 * measured["evaluation"] + 26 * measured["preview"]
    assert values["seconds"] == pytest.approx(100 * measured["step"] + pauses)
    assert values["memory"]["cuda"] == 0 < values["memory"]["all"] < measured["peak_memory"]
    command(*words, "--parallel.micro-batch-size", 1)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 100 and lines[0] == "digits on this machine (cpu)"  # (the last is a command)
    assert any(re.fullmatch(r"  held-out evaluations +5 x \S+ s", line) for line in lines)
    assert not any("GPU" in line or "MFU" in line for line in lines)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    assert [*tmp_path.iterdir()] == []


def test_parts_are_scaled_to_those_of_the_run(trained, monkeypatch, capsys):
    """A forward pass to all of a step, the first held-out batch of each source to all, four denoising steps to twelve."""
    monkeypatch.setattr(measure_module, "_time_steps", lambda trainer: [1.0, 2.0, 9.0])
    monkeypatch.setattr(measure_module, "_time", lambda work: 3.0)
    words = "--training.batch-size", 6, "--parallel.micro-batch-size", 2, "--generation.steps", 12
    command("plan", trained, "--device", "cpu", "--json", *words)
    measured = json.loads(capsys.readouterr().out)["measured"]
    with mock.patch("transfusion.cli.run_folder.HELDOUT", 24):  # as in `command`
        batches = RunFolder.open(trained).heldout_batches(2)
    assert (measured["step"], measured["preview"]) == (2.0 * 6 / 2, 3.0 * 12 / 4)
    assert measured["evaluation"] == 3.0 / len(batches) * sum(map(len, batches.values())) and len(batches) == 2


class Clock:
    """Seconds that pass only where a test lets them."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, 10), (12, 5), (25, 3), (70, 1)])
def test_long_steps_are_measured_once(seconds, expected, monkeypatch):
    """Two steps are a warm-up; at most a minute of steps follows, and at least one."""
    clock = Clock()
    monkeypatch.setattr(measure_module, "monotonic", clock)

    def take_step(trainer, number, micro_batches):
        clock.now += seconds if number >= 2 else 100 * seconds

    monkeypatch.setattr(measure_module, "take_step", take_step)
    trainer = SimpleNamespace(batches=lambda state: itertools.repeat(([], None)))
    assert measure_module._time_steps(trainer) == [seconds] * expected
