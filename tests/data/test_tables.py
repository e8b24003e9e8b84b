"""Files in, canonical rows out; scores in, a submission out; and one clear message for whatever is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.config import Rules, Source, Submission
from pairclf.data import rows as tables
from pairclf.data.audit import clean
from pairclf.data.formats import Flaw, read_file
from pairclf.data.rows import read_rows, scan_rows, to_rows, write_rows
from pairclf.data.scores import HASHES, class_matrix, read_scores, scores_frame, write_scores
from pairclf.data.submission import answer, check_submission, ids_by_position, open_sample, sample_ids, write_submission
from pairclf.errors import DataError
from pairclf.task import LMSYS, WSDM, Task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")

TURNS = st.lists(st.none() | st.text(max_size=12), max_size=3)


def lmsys_rows(n: int = 3) -> dict[str, list[str | None]]:
    """Columns of a sound LMSYS training file of up to three rows."""
    return {
        "id": [str(100 + row) for row in range(n)],
        "model_a": ["x"] * n,
        "model_b": ["y"] * n,
        "prompt": [json.dumps([f"question {row}"]) for row in range(n)],
        "response_a": [json.dumps([f"answer {row}"]) for row in range(n)],
        "response_b": [json.dumps(["no"])] * n,
        "winner_model_a": ["1", "0", "0"][:n],
        "winner_model_b": ["0", "1", "0"][:n],
        "winner_tie": ["0", "0", "1"][:n],
    }


def write_csv(path: Path, columns: dict[str, Any]) -> Path:
    pl.DataFrame(columns).write_csv(path)
    return path


def refusal(act: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        act()
    assert caught.value.exit_code == 2
    return caught.value


def read_lmsys(path: Path, **options: Any) -> pl.DataFrame:
    return read_rows([path], LMSYS, **{"labelled": True, **options})


def flaws_of(frame: pl.DataFrame) -> dict[str, set[str]]:
    """`{id: names of its flaws}`, rows without any left out."""
    pairs = zip(frame["id"], frame["flaws"], strict=True)
    return {row_id: {str(flaw.name).lower() for flaw in Flaw if bits & flaw} for row_id, bits in pairs if bits}


# --- reading ---------------------------------------------------------------------------------------------------------


def test_lmsys_csv_becomes_canonical(tmp_path: Path) -> None:
    frame = read_lmsys(write_csv(tmp_path / "train.csv", lmsys_rows()))
    assert frame.schema == {
        "id": pl.String,
        **dict.fromkeys(LMSYS.fields, pl.List(pl.String)),
        "target": pl.List(pl.Float64),
        "group": pl.String,
        "weight": pl.Float64,
        "train_only": pl.Boolean,
        "file": pl.String,
        "flaws": pl.UInt32,
    }
    assert set(frame["file"]) == {str(tmp_path / "train.csv")}
    assert flaws_of(frame) == {}
    first = to_rows(frame, LMSYS)[0]
    assert (first.id, first.target, first.weight) == ("100", (1.0, 0.0, 0.0), 1.0)
    assert first.fields == {"prompt": ("question 0",), "response_a": ("answer 0",), "response_b": ("no",)}


@pytest.mark.parametrize(
    ("cell", "turns", "flaws"),
    [
        ("[null]", (None,), {"null_list"}),
        ("[null, null]", (None, None), {"null_list"}),
        ("[]", (), set()),
        ('[""]', ("",), set()),
        ('["a", null, "b"]', ("a", None, "b"), set()),
        ("null", (None,), {"null_literal"}),
        (None, (None,), {"missing_cell"}),
        ("  ", (None,), {"missing_cell"}),
        ('["half \\ud83d pair"]', ("half \ufffd pair",), {"surrogate"}),
        ('["\\udc00\\ud800"]', ("\ufffd\ufffd",), {"surrogate"}),
        ('["whole \\ud83d\\ude00"]', ("whole 😀",), set()),
        ('["written out \ufffd"]', ("written out \ufffd",), set()),
        ('["nul \\u0000"]', ("nul \x00",), {"control_character"}),
        ('["\\b", "\\f"]', ("\b", "\f"), {"control_character"}),
        ('["bell \x07"]', ("bell \x07",), {"control_character"}),
        ('["del \x7f"]', ("del \x7f",), {"control_character"}),
        ('["\\u007e\\u00a0\\u0041\\t\\r\\n\\/"]', ("~\xa0A\t\r\n/",), set()),
        ('["a\nraw break"]', ("a\nraw break",), set()),
        (' [ "a" ,"b" ] ', ("a", "b"), set()),
        ('["back\\\\"]', ("back\\",), set()),
    ],
)
def test_cells_of_turns(tmp_path: Path, cell: str | None, turns: tuple[str | None, ...], flaws: set[str]) -> None:
    columns = lmsys_rows()
    columns["response_b"][1] = cell
    frame = read_lmsys(write_csv(tmp_path / "train.csv", columns))
    assert [row.fields["response_b"] for row in to_rows(frame, LMSYS)] == [("no",), turns, ("no",)]
    assert flaws_of(frame) == ({"101": flaws} if flaws else {})


@given(st.lists(st.tuples(TURNS, TURNS, TURNS), min_size=1, max_size=8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_turns_survive_every_format(tmp_path_factory: pytest.TempPathFactory, rows: Any, ascii_only: bool) -> None:
    folder = tmp_path_factory.mktemp("formats")
    ids = [f"{row:03}" for row in range(len(rows))]
    fields = dict(zip(LMSYS.fields, map(list, zip(*rows, strict=True)), strict=True))
    coded = {name: [json.dumps(cell, ensure_ascii=ascii_only) for cell in cells] for name, cells in fields.items()}
    paths = [folder / "test.csv", folder / "test.parquet", folder / "test.jsonl"]
    pl.DataFrame({"id": ids, **coded}).write_csv(paths[0])
    pl.DataFrame({"id": ids, **fields}, schema_overrides=dict.fromkeys(fields, pl.List(pl.String))).write_parquet(
        paths[1]
    )
    records = [{"id": row_id, **dict(zip(fields, row, strict=True))} for row_id, row in zip(ids, rows, strict=True)]
    paths[2].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for path in paths:
        read = to_rows(read_rows([path], LMSYS, labelled=False), LMSYS)
        assert [row.id for row in read] == ids
        assert [tuple(row.fields.values()) for row in read] == [tuple(map(tuple, row)) for row in rows], path.suffix


def test_plain_text_and_a_label_column(tmp_path: Path) -> None:
    columns = {"prompt": ["[1]", None], "response_a": ["a", ""], "response_b": ["null", "b"]}
    extra = {"id": ["00a", "1e5"], "winner": ["model_b", "model_a"], "language": ["English", "Korean"]}
    frame = pl.DataFrame({**extra, **columns})
    frame.write_parquet(tmp_path / "train.parquet")
    rows = to_rows(read_rows([tmp_path / "train.parquet"], WSDM, labelled=True), WSDM)
    assert [row.id for row in rows] == ["00a", "1e5"]
    assert [row.target for row in rows] == [(0.0, 1.0), (1.0, 0.0)]
    assert [tuple(row.fields.values()) for row in rows] == [(("[1]",), ("a",), ("null",)), ((None,), ("",), ("b",))]


def test_ids_stay_as_the_file_has_them(tmp_path: Path) -> None:
    ids = ["007", "1.0", "1e5", " x", "12345678901234567890123"]
    columns: dict[str, Any] = {"id": ids, **dict.fromkeys(LMSYS.fields, ['["a"]'] * len(ids))}
    assert read_lmsys(write_csv(tmp_path / "t.csv", columns), labelled=False)["id"].to_list() == ids


def test_numbers_as_ids_in_parquet_and_jsonl(tmp_path: Path) -> None:
    pl.DataFrame({"id": [7, 2**60], **{name: ["a", "b"] for name in WSDM.fields}}).write_parquet(tmp_path / "t.parquet")
    records = [{"id": row_id, **dict.fromkeys(WSDM.fields, "a")} for row_id in (7, 2**60)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for name in ("t.parquet", "t.jsonl"):
        assert read_rows([tmp_path / name], WSDM, labelled=False)["id"].to_list() == ["7", str(2**60)]


def test_several_files_and_max_rows(tmp_path: Path) -> None:
    first, second = lmsys_rows(), lmsys_rows()
    second["id"] = ["a", "b", "c"]
    paths = [write_csv(tmp_path / "1.csv", first), write_csv(tmp_path / "2.csv", second)]
    assert read_rows(paths, LMSYS, labelled=True)["id"].to_list() == ["100", "101", "102", "a", "b", "c"]
    assert read_rows(paths, LMSYS, labelled=True, max_rows=4)["id"].to_list() == ["100", "101", "102", "a"]
    assert read_rows(paths, LMSYS, labelled=True, max_rows=2)["id"].to_list() == ["100", "101"]


def test_soft_and_multi_labels(tmp_path: Path) -> None:
    columns = lmsys_rows()
    columns |= {"winner_model_a": ["0.25"] * 3, "winner_model_b": ["0.25"] * 3, "winner_tie": ["5e-1"] * 3}
    assert read_lmsys(write_csv(tmp_path / "t.csv", columns))["target"].to_list() == [[0.25, 0.25, 0.5]] * 3
    task = Task(name="toxic", fields=("text",), classes=("rude", "threat"), multi_label=True)
    path = write_csv(tmp_path / "m.csv", {"id": ["1"], "text": ["x"], "rude": ["1"], "threat": ["1"]})
    assert read_rows([path], task, labelled=True)["target"].to_list() == [[1.0, 1.0]]
    path = write_csv(
        tmp_path / "m.csv", {"id": ["1", "2"], "text": ["x"] * 2, "rude": ["2", "1"], "threat": ["0", "-1"]}
    )
    assert flaws_of(read_rows([path], task, labelled=True)) == {key: {"bad_label"} for key in "12"}


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", lmsys_rows())
    path.write_text(path.read_text() + "\n\n")
    assert len(read_lmsys(path)) == 3


# --- reading what is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"", "the file is empty"),
        ("t.csv", b"id,prompt,response_a,response_b\n", "no rows"),
        ("t.csv", b"id,prompt\n1,caf\xe9\n", "utf-8"),
        ("t.csv", b"id,prompt\n1,2,3\n", "line 2: the line has 3 cells; the header has 2"),
        ("t.csv", b'id,prompt\n1,"a\n2,b\n', "line 2, character 3, in column 'prompt': the quote that opens here"),
        ("t.parquet", b"PAR1 no more", "can't be read as parquet"),
        ("t.jsonl", b'{"id": 1}\n{"id": \n', "line 2"),
        ("t.jsonl", b"[1]\n", "line 1 holds no object"),
        ("t.jsonl", b"[" * 100_000, "line 1"),
        ("t.jsonl", b"\xff\n", "utf-8"),
        ("t.jsonl", b"\n", "no rows"),
        ("t.txt", b"id\n", "'.txt' can't be read"),
        ("t.csv", b"id,prompt,prompt\n1,a,b\n", "columns ['prompt'] stand more than once"),
        ("t.csv", b"id,prompt\r1,a\r2,b\r", "carriage return (CR) alone"),
        ("t.csv", b'id,"pro\nmpt"\r1,a\r2,b\r', "carriage return (CR) alone"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused = refusal(lambda: read_lmsys(path))
    assert expected in str(refused)
    assert refused.where == path
    assert refused.remedy


def test_absent_file_and_no_file(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(lambda: read_lmsys(tmp_path / "train.csv")))
    assert "no file of rows" in str(refusal(lambda: read_rows([], LMSYS, labelled=True)))
    (tmp_path / "dir.csv").mkdir()
    assert "is a folder" in str(refusal(lambda: read_lmsys(tmp_path / "dir.csv")))


def test_missing_and_unknown_columns_are_named_at_once(tmp_path: Path) -> None:
    columns = lmsys_rows()
    del columns["winner_tie"], columns["prompt"]
    path = write_csv(tmp_path / "t.csv", {"": ["0", "1", "2"], **columns, "language": ["en"] * 3})
    message = str(refusal(lambda: read_lmsys(path)))
    assert "['prompt', 'winner_tie'] are missing" in message
    assert 'data.ignore_columns=["", "language"]' in message


def test_unknown_columns_can_be_accepted(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", {"": ["0", "1", "2"], **lmsys_rows()})
    assert "a column without a name" in str(refusal(lambda: read_lmsys(path)))
    assert "" not in read_rows([Source(files=[path], ignore_columns=[""])], LMSYS, labelled=True).columns


@pytest.mark.parametrize(
    ("column", "cell", "flaw"),
    [
        *(("winner_tie", cell, "bad_label") for cell in ("1", "x", None, "inf", "-1", "0.00001")),
        *(
            (column, cell, "undecodable")
            for column in ("response_a", "prompt")
            for cell in ("no json", '["a"', "[1]", '["a", 1]', '{"a": 1}', '["a"], ["b"]', "['single']", "[" * 100_000)
        ),
        ("prompt", '["a\\"]', "undecodable"),
        ("prompt", '["\\x"]', "undecodable"),
    ],
)
def test_bad_cells_are_flaws_of_their_row(tmp_path: Path, column: str, cell: str | None, flaw: str) -> None:
    columns = lmsys_rows()
    columns[column][1] = cell
    frame = read_lmsys(write_csv(tmp_path / "t.csv", columns))
    assert flaws_of(frame) == {"101": {flaw}}
    assert frame["target"].is_null().to_list() == [False, flaw == "bad_label", False]
    if flaw == "undecodable":
        assert frame[column].to_list()[1] == [cell]


def test_cells_are_not_merged_across_rows(tmp_path: Path) -> None:
    """polars' decoder alone joins the cells, and reads these two as one."""
    columns = lmsys_rows()
    columns["prompt"][:2] = ['["a', '"]']
    assert flaws_of(read_lmsys(write_csv(tmp_path / "t.csv", columns))) == {
        key: {"undecodable"} for key in ["100", "101"]
    }


