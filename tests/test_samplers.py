"""Noise to image: the samplers against diffusers' schedulers, and driven by a model that is never wrong."""


import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddpm, scheduling_dpmsolver_multistep
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.profile import examples
from transfusion.config import DiffusionConfig
from transfusion.diffusion import add_noise, alpha_sigma, noise_from_x0, target, to_x0_and_noise
from transfusion.inference.samplers import SamplingSchedule, get_sampler

torch.set_num_threads(1)  # tensors of a few numbers: a second thread would only be waited for

few = examples(12, quick=6)
some = examples(15, quick=8)

SHAPE = (1, 3, 2, 2)
COUNTS = (1, 2, 4, 5, 10, 50, 250, 1000)  # of steps; they divide 1000, for diffusers walks whole ones
THEIR_NAMES = {"epsilon": "epsilon", "velocity": "v_prediction", "x0": "sample"}
STRAIGHT = [("rectified_flow", name) for name in ("ddpm", "ddim", "dpm", "dpm-sde", "euler", "heun")]
SAMPLERS = [("cosine", name) for name in ("ddpm", "ddim", "dpm", "dpm-sde")] + STRAIGHT
WITH_CHANCE = ("ddpm", "dpm-sde")

predictions = st.sampled_from(("epsilon", "velocity", "x0"))
counts = st.sampled_from(COUNTS)
seeds = st.integers(0, 2**32 - 1)
bounds = st.none() | st.just(1.0)


def walk(
    steps: int, diffusion: DiffusionConfig, bound: float | None = None, seed: int = 0, dtype=torch.float64
) -> SamplingSchedule:
    """A walk whose bound is the same on both sides of 0 and for every channel."""
    sides = None if bound is None else tuple(torch.full((3, 1, 1), s * bound, dtype=dtype) for s in (-1, 1))
    return SamplingSchedule(steps, diffusion, sides, torch.Generator().manual_seed(seed))


def drive(sampler, answer) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run a sampler to its end with answer(noisy, t): the image, and all that it wanted to be told about."""
    asked = []
    noisy, t = next(sampler)
    while True:
        asked.append((noisy, t))
        try:
            noisy, t = sampler.send(answer(noisy, t))
        except StopIteration as finished:
            return finished.value, asked


def calls(name: str, steps: int) -> int:
    """How often a sampler asks the model."""
    return 2 * steps - 1 if name == "heun" else steps


def random(seed: int, number: int, dtype=torch.float64) -> Tensor:
    """Noise number so and so of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((number + 1, *SHAPE), generator=generator, dtype=dtype)[number]


def in_double(scheduler) -> None:
    """Give a scheduler its own table at full precision: in float32 its last abar is off by 5e-5 of itself."""
    steps = torch.arange(1001, dtype=torch.float64) / 1000
    cosine = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    exact = (1 - betas).cumprod(0)
    torch.testing.assert_close(exact.float(), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
    scheduler.alphas_cumprod = exact


def scheduler_of(kind, steps: int, prediction: str, bound: float | None, **more):
    """diffusers' scheduler on the path, steps and prediction of the paper (section 4.1)."""
    scheduler = kind(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=bound is not None,
        prediction_type=THEIR_NAMES[prediction], clip_sample_range=bound or 1.0, **more,
    )  # fmt: skip
    in_double(scheduler)
    scheduler.set_timesteps(steps)
    return scheduler


def their_way(scheduler, noisy: Tensor, said: list[Tensor], seed: int = 0) -> list[Tensor]:
    """All that their loop passes through: where it begins, and what each of these predictions makes of it.

    With our chance: float32 noise from one generator, fresh in every step.
    """
    generator, way = torch.Generator().manual_seed(seed), [noisy]

    def draw(shape, **_):
        return torch.randn(shape, generator=generator).double()

    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduling_ddpm, scheduling_dpmsolver_multistep):
            patch.setattr(module, "randn_tensor", draw)
        for t, prediction in zip(scheduler.timesteps, said, strict=True):
            way.append(scheduler.step(prediction, t, way[-1]).prev_sample)
    return way


