"""The classical model: hashed TF-IDF and dense features, logistic regression, and its safetensors file.

Where a task can swap, the probability of a class is a product of two logistic regressions:

    P(decided), P(tie), ...   of features that a swap leaves as they are
    P(A | decided)            of features whose sign a swap changes, without an intercept

The first has one class for both winners. So exchanging the sides exchanges P(A) and P(B) exactly, by construction, and
cross-entropy splits into the losses of the two, which scikit-learn fits as they are. (One multinomial regression over
both orders of each row is equivariant only as far as its solver converges, and it costs ten times as much.) A task
without a swap has the first regression alone, over all classes; with several labels a row, one regression a class.

A saved model is one safetensors file of float64 arrays (`_shapes`): the IDF of each hashed n-gram, and the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import sparse
from scipy.special import log_expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pairclf.approaches.classical_features import COMPARISONS, MEASURES, DenseFeatures, dense_features
from pairclf.config import Classical
from pairclf.console import console
from pairclf.errors import BundleError, ConfigError, DataError, cut
from pairclf.files import atomic_file
from pairclf.scores.metrics import Floats
from pairclf.task import Row, Task, Turns

Sparse = Any
"""`(N, F)` scipy CSR of float64; scipy ships no types."""

MAX_PARAMETERS = 1 << 28
"""Numbers in a model: 2 GiB."""

MAX_HEADER = 1 << 16
"""Bytes of a file before its arrays."""

_TOKEN = r"\w+|[^\w\s]"  # words, and each sign of punctuation: lists, code and bold type are made of them
_MEANING = {"analyzer", "ngram_range", "char_ngram_range", "n_features", "sublinear_tf", "dense"}  # settings of columns
_CHUNK = 1024  # rows whose features are in memory at once when scoring


@dataclass(frozen=True, slots=True)
class ClassicalModel:
    """A fitted model; `fit` and `load` make it. The arrays have the shapes of `_shapes`."""

    task: Task
    settings: Classical
    idf: Floats
    side_weight: Floats
    class_weight: Floats
    class_bias: Floats

    def logits(self, rows: Sequence[Row]) -> Floats:
        """Logits `(N, O, C)`: order AB and, where the task can swap, order BA, each in its own columns.

        A row's logits depend on no other row, to the last bit.
        """
        logits = np.zeros((len(rows), 2 if self.task.swappable else 1, len(self.task.classes)))
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            logits[start : start + _CHUNK] = self.scores(*extract(chunk, self.task, self.settings))
        return logits

    def scores(self, counts: Mapping[str, Sparse], dense: DenseFeatures) -> Floats:
        """Logits `(N, O, C)` of rows by what `extract` gives of them."""
        features = _features(counts, dense, self.task, self.settings, self.idf)
        scores = np.zeros((features.classes.shape[0], len(self.task.classes)))
        groups = _groups(self.task)
        if groups:
            by_group = features.classes @ self.class_weight.T + self.class_bias
            for group, columns in enumerate(groups):
                scores[:, columns] = by_group[:, [group]]
        if self.task.swappable:
            first, second = _winners(self.task)
            preference = features.sides @ self.side_weight
            scores[:, first] += log_expit(preference)
            scores[:, second] += log_expit(-preference)
            return np.stack([scores, scores[:, list(self.task.swapped_columns)]], axis=1)
        return scores[:, None]

    def save(self, path: Path) -> None:
        """Write the model as one safetensors file, atomically; equal models give equal bytes."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _shapes(self.task, self.settings)}
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, metadata={"sha256": _digest(arrays, self.task, self.settings)})


def check(settings: Classical, task: Task) -> None:
    """Refuse what can't go together.

    Raises:
        ConfigError: the model would be too large.
    """
    parameters = sum(math.prod(shape) for shape in _shapes(task, settings).values())
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"classical.n_features={settings.n_features} makes a model of {parameters:,} numbers for "
            f"{len(task.fields)} fields and {len(task.classes)} classes; at most {MAX_PARAMETERS:,} are allowed",
            where="classical.n_features",
            remedy="set a smaller classical.n_features",
        )


def characters(row: Row) -> int:
    """Characters of a row's fields; the time to score it is proportional to them."""
    return sum(len(turn or "") for turns in row.fields.values() for turn in turns)


# --- training --------------------------------------------------------------------------------------------------------


