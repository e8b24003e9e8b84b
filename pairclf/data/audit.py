"""The audit: find the rows that break a rule of `data.rules`, report their ids, and keep, fix or drop them.

The order of the rules is such that no step undoes an earlier one, so that clean rows stay as they are:

1. ids: missing ones, then repeated ones;
2. flaws that the reader found (`flaws`), because texts must be final before they are compared;
3. other labels for the same texts, among the remaining rows;
4. rules about the texts and the label of a row alone;
5. repeated rows, mirrored pairs and prompts of earlier files, among the remaining rows: the first stays.

A row that several rules drop is counted under each of them, except under the rules of 3 and 5, which see the remaining
rows only. Test rows are never dropped: they are repaired if a repair exists, and kept otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import polars as pl
from rich.table import Table

from pairclf.config import Config, Rules, Source
from pairclf.console import console, counted, table
from pairclf.data.duplicates import near_overlap, normalised_prompts
from pairclf.data.folds import same_group
from pairclf.data.formats import CONTROL, Flaw, existing, expand, refuse
from pairclf.data.rows import read_rows
from pairclf.errors import DataError, cut, visible
from pairclf.files import write_json
from pairclf.task import Task

IDS_KEPT = 10
ACROSS_ROWS = ("duplicate_id", "conflicting_label", "duplicate_row", "mirrored_pair", "prompt_overlap")
"""Rules that compare rows; the other rules need one chunk only."""

_TURN = pl.element()


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule and the rows that break it.

    Attributes:
        rule: its name among `Rules`, or `exclude_overlap`.
        count: number of rows.
        ids: the first ten of them, in the order of the file.
        action: keep, fix, drop or error.
        done: the action in words.
    """

    rule: str
    count: int
    ids: tuple[str, ...]
    action: str
    done: str


def audit(frame: pl.DataFrame, task: Task, rules: Rules, *, labelled: bool) -> list[Finding]:
    """The findings of `clean` without a change, for every rule that applies to the task, also those without rows.

    Args:
        frame: canonical table.
        task: rules about sides and mirrors need a swap, `turn_counts_differ` two fields.
        rules: the action of each.
        labelled: training rows; for test rows, rules about labels are left out.
    """
    return _judge(frame, task, rules, labelled).in_order


def clean(frame: pl.DataFrame, task: Task, rules: Rules, *, labelled: bool) -> tuple[pl.DataFrame, list[Finding]]:
    """The remaining rows, repaired, and the findings. Clean rows do not change.

    Raises:
        DataError: rows break rules whose action is `error`; one message lists all of them.
    """
    judge = _judge(frame, task, rules, labelled)
    refuse(judge.problems, ", ".join(frame["file"].unique(maintain_order=True)))
    return judge.frame.filter(judge.stays), judge.in_order


def exclude_overlap(
    frame: pl.DataFrame, sources: Sequence[Source], config: Config, *, labelled: bool = True
) -> tuple[pl.DataFrame, list[Finding]]:
    """Remove the rows of each source that share a group, or (nearly) a prompt, with the files of its `exclude_overlap`.

    Args:
        frame: canonical table of the sources, as `read_rows` has it.
        config: says what shared prompts and groups are (`folds`), and names the columns of the files: those of
            `data.train` for its own, of `data.test` for others. They need no ids, and no column of groups.
        labelled: training rows; test rows are reported and kept.

    Returns:
        The remaining rows; a finding for each list of files.
    """
    findings, near, group = [], config.folds.near_duplicate_threshold, config.folds.group
    for names in dict.fromkeys(tuple(source.exclude_overlap) for source in sources if source.exclude_overlap):
        files = [
            str(path) for source in sources if tuple(source.exclude_overlap) == names for path in expand(source.files)
        ]
        concerned = frame["file"].is_in(files)
        rows = frame.filter(concerned)
        seen = read_rows(_unseen(names, config), config.task, labelled=False, group=group)
        shared = near_overlap(rows, seen, config.task, near) | same_group(rows, seen)
        gone = _mask(concerned.arg_true().filter(shared), len(frame))
        ids = frame["id"].filter(gone)
        action, word = ("drop", "dropped") if labelled else ("keep", "kept")
        or_group = "" if group is None else f", or the {group} of one,"
        done = f"{word}: a prompt (nearly) equal to one{or_group} in {', '.join(map(str, names))}"
        findings.append(Finding("exclude_overlap", len(ids), tuple(ids.head(IDS_KEPT)), action, done))
        frame = frame.filter(~gone) if labelled else frame
    return frame, findings


