"""Plots as SVG, without a script: lines, steps, points and histograms with intervals, bars, and heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10, nan
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.text import Text

from pairclf.errors import visible
from pairclf.page.html import Html, element, join

_WIDTH, _HEIGHT = 480, 300  # units of a drawing, which the page scales; a text is 12 high
_TOP, _BOTTOM, _RIGHT = 26, 44, 14
_LETTER = 7.4  # width of a letter on a phone, whose texts are 13 high
_COLOURS = 6  # classes s0 to s5 of style.css
_STEPS = 6  # most between the numbers of an axis
_MOST_DOTS = 100  # of a line; more would hide it
_MOST_NAMES = 12  # points whose names stand beside them
_LONGEST_NAME = 24  # columns of a name beside a bar or a row
_ROW = 24  # height of a bar's row
_LARGEST = 1e100  # a value beyond it is left out, as infinity is


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one colour. Points that are not finite are left out, and interrupt a line.

    Attributes:
        name: as the legend has it.
        x, y: coordinates `(n,)`.
        texts: of each point: shown while the pointer is on it, and beside it if the style is `points` and they are few.
        low, high: ends of each point's interval in y; none: no intervals.
        style: `steps` keep a value until the next point; a `histogram` has a bar from each x to the next one, so that
            its last y is not drawn; a `reference` is a thin line that does not widen the axes.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: Literal["line", "steps", "points", "histogram", "reference"] = "line"


class _Point(NamedTuple):
    x: float
    y: float
    text: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values from `low` to `high`, which lie at `start` to `stop` of the drawing."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, place = (log10(number) if self.log else number for number in (self.low, self.high, value))
        return round(self.start + (place - low) / (high - low) * (self.stop - self.start), 1)

    def numbers(self) -> list[float]:
        return round_numbers(self.low, self.high, log=self.log)


def round_numbers(low: float, high: float, *, log: bool = False) -> list[float]:
    """At most seven numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart.

    On a logarithmic axis over more than a power of ten: 1, 2 and 5 times each power, or powers alone.

    >>> round_numbers(0.03, 0.91), round_numbers(3, 150, log=True)
    ([0.2, 0.4, 0.6, 0.8], [5.0, 10.0, 20.0, 50.0, 100.0])
    """
    if log and high / low >= 10:
        powers = [10.0**exponent for exponent in range(floor(log10(low)), ceil(log10(high)) + 1)]
        several, single = (
            [value for power in powers for digit in digits if low <= (value := digit * power) <= high]
            for digits in ((1, 2, 5), (1,))
        )
        return several if len(several) <= _STEPS + 1 else single[:: ceil(len(single) / (_STEPS + 1))]
    step = 10.0 ** floor(log10((high - low) / _STEPS))
    step *= next(digit for digit in (1, 2, 5, 10, 20) if digit * step * _STEPS >= high - low)
    return [float(f"{count * step:.12g}") for count in range(ceil(low / step), floor(high / step) + 1)]


def plot(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    empty: str = "no values",
) -> Html:
    """Series over one pair of axes.

    Args:
        title: of the plot.
        series: what to draw, the last one on top.
        x, y: titles of the axes, with units.
        log: whether x is logarithmic; points of x <= 0 are then left out.
        marks: dotted lines at values of x, and their texts.
        empty: stands in place of points, if there are none.
    """
    drawn = [(line, list(_points(line, log=log))) for line in series]
    shown = [point for line, points in drawn for point in points if point and line.style != "reference"]
    marks = [mark for mark in marks if _drawable(mark[0], log=log)]
    if not shown:
        return _nothing(title, empty)
    values = [value for point in shown for value in (point.y, point.low, point.high) if _drawable(value)]
    bottom, top = _range(values, from_zero=any(line.style == "histogram" for line in series))
    y_axis = _Axis(bottom, top, _HEIGHT - _BOTTOM, _TOP)
    left = max(_width(_number(value)) for value in y_axis.numbers()) + 12
    low, high = _range([point.x for point in shown] + [value for value, _ in marks], log=log)
    x_axis = _Axis(low, high, left, _WIDTH - _RIGHT, log)

    colours = iter(range(len(series)))
    named = [(line, points, -1 if line.style == "reference" else next(colours)) for line, points in drawn]
    parts = [
        *_axes(x_axis, y_axis, x, y),
        *(_mark(x_axis.at(value), text) for value, text in marks),
        *(_reference(points, x_axis, y_axis) for line, points, _ in named if line.style == "reference"),
        *(_drawing(line, points, x_axis, y_axis, colour) for line, points, colour in named if colour >= 0),
    ]
    dots = [point for line, points in drawn for point in points if point and line.style == "points"]
    if len(dots) <= _MOST_NAMES:
        parts += _names(dots, x_axis, y_axis)
    legend = [element("span", line.name, class_=f"key {line.style} {_classes(colour)}") for line, _, colour in named]
    names = ", ".join(line.name for line in series)
    return _figure(title, f"{title}: {y} over {x}; {names}", parts, _HEIGHT, legend if len(legend) > 1 else [])


def _points(series: Series, *, log: bool) -> Iterator[_Point | None]:
    """Points as far as they can be drawn; None for the others."""
    count = len(series.x)
    low, high = (list(ends) or [nan] * count for ends in (series.low, series.high))
    for point in map(_Point._make, zip(series.x, series.y, series.texts or [""] * count, low, high, strict=True)):
        yield point if _drawable(point.x, log=log) and _drawable(point.y) else None


def _drawable(value: float, *, log: bool = False) -> bool:
    return abs(value) < _LARGEST and (not log or value > 1 / _LARGEST)  # false of NaN


def _range(values: Sequence[float], *, log: bool = False, from_zero: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows all values, and a little more."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.03 if high > low * 1.001 else 1.5
        return low / room, high * room
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    largest = max(abs(low), abs(high))
    room = 0.05 * largest if largest > 1 / _LARGEST else 1.0
    if high - low > 1e-9 * largest > 1 / _LARGEST:
        room = 0.04 * (high - low)
    return (0.0 if from_zero and low == 0 else low - room), high + room


def _number(value: float) -> str:
    return f"{value:,.10g}"


def _text(x: float, y: float, *texts: object, anchor: str = "start", class_: str | None = None) -> Html:
    return element("text", *texts, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _axes(x_axis: _Axis, y_axis: _Axis, x: str, y: str) -> Iterator[Html]:
    """Lines at round numbers, the numbers, and the titles: of y above its axis, of x below."""
    left, right, bottom, top = x_axis.start, x_axis.stop, y_axis.start, y_axis.stop
    for value in y_axis.numbers():
        yield _line(left, y_axis.at(value), right, y_axis.at(value), "grid")
        yield _text(left - 6, y_axis.at(value) + 4, _number(value), anchor="end")
    yield from _numbers_below(x_axis, bottom, top, x)
    yield _text(0, 12, y)


def _numbers_below(x_axis: _Axis, bottom: float, top: float, title: str) -> Iterator[Html]:
    free = 0.0  # from where on no number stands; one that would cover another is left out
    for value in x_axis.numbers():
        place, half = x_axis.at(value), _width(_number(value)) / 2
        yield _line(place, top, place, bottom, "grid")
        if place - half >= free:
            yield _text(place, bottom + 16, _number(value), anchor="middle")
            free = place + half + _LETTER
    yield _text((x_axis.start + x_axis.stop) / 2, bottom + 36, title, anchor="middle")


def _mark(x: float, text: str) -> Html:
    """A dotted line from top to bottom, with its text."""
    line = _line(x, _TOP, x, _HEIGHT - _BOTTOM, "reference")
    return join([line, _beside(x, _TOP + 6, text)])


def _beside(x: float, y: float, text: str) -> Html:
    """A text at the right of a place, or at its left where that is the wider side."""
    side, anchor = (-8, "end") if x > _WIDTH / 2 else (8, "start")
    return _text(x + side, y + 4, text, anchor=anchor, class_="name")


def _reference(points: Sequence[_Point | None], x_axis: _Axis, y_axis: _Axis) -> Html:
    """A thin line, cut off at the axes."""
    left, top = x_axis.start, y_axis.stop
    width, height = round(x_axis.stop - left, 1), y_axis.start - top
    path = element("path", d=_path(points, x_axis, y_axis, steps=False), class_="reference")
    return element("svg", path, x=left, y=top, width=width, height=height, viewBox=f"{left} {top} {width} {height}")


def _classes(colour: int) -> str:
    if colour < 0:
        return "quiet dashes"
    return f"s{colour % _COLOURS}" + " dashes" * (colour >= _COLOURS)


def _path(points: Iterable[_Point | None], x_axis: _Axis, y_axis: _Axis, *, steps: bool) -> str:
    """A line through the points, which starts anew after each gap."""
    parts, before = [], None
    for point in points:
        if point is not None:
            x, y = x_axis.at(point.x), y_axis.at(point.y)
            parts.append(f"M{x} {y}" if before is None else f"H{x}V{y}" if steps else f"L{x} {y}")
        before = point
    return "".join(parts)


def _drawing(series: Series, points: Sequence[_Point | None], x_axis: _Axis, y_axis: _Axis, colour: int) -> Html:
    shown = [point for point in points if point is not None]
    if series.style == "histogram":
        return element("g", *_histogram(points, x_axis, y_axis), class_=_classes(colour))
    parts: list[Html] = []
    if series.style != "points":
        path = _path(points, x_axis, y_axis, steps=series.style == "steps")
        parts.append(element("path", element("title", series.name), d=path, class_="line"))
    for point in shown:
        if _drawable(point.low) and _drawable(point.high):
            x = x_axis.at(point.x)
            parts.append(_line(x, y_axis.at(point.low), x, y_axis.at(point.high), "interval"))
    if series.style == "points" or len(shown) <= _MOST_DOTS:
        parts += [_dot(series.name, point, x_axis, y_axis) for point in shown]
    return element("g", *parts, class_=_classes(colour))


def _dot(name: str, point: _Point, x_axis: _Axis, y_axis: _Axis) -> Html:
    value = f"{point.x:,.6g}: {point.y:,.6g}{_interval(point.low, point.high)}"
    title = f"{name}{': ' * bool(point.text)}{point.text}\n{value}"
    return element("circle", element("title", title), cx=x_axis.at(point.x), cy=y_axis.at(point.y), r=4, class_="dot")


def _interval(low: float, high: float) -> str:
    return f" ({low:,.6g} to {high:,.6g})" if _drawable(low) and _drawable(high) else ""


def _names(points: Sequence[_Point], x_axis: _Axis, y_axis: _Axis) -> Iterator[Html]:
    """Names beside their points; one that would lie on another is left to the pointer."""
    taken: list[tuple[float, float, float]] = []
    for point in points:
        x, y, text = x_axis.at(point.x), y_axis.at(point.y), _short(point.text)
        start = x - 8 - _width(text) if x > _WIDTH / 2 else x + 8
        end = start + _width(text)
        if text and not any(abs(y - line) < 13 and start < last and first < end for first, last, line in taken):
            taken.append((start, end, y))
            yield _beside(x, y, text)


def _histogram(points: Sequence[_Point | None], x_axis: _Axis, y_axis: _Axis) -> Iterator[Html]:
    for point, after in pairwise(points):
        if point is not None and after is not None:
            left, right, y = x_axis.at(point.x), x_axis.at(after.x), y_axis.at(point.y)
            title = f"{point.x:,.6g} to {after.x:,.6g}: {point.y:,.6g}"
            yield _rect(title, left, y, right - left, y_axis.at(0) - y, class_="bar")


def _rect(tooltip: str, x: float, y: float, width: float, height: float, **attributes: object) -> Html:
    sides = {"x": round(x, 1), "y": round(y, 1), "width": round(width, 1), "height": round(height, 1)}
    return element("rect", element("title", tooltip), **sides, **attributes)


def bars(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    *,
    x: str,
    low: Sequence[float] = (),
    high: Sequence[float] = (),
) -> Html:
    """A bar from zero for each name, or, where `low` and `high` are given, a point with its interval.

    Args:
        title: of the plot.
        names: `(n,)`.
        values: `(n,)`; one that is not finite gets no bar.
        x: what the values are, with their unit.
        low, high: ends of the intervals `(n,)`.
    """
    count = len(names)
    ends = zip(names, values, *(list(side) or [nan] * count for side in (low, high)), strict=True)
    points = [_Point(value, row, name, *interval) for row, (name, value, *interval) in enumerate(ends)]
    shown = [point for point in points if _drawable(point.x)]
    if not shown:
        return _nothing(title, "no values")
    left, bottom = _name_width(names), 4 + _ROW * count
    numbers = [number for point in shown for number in (point.x, point.low, point.high) if _drawable(number)]
    axis = _Axis(*_range(numbers, from_zero=not len(low)), left, _WIDTH - _RIGHT)
    parts = list(_numbers_below(axis, bottom, 0, x))
    for point in points:
        y = 4 + _ROW * (point.y + 0.5)
        parts.append(_name_beside(left, y, point.text))
        tooltip = f"{point.text}: {point.x:,.6g}{_interval(point.low, point.high)}"
        if _drawable(point.x) and not len(low):
            start, stop = sorted((axis.at(0), axis.at(point.x)))
            parts.append(_rect(tooltip, start, y - 7, stop - start, 14, class_="bar"))
        elif _drawable(point.x):
            if _drawable(point.low) and _drawable(point.high):
                parts.append(_line(axis.at(point.low), y, axis.at(point.high), y, "interval"))
            parts.append(element("circle", element("title", tooltip), cx=axis.at(point.x), cy=y, r=5, class_="dot"))
    drawing = element("g", *parts, class_="s0")
    return _figure(title, f"{title}: {x} of {', '.join(names)}", [drawing], bottom + _BOTTOM)


def heat(
    title: str, values: Sequence[Sequence[float]], *, rows: Sequence[str], columns: Sequence[str], y: str, x: str
) -> Html:
    """A matrix of numbers >= 0, each cell as dark as its part of its row is large.

    Args:
        title: of the plot.
        values: `(len(rows), len(columns))`; a cell that is not finite stays empty.
        rows, columns: their names.
        y, x: what rows and columns are.
    """
    left, height = _name_width(rows), 44
    width = (_WIDTH - _RIGHT - left) / max(1, len(columns))
    parts = [_text(0, 12, y)]
    for row, (name, numbers) in enumerate(zip(rows, values, strict=True)):
        top = _TOP + row * height
        parts.append(_name_beside(left, top + height / 2, name))
        total = sum(value for value in numbers if _drawable(value))
        for column, value in enumerate(numbers):
            if _drawable(value):
                start, part = left + column * width, value / total if total else 0.0
                tooltip = f"{name}, {columns[column]}: {value:,.6g} ({part:.1%})"
                shade = round(0.03 + 0.47 * part, 3)  # at most half: the text must stay legible on it
                parts.append(_rect(tooltip, start, top, width - 2, height - 2, class_="cell", fill_opacity=shade))
                text = f"{_number(value)} ({part:.0%})"
                parts.append(_text(start + width / 2 - 1, top + height / 2 + 3, text, anchor="middle", class_="count"))
    bottom = _TOP + height * len(rows)
    for column, name in enumerate(columns):
        parts.append(_text(left + (column + 0.5) * width, bottom + 14, _short(name), anchor="middle", class_="name"))
    parts.append(_text((left + _WIDTH - _RIGHT) / 2, bottom + 34, x, anchor="middle"))
    return _figure(title, f"{title}: {y} by {x}", parts, bottom + _BOTTOM)


def _width(text: str) -> float:
    return _LETTER * cell_len(text)


def _name_width(names: Sequence[str]) -> float:
    return max((_width(_short(name)) for name in names), default=0.0) + 10


def _name_beside(left: float, y: float, name: str) -> Html:
    return _text(left - 6, y + 4, element("title", name), _short(name), anchor="end", class_="name")


def _short(name: str) -> str:
    text = Text(visible(name))
    text.truncate(_LONGEST_NAME, overflow="ellipsis")
    return text.plain


def _nothing(title: str, why: str) -> Html:
    return _figure(title, f"{title}: {why}", [_text(_WIDTH / 2, 60, why, anchor="middle")], 120)


def _figure(title: str, summary: str, parts: Iterable[Html], height: float, legend: Sequence[Html] = ()) -> Html:
    """The drawing under its title, with its legend below.

    Args:
        title: of the plot.
        summary: what a screen reader says in place of the drawing.
        parts: of the drawing.
        height: in units of the drawing.
        legend: names of the series.
    """
    drawing = element("svg", *parts, viewBox=f"0 0 {_WIDTH} {height:g}", role="img", aria_label=summary)
    names = element("div", *legend, class_="legend") if legend else None
    return element("figure", element("figcaption", title), drawing, names)
