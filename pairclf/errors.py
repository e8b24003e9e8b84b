"""The exception tree: what the user sees when something is wrong, and the exit code.

Every error that a user can cause is a `PairclfError`. The command line prints it without a traceback and
exits with its `exit_code`; anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import Repr

MAX_ROWS_SHOWN = 5
MAX_SHOWN = 200
"""Characters of a value, a name or another program's message that an error shows."""

MAX_MESSAGE = 10_000
"""Characters of a whole message, whatever it quotes."""

# C0 (less tab and line feed), DEL, C1, and what turns the direction of text: a terminal obeys them.
_OBEYED = [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]
_VISIBLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in [*_OBEYED, *range(0x2066, 0x206A)]}


def visible(text: object) -> str:
    """What a user typed, as it may be printed: nothing in it is a command to the terminal.

    >>> visible("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return str(text).translate(_VISIBLE)


def cut(text: object, most: int = MAX_SHOWN) -> str:
    """A text on which an error reports, or what another program says of it, at most `most` characters of it.

    >>> cut("abcdef", 4)
    'abcd… (6 characters)'
    """
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}… ({len(whole):,} characters)"


def quoted(value: object) -> str:
    """`repr` of what a user or a file gave: at most `MAX_SHOWN` characters, however large or deep it is.

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
    """A failure with a place, the rows concerned and a remedy.

    Args:
        what: parameter, value and the rule that it breaks, in one sentence.
        where: file, key or command that it was found in.
        rows: ids of the rows concerned; the first five are shown, and their number.
        remedy: what the user can do about it.
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

    def __reduce__(self) -> tuple[object, ...]:
        # It goes from process to process as it stands: `__init__` asks for more than the text that pickle would give.
        return _unpickled, (type(self), self.args, self.__dict__)

    def _text(self) -> str:
        lines = [visible(cut(self.what, MAX_MESSAGE))]
        if self.where is not None:
            lines.append(f"  where:  {visible(cut(self.where, 1000))}")
        if self.rows:
            shown = ", ".join(visible(cut(row)) for row in self.rows[:MAX_ROWS_SHOWN])
            more = len(self.rows) - MAX_ROWS_SHOWN
            lines.append(f"  rows:   {shown}" + (f" and {more:,} more" if more > 0 else ""))
        if self.remedy:
            lines.append(f"  remedy: {visible(cut(self.remedy, MAX_MESSAGE))}")
        return "\n".join(lines)


def _unpickled(kind: type[PairclfError], arguments: tuple[object, ...], state: dict[str, object]) -> PairclfError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class ConfigError(PairclfError):
    """A setting is unknown, has a wrong value, or contradicts another."""


class DataError(PairclfError):
    """A file of rows or scores can't be used as it is."""


class LeakError(DataError):
    """A row that must stay unseen shares its prompt with a row that is trained on."""


class ModelError(PairclfError):
    """A base model can't be loaded, or a combination of its parts is not legal."""


class CheckpointError(PairclfError):
    """A checkpoint can't be written, is damaged, or belongs to another training."""


class StopError(PairclfError):
    """A signal ended the work in good order: it can go on. The exit code is the shell's for it, 128 + its number."""

    def __init__(self, what: str, *, signal: int, remedy: str) -> None:
        super().__init__(what, remedy=remedy)
        self.exit_code = 128 + signal


class BundleError(PairclfError):
    """A bundle is incomplete, was changed, or does not score its probe rows as it did."""


class IncompleteError(PairclfError):
    """A prediction is there, and not all that was asked for could be scored (`--strict`)."""

    exit_code = 3


class PackagingError(PairclfError):
    """The folder for Kaggle can't be built, or its rehearsal did not end in a valid submission."""