def our_way(name: str, walk: SamplingSchedule, noisy: Tensor, said: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same of ours, and the times (1,) at which it asked."""
    answers = iter(said)
    image, asked = drive(get_sampler(name, walk.diffusion.noise_schedule)(noisy, walk), lambda *_: next(answers))
    return [*(noisy for noisy, _ in asked), image], [t for _, t in asked]


def agree(ours: Tensor, theirs: Tensor, within: float = 1e-4) -> None:
    """Within 1e-4 of the largest number there is: unclipped, an error at t = 1 is multiplied by 20,000."""
    assert (ours - theirs).abs().max() <= within * max(1, theirs.abs().max())


# Against diffusers


@some
@given(counts, predictions, bounds, seeds)
def test_ddpm_is_the_schedulers(steps, prediction, bound, seed):
    assume(bound is not None or prediction != "epsilon")  # see the test below
    diffusion = DiffusionConfig(prediction=prediction)
    said = [random(seed, 2 + n % 8) for n in range(steps)]
    answers = iter(said)
    sampler = get_sampler("ddpm", diffusion.noise_schedule)(random(seed, 0), walk(steps, diffusion, bound, seed))
    ours, asked = drive(sampler, lambda noisy, t: next(answers))
    scheduler = scheduler_of(DDPMScheduler, steps, prediction, bound, variance_type="fixed_small")
    assert [round(1000 * t.item()) - 1 for _, t in asked] == scheduler.timesteps.tolist()
    agree(ours, their_way(scheduler, random(seed, 0), said, seed)[-1], 1e-5)


@some
@given(counts, predictions, bounds, seeds)
def test_ddim_is_the_schedulers(steps, prediction, bound, seed):
    assume(bound is not None or prediction != "epsilon")
    diffusion = DiffusionConfig(prediction=prediction)
    said = [random(seed, 2 + n % 8) for n in range(steps)]
    answers = iter(said)
    sampler = get_sampler("ddim", diffusion.noise_schedule)(random(seed, 0), walk(steps, diffusion, bound))
    ours, asked = drive(sampler, lambda noisy, t: next(answers))
    scheduler = scheduler_of(DDIMScheduler, steps, prediction, bound)
    assert [round(1000 * t.item()) - 1 for _, t in asked] == scheduler.timesteps.tolist()
    theirs = random(seed, 0)
    for t, prediction in zip(scheduler.timesteps, said, strict=True):
        theirs = scheduler.step(prediction, t, theirs, eta=0.0, use_clipped_model_output=True).prev_sample
    agree(ours, theirs, 1e-5)


@few
@given(counts, st.sampled_from(("ddpm", "ddim")), seeds)
def test_unclipped_noise_predictions_are_the_schedulers(steps, name, seed):
    """The one case in which their abar at t = 1, 2.4288e-9, counts: predictions are divided by its root."""
    diffusion = DiffusionConfig()
    said = [random(seed, 2 + n % 8) for n in range(steps)]
    answers = iter(said)
    sampler = get_sampler(name, diffusion.noise_schedule)(random(seed, 0), walk(steps, diffusion, None, seed))
    ours, _ = drive(sampler, lambda *_: next(answers))
    theirs = random(seed, 0)
    if name == "ddpm":
        scheduler = scheduler_of(DDPMScheduler, steps, "epsilon", None, variance_type="fixed_small")
        theirs = their_way(scheduler, theirs, said, seed)[-1]
    else:
        scheduler = scheduler_of(DDIMScheduler, steps, "epsilon", None)
        for t, prediction in zip(scheduler.timesteps, said, strict=True):
            theirs = scheduler.step(prediction, t, theirs).prev_sample
    agree(ours, theirs)


@some
@given(st.integers(1, 60), st.sampled_from((1.0, 0.5, 3.0)), seeds)
def test_euler_is_the_schedulers(steps, shift, seed):
    diffusion = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity", t_shift=shift)
    said = [random(seed, 2 + n % 8, torch.float32) for n in range(steps)]
    answers = iter(said)
    start = random(seed, 0, torch.float32)
    sampler = get_sampler("euler", diffusion.noise_schedule)(start, walk(steps, diffusion))
    ours, asked = drive(sampler, lambda *_: next(answers))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - n / steps for n in range(steps)])
    torch.testing.assert_close(torch.cat([t for _, t in asked]), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    theirs = start
    for t, prediction in zip(scheduler.timesteps, said, strict=True):
        theirs = scheduler.step(prediction, t, theirs).prev_sample
    agree(ours, theirs)


@pytest.mark.parametrize(("name", "theirs"), [("dpm", "dpmsolver++"), ("dpm-sde", "sde-dpmsolver++")])
@some
@given(counts, predictions, bounds, seeds)
def test_dpm_is_the_schedulers(name, theirs, steps, prediction, bound, seed):
    """All along the way, not only at its end, where the last step is first-order and gives the last estimate."""
    diffusion = DiffusionConfig(prediction=prediction)
    said = [random(seed, 2 + n % 8) for n in range(steps)]
    ours, times = our_way(name, walk(steps, diffusion, bound, seed), random(seed, 0), said)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type=THEIR_NAMES[prediction],
        algorithm_type=theirs, solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
        thresholding=bound is not None, sample_max_value=bound or 1.0,  # at 1, dynamic thresholds do not move: they clip
    )  # fmt: skip
    in_double(scheduler)
    scheduler.set_timesteps(steps)
    assert [round(1000 * t.item()) - 1 for t in times] == scheduler.timesteps.tolist()
    abar = scheduler.alphas_cumprod[scheduler.timesteps]  # (steps,)
    exact = torch.cat([(1 / abar - 1).sqrt(), torch.zeros(1)])  # (steps + 1,)
    torch.testing.assert_close(exact.float(), scheduler.sigmas, rtol=1e-5, atol=1e-6)
    scheduler.sigmas = exact
    for one, other in zip(ours, their_way(scheduler, random(seed, 0), said, seed), strict=True):
        agree(one, other, 3e-5)  # they round to float32 in each of up to 1,000 steps


class ShortWalk(SamplingSchedule):
    """The times of diffusers' flow matching, which begin at 0.999 and not at 1: sigmas of 1 would be infinitely far."""

    def times(self) -> Tensor:
        times = 0.999 * torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)  # (steps + 1,)
        shift = self.diffusion.t_shift
        return shift * times / (1 + (shift - 1) * times)


