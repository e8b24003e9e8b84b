"""The linear classical models: logistic regression, linear SVM with a temperature, naive Bayes log-ratios (NBSVM).

Where a task can swap, the probability of a class is a product of two:

    P(decided), P(tie), ...   of features that a swap leaves as they are
    P(A | decided)            of features whose sign a swap changes, without an intercept

The first has one class for both winners. So exchanging the sides exchanges P(A) and P(B) exactly, by construction, and
cross-entropy splits into the losses of the two, which scikit-learn fits as they are. (One multinomial regression over
both orders of each row is equivariant only as far as its solver converges, and it costs ten times as much.) A task
without a swap has the first model alone, over all classes; with several labels a row, one model a class.

All three are saved as the same arrays of weights (`shapes`): what they differ in, a temperature or the log-ratios of
the columns, is multiplied into them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import log_expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from pairclf.approaches.classical_features import COMPARISONS, MEASURES
from pairclf.approaches.classical_pool import fit_pool
from pairclf.approaches.classical_vectors import Sparse, Vectors, contexts_of, hashed_columns, winners_of
from pairclf.config import Classical
from pairclf.console import console
from pairclf.scores.metrics import Floats
from pairclf.task import Task

Folds = Sequence[tuple[Any, Any]]
"""Inner folds of the training rows: numbers of the rows that are seen, and of those that are not."""

_ALPHA = 1.0  # of the naive Bayes counts, in texts; `alpha` of scikit-learn's MultinomialNB


@dataclass(frozen=True, slots=True)
class LinearModel:
    """A fitted linear model. The arrays have the shapes of `shapes`."""

    task: Task
    side_weight: Floats
    class_weight: Floats
    class_bias: Floats

    @property
    def arrays(self) -> dict[str, Floats]:
        return {"side_weight": self.side_weight, "class_weight": self.class_weight, "class_bias": self.class_bias}

    def logits(self, vectors: Vectors) -> Floats:
        """Logits `(N, O, C)`: order AB and, where the task can swap, order BA, each in its own columns."""
        features = _features(vectors, self.task)
        scores = np.zeros((features.classes.shape[0], len(self.task.classes)))
        groups = _groups(self.task)
        if groups:
            by_group = features.classes @ self.class_weight.T + self.class_bias
            for group, columns in enumerate(groups):
                scores[:, columns] = by_group[:, [group]]
        if self.task.swappable:
            first, second = winners_of(self.task)
            preference = features.sides @ self.side_weight
            scores[:, first] += log_expit(preference)
            scores[:, second] += log_expit(-preference)
            return np.stack([scores, scores[:, list(self.task.swapped_columns)]], axis=1)
        return scores[:, None]


@contextmanager
def convergence_said_once() -> Iterator[None]:
    """Print once that solvers stopped early, however many models and inner folds there are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield
    for text in dict.fromkeys(str(one.message) for one in caught if one.category is ConvergenceWarning):
        console.print(text, style="yellow")
    for other in caught:
        if other.category is not ConvergenceWarning:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


def fit_linear(
    kind: str,
    vectors: Vectors,
    targets: Floats,
    weights: Floats,
    task: Task,
    settings: Classical,
    seed: int,
    folds: Folds,
) -> LinearModel:
    """Fit a model of `SOLVERS` to rows, each with a weight above 0; `folds` are for its temperature, where it has one.

    The seed goes to scikit-learn. L-BFGS draws nothing at random: any seed gives the same bits.
    """
    features = _features(vectors, task)
    arrays = {name: np.zeros(shape) for name, shape in shapes(task, settings).items()}
    if task.swappable:
        dense = features.sides.shape[1] - hashed_columns(settings)
        solve = _Problem(kind, features.sides, dense, weights, settings, seed, folds, antisymmetric=True)
        sides, _ = solve(targets[:, winners_of(task)])
        arrays["side_weight"] = sides[0] - sides[1]
    groups = _groups(task)
    if groups:
        dense = features.classes.shape[1] - hashed_columns(settings) * len(contexts_of(task))
        solve = _Problem(kind, features.classes, dense, weights, settings, seed, folds, antisymmetric=False)
        if task.multi_label:
            for label in range(len(groups)):
                yes = targets[:, label]
                both, bias = solve(np.stack([1 - yes, yes], axis=1))
                arrays["class_weight"][label], arrays["class_bias"][label] = both[1] - both[0], bias[1] - bias[0]
        else:
            by_group = np.stack([targets[:, columns].sum(axis=1) for columns in groups], axis=1)
            arrays["class_weight"], arrays["class_bias"] = solve(by_group)
    return LinearModel(task, **arrays)


