"""Chat templates: programs in Jinja that come with a tokenizer, run where they can do no harm.

transformers renders them in jinja2's immutable sandbox, which lets them reach neither files nor Python's own objects. A
template may still never end, or fill the memory. So it is rendered in a process of its own, a fork of this one, which
takes milliseconds as nothing is imported in it, and which the kernel ends at these limits.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from pairclf.errors import ConfigError, cut

CPU_SECONDS = 10
"""A template takes a millisecond, and is compiled in ten."""

MEMORY = 1 << 30
"""Bytes beyond those that the process has when it begins."""

LONGEST = 1 << 20
"""Characters of a template, and of what it may write."""

PATIENCE = 120.0
"""Seconds on the clock after which a child that neither computes nor ends is given up: CPU time would not end it."""

REMEDY = "set inputs.template.apply_chat_template=false, or use an instruct model's tokenizer"


def render_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """`tokenizer.apply_chat_template(messages, tokenize=False, **options)`, within limits.

    Raises:
        ConfigError: the template fails, takes too long, or needs too much memory.
    """
    template = getattr(tokenizer, "chat_template", None)
    if len(str(template)) > LONGEST:
        raise ConfigError(f"the tokenizer's chat template has more than {LONGEST:,} characters", remedy=REMEDY)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks beside threads: the child takes none of their locks, as all it does is render text.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        _render_and_end(writer, tokenizer, messages, options)
    os.close(writer)
    try:
        answer, ended = _read(reader)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored, the kernel buries children
            os.kill(child, signal.SIGKILL)  # it has ended, or hangs
            os.waitpid(child, 0)
    if not ended:
        limits = f"{CPU_SECONDS} seconds of a CPU, {MEMORY >> 20:,} MiB of memory"
        raise ConfigError(f"the tokenizer's chat template was ended at its limits: {limits}", remedy=REMEDY)
    result = json.loads(answer[:-1])
    if "error" in result:
        raise ConfigError(f"the tokenizer's chat template fails: {result['error']}", remedy=REMEDY)
    text: str = result["text"]
    return text


def _read(reader: int) -> tuple[bytes, bool]:
    """The child's answer, and whether it is complete: it ends in a line feed."""
    answer, until = b"", time.monotonic() + PATIENCE
    while select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
        if not (piece := os.read(reader, 1 << 16)):
            break
        answer += piece
    return answer, answer.endswith(b"\n")


def _render_and_end(writer: int, tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: Any) -> NoReturn:
    """The child's life. Nothing of the parent's may happen in it a second time: it ends without any clean-up."""
    try:
        _limit()
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            answer = {"text": text} if len(text) <= LONGEST else {"error": f"it writes {len(text):,} characters"}
        except Exception as error:  # noqa: BLE001 - a template can raise anything; the parent says what it was
            answer = {"error": cut(f"{type(error).__name__}: {error}", 1000)}
        content = json.dumps(answer).encode() + b"\n"
        while content:
            content = content[os.write(writer, content) :]
    finally:
        os._exit(0)


def _limit() -> None:
    """Let the kernel end this process at the limits, and leave nothing of it on the disk."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        pages = int(stream.read().split()[0])
    for kind, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
