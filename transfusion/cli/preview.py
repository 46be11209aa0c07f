"""Previews during training: images drawn from held-out captions, below the held-out pictures."""

from collections.abc import Callable

import torch

from transfusion.checkpoint.open import OpenedRun
from transfusion.cli.run_folder import RunFolder
from transfusion.codecs.pictures import contact_sheet
from transfusion.data.loader import read_pairs
from transfusion.inference.engine import Engine, Request
from transfusion.model.transfusion import Transfusion
from transfusion.parallel import Ranks

Preview = Callable[[Transfusion, int, Callable[[], None]], None]

NUM_PREVIEWS, PREVIEW_DOCUMENTS = 10, 256  # captions of a preview, and the held-out documents they are taken from


def previewer(folder: RunFolder, heldout: list, device: torch.device, ranks: Ranks) -> Preview | None:
    """A function that draws held-out captions with the averaged weights into samples/step-NNNNNN.png, below the held-out
    pictures; None without captions. Every rank draws, because each holds a part of the weights; the main rank writes."""
    pairs = next((pairs for pairs in (list(read_pairs(source, PREVIEW_DOCUMENTS)) for source in heldout) if pairs), None)
    if pairs is None:
        return None
    pictures = {}  # the first held-out picture of each caption
    for _, caption, pixels in pairs:
        pictures.setdefault(caption, pixels)
    captions = list(pictures)[:NUM_PREVIEWS]

    def preview(model: Transfusion, step: int, reset_watchdog: Callable[[], None]) -> None:
        engine = Engine(OpenedRun(**vars(folder.description), model=model, step=step, device=device))
        engine.on_step = lambda num_finished: reset_watchdog()
        answers = engine.generate([Request(parts=(caption,), num_images=2) for caption in captions])
        if not ranks.is_main:
            return
        drawn = {f"drawn {n + 1}": [samples[n].parts[0] for samples in answers] for n in range(2)}
        path = folder.path / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        contact_sheet(captions, {"held out": [pictures[caption] for caption in captions], **drawn}).save(path)

    return preview
