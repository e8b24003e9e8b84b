"""List runs: their folds, out-of-fold metric, hours, and the settings that differ from their config file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.config import load_config
from pairclf.console import console, number, table
from pairclf.errors import BundleError, ConfigError
from pairclf.run import BUNDLE, TRAINED, TRAINING, Paths, out_of_fold_metric, trained_as, trained_otherwise
from pairclf.scores.figures import title

_RECORDED = {"seconds": (int, float), "finished": (str,), "config_file": (str,)}
"""What is listed of a record, with its types."""


def list_runs(folder: Path) -> Table:
    """A table with a line for the folds of each run below the folder, and one for its model of all rows.

    Raises:
        ConfigError: there is no run.
    """
    listed: dict[tuple[Path, bool], list[Bundle]] = {}
    for path in sorted(folder.rglob(TRAINED)):
        try:
            bundle = open_bundle(path.parent / BUNDLE, verified=True)
        except BundleError as error:
            console.print(f"{path.parent} is left out: {error.what}")
            continue
        listed.setdefault((path.parent.parent, bundle.manifest.fold is None), []).append(bundle)
    if not listed:
        raise ConfigError(
            f"there is no finished training below {folder}",
            remedy="give the folder of your runs (output_dir), or train one: `pairclf cv CONFIG`",
        )
    runs_table = table(f"Runs below {folder}", "run", "folds", "out of fold", "hours", "finished", "differs by")
    for column in runs_table.columns[1:-1]:
        column.no_wrap = True  # in a narrow terminal names and settings break, and no figure is cut off
    for (run, _), bundles in listed.items():
        runs_table.add_row(os.path.relpath(run, folder), *_cells(run, bundles))
    return runs_table


def _cells(run: Path, bundles: list[Bundle]) -> list[str]:
    """Folds, metric, hours, when the last fold was finished, and what differs from the config file."""
    config = bundles[0].config
    trained = [trained_as(Paths(run, bundle.manifest.fold)) for bundle in bundles]
    records = [_record(said) for said in trained]
    folds = sorted(bundle.manifest.fold for bundle in bundles if bundle.manifest.fold is not None)
    metric = out_of_fold_metric(bundles, config.task.metric)
    seconds = [record["seconds"] for record in records if "seconds" in record]
    return [
        f"{_spans(folds)} of {config.folds.n_splits}" if folds else "all rows",
        "-" if metric is None else f"{title(config.task.metric, config.task)} {metric:.4f}",
        number(sum(seconds) / 3600 if len(seconds) == len(bundles) else None, 2),
        max(record.get("finished", "-") for record in records)[:10],
        _differences(trained[0], records[0].get("config_file")),
    ]


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, those in a row as a span.

    >>> _spans([0, 1, 2, 4, 6, 7])
    '0-2 4 6-7'
    """
    spans: list[list[int]] = []
    for one in numbers:
        if spans and spans[-1][-1] == one - 1:
            spans[-1][1:] = [one]
        else:
            spans.append([one])
    return " ".join("-".join(map(str, span)) for span in spans)


def _record(trained: Mapping[str, Any]) -> dict[str, Any]:
    """What `trained.json` says of a training; without what a damaged file says in other types."""
    said = trained.get(TRAINING)
    record = said if isinstance(said, dict) else {}
    return {name: record[name] for name, kinds in _RECORDED.items() if isinstance(record.get(name), kinds)}


def _differences(trained: Mapping[str, Any], config_file: str | None) -> str:
    """The settings of a training that differ from what its config file has now."""
    if config_file is None:
        return "(its config file is unknown)"
    try:
        config = load_config(Path(config_file))
    except ConfigError:
        return f"({config_file} can't be read)"
    differing = trained_otherwise(config, trained)
    return ", ".join(f"{key}={trained.get(key)}" for key in differing) or f"nothing: as {config_file}"
