"""The packages of `pairclf[kaggle]`, which notebooks on Kaggle do not have."""

from __future__ import annotations

from importlib.util import find_spec

from pairclf.errors import PackagingError

PACKAGES = (
    "hatchling", "ipykernel", "jupyter_client", "kaggle", "nbclient", "nbformat", "pip", "psutil", "requests", "six",
    "uv",
)  # fmt: skip
"""Modules of the packages in the extra."""


def require_extra() -> None:
    """Refuse to start without the packages that are imported later.

    Raises:
        PackagingError: a package is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise PackagingError(
            f"this command needs {', '.join(missing)}, not installed here", remedy="pip install 'pairclf[kaggle]'"
        )