def test_ids_that_are_missing_get_the_number_of_their_row(tmp_path: Path) -> None:
    columns = lmsys_rows()
    columns["id"] = [None, "7", " "]
    for labelled in (True, False):
        frame = read_lmsys(write_csv(tmp_path / "t.csv", columns), labelled=labelled)
        assert flaws_of(frame) == {key: {"missing_id"} for key in ["row 1", "row 3"]}


def test_floats_as_ids(tmp_path: Path) -> None:
    """pandas makes floats of a column of integers with a hole in it."""
    ids = [1.0, float("nan"), 3e15]
    pl.DataFrame({"id": ids, **dict.fromkeys(WSDM.fields, ["x"] * 3)}).write_parquet(tmp_path / "t.parquet")
    frame = read_rows([tmp_path / "t.parquet"], WSDM, labelled=False)
    assert frame["id"].to_list() == ["1", "row 2", "3000000000000000"]
    assert flaws_of(frame) == {"row 2": {"missing_id"}}


@pytest.mark.parametrize(
    ("header", "said", "unsaid"),
    [
        ("Id,Text,y", 'map them with columns: {id: "Id", text: "Text"}', "accept them unread"),
        ("id,txt,y", 'columns: {text: "txt"}', "accept them unread"),
        ("id,review,y", "needs the columns ['id', 'text', 'y']", "columns: {text"),
        ("text,y", "a file without ids says columns: {id: null}", "check --unlabelled"),
        ("id,text", "test files have no labels (`check --unlabelled`)", "id: null"),
        ("id;text;y", "as if ';' stood between the cells", "accept them unread"),
    ],
)
def test_missing_columns_lead_to_what_was_meant(tmp_path: Path, header: str, said: str, unsaid: str) -> None:
    task = Task(name="t", fields=("text",), classes=("0", "1"), label_column="y")
    (tmp_path / "t.csv").write_text(f"{header}\n{re.sub('[A-Za-z]+', '1', header)}\n")
    message = str(refusal(lambda: read_rows([tmp_path / "t.csv"], task, labelled=True)))
    assert said in message
    assert unsaid not in message


