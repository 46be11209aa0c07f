"""What a forward pass costs: every multiplication and addition of its matrix products, counted on the real batch."""

from transfusion.config import ModelConfig
from transfusion.model.mask import packed_mask
from transfusion.model.patches import FREQUENCIES
from transfusion.model.unet import unet_products
from transfusion.sequence import Batch

BACKWARD = 2  # a backward pass costs twice its forward pass


def training_flops(batch: Batch, config: ModelConfig) -> int:
    """Forward and backward over one batch. Padding counts nothing; attention counts the pairs that the mask lets through."""
    attended = packed_mask(batch.document_ids, batch.image_ids, config.image_attention).count_pairs(batch.document_ids >= 0)
    forward = (
        2 * block_weights(config) * config.layers * batch.positions
        + 4 * config.heads * config.head_size * config.layers * attended  # queries by keys, weights by values
        + 2 * config.width * config.vocab_size * batch.text_count
        + sum(2 * patch_products(config, group.x0.shape[2:]) * len(group.index) for group in batch.groups)
    )
    return (1 + BACKWARD) * forward


def block_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of one block."""
    heads = 2 * config.heads + 2 * config.num_kv_heads
    return config.width * (heads * config.head_size + 3 * config.feed_forward_size)


def patch_products(config: ModelConfig, shape: tuple[int, int]) -> int:
    """Multiplications of the layers in and out for one image of shape (Y, X)."""
    if config.patches == "unet":
        return unet_products(config, shape)
    numbers = config.latent_channels * shape[0] * shape[1]
    return config.width * (2 * numbers + FREQUENCIES + config.width)