def fit(
    rows: Sequence[Row], targets: Floats, weights: Floats, task: Task, settings: Classical, seed: int
) -> ClassicalModel:
    """Fit the IDF and the regressions to `rows`, and to nothing else.

    Args:
        rows: training rows. A row of weight 0 is left out.
        targets: `(N, C)` probability of each class, soft or hard.
        weights: `(N,)` share of each row in the loss.
        task: the fields, the classes and the swap.
        settings: `classical`.
        seed: goes to scikit-learn. Its L-BFGS solver draws nothing at random, so that any seed gives the same bits.

    Raises:
        ConfigError: as `check`.
        DataError: there are no rows, or targets or weights are no such numbers.
    """
    check(settings, task)
    check_training(rows, targets, weights, task)
    kept = np.flatnonzero(weights).tolist()
    counts, dense = extract([rows[index] for index in kept], task, settings)
    return regress(counts, dense, targets[kept], weights[kept], task, settings, seed)


def regress(
    counts: Mapping[str, Sparse],
    dense_columns: DenseFeatures,
    targets: Floats,
    weights: Floats,
    task: Task,
    settings: Classical,
    seed: int,
) -> ClassicalModel:
    """Fit the IDF and the regressions to rows by what `extract` gives of them; each has a weight above 0."""
    idf = TfidfTransformer().fit(sparse.vstack(list(counts.values()), format="csr")).idf_
    features = _features(counts, dense_columns, task, settings, idf)
    arrays = {name: np.zeros(shape) for name, shape in _shapes(task, settings).items()} | {"idf": idf}
    if task.swappable:
        dense = features.sides.shape[1] - hashed_columns(settings)
        solve = _Solver(features.sides, dense, weights, settings, seed, antisymmetric=True)
        sides, _ = solve(targets[:, _winners(task)])
        arrays["side_weight"] = sides[0] - sides[1]
    groups = _groups(task)
    if groups:
        dense = features.classes.shape[1] - hashed_columns(settings) * len(_contexts(task))
        solve = _Solver(features.classes, dense, weights, settings, seed, antisymmetric=False)
        if task.multi_label:
            for label in range(len(groups)):
                yes = targets[:, label]
                both, bias = solve(np.stack([1 - yes, yes], axis=1))
                arrays["class_weight"][label], arrays["class_bias"][label] = both[1] - both[0], bias[1] - bias[0]
        else:
            by_group = np.stack([targets[:, columns].sum(axis=1) for columns in groups], axis=1)
            arrays["class_weight"], arrays["class_bias"] = solve(by_group)
    return ClassicalModel(task, settings, **arrays)


def check_training(rows: Sequence[Row], targets: Floats, weights: Floats, task: Task) -> None:
    """Raises `DataError` as `fit`."""
    if not np.any(weights):
        raise DataError("there are no rows with a weight above 0 to train on")
    if targets.shape != (len(rows), len(task.classes)) or weights.shape != (len(rows),):
        raise DataError(
            f"targets {targets.shape} and weights {weights.shape} must be {(len(rows), len(task.classes))} and "
            f"{(len(rows),)}: a row each, and a column for each class"
        )
    possible = (np.isfinite(targets) & (targets >= 0) & (targets <= 1)).all(axis=1)
    if not task.multi_label:
        possible &= np.isclose(targets.sum(axis=1), 1, atol=1e-6)
    wrong = np.flatnonzero(~(possible & np.isfinite(weights) & (weights >= 0))).tolist()
    if wrong:
        raise DataError(
            "targets must be probabilities of the classes, and weights must be 0 or more",
            rows=[rows[index].id for index in wrong],
        )


def repeated(targets: Floats, weights: Floats) -> tuple[Any, Any, Floats]:
    """Numbers of rows, classes and weights that give cross-entropy with the soft targets `(N, K)`.

    A row counts once for each class that has a part of it, by that part. A class that no row has a part of gets half a
    row without features, numbered -1 and behind the others, so that its logit stays finite.
    """
    shares = targets * weights[:, None]
    index, classes = np.nonzero(shares)
    absent = np.setdiff1d(np.arange(targets.shape[1]), classes)
    return (
        np.concatenate([index, np.full(len(absent), -1)]),
        np.concatenate([classes, absent]),
        np.concatenate([shares[index, classes], np.full(len(absent), 0.5)]),
    )


