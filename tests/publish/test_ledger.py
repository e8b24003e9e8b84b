from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console
from support.records import BOARD
from support.records import ledger_row as row

from pairclf.errors import ConfigError, PackagingError
from pairclf.publish.ledger import ForecastIntervals, add_forecasts, record, refresh, render, rows, update, write_page


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "ledger.jsonl"


def shown(path: Path, width: int = 200) -> str:
    console = Console(width=width, record=True, file=(path.parent / "shown.txt").open("w"))
    console.print(render(path))
    return console.export_text()


def test_lines_come_back_as_they_went_and_open_with_polars(ledger: Path) -> None:
    written = [row(0, public=0.98), row(1, oof=None), row(2, private=1.0)]
    for one in written:
        record(ledger, one)
    assert rows(ledger) == written
    frame = pl.read_ndjson(ledger)
    assert frame["submission"].to_list() == [0, 1, 2]
    assert frame["out_of_fold"].to_list() == [0.95, None, 0.95]
    assert frame["folds"].struct.field("1").to_list() == [None, None, 0.91]
    record(ledger, written[0])
    assert len(rows(ledger)) == 3


def test_lines_of_many_threads_all_stand(ledger: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: record(ledger, row(number)), range(40)))
    assert sorted(one.submission for one in rows(ledger)) == list(range(40))


def test_score_is_written_once_it_is_known_and_not_lost_again(ledger: Path) -> None:
    record(ledger, row(1))
    update(ledger, 1, {"status": "COMPLETE", "publicScore": "0.97", "privateScore": ""})
    update(ledger, 1, {"status": "COMPLETE", "publicScore": "", "privateScore": "0.98"})
    update(ledger, 9, {"status": "COMPLETE", "publicScore": "0.1"})
    assert [(one.status, one.public, one.private) for one in rows(ledger)] == [("COMPLETE", 0.97, 0.98)]


