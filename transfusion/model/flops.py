"""FLOPs of a training step: all multiplications and additions of its matrix products, counted on the real batch."""

from dataclasses import replace

import torch

from transfusion.config import ModelConfig
from transfusion.gpus import find_gpu
from transfusion.model.mask import packed_mask
from transfusion.model.patches import TIME_FEATURES
from transfusion.model.transfusion import build_on_meta, count_parameters
from transfusion.model.unet import count_unet_macs
from transfusion.sequence import Batch

BACKWARD_PER_FORWARD = 2  # a backward pass costs two forward passes


def find_peak_tflops(device: torch.device) -> float | None:
    """The dense bfloat16 peak of a GPU in TFLOP/s; None for a CPU and for a GPU that is not in `GPUS`."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu and gpu.tflops


def count_usual_flops(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of forward and backward for one position in the usual convention, 6 N + 12 l w L (PaLM, arXiv 2204.02311,
    appendix B): every weight is used at every position, and attention counts all L keys, masked or not. Of untied weights N
    counts those of one side: no position uses both."""
    parameters = count_parameters(build_on_meta(replace(config, untied="none")))
    return 6 * parameters + 12 * config.layers * config.heads * config.head_size * seq_len


def count_training_flops(batch: Batch, config: ModelConfig) -> int:
    """FLOPs of forward and backward for one batch. Padding is not counted; attention counts only unmasked pairs. Untied
    weights change nothing: each position uses those of its side."""
    mask = packed_mask(batch.document_ids, batch.image_ids, config.image_attention, batch.clean_starts)
    pairs = mask.count_pairs(batch.document_ids >= 0)
    forward = (
        2 * count_block_weights(config) * config.layers * batch.positions
        + 4 * config.heads * config.head_size * config.layers * pairs  # queries @ keys, weights @ values
        + 2 * config.width * config.vocab_size * batch.text_count
        + sum(2 * count_patch_macs(config, group.x0.shape[2:]) * len(group.index) for group in batch.groups)
    )
    return (1 + BACKWARD_PER_FORWARD) * forward


def count_block_weights(config: ModelConfig) -> int:
    """Weights in the matrices of one transformer block that a position uses."""
    heads = 2 * config.heads + 2 * config.num_kv_heads  # query and output; key and value
    return config.width * (heads * config.head_size + 3 * config.feed_forward_size)


def count_patch_macs(config: ModelConfig, shape: tuple[int, int]) -> int:
    """Multiply-accumulates of the patch layers for one latent of shape (Y, X)."""
    if config.patches == "unet":
        return count_unet_macs(config, shape)
    latent_size = config.latent_channels * shape[0] * shape[1]
    return config.width * (2 * latent_size + TIME_FEATURES + config.width)
