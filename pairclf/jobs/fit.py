"""One fold, from the config to a bundle that proves itself: split, train, score what was held out, save, re-score."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pairclf.config import Config
from pairclf.console import console
from pairclf.data.identity import prompt_marks, row_hashes
from pairclf.data.tables import scores_frame, to_rows, write_logits, write_scores
from pairclf.errors import BundleError, ConfigError, cut
from pairclf.files import MAX_JSON, atomic_folder, locked, parsed, read_plain, write_json
from pairclf.inputs.cache import EncodedRows
from pairclf.jobs.checkpoints import CHECKPOINTS, discard, identity_of
from pairclf.jobs.inputs import encoded_rows, open_inputs
from pairclf.jobs.launch import make_accelerator, refuse_illegal
from pairclf.jobs.run import OOF, OOF_AB, OOF_LOGITS, Paths, labelled_rows, output_of, split
from pairclf.jobs.scoring import Floats, by_order, items_of, score, verify
from pairclf.jobs.step import HeldOut, fingerprint, prepare
from pairclf.jobs.teachers import teachers_of
from pairclf.jobs.train import train
from pairclf.jobs.watch import check_trackers
from pairclf.model.bundle import MANIFEST, Probe, open_bundle, write
from pairclf.model.engine import Classifier
from pairclf.scores.metrics import METRICS, class_prior, measure, title
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import AB, Row, Task

PROBES = 8
COUNTS = ("rows", "weight")
"""Among a bundle's figures: how many rows were held out, and their weights' sum, in which folds' figures are averaged.
"""
TRAINED = "trained.json"


def fit(config: Config, fold: int | None, *, resume: bool | None = None, trust_checkpoint: bool = False) -> Path:
    """Train on all folds but `fold` (on all rows, if it is None) and write the bundle, verified by re-scoring.

    Beside the bundle stand `config.yaml`, `metrics.jsonl` and, where a fold was held out, its scores: `oof.parquet`
    (both orders averaged), `oof-ab.parquet` (the order of the file alone) and `oof-logits.parquet`. `trained.json` says
    of what settings and rows; a bundle of the very same is left as it is.

    Args:
        config: the resolved config.
        fold: the fold to hold out, or none.
        resume: as in `train`; False also makes a finished bundle anew.
        trust_checkpoint: as in `train`.

    Returns:
        The bundle's folder.
    """
    paths = Paths(output_of(config), fold)
    accelerator = make_accelerator(config)
    refuse_illegal(config, accelerator)
    check_trackers(config)
    if fold is None and config.train.evaluate_every is not None:
        remedy = "give --fold, or train.evaluate_every=null train.keep=last train.patience=null"
        raise ConfigError("train.evaluate_every looks at held-out rows, and none are", remedy=remedy)
    main = accelerator.is_main_process
    with locked(paths.folder / ".lock") if main else nullcontext():
        config, tokenizer, builder = open_inputs(config)
        with accelerator.main_process_first():  # it writes the folds and the tokens that the others read
            frame = labelled_rows(config)
            training, held_out = split(config, frame, fold)
            encoded = encoded_rows(config, builder, frame)
        rows, of_training = to_rows(training, config.task), encoded.of(training["id"])
        examples = prepare(rows, of_training, config, teachers_of(config, training))
        unseen = None if held_out is None else _held_out(config, held_out, encoded)
        identity = identity_of(config, examples, unseen)
        if resume is not False and _is_done(paths, identity):
            if main:
                console.print(f"{paths.bundle} is there, of these settings and rows (--no-resume makes it anew)")
            return paths.bundle
        if main:
            _note_other(paths, identity)
            (paths.folder / TRAINED).unlink(missing_ok=True)
        classifier = train(
            config,
            examples,
            paths.folder,
            accelerator,
            held_out=unseen,
            resume=resume,
            trust_checkpoint=trust_checkpoint,
        )
        if main:
            _save(config, paths, classifier, tokenizer, encoded, training, held_out)
            write_json(paths.folder / TRAINED, identity)
            discard(paths.folder / CHECKPOINTS)  # the bundle holds what they were kept for
    return paths.bundle


def _held_out(config: Config, held_out: pl.DataFrame, encoded: EncodedRows) -> HeldOut:
    rows = to_rows(held_out, config.task)
    weights = held_out["weight"].to_numpy()
    return HeldOut(encoded.of(held_out["id"]), _targets(held_out), weights, fingerprint(rows))


def _is_done(paths: Paths, identity: dict[str, Any]) -> bool:
    """Whether the bundle and the scores of the held-out rows are there, whole, and of these settings and rows."""
    scores = [] if paths.fold is None else [paths.folder / OOF, paths.folder / OOF_AB]
    if trained_as(paths) != identity or not all(path.is_file() for path in scores):
        return False
    try:
        open_bundle(paths.bundle)
    except BundleError as error:
        console.print(f"trained anew: {error}")
        return False
    return True


def _note_other(paths: Paths, identity: dict[str, Any]) -> None:
    """Say by what a finished training, whose bundle this one will replace, differs from it."""
    before = trained_as(paths)
    other = [name for name in (before | identity) if before.get(name) != identity.get(name)]
    if before and other:
        console.print(
            f"{paths.bundle} is of another training (different: {cut(', '.join(other))}); the new bundle replaces it "
            "when it is saved"
        )


def trained_as(paths: Paths) -> dict[str, Any]:
    """What a finished training was made of, as `identity_of` tells it; empty, if there is none or it can't be read."""
    try:
        read: Any = parsed(read_plain(paths.folder / TRAINED, MAX_JSON))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _save(
    config: Config,
    paths: Paths,
    classifier: Classifier,
    tokenizer: Any,
    encoded: EncodedRows,
    training: pl.DataFrame,
    held_out: pl.DataFrame | None,
) -> None:
    """Score what was held out, write the bundle, and score its probes again as it was saved."""
    to_score = held_out if held_out is not None else training.head(PROBES)
    rows = to_rows(to_score, config.task)
    items = items_of(encoded.of(to_score["id"]), orders=2)
    logits = score(classifier, items, tokens_per_batch=config.predict.tokens_per_batch, title="score")
    by_row = by_order(items, logits, len(rows))
    metrics = {} if held_out is None else _write_held_out(config, paths, held_out, by_row)
    probes = pick_probes(rows, [len(item.ids) for item in items if item.order == AB], by_row)
    with atomic_folder(paths.bundle, known_by=MANIFEST) as new:
        write(
            new,
            classifier,
            config,
            tokenizer,
            name="-".join([*paths.output.parts[-1:], paths.folder.name]),
            fold=paths.fold,
            metrics=metrics,
            prior=class_prior(_targets(training), training["weight"]).tolist(),
            probes=probes,
            trained_on=prompt_marks(training, config.task),
        )
        device = classifier.device
        del classifier
        free_memory()
        difference = _prove(new, device)
    shown = ", ".join(
        f"{_title(name, config.task)} {value:.4f}" for name, value in metrics.items() if name not in COUNTS
    )
    console.print(f"saved and re-scored {paths.bundle} (logits differ by {difference:.1g}) {shown}")


