"""The token cache: a file's tokenised texts on disk, memory-mapped and made once.

It holds the tokens of every turn, before truncation and templates. So it depends only on texts and tokenizer, and
serves every fold, template and `max_length`; the recipe is applied to a row on access. A cache is named by a hash of
all its inputs; it is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pairclf.console import console, progress
from pairclf.errors import DataError
from pairclf.files import atomic_folder, locked, parsed, read_plain, sha256_file, write_json
from pairclf.inputs.render import Encoded, InputBuilder, TokenisedRow
from pairclf.inputs.tokenise import TurnTokenizer
from pairclf.inputs.truncate import Ids
from pairclf.signals import work_for_parent

FORMAT = 2  # goes into the name: raise it when what is stored changes
TOKENS, MANIFEST = "tokens.arrow", "tokens.json"
ROWS_AT_A_TIME = 1024
WORTH_PROCESSES = 8192  # rows; below it a process costs more to start than it saves

MOST_PROCESSES = 8  # on fewer cores than these: a stranger's bundle may ask for any number
MAX_MANIFEST = 1 << 20  # bytes
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "counts": pa.list_(pa.int32()),  # turns of each field
        "turns": pa.list_(pa.int32()),  # tokens of each turn, field after field
        "tokens": pa.list_(pa.int32()),  # of all turns
    }
)

Frames = Callable[[], Iterable[pl.DataFrame]]
"""Makes an iterator over the chunks of a canonical table."""


class RowDigest:
    """A hash of ids and texts, whatever chunks they come in, and the number of rows.

    Args:
        fields: columns of turns.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self.rows = 0
        self._columns = ("id", *fields)
        parts = ("turns", "lengths", "texts")
        self._hashes = {(name, part): hashlib.sha256() for name in self._columns for part in parts}

    def update(self, frame: pl.DataFrame) -> RowDigest:
        """Add the next chunk."""
        self.rows += len(frame)
        for name in self._columns:
            turns = frame[name].list.len() if name != "id" else pl.Series([1] * len(frame), dtype=pl.UInt32)
            texts = _flat(frame[name]) if name != "id" else frame[name]
            self._hashes[name, "turns"].update(turns.fill_null(2**32 - 1).to_numpy().tobytes())
            self._hashes[name, "lengths"].update(texts.str.len_bytes().fill_null(2**32 - 1).to_numpy().tobytes())
            self._hashes[name, "texts"].update((texts.str.join("").item() or "").encode())
        return self

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(digest.digest() for digest in self._hashes.values())).hexdigest()


class RowSource(NamedTuple):
    """The rows of a file that need not be read to be told from others.

    Attributes:
        frames: their chunks.
        digest: differs where the rows differ.
        rows: number of rows.
        step: begins a step of the work on them, such as tokenising; it returns a function that says whether the step
            must end before it has come to the last row.
    """

    frames: Frames
    digest: str
    rows: int
    step: Callable[[], Callable[[], bool]] = lambda: lambda: False

    @classmethod
    def of(cls, frames: Frames, fields: Sequence[str]) -> RowSource:
        """Read the rows once for their digest."""
        digest = RowDigest(fields)
        for frame in frames():
            digest.update(frame)
        return cls(frames, digest.hexdigest(), digest.rows)


class TokenCache(Sequence[TokenisedRow]):
    """The rows of a cache, read from the mapped file on access; `len` and indices as in the table.

    Attributes:
        ids: the rows' ids, `(N,)` String.
        lengths: `(N, F)` int64, tokens of each field without breaks between turns.
    """

    def __init__(self, folder: Path, fields: Sequence[str]) -> None:
        self._fields = tuple(fields)
        batches = pa.ipc.open_stream(pa.memory_map(str(folder / TOKENS))).read_all().to_batches()
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)]).tolist()
        columns = [[batch.column(name) for name in ("counts", "turns", "tokens")] for batch in batches]
        self._batches = [[(_mapped(column.offsets), _mapped(column.values)) for column in batch] for batch in columns]
        ids = [pl.Series("id", batch.column("id")) for batch in batches]
        self.ids = pl.concat(ids) if ids else pl.Series("id", [], dtype=pl.String)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> TokenisedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenisedRow]: ...
    def __getitem__(self, index: int | slice) -> TokenisedRow | list[TokenisedRow]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch = bisect_right(self._starts, index) - 1
        at = index - self._starts[batch]
        counts, lengths, tokens = (values[ends[at] : ends[at + 1]] for ends, values in self._batches[batch])
        turns = np.split(tokens, np.cumsum(lengths[:-1])) if len(lengths) else []
        ends = np.cumsum(counts)
        return {name: turns[end - count : end] for name, count, end in zip(self._fields, counts, ends, strict=True)}

    @property
    def lengths(self) -> NDArray[np.int64]:
        rows = []
        for (_, counts), (ends, lengths), _ in self._batches:
            before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            turns = np.concatenate([[0], np.cumsum(counts)]) + ends[0]  # where each field's turns begin and end
            rows.append(np.diff(before[turns]).reshape(-1, len(self._fields)))
        return np.concatenate(rows) if rows else np.zeros((0, len(self._fields)), dtype=np.int64)


