"""Duplicate prompts: the normal form in which prompts are compared, and the search for near duplicates.

Two prompts are near duplicates if they meet in a bucket of MinHash LSH (datasketch) and the exact Jaccard index of
their sets of character 5-grams (shingles) reaches the threshold. Hence:

- there are no false positives: the exact index of each candidate is computed;
- a pair at or above the threshold t is missed with a probability of at most (1 - t ** rows) ** bands, which is
  less than 1 - RECALL: 1 in 20,000 if t is 0.8, the default, and 1 in 5 billion for a pair at 0.9 under that t;
- the result depends on the two prompts alone, so every search gives the same one.

A bundle can't keep all shingles of its training prompts. It keeps `samples`: the `SAMPLE` lowest hashes of each. Two
prompts with fewer shingles are still compared in full. The index of longer prompts is estimated from the lowest hashes
of their union, with a standard error of 0.025 at an index of 0.8. They count as near duplicates from three standard
errors below the threshold on, so that none is missed.

Source: Broder, On the resemblance and containment of documents (1997); Leskovec et al., Mining of Massive Datasets, 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.console import progress
from pairclf.data.formats import CONTROL
from pairclf.task import Task

if TYPE_CHECKING:
    from datasketch import MinHash

Hashes = NDArray[np.uint64] | NDArray[np.uint32]
Places = NDArray[np.int64]

SHINGLE = 5
"""Characters of a shingle. A shorter prompt has none, and is near to none but its equals."""

SAMPLE = 256
"""Hashes of a prompt's shingles that are kept where all of them are too many: 4 bytes each."""

PERMUTATIONS = 128
RECALL = 0.999

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits well spread: 2**64 over the golden ratio
_BLOCK = 8192  # shingles sketched at once: 128 permutations of them fit a cache, and no prompt is too long for memory
_SHOWN, _STEP = 5_000, 500  # prompts from which a search takes seconds, and between two moves of its bar


def normalised_prompts(frame: pl.DataFrame, task: Task) -> pl.Series:
    """The texts `(N,)` that prompts are compared by, "" where there is none; String.

    They hold the fields that a swap leaves in place, in NFKC and lower case, white space collapsed, control characters
    removed. Where a swap moves every field, their sorted texts stand together, so that a pair and its mirror are equal.
    """
    staying = [name for name in task.fields if name not in (task.swap_fields or ())]
    texts = [normalised_texts(frame[name].list.join("\n")) for name in staying or task.fields]
    cells = pl.DataFrame([text.alias(str(place)) for place, text in enumerate(texts)])
    joined = pl.concat_list(pl.all()) if staying else pl.concat_list(pl.all()).list.sort()
    return cells.select(joined.list.join("\n").str.strip_chars().fill_null("").alias("prompt")).to_series()


def normalised_texts(texts: pl.Series) -> pl.Series:
    """Texts `(N,)` in the normal form of `normalised_prompts`."""
    # ASCII is in normal form, and most prompts are ASCII.
    strange = texts.str.len_bytes() != texts.str.len_chars()
    if strange.any():
        texts = texts.scatter(strange.arg_true(), texts.filter(strange).str.normalize("NFKC"))
    lowered = texts.str.replace_all(CONTROL, "").str.to_lowercase()
    lowered = lowered.str.replace_many(["ß", "ς"], ["ss", "σ"])  # STRASSE is Straße, too
    return lowered.str.replace_all(r"\s{2,}|[^\S ]", " ").str.strip_chars()  # most white space is one blank, and stays


def near_overlap(frame: pl.DataFrame, seen: pl.DataFrame, task: Task, threshold: float | None) -> pl.Series:
    """Which rows of `frame` have a prompt equal, or nearly equal, to one of `seen`; Boolean `(N,)`.

    Args:
        frame: canonical table whose prompts are looked up.
        seen: canonical table of the prompts to compare with.
        task: names the fields that make a prompt.
        threshold: Jaccard index from which prompts are nearly equal; None: equal ones alone overlap.

    Rows without prompt text never overlap.
    """
    prompts, seen_prompts = (normalised_prompts(table, task) for table in (frame, seen))
    seen_prompts = seen_prompts.filter(seen_prompts != "").unique(maintain_order=True)
    overlap = prompts.is_in(seen_prompts.to_list()).alias("overlap")
    fresh = prompts.filter(~overlap & (prompts != "")).unique(maintain_order=True)
    if threshold is None or fresh.is_empty():
        return overlap
    labels = np.concatenate([np.zeros(len(seen_prompts), np.int64), np.full(len(fresh), -1)])
    index, places = NearIndex.of([*seen_prompts, *fresh], threshold), range(len(seen_prompts), len(labels))
    near = [len(met) > 0 for _, met in index.walk(labels, places)]
    return overlap | prompts.is_in(fresh.filter(pl.Series(near)).to_list())


