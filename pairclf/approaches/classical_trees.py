"""Trees on the dense features and the topics of texts: one decision tree, or LightGBM's boosted ones, and their files.

Trees know no signs: they are trained on both orders of each row, and a row's probabilities are the mean of both orders,
so that a swap exchanges them to the last bit.

A decision tree is saved as arrays, LightGBM in its text format: `lightgbm-0.txt` and so on, a file a bag, or with
several labels a row one a label and bag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.tree import DecisionTreeRegressor

from pairclf.approaches.classical_linear import repeated
from pairclf.approaches.classical_vectors import Vectors, averaged, columns_of_orders
from pairclf.config import Classical
from pairclf.errors import cut
from pairclf.files import read_plain, write_text
from pairclf.scores.metrics import Floats
from pairclf.task import Task

MAX_FILE = 1 << 28
"""Bytes of a file of trees."""

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


def _both_orders(vectors: Vectors, targets: Floats, weights: Floats, task: Task) -> tuple[Floats, Floats, Floats]:
    """Columns, targets and weights of each order of each row, one after the other."""
    orders = columns_of_orders(vectors, task)
    both = [targets, targets[:, list(task.swapped_columns)]][: len(orders)]
    return np.concatenate(orders), np.concatenate(both), np.tile(weights, len(orders))


# --- one tree --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecisionTree:
    """A decision tree of M nodes, parents before children.

    Attributes:
        nodes: `(M, 4)`: column that is read, threshold, and the nodes for values up to it and above it. A leaf leads to
            itself.
        chances: `(M, C)` probabilities in a leaf.
    """

    task: Task
    nodes: Floats
    chances: Floats

    @property
    def arrays(self) -> dict[str, Floats]:
        return {"nodes": self.nodes, "chances": self.chances}

    def logits(self, vectors: Vectors) -> Floats:
        """Logits `(N, O, C)`: order AB and, where the task can swap, order BA, each in its own columns."""
        return averaged(
            [self.chances[self._leaves(values)] for values in columns_of_orders(vectors, self.task)], self.task
        )

    def _leaves(self, values: Floats) -> Any:
        """The leaf of each row `(N,)`."""
        columns, threshold, children = self.nodes[:, 0].astype(int), self.nodes[:, 1], self.nodes[:, 2:].astype(int)
        # scikit-learn compares values in float32
        rows, leaf, values = np.arange(len(values)), np.zeros(len(values), dtype=int), values.astype(np.float32)
        while True:
            above = values[rows, columns[leaf]] > threshold[leaf]
            below = children[leaf, above.astype(int)]
            if np.array_equal(below, leaf):
                return leaf
            leaf = below


def fit_tree(
    vectors: Vectors, targets: Floats, weights: Floats, task: Task, settings: Classical, seed: int
) -> DecisionTree:
    """Fit a tree to rows, each with a weight above 0: squared error of soft labels is Gini's impurity."""
    values, labels, mass = _both_orders(vectors, targets, weights / weights.mean(), task)
    tree = DecisionTreeRegressor(
        max_leaf_nodes=settings.num_leaves, min_samples_leaf=settings.min_child_samples, random_state=seed
    )
    grown = tree.fit(values, labels, sample_weight=mass).tree_
    own = np.arange(grown.node_count)
    leaf = grown.children_left < 0
    children = [np.where(leaf, own, side) for side in (grown.children_left, grown.children_right)]
    column = np.where(leaf, 0, grown.feature)
    mass_of_node = grown.weighted_n_node_samples[:, None]
    # A class that no row of a leaf has is not impossible: a row of which nothing is known counts besides.
    unknown = 1 / 2 if task.multi_label else 1 / len(task.classes)
    chances = (grown.value[:, :, 0] * mass_of_node + unknown) / (mass_of_node + 1)
    return DecisionTree(task, np.stack([column, grown.threshold, *children], axis=1).astype(np.float64), chances)


