"""Nearest neighbours: a row's probabilities are the mean labels of the most similar training rows, by cosine.

Where a task can swap, a row is the topics of its prompt and the difference of its sides' topics. Each training row is a
neighbour in both orders, with its label in that order, and a row is looked up in both: a swap exchanges its
probabilities to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from pairclf.approaches.classical_vectors import Vectors, averaged, contexts_of
from pairclf.config import Classical
from pairclf.scores.metrics import Floats
from pairclf.task import Task


@dataclass(frozen=True, slots=True)
class NeighbourModel:
    """Training rows to compare with.

    Attributes:
        points: `(T, F)` of length 1, each order of each row.
        labels: `(T, C)` targets in that order, times the row's weight, and `mass` `(T,)`: the weights.
        prior: `(C,)` mean of the targets, which counts as one neighbour.
    """

    task: Task
    neighbours: int
    points: Floats
    labels: Floats
    mass: Floats
    prior: Floats

    @property
    def arrays(self) -> dict[str, Floats]:
        return {"points": self.points, "labels": self.labels, "mass": self.mass, "prior": self.prior}

    def logits(self, vectors: Vectors) -> Floats:
        """Logits `(N, O, C)`: order AB and, where the task can swap, order BA, each in its own columns."""
        with threadpool_limits(1):  # one product a row: the same bits whatever rows stand beside it
            chances = [np.array([self._chances(point) for point in order]) for order in _points(vectors, self.task)]
        return averaged([chance.reshape(-1, len(self.prior)) for chance in chances], self.task)

    def _chances(self, point: Floats) -> Floats:
        similar = self.points @ point
        nearest = np.argpartition(-similar, min(self.neighbours, len(similar)) - 1)[: self.neighbours]
        closeness = np.maximum(similar[nearest], 0)
        mean: Floats = (closeness @ self.labels[nearest] + self.prior) / (closeness @ self.mass[nearest] + 1)
        return mean


def fit_neighbours(
    vectors: Vectors, targets: Floats, weights: Floats, task: Task, settings: Classical
) -> NeighbourModel:
    """Keep the rows, each with a weight above 0."""
    weights = weights / weights.mean()
    orders = _points(vectors, task)
    labels = [targets, targets[:, list(task.swapped_columns)]][: len(orders)]
    labels = [label * weights[:, None] for label in labels]
    mass = np.tile(weights, len(orders))
    prior = np.concatenate(labels).sum(axis=0) / mass.sum()
    return NeighbourModel(
        task, settings.n_neighbors, np.concatenate(orders), np.concatenate(labels), mass, np.clip(prior, 1e-6, 1 - 1e-6)
    )


def load_neighbours(arrays: Mapping[str, Floats], task: Task, settings: Classical) -> NeighbourModel:
    """The model of the arrays of a file, whose shapes were compared.

    Raises:
        ValueError: they are of different numbers of rows.
    """
    if len({len(arrays[name]) for name in ("points", "labels", "mass")}) > 1:
        raise ValueError("points, labels and mass are of different numbers of rows")
    return NeighbourModel(task, settings.n_neighbors, **arrays)


def shapes(task: Task, settings: Classical) -> dict[str, tuple[int | None, ...]]:
    """Shape of each array of a model; None: as many as there are training rows."""
    texts = len(contexts_of(task)) + task.swappable
    classes = len(task.classes)
    return {
        "points": (None, texts * settings.n_components),
        "labels": (None, classes),
        "mass": (None,),
        "prior": (classes,),
    }


def _points(vectors: Vectors, task: Task) -> list[Floats]:
    """Rows in each order, `(N, F)` of length 1, or 0 where no text has a known n-gram."""
    topics, shared = vectors.topics, [vectors.topics[name] for name in contexts_of(task)]
    pairs = [task.swap_fields, task.swap_fields[::-1]] if task.swap_fields else [None]
    orders = []
    for pair in pairs:
        points = np.concatenate([*shared, *([topics[pair[0]] - topics[pair[1]]] if pair else [])], axis=1)
        lengths = np.sqrt((points**2).sum(axis=1, keepdims=True))
        orders.append(points / np.where(lengths > 0, lengths, 1))
    return orders
