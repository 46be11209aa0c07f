"""transfusion data fit-codec: an autoencoder (or VQ codec) of one's own, from one's own pictures."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from transfusion.cli.screen import Device, UsageError, nearest, parse, progress, say
from transfusion.cli.sources import Reading, Sources, open_readers
from transfusion.codecs.config import AutoencoderConfig, CodecTrainingConfig
from transfusion.config import FaultToleranceConfig, from_json, parse_size

SHOWN = 16  # held-out pictures on the page


@dataclass(frozen=True)
class Named:
    """What is trained; --network.* and --training.* change any number of it."""

    network: AutoencoderConfig
    training: CodecTrainingConfig


NAMED = {
    "paper": Named(AutoencoderConfig(), CodecTrainingConfig(gan_from=50_000)),
    "small": Named(
        AutoencoderConfig(width=16, multipliers=(1, 2, 4), blocks=1, attention=False),
        CodecTrainingConfig(
            steps=1_800, batch_size=16, learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=50, ema_decay=0.99,
            checkpoint_every=250, validate_every=250,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FitCodec:
    """Train an autoencoder on the pictures of some sources; the same command again goes on where it stopped.

    It writes a folder that `transfusion data prepare --codec FOLDER` takes, with a page of originals beside reconstructions.
    With --network.codes N it has a codebook of N codes (VQ), for runs with --model.patches codes.
    """

    out: Path
    """The folder to make."""
    network: AutoencoderConfig
    training: CodecTrainingConfig
    fault_tolerance: FaultToleranceConfig
    sources: Sources = ()
    """What to read; see transfusion data --help."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    size: str = "256x256"
    """Width x height to which pictures are cut for training."""
    most: int = 50_000
    """At most so many pictures, or crops, are used."""
    crops: int = 0
    """So many crops of each picture, at random places and scales; 0: the picture itself, resized and its middle cut out.
    Unless the source holds pictures out, held-out crops are of those that are learnt from, and may overlap others."""
    device: Device = "auto"


def fit_codec(arguments: list[str]) -> None:
    """Gather, train, take statistics, show."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: transfusion data fit-codec NAME SOURCE... --out FOLDER [options]\n\n"
              f"NAME is one of {', '.join(NAMED)}. "
              "transfusion data fit-codec NAME --help lists every option with its own defaults.")  # fmt: skip
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in NAMED:
        raise UsageError(f"there is no codec {name!r}{nearest(name, NAMED)}; there are {', '.join(NAMED)}")
    default = FitCodec(Path("codecs") / name, NAMED[name].network, NAMED[name].training, FaultToleranceConfig())
    asked = parse(FitCodec, f"data fit-codec {name}", rest, default)
    size = parse_size(asked.size)
    if any(side % asked.network.downsampling for side in size):
        raise UsageError(f"a picture of {asked.size} cannot be cut into squares of {asked.network.downsampling} pixels (f)")
    if asked.crops < 0 or asked.most < 1:
        raise UsageError(f"--crops must be at least 0 and --most at least 1, not {asked.crops} and {asked.most}")
    readers = open_readers(asked.sources, asked.reading)

    from transfusion.parallel import Ranks, pick_device
    from transfusion.training.codec import CodecTrainer

    device = pick_device(asked.device)
    _check_folder(asked, readers)
    with Ranks.of_torchrun(device) as ranks:
        if ranks.is_main:
            asked.out.mkdir(parents=True, exist_ok=True)
            found = _gather(asked, readers, size)
            lost = f"; {found.faults:,} records of no use" if found.faults else ""
            say(f"{len(found.images):,} different {'crops' if asked.crops else 'pictures'} of {asked.size}{lost}")
        ranks.barrier()
        if not ranks.is_main:
            found = _gather(asked, readers, size)
        trainer = CodecTrainer(
            asked.network, asked.training, asked.out, found.images, device, ranks, asked.fault_tolerance, found.heldout
        )
        _train(trainer, asked)


def _gather(asked: FitCodec, readers: list, size: tuple[int, int]):
    from transfusion.data.crops import gather_images

    named = []

    def hear(fault) -> None:
        named.append(fault)
        if len(named) <= SHOWN:
            say(f"  {fault}")

    with progress("reading pictures") as tick:
        return gather_images(readers, size, asked.network.image_channels, asked.most, asked.out, tick, asked.crops, hear)


def _check_folder(asked: FitCodec, readers: list) -> None:
    """A codec has a folder of its own, apart from its pictures', and goes on as it began or not at all."""
    from transfusion.checkpoint.save import list_checkpoints
    from transfusion.data.prepare import check_not_nested

    check_not_nested(readers, asked.out)
    for name, what in (("run.json", "a run"), ("recipe.json", "a data set"), ("dataset.json", "a data set")):
        if (asked.out / name).exists():
            raise UsageError(f"{asked.out} holds {what}: give another --out")
    if list_checkpoints(asked.out):
        _check_same(asked)


