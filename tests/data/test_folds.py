"""Folds: a partition, no (nearly) equal prompts on both sides, the same by seed; and a leak never goes unseen."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.model_selection import KFold
from support.tables import Turns, canonical
from typer.testing import CliRunner

from pairclf.cli import app
from pairclf.config import Source, dump_config, resolve
from pairclf.data.folds import (
    assert_apart,
    assert_no_leak,
    draw_rows,
    make_folds,
    prompt_groups,
    prompt_hashes,
    read_folds,
    report,
    same_group,
    strata,
    write_folds,
)
from pairclf.data.rows import read_rows, write_rows
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import ConfigError, DataError, LeakError
from pairclf.run import Run, chunks_of, folds_of, labelled_rows
from pairclf.task import LMSYS, WSDM, Task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

NEAR = 0.8


def folded(
    frame: pl.DataFrame, *, n: int, seed: int = 0, near: float | None = NEAR, stable: bool = False
) -> pl.DataFrame:
    return make_folds(frame, LMSYS, n=n, seed=seed, near=near, stable=stable)


def some_rows(n: int = 60, prompts: int = 20) -> pl.DataFrame:
    """No two of these prompts are near: they share none of their 5-grams."""
    return canonical([[" ".join([str(row % prompts)] * 3)] for row in range(n)], [row % 3 for row in range(n)])


labelled = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=4, max_size=60)


@given(rows=labelled, n=st.integers(2, 4), seed=st.integers(0, 3))
def test_folds_are_a_partition_without_leaks(rows: list[tuple[int, int]], n: int, seed: int) -> None:
    frame = canonical([[f"Prompt  {number}"] for number, _ in rows], [winner for _, winner in rows])
    try:
        folds = folded(frame, n=n, seed=seed)
    except DataError as error:
        few = prompt_groups(frame, LMSYS, NEAR).n_unique() < n  # Prompt 1 and Prompt 10 are near
        rare = all([winner for _, winner in rows].count(place) < n for place in range(3))
        assert few or rare or "stay empty" in error.what  # noqa: PT017 (not every table can be folded)
        return
    assert folds["id"].to_list() == frame["id"].to_list()
    assert set(folds["fold"]) == set(range(n))
    assert folds.group_by("group").agg(pl.col("fold").n_unique())["fold"].max() == 1
    assert folds.equals(folded(frame, n=n, seed=seed))
    for fold in range(n):
        held_out = folds["fold"] == fold
        prove(frame.filter(~held_out), frame.filter(held_out), NEAR)


def prove(training: pl.DataFrame, held_out: pl.DataFrame, near: float | None) -> None:
    sides = [rows.select("id", fold=pl.lit(fold)) for fold, rows in enumerate((held_out, training))]
    frame = pl.concat([held_out, training]).with_columns(train_only=pl.lit(False))
    assert_no_leak(frame, pl.concat(sides), [0], LMSYS, near)


def test_folds_are_balanced_and_the_seed_moves_them() -> None:
    frame = some_rows(300, 100)
    folds = folded(frame, n=5, seed=0)
    assert folds["fold"].value_counts()["count"].to_list() == pytest.approx([60] * 5, abs=3)
    winners = frame["target"].list.arg_max()
    for fold in range(5):
        counts = winners.filter(folds["fold"] == fold).value_counts()["count"].to_list()
        assert counts == pytest.approx([20] * 3, abs=3)
    assert not folds.equals(folded(frame, n=5, seed=1))


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
    columns = {"id": ["1", "2"], "a": [["x"], ["y"]], "b": [["y"], ["x"]], "group": [None, None]}
    frame = pl.DataFrame(columns, schema_overrides={"a": turns, "group": pl.String})
    assert prompt_groups(frame, task).n_unique() == 1


def test_too_few_prompts_or_no_labels() -> None:
    with pytest.raises(DataError, match="2 different prompts can't fill 3 folds"):
        folded(some_rows(30, 2), n=3, seed=0)
    with pytest.raises(DataError, match="2 different prompts"):
        folded(canonical([["a"], ["b"]], [0, 1]), n=3, seed=0)
    with pytest.raises(DataError, match="can't fill 3 folds"):
        folded(canonical([["a"], ["b"], ["c"]], [0, 1, 2]), n=3, seed=0)
    with pytest.raises(DataError, match="folds need labels") as caught:
        folded(canonical([["a"], ["b"]]), n=2, seed=0)
    assert caught.value.rows == ("r0", "r1")


def test_a_leak_is_named() -> None:
    train = canonical([["one"], ["Two "], [""]], prefix="t")
    prove(train, canonical([["three"], [""], [None]], prefix="h"), NEAR)
    with pytest.raises(LeakError, match="1 of 2 held-out rows") as caught:
        prove(train, canonical([["three"], ["two"]], prefix="h"), NEAR)
    assert caught.value.rows == ("h1",)
    with pytest.raises(LeakError) as caught:
        prove(train, canonical([["three"]], prefix="t"), NEAR)
    assert set(caught.value.rows) == {"t0"}


def test_folds_come_back_in_the_order_of_the_rows(tmp_path: Path) -> None:
    frame = some_rows()
    folds = folded(frame, n=3, seed=0)
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
        (lambda lines: [*lines[:-1], "r59,-2,g"], "or -1", "r59"),
        (lambda lines: [*lines[:-1], "r59,,g"], "whole numbers", "r59"),
        (lambda lines: ["key,fold,group", *lines[1:]], "columns are", None),
        (lambda lines: [line.replace(",2,", ",1,") for line in lines], "2 folds, not 3", None),
        (lambda lines: [], "can't be read", None),
    ],
)
def test_folds_that_do_not_fit_are_refused(tmp_path: Path, edit: Any, expected: str, row: str | None) -> None:
    frame, path = some_rows(), tmp_path / "folds.csv"
    write_folds(path, folded(frame, n=3, seed=0))
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
    write_folds(path, folded(frame, n=3, seed=0))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_folds(path, folded(frame, n=3, seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def lines_of(folds: pl.DataFrame, frame: pl.DataFrame) -> list[list[str]]:
    screen = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(report(folds, frame, LMSYS))
    return [line.split() for line in screen.export_text().splitlines()]


def test_report_counts_rows_prompts_groups_and_labels() -> None:
    near = ["a rather long question about the way of rivers", "a rather long question about the way of rivers!"]
    frame = canonical([["a"], ["a"], [near[0]], [near[1]], [""]], [0, 0, 1, 2, 2])
    folds = frame.select("id", fold=pl.Series([0, 0, 1, 1, -1]), group=prompt_groups(frame, LMSYS, NEAR))
    lines = lines_of(folds, frame)
    assert ["set", "aside", "1", "0", "1", "1"] in lines
    assert ["0", "2", "1", "1", "2"] in lines
    assert ["1", "2", "2", "1", "2"] in lines
    assert ["all", "5", "3", "3", "2"] in lines
    assert ["fold", "set", "aside", "0", "1", "all"] in lines
    assert ["winner_model_a", "0.0%", "100.0%", "0.0%", "40.0%"] in lines
    assert ["winner_tie", "100.0%", "0.0%", "50.0%", "40.0%"] in lines
    counts = {" ".join(line[:-1]): line[-1] for line in lines if line}
    assert counts["groups of one row"] == "1"
    assert counts["groups of several rows"] == "2"
    assert counts["groups of several prompts, nearly the same or of one folds.group"] == "1"
    assert counts["prompts in these groups"] == "2"
    assert counts["rows without prompt text"] == "1"
    assert counts["rows set aside, near to prompts of several folds"] == "1"


# --- groups, samples -------------------------------------------------------------------------------------------------


def grouped_rows() -> pl.DataFrame:
    """Sixty prompts by seven authors, and some by none."""
    authors = [None if row % 10 == 9 else f"author {row % 7}" for row in range(60)]
    return some_rows(prompts=60).with_columns(group=pl.Series(authors))


def test_rows_of_one_group_share_a_fold_and_leak_otherwise() -> None:
    frame = grouped_rows()
    folds = folded(frame, n=3)
    joined = frame.select("id", author="group").join(folds, on="id").filter(pl.col("author").is_not_null())
    assert joined.group_by("author").agg(pl.col("fold").n_unique())["fold"].to_list() == [1] * 7
    assert folds["group"].n_unique() == 7 + 6
    assert_no_leak(frame, folds, range(3), LMSYS, NEAR)
    blind = folded(frame.with_columns(group=pl.lit(None, dtype=pl.String)), n=3)
    with pytest.raises(LeakError, match=r"54 of 60 held-out rows share their id, prompt or folds\.group"):
        assert_no_leak(frame, blind, range(3), LMSYS, NEAR)
    with pytest.raises(LeakError, match=r"1 of 2 rows that are train_only share their id, prompt or folds\.group"):
        assert_apart(
            canonical([["new"], ["other"]], prefix="x").with_columns(group=pl.Series(["author 3", None])),
            frame,
            LMSYS,
            NEAR,
        )


def test_groups_are_joined_over_prompts_and_over_authors() -> None:
    """The first two rows share a prompt, the second and third an author, the third and fifth another prompt."""
    frame = canonical([["one"], ["one"], ["two"], ["three"], ["two"], [""]], prefix="g")
    frame = frame.with_columns(group=pl.Series([None, "x", "x", "y", None, "y"]))
    keys = prompt_groups(frame, LMSYS)
    assert keys[[0, 1, 2, 4]].n_unique() == 1
    assert keys[3] == keys[5] != keys[0]
    assert keys[0] == prompt_groups(frame[:1], LMSYS)[0]


def test_group_is_a_column_of_the_files(tmp_path: Path) -> None:
    """Read under the name that `folds.group` or a source gives, from CSV and parquet alike, and written back."""
    frame = some_rows(12, 12)
    write_rows(tmp_path / "a.parquet", frame.with_columns(group=pl.Series(range(12)) // 6), LMSYS, "author")
    whole = read_rows([tmp_path / "a.parquet"], LMSYS, labelled=True, group="author")
    assert whole["group"].to_list() == ["0"] * 6 + ["1"] * 6
    pl.read_parquet(tmp_path / "a.parquet").rename({"author": "writer"}).with_columns(
        writer=pl.Series([1.0, None, *[0.0] * 10]), id="x" + pl.col("id")
    ).write_parquet(tmp_path / "b.parquet")
    mapped = {"files": ["b.parquet"], "columns": {"group": "writer"}}
    none = {"files": ["b.parquet"], "columns": {"group": None}, "id_prefix": "n", "ignore_columns": ["writer"]}
    tree = {"folder": str(tmp_path), "train": ["a.parquet", mapped, none]}
    config = resolve({"data": tree, "folds": {"group": "author", "n_splits": 2}, "output_dir": str(tmp_path / "run")})
    groups = labelled_rows(config)["group"].to_list()
    assert groups[12:] == ["1", None, *["0"] * 10, *[None] * 12]
    pl.read_parquet(tmp_path / "b.parquet").select("id", "writer").write_csv(tmp_path / "writers.csv")
    text = Task(name="text", fields=("writer",), classes=("0", "1"), multi_turn=False)
    written = Source(files=[tmp_path / "writers.csv"], columns={"writer": "id", "group": "writer"})
    assert read_rows([written], text, labelled=False, group="author")["group"].to_list() == groups[12:24]
    with pytest.raises(DataError, match=r"columns \['author'\] are missing(.|\n)*columns: \{group: null\}"):
        read_rows([tmp_path / "b.parquet"], LMSYS, labelled=True, group="author")
    assert read_rows([tmp_path / "b.parquet"], LMSYS, labelled=False, group="author")["group"].null_count() == 12
    with pytest.raises(DataError, match="columns maps 'group'"):
        read_rows(config.data.sources[1:2], LMSYS, labelled=True)


def test_exclude_overlap_leaves_out_rows_of_the_same_group(tmp_path: Path) -> None:
    """Else a source that is train_only would be refused, with `exclude_overlap` as the remedy."""
    folded, extra = some_rows(12, 12), canonical([["new"], ["other"]], [0, 1], prefix="x")
    authors = pl.Series([f"author {row % 4}" for row in range(12)])
    write_rows(tmp_path / "a.parquet", folded.with_columns(group=authors), LMSYS, "writer")
    write_rows(tmp_path / "x.parquet", extra.with_columns(group=pl.Series(["author 3", "y"])), LMSYS, "author")
    excluding = {"files": "x.parquet", "train_only": True, "exclude_overlap": ["a.parquet"]}
    tree = {"folder": str(tmp_path), "train": [{"files": "a.parquet", "columns": {"group": "writer"}}, excluding]}
    folds = {"group": "author", "n_splits": 2, "near_duplicate_threshold": None}
    config = resolve({"data": tree, "folds": folds, "output_dir": str(tmp_path / "run")})
    training, _ = Run(config).split(0)
    assert training.filter("train_only")["id"].to_list() == ["x1"]


def test_strata_are_the_likeliest_class_or_the_rarest_label() -> None:
    tags = Task(name="tags", fields=("prompt",), classes=("often", "rare"), multi_label=True)
    frame = pl.DataFrame({"target": [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]})
    assert strata(frame, tags).tolist() == [0, 1, -1, 0]
    assert strata(pl.DataFrame({"target": [[0.2, 0.5, 0.3]]}), LMSYS).tolist() == [1]


def test_drawn_rows_keep_the_shares_of_the_classes() -> None:
    frame = canonical([[f"p{row}"] for row in range(200)], [0] * 100 + [1] * 60 + [2] * 40)
    drawn = draw_rows(frame, LMSYS, 20, seed=1)
    assert strata(drawn, LMSYS).tolist() == [0] * 10 + [1] * 6 + [2] * 4
    assert drawn["id"].to_list() == [row for row in frame["id"] if row in set(drawn["id"])]
    assert set(drawn["id"]) < set(draw_rows(frame, LMSYS, 60, seed=1)["id"])
    assert drawn["id"].to_list() != draw_rows(frame, LMSYS, 20, seed=2)["id"].to_list()
    assert draw_rows(frame, LMSYS, 20, seed=1).equals(drawn)


@pytest.mark.parametrize(("sampling", "classes"), [("head", 1), ("stratified", 3)])
def test_max_rows_draws_a_sample_or_takes_the_first(tmp_path: Path, sampling: str, classes: int) -> None:
    frame = canonical([[f"p{row}"] for row in range(30)], [0] * 10 + [1] * 10 + [2] * 10)
    write_rows(tmp_path / "t.parquet", frame, LMSYS)
    data = {"folder": str(tmp_path), "train": "t.parquet", "max_rows": 9, "sampling": sampling}
    config = resolve({"data": data})
    rows = labelled_rows(config)
    assert len(rows) == 9
    assert len(set(strata(rows, LMSYS))) == classes
    assert pl.concat(chunks_of(config, None)())["id"].to_list() == rows["id"].to_list()


def test_stable_folds_have_no_group() -> None:
    with pytest.raises(ConfigError, match=r"folds\.group and folds\.stable can't go together"):
        resolve({"folds": {"stable": True, "group": "author"}})


# --- near-duplicates -------------------------------------------------------------------------------------------------


def near_rows(families: int = 40, rows: int = 6, seed: int = 0) -> pl.DataFrame:
    """Families of prompts: sixty words, one of which each member has for itself; shuffled."""
    draw = random.Random(seed)
    prompts: list[Turns] = []
    for _ in range(families):
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(60)]
        places = [draw.randrange(60) for _ in range(rows)]
        prompts += [[" ".join([*words[:place], f"word{place}", *words[place + 1 :]])] for place in places]
    draw.shuffle(prompts)
    return canonical(prompts, [draw.randrange(3) for _ in prompts])


@pytest.mark.parametrize("stable", [False, True])
def test_near_duplicates_share_a_fold(stable: bool) -> None:
    frame = near_rows()
    folds = folded(frame, n=4, stable=stable)
    assert folds["group"].n_unique() == 40
    assert folds.group_by("group").agg(pl.col("fold").n_unique())["fold"].max() == 1
    exact = folded(frame, n=4, stable=stable, near=None)
    assert exact["group"].n_unique() > 200
    held_out = exact["fold"] == 0
    prove(frame.filter(~held_out), frame.filter(held_out), None)
    with pytest.raises(LeakError, match="nearly the same"):
        prove(frame.filter(~held_out), frame.filter(held_out), NEAR)


def test_plain_folds_leak_and_are_caught() -> None:
    """The wrong variant: rows dealt without a look at their prompts."""
    frame = near_rows()
    training, held_out = next(KFold(4, shuffle=True, random_state=0).split(frame))
    with pytest.raises(LeakError, match="held-out rows share") as caught:
        prove(frame[training.tolist()], frame[held_out.tolist()], NEAR)
    assert set(caught.value.rows) <= set(frame["id"][held_out.tolist()])
    assert caught.value.remedy


@given(order=st.permutations(range(30)))
@settings(max_examples=20, deadline=None)
def test_groups_hang_on_no_order(order: list[int]) -> None:
    frame = near_rows(10, 3)
    groups = prompt_groups(frame, LMSYS, NEAR)
    others = prompt_groups(frame[order], LMSYS, NEAR)
    names = set(zip((groups[place] for place in order), others, strict=True))
    assert len(names) == groups.n_unique() == others.n_unique() == 10


def test_a_chain_of_near_prompts_is_one_group_named_after_its_first() -> None:
    words = [f"word{number}" for number in range(80)]
    chain: list[Turns] = [[" ".join(words[start : start + 60])] for start in range(0, 20, 3)]
    frame = canonical([*chain[1:], ["another prompt altogether"], chain[0]])
    groups = prompt_groups(frame, LMSYS, NEAR)
    assert groups.n_unique() == 2
    assert groups[0] == prompt_groups(frame, LMSYS)[0] == groups[7]
    assert len(groups[0]) == 16
    assert prompt_groups(frame, LMSYS).n_unique() == 8


def test_one_row_and_one_prompt() -> None:
    for prompts in ([["only"]], [["the same"]] * 9):
        frame = canonical(list(prompts), [row % 3 for row in range(len(prompts))])
        for stable in (False, True):
            with pytest.raises(DataError, match="1 different prompt can't fill 2 folds"):
                folded(frame, n=2, stable=stable)
    blank = folded(canonical([[""], [None]] * 30, [0, 1] * 30), n=2)
    assert blank["group"].to_list() == [f"row:r{row}" for row in range(60)]


# --- stable folds ----------------------------------------------------------------------------------------------------

FAR: list[Turns] = [[" ".join([str(number) * 3] * 5)] for number in range(30)]
"""Prompts that are near to none; enough of them that no fold stays empty."""


def strand(number: int) -> Turns:
    """Prompts that change word by word: neighbours are near, strangers are not, those between are near to both."""
    return [" ".join(f"{chr(97 + place) * 5}{number > place}" for place in range(17))]


@given(st.lists(st.integers(0, 17), min_size=8, max_size=30), st.integers(30, 60), st.integers(0, 5))
def test_appended_rows_move_no_old_one(numbers: list[int], k: int, seed: int) -> None:
    prompts = [*FAR, *map(strand, numbers), [""]]
    frame = canonical(prompts, [row % 3 for row in range(len(prompts))])
    folds = folded(frame, n=2, seed=seed, stable=True)
    assert folds[:k].equals(folded(frame[:k], n=2, seed=seed, stable=True))
    held_out, training = folds["fold"] == 0, folds["fold"] == 1
    prove(frame.filter(training), frame.filter(held_out), NEAR)


def test_the_strand_is_a_test() -> None:
    """The property above is worth little if no prompt is near to two folds; and stratified folds do not have it."""
    prompts = [*FAR, *map(strand, [*range(1, 18, 4), *range(1, 18)])]
    frame = canonical(prompts, [row % 3 for row in range(len(prompts))])
    folds = folded(frame, n=2, stable=True)
    assert (folds["fold"] == -1).sum() > 0
    assert folds.filter(pl.col("fold") >= 0)["group"].is_duplicated().any()
    assert not folded(frame, n=2)[:40].equals(folded(frame[:40], n=2))


def test_a_prompt_near_to_two_folds_is_on_neither_side(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(70)]
    left, middle, right = (" ".join(words[start : start + 60]) for start in (0, 5, 10))
    prompts = [[left], [right], [middle], [middle], [f"{middle}!"], *FAR]
    frame = canonical(prompts, [row % 3 for row in range(len(prompts))])
    found = {seed: folded(frame, n=2, seed=seed, stable=True)["fold"].to_list() for seed in range(8)}
    for folds in found.values():
        apart = folds[0] != folds[1]
        assert folds[2:5] == ([-1] * 3 if apart else [folds[0]] * 3)
    seed = next(seed for seed, folds in found.items() if folds[0] != folds[1])
    config = resolve({"seed": seed, "output_dir": str(tmp_path), "folds": {"n_splits": 2, "stable": True}})
    for _ in range(2):  # made, then read
        assert folds_of(config, frame)["fold"].to_list() == found[seed]
    for fold in range(2):
        training, held_out = Run(config, frame).split(fold)
        assert held_out is not None
        assert len(training) + len(held_out) == len(frame) - 3
        assert not {"r2", "r3", "r4"} & {*training["id"], *held_out["id"]}


def test_the_command_makes_stable_folds(tmp_path: Path) -> None:
    write_lmsys(generate(80, seed=1), tmp_path, n_test=10)
    config = resolve(
        {
            "output_dir": str(tmp_path / "run"),
            "folds": {"n_splits": 2},
            "data": {"folder": str(tmp_path), "train": ["train.csv"]},
        }
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    frame = labelled_rows(config)
    for options, stable in ((["folds.stable=true"], True), ([], False)):
        done = CliRunner().invoke(app, ["folds", str(tmp_path / "config.yaml"), *options])
        assert done.exit_code == 0
        folds = read_folds(tmp_path / "run" / "folds.csv", frame, n=2)
        assert folds.equals(folded(frame, n=2, seed=config.seed, stable=stable))


def test_folds_are_the_same_in_every_process(tmp_path: Path) -> None:
    near_rows().write_parquet(tmp_path / "rows.parquet")
    code = (
        "import polars as pl, sys\n"
        "from pairclf.data.folds import make_folds\n"
        "from pairclf.task import LMSYS\n"
        "for stable in (False, True):\n"
        "    folds = make_folds(pl.read_parquet(sys.argv[1]), LMSYS, n=4, seed=0, near=0.8, stable=stable)\n"
        "    print(folds.rows())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows.parquet")],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [folded(near_rows(), n=4, stable=stable).rows() for stable in (False, True)]
    assert done.stdout == f"{here[0]}\n{here[1]}\n"


# --- rows that are trained on in every fold ---------------------------------------------------------------------------


def only_trained_on(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(train_only=pl.lit(True))


@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=8, max_size=40),
    extra=st.lists(st.tuples(st.integers(11, 40), st.integers(0, 2)), min_size=1, max_size=12),
    stable=st.booleans(),
    seed=st.integers(0, 3),
)
def test_train_only_rows_move_no_fold_and_are_never_held_out(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, extra: Any, stable: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    frame = canonical([[f"{number} " * 6] for number, _ in rows], [winner for _, winner in rows])
    others = only_trained_on(canonical([[f"{number} " * 6] for number, _ in extra], [w for _, w in extra], prefix="t"))
    together = pl.concat([frame, others]).sample(fraction=1, shuffle=True, seed=seed)
    config = resolve({"seed": seed, "output_dir": str(folder / "a"), "folds": {"n_splits": 2, "stable": stable}})
    apart = config.model_copy(update={"output_dir": folder / "b"})
    try:
        folds = folds_of(apart, together.filter(~pl.col("train_only")))
    except DataError:
        return  # not every table can be folded; the tests above say which
    assert folds_of(config, together).equals(folds)
    assert (folder / "a" / "folds.csv").read_bytes() == (folder / "b" / "folds.csv").read_bytes()
    leaks = bool({number for number, _ in rows} & {number for number, _ in extra})
    for fold in range(2):
        if leaks:
            with pytest.raises(LeakError, match="rows that are train_only share") as caught:
                Run(config, together).split(fold)
            assert "exclude_overlap" in str(caught.value)
            continue
        training, held_out = Run(config, together).split(fold)
        assert held_out is not None
        assert not held_out["train_only"].any()
        assert training["train_only"].sum() == len(others)
        prove(training, held_out, NEAR)
    whole, nothing = Run(config, together).split(None)
    assert (len(whole), nothing) == (len(together), None)


def test_a_near_prompt_or_an_id_of_a_train_only_row_is_a_leak_in_every_fold(tmp_path: Path) -> None:
    frame = some_rows()
    config = resolve({"output_dir": str(tmp_path), "folds": {"n_splits": 2}})
    near = only_trained_on(canonical([["19 19 19!"], ["far from all of them"]], [0, 1], prefix="t"))
    long = " ".join(f"word{number}" for number in range(40))
    base = pl.concat([frame, canonical([[long]], [0], prefix="long")])
    for extra in (near[:1].with_columns(prompt=pl.lit([f"{long}!"])), near[1:].with_columns(id=pl.lit("r3"))):
        for fold in range(2):
            with pytest.raises(LeakError, match="1 of 1 rows that are train_only") as caught:
                Run(config, pl.concat([base, extra])).split(fold)
            assert caught.value.rows == (extra["id"][0],)
    Run(config, pl.concat([base, near[1:]])).split(0)


def test_the_report_counts_train_only_rows_apart() -> None:
    frame = some_rows()
    folds = folded(frame, n=2)
    shown = Console(width=200, record=True)
    extra = only_trained_on(canonical([["far from all of them"]], [1], prefix="t"))
    shown.print(report(folds, pl.concat([frame, extra]), LMSYS))
    lines = [line.split() for line in shown.export_text().splitlines()]
    assert ["all", "60", "20", "20", "3"] in [line[:5] for line in lines]
    assert ["train", "only", "1", "1"] in [line[:4] for line in lines]


def test_hashes_of_prompts_are_what_they_were() -> None:
    """Bundles and scores keep them: they may not change from one version of anything to the next."""
    hashes = prompt_hashes(canonical([["What is\n it?"], ["  what IS it？"], ["Straße"]]), LMSYS)
    assert hashes.dtype == pl.UInt64
    assert hashes.to_list() == [11642561194938523757, 11642561194938523757, 1646462939830908158]


def test_rows_without_a_prompt_are_told_apart_by_their_texts() -> None:
    frame = canonical([[None], [""], [], ["a"]])
    assert prompt_hashes(frame, LMSYS).n_unique() == 2
    answered = frame.with_columns(response_a=pl.Series([["x"], ["b"], ["a"], ["a"]]))
    hashes = prompt_hashes(answered, LMSYS)
    assert hashes.n_unique() == 4
    swapped = answered.rename({"response_a": "response_b", "response_b": "response_a"})
    assert prompt_hashes(swapped, LMSYS).equals(hashes)


# --- what was edited by hand -----------------------------------------------------------------------------------------


def test_two_near_duplicates_put_into_two_folds_by_hand_are_caught(tmp_path: Path) -> None:
    frame = near_rows(10, 2)
    config = resolve({"output_dir": str(tmp_path), "folds": {"n_splits": 2}})
    folds = folds_of(config, frame)
    Run(config, frame).split(0)
    twins = folds.filter(pl.col("group") == folds["group"][0])
    assert len(twins) == 2
    moved = pl.when(pl.col("id") == twins["id"][1]).then(1 - pl.col("fold")).otherwise(pl.col("fold"))
    write_folds(tmp_path / "folds.csv", folds.with_columns(moved.alias("fold")))
    for fold in range(2):
        with pytest.raises(LeakError, match=r"1 of .* held-out rows share .* nearly the same prompt") as caught:
            Run(config, frame).split(fold)
        assert caught.value.rows[0] in twins["id"]
        assert "pairclf folds" in str(caught.value)


@pytest.mark.thorough
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")
def test_make_folds_of_real_data_do_not_leak() -> None:
    frame = read_rows([SHARED / "arena2" / "train.parquet"], WSDM, labelled=True)
    folds = make_folds(frame, WSDM, n=5, seed=0, near=NEAR, stable=False)
    assert folds["fold"].value_counts()["count"].to_list() == pytest.approx([len(frame) / 5] * 5, rel=0.02)
    assert_no_leak(frame, folds, range(5), WSDM, NEAR)


def test_rows_without_a_group_share_none() -> None:
    """`pseudo` leaves rows of a held-out group out by this."""
    groups = [
        pl.DataFrame({"group": values}, schema={"group": pl.String}) for values in (["a", None, "b"], ["b", None])
    ]
    assert same_group(*groups).to_list() == [False, False, True]
    assert same_group(groups[0], groups[0].clear()).to_list() == [False] * 3
