"""The recipe of the run on emoji: codec, prepared data, training, and fine-tuning on edits between the styles.

    python -m experiments.emoji.dataset data/emoji
    python -m experiments.emoji.recipe data/emoji --out runs/emoji      # about two hours on two cores

OUT has codec/, data/, run/ and edits/, each made by one `transfusion` command that is printed before it runs. The same
command resumes an interrupted one. Why these settings: LOG.md, "The recipe of emoji".
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.lab import run_command
from transfusion.parallel import has_cpu_bfloat16

CODEC = (
    "--size", "32x32",
    "--network.channels", "8", "--network.width", "16", "--network.multipliers", "1", "2", "4",
    "--training.batch-size", "32", "--training.learning-rate", "3e-3", "--training.min-learning-rate", "2e-5",
    "--training.ema-decay", "0.998",
    "--training.heldout", "600", "--training.validate-every", "1000", "--training.checkpoint-every", "1000",
)  # fmt: skip
AUTOENCODER = "--training.kl-weight", "1e-3"
DATA = ("--sizes", "32x32", "--tokenizer-size", "2000", "--fit-documents", "7000")
MODEL = (
    "--model.width", "256", "--model.layers", "4", "--model.heads", "4", "--model.intermediate-size", "512",
    "--model.tie-word-embeddings", "--parallel.cpu-matmul", "bfloat16" if has_cpu_bfloat16() else "auto",
)  # fmt: skip
TRAINING = (
    "--data.sources", "pictures", "interleaved", "--data.mixture-weights", "0.8", "0.2",
    "--data.seq-len", "256", "--training.batch-size", "16", "--data.image-first", "0.25", "--data.image-first-max-t", "0.3",
    "--training.learning-rate", "3e-3", "--training.min-learning-rate", "3e-5", "--training.warmup-steps", "200",
    "--training.ema-decay", "0.999", "--training.image-weight", "5", "--training.preview-every", "0",
    "--training.validate-every", "1000", "--training.checkpoint-every", "500",
)  # fmt: skip
EDITS = (
    "--data.sources", "edits", "--data.mixture-weights", "1",
    "--data.seq-len", "256", "--training.batch-size", "16",
    "--training.learning-rate", "1e-3", "--training.min-learning-rate", "3e-5", "--training.warmup-steps", "50",
    "--training.ema-decay", "0.995", "--training.image-weight", "5", "--training.preview-every", "0",
    "--training.validate-every", "500", "--training.checkpoint-every", "500",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    data: tyro.conf.Positional[Path] = Path("data/emoji")
    """Folder that `python -m experiments.emoji.dataset` wrote."""
    out: Path = Path("runs/emoji")
    """Folder of the codec, the prepared data and the runs."""
    codec_steps: int = 5_500
    """Optimizer steps of the codec."""
    steps: int = 11_000
    """Optimizer steps of the run."""
    edit_steps: int = 1_000
    """Optimizer steps of the fine-tuning on edits."""


def main(options: Options) -> None:
    codec, data, run, edits = (options.out / name for name in ("codec", "data", "run", "edits"))
    sources = [options.data / name for name in ("pictures", "interleaved", "edits")]
    if not (codec / "codec.safetensors").exists():
        run_command("data", "fit-codec", "small", sources[0], "--out", codec, *CODEC, *AUTOENCODER,
                    "--training.steps", str(options.codec_steps))  # fmt: skip
    if not (data / "dataset.json").exists():
        run_command("data", "prepare", *sources, "--out", data, "--codec", codec, *DATA)
    run_command("train", "small", "--data", data, "--out", run, *MODEL, *TRAINING, "--training.steps", str(options.steps))
    run_command("train", "small", "--from", run, "--data", data, "--out", edits, *MODEL, *EDITS,
                "--training.steps", str(options.edit_steps))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
