"""What trainings leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pairclf.model.engine import Classifier


def weights(classifier: Classifier) -> torch.Tensor:
    """All trained weights, one after the other."""
    return torch.cat([one.detach().flatten() for one in classifier.parameters() if one.requires_grad])


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