def test_whole_numbers_as_floats_are_labels(tmp_path: Path) -> None:
    """pandas writes 1.0 into a CSV whose column of labels has a hole."""
    task = Task(name="t", fields=("text",), classes=("0", "1"), label_column="y")
    path = write_csv(tmp_path / "t.csv", {"id": list("abcd"), "text": ["x"] * 4, "y": ["1.0", "0.0", "1", "1.5"]})
    frame = read_rows([path], task, labelled=True)
    assert frame["target"].to_list() == [[0, 1], [1, 0], [0, 1], None]


def test_unknown_class_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = dict.fromkeys(WSDM.fields, ["x"] * 3) | {"id": ["1", "2", "3"], "winner": ["model_a", "tie", None]}
    frame = read_rows([write_csv(tmp_path / "t.csv", columns)], WSDM, labelled=True)
    assert flaws_of(frame) == {key: {"bad_label"} for key in "23"}
    said = " ".join(capsys.readouterr().err.split())
    assert "t.csv: column winner: 'tie', None are no classes, which are 'model_a', 'model_b': correct" in said
    assert frame["target"].to_list() == [[1.0, 0.0], None, None]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_column_of_numbers_is_no_text(tmp_path: Path, labelled: bool) -> None:
    frame = pl.DataFrame({"id": ["1"], "prompt": [5], "response_a": [2.0], "response_b": ["x"]})
    frame.with_columns(winner=pl.lit("model_a")).write_parquet(tmp_path / "t.parquet")
    read = read_rows([tmp_path / "t.parquet"], WSDM, labelled=labelled)
    assert list(to_rows(read, WSDM)[0].fields.values()) == [("5",), ("2",), ("x",)]
    assert flaws_of(read) == {"1": {"undecodable"}}


@given(st.lists(st.text(max_size=30), min_size=1, max_size=10), st.sampled_from([LMSYS, WSDM]))
@settings(max_examples=60, deadline=None)
def test_test_rows_are_never_refused_for_their_content(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str], task: Task
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "test.parquet"
    ids = [str(row) for row in range(len(cells))]
    pl.DataFrame({"id": ids, **dict.fromkeys(task.fields, cells)}).write_parquet(path)
    read = read_rows([path], task, labelled=False)
    assert read["id"].to_list() == ids
    assert read["target"].null_count() == len(ids)
    for row in to_rows(read, task):
        for turns in row.fields.values():
            "".join(turn or "" for turn in turns).encode("utf-8")


def test_unknown_columns_of_test_files_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "test.csv", lmsys_rows() | {"language": ["en"] * 3, "winner_tie": ["?"] * 3})
    assert [row.target for row in to_rows(read_lmsys(path, labelled=False), LMSYS)] == [None] * 3
    assert "'language'" in capsys.readouterr().err


def test_broken_utf8_in_test_rows_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_bytes(b"id,prompt,response_a,response_b\n1,caf\xe9,a,b\n")
    assert read_rows([path], WSDM, labelled=False)["prompt"].to_list() == [["caf\ufffd"]]


# --- scores ----------------------------------------------------------------------------------------------------------


def some_scores(ids: list[str], task: Task = LMSYS, seed: int = 0) -> pl.DataFrame:
    chosen = np.random.default_rng(seed).dirichlet(np.ones(len(task.classes)), size=len(ids))
    return scores_frame(ids, chosen, task, 2, ["model"])


def test_scores_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    values = np.array([[0.1, 0.2, 0.7], [1, 0, 0]], dtype=np.float32)
    written = scores_frame(["01", "b"], values, LMSYS, [1, 2], ["x", "y"])
    write_scores(path, written)
    read = read_scores(path, LMSYS)
    assert read.equals(written)
    assert read["id"].to_list() == ["01", "b"]
    assert read["orders"].to_list() == [1, 2]
    assert read["models"].to_list() == [["x", "y"]] * 2
    np.testing.assert_allclose(class_matrix(read, LMSYS), values)
    assert "scores of task 'wsdm'" in str(refusal(lambda: read_scores(path, WSDM)))


