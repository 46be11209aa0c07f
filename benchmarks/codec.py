"""How much of the processor's matrix speed encoding reaches: pictures through an autoencoder beside a bare matrix product.

The product is the network's convolution at full size, written as a matrix: pixels x (9 width) x width. Data are prepared
on the CPU, so this is measured there.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Figure, Setting, in_turn
from transfusion.codecs.autoencoder import build_network, encode_raw
from transfusion.codecs.config import AutoencoderConfig

TIMES = 4


def measure(setting: Setting) -> Iterator[Figure]:
    """Both in turn."""
    width, size, count = setting.pick(64, 8), setting.pick(128, 32), 4
    config = AutoencoderConfig(width=width, multipliers=(1, 2, 2, 2), blocks=1)
    network = build_network(config, 0).eval().requires_grad_(False)
    chance = np.random.default_rng(0)
    pictures = list(chance.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    with FlopCounterMode(display=False) as counter:
        encode_raw(network, pictures)
    pixels = count * size**2
    a, b = torch.randn(pixels, 9 * width), torch.randn(9 * width, width)

    def product():
        for _ in range(TIMES):
            a @ b

    ways = {"encoding": lambda: encode_raw(network, pictures), "product": product}
    seconds = in_turn(ways, setting.pick(7, 1), torch.device("cpu"), warm=0)
    reached = counter.get_total_flops() / seconds["encoding"]
    bare = TIMES * 2 * pixels * 9 * width**2 / seconds["product"]
    yield Figure(f"{size}x{size}, an autoencoder of width {width}", count / seconds["encoding"], "pictures/s")
    yield Figure("  FLOPs", reached / 1e9, "GFLOP/s", reached / bare, "its convolution, a product")