@some
@given(st.integers(1, 60), st.sampled_from((1.0, 0.5, 3.0)), st.booleans(), bounds, seeds)
def test_dpm_on_the_straight_path_is_the_schedulers(steps, shift, short, bound, seed):
    """On their own times, and on ours, which begin at t = 1: no signal, and a first step of endless length."""
    diffusion = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity", t_shift=shift)
    said = [random(seed, 2 + n % 8) for n in range(steps)]
    full = walk(steps, diffusion, bound)
    bounded = ShortWalk(steps, diffusion, full.bound, full.generator) if short else full
    ours, times = our_way("dpm", bounded, random(seed, 0), said)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", solver_order=2,
        thresholding=bound is not None, sample_max_value=bound or 1.0,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    if short:
        torch.testing.assert_close(torch.cat(times).float(), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    scheduler.sigmas = bounded.times()
    for one, other in zip(ours, their_way(scheduler, random(seed, 0), said), strict=True):
        agree(one, other, 1e-5)


@some
@given(st.integers(1, 60), st.sampled_from((1.0, 0.5, 3.0)), seeds)
def test_heun_is_the_schedulers(steps, shift, seed):
    """On our times: theirs end with one of 0.001, whatever the number of steps, and are shifted twice."""
    diffusion = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity", t_shift=shift)
    said = [random(seed, 2 + n % 8, torch.float32) for n in range(calls("heun", steps))]
    start = random(seed, 0, torch.float32)
    ours, times = our_way("heun", walk(steps, diffusion), start, said)
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    assert len(scheduler.timesteps) == len(times)
    first, *others = walk(steps, diffusion).times().float()
    scheduler.sigmas = torch.stack([first, *(t for t in others[:-1] for _ in range(2)), others[-1]])
    torch.testing.assert_close(torch.cat(times), scheduler.sigmas[:-1], rtol=0, atol=0)
    for one, other in zip(ours, their_way(scheduler, start, said), strict=True):
        agree(one, other, 1e-5)


# Against a model that is never wrong


@pytest.mark.parametrize(("path", "name"), SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(st.integers(2, 40), predictions, st.booleans(), st.sampled_from((1.0, 2.0)), seeds)
def test_a_perfect_predictor_gives_the_clean_latent(
    path, name, dtype, steps, prediction, clipped, shift, seed
):
    """It knows the clean latent, and says what of the noisy one it is shown is noise."""
    diffusion = DiffusionConfig(noise_schedule=path, prediction=prediction, t_shift=shift)
    clean = random(seed, 1, dtype).clamp(-2, 2)

    def perfect(noisy: Tensor, t: Tensor) -> Tensor:
        return target(clean, noise_from_x0(noisy, clean, t, diffusion), t, diffusion)

    bounded = walk(steps, diffusion, 2.0 if clipped else None, seed, dtype)
    image, asked = drive(get_sampler(name, diffusion.noise_schedule)(random(seed, 0, dtype), bounded), perfect)
    assert len(asked) == calls(name, steps)
    assert image.dtype == dtype
    # At t = 1 float32's own error is multiplied by 20,000, but only that of t = 1 / steps is left at the end.
    torch.testing.assert_close(image, clean, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)


@few
@given(st.integers(1, 40), predictions, seeds)
def test_without_chance_the_way_back_is_the_way_there(steps, prediction, seed):
    """All that draw none pass through the very noisy latents that training makes of this image and this noise."""
    for path, name in SAMPLERS:
        if name in WITH_CHANCE or (path, prediction) == ("rectified_flow", "epsilon"):
            continue  # at t = 1 of the straight path a noise prediction says nothing of the image
        diffusion = DiffusionConfig(noise_schedule=path, prediction=prediction)
        clean, noise = random(seed, 1), random(seed, 0)
        start = add_noise(clean, noise, torch.ones(1, dtype=torch.float64), diffusion)
        _, asked = drive(
            get_sampler(name, diffusion.noise_schedule)(start, walk(steps, diffusion)),
            lambda noisy, t, c=clean, n=noise, d=diffusion: target(c, n, t, d),
        )
        for noisy, t in asked:
            torch.testing.assert_close(noisy, add_noise(clean, noise, t, diffusion), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", WITH_CHANCE)
@few
@given(st.integers(5, 60), seeds)
def test_new_noise_keeps_it_as_large_as_the_path_says(name, steps, seed):
    """Around a known clean latent, what is not signal is normal with the path's own scale, at every step."""
    for path in ("cosine", "rectified_flow"):
        diffusion = DiffusionConfig(noise_schedule=path, prediction="x0")
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(1, 1, 100, 100, generator=generator)
        clean = torch.full_like(start, 0.5)
        sampler = get_sampler(name, diffusion.noise_schedule)(start, walk(steps, diffusion, None, seed))
        _, asked = drive(sampler, lambda *_, clean=clean: clean)
        for noisy, t in asked:
            left = noise_from_x0(noisy, clean, t, diffusion)
            assert abs(left.mean()) < 0.06  # 10,000 numbers: six deviations of their mean
            assert abs(left.std() - 1) < 0.05


# Against a world whose images are known


def known(noisy: Tensor, t: Tensor, path: str) -> Tensor:
    """The mean of all clean latents that this noisy one may come from: each number lies about one of three centres."""
    centres = torch.tensor([-1.2, 0.3, 1.0], dtype=torch.float64)  # (3,)
    spread, shares = 0.3, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)  # (3,)
    signal, scale = alpha_sigma(t, path)
    variance = (signal * spread) ** 2 + scale**2
    off = noisy[..., None] - signal * centres  # (1, C, Y, X, 3)
    chance = (shares.log() - off**2 / (2 * variance)).softmax(-1)  # (1, C, Y, X, 3)
    return (chance * (centres + signal * spread**2 / variance * off)).sum(-1)


def walked(name: str, path: str, steps: int, start: Tensor) -> Tensor:
    """What becomes of pure noise in that world."""
    diffusion = DiffusionConfig(noise_schedule=path, prediction="x0")
    sampler = get_sampler(name, diffusion.noise_schedule)(start, walk(steps, diffusion))
    return drive(sampler, lambda noisy, t: known(noisy, t, path))[0]


@pytest.mark.parametrize(("path", "name", "steps", "rival", "times_closer"), [
    ("cosine", "dpm", 20, "ddim", 3), ("rectified_flow", "dpm", 20, "ddim", 3), ("rectified_flow", "heun", 10, "euler", 3),
])  # fmt: skip
def test_second_order_comes_closer_to_the_end_of_the_way_with_as_many_questions(path, name, steps, rival, times_closer):
    """The end is where ddim comes in 1,000 steps; first order has 20 of them, as many as second order's questions."""
    start = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = walked("ddim", path, 1000, start)
    ours, theirs = ((walked(*way, start) - end).abs().mean() for way in ((name, path, steps), (rival, path, 20)))
    assert ours * times_closer < theirs


# The walk


def test_250_steps_are_those_of_the_paper():
    times = walk(250, DiffusionConfig()).times()
    assert len(times) == 251
    expected = torch.arange(1000, -1, -4, dtype=torch.float64)
    torch.testing.assert_close(times * 1000, expected, rtol=0, atol=1e-9)


@some
@given(st.integers(1, 1000), st.floats(0.1, 10))
def test_every_walk_goes_down_from_1_to_0(steps, shift):
    times = walk(steps, DiffusionConfig(noise_schedule="rectified_flow", t_shift=shift)).times()
    assert (len(times), times[-1]) == (steps + 1, 0)
    assert abs(times[0] - 1) < 1e-12
    assert (times.diff() < 0).all()


@pytest.mark.parametrize(("path", "name"), SAMPLERS)
@few
@given(st.integers(1, 20), predictions, st.floats(0.1, 3), seeds)
def test_clipping_keeps_the_clean_estimate_inside_the_bound(path, name, steps, prediction, bound, seed):
    """Channel by channel, whatever the model says; the last step gives the last estimate itself."""
    diffusion = DiffusionConfig(noise_schedule=path, prediction=prediction)
    low = -bound * torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64).view(3, 1, 1)
    high = bound * torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    bounded = SamplingSchedule(steps, diffusion, (low, high), torch.Generator().manual_seed(seed))
    said = iter(10 * random(seed, 1 + n % 8) for n in range(calls(name, steps)))
    seen = []

    def answer(noisy: Tensor, t: Tensor) -> Tensor:
        prediction = next(said)
        seen.append((bounded.to_x0_and_noise(noisy, prediction, t), noisy, t))
        return prediction

    image, _ = drive(get_sampler(name, diffusion.noise_schedule)(random(seed, 0), bounded), answer)
    for (clean, noise), noisy, t in seen:
        assert ((low <= clean) & (clean <= high)).all()
        mixed = add_noise(clean, noise, t, diffusion)  # and the noise is what then is left
        torch.testing.assert_close(mixed, noisy, rtol=0, atol=1e-6)
    torch.testing.assert_close(image, seen[-1][0].x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("path", "name"), SAMPLERS)
@few
@given(st.integers(1, 20))
def test_a_walk_counts_its_steps_and_not_how_often_the_model_is_asked(path, name, steps):
    diffusion = DiffusionConfig(noise_schedule=path, prediction="velocity")
    counting, behind = walk(steps, diffusion), []

    def answer(noisy: Tensor, t: Tensor) -> Tensor:
        behind.append(counting.step)
        return 0 * noisy

    drive(get_sampler(name, diffusion.noise_schedule)(random(0, 0), counting), answer)
    twice = 2 if name == "heun" else 1
    assert behind == [n for n in range(steps) for _ in range(twice)][: calls(name, steps)]
    assert counting.step == steps


@pytest.mark.parametrize(("second", "first"), [("dpm", "ddim"), ("dpm-sde", "ddpm")])
@few
@given(st.sampled_from(("cosine", "rectified_flow")), st.integers(1, 3), seeds)
def test_where_it_has_nothing_to_go_by_second_order_is_first(second, first, path, steps, seed):
    """In the first step, in the last, and behind an endless one, which the straight path begins with."""
    assume(path == "rectified_flow" or steps < 3)
    diffusion = DiffusionConfig(noise_schedule=path, prediction="velocity")
    said = [random(seed, n) for n in range(1, steps + 1)]
    one, other = (our_way(name, walk(steps, diffusion, 1.0), random(seed, 0), said)[0] for name in (second, first))
    for ours, expected in zip(one, other, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["cosine", "rectified_flow"])
def test_steps_too_short_to_change_anything_do_not_stop_dpm(path):
    """Shifted that far, the cosine path's signal is the smallest there is at more than one of the times."""
    diffusion = DiffusionConfig(noise_schedule=path, prediction="velocity", t_shift=1000.0)
    wandering = walk(100, diffusion, 1.0)
    signals = [signal for signal, _ in wandering.alphas_sigmas]
    assert path == "rectified_flow" or signals[0] == signals[1]
    image, asked = drive(get_sampler("dpm", diffusion.noise_schedule)(random(0, 0), wandering), lambda x, t: random(0, 1))
    assert all(noisy.isfinite().all() and noisy.abs().max() < 10 for noisy, _ in asked)
    assert image.abs().max() <= 1


@few
@given(st.integers(1, 20), seeds)
def test_a_wide_bound_changes_nothing(steps, seed):
    for path, name in SAMPLERS:
        diffusion = DiffusionConfig(noise_schedule=path, prediction="velocity")
        images = []
        for bound in (None, 1e6):
            said = iter(random(seed, 1 + n % 8) for n in range(calls(name, steps)))
            sampler = get_sampler(name, diffusion.noise_schedule)(random(seed, 0), walk(steps, diffusion, bound, seed))
            images.append(drive(sampler, lambda *_, said=said: next(said))[0])
        torch.testing.assert_close(*images, rtol=0, atol=1e-9)


@few
@given(st.integers(2, 20), seeds, seeds)
def test_only_those_with_chance_draw_and_the_same_seed_draws_the_same(steps, seed, other):
    assume(seed != other)
    for path, name in SAMPLERS:
        diffusion = DiffusionConfig(noise_schedule=path, prediction="velocity")
        walks = [walk(steps, diffusion, 1.0, s) for s in (seed, seed, other)]
        images = [drive(get_sampler(name, diffusion.noise_schedule)(random(0, 0), w), lambda x, t: 0 * x)[0] for w in walks]
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2]) == (name not in WITH_CHANCE)


