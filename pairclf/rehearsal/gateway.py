"""Stands for `kaggle_evaluation.default_inference_server` in rehearsals, which mount it in the competition's folder.

    server = DefaultInferenceServer(predict)
    server.serve()                                # in the hidden rerun
    server.run_local_gateway((FOLDER,))           # otherwise

It treats `predict` as Kaggle's gateway does: it calls it batch by batch from another thread, with copies of the rows
that went through Arrow; it refuses answers of another type, length, order, id dtype or with other columns; it ends if
an answer takes too long; and it writes the submission.

The real one also has gRPC with its limit of a message, a container of its own that hides the rows, a `result.json`, and
batches as a host makes them (a day, a problem). It writes submission.parquet in most competitions.

The file is copied alone, so it imports nothing of pairclf.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import polars as pl

ROWS = 64
"""Rows of a batch."""

STARTUP_SECONDS = 60.0 * 15
"""From the notebook's start to `serve()` (`core/relay.py`: STARTUP_LIMIT_SECONDS)."""

BATCH_SECONDS = 60.0 * 5
"""For an answer (the gateways: set_response_timeout_seconds)."""

FIRST_SECONDS = 60.0 * 60
"""For the first answer, which may wait for models (`core/relay.py`: DEFAULT_DEADLINE_SECONDS)."""


class GatewayError(RuntimeError):
    """The rerun would end on Kaggle: the server was late, raised, or gave an answer that can't be used."""


def seconds_since_start() -> float:
    """Seconds since this process started; in a notebook, since its kernel started."""
    after_name = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    ticks = int(after_name[19])  # starttime, proc_pid_stat(5)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - ticks / os.sysconf("SC_CLK_TCK")


class DefaultInferenceServer:
    """Stands for Kaggle's class: functions that answer, of which `predict` is asked.

    Args:
        endpoint_listeners: these functions, told apart by their names.
        age: seconds since the notebook began.
        clock: seconds, for the limits of the answers.
    """

    def __init__(
        self,
        *endpoint_listeners: Callable[..., Any],
        age: Callable[[], float] = seconds_since_start,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        listeners = {listener.__name__: listener for listener in endpoint_listeners}
        if "predict" not in listeners:
            raise GatewayError(f"no listener for predict was registered, but {sorted(listeners)}")
        self._predict = listeners["predict"]
        self._age, self._clock = age, clock

    def serve(self) -> None:
        """In the hidden rerun, answer until all rows are done; otherwise return at once, as Kaggle's does."""
        took = self._age()
        if took > STARTUP_SECONDS / _speed():
            raise GatewayError(
                f"serve() came {took:.0f} s after the start; {STARTUP_SECONDS / _speed():.0f} are allowed"
            )
        if "KAGGLE_IS_COMPETITION_RERUN" in os.environ:
            run(self._predict, None, self._clock)

    def run_local_gateway(self, data_paths: Sequence[str | Path] | None = None) -> None:
        """Answer for the visible rows.

        Args:
            data_paths: the competition's folder; or the test file and the sample submission.
        """
        if self._age() > STARTUP_SECONDS / _speed():
            warnings.warn("the rerun would end here: the server starts too late", RuntimeWarning, stacklevel=2)
        run(self._predict, data_paths, self._clock)


def run(
    predict: Callable[..., Any], data_paths: Sequence[str | Path] | None, clock: Callable[[], float] = time.monotonic
) -> None:
    """Ask for all rows and write `submission.csv`.

    Raises:
        GatewayError: the first thing that Kaggle's gateway would have ended the rerun for.
    """
    test, sample = read(data_paths)
    answers = []
    for number, (rows, expected) in enumerate(batches(test, sample)):
        limit = (BATCH_SECONDS if number else FIRST_SECONDS) / _speed()
        answer = _called(predict, (_sent(rows), _sent(expected)), limit, clock)
        answers.append(checked(answer, expected))
    pl.concat(answers, how="vertical_relaxed").write_csv("submission.csv")


def read(data_paths: Sequence[str | Path] | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The test rows, and the sample submission in their order."""
    paths = [Path(__file__).parents[1]] if data_paths is None else [Path(path) for path in data_paths]
    if paths[0].is_dir():
        tests = sorted(path for path in paths[0].glob("test.*") if path.suffix in (".csv", ".parquet"))
        if not tests:
            raise GatewayError(f"there is no test.csv or test.parquet in {paths[0]}")
        paths = [tests[0], paths[0] / "sample_submission.csv"]
    test, sample = (
        pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema_length=None)
        for path in paths
    )
    identifier = sample.columns[0]
    if sorted(test[identifier]) != sorted(sample[identifier]):
        raise GatewayError(f"{paths[1].name} and {paths[0].name} have different rows")
    ordered = test.select(identifier).join(sample, on=identifier, how="left", maintain_order="left")
    return test, ordered.select(sample.columns)


def batches(test: pl.DataFrame, sample: pl.DataFrame) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Pairs of test rows and their rows of the sample."""
    return zip(test.iter_slices(ROWS), sample.iter_slices(ROWS), strict=True)


def checked(answer: Any, expected: pl.DataFrame) -> pl.DataFrame:
    """Return the answer as a polars frame.

    Raises:
        GatewayError: it is not.
    """
    if answer is None:
        raise GatewayError("no prediction received")
    if type(answer).__module__.partition(".")[0] == "pandas":
        answer = pl.from_pandas(answer)
    if not isinstance(answer, pl.DataFrame):
        raise GatewayError(f"a prediction must be a DataFrame, and is a {type(answer).__name__}")
    if len(answer) != len(expected):
        raise GatewayError(f"expected {len(expected)} rows, and received {len(answer)}")
    if answer.columns != expected.columns:
        raise GatewayError(f"a prediction has columns {answer.columns}, the sample {expected.columns}")
    identifier = expected.columns[0]
    if not answer[identifier].equals(expected[identifier]):
        raise GatewayError(f"the values of {identifier!r} are not those of the batch, in its order and type")
    return _sent(answer)


def _called(
    predict: Callable[..., Any], arguments: tuple[pl.DataFrame, ...], limit: float, clock: Callable[[], float]
) -> Any:
    """Call the function in another thread, as Kaggle's server does, and return the answer.

    An answer that never comes is waited for as long as `limit` is in real seconds; one that comes must come within it
    by the clock, too, which a rehearsal may turn ahead.
    """
    answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

    def call() -> None:
        try:
            answers.put((predict(*arguments), None))
        except Exception as error:  # noqa: BLE001 - it is raised below
            answers.put((None, error))

    began = clock()
    Thread(target=call, daemon=True).start()
    late = GatewayError(f"no answer to a batch within {limit:.0f} s")
    try:
        answer, error = answers.get(timeout=limit)
    except Empty:
        raise late from None
    if clock() - began > limit:
        raise late
    if error is not None:
        raise GatewayError(f"predict raised {type(error).__name__}: {error}") from error
    return answer


def _sent(frame: pl.DataFrame) -> pl.DataFrame:
    """A copy that went through Arrow's format, as everything that Kaggle sends."""
    stream = io.BytesIO()
    frame.write_ipc_stream(stream)
    stream.seek(0)
    return pl.read_ipc_stream(stream)


def _speed() -> float:
    """Speed of the rehearsal's clock: all limits are divided by it."""
    return float(os.environ.get("PAIRCLF_CLOCK_SPEED", "1"))
