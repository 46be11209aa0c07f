"""How much of the machine's matrix speed training reaches: the run's own steps beside bare matrix products, in one call.

    python benchmarks/training.py [--run digits] [--steps 40]
"""

import json
import statistics
import time
from dataclasses import dataclass, replace

import torch
import tyro

from transfusion import objective
from transfusion.config import named_run
from transfusion.data.loader import Loader
from transfusion.data.sources import fit, open_sources
from transfusion.model.flops import training_flops
from transfusion.model.transfusion import build
from transfusion.parallel import lower_precision, pick_device
from transfusion.training.optimizer import build_optimizer, update_average


@dataclass
class Options:
    run: str = "digits"
    steps: int = 40
    device: str = "auto"


def main(options: Options) -> None:
    """Steps and products in turn, so that a machine that slows down slows both."""
    device = pick_device(options.device)
    run = named_run(options.run)
    encoder = fit(run.data, run.model.patch_size, 0)
    run = replace(run, model=replace(run.model, vocabulary=encoder.vocabulary.size))
    batches = Loader(open_sources(run.data, "train"), encoder).batches()
    model, average = build(run.model, 0, device), build(run.model, 0, device).requires_grad_(False)
    optimizer = build_optimizer(model, run.training)
    rows, width, hidden = run.data.rows * run.data.row_length, run.model.width, run.model.size_of_hidden
    shapes = {(rows, width, width), (rows, width, 3 * width), (rows, width, 2 * hidden), (rows, hidden, width)}
    step_speed, positions, product_speed = [], [], {shape: [] for shape in sorted(shapes)}
    for step in range(options.steps + 5):
        batch, _ = next(batches)
        draws = objective.draw(batch, run.diffusion)
        seconds = timed(lambda: train(model, average, optimizer, batch, draws, run, device), device)  # noqa: B023
        if step >= 5:
            step_speed.append(training_flops(batch, run.model) / seconds)
            positions.append(batch.positions / seconds)
        for shape in product_speed:
            product_speed[shape].append(product(shape, device))
    reached = statistics.median(step_speed)
    products = {"x".join(map(str, shape)): statistics.median(found) for shape, found in product_speed.items()}
    square = products[f"{rows}x{width}x{width}"]
    print(json.dumps({
        "run": run.name, "device": str(device), "threads": torch.get_num_threads(),
        "positions_per_second": round(statistics.median(positions)),
        "training_gflops": round(reached / 1e9, 1),
        "products_gflops": {name: round(speed / 1e9, 1) for name, speed in products.items()},
        "of_rows_x_width_x_width": round(reached / square, 3),
        "of_best_product": round(reached / max(products.values()), 3),
    }, indent=2))  # fmt: skip


def train(model, average, optimizer, batch, draws, run, device) -> None:
    """One whole step, as the trainer takes it."""
    with lower_precision(device):
        losses = objective.losses(model, batch.to(device), draws, run.diffusion)
    objective.total(losses, losses.text_count, losses.image_count, run.training.image_weight).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.training.clip)
    optimizer.step()
    optimizer.zero_grad()
    update_average(average, model, 100, run.training.average)


def product(shape: tuple[int, int, int], device: torch.device) -> float:
    """FLOP/s of a product of this shape, over about the work of one layer's forward and backward."""
    m, k, n = shape
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    with lower_precision(device):
        return 12 * 2 * m * k * n / timed(lambda: [a @ b for _ in range(12)], device)


def timed(work, device: torch.device) -> float:
    """Seconds until it is done."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
