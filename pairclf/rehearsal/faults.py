"""The faults that a rehearsal can inject: how each is caused, and what result is expected.

The product has no code for this: a fault changes the workspace. It spoils an input, leaves a mount empty, runs a line
in the kernel before its first cell, or puts a module into the stand-in's environment. Every Python process there
imports that module at its start, and it changes one of pairclf's modules when that is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import polars as pl

from pairclf.rehearsal import shared_clock
from pairclf.rehearsal.mounts import Mount

MARKER_PREFIX = "struck-"
"""What the names of files begin with that a hook leaves in the stage's home when it has done something."""

HOOK = "pairclf_fault"

_AFTER_IMPORT = f'''
import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from pathlib import Path


def strike(what="pass"):
    """Note it; whether it is the first time."""
    try:
        Path(os.environ["HOME"], "{MARKER_PREFIX}" + what).open("x").close()
    except FileExistsError:
        return False
    return True


class AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            run, change = spec.loader.exec_module, CHANGES[name]
            spec.loader.exec_module = lambda module: (run(module), change(module))
        return spec


sys.meta_path.insert(0, AfterImport())


def of_scorers(worker, change):
    """Change every scorer that a worker loads, whatever its approach."""
    load = worker.load_bundle

    @functools.wraps(load)
    def loaded(assignment):
        made = load(assignment)
        change(made.scorer, assignment)
        return made

    worker.load_bundle = loaded
'''

_OOM = """
def limit(scorer, assignment):
    launch, fits = scorer.launch, FITTING * assignment.largest.longest

    def limited(items):
        tokens = sum(len(item.ids) for item in items)
        if tokens > fits:
            strike()
            raise MemoryError(f"a pass of {tokens} tokens, where {fits:g} are rehearsed to fit")
        return launch(items)

    scorer.launch = limited


CHANGES = {"pairclf.inference.worker": lambda worker: of_scorers(worker, limit)}
"""

_KILL = """
def kill_worker(scorer, assignment):
    collect = scorer.collect

    def killed(items, launched):
        if strike("worker"):
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(items, launched)

    scorer.collect = killed


def kill_parent(journal):
    add = journal.Journal.add

    def killed(self, *arguments):
        add(self, *arguments)
        if strike("predict"):
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal.add = killed


CHANGES = {
    "pairclf.inference.worker": lambda worker: of_scorers(worker, kill_worker),
    "pairclf.inference.journal": kill_parent,
}
"""

_CLOCK = """
CLOCK = SharedClock(Path(os.environ["HOME"], "clock"))
CLOCK.rule()
"""

_SLOW = f"""{_CLOCK}

def slow_down(scorer, assignment):
    launch = scorer.launch

    def slow(items):
        strike()
        CLOCK.last(SECONDS * len(items))
        return launch(items)

    scorer.launch = slow


def turn(pool):
    pool.ProcessPool.wait = CLOCK.turned_by(pool.ProcessPool.wait, step=20.0)


CHANGES = {{
    "pairclf.inference.worker": lambda worker: of_scorers(worker, slow_down),
    "pairclf.inference.pool": turn,
}}
"""

_HURRIED = f"""{_CLOCK}
CLOCK.hurry(least=1.0)
CHANGES = {{}}
"""

# What prints a traceback in a notebook looks at the version as it is imported.
_OTHER_PYTHON = """import collections, importlib.util, sys
importlib.util.find_spec("stack_data") and __import__("stack_data")
names = "major minor micro releaselevel serial"
sys.version_info = collections.namedtuple("version_info", names)(3, 99, 0, "final", 0)
"""


SpoilRows = Callable[[pl.DataFrame, Sequence[str]], pl.DataFrame]
SpoilMounts = Callable[[Sequence[Mount], Path], tuple[list[Mount], str]]


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """One thing that goes wrong.

    Attributes:
        expected: result, for people; always a valid submission, unless the first cell must fail.
        error_pattern: regular expression that the first cell's error must match, with `{spoiled}` for the spoiled
            file; empty: the run must end in a valid submission.
        scored: which rows of it must have been scored; `some`: one at least; `any`: however many.
        same_scores: the submission must be that of a run without faults.
        hook: code for every Python process of the kernel.
        markers: names that the hook must have left.
        prelude: code that the kernel runs before its first cell.
        spoil_rows: changes the test file's rows; gets the task's fields.
        spoil_mounts: changes the mounts, with a folder for changed files; returns what was spoiled too.
    """

    expected: str
    error_pattern: str = ""
    scored: Literal["all", "some", "any", "none"] = "all"
    same_scores: bool = False
    hook: str = ""
    markers: tuple[str, ...] = ()
    prelude: str = ""
    spoil_rows: SpoilRows | None = None
    spoil_mounts: SpoilMounts | None = None

    @property
    def skips_waits(self) -> bool:
        """Whether the kernel's waits take no time. Then no mount may be late: it is full, or stays empty."""
        return self.hook == _HURRIED

    def module(self, fitting: float, seconds: float) -> str:
        """The text of the hook's module.

        Args:
            fitting: part of the longest sequence that fits into a pass, for `oom`.
            seconds: that a sequence takes longer, for `slow`.
        """
        clock = Path(shared_clock.__file__).read_text(encoding="utf-8")
        return f"{clock}\n\n{_AFTER_IMPORT}\n\nFITTING, SECONDS = {fitting!r}, {seconds!r}\n{self.hook}"


