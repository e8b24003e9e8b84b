"""Write the calibration that `evaluate` advises as an ensemble's file, which `predict` and `package` take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from pairclf.config import Config
from pairclf.errors import ConfigError
from pairclf.files import check_file_target, write_text
from pairclf.inference.ensemble import SUFFIXES, EnsembleFile, MemberFile, NestedFigures, calibration_keys
from pairclf.run import bundles_of
from pairclf.runs.evaluate import Evaluation
from pairclf.scores.figures import finite


def check_calibrated(config: Config, path: Path, scores: Path | None) -> None:
    """Refuse, before any work, what `write_calibrated` can't do.

    Raises:
        ConfigError: the scores are a file's, which names no bundles; or the target is no YAML file.
    """
    if scores is not None:
        raise ConfigError(
            f"--calibrated {path} names the bundles of a run, and --scores {scores} are scores of any model",
            remedy="leave --scores away; or set the temperature in your ensemble's file by hand",
        )
    if config.predict.swap == "off" and config.orders > 1:
        raise ConfigError(
            "--calibrated fits the mean of both orders, and predict.swap=off predicts with one",
            remedy="give predict.swap=full; or set the temperature by hand",
        )
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--calibrated {path} must be a YAML file", remedy="e.g. --calibrated calibrated.yaml")
    check_file_target(path)


def write_calibrated(evaluation: Evaluation, config: Config, folds: Sequence[int], path: Path) -> bool:
    """Write the run's bundles as an ensemble with the advised calibration; False, and no file: none is worth it.

    Raises:
        ConfigError: as `bundles_of`.
    """
    if (advised := evaluation.advised) is None:
        return False
    members = [
        MemberFile(
            bundle=Path(os.path.relpath(bundle.resolve(), path.resolve().parent)),
            **calibration_keys(advised.fitted.calibration),
        )
        for bundle in bundles_of(config, folds)
    ]
    nested = NestedFigures(
        method=advised.fitted.method,
        rows=evaluation.rows,
        raw=round(advised.raw, 6),
        nested=round(advised.nested, 6),
        flattering=round(advised.fitted.flattering, 6),
        low=finite(advised.gain.low),
        high=finite(advised.gain.high),
    )
    file = EnsembleFile(members=members, out_of_fold={"log_loss": nested.nested}, nested=nested)
    tree = file.model_dump(mode="json", exclude_defaults=True)
    head = (
        f"# {advised.fitted.method}, fitted on {evaluation.rows} out-of-fold rows. "
        f"Log loss {advised.raw:.5f} without it, {advised.nested:.5f} nested in {evaluation.folds}.\n"
    )
    write_text(path, head + yaml.safe_dump(tree, sort_keys=False))
    return True
