"""Headings, paragraphs, images, plots and tables as one HTML file without external resources."""

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as Picture

SERIES = tuple(f"series-{n}" for n in range(1, 9))  # for lines of a plot that are all of one kind
COLOURS = ("text", "image", "right", "wrong", "plain", *SERIES)  # CSS classes; STYLE defines them for light and dark pages
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """One position of a sequence: the model's input there (a word, or image patches in order) and its target."""

    input: str | Sequence[np.ndarray]
    target: str = ""  # empty: no loss
    colour: str = "plain"  # of the input
    loss: str = "text"  # colour of the target


@dataclass(frozen=True)
class Line:
    """A line of a plot. `faint`: behind the others and not in the legend; `dots`: its points are marked."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "plain"
    faint: bool = False
    dots: bool = False
    dashed: bool = False


class Page:
    """A page that is filled from top to bottom. All text is escaped: it is never read as HTML. In paragraphs and notes,
    words between backticks are set as code. Pixels are (Y, X) or (Y, X, 1 | 3 | 4) uint8; a fourth channel is alpha."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = title, subtitle
        self.sections: list[tuple[str, list[str]]] = [("", [])]  # the first is above all headings

    def heading(self, text: str) -> None:
        """Begin a section; the list of sections at the top of the page links to it."""
        self.sections.append((text, []))

    def paragraph(self, text: str, muted: bool = False) -> None:
        """A paragraph; `muted`: smaller and grey."""
        self._add(f'<p class="{"muted" if muted else "prose"}">{_inline(text)}</p>')

    def figures(self, items: Iterable[tuple[str, str, str]]) -> None:
        """Headline figures: the number, what it counts, and a line that explains it."""
        cards = "".join(
            f"<li><b>{escape(number)}</b><strong>{escape(title)}</strong><span>{_inline(note)}</span></li>"
            for number, title, note in items
        )
        self._add(f'<ul class="figures">{cards}</ul>')

    def bars(self, title: str, rows: Sequence[tuple[str, float, str]], note: str = "") -> None:
        """Numbers to compare, each with its name and colour. Two such blocks in sequence are placed side by side."""
        largest = max((value for _, value, _ in rows), default=0) or 1
        bars = "".join(
            f'<div class="bar {_colour(colour)}"><span>{escape(name)}</span><b>{value:.2f}</b>'
            f'<i style="width:{100 * value / largest:.1f}%"></i></div>'
            for name, value, colour in rows
        )
        top = f"<figcaption>{escape(title)}</figcaption>"
        self._add(f'<figure class="half">{top}{bars}<p>{_inline(note)}</p></figure>')

    def table(self, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> None:
        """Rows of cells; the first cell of each row is its title."""
        titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        top = f"<thead><tr>{titles}</tr></thead>" if titles else ""
        body = ""
        for first, *rest in rows:
            cells = "".join(f"<td>{_inline(cell)}</td>" for cell in rest)
            body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
        self._add(f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>')

    def matrix(self, pixels: np.ndarray, labels: tuple[str, str], legend: Mapping[str, RGB], text: str, alt: str) -> None:
        """A matrix as an image with axis labels (rows, columns) and a legend, and a paragraph beside it."""
        rows, columns = map(escape, labels)
        swatch = '<li><i class="swatch" style="background:rgb{}"></i>{}</li>'
        key = "".join(swatch.format(colour, escape(name)) for name, colour in legend.items())
        self._add(
            f'<div class="beside"><figure class="matrix"><span>{rows}</span>{_img(pixels, alt)}<small>{columns}</small>'
            f'</figure><div><p class="prose">{_inline(text)}</p><ul class="key">{key}</ul></div></div>'
        )

    def pictures(self, items: Iterable[tuple[str, np.ndarray, bool | None]], width: int = 72, title: str = "") -> None:
        """A grid of images about `width` wide, each with a caption and a mark (True: right, False: wrong, None: no mark)."""
        shown = "".join(
            f'<figure class="{_mark_class(mark)}">{_img(pixels, caption)}'
            f"<figcaption>{_mark(mark)}{escape(caption)}</figcaption></figure>"
            for caption, pixels, mark in items
        )
        top = f"<h3>{escape(title)}</h3>" if title else ""
        self._add(f'{top}<div class="pictures" style="--width:{int(width)}px">{shown}</div>')

    def pairs(self, items: Iterable[tuple[str, np.ndarray, np.ndarray]], width: int = 72) -> None:
        """A grid of pairs of images, each about `width` wide, with one caption below both."""
        shown = "".join(
            f'<figure><div>{_img(left, f"{caption}, left")}{_img(right, f"{caption}, right")}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, left, right in items
        )
        self._add(f'<div class="pictures pairs" style="--width:{int(2 * width + 4)}px">{shown}</div>')

    def strip(
        self, rows: Sequence[tuple[str, Sequence[np.ndarray]]], column_titles: Sequence[str] = (), width: int = 60
    ) -> None:
        """Rows of images, `width` wide or less, each after its title.

        `column_titles`: first the title of the column of row titles, then one for each column of images.
        """
        columns = max((len(pictures) for _, pictures in rows), default=0)
        word, *numbers = column_titles or ("number", *map(str, range(1, columns + 1)))
        cells = "".join(f"<small>{escape(name)}</small>" for name in column_titles)
        for name, pictures in rows:
            alts = (f"{name}, {word} {number}" for number in numbers)
            shown = "".join(_img(pixels, alt) for pixels, alt in zip(pictures, alts, strict=False))
            cells += f"<b>{escape(name)}</b>{shown}" + "<span></span>" * (columns - len(pictures))
        style = f"--columns:{columns};--width:{int(width)}px"
        self._add(f'<div class="strip{" film" if column_titles else ""}" style="{style}">{cells}</div>')

    def sequence(self, cells: Iterable[Cell]) -> None:
        """Positions of a sequence side by side: the input above, the target below."""
        self._add(f'<div class="sequence">{"".join(map(_cell, cells))}</div>')

    def passage(self, parts: Iterable[tuple[str | np.ndarray, str]], width: int = 72) -> None:
        """Text and images, `width` wide, in their order, each with a note on its origin."""
        shown = ""
        for part, origin in parts:
            is_text = isinstance(part, str)
            content = f"<q>{escape(part)}</q>" if is_text else _img(part, f"picture, {origin}")
            shown += f"<figure>{content}<figcaption>{escape(origin)}</figcaption></figure>"
        self._add(f'<div class="passage" style="--width:{int(width)}px">{shown}</div>')

    def code(self, text: str, prompt: str = "") -> None:
        """Preformatted text; `prompt` precedes it, highlighted."""
        before = f"<mark>{escape(prompt)}</mark>" if prompt else ""
        self._add(f"<pre>{before}{escape(text)}</pre>")

    def fold(self, title: str, text: str) -> None:
        """Long preformatted text, hidden until the title is clicked."""
        self._add(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def plot(
        self, title: str, lines: Mapping[str, Line], x_label: str = "step", y_label: str = "", log: bool = False
    ) -> None:
        """Named lines over one pair of axes; `log`: the y axis is logarithmic, and its label says so. Two plots in sequence
        are placed side by side. Points that are not finite, or not above 0 on a log axis, are omitted."""
        lines = {name: _drawable(line, log) for name, line in lines.items()}
        lines = {name: line for name, line in lines.items() if line.x}
        if not lines:
            return
        x_axis = Axis.covering([x for line in lines.values() for x in line.x])
        y_axis = Axis.covering([y for line in lines.values() for y in line.y], log)
        named = [(name, line) for name, line in lines.items() if not line.faint]
        key = "".join(
            f'<li class="{_line_class(line)}"><i></i>{escape(name)} <b>{line.y[-1]:.3g}</b></li>' for name, line in named
        )
        summary = "; ".join(f"{name}: from {line.y[0]:.3g} to {line.y[-1]:.3g}" for name, line in named)
        x_ticks, y_ticks = ([(axis.to_percent(tick), tick) for tick in axis.ticks] for axis in (x_axis, y_axis))
        ticks = "".join(f'<span class="y" style="bottom:{percent:.2f}%">{tick:g}</span>' for percent, tick in y_ticks)
        ticks += "".join(f'<span class="x" style="left:{percent:.2f}%">{tick:,.12g}</span>' for percent, tick in x_ticks)
        paths = "".join(f'<path class="grid" d="M0 {100 - percent:.2f}h100"/>' for percent, _ in y_ticks)
        for line in sorted(lines.values(), key=lambda line: not line.faint):
            paths += _path(line, x_axis, y_axis)
        y_label = ", ".join(filter(None, (y_label, "log scale" if log else "")))
        self._add(
            f'<figure class="half plot"><figcaption>{escape(title)}</figcaption>'
            f'<p class="y-label">{escape(y_label)}</p>'
            f'<div class="area" role="img" aria-label="{escape(f"{title}: {summary}")}">'
            '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
            f"{paths}</svg>{ticks}</div>"
            f'<p class="x-label">{escape(x_label)}</p><ul class="key">{key}</ul></figure>'
        )

    def html(self) -> str:
        """The whole page."""
        title, (_, first) = escape(self.title), self.sections[0]
        subtitle = f"<p>{escape(self.subtitle)}</p>" if self.subtitle else ""
        links = sections = ""
        for n, (text, body) in enumerate(self.sections[1:], 1):
            links += f'<a href="#part-{n}">{escape(text)}</a>'
            sections += f'<section id="part-{n}"><h2>{escape(text)}</h2>{"".join(body)}</section>'
        nav = f'<nav aria-label="Sections">{links}</nav>' if links else ""
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
            # Defence in depth: if an escape is ever missing, no script runs and nothing is fetched.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            f"style-src 'unsafe-inline'\"><style>{STYLE}</style></head>"
            f"<body><header>{subtitle}<h1>{title}</h1></header><main>"
            f'<section class="first">{"".join(first)}{nav}</section>{sections}</main></body></html>\n'
        )

    def write(self, path: Path) -> Path:
        """Write the page to a file, atomically."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(self.html().encode(errors="replace"))
        return temporary.replace(path)

    def _add(self, fragment: str) -> None:
        self.sections[-1][1].append(fragment)


def data_uri(pixels: np.ndarray) -> str:
    """The image as a lossless PNG of the same size, in a data: URI."""
    file = BytesIO()
    squeezed = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Picture.fromarray(np.ascontiguousarray(squeezed, dtype=np.uint8)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _img(pixels: np.ndarray, alt: str) -> str:
    height, width = pixels.shape[:2]
    return f'<img src="{data_uri(pixels)}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _colour(name: str) -> str:
    if name not in COLOURS:
        raise ValueError(f"there is no colour {name!r}; choose one of {', '.join(COLOURS)}")
    return name


def _mark(mark: bool | None) -> str:
    return "" if mark is None else f'<b title="{_mark_class(mark)}">{"✓" if mark else "✗"}</b> '


def _mark_class(mark: bool | None) -> str:
    return "unmarked" if mark is None else "right" if mark else "wrong"


def _cell(cell: Cell) -> str:
    if isinstance(cell.input, str):
        content, many = escape(cell.input), ""
    else:
        content, many = "".join(_img(patch, f"patch {n}") for n, patch in enumerate(cell.input, 1)), " many"
    target = f'<i class="{_colour(cell.loss)}">{escape(cell.target)}</i>' if cell.target else "<i>no loss</i>"
    return f'<div class="cell{many}"><b class="{_colour(cell.colour)}">{content}</b>{target}</div>'


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its ticks."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def covering(cls, values: Sequence[float], log: bool = False) -> "Axis":
        """An axis whose range includes all values."""
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.05, high * 1.05
        elif low == high:
            high += 1
        return cls(low, high, log, _round_numbers(low, high, log))

    def to_percent(self, value: float) -> float:
        """The position of a value on the axis, 0 to 100."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return 100 * (value - low) / (high - low)


def _round_numbers(low: float, high: float, log: bool) -> tuple[float, ...]:
    """A few round numbers in [low, high]."""
    if log:
        powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        for digits in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 7), range(1, 10)):
            ticks = [digit * power for power in powers for digit in digits if low <= digit * power <= high]
            if len(ticks) > 2:
                return tuple(float(f"{tick:.6g}") for tick in ticks)
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step + 1e-6)
    return tuple(float(f"{step * n:.6g}") for n in range(first, last + 1))


