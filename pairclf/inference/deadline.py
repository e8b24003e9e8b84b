"""When prediction must be over: `8h30m` from now, or a time of day with its date."""

from __future__ import annotations

import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path

from pairclf.errors import ConfigError

_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)", re.IGNORECASE)
_EXAMPLES = "e.g. 8h30m, 45m, 90s, or 2026-01-31T18:00:00+00:00"


def seconds_until(text: str, now: datetime, spent: float = 0.0) -> float:
    """Seconds from `now` to the deadline; below zero where it has passed.

    >>> seconds_until("8h30m", datetime.now(UTC))
    30600.0

    Args:
        text: a duration (`8h30m`, `45m`, `90s`), or an absolute time in ISO 8601; without a zone it is UTC, as Kaggle's
            machines are.
        now: with its zone.
        spent: seconds of a duration that are gone already.

    Raises:
        ConfigError: it is neither, or a duration of nothing.
    """
    plain = text.strip()
    if plain and not _PART.sub("", plain).strip():
        seconds = sum(float(number) * _UNITS[unit.lower()] for number, unit in _PART.findall(plain))
        if seconds <= 0:
            raise ConfigError(f"--deadline {text} leaves no time", remedy=_EXAMPLES)
        return seconds - spent
    try:
        end = datetime.fromisoformat(plain)
    except ValueError as error:
        raise ConfigError(f"--deadline {text} is neither a duration nor a time", remedy=_EXAMPLES) from error
    end = end if end.tzinfo else end.replace(tzinfo=UTC)
    return (end - now).total_seconds()


def process_age() -> float:
    """Seconds since this process started, its imports included."""
    ticks = Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]  # since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def format_duration(seconds: float) -> str:
    """`7 h 05 min`, `12 min` or `40 s`, for people.

    >>> format_duration(25_500), format_duration(720), format_duration(40.2)
    ('7 h 05 min', '12 min', '40 s')
    """
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{seconds / 60:.0f} min" if seconds >= 300 else f"{seconds:.0f} s"