def _unseen(names: Sequence[Path], config: Config) -> list[Source]:
    """Files of `exclude_overlap` as sources: one that is trained on, too, has the columns of its source."""
    trained = {path: source for source in config.data.sources for path in existing(source.files)}
    read = {*config.task.fields, *(() if config.folds.group is None else ("group",))}
    unseen = []
    for path in expand(names):
        source = trained.get(path, config.data.unlabelled(path))
        own = {name: column for name, column in source.columns.items() if name in read}
        unseen.append(Source(files=[path], columns={**own, "id": None}, escape=source.escape))
    return unseen


# --- judging ---------------------------------------------------------------------------------------------------------


class _Judge:
    """The state of an audit: `frame` with the repairs so far, and `stays`, the mask of rows that no rule dropped."""

    def __init__(self, frame: pl.DataFrame, task: Task, rules: Rules, labelled: bool) -> None:
        self.frame = frame
        self.ids = frame["id"]
        self.task = task
        self.rules = rules
        self.labelled = labelled
        self.stays = pl.repeat(True, len(frame), dtype=pl.Boolean, eager=True)
        self.findings: dict[str, Finding] = {}
        self.problems: list[DataError] = []

    @property
    def in_order(self) -> list[Finding]:
        """The findings in the order of `Rules`."""
        return [self.findings[rule] for rule in Rules.model_fields if rule in self.findings]

    def action(self, rule: str) -> str:
        """The action of a rule; test rows are never dropped or refused."""
        action: str = getattr(self.rules, rule)
        if self.labelled:
            return action
        if rule in ("missing_id", "duplicate_id"):
            return "error"
        if action in ("drop", "error"):
            return "fix" if "fix" in legal_actions(rule) else "keep"
        return action

    def meet(self, rule: str, met: pl.Series) -> bool:
        """Record the rows that break a rule, and drop or refuse them; True if the caller must fix them."""
        action, rows = self.action(rule), self.ids.filter(met)
        self.findings[rule] = Finding(rule, len(rows), tuple(rows.head(IDS_KEPT)), action, _in_words(rule, action))
        if action == "drop":
            self.stays &= ~met
        if action == "error" and len(rows):
            what = f"{rule}: {_clauses(rule)[0]} ({counted(len(rows), 'row')})"
            self.problems.append(DataError(what, rows=rows.to_list(), remedy=self._remedy(rule)))
        return action == "fix" and len(rows) > 0

    def _remedy(self, rule: str) -> str:
        if not self.labelled:
            return "give every row an id of its own: test rows are never dropped, and scores are joined by id"
        first, *others = (action for action in legal_actions(rule) if action != "error")
        more = f" (or {', '.join(others)})" if others else ""
        of_turns = (
            "; plain texts need a task with multi_turn=false; messages (role, content) need known roles, and the two "
            "sides of a row the same questions (docs/data.md)"
        )
        plain = of_turns if rule == "undecodable" and self.task.multi_turn else ""
        return f"mend these rows, or set data.rules.{rule}={first}{more}{plain}"

    def meet_all(self, rules: dict[str, pl.Expr], marks: pl.DataFrame) -> None:
        """`meet` for rules without a fix, in one pass over `marks`."""
        masks = marks.select(met.fill_null(value=False).alias(rule) for rule, met in rules.items())
        for rule in rules:
            self.meet(rule, masks[rule])


def legal_actions(rule: str) -> tuple[str, ...]:
    """The possible actions of a rule."""
    return get_args(Rules.model_fields[rule].annotation)


def _clauses(rule: str) -> list[str]:
    return (Rules.model_fields[rule].description or "").split("; ")


