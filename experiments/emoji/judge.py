"""A judge of drawings: which concept does a picture show, and in which style?

One small residual network maps a picture to a unit vector that is alike for one concept in all styles; another tells the
four styles apart. Both learn from the training cells alone and are used only to judge. A drawing is looked up among the real
pictures of the *other* styles: a copy of the asked picture itself cannot help. `top1` and `top5` say how often the asked
concept is the nearest, or among the five nearest; `style` how often the style is the asked one.

Every figure stands between a ceiling and two floors: real held-out pictures judged the same way; chance; and the nearest
picture by mean colours.

    python -m experiments.emoji.judge data/emoji --out runs/emoji-judge
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.emoji.packages import STYLES
from transfusion.seeding import derive_seed

SIDE = 32
NUM_FEATURES = 128
CHANNELS = 32, 64, 128
STYLE_CHANNELS = 16, 32, 64
TEMPERATURE = 0.1  # of the similarities in the loss
CONCEPTS_PER_BATCH = 48  # each in two styles
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
COLOUR_SIDE = 4  # the colour baseline compares pictures of 4x4 mean colours


@dataclass(frozen=True)
class Options:
    data: tyro.conf.Positional[Path] = Path("data/emoji")
    """Folder that `python -m experiments.emoji.dataset` wrote."""
    out: Path = Path("runs/emoji-judge")
    """Folder of the judge."""
    steps: int = 1500
    """Optimizer steps of 96 pictures."""
    seed: int = 0
    """Seed of the weights and of the batches."""


@dataclass(frozen=True)
class Cells:
    """Pictures of one or both splits with what they show."""

    pixels: Tensor
    """(N, 3, 32, 32) float32 between -1 and 1."""
    concepts: list[str]
    styles: list[str]
    kinds: list[str]
    """train, cell or concept (held out)."""
    is_flag: list[bool]

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def captions(self) -> list[str]:
        """The caption of each cell, such as "pizza, openmoji"."""
        return [f"{concept}, {style}" for concept, style in zip(self.concepts, self.styles, strict=True)]

    def where(self, keep: Sequence[bool]) -> "Cells":
        """The cells whose entry in `keep` is true."""
        return self.take([n for n, kept in enumerate(keep) if kept])

    def take(self, ids: Sequence[int]) -> "Cells":
        """The cells with these numbers, in this order."""
        ids = list(ids)
        lists = ([values[n] for n in ids] for values in (self.concepts, self.styles, self.kinds, self.is_flag))
        return Cells(self.pixels[ids], *lists)


def read_cells(folder: Path) -> Cells:
    """All pictures of the data set."""
    places = [folder / "pictures" / split for split in ("train", "validation")]
    rows = [(place, json.loads(line)) for place in places
            for line in (place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    pixels = torch.cat([preprocess([np.asarray(Image.open(place / row["file_name"]))]) for place, row in rows])
    return Cells(pixels, [row["concept"] for _, row in rows], [row["style"] for _, row in rows],
                 [row.get("heldout", "train") for _, row in rows], [row["flag"] for _, row in rows])  # fmt: skip


def preprocess(images: Sequence[np.ndarray]) -> Tensor:
    """(Y, X, 3) uint8 of any sizes -> (N, 3, 32, 32) between -1 and 1, with antialiasing."""
    batch = [torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1 for image in images]  # (1, 3, Y, X) each
    return torch.cat([F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True) for x in batch])


class Block(nn.Module):
    """Two convolutions with a residual connection; (B, C, Y, X) -> (B, out, Y / stride, X / stride)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def build_network(channels: Sequence[int], pool: int, out: int) -> nn.Sequential:
    """(N, 3, 32, 32) -> (N, out). Means of pool x pool places of the last block's 8x8 keep where something is."""
    first, second, third = channels
    blocks = Block(3, first, 1), Block(first, second, 2), Block(second, third, 2)  # (N, channels[-1], 8, 8)
    return nn.Sequential(*blocks, nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(third * (8 // pool) ** 2, out))


class Judge(nn.Module):
    """Pictures (N, 3, 32, 32) -> unit vectors (N, 128) of the concept, and logits (N, 4) of the style."""

    def __init__(self):
        super().__init__()
        self.concept = build_network(CHANNELS, 2, NUM_FEATURES)
        self.style = build_network(STYLE_CHANNELS, 8, len(STYLES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.concept(pixels), dim=1), self.style(pixels)

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> tuple[Tensor, list[str]]:
        """Unit vectors (N, 128), and the most likely style of each picture."""
        self.eval()
        vectors, logits = zip(*(self(batch) for batch in pixels.split(256)), strict=True)
        return torch.cat(vectors), [STYLES[n] for n in torch.cat(logits).argmax(1).tolist()]


def train(cells: Cells, steps: int, seed: int) -> Judge:
    """Train on cells; each batch has CONCEPTS_PER_BATCH concepts in two styles each.

    loss = supervised contrastive loss of the concept (Khosla et al. 2020, arXiv 2004.11362, one positive each)
           + cross-entropy of the style

    Much blur and noise would hide what tells the styles apart: pictures for the style have little of both.
    """
    styles_of = defaultdict(list)
    for n, concept in enumerate(cells.concepts):
        styles_of[concept].append(n)
    several = [ids for ids in styles_of.values() if len(ids) > 1]
    style_ids = torch.tensor([STYLES.index(style) for style in cells.styles])
    torch.manual_seed(derive_seed("emoji judge", seed))
    rng = np.random.default_rng(derive_seed("emoji judge batches", seed))
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for step in range(steps):
        chosen = rng.choice(len(several), min(CONCEPTS_PER_BATCH, len(several)), replace=False)
        pairs = [rng.choice(several[n], 2, replace=False) for n in chosen]
        ids = torch.tensor(np.array(pairs).T.reshape(-1))  # (2 * C,): first styles, then second ones
        moved = move(cells.pixels[ids])
        first, second = F.normalize(judge.concept(disturb(moved, 1.0)), dim=1).chunk(2)
        similarity = first @ second.T / TEMPERATURE  # (C, C)
        same = torch.arange(len(first))
        concept_loss = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
        style_loss = F.cross_entropy(judge.style(disturb(moved, 0.3)), style_ids[ids])
        loss = concept_loss + style_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1} of {steps}: loss of the concept {concept_loss.item():.3f}, of the style "
                  f"{style_loss.item():.3f}", flush=True)
    return judge.eval()


def move(pixels: Tensor) -> Tensor:
    """Random small rotations, scales and shifts (white outside). (B, 3, 32, 32) -> the same shape."""
    size = len(pixels)
    angle, scale = (torch.rand(size) - 0.5) * 0.35, 1 + (torch.rand(size) - 0.5) * 0.3
    shift = (torch.rand(size, 2) - 0.5) * 0.25
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1  # 0 outside = white


def disturb(moved: Tensor, most: float) -> Tensor:
    """Random blur, noise and brightness, up to a share `most`: a drawing is judged by what it shows, not by its sharpness.
    (B, 3, 32, 32) -> the same shape."""
    smooth = F.interpolate(F.avg_pool2d(moved, 2), moved.shape[2:], mode="bilinear")
    blur, noise, light = most * torch.rand(3, len(moved), 1, 1, 1)
    blurred = moved.lerp(smooth, blur)
    return (blurred + 0.1 * noise * torch.randn_like(moved) + 0.2 * (light - most / 2)).clamp(-1, 1)


@dataclass(frozen=True)
class Verdict:
    """Shares of drawings, 0 to 1."""

    top1: float
    top5: float
    style: float
    count: int


def rank_concepts(vectors: Tensor, asked: Cells, gallery: "Gallery") -> np.ndarray:
    """Rank (N,) of the asked concept of each vector (N, F) among the concepts of the gallery in the other styles: 0 is the
    nearest. A concept that no other style has comes last."""
    names = sorted(set(gallery.cells.concepts))
    index = {name: n for n, name in enumerate(names)}
    columns = torch.tensor([index[concept] for concept in gallery.cells.concepts])
    ranks = []
    for n, (concept, style) in enumerate(zip(asked.concepts, asked.styles, strict=True)):
        others = torch.tensor([other != style for other in gallery.cells.styles])
        nearness = torch.full((len(names),), -torch.inf)
        nearness.scatter_reduce_(0, columns[others], gallery.vectors[others] @ vectors[n], "amax")
        asked_nearness = nearness[index[concept]]
        ranks.append(int((nearness > asked_nearness).sum()) if torch.isfinite(asked_nearness) else len(names))
    return np.array(ranks)


@dataclass(frozen=True)
class Gallery:
    """The real pictures among which concepts are looked up, with their vectors (N, F)."""

    cells: Cells
    vectors: Tensor


def judge_pictures(judge: Judge, pixels: Tensor, asked: Cells, gallery: Gallery) -> Verdict:
    """Judge pictures (N, 3, 32, 32) as drawings of the cells `asked`."""
    vectors, styles = judge.features(pixels)
    same_style = [predicted == style for predicted, style in zip(styles, asked.styles, strict=True)]
    return _to_verdict(rank_concepts(vectors, asked, gallery), same_style)


def judge_by_colours(pixels: Tensor, asked: Cells, cells: Cells) -> Verdict:
    """The floor: concepts by the nearest mean colours, the style by chance."""
    ranks = rank_concepts(colour_vectors(pixels), asked, Gallery(cells, colour_vectors(cells.pixels)))
    return _to_verdict(ranks, [1 / len(STYLES)])


def _to_verdict(ranks: np.ndarray, same_style: Sequence[float]) -> Verdict:
    return Verdict(float((ranks < 1).mean()), float((ranks < 5).mean()), float(np.mean(same_style)), len(ranks))


def colour_vectors(pixels: Tensor) -> Tensor:
    """(N, 3, 32, 32) -> (N, 48) unit vectors of 4x4 mean colours, white as zero: the baseline that sees no shapes."""
    return F.normalize(F.adaptive_avg_pool2d(pixels - 1, COLOUR_SIDE).flatten(1), dim=1)


def main(options: Options) -> None:
    cells = read_cells(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    judge = train(cells.where([kind == "train" for kind in cells.kinds]), options.steps, options.seed)
    save_file(judge.state_dict(), options.out / "judge.safetensors")
    gallery = Gallery(cells, judge.features(cells.pixels)[0])
    print("kind     concepts pictures top-1  top-5  style  by colours: top-1 top-5")
    for kind in ("train", "cell", "concept"):
        for flags in (False, True):
            asked = cells.where([k == kind and flag == flags for k, flag in zip(cells.kinds, cells.is_flag, strict=True)])
            if len(asked):
                real = judge_pictures(judge, asked.pixels, asked, gallery)
                floor = judge_by_colours(asked.pixels, asked, cells)
                print(f"{kind:8} {'flags' if flags else 'others':8} {real.count:8} {real.top1:.3f}  {real.top5:.3f}  "
                      f"{real.style:.3f}  {floor.top1:17.3f} {floor.top5:.3f}")  # fmt: skip


def open_judge(folder: Path) -> Judge:
    """The judge that `main` wrote."""
    judge = Judge()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.eval()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
