"""pairclf trains classifiers on preference pairs, predicts test files and packages the models for Kaggle.

    judge = pairclf.load("runs/demo/fold0/bundle")
    judge.predict(frame)
    pairclf.fit("configs/demo/gemma2-tiny.yaml", "train.num_train_epochs=2", fold=0)
    pairclf.PairClassifier(approach="classical").fit(frame, labels)

Importing it loads nothing: each name is imported as it is used. docs/api.md lists them.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairclf.api.estimator import PairClassifier
    from pairclf.api.judge import Judge, load
    from pairclf.api.workflows import TrainedFolds, blend, compare, cross_validate, evaluate, fit, report, sweep
    from pairclf.errors import PairclfError

__version__ = "0.1.0"

_MODULES = {
    "Judge": "pairclf.api.judge",
    "PairClassifier": "pairclf.api.estimator",
    "PairclfError": "pairclf.errors",
    "TrainedFolds": "pairclf.api.workflows",
    "blend": "pairclf.api.workflows",
    "compare": "pairclf.api.workflows",
    "cross_validate": "pairclf.api.workflows",
    "evaluate": "pairclf.api.workflows",
    "fit": "pairclf.api.workflows",
    "load": "pairclf.api.judge",
    "report": "pairclf.api.workflows",
    "sweep": "pairclf.api.workflows",
}
"""Where each public name is defined."""

__all__ = [
    "Judge", "PairClassifier", "PairclfError", "TrainedFolds",
    "blend", "compare", "cross_validate", "evaluate", "fit", "load", "report", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pairclf' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


# Two messages of libraries to each other, which a user can do nothing about:
# on CPUs with AVX512-BF16 bitsandbytes (0.50) says at import that a bfloat16 kernel is missing, which pairclf never
# uses, so that scores are the same on every CPU; and peft (0.21) reads an attribute that transformers 5.20 renamed.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
