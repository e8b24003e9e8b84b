"""The classical model: one of `MODELS` or a stack of several, their fit on a fold's rows, and their safetensors file.

A stack adds the logits of its members, or has boosted trees read them beside the features. `knn` is fitted as a stack
of itself alone, because its mean labels need a temperature. A stack's weights and trees are fitted to logits of
training rows, each by members that saw no row of the same group: equal and nearly equal prompts share one, as in the
outer folds. The IDF and the SVD there are those of all training rows, as they know no labels.

A saved model is one safetensors file of float64 arrays: the IDF of each hashed n-gram, the directions of the SVD, the
arrays of each member, and the weights of a stack. LightGBM's text files lie beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.model_selection import GroupKFold

from pairclf.approaches import classical_linear, classical_neighbours, classical_trees
from pairclf.approaches.classical_features import COMPARISONS, MEASURES
from pairclf.approaches.classical_linear import Folds, convergence_said_once, fit_linear, load_linear
from pairclf.approaches.classical_neighbours import fit_neighbours, load_neighbours
from pairclf.approaches.classical_pool import fit_pool
from pairclf.approaches.classical_trees import BoostedTrees, fit_boosted, fit_tree, load_boosted, load_tree
from pairclf.approaches.classical_vectors import (
    CHUNK,
    Extracted,
    Space,
    Vectors,
    contexts_of,
    extract,
    hashed_columns,
    winners_of,
)  # fmt: skip
from pairclf.config import Classical
from pairclf.errors import BundleError, ConfigError, DataError, cut
from pairclf.files import atomic_file
from pairclf.scores.metrics import Floats
from pairclf.task import Row, Task

MAX_PARAMETERS = 1 << 28
"""Numbers in a model: 2 GiB."""

MAX_HEADER = 1 << 16
"""Bytes of a file before its arrays."""

INNER_FOLDS = 4
"""Folds of the training rows, from which out-of-fold logits come: of a stack's members, or for a temperature."""

_MEANING = {
    "analyzer", "ngram_range", "char_ngram_range", "n_features", "sublinear_tf", "dense", "model", "estimators",
    "final_estimator", "n_components", "n_bags",
}  # fmt: skip
"""Settings that give arrays their meaning."""


class FittedMember(Protocol):
    """A fitted model of `MODELS`."""

    @property
    def arrays(self) -> dict[str, Floats]:
        """What is saved of it in the safetensors file."""

    def logits(self, vectors: Vectors) -> Floats:
        """Logits `(N, O, C)`, each order in its own columns; a row's depend on no other row, to the last bit."""


class TrainingRows(NamedTuple):
    """Rows of a fold with a weight above 0, as members are fitted to them."""

    vectors: Vectors
    targets: Floats
    weights: Floats


Fit = Callable[[TrainingRows, Task, Classical, int, Folds], FittedMember]
Load = Callable[[Mapping[str, Floats], Path, Task, Classical], FittedMember]
Shapes = Callable[[Task, Classical], Mapping[str, tuple[int | None, ...]]]


class ModelKind(NamedTuple):
    """A kind of model.

    Attributes:
        fit: from rows, task, settings, seed and inner folds.
        load: from the arrays of a file, the folder of further files, task and settings; it raises `ValueError` or what
            reading raises.
        shapes: of its arrays; None: as the training rows had it.
        package: what it needs besides scikit-learn.
        words: whether it reads the TF-IDF itself.
        topics: whether it reads the SVD.
        columns: whether it reads the columns of trees.
        folds: whether it needs inner folds.
        pooled: whether its probabilities need a calibration: it is then fitted as a stack of itself alone, with one
            weight (a temperature) and biases.
    """

    fit: Fit
    load: Load
    shapes: Shapes
    package: str | None = None
    words: bool = False
    topics: bool = False
    columns: bool = False
    folds: bool = False
    pooled: bool = False


def _linear(kind: str) -> ModelKind:
    return ModelKind(
        lambda rows, task, settings, seed, folds: fit_linear(kind, *rows, task, settings, seed, folds),
        lambda arrays, folder, task, settings: load_linear(arrays, task),
        classical_linear.shapes,
        words=True,
        folds=classical_linear.SOLVERS[kind].calibrated,
    )


