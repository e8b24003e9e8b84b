"""CSVs of every writer: read exactly or refused, whole and in chunks; never other rows, never another text."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.config import Source
from pairclf.data import csv_syntax
from pairclf.data.folds import read_folds
from pairclf.data.formats import read_file
from pairclf.data.rows import read_rows, scan_rows, write_rows
from pairclf.data.scores import read_scores
from pairclf.data.submission import check_submission, sample_ids
from pairclf.errors import DataError, PairclfError
from pairclf.rehearsal.hidden_test import read_raw
from pairclf.task import WSDM

Rows = list[tuple[str | None, ...]]

LABELLED = {"target": [[1.0, 0.0]] * 2, "weight": [1.0] * 2}

NAMES = ["id", "te xt", "last"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("csv") / "t.csv"


def read(path: Path, data: bytes, size: int | None = None, **options: Any) -> Rows | None:
    """The rows of a file of these bytes; None: it is refused."""
    path.write_bytes(data)
    try:
        chunks = list(read_file(path, rows=None, size=size, **{"lossy": False, **options}))
    except DataError:
        return None
    return pl.concat(chunks).rows()


def without_nulls(rows: Sequence[Sequence[str | None]]) -> list[list[str]]:
    return [[cell or "" for cell in row] for row in rows]


def by_the_letter(data: bytes) -> list[list[str]] | None:
    """What Python's strict reader makes of a file all of whose lines have as many cells as the header; else None."""
    text = io.StringIO(data.decode().removeprefix("\ufeff"), newline="")
    try:
        header, *rows = csv.reader(text, strict=True)
    except (csv.Error, ValueError):
        return None
    rows = [row or [""] * len(header) for row in rows]
    return without_end(rows) if all(len(row) == len(header) for row in rows) else None


def without_end(rows: list[list[str]]) -> list[list[str]]:
    """Without empty rows at the end: Python's reader does not tell blank lines from quoted nothing."""
    while rows and not any(rows[-1]):
        rows.pop()
    return rows


# --- writers ---------------------------------------------------------------------------------------------------------


def by_csv(**options: Any) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, **options).writerows([NAMES, *rows])
        return text.getvalue().encode()

    return write


def by_pandas(**options: Any) -> Callable[[Rows], bytes]:
    return lambda rows: pd.DataFrame(rows, columns=NAMES, dtype=object).to_csv(index=False, **options).encode()


def by_polars(**options: Any) -> Callable[[Rows], bytes]:
    schema = dict.fromkeys(NAMES, pl.String)
    return lambda rows: pl.DataFrame(rows, schema=schema, orient="row").write_csv(**options).encode()


def quoted_all(escape: Callable[[str], str], ending: str = "\n") -> Callable[[Rows], bytes]:
    """Every cell in quotes, and what stands in it as another program escapes it."""
    return lambda rows: "".join(
        ",".join(f'"{escape(cell or "")}"' for cell in row) + ending for row in [NAMES, *rows]
    ).encode()


