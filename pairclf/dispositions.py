"""What this process does about signals while a job lasts, and which of them it was told to leave alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def answering(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Let `handler` answer these signals meanwhile, but for those that the process was started to ignore.

    `nohup` starts a command with SIGHUP ignored, and the shell of a script starts one in the background (`&`) with
    SIGINT ignored: a closed terminal, or a Ctrl-C that is meant for another command, must not end the job then.

    Args:
        numbers: the signals.
        handler: as `signal.signal` takes it; Python calls it in the main thread, where this must be entered too.
    """
    former = {number: signal.getsignal(number) for number in numbers}
    answered = [number for number, before in former.items() if before is not signal.SIG_IGN]
    for number in answered:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in answered:
            signal.signal(number, former[number])
