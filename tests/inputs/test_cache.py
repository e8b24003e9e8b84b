"""The token cache: the same inputs as without it, whatever the chunks and processes; never stale, never half there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pyarrow as pa
import pytest
from clocks_support import comes_true
from datasets import Dataset
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.forked import forked

from pairclf.config import resolve
from pairclf.data.rows import to_rows
from pairclf.errors import DataError
from pairclf.inputs import cache as module
from pairclf.inputs.cache import MANIFEST, TOKENS, EncodedRows, RowSource, TokenCache, token_cache
from pairclf.inputs.render import Encoded, InputBuilder
from pairclf.inputs.tokenise import TurnTokenizer
from pairclf.model.backbone import load_tokenizer
from pairclf.task import LMSYS

TURNS = st.lists(st.none() | st.text(alphabet="ab é<eos>", max_size=12), max_size=4)
TABLES = st.lists(st.tuples(TURNS, TURNS, TURNS), max_size=12)
ROWS = [(["hi", None], ["yes"], ["no " * 9]), ([], [""], []), (["hi"], ["a" * 300, "b"], ["c"]), ([None], ["é"], ["é"])]


def frame_of(rows: list[tuple[list[str | None], ...]]) -> pl.DataFrame:
    turns = [
        pl.Series(name, [row[at] for row in rows], dtype=pl.List(pl.String)) for at, name in enumerate(LMSYS.fields)
    ]
    ids = pl.Series("id", [f"r{number}" for number in range(len(rows))], dtype=pl.String)
    target = pl.Series("target", [None] * len(rows), dtype=pl.List(pl.Float64))
    return pl.DataFrame([ids, *turns, target]).with_columns(weight=pl.lit(1.0))


@pytest.fixture(scope="session")
def builder(base_of: Callable[[str], Path]) -> InputBuilder:
    tokenizer = load_tokenizer(str(base_of("gemma2")))
    return InputBuilder(tokenizer, LMSYS, resolve({"inputs": {"max_length": 120}}).inputs)


def cache_of(
    folder: Path, frame: pl.DataFrame, builder: InputBuilder, *, size: int = 3, processes: int = 1
) -> TokenCache:
    return token_cache(folder, lambda: frame.iter_slices(size), builder.tokenizer, LMSYS.fields, processes=processes)


def plain(encoded: tuple[Encoded, ...]) -> list[Any]:
    return [(one.ids.tolist(), one.spans, one.dropped) for one in encoded]


@hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25
)
@given(rows=TABLES, size=st.integers(1, 5))
def test_token_cache_rows_are_the_rows_themselves(
    tmp_path_factory: pytest.TempPathFactory, builder: InputBuilder, rows: list[tuple[Any, ...]], size: int
) -> None:
    frame = frame_of(rows)
    cache = cache_of(tmp_path_factory.mktemp("cache"), frame, builder, size=size)
    encoded = EncodedRows(cache, builder)
    assert len(encoded) == len(rows)
    assert cache.ids.to_list() == frame["id"].to_list()
    assert [plain(one) for one in encoded] == [plain(one) for one in builder.encode(to_rows(frame, LMSYS))]
    tokens = [[sum(map(len, row[name])) for name in LMSYS.fields] for row in cache]
    assert cache.lengths.tolist() == tokens


def test_encoded_rows_are_found_by_id_in_any_order(tmp_path: Path, builder: InputBuilder) -> None:
    frame = frame_of(ROWS)
    encoded = EncodedRows(cache_of(tmp_path, frame, builder), builder)
    picked = encoded.of(pl.Series(["r2", "r0"]))
    assert [plain(one) for one in picked] == [plain(encoded[2]), plain(encoded[0])]
    assert [plain(one) for one in picked[:1]] == [plain(encoded[2])]
    with pytest.raises(DataError, match="not tokenised"):
        encoded.of(pl.Series(["r2", "of another file"]))
    with pytest.raises(IndexError):
        encoded[4]


def test_token_cache_is_mapped_and_not_read(tmp_path: Path, builder: InputBuilder) -> None:
    cache = cache_of(tmp_path, frame_of(ROWS), builder)
    ids = cache[2]["response_a"][0]
    assert len(ids) == 300
    assert not ids.flags.owndata
    assert not ids.flags.writeable


def test_token_cache_opens_with_datasets(tmp_path: Path, builder: InputBuilder) -> None:
    cache_of(tmp_path, frame_of(ROWS), builder)
    (file,) = tmp_path.rglob(TOKENS)
    dataset = Dataset.from_file(str(file))
    assert dataset["id"][:] == ["r0", "r1", "r2", "r3"]
    assert dataset[2]["turns"] == [2, 300, 1, 1]


def test_token_cache_is_another_one_if_anything_could_change_a_token(
    tmp_path: Path, builder: InputBuilder, base_of: Callable[[str], Path]
) -> None:
    def folders() -> int:
        return len(list(tmp_path.rglob(MANIFEST)))

    frame = frame_of(ROWS)
    cache_of(tmp_path, frame, builder)
    cache_of(tmp_path, frame, builder, size=1)  # chunks do not count
    cache_of(tmp_path, frame, builder.within(90))  # nor does the budget: it is applied to what is stored
    assert folders() == 1
    one_byte = [*ROWS[:3], ([None], ["é"], ["e"])]
    moved = [*ROWS[:1], ([""], [], []), *ROWS[2:]]  # the same texts, in other fields
    for number, changed in enumerate((frame_of(one_byte), frame_of(moved), frame.reverse(), frame.head(3)), start=2):
        cache_of(tmp_path, changed, builder)
        assert folders() == number
    tokenizer = load_tokenizer(str(base_of("gemma2")))
    tokenizer.add_tokens(["hi"])
    cache_of(tmp_path, frame, InputBuilder(tokenizer, LMSYS, resolve({}).inputs))
    assert folders() == 6


@pytest.mark.parametrize("rows", [0, 2])
def test_token_cache_whose_rows_end_early_has_the_first_and_is_built_again(
    tmp_path: Path, builder: InputBuilder, rows: int
) -> None:
    frame = frame_of(ROWS)
    pieces = iter([False] * (rows // 2) + [True])
    source = RowSource(lambda: frame.iter_slices(2), "digest", len(frame), lambda: lambda: next(pieces))
    first = token_cache(tmp_path, source, builder.tokenizer, LMSYS.fields)
    assert len(first) == len(first.lengths) == rows
    whole = token_cache(tmp_path, source._replace(step=lambda: lambda: False), builder.tokenizer, LMSYS.fields)
    assert whole.ids.to_list() == frame["id"].to_list()


def test_token_cache_is_built_once(tmp_path: Path, builder: InputBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache_of(tmp_path, frame_of(ROWS), builder)
    monkeypatch.setattr(module, "_build", lambda *_, **__: pytest.fail("built again"))
    again = cache_of(tmp_path, frame_of(ROWS), builder)
    assert [one.tolist() for one in first[2]["response_a"]] == [one.tolist() for one in again[2]["response_a"]]


@pytest.mark.parametrize("harm", ["offsets", "columns", "fifo"])
def test_token_cache_of_a_stranger_under_fitting_hashes_is_built_again(
    tmp_path: Path, builder: InputBuilder, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    wanted = cache_of(tmp_path, frame_of(ROWS), builder)[2]["prompt"][0].tolist()
    (tokens,), (manifest,) = tmp_path.rglob(TOKENS), tmp_path.rglob(MANIFEST)
    if harm == "fifo":
        tokens.unlink()
        os.mkfifo(tokens)
    else:
        with pa.ipc.open_stream(tokens.read_bytes()) as reader:
            table = reader.read_all().combine_chunks()
        ids = table.column("tokens").chunk(0)
        far = pa.array([0, 10**9, *[len(ids.values)] * (len(table) - 1)], type=pa.int32())
        hostile = pa.ListArray.from_buffers(ids.type, len(table), [None, far.buffers()[1]], children=[ids.values])
        table = table.set_column(3, "tokens", hostile) if harm == "offsets" else table.drop_columns(["tokens"])
        with pa.OSFile(str(tokens), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        made = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(made | {"sha256": hashlib.sha256(tokens.read_bytes()).hexdigest()}))
    capsys.readouterr()
    assert cache_of(tmp_path, frame_of(ROWS), builder)[2]["prompt"][0].tolist() == wanted
    assert "is damaged or incomplete, and is rebuilt" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("harm", ["one byte", "cut short", "no tokens", "no manifest", "a manifest of nothing"])
def test_token_cache_that_is_damaged_is_built_again(tmp_path: Path, builder: InputBuilder, harm: str) -> None:
    cache_of(tmp_path, frame_of(ROWS), builder)
    (tokens,), (manifest,) = tmp_path.rglob(TOKENS), tmp_path.rglob(MANIFEST)
    whole = tokens.read_bytes()
    if harm == "one byte":
        tokens.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    elif harm == "cut short":
        tokens.write_bytes(whole[: len(whole) // 2])
    elif harm == "no tokens":
        tokens.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("null")
    assert len(cache_of(tmp_path, frame_of(ROWS), builder)) == 4
    assert tokens.read_bytes() == whole


def test_token_cache_needed_twice_at_once_is_built_once(
    tmp_path: Path, builder: InputBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two folds do that are started side by side."""
    builds = []
    build = module._build

    def slow(*arguments: Any, **settings: Any) -> int:
        builds.append(1)
        time.sleep(0.3)
        return build(*arguments, **settings)

    monkeypatch.setattr(module, "_build", slow)
    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(lambda _: cache_of(tmp_path, frame_of(ROWS), builder), range(2)))
    assert [len(cache) for cache in caches] == [4, 4]
    assert len(builds) == 1


