"""What `plan` says before a run against what the run then does: bytes that are held, kept and sharded, by measurement."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.profile import THOROUGH
from tests.test_cli import command, fails
from transfusion import objective, plan
from transfusion.config import DataConfig, ModelConfig, ParallelConfig, Run, to_json
from transfusion.model.mask import packed_mask
from transfusion.model.transformer import Block, RMSNorm, rope_cos_sin
from transfusion.model.transfusion import build, build_on_meta, count_parameters
from transfusion.parallel import Ranks, parallelize
from transfusion.plan import BF16, FP32, LOGITS, Machines
from transfusion.runs import NAMES, PAPER, SIZES, named_run
from transfusion.training.optimizer import build_optimizer, freeze, optimizer_tensors

KEPT, MOST = 0.05, 0.1  # how far the plan may be off: indices, noise and times are left out, and what is let go early


class Alive(TorchDispatchMode):
    """Counts the bytes of every storage that is made while it is open, and takes off those that are let go."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.seen[id(tensor.untyped_storage())] = tensor.untyped_storage()
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return made

    def _count(self, storage):
        if self.seen.get(id(storage)) is not storage:
            self.seen[id(storage)] = storage
            self.now += storage.nbytes()
            weakref.finalize(storage, self._let_go, storage.nbytes())

    def _let_go(self, number: int):
        self.now -= number


def one_row(length: int = 512, parallel: ParallelConfig = ParallelConfig(compile=False), **model) -> Run:  # noqa: B008
    """A run like `digits`, of one row, so that a row of the plan's is its batch."""
    digits = named_run("digits")
    config = replace(digits.model, **{"vocab_size": 640} | model)
    return replace(digits, model=config, parallel=parallel, data=replace(digits.data, rows=1, seq_len=length))


def measured(run: Run) -> tuple[int, int]:
    """Bytes that the forward pass of a step leaves behind, and the most at any time of the step; but for the mask, which
    only a CPU makes in full."""
    model, batch = build(run.model, 0), plan.typical_row(run.model, run.data.seq_len)
    model.transformer.activation_checkpointing = run.parallel.activation_checkpointing
    draws = objective.sample_noise(batch, run.diffusion)
    with Alive() as alive:
        losses = objective.compute_losses(model, batch, draws, run.diffusion)
        loss = objective.total_loss(losses, batch.text_count, batch.image_count, 1.0)
        kept = alive.now
        loss.backward()
    mask = (FP32 + 1) * run.data.seq_len**2
    return kept - mask, alive.most - mask


def planned(run: Run) -> tuple[int, int]:
    """The same, as planned for fp32; gradients apart."""
    kept, logits = plan.activations(run, FP32), plan.logits(run)
    return kept + logits * FP32 // LOGITS, kept + max(logits, plan.inside_block(run, FP32))


# Memory


@pytest.mark.parametrize(
    "rates", [{}, {"text_lr_scale": 0.0}, {"image_lr_scale": 0.0}, {"transformer_lr_scale": 0.0}], ids=str
)
def test_weights_gradients_moments_and_average_are_exact(rates):
    run = named_run("shapes")
    run = replace(run, training=replace(run.training, **rates))
    model, average = build(run.model, 0), build(run.model, 0)
    freeze(model, run.training.lr_scales)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer = build_optimizer(model, run.training)
    optimizer.step()
    moments = [value for name, value in optimizer_tensors(model, optimizer).items() if not name.endswith("step")]
    found = plan.plan(run, Machines()).memory
    held = {
        "weights": list(model.parameters()), "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "moments": moments, "ema": list(average.parameters()),
    }  # fmt: skip
    assert {name: sum(t.nbytes for t in tensors) for name, tensors in held.items()} == {
        name: getattr(found, name) for name in held
    }
    states = sum(t.nbytes for part in ("weights", "moments", "ema") for t in held[part])
    assert plan.plan(run, Machines()).checkpoint == states


