"""All settings: one frozen dataclass for each part of a run. A field's comment is its --help text, its annotation the rule
that `fields.Config` checks. Imports nothing heavy."""

import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Literal, get_args, get_type_hints

from transfusion.fields import (
    MAX_SECONDS,
    Config,
    Decay,
    Epsilon,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Share,
    Size,
    VocabSize,
    short_repr,
)

TokenizerSize = Annotated[int, Range(at_least=256, limit=2**24)]  # with one id for each byte
SceneLevel = Annotated[int, Range(0, 3)]
SceneSize = Annotated[int, Range(at_least=1, limit=4096)]
GuidanceScale = Annotated[float, Range(0, 100)]
TShift = Annotated[float, Range(0.001, 1000)]
Teraflops = Annotated[float, Range(at_least=0.001, limit=10**6)]
MFU = Annotated[float, Range(0.001, 1)]
DrawingSteps = Annotated[int, Range(at_least=1, limit=100_000)]
LoggerName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class RopeScaling(Config, part="model.rope_scaling."):
    """Llama 3's scaling of the low rotary frequencies, for contexts longer than those of pretraining."""

    factor: Annotated[float, Range(at_least=1, limit=10**6)] = 8.0  # Low frequencies are divided by this number.
    # Wavelengths above original_length / this number are scaled in full.
    low_frequency_factor: Annotated[float, Range(above=0, limit=10**6)] = 1.0
    # Wavelengths below original_length / this number are not scaled.
    high_frequency_factor: Annotated[float, Range(above=0, limit=10**6)] = 4.0
    original_length: PositiveInt = 8192  # Context length of pretraining, in positions.

    def __post_init__(self):
        super().__post_init__()
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(f"model.rope_scaling.high_frequency_factor must be above low_frequency_factor, "
                             f"{self.low_frequency_factor}, not {self.high_frequency_factor}")  # fmt: skip


UNET_CHANNELS = 8  # the widths of a U-Net are multiples of it: the smallest group of a group norm