def _in_words(rule: str, action: str) -> str:
    """`dropped: the later rows go`, from the rule's own description."""
    word = {"keep": "kept", "fix": "fixed", "drop": "dropped", "error": "error: nothing runs"}[action]
    return next((word + clause[len(action) :] for clause in _clauses(rule) if clause.startswith(f"{action}:")), word)


def _judge(frame: pl.DataFrame, task: Task, rules: Rules, labelled: bool) -> _Judge:
    judge = _Judge(frame, task, rules, labelled)
    _judge_ids(judge)
    _judge_flaws(judge)
    keys = _pair_keys(judge.frame, task)
    if labelled:
        _judge_conflicts(judge, keys)
    _judge_texts(judge)
    if task.swap_fields is not None:
        _judge_identical(judge, *task.swap_fields)
    _judge_repeats(judge, keys)
    return judge


def _flawed(frame: pl.DataFrame, flaw: Flaw) -> pl.Series:
    return (frame["flaws"] & int(flaw)) != 0


def _without_flaw(frame: pl.DataFrame, flaw: Flaw) -> pl.DataFrame:
    return frame.with_columns(pl.col("flaws") & pl.lit(~int(flaw) & 0xFFFFFFFF, dtype=pl.UInt32))


def _judge_ids(judge: _Judge) -> None:
    missing = _flawed(judge.frame, Flaw.MISSING_ID)
    ids = judge.frame["id"]
    if judge.meet("missing_id", missing):
        judge.frame = _without_flaw(judge.frame, Flaw.MISSING_ID)
    elif missing.any():
        ids = ids.set(missing, None)
    if judge.meet("duplicate_id", _again(ids)):
        while _again(ids).any():  # a#2 may itself stand in the file
            count = pl.int_range(1, pl.len() + 1).over("id")
            numbered = pl.when(count > 1).then(pl.col("id") + "#" + count.cast(pl.String)).otherwise("id")
            ids = ids.to_frame().select(numbered.alias("id")).to_series()
        judge.frame = judge.frame.with_columns(ids.fill_null(judge.frame["id"]))


def _again(values: pl.Series) -> pl.Series:
    """Mask of repeated values; missing values are not repeats."""
    return ~values.is_first_distinct() & values.is_not_null()


def _judge_flaws(judge: _Judge) -> None:
    labels = [Flaw.BAD_LABEL] if judge.labelled else []
    lists = [Flaw.NULL_LITERAL] if judge.task.multi_turn else []
    for flaw in (*labels, Flaw.UNDECODABLE, Flaw.MISSING_CELL, *lists, Flaw.NULL_LIST, Flaw.SURROGATE):
        if judge.meet(str(flaw.name).lower(), _flawed(judge.frame, flaw)):
            judge.frame = _without_flaw(judge.frame, flaw)  # the reader has repaired the text
    met = _flawed(judge.frame, Flaw.CONTROL_CHARACTER)
    if judge.meet("control_character", met):
        fields = pl.col(judge.task.fields)
        cleaned = fields.list.eval(_TURN.str.replace_all(CONTROL, ""))
        repaired = judge.frame.with_columns(pl.when(pl.lit(met)).then(cleaned).otherwise(fields))
        judge.frame = _without_flaw(repaired, Flaw.CONTROL_CHARACTER)


