"""The rules: each meets the rows that it is about and no other, and does what it says; and `pairclf check`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests_support import strange_file
from typer.testing import CliRunner

from pairclf.cli import app
from pairclf.cli.options import repeat_option
from pairclf.config import Config, Rules, Source, resolve
from pairclf.data.audit import IDS_KEPT, audit, clean, exclude_overlap, legal_actions, render, write_audit
from pairclf.data.formats import Flaw
from pairclf.data.rows import read_rows, to_rows
from pairclf.errors import DataError
from pairclf.task import LMSYS, WSDM, Task

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"

A, B, TIE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]

Turns = list[str | None]
Cells = tuple[str, Turns, Turns, Turns, list[float] | None]
SINGLE = Task(name="single", fields=("prompt",), classes=("bad", "good"))
IDS = ("missing_id", "duplicate_id")


def canonical(rows: list[Cells], flaws: dict[str, Flaw] | None = None, files: list[str] | None = None) -> pl.DataFrame:
    """A canonical table; flaws by id, files by row."""
    ids, prompts, firsts, seconds, targets = zip(*rows, strict=True)
    columns: dict[str, Any] = {
        "id": ids,
        "prompt": prompts,
        "response_a": firsts,
        "response_b": seconds,
        "target": targets,
        "weight": [1.0] * len(ids),
        "file": files or ["rows.csv"] * len(ids),
        "flaws": [int((flaws or {}).get(row_id, 0)) for row_id in ids],
        "train_only": [False] * len(ids),
    }
    kinds = {**dict.fromkeys(LMSYS.fields, pl.List(pl.String)), "target": pl.List(pl.Float64), "flaws": pl.UInt32}
    return pl.DataFrame(columns, schema_overrides=kinds)


def met(frame: pl.DataFrame, task: Task = LMSYS, *, labelled: bool = True) -> dict[str, set[str]]:
    findings = audit(frame, task, Rules(), labelled=labelled)
    return {finding.rule: set(finding.ids) for finding in findings if finding.count}


SOUND: list[Cells] = [("s", ["p1"], ["x\n\t"], ["y"], A), ("t", ["p2", "q2"], ["x", "y"], ["y", "x"], TIE)]

TABLES: dict[str, pl.DataFrame] = {
    "missing_id": canonical([*SOUND, ("row 3", ["p"], ["x"], ["y"], A)], {"row 3": Flaw.MISSING_ID}),
    "duplicate_id": canonical([*SOUND, ("d", ["p"], ["x"], ["y"], A), ("d", ["q"], ["x"], ["y"], A)]),
    "bad_label": canonical([*SOUND, ("odd", ["p"], ["x"], ["y"], None)], {"odd": Flaw.BAD_LABEL}),
    "undecodable": canonical([*SOUND, ("odd", ["[p"], ["x"], ["y"], A)], {"odd": Flaw.UNDECODABLE}),
    "missing_cell": canonical([*SOUND, ("odd", ["p"], ["x"], [None], A)], {"odd": Flaw.MISSING_CELL}),
    "null_literal": canonical([*SOUND, ("odd", ["p"], ["x"], [None], A)], {"odd": Flaw.NULL_LITERAL}),
    "null_list": canonical([*SOUND, ("odd", ["p"], ["x"], [None], A)], {"odd": Flaw.NULL_LIST}),
    "null_turn": canonical([*SOUND, ("odd", ["p", "q"], ["x", None], ["y", "z"], A)]),
    "no_turns": canonical([*SOUND, ("odd", ["p"], ["x"], [], A)]),
    "empty_turn": canonical([*SOUND, ("odd", ["p", "q"], ["x", " \n"], ["y", "z"], A)]),
    "empty_prompt": canonical([*SOUND, ("odd", [None, ""], ["x", "y"], ["y", "z"], A)]),
    "one_side_empty": canonical([*SOUND, ("odd", ["p"], ["x"], [""], A)]),
    "both_sides_empty": canonical([*SOUND, ("odd", ["p"], [" "], [""], A)]),
    "identical_with_winner": canonical([*SOUND, ("odd", ["p"], ["x"], ["x"], [0.75, 0.05, 0.2])]),
    "identical_without_winner": canonical([*SOUND, ("odd", ["p"], ["x"], ["x"], TIE)]),
    "surrogate": canonical([*SOUND, ("odd", ["p\ufffd"], ["x"], ["y"], A)], {"odd": Flaw.SURROGATE}),
    "control_character": canonical([*SOUND, ("odd", ["p"], ["\x00x\x7f"], ["y"], A)], {"odd": Flaw.CONTROL_CHARACTER}),
    "turn_counts_differ": canonical([*SOUND, ("odd", ["p"], ["x"], ["y", "z"], A)]),
    "duplicate_row": canonical([*SOUND, ("odd", *SOUND[0][1:])]),
    "conflicting_label": canonical([*SOUND, ("odd1", ["p"], ["x"], ["y"], A), ("odd2", ["p"], ["x"], ["y"], TIE)]),
    "mirrored_pair": canonical([*SOUND, ("odd", ["p1"], ["y"], ["x\n\t"], B)]),
    "prompt_overlap": canonical([*SOUND, ("odd", [" P1"], ["other"], ["words"], A)], files=["1", "1", "2"]),
}
"""For each rule a table in which it meets the rows after the two sound ones (`duplicate_id`: the last alone)."""

ALSO = {  # what else is true of these rows
    "missing_cell": {"one_side_empty"},
    "null_literal": {"one_side_empty"},
    "null_list": {"one_side_empty"},
    "no_turns": {"one_side_empty", "turn_counts_differ"},
    "empty_prompt": {"empty_turn", "null_turn"},
    "one_side_empty": {"empty_turn"},
    "both_sides_empty": {"empty_turn"},
}


def odd_ids(rule: str) -> list[str]:
    return TABLES[rule]["id"].to_list()[3 if rule == "duplicate_id" else 2 :]


def test_every_rule_has_its_table() -> None:
    assert list(TABLES) == list(Rules.model_fields)


@pytest.mark.parametrize("rule", TABLES)
def test_each_rule_meets_its_rows(rule: str) -> None:
    found = met(TABLES[rule])
    assert set(found) == {rule} | ALSO.get(rule, set())
    assert found[rule] == set(odd_ids(rule))


CASES = [(rule, action) for rule in TABLES for action in legal_actions(rule)]


@pytest.mark.parametrize(("rule", "action"), CASES)
def test_training_rows(rule: str, action: str) -> None:
    frame, rules = TABLES[rule], Rules(**{rule: action})  # type: ignore[arg-type]
    if action == "error":
        with pytest.raises(DataError, match=f"data.rules.{rule}=") as caught:
            clean(frame, LMSYS, rules, labelled=True)
        assert list(caught.value.rows) == odd_ids(rule)
        assert caught.value.where == ", ".join(frame["file"].unique(maintain_order=True))
        return
    cleaned, findings = clean(frame, LMSYS, rules, labelled=True)
    one = next(finding for finding in findings if finding.rule == rule)
    assert (one.count, list(one.ids), one.action) == (len(odd_ids(rule)), odd_ids(rule), action)
    assert cleaned.head(2).equals(frame.head(2))
    if action == "keep":
        assert cleaned.equals(frame)
    elif action == "drop":
        assert cleaned.equals(frame.head(len(frame) - one.count))
    else:
        assert cleaned.drop("flaws").rows()[2:] == FIXED[rule]
        assert cleaned["flaws"].to_list() == [0] * len(frame)


def rows_of(rule: str, **changes: list[Any]) -> list[tuple[Any, ...]]:
    """The odd rows as they are, but for some columns."""
    odd = TABLES[rule].drop("flaws")[2:]
    return odd.with_columns(pl.Series(name, cells, dtype=odd.schema[name]) for name, cells in changes.items()).rows()


FIXED = {
    "missing_id": rows_of("missing_id"),
    "duplicate_id": rows_of("duplicate_id", id=["d", "d#2"]),
    "undecodable": rows_of("undecodable"),
    "surrogate": rows_of("surrogate"),
    "control_character": rows_of("control_character", response_a=[["x"]]),
    "identical_with_winner": rows_of("identical_with_winner", target=[[0.4, 0.4, 0.2]]),
    "conflicting_label": rows_of("conflicting_label", target=[[0.5, 0.0, 0.5]] * 2),
}


@pytest.mark.parametrize(("rule", "action"), CASES)
def test_test_rows_are_repaired_or_kept(rule: str, action: str) -> None:
    frame = TABLES[rule].with_columns(target=pl.lit(None, dtype=pl.List(pl.Float64)))
    rules = Rules(**{rule: action})  # type: ignore[arg-type]
    if rule in IDS:
        with pytest.raises(DataError, match="give every row an id of its own"):
            clean(frame, LMSYS, rules, labelled=False)
        return
    cleaned, findings = clean(frame, LMSYS, rules, labelled=False)
    assert cleaned["id"].to_list() == frame["id"].to_list()
    assert {finding.action for finding in findings if finding.rule not in IDS} <= {"keep", "fix"}
    assert not {"bad_label", "conflicting_label", "identical_with_winner"} & {finding.rule for finding in findings}
    if rule == "control_character":
        assert cleaned["response_a"].to_list()[2] == (["\x00x\x7f"] if action == "keep" else ["x"])


def test_all_that_is_wrong_is_said_at_once() -> None:
    flaws = {"l": Flaw.BAD_LABEL, "u": Flaw.UNDECODABLE}
    frame = canonical([*SOUND, ("l", ["p"], ["x"], ["y"], None), ("u", ["q"], ["x"], ["y"], A), SOUND[0]], flaws)
    with pytest.raises(DataError) as caught:
        clean(frame, LMSYS, Rules(mirrored_pair="error"), labelled=True)
    message = str(caught.value)
    assert message.startswith("3 things are wrong")
    for part in (
        "duplicate_id",
        "bad_label",
        "undecodable",
        "data.rules.undecodable=fix (or drop)",
        "multi_turn=false",
    ):
        assert part in message


def test_a_row_that_two_rules_drop_goes_once() -> None:
    frame = canonical([*SOUND, ("odd", ["p"], [], [" "], A)])
    rules = Rules(no_turns="drop", both_sides_empty="drop")
    cleaned, findings = clean(frame, LMSYS, rules, labelled=True)
    assert cleaned.equals(frame.head(2))
    assert {finding.rule for finding in findings if finding.count and finding.action == "drop"} == {
        "no_turns",
        "both_sides_empty",
    }


def test_what_is_dropped_first_takes_no_later_row_along() -> None:
    """The second row is the first's repaired text: it stays, though the first, which it repeats, went."""
    rows: list[Cells] = [("a", ["p"], ["x"], ["y"], A), ("b", ["p"], ["x"], ["y"], A), ("c", ["p"], ["x"], ["y"], None)]
    frame = canonical(rows, {"a": Flaw.UNDECODABLE, "c": Flaw.BAD_LABEL})
    rules = Rules(undecodable="drop", duplicate_row="drop", bad_label="drop", conflicting_label="fix")
    cleaned, _ = clean(frame, LMSYS, rules, labelled=True)
    assert cleaned["id"].to_list() == ["b"]
    assert cleaned["target"].to_list() == [A]