def test_token_cache_that_can_not_be_written_to_is_read(tmp_path: Path, builder: InputBuilder) -> None:
    cache_of(tmp_path, frame_of(ROWS), builder)
    for lock in tmp_path.glob(".*.lock"):
        lock.unlink()
    before = sorted(tmp_path.rglob("*"))
    assert len(cache_of(tmp_path, frame_of(ROWS), builder)) == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_token_cache_is_the_same_from_several_processes(tmp_path: Path, builder: InputBuilder) -> None:
    frame = frame_of([([f"question {n}"], ["a" * (n % 50)], ["b", None]) for n in range(1000)])
    cache_of(tmp_path / "one", frame, builder, size=400)
    cache_of(tmp_path / "two", frame, builder, size=400, processes=2)
    one, two = (next((tmp_path / name).rglob(TOKENS)).read_bytes() for name in ("one", "two"))
    assert one == two


def test_token_cache_limits_the_processes_that_a_config_asks_for(
    tmp_path: Path, builder: InputBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(chunks: Any, tokenizer: Any, fields: Any, processes: int, is_over: Any) -> Any:
        asked.append(processes)
        return tokenised(chunks, tokenizer, fields, 1, is_over)

    tokenised = module._tokenised
    monkeypatch.setattr(module, "_tokenised", counted)
    cache_of(tmp_path, frame_of(ROWS), builder, processes=100_000)
    assert asked == [max(module.MOST_PROCESSES, len(os.sched_getaffinity(0)))]


@pytest.mark.parametrize("over", [False, True])
def test_token_cache_names_a_process_that_died_and_leaves_nothing_unless_the_time_is_over(
    tmp_path: Path, builder: InputBuilder, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    """A signal to all processes of a command kills one that has not begun to ignore it."""
    pool = module.ProcessPoolExecutor

    def killed(processes: int, context: Any, start: Any, arguments: Any) -> Any:
        return pool(processes, context, signal.raise_signal, (signal.SIGKILL,))

    monkeypatch.setattr(module, "ProcessPoolExecutor", killed)
    started = iter([False])
    source = RowSource(lambda: [frame_of(ROWS)], "digest", len(ROWS), lambda: lambda: over and next(started, True))
    with nullcontext() if over else pytest.raises(DataError, match="killed"):
        assert len(token_cache(tmp_path, source, builder.tokenizer, LMSYS.fields, processes=2)) == 0
    assert len(list(tmp_path.rglob(MANIFEST))) == over


def build_until_held(channel: Connection, base: Path, folder: Path) -> None:
    """Build a cache, and wait at its second chunk."""
    tokenise, chunks = module.tokenise_chunk, [0]

    def hold(*arguments: Any) -> pa.Table:
        chunks[0] += 1
        if chunks[0] == 2:
            channel.send("held")
            channel.poll(None)
        return tokenise(*arguments)

    module.tokenise_chunk = hold
    frame, tokenizer = frame_of(ROWS * 300), TurnTokenizer(load_tokenizer(str(base)))
    token_cache(folder, lambda: frame.iter_slices(400), tokenizer, LMSYS.fields, processes=1)


def test_token_cache_killed_while_it_is_built_leaves_nothing_that_looks_whole(
    tmp_path: Path, builder: InputBuilder, base_of: Callable[[str], Path]
) -> None:
    ours, theirs = Pipe()
    folder = tmp_path / "cache"
    process = forked(build_until_held, theirs, base_of("gemma2"), folder, output=tmp_path / "output")
    assert ours.recv() == "held"
    process.kill()
    process.join()
    assert any(folder.iterdir())  # something was begun
    assert list(folder.rglob(MANIFEST)) == []
    assert len(cache_of(folder, frame_of(ROWS * 300), builder, size=400)) == 1_200


def tokenise_until_held(channel: Connection, base: Path) -> None:
    """Tokenise in two processes, which wait for a second chunk."""
    frame, tokenizer = frame_of(ROWS * 600), TurnTokenizer(load_tokenizer(str(base)))

    def frames() -> Iterator[pl.DataFrame]:
        yield frame.head(2000)
        channel.send("waiting")
        channel.poll(None)

    list(module._tokenised(frames(), tokenizer, LMSYS.fields, 2))


def test_token_cache_workers_leave_with_a_parent_that_was_killed(
    tmp_path: Path, base_of: Callable[[str], Path]
) -> None:
    ours, theirs = Pipe()
    process = forked(tokenise_until_held, theirs, base_of("gemma2"), output=tmp_path / "output")
    assert ours.recv() == "waiting"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.join()
    assert comes_true(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers))