def clusters(prompts: Sequence[str], threshold: float | None) -> Places:
    """Connected components of near duplicates among different normalised prompts.

    Returns:
        `(P,)`: the place of the first prompt in each prompt's component.
    """
    firsts = np.arange(len(prompts))
    for place, met in NearIndex.of(prompts, threshold).walk(firsts):
        if len(met):
            joined = np.sort(firsts[met])
            firsts[place] = joined[0]
            for first in joined[1:]:
                firsts[firsts == first] = joined[0]
    return firsts


def same_rows(frame: pl.DataFrame, task: Task, threshold: float | None) -> tuple[Places, NDArray[np.bool_]]:
    """Which rows have equal, or nearly equal, texts in every field; of a pair in either order.

    Args:
        frame: canonical table of `N` rows.
        task: its fields and their swap.
        threshold: Jaccard index from which two texts are nearly equal; None: equal ones alone.

    Returns:
        `(N,)` numbers, equal for rows of one group; and `(N,)`, which rows have their sides exchanged beside others of
        their group, so that their labels are to be swapped before the two are compared.
    """
    columns = [normalised_texts(frame[name].list.join("\n").fill_null("")).to_list() for name in task.fields]
    mirror = [task.fields.index(name) for name in task.swapped_fields.values()]
    rows = [(row, tuple(row[place] for place in mirror)) for row in zip(*columns, strict=True)]
    turned = np.array([other < row for row, other in rows], dtype=np.bool_)
    numbers: dict[tuple[str, ...], int] = {}
    number = np.array([numbers.setdefault(min(both), len(numbers)) for both in rows], dtype=np.int64)
    if threshold is None:
        return number, turned
    texts = list(numbers)
    firsts = clusters(["\n".join(row) for row in texts], threshold)
    for place in np.flatnonzero(firsts != np.arange(len(texts))).tolist():  # candidates: now field by field
        first, own = texts[firsts[place]], texts[place]
        straight = min(map(_resemblance, own, first))
        exchanged = min(map(_resemblance, [own[other] for other in mirror], first))
        if max(straight, exchanged) < threshold:
            firsts[place] = place
        elif exchanged > straight:
            turned[number == place] ^= True
    return firsts[number], turned


def _resemblance(text: str, other: str) -> float:
    """The Jaccard index of two normalised texts; 1 for equal ones, also where they are shorter than a shingle."""
    if text == other:
        return 1.0
    own, theirs = shingles(text), shingles(other)
    shared = len(np.intersect1d(own, theirs, assume_unique=True))
    return shared / max(1, len(own) + len(theirs) - shared)


def samples(prompts: pl.Series) -> pl.Series:
    """The `SAMPLE` lowest hashes of each normalised prompt's shingles, their upper 32 bits, ascending; List(UInt32)."""
    lowest = [np.unique(shingles(prompt) >> np.uint64(32)).astype(np.uint32)[:SAMPLE] for prompt in prompts]
    return pl.Series("sample", lowest, dtype=pl.List(pl.UInt32))


def near_samples(
    fresh: pl.Series, known: pl.Series, searches: Sequence[tuple[pl.Series, pl.Series]], threshold: float
) -> list[pl.Series]:
    """For each search, the mask `(N,)` of fresh prompts that are near to a known one.

    Args:
        fresh: `samples` of prompts `(N,)`.
        known: `samples` of the prompts to compare with `(K,)`, without repeats.
        searches: masks of the known `(K,)` and the fresh `(N,)` prompts of each search. All share one index.
        threshold: Jaccard index from which prompts are nearly equal.
    """
    index = NearIndex([sample.to_numpy() for sample in (*known, *fresh)], threshold, sampled=True)
    near_by_search = []
    for counts, asked in searches:
        labels = np.full(len(known) + len(fresh), -1)
        labels[: len(known)][counts.to_numpy()] = 0
        places = (asked.arg_true() + len(known)).to_list()
        near = [place - len(known) for place, met in index.walk(labels, places) if len(met)]
        near_by_search.append(pl.Series(np.isin(np.arange(len(fresh)), near)))
    return near_by_search