OF_RFC_4180 = {
    "excel": by_csv(),
    "unix": by_csv(dialect="unix"),
    "minimal": by_csv(lineterminator="\n"),
    "all": by_csv(quoting=csv.QUOTE_ALL),
    "nonnumeric": by_csv(quoting=csv.QUOTE_NONNUMERIC),
    "pandas": by_pandas(),
    "pandas, all": by_pandas(quoting=csv.QUOTE_ALL, lineterminator="\r\n"),
    "pandas, nonnumeric": by_pandas(quoting=csv.QUOTE_NONNUMERIC),
    "polars": by_polars(),
    "polars, always": by_polars(quote_style="always", line_terminator="\r\n"),
    "polars, non_numeric": by_polars(quote_style="non_numeric", include_bom=True),
    "R, double": quoted_all(lambda cell: cell.replace('"', '""')),
}
ESCAPING = {
    "csv": by_csv(doublequote=False, escapechar="\\"),
    "csv, all": by_csv(doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "csv, none": by_csv(quoting=csv.QUOTE_NONE, escapechar="\\"),
    "pandas": by_pandas(doublequote=False, escapechar="\\"),
    "pandas, none": by_pandas(quoting=csv.QUOTE_NONE, escapechar="\\"),
    "MySQL": quoted_all(lambda cell: cell.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\\n")),
}
CARELESS = {
    "R, escape": quoted_all(lambda cell: cell.replace('"', '\\"')),
    "Spark": by_polars(quote_style="never"),
    "no quoting": lambda rows: "".join(",".join(cell or "" for cell in row) + "\n" for row in [NAMES, *rows]).encode(),
    "not doubled": quoted_all(lambda cell: cell),
    "tabs": by_csv(dialect="excel-tab"),
    "semicolons": by_csv(delimiter=";"),
}

PIECES = st.sampled_from(['"', ",", "\n", "\r\n", "\\", '\\"', '""', '",', "a", "é", "b c", " ", "\x00", "\ufeff", "1"])
CELL = st.lists(PIECES, max_size=4).map("".join)
ROWS = st.lists(
    st.tuples(CELL, CELL, CELL.map(lambda text: text + ".")), min_size=1, max_size=5
)  # a row is never blank
RETURNS = st.lists(st.sampled_from(["\r", "a", "b"]), max_size=3).map("".join)


@given(ROWS, st.sampled_from(sorted(OF_RFC_4180)), st.integers(1, 3), st.booleans())
def test_files_of_rfc_4180_are_read_exactly(path: Path, rows: Rows, writer: str, size: int, cut: bool) -> None:
    data = OF_RFC_4180[writer](rows)
    data = data.removesuffix(b"\n").removesuffix(b"\r") if cut else data
    for at_once in (None, size):
        found = read(path, data, at_once)
        assert found is not None
        assert without_nulls(found) == without_nulls(rows)


@given(st.lists(st.tuples(RETURNS, RETURNS, RETURNS.map(lambda text: "." + text)), min_size=1, max_size=3))
def test_a_carriage_return_is_kept_or_refused(path: Path, rows: Rows) -> None:
    for writer, write in OF_RFC_4180.items():
        found = read(path, write(rows))
        assert found is None or without_nulls(found) == without_nulls(rows), writer
    for write in (by_polars(), by_csv()):
        assert read(path, write(rows)) is not None


@given(ROWS, st.sampled_from(sorted(ESCAPING)), st.none() | st.integers(1, 3))
def test_escaped_files_are_read_exactly_where_that_is_said(
    path: Path, rows: Rows, writer: str, size: int | None
) -> None:
    found = read(path, ESCAPING[writer](rows), size, escape=True)
    assert found is not None
    assert without_nulls(found) == without_nulls(rows)


@given(ROWS, st.sampled_from(sorted(ESCAPING | CARELESS)), st.none() | st.integers(1, 3))
@settings(max_examples=2 * settings.default.max_examples, deadline=None)
def test_other_files_are_read_exactly_or_refused(path: Path, rows: Rows, writer: str, size: int | None) -> None:
    """But for those that are sound by RFC 4180, and say something else: nobody can tell."""
    data = (ESCAPING | CARELESS)[writer](rows)
    found = read(path, data, size)
    if found is not None and without_nulls(found) != without_nulls(rows):
        assert without_end(without_nulls(found)) == by_the_letter(data)


@given(
    st.lists(st.sampled_from([*'",\n\\aé', "\r\n", '""', '","', '"\n"', "x,y\n"]), max_size=16).map("".join),
    st.sampled_from(["a,b\n", '"a",b\r\n', "\ufeffa,b\n", "a\n", ""]),
    st.sampled_from([1, 2, 5, 1 << 21]),
    st.none() | st.integers(1, 3),
)
@settings(max_examples=6 * settings.default.max_examples, deadline=None)
def test_any_file_is_read_as_the_strict_reader_does_or_refused(
    path: Path, body: str, header: str, block: int, size: int | None
) -> None:
    data = (header + body).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_syntax, "BLOCK", block)
        found = read(path, data, size)
    assert found is None or without_end(without_nulls(found)) == by_the_letter(data)


def test_empty_cells_are_missing_and_quoted_ones_are_empty(path: Path) -> None:
    assert read(path, b'a,b,c\n1,,""\n"",2,\n') == [("1", None, ""), ("", "2", None)]


@pytest.mark.parametrize("size", [None, 1])
def test_names_are_the_header_s(path: Path, size: int | None) -> None:
    path.write_bytes(b'"a ""b""","c\nd",\n1,2,3\n')
    (frame,) = read_file(path, rows=None, lossy=False, size=size)
    assert frame.columns == ['a "b"', "c\nd", ""]


BACKSLASH = b'id,prompt,response_a,response_b,winner\n1,"say \\"hi\\"",a,b,model_a\n2,p,a,"b",model_b\n'


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (BACKSLASH, "line 2, character 9, in column 'prompt': a quote that is neither doubled nor"),
        (
            b'id,prompt\n1,p\n2,5" pipe\n3,6" pipe\n',
            "line 3, character 4, in column 'prompt': a quote in a cell that does",
        ),
        (b'id,prompt\n1,"a\nb" \n', "line 3, character 2, in column 'prompt': a quote that is neither"),
        (b'id,prompt\n1,"a"\n2,"b\n', "line 3, character 3, in column 'prompt': the quote that opens here is never"),
        ('id,prompt\n1,"é" x\n'.encode(), "line 2, character 5,"),
        (b"id,prompt\n1,p\n2\n3,p\n", "line 3: the line has 1 cells; the header has 2"),
        (b'id,prompt\n1,"a\nb"\n2,b,c\n', "line 4: the line has 3 cells; the header has 2"),
        (b"\nid,prompt\n1,p\n", "line 1: the line is blank"),
        (b"id,prompt\n1,p\r\n2,p\n", "line 2, character 4, in column 'prompt': the line ends in CR LF"),
        (b"id,prompt\n1\r,p\n", "line 2, character 2, in column 'id': a carriage return ends a cell"),
        (b"\x1f\x8b\x08\x00", "named '.csv' and is a gzip archive"),
        ("id,prompt\n1,p\n".encode("utf-16"), "named '.csv' and is UTF-16 text"),
    ],
)
@pytest.mark.parametrize("size", [None, 1])
def test_what_is_wrong_is_named_with_line_and_column(path: Path, data: bytes, expected: str, size: int | None) -> None:
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_file(path, rows=None, lossy=False, size=size))
    assert expected in str(caught.value)


