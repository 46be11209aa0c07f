"""How much of the machine's matrix speed encoding reaches: pictures through an autoencoder beside a bare matrix product.

    python benchmarks/codec.py [--width 64] [--size 128]

The product is the network's convolution at full size, written as a matrix: pixels x (9 width) x width.
"""

import json
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from transfusion.codecs.autoencoder import build_network, encode_raw
from transfusion.config import AutoencoderConfig


@dataclass
class Options:
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    size: int = 128
    pictures: int = 4
    rounds: int = 7


def main(options: Options) -> None:
    """Both in turn, so that a machine that slows down slows both."""
    config = AutoencoderConfig(width=options.width, multipliers=options.multipliers, blocks=1)
    network = build_network(config, 0).eval().requires_grad_(False)
    chance = np.random.default_rng(0)
    pictures = list(chance.integers(0, 256, (options.pictures, options.size, options.size, 3), dtype=np.uint8))
    with FlopCounterMode(display=False) as counter:
        encode_raw(network, pictures)
    flops = counter.get_total_flops()
    pixels = options.pictures * options.size**2
    a, b = torch.randn(pixels, 9 * options.width), torch.randn(9 * options.width, options.width)
    encoding, product = [], []
    for _ in range(options.rounds):
        begun = time.perf_counter()
        encode_raw(network, pictures)
        encoding.append(flops / (time.perf_counter() - begun))
        begun = time.perf_counter()
        for _ in range(4):
            a @ b
        product.append(4 * 2 * pixels * 9 * options.width**2 / (time.perf_counter() - begun))
    reached, best = statistics.median(encoding), statistics.median(product)
    print(json.dumps({
        "width": options.width, "multipliers": options.multipliers, "size": options.size,
        "threads": torch.get_num_threads(), "pictures_per_second": round(reached / flops * options.pictures, 2),
        "encoding_gflops": round(reached / 1e9, 1), "product_gflops": round(best / 1e9, 1),
        "of_product": round(reached / best, 3),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
