"""Headings, paragraphs, pictures, plots and tables as one HTML file that needs nothing else."""

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as Picture

COLOURS = ("text", "image", "right", "wrong", "plain")  # STYLE says what they look like, on light and on dark


@dataclass(frozen=True)
class Cell:
    """One place of a sequence: what is read there (a word, or pictures in order) and what is to be said."""

    reads: str | Sequence[np.ndarray]
    says: str = ""  # empty: nothing
    colour: str = "plain"  # of what is read
    loss: str = "text"  # colour of what is said


@dataclass(frozen=True)
class Line:
    """A line of a plot. `faint`: behind the others and not in the key; `dots`: its points are marked."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "plain"
    faint: bool = False
    dots: bool = False
    dashed: bool = False


class Page:
    """A page that is filled from top to bottom. Whatever is handed in is shown as it is, never read as HTML.

    In paragraphs and notes, words between backticks are set as code. Pixels are (Y, X) or (Y, X, 1 | 3 | 4)
    uint8; of four colours the last says how solid.
    """

    def __init__(self, title: str, above: str = ""):
        self.title, self.above = title, above
        self.sections: list[tuple[str, list[str]]] = [("", [])]  # the first stands above all headings

    def heading(self, text: str) -> None:
        """Begin a section; the list of sections at the top of the page leads here."""
        self.sections.append((text, []))

    def say(self, text: str, quiet: bool = False) -> None:
        """A paragraph."""
        self._add(f'<p class="{"quiet" if quiet else "say"}">{_inline(text)}</p>')

    def figures(self, items: Iterable[tuple[str, str, str]]) -> None:
        """Headline figures: the number, what it counts, and a line that helps to read it."""
        cards = "".join(
            f"<li><b>{escape(number)}</b><strong>{escape(what)}</strong><span>{_inline(note)}</span></li>"
            for number, what, note in items
        )
        self._add(f'<ul class="figures">{cards}</ul>')

    def bars(self, title: str, rows: Sequence[tuple[str, float, str]], note: str = "") -> None:
        """Numbers to compare, each with its name and colour. Two such blocks in a row stand side by side."""
        most = max((value for _, value, _ in rows), default=0) or 1
        bars = "".join(
            f'<div class="bar {_colour(colour)}"><span>{escape(name)}</span><b>{value:.2f}</b>'
            f'<i style="width:{100 * value / most:.1f}%"></i></div>'
            for name, value, colour in rows
        )
        top = f"<figcaption>{escape(title)}</figcaption>"
        self._add(f'<figure class="half">{top}{bars}<p>{_inline(note)}</p></figure>')

    def table(self, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> None:
        """Rows of cells; the first cell of each names it."""
        names = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        top = f"<thead><tr>{names}</tr></thead>" if names else ""
        body = ""
        for first, *rest in rows:
            cells = "".join(f"<td>{_inline(cell)}</td>" for cell in rest)
            body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
        self._add(f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>')

    def picture(self, pixels: np.ndarray, text: str, alt: str) -> None:
        """One picture with a paragraph beside it."""
        self._add(f'<div class="beside">{_img(pixels, alt)}<p class="say">{_inline(text)}</p></div>')

    def pictures(self, items: Iterable[tuple[str, np.ndarray, bool | None]], width: int = 72) -> None:
        """A grid of pictures about `width` wide, each with a caption and a mark: right, wrong, None: none."""
        shown = "".join(
            f'<figure class="{_kind_of_mark(mark)}">{_img(pixels, caption)}'
            f"<figcaption>{_mark(mark)}{escape(caption)}</figcaption></figure>"
            for caption, pixels, mark in items
        )
        self._add(f'<div class="pictures" style="--width:{int(width)}px">{shown}</div>')

    def strip(
        self, rows: Sequence[tuple[str, Sequence[np.ndarray]]], over: Sequence[str] = (), width: int = 60
    ) -> None:
        """Film strips: rows of pictures, `width` wide or less, behind their names.

        `over` stands on top: a word above the names, then one above each column.
        """
        columns = max((len(pictures) for _, pictures in rows), default=0)
        word, *columns_named = over or ("number", *map(str, range(1, columns + 1)))
        cells = "".join(f"<small>{escape(name)}</small>" for name in over)
        for name, pictures in rows:
            alts = (f"{name}, {word} {column}" for column in columns_named)
            shown = "".join(_img(pixels, alt) for pixels, alt in zip(pictures, alts, strict=False))
            cells += f"<b>{escape(name)}</b>{shown}" + "<span></span>" * (columns - len(pictures))
        style = f"--columns:{columns};--width:{int(width)}px"
        self._add(f'<div class="strip{" film" if over else ""}" style="{style}">{cells}</div>')

    def sequence(self, cells: Iterable[Cell]) -> None:
        """Places of a sequence side by side: above what is read, below what is to be said."""
        self._add(f'<div class="sequence">{"".join(map(_cell, cells))}</div>')

    def passage(self, parts: Iterable[tuple[str | np.ndarray, str]], width: int = 72) -> None:
        """Text and pictures, `width` wide, in the order in which they stand, each with a word on where it comes from."""
        shown = ""
        for part, origin in parts:
            is_text = isinstance(part, str)
            inside = f"<q>{escape(part)}</q>" if is_text else _img(part, f"picture, {origin}")
            shown += f"<figure>{inside}<figcaption>{escape(origin)}</figcaption></figure>"
        self._add(f'<div class="passage" style="--width:{int(width)}px">{shown}</div>')

    def code(self, text: str, given: str = "") -> None:
        """Text to the letter; `given` stands before it, set off."""
        before = f"<mark>{escape(given)}</mark>" if given else ""
        self._add(f"<pre>{before}{escape(text)}</pre>")

    def fold(self, title: str, text: str) -> None:
        """Long text to the letter, shown when asked for."""
        self._add(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def plot(self, title: str, lines: Mapping[str, Line], across: str = "step", log: bool = False) -> None:
        """Lines by name over one axis; `log`: the upright axis is logarithmic.

        Two plots in a row stand side by side. Points that have no place on the axes are left out.
        """
        kept = {name: _placeable(line, log) for name, line in lines.items()}
        kept = {name: line for name, line in kept.items() if line.x}
        if not kept:
            return
        x_axis = Axis.over([x for line in kept.values() for x in line.x])
        y_axis = Axis.over([y for line in kept.values() for y in line.y], log)
        named = [(name, line) for name, line in kept.items() if not line.faint]
        key = "".join(
            f'<li class="{_looks(line)}"><i></i>{escape(name)} <b>{line.y[-1]:.3g}</b></li>'
            for name, line in named
        )
        spoken = "; ".join(f"{name}: from {line.y[0]:.3g} to {line.y[-1]:.3g}" for name, line in named)
        at_x, at_y = ([(axis.at(tick), tick) for tick in axis.ticks] for axis in (x_axis, y_axis))
        ticks = "".join(f'<span class="y" style="bottom:{at:.2f}%">{tick:g}</span>' for at, tick in at_y)
        ticks += "".join(f'<span class="x" style="left:{at:.2f}%">{tick:,.12g}</span>' for at, tick in at_x)
        paths = "".join(f'<path class="grid" d="M0 {100 - at:.2f}h100"/>' for at, _ in at_y)
        for line in sorted(kept.values(), key=lambda line: not line.faint):
            paths += _path(line, x_axis, y_axis)
        self._add(
            f'<figure class="half plot"><figcaption>{escape(title)}</figcaption>'
            f'<div class="area" role="img" aria-label="{escape(f"{title}: {spoken}")}">'
            '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-intermediate_size="true">'
            f"{paths}</svg>{ticks}</div>"
            f'<p class="across">{escape(across)}</p><ul class="key">{key}</ul></figure>'
        )

    def html(self) -> str:
        """The whole page."""
        title, (_, first) = escape(self.title), self.sections[0]
        above = f"<p>{escape(self.above)}</p>" if self.above else ""
        links = sections = ""
        for n, (text, body) in enumerate(self.sections[1:], 1):
            links += f'<a href="#part-{n}">{escape(text)}</a>'
            sections += f'<section id="part-{n}"><h2>{escape(text)}</h2>{"".join(body)}</section>'
        nav = f'<nav aria-label="Sections">{links}</nav>' if links else ""
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
            # Were an escape ever forgotten, still nothing could run and nothing be fetched.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            f"style-src 'unsafe-inline'\"><style>{STYLE}</style></head>"
            f"<body><header>{above}<h1>{title}</h1></header><main>"
            f'<section class="first">{"".join(first)}{nav}</section>{sections}</main></body></html>\n'
        )

    def write(self, path: Path) -> Path:
        """The page as a file: whole, or as it was before."""
        aside = path.with_name(path.name + ".tmp")
        aside.write_bytes(self.html().encode(errors="replace"))
        return aside.replace(path)

    def _add(self, fragment: str) -> None:
        self.sections[-1][1].append(fragment)


def data_uri(pixels: np.ndarray) -> str:
    """The picture as a PNG of its own size, without loss, in a data: URI."""
    file = BytesIO()
    plain = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Picture.fromarray(np.ascontiguousarray(plain, dtype=np.uint8)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _img(pixels: np.ndarray, alt: str) -> str:
    height, width = pixels.shape[:2]
    return f'<img src="{data_uri(pixels)}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _colour(name: str) -> str:
    if name not in COLOURS:
        raise ValueError(f"there is no colour {name!r}; there are {', '.join(COLOURS)}")
    return name


def _mark(mark: bool | None) -> str:
    return "" if mark is None else f'<b title="{_kind_of_mark(mark)}">{"✓" if mark else "✗"}</b> '


def _kind_of_mark(mark: bool | None) -> str:
    return "unmarked" if mark is None else "right" if mark else "wrong"


def _cell(cell: Cell) -> str:
    if isinstance(cell.reads, str):
        reads, many = escape(cell.reads), ""
    else:
        reads, many = "".join(_img(p, f"patch {n}") for n, p in enumerate(cell.reads, 1)), " many"
    says = f'<i class="{_colour(cell.loss)}">{escape(cell.says)}</i>' if cell.says else "<i>nothing</i>"
    return f'<div class="cell{many}"><b class="{_colour(cell.colour)}">{reads}</b>{says}</div>'


@dataclass(frozen=True)
class Axis:
    """From where to where an axis goes, and the numbers on it."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], log: bool = False) -> "Axis":
        """An axis that shows all of these."""
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.05, high * 1.05
        elif low == high:
            high += 1
        return cls(low, high, log, _round_numbers(low, high, log))

    def at(self, value: float) -> float:
        """Where this value lies, in per cent."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return 100 * (value - low) / (high - low)


def _round_numbers(low: float, high: float, log: bool) -> tuple[float, ...]:
    """A few numbers between these that are easy to read."""
    if log:
        powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        for digits in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 7), range(1, 10)):
            found = [digit * power for power in powers for digit in digits if low <= digit * power <= high]
            if len(found) > 2:
                return tuple(float(f"{number:.6g}") for number in found)
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step + 1e-6)
    return tuple(float(f"{step * n:.6g}") for n in range(first, last + 1))


def _placeable(line: Line, log: bool) -> Line:
    """The line without the points that no axis has."""
    points = zip(line.x, line.y, strict=True)
    points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
    xs, ys = zip(*points, strict=True) if points else ((), ())
    return Line(xs, ys, line.colour, line.faint, line.dots, line.dashed)


def _path(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """The line as SVG. A dot is a line of no length with round ends: it stays round in a stretched plot."""
    points = [f"{x_axis.at(x):.2f} {100 - y_axis.at(y):.2f}" for x, y in zip(line.x, line.y, strict=True)]
    drawn = f'<path class="{_looks(line)}" d="M{"L".join(points)}"/>'
    if line.dots:
        drawn += f'<path class="{line.colour} dots" d="{"".join(f"M{point}h0" for point in points)}"/>'
    return drawn


def _looks(line: Line) -> str:
    looks = (("faint", line.faint), ("dashed", line.dashed))
    return " ".join([_colour(line.colour), *(name for name, is_so in looks if is_so)])


STYLE = """
:root { color-scheme: light dark; --ground: #faf9f6; --panel: #fff; --ink: #1d1e22; --quiet: #62646c;
  --rule: #e3e0d8; --text: #b0500a; --text-soft: #fbeedd; --image: #2c5bcb; --image-soft: #e5ecfb;
  --right: #1c7a43; --wrong: #bf2635; --plain: #62646c; --plain-soft: #eeece6; }
@media (prefers-color-scheme: dark) { :root { --ground: #131417; --panel: #1b1d21; --ink: #e9e7e2;
  --quiet: #a0a2aa; --rule: #30333a; --text: #f2a65f; --text-soft: #38291a; --image: #8cb0ff;
  --image-soft: #1f2b47; --right: #5cc78d; --wrong: #ff7f86; --plain: #a0a2aa; --plain-soft: #27292e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 960px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 56px; }
header p { margin: 0; color: var(--quiet); }
h1 { margin: 0 0 20px; font-size: 46px; line-height: 1.1; letter-spacing: -.025em; }
h2 { font-size: 25px; line-height: 1.2; letter-spacing: -.015em; }
section { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 18px 28px;
  padding: 38px 0; border-top: 1px solid var(--rule); }
section.first { border: 0; padding-top: 0; }
section > * { grid-column: 1 / -1; margin: 0; }
section > .half { grid-column: auto; }
.say, .quiet { max-width: 44em; }
.quiet { color: var(--quiet); font-size: 15px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 15px; }
a { color: var(--image); text-underline-offset: 3px; }
img { display: block; width: 100%; height: auto; border-radius: 3px; image-rendering: pixelated;
  box-shadow: 0 0 0 1px var(--rule); }
code, pre { font: .87em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
code { padding: .1em .3em; border-radius: 4px; background: var(--plain-soft); }
pre { margin: 0; padding: 14px 16px; border: 1px solid var(--rule); border-radius: 8px;
  background: var(--panel); white-space: pre-wrap; font-size: 14px; }
mark { background: var(--text-soft); color: var(--text); border-radius: 3px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 15px; }
.text { color: var(--text); } .image { color: var(--image); } .plain { color: var(--plain); }
.right { color: var(--right); } .wrong { color: var(--wrong); }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  padding: 0; list-style: none; }
.figures li, .half { padding: 14px 18px 16px; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 10px; }
.figures b, .figures strong, .figures span { display: block; }
.figures b { font-size: 38px; line-height: 1.2; letter-spacing: -.02em; }
.figures strong { margin-bottom: 6px; font-weight: 600; line-height: 1.3; }
.figures span { color: var(--quiet); font-size: 14px; line-height: 1.45; }
.half > figcaption { margin-bottom: 10px; font-weight: 600; }
.half > p { margin: 10px 0 0; color: var(--quiet); font-size: 14px; line-height: 1.45; }
.bar { display: grid; grid-template-columns: 1fr auto; margin-top: 8px; font-size: 15px; }
.bar span { color: var(--ink); }
.bar b { font-variant-numeric: tabular-nums; }
.bar i { grid-column: 1 / -1; height: 9px; margin-top: 3px; border-radius: 2px; background: currentColor; }

.area { position: relative; height: 230px; margin: 6px 6px 28px 34px; border: solid var(--rule);
  border-width: 0 0 1px 1px; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.area span { position: absolute; color: var(--quiet); font-size: 12.5px; line-height: 1; }
.area .y { right: 100%; margin-right: 7px; transform: translateY(50%); }
.area .x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
path { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
path.grid { stroke: var(--rule); stroke-width: 1; }
path.faint { stroke-width: 1; opacity: .4; }
path.dashed { stroke-dasharray: 5 4; }
path.dots { stroke-width: 7; stroke-linecap: round; }
.half > .across { margin: -6px 0 8px; text-align: right; font-size: 12.5px; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; padding: 0; list-style: none;
  font-size: 14px; }
.key i { display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid; }
.key .dashed i { border-top-style: dashed; }
.key li { color: var(--ink); } .key .text i { color: var(--text); }
.key .image i { color: var(--image); } .key .plain i { color: var(--plain); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; line-height: 1.4; }
th, td { padding: 7px 22px 7px 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
thead th { color: var(--quiet); font-weight: 400; }
tbody th { font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }

.beside { display: grid; grid-template-columns: 190px minmax(0, 1fr); gap: 24px; align-items: center; }
.beside p { margin: 0; }
.beside img { background: var(--panel); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(var(--width), 1fr));
  gap: 16px 12px; }
.pictures figure { max-width: calc(1.5 * var(--width)); }
.pictures figcaption { margin-top: 4px; color: var(--ink); font-size: 13px; line-height: 1.3;
  white-space: pre-line; }
.pictures .wrong img { outline: 2px solid var(--wrong); outline-offset: 1px; }
.pictures .right b { color: var(--right); } .pictures .wrong b { color: var(--wrong); }
.strip { display: grid; grid-template-columns: max-content repeat(var(--columns), minmax(0, var(--width)));
  gap: 6px; align-items: center; }
.strip b { max-width: 8.5em; padding-right: 8px; font-size: 15px; font-weight: 600; line-height: 1.25; }
.strip small { color: var(--quiet); font-size: 12.5px; text-align: center; }
.strip small:first-child { text-align: left; }

.sequence { display: flex; flex-wrap: wrap; gap: 12px 5px; }
.cell { display: flex; flex-direction: column; gap: 4px; text-align: center; font-size: 14px;
  line-height: 1.2; }
.cell > b, .cell > i { padding: 0 9px; border-radius: 5px; font-style: normal; }
.cell > b { display: flex; gap: 3px; align-items: center; justify-content: center; min-height: 46px;
  border: 1.5px solid; font-weight: 600; }
.cell > b.text { background: var(--text-soft); } .cell > b.image { background: var(--image-soft); }
.cell > b.plain { background: var(--plain-soft); border-color: transparent; }
.cell > i { padding-block: 4px; color: var(--quiet); }
.cell > i.text { background: var(--text); color: var(--ground); }
.cell > i.image { background: var(--image); color: var(--ground); }
.cell.many { min-width: 0; }
.cell.many > b { flex-wrap: wrap; padding: 5px; }
.cell.many img { width: 30px; border-radius: 1px; }
.passage { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-end; }
.passage img { width: var(--width); max-width: 100%; }
.passage q { display: inline-block; padding: 8px 14px; border: 1.5px solid var(--text); border-radius: 6px;
  background: var(--text-soft); color: var(--text); font-weight: 600; quotes: none; white-space: pre-wrap; }
.passage figcaption { margin-top: 4px; color: var(--quiet); font-size: 13px; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 12px; }

@media (max-width: 640px) {
  body { font-size: 16px; } header { padding-top: 32px; } h1 { font-size: 34px; } h2 { font-size: 22px; }
  section { display: block; padding: 28px 0; } section > * + * { margin-top: 16px; }
  .figures { grid-template-columns: 1fr; gap: 10px; } .figures b { font-size: 32px; }
  .beside { grid-template-columns: 1fr; } .beside img { width: 190px; }
  .strip { gap: 3px; } .strip b { padding-right: 4px; font-size: 13px; } .strip small { font-size: 11px; }
  .film { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
  .film b, .film small:first-child { grid-column: 1 / -1; max-width: none; text-align: left; }
}
@media print { figure, pre, .strip { break-inside: avoid; } nav { display: none; } }
"""
