"""Losses over the training steps, and whether the run overfits."""

from transfusion.page import Line, Page
from transfusion.report.material import Material
from transfusion.report.record import VELOCITY_ERROR, Record, running_mean

MAX_POINTS = 600  # of a line in a plot


def add_curves(page: Page, material: Material) -> None:
    """Losses over the training steps."""
    record = material.record
    if not record.metrics:
        return
    page.heading("Training curves")
    unit = "nats per code" if material.engine.vocabulary.num_image_codes else "mean squared error per value"
    for kind, label in (("text", "nats per token"), ("image", unit)):
        page.plot(f"{kind.capitalize()} loss", _curves(record, kind), "training step", f"loss ({label})", log=True)
    _add_velocity_errors(page, record)
    for sentence in record.overfitting():
        page.paragraph(sentence)
    uneven = " The text loss varies from batch to batch because the sources differ and their shares of a batch vary."
    page.paragraph(
        "Grey: training, each batch (thin) and the running mean. Colour: held-out data, with the EMA weights. The "
        "image loss cannot reach 0: part of the noise cannot be predicted." + (uneven if len(material.sources) > 1 else ""),
        muted=True,
    )


def _add_velocity_errors(page: Page, record: Record) -> None:
    """The held-out velocity errors: their mean over the training steps, and the last ones by t."""
    means, by_t = record.heldout("velocity_error"), record.velocity_errors_by_t()
    plots = ("Velocity error", "training step", means), ("Velocity error by t", "t, from image to noise", by_t)
    for title, x_label, series in plots:
        lines = {source: Line(x, y, "image", dots=True, dashed=n > 0) for n, (source, (x, y)) in enumerate(series.items())}
        page.plot(title, lines, x_label, "mean squared error per value", log=True)
    if means:
        page.paragraph(VELOCITY_ERROR, muted=True)


def _curves(record: Record, kind: str) -> dict[str, Line]:
    lines = {}
    steps, losses = record.series(f"{kind}_loss")  # a step without images has no image loss
    if steps:
        stride = -(-len(steps) // MAX_POINTS)
        lines["batches"] = Line(steps[::stride], losses[::stride], faint=True)
        lines["training"] = Line(steps[::stride], running_mean(losses)[::stride])
    for n, (source, (steps, losses)) in enumerate(record.heldout(f"{kind}_loss").items()):
        lines[f"held out: {source}"] = Line(steps, losses, kind, dots=True, dashed=n > 0)
    return lines
