"""Seconds of a forward pass as a function of its workload, fitted to the passes so far."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pairclf.inference.pending import Workload

WINDOW = 96
"""Most recent passes that are fitted; a machine's speed drifts, so older ones also count less (`HALF_LIFE`)."""

HALF_LIFE = 16.0
"""Passes after which the weight of a pass has halved."""

STALL_FACTOR = 4.0
"""A single pass that takes this many times the expected seconds is a stall: it widens the margin and not the fit."""

PRIOR_WEIGHT = 0.3
"""Weight of the prior of each coefficient; a measured pass has weight 1."""

MIN_MARGIN, MAX_MARGIN = 1.05, 1.8


class SequenceCost(Protocol):
    """Operations of a sequence of T tokens: `linear * T + quadratic * T**2` (`protocol.ModelCost`)."""

    @property
    def linear(self) -> float: ...
    @property
    def quadratic(self) -> float: ...


class ThroughputModel:
    """A regression of seconds: `a * tokens + b * squares + c * passes`, with coefficients of at least 0.

    The prior is operations / assumed speed. It stays in the regression with a small weight: batches are scored longest
    first, so the first passes all have similar lengths and can't tell `a`, `b` and `c` apart by themselves.

    Args:
        cost: operations of the model.
        speed: operations a second of one worker, a first estimate.
    """

    def __init__(self, cost: SequenceCost, speed: float) -> None:
        self._cost = cost
        self._speed = speed
        self._passes: deque[tuple[float, ...]] = deque(maxlen=WINDOW)  # (*workload, seconds, weight)
        self._ratios: deque[float] = deque(maxlen=32)  # measured / predicted seconds
        self._terms = self._prior_terms()

    @property
    def is_fitted(self) -> bool:
        """Whether any pass has been measured."""
        return len(self._passes) > 0

    @property
    def speed(self) -> float:
        """Operations a second in recent passes, fixed costs of a pass included."""
        return self._speed

    @property
    def margin(self) -> float:
        """Safety factor for predictions of many passes: 1.05 where predictions are accurate, up to 1.8."""
        if len(self._ratios) < 4:
            return 1.25
        spread = float(np.std(np.log(self._ratios)))
        return float(np.clip(1 + spread, MIN_MARGIN, MAX_MARGIN))

    def seconds(self, workload: Workload) -> float:
        """Predicted seconds of one worker."""
        return float(self._terms @ np.array(workload))

    def observe(self, workload: Workload, seconds: float, *, warming_up: bool = False) -> None:
        """Add a measured pass. `warming_up`: the worker's first pass, which also loads kernels and allocates memory."""
        if self.is_fitted and not warming_up:
            expected = max(self.seconds(workload), 1e-9)
            self._ratios.append(max(seconds, 1e-9) / expected)
            seconds = min(seconds, STALL_FACTOR * expected) if self._is_single_stall(seconds, workload) else seconds
        if warming_up and self.is_fitted:
            return
        # The very first pass is kept, with a low weight: it is better than the prior alone.
        self._passes.append((*workload, seconds, 0.2 if warming_up else 1.0))
        self._fit()

    def _is_single_stall(self, seconds: float, workload: Workload) -> bool:
        """Whether this pass is slow and those before it were not. If several are slow, the machine became slower, and
        the fit must follow."""
        recent = list(self._ratios)[-4:-1]
        return seconds > STALL_FACTOR * self.seconds(workload) and sum(ratio > 2 for ratio in recent) < 2

    def _fit(self) -> None:
        from scipy.optimize import nnls  # slow to import, and most commands fit nothing

        passes = np.array(self._passes)
        workloads, seconds, weights = passes[:, :3], passes[:, 3], passes[:, 4]
        weights = weights * 0.5 ** (np.arange(len(passes))[::-1] / HALF_LIFE)
        operations = workloads @ self._prior_terms() * self._speed
        self._speed = float(weights @ operations / max(weights @ seconds, 1e-12))
        prior = self._prior_terms()
        # Residuals are relative to the prior's prediction: a short pass that is off by half is as wrong as a long one.
        # (Relative to the measured seconds, slow passes would hardly count.) Each coefficient is pulled to its prior,
        # relative to the prior.
        scale = np.sqrt(weights) / np.maximum(workloads @ prior, 1e-9)
        pull = np.diag(PRIOR_WEIGHT / np.maximum(prior, 1e-30)) * (prior > 0)
        matrix = np.concatenate([workloads * scale[:, None], pull])
        unit = np.maximum(matrix.max(axis=0), 1e-30)  # columns of similar size, for the solver's sake
        scaled_terms, _ = nnls(matrix / unit, np.concatenate([seconds * scale, pull @ prior]))
        self._terms = scaled_terms / unit

    def _prior_terms(self) -> NDArray[np.float64]:
        return np.array([self._cost.linear, self._cost.quadratic, 0.0]) / self._speed
