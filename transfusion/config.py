"""All settings: one frozen dataclass for each part of a run. A field's comment is its --help text. Imports nothing heavy."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the low rotary frequencies, for contexts longer than those of pretraining."""

    factor: float = 8.0  # Low frequencies are divided by this number.
    low_frequency_factor: float = 1.0  # Wavelengths above original_length / this number are scaled in full.
    high_frequency_factor: float = 4.0  # Wavelengths below original_length / this number are not scaled.
    original_length: int = 8192  # Context length of pretraining, in positions.


BETWEEN_0_AND_1 = "be between 0 and 1", lambda value: 0 <= value <= 1  # rules for check
ABOVE_0 = "be above 0", lambda value: value > 0
ABOVE_0_UP_TO_1 = "be above 0 and at most 1", lambda value: 0 < value <= 1
NOT_NEGATIVE = "not be negative", lambda value: value >= 0


def check(config, part: str, names: str, rule: str, is_valid: Callable[[Any], bool]) -> None:
    """ValueError for the first of these fields that is set and breaks the rule. `part` is the prefix of its name."""
    for name in names.split():
        if getattr(config, name) is not None and not is_valid(getattr(config, name)):
            raise ValueError(f"{part}{name} must {rule}, not {getattr(config, name)}")


def check_at_least_1(config, part: str, *names: str) -> None:
    check(config, part, " ".join(names), "be at least 1", lambda value: value >= 1)


UNET_CHANNELS = 8  # the widths of a U-Net are multiples of it: the smallest group of a group norm


