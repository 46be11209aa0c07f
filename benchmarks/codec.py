"""FLOP/s of encoding images with an autoencoder, against a plain matrix product.

The product is the network's convolution at full resolution as a matrix: pixels x (9 width) x width. Data are prepared on
the CPU, so this part measures the CPU.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Figure, Setting, time_alternately
from transfusion.codecs.autoencoder import build_network, encode_raw
from transfusion.codecs.config import AutoencoderConfig

NUM_MATMULS = 4


def measure(setting: Setting) -> Iterator[Figure]:
    width, size, count = setting.pick(64, 8), setting.pick(128, 32), 4
    config = AutoencoderConfig(width=width, multipliers=(1, 2, 2, 2), blocks=1)
    network = build_network(config, 0).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    with FlopCounterMode(display=False) as counter:
        encode_raw(network, images)
    pixels = count * size**2
    a, b = torch.randn(pixels, 9 * width), torch.randn(9 * width, width)

    def run_matmuls():
        for _ in range(NUM_MATMULS):
            a @ b

    functions = {"encoding": lambda: encode_raw(network, images), "matmul": run_matmuls}
    seconds = time_alternately(functions, setting.pick(7, 1), torch.device("cpu"), warmup=0)
    encoding_flops = counter.get_total_flops() / seconds["encoding"]
    matmul_flops = NUM_MATMULS * 2 * pixels * 9 * width**2 / seconds["matmul"]
    yield Figure(f"{size}x{size}, an autoencoder of width {width}", count / seconds["encoding"], "images/s")
    yield Figure("  FLOPs", encoding_flops / 1e9, "GFLOP/s", encoding_flops / matmul_flops, "its convolution as a matmul")