def test_wherever_a_csv_is_read_it_is_looked_at_first(tmp_path: Path) -> None:
    data, sample = tmp_path / "data.csv", tmp_path / "sample.csv"
    data.write_bytes(BACKSLASH)
    sample.write_bytes(b'id,winner\n1,"a\\" "\n2,"b"\n')
    for act in (
        lambda: read_rows([data], WSDM, labelled=True),
        lambda: read_rows([data], WSDM, labelled=False),
        lambda: sample_ids(sample, WSDM),
        lambda: check_submission(sample, sample, WSDM),
        lambda: read_scores(sample, WSDM, foreign=True),
        lambda: read_raw(data),
        lambda: read_folds(data, pl.DataFrame({"id": ["1"]}), n=2),
    ):
        with pytest.raises(PairclfError, match="line 2, character"):
            act()


def test_a_source_says_that_its_quotes_are_escaped(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_bytes(BACKSLASH)
    source = Source(files=[data], escape="backslash")
    whole = read_rows([source], WSDM, labelled=True)
    assert whole["prompt"].to_list() == [['say "hi"'], ["p"]]
    assert whole["response_b"].to_list() == [["b"], ["b"]]
    assert pl.concat(scan_rows([source], WSDM, labelled=True, size=1)).equals(whole)
    data.write_bytes(BACKSLASH.replace(b"say", b"C:\\temp"))
    with pytest.raises(DataError, match=r"(?s)line 2, character 6: a backslash before 't'.*leave `escape` out"):
        read_rows([source], WSDM, labelled=True)
    other = data.with_suffix(".parquet")
    whole.write_parquet(other)
    with pytest.raises(DataError, match="escape"):
        read_rows([Source(files=[other], escape="backslash")], WSDM, labelled=True)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, suffix: str) -> None:
    data = tmp_path / f"data{suffix}"
    write_rows(data, pl.DataFrame({"id": ["1", "2"], **dict.fromkeys(WSDM.fields, [["a"]] * 2), **LABELLED}), WSDM)
    chunks = read_file(data, rows=None, lossy=False, size=1)
    next(chunks)
    write_rows(data, pl.DataFrame({"id": ["3", "4"], **dict.fromkeys(WSDM.fields, [["a"]] * 2), **LABELLED}), WSDM)
    with pytest.raises(DataError, match="changed while it was read"):
        list(chunks)