MODELS = {
    "logistic": _linear("logistic"),
    "svm": _linear("svm"),
    "nb": _linear("nb"),
    "knn": ModelKind(
        lambda rows, task, settings, seed, folds: fit_neighbours(*rows, task, settings),
        lambda arrays, folder, task, settings: load_neighbours(arrays, task, settings),
        classical_neighbours.shapes,
        topics=True,
        pooled=True,
    ),
    "tree": ModelKind(
        lambda rows, task, settings, seed, folds: fit_tree(*rows, task, settings, seed),
        lambda arrays, folder, task, settings: load_tree(arrays, task, settings, columns_of(task, settings)),
        lambda task, settings: classical_trees.tree_shapes(task),
        topics=True,
        columns=True,
    ),
    "lightgbm": ModelKind(
        lambda rows, task, settings, seed, folds: fit_boosted(*rows, task, settings, seed),
        lambda arrays, folder, task, settings: load_boosted(folder, task, settings, columns_of(task, settings)),
        lambda task, settings: {},
        package="lightgbm",
        topics=True,
        columns=True,
    ),
}
"""Each value of `classical.model` but `stack`."""


@dataclass(frozen=True, slots=True)
class ClassicalModel:
    """A fitted model; `fit_extracted` and `load` make it.

    Attributes:
        task: fields, classes and swap.
        space: IDF and SVD.
        members: by name, one, or those of a stack.
        weight: `(M,)` by member, and `bias` `(C,)`: 1 and 0 where nothing is pooled.
        final: the trees that read the members' logits, if they do.
    """

    task: Task
    space: Space
    members: Mapping[str, FittedMember]
    weight: Floats
    bias: Floats
    final: BoostedTrees | None

    def logits(self, rows: Sequence[Row]) -> Floats:
        """Logits `(N, O, C)`: order AB and, where the task can swap, order BA, each in its own columns.

        A row's logits depend on no other row, to the last bit.
        """
        chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        return self._joined([self._scores(extract(chunk, self.task, self.space.settings)) for chunk in chunks])

    def scores(self, rows: Extracted) -> Floats:
        """Logits `(N, O, C)` of rows by what `extract` gives of them."""
        return self._joined([self._scores(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK)])

    def _joined(self, parts: Sequence[Floats]) -> Floats:
        return np.concatenate([np.zeros((0, 2 if self.task.swappable else 1, len(self.task.classes))), *parts])

    def _scores(self, rows: Extracted) -> Floats:
        vectors = self.space.vectors(rows, tfidf=_reads_words(self.members))
        logits = [member.logits(vectors) for member in self.members.values()]
        if self.final is not None:
            return self.final.logits(_with_logits(vectors, logits))
        parts = [weight * values for weight, values in zip(self.weight, logits, strict=True)]
        pooled: Floats = sum(parts[1:], parts[0]) + self.bias
        return pooled

    def save(self, path: Path) -> None:
        """Write the model to `path`, atomically, and LightGBM's files beside it; equal models give equal bytes."""
        arrays = {"idf": self.space.idf, "components": self.space.components}
        for name, member in self.members.items():
            arrays |= {f"{name}.{part}": values for part, values in member.arrays.items()}
        for model in (*self.members.values(), self.final):
            if isinstance(model, BoostedTrees):
                model.save_trees(path.parent)
        if _pools(self.space.settings):
            arrays |= {"stack.weight": self.weight, "stack.bias": self.bias}
        arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, metadata={"sha256": _digest(arrays, self.task, self.space.settings)})


def packages_of(settings: Classical) -> list[str]:
    """Packages that the models of the settings compute with."""
    own = {MODELS[name].package for name in _kinds(settings)} - {None}
    return ["scikit-learn", "numpy", "scipy", *sorted(map(str, own))]


def reads_groups(settings: Classical) -> bool:
    """Whether the models need inner folds, and so the groups of rows."""
    return _pools(settings) or any(MODELS[name].folds for name in settings.members)


def columns_of(task: Task, settings: Classical) -> int:
    """Columns that trees read."""
    measures, comparisons = len(MEASURES) * settings.dense, COMPARISONS * settings.dense
    a_text = measures + settings.n_components
    if not task.swappable:
        return a_text * len(task.fields)
    return comparisons + 3 * a_text + len(contexts_of(task)) * (a_text + 3 * comparisons)


def check(settings: Classical, task: Task) -> None:
    """Refuse what can't go together.

    Raises:
        ConfigError: the model would be too large, a package is not installed, or trees would have nothing to read.
    """
    parameters = sum(math.prod(size or 1 for size in shape) for shape in _shapes(task, settings).values())
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"classical.n_features={settings.n_features} makes a model of {parameters:,} numbers for "
            f"{len(task.fields)} fields and {len(task.classes)} classes; at most {MAX_PARAMETERS:,} are allowed",
            where="classical.n_features",
            remedy="set a smaller classical.n_features or classical.n_components",
        )
    for name in _kinds(settings):
        package = MODELS[name].package
        if package is not None and find_spec(package) is None:
            raise ConfigError(
                f"classical.model={name} needs the package {package}, which is not installed",
                where="classical.model",
                remedy=f"run `pip install {package}`, or set classical.model=logistic",
            )
        if MODELS[name].columns and not columns_of(task, settings):
            raise ConfigError(
                f"classical.model={name} has nothing to read with classical.dense=false and classical.n_components=0",
                where="classical.n_components",
                remedy="set classical.dense=true, or classical.n_components to 1 or more",
            )