def _drawable(line: Line, log: bool) -> Line:
    """The line without points that are not finite, or not above 0 on a log axis."""
    points = zip(line.x, line.y, strict=True)
    points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
    xs, ys = zip(*points, strict=True) if points else ((), ())
    return replace(line, x=xs, y=ys)


def _path(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """The line as SVG. A dot is a line of length 0 with round ends: it stays round in a stretched plot."""
    points = [f"{x_axis.to_percent(x):.2f} {100 - y_axis.to_percent(y):.2f}" for x, y in zip(line.x, line.y, strict=True)]
    path = f'<path class="{_line_class(line)}" d="M{"L".join(points)}"/>'
    if line.dots:
        path += f'<path class="{line.colour} dots" d="{"".join(f"M{point}h0" for point in points)}"/>'
    return path


def _line_class(line: Line) -> str:
    flags = (("faint", line.faint), ("dashed", line.dashed))
    return " ".join([_colour(line.colour), *(name for name, is_set in flags if is_set)])


STYLE = """
:root { color-scheme: light dark; --background: #faf9f6; --panel: #fff; --ink: #1d1e22; --muted: #62646c;
  --rule: #e3e0d8; --text: #b0500a; --text-soft: #fbeedd; --image: #2c5bcb; --image-soft: #e5ecfb;
  --right: #1c7a43; --wrong: #bf2635; --plain: #62646c; --plain-soft: #eeece6; }
@media (prefers-color-scheme: dark) { :root { --background: #131417; --panel: #1b1d21; --ink: #e9e7e2;
  --muted: #a0a2aa; --rule: #30333a; --text: #f2a65f; --text-soft: #38291a; --image: #8cb0ff;
  --image-soft: #1f2b47; --right: #5cc78d; --wrong: #ff7f86; --plain: #a0a2aa; --plain-soft: #27292e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--background); color: var(--ink); overflow-wrap: break-word;
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 960px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 56px; }
header p { margin: 0; color: var(--muted); }
h1 { margin: 0 0 20px; font-size: 46px; line-height: 1.1; letter-spacing: -.025em; }
h2 { font-size: 25px; line-height: 1.2; letter-spacing: -.015em; }
h3 { font-size: 17px; line-height: 1.3; }
section { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 18px 28px;
  padding: 38px 0; border-top: 1px solid var(--rule); }
section.first { border: 0; padding-top: 0; }
section > * { grid-column: 1 / -1; margin: 0; }
section > .half { grid-column: auto; }
.prose, .muted { max-width: 44em; }
.muted { color: var(--muted); font-size: 15px; }
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
.series-1, .key .series-1 i { color: #3b7dd8; } .series-2, .key .series-2 i { color: #d9730d; }
.series-3, .key .series-3 i { color: #1f9d55; } .series-4, .key .series-4 i { color: #c2387f; }
.series-5, .key .series-5 i { color: #8a63d2; } .series-6, .key .series-6 i { color: #0f9ba8; }
.series-7, .key .series-7 i { color: #b8860b; } .series-8, .key .series-8 i { color: #7a7f87; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  padding: 0; list-style: none; }
.figures li, .half { padding: 14px 18px 16px; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 10px; }
.figures b, .figures strong, .figures span { display: block; }
.figures b { font-size: 38px; line-height: 1.2; letter-spacing: -.02em; }
.figures strong { margin-bottom: 6px; font-weight: 600; line-height: 1.3; }
.figures span { color: var(--muted); font-size: 14px; line-height: 1.45; }
.half > figcaption { margin-bottom: 10px; font-weight: 600; }
.half > p { margin: 10px 0 0; color: var(--muted); font-size: 14px; line-height: 1.45; }
.bar { display: grid; grid-template-columns: 1fr auto; column-gap: 12px; margin-top: 8px; font-size: 15px; }
.bar span { color: var(--ink); }
.bar b { font-variant-numeric: tabular-nums; }
.bar i { grid-column: 1 / -1; height: 9px; margin-top: 3px; border-radius: 2px; background: currentColor; }

.area { position: relative; height: 230px; margin: 6px 6px 28px 34px; border: solid var(--rule);
  border-width: 0 0 1px 1px; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.area span { position: absolute; color: var(--muted); font-size: 12.5px; line-height: 1; }
.area .y { right: 100%; margin-right: 7px; transform: translateY(50%); }
.area .x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
path { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
path.grid { stroke: var(--rule); stroke-width: 1; }
path.faint { stroke-width: 1; opacity: .4; }
path.dashed { stroke-dasharray: 5 4; }
path.dots { stroke-width: 7; stroke-linecap: round; }
.half > .x-label { margin: -6px 0 8px; text-align: center; font-size: 12.5px; }
.half > .y-label { margin: -4px 0 10px; font-size: 12.5px; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; padding: 0; list-style: none;
  font-size: 14px; }
.key i { display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid; }
.key .dashed i { border-top-style: dashed; }
.key .swatch { width: 14px; height: 14px; border: 1px solid var(--rule); border-radius: 3px; }
.key li { color: var(--ink); } .key .text i { color: var(--text); }
.key .image i { color: var(--image); } .key .plain i { color: var(--plain); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; line-height: 1.4; }
th, td { padding: 7px 22px 7px 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
thead th { color: var(--muted); font-weight: 400; }
tbody th { font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }

.beside { display: grid; grid-template-columns: 214px minmax(0, 1fr); gap: 24px; align-items: center; }
.beside p { margin: 0 0 12px; }
.beside .key { flex-direction: column; }
.matrix { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 4px 6px; align-items: center;
  color: var(--muted); font-size: 12.5px; text-align: center; }
.matrix span { writing-mode: vertical-rl; transform: rotate(180deg); }
.matrix small { grid-column: 2; font-size: inherit; } .matrix img { background: var(--panel); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(var(--width), 1fr));
  gap: 16px 12px; }
.pictures figure { max-width: calc(1.5 * var(--width)); }
.pictures figcaption { margin-top: 4px; color: var(--ink); font-size: 13px; line-height: 1.3;
  white-space: pre-line; }
.pairs figure { max-width: var(--width); } .pairs div { display: flex; gap: 4px; }
.pairs img { flex: 1 1 0; min-width: 0; }
.pictures .wrong img { outline: 2px solid var(--wrong); outline-offset: 1px; }
.pictures .right b { color: var(--right); } .pictures .wrong b { color: var(--wrong); }
.strip { display: grid; grid-template-columns: max-content repeat(var(--columns), minmax(0, var(--width)));
  gap: 6px; align-items: center; }
.strip b { max-width: 8.5em; padding-right: 8px; font-size: 15px; font-weight: 600; line-height: 1.25; }
.strip small { color: var(--muted); font-size: 12.5px; text-align: center; }
.strip small:first-child { text-align: left; }

.sequence { display: flex; flex-wrap: wrap; gap: 12px 5px; }
.cell { display: flex; flex-direction: column; gap: 4px; text-align: center; font-size: 14px;
  line-height: 1.2; }
.cell > b, .cell > i { padding: 0 9px; border-radius: 5px; font-style: normal; }
.cell > b { display: flex; gap: 3px; align-items: center; justify-content: center; min-height: 46px;
  border: 1.5px solid; font-weight: 600; }
.cell > b.text { background: var(--text-soft); } .cell > b.image { background: var(--image-soft); }
.cell > b.plain { background: var(--plain-soft); border-color: transparent; }
.cell > i { padding-block: 4px; color: var(--muted); }
.cell > i.text { background: var(--text); color: var(--background); }
.cell > i.image { background: var(--image); color: var(--background); }
.cell.many { min-width: 0; }
.cell.many > b { flex-wrap: wrap; padding: 5px; }
.cell.many img { width: 30px; border-radius: 1px; }
.passage { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-end; }
.passage img { width: var(--width); max-width: 100%; }
.passage q { display: inline-block; padding: 8px 14px; border: 1.5px solid var(--text); border-radius: 6px;
  background: var(--text-soft); color: var(--text); font-weight: 600; quotes: none; white-space: pre-wrap; }
.passage figcaption { margin-top: 4px; color: var(--muted); font-size: 13px; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 12px; }

@media (max-width: 640px) { th, td { padding-right: 12px; }
  body { font-size: 16px; } header { padding-top: 32px; } h1 { font-size: 34px; } h2 { font-size: 22px; }
  section { display: block; padding: 28px 0; } section > * + * { margin-top: 16px; }
  .figures { grid-template-columns: 1fr; gap: 10px; } .figures b { font-size: 32px; }
  .beside { grid-template-columns: 1fr; } .matrix { max-width: 230px; }
  .strip { gap: 3px; } .strip b { padding-right: 4px; font-size: 13px; } .strip small { font-size: 11px; }
  .film { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
  .film b, .film small:first-child { grid-column: 1 / -1; max-width: none; text-align: left; }
}
@media print { figure, pre, .strip { break-inside: avoid; } nav { display: none; } }
"""