def test_scores_say_what_their_models_have_seen(tmp_path: Path) -> None:
    path, values = tmp_path / "scores.parquet", np.full((2, 3), 1 / 3)
    hashes = pl.DataFrame(
        {"prompt": [2**64 - 1, 7], "row_hash": [1, 2]}, schema_overrides=dict.fromkeys(HASHES, pl.UInt64)
    )
    seen = pl.Series([True, None])
    write_scores(path, scores_frame(["a", "b"], values, LMSYS, 2, ["m"], seen=seen, hashes=hashes))
    assert read_scores(path, LMSYS).select("seen", *HASHES).rows() == [(1, 2**64 - 1, 1), (None, 7, 2)]
    older = scores_frame(["a", "b"], values, LMSYS, 2, ["m"], seen=0, hashes=hashes).drop("seen", *HASHES)
    older.write_parquet(path)
    assert read_scores(path, LMSYS).select("seen", *HASHES).rows() == [(None,) * 3] * 2


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_scores_of_other_people_are_read_where_they_may_be(tmp_path: Path, suffix: str) -> None:
    columns: dict[str, list[str | None]] = {name: ["0.25", "0.5"] for name in LMSYS.classes[:2]}
    path = write_as(
        tmp_path / f"s{suffix}", {"note": ["x", "y"], **columns, "winner_tie": ["0.5", "0"], "id": ["1", "2"]}
    )
    read = read_scores(path, LMSYS, foreign=True)
    assert read.columns == some_scores(["1"]).columns
    assert class_matrix(read, LMSYS).tolist() == [[0.25, 0.25, 0.5], [0.5, 0.5, 0]]
    assert read.select("orders", "models", "seen", *HASHES).rows() == [(None,) * 5] * 2
    assert "scores of task 'lmsys' have" in str(refusal(lambda: read_scores(path, LMSYS)))
    assert "['model_a', 'model_b'] are missing" in str(refusal(lambda: read_scores(path, WSDM, foreign=True)))
    spoiled = write_as(tmp_path / f"t{suffix}", {**columns, "winner_tie": ["a lot", "0"], "id": ["1", "2"]})
    assert "scores can't be read" in str(refusal(lambda: read_scores(spoiled, LMSYS, foreign=True)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [([0.5, np.nan, 0.5], "no finite"), ([0.5, 0.6, -0.1], "outside [0, 1]"), ([0.5, 0.4, 0.2], "sum to one")],
)
def test_impossible_scores_are_refused(tmp_path: Path, row: list[float], expected: str) -> None:
    values = np.array([[1, 0, 0], row], dtype=np.float64)
    refused = refusal(lambda: scores_frame(["a", "b"], values, LMSYS, 1, ["m"]))
    assert expected in str(refused)
    assert refused.rows == ("b",)
    assert not list(tmp_path.iterdir())


def test_scores_need_one_row_an_id() -> None:
    values = np.full((2, 3), 1 / 3)
    assert "stand twice" in str(refusal(lambda: scores_frame(["a", "a"], values, LMSYS, 1, ["m"])))
    assert "shape" in str(refusal(lambda: scores_frame(["a"], values, LMSYS, 1, ["m"])))


# --- submissions -----------------------------------------------------------------------------------------------------


def write_sample(path: Path, ids: list[str], columns: list[str]) -> Path:
    pl.DataFrame({"id": ids, **dict.fromkeys(columns, ["0"] * len(ids))}).write_csv(path)
    return path


@given(st.permutations([f"{row:02}" for row in range(12)]), st.permutations(LMSYS.classes))
@settings(max_examples=25, deadline=None)
def test_submission_follows_the_sample(tmp_path_factory: pytest.TempPathFactory, ids: Any, classes: Any) -> None:
    folder = tmp_path_factory.mktemp("order")
    sample, out = write_sample(folder / "sample.csv", ids, list(classes)), folder / "submission.csv"
    scores = some_scores(sorted(ids))
    write_submission(out, scores, LMSYS, sample)
    written = pl.read_csv(out, schema_overrides={"id": pl.String})
    assert written.columns == ["id", *classes]
    assert written["id"].to_list() == list(ids)
    assert written.sort("id").equals(scores.select("id", *classes))
    summary = check_submission(out, sample, LMSYS)
    assert summary["rows"] == sum(summary["verdicts"].values()) == 12
    assert summary["means"] == pytest.approx(dict(zip(LMSYS.classes, class_matrix(scores, LMSYS).mean(0), strict=True)))


def test_submission_of_class_names(tmp_path: Path) -> None:
    sample, out = write_sample(tmp_path / "sample.csv", ["b", "a", "c"], ["winner"]), tmp_path / "submission.csv"
    values = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    write_submission(out, scores_frame(["a", "b", "c"], values, WSDM, 1, ["m"]), WSDM, sample)
    assert out.read_text() == "id,winner\nb,model_a\na,model_b\nc,model_a\n"
    summary = check_submission(out, sample, WSDM)
    assert summary["verdicts"] == {"model_a": 2, "model_b": 1}
    assert summary["means"] == pytest.approx({"model_a": 2 / 3, "model_b": 1 / 3})


SPAM = Task(name="spam", fields=("text",), classes=("0", "1"), label_column="label")
WRITTEN = Task(name="written", fields=("text",), classes=("human", "ai"), label_column="author", metric="accuracy")
DIGITS = Task(name="digits", fields=("text",), classes=("0", "1", "2"), label_column="digit")
TAGS = Task(name="tags", fields=("text",), classes=("x", "y"), multi_label=True)
TOXIC = Task(name="toxic", fields=("text",), classes=("toxic",), multi_label=True)


@pytest.mark.parametrize(
    ("task", "metric", "settings", "sample", "expected"),
    [
        (SPAM, "log_loss", {}, "id,label\nr,0.5\n", "id,label\nr,0.7\n"),
        (SPAM, "log_loss", {}, "id,label\nr,0\n", "id,label\nr,0.7\n"),
        (SPAM, "accuracy", {}, "id,label\nr,0\n", "id,label\nr,1\n"),
        (SPAM, "accuracy", {}, "id,label\nr,0.5\n", "id,label\nr,0.7\n"),
        (SPAM, "accuracy", {"values": "probabilities"}, "id,label\nr,0\n", "id,label\nr,0.7\n"),
        (SPAM, "log_loss", {}, None, "id,0,1\nr,0.3,0.7\n"),
        (SPAM, "accuracy", {}, None, "id,label\nr,1\n"),
        (SPAM, "log_loss", {"columns": {"1": "p"}}, None, "id,p\nr,0.7\n"),
        (SPAM, "log_loss", {"id": "row"}, "label,row\n0.5,r\n", "label,row\n0.7,r\n"),
        (WRITTEN, "accuracy", {}, "id,author\nr,ai\n", "id,author\nr,ai\n"),
        (WRITTEN, "accuracy", {"columns": {"author": "writer"}}, "id,writer\nr,0\n", "id,writer\nr,ai\n"),
        (WRITTEN, "log_loss", {"columns": {"ai": "generated"}}, "id,generated\nr,0.1\n", "id,generated\nr,0.7\n"),
        (WRITTEN, "log_loss", {"columns": {"human": "author"}}, "id,author\nr,0.1\n", "id,author\nr,0.3\n"),
        (WRITTEN, "log_loss", {}, "id,ai\nr,0\n", "id,ai\nr,0.7\n"),
        (WRITTEN, "log_loss", {"values": "labels"}, "id,author\nr,ai\n", "id,author\nr,ai\n"),
        (WRITTEN, "log_loss", {"columns": {"human": "h", "ai": "a"}}, "id,a,h\nr,0,0\n", "id,a,h\nr,0.7,0.3\n"),
        (DIGITS, "accuracy", {}, "id,digit\nr,0\n", "id,digit\nr,1\n"),
        (DIGITS, "accuracy", {"values": "labels"}, "id,0,1,2\nr,0,0,0\n", "id,0,1,2\nr,0,1,0\n"),
        (TAGS, "log_loss", {}, "id,x,y\nr,0,0\n", "id,x,y\nr,0.7,0.7\n"),
        (TAGS, "log_loss", {"values": "labels"}, "id,x,y\nr,0,0\n", "id,x,y\nr,1,1\n"),
        (TOXIC, "log_loss", {}, "id,toxic\nr,0\n", "id,toxic\nr,0.7\n"),
    ],
)
def test_metric_sample_and_settings_decide_what_is_written(
    tmp_path: Path, task: Task, metric: str, settings: dict[str, Any], sample: str | None, expected: str
) -> None:
    """Probabilities are .7 for the second class (of several labels: each), and what is written passes the check."""
    task, form = task.model_copy(update={"metric": metric}), Submission.model_validate(settings)
    values = {"tags": [0.7, 0.7], "toxic": [0.7], "digits": [0.2, 0.7, 0.1]}.get(task.name, [0.3, 0.7])
    scores = scores_frame(["r"], np.array([values]), task, 1, ["m"])
    path = None if sample is None else tmp_path / "sample.csv"
    if path is not None and sample is not None:
        path.write_text(sample)
    write_submission(tmp_path / "out.csv", scores, task, path, form)
    assert (tmp_path / "out.csv").read_text() == expected
    if path is not None:
        assert check_submission(tmp_path / "out.csv", path, task, form)["rows"] == 1
        rows = answer(pl.Series(["r"]), class_matrix(scores, task), task, pl.read_csv(path), form)
        assert rows.write_csv() == expected


@pytest.mark.parametrize(
    ("task", "settings", "sample", "message"),
    [
        (WRITTEN, {}, "id,author\nr,0.5\n", r"its cells are fractions(.|\n)*columns=\{ai: author\}"),
        (WRITTEN, {"values": "probabilities"}, "id,author\nr,ai\n", "unclear of which class"),
        (
            DIGITS,
            {},
            "id,digit\nr,0\n",
            r"task.metric=log_loss is of probabilities(.|\n)*data.submission.values=labels",
        ),
        (SPAM, {}, "row,label\nr,0.5\n", r"data.submission.id=COLUMN"),
        (SPAM, {"columns": {"0": "1"}}, "id,1\nr,0.5\n", r"gives several classes the columns \['1'\]"),
        (SPAM, {"columns": {"1": "id"}}, "id,label\nr,0.5\n", r"'id' of the submission is that of the ids(.|\n)*'1'"),
        (SPAM, {"id": "label"}, "label,1\nr,0.5\n", "'label' of the submission is that of the ids"),
        (SPAM, {"columns": {"2": "p"}}, "id,p\nr,0.5\n", r"maps \['2'\](.|\n)*0, 1, label"),
        (DIGITS, {"columns": {"1": "p"}}, "id,p\nr,0.5\n", r"can fill \['id', '0', 'p', '2'\] or \['id', 'digit'\]"),
    ],
)
def test_no_hard_label_is_written_silently(
    tmp_path: Path, task: Task, settings: dict[str, Any], sample: str, message: str
) -> None:
    path = tmp_path / "sample.csv"
    path.write_text(sample)
    with pytest.raises(DataError, match=message):
        open_sample(path, task, Submission.model_validate(settings))


def test_rows_without_ids_are_those_of_the_sample(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["7", "9"], LMSYS.classes)
    assert ids_by_position(2, LMSYS, sample) == ["7", "9"]
    with pytest.raises(DataError, match="3 rows without ids, and the sample submission 2"):
        ids_by_position(3, LMSYS, sample)


def test_submission_without_a_sample(tmp_path: Path) -> None:
    write_submission(tmp_path / "s.csv", some_scores(["b", "a"]), LMSYS, None)
    assert pl.read_csv(tmp_path / "s.csv").columns == ["id", *LMSYS.classes]
    write_submission(tmp_path / "w.csv", some_scores(["b", "a"], WSDM), WSDM, None)
    assert pl.read_csv(tmp_path / "w.csv").columns == ["id", "winner"]
    assert pl.read_csv(tmp_path / "w.csv")["id"].to_list() == ["b", "a"]


def test_submission_refuses_other_ids_and_columns(tmp_path: Path) -> None:
    out = tmp_path / "submission.csv"
    sample = write_sample(tmp_path / "sample.csv", ["a", "b", "c"], list(LMSYS.classes))
    refused = refusal(lambda: write_submission(out, some_scores(["a", "x", "y"]), LMSYS, sample))
    assert "lack 2 ids" in str(refused)
    assert "have 2 ids that the sample submission lacks" in str(refused)
    twice = pl.concat([some_scores(["a", "b", "c"]), some_scores(["a"])])
    assert "stand twice" in str(refusal(lambda: write_submission(out, twice, LMSYS, sample)))
    broken = some_scores(["a", "b", "c"]).with_columns(winner_tie=pl.lit(float("nan")))
    assert "no finite" in str(refusal(lambda: write_submission(out, broken, LMSYS, sample)))
    other = write_sample(tmp_path / "other.csv", ["a"], ["label"])
    assert "the sample submission has columns" in str(
        refusal(lambda: write_submission(out, some_scores(["a"]), LMSYS, other))
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: text.replace("id,", "key,", 1), "columns"),
        (lambda text: "," + text.replace("\n", "\n0,", 3), "columns"),
        (lambda text: "\n".join(sorted(text.split(), reverse=True)) + "\n", "another order"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "lack 1 ids"),
        (lambda text: text + "z,1,0,0\n", "have 1 ids"),
        (lambda text: text.replace("0.5", "0.9"), "do not sum to one"),
        (lambda text: text.replace("0.5", "nan"), "no finite"),
        (lambda text: text.replace("0.5", ""), "no finite"),
        (lambda text: text.replace("\nb", "\na"), "stand twice"),
    ],
)
def test_check_submission_finds_what_loses_places(tmp_path: Path, edit: Any, expected: str) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["a", "b", "c"], list(LMSYS.classes))
    out = tmp_path / "submission.csv"
    values = np.array([[0.2, 0.3, 0.5], [0.25, 0.25, 0.5], [1, 0, 0]])
    write_submission(out, scores_frame(["a", "b", "c"], values, LMSYS, 2, ["m"]), LMSYS, sample)
    check_submission(out, sample, LMSYS)
    out.write_text(edit(out.read_text()))
    assert expected in str(refusal(lambda: check_submission(out, sample, LMSYS)))


