"""The approaches, which turn rows into logits: `APPROACHES` names them, `protocol.py` says what each must do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from pairclf.approaches.protocol import Approach
from pairclf.bundles.bundle import Bundle
from pairclf.bundles.probes import difference_of_probes, require_close
from pairclf.config import Config


def _finetune() -> Approach:
    from pairclf.approaches.finetune.approach import FinetuneApproach

    return FinetuneApproach()


def _prompt() -> Approach:
    from pairclf.approaches.prompt import PromptApproach

    return PromptApproach()


def _classical() -> Approach:
    from pairclf.approaches.classical import ClassicalApproach

    return ClassicalApproach()


APPROACHES: dict[str, Callable[[], Approach]] = {"finetune": _finetune, "prompt": _prompt, "classical": _classical}
"""`approach` in a config and in a bundle's manifest. Each function imports inside of itself: a table without torch."""


def approach_of(config: Config) -> Approach:
    """The approach that a config, a run's or a bundle's, names; the same one in each call."""
    return _made(config.approach)


def verify_probes(bundle: Bundle, base: Path | None = None) -> float:
    """Load a bundle's model and score its probe rows.

    Returns:
        The largest difference of a logit.

    Raises:
        BundleError: it exceeds the tolerance of the dtype computed in.
        ModelError: the model can't be loaded.
    """
    logits, dtype = approach_of(bundle.config).score_probes(bundle, base)
    difference = difference_of_probes(bundle, logits)
    require_close(bundle, dtype, difference)
    return difference


@cache
def _made(name: str) -> Approach:
    return APPROACHES[name]()