def test_new_ids_are_new() -> None:
    frame = canonical([(row_id, [f"p{at}"], ["x"], ["y"], A) for at, row_id in enumerate(["a", "a", "a#2", "a"])])
    cleaned, _ = clean(frame, LMSYS, Rules(duplicate_id="fix"), labelled=True)
    assert cleaned["id"].to_list() == ["a", "a#2", "a#2#2", "a#3"]


def test_turns_are_not_run_together() -> None:
    rows: list[Cells] = [("1", ["a", "b"], ["x"], ["y"], A), ("2", ["a"], ["b", "x"], ["y"], A)]
    assert "duplicate_row" not in met(canonical(rows))


def test_tasks_without_sides_know_no_rules_about_them() -> None:
    frame = canonical([("1", ["p"], ["x"], ["x"], None), ("2", ["p"], ["x"], ["x"], None)])
    assert met(frame, labelled=False) == {"duplicate_row": {"2"}, "identical_without_winner": {"1", "2"}}
    assert met(frame, SINGLE, labelled=False) == {"duplicate_row": {"2"}}
    rules = {finding.rule for finding in audit(frame, SINGLE, Rules(), labelled=True)}
    sides = {"one_side_empty", "both_sides_empty", "identical_with_winner", "identical_without_winner"}
    assert set(Rules.model_fields) - rules == {*sides, "mirrored_pair", "turn_counts_differ", "null_literal"}


