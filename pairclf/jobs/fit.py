"""One fold, from the config to a bundle that proves itself: split, train, score what was held out, save, re-score."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pairclf.config import Config
from pairclf.console import console
from pairclf.data.tables import scores_frame, to_rows, write_scores
from pairclf.files import atomic_folder
from pairclf.jobs.inputs import encoded_rows, open_inputs
from pairclf.jobs.launch import make_accelerator
from pairclf.jobs.run import OOF, OOF_AB, Paths, labelled_rows, output_of, split
from pairclf.jobs.scoring import Floats, by_order, combine, items_of, probabilities, score, verify
from pairclf.jobs.train import train
from pairclf.model.bundle import MANIFEST, Probe, open_bundle, write
from pairclf.scores.metrics import accuracy, log_loss
from pairclf.task import AB, Row

PROBES = 8


def fit(config: Config, fold: int | None) -> Path:
    """Train on all folds but `fold` (on all rows, if it is None) and write the bundle, verified by re-scoring.

    Beside the bundle stand `config.yaml`, `metrics.jsonl` and, where a fold was held out, its scores: `oof.parquet`
    (both orders averaged) and `oof-ab.parquet` (the order of the file alone).

    Returns:
        The bundle's folder.
    """
    paths = Paths(output_of(config), fold)
    accelerator = make_accelerator(config)
    config, tokenizer, builder = open_inputs(config)
    with accelerator.main_process_first():  # it writes the folds and the tokens that the others read
        frame = labelled_rows(config)
        training, held_out = split(config, frame, fold)
        encoded = encoded_rows(config, builder, frame)
    of_training = encoded.of(training["id"])
    classifier = train(config, to_rows(training, config.task), of_training, paths.folder, accelerator)
    if not accelerator.is_main_process:
        return paths.bundle
    to_score = held_out if held_out is not None else training.head(PROBES)
    rows = to_rows(to_score, config.task)
    items = items_of(encoded.of(to_score["id"]), orders=2)
    logits = score(classifier, items, tokens_per_batch=config.predict.tokens_per_batch, title="score")
    orders = by_order(items, logits, len(rows))
    metrics = {} if held_out is None else _write_held_out(config, paths, rows, orders)
    name = "-".join([*paths.output.parts[-1:], paths.folder.name])
    probes = pick_probes(rows, [len(item.ids) for item in items if item.order == AB], orders)
    with atomic_folder(paths.bundle, known_by=MANIFEST) as new:
        write(new, classifier, config, tokenizer, name=name, fold=fold, metrics=metrics, probes=probes)
        device = classifier.device
        del classifier
        free_memory()
        difference = _prove(new, device)
    shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "rows")
    console.print(f"saved and re-scored {paths.bundle} (logits differ by {difference:.1g}) {shown}")
    return paths.bundle


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


def _write_held_out(config: Config, paths: Paths, rows: Sequence[Row], logits: Sequence[Floats]) -> dict[str, float]:
    orders = probabilities(logits, config.task, config.predict.temperature)
    ids, models = [row.id for row in rows], [f"fold{paths.fold}"]
    averaged = combine(orders, config.task)
    write_scores(paths.folder / OOF, scores_frame(ids, averaged, config.task, len(orders), models))
    write_scores(paths.folder / OOF_AB, scores_frame(ids, orders[AB], config.task, 1, models))
    targets = np.array([row.target for row in rows])
    return {
        "rows": float(len(rows)),
        "log_loss": log_loss(averaged, targets),
        "log_loss_one_order": log_loss(orders[AB], targets),
        "accuracy": accuracy(averaged, targets),
    }


def _prove(folder: Path, device: torch.device) -> float:
    """Load what was saved and score its probes: a head or adapter lost on saving is found now, not by Kaggle.

    Returns:
        The largest difference of a logit.
    """
    bundle = open_bundle(folder)
    return verify(bundle, bundle.load(device))
