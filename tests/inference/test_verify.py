from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests_support import hollow_bundle

from pairclf.approaches.finetune.approach import FinetuneApproach
from pairclf.config import Config
from pairclf.errors import BundleError
from pairclf.inference import verify as module
from pairclf.inference.verify import verify


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Bundles whose probes differ by what their names say."""
    monkeypatch.setattr(FinetuneApproach, "score_probes", lambda *_: (np.zeros(0), "float32"))
    monkeypatch.setattr(module, "difference_of_probes", lambda bundle, logits: float(bundle.name))
    return [hollow_bundle(tmp_path / name, Config(), name) for name in ("1e-6", "0.5", "nan", "2e-6")]


def test_what_was_found_is_written_of_bundles_that_fail_too(bundles: list[Path], tmp_path: Path) -> None:
    (bundles[3] / "head.safetensors").write_text("other weights")
    passed = []
    with pytest.raises(BundleError, match=r"off by 0\.5; float32 allows 0\.0001"):
        for folder, _ in verify(bundles, None, tmp_path / "verify.json"):
            passed.append(folder)
    found = json.loads((tmp_path / "verify.json").read_text())
    assert passed == bundles[:1]
    assert [one["bundle"] for one in found] == ["1e-6", "0.5", "nan"]
    assert [one["largest_difference"] for one in found] == [1e-6, 0.5, None]
    rest = {"rows": 0, "largest_difference": 1e-6, "tolerance": 1e-4, "dtype": "float32"}
    assert found[0] == {"bundle": "1e-6", "folder": str(bundles[0]), **rest}


def test_bundles_that_hold_need_no_file(bundles: list[Path], tmp_path: Path) -> None:
    assert [one["bundle"] for _, one in verify([bundles[0], bundles[3]], None, None)] == ["1e-6", "2e-6"]
    assert not (tmp_path / "verify.json").exists()