def test_labels_of_several_classes() -> None:
    task = Task(name="toxic", fields=("prompt",), classes=("rude", "threat"), multi_label=True)
    frame = canonical([("1", ["p"], ["x"], ["x"], [1.0, 1.0]), ("2", ["p"], ["x"], ["x"], [1.0, 0.0])])
    cleaned, _ = clean(frame, task, Rules(conflicting_label="fix"), labelled=True)
    assert cleaned["target"].to_list() == [[1.0, 0.5]] * 2


VOTE = st.tuples(st.booleans(), st.sampled_from([A, B, TIE, [0.6, 0.4, 0.0]]), st.floats(0.01, 3))


@given(st.lists(VOTE, min_size=2, max_size=6))
def test_conflicting_labels_become_their_weighted_mean_over_both_orders(votes: list[Any]) -> None:
    """A mirrored row votes with its label mirrored: 1 vote against 3 is a quarter, a weight of 0.01 next to none."""
    swap = LMSYS.swap_target
    rows: list[Cells] = [
        (str(row), ["p"], *((["y"], ["x"]) if mirrored else (["x"], ["y"])), target)
        for row, (mirrored, target, _) in enumerate(votes)
    ]
    other: Cells = ("other", ["q"], ["x"], ["y"], A)
    frame = canonical([*rows, other]).with_columns(weight=pl.Series([*(weight for *_, weight in votes), 1.0]))
    cleaned, _ = clean(frame, LMSYS, Rules(conflicting_label="fix"), labelled=True)
    turned = [swap(target) if mirrored else tuple(target) for mirrored, target, _ in votes]
    mean = np.average(turned, axis=0, weights=[weight for *_, weight in votes])
    for (mirrored, target, _), found in zip(votes, cleaned["target"].to_list(), strict=False):
        wanted = target if len(set(turned)) == 1 else swap(mean) if mirrored else mean
        assert found == pytest.approx(wanted, abs=1e-12)
    assert cleaned["target"].to_list()[-1] == A
    assert clean(cleaned, LMSYS, Rules(conflicting_label="fix"), labelled=True)[0].equals(cleaned)


