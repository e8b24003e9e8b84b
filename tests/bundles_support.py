"""Bundles of classifiers that tests made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairclf.bundles.bundle import write_bundle
from pairclf.config import Config
from pairclf.model.engine import Classifier
from pairclf.model.weights import save_weights

FACTS: dict[str, Any] = {"name": "test", "fold": None, "metrics": {}, "prior": [0.4, 0.3, 0.3], "probes": []}


def write_model(new: Path, classifier: Classifier, config: Config, tokenizer: Any, **facts: Any) -> None:
    """Write a whole bundle into the folder `new`, with these facts in its manifest."""
    new.mkdir(parents=True, exist_ok=True)
    write_bundle(new, config, save_weights(new, classifier, config, tokenizer), **{**FACTS, **facts})
