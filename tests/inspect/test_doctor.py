"""`doctor`: what is absent and not needed by all is named, and is no error."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from pairclf.inspect import doctor as module
from pairclf.inspect.doctor import examine


@pytest.mark.parametrize("there", [True, False])
def test_gpu_tokens_and_extras_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool) -> None:
    def installed(name: str) -> str:
        if name == "tensorboard" and not there:
            raise PackageNotFoundError(name)
        return "99" if name in ("mlflow-skinny", "trackio", "wandb", "tensorboard") else version(name)

    monkeypatch.setattr(module, "version", installed)
    monkeypatch.setattr(module, "get_token", lambda: "hf_secret" if there else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / ".kaggle").mkdir()
        (tmp_path / ".kaggle" / "kaggle.json").write_text("a secret")
    findings = {name: (well, found) for name, well, found in examine()}
    assert findings["GPU"][0] is None
    assert "the CPU computes" in findings["GPU"][1]
    well = True if there else None
    assert {findings[name][0] for name in ("HF_TOKEN", "Kaggle's token", "extra trackers")} == {well}
    if there:
        assert "secret" not in str(findings)
    else:
        assert "gated models" in findings["HF_TOKEN"][1]
        assert "`pairclf push`" in findings["Kaggle's token"][1]
        assert findings["extra trackers"][1] == "without tensorboard; pip install 'pairclf[trackers]'"