@pytest.mark.parametrize("folded", [[A], [A, A], [A, B]])
@pytest.mark.parametrize("action", ["fix", "drop"])
def test_train_only_rows_have_no_vote_on_rows_that_may_be_held_out(folded: list[list[float]], action: str) -> None:
    """Validation measures people's labels, with and without pseudo-labels of the same texts."""
    rules = Rules(conflicting_label=action, identical_with_winner="keep")
    rows: list[Cells] = [(str(row), ["p"], ["x"], ["y"], target) for row, target in enumerate(folded)]
    pseudo: list[Cells] = [("mirror", ["p"], ["y"], ["x"], TIE), ("same", ["p"], ["x"], ["y"], [0.2, 0.3, 0.5])]
    others: list[Cells] = [("o1", ["q"], ["x"], ["y"], A), ("o2", ["q"], ["x"], ["y"], B)]
    frame = canonical([*rows, *pseudo, *others])
    with_pseudo = frame.with_columns(train_only=~pl.col("id").is_in([row[0] for row in rows]))
    cleaned, _ = clean(with_pseudo, LMSYS, rules, labelled=True)
    alone, _ = clean(canonical(rows), LMSYS, rules, labelled=True)
    assert cleaned.filter(~pl.col("train_only")).equals(alone)
    labels = dict(cleaned.select("id", "target").rows())
    if action == "fix":
        mean = np.mean(folded, axis=0)
        assert labels["same"] == pytest.approx(mean)
        assert labels["mirror"] == pytest.approx(LMSYS.swap_target(mean))
        assert labels["o1"] == labels["o2"] == [0.5, 0.5, 0.0]  # among themselves they vote
    else:
        assert not {"same", "mirror", "o1", "o2"} & set(labels)


