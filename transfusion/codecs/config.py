"""The configs of a codec that is trained here: its network and its training. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transfusion.fields import (
    Config,
    Decay,
    Epsilon,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Size,
)


@dataclass(frozen=True)
class AutoencoderConfig(Config, part="network."):
    """The convolutional network between pixels and latents (section 4.1). The defaults are the paper's, 86M parameters.

    With `codes` it has a codebook instead of a latent distribution: the VQ codec of the paper's Chameleon baseline, with
    16,384 codes.
    """

    channels: Size = 8  # Channels of a latent.
    width: Annotated[int, Range(at_least=1, limit=2**16)] = 128  # Channels of the network at full resolution.
    # Width factors, one per resolution; n of them downsample by 2 ** (n - 1).
    multipliers: tuple[Annotated[int, Range(at_least=1, limit=1024)], ...] = (1, 2, 4, 4)
    blocks: Size = 2  # Residual blocks at each resolution; the decoder has one more.
    attention: bool = True  # Use self-attention at the lowest resolution.
    image_channels: Literal[1, 3] = 3  # Channels of the images: 3, or 1 for grey.
    # Number of codes of a VQ codec, each of `channels` numbers; latents are continuous if not set.
    codes: Annotated[int, Range(at_least=2, limit=2**24)] | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(self.multipliers) <= 16:
            raise ValueError(f"network.multipliers must be 1 to 16 numbers, one per resolution, not {len(self.multipliers)}")

    @property
    def downsampling(self) -> int:
        """f: pixels along one side of a latent pixel."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class CodecTrainingConfig(Config, part="training."):
    """Training of a codec (section 4.1: L1 + LPIPS + 0.5 GAN + 0.2 identity + 1e-6 KL). Learning rates are VQGAN's. With a
    codebook, codebook loss + 0.25 commitment replace KL (appendix A)."""

    steps: PositiveInt = 1_000_000  # Number of optimizer steps.
    batch_size: PositiveInt = 32  # Images per step, over all processes.
    learning_rate: NonNegativeFloat = 1e-4  # Peak learning rate of AdamW.
    min_learning_rate: NonNegativeFloat = 1e-5  # Learning rate at the last step, after cosine decay.
    warmup_steps: NonNegativeInt = 1_000  # Steps in which the learning rate rises linearly from 0.
    betas: tuple[Decay, Decay] = (0.5, 0.9)  # AdamW's decay rates of the two moments.
    eps: Epsilon = 1e-8  # AdamW's epsilon.
    weight_decay: NonNegativeFloat = 0.0  # AdamW's weight decay.
    max_grad_norm: PositiveFloat = 1.0  # Gradients with a larger norm are scaled down to it.
    ema_decay: Decay = 0.999  # Decay per step of the moving average of the weights.
    kl_weight: NonNegativeFloat = 1e-6  # Weight of the KL loss; a VQ codec has none.
    codebook_weight: NonNegativeFloat = 1.0  # Weight of the loss that moves the codes to the encoder's output.
    commitment: NonNegativeFloat = 0.25  # Weight of the loss that moves the encoder's output to its codes.
    revive_after: PositiveInt = 100  # Steps without use after which a code is replaced by a latent of the step.
    perceptual: str | None = None  # File (.safetensors, .pth) with the VGG-16 of LPIPS; no LPIPS loss if not set.
    identity: str | None = None  # File (.safetensors, .pth) with the ResNet-50 of MoCo v2; no identity loss if not set.
    identity_weight: NonNegativeFloat = 0.2  # Weight of the identity loss.
    gan_weight: NonNegativeFloat = 0.5  # Weight of the adversarial loss.
    gan_from: NonNegativeInt | None = None  # First step with the patch discriminator; no discriminator if not set.
    seed: Seed = 0  # Seed of weights, image order and noise.
    heldout: PositiveInt = 256  # Number of held-out images; never more than a tenth of all.
    checkpoint_every: PositiveInt = 1_000  # Steps between checkpoints.
    keep_checkpoints: PositiveInt = 2  # Number of latest checkpoints to keep.
    validate_every: PositiveInt = 1_000  # Steps between evaluations on held-out images.
    log_every: PositiveInt = 10  # Steps between lines of metrics.jsonl.
