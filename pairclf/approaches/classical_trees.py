"""LightGBM on the dense features and on the logits of the logistic regressions: the stack of both, and its files.

The regressions' logits of a training row come from regressions that saw no row with its texts (those of its prompt,
where there are sides). Trees know no signs: they are trained on both orders of each row, and a row's probabilities are
the mean of both orders, so that a swap exchanges them to the last bit.

A saved model is that of the regressions and, beside it, LightGBM's text format: one `lightgbm-0.txt`, or with several
labels a row one file a label.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

from pairclf.approaches import classical_model
from pairclf.approaches.classical_features import DenseFeatures
from pairclf.approaches.classical_model import ClassicalModel
from pairclf.config import Classical
from pairclf.errors import BundleError, ConfigError, cut
from pairclf.files import read_plain, write_text
from pairclf.scores.metrics import Floats
from pairclf.task import Row, Task

INNER_FOLDS = 4
"""Folds of the training rows, from which their out-of-fold logits come."""

MAX_FILE = 1 << 28
"""Bytes of a file of trees."""

_CHUNK = 1024  # rows whose features are in memory at once when scoring
_OPTIONS = {
    "objective": "multiclass",
    "feature_fraction": 0.3,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "max_bin": 63,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


@dataclass(frozen=True, slots=True)
class BoostedModel:
    """A fitted stack; `fit` and `load` make it. With several labels a row there is one booster a label."""

    linear: ClassicalModel
    boosters: tuple[Any, ...]

    @property
    def task(self) -> Task:
        return self.linear.task

    def logits(self, rows: Sequence[Row]) -> Floats:
        """Logits `(N, O, C)`, as `ClassicalModel.logits`; a row's depend on no other row."""
        chunks = [self._logits(rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)]
        return np.concatenate([self.linear.logits([]), *chunks])

    def _logits(self, rows: Sequence[Row]) -> Floats:
        counts, dense = classical_model.extract(rows, self.task, self.linear.settings)
        inputs = _inputs(dense, self.linear.scores(counts, dense), self.task)
        # A probability of 0 would have no logarithm.
        chances = [
            np.clip([one.predict(values, num_threads=1) for one in self.boosters], 1e-15, 1) for values in inputs
        ]
        if self.task.multi_label:
            return np.stack([np.log(both[:, :, 1] / both[:, :, 0]).T for both in chances], axis=1)
        swapped = list(self.task.swapped_columns)
        mean = chances[0][0] if len(chances) == 1 else (chances[0][0] + chances[1][0][:, swapped]) / 2
        orders = [mean] if len(chances) == 1 else [mean, mean[:, swapped]]
        logits: Floats = np.log(np.stack(orders, axis=1))
        return logits

    def save(self, path: Path) -> None:
        """Write the regressions to `path`, and the trees beside it."""
        self.linear.save(path)
        for number, booster in enumerate(self.boosters):
            write_text(_trees(path, number), booster.model_to_string())


def check(settings: Classical, task: Task) -> None:
    """Raises `ConfigError` as `classical_model.check`, or if LightGBM is not installed."""
    classical_model.check(settings, task)
    if find_spec("lightgbm") is None:
        raise ConfigError(
            "classical.model=lightgbm needs the package lightgbm, which is not installed",
            where="classical.model",
            remedy="run `pip install lightgbm`, or set classical.model=logistic",
        )


def fit(
    rows: Sequence[Row], targets: Floats, weights: Floats, task: Task, settings: Classical, seed: int
) -> BoostedModel:
    """Fit the regressions, and the trees to their out-of-fold logits; arguments and errors as `classical_model.fit`."""
    import lightgbm

    check(settings, task)
    classical_model.check_training(rows, targets, weights, task)
    kept = np.flatnonzero(weights)
    rows, targets, weights = [rows[index] for index in kept.tolist()], targets[kept], weights[kept]
    counts, dense = classical_model.extract(rows, task, settings)
    linear = classical_model.regress(counts, dense, targets, weights, task, settings, seed)
    logits = linear.scores(counts, dense)
    for seen, unseen in _inner_folds(rows, task):
        inner = classical_model.regress(
            {name: count[seen] for name, count in counts.items()},
            dense[seen],
            targets[seen],
            weights[seen],
            task,
            settings,
            seed,
        )
        logits[unseen] = inner.scores({name: count[unseen] for name, count in counts.items()}, dense[unseen])
    inputs = np.concatenate(_inputs(dense, logits, task))
    if task.multi_label:
        problems = [np.stack([1 - column, column], axis=1) for column in targets.T]
    else:
        problems = [np.concatenate([targets, targets[:, list(task.swapped_columns)]][: logits.shape[1]])]
    boosters = []
    for problem in problems:
        index, classes, shares = classical_model.repeated(problem, np.tile(weights, logits.shape[1]))
        # A class that no row has a part of stands at -1, in a row without features.
        values = np.where(index[:, None] < 0, 0.0, inputs[index])
        options = {
            **_OPTIONS,
            "num_class": problem.shape[1],
            "learning_rate": settings.learning_rate,
            "num_leaves": settings.num_leaves,
            "min_data_in_leaf": settings.min_child_samples,
            "seed": seed,
        }
        data = lightgbm.Dataset(values, classes, weight=shares)
        boosters.append(lightgbm.train(options, data, num_boost_round=settings.n_estimators))
    return BoostedModel(linear, tuple(boosters))


