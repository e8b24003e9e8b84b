"""Rows that tests of several rooms share."""

from __future__ import annotations

from pairclf.task import Row


def make_rows(count: int) -> list[Row]:
    """Rows of different lengths whose winner can be read from the text."""
    rows = []
    for number in range(count):
        good, bad = "yes " * (1 + number % 5), "no " * (2 + number % 7)
        winner = number % 3
        a, b = ((good, bad), (bad, good), (good, good))[winner]
        target = tuple(float(index == winner) for index in range(3))
        fields = {"prompt": (f"question {number}",), "response_a": (a,), "response_b": (b, "more")[: 1 + number % 2]}
        rows.append(Row(str(number), fields, target))
    return rows
