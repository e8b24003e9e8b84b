"""Cross-validation: the fold queue, and one table of out-of-fold scores over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

from pairclf.config import Config
from pairclf.console import console, table
from pairclf.data.identity import refuse_other_rows
from pairclf.data.tables import class_matrix, read_logits, read_scores, to_rows, write_scores
from pairclf.errors import ConfigError, DataError
from pairclf.jobs.fit import fit, trained_as
from pairclf.jobs.launch import make_accelerator
from pairclf.jobs.run import OOF, OOF_AB, OOF_LOGITS, Paths, folds_of, labelled_rows, output_of, sides
from pairclf.jobs.step import fingerprint, fingerprint_of_examples
from pairclf.jobs.teachers import teachers_of
from pairclf.scores.metrics import measure, title
from pairclf.task import Task


def cross_validate(config: Config, *, resume: bool | None = None, trust_checkpoint: bool = False) -> list[Path]:
    """Train every fold that `folds.run` names (all, if it is null) and join their held-out scores.

    Writes `oof.parquet`, `oof-ab.parquet` and `oof-logits.parquet` into the run folder; folds that were trained before
    with the same settings are in them, too.

    Returns:
        The bundles' folders, in the order of the folds.

    Raises:
        ConfigError: `folds.run` names a fold twice, or one that is not there.
        DataError: a fold that was trained before with the same settings is of other rows.
    """
    chosen = config.folds.run if config.folds.run is not None else list(range(config.folds.n))
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"folds.run={chosen} names a fold twice")
    if unknown := [fold for fold in chosen if not 0 <= fold < config.folds.n]:
        raise ConfigError(f"folds.run names {unknown}; folds are counted from 0 and folds.n={config.folds.n}")
    bundles = []
    for place, fold in enumerate(chosen, start=1):
        console.rule(f"fold {fold} ({place} of {len(chosen)})", align="left")
        bundles.append(fit(config, fold, resume=resume, trust_checkpoint=trust_checkpoint))
    if make_accelerator(config).is_main_process:
        console.print(_join(config, chosen))
    return bundles


def _join(config: Config, chosen: list[int]) -> Table:
    """Write the scores of all folds that were trained with these settings, and measure them fold by fold.

    Raises:
        DataError: a fold was trained on other rows than there are now, or its scores are not those of its rows.
    """
    output, task = output_of(config), config.task
    # The settings of a fold just trained are those of its own folder: a chat template is written out by then.
    settings = _settings(Paths(output, chosen[0]))
    folds = [fold for fold in range(config.folds.n) if _settings(Paths(output, fold)) == settings]
    frame = labelled_rows(config)
    split = {fold: sides(frame, folds_of(config, frame), fold) for fold in folds}
    # `fit` has just compared the rows of the chosen ones.
    _refuse_other_data(config, {fold: split[fold] for fold in folds if fold not in chosen})
    names = [OOF, OOF_AB]
    if all((Paths(output, fold).folder / OOF_LOGITS).is_file() for fold in folds):
        names.append(OOF_LOGITS)
    else:  # a fold of an older pairclf has none, and those of the others alone would not be of the same rows
        (output / OOF_LOGITS).unlink(missing_ok=True)
    for name in names:
        read = read_logits if name == OOF_LOGITS else read_scores
        parts = {fold: read(Paths(output, fold).folder / name, task) for fold in folds}
        for fold, part in parts.items():
            _check_rows(part, split[fold][1], task, Paths(output, fold).folder / name)
        write_scores(output / name, pl.concat(parts.values()))
    return _measured(config, read_scores(output / OOF, task), {fold: split[fold][1] for fold in folds})


def _refuse_other_data(config: Config, split: dict[int, tuple[pl.DataFrame, pl.DataFrame]]) -> None:
    """Do nothing if these folds were trained on the rows, and held those out, that they have now."""
    differing = []
    for fold, (training, held_out) in split.items():
        trained = trained_as(Paths(output_of(config), fold))
        teachers = teachers_of(config, training)
        now = {
            "rows": fingerprint_of_examples(to_rows(training, config.task), teachers),
            "held-out rows": fingerprint(to_rows(held_out, config.task)),
        }
        words = {"rows": "the rows trained on (or their teachers)", "held-out rows": "the rows held out"}
        if other := [words[name] for name in now if trained.get(name) != now[name]]:
            differing.append((fold, f"fold {fold} ({' and '.join(other)})"))
    if differing:
        raise DataError(
            "folds were trained with these settings on other data than data.train and the folds are now: "
            + ", ".join(shown for _, shown in differing),
            where=output_of(config),
            remedy=f"train them again with folds.run={[fold for fold, _ in differing]}, or move their folders away; "
            "the bundles of the other folds are as they should be",
        )


def _check_rows(scores: pl.DataFrame, held_out: pl.DataFrame, task: Task, where: Path) -> None:
    """Do nothing if these are the scores of the held-out rows, each once."""
    odd = set(scores["id"]) ^ set(held_out["id"])
    if odd or len(scores) != len(held_out):
        raise DataError(
            f"{len(scores):,} rows have scores and the fold held out {len(held_out):,}; ids are missing, unknown or "
            "stand twice",
            where=where,
            rows=sorted(odd) or scores["id"].filter(scores["id"].is_duplicated()).to_list(),
            remedy="train the fold again with --no-resume",
        )
    refuse_other_rows(scores, held_out, task, where)


def _measured(config: Config, scores: pl.DataFrame, held_out: dict[int, pl.DataFrame]) -> Table:
    """The figures of each fold, and of all their rows together."""
    task, n = config.task, config.folds.n
    names = ("log_loss", "accuracy")
    shown = table(f"Out of fold: {len(held_out)} of {n} folds", "fold", "rows", *(title(name, task) for name in names))
    for label, rows in [*held_out.items(), ("all", pl.concat(held_out.values()))]:
        joined = rows.select("id", "target", "weight").join(scores, on="id", how="left", maintain_order="left")
        found = measure(class_matrix(joined, task), joined["target"].to_list(), task, joined["weight"])
        style = "bold" if label == "all" else None
        shown.add_row(str(label), f"{len(rows):,}", *(f"{found[name]:.4f}" for name in names), style=style)
    return shown


def _settings(paths: Paths) -> dict[str, Any]:
    """The settings that a finished fold was trained with; empty where there is none."""
    return {name: value for name, value in trained_as(paths).items() if name not in ("rows", "held-out rows")}
