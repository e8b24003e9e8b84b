"""Rows and fitted models for the tests of the classical approach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pairclf.approaches.classical_model import ClassicalModel, fit_extracted
from pairclf.approaches.classical_vectors import contexts_of, extract
from pairclf.config import Classical
from pairclf.demo.arena import generate
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS, WSDM, Row, Task

TOPICS = Task(name="topics", fields=("text",), classes=("animal", "tool", "fruit"))
LABELS = Task(name="labels", fields=("title", "text"), classes=("rude", "long"), multi_label=True)
TASKS = {task.name: task for task in (LMSYS, WSDM, TOPICS, LABELS)}


def fit(
    rows: Sequence[Row], targets: Floats, weights: Floats, task: Task, settings: Classical, seed: int = 0
) -> ClassicalModel:
    """Fitted to rows, of which those with the same prompt, or the same texts, are one group."""
    groups = [tuple(row.fields[name] for name in contexts_of(task) or task.fields) for row in rows]
    return fit_extracted(extract(rows, task, settings), groups, targets, weights, task, settings, seed)


def fitted(task: Task, n: int, settings: Classical) -> ClassicalModel:
    """Fitted to generated rows."""
    rows, targets = rows_of(task, n)
    return fit(rows, targets, np.ones(n), task, settings)


def rows_of(task: Task, n: int, *, seed: int = 0) -> tuple[list[Row], Floats]:
    """Generated rows, and a target of each: who wins, or where there are no sides how long the text is."""
    comparisons = generate(n, seed=seed, dirt=0.2).rows
    texts = [(row.prompt, row.response_a, row.response_b)[-len(task.fields) :] for row in comparisons]
    rows = [Row(c.id, dict(zip(task.fields, text, strict=True))) for c, text in zip(comparisons, texts, strict=True)]
    if not task.swappable:
        lengths = np.array([sum(len(turn or "") for turn in text[-1]) for text in texts])
        longer = lengths[:, None] > np.quantile(lengths, [0.33, 0.67])
        return rows, longer.astype(float) if task.multi_label else np.eye(3)[longer.sum(axis=1)]
    targets = np.eye(3)[[row.label for row in comparisons]]
    return rows, targets if len(task.classes) == 3 else targets[:, :2] + targets[:, 2:] / 2
