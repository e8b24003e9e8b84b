"""Cross-validation: train the folds one after the other, and join their out-of-fold scores into one table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.config import Config
from pairclf.console import console, counted, number, table
from pairclf.data.identity import refuse_other_rows
from pairclf.data.rows import targets_of
from pairclf.data.scores import class_matrix, read_logits, read_scores, with_labels, write_scores
from pairclf.errors import DataError
from pairclf.run import OOF, OOF_AB, OOF_LOGITS, Paths, Run, Split, output_of, trained_as
from pairclf.runs.fit import Session, fit_fold, open_session, run_log
from pairclf.scores.figures import METRICS, labels_hint, measure, metrics_of
from pairclf.scores.metrics import class_prior
from pairclf.task import Task


def cross_validate(
    config: Config, *, resume: bool | None = None, trust_checkpoint: bool = False, config_file: Path | None = None
) -> list[Path]:
    """Train the folds in `folds.run` (all, if it is null) and join their held-out scores.

    Writes `oof.parquet`, `oof-ab.parquet` and `oof-logits.parquet` into the run folder, including folds that were
    trained before.

    Returns:
        The bundles' folders, in the order of the folds.

    Raises:
        ConfigError: as `open_session`.
        DataError: a fold that was trained before with the same settings used other rows.
    """
    chosen = config.folds.run if config.folds.run is not None else list(range(config.folds.n_splits))
    with run_log(output_of(config)):
        session, bundles = open_session(Run(config), chosen, resume=resume, config_file=config_file), []
        for place, fold in enumerate(chosen, start=1):
            console.rule(f"fold {fold} ({place} of {len(chosen)})", align="left")
            bundles.append(fit_fold(session, fold, resume=resume, trust_checkpoint=trust_checkpoint))
        if session.process.is_main:
            console.print(_join(session, chosen))
    return bundles


def _join(session: Session, chosen: list[int]) -> Table:
    """Write the scores of all trained folds, and measure them fold by fold.

    Raises:
        DataError: a fold was trained on other rows than the current ones, or its scores belong to other rows.
    """
    run = session.run
    config, output, task = run.config, output_of(run.config), run.config.task
    folds = [fold for fold in range(config.folds.n_splits) if trained_as(Paths(output, fold))]
    split = {fold: run.sides(fold) for fold in folds}
    # `fit_fold` has just compared the rows of the chosen ones.
    _refuse_other_data(session, {fold: Split(*split[fold]) for fold in folds if fold not in chosen})
    names = [OOF, OOF_AB]
    if all((Paths(output, fold).folder / OOF_LOGITS).is_file() for fold in folds):
        names.append(OOF_LOGITS)
    else:  # an older pairclf wrote no logits, and those of the other folds would not cover all rows
        (output / OOF_LOGITS).unlink(missing_ok=True)
    parts: dict[str, dict[int, pl.DataFrame]] = {}
    for name in names:
        read = read_logits if name == OOF_LOGITS else read_scores
        parts[name] = {fold: read(Paths(output, fold).folder / name, task) for fold in folds}
        for fold, part in parts[name].items():
            _check_rows(part, split[fold][1], task, Paths(output, fold).folder / name)
    logits = parts.get(OOF_LOGITS, {})
    parts[OOF] = {
        fold: _with_labels(part, task, fold, split[fold][1], logits.get(fold)) for fold, part in parts[OOF].items()
    }
    for name in names:
        write_scores(output / name, pl.concat(parts[name].values()))
    return _measured(config, read_scores(output / OOF, task), {fold: split[fold][1] for fold in folds})


def _with_labels(
    scores: pl.DataFrame, task: Task, fold: int, held_out: pl.DataFrame, logits: pl.DataFrame | None
) -> pl.DataFrame:
    """`with_labels` of a fold's scores, joined on id."""
    rows = scores.select("id").join(held_out.select("id", "target"), on="id", how="left", maintain_order="left")
    found = None if logits is None else scores.select("id").join(logits, on="id", how="left", maintain_order="left")
    return with_labels(
        scores,
        task,
        fold=fold,
        targets=targets_of(rows),
        logits=None if found is None else np.array(found["logits"].to_list(), dtype=np.float64),
    )


def _refuse_other_data(session: Session, splits: dict[int, Split]) -> None:
    """Do nothing if these folds were trained on the rows, and held those out, that they have now."""
    differing, output = [], output_of(session.run.config)
    for fold, split in splits.items():
        trained, now = trained_as(Paths(output, fold)), session.trainer.identity(split)
        words = {"rows": "the rows trained on (or their teachers)", "held-out rows": "the rows held out"}
        if other := [words[name] for name in words if trained.get(name) != now[name]]:
            differing.append((fold, f"fold {fold} ({' and '.join(other)})"))
    if differing:
        raise DataError(
            "folds were trained with the same settings on other data than data.train and folds.csv have now: "
            + ", ".join(shown for _, shown in differing),
            where=output,
            remedy=f"train them again with folds.run={[fold for fold, _ in differing]}, or move their folders away; "
            "the other folds are up to date",
        )


def _check_rows(scores: pl.DataFrame, held_out: pl.DataFrame, task: Task, where: Path) -> None:
    """Refuse scores that are not those of the held-out rows, each once."""
    odd = set(scores["id"]) ^ set(held_out["id"])
    if odd or len(scores) != len(held_out):
        raise DataError(
            f"{counted(len(scores), 'row has a score', 'rows have scores')} and the fold held out {len(held_out):,}; "
            "ids are missing, unknown or stand twice",
            where=where,
            rows=sorted(odd) or scores["id"].filter(scores["id"].is_duplicated()).to_list(),
            remedy="train the fold again with --no-resume",
        )
    refuse_other_rows(scores, held_out, task, where)


def _measured(config: Config, scores: pl.DataFrame, held_out: dict[int, pl.DataFrame]) -> Table:
    """A table with the metrics of each fold and of all rows; below it those of the class prior."""
    task, n = config.task, config.folds.n_splits
    names = metrics_of(task)
    oof_table = table(
        f"Out of fold: {len(held_out)} of {n} folds", "fold", "rows", *(METRICS[name].title for name in names)
    )
    everything = pl.concat(held_out.values())
    for label, rows in [*held_out.items(), ("all", everything)]:
        joined = rows.select("id", "target", "weight").join(scores, on="id", how="left", maintain_order="left")
        figures = measure(class_matrix(joined, task), joined["target"].to_list(), task, joined["weight"])
        style = "bold" if label == "all" else None
        oof_table.add_row(str(label), f"{len(rows):,}", *(number(figures.get(name)) for name in names), style=style)
    targets, weights = targets_of(everything), everything["weight"]
    of_prior = measure(np.tile(class_prior(targets, weights), (len(targets), 1)), targets, task, weights)
    prior = f"class prior: {', '.join(f'{METRICS[name].title} {value:.4f}' for name, value in of_prior.items())}"
    oof_table.caption, oof_table.caption_justify = "\n".join(filter(None, [labels_hint(task), prior])), "left"
    return oof_table