def _title(name: str, task: Task) -> str:
    return title(name, task) if name in METRICS else name.replace("_", " ")


def pick_probes(rows: Sequence[Row], lengths: Sequence[int], logits: Floats) -> list[Probe]:
    """Up to eight rows, from the shortest to the longest, with their logits in each order, of all rows' `(N, O, C)`."""
    ranked = sorted(range(len(rows)), key=lambda row: (lengths[row], row))
    chosen = dict.fromkeys(ranked[round(at)] for at in np.linspace(0, len(ranked) - 1, PROBES))
    return [
        Probe(
            id=rows[row].id,
            fields={name: list(turns) for name, turns in rows[row].fields.items()},
            logits=logits[row].tolist(),
        )
        for row in chosen
    ]


def free_memory() -> None:
    """Give back what a dropped model held, before another is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write_held_out(config: Config, paths: Paths, held_out: pl.DataFrame, logits: Floats) -> dict[str, float]:
    """Write the scores of the held-out rows, made of their logits `(N, O, C)`, and measure them."""
    task, temperature = config.task, config.predict.temperature
    ids, models, hashes = held_out["id"], [f"fold{paths.fold}"], row_hashes(held_out, config.task)
    targets, weights = _targets(held_out), held_out["weight"]
    write_logits(paths.folder / OOF_LOGITS, ids, logits, hashes)
    figures = {}
    for name, shown in ((OOF, logits.shape[1]), (OOF_AB, 1)):
        values = mean_of_orders(logits[:, :shown], task, temperature)
        # `split` has asserted that no held-out prompt was trained on: seen=0.
        write_scores(
            paths.folder / name,
            scores_frame(ids.to_list(), values, task, shown, models, seen=0, hashes=hashes),
        )
        figures[name] = measure(values, targets, task, weights)
    one_order = {"log_loss_one_order": figures[OOF_AB]["log_loss"]}
    counts = dict(zip(COUNTS, (float(len(ids)), float(weights.sum())), strict=True))
    return {**counts, **figures[OOF], **one_order}


def _targets(frame: pl.DataFrame) -> Floats:
    """The rows' targets, `(N, C)`."""
    return np.array(frame["target"].to_list())


def _prove(folder: Path, device: torch.device) -> float:
    """Load what was saved and score its probes: a head or adapter lost on saving is found now, not by Kaggle.

    Returns:
        The largest difference of a logit.
    """
    bundle = open_bundle(folder)
    return verify(bundle, bundle.load(device))