def test_a_full_disk_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission, scores = tmp_path / "submission.csv", tmp_path / "scores.parquet"
    frame = some_scores(["a", "b"])
    arguments = (["a", "b"], class_matrix(frame, LMSYS), LMSYS, 2, ["m"])
    write_submission(submission, frame, LMSYS, None)
    write_scores(scores, scores_frame(*arguments))
    before = submission.read_bytes(), scores.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(_: pl.DataFrame, path: Path) -> None:
        path.write_bytes(b"half a fi")
        full()

    for owner, name, fault in (
        (os, "replace", full),
        (os, "fsync", full),
        (tables.pl.DataFrame, "write_csv", half),
        (tables.pl.DataFrame, "write_parquet", half),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            if name != "write_parquet":
                with pytest.raises(OSError, match="No space"):
                    write_submission(submission, frame.reverse(), LMSYS, None)
            if name != "write_csv":
                with pytest.raises(OSError, match="No space"):
                    write_scores(scores, scores_frame(*arguments))
        assert (submission.read_bytes(), scores.read_bytes()) == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["scores.parquet", "submission.csv"]


# --- the real thing --------------------------------------------------------------------------------------------------


@real_data
@pytest.mark.parametrize(("folder", "suffix", "task"), [("arena3", "csv", LMSYS), ("arena2", "parquet", WSDM)])
def test_real_files(tmp_path: Path, folder: str, suffix: str, task: Task) -> None:
    train = read_rows([SHARED / folder / f"train.{suffix}"], task, labelled=True)
    test = read_rows([SHARED / folder / f"test.{suffix}"], task, labelled=False)
    sample = SHARED / folder / "sample_submission.csv"
    assert len(train) == {"arena3": 7770, "arena2": 3990}[folder]
    assert np.allclose(train["target"].list.sum().to_numpy(), 1)
    write_submission(tmp_path / "s.csv", some_scores(test["id"].to_list(), task).reverse(), task, sample)
    assert check_submission(tmp_path / "s.csv", sample, task)["rows"] == len(test)


def test_a_blank_row_in_the_middle_is_not_dropped_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("id,prompt,response_a,response_b\n1,p,a,b\n,,,\n2,p,a,b\n\n\n")
    assert flaws_of(read_rows([path], WSDM, labelled=False)) == {"row 2": {"missing_id", "missing_cell"}}
    path.write_text("id,prompt,response_a,response_b\n1,p,a,b\n2,p,a,b\n\n\n")
    assert read_rows([path], WSDM, labelled=False)["id"].to_list() == ["1", "2"]


@pytest.mark.parametrize("ids", [[b"1", b"2"], [["1"], ["2"]]])
def test_ids_that_have_no_one_way_of_writing_are_refused(tmp_path: Path, ids: list[object]) -> None:
    path = tmp_path / "test.parquet"
    pl.DataFrame({"id": ids, "prompt": ["p", "q"], "response_a": ["a", "a"], "response_b": ["b", "b"]}).write_parquet(
        path
    )
    refused = str(refusal(lambda: read_rows([path], WSDM, labelled=False)))
    assert f"column 'id' holds {pl.Series(ids).dtype}" in refused


def test_an_id_in_another_encoding_is_refused_even_in_a_test_file(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_bytes("id,prompt,response_a,response_b\n\u00e9,p,a,b\n".encode("cp1252"))
    assert "not UTF-8" in str(refusal(lambda: read_rows([path], WSDM, labelled=False)))


# --- types: the same in every format ---------------------------------------------------------------------------------


def of_type(path: Path, column: str, cells: pa.Array) -> Path:
    """A WSDM training file of parquet, one of whose columns has these cells."""
    count = len(cells)
    texts = {"id": [f"i{row}" for row in range(count)], **{name: ["x"] * count for name in WSDM.fields}}
    pq.write_table(pa.table({**texts, "winner": ["model_a"] * count, column: cells}), path)
    return path


IDS = [
    (pa.array([7.0, 8.0]), ["7", "8"]),
    (pa.array([7.0, 8.0], pa.float32()), ["7", "8"]),
    (pa.array([2**53 + 1, -7]), [str(2**53 + 1), "-7"]),
    (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
    (pa.array([Decimal(7)], pa.decimal128(20, 0)), ["7"]),
    (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
    (pa.array(["07"], pa.large_string()), ["07"]),
    (pa.array([7.0, 8.5]), "ids of 1 row are floats with fractions"),
    (pa.array([2.0**53]), "ids of 1 row are floats with fractions, or too large"),
    (pa.array([2.0**24], pa.float32()), "ids of 1 row are floats with fractions, or too large"),
    (pa.array([float("inf")]), "ids of 1 row are floats"),
    (pa.array([True, False]), "ids of 2 rows are booleans"),
    (pa.array([b"1"]), "column 'id' holds Binary"),
    (pa.array([date(2024, 1, 2)]), "column 'id' holds Date"),
    (pa.array([Decimal("7.5")]), "column 'id' holds Decimal"),
]


@pytest.mark.parametrize(("cells", "expected"), IDS)
def test_an_id_is_the_same_text_in_parquet_and_jsonl_or_refused(
    tmp_path: Path, cells: pa.Array, expected: list[str] | str
) -> None:
    paths = [of_type(tmp_path / "t.parquet", "id", cells)]
    if isinstance(cells[0].as_py(), bool | int | float):
        records = [{"id": one, **dict.fromkeys(WSDM.fields, "x"), "winner": "model_a"} for one in cells.to_pylist()]
        paths.append(tmp_path / "t.jsonl")
        paths[1].write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in paths if cells.type != pa.float32() else paths[:1]:  # a float32 in JSON is a float64
        if isinstance(expected, str):
            refused = refusal(lambda path=path: read_rows([path], WSDM, labelled=True))
            assert expected in str(refused)
            assert refused.where == path
        else:
            assert read_rows([path], WSDM, labelled=True)["id"].to_list() == expected


def test_whole_floats_as_ids_are_joined_with_the_sample(tmp_path: Path) -> None:
    sample = tmp_path / "sample.parquet"
    pl.DataFrame({"id": [9.0, 7.0], "winner": ["model_a"] * 2}).write_parquet(sample)
    assert sample_ids(sample, WSDM) == ["9", "7"]
    read = read_rows([of_type(tmp_path / "t.parquet", "id", pa.array([7.0, 9.0]))], WSDM, labelled=False)
    write_submission(tmp_path / "s.csv", some_scores(read["id"].to_list(), WSDM), WSDM, sample)
    assert check_submission(tmp_path / "s.csv", sample, WSDM)["rows"] == 2


LISTS = [
    (pa.array([["x", "z"], ["y", None]], pa.list_(pa.string(), 2)), [["x", "z"], ["y", None]]),
    (pa.array([["x"], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))), [["x"], [None]]),
    (pa.array([["x"], []], pa.large_list(pa.string())), [["x"], []]),
    (pa.array([["x"]], pa.list_(pa.large_string())), [["x"]]),
    (pa.array([[None], []], pa.list_(pa.null())), [[None], []]),
    (pa.array(["x", None]).dictionary_encode(), [["x"], [None]]),
    (pa.array([[b"x"]]), "List(Binary)"),
    (pa.array([b"x"]), "Binary"),
    (pa.array([[1, 2]]), "List(Int64)"),
    (pa.array([[["x"]]]), "List(List(String))"),
    (pa.array([{"a": "x"}]), "Struct"),
    (pa.array([[{"role": "assistant", "content": "x"}]]), [["x"]]),
    (pa.array([date(2024, 1, 2)]), "Date"),
    (pa.array([Decimal("7.5")]), "Decimal"),
]


@pytest.mark.parametrize(("cells", "expected"), LISTS)
@pytest.mark.parametrize("size", [None, 1])
def test_texts_of_any_arrow_type_are_plain_or_the_column_is_refused(
    tmp_path: Path, cells: pa.Array, expected: list[list[str | None]] | str, size: int | None
) -> None:
    """Never is the text what Python prints for bytes, lists or objects."""
    path = of_type(tmp_path / "t.parquet", "response_a", cells)

    def read() -> pl.DataFrame:
        return (
            read_rows([path], WSDM, labelled=False)
            if size is None
            else pl.concat(scan_rows([path], WSDM, labelled=False, size=size))
        )

    if isinstance(expected, str):
        assert f"the column of 'response_a' holds {expected}" in str(refusal(read))
    else:
        assert read()["response_a"].to_list() == expected


@pytest.mark.parametrize(("cell", "expected"), [({"a": 1}, "objects"), ([1], "lists of other things than texts")])
def test_objects_in_jsonl_are_no_texts_and_may_stand_in_columns_that_are_not_read(
    tmp_path: Path, cell: object, expected: str
) -> None:
    path = tmp_path / "t.jsonl"
    record = {"id": 1, **dict.fromkeys(WSDM.fields, "x"), "winner": "model_a"}
    path.write_text(json.dumps({**record, "language": cell}))
    assert read_rows([path], WSDM, labelled=True)["id"].to_list() == ["1"]
    for column, words in (("prompt", "the column of 'prompt'"), ("id", "column 'id'"), ("winner", "column 'winner'")):
        path.write_text(json.dumps({**record, column: cell}))
        assert f"{words} holds {expected}" in str(refusal(lambda: read_rows([path], WSDM, labelled=True)))


def test_numbers_and_booleans_among_texts_of_jsonl_are_undecodable(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    cells = ["x", 7, 7.0, 7.5, True, float("nan"), None]
    records = [{"id": f"i{row}", **dict.fromkeys(WSDM.fields, "x"), "prompt": cell} for row, cell in enumerate(cells)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = read_rows([path], WSDM, labelled=False)
    assert read["prompt"].to_list() == [["x"], ["7"], ["7"], ["7.5"], ["true"], [None], [None]]
    undecodable = {key: {"undecodable"} for key in ("i2", "i3", "i4")}
    assert flaws_of(read) == undecodable | {key: {"missing_cell"} for key in ("i5", "i6")}


def test_lists_of_messages_are_turns(tmp_path: Path) -> None:
    """As a list, or as a text that holds one in JSON; earlier answers and systems in a prompt are marked."""
    messages: list[Any] = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "why?"},
    ]
    expected = ["[system]\nbrief\n\n[user]\nhello", "[assistant]\nhi", "why?"]
    texts = {"response_a": ["a"], "response_b": ["b"], **dict(zip(LMSYS.classes, (1, 0, 0), strict=True))}
    path = tmp_path / "t.jsonl"
    for cell in (messages, json.dumps(messages)):
        path.write_text(json.dumps({"id": "1", "prompt": cell, **texts}) + "\n")
        read = read_rows([path], LMSYS, labelled=True)
        assert read["prompt"].to_list() == [expected]
        assert read["flaws"].to_list() == [0]
    messages[0]["role"] = "oracle"
    path.write_text(json.dumps({"id": "1", "prompt": messages, **texts}) + "\n")
    read = read_rows([path], LMSYS, labelled=True)
    assert read["flaws"].to_list() == [Flaw.UNDECODABLE]
    with pytest.raises(DataError, match=r"messages \(role, content\) need known roles"):
        clean(read, LMSYS, Rules(), labelled=True)


def test_a_list_of_labels_is_the_mean_of_raters(tmp_path: Path) -> None:
    votes = [["model_a", "model_a", "model_b"], ["model_b"], ["model_a", "nobody"], [], None]
    rows = [{"id": f"i{row}", **dict.fromkeys(WSDM.fields, "x"), "winner": cell} for row, cell in enumerate(votes)]
    pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for path in (tmp_path / "t.parquet", tmp_path / "t.jsonl"):
        targets = read_rows([path], WSDM, labelled=True)["target"].to_list()
        assert targets[:2] == [[pytest.approx(2 / 3), pytest.approx(1 / 3)], [0.0, 1.0]]
        assert targets[2:] == [None] * 3


def test_one_label_may_be_yes_and_no(tmp_path: Path) -> None:
    for cells in (["yes", "no"], ["True", "false"], ["1", "0"]):
        path = write_csv(tmp_path / "t.csv", {"id": ["a", "b"], "text": ["x", "y"], "toxic": cells})
        assert read_rows([path], TOXIC, labelled=True)["target"].to_list() == [[1.0], [0.0]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_booleans_are_labels_in_every_format(tmp_path: Path, suffix: str) -> None:
    wins = np.eye(3, dtype=bool)
    texts = {"id": ["0", "1", "2"], **{name: ['["a"]'] * 3 for name in LMSYS.fields}}
    one_hot = pd.DataFrame(texts | {name: wins[:, at] for at, name in enumerate(LMSYS.classes)})
    named = pd.DataFrame(texts | {"label": [True, False, True]})
    for classes in (("False", "True"), ("false", "true"), ("0", "1")):
        task = Task(name="b", fields=LMSYS.fields, classes=classes, label_column="label", swap_fields=None)
        path = by_pandas(tmp_path / f"named{suffix}", named)
        read = read_rows([path], task, labelled=True)
        assert read["target"].to_list() == [[0, 1], [1, 0], [0, 1]]
    path = by_pandas(tmp_path / f"one_hot{suffix}", one_hot)
    assert read_rows([path], LMSYS, labelled=True)["target"].to_list() == wins.astype(float).tolist()
    source = Source(
        files=[tmp_path / f"named{suffix}"], label_column="label", labels={"true": "model_a", "false": "model_b"}
    )
    assert read_rows([source], WSDM, labelled=True)["target"].to_list() == [[1, 0], [0, 1], [1, 0]]


def by_pandas(path: Path, frame: pd.DataFrame) -> Path:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


def test_a_boolean_is_no_weight_and_no_probability(tmp_path: Path) -> None:
    rows = {"id": ["1"], **{name: ["a"] for name in WSDM.fields}, "winner": ["model_a"], "weight": [True]}
    pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
    assert "has 1 weights" in str(refusal(lambda: read_rows([tmp_path / "t.parquet"], WSDM, labelled=True)))
    sample = write_sample(tmp_path / "sample.csv", ["a"], list(LMSYS.classes))
    (tmp_path / "s.csv").write_text(f"id,{','.join(LMSYS.classes)}\na,True,False,False\n")
    assert "no finite" in str(refusal(lambda: check_submission(tmp_path / "s.csv", sample, LMSYS)))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("prompt", "chosen", "rejected"), "chosen-rejected"),
        (("question_id", "conversation_a", "conversation_b", "winner"), "chatbot-arena-33k"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("labelled", [True, False])
def test_public_sets_of_another_shape_are_told_by_name(
    tmp_path: Path, columns: tuple[str, ...], expected: str, suffix: str, labelled: bool
) -> None:
    path = write_as(tmp_path / f"t{suffix}", {name: ["x"] for name in columns})
    for task in (LMSYS, WSDM):
        refused = refusal(lambda task=task: read_rows([path], task, labelled=labelled))
        assert expected in refused.what
        assert f"say format: {expected}" in str(refused.remedy)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": 1, "prompt": "p", "prompt": "q"}', "line 2: names ['prompt'] stand twice"),
        ('{"id": 1} {"id": 2}', "line 2: Extra data"),
        ('{"id": 1, "prompt": "p', "line 2: Unterminated string"),
        ('"text"', "line 2 holds no object but a str"),
    ],
)
def test_lines_of_jsonl_that_are_no_record_are_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n" + line)
    assert expected in str(refusal(lambda: read_rows([path], WSDM, labelled=True)))


def test_parquet_files_that_hold_no_table_are_refused(tmp_path: Path) -> None:
    path = of_type(tmp_path / "t.parquet", "id", pa.array(["1"]))
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 0), path)
    assert "no rows" in str(refusal(lambda: read_rows([path], WSDM, labelled=True)))
    pq.ParquetWriter(path, table.schema).close()
    assert "no rows" in str(refusal(lambda: read_rows([path], WSDM, labelled=True)))
    pq.write_table(table.rename_columns(["id", "prompt", "prompt", "response_a", "winner"]), path)
    assert "['prompt'] stand more than once" in str(refusal(lambda: read_rows([path], WSDM, labelled=True)))


