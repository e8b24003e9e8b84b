"""Traits of rows: each pattern finds what it is for, and a bias points to the side that has more."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from pairclf.data.traits import preferred_sides, traits
from pairclf.task import LMSYS, Task

SINGLE = Task(name="single", fields=("text",), classes=("x", "y"))


def frame_of(rows: list[tuple[Any, Any, Any]], files: list[str] | None = None) -> pl.DataFrame:
    cells = {name: [[cell] if isinstance(cell, str) else cell for cell in column] for name, column in zip(
        LMSYS.fields, zip(*rows, strict=True), strict=True)}  # fmt: skip
    schema = dict.fromkeys(LMSYS.fields, pl.List(pl.String))
    return pl.DataFrame(cells, schema=schema).with_columns(file=pl.Series(files or ["train.csv"] * len(rows)))


@pytest.mark.parametrize(
    ("prompt", "script"),
    [
        ("What is it?", "Latin"), ("Что это?", "Cyrillic"), ("这是什么 ok", "Chinese or Japanese"),
        ("これは何ですか", "Chinese or Japanese"), ("이것은 무엇입니까", "Korean"), ("ما هذا؟", "Arabic"),
        ("यह क्या है", "Devanagari"), ("τι είναι", "Greek"), ("מה זה", "Hebrew"), ("นี่คืออะไร", "Thai"),
        ("1 + 1 = ?", None), ("", None),
    ],
)  # fmt: skip
def test_the_script_is_that_of_most_letters(prompt: str, script: str | None) -> None:
    assert traits(frame_of([(prompt, "a", "b")]), LMSYS)["script of the prompt"].to_list() == [script]


@pytest.mark.parametrize(
    ("a", "b", "trait", "name"),
    [
        ("**bold**", "plain", "markdown", "markdown in one answer"),
        ("- item", "1. item\n2. item", "markdown", "markdown in both answers"),
        ("2 - 1 = 1, a*b", "it costs $1.50", "markdown", "markdown in no answer"),
        ("I'm sorry, but I can't", "Sure", "refusals", "refusal in one answer"),
        ("As an AI, I have no taste", "I cannot help", "refusals", "refusal in both answers"),
        ("Sure. " + "x" * 400 + " I cannot", "a can", "refusals", "refusal in no answer"),
        (["I cannot", "Here it is"], "Yes", "refusals", "refusal in no answer"),
        ("same", "same", "lengths of the answers", "equal answers"),
        ("x" * 100, "y" * 104, "lengths of the answers", "answers as long as each other"),
        ("x" * 100, "y" * 150, "lengths of the answers", "one answer longer"),
        ("x" * 10, "y" * 150, "lengths of the answers", "one answer twice as long"),
        ("", "", "lengths of the answers", "equal answers"),
        ("```python\n1\n```", "x", "code", "code"),
        ("`x`", "x", "code", "no code"),
    ],
)
def test_pairs_are_sliced_alike_in_both_orders(a: Any, b: Any, trait: str, name: str) -> None:
    found = traits(frame_of([("p", a, b), ("p", b, a)]), LMSYS)
    assert found[trait].to_list() == [name, name]


def test_turns_lengths_and_files() -> None:
    rows = [(["p"] * turns, ["a" * size] * turns, ["b"] * turns) for turns, size in ((1, 1), (2, 9), (3, 99), (7, 999))]
    found = traits(frame_of(rows, ["x.csv", "x.csv", "y.csv", "y.csv"]), LMSYS)
    assert found["turns"].to_list() == ["1 turn", "2 turns", "3 turns or more", "3 turns or more"]
    assert found["length"].to_list() == ["shortest quarter", "second quarter", "third quarter", "longest quarter"]
    assert found["file"].to_list() == ["x.csv", "x.csv", "y.csv", "y.csv"]
    assert "file" not in traits(frame_of(rows), LMSYS).columns


def test_null_turns_and_empty_lists_are_rows_like_any_other() -> None:
    found = traits(frame_of([(["p", None], [None], []), ([], ["x"], [None, "y"])]), LMSYS)
    assert found["turns"].to_list() == ["2 turns", "1 turn"]
    assert found["refusals"].to_list() == ["refusal in no answer"] * 2


def test_a_text_alone_has_no_sides() -> None:
    frame = pl.DataFrame({"text": [["один"], ["two"]], "file": ["f", "f"]})
    assert traits(frame, SINGLE)["script"].to_list() == ["Cyrillic", "Latin"]
    assert "markdown" not in traits(frame, SINGLE).columns
    assert preferred_sides(frame, SINGLE) == {}


def test_a_bias_points_to_the_side_that_has_more() -> None:
    rows = [("p", "**a**\n- b", "short"), ("p", "xx", "I cannot do that"), ("p", "equal", "lengt")]
    assert {name: sides.tolist() for name, sides in preferred_sides(frame_of(rows), LMSYS).items()} == {
        "the longer answer": [0, 1, -1],
        "the answer with more markdown": [0, -1, -1],
        "the answer that refuses": [-1, 1, -1],
    }
