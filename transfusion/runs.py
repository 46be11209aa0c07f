"""The named runs, which `train NAME` begins: from five minutes on two cores to every row of the paper's tables."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transfusion.config import DataConfig, DiffusionConfig, DigitsConfig, GenerationConfig, ModelConfig, Run, TrainingConfig

SIZES = {  # Table 2
    "0.16b": ModelConfig(width=768, layers=16, heads=12),
    "0.37b": ModelConfig(width=1024, layers=24, heads=16),
    "0.76b": ModelConfig(width=1536, layers=24, heads=24),
    "1.4b": ModelConfig(width=2048, layers=24, heads=16),
    "7b": ModelConfig(width=4096, layers=32, heads=32),
}
CODES = 16_384  # of the paper's VQ codec
CHAMELEON_VOCABULARY = 48_512  # 32,000 ids of text, 16,384 codes and the markers, in whole 128s


def digits() -> Run:
    """Real 8x8 scans with their English names, and Python's documentation: learns in five minutes on two cores."""
    return Run(
        name="digits",
        model=ModelConfig(width=192, layers=4, heads=3, intermediate_size=512, qk_norm=True,
                          unet_width=64, latent_channels=1),
        diffusion=DiffusionConfig(prediction="velocity"),
        data=DataConfig(
            sources=("digits", "topics"), mixture_weights=(0.85, 0.15), seq_len=128, rows=13,
            image_first_max_t=0.3, digits=DigitsConfig(interleaved=0.15),
        ),
        training=TrainingConfig(
            steps=1500, learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=100, ema_decay=0.995, image_weight=2.0,
            checkpoint_every=500, validate_every=250, preview_every=500,
        ),
        generation=GenerationConfig(steps=50, sampler="ddim", guidance_scale=2.0, max_tokens=64),
    )  # fmt: skip


def shapes() -> Run:
    """A made world of captioned scenes, 32x32 in colour, that can be checked exactly."""
    return Run(
        name="shapes",
        model=ModelConfig(width=128, layers=4, heads=4, intermediate_size=344, qk_norm=True,
                          unet_width=64, latent_channels=6),
        diffusion=DiffusionConfig(prediction="velocity"),
        data=DataConfig(
            sources=("shapes",), codec="block_pca", seq_len=128, rows=16, image_first_max_t=0.3, tokenizer_size=320,
        ),
        training=TrainingConfig(
            steps=2000, learning_rate=4e-3, min_learning_rate=1e-4, warmup_steps=100, ema_decay=0.995, image_weight=4.0,
            checkpoint_every=500, validate_every=250, preview_every=500,
        ),
        generation=GenerationConfig(steps=50, sampler="ddim", guidance_scale=2.0, max_tokens=64),
    )  # fmt: skip


def small() -> Run:
    """For data of one's own on two cores: pictures of 16 to 64 patches with short captions, minutes to an hour."""
    run = shapes()
    return replace(
        run, name="small", model=replace(run.model, width=192, heads=3, intermediate_size=512),
        data=replace(run.data, sources=(), seq_len=256, rows=8),
        training=replace(run.training, learning_rate=3e-3, image_weight=2.0),
    )  # fmt: skip


def paper(size: str, **model) -> Run:
    """A run of the paper's by its size, with other numbers of the model."""
    return Run(name=size, model=replace(SIZES[size], **model))


def chameleon(size: str, **model) -> Run:
    """The paper's baseline (section 4.1, appendix A): Llama with queries and keys normalised, norms behind the layers, a
    pull on the logits' normaliser and a smaller rate; `with_codes` adds the images."""
    run = paper(size, qk_norm=True, post_norm=True, z_loss=1e-5, **model)
    return replace(run, training=replace(run.training, learning_rate=1e-4))


def with_codes(size: str) -> Run:
    return chameleon(size, patches="codes", patch_size=1, vocab_size=CHAMELEON_VOCABULARY)


def limited(size: str) -> Run:
    """Images that come before their caption are noised half as far at most (section 4.3.4)."""
    run = paper(size, patches="unet")
    return replace(run, data=replace(run.data, image_first_max_t=0.5))