# --- chunks, globs, sources ------------------------------------------------------------------------------------------

CELLS = st.sampled_from(
    [
        "[]",
        "[null]",
        '["a"]',
        '["a", null]',
        '["\\ud83d"]',
        "no list",
        "null",
        '["a',
        '"]',
        '["b\\u0007"]',
        '["\t"]',
        None,
        "",
    ]
)


def write_as(path: Path, columns: dict[str, list[str | None]]) -> Path:
    """The columns as CSV, parquet or JSONL, by the name of the file."""
    frame = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
    if path.suffix == ".csv":
        frame.write_csv(path)
    elif path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        lines = (json.dumps({name: cell for name, cell in row.items() if cell}) for row in frame.iter_rows(named=True))
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS), min_size=1, max_size=12),
    st.integers(1, 5),
    st.none() | st.integers(1, 9),
)
@settings(max_examples=30, deadline=None)
def test_chunks_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, size: int, max_rows: int | None
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    names = ("id", *LMSYS.fields)
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    first = {name: ["x", *cells] for name, cells in columns.items()}  # JSONL shows its columns at once
    for suffix in (".csv", ".parquet", ".jsonl"):
        paths = [write_as(folder / f"{part}{suffix}", first) for part in "ab"]
        whole = read_rows(paths, LMSYS, labelled=False, max_rows=max_rows)
        chunks = list(scan_rows(paths, LMSYS, labelled=False, max_rows=max_rows, size=size))
        assert max(map(len, chunks)) <= size
        assert pl.concat(chunks).equals(whole)


