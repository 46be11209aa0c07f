"""The configs of a codec that is trained here: its network and its training. Imports nothing heavy."""

from dataclasses import dataclass

from transfusion.config import check_at_least_1


@dataclass(frozen=True)
class AutoencoderConfig:
    """The convolutional network between pixels and latents (section 4.1). The defaults are the paper's, 86M parameters.

    With `codes` it has a codebook instead of a latent distribution: the VQ codec of the paper's Chameleon baseline, with
    16,384 codes.
    """

    channels: int = 8  # Channels of a latent.
    width: int = 128  # Channels of the network at full resolution.
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # Width factors, one per resolution; n of them downsample by 2 ** (n - 1).
    blocks: int = 2  # Residual blocks at each resolution; the decoder has one more.
    attention: bool = True  # Use self-attention at the lowest resolution.
    image_channels: int = 3  # Channels of the images: 3, or 1 for grey.
    codes: int | None = None  # Number of codes of a VQ codec, each of `channels` numbers; latents are continuous if not set.

    def __post_init__(self):
        check_at_least_1(self, "network.", "channels", "width", "blocks")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"network.multipliers {self.multipliers}: give one whole number of at least 1 per resolution")
        if self.image_channels not in (1, 3):
            raise ValueError(f"network.image_channels must be 1 or 3, not {self.image_channels}")
        if self.codes is not None and self.codes < 2:
            raise ValueError(f"network.codes must be at least 2, not {self.codes}")

    @property
    def downsampling(self) -> int:
        """f: pixels along one side of a latent pixel."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class CodecTrainingConfig:
    """Training of a codec (section 4.1: L1 + LPIPS + 0.5 GAN + 0.2 identity + 1e-6 KL). Learning rates are VQGAN's. With a
    codebook, codebook loss + 0.25 commitment replace KL (appendix A)."""

    steps: int = 1_000_000  # Number of optimizer steps.
    batch_size: int = 32  # Images per step, over all processes.
    learning_rate: float = 1e-4  # Peak learning rate of AdamW.
    min_learning_rate: float = 1e-5  # Learning rate at the last step, after cosine decay.
    warmup_steps: int = 1_000  # Steps in which the learning rate rises linearly from 0.
    betas: tuple[float, float] = (0.5, 0.9)  # AdamW's decay rates of the two moments.
    eps: float = 1e-8  # AdamW's epsilon.
    weight_decay: float = 0.0  # AdamW's weight decay.
    max_grad_norm: float = 1.0  # Gradients with a larger norm are scaled down to it.
    ema_decay: float = 0.999  # Decay per step of the moving average of the weights.
    kl_weight: float = 1e-6  # Weight of the KL loss; a VQ codec has none.
    codebook_weight: float = 1.0  # Weight of the loss that moves the codes to the encoder's output.
    commitment: float = 0.25  # Weight of the loss that moves the encoder's output to its codes.
    revive_after: int = 100  # Steps without use after which a code is replaced by a latent of the step.
    perceptual: str | None = None  # File (.safetensors, .pth) with the VGG-16 of LPIPS; no LPIPS loss if not set.
    identity: str | None = None  # File (.safetensors, .pth) with the ResNet-50 of MoCo v2; no identity loss if not set.
    identity_weight: float = 0.2  # Weight of the identity loss.
    gan_weight: float = 0.5  # Weight of the adversarial loss.
    gan_from: int | None = None  # First step with the patch discriminator; no discriminator if not set.
    seed: int = 0  # Seed of weights, image order and noise.
    heldout: int = 256  # Number of held-out images; never more than a tenth of all.
    checkpoint_every: int = 1_000  # Steps between checkpoints.
    keep_checkpoints: int = 2  # Number of latest checkpoints to keep.
    validate_every: int = 1_000  # Steps between evaluations on held-out images.
    log_every: int = 10  # Steps between lines of metrics.jsonl.

    def __post_init__(self):
        check_at_least_1(
            self, "training.", "steps", "batch_size", "revive_after", "checkpoint_every", "keep_checkpoints",
            "validate_every", "log_every", "heldout",
        )  # fmt: skip