def load_tree(arrays: Mapping[str, Floats], task: Task, settings: Classical, columns: int) -> DecisionTree:
    """The model of the arrays of a file, whose shapes were compared.

    Raises:
        ValueError: a node leads out of the tree or in a circle, or reads a column that is not there; or there are more
            than the settings allow.
    """
    nodes, chances, most = arrays["nodes"], arrays["chances"], 2 * settings.num_leaves - 1
    if not 1 <= len(nodes) == len(chances) <= most:
        raise ValueError(f"a decision tree has {len(nodes)} nodes, chances of {len(chances)}, and at most {most}")
    whole = nodes[:, [0, 2, 3]]
    own = np.arange(len(nodes))[:, None]
    leaf = (whole[:, 1:] == own).all(axis=1, keepdims=True)
    inside = leaf | (whole[:, 1:] > own) & (whole[:, 1:] < len(nodes))
    readable = (whole[:, 0] >= 0) & (whole[:, 0] < columns)
    if not (inside.all() and readable.all() and (whole % 1 == 0).all()):
        raise ValueError("a node of the decision tree leads out of it, or reads a column that is not there")
    return DecisionTree(task, nodes, chances)


def tree_shapes(task: Task) -> dict[str, tuple[int | None, ...]]:
    """Shape of each array of a decision tree; None: as many as it has nodes."""
    return {"nodes": (None, 4), "chances": (None, len(task.classes))}


# --- boosted trees ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BoostedTrees:
    """LightGBM's boosters: one a bag; with several labels a row one a label and bag, those of a bag together."""

    task: Task
    boosters: tuple[Any, ...]

    @property
    def arrays(self) -> dict[str, Floats]:
        return {}

    def logits(self, vectors: Vectors) -> Floats:
        """Logits `(N, O, C)`: order AB and, where the task can swap, order BA, each in its own columns."""
        labels = len(self.task.classes) if self.task.multi_label else 1
        chances = []
        for values in columns_of_orders(vectors, self.task):
            predicted = [booster.predict(values, num_threads=1) for booster in self.boosters]
            means = [np.mean(predicted[label::labels], axis=0) for label in range(labels)]
            chances.append(np.stack([mean[:, 1] for mean in means], axis=1) if self.task.multi_label else means[0])
        return averaged(chances, self.task)

    def save_trees(self, folder: Path) -> None:
        """Write a text file for each booster."""
        for number, booster in enumerate(self.boosters):
            write_text(_trees(folder, number), booster.model_to_string())


def fit_boosted(
    vectors: Vectors, targets: Floats, weights: Floats, task: Task, settings: Classical, seed: int
) -> BoostedTrees:
    """Fit boosted trees to rows, each with a weight above 0."""
    import lightgbm

    values, labels, mass = _both_orders(vectors, targets, weights, task)
    problems = [np.stack([1 - label, label], axis=1) for label in labels.T] if task.multi_label else [labels]
    options = {
        **_OPTIONS,
        "num_class": 2 if task.multi_label else len(task.classes),
        "learning_rate": settings.learning_rate,
        "num_leaves": settings.num_leaves,
        "min_data_in_leaf": settings.min_child_samples,
        "extra_trees": settings.extra_trees,
    }
    boosters = []
    for bag in range(settings.n_bags):
        for problem in problems:
            index, classes, shares = repeated(problem, mass)
            # A class that no row has a part of stands at -1, in a row without features.
            data = lightgbm.Dataset(np.where(index[:, None] < 0, 0.0, values[index]), classes, weight=shares)
            seeded = options | {"seed": seed + bag}
            boosters.append(lightgbm.train(seeded, data, num_boost_round=settings.n_estimators))
    return BoostedTrees(task, tuple(boosters))


def load_boosted(folder: Path, task: Task, settings: Classical, columns: int) -> BoostedTrees:
    """Read the text files of boosted trees in a folder.

    Raises:
        OSError, ValueError, LookupError: a file is missing or no file of trees, or has other columns or classes.
    """
    import lightgbm

    count, classes = (len(task.classes), 2) if task.multi_label else (1, len(task.classes))
    boosters = []
    for number in range(count * settings.n_bags):
        text = read_plain(_trees(folder, number), MAX_FILE)
        actual = _whole(text, "max_feature_idx")[0] + 1, _whole(text, "num_tree_per_iteration")[0]
        if actual != (columns, classes):
            raise ValueError(f"features and classes are {actual}, and must be {(columns, classes)}")
        try:
            boosters.append(lightgbm.Booster(model_str=_rewritten(text, columns, classes, settings.num_leaves)))
        except lightgbm.basic.LightGBMError as error:
            raise ValueError(str(error)) from error
    return BoostedTrees(task, tuple(boosters))


