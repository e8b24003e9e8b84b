"""The report: what it says, what it lets through, and what `push` must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from support.kernels import make_report
from support.records import make_build

from pairclf.errors import PackagingError
from pairclf.packaging.build_record import own_note, write_build
from pairclf.rehearsal.report import (
    Parity,
    Projection,
    RehearsalReports,
    ScoredRows,
    read_passed,
    read_report,
    write_report,
)


@pytest.fixture
def build(tmp_path: Path) -> Path:
    write_build(tmp_path, make_build())
    return tmp_path


def render(reports: RehearsalReports, width: int = 160) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(reports.render())
    return captured.get()


def test_table_shows_limits_and_shares() -> None:
    lines = {line.split("  ")[0]: line for line in render(RehearsalReports([make_report()])).splitlines()}
    assert "324.0 s of 9 h 00 min" in lines["the kernel"]
    assert lines["the kernel"].endswith("1%")
    assert "4 h 15 min of 8 h 30 min" in lines["25,000 rows on 2 x Tesla T4"]
    assert lines["25,000 rows on 2 x Tesla T4"].endswith("50%")
    assert lines["memory"].endswith("10%")
    assert "39 in full, 1 in one order, 0 prior" in lines["rows scored"]
    assert "passed" in lines["verdict"]


def test_nothing_wraps_in_80_columns() -> None:
    """The longest that sandboxes, clocks and faults say."""
    full = make_report(
        rows=25_000, python="3.12.13", network="guard on Python's sockets (Permission denied)", speed=123.4,
        input="no permission to write (Permission denied)", working="file system of its own",
        seconds={"input": 1.0, "image": 100.0, "forecast": 2.0, "cell predict": 12345.6},
        parity=[Parity(bundle="gemma2-tiny-01234567", rows=4, difference=1e-7, tolerance=1e-5)],
        scored=ScoredRows(both_orders=25_000, one_order=0, prior=0),
        projections=[
            Projection(machine=machine, rows=25_000, predict=15_000.0, rest=300.0, source="", judged=True, at_most=most)
            for machine, most in (("a machine like this", True), ("2 x Tesla T4", False))
        ],
    )  # fmt: skip
    struck = [
        make_report(fault="missing-model", expected="first cell fails", affected=["model.safetensors"],
                    scored=full.scored, rows=25_000, submission={"rows": 25_000, "means": {}}, passed=True),
        make_report(fault="kill", expected="the same scores", affected=["worker", "predict"], passed=True),
    ]  # fmt: skip
    lines = render(RehearsalReports([full, *struck]), 80).splitlines()
    assert sum(line.startswith(("missing-model", "kill", "nothing")) for line in lines) == 3
    assert len(lines) == len(render(RehearsalReports([full, *struck]), 300).splitlines())


def test_several_runs_have_a_line_each() -> None:
    bad = make_report(fault="corrupt-bundle", expected="the first cell fails", passed=False, problems=["it went on"])
    shown = render(RehearsalReports([make_report(fault="kill", expected="a valid submission"), bad]))
    assert shown.index("Rehearsal of a-notebook.ipynb: corrupt-bundle") < shown.index("Faults")
    assert "Rehearsal of a-notebook.ipynb: kill" not in shown, "of what passed a line is enough"
    assert not RehearsalReports([make_report(), bad]).passed


def test_report_is_read_as_it_was_written(build: Path) -> None:
    report = make_report()
    write_report(build / "rehearsal", report)
    assert read_passed(build) == report
    assert read_report(build / "rehearsal" / "report.json") == report


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"build": "c" * 64}, r"never rehearsed on this machine as it is now \(build aaaaaaaaaaaa\)"),
        ({"passed": False, "problems": ["no row was scored"]}, r"did not pass:\n  no row was scored"),
        ({"scored": ScoredRows(both_orders=38, one_order=1, prior=1)}, "scored 39 of 40 rows"),
        ({"scored": None}, "scored 0 of 40 rows"),
        ({"submission": {"rows": 3, "means": {}}}, "of 40 rows"),
        ({"rows": 0}, "of 0 rows"),
        ({"parity": []}, r"did not prove the logits of \['fold0-01234567'\]"),
        (
            {"parity": [Parity(bundle="fold0-01234567", rows=4, difference=0.5, tolerance=1e-5)]},
            "did not prove the logits",
        ),
        ({"parity": [Parity(bundle="another", rows=4, difference=0.0, tolerance=1e-5)]}, "did not prove the logits"),
    ],
)
def test_nothing_else_is_let_through(build: Path, changes: dict[str, object], says: str) -> None:
    write_report(build / "rehearsal", make_report(**changes))
    with pytest.raises(PackagingError, match=says):
        read_passed(build)


@pytest.mark.parametrize("changes", [{"fault": "kill"}, {"rerun": False}, {"speed": 60.0}])
def test_faults_and_trials_alone_are_not_let_through(build: Path, changes: dict[str, object]) -> None:
    report = make_report(**changes)
    write_report(build / "rehearsal", report)
    with pytest.raises(PackagingError, match=r"was never rehearsed[\s\S]*without --commit"):
        read_passed(build)
    write_report(build / "rehearsal", make_report())
    own_note("rehearsals", report.build).write_text(report.model_dump_json())
    with pytest.raises(PackagingError, match="not of a hidden rerun without faults"):
        read_passed(build)


def test_changed_report_is_refused(build: Path) -> None:
    write_report(build / "rehearsal", make_report())
    path = own_note("rehearsals", "a" * 64)
    path.write_text(path.read_text()[:-10])
    with pytest.raises(PackagingError, match="is not JSON"):
        read_passed(build)
    path.write_text(json.dumps({"passed": True}))
    with pytest.raises(Exception, match="settings can't be used"):
        read_passed(build)


def test_a_report_that_came_with_the_package_is_none(build: Path) -> None:
    """Whoever made the package can have written it; what counts is what this machine rehearsed."""
    write_report(build / "rehearsal", make_report())
    own_note("rehearsals", "a" * 64).unlink()
    with pytest.raises(PackagingError, match=r"report\.json in it does not count[\s\S]*pairclf rehearse"):
        read_passed(build)


def test_reports_of_this_machine_are_its_users_alone(build: Path) -> None:
    write_report(build / "rehearsal", make_report())
    path = own_note("rehearsals", "a" * 64)
    assert [one.stat().st_mode & 0o777 for one in (path.parent, path)] == [0o700, 0o600]
