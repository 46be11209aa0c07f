"""What the cache buys: denoising steps behind a cached prompt beside steps that read the whole sequence again.

    python benchmarks/drawing.py [--run shapes] [--prefix 200] [--images 16]

Both do the same work: so many images at once, each behind its own prompt, with the unconditional branch of guidance.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace

import torch
import tyro
from training import timed

from transfusion.config import named_run
from transfusion.inference import image_mode, text_mode
from transfusion.inference.cache import Cache
from transfusion.model.transfusion import build
from transfusion.parallel import pick_device
from transfusion.sequence import Document, Image, Row, Text, Vocabulary, collate, lay_out


@dataclass
class Options:
    run: str = "shapes"
    prefix: int = 200
    images: int = 16
    steps: int = 20
    device: str = "auto"


@torch.inference_mode()
def main(options: Options) -> None:
    """Both ways in turn, and a check that they say the same."""
    device = pick_device(options.device)
    config = replace(named_run(options.run).model, vocabulary=512)
    model = build(config, 0, device)
    torch.nn.init.normal_(model.patches.outward.weight, generator=torch.Generator(device).manual_seed(0))
    vocabulary = Vocabulary.build(400, [(8, 8)], config.patch_size)
    chance = torch.Generator().manual_seed(0)
    words = torch.randint(0, 400, (options.images, options.prefix), generator=chance).tolist()
    noisy = torch.randn(2 * options.images, config.latent_channels, 8, 8, generator=chance).to(device)
    t = torch.full((len(noisy),), 0.5, device=device)
    prompts = [Document((Text(tuple(tokens)),)) for tokens in words] + [Document(())] * options.images

    cache = Cache(config, device)
    slots = [cache.acquire() for _ in prompts]
    pieces = [lay_out(prompt, vocabulary, ends=False).followed_by(vocabulary.boi[8, 8]) for prompt in prompts]
    begun = time.perf_counter()
    text_mode.read(model, cache, slots, pieces, vocabulary)
    prefill = time.perf_counter() - begun

    whole = []  # with their prompts, and without: each group as long as it needs to be
    for group in (slice(0, options.images), slice(options.images, None)):
        documents = [replace(d, segments=(*d.segments, Image(x.cpu().numpy()))) for d, x in
                     zip(prompts[group], noisy[group], strict=True)]  # fmt: skip
        laid = [lay_out(document, vocabulary, ends=False) for document in documents]
        whole.append((collate([Row((p,)) for p in laid], len(laid[0]), vocabulary).to(device), noisy[group], t[group]))

    def with_cache():
        return image_mode.predict(model, cache, slots, noisy, t)

    def again():
        return torch.cat([model(batch, [x], [time_]).images[0] for batch, x, time_ in whole])

    difference = (with_cache() - again()).abs().max().item()
    seconds = {"with_cache": [], "again": []}
    for _ in range(options.steps):
        seconds["with_cache"].append(timed(with_cache, device))
        seconds["again"].append(timed(again, device))
    step, full = (statistics.median(found) for found in seconds.values())
    print(json.dumps({
        "run": options.run, "device": str(device), "threads": torch.get_num_threads(), "prefix": options.prefix,
        "images": options.images, "largest_difference": difference, "prefill_ms": round(prefill * 1e3, 2),
        "step_with_cache_ms": round(step * 1e3, 2), "step_again_ms": round(full * 1e3, 2),
        "times_faster": round(full / step, 2),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
