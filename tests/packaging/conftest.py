"""A bundle without a model, and a registry without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests_support import hollow_bundle
from wheels_support import freeze_here, registry_of

from pairclf.config import Config
from pairclf.packaging import image_profiles

SMALL = "iniconfig"  # stands for what Kaggle's image lacks: pure Python, and nothing in the notebook needs it


@pytest.fixture
def config() -> Config:
    return Config.model_validate({"package": {"owner": "someone", "name": "a-notebook", "extra_packages": [SMALL]}})


@pytest.fixture
def bundle(tmp_path: Path, config: Config) -> Path:
    return hollow_bundle(tmp_path / "bundle", config, "fold0")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package registry, and images that hold what is installed here, less `SMALL`."""
    images = freeze_here(tmp_path / "images", ("3.11", "3.12", "3.13"), {SMALL})
    monkeypatch.setattr(image_profiles, "shipped", lambda name: images)
    return registry_of(tmp_path / "registry", SMALL, monkeypatch)
