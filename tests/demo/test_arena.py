"""The arena's truth is what its labels are drawn from, its traits stand in its texts, and its files look real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.demo.arena import DIRT, NU, TRAITS, WEIGHTS, Arena, davidson, generate, write_lmsys
from pairclf.task import LMSYS

UTILITY = st.floats(-30, 30)


@pytest.fixture(scope="module")
def arena() -> Arena:
    return generate(4_000, seed=5)


@pytest.fixture(scope="module")
def dirty() -> Arena:
    return generate(800, seed=6, dirt=0.3)


def _traits(arena: Arena) -> np.ndarray:
    return np.array([(row.traits_a, row.traits_b) for row in arena.rows])


def best_log_loss(arena: Arena) -> float:
    return float(-(arena.truth * np.log(arena.truth)).sum(axis=1).mean())


# ------------------------------------------------------------------------------------------------------------ truth


@given(UTILITY, UTILITY)
def test_davidson_is_its_formula_sums_to_one_and_mirrors(a: float, b: float) -> None:
    (truth,) = davidson(np.array([a]), np.array([b]))
    odds = np.array([np.exp(a), np.exp(b), NU * np.sqrt(np.exp(a + b))])
    np.testing.assert_allclose(truth, odds / odds.sum(), rtol=1e-9)
    np.testing.assert_allclose(davidson(np.array([b]), np.array([a]))[0], truth[[1, 0, 2]], rtol=1e-9)


def test_davidson_survives_utilities_whose_exponentials_overflow() -> None:
    truth = davidson(np.array([5_000.0, -5_000.0]), np.array([0.0, 0.0]))
    np.testing.assert_array_equal(truth, [[1, 0, 0], [0, 1, 0]])


def test_truth_of_an_arena_is_davidson_of_its_weighted_traits(dirty: Arena) -> None:
    utility = _traits(dirty) @ WEIGHTS
    np.testing.assert_allclose(dirty.truth, davidson(utility[:, 0], utility[:, 1]))
    np.testing.assert_allclose(dirty.truth.sum(axis=1), 1)


def test_labels_are_drawn_from_the_truth(arena: Arena) -> None:
    truth, labels = arena.truth, np.array([row.label for row in arena.rows])
    spread = np.sqrt((truth * (1 - truth)).sum(axis=0))
    assert (np.abs(np.bincount(labels, minlength=3) - truth.sum(axis=0)) < 4 * spread).all()
    sure = truth.max(axis=1) > 0.8
    hits = labels[sure] == truth[sure].argmax(axis=1)
    assert abs(hits.mean() - truth[sure].max(axis=1).mean()) < 4 * np.sqrt(0.16 / sure.sum())


def test_best_log_loss_is_what_the_truth_scores(arena: Arena) -> None:
    truth = arena.truth
    best = best_log_loss(arena)
    scored = -np.log(truth[np.arange(len(truth)), [row.label for row in arena.rows]])
    assert abs(scored.mean() - best) < 4 * scored.std() / np.sqrt(len(scored))


def test_there_is_something_to_learn(arena: Arena) -> None:
    share = np.bincount([row.label for row in arena.rows], minlength=3) / len(arena.rows)
    prior = -(share * np.log(share)).sum()
    assert 1.04 < prior < np.log(3)
    assert 0.72 < best_log_loss(arena) < 0.87


@pytest.mark.parametrize("trait", TRAITS)
def test_each_trait_moves_the_verdict_its_way(arena: Arena, trait: str) -> None:
    """Over the rows in which nothing else differs (much): the truth leans to the better side, and so do the labels."""
    index = TRAITS.index(trait)
    gaps = (_traits(arena)[:, 0] - _traits(arena)[:, 1]) * WEIGHTS
    others = np.abs(np.delete(gaps, index, axis=1)).sum(axis=1)
    alone = (np.abs(gaps[:, index]) > 2 * others) & (np.abs(gaps[:, index]) > 0.2)
    assert alone.sum() >= 5, "too few rows to judge by"
    better = np.where(gaps[alone, index] > 0, 0, 1)
    truth, labels = arena.truth[alone], np.array([row.label for row in arena.rows])[alone]
    each = np.arange(len(truth))
    assert (truth[each, better] > truth[each, 1 - better]).all()
    if alone.sum() > 100:
        assert (labels == better).sum() > (labels == 1 - better).sum()


# ------------------------------------------------------------------------------------------------------------ texts


def _is_json(text: str) -> bool:
    try:
        return "answer" in json.loads(text)
    except ValueError:
        return False


KEEPS: dict[str, Callable[[str], bool]] = {
    "Answer in JSON.": _is_json,
    "Use bold letters.": lambda text: "**" in text,
    "Reply with one word only.": lambda text: " " not in text,
    "Number the items.": lambda text: text.startswith("1. "),
}


@pytest.mark.parametrize("asked", KEEPS)
def test_the_format_trait_can_be_read_from_the_text(arena: Arena, asked: str) -> None:
    seen = set()
    for row in arena.rows:
        if len(row.prompt) == 1 and str(row.prompt[0]).endswith(asked):
            for turns, traits in ((row.response_a, row.traits_a), (row.response_b, row.traits_b)):
                kept = bool(traits[TRAITS.index("format")])
                assert kept == KEEPS[asked](str(turns[0])), (row.prompt, turns)
                seen.add(kept)
    assert seen == {True, False}


def test_equal_texts_have_equal_traits(arena: Arena) -> None:
    same = [row for row in arena.rows if row.response_a == row.response_b]
    assert same
    assert all(row.traits_a == row.traits_b for row in same)


def test_arena_is_like_the_real_one(arena: Arena) -> None:
    several = np.mean([len(row.prompt) > 1 for row in arena.rows])
    assert 0.10 < several < 0.18
    assert 1.5 < len(arena.rows) / len({row.prompt for row in arena.rows}) < 4
    assert {row.language for row in arena.rows} > {
        "English",
        "Spanish",
        "Russian",
        "Greek",
        "Chinese",
        "Arabic",
        "Hindi",
    }
    assert len({row.id for row in arena.rows}) == len(arena.rows)


def test_one_seed_one_arena() -> None:
    assert generate(300, seed=1, dirt=0.2) == generate(300, seed=1, dirt=0.2)
    assert generate(300, seed=1) != generate(300, seed=2)


# ------------------------------------------------------------------------------------------------------------- dirt


def test_dirt_holds_every_kind_and_clean_arenas_none(arena: Arena, dirty: Arena) -> None:
    cells = [turns for row in dirty.rows for turns in (row.prompt, row.response_a, row.response_b)]
    assert {(None,), (), ("",)} <= set(cells)
    assert any(None in turns and len(turns) > 1 for turns in cells)
    assert any("\ud83d" in (turn or "") for turns in cells for turn in turns)
    assert any(row.response_a == row.response_b == ("",) for row in dirty.rows)
    assert any(len(turn or "") > 30_000 for turns in cells for turn in turns)
    same = [row for row in dirty.rows if row.dirt == "same answers"]
    assert all(row.response_a == row.response_b for row in same)
    assert any(row.label != 2 for row in same), "identical responses with a winner"
    assert {row.dirt for row in dirty.rows} == {"", *DIRT}
    assert {row.dirt for row in arena.rows} == {""}


def test_huge_rows_keep_legal_traits(dirty: Arena) -> None:
    assert _traits(dirty).min() >= 0
    assert _traits(dirty).max() <= 1 + 1e-12


# ------------------------------------------------------------------------------------------------------------ files


def _decoded(frame: pl.DataFrame, field: str) -> list[Any]:
    return [json.loads(cell) for cell in frame[field]]


def test_lmsys_files(dirty: Arena, tmp_path: Path) -> None:
    write_lmsys(dirty, tmp_path, n_test=200)
    train, test = (
        pl.read_csv(tmp_path / name, schema_overrides={"id": pl.String}) for name in ("train.csv", "test.csv")
    )
    wins = ["winner_model_a", "winner_model_b", "winner_tie"]
    assert train.columns == ["id", "model_a", "model_b", "prompt", "response_a", "response_b", *wins]
    assert test.columns == ["id", "prompt", "response_a", "response_b"]
    assert (train.height, test.height) == (600, 200)
    assert train.select(pl.sum_horizontal(wins)).to_series().to_list() == [1] * 600
    by_id = {row.id: row for row in dirty.rows}
    for frame in (train, test):
        for field in LMSYS.fields:
            assert _decoded(frame, field) == [list(getattr(by_id[id], field)) for id in frame["id"]]
    assert not {*map(str, _decoded(train, "prompt"))} & {*map(str, _decoded(test, "prompt"))}
    assert "\\ud83d" in "".join(train["response_a"])
    sample = pl.read_csv(tmp_path / "sample_submission.csv", schema_overrides={"id": pl.String})
    assert sample.columns == ["id", *wins]
    assert sample["id"].to_list() == test["id"].to_list()
    truth = pl.read_parquet(tmp_path / "truth.parquet")
    assert truth["id"].to_list() == [row.id for row in dirty.rows]
    np.testing.assert_allclose(truth.select(wins).to_numpy(), dirty.truth)


def test_a_test_part_that_can_not_be_had_is_refused(arena: Arena) -> None:
    with pytest.raises(ValueError, match="n_test=4000 can't be had"):
        arena.split(4_000)
    with pytest.raises(ValueError, match="without sharing a prompt"):
        Arena(arena.rows[:1] * 2).split(1)


def test_a_full_disk_leaves_nothing_half_written(arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: pl.DataFrame, path: Path) -> None:
        Path(path).write_text("id,mod")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_csv", full)
    with pytest.raises(OSError, match="No space left"):
        write_lmsys(arena, tmp_path, n_test=10)
    assert list(tmp_path.iterdir()) == []
