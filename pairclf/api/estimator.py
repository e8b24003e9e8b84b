"""`PairClassifier`: any approach as a classifier of scikit-learn."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from pairclf.api.judge import Judge, load
from pairclf.api.workflows import fit
from pairclf.config import Config, resolve
from pairclf.console import silenced
from pairclf.data.rows import in_memory
from pairclf.errors import ConfigError, DataError, quoted
from pairclf.scores.metrics import Floats

LABEL, WEIGHT = "label", "weight"
"""Columns of the file of training rows, besides the task's fields."""


class PairClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier of preference pairs, or of any task that a config can define, with scikit-learn's methods.

    It works in `Pipeline`, `cross_val_score` and `GridSearchCV`. scikit-learn's folds know nothing of equal prompts:
    give the prompts as `groups` to `GroupKFold`, or use `pairclf.cross_validate`, whose folds keep them together.

    Args:
        approach: classical, finetune or prompt.
        labels: `{label in y: class of the task}`; None: y holds the task's classes, such as winner_model_a.
        verbose: print what a training prints.
        settings: all other settings of a config: `classical__C=4`, `model={"base": ...}`, `task="wsdm"`, `seed=1`; `__`
            stands for the dot of `classical.C`.

    Attributes:
        classes_: the labels, sorted, as scikit-learn's metrics expect them.
        n_features_in_: number of columns that it was trained on.
        feature_names_in_: their names; only where it was trained on a frame.
        bundle_: folder of the bundle, which lives as long as the estimator; `pairclf.load` opens it.

    Raises:
        ConfigError: at `fit`, for settings that can't be used.
        DataError: rows or labels can't be read.
    """

    def __init__(
        self,
        approach: str = "classical",
        labels: Mapping[Any, str] | None = None,
        verbose: bool = False,
        **settings: Any,
    ) -> None:
        self.approach = approach
        self.labels = labels
        self.verbose = verbose
        self.settings = settings

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, as scikit-learn asks for them to make a copy."""
        return {"approach": self.approach, "labels": self.labels, "verbose": self.verbose, **self.settings}

    def set_params(self, **params: Any) -> PairClassifier:
        """Set arguments; a setting of the config is checked at `fit`."""
        for name, value in params.items():
            if name in ("approach", "labels", "verbose"):
                setattr(self, name, value)
            else:
                self.settings = {**self.settings, name: value}
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> PairClassifier:
        """Train on all rows.

        Args:
            X: a polars or pandas DataFrame with the task's fields; or an array of texts `(N, fields)`.
            y: `(N,)` labels.
            sample_weight: `(N,)`, 0 or more; a row of weight 0 is left out.
        """
        folder = TemporaryDirectory(prefix="pairclf-")
        config = self._config(Path(folder.name))
        labels = self._labels_of(config)
        frame = _frame_of(X, config)
        rows = _training_rows(frame, y, sample_weight, config, labels)
        rows.write_parquet(Path(folder.name) / "train.parquet")
        with silenced(not self.verbose):
            self.bundle_ = fit(config)
        self._keep(folder)
        self.classes_ = np.array(sorted(labels))
        self._columns = [config.task.classes.index(labels[label]) for label in self.classes_.tolist()]
        self.n_features_in_ = frame.width
        if hasattr(X, "columns"):
            self.feature_names_in_ = np.array([str(name) for name in frame.columns], dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities `(N, C)`, columns as `classes_`."""
        check_is_fitted(self)
        with silenced(not self.verbose), load(self.bundle_) as judge:
            scores = judge.predict(_in_our_columns(_frame_of(X, judge), judge))
        values = scores.select(judge.classes).to_numpy()
        return np.ascontiguousarray(values[:, self._columns], dtype=np.float64)

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable label of each row, `(N,)`."""
        probabilities = self.predict_proba(X)
        chosen: NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return chosen

    def _config(self, folder: Path) -> Config:
        tree: dict[str, Any] = {}
        # Sections first: what is said of one setting holds, too, where its section is given.
        for key, value in sorted(self.settings.items(), key=lambda setting: setting[0].count("__")):
            *sections, name = key.split("__")
            section = tree
            for part in sections:
                section = _section(section, part)
            section[name] = deepcopy(value)
        data = _section(tree, "data")
        ours = [name for name, of in (("output_dir", tree), ("data.folder", data), ("data.train", data))
                if name.rpartition(".")[2] in of]  # fmt: skip
        if ours:
            raise ConfigError(
                f"{', '.join(ours)} can't be set: X and y are the rows, and the run's folder is temporary",
                remedy="pairclf.fit(config) trains on files, and keeps the run",
            )
        source = {"files": ["train.parquet"], "label_column": LABEL, "columns": {WEIGHT: WEIGHT}}
        rules = {"undecodable": "fix", **_section(data, "rules")}  # a plain text is one turn, as in rows to predict
        data = {**data, "rules": rules, "folder": str(folder), "train": [source]}
        return resolve({**tree, "approach": self.approach, "data": data, "output_dir": str(folder / "run")})

    def _labels_of(self, config: Config) -> dict[Any, str]:
        """Our class of each label.

        Raises:
            ConfigError: a row may have several labels, or `labels` does not name each class once.
        """
        classes = config.task.classes
        if config.task.multi_label:
            raise ConfigError(
                f"task {config.task.name!r} has several labels a row, which y can't hold",
                remedy="pairclf.fit(config), and pairclf.load",
            )
        if not isinstance(self.labels, Mapping | None):
            raise ConfigError(f"labels={quoted(self.labels)} is no dict", remedy="labels={label in y: class}")
        labels = {label: label for label in classes} if self.labels is None else dict(self.labels)
        if sorted(labels.values()) != sorted(classes):
            raise ConfigError(f"labels={labels} must name each class once: {', '.join(classes)}")
        try:
            sorted(labels)
        except TypeError as error:
            what = f"the labels {list(labels)} have no order, which classes_ needs"
            raise ConfigError(what, remedy="give all of them one type") from error
        return labels

    # A copy, in another process or in memory, has a bundle of its own.

    def _keep(self, folder: TemporaryDirectory[str]) -> None:
        """Delete the folder with the estimator."""
        self._delete = weakref.finalize(self, folder.cleanup)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_delete", None)
        if "bundle_" in state:
            bundle = state.pop("bundle_")
            files = sorted(path for path in bundle.rglob("*") if path.is_file())
            state["_files"] = {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        files = state.pop("_files", None)
        super().__setstate__(state)
        if files is None:
            return
        folder = TemporaryDirectory(prefix="pairclf-")
        self.bundle_ = Path(folder.name) / "bundle"
        for name, content in files.items():
            path = self.bundle_ / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self._keep(folder)


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a config, which is begun if it is not there.

    Raises:
        ConfigError: a setting has its name.
    """
    section = tree.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{name}={section!r} is no section of a config", remedy=f"{name}={{setting: value}}")
    return section


def _frame_of(X: Any, source: Config | Judge) -> pl.DataFrame:
    """The rows as a frame; the columns of an array are the task's fields.

    Raises:
        DataError: an array has another shape.
    """
    if hasattr(X, "columns"):
        return in_memory(X, source.task.fields)
    cells, fields = np.asarray(X, dtype=object), source.task.fields
    if cells.ndim != 2 or cells.shape[1] != len(fields) or not all(isinstance(cell, str | None) for cell in cells.flat):
        raise DataError(
            f"X is an array of shape {cells.shape}; it must hold texts in the columns {', '.join(fields)}",
            remedy="give a polars or pandas DataFrame with these columns",
        )
    return pl.DataFrame(
        {name: cells[:, place].tolist() for place, name in enumerate(fields)}, schema=dict.fromkeys(fields, pl.String)
    )


def _in_our_columns(frame: pl.DataFrame, judge: Judge) -> pl.DataFrame:
    """The rows as the judge reads them: without ids, which may repeat in a resampled frame."""
    columns = judge.ensemble.data.test.columns
    return frame.drop(columns.get("id") or "id", strict=False)


def _training_rows(
    frame: pl.DataFrame, y: ArrayLike, sample_weight: ArrayLike | None, config: Config, labels: Mapping[Any, str]
) -> pl.DataFrame:
    """The file of training rows.

    Raises:
        DataError: a field is missing, or labels or weights don't fit the rows.
    """
    fields, labelled = config.task.fields, np.asarray(y, dtype=object)
    if missing := [name for name in fields if name not in frame.columns]:
        raise DataError(f"columns {missing} are missing; X has {frame.columns}", remedy="rename the columns of X")
    if labelled.ndim != 1:
        raise DataError(
            f"y has the shape {labelled.shape}; it must hold one label a row: {', '.join(map(str, labels))}",
            remedy="numpy.ravel(y); of a column a class: [classes[place] for place in numpy.argmax(y, axis=1)]",
        )
    given = labelled.tolist()
    weights = np.ones(len(frame)) if sample_weight is None else _weights(sample_weight)
    if not len(frame) == len(given) == len(weights) or len(frame) == 0:
        raise DataError(f"X has {len(frame):,} rows, y {len(given):,} and sample_weight {len(weights):,}")
    if unknown := sorted({str(label) for label in given if label not in labels}):
        raise DataError(
            f"y holds {unknown[:5]}, and the classes are {', '.join(map(str, labels))}",
            remedy="labels={label in y: class}",
        )
    if not weights.any():
        raise DataError("all rows have the sample_weight 0", remedy="leave sample_weight away")
    names = pl.Series(LABEL, [labels[label] for label in given])
    rows = frame.select(*fields).with_columns(names, pl.Series(WEIGHT, weights)).with_row_index("id")
    return rows.filter(pl.col(WEIGHT) > 0)


def _weights(sample_weight: ArrayLike) -> Floats:
    """Raises:
    DataError: they are no `(N,)` numbers from 0.
    """
    try:
        weights = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"sample_weight holds no numbers: {error}", remedy="give a number from 0 a row") from error
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if weights.ndim != 1 or wrong.any():
        what = f"sample_weight, of shape {weights.shape}, holds {int(wrong.sum()):,} numbers below 0 or not finite"
        raise DataError(what, remedy="give a finite number from 0 a row: `(N,)`")
    return weights
