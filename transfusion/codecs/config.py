"""The numbers of a codec that is trained here: its network and its training. Imports nothing heavy."""

from dataclasses import dataclass

from transfusion.config import check_at_least_1


@dataclass(frozen=True)
class AutoencoderConfig:
    """The convolutional network between pixels and latents (section 4.1). These numbers are the paper's 86M parameters.

    With `codes` it has a codebook instead of a distribution: the VQ twin for the paper's Chameleon baseline, 16,384 there.
    """

    channels: int = 8  # of a latent
    width: int = 128  # channels at full size
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the width at each size; f = 2 ** (how many - 1)
    blocks: int = 2  # residual blocks at each size, one more on the way back
    attention: bool = True  # over all positions, at the smallest size
    image_channels: int = 3
    codes: int | None = None  # in the codebook, each of `channels` numbers; None: none, latents are continuous

    def __post_init__(self):
        check_at_least_1(self, "network.", "channels", "width", "blocks")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError("network.multipliers must be whole numbers from 1 up, one for each size")
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
    """How an autoencoder learns (section 4.1: L1 + LPIPS + 0.5 GAN + 0.2 identity + 1e-6 KL). Rates: VQGAN's.

    With a codebook, codebook loss + 0.25 commitment stand in the place of KL (appendix A).
    """

    steps: int = 1_000_000
    batch_size: int = 32  # pictures in a step
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int = 1_000
    betas: tuple[float, float] = (0.5, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0  # draws codes to what the encoder makes
    commitment: float = 0.25  # draws what the encoder makes to its codes
    revive_after: int = 100  # steps without use after which a code starts anew from what the encoder makes
    perceptual: str | None = None  # a .safetensors or .pth file with LPIPS' VGG-16; None: without this loss
    identity: str | None = None  # a .safetensors or .pth file with MoCo v2's ResNet-50; None: without this loss
    identity_weight: float = 0.2
    gan_weight: float = 0.5
    gan_from: int | None = None  # the step from which the patch discriminator joins in; None: never
    seed: int = 0
    heldout: int = 256  # pictures, at most a tenth
    checkpoint_every: int = 1_000
    keep_checkpoints: int = 2
    validate_every: int = 1_000
    log_every: int = 10

    def __post_init__(self):
        check_at_least_1(
            self, "training.", "steps", "batch_size", "revive_after", "checkpoint_every", "keep_checkpoints",
            "validate_every", "log_every", "heldout",
        )  # fmt: skip