def test_globs_are_sorted_and_names_are_taken_literally(tmp_path: Path) -> None:
    for name in ("b1", "a1", "[x]"):
        write_csv(tmp_path / f"{name}.csv", lmsys_rows(1) | {"id": [name]})
    assert read_lmsys(tmp_path / "*1.csv")["id"].to_list() == ["a1", "b1"]
    assert read_lmsys(tmp_path / "[x].csv")["id"].to_list() == ["[x]"]
    assert "no file matches" in str(refusal(lambda: read_lmsys(tmp_path / "c*.csv")))


SOURCE = {
    "columns": {"id": "key", "prompt": "question", "response_a": "left", "response_b": "right"},
    "label_column": "better",
    "labels": {"A": "winner_model_a", "B": "winner_model_b"},
    "id_prefix": "extra-",
    "weight": 0.5,
    "ignore_columns": ["judge"],
}
EXTRA: dict[str, list[str | None]] = {
    "key": ["1", "2", "3"],
    "question": ['["q"]'] * 3,
    "left": ['["l"]'] * 3,
    "right": ['["r"]'] * 3,
    "better": ["A", "winner_tie", "C"],
    "judge": ["me"] * 3,
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_source_with_columns_of_its_own(tmp_path: Path, suffix: str) -> None:
    path = write_as(tmp_path / f"extra{suffix}", EXTRA)
    main = write_csv(tmp_path / "train.csv", lmsys_rows(1))
    frame = read_rows([main, Source(files=[path], **SOURCE)], LMSYS, labelled=True)
    assert frame["id"].to_list() == ["100", "extra-1", "extra-2", "extra-3"]
    assert frame["weight"].to_list() == [1.0, 0.5, 0.5, 0.5]
    assert frame["target"].to_list()[1:] == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], None]
    assert flaws_of(frame) == {"extra-3": {"bad_label"}}
    assert frame["response_a"].to_list() == [["answer 0"], ["l"], ["l"], ["l"]]