def _rewritten(text: str, columns: int, classes: int, most_leaves: int) -> str:
    """A model file with the same trees, written anew from their numbers.

    LightGBM's native code believes a file: it jumps by the sizes of the trees, walks from node to node, and writes as
    many probabilities as the objective names. So it gets no line of the file, but numbers that were looked at.

    Raises:
        ValueError, LookupError: a file holds no such trees.
    """
    trees, end, _ = text.partition("\nend of trees")  # parameters of the training come after it
    _, *parts = re.split(r"^Tree=\d+$", trees, flags=re.MULTILINE)
    if not end or not parts or len(parts) % classes:
        raise ValueError(f"its {len(parts)} trees have no end, or are not {classes} a round")
    written = [f"Tree={number}\n{_tree(part, columns, most_leaves)}\n\n" for number, part in enumerate(parts)]
    head: dict[str, object] = {
        "version": "v4",
        "num_class": classes,
        "num_tree_per_iteration": classes,
        "label_index": 0,
        "max_feature_idx": columns - 1,
        "objective": f"multiclass num_class:{classes}",
        "feature_names": " ".join(f"Column_{column}" for column in range(columns)),
        "feature_infos": " ".join(["none"] * columns),
        "tree_sizes": " ".join(str(len(tree)) for tree in written),
    }
    return f"tree\n{_lines(head)}\n{''.join(written)}end of trees\n"


def _tree(text: str, columns: int, most_leaves: int) -> str:
    """A tree, written anew: every node reads a column, and leads to later nodes or to leaves."""
    (leaves,), values = _whole(text, "num_leaves"), _line(text, "leaf_value").split()
    if not 1 <= leaves == len(values) <= most_leaves or not np.isfinite(np.array(values, float)).all():
        raise ValueError(f"a tree has not a finite value for each of 1 to {most_leaves} leaves")
    if _line(text, "num_cat") != "0" or _line(text, "is_linear") != "0":
        raise ValueError("a tree has nodes or leaves of another kind")
    lines: dict[str, object] = {"num_leaves": leaves, "num_cat": 0, "leaf_value": " ".join(values)}
    lines |= {"is_linear": 0, "shrinkage": 1}
    if leaves == 1:
        return _lines(lines)
    names = ("split_feature", "decision_type", "left_child", "right_child")
    wholes = [np.array(_whole(text, name)) for name in names]
    features, kinds, *children = wholes
    thresholds, nodes = _line(text, "threshold").split(), np.arange(leaves - 1)
    if {len(thresholds), *map(len, wholes)} != {len(nodes)} or np.isnan(np.array(thresholds, float)).any():
        raise ValueError("a tree has not as many nodes as leaves less one, each with a threshold")
    inside = [(nodes < child) & (child < len(nodes)) | (child < 0) & (child >= -leaves) for child in children]
    if not np.all(inside) or not ((features >= 0) & (features < columns) & (kinds >= 0) & (kinds % 2 == 0)).all():
        raise ValueError("a tree has a node that leads out of it, or reads a feature that is not there")
    numbers = {name: " ".join(map(str, part.tolist())) for name, part in zip(names, wholes, strict=True)}
    return _lines(lines | numbers | {"threshold": " ".join(thresholds), "split_gain": " ".join("0" * len(nodes))})


def _lines(values: Mapping[str, object]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _whole(text: str, name: str) -> list[int]:
    """The whole numbers of the line, one at least, as native code reads them too."""
    line = _line(text, name)
    if not re.fullmatch(r"-?[0-9]{1,9}( -?[0-9]{1,9})*", line):
        raise ValueError(f"{name} must be whole numbers, and is {cut(line)!r}")
    return [int(number) for number in line.split()]


def _line(text: str, name: str) -> str:
    """The value of the one line `name=value`."""
    found = re.findall(rf"^{name}=(.*)$", text, flags=re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"{name} does not stand there once")
    return str(found[0])


def _trees(folder: Path, number: int) -> Path:
    return folder / f"lightgbm-{number}.txt"
