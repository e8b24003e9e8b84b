"""No test hangs on how fast a machine is: none reads a clock, or acts after a time; they wait for what happens."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from clocks_support import PATIENCE
from hypothesis import settings

TESTS = Path(__file__).parent
EXEMPT = ("clocks_support.py", "test_clocks.py")
"""The one file that looks at a clock, to give up on what never comes; and this one."""

CLOCKS = re.compile(
    r"\btime\.(time|monotonic|perf_counter|process_time|thread_time|clock_gettime)(_ns)?\(|\bTimer\(|\bdatetime\.now\(|"
    r"\.(utcnow|create_time)\(\) *[<>]"
)
SHORT = re.compile(r"\btimeout=(\d+(?:\.\d+)?)")


def clocks_in(text: str) -> list[str]:
    """What reads a clock there, in the code of child processes too."""
    return [found[0] for found in CLOCKS.finditer(text)]


def short_in(text: str) -> list[str]:
    """Limits that a machine may miss which is merely busy."""
    return [found[0] for found in SHORT.finditer(text) if float(found[1]) < PATIENCE]


def test_no_test_reads_a_clock() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("*.py")) if path.name not in EXEMPT}
    assert len(texts) > 50
    found = {path.name: [*clocks_in(text), *short_in(text)] for path, text in texts.items()}
    reading = {name: places for name, places in found.items() if places}
    assert reading == {}, "wait for what happens (comes_true), or turn a clock (clock_in): see clocks_support.py"


def test_what_reads_a_clock_is_found() -> None:
    for text in ("assert time.monotonic() - began < 9", "time.time()", "Timer(0.4, fill).start()", "time.time_ns()"):
        assert clocks_in(text), text
    assert short_in("process.communicate(timeout=60)") == ["timeout=60"]
    assert not clocks_in("time.sleep(0.3)") + short_in("pool.wait_procs(some, timeout=600)")


def test_tests_start_with_plain_signals_and_examples_may_take_long() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    assert settings().deadline is None