@dataclass(frozen=True)
class ModelConfig:
    """The network: a Llama decoder with input and output layers for image patches (section 3 and Table 2)."""

    width: int = 768  # Width of the residual stream.
    layers: int = 16  # Number of transformer blocks.
    heads: int = 12  # Number of attention heads; the width must be a multiple of it unless head_dim is set.
    kv_heads: int | None = None  # Number of key and value heads (grouped-query attention); as many as heads if not set.
    head_dim: int | None = None  # Width of one attention head; width / heads if not set.
    intermediate_size: int | None = None  # Width of the feed-forward; if not set, 8/3 width rounded up to a multiple of 256.
    vocab_size: int = 32_000  # Number of token ids; training replaces it by the number that its tokenizer needs.
    tie_word_embeddings: bool = False  # Use one matrix for token embeddings and output logits.
    norm_eps: float = 1e-5  # Epsilon of the RMS norms.
    rope_theta: float = 10_000.0  # Base of the rotary position frequencies.
    rope_scaling: RopeScaling | None = None  # Llama 3's scaling of rotary frequencies, as four numbers; off if not set.
    qk_norm: bool = False  # Normalise queries and keys, as in Chameleon.
    post_norm: bool = False  # Normalise the output of each sublayer instead of its input, as in Chameleon.
    z_loss: float = 0.0  # Weight of the squared log of the softmax normaliser in the loss (Chameleon: 1e-5).
    latent_channels: int = 8  # Channels of an image latent; training replaces it by those of its codec.
    patch_size: int = 2  # Side of a patch in latent pixels; 2 gives 256 patches for an image of 256x256 pixels.
    # How images are embedded and predicted: one linear layer each, the two halves of a U-Net, or VQ codes as tokens.
    patches: Literal["linear", "unet", "codes"] = "linear"
    unet_width: int | None = None  # U-Net channels at the lowest resolution; 5/4 width, at most 1184, if not set (Table 7).
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"  # Attention inside an image (Table 5).

    def __post_init__(self):
        check_at_least_1(self, "model.", "width", "layers", "heads", "vocab_size", "latent_channels", "patch_size")
        if self.width % self.heads and self.head_dim is None:
            raise ValueError(f"model.heads {self.heads}: width {self.width} is not divisible by {self.heads}; "
                             f"use {_divisors(self.width, 2 * self.heads)}")  # fmt: skip
        if self.heads % self.num_kv_heads:
            raise ValueError(f"model.kv_heads {self.kv_heads}: heads {self.heads} is not divisible by {self.kv_heads}; "
                             f"use {_divisors(self.heads, self.heads)}")  # fmt: skip
        if self.head_size % 2:
            raise ValueError(f"model.head_dim {self.head_size}: rotary positions need an even width of a head")
        if self.patches == "unet" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"model.patch_size must be a power of 2 with model.patches unet, not {self.patch_size}")
        multiple = UNET_CHANNELS * self.patch_size
        if self.patches == "unet" and self.unet_width is not None and (self.unet_width < 1 or self.unet_width % multiple):
            raise ValueError(f"model.unet_width must be a multiple of {multiple} with patches of side {self.patch_size}, "
                             f"not {self.unet_width}")  # fmt: skip
        if self.patches == "codes" and self.patch_size != 1:
            raise ValueError(f"model.patch_size must be 1 with model.patches codes, not {self.patch_size}")

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def feed_forward_size(self) -> int:
        return self.intermediate_size or -(-8 * self.width // 3 // 256) * 256

    @property
    def patch_width(self) -> int:
        """Number of values in one patch."""
        return self.latent_channels * self.patch_size**2

    @property
    def unet_widths(self) -> tuple[int, ...]:
        """Channels of the U-Net at each resolution, from the latent's to the patches'; each doubles the one before.

        The paper gives no widths, only the parameters that the U-Net adds (Table 7): 172M to the 0.16b model, about 0.27B
        to the others. 960 = 5/4 of 768 gives the first, 1184 the others.
        """
        multiple = UNET_CHANNELS * self.patch_size
        lowest = self.unet_width or max(1, min(5 * self.width // 4, 1184) // multiple) * multiple
        return tuple(lowest >> n for n in reversed(range(self.patch_size.bit_length())))


def _divisors(number: int, largest: int) -> str:
    """The divisors of a number up to the largest, as text: "1, 2 or 4"."""
    *first, last = [n for n in range(1, largest + 1) if number % n == 0]
    return f"{', '.join(map(str, first))} or {last}" if first else str(last)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule of images, and what the image head predicts (sections 2.2 and 4.1)."""

    noise_schedule: Literal["cosine", "rectified_flow"] = "cosine"  # Schedule of alpha and sigma over t (1 is noise).
    # What the image head predicts: epsilon (the noise), x0 (the image), or velocity, which is alpha * noise - sigma * x0 on
    # the cosine schedule and noise - x0 on rectified flow.
    prediction: Literal["epsilon", "velocity", "x0"] = "epsilon"
    loss_space: Literal["prediction", "velocity"] = "prediction"  # The quantity whose squared error is the image loss.
    t_distribution: Literal["uniform", "logit_normal"] = "uniform"  # Distribution of t in training.
    t_shift: float = 1.0  # Above 1, training samples more t near 1, where noise is high; useful for large images.

    def __post_init__(self):
        if self.prediction == "epsilon" and self.loss_space == "velocity":
            raise ValueError("diffusion.loss_space velocity divides by nearly 0 with prediction epsilon and t near 1; use "
                             "prediction velocity or x0")  # fmt: skip
        check(self, "diffusion.", "t_shift", *ABOVE_0)


BUILT_IN = ("digits", "shapes", "topics", "emoji", "photographs")  # sources without files


@dataclass(frozen=True)
class DigitsConfig:
    """The built-in source `digits`: scans of handwritten digits with captions."""

    interleaved: float = 0.0  # Share of documents that hold 2 to 4 captioned images instead of one, from 0 to 1.

    def __post_init__(self):
        check(self, "data.digits.", "interleaved", *BETWEEN_0_AND_1)


@dataclass(frozen=True)
class ShapesConfig:
    """The built-in source `shapes`: rendered scenes with captions."""

    level: int = 1  # Content of a scene: 0 is one object, 1 also two objects in a relation, 2 up to four objects.
    size: int = 32  # Side of an image in pixels.


@dataclass(frozen=True)
class DataConfig:
    """The training data, and how documents become rows."""

    prepared: tuple[str, ...] = ()  # Folders from `transfusion data prepare` (short: --data); built-in sources if not set.
    sources: tuple[str, ...] = ()  # Names of the sources to read; all sources of the prepared folders if not set.
    mixture_weights: tuple[float, ...] = ()  # Relative number of positions of each source; equal if not set.
    codec: Literal["pixels", "block_pca"] = "pixels"  # Codec for the images of built-in sources.
    codec_block: int = 4  # Side of a block of the codec block_pca, in pixels.
    codec_components: int = 6  # Latent channels of the codec block_pca.
    fit_documents: int = 2_000  # Number of training documents to which tokenizer and codec are fitted.
    tokenizer_size: int = 512  # Vocabulary size of the byte-pair tokenizer that is fitted to built-in sources.
    seq_len: int = 4096  # Positions in a row.
    rows: int = 8  # Rows in one forward pass of each process.
    image_first: float = 0.2  # Share of captioned images that precede their caption (section 4.1).
    image_first_max_t: float = 1.0  # Largest t of images before their caption (Table 8: 0.5); 0 trains no image loss there.
    caption_dropout: float = 0.1  # Share of captions left out before an image, for classifier-free guidance.
    condition_text_dropout: float = 0.05  # Share of edit documents whose text is dropped, for guidance by image.
    condition_dropout: float = 0.05  # Share of edit documents whose text and images before the target are dropped.
    shuffle_block: int = 2048  # Number of consecutive documents of the shuffled stream that are packed together.
    workers: int = 1  # Threads that read ahead; the batches do not depend on their number.
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)

    def __post_init__(self):
        if self.mixture_weights and self.sources and len(self.mixture_weights) != len(self.sources):
            raise ValueError(f"data.mixture_weights has {len(self.mixture_weights)} numbers for {len(self.sources)} sources")
        shares = "image_first image_first_max_t caption_dropout condition_text_dropout condition_dropout"
        check(self, "data.", shares, *BETWEEN_0_AND_1)
        check_at_least_1(self, "data.", "seq_len", "rows", "shuffle_block", "workers")
        if any(weight <= 0 for weight in self.mixture_weights):
            raise ValueError(f"data.mixture_weights must be above 0, not {' '.join(map(str, self.mixture_weights))}")


@dataclass(frozen=True)
class PrepareConfig:
    """How files become a prepared data set: the same files and settings always give the same one."""

    like: str | None = None  # Reuse tokenizer, codec and sizes of this prepared folder or run.
    tokenizer: str | None = None  # The tokenizer.json to use; if not set, a tokenizer is trained on the first documents.
    tokenizer_size: int | None = None  # Largest vocabulary of a trained tokenizer; at most 8192 if not set.
    sizes: tuple[str, ...] = ()  # WIDTHxHEIGHT in pixels; if not set, their own if equal and at most 256x256, else 256x256.
    # Codec: pixels, block_pca, a folder from fit-codec, or an AutoencoderKL; auto is pixels below 16 a side, else block_pca.
    codec: str = "auto"
    codec_block: int | None = None  # Side of a block of block_pca in pixels; if not set, 4 for images below 64, else 8.
    codec_components: int | None = None  # Latent channels of block_pca; if not set, 6 for blocks of 4 pixels, else 8.
    fit_documents: int = 2_000  # Number of documents of each source to which tokenizer and codec are fitted.
    # Expected number of held-out documents per source, on average; at most 0.05 of all pictures and texts are held out.
    heldout: int = 1_000
    max_faults: float = 0.02  # Largest share of a source's records that may be skipped as faulty, from 0 to 1.
    # Prepare a source although the rest of one of its files cannot be read, so that an unknown number of records is missing.
    allow_cut: bool = False
    records_per_shard: int = 2048  # Number of records that are written as one shard.

    def __post_init__(self):
        check_at_least_1(self, "", "tokenizer_size", "fit_documents", "records_per_shard")
        names = "tokenizer", "tokenizer_size", "sizes", "codec", "codec_block", "codec_components"
        changed = [f.name.replace("_", "-") for f in fields(self) if f.name in names and getattr(self, f.name) != f.default]
        if self.like is not None and changed:
            raise ValueError(f"like and --{changed[0]} cannot be combined: the folder decides tokenizer, codec and sizes")
        check(self, "", "max_faults", *BETWEEN_0_AND_1)
        check(self, "", "heldout", *NOT_NEGATIVE)
        for size in self.sizes:
            parse_size(size)


def parse_size(text: str) -> tuple[int, int]:
    """"64x48" -> (64, 48), width and height in pixels. ValueError for any other text."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"a size is width x height in pixels, for example 64x48, not {text!r}")
    return int(width), int(height)


@dataclass(frozen=True)
class TrainingConfig:
    """Optimizer, learning rate and intervals of training (section 4.1 and appendix)."""

    steps: int = 250_000  # Number of optimizer steps.
    learning_rate: float = 3e-4  # Peak learning rate of AdamW.
    min_learning_rate: float = 1.5e-5  # Learning rate at the last step, after cosine decay.
    warmup_steps: int = 4_000  # Steps in which the learning rate rises linearly from 0.
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay rates of the two moments.
    eps: float = 1e-8  # AdamW's epsilon.
    weight_decay: float = 0.1  # AdamW's weight decay of matrices.
    max_grad_norm: float = 1.0  # Gradients with a larger norm are scaled down to it.
    ema_decay: float = 0.9999  # Decay per step of the moving average of the weights.
    text_lr_scale: float = 1.0  # Multiplies the learning rate of token embedding and head; 0 freezes them.
    image_lr_scale: float = 1.0  # Multiplies the learning rate of the patch layers; 0 freezes them.
    transformer_lr_scale: float = 1.0  # Multiplies the learning rate of the blocks and the last norm; 0 freezes them.
    accumulate: int = 1  # Forward passes per optimizer step in each process.
    image_weight: float = 5.0  # Weight of the image loss (lambda in the paper; 5 is for prediction epsilon).
    seed: int = 0  # Seed of weights, data order, noise and dropout.
    checkpoint_every: int = 5_000  # Steps between checkpoints.
    keep_checkpoints: int = 2  # Number of latest checkpoints to keep.
    validate_every: int = 1_000  # Steps between evaluations of the held-out losses.
    preview_every: int = 5_000  # Steps between image grids in samples/; 0 disables them.
    log_every: int = 10  # Steps between lines of metrics.jsonl.

    def __post_init__(self):
        counts = "steps accumulate checkpoint_every keep_checkpoints validate_every log_every"
        check_at_least_1(self, "training.", *counts.split())
        scales = "text_lr_scale image_lr_scale transformer_lr_scale"
        check(self, "training.", scales, "be finite and at least 0", lambda value: 0 <= value < math.inf)
        if not any(self.lr_scales.values()):
            raise ValueError("training.text_lr_scale, image_lr_scale and transformer_lr_scale are all 0: nothing would be "
                             "trained; set one above 0")  # fmt: skip

    @property
    def lr_scales(self) -> dict[str, float]:
        """Learning rate scale by the first word of a parameter's name."""
        scale = self.text_lr_scale
        return {"tokens": scale, "head": scale, "patches": self.image_lr_scale, "transformer": self.transformer_lr_scale}


@dataclass(frozen=True)
class FaultToleranceConfig:
    """What training does when a step fails. A resumed run may change these."""

    # Number of consecutive updates that may be skipped (a non-finite value or a gradient spike); training stops at the next.
    skip_nonfinite: int = 0
    # Skip updates with a gradient norm this many standard deviations above the mean of the last 128 norms; off if not set.
    skip_spikes_above: float | None = None
    watchdog: float = 1800.0  # Seconds without a step after which training aborts and writes all stacks; 0 disables it.

    def __post_init__(self):
        check(self, "fault_tolerance.", "skip_nonfinite watchdog", *NOT_NEGATIVE)
        check(self, "fault_tolerance.", "skip_spikes_above", *ABOVE_0)


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is distributed. The result does not depend on it, and a resumed run may change these."""

    shard: Literal["full", "hybrid"] = "full"  # Shard weights over all processes, or hybrid: over those of one machine.
    activation_checkpointing: bool = False  # Recompute blocks in the backward pass: less memory, about a third slower.
    compile: bool | None = None  # Compile the blocks with torch.compile; on CUDA only if not set.


SAMPLERS = {  # name -> the noise schedules it supports; inference/samplers.py has a function of the same name
    **dict.fromkeys(("ddpm", "ddim", "dpm", "dpm-sde"), ("cosine", "rectified_flow")),
    **dict.fromkeys(("euler", "heun"), ("rectified_flow",)),
}


@dataclass(frozen=True)
class GenerationConfig:
    """Default settings for generating text and images."""

    sampler: Literal[*SAMPLERS] = "ddpm"  # Diffusion sampler; dpm needs few steps, euler and heun need rectified_flow.
    steps: int = 250  # Denoising steps for an image (section 4.1); heun evaluates the model twice in each.
    t_shift: float | None = None  # Above 1, more steps are spent at high noise; the training value if not set.
    guidance_scale: float = 3.0  # Scale of classifier-free guidance (section 4.3); 1 disables it.
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # Range of t with guidance, from 0 (image) to 1 (noise).
    guidance_rescale: float = 0.0  # From 0 to 1 (full), how far guided predictions are rescaled (arXiv 2305.08891).
    image_guidance_scale: float | None = None  # Guidance scale towards the prompt's images; guidance_scale if not set.
    temperature: float = 1.0  # Sampling temperature of text and of VQ codes; 0 is greedy.
    top_p: float = 1.0  # Sample only from the most likely tokens with this total probability; 1 uses all.
    max_tokens: int = 256  # Largest number of text tokens and image markers in one answer.
    clip_x0: bool = True  # Clip the estimate of x0 to the codec's range.

    def __post_init__(self):
        check_at_least_1(self, "", "steps", "max_tokens")
        check(self, "", "t_shift", "be a number above 0", lambda value: 0 < value < math.inf)
        check(self, "", "guidance_scale image_guidance_scale", "be a finite number", math.isfinite)
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            values = " ".join(map(str, self.guidance_interval))
            raise ValueError(f"guidance_interval must be two numbers between 0 and 1, the smaller one first, not {values}")
        check(self, "", "guidance_rescale", *BETWEEN_0_AND_1)
        check(self, "", "temperature", *NOT_NEGATIVE)
        check(self, "", "top_p", *ABOVE_0_UP_TO_1)


TASKS = {  # of evaluation, by name; the quick ones are the default
    "captions": "captions of held-out images, decoded greedily: exact match, CIDEr-D, BLEU-4",
    "drawings": "images of digits and shapes, checked automatically: share that matches the prompt",
    "coco": "captions of COCO images against the reference captions: CIDEr-D, BLEU-4 (Karpathy's test split)",
    "coco-images": "images from one caption of each COCO image: FID, KID and others, CLIP score",
    "edits": "held-out image edits: distance to the target image",
    "conditioning": "increase of the image loss with other images' captions",
    "text": "bits per byte and perplexity of held-out text",
    "images": "images from held-out captions: FID, KID, precision, recall, density and coverage",
    "choice": "multiple choice by likelihood: continuations of held-out texts, or the questions of a file",
    "clip": "CLIP score of images from held-out captions",
    "geneval": "GenEval: its 553 prompts with --detector, else prompts about shapes, checked from the pixels",
    "llama": "the seven tasks of the Llama suite, with lm_eval and data from the hub",
}
QUICK = ("captions", "drawings", "conditioning", "text")


@dataclass(frozen=True)
class EvaluationConfig:
    """Tasks, data and settings of an evaluation. `results.json` stores them, so that it can be repeated."""

    tasks: tuple[str, ...] | None = None  # Tasks to run; if not set, the default tasks that the run supports.
    data: tuple[str, ...] | None = None  # Prepared folders to measure on; the run's own data if not set.
    count: int = 200  # Number of held-out documents of each source.
    seed: int = 0  # Seed of generated images and texts.
    sampler: str | None = None  # Diffusion sampler; the run's default if not set.
    steps: int | None = None  # Denoising steps for an image; the run's default if not set.
    guidance_scale: float | None = None  # Scale of classifier-free guidance; the run's default if not set.
    # Features for images and coco-images: Inception weights (.safetensors, .pth) or a vision model of transformers, a folder
    # or owner/name; if not set, a small network is trained, whose FID is not the published one.
    features: str | None = None
    clip: str | None = None  # CLIP model for clip, coco-images and geneval, as a folder or owner/name.
    detector: str | None = None  # Segmentation model for geneval (folder or owner/name), such as Mask2Former Swin-S.
    prompts: str | None = None  # Prompts for geneval, a file like its evaluation_metadata.jsonl; its 553 if not set.
    questions: str | None = None  # JSON lines with context, choices, answer for choice; held-out texts if not set.
    coco: str | None = None  # Karpathy's dataset_coco.json or COCO's annotations, for coco and coco-images.
    pictures: str | None = None  # Folder of the images that the COCO file names; the file's own folder if not set.

    def __post_init__(self):
        for task in self.tasks or ():
            if task not in TASKS:
                raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
        if self.tasks == ():
            raise ValueError(f"tasks is empty: name at least one task of {', '.join(TASKS)}")
        check(self, "", "count", "be at least 2", lambda value: value >= 2)


@dataclass(frozen=True)
class Machines:
    """The GPUs that share a run."""

    gpus: int = 1
    gpus_per_machine: int = 8
    memory: int = 80_000_000_000  # bytes of each GPU
    tflops: float = 989.0  # peak of each GPU: H100, bfloat16, dense
    mfu: float = 0.4  # share of the peak that a run reaches

    def __post_init__(self):
        check_at_least_1(self, "", "gpus", "gpus_per_machine")
        check(self, "", "tflops", *ABOVE_0)
        check(self, "", "mfu", *ABOVE_0_UP_TO_1)

    def shard_group_size(self, shard: str) -> int:
        """Number of GPUs that share one copy of the weights. ValueError when hybrid sharding does not fill all machines."""
        if shard == "full" or self.gpus <= self.gpus_per_machine:
            return self.gpus
        if self.gpus % self.gpus_per_machine:
            raise ValueError(f"hybrid sharding: {self.gpus} is not a multiple of {self.gpus_per_machine} GPUs per machine")
        return self.gpus_per_machine


@dataclass(frozen=True)
class Run:
    """A whole run, as in `run.json` and `train`."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)


to_json = asdict  # a config as plain JSON values


def from_json(kind: type, values: dict, where: str = ""):
    """The config of this class that `to_json` wrote. ValueError names the first unknown or mistyped field."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the config'} must be an object, not {values!r}")
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field {where}{key}")
    return kind(**{key: _read(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _read(hint: Any, value: Any, where: str):
    if is_dataclass(hint):
        return from_json(hint, value, where + ".")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {value!r}")
        return tuple(_read(arguments[0], item, where) for item in value)
    if arguments:  # X | None
        return None if value is None else _read(arguments[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {hint.__name__}, not {value!r}")
    return value
