"""Folds: a partition, no prompt on both sides, the same by seed; and a leak never goes unseen."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pairclf.data.folds import (
    assert_no_leak,
    make_folds,
    normalise,
    prompt_groups,
    read_folds,
    report,
    write_folds,
)
from pairclf.data.tables import read_rows
from pairclf.errors import DataError, LeakError
from pairclf.task import LMSYS, WSDM, Task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

Turns = list[str | None]


def canonical(prompts: list[Turns], classes: list[int] | None = None, prefix: str = "r") -> pl.DataFrame:
    """A canonical LMSYS table with these prompts and these winners (none: unlabelled)."""
    n = len(prompts)
    targets = [None] * n if classes is None else [[float(place == winner) for place in range(3)] for winner in classes]
    texts = {"prompt": prompts, "response_a": [["a"]] * n, "response_b": [["b"]] * n}
    kinds = {**dict.fromkeys(texts, pl.List(pl.String)), "target": pl.List(pl.Float64)}
    columns = {"id": [f"{prefix}{row}" for row in range(n)], **texts, "target": targets}
    return pl.DataFrame(columns, schema_overrides=kinds).with_columns(weight=pl.lit(1.0))


def some_rows(n: int = 60, prompts: int = 20) -> pl.DataFrame:
    return canonical([[f"prompt {row % prompts}"] for row in range(n)], [row % 3 for row in range(n)])


labelled = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=4, max_size=60)


@given(rows=labelled, n=st.integers(2, 4), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_folds_are_a_partition_without_leaks(rows: list[tuple[int, int]], n: int, seed: int) -> None:
    frame = canonical([[f"Prompt  {number}"] for number, _ in rows], [winner for _, winner in rows])
    try:
        folds = make_folds(frame, LMSYS, n=n, seed=seed)
    except DataError as error:
        few = len({number for number, _ in rows}) < n
        rare = all([winner for _, winner in rows].count(place) < n for place in range(3))
        assert few or rare or "stay empty" in error.what  # noqa: PT017 (not every table can be folded)
        return
    assert folds["id"].to_list() == frame["id"].to_list()
    assert set(folds["fold"]) == set(range(n))
    assert folds.group_by("group").agg(pl.col("fold").n_unique())["fold"].max() == 1
    assert folds.equals(make_folds(frame, LMSYS, n=n, seed=seed))
    for fold in range(n):
        held_out = folds["fold"] == fold
        assert_no_leak(frame.filter(~held_out), frame.filter(held_out), LMSYS)


def test_folds_are_balanced_and_the_seed_moves_them() -> None:
    frame = some_rows(300, 100)
    folds = make_folds(frame, LMSYS, n=5, seed=0)
    assert folds["fold"].value_counts()["count"].to_list() == pytest.approx([60] * 5, abs=3)
    winners = frame["target"].list.arg_max()
    for fold in range(5):
        counts = winners.filter(folds["fold"] == fold).value_counts()["count"].to_list()
        assert counts == pytest.approx([20] * 3, abs=3)
    assert not folds.equals(make_folds(frame, LMSYS, n=5, seed=1))


@given(st.text(max_size=30))
@settings(deadline=None)
def test_normalise_ignores_case_and_space(text: str) -> None:
    once = normalise(text)
    assert normalise(f" \n{text}\t ") == once
    assert once == once.strip()
    assert "  " not in once


def test_prompts_are_compared_normalised() -> None:
    same: list[Turns] = [["What is\n it?"], ["  what IS it？"], ["What is", None, "it?"], ["Ｗｈａｔ is it?\u00a0"]]
    groups = prompt_groups(canonical([*same, ["What was it?"], ["Straße"], ["STRASSE"]]), LMSYS)
    assert groups[:4].n_unique() == 1
    assert groups[4] != groups[0]
    assert groups[5] == groups[6]


def test_rows_without_a_prompt_are_groups_of_their_own() -> None:
    groups = prompt_groups(canonical([[], [None], [""], [" \n"], ["x"]]), LMSYS)
    assert groups.n_unique() == 5
    assert groups.to_list() == prompt_groups(canonical([[], [None], [""], [" \n"], ["x"]]), LMSYS).to_list()


def test_a_pair_and_its_mirror_share_a_group_where_a_swap_moves_every_field() -> None:
    task = Task(name="pair", fields=("a", "b"), classes=("l", "r"), swap_fields=("a", "b"), swap_classes=("l", "r"))
    turns = pl.List(pl.String)
    frame = pl.DataFrame({"id": ["1", "2"], "a": [["x"], ["y"]], "b": [["y"], ["x"]]}, schema_overrides={"a": turns})
    assert prompt_groups(frame, task).n_unique() == 1


def test_too_few_prompts_or_no_labels() -> None:
    with pytest.raises(DataError, match="2 different prompts can't fill 3 folds"):
        make_folds(some_rows(30, 2), LMSYS, n=3, seed=0)
    with pytest.raises(DataError, match="2 different prompts"):
        make_folds(canonical([["a"], ["b"]], [0, 1]), LMSYS, n=3, seed=0)
    with pytest.raises(DataError, match="can't fill 3 folds"):
        make_folds(canonical([["a"], ["b"], ["c"]], [0, 1, 2]), LMSYS, n=3, seed=0)
    with pytest.raises(DataError, match="folds need labels") as caught:
        make_folds(canonical([["a"], ["b"]]), LMSYS, n=2, seed=0)
    assert caught.value.rows == ("r0", "r1")


def test_a_leak_is_named() -> None:
    train = canonical([["one"], ["Two "], [""]], prefix="t")
    assert_no_leak(train, canonical([["three"], [""], [None]], prefix="h"), LMSYS)
    with pytest.raises(LeakError, match="1 of 2 held-out rows") as caught:
        assert_no_leak(train, canonical([["three"], ["two"]], prefix="h"), LMSYS)
    assert caught.value.rows == ("h1",)
    with pytest.raises(LeakError) as caught:
        assert_no_leak(train, canonical([["three"]], prefix="t"), LMSYS)
    assert caught.value.rows == ("t0",)


def test_folds_come_back_in_the_order_of_the_rows(tmp_path: Path) -> None:
    frame = some_rows()
    folds = make_folds(frame, LMSYS, n=3, seed=0)
    write_folds(tmp_path / "folds.csv", folds.reverse())
    assert read_folds(tmp_path / "folds.csv", frame, n=3).equals(folds)


@pytest.mark.parametrize(
    ("edit", "expected", "row"),
    [
        (lambda lines: lines[:-1], "have no fold", "r59"),
        (lambda lines: [*lines, "new,0,g"], "not in the data", "new"),
        (lambda lines: [*lines, lines[1]], "stand twice", "r0"),
        (lambda lines: [*lines[:-1], "r59,x,g"], "whole numbers", "r59"),
        (lambda lines: [*lines[:-1], "r59,3,g"], "from 0 to 2", "r59"),
        (lambda lines: [*lines[:-1], "r59,,g"], "whole numbers", "r59"),
        (lambda lines: ["key,fold,group", *lines[1:]], "columns are", None),
        (lambda lines: [line.replace(",2,", ",1,") for line in lines], "2 folds, not 3", None),
        (lambda lines: [], "can't be read", None),
    ],
)
def test_folds_that_do_not_fit_are_refused(tmp_path: Path, edit: Any, expected: str, row: str | None) -> None:
    frame, path = some_rows(), tmp_path / "folds.csv"
    write_folds(path, make_folds(frame, LMSYS, n=3, seed=0))
    path.write_text("".join(f"{line}\n" for line in edit(path.read_text().splitlines())))
    with pytest.raises(DataError, match=expected) as caught:
        read_folds(path, frame, n=3)
    assert caught.value.rows == (() if row is None else (row,))
    assert caught.value.remedy


def test_absent_folds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_folds(tmp_path / "folds.csv", some_rows(), n=3)


def test_a_full_disk_leaves_the_old_folds_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, frame = tmp_path / "folds.csv", some_rows()
    write_folds(path, make_folds(frame, LMSYS, n=3, seed=0))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_folds(path, make_folds(frame, LMSYS, n=3, seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_report_counts_rows_prompts_and_labels() -> None:
    frame = canonical([["a"], ["a"], ["b"], ["c"]], [0, 0, 1, 2])
    folds = frame.select("id", fold=pl.Series([0, 0, 1, 1]), group=prompt_groups(frame, LMSYS))
    screen = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(report(folds, frame, LMSYS))
    lines = [line.split() for line in screen.export_text().splitlines()]
    assert ["0", "2", "1", "2", "100.0%", "0.0%", "0.0%"] in lines
    assert ["1", "2", "2", "1", "0.0%", "50.0%", "50.0%"] in lines
    assert ["all", "4", "3", "2", "50.0%", "25.0%", "25.0%"] in lines


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")
def test_real_data_folds() -> None:
    frame = read_rows([SHARED / "arena2" / "train.parquet"], WSDM, labelled=True)
    folds = make_folds(frame, WSDM, n=5, seed=0)
    assert folds["fold"].value_counts()["count"].to_list() == pytest.approx([len(frame) / 5] * 5, rel=0.02)
    for fold in range(5):
        held_out = folds["fold"] == fold
        assert_no_leak(frame.filter(~held_out), frame.filter(held_out), WSDM)
