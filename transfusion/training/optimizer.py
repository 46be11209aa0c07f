"""AdamW, warm-up and cosine, and the moving average of the weights (section 4.1)."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from transfusion.config import TrainingConfig


def build_optimizer(
    model: nn.Module, config: TrainingConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only: norms and biases have nothing to gain from being near zero.

    `rates` multiplies the learning rate by part, the first word of a parameter's name; it stands in each group as "rate".
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = (rates or {}).get(name.partition(".")[0], 1.0)
            groups.setdefault((rate, parameter.dim() < 2), []).append(parameter)
    ordered = [
        {"params": parameters, "rate": rate, "weight_decay": 0.0 if flat else config.weight_decay}
        for (rate, flat), parameters in sorted(groups.items(), key=lambda one: one[0])
    ]
    if not ordered:
        raise ValueError("all that this model has is frozen: nothing would be learnt")
    fused = ordered[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(ordered, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def freeze(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Parts whose rate is 0 are not learnt: no gradient, no moments, no decay."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates.get(name.partition(".")[0], 1.0) > 0)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """For the step with this number, counted from 0: linear warm-up, then half a cosine down to the last."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    fall = (1 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + fall * (config.learning_rate - config.min_learning_rate)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Moves the average towards the weights; early on faster, so that it never remembers the start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: both moments, and the step as a 0-d tensor. Made if there is none yet.

    What is frozen has none.
    """
    found = {}
    learnt = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter not in learnt:
            continue
        state = optimizer.state[parameter]
        if not state:
            # Where AdamW keeps it: fused it counts on the device.
            place = parameter.device if optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        found |= {f"{name}.{part}": value for part, value in state.items()}
    return found
