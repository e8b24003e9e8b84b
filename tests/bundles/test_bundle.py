"""A bundle proves itself: one byte anywhere, another base, or a weight that did not arrive, and it is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles_support import write_model
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests_support import make_rows
from transformers import AutoModel

from pairclf.approaches import verify_probes
from pairclf.bundles import bundle as bundles
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.contents import MANIFEST
from pairclf.bundles.manifest import read_manifest, seal_of
from pairclf.bundles.probes import pick_probes
from pairclf.config import Config, resolve
from pairclf.errors import BundleError
from pairclf.files import atomic_folder
from pairclf.inputs.render import InputBuilder
from pairclf.model.backbone import load_tokenizer
from pairclf.model.engine import build
from pairclf.model.scoring import by_order, items_of, score

CPU = torch.device("cpu")


def write_bundle(config: Config, folder: Path) -> None:
    classifier = build(config, CPU).eval()
    for name, parameter in classifier.named_parameters():
        if "lora_B" in name or name == "head.weight":
            torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = load_tokenizer(config.model.base)
    rows = make_rows(5)
    items = items_of(InputBuilder(tokenizer, config.task, config.inputs).encode(rows), orders=2)
    orders = by_order(items, score(classifier, items, tokens_per_batch=1_000), len(rows))
    probes = pick_probes(rows, orders)
    with atomic_folder(folder, known_by=MANIFEST) as new:
        figures = {"metrics": {"log_loss": 1.0}, "prior": [0.5, 0.3, 0.2]}
        write_model(new, classifier, config, tokenizer, name="test", fold=0, probes=probes, **figures)


@pytest.fixture(scope="module")
def saved(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    model = {"base": str(base_of("gemma2")), "quantization": "nf4", "lora": {"r": 4}}
    write_bundle(resolve({"inputs": {"max_length": 160}, "model": model}), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def check(folder: Path, base: Path | None = None) -> float:
    opened = open_bundle(folder)
    return verify_probes(opened, base)


def test_a_bundle_scores_its_probes_as_it_did(saved: Path) -> None:
    assert check(saved) <= 1e-6


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "lora"])
def test_round_trip_of_other_backbones(
    config_for: Callable[..., Config], tmp_path: Path, kind: str, lora: dict[str, int] | None
) -> None:
    write_bundle(config_for(kind, model={"lora": lora}), tmp_path / "bundle")
    assert check(tmp_path / "bundle") <= 1e-6


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_any_one_byte_changed_is_refused(copy: Path) -> None:
    names = files_of(copy)
    assert {"adapter/adapter_model.safetensors", "head.safetensors", "config.yaml", "bundle.json"} <= set(names)
    assert "tokenizer/tokenizer.json" in names
    for name in names:
        whole = (copy / name).read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            changed = bytearray(whole)
            changed[place] ^= 1
            (copy / name).write_bytes(changed)
            with pytest.raises(BundleError):
                open_bundle(copy)
        (copy / name).write_bytes(whole)
    assert open_bundle(copy).name == "test"


def test_a_file_too_many_or_too_few_is_refused(copy: Path) -> None:
    (copy / "adapter" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"adapter/extra\.safetensors"):
        open_bundle(copy)
    (copy / "adapter" / "extra.safetensors").unlink()
    (copy / "head.safetensors").unlink()
    with pytest.raises(BundleError, match=r"head\.safetensors"):
        open_bundle(copy)
    with pytest.raises(BundleError, match="no bundle"):
        open_bundle(copy / "adapter")


def reseal(folder: Path) -> None:
    """Make the hashes fit again, as somebody would who tampers on purpose, or a tool that rewrites files."""
    path = folder / MANIFEST
    tree = json.loads(path.read_text()) | {"files": bundles.sha256_tree(folder, without=frozenset({MANIFEST}))}
    path.write_text(json.dumps(tree | {"seal": seal_of(tree)}))


@pytest.mark.parametrize("name", ["head.safetensors", "adapter/adapter_model.safetensors"])
def test_other_weights_under_fitting_hashes_fail_the_probes(copy: Path, name: str) -> None:
    weights = load_file(copy / name)
    save_file({key: tensor + 0.05 for key, tensor in weights.items()}, copy / name)
    reseal(copy)
    with pytest.raises(BundleError, match="probe rows score differently"):
        check(copy)


def test_an_adapter_weight_that_is_missing_is_an_error_and_no_warning(copy: Path) -> None:
    path = copy / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(key for key in weights if "lora_B" in key))
    save_file(weights, path)
    reseal(copy)
    with pytest.raises(BundleError, match="did not arrive"):
        check(copy)


def test_a_head_of_another_shape_is_an_error(copy: Path) -> None:
    save_file({"weight": torch.zeros(2, 64), "bias": torch.zeros(2)}, copy / "head.safetensors")
    reseal(copy)
    with pytest.raises(BundleError, match="head can't be loaded"):
        check(copy)


def test_another_base_is_refused_and_the_same_elsewhere_accepted(
    saved: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="not the one"):
        check(saved, base_of("llama"))
    moved = Path(shutil.copytree(base_of("gemma2"), tmp_path / "moved"))
    assert check(saved, moved) <= 1e-6


def test_plain_peft_opens_the_adapter(saved: Path) -> None:
    opened = open_bundle(saved)
    base = AutoModel.from_pretrained(opened.config.model.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(saved / "adapter"))
    loaded = {name: one for name, one in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(saved / "adapter" / "adapter_model.safetensors"))


def test_the_documented_code_gives_a_bundles_logits(
    trained_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of docs/export.md on an NF4 run; with a base that is not quantised, its logits are others."""
    folder = trained_run("gemma2") / "run/fold0/bundle"
    page = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example, config = "runs/lmsys/gemma2-9b-qlora/fold0/bundle", ", quantization_config=nf4"
    assert code.count(example) == code.count(config) == 1
    saved = np.array([probe.logits[0] for probe in open_bundle(folder).manifest.probes])

    def computed(text: str) -> NDArray[np.float64]:
        exec(compile(text.replace(example, str(folder)), "docs/export.md", "exec"), {})
        return np.array([json.loads(logits) for logits in re.findall(r"(\[.*?\]) saved:", capsys.readouterr().out)])

    np.testing.assert_allclose(computed(code), saved, atol=1e-5)
    assert np.abs(computed(code.replace(config, "")) - saved).max() > 1e-3


