"""The configs of a codec that is trained here: its network and its training. Imports nothing heavy."""

from dataclasses import dataclass

from transfusion.config import check_at_least_1


@dataclass(frozen=True)
class AutoencoderConfig:
    """The convolutional network between pixels and latents (section 4.1). The defaults are the paper's, 86M parameters.

    With `codes` it has a codebook instead of a latent distribution: the VQ codec of the paper's Chameleon baseline, with
    16,384 codes.
    """

    channels: int = 8  # of a latent
    width: int = 128  # channels at full resolution
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the width at each resolution; f = 2 ** (len(multipliers) - 1)
    blocks: int = 2  # residual blocks at each resolution; the decoder has one more
    attention: bool = True  # over all positions, at the lowest resolution
    image_channels: int = 3
    codes: int | None = None  # in the codebook, each a vector of `channels` numbers; None: no codebook, continuous latents

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
    """Training of a codec (section 4.1: L1 + LPIPS + 0.5 GAN + 0.2 identity + 1e-6 KL). Learning rates are VQGAN's.

    With a codebook, codebook loss + 0.25 commitment replace KL (appendix A).
    """

    steps: int = 1_000_000
    batch_size: int = 32  # images per step, over all processes
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int = 1_000
    betas: tuple[float, float] = (0.5, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0  # moves the codes to the encoder's output
    commitment: float = 0.25  # moves the encoder's output to its codes
    revive_after: int = 100  # steps without use after which a code is replaced by a latent of the step
    perceptual: str | None = None  # a .safetensors or .pth file with the VGG-16 of LPIPS; None: without this loss
    identity: str | None = None  # a .safetensors or .pth file with the ResNet-50 of MoCo v2; None: without this loss
    identity_weight: float = 0.2
    gan_weight: float = 0.5
    gan_from: int | None = None  # the first step that uses the patch discriminator; None: never
    seed: int = 0
    heldout: int = 256  # held-out images, at most a tenth of all
    checkpoint_every: int = 1_000
    keep_checkpoints: int = 2
    validate_every: int = 1_000
    log_every: int = 10

    def __post_init__(self):
        check_at_least_1(
            self, "training.", "steps", "batch_size", "revive_after", "checkpoint_every", "keep_checkpoints",
            "validate_every", "log_every", "heldout",
        )  # fmt: skip
