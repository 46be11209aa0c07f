"""The worker for transfusion-pytorch. It runs in the peer's environment and imports nothing of ours except `worker`."""

import time
from importlib.metadata import version

import torch
from transfusion_pytorch import Transfusion

from benchmarks.worker import (
    BATCH_SIZE,
    CHANNELS,
    LATENT_SIZE,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PROMPT_LENGTH,
    TEXT_LENGTHS,
    VOCAB_SIZE,
    peak_memory_mib,
    serve_commands,
)


class PeerModel:
    """A model of width 256 with 6 layers and 4 heads of 64; otherwise the package's defaults."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Transfusion(
            num_text_tokens=VOCAB_SIZE, dim_latent=CHANNELS, modality_default_shape=(LATENT_SIZE, LATENT_SIZE),
            modality_num_dim=2, transformer={"dim": 256, "depth": 6, "heads": 4, "dim_head": 64},
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.passes = 0
        self.model.transformer.register_forward_pre_hook(self._count_passes)

    def _count_passes(self, *_) -> None:
        self.passes += 1

    def set_onednn(self, enabled: int) -> None:
        """Compute the float32 products of training in oneDNN, as ours (see `transfusion.parallel.fast_matmul`), or not."""
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if enabled else "none"

    def describe(self) -> dict:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        versions = {name: version(name) for name in ("transfusion-pytorch", "torch")}
        return {"parameters": parameters, "threads": torch.get_num_threads(), "versions": versions}

    def train(self, steps: int) -> list[float]:
        """Seconds of each step, including its data."""
        self.model.train()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.model([random_sequence() for _ in range(BATCH_SIZE)]).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        return seconds

    def draw(self) -> dict:
        """Draw one image after a prompt with the package's defaults. `max_length` (without the prompt) stops after it."""
        self.model.eval()
        prompt, shape = torch.randint(VOCAB_SIZE, (PROMPT_LENGTH,)), (LATENT_SIZE, LATENT_SIZE)
        self.passes, start = 0, time.perf_counter()
        self.model.sample(
            prompt, max_length=LATENT_SIZE**2 - 1, force_modality_at_start=(0, shape), return_unprocessed_modalities=True
        )
        return {"seconds": time.perf_counter() - start, "passes": self.passes}


def random_sequence() -> list[torch.Tensor]:
    """Random text, image, text, image, text."""
    first, *others = (torch.randint(VOCAB_SIZE, (length,)) for length in TEXT_LENGTHS)
    return [first, *(part for text in others for part in (torch.randn(LATENT_SIZE, LATENT_SIZE, CHANNELS), text))]


if __name__ == "__main__":
    model = PeerModel()
    serve_commands({
        "about": model.describe, "onednn": model.set_onednn, "train": model.train, "draw": model.draw,
        "memory": peak_memory_mib,
    })  # fmt: skip