def characters(row: Row) -> int:
    """Characters of a row's fields; the time to score it is proportional to them."""
    return sum(len(turn or "") for turns in row.fields.values() for turn in turns)


# --- training --------------------------------------------------------------------------------------------------------


def fit_extracted(
    rows: Extracted,
    groups: Sequence[Hashable],
    targets: Floats,
    weights: Floats,
    task: Task,
    settings: Classical,
    seed: int,
) -> ClassicalModel:
    """Fit the IDF, the SVD and the models to `rows`, and to nothing else.

    Args:
        rows: training rows. A row of weight 0 is left out.
        groups: `(N,)`; inner folds keep rows of a group together.
        targets: `(N, C)` probability of each class, soft or hard.
        weights: `(N,)` share of each row in the loss.
        task: the fields, the classes and the swap.
        settings: `classical`.
        seed: for what is drawn at random.

    Raises:
        ConfigError: as `check`.
        DataError: there are no rows, or targets or weights are no such numbers.
    """
    check(settings, task)
    _check_training(len(rows), targets, weights, task)
    kept = np.flatnonzero(weights)
    if len(kept) < len(weights):
        rows, targets, weights = rows[kept], targets[kept], weights[kept]
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(groups[index], len(numbers)) for index in kept.tolist()])
    space = Space.fit(rows, task, settings, seed, components=_components(settings))
    training = TrainingRows(space.vectors(rows, tfidf=_reads_words(settings.members)), targets, weights)
    folds = _inner_folds(group) if reads_groups(settings) else []
    with convergence_said_once():
        members: dict[str, FittedMember] = {
            name: MODELS[name].fit(training, task, settings, seed, folds) for name in settings.members
        }
        pools = _pools(settings)
        logits = _unseen_logits(training, members, group, folds, task, settings, seed) if pools else []
    weight, bias, final = np.full(len(members), 1 / len(members)), np.zeros(len(task.classes)), None
    if pools:
        if settings.boosts_stack:
            stacked = TrainingRows(_with_logits(training.vectors, logits), targets, weights)
            final = fit_boosted(*stacked, task, settings, seed)
        elif folds:
            first, tied = np.stack([values[:, 0] for values in logits]), winners_of(task)
            equal, independent = 1 / len(members), task.multi_label
            weight, bias = fit_pool(first, targets, weights, equal=equal, tied=tied, independent=independent)
    return ClassicalModel(task, space, members, weight, bias, final)


def _unseen_logits(
    rows: TrainingRows,
    members: Mapping[str, FittedMember],
    group: Any,
    folds: Folds,
    task: Task,
    settings: Classical,
    seed: int,
) -> list[Floats]:
    """By member, the logits `(N, O, C)` that its like gives rows that it did not see; without folds, its own."""
    if not folds:
        return [member.logits(rows.vectors) for member in members.values()]
    logits = [np.zeros((len(rows.targets), 2 if task.swappable else 1, len(task.classes))) for _ in members]
    for seen, unseen in folds:
        part = TrainingRows(rows.vectors[seen], rows.targets[seen], rows.weights[seen])
        within = _inner_folds(group[seen]) if any(MODELS[name].folds for name in members) else []
        held_out = rows.vectors[unseen]
        for values, name in zip(logits, members, strict=True):
            values[unseen] = MODELS[name].fit(part, task, settings, seed, within).logits(held_out)
    return logits


def _with_logits(vectors: Vectors, logits: Sequence[Floats]) -> Vectors:
    return replace(vectors, logits=np.concatenate(logits, axis=2))


def _inner_folds(group: Any) -> list[tuple[Any, Any]]:
    """Rows that are seen and unseen, by number; no fold at all where all rows are of one group."""
    count = len(np.unique(group))
    return list(GroupKFold(min(INNER_FOLDS, count)).split(group, groups=group)) if count > 1 else []


def _check_training(count: int, targets: Floats, weights: Floats, task: Task) -> None:
    """Raises `DataError` as `fit_extracted`."""
    if not np.any(weights):
        raise DataError("there are no rows with a weight above 0 to train on")
    if targets.shape != (count, len(task.classes)) or weights.shape != (count,):
        raise DataError(
            f"targets {targets.shape} and weights {weights.shape} must be {(count, len(task.classes))} and "
            f"{(count,)}: a row each, and a column for each class"
        )
    possible = (np.isfinite(targets) & (targets >= 0) & (targets <= 1)).all(axis=1)
    if not task.multi_label:
        possible &= np.isclose(targets.sum(axis=1), 1, atol=1e-6)
    wrong = np.flatnonzero(~(possible & np.isfinite(weights) & (weights >= 0))).tolist()
    if wrong:
        raise DataError(
            f"targets must be probabilities of the classes, and weights must be 0 or more; those of row {wrong[0] + 1} "
            f"of {count:,} are not"
        )


