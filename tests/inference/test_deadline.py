from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from pairclf.errors import ConfigError
from pairclf.inference.deadline import format_duration, seconds_until

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h30m", 30_600), ("8h 30min", 30_600), ("45m", 2700), ("90s", 90), ("1.5h", 5400), ("1d", 86_400),
        ("2026-01-31T13:00:00", 3600), ("2026-01-31T13:00:00+01:00", 0), ("2026-01-31T11:00:00+00:00", -3600),
    ],
)  # fmt: skip
def test_durations_and_times(text: str, seconds: float) -> None:
    assert seconds_until(text, NOW) == seconds


def test_the_zone_of_now_does_not_matter() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=9)))
    assert seconds_until("2026-01-31T13:00:00", there) == 3600


@pytest.mark.parametrize("text", ["", "soon", "8", "8h30", "-5m", "0s", "8hours", "2026-31-01", "h"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--deadline"):
        seconds_until(text, NOW)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (299, "299 s"), (300, "5 min"), (3599, "60 min"), (3660, "1 h 01 min")]
)
def test_spoken(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