def test_a_mirror_with_the_same_verdict_is_no_conflict() -> None:
    rows: list[Cells] = [("1", ["p"], ["x"], ["y"], A), ("2", ["p"], ["y"], ["x"], B)]
    assert "conflicting_label" not in met(canonical(rows))
    assert met(canonical([*rows, ("3", ["p"], ["y"], ["x"], A)]))["conflicting_label"] == {"1", "2", "3"}


TURN = st.sampled_from([None, "", " ", "x", "y", "\x07", "x\x07"])
FIELD = st.lists(TURN, max_size=2)
ROW = st.tuples(st.sampled_from("abc"), FIELD, FIELD, FIELD, st.sampled_from([A, B, TIE, [0.6, 0.4, 0.0], None]))
RULES = st.fixed_dictionaries(
    {rule: st.sampled_from([action for action in legal_actions(rule) if action != "error"]) for rule in TABLES}
)


@given(st.lists(ROW, min_size=1, max_size=10), RULES, st.lists(st.integers(0, 31), min_size=10, max_size=10))
@settings(max_examples=2 * settings.default.max_examples, deadline=None)
def test_what_is_clean_stays_as_it_is(rows: list[Cells], actions: dict[str, Any], bits: list[int]) -> None:
    frame = canonical(rows, files=["1" if row < 5 else "2" for row in range(len(rows))])
    fields = pl.col(LMSYS.fields)
    marks = {
        Flaw.CONTROL_CHARACTER: pl.any_horizontal(fields.list.eval(pl.element().str.contains("\x07")).list.any()),
        Flaw.BAD_LABEL: pl.col("target").is_null(),
    }
    seen = (met.fill_null(value=False).cast(pl.UInt32) * int(flaw) for flaw, met in marks.items())
    others = pl.Series(bits[: len(rows)], dtype=pl.UInt32) * int(Flaw.UNDECODABLE)  # and the four bits above it
    frame = frame.with_columns(flaws=pl.sum_horizontal(pl.lit(others), *seen))
    rules = Rules(**actions)
    cleaned, _ = clean(frame, LMSYS, rules, labelled=True)
    assert cleaned["id"].is_unique().all()
    assert cleaned["target"].null_count() == 0
    again, findings = clean(cleaned, LMSYS, rules, labelled=True)
    assert again.equals(cleaned)
    assert {finding.rule for finding in findings if finding.count and finding.action in ("fix", "drop")} == set()
    assert frame.filter(pl.col("target").is_not_null()).schema == cleaned.schema


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_first_ids_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    frame = canonical([(f"row-with-a-long-id-{row}", [f"p{row}"], ["x"], ["x"], A) for row in range(25)])
    findings = audit(frame, LMSYS, Rules(), labelled=True)
    one = next(finding for finding in findings if finding.count)
    assert one.count == 25
    assert one.ids == tuple(frame["id"][:IDS_KEPT])
    write_audit(tmp_path / "audit.json", frame, LMSYS, findings)
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["files"] == [{"name": "rows.csv", "rows": 25}]
    assert written["task"] == "lmsys"
    assert [item["rule"] for item in written["findings"]] == [finding.rule for finding in findings]
    screen = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(render(findings))
    shown = screen.export_text()
    assert "25" in shown
    assert "row-with-a-…" in shown
    assert "no row: missing_id" in shown


WORDS = "the quick brown fox jumps over one lazy dog and then sleeps in warm evening sun"


def write_lmsys(path: Path, prompts: list[str], *, labelled: bool = True) -> Path:
    cells = {name: [json.dumps([f"{name} {row}"]) for row in range(len(prompts))] for name in LMSYS.fields}
    cells["prompt"] = [json.dumps([prompt]) for prompt in prompts]
    labels = dict(zip(LMSYS.classes, (["1"], ["0"], ["0"]), strict=True)) if labelled else {}
    columns = {"id": [f"{path.stem}{row}" for row in range(len(prompts))], **cells}
    pl.DataFrame({**columns, **{name: cell * len(prompts) for name, cell in labels.items()}}).write_csv(path)
    return path