class _Solver:
    """Logistic regression with soft targets on one matrix of features.

    The dense columns are standardised, so that the penalty treats them alike, and those of a row together have the
    length of its TF-IDF, 1. Their scale then goes into the weights: a saved model holds no scaler. Antisymmetric
    features have the mean 0 over both orders, and no intercept.
    A hashed column that no row uses would get the weight 0, and is left out.
    """

    def __init__(
        self, features: Sparse, dense: int, weights: Floats, settings: Classical, seed: int, *, antisymmetric: bool
    ) -> None:
        hashed, values = features[:, : features.shape[1] - dense], features[:, features.shape[1] - dense :].toarray()
        self._columns = features.shape[1]
        self._used = np.flatnonzero(hashed.getnnz(axis=0))
        self._mean = np.zeros(dense) if antisymmetric else values.mean(axis=0)
        scale = np.sqrt(((values - self._mean) ** 2).mean(axis=0))
        self._scale = np.where(scale > 1e-9, scale, 1.0) * math.sqrt(max(1, dense))
        self._features = sparse.hstack([hashed[:, self._used], (values - self._mean) / self._scale], format="csr")
        self._weights = weights
        self._settings = settings
        self._options = {"fit_intercept": not antisymmetric, "random_state": seed}

    def __call__(self, targets: Floats) -> tuple[Floats, Floats]:
        """Weights `(K, F)` and biases `(K,)` for targets `(N, K)`."""
        index, classes, shares = repeated(targets, self._weights)
        blank = sparse.csr_matrix((int((index < 0).sum()), self._features.shape[1]))
        model = LogisticRegression(C=self._settings.C, max_iter=self._settings.max_iter, **self._options)
        # BLAS adds in another order for each number of threads.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below, in the words of the settings
            features = sparse.vstack([self._features[index[index >= 0]], blank], format="csr")
            model.fit(features, classes, sample_weight=shares)
        if model.n_iter_.max() >= self._settings.max_iter:
            stopped = f"the solver stopped at classical.max_iter={self._settings.max_iter} before it converged"
            console.print(f"{stopped}; set it higher", style="yellow")
        weight, bias = model.coef_, np.broadcast_to(model.intercept_, len(model.coef_))
        if targets.shape[1] == 2:  # scikit-learn gives the difference of the two logits
            weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
        return self._unscaled(weight, bias)

    def _unscaled(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """The weights of all columns as they are, from those of the standardised columns in use."""
        used, dense = len(self._used), len(self._scale)
        whole = np.zeros((len(weight), self._columns))
        whole[:, self._used] = weight[:, :used]
        whole[:, self._columns - dense :] = weight[:, used:] / self._scale
        return whole, bias - whole[:, self._columns - dense :] @ self._mean


# --- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Features:
    """`sides` change their sign in a swap; `classes` stay. Hashed columns first, then dense ones."""

    sides: Sparse
    classes: Sparse


def _groups(task: Task) -> list[list[int]]:
    """Columns of the classes that the features that stay in a swap can't tell apart; empty where these are all."""
    if not task.swappable:
        return [[column] for column in range(len(task.classes))]
    winners = _winners(task)
    others = [[column] for column in range(len(task.classes)) if column not in winners]
    return [winners, *others] if others else []


def _winners(task: Task) -> list[int]:
    """Columns of the classes in which the first and the second side win."""
    return [task.classes.index(name) for name in task.swap_classes or ()]


def _shapes(task: Task, settings: Classical) -> dict[str, tuple[int, ...]]:
    """Shape of each array of a model; one of size 0 is not needed for the task."""
    contexts, groups, hashed = len(_contexts(task)), len(_groups(task)), hashed_columns(settings)
    measures, comparisons = len(MEASURES) * settings.dense, COMPARISONS * settings.dense
    sides = hashed + measures + contexts * (1 + comparisons)
    classes = contexts * (hashed + measures)
    if task.swappable:
        classes += 2 * measures + contexts * (1 + comparisons) + 1 + comparisons
    return {
        "idf": (hashed,),
        "side_weight": (sides if task.swappable else 0,),
        "class_weight": (groups, classes if groups else 0),
        "class_bias": (groups,),
    }


def _contexts(task: Task) -> list[str]:
    """Fields that a swap leaves in place: the prompt, or all fields of a task without a swap."""
    return [name for name in task.fields if name not in (task.swap_fields or ())]


def hashed_columns(settings: Classical) -> int:
    """Columns of a field's n-grams: those of words, then those of characters."""
    return settings.n_features * (1 if settings.char_ngram_range is None else 2)


def extract(rows: Sequence[Row], task: Task, settings: Classical) -> tuple[dict[str, Sparse], DenseFeatures]:
    """How often each hashed n-gram stands in each field, `(N, hashed_columns)`, and the dense features.

    Counts have no alternating sign: the IDF needs the number of texts with an n-gram, and 1 + log(n) needs n > 0.
    """
    ranges = [(settings.analyzer, settings.ngram_range)]
    if settings.char_ngram_range is not None:
        ranges.append(("char_wb", settings.char_ngram_range))
    vectorizers = [
        HashingVectorizer(
            analyzer=analyzer,
            ngram_range=ngram_range,
            token_pattern=_TOKEN if analyzer == "word" else None,
            n_features=settings.n_features,
            alternate_sign=False,
            norm=None,
            decode_error="replace",
        )
        for analyzer, ngram_range in ranges
    ]
    counts = {}
    for name in task.fields:
        texts = [_text(row.fields[name]) for row in rows]
        counts[name] = sparse.hstack([vectorizer.transform(texts) for vectorizer in vectorizers], format="csr")
    return counts, dense_features(rows, task, empty=not settings.dense)


def _text(turns: Turns) -> bytes:
    """UTF-8 of a field; half a surrogate pair can't be decoded again, and is replaced then."""
    return "\n".join(turn or "" for turn in turns).encode("utf-8", "surrogatepass")


def _features(
    counts: Mapping[str, Sparse], dense_columns: DenseFeatures, task: Task, settings: Classical, idf: Floats
) -> _Features:
    """All is computed row by row, and a swap gives the same numbers with the other sign, to the last bit."""
    tfidf = TfidfTransformer(sublinear_tf=settings.sublinear_tf)
    tfidf.idf_ = idf
    vectors = {name: tfidf.transform(count) for name, count in counts.items()}
    measures, contexts = dense_columns.measures, _contexts(task)
    texts, dense = [vectors[name] for name in contexts], [measures[name] for name in contexts]
    if task.swap_fields is None:
        return _Features(sides=None, classes=_columns(texts, dense))
    a, b = task.swap_fields
    alike = {pair: _alike(vectors, dense_columns, pair) for pair in dense_columns.comparisons}
    differences = [alike[name, a] - alike[name, b] for name in contexts]
    sums = [alike[name, a] + alike[name, b] for name in contexts]
    gap = measures[a] - measures[b]
    sides = _columns([vectors[a] - vectors[b]], [gap, *differences])
    of_sides = alike[a, b]
    of_sides[:, 3:5] = np.sort(of_sides[:, 3:5], axis=1)
    return _Features(sides, _columns(texts, [*dense, np.abs(gap), measures[a] + measures[b], *sums, of_sides]))


def _alike(vectors: Mapping[str, Sparse], dense_columns: DenseFeatures, pair: tuple[str, str]) -> Floats:
    """Cosine similarity of each row's two texts, and their comparison, `(N, 1 + K)`."""
    cosines = np.asarray(vectors[pair[0]].multiply(vectors[pair[1]]).sum(axis=1)).reshape(-1, 1)
    return np.concatenate([cosines, dense_columns.comparisons[pair]], axis=1)


def _columns(hashed: Sequence[Sparse], dense: Sequence[Floats]) -> Sparse:
    return sparse.hstack([*hashed, sparse.csr_matrix(np.concatenate(dense, axis=1))], format="csr")


# --- the file --------------------------------------------------------------------------------------------------------


def load(path: Path, task: Task, settings: Classical) -> ClassicalModel:
    """Read a saved model. Its size is compared with the settings before anything is allocated.

    Raises:
        ConfigError: as `check`.
        BundleError: the file is no such model, was changed, or belongs to another task or other settings.
    """
    check(settings, task)
    shapes = _shapes(task, settings)
    size = 8 * sum(math.prod(shape) for shape in shapes.values())
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not size <= status.st_size <= size + MAX_HEADER:
            raise BundleError(f"it must be a file of {size:,} bytes and a header", where=path)
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
    return ClassicalModel(task, settings, **arrays)


def _check_header(file: Any, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    wrong = sorted(shapes.keys() ^ set(file.keys()))
    if wrong:
        raise BundleError(
            f"it must hold the arrays {', '.join(shapes)}; {cut(wrong[0])} is one too few or many", where=path
        )
    for name, shape in shapes.items():
        header = file.get_slice(name)
        if header.get_dtype() != "F64" or tuple(header.get_shape()) != shape:
            raise BundleError(
                f"{name} is {header.get_dtype()} {header.get_shape()}, and must be F64 {list(shape)}", where=path
            )


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
