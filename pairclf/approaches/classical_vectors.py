"""What the classical models read of rows: counts of hashed n-grams, TF-IDF, its SVD, and the dense features.

`extract` reads one row at a time and is fitted to nothing: a run does it once. `Space` is fitted to a fold's training
rows, without their labels: the IDF, and the directions of a truncated SVD of the TF-IDF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from pairclf.approaches.classical_features import DenseFeatures, dense_features
from pairclf.config import Classical
from pairclf.scores.metrics import Floats
from pairclf.task import Row, Task, Turns

Sparse = Any
"""`(N, F)` scipy CSR; scipy ships no types."""

SVD_TEXTS = 1 << 14
"""Most texts that the SVD is fitted to, evenly drawn from the training rows: memory and time stay bounded."""

_TOKEN = r"\w+|[^\w\s]"  # words, and each sign of punctuation: lists, code and bold type are made of them
CHUNK = 1024
"""Rows whose features are in memory at once when scoring."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """Of rows: counts of n-grams by field, `(N, F)` float32 CSR, and the dense features."""

    counts: Mapping[str, Sparse]
    dense: DenseFeatures

    def __len__(self) -> int:
        return int(next(iter(self.counts.values())).shape[0])

    def __getitem__(self, rows: Any) -> Extracted:
        """Those of some rows."""
        return Extracted({name: count[rows] for name, count in self.counts.items()}, self.dense[rows])

    @classmethod
    def concat(cls, parts: Sequence[Extracted]) -> Extracted:
        """Rows of several parts, one after the other."""
        counts = {name: sparse.vstack([part.counts[name] for part in parts], format="csr") for name in parts[0].counts}
        return cls(counts, DenseFeatures.concat([part.dense for part in parts]))


@dataclass(frozen=True, slots=True)
class Vectors:
    """Of rows in a fold's space.

    Attributes:
        tfidf: by field, `(N, F)` float64 CSR of length 1; empty where no model reads it.
        topics: by field, its projection `(N, D)` on the directions of the SVD; D = 0 where no model reads it.
        dense: the dense features.
        logits: `(N, O, L)` of the other models of a stack, by order; L = 0 where there are none.
    """

    tfidf: Mapping[str, Sparse]
    topics: Mapping[str, Floats]
    dense: DenseFeatures
    logits: Floats

    def __getitem__(self, rows: Any) -> Vectors:
        """Those of some rows."""
        tfidf = {name: values[rows] for name, values in self.tfidf.items()}
        topics = {name: values[rows] for name, values in self.topics.items()}
        return Vectors(tfidf, topics, self.dense[rows], self.logits[rows])


@dataclass(frozen=True, slots=True)
class Space:
    """IDF `(F,)` and directions of the SVD `(D, F)`, float64; `Space.fit` makes it."""

    settings: Classical
    idf: Floats
    components: Floats

    @classmethod
    def fit(cls, rows: Extracted, task: Task, settings: Classical, seed: int, *, components: int) -> Space:
        """Fit the IDF to all texts of `rows`, and `components` directions to those that are compared.

        Where a task can swap, these are the sides' texts, and otherwise all. Directions that the texts do not fill are
        zeros.
        """
        documents = sum(np.bincount(count.indices, minlength=count.shape[1]) for count in rows.counts.values())
        idf = np.log((1 + len(rows.counts) * len(rows)) / (1 + documents)) + 1
        space = cls(settings, idf, np.zeros((components, len(idf))))
        if not components:
            return space
        names = task.swap_fields or task.fields
        step = max(1, -(-len(names) * len(rows) // SVD_TEXTS))
        texts = sparse.vstack([space._tfidf(rows.counts[name][::step]) for name in names], format="csr")
        texts = texts[np.flatnonzero(texts.getnnz(axis=1))]
        if found := min(components, *texts.shape):
            with threadpool_limits(1):  # BLAS adds in another order for each number of threads
                space.components[:found] = randomized_svd(texts, found, n_iter=3, random_state=seed)[2]
        return space

    def vectors(self, rows: Extracted, *, tfidf: bool) -> Vectors:
        """Those of rows; each row's depend on no other row, to the last bit."""
        directions = np.ascontiguousarray(self.components.T)
        topics = {name: np.zeros((len(rows), directions.shape[1])) for name in rows.counts}
        for start in range(0, len(rows) if directions.size else 0, CHUNK):
            for name, count in rows.counts.items():
                topics[name][start : start + CHUNK] = self._tfidf(count[start : start + CHUNK]) @ directions
        kept = {name: self._tfidf(count) for name, count in rows.counts.items()} if tfidf else {}
        return Vectors(kept, topics, rows.dense, np.zeros((len(rows), 2, 0)))

    def _tfidf(self, counts: Sparse) -> Sparse:
        transformer = TfidfTransformer(sublinear_tf=self.settings.sublinear_tf)
        transformer.idf_ = self.idf
        return transformer.transform(counts.astype(np.float64))