class NearIndex:
    """Finds the prompts that are near to one.

    Args:
        sets: the shingles of each prompt, or their `samples`.
        threshold: Jaccard index from which two are near; None: none is.
        sampled: the sets are `samples`.
    """

    def __init__(self, sets: Sequence[Hashes], threshold: float | None, *, sampled: bool = False) -> None:
        self._threshold = threshold or 0.0
        self._sampled = sampled
        self._shingles = sets
        self._buckets: dict[int, list[Places]] = {}
        if threshold is not None:
            self._fill_buckets(*_bands(_of_samples(_lenient(threshold)) if sampled else threshold))
        self._sizes = np.array([len(hashes) for hashes in sets], dtype=np.int64)

    @classmethod
    def of(cls, prompts: Sequence[str], threshold: float | None) -> NearIndex:
        """That of normalised and different prompts, compared in full."""
        return cls([] if threshold is None else [shingles(prompt) for prompt in prompts], threshold)

    def _fill_buckets(self, bands: int, rows: int) -> None:
        from datasketch import MinHash, MinHashLSH  # half a second, which most commands need not wait for

        lsh, count = MinHashLSH(num_perm=PERMUTATIONS, params=(bands, rows)), len(self._shingles)
        blank = MinHash(num_perm=PERMUTATIONS, hashfunc=_as_it_is)
        with progress("Sketching prompts", count, visible=count >= _SHOWN) as advance:
            for place, hashes in enumerate(self._shingles):
                if len(hashes):
                    lsh.insert(place, _sketch(blank, hashes), check_duplication=False)
                if place % _STEP == 0:
                    advance(min(_STEP, count - place))
        for table in lsh.hashtables:
            for key in table.keys():  # noqa: SIM118 (a storage of datasketch's, not a dict)
                places = table.get(key)
                if len(places) > 1:
                    bucket = np.array(sorted(places))
                    for place in places:
                        self._buckets.setdefault(place, []).append(bucket)

    def walk(self, labels: Places, places: Sequence[int] | None = None) -> Iterator[tuple[int, Places]]:
        """Each of the places (None: all), and what `near` finds for it; the labels may change on the way."""
        places = range(len(labels)) if places is None else places
        with progress("Joining near prompts", len(places), visible=len(places) >= _SHOWN) as advance:
            for number, place in enumerate(places):
                yield place, self.near(place, labels)
                if number % _STEP == 0:
                    advance(min(_STEP, len(places) - number))

    def near(self, place: int, labels: Places) -> Places:
        """Prompts before `place` that are near to it, one per label.

        Args:
            place: the prompt.
            labels: `(P,)`; prompts with a label below 0 are not considered.

        One per label is enough, and thousands of prompts may be near to each other: after a match, prompts of the same
        label are skipped. The number of compared prompts doubles from step to step, so that many near prompts cost few
        comparisons, and many false candidates cost few steps.
        """
        neighbours: list[int] = []
        step = 1
        compared = np.zeros(place, dtype=np.bool_)
        for bucket in self._buckets.get(place, ()):
            left = bucket[: np.searchsorted(bucket, place)]
            for neighbour in neighbours:
                left = left[labels[left] != labels[neighbour]]
            left = left[(labels[left] >= 0) & ~compared[left]]
            while len(left):
                asked, left = left[:step], left[step:]
                compared[asked] = True
                for neighbour in asked[self._alike(place, asked)].tolist():
                    if all(labels[neighbour] != labels[other] for other in neighbours):
                        neighbours.append(neighbour)
                        left = left[labels[left] != labels[neighbour]]
                step *= 2
        return np.array(neighbours, dtype=np.int64)

    def _alike(self, place: int, others: Places) -> NDArray[np.bool_]:
        """Whether the Jaccard index of `place` and each of `others` reaches the threshold; `(M,)`."""
        if not self._sampled:
            return self._alike_in_full(place, others)
        cut = (self._sizes[others] >= SAMPLE) | (len(self._shingles[place]) >= SAMPLE)
        alike = np.zeros(len(others), dtype=np.bool_)
        alike[~cut] = self._alike_in_full(place, others[~cut])
        own, least = self._shingles[place], _lenient(self._threshold)
        alike[cut] = [_estimate(own, self._shingles[other]) >= least for other in others[cut]]
        return alike

    def _alike_in_full(self, place: int, others: Places) -> NDArray[np.bool_]:
        own, sizes = self._shingles[place], self._sizes[others]
        alike: NDArray[np.bool_] = np.minimum(sizes, len(own)) / np.maximum(sizes, len(own)) >= self._threshold
        for contained in (_at_most_in, _in):  # two cheap bounds rule out most candidates: sizes, and slots
            if alike.any():
                sizes = self._sizes[others[alike]]
                theirs = np.concatenate([self._shingles[other] for other in others[alike]])
                shared = np.add.reduceat(contained(own, theirs), np.cumsum(sizes) - sizes, dtype=np.int64)
                alike[alike] = shared / (len(own) + sizes - shared) >= self._threshold
        return alike