def test_a_sampler_that_is_not_there_or_not_for_this_path_is_refused():
    with pytest.raises(ValueError, match="no sampler 'magic'.*ddpm, ddim, dpm, dpm-sde"):
        get_sampler("magic", DiffusionConfig().noise_schedule)
    for name in ("euler", "heun"):
        with pytest.raises(ValueError, match=f"{name} does not support the cosine noise schedule; use ddpm"):
            get_sampler(name, DiffusionConfig().noise_schedule)
    for path, name in SAMPLERS:
        assert callable(get_sampler(name, DiffusionConfig(noise_schedule=path).noise_schedule))


@few
@given(predictions, st.floats(0.01, 0.99), seeds)
def test_an_estimate_without_bound_is_what_the_prediction_says(prediction, t, seed):
    for path in ("cosine", "rectified_flow"):
        diffusion = DiffusionConfig(noise_schedule=path, prediction=prediction)
        time = torch.tensor([t], dtype=torch.float64)
        noisy, said = random(seed, 0), random(seed, 1)
        found = walk(1, diffusion).to_x0_and_noise(noisy, said, time)
        expected = to_x0_and_noise(noisy, said, time, diffusion)
        torch.testing.assert_close(found.x0, expected.x0)
        torch.testing.assert_close(found.noise, expected.noise, rtol=1e-6, atol=1e-6)