def test_overlap_is_excluded_source_by_source(tmp_path: Path) -> None:
    unseen = write_lmsys(tmp_path / "test.csv", [WORDS, "short"], labelled=False)
    main = write_lmsys(tmp_path / "main.csv", ["short", "other"])
    extra = write_lmsys(tmp_path / "extra.csv", [WORDS + " today", "Short ", "unlike anything"])
    test: dict[str, Any] = {"test": {"columns": {"prompt": "question"}}}

    def config(near: float | None = None, **data: Any) -> Config:
        return resolve({"task": "lmsys", "data": data, "folds": {"near_duplicate_threshold": near}})

    sources = [Source(files=[main]), Source(files=[extra], exclude_overlap=[unseen])]
    frame = read_rows(sources, LMSYS, labelled=True)
    kept, findings = exclude_overlap(frame, sources, config(0.8))
    assert kept["id"].to_list() == ["main0", "main1", "extra2"]
    assert [(one.rule, one.count, one.ids) for one in findings] == [("exclude_overlap", 2, ("extra0", "extra1"))]
    kept, _ = exclude_overlap(frame, sources, config())
    assert kept["id"].to_list() == ["main0", "main1", "extra0", "extra2"]
    both = config(train=[str(unseen)], **test)  # a file of data.train has the columns of its source
    assert exclude_overlap(frame, sources, both)[0].equals(kept)
    renamed = tmp_path / "renamed.csv"
    pl.read_csv(unseen).rename({"id": "row", "prompt": "question"}).write_csv(renamed)
    sources[1] = Source(files=[extra], exclude_overlap=[renamed])
    mapped = {"files": str(renamed), "columns": {"id": "row", "prompt": "question", "group": "response_a"}}
    for naming in (config(**test), config(train=[mapped])):
        assert exclude_overlap(frame, sources, naming)[0].equals(kept)


def check(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_check_writes_what_stays(tmp_path: Path) -> None:
    unseen = [write_lmsys(tmp_path / f"{name}.csv", [name], labelled=name != "test") for name in ("test", "train")]
    write_lmsys(tmp_path / "extra1.csv", ["test", "new"])
    write_lmsys(tmp_path / "extra2.csv", ["train", "new"])
    out, kept = tmp_path / "audit.json", tmp_path / "kept.jsonl"
    rule = "data.rules.prompt_overlap=drop"
    code, shown = check(tmp_path / "extra*.csv", "--exclude-overlap", *unseen, rule, "--write", kept, "--out", out)
    assert code == 0, shown
    findings = {one["rule"]: one for one in json.loads(out.read_text())["findings"]}
    assert findings["exclude_overlap"]["ids"] == ["extra10", "extra20"]
    assert findings["prompt_overlap"]["ids"] == ["extra21"]
    assert read_rows([kept], LMSYS, labelled=True)["id"].to_list() == ["extra11"]
    assert check(kept, "--out", out)[0] == 0


def test_check_says_when_nothing_would_run(tmp_path: Path) -> None:
    path = write_lmsys(tmp_path / "train.csv", ["same", "same"])
    kept = tmp_path / "kept.csv"
    wanted = ("--out", tmp_path / "a.json", "--write", kept, "data.rules.turn_counts_differ=error")
    assert check(path, *wanted)[0] == 0
    kept.unlink()
    path.write_text(path.read_text().replace('[""prompt 1""]', "no list").replace("train1", "train0"))
    code, shown = check(path, *wanted)
    assert code == 1
    assert "refused by data.rules.duplicate_id" in shown
    assert json.loads((tmp_path / "a.json").read_text())["findings"][1]["count"] == 1
    assert not kept.exists()
    with pytest.raises(DataError, match="no such file"):
        check(tmp_path / "absent.csv")


def test_check_takes_task_rules_and_sources_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "extra.jsonl").write_text('{"key": "1", "text": "a\\u0007", "label": "yes"}\n', encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        f"task: {{name: toxic, fields: [comment], classes: [fine, toxic]}}\n"
        f"data:\n  folder: {tmp_path}\n  rules: {{control_character: fix}}\n"
        "  train:\n    - files: [extra.*]\n      columns: {id: key, comment: text}\n"
        "      label_column: label\n      labels: {yes: toxic}\n"
    )
    kept = tmp_path / "kept.csv"
    out = ("--out", tmp_path / "audit.json")
    code, shown = check(tmp_path / "extra.jsonl", "--task", tmp_path / "run.yaml", "--write", kept, *out)
    assert code == 0, shown
    assert "control_character" in shown
    assert "fixed: it is removed" in shown
    assert kept.read_text() == "id,comment,fine,toxic\n1,a,0.0,1.0\n"


