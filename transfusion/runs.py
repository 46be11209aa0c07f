"""The recipes of `train RECIPE`: from five minutes on two cores to every row of the paper's tables."""

from collections.abc import Callable
from dataclasses import replace

from transfusion.config import (
    DataConfig,
    DiffusionConfig,
    DigitsConfig,
    GenerationConfig,
    ModelConfig,
    ParallelConfig,
    Run,
    TrainingConfig,
)  # fmt: skip

SIZES = {  # Table 2
    "0.16b": ModelConfig(width=768, layers=16, heads=12),
    "0.37b": ModelConfig(width=1024, layers=24, heads=16),
    "0.76b": ModelConfig(width=1536, layers=24, heads=24),
    "1.4b": ModelConfig(width=2048, layers=24, heads=16),
    "7b": ModelConfig(width=4096, layers=32, heads=32),
}
NUM_CODES = 16_384  # of the paper's VQ codec
CHAMELEON_VOCAB_SIZE = 48_512  # 32,000 text ids, 16,384 codes and the markers, rounded up to a multiple of 128


def digits() -> Run:
    """Scans of 8x8 pixels with English captions, and Python's documentation: trains in five minutes on two cores."""
    return Run(
        recipe="digits",
        model=ModelConfig(width=192, layers=4, heads=3, intermediate_size=512, qk_norm=True,
                          unet_width=64, latent_channels=1),
        diffusion=DiffusionConfig(prediction="velocity"),
        data=DataConfig(
            sources=("digits", "topics"), mixture_weights=(0.85, 0.15), seq_len=128, image_first_max_t=0.3,
            digits=DigitsConfig(interleaved=0.15),
        ),
        training=TrainingConfig(
            steps=1500, batch_size=13, learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=100, ema_decay=0.995,
            image_weight=2.0, checkpoint_every=500, validate_every=250, preview_every=500,
        ),
        generation=GenerationConfig("dpm-sde", steps=20, guidance_scale=2.0, max_tokens=64),
    )  # fmt: skip


def shapes() -> Run:
    """Rendered scenes of 32x32 colour pixels with captions, whose images can be scored automatically."""
    return Run(
        recipe="shapes",
        model=ModelConfig(width=128, layers=4, heads=4, intermediate_size=344, qk_norm=True,
                          unet_width=64, latent_channels=6),
        diffusion=DiffusionConfig(prediction="velocity"),
        data=DataConfig(
            sources=("shapes",), codec="block_pca", seq_len=128, image_first_max_t=0.3, tokenizer_size=320,
        ),
        training=TrainingConfig(
            steps=2000, batch_size=16, learning_rate=4e-3, min_learning_rate=1e-4, warmup_steps=100, ema_decay=0.995,
            image_weight=4.0, checkpoint_every=500, validate_every=250, preview_every=500,
        ),
        generation=GenerationConfig("dpm-sde", steps=20, guidance_scale=2.0, max_tokens=64),
    )  # fmt: skip


def small() -> Run:
    """For your own data on two cores: images of 16 to 64 patches with short captions, minutes to an hour."""
    run = shapes()
    return replace(
        run, recipe="small", model=replace(run.model, width=192, heads=3, intermediate_size=512),
        data=replace(run.data, sources=(), seq_len=256),
        training=replace(run.training, batch_size=8, learning_rate=3e-3, image_weight=2.0),
    )  # fmt: skip


def paper(size: str, **model) -> Run:
    """A run of the paper by its size, with changed model settings."""
    return Run(recipe=size, model=replace(SIZES[size], **model), parallel=ParallelConfig(micro_batch_size=8))


def chameleon(size: str, **model) -> Run:
    """The paper's baseline (section 4.1, appendix A) without images: Llama with normalised queries and keys, post-norm,
    z-loss and a smaller learning rate."""
    run = paper(size, qk_norm=True, post_norm=True, z_loss=1e-5, **model)
    return replace(run, training=replace(run.training, learning_rate=1e-4))


def chameleon_with_images(size: str) -> Run:
    """The same with images as VQ codes."""
    return chameleon(size, patches="codes", patch_size=1, vocab_size=CHAMELEON_VOCAB_SIZE)


def noise_limited(size: str) -> Run:
    """Images before their caption are noised up to t = 0.5 (section 4.3.4)."""
    run = paper(size, patches="unet")
    return replace(run, data=replace(run.data, image_first_max_t=0.5))


def large() -> Run:
    """Section 4.4: twice the steps, with twice the rows in each."""
    run = paper("7b", patches="unet")
    return replace(run, training=replace(run.training, steps=500_000, batch_size=1024))


RUNS: dict[str, Callable[[], Run]] = {
    "digits": digits, "shapes": shapes, "small": small,
    **{size: lambda size=size: paper(size) for size in SIZES},
    **{f"{size}-unet": lambda size=size: paper(size, patches="unet") for size in SIZES},
    **{f"chameleon-{size}": lambda size=size: chameleon_with_images(size) for size in SIZES},
    "chameleon-text-0.76b": lambda: chameleon("0.76b"),
    "0.76b-causal": lambda: paper("0.76b", image_attention="causal"),
    "0.76b-unet-causal": lambda: paper("0.76b", patches="unet", image_attention="causal"),
    **{f"0.76b-patch{side}": lambda side=side: paper("0.76b", patch_size=side) for side in (1, 4, 8)},
    **{f"0.76b-unet-patch{side}": lambda side=side: paper("0.76b", patches="unet", patch_size=side) for side in (4, 8)},
    **{f"{size}-unet-limit": lambda size=size: noise_limited(size) for size in ("0.76b", "7b")},
    "7b-large": large,
}  # fmt: skip
NAMES = tuple(RUNS)


def named_run(name: str) -> Run:
    """The run of this recipe. KeyError for an unknown name."""
    return replace(RUNS[name](), recipe=name)
