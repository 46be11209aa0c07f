"""Keeps a codebook in use while it learns: counts which codes are used, and starts those anew that are not."""

import torch
from torch import Tensor

from transfusion.codecs.config import CodecTrainingConfig
from transfusion.codecs.vq import QuantisedNetwork
from transfusion.seeding import derive_seed


class CodebookReviver:
    """Of one network in training and its moving average.

    A code that is not the nearest of anything gets no gradient, so it would stay where it is for good. It moves to a latent
    pixel of the step instead, the likelier the farther that is from its own code (as k-means++ starts), so that new codes go
    where they are missed. At the start all count as unused: the codebook begins with what the encoder makes.
    """

    def __init__(
        self, network: QuantisedNetwork, average: QuantisedNetwork, optimizer: torch.optim.Optimizer,
        config: CodecTrainingConfig,
    ):  # fmt: skip
        self.network, self.ema, self.optimizer, self.config = network, average, optimizer, config
        device = network.codebook.device
        self.idle = torch.full((network.config.codes,), config.revive_after, device=device)  # (codes,) steps without use
        self.revived = torch.zeros((), dtype=torch.int64, device=device)  # () so far

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores or fills in."""
        return {"idle": self.idle, "revived": self.revived}

    @torch.no_grad()
    def update(self, step: int, latents: Tensor, codes: Tensor) -> dict[str, float]:
        """After an update. latents (n, C) and their codes (n,) are the step's; says how many codes were used in it."""
        counts = torch.bincount(codes, minlength=len(self.idle))  # (codes,)
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        dead = (self.idle >= self.config.revive_after).nonzero()[:, 0]  # (dead,)
        if len(dead):
            self._revive(dead, step, latents, codes)
        return use_of(counts) | {"revived": self.revived.item()}

    def _revive(self, dead: Tensor, step: int, latents: Tensor, codes: Tensor) -> None:
        """As many as there are latent pixels off their codes; the rest of the dead wait for the next step."""
        codebook = self.network.codebook
        missed = (latents - codebook[codes]).square().sum(1).double().cpu()  # (n,)
        dead = dead[: int(missed.count_nonzero())]  # (revived,)
        if not len(dead):
            return
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "revival", step))
        places = torch.multinomial(missed, len(dead), generator=generator).to(latents.device)  # (revived,)
        codebook[dead] = self.ema.codebook[dead] = latents[places]  # (revived, C)
        for moment in ("exp_avg", "exp_avg_sq"):  # those of where it was before
            self.optimizer.state[codebook][moment][dead] = 0
        self.idle[dead] = 0
        self.revived += len(dead)


def use_of(counts: Tensor) -> dict[str, float]:
    """Of counts (codes,): the share of codes that were used, and the perplexity, as many codes as if all were used alike."""
    shares = counts.double() / counts.sum()  # (codes,)
    return {"codes_used": (counts > 0).double().mean().item(), "perplexity": torch.special.entr(shares).sum().exp().item()}