def load_linear(arrays: Mapping[str, Floats], task: Task) -> LinearModel:
    """The model of the arrays of a file, whose shapes were compared."""
    return LinearModel(task, **arrays)


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


# --- solvers ---------------------------------------------------------------------------------------------------------


class Solver(NamedTuple):
    """How a linear model is fitted to columns of features.

    Attributes:
        make: scikit-learn's model, by the settings and its `fit_intercept` and `random_state`.
        log_ratios: columns are multiplied by their naive Bayes log-ratios before.
        calibrated: whether the decisions are no logits yet, and get a temperature and biases from inner folds.
    """

    make: Callable[..., Any]
    log_ratios: bool
    calibrated: bool


SOLVERS = {
    "logistic": Solver(LogisticRegression, log_ratios=False, calibrated=False),
    "svm": Solver(LinearSVC, log_ratios=False, calibrated=True),
    "nb": Solver(LogisticRegression, log_ratios=True, calibrated=True),
}


class _Problem:
    """A linear model with soft targets on one matrix of features.

    The dense columns are standardised, so that the penalty treats them alike, and those of a row together have the
    length of its TF-IDF, 1. Their scale then goes into the weights: a saved model holds no scaler. Antisymmetric
    features have the mean 0 over both orders, and no intercept.
    A hashed column that no row uses would get the weight 0, and is left out.
    """

    def __init__(
        self,
        kind: str,
        features: Sparse,
        dense: int,
        weights: Floats,
        settings: Classical,
        seed: int,
        folds: Folds,
        *,
        antisymmetric: bool,
    ) -> None:
        hashed, values = features[:, : features.shape[1] - dense], features[:, features.shape[1] - dense :].toarray()
        self._columns = features.shape[1]
        self._used = np.flatnonzero(np.bincount(hashed.indices, minlength=hashed.shape[1]))
        self._mean = np.zeros(dense) if antisymmetric else values.mean(axis=0)
        scale = np.sqrt(((values - self._mean) ** 2).mean(axis=0))
        self._scale = np.where(scale > 1e-9, scale, 1.0) * math.sqrt(max(1, dense))
        self._features = sparse.hstack([hashed[:, self._used], (values - self._mean) / self._scale], format="csr")
        self._weights, self._solver, self._folds = weights, SOLVERS[kind], folds
        self._max_iter, self._antisymmetric = settings.max_iter, antisymmetric
        self._options = {"C": settings.C, "max_iter": settings.max_iter, "random_state": seed}

    def __call__(self, targets: Floats) -> tuple[Floats, Floats]:
        """Weights `(K, F)` and biases `(K,)` for targets `(N, K)`."""
        everything = np.arange(len(targets))
        # BLAS adds in another order for each number of threads.
        with threadpool_limits(1):
            weight, bias = self._solved(everything, targets)
            if self._solver.calibrated and self._folds:
                decisions = np.zeros((1, *targets.shape))
                for seen, unseen in self._folds:
                    inner, intercept = self._solved(seen, targets)
                    decisions[0, unseen] = self._features[unseen] @ inner.T + intercept
                tied = range(targets.shape[1]) if self._antisymmetric else ()
                factor, shift = fit_pool(decisions, targets, self._weights, equal=1.0, tied=tied)
                weight, bias = factor * weight, factor * bias + shift
        return self._unscaled(weight, bias)

    def _solved(self, rows: Any, targets: Floats) -> tuple[Floats, Floats]:
        """Weights `(K, F)` and biases `(K,)` of some rows, of the standardised columns in use."""
        features, targets, weights = self._features[rows], targets[rows], self._weights[rows]
        if not self._solver.log_ratios:
            return self._fitted(features, targets, weights)
        hashed, answers = len(self._used), []
        # Each class has ratios of its own: against all others, and where there are two, one against the other.
        for label in range(1, targets.shape[1]) if targets.shape[1] == 2 else range(targets.shape[1]):
            both = np.stack([1 - targets[:, label], targets[:, label]], axis=1)
            ratios = np.ones(features.shape[1])
            ratios[:hashed] = _log_ratios(features[:, :hashed], both, weights)
            weight, bias = self._fitted(features @ sparse.diags_array(ratios, format="csr"), both, weights)
            answers.append((weight * ratios, bias))
        if targets.shape[1] == 2:
            return answers[0]
        return np.stack([weight[1] - weight[0] for weight, _ in answers]), np.array([b[1] - b[0] for _, b in answers])

    def _fitted(self, features: Sparse, targets: Floats, weights: Floats) -> tuple[Floats, Floats]:
        index, classes, shares = repeated(targets, weights)
        blank = sparse.csr_matrix((int((index < 0).sum()), features.shape[1]))
        model = self._solver.make(fit_intercept=not self._antisymmetric, **self._options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below in the words of the settings
            model.fit(sparse.vstack([features[index[index >= 0]], blank], format="csr"), classes, sample_weight=shares)
        if np.max(model.n_iter_) >= self._max_iter:
            stopped = f"the solver stopped at classical.max_iter={self._max_iter} before it converged"
            warnings.warn(f"{stopped}; set it higher", ConvergenceWarning, stacklevel=2)
        weight, bias = model.coef_, np.broadcast_to(model.intercept_, len(model.coef_))
        if targets.shape[1] == 2:  # scikit-learn gives the difference of the two logits
            weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
        return weight, bias

    def _unscaled(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """The weights of all columns as they are, from those of the standardised columns in use."""
        used, dense = len(self._used), len(self._scale)
        whole = np.zeros((len(weight), self._columns))
        whole[:, self._used] = weight[:, :used]
        whole[:, self._columns - dense :] = weight[:, used:] / self._scale
        return whole, bias - whole[:, self._columns - dense :] @ self._mean


def _log_ratios(features: Sparse, targets: Floats, weights: Floats) -> Floats:
    """Naive Bayes log-ratios `(F,)` of the columns: how much more of them the second class has than the first.

    A feature below 0 counts for the other class: that of a difference of two sides belongs to the other side.
    """
    first, second = (targets * weights[:, None]).T
    more, less = features.maximum(0), (-features).maximum(0)
    of_second = _ALPHA + more.T @ second + less.T @ first
    of_first = _ALPHA + more.T @ first + less.T @ second
    ratios: Floats = np.log(of_second / of_second.sum()) - np.log(of_first / of_first.sum())
    return ratios


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
    winners = winners_of(task)
    others = [[column] for column in range(len(task.classes)) if column not in winners]
    return [winners, *others] if others else []


def shapes(task: Task, settings: Classical) -> dict[str, tuple[int, ...]]:
    """Shape of each array of a model; one of size 0 is not needed for the task."""
    contexts, groups, hashed = len(contexts_of(task)), len(_groups(task)), hashed_columns(settings)
    measures, comparisons = len(MEASURES) * settings.dense, COMPARISONS * settings.dense
    sides = hashed + measures + contexts * (1 + comparisons)
    classes = contexts * (hashed + measures)
    if task.swappable:
        classes += 2 * measures + contexts * (1 + comparisons) + 1 + comparisons
    return {
        "side_weight": (sides if task.swappable else 0,),
        "class_weight": (groups, classes if groups else 0),
        "class_bias": (groups,),
    }


def _features(vectors: Vectors, task: Task) -> _Features:
    """All is computed row by row, and a swap gives the same numbers with the other sign, to the last bit."""
    measures, contexts = vectors.dense.measures, contexts_of(task)
    texts, dense = [vectors.tfidf[name] for name in contexts], [measures[name] for name in contexts]
    if task.swap_fields is None:
        return _Features(sides=None, classes=_columns(texts, dense))
    a, b = task.swap_fields
    alike = {pair: _alike(vectors, pair) for pair in vectors.dense.comparisons}
    differences = [alike[name, a] - alike[name, b] for name in contexts]
    sums = [alike[name, a] + alike[name, b] for name in contexts]
    gap = measures[a] - measures[b]
    sides = _columns([vectors.tfidf[a] - vectors.tfidf[b]], [gap, *differences])
    of_sides = alike[a, b]
    of_sides[:, 3:5] = np.sort(of_sides[:, 3:5], axis=1)
    return _Features(sides, _columns(texts, [*dense, np.abs(gap), measures[a] + measures[b], *sums, of_sides]))


def _alike(vectors: Vectors, pair: tuple[str, str]) -> Floats:
    """Cosine similarity of each row's two texts, and their comparison, `(N, 1 + K)`."""
    cosines = np.asarray(vectors.tfidf[pair[0]].multiply(vectors.tfidf[pair[1]]).sum(axis=1)).reshape(-1, 1)
    return np.concatenate([cosines, vectors.dense.comparisons[pair]], axis=1)


def _columns(hashed: Sequence[Sparse], dense: Sequence[Floats]) -> Sparse:
    return sparse.hstack([*hashed, sparse.csr_matrix(np.concatenate(dense, axis=1))], format="csr")
