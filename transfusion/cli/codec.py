"""transfusion data fit-codec: train an autoencoder or VQ codec on images."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from transfusion.cli.ignored import check_fit_codec, warn_about_warmup
from transfusion.cli.options import Device, as_usage_error, parse
from transfusion.cli.screen import UsageError, nearest, print_status, progress
from transfusion.cli.sources import Reading, open_readers
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.config import FaultToleranceConfig, LoggerName, from_json, parse_size
from transfusion.disk import read_json, write_json, write_whole
from transfusion.fields import Config, NonNegativeInt, PositiveInt
from transfusion.training.loggers import check_loggers

NUM_SHOWN = 16  # held-out images on the page, and faults on the screen


@dataclass(frozen=True)
class Preset:
    """A named network and its training; --network.* and --training.* change its settings."""

    network: AutoencoderConfig
    training: CodecTrainingConfig


PRESETS = {
    "paper": Preset(AutoencoderConfig(), CodecTrainingConfig(gan_from=50_000)),
    "small": Preset(
        AutoencoderConfig(width=16, multipliers=(1, 2, 4), blocks=1, attention=False),
        CodecTrainingConfig(
            steps=1_800, batch_size=16, learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=50, ema_decay=0.99,
            checkpoint_every=250, validate_every=250,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FitCodec:
    """Train an autoencoder on the images of sources; the same command resumes it.

    Its folder is for `transfusion data prepare --codec FOLDER`, and has a page of originals and reconstructions. With
    --network.codes N it is a VQ codec with N codes, for runs with --model.patches codes.
    """

    out: Path
    """Folder of the codec."""
    network: AutoencoderConfig
    training: CodecTrainingConfig
    fault_tolerance: FaultToleranceConfig
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    size: str = "256x256"
    """WIDTHxHEIGHT in pixels to which images are resized and cropped."""
    max_images: PositiveInt = 50_000
    """Largest number of images, or crops, to train on."""
    crops: NonNegativeInt = 0
    """Random crops of each image, held-out ones too if no image is held out; 0 takes the centre, resized."""
    log: tuple[LoggerName, ...] = ()
    """Also write the metrics for TensorBoard, into the folder tensorboard of the codec, or for Weights & Biases (wandb)."""
    device: Device = "auto"


def fit_codec(arguments: list[str]) -> None:
    """Gather the images, train, and write the codec with a page."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: transfusion data fit-codec NAME SOURCE... --out FOLDER [options]\n\n"
              f"NAME is one of {', '.join(PRESETS)}. "
              "transfusion data fit-codec NAME --help lists every option with its own defaults.")  # fmt: skip
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in PRESETS:
        raise UsageError(f"there is no codec {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    default = FitCodec(Path("codecs") / name, PRESETS[name].network, PRESETS[name].training, FaultToleranceConfig())
    args = parse(FitCodec, f"data fit-codec {name}", rest, default)
    check_fit_codec(default, args)
    with as_usage_error(FitCodec):
        size = parse_size(args.size)
    if any(side % args.network.downsampling for side in size):
        raise UsageError(f"--size {args.size}: both sides must be multiples of {args.network.downsampling} pixels")
    check_loggers(args.log)
    readers = open_readers(args.reading)

    from transfusion.training.signals import exit_on_signal, exit_stopped

    with exit_on_signal():  # also while packages are imported, and after the codec is saved
        if not _fit(args, readers, size):
            exit_stopped()


def _fit(args: FitCodec, readers: list, size: tuple[int, int]) -> bool:
    """Train the codec or resume it, on all processes of torchrun. False when a signal stopped it."""
    from transfusion.data.reading.account import counted
    from transfusion.parallel import Ranks, keep_freed_memory, pick_device
    from transfusion.training.codec import CodecTrainer
    from transfusion.training.lock import TrainingLock

    device = pick_device(args.device)
    keep_freed_memory(device)
    _check_folder(args, readers)
    with Ranks.of_torchrun(device) as ranks, TrainingLock(args.out, ranks) as lock:
        gathered = _gather(args, readers, size) if ranks.is_main else None
        if gathered:
            skipped = f"; {counted(gathered.faults, 'record')} skipped" if gathered.faults else ""
            noun = "different crop" if args.crops else "different image"
            print_status(f"{counted(len(gathered.images), noun)} of {args.size}{skipped}")
        ranks.barrier()
        gathered = gathered or _gather(args, readers, size)
        trainer = CodecTrainer(args.network, args.training, args.out, gathered.images, device, ranks, args.fault_tolerance,
                               gathered.heldout, args.log)  # fmt: skip
        lock.begin()
        return lock.end(_train(trainer, args))


def _gather(args: FitCodec, readers: list, size: tuple[int, int]):
    from transfusion.data.crops import gather_images

    args.out.mkdir(parents=True, exist_ok=True)
    faults = []

    def on_fault(fault) -> None:
        faults.append(fault)
        if len(faults) <= NUM_SHOWN:
            print_status(f"  {fault}")

    with progress("reading images") as on_progress:
        return gather_images(readers, size, args.network.image_channels, args.max_images, args.out, on_progress, args.crops,
                             on_fault)  # fmt: skip


def _check_folder(args: FitCodec, readers: list) -> None:
    """UsageError when the folder holds something else, or a codec with other settings."""
    from transfusion.checkpoint.save import list_checkpoints
    from transfusion.data.prepare import check_not_nested

    check_not_nested(readers, args.out)
    for name, content in (("run.json", "a run"), ("recipe.json", "a data set"), ("dataset.json", "a data set")):
        if (args.out / name).exists():
            raise UsageError(f"{args.out} holds {content}: give another --out")
    path, parts = args.out / "fit.json", {"network": args.network, "training": args.training}
    for part, config in parts.items() if list_checkpoints(args.out) else ():
        # A field that a later version added has its default, which is what earlier versions did.
        before = _read_config(type(config), path, part)
        for name, value in asdict(config).items():
            if before[name] != value:
                raise UsageError(f"{args.out} started with {part}.{name} {before[name]}, not {value}: give another --out")


def _read_config(kind: type[Config], path: Path, part: str) -> dict:
    try:
        return asdict(from_json(kind, read_json(path).get(part, {})))
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


def _train(trainer, args: FitCodec) -> bool:
    """Train from the last checkpoint to the last step, then write the codec. False when a signal stopped it earlier."""
    if trainer.ranks.is_main:
        write_json(args.out / "fit.json", {"network": asdict(args.network), "training": asdict(args.training)})
    trainer.loop.restore(print_status)
    if trainer.ranks.is_main:
        print_status(f"training on {trainer.device} with {', '.join(trainer.loss_names)}, into {args.out}")
        warn_about_warmup(args.training, print_status)
    done = trainer.loop.progress.step >= args.training.steps or trainer.train()
    if done and trainer.ranks.is_main:
        _finish(trainer, args)
    return done


def _finish(trainer, args: FitCodec) -> None:
    """Normalise the latents, and write the codec, codec.json and the page."""
    from hashlib import sha256

    from transfusion.codecs.autoencoder import Autoencoder
    from transfusion.codecs.codec import codec_to_bytes
    from transfusion.codecs.vq import VQ

    is_vq = args.network.codes is not None
    codec = VQ(trainer.ema) if is_vq else Autoencoder.fit(trainer.ema, trainer.sample_images())
    content, quality = codec_to_bytes(codec), trainer.evaluate()
    write_whole(args.out / "codec.safetensors", content)
    write_json(args.out / "codec.json", {
        "kind": codec.kind, "channels": codec.channels, "downsampling": codec.downsampling,
        "sha256": sha256(content).hexdigest(),
        "heldout": quality, "losses": trainer.loss_names, "steps": trainer.loop.progress.step,
        "seconds": round(trainer.loop.progress.seconds), **({"codes": codec.codes} if is_vq else {}),
    })  # fmt: skip
    page = _page(trainer, codec, quality, args)
    usage = f", {quality['codes_used']:.1%} of the codes, perplexity {quality['perplexity']:,.0f}" if is_vq else ""
    print_status(f"held out: PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.4f}{usage}")
    print_status(f"wrote {args.out / 'codec.safetensors'} and {page}")


def _page(trainer, codec, quality: dict, args: FitCodec) -> Path:
    from transfusion.page import Page

    is_vq = args.network.codes is not None
    page = Page(args.out.name, "A VQ codec" if is_vq else "An autoencoder")
    latents = f"one of {codec.codes:,} codes" if is_vq else f"latents of {codec.channels} numbers"
    page.paragraph(
        f"Images of {args.size} pixels become {latents} for each {codec.downsampling} x {codec.downsampling} pixels, from "
        f"which they are reconstructed. Trained {trainer.loop.progress.step:,} steps with {', '.join(trainer.loss_names)}."
    )
    same_images = args.crops and not trainer.source_has_heldout
    heldout = "held-out crops of the training images" if same_images else "held-out images"
    figures = [
        (f"{quality['psnr']:.2f} dB", "PSNR", f"of {quality['count']} {heldout}; higher is better"),
        (f"{quality['ssim']:.4f}", "SSIM", "of the same; 1 is a perfect reconstruction"),
    ]
    if is_vq:
        figures += [
            (f"{quality['codes_used']:.1%}", "codes used", f"of {codec.codes:,}, by the same images"),
            (f"{quality['perplexity']:,.0f}", "perplexity", "of the codes; their number if all are used equally"),
        ]
    page.figures(figures)
    originals = [trainer.images[n] for n in trainer.heldout[:NUM_SHOWN]]
    page.heading(f"{heldout.capitalize()}, above, and their reconstructions")
    half = len(originals) // 2 or 1
    for start in range(0, len(originals), half):
        row = originals[start : start + half]
        reconstructions = [codec.decode(codec.encode(picture)) for picture in row]
        page.strip([("original", row), ("reconstruction", reconstructions)], width=110)
    return page.write(args.out / "reconstructions.html")
