"""Wheels that hold nothing but what they ask for, a registry of them, and images that hold what is installed here."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path

import pytest

from pairclf.packaging.image_profiles import write_wheel
from pairclf.packaging.wheelhouse import repack

LINUX = "manylinux_2_17_x86_64.manylinux2014_x86_64"


def fake_wheel(
    folder: Path, name: str, version: str, needs: Sequence[str] = (), tags: str = "py3-none-any", *, claims: str = ""
) -> Path:
    """A wheel with one empty module of its name; `claims` is the text of its top_level.txt, which need not be true."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-{tags}.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    files = {
        f"{stem}.dist-info/METADATA": "\n".join(lines) + "\n",
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nTag: {tags}\n",
        f"{name.replace('-', '_')}.py": "",
        **({f"{stem}.dist-info/top_level.txt": claims} if claims else {}),
    }
    return write_wheel(path, {place: text.encode() for place, text in files.items()})


def only_registry(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make `folder` the package registry: neither pip nor uv looks anywhere else."""
    settings = folder.parent / f"{folder.name}.toml"
    settings.write_text(f'no-index = true\nfind-links = ["{folder}"]\n')
    patch.setenv("UV_CONFIG_FILE", str(settings))
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))
    patch.setenv("PIP_CONFIG_FILE", os.devnull)


def registry_of(folder: Path, project: str, patch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the package registry, with a project that is installed here; returns it."""
    folder.mkdir()
    repack(project, folder)
    only_registry(folder, patch)
    return folder


def freeze_here(folder: Path, pythons: Iterable[str], without: Collection[str]) -> Path:
    """Profiles of images that hold all that is installed here, but pairclf and `without`; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pins = sorted({f"{d.name}=={d.version}\n" for d in distributions() if d.name not in ("pairclf", *without)})
    for python in pythons:
        (folder / f"python{python}.txt").write_text("".join(pins))
    return folder
