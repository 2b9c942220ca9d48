"""Charts as SVG text: small, sharp at any size, in the colours of the page that holds them (CSS variables).

A chart is WIDTH units wide, which is about its width in pixels on a phone and in a column of three on a desk, so that
its text is readable on both. A line's points are those of its `<polyline>`; the page's script reads values off them by
the ranges in `data-box` and `data-range`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 382, 24, 196  # the box of the axes
GOLDEN = 0.618034


@dataclass(frozen=True)
class Line:
    """A curve. color: CSS; dash: of the stroke, "" = solid; faint: one of many, without a name in the legend."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: str
    dash: str = ""
    faint: bool = False
    dots: bool = False


def hue(label: int) -> int:
    """Degrees of a class's colour, the same as in drawn pictures (ssod.data.draw.class_color)."""
    return round(360 * ((0.02 + label * GOLDEN) % 1.0))


def class_color(label: int) -> str:
    """CSS colour of a class for curves; its lightness is the page's."""
    return f"hsl({hue(label)} 72% var(--ink))"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers within low .. high."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short: 0.412, 12.3, 4.1k."""
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:.0f}k" if size < 1e6 else f"{value / 1e6:.1f}M"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}".rstrip("0").rstrip(".") if size >= 10 else f"{value:.3f}".rstrip("0").rstrip(".")


