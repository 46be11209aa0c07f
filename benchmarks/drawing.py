"""Image generation by the engine: denoising steps against recomputing the prompts, and seconds per image by sampler."""

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.fixtures import make_engine
from benchmarks.timing import Figure, Setting, time_alternately, time_call
from transfusion.config import GenerationConfig
from transfusion.diffusion import to_x0_and_noise
from transfusion.inference.engine import Engine, Request
from transfusion.inference.image_mode import LatentImageState
from transfusion.parallel import lower_precision, precision
from transfusion.sequence import Document, Image, Row, Text, collate, encode_document

PROMPT_LENGTH, SCALE = 200, 3.0  # tokens before each image; of guidance
CAPTION = "a large red circle above a small blue square"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # relative to the largest value
SAMPLERS = (("ddpm", 250), ("ddim", 50), ("dpm", 20), ("dpm-sde", 20))


def measure(setting: Setting) -> Iterator[Figure]:
    """All figures include the unconditional branch of guidance."""
    engine, num_images = make_engine("shapes", setting), setting.pick(16, 2)
    generator = torch.Generator(setting.device).manual_seed(0)
    torch.nn.init.normal_(engine.model.patches.proj_out.weight, generator=generator)  # zero in a new model
    yield from measure_step(engine, num_images, setting)
    yield from measure_images(engine, num_images, setting)


def measure_step(engine: Engine, num_images: int, setting: Setting) -> Iterator[Figure]:
    """Time one step of an engine that draws several images with different prompts. RuntimeError if the x0 that it predicts
    differs from that of whole sequences."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, engine.vocabulary.num_text_tokens, (num_images, PROMPT_LENGTH), generator=generator).tolist()
    prompts = [Text(tuple(ids)) for ids in tokens]
    generation = GenerationConfig("ddim", guidance_scale=SCALE)  # more steps than are measured
    for seed, prompt in enumerate(prompts):
        engine.submit(Request((prompt,), num_images=1, seed=seed, size=engine.sizes[0], generation=generation))
    first_seconds = time_call(engine.step, setting.device)
    images = [sequence.phase.image for sequence in engine.sequences]
    predict_uncached = build_uncached(engine, images, prompts)
    expected = predict_uncached()
    engine.step()
    actual = torch.stack([image.x0 for image in images])
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE[precision(setting.device)] * largest:
        raise RuntimeError(f"x0 of a denoising step with and without the cache differs by {difference:.3g}")
    functions = {"cached": engine.step, "uncached": predict_uncached}
    seconds = time_alternately(functions, setting.pick(20, 1), setting.device)
    for request_id in {sequence.request_id for sequence in engine.sequences}:
        engine.cancel(request_id)
    ratio = seconds["uncached"] / seconds["cached"]
    name = f"a step of {num_images} images after {PROMPT_LENGTH} tokens"
    yield Figure(name, 1e3 * seconds["cached"], "ms", ratio, "without a cache")
    yield Figure("  the first step, with the prompts", 1e3 * first_seconds, "ms")


def build_uncached(
    engine: Engine, images: Sequence[LatentImageState], prompts: Sequence[Text]
) -> Callable[[], torch.Tensor]:
    """A function that predicts the x0 (N, C, Y, X) of the images at their present step from whole sequences."""
    vocabulary, device = engine.vocabulary, engine.device
    x_t = torch.stack([image.x_t for image in images])  # (N, C, Y, X)
    t = x_t.new_tensor([image.update.t for image in images])  # (N,)
    batches = []  # with the prompts, and without: rows of one batch have the same length
    for prefixes in ([(prompt,) for prompt in prompts], [()] * len(images)):
        chunks = [
            encode_document(Document((*prefix, Image(latent.cpu().numpy()))), vocabulary, add_eos=False)
            for prefix, latent in zip(prefixes, x_t, strict=True)
        ]
        batches.append(collate([Row((chunk,)) for chunk in chunks], len(chunks[0]), vocabulary).to(device))

    @torch.inference_mode()
    def predict() -> torch.Tensor:
        with lower_precision(device):
            cond, uncond = (engine.model(batch, [x_t], [t]).images[0].to(x_t.dtype) for batch in batches)
        x0 = to_x0_and_noise(x_t, uncond + SCALE * (cond - uncond), t, engine.run.diffusion).x0
        return x0.clamp(*engine.latent_range)

    return predict


def measure_images(engine: Engine, num_images: int, setting: Setting) -> Iterator[Figure]:
    """Time a batch of images from caption to pixels."""

    def drawer(sampler: str, steps: int):
        generation = GenerationConfig(sampler, steps=setting.pick(steps, 2), guidance_scale=SCALE)
        return lambda: engine.generate([Request((CAPTION,), num_images=num_images, generation=generation)])

    functions = {sampler: drawer(sampler, steps) for sampler, steps in SAMPLERS}
    seconds = time_alternately(functions, setting.pick(3, 1), setting.device, warmup=0)
    for sampler, steps in SAMPLERS:
        ratio = seconds["ddpm"] / seconds[sampler]
        name = f"an image by {sampler}, {steps} steps, guided"
        yield Figure(name, seconds[sampler] / num_images, "s", ratio, "ddpm, 250 steps")
