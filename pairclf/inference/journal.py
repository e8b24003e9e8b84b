"""The journal: logits on disk after every batch, from which a killed run resumes.

Every record has a checksum: of a damaged file the intact records are kept, and the rest is scored again.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pairclf.console import console, counted
from pairclf.errors import PairclfError, cut
from pairclf.files import parsed
from pairclf.scores.metrics import Floats

NOT_FINITE = "logits are not finite"
_SHOWN = 60  # letters of a value that is shown
FORMAT = 4
"""Format of the file; part of the identity, so that a journal of another format is not continued."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS note (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scored
    (member INT, row INT, swap_order INT, logits BLOB, checksum INT, PRIMARY KEY (member, row, swap_order))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failed
    (member INT, row INT, swap_order INT, what TEXT, checksum INT, PRIMARY KEY (member, row, swap_order))
    WITHOUT ROWID;
"""
_Record = tuple[int, int, int, bytes | str, int]
"""Model, row, order, logits or what went wrong, checksum."""


class Journal:
    """An sqlite file with the exact logits of every `(member, row, order)`.

    A kill loses no batch for which `add` has returned, thanks to sqlite's write-ahead log. If the file can't be written
    (full disk, read-only folder), the journal reports it once, and the run continues without it.

    Attributes:
        path: the file; sqlite keeps a `-wal` beside it.
        restart_reason: why an existing journal was not continued; None: it was, or there was none.
        write_error: why the journal is no longer written; None: it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restart_reason: str | None = None
        self.write_error: str | None = None
        self._file: sqlite3.Connection | None = None

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> Journal:
        """Continue the journal at `path` if it is of the same run, else start a new one and report why.

        Args:
            path: the file.
            identity: what identifies a run (seals of the bundles, hash of the data, settings), as JSON values.

        Raises:
            PairclfError: another process has locked it.
        """
        journal = cls(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            journal._continue({"format": FORMAT, **json.loads(json.dumps(identity))})
        except OSError as error:
            journal._disable(error)
            journal.close()
        except sqlite3.Error as error:
            if _code(error) == sqlite3.SQLITE_BUSY:
                raise PairclfError(
                    f"another process is predicting with {path}",
                    remedy="wait for it, end it, or write to another --out",
                ) from error
            journal._disable(error)
            journal.close()
        return journal

    def _continue(self, identity: dict[str, Any]) -> None:
        kept: dict[str, list[_Record]] = {}
        try:
            self._file = _connect(self.path)
            saved_identity = _identity(self._file)
            _check_records(self._file)
        except (sqlite3.DatabaseError, ValueError) as error:
            if isinstance(error, sqlite3.OperationalError) and _code(error) != sqlite3.SQLITE_ERROR:
                raise  # it can't be opened: its contents are unknown, and must not be removed
            self.close()
            self.restart_reason = f"it was damaged ({cut(' '.join(str(error).split()))})"
            saved_identity, kept = {}, _recover_records(self.path, identity)
        if saved_identity and saved_identity != identity:
            self.restart_reason = _difference_between(saved_identity, identity)
        if self.restart_reason:
            whole = sum(map(len, kept.values()))
            saved = f"; {counted(whole, 'intact record')} of it kept, the rest is scored again" if whole else ""
            console.print(f"the journal {self.path} was started anew: {self.restart_reason}{saved}")
            self.remove()
            self._file = _connect(self.path)
        if self._file is not None and (self.restart_reason or not saved_identity):
            with self._file:
                cells = [(key, json.dumps(value)) for key, value in identity.items()]
                self._file.executemany("INSERT INTO identity VALUES (?, ?)", cells)
                for table, records in kept.items():
                    self._file.executemany(_INSERT[table], records)

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None:
        """Write a batch in one transaction; sequences with non-finite logits are recorded as failed.

        Args:
            member: index of the model.
            sequences: `R` of `(row, order)`.
            logits: `(R, C)`.
        """
        finite = [bool(np.isfinite(values).all()) for values in logits]
        keys = [(member, int(row), int(order)) for row, order in sequences]
        scored = [_record(key, _bytes(values)) for key, values, good in zip(keys, logits, finite, strict=True) if good]
        failed = [_record(key, NOT_FINITE) for key, good in zip(keys, finite, strict=True) if not good]
        self._write(
            ("DELETE FROM failed WHERE member = ? AND row = ? AND swap_order = ?", [record[:3] for record in scored]),
            (_INSERT["scored"], scored),
            (_INSERT["failed"], failed),
        )

    def fail(self, member: int, row: int, order: int, what: str) -> None:
        """Record that a sequence can't be scored, and why: a resumed run does not retry it."""
        self._write((_INSERT["failed"], [_record((member, row, order), what)]))

    def scored(self) -> Iterator[tuple[int, int, int, Floats]]:
        """`(member, row, order, logits (C,))` of all scored sequences."""
        for member, row, order, logits, _ in self._read("SELECT * FROM scored ORDER BY member, row, swap_order"):
            yield member, row, order, np.frombuffer(logits, dtype="<f8").astype(np.float64)

    def failed(self) -> Iterator[tuple[int, int, int, str]]:
        """`(member, row, order, what)` of all failed sequences."""
        for member, row, order, what, _ in self._read("SELECT * FROM failed ORDER BY member, row, swap_order"):
            yield member, row, order, what

    def write_note(self, key: str, value: str) -> None:
        """Store a text about the run under a key, replacing an older one."""
        self._write(("INSERT OR REPLACE INTO note VALUES (?, ?)", [(key, value)]))

    def read_note(self, key: str) -> str | None:
        """The text stored by `write_note`, or None."""
        return next((str(value) for (value,) in self._read("SELECT value FROM note WHERE key = ?", key)), None)

    def clear(self) -> None:
        """Remove all that an earlier run wrote; the file stays locked. If that fails, the run continues without it."""
        self._write(*((f"DELETE FROM {table}", [()]) for table in (*_INSERT, "note")))
        if self.write_error:
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close and remove the file: the run is complete."""
        self.close()
        for ending in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    def _write(self, *statements: tuple[str, Sequence[tuple[Any, ...]]]) -> None:
        """Run them in one transaction."""
        if self._file is None or self.write_error:
            return
        try:
            with self._file:
                for statement, cells in statements:
                    self._file.executemany(statement, cells)
        except (sqlite3.Error, OSError) as error:
            self._disable(error)

    def _read(self, statement: str, *values: str) -> Iterator[Any]:
        if self._file is not None:
            try:
                with closing(self._file.execute(statement, values)) as rows:
                    yield from rows
            except sqlite3.DatabaseError as error:
                raise PairclfError(
                    f"the journal is damaged: {error}", where=self.path, remedy="score anew: --no-resume"
                ) from error

    def _disable(self, error: Exception) -> None:
        self.write_error = str(error)
        console.print(
            f"the journal {self.path} can't be written ({error}): if this run is killed, unsaved scores are lost"
        )


_INSERT = {table: f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?, ?)" for table in ("scored", "failed")}


def _record(key: tuple[int, int, int], content: bytes | str) -> _Record:
    return (*key, content, _checksum(key, content))


def _checksum(key: tuple[int, int, int], content: bytes | str) -> int:
    return zlib.crc32(content if isinstance(content, bytes) else content.encode(), zlib.crc32(repr(key).encode()))


def _is_intact(record: tuple[Any, ...], table: str) -> bool:
    """Whether a record has the types and the checksum that it was written with."""
    *key, content, checksum = record
    kind = bytes if table == "scored" else str
    return isinstance(content, kind) and checksum == _checksum((key[0], key[1], key[2]), content)


def _text(content: bytes) -> str:
    """Decode damaged text without an error; its checksum will not match."""
    return content.decode(errors="replace")


def _identity(file: sqlite3.Connection) -> dict[str, Any]:
    """The identity of the run that wrote the file; empty for a new file.

    Raises:
        ValueError: a value is no JSON, or there are records of an unknown run.
    """
    identity = {str(key): parsed(str(value)) for key, value in file.execute("SELECT key, value FROM identity")}
    if not identity and any(file.execute(f"SELECT 1 FROM {table}").fetchone() for table in _INSERT):
        raise ValueError("it does not say of which run it is")
    return identity


def _code(error: Exception) -> int | None:
    """The primary error code of sqlite, such as SQLITE_BUSY."""
    return getattr(error, "sqlite_errorcode", None)


def _check_records(file: sqlite3.Connection) -> None:
    """Raise `DatabaseError` if a record differs from its checksum: sqlite itself notices no changed cell."""
    damaged = sum(
        not _is_intact(record, table) for table in _INSERT for record in file.execute(f"SELECT * FROM {table}")
    )
    if damaged:
        raise sqlite3.DatabaseError(f"wrong checksum of {counted(damaged, 'record')}")


def _difference_between(saved: dict[str, Any], identity: dict[str, Any]) -> str:
    """Why a journal of the saved identity is not continued; long values (hashes, seals) are not shown."""
    if saved.get("format") != identity["format"]:
        return f"it has format {saved.get('format')} of another version of pairclf; this version reads format {FORMAT}"
    differences = []
    for key in sorted(saved.keys() | identity.keys()):
        was, is_now = (json.dumps(side.get(key)) for side in (saved, identity))
        if was != is_now:
            too_long = max(len(was), len(is_now)) > _SHOWN
            differences.append(f"{key} differs" if too_long else f"{key} was {was} and is {is_now}")
    return f"it is of another run: {', '.join(differences)}"


def _recover_records(path: Path, identity: dict[str, Any]) -> dict[str, list[_Record]]:
    """The intact records of a damaged file that sqlite can still read; none unless its identity is this run's."""
    kept: dict[str, list[_Record]] = {"scored": [], "failed": []}
    with suppress(sqlite3.Error, ValueError), closing(sqlite3.connect(path, timeout=0)) as file:
        file.text_factory = _text
        file.execute("PRAGMA trusted_schema = OFF")
        file.execute("PRAGMA writable_schema = ON")  # else sqlite does not read a file that was cut at all
        if _identity(file) != identity:
            return {}
        for table, records in kept.items():
            with suppress(sqlite3.Error):  # the end of what can be read
                for record in file.execute(f"SELECT * FROM {table}"):
                    if _is_intact(record, table):
                        records.append(record)
    return kept


def _connect(path: Path) -> sqlite3.Connection:
    """The file with its tables, locked against every other process for as long as it is open.

    Raises:
        sqlite3.OperationalError: it can't be opened, locked or written.
        sqlite3.DatabaseError: it is damaged, or no sqlite file.
    """
    file = sqlite3.connect(path, timeout=0)
    file.text_factory = _text
    try:
        # An exclusive lock also spares the `-shm` file, which network file systems can't map.
        file.execute("PRAGMA trusted_schema = OFF")  # whoever wrote the file: no function runs from its schema
        file.execute("PRAGMA locking_mode = EXCLUSIVE")
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
        if (state := file.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(state)
        file.executescript(_SCHEMA)
        file.execute("BEGIN EXCLUSIVE")
        file.commit()
    except BaseException:
        file.close()
        raise
    return file


def _bytes(values: Floats) -> bytes:
    return values.astype("<f8").tobytes()
