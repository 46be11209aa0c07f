"""Drawing: denoising steps behind a cached prompt beside reading everything again, and seconds an image by each sampler."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.made import engine
from benchmarks.measuring import Figure, Setting, in_turn, timed
from transfusion.config import GenerationConfig
from transfusion.inference import image_mode, text_mode
from transfusion.inference.cache import Cache
from transfusion.inference.engine import Engine, Request
from transfusion.parallel import lower_precision, precision
from transfusion.sequence import Document, Image, Row, Text, collate, encode_document

PREFIX, SHAPE = 200, (8, 8)  # tokens before each image; of its latent
CAPTION = "a large red circle above a small blue square"
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the largest number: how far both ways may be from one another
SAMPLERS = (("ddpm", 250), ("ddim", 50), ("dpm", 20))


def measure(setting: Setting) -> Iterator[Figure]:
    """With the unconditional branch of guidance, as drawings are made."""
    artist, images = engine("shapes", setting), setting.pick(16, 2)
    generator = torch.Generator(setting.device).manual_seed(0)
    torch.nn.init.normal_(artist.model.patches.proj_out.weight, generator=generator)  # a new model says 0 everywhere
    yield from a_step(artist, images, setting)
    yield from whole_drawings(artist, images, setting)


@torch.inference_mode()
def a_step(artist: Engine, images: int, setting: Setting) -> Iterator[Figure]:
    """So many images at once, each behind its own prompt. RuntimeError when both ways do not say the same."""
    model, vocabulary, device = artist.model, artist.vocabulary, setting.device
    chance = torch.Generator().manual_seed(0)
    words = torch.randint(0, vocabulary.num_text_tokens, (images, PREFIX), generator=chance).tolist()
    noisy = torch.randn(2 * images, model.config.latent_channels, *SHAPE, generator=chance).to(device)  # (B, C, Y, X)
    t = torch.full((len(noisy),), 0.5, device=device)
    prompts = [Document((Text(tuple(tokens)),)) for tokens in words] + [Document(())] * images

    cache = Cache(model.config, device, precision(device))
    slots = [cache.acquire() for _ in prompts]
    chunks = [encode_document(prompt, vocabulary, ends=False).append(vocabulary.boi[SHAPE]) for prompt in prompts]

    def prompts_read():
        with lower_precision(device):
            return text_mode.prefill(model, cache, slots, chunks, vocabulary)

    prefill = timed(prompts_read, device)

    whole = []  # with their prompts, and without: each group as long as it needs to be
    for group in (slice(0, images), slice(images, None)):
        documents = [replace(d, segments=(*d.segments, Image(x.cpu().numpy()))) for d, x in
                     zip(prompts[group], noisy[group], strict=True)]  # fmt: skip
        laid = [encode_document(document, vocabulary, ends=False) for document in documents]
        whole.append((collate([Row((p,)) for p in laid], len(laid[0]), vocabulary).to(device), noisy[group], t[group]))

    def with_cache():
        with lower_precision(device):
            return image_mode.predict(model, cache, slots, noisy, t)

    def again():
        with lower_precision(device):
            return torch.cat([model(batch, [x], [time]).images[0] for batch, x, time in whole])

    difference = (with_cache() - again()).abs().max().item()
    if not difference <= NEAR[precision(device)] * again().abs().max().item():
        raise RuntimeError(f"with the cache a denoising step says something else than without: by {difference:.3g}")
    seconds = in_turn({"cache": with_cache, "again": again}, setting.pick(20, 1), device)
    ratio = seconds["again"] / seconds["cache"]
    what = f"a step of {images} images behind {PREFIX} tokens"
    yield Figure(what, 1e3 * seconds["cache"], "ms", ratio, "reading everything again")
    yield Figure("  reading the prompts, once", 1e3 * prefill, "ms")


def whole_drawings(artist: Engine, images: int, setting: Setting) -> Iterator[Figure]:
    """From a caption to pixels, so many at once."""

    def drawn(sampler: str, steps: int):
        generation = GenerationConfig(sampler, steps=setting.pick(steps, 2), guidance_scale=3.0)
        return lambda: artist.generate([Request((CAPTION,), num_images=images, generation=generation)])

    seconds = in_turn({sampler: drawn(sampler, steps) for sampler, steps in SAMPLERS}, setting.pick(3, 1), setting.device, 0)
    for sampler, steps in SAMPLERS:
        ratio = seconds["ddpm"] / seconds[sampler]
        what = f"an image by {sampler}, {steps} steps, guided"
        yield Figure(what, seconds[sampler] / images, "s", ratio, "ddpm, 250 steps")
