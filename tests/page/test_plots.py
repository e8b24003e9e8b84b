"""Plots show each finite value at its place, at round numbers, and nothing else."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise, product
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.page.html import Html, document, element, table
from pairclf.page.plots import Series, bars, heat, plot, round_numbers

if TYPE_CHECKING:
    from pathlib import Path

    from support.browser import Browser

NAMES = ["A wins", "<b>B</b> wins", "\u05ea\u05d9\u05e7\u05d5"]
NUMBERS = st.floats() | st.sampled_from([0.0, -0.0, 1e-300, 1e300, math.nan, math.inf])


def tree(figure: Html) -> ElementTree.Element:
    """The drawing, which must be well-formed XML whose coordinates are finite numbers within it."""
    drawing = ElementTree.fromstring(str(figure)).find("svg")
    assert drawing is not None
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    for mark in drawing.iter():
        for name, most in {"x": width, "cx": width, "x1": width, "x2": width, "y": height, "cy": height}.items():
            assert -1 <= float(mark.attrib.get(name, 0)) <= most + 1, (mark.tag, mark.attrib)
    return drawing


def texts(figure: Html, class_: str | None = None) -> list[str]:
    return ["".join(mark.itertext()) for mark in tree(figure).iter("text") if mark.attrib.get("class") == class_]


def centres(figure: Html) -> list[tuple[float, float]]:
    return [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in tree(figure).iter("circle")]


@given(st.floats(-1e99, 1e99, allow_subnormal=False), st.floats(1e-6, 1e6))
def test_round_numbers_are_few_evenly_apart_and_inside(low: float, part: float) -> None:
    high = low + max(abs(low), 1e-90) * part
    numbers = round_numbers(low, high)
    assert 1 <= len(numbers) <= 7
    room = 1e-9 * max(abs(low), abs(high))
    assert all(low - room <= number <= high + room for number in numbers)
    steps = {f"{second - first:.3g}" for first, second in pairwise(numbers)}
    assert len(steps) <= 1
    assert all(f"{float(step):e}"[:4] in ("1.00", "2.00", "5.00") for step in steps)


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (1, 900, [1, 10, 100]),
        (20, 900, [20, 50, 100, 200, 500]),
        (1e-9, 1e9, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9]),
        (200, 1000, [200, 400, 600, 800, 1000]),
    ],
)
def test_numbers_of_a_logarithmic_axis(low: float, high: float, numbers: list[float]) -> None:
    assert round_numbers(low, high, log=True) == pytest.approx(numbers)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=9), st.booleans())
def test_whatever_the_values_the_drawing_is_whole(points: list[tuple[float, ...]], log: bool) -> None:
    x, y, low, high = ([point[place] for point in points] for place in range(4))
    names = [NAMES[place % 3] for place in range(len(points))]
    series = [
        Series("line", x, y, names, low, high),
        Series("steps", y, x, style="steps"),
        Series("points", x, y, names, style="points"),
        Series("histogram", x, y, style="histogram"),
        Series("reference", low, high, style="reference"),
    ]
    for figure in (
        *(
            plot("Title", [one, series[-1]], x="x", y="y", log=log, marks=[(x[0] if x else 1, "mark")])
            for one in series
        ),
        bars("Title", names, y, x="x"),
        bars("Title", names, y, x="x", low=low, high=high),
        heat("Title", [list(map(abs, row)) for row in points], rows=names, columns=["a"] * 4, y="y", x="x"),
    ):
        tree(figure)
        assert not re.findall(r'="[^"]*(?:nan|inf)\b', figure)


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    whole = plot("Loss", [Series("loss", [0, 1, 2, 3], [1, 2, 3, 4])], x="step", y="nats")
    gap = plot("Loss", [Series("loss", [0, 1, 2, 3], [1, 2, math.nan, 4])], x="step", y="nats")
    [line], [broken] = (re.findall(r'd="([^"]*)"', figure) for figure in (whole, gap))
    assert (line.count("M"), line.count("L")) == (1, 3)
    assert (broken.count("M"), broken.count("L")) == (2, 1)
    assert [centres(whole)[place] for place in (0, 1, 3)] == centres(gap)


def test_points_lie_where_their_values_are() -> None:
    """By the numbers of the axes, which the drawing has too."""
    figure = plot("Runs", [Series("runs", [1, 2, 4], [10, 30, 20], style="points")], x="hours", y="loss")
    numbers = {
        "".join(mark.itertext()): (float(mark.attrib["x"]), float(mark.attrib["y"]) - 4)
        for mark in tree(figure).iter("text")
    }
    (x1, y10), (x2, y30), (x4, _) = centres(figure)
    assert x1 == pytest.approx(numbers["1"][0])
    assert (x2, x4) == pytest.approx((numbers["2"][0], numbers["4"][0]))
    assert (y10, y30) == pytest.approx((numbers["10"][1], numbers["30"][1]))
    assert y30 < y10, "larger values stand higher"
    log = centres(plot("Log", [Series("runs", [1, 10, 100], [1, 1, 1])], x="x", y="y", log=True))
    assert log[1][0] - log[0][0] == pytest.approx(log[2][0] - log[1][0], abs=0.2)


@pytest.mark.parametrize("log", [False, True])
def test_no_number_below_covers_another(log: bool) -> None:
    figure = plot("Costs", [Series("runs", [1_400_000, 6_600_000], [0.98, 0.91])], x="weights", y="loss", log=log)
    below = [mark for mark in tree(figure).iter("text") if "," in str(mark.text)]
    ends = [(float(mark.attrib["x"]), 3.7 * len(str(mark.text))) for mark in below]
    assert len(ends) >= 2
    assert all(first + half < second - other for (first, half), (second, other) in pairwise(ends))


def test_a_reference_widens_no_axis() -> None:
    points = Series("runs", [0.9, 0.91], [0.95, 0.96], ["first", "second"], style="points")
    wide = Series("equal", [0, 9], [0, 9], style="reference")
    alone = plot("Runs", [points], x="out of fold", y="leaderboard")
    both = plot("Runs", [wide, points], x="out of fold", y="leaderboard")
    assert centres(alone) == centres(both)
    assert texts(both, "name") == ["first", "second"]
    assert centres(plot("Runs", [Series("wide", [0, 9], [0, 9]), points], x="", y=""))[2:] != centres(alone)
    assert 'class="key points s0"' in both, "a reference takes no colour"


def test_intervals_tooltips_and_names() -> None:
    figure = plot(
        "Reliability",
        [
            Series("tie", [0.5], [0.4], ["<bin>"], [0.3], [0.5]),
            Series("no interval", [0.6], [0.4], low=[math.nan], high=[1]),
        ],
        x="predicted",
        y="observed",
    )
    assert figure.count('class="interval"') == 1
    assert "tie: &lt;bin&gt;\n0.5: 0.4 (0.3 to 0.5)</title>" in figure
    assert 'aria-label="Reliability: observed over predicted; tie, no interval"' in figure
    assert texts(plot("Empty", [Series("nothing", [], [])], x="x", y="y", empty="no run yet")) == ["no run yet"]
    crowded = [Series("runs", [1, 1.001, 2], [2, 2.001, 3], ["low", "over it", "high"], style="points")]
    assert texts(plot("Runs", crowded, x="x", y="y", marks=[(1.5, "deadline")]), "name") == ["deadline", "low", "high"]


def test_bars_begin_at_zero_and_intervals_do_not() -> None:
    figure = bars("Slices", ["a", "b"], [2, -1], x="gain")
    first, second = tree(figure).iter("rect")
    assert float(first.attrib["x"]) == pytest.approx(float(second.attrib["x"]) + float(second.attrib["width"]), abs=0.2)
    assert float(first.attrib["width"]) == pytest.approx(2 * float(second.attrib["width"]), abs=0.3)
    figure = bars("Slices", ["a", "b"], [0.95, 1.05], low=[0.9, 1.0], high=[1.0, 1.1], x="log loss")
    assert "0" not in texts(figure)
    assert figure.count('class="interval"') == 2
    assert "a: 0.95 (0.9 to 1)" in figure


def test_a_cell_is_as_dark_as_its_part_of_the_row() -> None:
    figure = heat("Confusion", [[3, 1], [0, 0]], rows=["A", "B"], columns=["A", "B"], y="label", x="predicted")
    shades = [float(cell.attrib["fill-opacity"]) for cell in tree(figure).iter("rect")]
    assert shades == pytest.approx([0.03 + 0.47 * 0.75, 0.03 + 0.47 * 0.25, 0.03, 0.03], abs=1e-3)
    assert texts(figure, "count") == ["3 (75%)", "1 (25%)", "0 (0%)", "0 (0%)"]


def test_long_names_are_cut_and_whole_in_their_tooltip() -> None:
    name = "\u6bd4" * 50 + "\x1b"
    for figure in (
        bars("Slices", [name], [1], x="x"),
        heat("Confusion", [[1]], rows=[name], columns=[name], y="y", x="x"),
    ):
        assert "\u2026" in figure
        assert "\x1b" not in figure
        assert f"<title>{name[:-1]}\\x1b</title>" in figure


OUTSIDE = """
return [...document.querySelectorAll("figure > svg")].flatMap(drawing => {
  const box = drawing.getBoundingClientRect()
  return [...drawing.querySelectorAll("text")].filter(text => {
    const { left, right, top, bottom } = text.getBoundingClientRect()
    return left < box.left - 1 || right > box.right + 1 || top < box.top - 1 || bottom > box.bottom + 1
  }).map(text => text.textContent)
})
"""
FAINT = """
const light = color => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
  const linear = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05
}
const paper = light(getComputedStyle(document.body).backgroundColor)
const marks = document.querySelectorAll("h1, p, td, th, caption, figcaption, .key, svg text")
return [...marks].filter(mark => {
  const style = getComputedStyle(mark), ink = light(mark.tagName === "text" ? style.fill : style.color)
  return Math.max(ink, paper) / Math.min(ink, paper) < 4.5
}).map(mark => mark.textContent)
"""
"""The least contrast of a text by the Web Content Accessibility Guidelines 2.2, level AA, is 4.5."""


@pytest.mark.thorough
@pytest.mark.parametrize(("size", "dark"), list(product(("wide", "phone"), (False, True))))
def test_texts_are_legible_and_lie_within_the_page(browser: Browser, tmp_path: Path, size: str, dark: bool) -> None:
    lines = [Series(f"run {run}", [1, 20, 5000], [run, 0.123456, 1e6], ["text"] * 3) for run in range(8)]
    points = Series("runs", [1, 2, 3], [1, 2, 3], ["first", "a name of thirty letters or so", "last"], style="points")
    names = ["gemma2-9b-it-qlora-4096-tokens", "short"]
    plots = [
        plot("Lines", lines, x="optimizer steps", y="log loss", log=True, marks=[(20, "deadline, with time to spare")]),
        plot("Points", [points], x="hours", y="log loss"),
        plot("Nothing", [], x="x", y="y", empty="no submission has both an out-of-fold and a leaderboard score yet"),
        bars("Bars", names, [-1e5, 12_345.6], x="gain in log loss, thousandths of a nat a row"),
        heat("Cells", [[12_345, 1], [2, 3]], rows=names, columns=["A wins", "B wins"], y="label", x="predicted"),
    ]
    words = [element("p", word, class_=word) for word in ("good", "warn", "bad", "quiet")]
    figures = table(["name", "figure"], [["a text of many words " * 9, 1.5]], caption="a caption of many words " * 5)
    path = tmp_path / "page.html"
    path.write_text(document("Plots", [element("div", *plots, class_="plots"), *words, figures]), encoding="utf-8")
    browser.open(path, size=size, dark=dark)
    assert browser.console() == browser.requests() == []
    assert browser.overflow() == 0
    assert browser.run(OUTSIDE) == []
    assert browser.run(FAINT) == []
