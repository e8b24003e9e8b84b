"""One fold, from the config to a bundle that proves itself: split, train, score what was held out, save, re-score."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pairclf.config import Config, parse_yaml, resolve
from pairclf.console import console
from pairclf.data.folds import prompt_hashes
from pairclf.data.tables import scores_frame, to_rows, write_scores
from pairclf.errors import ConfigError
from pairclf.files import atomic_folder
from pairclf.inputs.cache import EncodedRows
from pairclf.jobs.checkpoints import CHECKPOINTS, discard, identity_of
from pairclf.jobs.inputs import encoded_rows, open_inputs
from pairclf.jobs.launch import make_accelerator, refuse_illegal
from pairclf.jobs.run import OOF, OOF_AB, Paths, labelled_rows, output_of, split
from pairclf.jobs.scoring import Floats, by_order, combine, items_of, probabilities, score, verify
from pairclf.jobs.teachers import teachers_of
from pairclf.jobs.train import HeldOut, train
from pairclf.model.bundle import MANIFEST, Probe, open_bundle, write
from pairclf.model.engine import Classifier
from pairclf.scores.metrics import accuracy, log_loss
from pairclf.task import AB, Row

PROBES = 8


def fit(config: Config, fold: int | None, *, resume: bool | None = None) -> Path:
    """Train on all folds but `fold` (on all rows, if it is None) and write the bundle, verified by re-scoring.

    Beside the bundle stand `config.yaml`, `metrics.jsonl` and, where a fold was held out, its scores: `oof.parquet`
    (both orders averaged) and `oof-ab.parquet` (the order of the file alone).

    Args:
        config: the resolved config.
        fold: the fold to hold out, or none.
        resume: as in `train`; True also leaves a bundle as it is that these settings have made before.

    Returns:
        The bundle's folder.
    """
    paths = Paths(output_of(config), fold)
    accelerator = make_accelerator(config)
    refuse_illegal(config, accelerator)
    if fold is None and config.train.evaluate_every is not None:
        raise ConfigError("train.evaluate_every looks at held-out rows, and none are", remedy="give --fold, or null it")
    config, tokenizer, builder = open_inputs(config)
    if resume and _is_done(config, paths):
        if accelerator.is_main_process:
            console.print(f"{paths.bundle} is there and made with these settings: nothing to do")
        return paths.bundle
    with accelerator.main_process_first():  # it writes the folds and the tokens that the others read
        frame = labelled_rows(config)
        training, held_out = split(config, frame, fold)
        encoded = encoded_rows(config, builder, frame)
    classifier = train(
        config,
        to_rows(training, config.task),
        encoded.of(training["id"]),
        paths.folder,
        accelerator,
        held_out=None if held_out is None else HeldOut(encoded.of(held_out["id"]), _targets(held_out)),
        teachers=teachers_of(config, training),
        resume=resume,
    )
    if accelerator.is_main_process:
        _save(config, paths, classifier, tokenizer, encoded, training, held_out)
        discard(paths.folder / CHECKPOINTS)  # the bundle holds what they were kept for
    return paths.bundle


def _is_done(config: Config, paths: Paths) -> bool:
    """Whether the bundle is there, and the settings beside it are these."""
    path = paths.folder / "config.yaml"
    if not ((paths.bundle / MANIFEST).is_file() and path.is_file()):
        return False
    made_with = resolve(parse_yaml(path.read_text(encoding="utf-8"), path), path)
    return identity_of(made_with, "") == identity_of(config, "")


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
    orders = by_order(items, logits, len(rows))
    metrics = {} if held_out is None else _write_held_out(config, paths, held_out, orders)
    probes = pick_probes(rows, [len(item.ids) for item in items if item.order == AB], orders)
    with atomic_folder(paths.bundle, known_by=MANIFEST) as new:
        write(
            new,
            classifier,
            config,
            tokenizer,
            name="-".join([*paths.output.parts[-1:], paths.folder.name]),
            fold=paths.fold,
            metrics=metrics,
            probes=probes,
            trained_on=prompt_hashes(training, config.task),
        )
        device = classifier.device
        del classifier
        free_memory()
        difference = _prove(new, device)
    shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "rows")
    console.print(f"saved and re-scored {paths.bundle} (logits differ by {difference:.1g}) {shown}")


def pick_probes(rows: Sequence[Row], lengths: Sequence[int], orders: Sequence[Floats]) -> list[Probe]:
    """Up to eight rows, from the shortest to the longest, with their logits in each order."""
    ranked = sorted(range(len(rows)), key=lambda row: (lengths[row], row))
    chosen = dict.fromkeys(ranked[round(at)] for at in np.linspace(0, len(ranked) - 1, PROBES))
    return [
        Probe(
            id=rows[row].id,
            fields={name: list(turns) for name, turns in rows[row].fields.items()},
            logits=[one[row].tolist() for one in orders],
        )
        for row in chosen
    ]


def free_memory() -> None:
    """Give back what a dropped model held, before another is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write_held_out(config: Config, paths: Paths, held_out: pl.DataFrame, logits: Sequence[Floats]) -> dict[str, float]:
    orders = probabilities(logits, config.task, config.predict.temperature)
    ids, models = held_out["id"].to_list(), [f"fold{paths.fold}"]
    averaged, targets = combine(orders, config.task), _targets(held_out)
    hashes = prompt_hashes(held_out, config.task)
    # `split` has asserted that no held-out prompt was trained on: seen=0.
    for name, values, shown in ((OOF, averaged, len(orders)), (OOF_AB, orders[AB], 1)):
        scored = scores_frame(ids, values, config.task, shown, models, seen=0, prompts=hashes)
        write_scores(paths.folder / name, scored)
    return {
        "rows": float(len(ids)),
        "log_loss": log_loss(averaged, targets),
        "log_loss_one_order": log_loss(orders[AB], targets),
        "accuracy": accuracy(averaged, targets),
    }


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