class EncodedRows(Sequence[tuple[Encoded, ...]]):
    """Some rows of a cache, encoded by the builder on access.

    Args:
        cache: the token cache.
        builder: the recipe.
        rows: indices into the cache, in the order wanted; none: all.
    """

    def __init__(self, cache: TokenCache, builder: InputBuilder, rows: Sequence[int] | None = None) -> None:
        self._cache = cache
        self.builder = builder
        self._rows = range(len(cache)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> tuple[Encoded, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Encoded, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Encoded, ...] | list[tuple[Encoded, ...]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self.builder.assemble(self._cache[self._rows[index]], self._cache.ids[self._rows[index]])

    def of(self, ids: pl.Series) -> EncodedRows:
        """The rows with these ids, in their order.

        Raises:
            DataError: an id is not in the cache.
        """
        cached = pl.DataFrame({"id": self._cache.ids}).with_row_index("row")
        matches = pl.DataFrame({"id": ids}).join(cached, on="id", how="left", maintain_order="left")
        if matches["row"].null_count():
            missing = matches.filter(pl.col("row").is_null())["id"].to_list()
            raise DataError("rows were not tokenised", rows=missing, remedy="read the same files again")
        return EncodedRows(self._cache, self.builder, matches["row"].to_list())

    def built_by(self, builder: InputBuilder) -> EncodedRows:
        """The same rows by another recipe with the same tokenizer."""
        return EncodedRows(self._cache, builder, self._rows)


def token_cache(
    folder: Path,
    rows: Frames | RowSource,
    tokenizer: TurnTokenizer,
    fields: Sequence[str],
    *,
    processes: int | None = None,
) -> TokenCache:
    """Open the cache of these rows in `folder`; build it if it does not exist.

    Args:
        folder: holds a folder a cache.
        rows: chunks of the canonical table, which are read twice; or a source, which is read once, and not to its end
            if there is no time: the cache then has its first rows, and is built again by the next call.
        tokenizer: what turns texts into tokens.
        fields: columns of turns, in the task's order.
        processes: that tokenise at the same time; none: one a core, or one for few rows.
    """
    source = rows if isinstance(rows, RowSource) else RowSource.of(rows, fields)
    made_from = _made_from(source, tokenizer, fields)
    place = _place(folder, made_from)
    if not _is_sound(place, source.rows):
        with locked(folder / f".{place.name}.lock"):  # several folds may be started at once
            if not _is_sound(place, source.rows):
                _replace(place, made_from, source, tokenizer, fields, processes=processes)
    return TokenCache(place, fields)


def find_cache(folder: Path, source: RowSource, tokenizer: TurnTokenizer, fields: Sequence[str]) -> TokenCache | None:
    """The cache of these rows, if `token_cache` built it before; None: there is none that can be used."""
    place = _place(folder, _made_from(source, tokenizer, fields))
    return TokenCache(place, fields) if _is_sound(place, source.rows) else None


def _made_from(source: RowSource, tokenizer: TurnTokenizer, fields: Sequence[str]) -> dict[str, Any]:
    return {"format": FORMAT, "fields": list(fields), "data": source.digest, "tokenizer": tokenizer.fingerprint}


def _place(folder: Path, made_from: dict[str, Any]) -> Path:
    return folder / hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def _is_sound(place: Path, rows: int) -> bool:
    """Whether the cache exists, is unchanged, has all rows, and all its offsets are valid.

    A shared run folder may contain somebody else's cache; invalid offsets would read other memory.
    """
    try:
        manifest = parsed(read_plain(place / MANIFEST, MAX_MANIFEST))
        if (
            manifest["rows"] != rows
            or not (place / TOKENS).is_file()
            or manifest["sha256"] != sha256_file(place / TOKENS)
        ):
            return False
        with pa.memory_map(str(place / TOKENS)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                batch.validate(full=True)
            return bool(batches.schema.equals(_SCHEMA))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _replace(
    place: Path,
    made_from: dict[str, Any],
    source: RowSource,
    tokenizer: TurnTokenizer,
    fields: Sequence[str],
    *,
    processes: int | None,
) -> None:
    if place.exists():
        console.print(f"note: the token cache {place} is damaged or incomplete, and is rebuilt")
    cores = len(os.sched_getaffinity(0))
    processes = min(processes or (cores if source.rows >= WORTH_PROCESSES else 1), max(cores, MOST_PROCESSES))
    with atomic_folder(place, known_by=MANIFEST if (place / MANIFEST).exists() else TOKENS) as new:
        rows = _build(new / TOKENS, source, tokenizer, fields, processes=processes)
        write_json(new / MANIFEST, {**made_from, "rows": rows, "sha256": sha256_file(new / TOKENS)})


def _flat(turns: pl.Series) -> pl.Series:
    """All turns of all rows in sequence. (`explode` would leave a null for a row without turns.)"""
    return turns.filter(turns.list.len() > 0).explode()


def _build(path: Path, source: RowSource, tokenizer: TurnTokenizer, fields: Sequence[str], *, processes: int) -> int:
    """Write the tokens; returns the number of rows written."""
    rows = 0
    chunks = (chunk for frame in source.frames() for chunk in frame.select("id", *fields).iter_slices(ROWS_AT_A_TIME))
    is_over = source.step()
    timely = takewhile(lambda chunk: not is_over(), chunks)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
        progress("tokenise", total=source.rows) as advance,
    ):
        for table in _tokenised(timely, tokenizer, fields, processes, is_over):
            writer.write_table(table)
            rows += len(table)
            advance(len(table))
    return rows


def _tokenised(
    chunks: Iterable[pl.DataFrame],
    tokenizer: TurnTokenizer,
    fields: Sequence[str],
    processes: int,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[pa.Table]:
    """One table for each chunk, in order; only a few chunks are in memory at a time."""
    if processes == 1:
        for chunk in chunks:
            yield tokenise_chunk(chunk, tokenizer, fields)
        return
    # A forked process would inherit the locks of polars' and tokenizers' threads.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (tokenizer.to_json(), tuple(fields)))
    with pool:
        waiting: deque[Future[pa.Table]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            if is_over():  # a signal that ended this process's work may have killed one that had just been started
                return
            remedy = "free some memory, or set inputs.num_proc=1"
            raise DataError("a process that tokenised was killed", remedy=remedy) from error


_worker: list[tuple[TurnTokenizer, tuple[str, ...]]] = []
"""In a process of the pool: what every chunk needs."""


def _start(tokenizer: str, fields: tuple[str, ...]) -> None:
    work_for_parent()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # the processes are the threads
    _worker.append((TurnTokenizer.from_json(tokenizer), fields))


def _work(chunk: pl.DataFrame) -> pa.Table:
    return tokenise_chunk(chunk, *_worker[0])


def tokenise_chunk(chunk: pl.DataFrame, tokenizer: TurnTokenizer, fields: Sequence[str]) -> pa.Table:
    """The rows of a canonical table as the cache holds them."""
    counts = chunk.select(pl.col(name).list.len() for name in fields).to_numpy().astype(np.int32)
    turns = chunk.select(pl.concat_list(fields)).to_series()
    texts = _flat(turns).fill_null("").to_list()
    different = dict.fromkeys(texts)
    ids = dict(zip(different, tokenizer(list(different), special=False), strict=True))
    sequences: list[Ids] = [ids[text] for text in texts]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    by_row = np.concatenate([[0], np.cumsum(counts.sum(axis=1))]).astype(np.int32)
    by_turn = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate(sequences) if sequences else np.zeros(0, dtype=np.int32)
    columns = [
        chunk["id"].to_arrow().cast(pa.string()),
        _lists(np.arange(0, counts.size + 1, len(fields), dtype=np.int32), counts.reshape(-1)),
        _lists(by_row, lengths),
        _lists(by_turn[by_row].astype(np.int32), tokens),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


# To numpy and back by way of polars: pyarrow imports pandas for it, to ask whether an array is one of its.


def _mapped(array: pa.Array) -> NDArray[np.int32]:
    """The memory of an array, which is not copied."""
    return pl.Series(array).to_numpy(allow_copy=False)


def _lists(offsets: NDArray[np.int32], values: NDArray[np.int32]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pl.Series(offsets).to_arrow(), pl.Series(values).to_arrow())
