"""The exceptions, their messages and exit codes, and the shortening of values that a message quotes.

    PairclfError            exit code 2
      ConfigError           a setting
      DataError             a file of rows or scores
        LeakError           a prompt both in training rows and in rows that must stay unseen
      ModelError            a base model
      CheckpointError       a checkpoint
      BundleError           a bundle
      StopError             a signal; exit code 128 + its number
      IncompleteError       rows without a score under `--strict`; exit code 3
      PackagingError        a package for Kaggle, or its rehearsal
        KaggleError         an answer of Kaggle, or none (publish/client.py)
      WorkerError           a process of `--processes`; exit code of that process (runs/processes.py)

Every error that a user can cause is a `PairclfError`. The command line prints its message without a traceback and
exits with its `exit_code`. Any other exception is a bug in pairclf and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from reprlib import Repr

MAX_ROWS_SHOWN = 5
MAX_SHOWN = 200
"""Characters of a value, a name or another program's message that an error shows."""

MAX_MESSAGE = 10_000
"""Most characters of a whole message."""

# C0 except tab and line feed, DEL, C1, and marks of text direction: a terminal obeys them.
_OBEYED = [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]
_VISIBLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in [*_OBEYED, *range(0x2066, 0x206A)]}


def visible(text: object) -> str:
    """A text that is safe to print: control characters are escaped, so that the terminal does not obey them.

    >>> visible("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return str(text).translate(_VISIBLE)


def cut(text: object, most: int = MAX_SHOWN) -> str:
    """The first `most` characters of a text, with its length if it is longer.

    >>> cut("abcdef", 4)
    'abcd… (6 characters)'
    """
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}… ({len(whole):,} characters)"


def quoted(value: object) -> str:
    """`repr` of a value from a user or a file, in at most `MAX_SHOWN` characters, however large or deep it is.

    >>> quoted(["x" * 1000] * 1000)[:20], len(quoted(["x" * 1000] * 1000)) < 500
    ("['xxxxxxxxxxxxxxxxxx", True)
    """
    short = Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    short.maxlevel = 3
    try:
        return cut(visible(short.repr(value)))
    except ValueError:  # a number of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"


class PairclfError(Exception):
    """An error with its place, the affected rows and a remedy.

    Args:
        what: the parameter, its value and the broken rule, in one sentence.
        where: the file, key or command.
        rows: ids of the affected rows; the message shows five of them and their number.
        remedy: what the user can do.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: object = None, rows: Sequence[object] = (), remedy: str | None = None
    ) -> None:
        self.what = what
        self.where = where
        self.rows = tuple(rows)
        self.remedy = remedy
        super().__init__(self._text())

    def reword(self, words: Callable[[str], str]) -> None:
        """Put message and remedy into other words, such as Python's for those of the command line."""
        self.what, self.remedy = words(self.what), self.remedy and words(self.remedy)
        self.args = (self._text(),)

    def __reduce__(self) -> tuple[object, ...]:
        # Pickle would call `__init__` with the text alone; errors travel between processes.
        return _unpickled, (type(self), self.args, self.__dict__)

    def _text(self) -> str:
        lines = [visible(cut(self.what, MAX_MESSAGE))]
        if self.where is not None:
            lines.append(f"  where:  {visible(cut(self.where, 1000))}")
        if self.rows:
            ids = ", ".join(visible(cut(row)) for row in self.rows[:MAX_ROWS_SHOWN])
            more = len(self.rows) - MAX_ROWS_SHOWN
            lines.append(f"  rows:   {ids}" + (f" and {more:,} more" if more > 0 else ""))
        if self.remedy:
            lines.append(f"  remedy: {visible(cut(self.remedy, MAX_MESSAGE))}")
        return "\n".join(lines)


def _unpickled(kind: type[PairclfError], arguments: tuple[object, ...], state: dict[str, object]) -> PairclfError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class ConfigError(PairclfError):
    """A setting is unknown, has a wrong value, or contradicts another one."""


class DataError(PairclfError):
    """A file of rows or scores can't be used."""


class LeakError(DataError):
    """A row that must stay unseen shares its prompt with a training row."""


class ModelError(PairclfError):
    """A base model can't be loaded, or its parts can't be combined."""


class CheckpointError(PairclfError):
    """A checkpoint can't be written, is damaged, or belongs to another training."""


class StopError(PairclfError):
    """A signal ended the command, which can be resumed. The exit code is the shell's: 128 + the signal's number."""

    def __init__(self, what: str, *, signal: int, remedy: str) -> None:
        super().__init__(what, remedy=remedy)
        self.exit_code = 128 + signal


class BundleError(PairclfError):
    """A bundle is incomplete or changed, or its probe rows get other logits than before."""


class IncompleteError(PairclfError):
    """The prediction is written, but some rows or models could not be scored (`--strict`)."""

    exit_code = 3


class PackagingError(PairclfError):
    """The package for Kaggle can't be built, or its rehearsal gave no valid submission."""