@pytest.mark.parametrize("model", [
    {}, {"qk_norm": False}, {"heads": 4, "kv_heads": 2, "head_dim": 48}, {"post_norm": True}, {"layers": 2},
    {"intermediate_size": 2048}, {"vocab_size": 8192}, {"patches": "unet"},
    {"patches": "unet", "unet_width": 128, "patch_size": 4},
    {"patches": "unet", "patch_size": 1},
], ids=str)  # fmt: skip
def test_activations_and_logits_are_what_a_step_keeps(model):
    run = one_row(**model)
    (kept, most), (kept_planned, most_planned) = measured(run), planned(run)
    assert kept_planned == pytest.approx(kept, rel=KEPT)
    assert most_planned == pytest.approx(most, rel=MOST)


@pytest.mark.parametrize("model", [{}, {"layers": 12}, {"vocab_size": 8192}, {"intermediate_size": 2048}], ids=str)
def test_recomputing_keeps_what_goes_into_blocks(model):
    run = one_row(**model, parallel=ParallelConfig(compile=False, activation_checkpointing=True))
    (kept, most), (kept_planned, most_planned) = measured(run), planned(run)
    assert kept_planned == pytest.approx(kept, rel=KEPT)
    gradients = FP32 * count_parameters(build_on_meta(run.model))  # some are there when it is most
    assert most_planned * (1 - MOST) < most < (most_planned + gradients) * (1 + MOST)


@pytest.mark.parametrize("model", [{"qk_norm": True, "kv_heads": 2}, *([{}] if THOROUGH else [])], ids=str)
def test_a_compiled_block_in_bfloat16_keeps_what_is_planned(model, monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward", nn.RMSNorm.forward)  # as on CUDA
    config = ModelConfig(width=256, layers=1, heads=4, intermediate_size=768, **model)
    run = Run("", config, data=DataConfig(rows=2, seq_len=64))
    block = Block(config, 0).bfloat16()
    block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    x = torch.randn(2, 64, 256, dtype=torch.bfloat16, requires_grad=True)
    rotation = rope_cos_sin(torch.arange(64).expand(2, 64), config, x.dtype)
    mask = packed_mask(torch.zeros(2, 64, dtype=torch.int32), torch.full((2, 64), -1))
    mask.prepare()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        block(x, rotation, mask, None)
    known = {t.data_ptr() for t in (*block.parameters(), *rotation)}
    on_cpu = BF16 * mask.attn_bias.numel()  # the mask in full
    kept = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known) - on_cpu
    assert plan.kept_by_block(run) * 2 * 64 == pytest.approx(kept, rel=0.02)


@pytest.fixture
def spread_over(request):
    """A model without memory, spread over ranks that are not there: what one of them would hold."""

    def held(config: ModelConfig, rank: int, ranks: int, shard: str = "full", per_machine: int = 8) -> int:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            group = Ranks(rank, ranks)
            group.per_machine = per_machine
            model = build_on_meta(config)
            parallelize(model, model.transformer.blocks, torch.device("cpu"), group.mesh("cpu", shard), compiled=False)
            return sum(FP32 * parameter.to_local().numel() for parameter in model.parameters())
        finally:
            dist.destroy_process_group()

    return held


@pytest.mark.parametrize(("size", "gpus", "shard"), [
    ("7b", 64, "full"), ("7b", 64, "hybrid"), ("0.16b", 7, "full"), ("1.4b", 48, "full"),
])  # fmt: skip
def test_the_first_of_many_ranks_holds_what_is_planned(spread_over, size, gpus, shard):
    run = Run(size, SIZES[size], parallel=ParallelConfig(shard=shard))
    assert spread_over(run.model, 0, gpus, shard) == plan.memory(run, Machines(gpus)).weights