class Axes:
    """A frame with ticks and a grid; `x` and `y` lead from values to the units of the drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_name: str) -> None:
        self.low, self.high = x, y
        self._x, self._y = x, y
        parts = []
        for value in ticks(*y):
            at = self.y(value)
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{at}" y2="{at}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in ticks(*x):
            parts.append(f'<text x="{self.x(value)}" y="{BOTTOM + 16}" text-anchor="middle">{number(value)}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
        parts.append(f'<text x="{RIGHT}" y="{HEIGHT - 6}" text-anchor="end" class="soft">{escape(x_name)}</text>')
        self.parts = parts

    def x(self, value: float) -> float:
        low, high = self._x
        return round(LEFT + (value - low) / (high - low) * (RIGHT - LEFT), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)

    def mark(self, at: float, name: str) -> None:
        """A dotted vertical line with its name."""
        x = self.x(at)
        if not LEFT <= x <= RIGHT:
            return
        end = "end" if x > (LEFT + RIGHT) / 2 else "start"
        self.parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{BOTTOM}"/>')
        shift = -4 if end == "end" else 4
        self.parts.append(f'<text x="{x + shift}" y="{TOP - 8}" text-anchor="{end}" class="soft">{escape(name)}</text>')

    def svg(self, label: str) -> str:
        ranges = ",".join(f"{v:.6g}" for v in (*self._x, *self._y))
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
            f'data-box="{LEFT},{RIGHT},{TOP},{BOTTOM}" data-range="{ranges}">{"".join(self.parts)}</svg>'
        )


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    marks: Sequence[tuple[float, str]] = (),
    x_name: str = "step",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    close: bool = False,
    note: str = "",
) -> Markup:
    """Curves over one axis as a `<figure>`. Values that are not finite are left out; "" where nothing is left.

    marks    (x, name) of vertical lines
    y_range  default: from 0, or below, to the highest value; with `close` from near the lowest
    """
    drawn = [_finite(line) for line in lines]
    drawn = [line for line in drawn if line.xs]
    if not drawn:
        return Markup("")
    every_x, every_y = [x for line in drawn for x in line.xs], [y for line in drawn for y in line.ys]
    x_low, x_high = x_range or (0.0, max(every_x))
    y_low, y_high = y_range or (min(0.0, min(every_y)), max(every_y))
    if close and min(every_y) > 0.5 * y_high:
        y_low = max(0.0, min(every_y) - 0.4 * (y_high - min(every_y)))
    if x_high <= x_low:
        x_high = x_low + 1
    if y_high <= y_low:
        y_high = y_low + 1
    if y_range is None:
        y_high += 0.06 * (y_high - y_low)
    axes = Axes((x_low, x_high), (y_low, y_high), x_name)
    for at, name in marks:
        axes.mark(at, name)
    for line in sorted(drawn, key=lambda one: not one.faint):
        axes.parts.append(_polyline(axes, line))
    label = f"{title}. " + " ".join(_said(line, x_name) for line in drawn if not line.faint)
    return _figure(title, axes.svg(label), [line for line in drawn if not line.faint], note)


def _finite(line: Line) -> Line:
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None and math.isfinite(y)]
    return Line(line.name, [x for x, _ in pairs], [y for _, y in pairs], line.color, line.dash, line.faint, line.dots)


def _polyline(axes: Axes, line: Line) -> str:
    points = [(axes.x(x), axes.y(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    if line.faint:
        return f'<polyline class="faint" points="{_points(points)}"/>'
    style = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    out = (
        f'<polyline class="line" style="stroke:{line.color}"{style} data-name="{escape(line.name)}" '
        f'points="{_points(points)}"/>'
    )
    if line.dots or len(points) == 1:
        out += f'<g style="fill:{line.color}">' + "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in points)
        out += "</g>"
    return out


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _said(line: Line, x_name: str) -> str:
    if len(line.xs) == 1:
        return f"{line.name}: {number(line.ys[0])} at {x_name} {number(line.xs[0])}."
    first, last = (f"{number(line.ys[i])} at {x_name} {number(line.xs[i])}" for i in (0, -1))
    return f"{line.name}: from {first} to {last}, at most {number(max(line.ys))}."


def _figure(title: str, svg: str, lines: Sequence[Line], note: str = "") -> Markup:
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><line x1="1" x2="23" y1="4" y2="4" '
        f'style="stroke:{line.color}" stroke-dasharray="{line.dash}"/></svg>{escape(line.name)}</li>'
        for line in lines
    )
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return Markup(  # every text in it went through escape()
        f'<figure class="card chart"><figcaption>{escape(title)}</figcaption>{svg}'
        f'<ul class="legend">{legend}</ul>{said}</figure>'
    )


def histogram(
    title: str,
    bins: Sequence[tuple[float, float, int, int]],
    *,
    color: str,
    names: tuple[str, str],
    mark: tuple[float, str] | None = None,
    note: str = "",
) -> Markup:
    """Bars over scores 0 .. 1; each a (low, high, n, of them dark). names: of the dark part and of the rest."""
    total = sum(n for _, _, n, _ in bins)
    if total == 0:
        return Markup("")
    axes = Axes((0.0, 1.0), (0.0, max(n for _, _, n, _ in bins) * 1.08), "score")
    for low, high, n, dark in bins:
        left, width = axes.x(low) + 0.5, max(axes.x(high) - axes.x(low) - 1, 1)
        for kind, below, above in (("rest", dark, n), ("dark", 0, dark)):
            if above > below:
                top = axes.y(above)
                name = names[kind == "rest"]
                axes.parts.append(
                    f'<rect class="{kind}" style="--bar:{color}" x="{left:g}" y="{top}" width="{width:g}" '
                    f'height="{axes.y(below) - top:.1f}"><title>{number(low)} to {number(high)}: '
                    f"{above - below} {escape(name)}</title></rect>"
                )
    if mark is not None:
        axes.mark(*mark)
    dark_total = sum(d for *_, d in bins)
    label = f"{title}. {dark_total} {names[0]}, {total - dark_total} {names[1]}."
    keys = "".join(
        f'<li><i class="{kind}" style="--bar:{color}"></i>{escape(name)} ({count})</li>'
        for kind, name, count in (("dark", names[0], dark_total), ("rest", names[1], total - dark_total))
    )
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return Markup(
        f'<figure class="card chart"><figcaption>{escape(title)}</figcaption>{axes.svg(label)}'
        f'<ul class="legend">{keys}</ul>{said}</figure>'
    )