def test_broken_line_is_named(ledger: Path) -> None:
    record(ledger, row(1))
    with ledger.open("a", encoding="utf-8") as stream:
        stream.write("{half a li")
    with pytest.raises(PackagingError, match="line 2"):
        rows(ledger)
    ledger.write_text('{"when": "today"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1"):
        rows(ledger)


def test_table_says_how_out_of_fold_and_leaderboard_go_together(ledger: Path) -> None:
    for number, (oof, public) in enumerate([(0.90, 0.94), (0.92, 0.95), (0.95, 0.99), (0.93, 0.96)]):
        record(ledger, row(number, oof=oof, public=public))
    text = shown(ledger)
    line = next(line for line in text.splitlines() if line.startswith(f"{BOARD}, public"))
    assert line.split()[1:] == ["public", "4", "0.964", "1.000", "+0.03500"]
    line = next(line for line in text.splitlines() if line.startswith(f"{BOARD}, private"))
    assert line.split()[2:5] == ["0", "not", "enough"]
    assert "run 3" in text
    assert "5ea15ea1" in text


def test_forecasts_go_to_their_submissions_and_scores_in_them_are_counted(ledger: Path) -> None:
    """A run's forecast goes to submissions of any of its bundles, a blend's to those of all of its own."""
    of_run = ForecastIntervals(level=0.9, public=(0.9, 1.0), private=(0.93, 0.97))
    of_blend = ForecastIntervals(level=0.9, public=(0.8, 0.9), private=(0.83, 0.87))
    record(ledger, row(1, bundles=["a"], public=0.95, private=0.98))
    record(ledger, row(2, bundles=["a", "b"], public=0.9))
    record(ledger, row(3, bundles=["a", "b", "x", "y"], public=0.9))
    record(ledger, row(4, bundles=["x"], public=0.9))
    record(ledger, row(5, bundles=[], public=0.9))
    assert "Forecasts" not in shown(ledger)
    assert add_forecasts(ledger, [(["a", "b", "c"], False, of_run), (["y", "x", "b", "a"], True, of_blend)]) == 3
    assert [entry.forecast for entry in rows(ledger)] == [of_run, of_run, of_blend, None, None]
    text = shown(ledger)
    assert "3 of 4 real scores lay in their 90% interval" in text
    assert "0.9300 to 0.9700" in text


def test_table_fits_a_narrow_terminal(ledger: Path) -> None:
    usual = row(2, public=0.98765, private=1.01234)
    usual.folds = {str(fold): 0.88 + fold / 130 for fold in range(5)}
    usual.bundles, usual.message, usual.seconds = ["5ea1" * 16] * 5, "five [folds]", 4.2 * 3600
    record(ledger, usual)
    lines = [" ".join(line.split()) for line in shown(ledger, 80).splitlines()]
    assert "2026-01-02 03:04 0.88-0.91 (5) 0.95000 0.98765 1.01234 4:12 5ea15ea1 +4" in lines
    assert "demo/gemma2-tiny five [folds]" in lines


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_ledger_without_submissions_says_so(
    ledger: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.parent.mkdir()
    if content is not None:
        ledger.write_text(content)
    assert "no submission yet" in shown(ledger)
    refresh(ledger)
    assert "no submission yet" in capsys.readouterr().err


def test_line_of_another_file_is_told_as_such(ledger: Path) -> None:
    ledger.parent.mkdir()
    ledger.write_text('{"step": 1, "loss": 0.9}\n')
    with pytest.raises(PackagingError, match=r"has loss, step, which no submission has") as caught:
        rows(ledger)
    assert "nearest" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([(0.90, 0.99), (0.92, 0.97), (0.95, 0.90)], ["3", "-0.981", "-1.000", "+0.03000"]),
        ([(0.95, 0.90)] * 3, ["3", "all", "equal", "all", "equal", "-0.05000"]),
        ([(0.90, 0.94), (0.92, 0.95)], ["2", "not", "enough", "not", "enough", "+0.03500"]),
    ],
    ids=["turned around", "equal", "too few"],
)
def test_agreement_of_out_of_fold_and_leaderboard(
    ledger: Path, pairs: list[tuple[float, float]], says: list[str]
) -> None:
    for number, (oof, public) in enumerate(pairs):
        record(ledger, row(number, oof=oof, public=public))
    line = next(line for line in shown(ledger).splitlines() if line.startswith(f"{BOARD}, public"))
    assert line.split()[2:] == says


def test_competitions_are_not_mixed(ledger: Path) -> None:
    for number, (oof, public) in enumerate([(0.90, 0.94), (0.92, 0.95), (0.95, 0.99)]):
        record(ledger, row(number, oof=oof, public=public))
        record(ledger, row(10 + number, oof=1 - oof, public=0.7, competition="wsdm-cup"))
    lines = [line.split() for line in shown(ledger).splitlines()]
    assert ["lmsys-chatbot-arena,", "public", "3", "0.976", "1.000", "+0.03667"] in lines
    assert any(line[:3] == ["wsdm-cup,", "public", "3"] and line[3:5] == ["all", "equal"] for line in lines)


def test_plot_needs_no_network(ledger: Path, tmp_path: Path) -> None:
    for number in range(3):
        record(ledger, row(number, oof=0.9 + number / 100, public=0.95 + number / 100, private=0.96))
    assert write_page(ledger, tmp_path / "ledger.html") == 6
    page = (tmp_path / "ledger.html").read_text(encoding="utf-8")
    assert "gemma2-tiny: run 2" in page
    assert page.count("<circle") == 6
    assert "+0.05000" in page, "the gaps of the table"
    assert ">0.905</text>" in page, "each axis shows its own scores"


@pytest.mark.parametrize(("public", "says"), [(0.95, "wrote "), (None, "nothing to plot in ")])
def test_an_empty_plot_is_said(
    ledger: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]], public: float | None, says: str
) -> None:
    record(ledger, row(0, public=public))
    code, text = cli("ledger", "--ledger", ledger, "--plot", tmp_path / "plot.html")
    assert (code, says in text) == (0, True)
    empty = "no submission has both an out-of-fold and a leaderboard score yet"
    assert (empty in text) == (empty in (tmp_path / "plot.html").read_text(encoding="utf-8")) == (public is None)