def _lenient(threshold: float) -> float:
    """Three standard errors of `_estimate` below the threshold."""
    return float(threshold - 3 * np.sqrt(threshold * (1 - threshold) / SAMPLE))


def _of_samples(resemblance: float) -> float:
    """The lowest Jaccard index of two samples as sets, if that of the whole sets is `resemblance`.

    It is lowest if one set contains the other: the larger set's sample ends sooner, before a part of the smaller one's.
    """
    return resemblance / (2 - resemblance)


def _estimate(sample: Hashes, other: Hashes) -> float:
    """The Jaccard index of two sets, from their `samples`: the fraction of their union's lowest hashes in both."""
    lowest = np.union1d(sample, other)[:SAMPLE]
    both = np.intersect1d(sample, other, assume_unique=True)
    return float(np.searchsorted(both, lowest[-1], side="right") / len(lowest))


def _at_most_in(own: Hashes, theirs: Hashes) -> NDArray[np.bool_]:
    """As `_in`, and now and then true of a hash that is not: told by its lowest 16 bits, ten times as fast."""
    slots = np.zeros(1 << 16, dtype=np.bool_)
    slots[own.astype(np.uint16)] = True
    return slots[theirs.astype(np.uint16)]


def _in(own: Hashes, theirs: Hashes) -> NDArray[np.bool_]:
    """Which of `theirs` are in `own`, which is sorted."""
    met: NDArray[np.bool_] = own[np.minimum(np.searchsorted(own, theirs), len(own) - 1)] == theirs
    return met


def shingles(prompt: str) -> NDArray[np.uint64]:
    """The different character 5-grams of a text as 64-bit hashes, `(S,)`, in ascending order.

    Polynomials of the code points, modulo 2**64: in a pair of prompts with 10,000 shingles each, two different ones
    have the same hash with a probability of 1 in 10**11, so that sets of hashes are as good as sets of texts.
    """
    codes = np.frombuffer(prompt.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = max(len(codes) - SHINGLE + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for start in range(SHINGLE):
        hashes = hashes * _MULTIPLIER + codes[start : start + count]
    hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes * _MULTIPLIER)


def _as_it_is(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return hashes


def _sketch(blank: MinHash, hashes: Hashes) -> MinHash:
    """The MinHash of a set; `blank` holds the permutations. A whole block is one "value" to it, so numpy does it all.

    No long prompt is cut: sketches of two beginnings are unlike where a text only has a page put before it. Blocks
    bound the memory instead, and the time is linear.
    """
    sketch = blank.copy()
    # datasketch permutes 32 bits; samples have no more.
    high = hashes if hashes.dtype == np.uint32 else (hashes >> np.uint64(32)).astype(np.uint32)
    for start in range(0, len(high), _BLOCK):
        sketch.update_batch([high[start : start + _BLOCK]])
    return sketch


def _bands(threshold: float) -> tuple[int, int]:
    """Bands, and rows a band: as many rows as leave a pair at the threshold its `RECALL`; fewest false candidates."""
    for rows in range(PERMUTATIONS // 2, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1
