"""Bundles and a test file in, a submission out: every row, both orders, every model, joined on id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pairclf.config import override
from pairclf.console import console
from pairclf.data.audit import clean, note_changes
from pairclf.data.folds import prompt_hashes
from pairclf.data.tables import read_rows, scores_frame, to_rows, write_scores, write_submission
from pairclf.errors import BundleError, ConfigError
from pairclf.files import check_file_target
from pairclf.jobs.fit import free_memory
from pairclf.jobs.scoring import by_order, combine, items_of, probabilities, score
from pairclf.model.backbone import pick_device
from pairclf.model.bundle import Bundle, open_bundle
from pairclf.scores.blend import blend

SETTABLE = ("predict.", "model.dtype=", "model.attention=")
"""Overrides that leave a bundle the model that it is."""


def predict(
    folders: Sequence[Path],
    data: Path,
    out: Path,
    *,
    sample: Path | None = None,
    scores: Path | None = None,
    base: Path | None = None,
    overrides: Sequence[str] = (),
) -> pl.DataFrame:
    """Score `data` with every bundle, average, and write the submission.

    Args:
        folders: the bundles; they must agree on the task.
        data: unlabelled file.
        out: the submission to write.
        sample: sample submission, whose ids, order and columns `out` will have.
        scores: where to write the scores as parquet too, with what stands behind each row.
        base: folder of the base model on this machine.
        overrides: `key=value` for settings under `predict`, `model.dtype` and `model.attention`.

    Returns:
        The blended scores.

    Raises:
        BundleError, DataError, ConfigError, ModelError: before anything is written.
    """
    if refused := [one for one in overrides if not one.startswith(SETTABLE)]:
        raise ConfigError(f"{refused} can't be set for a trained bundle", remedy=f"settable: {', '.join(SETTABLE)}")
    _check_paths(out, scores, data, sample)
    bundles = [open_bundle(folder) for folder in folders]
    _check_agreement(bundles)
    task = bundles[0].config.task
    frame = read_rows([data], task, labelled=False)
    scored = []
    for bundle in bundles:
        scored.append(_score(bundle, frame, base, overrides))
        free_memory()
    blended = blend(scored, task)
    write_submission(out, blended, task, sample)
    if scores is not None:
        write_scores(scores, blended)
    console.print(f"wrote {out}: {len(frame):,} rows from {len(bundles)} model(s)")
    return blended


def _check_paths(out: Path, scores: Path | None, data: Path, sample: Path | None) -> None:
    """Found out now, and not after hours of scoring."""
    written = [path for path in (out, scores) if path is not None]
    named = [path.resolve() for path in (*written, data, sample) if path is not None]
    if len(set(named)) != len(named):
        raise ConfigError("two of the files to read and to write are the same", remedy="give each its own path")
    for path in written:
        check_file_target(path)


def _check_agreement(bundles: Sequence[Bundle]) -> None:
    if not bundles:
        raise ConfigError("no bundle is given", remedy="pairclf predict BUNDLE [BUNDLE ...] --data test.csv")
    if len({bundle.manifest.seal for bundle in bundles}) != len(bundles):
        raise ConfigError("a bundle is given twice, and would count twice in the mean")
    first = bundles[0]
    for other in bundles[1:]:
        if other.config.task != first.config.task:
            raise BundleError(
                f"bundles {first.name} and {other.name} were trained for different tasks",
                remedy="give bundles of one task with the same classes in the same order",
            )


def _score(bundle: Bundle, frame: pl.DataFrame, base: Path | None, overrides: Sequence[str]) -> pl.DataFrame:
    """One model's scores for all rows, in their order, repaired as its training rows were."""
    config = override(bundle.config, overrides)
    settings = config.predict
    repaired, findings = clean(frame, config.task, config.data.rules, labelled=False)
    note_changes(findings)
    rows = to_rows(repaired, config.task)
    items = items_of(bundle.builder().encode(rows), orders=2 if settings.swap == "full" else 1)
    classifier = Bundle(bundle.folder, bundle.manifest, config).load(pick_device(), base)
    logits = score(classifier, items, tokens_per_batch=settings.tokens_per_batch, title=bundle.name)
    orders = probabilities(by_order(items, logits, len(rows)), config.task, settings.temperature)
    prompts, trained_on = prompt_hashes(repaired, config.task), bundle.trained_on()
    return scores_frame(
        [row.id for row in rows],
        combine(orders, config.task),
        config.task,
        orders=len(orders),
        models=[bundle.name],
        seen=None if trained_on is None else prompts.is_in(trained_on.implode()),
        prompts=prompts,
    )
