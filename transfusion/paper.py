"""The rows of the paper's Tables 3 to 9: the recipe of each, and how its images were generated and scored."""

from dataclasses import dataclass

from transfusion.runs import SIZES


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper: its run, and how its images were generated and scored.

    `sources` is "text" or "both". `batch_size` is training.batch_size: rows of 4,096 positions in a step. Runs on text alone
    have half of the run's, as much text as the others. FID of 5,000 images is about 5.4 higher than FID of 30,000 images: do
    not compare them.
    """

    table: int
    label: str
    run: str
    sources: str = "both"
    batch_size: int = 512
    guidance_scale: float | None = 3.0  # None: tuned, or no images
    fid_images: int | None = 5_000


PAPER: tuple[PaperRow, ...] = (
    PaperRow(3, "Transfusion", "7b", guidance_scale=5.0, fid_images=30_000),
    PaperRow(3, "Chameleon", "chameleon-7b", guidance_scale=5.0, fid_images=30_000),
    PaperRow(4, "Llama 2", "0.76b", "text", 256, None, None),
    PaperRow(4, "Transfusion: + diffusion", "0.76b", guidance_scale=None, fid_images=None),
    PaperRow(4, "Chameleon: + stability modifications", "chameleon-text-0.76b", "text", 256, None, None),
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
    PaperRow(9, "Transfusion", "7b-large", batch_size=1024, guidance_scale=None, fid_images=30_000),
)
