"""A package too small to run, and a clock that does not wait: for the tests of push, submit and ledger."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from support.records import make_package, write_package

from pairclf.publish.client import WaitClock


@dataclass
class Ticks:
    """A clock that is told the time by those who wait."""

    time: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    @property
    def clock(self) -> WaitClock:
        return WaitClock(self.sleep, lambda: self.time)


def small_package(
    folder: Path,
    *,
    weights: str = "weights",
    code: str = "print(1)",
    extra: dict[str, str] | None = None,
    **settings: str,
) -> Path:
    """A folder as `package` leaves it with these settings, with a bundle of a few bytes and a wheel that is none.

    `extra`: further `{path: SHA-256}` in the bundle's marker, of files that are not there.
    """
    sealed = hashlib.sha256(weights.encode()).hexdigest()
    name = f"fold0-{sealed[:8]}"
    packed = {
        "folder": name, "name": "fold0", "seal": sealed, "fold": 0, "metrics": {"log_loss": 0.9}, "orders": 2,
        "base": "x",
    }  # fmt: skip
    return write_package(
        folder,
        make_package(**settings),
        {"a": code},
        {
            "bundle": {f"{name}/adapter/weights.bin": weights * 1000, f"{name}/manifest.json": "{}"},
            "wheels": {"pairclf-0.1.0-py3-none-any.whl": "a wheel"},
        },
        extra=extra,
        bundles=[packed],
        config="demo/llama-tiny",
        out_of_fold=0.95,
    )
