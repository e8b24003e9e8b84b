"""What was scored, on disk after every batch: a run that is killed goes on where it was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pairclf.console import console
from pairclf.errors import PairclfError
from pairclf.inference.work import Floats

NOT_FINITE = "logits are not finite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scored (member INT, row INT, told INT, logits BLOB, PRIMARY KEY (member, row, told));
CREATE TABLE IF NOT EXISTS failed (member INT, row INT, told INT, what TEXT, PRIMARY KEY (member, row, told));
"""


class Journal:
    """An sqlite file with the logits of every `(member, row, order)`, exactly as they were.

    A kill at any moment loses no batch that `add` returned for: the file has a write-ahead log, and the system keeps
    what was handed to it. Where nothing can be written (the disk is full, the folder can't be written to), the journal
    says so once, and the run goes on without it.

    Attributes:
        path: the file; sqlite keeps a `-wal` beside it.
        anew: why an older journal there was not continued, None if it was or there was none.
        broken: why nothing is written any more, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.anew: str | None = None
        self.broken: str | None = None
        self._file: sqlite3.Connection | None = None

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> Journal:
        """Continue the journal at `path` if it is of the same run, else start anew, and say why.

        Args:
            path: the file.
            identity: what makes a run the same run (seals of the bundles, hash of the data, settings): JSON values.

        Raises:
            PairclfError: another process holds it.
        """
        journal = cls(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            journal._continue(json.loads(json.dumps(identity)))
        except OSError as error:
            journal._break(error)
            journal.close()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise PairclfError(
                    f"another process is predicting with {path}",
                    remedy="wait for it, end it, or write to another --out",
                ) from error
            journal._break(error)
            journal.close()
        return journal

    def _continue(self, identity: dict[str, Any]) -> None:
        try:
            self._file = _connect(self.path)
            found = {key: json.loads(value) for key, value in self._file.execute("SELECT key, value FROM identity")}
        except sqlite3.OperationalError:  # it can't be had: nothing is known of what is in it
            raise
        except (sqlite3.DatabaseError, ValueError) as error:
            self.anew = f"it was damaged ({error})"
            found = {}
        differing = sorted(key for key in found.keys() | identity.keys() if found.get(key) != identity.get(key))
        if found and differing:
            self.anew = f"it is of another run: {', '.join(differing)} differ"
        if self.anew:
            console.print(f"the journal {self.path} was started anew: {self.anew}")
            self.remove()
            self._file = _connect(self.path)
        if self._file is not None and (self.anew or not found):
            cells = [(key, json.dumps(value)) for key, value in identity.items()]
            with self._file:
                self._file.executemany("INSERT INTO identity VALUES (?, ?)", cells)

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None:
        """Write a batch, all of it or nothing; what is not finite goes to the failed.

        Args:
            member: index of the model.
            sequences: `R` of `(row, order)`.
            logits: `(R, C)`.
        """
        finite = [bool(np.isfinite(values).all()) for values in logits]
        keys = [(member, int(row), int(order)) for row, order in sequences]
        scored = [(*key, _bytes(values)) for key, values, good in zip(keys, logits, finite, strict=True) if good]
        failed = [(*key, NOT_FINITE) for key, good in zip(keys, finite, strict=True) if not good]
        self._write(
            ("DELETE FROM failed WHERE member = ? AND row = ? AND told = ?", [one[:3] for one in scored]),
            ("INSERT OR REPLACE INTO scored VALUES (?, ?, ?, ?)", scored),
            ("INSERT OR REPLACE INTO failed VALUES (?, ?, ?, ?)", failed),
        )

    def fail(self, member: int, row: int, order: int, what: str) -> None:
        """Note that a sequence can't be scored, and why: it is not tried again after a restart."""
        self._write(("INSERT OR REPLACE INTO failed VALUES (?, ?, ?, ?)", [(member, row, order, what)]))

    def scored(self) -> Iterator[tuple[int, int, int, Floats]]:
        """`(member, row, order, logits (C,))` of all that was scored."""
        for member, row, order, logits in self._read("SELECT * FROM scored ORDER BY member, row, told"):
            yield member, row, order, np.frombuffer(logits, dtype="<f8").astype(np.float64)

    def failed(self) -> Iterator[tuple[int, int, int, str]]:
        """`(member, row, order, what)` of all that could not be scored."""
        yield from self._read("SELECT * FROM failed ORDER BY member, row, told")

    def close(self) -> None:
        """Let go of the file, which stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close, and remove the file: the run is done."""
        self.close()
        for ending in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    def _write(self, *statements: tuple[str, Sequence[tuple[Any, ...]]]) -> None:
        """Run them in one transaction."""
        if self._file is None or self.broken:
            return
        try:
            with self._file:
                for statement, cells in statements:
                    self._file.executemany(statement, cells)
        except (sqlite3.Error, OSError) as error:
            self._break(error)

    def _read(self, statement: str) -> Iterator[Any]:
        if self._file is not None:
            try:
                with closing(self._file.execute(statement)) as rows:
                    yield from rows
            except sqlite3.DatabaseError as error:
                raise PairclfError(
                    f"the journal is damaged: {error}", where=self.path, remedy="score anew: --no-resume"
                ) from error

    def _break(self, error: Exception) -> None:
        self.broken = str(error)
        console.print(f"the journal {self.path} can't be written ({error}): if this run is killed, the rest is lost")


def _connect(path: Path) -> sqlite3.Connection:
    """The file with its tables, locked against every other process for as long as it is open.

    Raises:
        sqlite3.OperationalError: it can't be opened, locked or written.
        sqlite3.DatabaseError: it is damaged, or no sqlite file.
    """
    file = sqlite3.connect(path, timeout=0)
    try:
        # An exclusive lock also spares the `-shm` file, which network file systems can't map.
        file.execute("PRAGMA locking_mode = EXCLUSIVE")
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
        if (state := file.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(" ".join(str(state).split()))
        file.executescript(_SCHEMA)
        file.execute("BEGIN EXCLUSIVE")
        file.commit()
    except BaseException:
        file.close()
        raise
    return file


def _bytes(values: Floats) -> bytes:
    return values.astype("<f8").tobytes()