def _reads_words(names: Sequence[str] | Mapping[str, object]) -> bool:
    return any(MODELS[name].words for name in names)


def _pools(settings: Classical) -> bool:
    """Whether the logits of the models get weights and biases: those of a stack, or of one that needs them."""
    return settings.model == "stack" or MODELS[settings.model].pooled


def _kinds(settings: Classical) -> list[str]:
    """Names of `MODELS` that are fitted, the trees of a stack among them."""
    return [*settings.members, *(["lightgbm"] if settings.boosts_stack else [])]


def _components(settings: Classical) -> int:
    return settings.n_components if any(MODELS[name].topics for name in _kinds(settings)) else 0


# --- the file --------------------------------------------------------------------------------------------------------


def _shapes(task: Task, settings: Classical) -> dict[str, tuple[int | None, ...]]:
    """Shape of each array of a file; None: as the training rows had it."""
    hashed, members = hashed_columns(settings), settings.members
    shapes: dict[str, tuple[int | None, ...]] = {"idf": (hashed,), "components": (_components(settings), hashed)}
    for name in members:
        shapes |= {f"{name}.{part}": shape for part, shape in MODELS[name].shapes(task, settings).items()}
    if _pools(settings):
        shapes |= {"stack.weight": (len(members),), "stack.bias": (len(task.classes),)}
    return shapes


def load(path: Path, task: Task, settings: Classical) -> ClassicalModel:
    """Read a saved model. Its header is compared with the settings before anything is allocated.

    Raises:
        ConfigError: as `check`.
        BundleError: a file is no such model, was changed, or belongs to another task or other settings.
    """
    check(settings, task)
    shapes = _shapes(task, settings)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > 8 * MAX_PARAMETERS + MAX_HEADER:
            raise BundleError(f"it must be a file of at most {8 * MAX_PARAMETERS + MAX_HEADER:,} bytes", where=path)
        with safe_open(path, framework="numpy") as file:
            _check_header(file, shapes, path)
            arrays = {name: file.get_tensor(name) for name in shapes}
            digest = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise BundleError(f"the classical model can't be read: {cut(error)}", where=path) from error
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise BundleError(f"{name} holds a number that is not finite", where=path)
    if digest != _digest(arrays, task, settings):
        raise BundleError("it was changed after it was saved, or fitted with another task or settings", where=path)
    members: dict[str, FittedMember] = {}
    final = None
    try:
        for name in settings.members:
            own = {part: arrays[f"{name}.{part}"] for part in MODELS[name].shapes(task, settings)}
            members[name] = MODELS[name].load(own, path.parent, task, settings)
        if settings.boosts_stack:
            columns = columns_of(task, settings) + len(members) * len(task.classes)
            final = load_boosted(path.parent, task, settings, columns)
    except (OSError, ValueError, LookupError) as error:
        raise BundleError(f"a model can't be read: {cut(error)}", where=path.parent) from error
    weight, bias = arrays.get("stack.weight", np.ones(1)), arrays.get("stack.bias", np.zeros(len(task.classes)))
    return ClassicalModel(task, Space(settings, arrays["idf"], arrays["components"]), members, weight, bias, final)


def _check_header(file: Any, shapes: Mapping[str, tuple[int | None, ...]], path: Path) -> None:
    wrong = sorted(shapes.keys() ^ set(file.keys()))
    if wrong:
        raise BundleError(
            f"it must hold the arrays {', '.join(shapes)}; {cut(wrong[0])} is one too few or many",
            where=path,
            remedy="train it again with this version of pairclf, if an older one saved it",
        )
    for name, shape in shapes.items():
        header = file.get_slice(name)
        actual = header.get_shape()
        fits = len(actual) == len(shape) and all(
            size is None or size == own for size, own in zip(shape, actual, strict=True)
        )
        if header.get_dtype() != "F64" or not fits:
            wanted = ["any" if size is None else size for size in shape]
            raise BundleError(f"{name} is {header.get_dtype()} {actual}, and must be F64 {wanted}", where=path)


def _digest(arrays: Mapping[str, Floats], task: Task, settings: Classical) -> str:
    """SHA-256 of the arrays and of what gives their columns a meaning."""
    meaning = [
        task.model_dump(include={"fields", "classes", "multi_label", "swap_fields", "swap_classes"}, mode="json"),
        settings.model_dump(include=_MEANING, mode="json"),
    ]
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).data)
    return digest.hexdigest()