@pytest.mark.parametrize(
    ("swap", "labels", "absent"),
    [(False, "11", "'0', '2'"), (False, "012", None), (True, "11", "'2'"), (True, "012", None)],
)
def test_check_counts_rows_and_names_labels_that_no_row_has(
    tmp_path: Path, swap: bool, labels: str, absent: str | None
) -> None:
    """A model of one class alone has an accuracy of 1."""
    config = {"name": "t", "fields": ["q", "a", "b"], "classes": [0, 1, 2], "label_column": "y"}
    config |= {"swap_fields": ["a", "b"], "swap_classes": [0, 1]} if swap else {"swap_fields": None}
    (tmp_path / "t.yaml").write_text(json.dumps({"task": config}))
    lines = [f"{row},q{row},x{row},y{row},{label}" for row, label in enumerate(labels)]
    (tmp_path / "t.csv").write_text("\n".join(["id,q,a,b,y", *lines]))
    code, shown = check(tmp_path / "t.csv", "--task", tmp_path / "t.yaml", "--out", tmp_path / "a.json")
    assert code == 0
    assert f"{len(labels)} rows in 1 file" in shown
    assert ("no row has the label" in shown) == bool(absent)
    assert f"no row has the label {absent}: look at task.classes" in shown or not absent


def test_an_option_that_takes_several_names() -> None:
    given = ["x", "--exclude-overlap", "a", "b", "seed=1", "e", "--task", "lmsys", "--exclude-overlap", "c", "--", "d"]
    spelled = [
        "--exclude-overlap",
        "a",
        "--exclude-overlap",
        "b",
        "seed=1",
        "e",
        "--task",
        "lmsys",
        "--exclude-overlap",
        "c",
        "--",
        "d",
    ]
    assert repeat_option("--exclude-overlap", given) == ["x", *spelled]


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_check_of_strange_rows_ends_in_no_traceback(tmp_path: Path, count: int) -> None:
    path = strange_file(tmp_path, count)
    out, kept = ("--out", tmp_path / "audit.json"), tmp_path / "kept.csv"
    code, shown = check(path, *out)
    assert code == 1
    assert "refused by data.rules.missing_id, data.rules.duplicate_id, data.rules.bad_label" in shown
    assert check(path, "--unlabelled", *out)[0] == 1
    mended = {"missing_id": "fix", "duplicate_id": "fix", "undecodable": "fix", "bad_label": "drop"}
    sets = [f"data.rules.{rule}={action}" for rule, action in mended.items()]
    code, shown = check(path, "--write", kept, *sets, *out)
    assert code == 0, shown
    code, shown = check(kept, *out)
    assert code == 0, shown
    rules = Rules(**mended)  # type: ignore[arg-type]
    expected, _ = clean(read_rows([path], LMSYS, labelled=True), LMSYS, rules, labelled=True)
    written = read_rows([kept], LMSYS, labelled=True)
    assert to_rows(written, LMSYS) == to_rows(expected, LMSYS)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize(("name", "task"), [("arena3/train.csv", LMSYS), ("arena2/train.parquet", WSDM)])
def test_clean_keeps_real_data(name: str, task: Task) -> None:
    frame = read_rows([SHARED / name], task, labelled=True)
    cleaned, findings = clean(frame, task, Rules(), labelled=True)
    assert cleaned.equals(frame)
    assert sum(finding.count for finding in findings) > 0


def test_every_rule_stands_in_the_guide_with_its_default() -> None:
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in guide.splitlines() if line.startswith("| `")}
    for rule, field in Rules.model_fields.items():
        cells = [cell.strip() for cell in lines[f"`{rule}`"].strip("|").split("|")]
        assert cells[1] == f"**{field.default}**, " + ", ".join(a for a in legal_actions(rule) if a != field.default)
        assert len(cells[3]) > 20, f"{rule}: say why"
