"""The token cache: what the tokenizer makes of a file's texts, on disk, memory-mapped, made once.

It holds the tokens of every turn before anything is cut or put into words. So it depends on the texts and on the
tokenizer alone, serves every fold, template and `max_length`, and a recipe is applied to a row when it is asked for.
A cache is named by a hash of all that it was made from; it is written under another name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, overload

import numpy as np
import polars as pl
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from pairclf.console import console, progress
from pairclf.errors import DataError
from pairclf.files import atomic_folder, locked, parsed, read_plain, sha256_file, write_json
from pairclf.inputs.render import Encoded, InputBuilder, TokenisedRow
from pairclf.inputs.tokenise import TurnTokenizer
from pairclf.inputs.truncate import Ids

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
"""Makes an iterator over the chunks of a canonical table; it is called once for the name and once for the tokens."""


class TokenCache(Sequence[TokenisedRow]):
    """The rows of a cache, read from the mapped file when they are asked for; `len` and indices as in the table.

    Attributes:
        ids: the rows' ids, `(N,)` String.
        lengths: `(N, F)` int64, tokens of each field without breaks between turns.
    """

    def __init__(self, folder: Path, fields: Sequence[str]) -> None:
        self._fields = tuple(fields)
        batches = Dataset.from_file(str(folder / TOKENS)).data.to_batches()
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)]).tolist()
        columns = [[batch.column(name) for name in ("counts", "turns", "tokens")] for batch in batches]
        self._batches = [[(one.offsets.to_numpy(), one.values.to_numpy()) for one in batch] for batch in columns]
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
            return [self[one] for one in range(*index.indices(len(self)))]
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
    """Some rows of a cache as the builder shows them, each made when it is asked for.

    Args:
        cache: the token cache.
        builder: the recipe.
        rows: indices into the cache, in the order wanted; none: all.
    """

    def __init__(self, cache: TokenCache, builder: InputBuilder, rows: Sequence[int] | None = None) -> None:
        self._cache = cache
        self._builder = builder
        self._rows = range(len(cache)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> tuple[Encoded, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Encoded, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Encoded, ...] | list[tuple[Encoded, ...]]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self._builder.assemble(self._cache[self._rows[index]])

    def of(self, ids: pl.Series) -> EncodedRows:
        """Those with the given ids, in the order given.

        Raises:
            DataError: an id is not in the cache.
        """
        known = pl.DataFrame({"id": self._cache.ids}).with_row_index("row")
        found = pl.DataFrame({"id": ids}).join(known, on="id", how="left", maintain_order="left")
        if found["row"].null_count():
            missing = found.filter(pl.col("row").is_null())["id"].to_list()
            raise DataError("rows were not tokenised", rows=missing, remedy="read the same files again")
        return EncodedRows(self._cache, self._builder, found["row"].to_list())


def token_cache(
    folder: Path, frames: Frames, tokenizer: TurnTokenizer, fields: Sequence[str], *, processes: int | None = None
) -> TokenCache:
    """The cache of these rows in `folder`, opened if it is there, built if it is not.

    Args:
        folder: holds a folder a cache.
        frames: chunks of the canonical table.
        tokenizer: what turns texts into tokens.
        fields: columns of turns, in the task's order.
        processes: that tokenise at the same time; none: one a core, or one for few rows.
    """
    digest, rows = _digest(frames(), fields)
    made_from = {"format": FORMAT, "fields": list(fields), "data": digest, "tokenizer": tokenizer.fingerprint}
    place = folder / hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    if not _is_sound(place):
        with locked(folder / f".{place.name}.lock"):  # several folds may be started at once
            if not _is_sound(place):
                _replace(place, made_from, frames(), tokenizer, fields, processes=processes, rows=rows)
    return TokenCache(place, fields)


def _is_sound(place: Path) -> bool:
    """Whether the cache is there, byte by byte as it was written, and no place in it leads out of the file.

    A shared run folder may hold a stranger's; read without a look, its offsets would lead into other memory.
    """
    try:
        made = parsed(read_plain(place / MANIFEST, MAX_MANIFEST))
        if not (place / TOKENS).is_file() or made["sha256"] != sha256_file(place / TOKENS):
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
    frames: Iterable[pl.DataFrame],
    tokenizer: TurnTokenizer,
    fields: Sequence[str],
    *,
    processes: int | None,
    rows: int,
) -> None:
    if place.exists():
        console.print(f"note: the token cache {place} is damaged, and is built again")
    cores = len(os.sched_getaffinity(0))
    processes = min(processes or (cores if rows >= WORTH_PROCESSES else 1), max(cores, MOST_PROCESSES))
    with atomic_folder(place, known_by=MANIFEST if (place / MANIFEST).exists() else TOKENS) as new:
        _build(new / TOKENS, frames, tokenizer, fields, processes=processes, rows=rows)
        write_json(new / MANIFEST, {**made_from, "rows": rows, "sha256": sha256_file(new / TOKENS)})


def _digest(frames: Iterable[pl.DataFrame], fields: Sequence[str]) -> tuple[str, int]:
    """A hash of ids and texts, whatever chunks they come in, and the number of rows."""
    rows = 0
    hashes = {(name, part): hashlib.sha256() for name in ("id", *fields) for part in ("turns", "lengths", "texts")}
    for frame in frames:
        rows += len(frame)
        for name in ("id", *fields):
            turns = frame[name].list.len() if name != "id" else pl.Series([1] * len(frame), dtype=pl.UInt32)
            texts = _flat(frame[name]) if name != "id" else frame[name]
            hashes[name, "turns"].update(turns.to_numpy().tobytes())
            hashes[name, "lengths"].update(texts.str.len_bytes().fill_null(2**32 - 1).to_numpy().tobytes())
            hashes[name, "texts"].update((texts.str.join("").item() or "").encode())
    whole = hashlib.sha256(b"".join(one.digest() for one in hashes.values()))
    return whole.hexdigest(), rows


def _flat(turns: pl.Series) -> pl.Series:
    """All turns of all rows, one after the other. (Exploded, a row without turns would leave a null.)"""
    return turns.filter(turns.list.len() > 0).explode()


def _build(
    path: Path,
    frames: Iterable[pl.DataFrame],
    tokenizer: TurnTokenizer,
    fields: Sequence[str],
    *,
    processes: int,
    rows: int,
) -> None:
    chunks = (chunk for frame in frames for chunk in frame.select("id", *fields).iter_slices(ROWS_AT_A_TIME))
    with ArrowWriter(path=str(path), schema=_SCHEMA) as writer, progress("tokenise", total=rows) as advance:
        for table in _tokenised(chunks, tokenizer, fields, processes):
            writer.write_table(table)
            advance(len(table))
        writer.finalize()


def _tokenised(
    chunks: Iterable[pl.DataFrame], tokenizer: TurnTokenizer, fields: Sequence[str], processes: int
) -> Iterator[pa.Table]:
    """A table a chunk, in their order; no more than a few chunks are held at a time."""
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
            remedy = "free some memory, or set inputs.processes=1"
            raise DataError("a process that tokenised was killed", remedy=remedy) from error


_worker: list[tuple[TurnTokenizer, tuple[str, ...]]] = []
"""In a process of the pool: what every chunk needs."""


def _start(tokenizer: str, fields: tuple[str, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    Thread(target=_leave_with_parent, daemon=True).start()
    _worker.append((TurnTokenizer.from_json(tokenizer), fields))


def _leave_with_parent() -> None:
    """A process of the pool would otherwise wait for ever for work from a parent that was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: pl.DataFrame) -> pa.Table:
    return tokenise_chunk(chunk, *_worker[0])


def tokenise_chunk(chunk: pl.DataFrame, tokenizer: TurnTokenizer, fields: Sequence[str]) -> pa.Table:
    """The rows of a canonical table as the cache holds them."""
    counts = chunk.select(pl.col(name).list.len() for name in fields).to_numpy().astype(np.int32)
    turns = chunk.select(pl.concat_list(fields)).to_series()
    texts = _flat(turns).fill_null("").to_list()
    different = dict.fromkeys(texts)
    ids = dict(zip(different, tokenizer(list(different), special=False), strict=True))
    found: list[Ids] = [ids[text] for text in texts]
    lengths = np.array([len(one) for one in found], dtype=np.int32)
    by_row = np.concatenate([[0], np.cumsum(counts.sum(axis=1))]).astype(np.int32)
    by_turn = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate(found) if found else np.zeros(0, dtype=np.int32)
    columns = [
        chunk["id"].to_arrow().cast(pa.string()),
        _lists(np.arange(0, counts.size + 1, len(fields), dtype=np.int32), counts.reshape(-1)),
        _lists(by_row, lengths),
        _lists(by_turn[by_row].astype(np.int32), tokens),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _lists(offsets: NDArray[np.int32], values: NDArray[np.int32]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
