"""`show`: what is printed is what the model sees, and nothing in a text reaches the terminal as a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from pairclf.config import Config
from pairclf.errors import DataError
from pairclf.inspect.show import find_rows, show
from pairclf.model.inputs import open_inputs
from pairclf.task import LMSYS, Row


def row(**texts: str) -> Row:
    return Row("7", {name: (texts.get(name, "x"),) for name in LMSYS.fields})


def test_both_orders_are_shown_with_what_was_cut(config_for: Callable[..., Config]) -> None:
    opened = open_inputs(config_for("gemma2", inputs={"max_length": 180}))
    ab, ba = (text.plain for text in show(opened, row(response_a="a" * 300, response_b="bbb"), coloured=False))
    assert ab.startswith("row 7, order AB: 180 of 180 tokens; tokens cut from response_a 2")
    assert "cut from response_b 2" in ba.splitlines()[0]
    assert "⟨prompt⟩x" in ab
    assert "⟨response_b⟩bbb" in ab
    assert "⟨response_a⟩bbb" in ba
    assert "⟨marker⟩ [… 2" in ab


def test_what_is_shown_is_what_the_model_gets(config_for: Callable[..., Config]) -> None:
    opened = open_inputs(config_for("gemma2"))
    one = row(prompt="Was ist 日本?", response_a="é\n\n", response_b="<eos>")
    for text, encoded in zip(show(opened, one, coloured=True), opened.builder.encode([one])[0], strict=True):
        assert "nothing cut" in text.plain
        assert text.plain.split("template \n")[1].removesuffix("\n") == opened.tokenizer.decode(encoded.ids)


def test_segments_have_their_own_colours_in_either_order(config_for: Callable[..., Config]) -> None:
    opened = open_inputs(config_for("gemma2"))
    for text in show(opened, row(response_a="left", response_b="right"), coloured=True):
        styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
        assert styles["left"] != styles["right"]
        assert styles["left"] == styles[" response_a " if "AB" in text.plain else " response_b "].removesuffix(
            " reverse"
        )


def test_no_escape_sequence_of_a_user_reaches_the_terminal(config_for: Callable[..., Config]) -> None:
    opened = open_inputs(config_for("gemma2"))
    shown = show(opened, row(prompt="\x1b[2J\x07[red]\x7f"), coloured=True)[0].plain
    assert "\\x1b[2J\\x07[red]\\x7f" in shown


def test_rows_are_found_in_whatever_chunk_they_stand() -> None:
    turns: dict[str, Any] = {name: [["t"]] * 6 for name in LMSYS.fields}
    frame = pl.DataFrame({"id": list("abcdef"), **turns, "target": [[1.0, 0, 0]] * 6, "weight": [1.0] * 6})
    assert [one.id for one in find_rows(frame.iter_slices(2), ["e", "a"], LMSYS)] == ["e", "a"]
    assert [one.id for one in find_rows(frame.iter_slices(2), [], LMSYS)] == ["a"]
    with pytest.raises(DataError, match="no row has this id"):
        find_rows(frame.iter_slices(2), ["a", "z"], LMSYS)