def test_ranks_hold_everything_once_and_none_more_than_the_first(spread_over):
    config = replace(SIZES["0.16b"], layers=2)
    held = [spread_over(config, rank, 7) for rank in range(7)]
    assert sum(held) == FP32 * count_parameters(build_on_meta(config))
    assert max(held) == held[0] == plan.memory(Run("", config), Machines(7)).weights
    assert held[0] > held[-1]  # seven does not divide: the last holds less


# Work


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_model(name):
    run = named_run(name)
    found = plan.plan(run, Machines()).parameters
    model = build_on_meta(run.model)
    assert sum(found.values()) == count_parameters(model)
    assert found["transformer"] == count_parameters(model.transformer)
    assert found["patches"] == (count_parameters(model.patches) if model.patches is not None else 0)


def test_flops_are_those_of_a_row_that_is_half_images():
    run = named_run("1.4b")
    config, length, patches = run.model, 4096, 256
    found, batch = plan.plan(run, Machines()), plan.typical_row(run.model, 4096)
    images = length // 2 // (patches + 4)
    assert (batch.positions, batch.image_count, batch.groups[0].index.shape[1]) == (length, images, patches)
    text = length - images * (patches + 4)
    pairs = text * (text + 1) // 2 + images * (1 + 2 + patches * (patches + 2) + (patches + 3) + (patches + 4))
    products = 2048 * (4 * 2048 + 3 * 5632) * 24
    in_and_out = images * 2048 * (2 * 32 * patches + 256 + 2048)
    head = 2048 * 32_000 * (text + 2 * images)
    forward = 2 * (products * length + head + in_and_out) + 4 * 2048 * 24 * pairs
    assert found.flops == pytest.approx(3 * forward / length, rel=1e-12)
    assert found.usual_flops == 6 * count_parameters(build_on_meta(config)) + 12 * 24 * 2048 * length


@pytest.mark.parametrize(("length", "patch_size", "patches"), [
    (4096, 2, 256), (4096, 1, 1024), (4096, 8, 16), (128, 2, 16), (256, 2, 64), (8, 2, 0), (1, 2, 0),
])  # fmt: skip
def test_a_typical_row_is_full_whatever_its_length(length, patch_size, patches):
    batch = plan.typical_row(ModelConfig(patch_size=patch_size), length)
    assert batch.positions == length
    assert [group.index.shape[1] for group in batch.groups] == [patches] * bool(patches)


def test_time_and_disk_follow():
    run, machines = named_run("7b"), Machines(gpus=64, mfu=0.5, tflops=1000)
    found = plan.plan(run, machines)
    assert found.positions == 250_000 * 8 * 4096 * 64
    assert found.seconds == pytest.approx(found.positions * found.flops / (0.5 * 1e15 * 64))
    assert found.checkpoint == 16 * count_parameters(build_on_meta(run.model))
    assert found.usual_mfu * found.flops == pytest.approx(0.5 * found.usual_flops)


@pytest.mark.parametrize(("asked", "accumulate"), [(2**21, 1), (2**23, 4), (5 * 2**20, 2), (1, 1)])
def test_a_batch_gives_the_nearest_accumulation(asked, accumulate):
    assert plan.with_batch(named_run("7b"), 64, asked).training.accumulate == accumulate


# What would help


@pytest.mark.parametrize(("name", "gpus", "memory"), [("7b", 64, 80e9), ("7b", 8, 40e9), ("1.4b", 1, 40e9), ("7b", 1, 80e9)])
def test_every_way_to_fit_fits(name, gpus, memory, capsys):
    before = plan.plan(named_run(name), Machines(gpus, memory=memory))
    ways = [*plan.ways_to_fit(before.run, before.machines)]
    assert not before.fits
    assert ways
    for way in ways:
        command("plan", name, "--gpus", gpus, "--memory", f"{memory / 1e9:g}GB", *way.split(), "--json")
        assert json.loads(capsys.readouterr().out)["fits"], way


def test_there_may_be_no_way_to_fit():
    assert not [*plan.ways_to_fit(named_run("7b"), Machines(8, memory=3_000_000_000))]


# The command


