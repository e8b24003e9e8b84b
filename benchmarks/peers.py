"""What benchmarks have in common of the peers that they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


def watched_trainer(losses: list[float]) -> type[Trainer]:
    """HF Trainer that adds the loss of each micro-batch to `losses`; its own log rounds."""
    from transformers import Trainer

    class Watched(Trainer):
        def training_step(self, *arguments: Any, **named: Any) -> Tensor:
            loss: Tensor = super().training_step(*arguments, **named)
            losses.append(float(loss))
            return loss

    return Watched