def test_a_source_without_ids_is_numbered_over_its_files(tmp_path: Path) -> None:
    for name in "ab":
        write_as(tmp_path / f"{name}.csv", {**EXTRA, "key": [None] * 3})
    columns = {**SOURCE["columns"], "id": None}  # type: ignore[dict-item]
    source = Source(files=[tmp_path / "*.csv"], **{**SOURCE, "columns": columns, "ignore_columns": "all"})
    assert read_rows([source], LMSYS, labelled=True)["id"].to_list() == [f"extra-{row}" for row in range(1, 7)]


def test_a_source_that_contradicts_the_task(tmp_path: Path) -> None:
    source = Source(files=[tmp_path / "x.csv"], columns={"promt": "q", "prompt": None}, labels={"A": "a"})
    message = str(refusal(lambda: read_rows([source], LMSYS, labelled=True)))
    for part in ("'promt'", "nearest is 'prompt'", "'prompt' to null", "['a']"):
        assert part in message


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("task", [LMSYS, WSDM])
def test_written_rows_read_back(tmp_path: Path, suffix: str, task: Task) -> None:
    cells: dict[str, Any] = {name: [["a"], [None], ['"quoted", é\n']] for name in task.fields}
    if task is LMSYS:
        cells["prompt"] = [[], ["a", None], ["", "b"]]
    target = [[float(at == row % len(task.classes)) for at in range(len(task.classes))] for row in range(3)]
    frame = pl.DataFrame(
        {"id": list("xyz"), **cells, "target": target, "weight": [1.0] * 3},
        schema_overrides=dict.fromkeys(cells, pl.List(pl.String)),
    )
    write_rows(tmp_path / f"rows{suffix}", frame, task)
    read = read_rows([tmp_path / f"rows{suffix}"], task, labelled=True)
    assert read.select(frame.columns).equals(frame)
    write_rows(tmp_path / f"test{suffix}", frame.with_columns(target=pl.lit(None, dtype=pl.List(pl.Float64))), task)
    assert read_rows([tmp_path / f"test{suffix}"], task, labelled=False)["id"].to_list() == list("xyz")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("task", [LMSYS, WSDM])
def test_probabilities_and_weights_read_back(tmp_path: Path, suffix: str, task: Task) -> None:
    """In a WSDM file without `winner`, the columns that are else names of models are probabilities."""
    values = np.random.default_rng(0).dirichlet(np.ones(len(task.classes)), size=3).tolist()
    cells = {name: [["a"], ["b"], ["c"]] for name in task.fields}
    frame = pl.DataFrame({"id": list("xyz"), **cells, "target": values, "weight": [0.5, 1.0, 2.0]})
    path = tmp_path / f"rows{suffix}"
    write_rows(path, frame, task)
    assert read_rows([path], task, labelled=True).select(frame.columns).equals(frame)
    weighted = read_rows([Source(files=[path], weight=0.5, train_only=True)], task, labelled=True)
    assert weighted["weight"].to_list() == [0.25, 0.5, 1.0]
    assert weighted["train_only"].all()
    for ignored in (["weight"], "all"):
        unread = read_rows([Source(files=[path], ignore_columns=ignored)], task, labelled=True)
        assert unread["weight"].to_list() == [1.0] * 3
    assert read_rows([path], task, labelled=False)["weight"].to_list() == [1.0] * 3
    renamed = tmp_path / "renamed.parquet"
    pl.concat(read_file(path, rows=None, lossy=False)).rename({"weight": "w"}).write_parquet(renamed)
    mapped = Source(files=[renamed], columns={"weight": "w"}, ignore_columns="all")
    assert read_rows([mapped], task, labelled=True)["weight"].to_list() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", None, "heavy"])
def test_a_weight_that_is_no_weight_is_refused(tmp_path: Path, suffix: str, wrong: str | None) -> None:
    rows = {name: ['["a"]'] * 2 for name in LMSYS.fields} | {name: ["0", "0"] for name in LMSYS.classes}
    columns = {"id": ["p", "q"], **rows, "winner_tie": ["1", "1"], "weight": ["1", wrong]}
    path = write_as(tmp_path / f"rows{suffix}", columns)
    refused = refusal(lambda: read_lmsys(path))
    assert "column 'weight' has 1 weights" in str(refused)
    assert refused.rows == ("q",)


def test_names_of_models_are_no_probabilities(tmp_path: Path) -> None:
    rows = {"id": ["1", "2"], **{name: ["a", "b"] for name in WSDM.fields}}
    path = write_as(tmp_path / "train.csv", {**rows, "model_a": ["gpt", "claude"], "model_b": ["x", "y"]})
    assert "columns ['winner'] are missing" in str(refusal(lambda: read_rows([path], WSDM, labelled=True)))
    named = {**rows, "model_a": ["0.5", "0.5"], "model_b": ["0.5", "0.5"], "winner": ["model_a", "model_b"]}
    frame = read_rows([write_as(tmp_path / "named.csv", named)], WSDM, labelled=True)
    assert frame["target"].to_list() == [[1.0, 0.0], [0.0, 1.0]]
    soft = {**rows, "model_a": ["0.5", "half"], "model_b": ["0.5", "0.5"]}
    frame = read_rows([write_as(tmp_path / "soft.csv", soft)], WSDM, labelled=True)
    assert frame["target"].to_list() == [[0.5, 0.5], None]
    assert flaws_of(frame) == {"2": {"bad_label"}}


def test_rows_that_a_file_can_not_hold_are_not_written(tmp_path: Path) -> None:
    rows = {"id": ["1"], **{name: [["a", "b"]] for name in WSDM.fields}, "target": [[1.0, 0.0]], "weight": [1.0]}
    assert "lists of turns" in str(refusal(lambda: write_rows(tmp_path / "x.csv", pl.DataFrame(rows), WSDM)))
    assert "can't be written" in str(refusal(lambda: write_rows(tmp_path / "x.txt", pl.DataFrame(rows), WSDM)))
    assert list(tmp_path.iterdir()) == []
