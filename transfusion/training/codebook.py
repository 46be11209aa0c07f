"""Tracks which codes of a codebook are used in training, and moves unused codes to latents of the current step."""

import torch
from torch import Tensor

from transfusion.codecs.config import CodecTrainingConfig
from transfusion.codecs.vq import QuantisedNetwork
from transfusion.seeding import derive_seed


class CodebookReviver:
    """Revives the dead codes of a network and of its moving average.

    A code that is nearest to no latent gets no gradient and would never change. After `revive_after` steps without use it
    moves to a latent pixel of the step, sampled with probability proportional to its squared distance from its code (as in
    k-means++). At the start all codes count as unused, so that the codebook starts from the encoder's output.
    """

    def __init__(
        self, network: QuantisedNetwork, ema: QuantisedNetwork, optimizer: torch.optim.Optimizer, config: CodecTrainingConfig
    ):
        self.network, self.ema, self.optimizer, self.config = network, ema, optimizer, config
        device = network.codebook.device
        self.idle = torch.full((network.config.codes,), config.revive_after, device=device)  # (codes,) steps without use
        self.revived = torch.zeros((), dtype=torch.int64, device=device)  # () total number

    def tensors(self) -> dict[str, Tensor]:
        """The state that a checkpoint saves and restores."""
        return {"idle": self.idle, "revived": self.revived}

    @torch.no_grad()
    def update(self, step: int, latents: Tensor, codes: Tensor) -> dict[str, float]:
        """Called after an optimizer step with its latents (n, C) and codes (n,). Returns the usage for the metrics."""
        counts = torch.bincount(codes, minlength=len(self.idle))  # (codes,)
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        dead = (self.idle >= self.config.revive_after).nonzero()[:, 0]  # (dead,)
        if len(dead):
            self._revive(dead, step, latents, codes)
        return measure_usage(counts) | {"revived": self.revived.item()}

    def _revive(self, dead: Tensor, step: int, latents: Tensor, codes: Tensor) -> None:
        """Revive at most as many codes as there are latent pixels that differ from their code; the others wait."""
        codebook = self.network.codebook
        distances = (latents - codebook[codes]).square().sum(1).double().cpu()  # (n,)
        dead = dead[: int(distances.count_nonzero())]  # (revived,)
        if not len(dead):
            return
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "revival", step))
        index = torch.multinomial(distances, len(dead), generator=generator).to(latents.device)  # (revived,)
        codebook[dead] = self.ema.codebook[dead] = latents[index]  # (revived, C)
        for moment in ("exp_avg", "exp_avg_sq"):  # they belong to the old codes
            self.optimizer.state[codebook][moment][dead] = 0
        self.idle[dead] = 0
        self.revived += len(dead)


def measure_usage(counts: Tensor) -> dict[str, float]:
    """From counts (codes,): the share of codes in use, and the perplexity exp(entropy) of their distribution."""
    shares = counts.double() / counts.sum()  # (codes,)
    return {"codes_used": (counts > 0).double().mean().item(), "perplexity": torch.special.entr(shares).sum().exp().item()}