# --- rows ------------------------------------------------------------------------------------------------------------

CELLS = (None, "", "[]", "[null]", "null", '["cut', '{"a": 1}', '[""]')
LISTS: tuple[list[str | None] | None, ...] = (None, [], [None], [""])
SPOIL_INTERVAL = 3
"""One row in so many is spoiled, each field of it in another way."""


def _empty_cells(frame: pl.DataFrame, fields: Sequence[str]) -> pl.DataFrame:
    for place, name in enumerate(field for field in fields if field in frame.columns):
        cells, column = frame[name].to_list(), frame[name]
        ways: Sequence[object] = LISTS if column.dtype == pl.List(pl.String) else CELLS
        for row in range(0, len(cells), SPOIL_INTERVAL):
            cells[row] = ways[(row // SPOIL_INTERVAL + place) % len(ways)]
        frame = frame.with_columns(pl.Series(name, cells, dtype=column.dtype))
    return frame


def _more_columns(frame: pl.DataFrame, fields: Sequence[str]) -> pl.DataFrame:
    """Add an index as pandas leaves it, an empty column, and one with commas and quotes."""
    stray = pl.Series("Unnamed: 0", [str(row) for row in range(len(frame))])
    return frame.insert_column(0, stray).with_columns(
        pl.lit(None, dtype=pl.String).alias("model_c"), pl.lit('a, "b"\nc').alias("remark")
    )


# --- mounts ----------------------------------------------------------------------------------------------------------


def _leave_empty(mounts: Sequence[Mount], folder: Path) -> tuple[list[Mount], str]:
    """Leave the base model's mount empty, or the bundles' if no base model is attached."""
    roles = {mount.role for mount in mounts}
    role = "base" if "base" in roles else "bundle"
    return [replace(mount, files={}) if mount.role == role else mount for mount in mounts], role


def _flip_byte(mounts: Sequence[Mount], folder: Path) -> tuple[list[Mount], str]:
    """Change a byte in the middle of the bundles' largest file."""
    sizes = {
        (at, name): path.stat().st_size
        for at, mount in enumerate(mounts)
        if mount.role == "bundle"
        for name, path in mount.files.items()
    }
    at, name = max(sizes, key=lambda key: sizes[key])
    content = bytearray(mounts[at].files[name].read_bytes())
    content[len(content) // 2] ^= 1
    spoiled = folder / Path(name).name
    spoiled.write_bytes(content)
    changed = replace(mounts[at], files={**mounts[at].files, name: spoiled})
    return [*mounts[:at], changed, *mounts[at + 1 :]], name


FAULTS = {
    "oom": InjectedFault("some rows scored", scored="some", hook=_OOM, markers=("pass",)),  # of large passes
    # A worker, and predict after its first batch.
    "kill": InjectedFault("the same scores", same_scores=True, hook=_KILL, markers=("worker", "predict")),
    # Forward passes take longer than there is time for.
    "slow": InjectedFault("valid, in time", scored="any", hook=_SLOW, markers=("pass",)),
    # Every third row has empty and broken cells.
    "null-rows": InjectedFault("all rows scored", spoil_rows=_empty_cells),
    # The base model, or the bundles that hold it, never comes.
    "missing-model": InjectedFault("priors", scored="none", hook=_HURRIED, spoil_mounts=_leave_empty),
    # A byte of a bundle is another. The kernel looks twice at a file that may still be on its way, 20 s apart.
    "corrupt-bundle": InjectedFault(
        "first cell fails",
        error_pattern=r"{spoiled}[\s\S]*changed",
        scored="none",
        hook=_HURRIED,
        spoil_mounts=_flip_byte,
    ),
    "wrong-python": InjectedFault(  # 3.99
        "first cell fails", error_pattern=r"3\.99", scored="none", prelude=_OTHER_PYTHON
    ),
    # The test file has columns that nobody knows.
    "extra-columns": InjectedFault("the same scores", same_scores=True, spoil_rows=_more_columns),
}
"""`rehearse --inject`."""
