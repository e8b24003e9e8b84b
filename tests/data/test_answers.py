"""Files of answers: three kinds of files hold the same, pairs connect all answers, and what is no prompt is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pairclf.config import Rules
from pairclf.data.answers import MAX_PAIRS, pairwise_rows, pointwise_rows, ranking, read_answers, write_ranking
from pairclf.errors import DataError
from pairclf.task import LMSYS, WSDM, Task

PROMPTS: list[dict[str, Any]] = [
    {"id": "p", "prompt": "Why?", "answers": ["So.", "", "So.", "Because."]},
    {"id": "q", "prompt": "", "answers": ["alone"]},
    {"id": "r", "prompt": "How?", "answers": ["b", "a"]},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one_a_row(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """In the order of a file whose answers came one after the other."""
    longest = max(len(row["answers"]) for row in rows)
    cells = [(row, place) for place in range(longest) for row in rows if place < len(row["answers"])]
    return pl.DataFrame([{"id": row["id"], "prompt": row["prompt"], "answer": row["answers"][at]} for row, at in cells])


def read(path: Path, task: Task = WSDM, **columns: str | None) -> pl.DataFrame:
    return read_answers(path, task, Rules(), columns)


def test_all_kinds_of_files_hold_the_same(tmp_path: Path) -> None:
    expected = read(write_jsonl(tmp_path / "a.jsonl", PROMPTS))
    assert expected.select("id", "group", "answer", "same_as").rows() == [
        ("p", 0, 0, 0), ("p", 0, 1, 1), ("p", 0, 2, 0), ("p", 0, 3, 3), ("q", 1, 0, 0), ("r", 2, 0, 0), ("r", 2, 1, 1),
    ]  # fmt: skip
    assert expected["response"].to_list()[:2] == [["So."], [""]]
    pl.DataFrame(PROMPTS).write_parquet(tmp_path / "a.parquet")
    one_a_row(PROMPTS).write_csv(tmp_path / "a.csv")
    one_a_row(PROMPTS).write_parquet(tmp_path / "b.parquet")
    for name in ("a.parquet", "a.csv", "b.parquet"):
        read_back = read(tmp_path / name)
        cells = pl.col("prompt", "response").list.eval(pl.element().fill_null(""))  # a CSV has no empty texts
        assert_frame_equal(read_back.with_columns(cells), expected)


def test_turns_and_columns_are_those_of_test_files(tmp_path: Path) -> None:
    rows = [{"question": ["Hi", "And?"], "answers": ["yes", "no"]}, {"question": ["Why"], "answers": ["so"]}]
    answers = read(write_jsonl(tmp_path / "a.jsonl", rows), LMSYS, prompt="question", response_a="left")
    assert answers["id"].to_list() == ["1", "1", "2"], "prompts without ids are numbered"
    assert answers["prompt"].to_list()[0] == ["Hi", "And?"]
    (tmp_path / "a.csv").write_text('id,prompt,answer\n1,"[""Hi"", ""And?""]","[""yes"", null]"\n', encoding="utf-8")
    turns = read(tmp_path / "a.csv", LMSYS)
    assert turns.select("prompt", "response").row(0) == (["Hi", "And?"], ["yes", None])


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "empty": ([{"id": 7, "prompt": "a", "answers": []}, PROMPTS[0]], r"1 prompt has no answers[\s\S]*\b7\b"),
    "null": ([{"id": 7, "prompt": "a", "answers": None}, PROMPTS[0]], r"1 prompt has no answers[\s\S]*\b7\b"),
    "repeated": ([PROMPTS[0], PROMPTS[0]], "duplicate_id"),
    "two-prompts": (
        [{"id": 7, "prompt": "a", "answer": "x"}, {"id": 7, "prompt": "b", "answer": "x"}],
        r"1 id stands for different prompts[\s\S]*\b7\b",
    ),
    "none": ([{"id": 7, "prompt": "a"}], r"must have one of `answers` \(not in a CSV\) and `answer`"),
    "both": ([{"id": 7, "prompt": "a", "answers": ["x"], "answer": "x"}], "must have one of"),
    "no-prompt": ([{"id": 7, "answers": ["x"]}], r"columns \['prompt'\] are missing"),
    "no-id": ([{"prompt": "a", "answer": "x"}], r"columns \['id'\] are missing"),
}


@pytest.mark.parametrize(("rows", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_prompt_with_answers_is_refused(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError) as error:
        read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert re.search(says, str(error.value))


def test_fields_that_are_columns_of_answers_are_refused(tmp_path: Path) -> None:
    fields = {"fields": ("first", "prompt", "a", "b"), "swap_fields": ("a", "b"), "swap_classes": ("u", "v")}
    task = Task.model_validate({"name": "t", "classes": ("u", "v"), "label_column": "label", **fields})
    with pytest.raises(DataError, match=r"task 't' has fields \['first'\], which are columns of answers"):
        read(write_jsonl(tmp_path / "a.jsonl", PROMPTS), task)


def test_lists_in_a_csv_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,prompt,answers\n1,a,"[""x""]"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"not in a CSV[\s\S]*one row an answer"):
        read(tmp_path / "a.csv")


def answers_of(tmp_path: Path, count: int) -> pl.DataFrame:
    rows = [
        {"prompt": "few", "answers": ["x", "x", "y"]},
        {"prompt": "many", "answers": [f"a{n}" for n in range(count)]},
    ]
    return read(write_jsonl(tmp_path / "a.jsonl", rows))


def test_rows_to_score_have_each_different_answer(tmp_path: Path) -> None:
    answers = answers_of(tmp_path, 4)
    alone = pointwise_rows(answers, WSDM)
    assert alone["id"].to_list() == ["1, answer 0", "1, answer 2", *(f"2, answer {n}" for n in range(4))]
    assert alone.columns[3:] == ["prompt", "response"]
    pairs = pairwise_rows(answers, WSDM)
    assert pairs["group"].to_list() == [0] + [1] * 6
    assert {*pairs.select("first", "second").rows()[1:]} == {(a, b) for b in range(4) for a in range(b)}
    (first,) = pairs.head(1).select("id", "prompt", "response_a", "response_b").rows()
    assert first == ("1, answers 0 and 2", ["few"], ["x"], ["y"])


@given(st.integers(2, 12), st.integers(1, 70), st.randoms(use_true_random=False))
def test_a_budget_of_pairs_connects_all_answers_evenly_in_any_order(count: int, budget: int, random: Any) -> None:
    texts = [f"a{number}" for number in range(count)]
    chosen = []
    for _ in range(2):
        frame = pl.DataFrame({"id": "p", "prompt": [["why"]] * count, "group": 0, "answer": range(count)})
        frame = frame.with_columns(pl.Series("response", [[text] for text in texts]), same_as="answer")
        if budget < count - 1:
            with pytest.raises(DataError, match=rf"--pairs {budget} does not connect {count} different answers"):
                pairwise_rows(frame, WSDM, budget)
            return
        pairs = pairwise_rows(frame, WSDM, budget)
        numbers = pairs.select("first", "second").to_numpy()
        assert len(pairs) == min(budget, count * (count - 1) // 2)
        assert connected_components(coo_array((np.ones(len(pairs)), numbers.T), shape=(count, count)))[0] == 1
        assert np.ptp(np.bincount(numbers.reshape(-1), minlength=count)) <= 2
        sides = zip(pairs["response_a"].to_list(), pairs["response_b"].to_list(), strict=True)
        chosen.append({frozenset((*a, *b)) for a, b in sides})
        random.shuffle(texts)
    assert chosen[0] == chosen[1]


def test_too_many_pairs_are_refused_with_their_number(tmp_path: Path) -> None:
    assert len(pairwise_rows(answers_of(tmp_path, 64), WSDM)) == MAX_PAIRS + 1
    with pytest.raises(DataError, match=r"65 different answers make 2,080 pairs, 4,160 inputs[\s\S]*--pairs N, 64 at"):
        pairwise_rows(answers_of(tmp_path, 65), WSDM)


def test_ranking_shares_ranks_and_leaves_out_what_was_not_scored(tmp_path: Path) -> None:
    answers = read(write_jsonl(tmp_path / "a.jsonl", PROMPTS))
    scored = pl.DataFrame(
        {"group": [0, 0, 0, 1, 2, 2], "answer": [0, 1, 3, 0, 0, 1], "reward": [1.0, 2.0, 0.5, 7.0, np.nan, 3.0]},
        schema_overrides={"group": pl.UInt32},
    )
    table = ranking(answers, scored)
    assert table["rank"].to_list() == [2, 1, 2, 4, 1, None, 1]
    assert table["reward"].to_list() == [1.0, 2.0, 1.0, 0.5, 7.0, None, 3.0]
    for name, load in (("r.csv", pl.read_csv), ("r.parquet", pl.read_parquet), ("r.jsonl", pl.read_ndjson)):
        write_ranking(tmp_path / name, table)
        assert_frame_equal(load(tmp_path / name), table, check_dtypes=False)
