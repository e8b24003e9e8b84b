"""What is odd about the rows: for each rule how many, which ids, and what is done about it. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
from rich.table import Table

from pairclf.console import table
from pairclf.data.folds import prompt_groups
from pairclf.data.tables import REPLACEMENT
from pairclf.files import write_json
from pairclf.task import Task

IDS_KEPT = 10

_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"  # but not tab, line feed and carriage return
_TURN = pl.element()


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule and the rows that it met.

    Attributes:
        rule: what these rows have in common.
        count: how many there are.
        ids: the first ten of them, in the order of the file.
        action: what is done about them.
    """

    rule: str
    count: int
    ids: tuple[str, ...]
    action: str


def audit(frame: pl.DataFrame, task: Task) -> list[Finding]:
    """Every rule over a canonical table, those that met no row included (their count is 0).

    Rules about sides and mirrors need a task with a swap, rules about labels a labelled table; others are left out.
    """
    marked = frame.select("id", "target", *task.fields, prompt_groups(frame, task).alias("group"))
    marked = marked.with_columns(_pair_key(task.fields).alias("pair"))
    rules = [*_text_rules(task.fields), *_repeat_rules(frame["target"].null_count() < len(frame))]
    if task.swap_fields is not None:
        marked = marked.with_columns(_pair_key(tuple(task.swapped_fields.values())).alias("mirror"))
        rules += _side_rules(task, *task.swap_fields)
    found = marked.select(met.fill_null(value=False).alias(rule) for rule, met, _ in rules)
    ids = frame["id"]
    findings = []
    for rule, _, action in rules:
        rows = ids.filter(found[rule])
        findings.append(Finding(rule, len(rows), tuple(rows.head(IDS_KEPT)), action))
    return findings


_Rule = tuple[str, pl.Expr, str]


def _pair_key(fields: Sequence[str]) -> pl.Expr:
    """A 64-bit hash of the fields' turns, read in this order: equal for equal texts."""
    return pl.concat_list(pl.col(name).hash() for name in fields).hash()


def _any_turn(fields: Sequence[str], met: pl.Expr) -> pl.Expr:
    return pl.any_horizontal(pl.col(name).list.eval(met).list.any() for name in fields)


def _without_text(name: str) -> pl.Expr:
    blank = _TURN.is_null() | (_TURN.str.strip_chars() == "")
    return pl.col(name).list.eval(blank).list.all()  # true of no turns at all


def _text_rules(fields: Sequence[str]) -> list[_Rule]:
    first = fields[0]
    return [
        ("null turns", _any_turn(fields, _TURN.is_null()), "kept; read as empty"),
        ("empty turns", _any_turn(fields, _TURN.str.strip_chars() == ""), "kept"),
        (f"empty {first}", _without_text(first), "kept; each is a group of its own in the folds"),
        ("control characters", _any_turn(fields, _TURN.str.contains(_CONTROL)), "kept"),
        (
            "replacement characters",
            _any_turn(fields, _TURN.str.contains(REPLACEMENT, literal=True)),
            "kept; half a surrogate pair was replaced when the file was read, or before",
        ),
    ]


def _repeat_rules(labelled: bool) -> list[_Rule]:
    pair, group = pl.col("pair"), pl.col("group")
    rules = [("prompt in several rows", group.is_duplicated(), "kept; they share a fold")]
    if labelled:
        verdicts = pl.col("target").n_unique().over("pair")
        rules += [
            ("same row again", pl.struct("pair", "target").is_duplicated(), "kept; each counts"),
            ("same pair, other label", pair.is_duplicated() & (verdicts > 1), "kept; people disagree"),
        ]
    else:
        rules.append(("same row again", pair.is_duplicated(), "kept; each is scored"))
    return rules


def _side_rules(task: Task, a: str, b: str) -> list[_Rule]:
    """Rules about the two sides `a` and `b` that a swap exchanges."""
    empty_a, empty_b = _without_text(a), _without_text(b)
    alike = pl.col(a) == pl.col(b)
    places = [task.classes.index(name) for name in task.swap_classes or ()]
    won = pl.any_horizontal(pl.col("target").list.get(place) > 0.5 for place in places)
    turns = [pl.col(name).list.len() for name in task.fields]
    mirrored = pl.col("mirror").is_in(pl.col("pair").implode()) & (pl.col("pair") != pl.col("mirror"))
    return [
        ("one side empty", empty_a ^ empty_b, "kept"),
        ("both sides empty", empty_a & empty_b, "kept"),
        ("identical sides, with a winner", alike & won, "kept; no text tells who won"),
        ("identical sides, without a winner", alike & ~won.fill_null(value=False), "kept"),
        ("numbers of turns differ", pl.any_horizontal(count != turns[0] for count in turns[1:]), "kept"),
        ("same pair mirrored", mirrored, "kept; they share a fold"),
    ]


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table; rules that met no row stand in one line at the end."""
    made = table("Audit", "rule", "rows", "first ids", "what is done")
    for column in made.columns[2:]:
        column.justify = "left"
    for finding in findings:
        if finding.count:
            shown = (name if len(name) <= 12 else f"{name[:11]}…" for name in finding.ids[:2])
            made.add_row(finding.rule, f"{finding.count:,}", ", ".join(shown), finding.action)
    clean = [finding.rule for finding in findings if not finding.count]
    if clean:
        made.caption, made.caption_justify = f"no row: {', '.join(clean)}", "left"
    return made


def write_audit(path: Path, findings: Sequence[Finding]) -> None:
    """Write the findings as a JSON list, atomically."""
    write_json(path, [asdict(finding) for finding in findings])