def _inner_folds(rows: Sequence[Row], task: Task) -> list[tuple[Any, Any]]:
    """Rows that are seen and unseen, by number; no fold at all where all rows have the same texts."""
    names = [name for name in task.fields if name not in (task.swap_fields or ())] or task.fields
    numbers: dict[object, int] = {}
    groups = [numbers.setdefault(tuple(row.fields[name] for name in names), len(numbers)) for row in rows]
    if len(numbers) < 2:
        return []
    return list(GroupKFold(min(INNER_FOLDS, len(numbers))).split(groups, groups=groups))


def _inputs(dense: DenseFeatures, logits: Floats, task: Task) -> list[Floats]:
    """What the trees read, `(N, F)` for each order of `logits` `(N, O, C)`."""
    inputs = []
    for order in range(logits.shape[1]):
        columns = [logits[:, order]]
        if task.swap_fields is None:
            columns += dense.measures.values()
        else:
            a, b = sides = task.swap_fields[::-1] if order else task.swap_fields
            pair = dense.comparisons[task.swap_fields]
            columns += [dense.measures[a], dense.measures[b], dense.measures[a] - dense.measures[b]]
            columns.append(pair[:, [0, 1, 3, 2, 4, 5]] if order else pair)
            for name in (name for name in task.fields if name not in sides):
                of_a, of_b = dense.comparisons[name, a], dense.comparisons[name, b]
                columns += [dense.measures[name], of_a, of_b, of_a - of_b]
        inputs.append(np.concatenate(columns, axis=1))
    return inputs


def load(path: Path, task: Task, settings: Classical) -> BoostedModel:
    """Read a saved stack.

    Raises:
        ConfigError: as `check`.
        BundleError: as `classical_model.load`, or a file of trees is none, or has other inputs or classes.
    """
    check(settings, task)
    import lightgbm

    linear = classical_model.load(path, task, settings)
    blank = Row("", dict.fromkeys(task.fields, ("",)))
    counts, dense = classical_model.extract([blank], task, settings)
    columns = _inputs(dense, linear.scores(counts, dense), task)[0].shape[1]
    count, classes = (len(task.classes), 2) if task.multi_label else (1, len(task.classes))
    boosters = []
    for number in range(count):
        trees = _trees(path, number)
        try:
            text = read_plain(trees, MAX_FILE)
            actual = int(_line(text, "max_feature_idx")) + 1, int(_line(text, "num_tree_per_iteration"))
            if actual != (columns, classes):
                raise ValueError(f"features and classes are {actual}, and must be {(columns, classes)}")
            boosters.append(lightgbm.Booster(model_str=_checked(text, columns)))
        except (OSError, ValueError, LookupError, lightgbm.basic.LightGBMError) as error:
            raise BundleError(f"the trees can't be read: {cut(error)}", where=trees) from error
    return BoostedModel(linear, tuple(boosters))


def _checked(text: str, columns: int) -> str:
    """The trees of a model file, after a look at what LightGBM's native code would follow unseen.

    It jumps by the sizes of the trees, and walks from node to node. Here every size is the length of a tree, every node
    reads one of `columns` numerical features, and leads to later nodes or to leaves of its own tree.

    Raises:
        ValueError, LookupError: a file is otherwise.
    """
    if "\r" in text:
        raise ValueError("it has carriage returns, and so lines within lines")
    place = text.index("Tree=")
    sizes = _line(text[:place], "tree_sizes").split()
    for number, size in enumerate(map(int, sizes)):
        tree, place = text[place : place + size], place + size
        leaves = int(_line(tree, "num_leaves"))
        if not tree.startswith(f"Tree={number}\n") or tree.count("Tree=") > 1:
            raise ValueError(f"tree {number} is not where its size has it")
        if len(_line(tree, "leaf_value").split()) != leaves or _line(tree, "num_cat") != "0" or "is_linear=1" in tree:
            raise ValueError(f"tree {number} has not a value for each leaf, or is of another kind")
        if leaves == 1:
            continue
        names = ("split_feature", "decision_type", "left_child", "right_child")
        features, kinds, *children = (np.array(_line(tree, name).split(), dtype=np.int64) for name in names)
        nodes = np.arange(leaves - 1)
        counts = {len(_line(tree, "threshold").split()), *map(len, (features, kinds, *children))}
        if counts != {len(nodes)}:
            raise ValueError(f"tree {number} has not as many nodes as leaves less one")
        inside = [(nodes < child) & (child < len(nodes)) | (child < 0) & (child >= -leaves) for child in children]
        if not np.all(inside) or not ((features >= 0) & (features < columns) & (kinds % 2 == 0)).all():
            raise ValueError(f"tree {number} has a node that leads out of it, or reads a feature that is not there")
    if not text.startswith("end of trees", place):
        raise ValueError("the trees do not end where their sizes have it")
    return f"{text[:place]}end of trees\n"  # parameters of the training come after it


def _line(text: str, name: str) -> str:
    """The value of the one line `name=value`."""
    found = re.findall(rf"^{name}=(.*)$", text, flags=re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"{name} does not stand there once")
    return str(found[0])


def _trees(path: Path, number: int) -> Path:
    return path.with_name(f"lightgbm-{number}.txt")