def test_the_table_says_what_the_json_says(capsys):
    typed = ("plan", "7b", "--gpus", 64, "--memory", "80GB")
    command(*typed)
    table = capsys.readouterr().out
    command(*typed, "--json")
    values = json.loads(capsys.readouterr().out)
    assert max(map(len, table.splitlines())) <= 100
    assert f"{values['parameters']['all']:,}" in table
    assert f"{values['memory']['activations'] / 1e9:.2f}" in table
    assert values["memory"]["all"] == sum(v for name, v in values["memory"].items() if name != "all")
    assert not values["fits"]
    assert "it would with --parallel.activation-checkpointing or" in table


def test_the_rows_of_the_papers_tables_are_listed(capsys):
    command("plan", "--tables", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(PAPER)
    unet = next(row for row in rows if row["label"] == "0.16b, U-Net")
    assert (unet["table"], unet["run"], unet["guidance_scale"], unet["fid_images"]) == (7, "0.16b-unet", 3.0, 5000)
    command("plan", "--tables")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(PAPER) and max(map(len, lines)) <= 120
    assert any("0.16b, U-Net" in line and f"{unet['parameters']:,}" in line for line in lines)
    for words in (("digits", "--tables"), ("--tables", "--gpus", "64")):
        assert "nothing but --json" in fails(capsys, 2, "plan", *words)


def test_without_a_run_the_five_sizes_stand_side_by_side(capsys):
    command("plan", "--gpus", 64)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == list(SIZES)
    assert max(map(len, lines)) <= 100
    command("plan", "--data.rows", 2, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in found] == list(SIZES)
    assert {one["positions_per_step"] for one in found} == {2 * 4096}


def test_a_run_is_planned_as_it_would_be_trained(tmp_path, capsys):
    command("plan", "digits", "--json")
    assert json.loads(capsys.readouterr().out)["parameters"]["all"] == 2_105_604  # with the vocabulary of its own text
    data = DataConfig(prepared=("/elsewhere",), seq_len=64)
    run = Run("mine", ModelConfig(width=64, layers=2, heads=2, vocab_size=384), data=data)
    (tmp_path / "run.json").write_text(json.dumps(to_json(run)))
    command("plan", tmp_path / "run.json", "--model.layers", 3, "--batch", "1k", "--json")
    values = json.loads(capsys.readouterr().out)
    config = replace(run.model, layers=3)
    assert values["parameters"]["all"] == count_parameters(build_on_meta(config))
    assert values["positions_per_step"] == 2 * 8 * 64


def test_a_batch_that_does_not_divide_is_told(capsys):
    command("plan", "7b", "--gpus", 64, "--batch", "2M")
    assert "--batch 2,000,000 is no multiple of 2,097,152: the nearest is 2,097,152." in capsys.readouterr().out
    command("plan", "7b", "--gpus", 64, "--batch", 2**22)
    assert "--batch" not in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "said"), [
    (["--gpus", "0"], "--gpus must be at least 1, not 0"),
    (["--gpus-per-machine", "0"], "--gpus-per-machine must be at least 1"),
    (["--memory", "80 apples"], "--memory takes a size, for example 80GB or 40GiB, not '80 apples'"),
    (["--memory", "80"], "not '80'"), (["--memory", "0GB"], "not '0GB'"), (["--memory=-1GB"], "not '-1GB'"),
    (["--batch", "many"], "--batch takes a number of positions"),
    (["--mfu", "40"], "--mfu must lie above 0 and up to 1"), (["--tflops", "0"], "--tflops must be above 0"),
    (["--gpus", "12", "--parallel.shard", "hybrid"], "12 is not a multiple of 8"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(capsys, typed, said):
    found = fails(capsys, 2, "plan", "7b", *typed)
    assert said in found
    assert found.count("\n") == 1


def test_an_unknown_run_is_told(capsys):
    assert "there is no run '8b'" in fails(capsys, 2, "plan", "8b")
