"""The packages of `pairclf[kaggle]`, which notebooks on Kaggle do not have."""

from __future__ import annotations

from importlib.util import find_spec

from pairclf.errors import PackagingError

PACKAGES = ("hatchling", "ipykernel", "nbclient", "nbformat", "psutil", "uv")


def require_extra() -> None:
    """Refuse to start without the packages that are imported later.

    Raises:
        PackagingError: a package is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise PackagingError(f"packaging needs {', '.join(missing)}", remedy="pip install 'pairclf[kaggle]'")
