"""The scripts of benchmarks/ as modules, which import each other as neighbours."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark_script(name: str) -> Any:
    """The module of `benchmarks/NAME.py`. What it sets for its own process, such as OpenMP's threads, is undone."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    with patch.dict(os.environ):
        return import_module(name)
