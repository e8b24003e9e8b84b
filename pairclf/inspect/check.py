"""`check` and `convert`: list the problems in data files and what `data.rules` does about each; write cleaned rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from pairclf.config import Config, Source, load_config, override, resolve
from pairclf.console import console, counted
from pairclf.data.audit import Finding, audit, clean, exclude_overlap, note_absent_classes, note_changes, write_audit
from pairclf.data.formats import column_names, existing, expand
from pairclf.data.preferences import FORMATS, entry, recognise, why_not
from pairclf.data.rows import read_rows, write_rows
from pairclf.errors import ConfigError
from pairclf.files import check_file_target
from pairclf.own_files import or_shipped
from pairclf.task import TASKS, Task


def config_of(task: str, overrides: Sequence[str]) -> Config:
    """The settings of a check: a preset's defaults or those of a config file, with overrides.

    Raises:
        ConfigError: `task` is neither, or a setting can't be used.
    """
    if task in TASKS:
        return override(resolve({"task": task}), overrides)
    if not or_shipped(Path(task)).is_file():
        remedy = f"one of {', '.join(TASKS)}, or the path of a config"
        raise ConfigError(f"--task {task} is no preset and no file", remedy=remedy)
    return load_config(Path(task), overrides)


def check(
    files: Sequence[Path],
    config: Config,
    out: Path,
    *,
    labelled: bool,
    ignore: Sequence[str] = (),
    unseen: Sequence[Path] = (),
    write: Path | None = None,
) -> list[Finding]:
    """Audit files and write the findings as JSON.

    Args:
        files: names or globs. A file of one of the config's sources is read as that source says.
        config: its `task`, `data` and `folds.near_duplicate_threshold` are used.
        out: the JSON file.
        labelled: they are training files.
        ignore: further columns to accept and not read.
        unseen: files that must stay unseen; rows with (nearly) a prompt, or a folds.group, of theirs go.
        write: where to write the rows that stay, if no rule with the action `error` met a row.

    Returns:
        What was excluded, if anything was to be, and a finding a rule.
    """
    named = expand(files)
    written = [out, *([write] if write else [])]
    for path in written:
        check_file_target(path)
    paths = [path.resolve() for path in (*named, *expand(unseen), *written)]
    if overwritten := [path for path in written if paths.count(path.resolve()) > 1]:
        raise ConfigError(f"{overwritten[0]} would be overwritten", remedy="give --out and --write other names")
    sources = _sources(named, config, ignore, unseen, labelled)
    group = config.folds.group
    read = read_rows(sources, config.task, labelled=labelled, group=group)
    console.print(f"{counted(len(read), 'row')} in {counted(len(named), 'file')}")
    if labelled:
        note_absent_classes(read, config.task)
    frame, excluded = exclude_overlap(read, sources, config, labelled=labelled)
    findings = [*excluded, *audit(frame, config.task, config.data.rules, labelled=labelled)]
    write_audit(out, read, config.task, findings)
    if write is not None and not any(refuses(finding) for finding in findings):
        write_rows(write, clean(frame, config.task, config.data.rules, labelled=labelled)[0], config.task, group)
    return findings


def convert(files: Sequence[Path], config: Config, to: Path) -> int:
    """Write files as one with the task's columns, after `data.rules`; returns the number of rows.

    Args:
        files: labelled files or globs; read as `check` reads them.
        config: its `task`, `data` and `folds.group` are used.
        to: .csv, .parquet or .jsonl.

    Raises:
        DataError: a file can't be read, or rows break a rule whose action is `error`.
    """
    named = expand(files)
    check_file_target(to)
    if to.resolve() in {path.resolve() for path in named}:
        raise ConfigError(f"{to} would be overwritten", remedy="give --to another name")
    group = config.folds.group
    read = read_rows(_sources(named, config, [], [], labelled=True), config.task, labelled=True, group=group)
    rows, findings = clean(read, config.task, config.data.rules, labelled=True)
    note_changes(findings)
    write_rows(to, rows, config.task, group)
    return len(rows)


def refuses(finding: Finding) -> bool:
    """Whether this finding stops a training."""
    return finding.action == "error" and finding.count > 0


def refusal(findings: Sequence[Finding], write: Path | None) -> str | None:
    """The reason why a training on these rows would stop, or None."""
    rules = [f"data.rules.{finding.rule}" for finding in findings if refuses(finding)]
    if not rules:
        return None
    unwritten = f"; {write} was not written" if write else ""
    return f"refused by {', '.join(rules)}: training on these rows would stop{unwritten}"


def _sources(
    paths: Sequence[Path], config: Config, ignore: Sequence[str], unseen: Sequence[Path], labelled: bool
) -> list[Source]:
    """The sources of the files: the config's own if it names the file, otherwise one with the task's columns.

    A public preference set is read in its format, and the entry for a config is printed. Test files have the columns
    of `data.test`.
    """
    plain = Source(files=[Path()]) if labelled else config.data.unlabelled(Path())
    plain = plain.model_copy(update={"ignore_columns": config.data.ignore_columns})
    files_by_source = [(source, {path.resolve() for path in existing(source.files)}) for source in config.data.sources]

    def source_of(path: Path) -> Source:
        own = next((source for source, files in files_by_source if path.resolve() in files), None)
        if own or (name := _recognised(path, config)) is None:
            return own or plain
        return plain.model_copy(update={"format": name, "id_prefix": f"{name}-"})

    sources = []
    for source, group in groupby(paths, source_of):
        ignored = source.ignore_columns if source.ignore_columns == "all" else [*source.ignore_columns, *ignore]
        excluded = [*source.exclude_overlap, *unseen]
        changes = {"files": list(group), "ignore_columns": ignored, "exclude_overlap": excluded}
        sources.append(source.model_copy(update=changes))
    return sources


def _recognised(path: Path, config: Config) -> str | None:
    """The format of a file that has no columns of the task, but those of a public preference set.

    Prints the entry for a config; of a file with the columns of another preset, the name of that task.
    """
    columns, task = {*column_names(path)}, config.task
    others = [name for name, record in TASKS.items() if _columns_of(record.task) <= columns]
    if others and not _columns_of(task) <= columns:
        console.print(f"{path} has the columns of --task {others[0]}")
    name = None if {*task.fields} <= columns or why_not(task) else recognise([*columns])
    if name is not None:
        console.print(f"{path} looks like {name} ({FORMATS[name].page}). To train on it:\n{entry(path, name)}")
    return name


def _columns_of(task: Task) -> set[str]:
    return {"id", *task.fields, *([task.label_column] if task.label_column else task.classes)}
