"""A bundle without a model, and a package whose notebook scores without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests_support import hollow_bundle

from pairclf.config import Config
from pairclf.packaging import build
from pairclf.packaging.wheelhouse import repack

SMALL = "iniconfig"  # stands for what Kaggle's image lacks: pure Python, and nothing in the notebook needs it


@pytest.fixture
def config() -> Config:
    return Config.model_validate({"package": {"owner": "someone", "name": "a-notebook", "wheels": [SMALL]}})


@pytest.fixture
def bundle(tmp_path: Path, config: Config) -> Path:
    return hollow_bundle(tmp_path / "bundle", config, "fold0")


@pytest.fixture
def write_bundle() -> Callable[[Path, Config, str], Path]:
    return hollow_bundle


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package registry: pip looks nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    repack(SMALL, folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


Packager = Callable[..., Path]


@pytest.fixture
def packaged(tmp_path: Path, config: Config, bundle: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> Packager:
    """`packaged(code, after=id)`: a package whose notebook has the real one's cells up to `id`, and then `code`."""

    def make(code: str, after: str = "install") -> Path:
        real = build.shipped(build.TEMPLATE).read_text(encoding="utf-8")
        head, cell, tail = real.partition(f"# %% {after}\n")
        template = tmp_path / "template.py"
        template.write_text(head + cell + tail.partition("# %%")[0] + f"# %% score\n{code}", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(build, "shipped", lambda name: template)
            return build.package(config, [bundle], tmp_path / "package")

    return make


@pytest.fixture
def competition(tmp_path: Path) -> tuple[Path, Path]:
    """A test file and its sample submission."""
    test, sample = tmp_path / "rows.csv", tmp_path / "sample.csv"
    test.write_text(
        'id,prompt,response_a,response_b\n7,"[""p""]","[""a""]","[""b""]"\n3,"[""q""]","[""c""]","[""d""]"\n'
    )
    thirds = "0.3333333,0.3333333,0.3333334"
    sample.write_text(f"id,winner_model_a,winner_model_b,winner_tie\n7,{thirds}\n3,{thirds}\n")
    return test, sample
