"""How long a forward pass takes, learnt from those that came back: seconds as a function of length."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pairclf.inference.backlog import Load

REMEMBERED = 96
"""Passes that are looked at; speed drifts, and older ones say less (`HALF_LIFE`)."""

HALF_LIFE = 16.0
"""Passes after which one counts half."""

STALL = 4.0
"""A pass that alone took so many times what was expected is a stall: it widens the margin, not the pace."""

PULL = 0.3
"""Weight of what the operations say of a term, beside passes that were made (1 each)."""

LEAST_MARGIN, MOST_MARGIN = 1.05, 1.8


class Shape(Protocol):
    """Operations of a sequence: `linear * T + quadratic * T**2` (`jobs.estimate.Cost`)."""

    @property
    def linear(self) -> float: ...
    @property
    def quadratic(self) -> float: ...


class Pace:
    """Seconds of a pass: `c * passes + a * tokens + b * squares`, none of them negative.

    Before anything was seen, operations divided by a speed are all there is; afterwards they are a weak witness among
    the passes, so that long sequences, which come first, say something of short ones.

    Args:
        shape: operations of the member's model.
        speed: operations a second of one worker to begin with.
    """

    def __init__(self, shape: Shape, speed: float) -> None:
        self._shape = shape
        self._speed = speed
        self._seen: deque[tuple[float, ...]] = deque(maxlen=REMEMBERED)  # a load, its seconds, its weight
        self._ratios: deque[float] = deque(maxlen=32)
        self._terms = self._by_shape()

    @property
    def known(self) -> bool:
        """Whether it rests on passes that were made."""
        return len(self._seen) > 0

    @property
    def speed(self) -> float:
        """Operations a second, as seen of late; what a pass costs besides is in it."""
        return self._speed

    @property
    def margin(self) -> float:
        """What predictions of much work are to be multiplied with: 1.05 where passes take what was expected of them."""
        if len(self._ratios) < 4:
            return 1.25
        spread = float(np.std(np.log(self._ratios)))
        return float(np.clip(1 + spread, LEAST_MARGIN, MOST_MARGIN))

    def seconds(self, load: Load) -> float:
        """Predicted seconds of one worker."""
        return float(self._terms @ np.array(load))

    def learn(self, load: Load, seconds: float, *, warming_up: bool = False) -> None:
        """A pass took so long. `warming_up`: it was a worker's first, which loads kernels and finds memory."""
        if self.known and not warming_up:
            self._ratios.append(max(seconds, 1e-9) / max(self.seconds(load), 1e-9))
            seconds = min(seconds, STALL * max(self.seconds(load), 1e-9)) if self._is_lone(seconds, load) else seconds
        if warming_up and self.known:
            return
        self._seen.append((*load, seconds, 0.2 if warming_up else 1.0))
        self._fit()

    def _is_lone(self, seconds: float, load: Load) -> bool:
        """Whether this pass alone is slow, and not those before it: else the machine has become slower."""
        recent = list(self._ratios)[-4:-1]
        return seconds > STALL * self.seconds(load) and sum(ratio > 2 for ratio in recent) < 2

    def _fit(self) -> None:
        seen = np.array(self._seen)
        loads, seconds, weights = seen[:, :3], seen[:, 3], seen[:, 4]
        weights = weights * 0.5 ** (np.arange(len(seen))[::-1] / HALF_LIFE)
        operations = loads @ self._by_shape() * self._speed
        self._speed = float(weights @ operations / max(weights @ seconds, 1e-12))
        witness = self._by_shape()
        # Errors count in parts of what the operations say: a short pass that is off by half is as wrong as a long one.
        # (In parts of the seconds themselves, slow passes would hardly count.) And each term is drawn to what the
        # operations say of it, in parts of itself.
        scale = np.sqrt(weights) / np.maximum(loads @ witness, 1e-9)
        pull = np.diag(PULL / np.maximum(witness, 1e-30)) * (witness > 0)
        known = np.concatenate([loads * scale[:, None], pull])
        unit = np.maximum(known.max(axis=0), 1e-30)
        found, _ = nnls(known / unit, np.concatenate([seconds * scale, pull @ witness]))
        self._terms = found / unit

    def _by_shape(self) -> NDArray[np.float64]:
        return np.array([self._shape.linear, self._shape.quadratic, 0.0]) / self._speed