@dataclass(frozen=True)
class ModelConfig(Config, part="model."):
    """The network: a Llama decoder with input and output layers for image patches (section 3 and Table 2)."""

    width: Size = 768  # Width of the residual stream.
    layers: Annotated[int, Range(at_least=1, limit=10_000)] = 16  # Number of transformer blocks.
    heads: Size = 12  # Number of attention heads; the width must be a multiple of it unless head_dim is set.
    kv_heads: Size | None = None  # Number of key and value heads (grouped-query attention); as many as heads if not set.
    head_dim: Size | None = None  # Width of one attention head; width / heads if not set.
    # Width of the feed-forward; if not set, 8/3 width rounded up to a multiple of 256.
    intermediate_size: Size | None = None
    vocab_size: VocabSize = 32_000  # Number of token ids; training replaces it by the number that its tokenizer needs.
    tie_word_embeddings: bool = False  # Use one matrix for token embeddings and output logits.
    norm_eps: Annotated[float, Range(1e-12, 0.1)] = 1e-5  # Epsilon of the RMS norms.
    rope_theta: Annotated[float, Range(at_least=1)] = 10_000.0  # Base of the rotary position frequencies.
    rope_scaling: RopeScaling | None = None  # Llama 3's scaling of rotary frequencies, as four numbers; off if not set.
    qk_norm: bool = False  # Normalise queries and keys, as in Chameleon and Qwen3.
    qkv_bias: bool = False  # Add biases to queries, keys and values, as in Qwen2.
    post_norm: bool = False  # Normalise the output of each sublayer instead of its input, as in Chameleon.
    z_loss: NonNegativeFloat = 0.0  # Weight of the squared log of the softmax normaliser in the loss (Chameleon: 1e-5).
    latent_channels: Size = 8  # Channels of an image latent; training replaces it by those of its codec.
    # Side of a patch in latent pixels; 2 gives 256 patches for an image of 256x256 pixels.
    patch_size: Annotated[int, Range(at_least=1, limit=1024)] = 2
    # How images are embedded and predicted: one linear layer each, the two halves of a U-Net, or VQ codes as tokens.
    patches: Literal["linear", "unet", "codes"] = "linear"
    unet_width: Size | None = None  # U-Net channels at the lowest resolution; 5/4 width, at most 1184, if not set (Table 7).
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"  # Attention inside an image (Table 5).
    image_rope: Literal["1d", "2d"] = "1d"  # Rotary positions in an image: in one line, or by row and column.
    # Weights of their own for image positions (Mixture-of-Transformers, not in the paper): none, feed_forward with its norm,
    # or full, which adds queries, keys, values, outputs and all norms. FLOPs do not change.
    untied: Literal["none", "feed_forward", "full"] = "none"
    image_init: Literal["copy", "fresh"] = "copy"  # First untied image weights: a copy of the text's, or random ones.
    # Number of token ids of text; with untied the rows of all others, which are ids of images, are image weights. Training
    # sets it.
    text_vocab_size: VocabSize | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads and self.head_dim is None:
            raise ValueError(f"model.heads {self.heads}: width {self.width} is not divisible by {self.heads}; "
                             f"use {_divisors(self.width, 2 * self.heads)}")  # fmt: skip
        if self.heads % self.num_kv_heads:
            raise ValueError(f"model.kv_heads {self.kv_heads}: heads {self.heads} is not divisible by {self.kv_heads}; "
                             f"use {_divisors(self.heads, self.heads)}")  # fmt: skip
        divisor = 4 if self.image_rope == "2d" else 2
        if self.head_size % divisor:
            raise ValueError(f"model.head_dim {self.head_size}: model.image_rope {self.image_rope} needs a width of a head "
                             f"divisible by {divisor}; use {self.head_size + -self.head_size % divisor}")  # fmt: skip
        if self.patches == "unet" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"model.patch_size must be a power of 2 with model.patches unet, not {self.patch_size}")
        multiple = UNET_CHANNELS * self.patch_size
        if self.patches == "unet" and self.unet_width is not None and self.unet_width % multiple:
            raise ValueError(f"model.unet_width must be a multiple of {multiple} with patches of side {self.patch_size}, "
                             f"not {self.unet_width}")  # fmt: skip
        if self.text_vocab_size is not None and self.text_vocab_size > self.vocab_size:
            raise ValueError(f"model.text_vocab_size {self.text_vocab_size} is above model.vocab_size {self.vocab_size}")
        if self.patches == "codes" and self.patch_size != 1:
            raise ValueError(f"model.patch_size must be 1 with model.patches codes, not {self.patch_size}")

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def feed_forward_size(self) -> int:
        return -(-8 * self.width // 3 // 256) * 256 if self.intermediate_size is None else self.intermediate_size

    @property
    def num_text_rows(self) -> int:
        """Rows of token embedding and head that are text weights: all, or with `untied` those of the ids of text."""
        return self.vocab_size if self.untied == "none" or self.text_vocab_size is None else self.text_vocab_size

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
        default = max(1, min(5 * self.width // 4, 1184) // multiple) * multiple
        lowest = default if self.unet_width is None else self.unet_width
        return tuple(lowest >> n for n in reversed(range(self.patch_size.bit_length())))


def _divisors(number: int, largest: int) -> str:
    """The divisors of a number up to the largest, the last ten of many, as text: "1, 2 or 4"."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    *first, last = [n for n in sorted({*small, *(number // n for n in small)}) if n <= largest][-10:]
    return f"{', '.join(map(str, first))} or {last}" if first else str(last)


@dataclass(frozen=True)
class LoraConfig(Config, part="lora."):
    """LoRA (arXiv 2106.09685): train low-rank additions to the matrices of the blocks, and leave the weights of the start, a
    run or a language model, as they are."""

    rank: Size | None = None  # Rank of the additions to each matrix; without it all weights are trained (no LoRA).
    # Whose matrices get additions: with model.untied those of image or of text, or all. Unless it is text, the patch layers,
    # and with model.untied the rows of ids that only images have, are trained in full.
    on: Literal["image", "text", "all"] = "all"

    def sides(self, untied: str) -> tuple[str, ...]:
        """The sides of a model (`model.untied.side_of`) with trained parameters."""
        shared = () if untied == "full" else ("transformer",)
        text = () if untied == "none" else ("text",)  # embedding and head are frozen
        return (*text, "image", *shared) if self.on == "all" else (self.on,)


@dataclass(frozen=True)
class DiffusionConfig(Config, part="diffusion."):
    """The noise schedule of images, and what the image head predicts (sections 2.2 and 4.1)."""

    noise_schedule: Literal["cosine", "rectified_flow"] = "cosine"  # Schedule of alpha and sigma over t (1 is noise).
    # What the image head predicts: epsilon (the noise), x0 (the image), or velocity, which is alpha * noise - sigma * x0 on
    # the cosine schedule and noise - x0 on rectified flow.
    prediction: Literal["epsilon", "velocity", "x0"] = "epsilon"
    loss_space: Literal["prediction", "velocity"] = "prediction"  # The quantity whose squared error is the image loss.
    t_distribution: Literal["uniform", "logit_normal"] = "uniform"  # Distribution of t in training.
    t_shift: TShift = 1.0  # Above 1, training samples more t near 1, where noise is high; useful for large images.

    def __post_init__(self):
        super().__post_init__()
        if self.prediction == "epsilon" and self.loss_space == "velocity":
            raise ValueError("diffusion.loss_space velocity divides by nearly 0 with prediction epsilon and t near 1; use "
                             "prediction velocity or x0")  # fmt: skip


BUILT_IN = ("digits", "shapes", "topics", "photographs")  # sources without files


@dataclass(frozen=True)
class DigitsConfig(Config, part="data.digits."):
    """The built-in source `digits`: scans of handwritten digits with captions."""

    interleaved: Share = 0.0  # Share of documents that hold 2 to 4 captioned images instead of one.


@dataclass(frozen=True)
class ShapesConfig(Config, part="data.shapes."):
    """The built-in source `shapes`: rendered scenes with captions."""

    # Content of a scene: 0 is one object, 1 also two objects in a relation, 2 up to four objects; 3 is one shaded object
    # with continuous hue, size and place, and a caption of numbers.
    level: SceneLevel = 1
    size: SceneSize = 32  # Side of an image in pixels.


@dataclass(frozen=True)
class DataConfig(Config, part="data."):
    """The training data, and how documents become rows."""

    prepared: tuple[str, ...] = ()  # Folders from `transfusion data prepare`; built-in sources if not set.
    sources: tuple[str, ...] = ()  # Names of the sources to read; all sources of the prepared folders if not set.
    mixture_weights: tuple[PositiveFloat, ...] = ()  # Relative number of positions of each source; equal if not set.
    codec: Literal["pixels", "block_pca"] = "pixels"  # Codec for the images of built-in sources.
    codec_block: Size = 4  # Side of a block of the codec block_pca, in pixels.
    codec_components: Size = 6  # Latent channels of the codec block_pca.
    fit_documents: PositiveInt = 2_000  # Number of training documents to which tokenizer and codec are fitted.
    tokenizer_size: TokenizerSize = 512  # Vocabulary size of the byte-pair tokenizer that is fitted to built-in sources.
    seq_len: Annotated[int, Range(at_least=1, limit=2**24)] = 4096  # Positions in a row.
    image_first: Share = 0.2  # Share of captioned images that precede their caption (section 4.1).
    image_first_max_t: Share = 1.0  # Largest t of images before their caption (Table 8: 0.5); 0 trains no image loss there.
    # Text and images after an image read it clean, and its denoising loss is on a noisy copy that nothing else attends to.
    clean_copies: bool = False
    caption_dropout: Share = 0.1  # Share of captions left out before an image, for classifier-free guidance.
    condition_text_dropout: Share = 0.05  # Share of edit documents whose text is dropped, for guidance by image.
    condition_dropout: Share = 0.05  # Share of edit documents whose text and images before the target are dropped.
    # Number of consecutive documents of the shuffled stream that are packed together.
    shuffle_block: Annotated[int, Range(at_least=1, limit=2**24)] = 2048

    digits: DigitsConfig = field(default_factory=DigitsConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.mixture_weights and self.sources and len(self.mixture_weights) != len(self.sources):
            raise ValueError(f"data.mixture_weights has {len(self.mixture_weights)} numbers for {len(self.sources)} sources")
        if self.condition_text_dropout + self.condition_dropout > 1:
            raise ValueError(f"data.condition_text_dropout {self.condition_text_dropout} and condition_dropout "
                             f"{self.condition_dropout} are shares of the same documents: their sum must be at most 1")


@dataclass(frozen=True)
class ChatLayout(Config, part="chat."):
    """Text before and after each message of a conversation, in training data and in chat requests. Special tokens of the
    tokenizer are recognised in it. The suffix of the assistant is blank (eos ends an answer) or has the special token that
    ends an answer. On the command line \\n is a line break."""

    system_prefix: str = ""  # Text before a message of the system or the developer.
    system_suffix: str = "\n"  # Text after a message of the system or the developer.
    user_prefix: str = ""  # Text before a message of the user.
    user_suffix: str = "\n"  # Text after a message of the user.
    assistant_prefix: str = ""  # Text before an answer.
    assistant_suffix: str = "\n"  # Text after an answer: white space, or with a special token.


def parse_size(text: str, name: str = "size") -> tuple[int, int]:
    """"64x48" -> (64, 48), width and height in pixels. ValueError for any other text."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if match is None:
        raise ValueError(f"{name} must be width x height in pixels, for example 64x48, not {short_repr(text)}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class TrainingConfig(Config, part="training."):
    """Optimizer, learning rate and intervals of training (section 4.1 and appendix)."""

    steps: PositiveInt = 250_000  # Number of optimizer steps.
    # Packed rows in an optimizer step, shared evenly by all processes; the paper has 512 rows of 4,096 positions.
    batch_size: Size = 512
    # Optimizer of all weights, or muon (not in the paper): Muon for the matrices of the blocks, AdamW for all others.
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: NonNegativeFloat = 3e-4  # Peak learning rate.
    min_learning_rate: NonNegativeFloat = 1.5e-5  # Learning rate at the last step, after cosine decay.
    warmup_steps: NonNegativeInt = 4_000  # Steps in which the learning rate rises linearly from 0.
    betas: tuple[Decay, Decay] = (0.9, 0.95)  # AdamW's decay rates of the two moments.
    eps: Epsilon = 1e-8  # AdamW's epsilon.
    weight_decay: NonNegativeFloat = 0.1  # Weight decay of matrices, times the learning rate in every step.
    max_grad_norm: PositiveFloat = 1.0  # Gradients with a larger norm are scaled down to it.
    ema_decay: Decay = 0.9999  # Decay per step of the moving average of the weights.
    # Multiplies the learning rate of token embedding and head, and with model.untied of the blocks' text weights; 0 freezes
    # them.
    text_lr_scale: NonNegativeFloat = 1.0
    # Multiplies the learning rate of the patch layers, and with model.untied of the blocks' image weights and of ids that
    # only images have; 0 freezes them.
    image_lr_scale: NonNegativeFloat = 1.0
    # Multiplies the learning rate of the weights of the blocks, and of the last norm, that text and images share; 0 freezes
    # them.
    transformer_lr_scale: NonNegativeFloat = 1.0
    image_weight: NonNegativeFloat = 5.0  # Weight of the image loss (lambda in the paper; 5 is for prediction epsilon).
    seed: Seed = 0  # Seed of weights, data order, noise and dropout.
    checkpoint_every: PositiveInt = 5_000  # Steps between checkpoints.
    keep_checkpoints: PositiveInt = 2  # Number of latest checkpoints to keep.
    validate_every: PositiveInt = 1_000  # Steps between evaluations of the held-out losses.
    preview_every: NonNegativeInt = 5_000  # Steps between image grids in samples/; 0 disables them.
    log_every: PositiveInt = 10  # Steps between lines of metrics.jsonl.
    # Also write the metrics for TensorBoard, into the folder tensorboard of the run, or for Weights & Biases (wandb).
    log: tuple[LoggerName, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not any(self.lr_scales.values()):
            raise ValueError("training.text_lr_scale, image_lr_scale and transformer_lr_scale are all 0: nothing would be "
                             "trained; set one above 0")  # fmt: skip

    @property
    def lr_scales(self) -> dict[str, float]:
        """Learning rate scale by the side of a parameter (`model.untied.side_of`)."""
        return {"text": self.text_lr_scale, "image": self.image_lr_scale, "transformer": self.transformer_lr_scale}


@dataclass(frozen=True)
class FaultToleranceConfig(Config, part="fault_tolerance."):
    """What training does when a step fails. A resumed run may change these."""

    # Number of consecutive updates that may be skipped (a non-finite value or a gradient spike); training stops at the next.
    skip_nonfinite: NonNegativeInt = 0
    # Skip updates with a gradient norm this many standard deviations above the mean of the last 128 norms; off if not set.
    skip_spikes_above: PositiveFloat | None = None
    # Seconds without a step after which training aborts and writes all stacks; 0 disables it.
    watchdog: Annotated[float, Range(at_least=0, limit=MAX_SECONDS)] = 1800.0


@dataclass(frozen=True)
class ParallelConfig(Config, part="parallel."):
    """How the work is computed and distributed. Results depend on it only by rounding; a resumed run may change these."""

    shard: Literal["full", "hybrid"] = "full"  # Shard weights over all processes, or hybrid: over those of one machine.
    # Rows in one forward pass of a process, which sums the gradients of its passes; its whole share of a step if not set.
    micro_batch_size: Size | None = None
    activation_checkpointing: bool = False  # Recompute blocks in the backward pass: less memory, about a third slower.
    compile: bool | None = None  # Compile the blocks with torch.compile; on CUDA only if not set.
    # Matrix products of training on a CPU: auto is float32 by oneDNN on AMD CPUs with AVX512 and otherwise default, which is
    # float32 by torch's own choice; bfloat16 is faster and less exact, and the CPU must have instructions for it.
    cpu_matmul: Literal["auto", "default", "bfloat16"] = "auto"


SAMPLERS = {  # name -> the noise schedules it supports; inference/samplers.py has a function of the same name
    **dict.fromkeys(("ddpm", "ddim", "dpm", "dpm-sde"), ("cosine", "rectified_flow")),
    **dict.fromkeys(("euler", "heun"), ("rectified_flow",)),
}


@dataclass(frozen=True)
class GenerationConfig(Config):
    """Default settings for generating text and images."""

    sampler: Literal[*SAMPLERS] = "ddpm"  # Diffusion sampler; dpm needs few steps, euler and heun need rectified_flow.
    steps: DrawingSteps = 250  # Denoising steps for an image (section 4.1); heun evaluates the model twice in each.
    t_shift: TShift | None = None  # Above 1, more steps are spent at high noise; the training value if not set.
    guidance_scale: GuidanceScale = 3.0  # Scale of classifier-free guidance (section 4.3); 1 disables it.
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)  # Range of t with guidance, from 0 (image) to 1 (noise).
    guidance_rescale: Share = 0.0  # From 0 to 1 (full), how far guided predictions are rescaled (arXiv 2305.08891).
    # Guidance scale towards the prompt's images; guidance_scale if not set.
    image_guidance_scale: GuidanceScale | None = None
    temperature: NonNegativeFloat = 1.0  # Sampling temperature of text and of VQ codes; 0 is greedy.
    # Sample only from the most likely tokens with this total probability; 1 uses all.
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    max_tokens: PositiveInt = 256  # Largest number of text tokens and image markers in one answer.
    clip_x0: bool = True  # Clip the estimate of x0 to the codec's range.

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_interval[0] > self.guidance_interval[1]:
            values = " ".join(map(str, self.guidance_interval))
            raise ValueError(f"guidance_interval must have the smaller number first, not {values}")


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
class EvaluationConfig(Config):
    """Tasks, data and settings of an evaluation. `results.json` stores them, so that it can be repeated."""

    tasks: tuple[str, ...] | None = None  # Tasks to run; if not set, the default tasks that the run supports.
    data: tuple[str, ...] | None = None  # Prepared folders to measure on; the run's own data if not set.
    count: Annotated[int, Range(at_least=2)] = 200  # Number of held-out documents of each source.
    seed: Seed = 0  # Seed of generated images and texts.
    sampler: Literal[*SAMPLERS] | None = None  # Diffusion sampler; the run's default if not set.
    steps: DrawingSteps | None = None  # Denoising steps for an image; the run's default if not set.
    guidance_scale: GuidanceScale | None = None  # Scale of classifier-free guidance; the run's default if not set.
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
        super().__post_init__()
        for task in self.tasks or ():
            if task not in TASKS:
                raise ValueError(f"tasks must be some of {', '.join(TASKS)}, not {short_repr(task)}")
        if self.tasks == ():
            raise ValueError(f"tasks is empty: name at least one task of {', '.join(TASKS)}")


@dataclass(frozen=True)
class Machines(Config):
    """The GPUs that share a run."""

    gpus: PositiveInt = 1
    gpus_per_machine: PositiveInt = 8
    memory: PositiveInt = 80_000_000_000  # bytes of each GPU
    tflops: Teraflops = 989.0  # peak of each GPU: H100, bfloat16, dense
    mfu: MFU = 0.4  # share of the peak that a run reaches
    device: Literal["cuda", "cpu"] = "cuda"  # a CPU computes in float32 unless parallel.cpu_matmul is bfloat16

    def shard_group_size(self, shard: str) -> int:
        """Number of GPUs that share one copy of the weights. ValueError when hybrid sharding does not fill all machines."""
        if shard == "full" or self.gpus <= self.gpus_per_machine:
            return self.gpus
        if self.gpus % self.gpus_per_machine:
            raise ValueError(f"hybrid sharding: {self.gpus} is not a multiple of {self.gpus_per_machine} GPUs per machine")
        return self.gpus_per_machine


@dataclass(frozen=True)
class Run(Config):
    """A whole run, as in `run.json` and `train`."""

    recipe: str  # Name of the recipe (`runs.py`) that the other settings began from; the run is called as its folder.
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.model.untied == "full" and not self.training.text_lr_scale and not self.training.image_lr_scale:
            raise ValueError("training.text_lr_scale and image_lr_scale are both 0 with model.untied full: nothing would be "
                             "trained; set one above 0")  # fmt: skip
        if self.lora.rank is not None:
            self._check_lora()
        if self.data.clean_copies and self.model.patches == "codes":
            raise ValueError("data.clean_copies cannot be used with model.patches codes: image codes have no noise")

    def _check_lora(self) -> None:
        on, untied, sides = self.lora.on, self.model.untied, self.lora.sides(self.model.untied)
        if on != "all" and untied == "none":
            other = {"image": "text", "text": "images"}[on]
            raise ValueError(f"lora.on {on} with model.untied none: text and images share the weights of the blocks, so it "
                             f"would change {other} too; use lora.on all, or model.untied full")  # fmt: skip
        if untied != "none" and self.model.image_init == "fresh":
            raise ValueError("model.image_init fresh with lora.rank: additions to random weights become no model; use copy")
        if not any(self.training.lr_scales[side] for side in sides):
            names = " and ".join(f"training.{side}_lr_scale" for side in sides)
            raise ValueError(f"lora.on {on} with {names} 0: nothing would be trained; set one above 0")


to_json = asdict  # a config as plain JSON values


def from_json(kind: type[Config], values: dict, part: str = ""):
    """The config of this class that `to_json` wrote. ValueError names a field that is unknown, missing or invalid.
    `part` is its prefix for a class that has none."""
    part = kind.part or part
    if not isinstance(values, dict):
        raise ValueError(f"{part.removesuffix('.') or 'the config'} must be an object, not a {type(values).__name__}")
    hints, options = get_type_hints(kind), dict(values)
    for name in values.keys() - hints.keys():
        raise ValueError(f"unknown field {part}{name}")
    for f in fields(kind):
        if f.name not in values and f.default is f.default_factory is MISSING:
            raise ValueError(f"the field {part}{f.name} is missing")
        inner = next((t for t in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(t)), None)
        if inner and isinstance(values.get(f.name), dict):
            options[f.name] = from_json(inner, values[f.name], f"{f.name}.")
    return kind(**options)