def large() -> Run:
    """Section 4.4: as many steps again, each on twice as many positions."""
    run = paper("7b", patches="unet")
    return replace(run, training=replace(run.training, steps=500_000, accumulate=2))


RUNS: dict[str, Callable[[], Run]] = {
    "digits": digits, "shapes": shapes, "small": small,
    **{size: lambda size=size: paper(size) for size in SIZES},
    **{f"{size}-unet": lambda size=size: paper(size, patches="unet") for size in SIZES},
    **{f"chameleon-{size}": lambda size=size: with_codes(size) for size in SIZES},
    "chameleon-text-0.76b": lambda: chameleon("0.76b"),
    "0.76b-causal": lambda: paper("0.76b", image_attention="causal"),
    "0.76b-unet-causal": lambda: paper("0.76b", patches="unet", image_attention="causal"),
    **{f"0.76b-patch{side}": lambda side=side: paper("0.76b", patch_size=side) for side in (1, 4, 8)},
    **{f"0.76b-unet-patch{side}": lambda side=side: paper("0.76b", patches="unet", patch_size=side) for side in (4, 8)},
    **{f"{size}-unet-limit": lambda size=size: limited(size) for size in ("0.76b", "7b")},
    "7b-large": large,
}  # fmt: skip
NAMES = tuple(RUNS)


def named_run(name: str) -> Run:
    """The run of that name. KeyError when there is none."""
    return replace(RUNS[name](), name=name)


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper: the run it is of, and how its images were drawn and counted.

    `sources`: "text", or "both"; `batch`: positions of a step (text alone has half of them: as much text as both). FID of
    5,000 images reads about 5.4 higher than that of 30,000: never compare them.
    """

    table: int
    label: str
    run: str
    sources: str = "both"
    batch: str = "2M"
    guidance_scale: float | None = 3.0  # None: tuned, or nothing is drawn
    fid_images: int | None = 5_000


PAPER: tuple[PaperRow, ...] = (
    PaperRow(3, "Transfusion", "7b", guidance_scale=5.0, fid_images=30_000),
    PaperRow(3, "Chameleon", "chameleon-7b", guidance_scale=5.0, fid_images=30_000),
    PaperRow(4, "Llama 2", "0.76b", "text", "1M", None, None),
    PaperRow(4, "Transfusion: + diffusion", "0.76b", guidance_scale=None, fid_images=None),
    PaperRow(4, "Chameleon: + stability modifications", "chameleon-text-0.76b", "text", "1M", None, None),
    PaperRow(4, "Chameleon: + LM loss on image tokens", "chameleon-0.76b", guidance_scale=None, fid_images=None),
    PaperRow(5, "linear, causal", "0.76b-causal"),
    PaperRow(5, "linear, bidirectional", "0.76b"),
    PaperRow(5, "U-Net, causal", "0.76b-unet-causal"),
    PaperRow(5, "U-Net, bidirectional", "0.76b-unet"),
    PaperRow(6, "none, 1x1, 1024 patches", "0.76b-patch1"),
    PaperRow(6, "linear, 2x2, 256 patches", "0.76b"),
    PaperRow(6, "linear, 4x4, 64 patches", "0.76b-patch4"),
    PaperRow(6, "linear, 8x8, 16 patches", "0.76b-patch8"),
    PaperRow(6, "U-Net, 2x2, 256 patches", "0.76b-unet"),
    PaperRow(6, "U-Net, 4x4, 64 patches", "0.76b-unet-patch4"),
    PaperRow(6, "U-Net, 8x8, 16 patches", "0.76b-unet-patch8"),
    *(PaperRow(7, f"{size}, linear", size) for size in SIZES),
    *(PaperRow(7, f"{size}, U-Net", f"{size}-unet") for size in SIZES),
    *(PaperRow(8, f"{size}, no limit", f"{size}-unet") for size in ("0.76b", "7b")),
    *(PaperRow(8, f"{size}, limit", f"{size}-unet-limit") for size in ("0.76b", "7b")),
    PaperRow(9, "Transfusion", "7b-large", batch="4M", guidance_scale=None, fid_images=30_000),
)
