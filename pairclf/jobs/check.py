"""Files in, findings out: what is wrong with rows, what would be done about it, and the rows that are left."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from pairclf.config import Config, Source
from pairclf.data.audit import Finding, audit, clean, exclude_overlap, write_audit
from pairclf.data.formats import expand
from pairclf.data.tables import read_rows, write_rows
from pairclf.errors import ConfigError
from pairclf.files import check_file_target


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
        config: its `task`, `data` and `folds.near` are used.
        out: the JSON file.
        labelled: they are training files.
        ignore: further columns to accept and not read.
        unseen: files that must stay unseen; rows with a prompt (nearly) equal to one of theirs go.
        write: where to write the rows that stay, if no rule with the action `error` met a row.

    Returns:
        What was excluded, if anything was to be, and a finding a rule.
    """
    named = expand(files)
    written = [out, *([write] if write else [])]
    for path in written:
        check_file_target(path)
    given = [path.resolve() for path in (*named, *expand(unseen), *written)]
    if overwritten := [path for path in written if given.count(path.resolve()) > 1]:
        raise ConfigError(f"{overwritten[0]} would be overwritten", remedy="give --out and --write other names")
    sources = _sources(named, config, ignore, unseen)
    read = read_rows(sources, config.task, labelled=labelled)
    frame, excluded = exclude_overlap(read, sources, config.task, config.folds.near, labelled=labelled)
    findings = [*excluded, *audit(frame, config.task, config.data.rules, labelled=labelled)]
    write_audit(out, read, config.task, findings)
    if write is not None and not any(refuses(finding) for finding in findings):
        write_rows(write, clean(frame, config.task, config.data.rules, labelled=labelled)[0], config.task)
    return findings


def refuses(finding: Finding) -> bool:
    """Whether this finding alone is enough for nothing to run."""
    return finding.action == "error" and finding.count > 0


def _sources(paths: Sequence[Path], config: Config, ignore: Sequence[str], unseen: Sequence[Path]) -> list[Source]:
    """The files as the config's sources have them that name them; others as files in the task's own columns."""
    plain = Source(files=[Path()], ignore_columns=config.data.ignore_columns)
    known = [(source, {one.resolve() for one in _existing(source.files)}) for source in config.data.sources]

    def source_of(path: Path) -> Source:
        return next((source for source, files in known if path.resolve() in files), plain)

    made = []
    for source, group in groupby(paths, source_of):
        ignored = source.ignore_columns if source.ignore_columns == "all" else [*source.ignore_columns, *ignore]
        excluded = [*source.exclude_overlap, *unseen]
        changes = {"files": list(group), "ignore_columns": ignored, "exclude_overlap": excluded}
        made.append(source.model_copy(update=changes))
    return made


def _existing(names: Sequence[Path]) -> list[Path]:
    """What the names of a source stand for here, where they need not stand for anything."""
    return [path for name in names if name.exists() or glob.glob(str(name), recursive=True) for path in expand([name])]