def _pair_keys(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    """`row`, and 64-bit hashes of the fields' turns: `pair` as they stand, `mirror` with the sides exchanged."""
    turns = pl.col(task.fields).list.eval(_TURN.hash())  # polars below 2 hashes no list of texts
    hashes = frame.select(turns).select(pl.all().hash())
    mirrored = list(task.swapped_fields.values())
    return hashes.select(pair=pl.struct(task.fields).hash(), mirror=pl.struct(mirrored).hash()).with_row_index("row")


def _mask(rows: pl.Series, length: int) -> pl.Series:
    return pl.repeat(False, length, dtype=pl.Boolean, eager=True).scatter(rows, True)


def _judge_conflicts(judge: _Judge, keys: pl.DataFrame) -> None:
    """Other labels for the same texts; mirrored rows count with their labels swapped.

    A train_only row does not influence rows that may be held out: it gets the mean of their labels.
    """
    votes = keys.hstack(judge.frame.select("target", "weight", "train_only")).filter(judge.stays)
    votes = votes.with_columns(
        either=pl.min_horizontal("pair", "mirror"), turned=pl.col("pair") > pl.col("mirror")
    ).filter(pl.col("either").is_duplicated() & pl.col("target").is_not_null())
    votes = votes.with_columns(_turned(pl.col("target"), judge.task))
    label, alone = pl.col("target").hash(), pl.col("train_only").all()
    votes = votes.with_columns(
        unlike=label.n_unique().over("either") > 1,
        unlike_folded=label.filter(~pl.col("train_only")).n_unique().over("either") > 1,
        vote=pl.when(pl.col("train_only") & ~alone.over("either")).then(0.0).otherwise("weight"),
    )
    unlike = votes.filter(pl.when("train_only").then("unlike").otherwise(pl.col("unlike_folded")))
    if judge.meet("conflicting_label", _mask(unlike["row"], len(keys))):
        total = pl.col("vote").sum().over("either")
        shares = (
            (pl.col("target").list.get(place) * pl.col("vote")).sum().over("either") / total
            for place in range(len(judge.task.classes))
        )
        means = votes.with_columns(target=pl.concat_list(shares)).join(unlike.select("row"), on="row", how="semi")
        means = means.select("row", mean=_turned(pl.col("target"), judge.task))
        shared = keys.join(means, on="row", how="left", maintain_order="left")["mean"]
        judge.frame = judge.frame.with_columns(target=shared.zip_with(shared.is_not_null(), judge.frame["target"]))


def _turned(target: pl.Expr, task: Task) -> pl.Expr:
    """A target, swapped in the rows that are `turned`; its own inverse."""
    swapped = pl.concat_list(target.list.get(place) for place in task.swapped_columns)
    return pl.when("turned").then(swapped).otherwise(target)


def _judge_texts(judge: _Judge) -> None:
    """Rules about turns without text, in one pass: a turn is true, false (blank) or null."""
    task = judge.task
    marks = judge.frame.select(pl.col(task.fields).list.eval(_TURN.str.contains(r"\S")))
    fields = [pl.col(name).list for name in task.fields]
    counts = [(field.len(), field.eval(_TURN.is_not_null()).list.sum()) for field in fields]
    rules = {
        "null_turn": pl.any_horizontal((some > 0) & (some < count) for count, some in counts),
        "no_turns": pl.any_horizontal(count == 0 for count, _ in counts),
        "empty_turn": pl.any_horizontal(~field.all() for field in fields),
        "empty_prompt": ~fields[0].any(),
    }
    if task.swap_fields is not None:
        empty_a, empty_b = (~pl.col(name).list.any() for name in task.swap_fields)
        rules |= {"one_side_empty": empty_a ^ empty_b, "both_sides_empty": empty_a & empty_b}
    if len(fields) > 1:
        rules["turn_counts_differ"] = pl.any_horizontal(count != counts[0][0] for count, _ in counts[1:])
    judge.meet_all(rules, marks)


def _judge_identical(judge: _Judge, a: str, b: str) -> None:
    """Rules about equal sides. A fixed label, its mean with the swapped one, has no winner: the second rule applies."""
    task = judge.task
    alike = (judge.frame[a] == judge.frame[b]).fill_null(value=False)
    places = [task.classes.index(name) for name in task.swap_classes or ()]
    parts = pl.max_horizontal(pl.col("target").list.get(place) for place in places)
    won = judge.frame.select((parts > 0.5).fill_null(value=False)).to_series()
    if judge.labelled and judge.meet("identical_with_winner", alike & won):
        target = pl.col("target").list
        shared = ((target.get(p) + target.get(q)) / 2 for p, q in enumerate(task.swapped_columns))
        both = pl.when(pl.lit(alike & won)).then(pl.concat_list(shared)).otherwise("target")
        judge.frame = judge.frame.with_columns(both.alias("target"))
        won = won & ~alike
    judge.meet("identical_without_winner", alike & ~won)


def _judge_repeats(judge: _Judge, keys: pl.DataFrame) -> None:
    """Rules about rows that stood before, in this order or another, or whose prompt stood in an earlier file."""
    kept = keys.with_columns(judge.frame["target"], either=pl.min_horizontal("pair", "mirror")).filter(judge.stays)
    repeated = kept.filter(pl.col("either").is_duplicated())
    same = repeated.select(pl.struct("pair", pl.col("target").hash()).hash()).to_series()
    met = {"duplicate_row": repeated["row"].filter(_again(same))}
    if judge.task.swap_fields is not None:
        met["mirrored_pair"] = repeated.filter(pl.col("pair") != pl.col("pair").first().over("either"))["row"]
    met["prompt_overlap"] = _in_earlier_files(judge, kept["row"])
    for rule, rows in met.items():
        judge.meet(rule, _mask(rows, len(keys)))


def _in_earlier_files(judge: _Judge, rows: pl.Series) -> pl.Series:
    """Those of the rows that are left whose prompt stood in an earlier file."""
    left = judge.frame.filter(judge.stays)
    files = left["file"].unique(maintain_order=True)
    if len(files) < 2:
        return rows.head(0)
    number = pl.col("file").replace_strict(files, range(len(files)))
    prompts = left.select("file").with_columns(rows, normalised_prompts(left, judge.task).alias("prompt"))
    return prompts.filter(number > number.min().over("prompt"), pl.col("prompt") != "")["row"]


# --- output to the user ----------------------------------------------------------------------------------------------


def joined(findings: Sequence[Finding]) -> list[Finding]:
    """Join the findings of several chunks to one finding per rule."""
    by_rule: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.rule, finding.action, finding.done)
        before = by_rule.get(key, replace(finding, count=0, ids=()))
        by_rule[key] = replace(finding, count=before.count + finding.count, ids=(*before.ids, *finding.ids)[:IDS_KEPT])
    return list(by_rule.values())


