"""Cross-validation: the fold queue, and one table of out-of-fold scores over all of them."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pairclf.config import Config
from pairclf.console import console
from pairclf.data.tables import read_scores, write_scores
from pairclf.errors import ConfigError
from pairclf.jobs.fit import fit
from pairclf.jobs.launch import make_accelerator
from pairclf.jobs.run import OOF, OOF_AB, Paths, output_of


def cross_validate(config: Config, *, resume: bool | None = None) -> list[Path]:
    """Train every fold that `folds.run` names (all, if it is null) and join their held-out scores.

    Writes `oof.parquet` and `oof-ab.parquet` into the run folder.

    Returns:
        The bundles' folders, in the order of the folds.
    """
    chosen = config.folds.run if config.folds.run is not None else list(range(config.folds.n))
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"folds.run={chosen} names a fold twice")
    if unknown := [fold for fold in chosen if not 0 <= fold < config.folds.n]:
        raise ConfigError(f"folds.run names {unknown}; folds are counted from 0 and folds.n={config.folds.n}")
    bundles = []
    for place, fold in enumerate(chosen, start=1):
        console.rule(f"fold {fold} ({place} of {len(chosen)})", align="left")
        bundles.append(fit(config, fold, resume=resume))
    if not make_accelerator(config).is_main_process:
        return bundles
    output = output_of(config)
    for name in (OOF, OOF_AB):
        parts = [read_scores(Paths(output, fold).folder / name, config.task) for fold in chosen]
        write_scores(output / name, pl.concat(parts))
    return bundles
