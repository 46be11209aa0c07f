"""Every number: one frozen dataclass per part of a run, from and to JSON. Imports nothing heavy, not even torch."""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies, for contexts longer than the weights were trained on."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


def check_at_least_1(config, part: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{part}{name} must be at least 1, not {getattr(config, name)}")


UNET_CHANNELS = 8  # the widths of a U-Net are multiples of it: the smallest group that is normalised together


@dataclass(frozen=True)
class ModelConfig:
    """The network: a Llama decoder with one more way in and out, for patches (section 3 and Table 2)."""

    width: int = 768
    layers: int = 16
    heads: int = 12
    kv_heads: int | None = None  # fewer than heads: grouped keys and values; None: as many as heads
    head_dim: int | None = None  # None: width / heads
    intermediate_size: int | None = None  # of the feed-forward; None: 8/3 width, rounded up to a multiple of 256
    vocab_size: int = 32_000  # `train` replaces it by the size its tokenizer gives
    tie_word_embeddings: bool = False  # one matrix for tokens in and out
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # Chameleon: normalise queries and keys
    post_norm: bool = False  # Chameleon: normalise what a layer adds, not what it reads
    z_loss: float = 0.0  # Chameleon: 1e-5, keeps the logits' normaliser near one
    latent_channels: int = 8
    patch_size: int = 2  # a patch is patch_size x patch_size latent pixels; 2 -> 256 patches for 256x256 pictures
    # how images come in and out: one layer each, the halves of a U-Net, or as tokens, the codes of a VQ codec (Chameleon)
    patches: Literal["linear", "unet", "codes"] = "linear"
    unet_width: int | None = None  # channels at the U-Net's lowest resolution; None: 5/4 width, 1184 at most, as in Table 7
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"  # inside an image (Table 5)

    def __post_init__(self):
        check_at_least_1(self, "model.", "width", "layers", "heads", "vocab_size", "latent_channels", "patch_size")
        if self.width % self.heads and self.head_dim is None:
            raise ValueError(f"model.width {self.width} is not a multiple of model.heads {self.heads}")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_size}")
        if self.patches == "unet":
            self._check_unet()
        if self.patches == "codes" and self.patch_size != 1:
            raise ValueError(f"with model.patches codes, where a code is a position, model.patch_size must be 1, "
                             f"not {self.patch_size}")  # fmt: skip

    def _check_unet(self):
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"with model.patches unet, model.patch_size must be 1, 2, 4, 8 ..., not {self.patch_size}")
        unit = UNET_CHANNELS * self.patch_size
        if self.unet_width is not None and (self.unet_width < 1 or self.unet_width % unit):
            raise ValueError(f"model.unet_width must be a multiple of {unit} with patches of side {self.patch_size}, "
                             f"not {self.unet_width}")  # fmt: skip

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
        """Numbers in one patch."""
        return self.latent_channels * self.patch_size**2

    @property
    def unet_widths(self) -> tuple[int, ...]:
        """Channels of the U-Net at each resolution, from the latent's own down to the patches': each twice the one before.

        The paper gives no widths, only how many parameters the U-Net adds (Table 7): 172M to 0.16b, about 0.27B to the
        others. 960 = 5/4 of 768 gives the first, 1184 the others.
        """
        unit = UNET_CHANNELS * self.patch_size
        lowest = self.unet_width or max(1, min(5 * self.width // 4, 1184) // unit) * unit
        return tuple(lowest >> n for n in reversed(range(self.patch_size.bit_length())))


@dataclass(frozen=True)
class DiffusionConfig:
    """How images are noised and what the image head says about it (section 2.2, 4.1)."""

    noise_schedule: Literal["cosine", "rectified_flow"] = "cosine"
    prediction: Literal["epsilon", "velocity", "x0"] = "epsilon"
    loss_space: Literal["prediction", "velocity"] = "prediction"
    t_distribution: Literal["uniform", "logit_normal"] = "uniform"
    t_shift: float = 1.0  # > 1: more of the time is spent at high noise (large pictures)

    def __post_init__(self):
        if self.prediction == "epsilon" and self.loss_space == "velocity":
            raise ValueError("diffusion.loss_space velocity would divide a noise prediction by nearly 0 where t is near 1")
        if self.t_shift <= 0:
            raise ValueError(f"diffusion.t_shift must be above 0, not {self.t_shift}")


BUILT_IN = ("digits", "shapes", "topics", "emoji", "photographs")  # sources that need no files


@dataclass(frozen=True)
class DigitsConfig:
    """The built-in source `digits`."""

    interleaved: float = 0.0  # share of documents that hold 2 to 4 captioned scans

    def __post_init__(self):
        if not 0 <= self.interleaved <= 1:
            raise ValueError(f"data.digits.interleaved must lie between 0 and 1, not {self.interleaved}")


@dataclass(frozen=True)
class ShapesConfig:
    """The built-in source `shapes`."""

    level: int = 1  # how much a scene holds, 0 to 2
    size: int = 32  # pixels along one side


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how documents become rows."""

    prepared: tuple[str, ...] = ()  # --data DIR...: what `transfusion data prepare` made; none: sources that need no files
    sources: tuple[str, ...] = ()  # with `prepared`, none: all that it holds
    mixture_weights: tuple[float, ...] = ()  # of the positions, one number per source; none: equal
    codec: Literal["pixels", "block_pca"] = "pixels"
    codec_block: int = 4  # block_pca: pixels along one side of a block
    codec_components: int = 6  # block_pca: numbers kept per block
    fit_documents: int = 2_000  # a codec with fitted state sees this many training documents
    tokenizer_size: int = 512  # size of the byte-pair tokenizer trained on the run's own text
    seq_len: int = 4096  # L
    rows: int = 8  # per forward pass
    image_first: float = 0.2  # of captioned pairs (section 4.1)
    image_first_max_t: float = 1.0  # 0.5: the noise limit of Table 8; 0: clean, and no image loss
    caption_dropout: float = 0.1  # of caption-first pairs: what the unconditional branch learns from
    condition_text_dropout: float = 0.05  # of documents that draw from an image that is given: they lose their text
    condition_dropout: float = 0.05  # ... or everything before the image that is drawn
    shuffle_block: int = 2048  # documents that are shuffled and packed together
    workers: int = 1  # threads that read ahead; what is read does not depend on them
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)

    def __post_init__(self):
        if self.mixture_weights and self.sources and len(self.mixture_weights) != len(self.sources):
            raise ValueError(f"data.mixture_weights has {len(self.mixture_weights)} numbers for {len(self.sources)} sources")
        for name in ("image_first", "image_first_max_t", "caption_dropout", "condition_text_dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must lie between 0 and 1, not {getattr(self, name)}")
        check_at_least_1(self, "data.", "seq_len", "rows", "shuffle_block", "workers")
        if any(share <= 0 for share in self.mixture_weights):
            raise ValueError(f"data.mixture_weights must be above 0, not {' '.join(map(str, self.mixture_weights))}")


@dataclass(frozen=True)
class PrepareConfig:
    """How files become a prepared data set: the same files and numbers always give the same one."""

    like: str | None = None  # a prepared folder or a run whose tokenizer, codec and sizes are used: one run can read both
    tokenizer: str | None = None  # a tokenizer.json to be used; None: one is trained on the first documents
    tokenizer_size: int | None = None  # size of one that is trained, at most; None: 8192, less where there is little text
    sizes: tuple[str, ...] = ()  # width x height of pictures; none: as they are, if all are alike and small, else 256x256
    codec: str = "auto"  # pixels (auto below 16 a side), block_pca (auto above), what fit-codec made, or an AutoencoderKL
    codec_block: int | None = None  # block_pca: pixels along one side of a block; None: 4 for sides below 64, else 8
    codec_components: int | None = None  # block_pca: numbers kept per block; None: 6 for blocks of 4, else 8
    fit_documents: int = 2_000  # of each source, from which tokenizer and codec are fitted
    heldout: int = 1_000  # documents of each source, about, and at most one in twenty
    max_faults: float = 0.02  # share of the records of a source that may be left out
    shard: int = 2048  # documents in one file

    def __post_init__(self):
        check_at_least_1(self, "", "tokenizer_size", "fit_documents", "shard")
        brought = (self.tokenizer, self.tokenizer_size, self.codec_block, self.codec_components)
        if self.like is not None and (self.sizes or self.codec != "auto" or any(one is not None for one in brought)):
            raise ValueError("like brings a tokenizer, a codec and sizes along: say nothing else about them")
        if not 0 <= self.max_faults <= 1:
            raise ValueError(f"max_faults must lie between 0 and 1, not {self.max_faults}")
        if self.heldout < 0:
            raise ValueError(f"heldout must not be negative, not {self.heldout}")
        for size in self.sizes:
            parse_size(size)


def parse_size(text: str) -> tuple[int, int]:
    """"64x48" -> (64, 48), width and height. ValueError when it is none."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"a size is width x height in pixels, for example 64x48, not {text!r}")
    return int(width), int(height)


@dataclass(frozen=True)
class TrainingConfig:
    """How it learns (section 4.1 and appendix)."""

    steps: int = 250_000
    learning_rate: float = 3e-4
    min_learning_rate: float = 1.5e-5
    warmup_steps: int = 4_000  # steps
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.9999  # decay of the moving average of the weights
    text_lr_scale: float = 1.0  # of embedding and head, times the learning rate; 0: they are frozen, and stay as they began
    image_lr_scale: float = 1.0  # of the layers that take patches in and out, likewise
    transformer_lr_scale: float = 1.0  # of the blocks and the last norm, likewise
    accumulate: int = 1  # forward passes per step
    image_weight: float = 5.0  # the paper's lambda; 5 belongs to noise prediction
    seed: int = 0
    checkpoint_every: int = 5_000  # steps
    keep_checkpoints: int = 2  # checkpoints
    validate_every: int = 1_000
    preview_every: int = 5_000  # a grid of drawings in samples/; 0: none
    log_every: int = 10

    def __post_init__(self):
        check_at_least_1(
            self, "training.", "steps", "accumulate", "checkpoint_every", "keep_checkpoints", "validate_every", "log_every",
        )  # fmt: skip
        for name in ("text_lr_scale", "image_lr_scale", "transformer_lr_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"training.{name} must be a number from 0 up, not {getattr(self, name)}")
        if not any(self.lr_scales.values()):
            raise ValueError(
                "training.text_lr_scale, image_lr_scale and transformer_lr_scale are all 0: nothing would be learnt"
            )

    @property
    def lr_scales(self) -> dict[str, float]:
        """By the first word of a parameter's name."""
        text = self.text_lr_scale
        return {"tokens": text, "head": text, "patches": self.image_lr_scale, "transformer": self.transformer_lr_scale}


@dataclass(frozen=True)
class FaultToleranceConfig:
    """What training does when something goes wrong. A run may go on with other choices."""

    skip_nonfinite: int = 0  # updates in a row that may be left out (not finite, or a spike) before training stops
    skip_spikes_above: float | None = None  # skip gradients this many deviations above the mean of the last 128; None: off
    watchdog: float = 1800.0  # seconds; a step that takes longer is given up, with every thread's stack; 0: none is

    def __post_init__(self):
        for name in ("skip_nonfinite", "watchdog"):
            if getattr(self, name) < 0:
                raise ValueError(f"fault_tolerance.{name} must not be negative, not {getattr(self, name)}")
        if self.skip_spikes_above is not None and self.skip_spikes_above <= 0:
            raise ValueError(f"fault_tolerance.skip_spikes_above must be above 0, not {self.skip_spikes_above}")


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is laid out; what is learnt does not depend on it, and a run may go on with other choices."""

    shard: Literal["full", "hybrid"] = "full"  # weights over all processes, or over those of a machine, machines alike
    activation_checkpointing: bool = False  # blocks run again in the backward pass: less memory, a third slower
    compile: bool | None = None  # blocks with torch.compile; None: on CUDA


SAMPLERS = {  # name -> the noise schedules it supports; inference/samplers.py has a function of the same name
    "ddpm": ("cosine", "rectified_flow"),
    "ddim": ("cosine", "rectified_flow"),
    "dpm": ("cosine", "rectified_flow"),
    "dpm-sde": ("cosine", "rectified_flow"),
    "euler": ("rectified_flow",),
    "heun": ("rectified_flow",),
}


@dataclass(frozen=True)
class GenerationConfig:
    """How a run writes and draws when nobody says otherwise."""

    sampler: Literal[*SAMPLERS] = "ddpm"
    steps: int = 250  # of 1000 (section 4.1); heun asks the model twice in each
    t_shift: float | None = None  # > 1: more of the steps are spent at high noise; None: as the run was trained
    guidance_scale: float = 3.0  # section 4.3; 1: none
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # of t; outside there is no guidance, and its branches cost nothing
    guidance_rescale: float = 0.0  # 1: a guided prediction deviates as little as one without guidance (2305.08891)
    image_guidance_scale: float | None = None  # towards a prompt's images alone (2211.09800); None: as guidance_scale
    temperature: float = 1.0  # of text, and of an image's codes; 0: greedy
    top_p: float = 1.0
    max_tokens: int = 256  # text tokens and images' markers that one request may add
    clip_x0: bool = True  # clip the clean estimate to the codec's bound

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.t_shift is not None and not 0 < self.t_shift < math.inf:
            raise ValueError(f"t_shift must be a number above 0, not {self.t_shift}")
        for name in ("guidance_scale", "image_guidance_scale"):
            if not math.isfinite(getattr(self, name) or 0):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            found = " ".join(map(str, self.guidance_interval))
            raise ValueError(f"guidance_interval must be two numbers between 0 and 1, the smaller one first, not {found}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must lie between 0 and 1, not {self.guidance_rescale}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and up to 1, not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


TASKS = {  # of evaluation, by name; "quick" ones are done when nobody names any
    "captions": "held-out pictures, captioned greedily: exact, CIDEr-D, BLEU-4",
    "drawings": "of digits and shapes, read back: the share that is what was asked for",
    "coco": "captions of COCO's pictures beside what people said of them: CIDEr-D, BLEU-4 (Karpathy's test split)",
    "coco-images": "FID and the rest, and CLIP score, of drawings from a caption of each of COCO's pictures",
    "edits": "held-out edits, drawn: how near they come to the picture that was asked for",
    "conditioning": "how much worse pictures are predicted behind others' captions",
    "text": "bits per byte and perplexity of held-out text",
    "images": "FID, KID, precision, recall, density and coverage of drawings from held-out captions",
    "choice": "ranked multiple choice: how held-out texts go on, or the questions of a file",
    "clip": "CLIP score of drawings from held-out captions",
    "geneval": "GenEval: of shapes, answered from the pixels; with --detector its 553 prompts",
    "llama": "the seven tasks of the Llama suite, through lm_eval and the hub",
}
QUICK = ("captions", "drawings", "conditioning", "text")


@dataclass(frozen=True)
class EvaluationConfig:
    """What of a run is measured, and how. `results.json` holds it, and can be measured anew from it."""

    tasks: tuple[str, ...] | None = None  # None: what the run supports of the quick ones
    data: tuple[str, ...] | None = None  # prepared data; None: the run's own
    count: int = 200  # held-out documents of each source that are captioned, drawn, read
    seed: int = 0
    sampler: str | None = None  # these three: None, the run's own
    steps: int | None = None
    guidance_scale: float | None = None
    features: str | None = None  # of images: Inception's weights (a file), a vision model; None: a small network
    clip: str | None = None  # a CLIP model, a folder or owner/name
    detector: str | None = None  # of GenEval's 553 prompts: a model that segments instances, a folder or owner/name
    prompts: str | None = None  # of GenEval: a file like its evaluation_metadata.jsonl; None: its 553
    questions: str | None = None  # of `choice`: a file of JSON lines
    coco: str | None = None  # Karpathy's dataset_coco.json, or COCO's annotations
    pictures: str | None = None  # of COCO: the folder from which its paths count; None: the file's own

    def __post_init__(self):
        for task in self.tasks or ():
            if task not in TASKS:
                raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
        if self.tasks == ():
            raise ValueError(f"name at least one task behind --tasks: {', '.join(TASKS)}")
        if self.count < 2:
            raise ValueError(f"count must be at least 2, not {self.count}")


@dataclass(frozen=True)
class Machines:
    """The GPUs that share a run."""

    gpus: int = 1
    per_machine: int = 8
    memory: int = 80_000_000_000  # bytes of each
    tflops: float = 989.0  # of each at its best: H100, bfloat16, dense
    mfu: float = 0.4  # share of that which the FLOPs of a run will reach

    def __post_init__(self):
        for name, value in (("gpus", self.gpus), ("gpus-per-machine", self.per_machine)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        if self.tflops <= 0:
            raise ValueError(f"--tflops must be above 0, not {self.tflops}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu must lie above 0 and up to 1, not {self.mfu}")

    def sharing(self, shard: str) -> int:
        """How many GPUs share one copy of the weights. ValueError when machines would be left half empty."""
        if shard == "full" or self.gpus <= self.per_machine:
            return self.gpus
        if self.gpus % self.per_machine:
            raise ValueError(f"hybrid sharding takes whole machines: {self.gpus} is not a multiple of {self.per_machine}")
        return self.per_machine


@dataclass(frozen=True)
class Run:
    """A whole run: what `run.json` holds and `train` takes."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)


def to_json(config) -> dict:
    """A config as plain JSON values."""
    return asdict(config)


def from_json(kind: type, values: dict, where: str = ""):
    """The config of this kind that `to_json` wrote. ValueError names the first unknown, missing or mistyped field."""
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