def test_a_bundle_names_nothing_of_the_machine_but_its_base(saved: Path) -> None:
    opened = open_bundle(saved)
    assert opened.config.output_dir is None
    assert opened.config.data.train == []
    assert not (saved / "adapter" / "README.md").exists()


def test_a_full_disk_leaves_the_old_bundle(
    copy: Path, config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pairclf.model.weights.save_file", full)
        with pytest.raises(OSError, match="No space"):
            write_bundle(config_for("gemma2"), copy)
    assert open_bundle(copy).name == "test"
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]


def test_probes_span_the_lengths() -> None:
    rows = make_rows(30)
    logits = np.stack([np.zeros((30, 3)), np.ones((30, 3))], axis=1)
    chosen = pick_probes(rows, logits)
    sizes = {row.id: sum(len(turn or "") for turns in row.fields.values() for turn in turns) for row in rows}
    assert len(chosen) == 8
    assert (sizes[chosen[0].id], sizes[chosen[-1].id]) == (min(sizes.values()), max(sizes.values()))
    assert [sizes[probe.id] for probe in chosen] == sorted(sizes[probe.id] for probe in chosen)
    assert chosen[0].logits == [[0.0] * 3, [1.0] * 3]
    assert len(pick_probes(rows[:1], logits[:1])) == 1


def test_opening_reads_no_weights(saved: Path) -> None:
    assert isinstance(open_bundle(saved), Bundle)


def test_the_manifest_alone_is_read_without_a_look_at_the_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "head.safetensors").write_bytes(b"changed")
    monkeypatch.setattr(bundles, "sha256_tree", lambda *_, **__: pytest.fail("hashed every file"))
    assert read_manifest(copy).prior == [0.5, 0.3, 0.2]
    assert open_bundle(copy, verified=True).manifest == read_manifest(copy)
    monkeypatch.undo()
    with pytest.raises(BundleError, match=r"head\.safetensors"):
        open_bundle(copy)


def test_what_is_proven_elsewhere_still_has_its_own_manifest_and_config(copy: Path) -> None:
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("max_length: 160", "max_length: 16"))
    with pytest.raises(BundleError, match=r"1 file: config\.yaml"):
        open_bundle(copy, verified=True)
    (copy / "config.yaml").unlink()
    with pytest.raises(BundleError, match=r"config\.yaml"):
        open_bundle(copy, verified=True)
    manifest = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(manifest.replace("0.5", "0.6"))
    with pytest.raises(BundleError, match="was changed"):
        read_manifest(copy)