def _train(trainer, asked: FitCodec) -> None:
    """To the last step, from wherever it stands, and then the codec's own files."""
    from transfusion.disk import write_json

    if trainer.ranks.is_main:
        write_json(asked.out / "fit.json", {"network": asdict(asked.network), "training": asdict(asked.training)})
    trainer.loop.restore(say)
    if trainer.ranks.is_main:
        say(f"training on {trainer.device} with {', '.join(trainer.loss_names)}, into {asked.out}")
    done = trainer.loop.progress.step >= asked.training.steps or trainer.train()
    if done and trainer.ranks.is_main:
        _finish(trainer, asked)


def _check_same(asked: FitCodec) -> None:
    from transfusion.disk import read_json

    path, parts = asked.out / "fit.json", {"network": asked.network, "training": asked.training}
    known = read_json(path)
    for part, config in parts.items():
        # A field that a later version added is taken for its default, which is what was done before there was one.
        began = asdict(from_json(type(config), known.get(part, {}), f"{path}: {part}."))
        for name, value in asdict(config).items():
            if began[name] != value:
                raise UsageError(f"{asked.out} began with {part}.{name} {began[name]}, not {value}: give another --out")


def _finish(trainer, asked: FitCodec) -> None:
    """Statistics of the latents, the codec's own files, and the page."""
    from hashlib import sha256

    from transfusion.codecs.autoencoder import Autoencoder
    from transfusion.codecs.codec import codec_to_bytes
    from transfusion.codecs.vq import VQ
    from transfusion.disk import write_json, write_whole

    quantised = asked.network.codes is not None
    codec = VQ(trainer.ema) if quantised else Autoencoder.fit(trainer.ema, trainer.sample_images())
    content, quality = codec_to_bytes(codec), trainer.evaluate()
    write_whole(asked.out / "codec.safetensors", content)
    write_json(asked.out / "codec.json", {
        "kind": codec.kind, "channels": codec.channels, "downsampling": codec.downsampling,
        "sha256": sha256(content).hexdigest(),
        "heldout": quality, "losses": trainer.loss_names, "steps": trainer.loop.progress.step,
        "seconds": round(trainer.loop.progress.seconds), **({"codes": codec.codes} if quantised else {}),
    })  # fmt: skip
    page = _page(trainer, codec, quality, asked)
    use = f", {quality['codes_used']:.1%} of the codes, perplexity {quality['perplexity']:,.0f}" if quantised else ""
    say(f"held out: PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.4f}{use}")
    say(f"wrote {asked.out / 'codec.safetensors'} and {page}")


def _page(trainer, codec, quality: dict, asked: FitCodec) -> Path:
    from transfusion.page import Page

    quantised = asked.network.codes is not None
    page = Page(asked.out.name, "A VQ codec" if quantised else "An autoencoder")
    become = f"one of {codec.codes:,} codes" if quantised else f"latents of {codec.channels} numbers"
    page.paragraph(
        f"Pictures of {asked.size} pixels become {become} for each {codec.downsampling} x {codec.downsampling} "
        f"pixels, and come back. Trained {trainer.loop.progress.step:,} steps with {', '.join(trainer.loss_names)}."
    )
    same = asked.crops and not trainer.source_has_heldout
    held = "held-out crops of the pictures that it learnt from" if same else "held-out pictures"
    figures = [
        (f"{quality['psnr']:.2f} dB", "PSNR", f"of {quality['count']} {held}; higher is better"),
        (f"{quality['ssim']:.4f}", "SSIM", "of the same; 1 is the picture itself"),
    ]
    if quantised:
        figures += [
            (f"{quality['codes_used']:.1%}", "codes used", f"of {codec.codes:,}, by the same pictures"),
            (f"{quality['perplexity']:,.0f}", "perplexity", "of the codes; their number if all are used alike"),
        ]
    page.figures(figures)
    shown = [trainer.images[n] for n in trainer.heldout[:SHOWN]]
    page.heading(f"{held.capitalize()}, above, and what comes back of them")
    half = len(shown) // 2 or 1
    for first in range(0, len(shown), half):
        group = shown[first : first + half]
        page.strip([("picture", group), ("returns", [codec.decode(codec.encode(picture)) for picture in group])], width=110)
    return page.write(asked.out / "reconstructions.html")
