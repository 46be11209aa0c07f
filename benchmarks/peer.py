"""The peer's side of the comparison, in the peer's environment: there is nothing of ours but `sides`."""

import time
from importlib.metadata import version

import torch
from transfusion_pytorch import Transfusion

from benchmarks.sides import CHANNELS, CLIP, PROMPT, RATE, SEQUENCES, SIDE, TEXTS, VOCABULARY, obey, peak_memory


class Peer:
    """A model of width 256, 6 layers, 4 heads of 64, and whatever else the package takes for granted."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Transfusion(
            num_text_tokens=VOCABULARY, dim_latent=CHANNELS, modality_default_shape=(SIDE, SIDE), modality_num_dim=2,
            transformer={"dim": 256, "depth": 6, "heads": 4, "dim_head": 64},
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        self.passes = 0
        self.model.transformer.register_forward_pre_hook(self._count)

    def _count(self, *_) -> None:
        self.passes += 1

    def about(self) -> dict:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        versions = {name: version(name) for name in ("transfusion-pytorch", "torch")}
        return {"parameters": parameters, "threads": torch.get_num_threads(), "versions": versions}

    def train(self, steps: int) -> list[float]:
        """Seconds of each step, its data made in it."""
        self.model.train()
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            self.model([sequence() for _ in range(SEQUENCES)]).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - begun)
        return seconds

    def draw(self) -> dict:
        """One image behind a prompt, all choices left to the package; `max_length` (the prompt left out) ends it there."""
        self.model.eval()
        prompt, shape = torch.randint(VOCABULARY, (PROMPT,)), (SIDE, SIDE)
        self.passes, begun = 0, time.perf_counter()
        self.model.sample(
            prompt, max_length=SIDE**2 - 1, force_modality_at_start=(0, shape), return_unprocessed_modalities=True
        )
        return {"seconds": time.perf_counter() - begun, "passes": self.passes}


def sequence() -> list[torch.Tensor]:
    """Text, image, text, image, text: all chance."""
    first, *others = (torch.randint(VOCABULARY, (length,)) for length in TEXTS)
    return [first, *(part for text in others for part in (torch.randn(SIDE, SIDE, CHANNELS), text))]


if __name__ == "__main__":
    peer = Peer()
    obey({"about": peer.about, "train": peer.train, "draw": peer.draw, "memory": peak_memory})