def extract(rows: Sequence[Row], task: Task, settings: Classical) -> Extracted:
    """How often each hashed n-gram stands in each field, and the dense features.

    Counts have no alternating sign: the IDF needs the number of texts with an n-gram, and 1 + log(n) needs n > 0.
    """
    dense = dense_features(rows, task, empty=not settings.dense)
    if not settings.reads_ngrams:
        none = sparse.csr_matrix((len(rows), 0), dtype=np.float32)
        return Extracted(dict.fromkeys(task.fields, none), dense)
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
            dtype=np.float32,
        )
        for analyzer, ngram_range in ranges
    ]
    counts = {}
    for name in task.fields:
        texts = [_text(row.fields[name]) for row in rows]
        counts[name] = sparse.hstack([vectorizer.transform(texts) for vectorizer in vectorizers], format="csr")
    return Extracted(counts, dense)


def _text(turns: Turns) -> bytes:
    """UTF-8 of a field; half a surrogate pair can't be decoded again, and is replaced then."""
    return "\n".join(turn or "" for turn in turns).encode("utf-8", "surrogatepass")


def hashed_columns(settings: Classical) -> int:
    """Columns of a field's n-grams: those of words, then those of characters; 0 where no model reads n-grams."""
    return settings.n_features * (1 if settings.char_ngram_range is None else 2) * settings.reads_ngrams


def contexts_of(task: Task) -> list[str]:
    """Fields that a swap leaves in place: the prompt, or all fields of a task without a swap."""
    return [name for name in task.fields if name not in (task.swap_fields or ())]


def winners_of(task: Task) -> list[int]:
    """Columns of the classes in which the first and the second side win."""
    return [task.classes.index(name) for name in task.swap_classes or ()]


def averaged(chances: Sequence[Floats], task: Task) -> Floats:
    """Logits `(N, O, C)` of the probabilities `(N, C)` that a model gives each order, each in its own columns.

    The mean of both orders, so that a swap exchanges the logits to the last bit. With several labels a row the
    probabilities are each label's own.
    """
    first = np.clip(chances[0], 1e-15, 1)  # a probability of 0 would have no logarithm
    if task.multi_label:
        logits: Floats = (np.log(first) - np.log(np.clip(1 - chances[0], 1e-15, 1)))[:, None]
        return logits
    if not task.swappable:
        return np.asarray(np.log(first))[:, None]
    swapped = list(task.swapped_columns)
    mean = (first + np.clip(chances[1], 1e-15, 1)[:, swapped]) / 2
    return np.asarray(np.log(np.stack([mean, mean[:, swapped]], axis=1)))


def columns_of_orders(vectors: Vectors, task: Task) -> list[Floats]:
    """What trees read, `(N, F)` for each order: logits, measures and topics, differences of sides, comparisons."""
    dense, topics = vectors.dense, vectors.topics
    if not task.swappable:
        return [np.concatenate([*dense.measures.values(), *topics.values(), vectors.logits[:, 0]], axis=1)]
    assert task.swap_fields is not None
    orders = []
    for order, (a, b) in enumerate((task.swap_fields, task.swap_fields[::-1])):
        columns = [vectors.logits[:, order], dense.oriented(a, b)]
        for values in (dense.measures, topics):
            columns += [values[a], values[b], values[a] - values[b]]
        for name in contexts_of(task):
            of_a, of_b = dense.comparisons[name, a], dense.comparisons[name, b]
            columns += [dense.measures[name], topics[name], of_a, of_b, of_a - of_b]
        orders.append(np.concatenate(columns, axis=1))
    return orders
