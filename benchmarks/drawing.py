"""Image generation: denoising steps with a cached prompt against recomputing it, and seconds per image by sampler."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.fixtures import make_engine
from benchmarks.timing import Figure, Setting, time_alternately, time_call
from transfusion.config import GenerationConfig
from transfusion.inference import image_mode, text_mode
from transfusion.inference.cache import Cache
from transfusion.inference.engine import Engine, Request
from transfusion.parallel import lower_precision, precision
from transfusion.sequence import Document, Image, Row, Text, collate, encode_document

PROMPT_LENGTH, LATENT_SHAPE = 200, (8, 8)
CAPTION = "a large red circle above a small blue square"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # relative to the largest value
SAMPLERS = (("ddpm", 250), ("ddim", 50), ("dpm", 20))


def measure(setting: Setting) -> Iterator[Figure]:
    """All figures include the unconditional branch of guidance."""
    engine, num_images = make_engine("shapes", setting), setting.pick(16, 2)
    generator = torch.Generator(setting.device).manual_seed(0)
    torch.nn.init.normal_(engine.model.patches.proj_out.weight, generator=generator)  # zero in a new model
    yield from measure_step(engine, num_images, setting)
    yield from measure_images(engine, num_images, setting)


@torch.inference_mode()
def measure_step(engine: Engine, num_images: int, setting: Setting) -> Iterator[Figure]:
    """Time one denoising step of several images with different prompts. RuntimeError if both predictions differ."""
    model, vocabulary, device = engine.model, engine.vocabulary, setting.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary.num_text_tokens, (num_images, PROMPT_LENGTH), generator=generator).tolist()
    x_t = torch.randn(2 * num_images, model.config.latent_channels, *LATENT_SHAPE, generator=generator).to(device)
    t = torch.full((len(x_t),), 0.5, device=device)
    prompts = [Document((Text(tuple(ids)),)) for ids in tokens] + [Document(())] * num_images

    cache = Cache(model.config, device, precision(device))
    slots = [cache.acquire() for _ in prompts]
    chunks = [encode_document(prompt, vocabulary, add_eos=False).append(vocabulary.boi[LATENT_SHAPE]) for prompt in prompts]

    def prefill():
        with lower_precision(device):
            return text_mode.extend_cache(model, cache, slots, chunks, vocabulary)

    prefill_seconds = time_call(prefill, device)

    groups = []  # conditional and unconditional: rows of one group have the same length
    for group in (slice(0, num_images), slice(num_images, None)):
        documents = [replace(d, segments=(*d.segments, Image(x.cpu().numpy()))) for d, x in
                     zip(prompts[group], x_t[group], strict=True)]  # fmt: skip
        full_chunks = [encode_document(document, vocabulary, add_eos=False) for document in documents]
        batch = collate([Row((chunk,)) for chunk in full_chunks], len(full_chunks[0]), vocabulary).to(device)
        groups.append((batch, x_t[group], t[group]))

    def predict_cached():
        with lower_precision(device):
            return image_mode.predict(model, cache, slots, x_t, t)

    def predict_uncached():
        with lower_precision(device):
            return torch.cat([model(batch, [latents], [time]).images[0] for batch, latents, time in groups])

    difference = (predict_cached() - predict_uncached()).abs().max().item()
    if not difference <= TOLERANCE[precision(device)] * predict_uncached().abs().max().item():
        raise RuntimeError(f"the predictions of a denoising step with and without the cache differ by {difference:.3g}")
    functions = {"cached": predict_cached, "uncached": predict_uncached}
    seconds = time_alternately(functions, setting.pick(20, 1), device)
    ratio = seconds["uncached"] / seconds["cached"]
    name = f"a step of {num_images} images after {PROMPT_LENGTH} tokens"
    yield Figure(name, 1e3 * seconds["cached"], "ms", ratio, "without a cache")
    yield Figure("  prefill of the prompts, once", 1e3 * prefill_seconds, "ms")


def measure_images(engine: Engine, num_images: int, setting: Setting) -> Iterator[Figure]:
    """Time a batch of images from caption to pixels."""

    def drawer(sampler: str, steps: int):
        generation = GenerationConfig(sampler, steps=setting.pick(steps, 2), guidance_scale=3.0)
        return lambda: engine.generate([Request((CAPTION,), num_images=num_images, generation=generation)])

    functions = {sampler: drawer(sampler, steps) for sampler, steps in SAMPLERS}
    seconds = time_alternately(functions, setting.pick(3, 1), setting.device, warmup=0)
    for sampler, steps in SAMPLERS:
        ratio = seconds["ddpm"] / seconds[sampler]
        name = f"an image by {sampler}, {steps} steps, guided"
        yield Figure(name, seconds[sampler] / num_images, "s", ratio, "ddpm, 250 steps")
