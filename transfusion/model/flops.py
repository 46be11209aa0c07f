"""What a forward pass costs: every multiplication and addition of its matrix products, counted on the real batch."""

from transfusion.config import ModelConfig
from transfusion.model.mask import packed
from transfusion.model.patches import FREQUENCIES
from transfusion.sequence import Batch

BACKWARD = 2  # a backward pass costs twice its forward pass


def training_flops(batch: Batch, config: ModelConfig) -> int:
    """Forward and backward over one batch. Padding counts nothing; attention counts the pairs that the mask lets through."""
    attended = packed(batch.document, batch.image, config.image_attention).pairs(batch.document >= 0)
    images = sum(len(group.index) for group in batch.groups)
    patches = sum(group.index.numel() for group in batch.groups)
    forward = (
        2 * block_weights(config) * config.layers * batch.positions
        + 4 * config.heads * config.size_of_head * config.layers * attended  # queries by keys, weights by values
        + 2 * config.width * config.vocabulary * batch.text_count
        + 4 * config.width * config.patch_width * patches
        + 2 * config.width * (FREQUENCIES + config.width) * images
    )
    return (1 + BACKWARD) * forward


def block_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of one block."""
    heads = 2 * config.heads + 2 * config.num_kv_heads
    return config.width * (heads * config.size_of_head + 3 * config.size_of_hidden)
