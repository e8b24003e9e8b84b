"""The audit: each rule meets the rows that it is about, and no other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from pairclf.data.audit import IDS_KEPT, Finding, audit, render, write_audit
from pairclf.data.tables import read_rows
from pairclf.task import LMSYS, Task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

A, B, TIE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)

Cells = tuple[list[str | None], list[str | None], list[str | None], tuple[float, ...] | None]


def canonical(rows: dict[str, Cells]) -> pl.DataFrame:
    prompts, firsts, seconds, targets = zip(*rows.values(), strict=True)
    columns = {"id": list(rows), "prompt": prompts, "response_a": firsts, "response_b": seconds, "target": targets}
    kinds = {**dict.fromkeys(LMSYS.fields, pl.List(pl.String)), "target": pl.List(pl.Float64)}
    return pl.DataFrame(columns, schema_overrides=kinds).with_columns(weight=pl.lit(1.0))


def met(frame: pl.DataFrame, task: Task = LMSYS) -> dict[str, set[str]]:
    return {finding.rule: set(finding.ids) for finding in audit(frame, task) if finding.count}


CLEAN: dict[str, Cells] = {
    "clean": (["p1"], ["x\n\t"], ["y"], A),
    "turns": (["p2", "q2"], ["x", "y"], ["y", "x"], TIE),
}


def test_clean_rows_meet_no_rule() -> None:
    assert met(canonical(CLEAN)) == {}


@pytest.mark.parametrize(
    ("row", "rules"),
    [
        ((["p"], [None], ["y"], A), {"null turns", "one side empty"}),
        ((["p", "q"], ["x", ""], ["y", "z"], A), {"empty turns"}),
        ((["p", "q"], ["x", " \n"], ["y", "z"], A), {"empty turns"}),
        (([], [], ["y"], B), {"empty prompt", "one side empty", "numbers of turns differ"}),
        ((["p"], [""], [" "], A), {"empty turns", "both sides empty"}),
        ((["p"], [], [], A), {"both sides empty", "identical sides, with a winner", "numbers of turns differ"}),
        ((["p"], ["x"], ["x"], B), {"identical sides, with a winner"}),
        ((["p"], ["x"], ["x"], TIE), {"identical sides, without a winner"}),
        ((["p"], ["x\x07"], ["y"], A), {"control characters"}),
        ((["p\ufffd"], ["x"], ["y"], A), {"replacement characters"}),
        ((["p"], ["x"], ["y", "z"], A), {"numbers of turns differ"}),
        (([" P1"], ["other"], ["words"], A), {"prompt in several rows"}),
    ],
)
def test_each_rule_meets_its_rows(row: Cells, rules: set[str]) -> None:
    found = met(canonical({**CLEAN, "odd": row}))
    assert {rule for rule, ids in found.items() if "odd" in ids} == rules
    assert set().union(*found.values()) <= {"odd", "clean"}  # "clean" shares its prompt with the last case


def test_repeated_pairs() -> None:
    rows: dict[str, Cells] = {
        **CLEAN,
        "again": (["p1"], ["x\n\t"], ["y"], A),
        "conflict": (["p2", "q2"], ["x", "y"], ["y", "x"], A),
        "mirror": (["p1"], ["y"], ["x\n\t"], B),
    }
    found = met(canonical(rows))
    assert found["same row again"] == {"clean", "again"}
    assert found["same pair, other label"] == {"turns", "conflict"}
    assert found["same pair mirrored"] == {"clean", "again", "mirror"}
    assert found["prompt in several rows"] == set(rows)


def test_turns_are_not_run_together() -> None:
    rows: dict[str, Cells] = {"1": (["a", "b"], ["x"], ["y"], A), "2": (["a"], ["b", "x"], ["y"], A)}
    assert "same row again" not in met(canonical(rows))


def test_unlabelled_rows_and_a_task_without_swap() -> None:
    frame = canonical({"1": (["p"], ["x"], ["x"], None), "2": (["p"], ["x"], ["x"], None)})
    assert met(frame) == {
        "prompt in several rows": {"1", "2"},
        "same row again": {"1", "2"},
        "identical sides, without a winner": {"1", "2"},
    }
    single = Task(name="single", fields=("prompt",), classes=("bad", "good"))
    assert set(met(frame, single)) == {"prompt in several rows", "same row again"}


def test_the_first_ids_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    frame = canonical({f"row-with-a-long-id-{row}": ([f"p{row}"], ["x"], ["x"], A) for row in range(25)})
    findings = audit(frame, LMSYS)
    one = next(finding for finding in findings if finding.count)
    assert one.count == 25
    assert one.ids == tuple(frame["id"][:IDS_KEPT])
    write_audit(tmp_path / "audit.json", findings)
    written = json.loads((tmp_path / "audit.json").read_text())
    assert [Finding(**{**item, "ids": tuple(item["ids"])}) for item in written] == findings
    screen = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(render(findings))
    shown = screen.export_text()
    assert "25" in shown
    assert "row-with-a-…" in shown
    assert "no row: null turns" in shown


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")
def test_real_data_is_audited() -> None:
    frame = read_rows([SHARED / "arena3" / "train.csv"], LMSYS, labelled=True)
    counts = {finding.rule: finding.count for finding in audit(frame, LMSYS)}
    assert counts["same pair, other label"] > 0
    assert counts["identical sides, without a winner"] > 0
    assert counts["null turns"] == 0