def note_changes(findings: Sequence[Finding]) -> None:
    """Print a line for each rule that changed rows."""
    for finding in findings:
        if finding.count and finding.action in ("fix", "drop"):
            examples = ", ".join(map(visible, finding.ids[:3])) + (" …" if finding.count > 3 else "")
            text = f"note: {finding.rule}: {counted(finding.count, 'row')} {finding.done} ({examples})"
            console.print(text)


def note_absent_classes(frame: pl.DataFrame, task: Task) -> None:
    """Print the classes that no row of a training table has: the scores of the others then say nothing.

    In a pair, the class of one side's victory stands for the other's too: the swapped row has it.
    """
    target = pl.col("target").list
    shares = frame.select(target.get(place).sum().alias(name) for place, name in enumerate(task.classes)).row(0)
    swapped = task.swapped_columns
    if absent := [name for place, name in enumerate(task.classes) if not shares[place] + shares[swapped[place]]]:
        names = cut(", ".join(map(repr, absent)))
        console.print(f"note: no row has the label {names}: look at task.classes, and whether the files are whole")


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table; its caption lists the rules without rows."""
    audit_table = table("Audit", "rule", "rows", "first ids", "what is done")
    for column in audit_table.columns[2:]:
        column.justify = "left"
    for finding in findings:
        if finding.count:
            examples = (name if len(name) <= 12 else f"{name[:11]}…" for name in finding.ids[:2])
            audit_table.add_row(finding.rule, f"{finding.count:,}", visible(", ".join(examples)), finding.done)
    audit_table.show_header = audit_table.row_count > 0
    clean = [finding.rule for finding in findings if not finding.count]
    if clean:
        audit_table.caption, audit_table.caption_justify = f"no row: {', '.join(clean)}", "left"
    return audit_table


def write_audit(path: Path, frame: pl.DataFrame, task: Task, findings: Sequence[Finding]) -> None:
    """Write `files` (name, rows), `task` and `findings` as a JSON object, atomically."""
    files = frame.group_by("file", maintain_order=True).len("rows").rename({"file": "name"})
    records = [asdict(finding) for finding in findings]
    write_json(path, {"files": files.to_dicts(), "task": task.name, "findings": records})
