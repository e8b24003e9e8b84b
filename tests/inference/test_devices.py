"""Models go where they fit, and who asks for what can't be is told why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests_support import hollow_bundle

from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, Predict
from pairclf.errors import ConfigError, ModelError
from pairclf.inference.devices import Gpu, choose, place
from pairclf.model.backbone import load_base
from pairclf.model.cost import model_bytes

GIB = 1 << 30
T4 = Gpu("Tesla T4", 15_828_320_256)
GEMMA_NF4, GEMMA_INT8, GEMMA_FP16, LLAMA_70B = 6.2 * GIB, 9.6 * GIB, 17.2 * GIB, 131 * GIB


def settings(**values: object) -> Predict:
    return Predict.model_validate(values)


@pytest.mark.parametrize("size", [GEMMA_NF4, GEMMA_INT8])
def test_what_fits_one_gpu_stands_on_each(size: float) -> None:
    placed = place(settings(), int(size), [T4, T4])
    assert placed.groups == (("cuda:0",), ("cuda:1",))
    assert "Tesla T4" in placed.why
    assert placed.gpu


def test_what_does_not_is_laid_over_all() -> None:
    placed = place(settings(), int(GEMMA_FP16), [T4, T4])
    assert placed.groups == (("cuda:0", "cuda:1"),)
    assert "it does not fit on one of them" in placed.why
    with pytest.raises(ModelError, match="does not fit on each"):
        place(settings(parallelism="replicas"), int(GEMMA_FP16), [T4, T4])
    # Replicas that were asked for are refused by the weights alone.
    assert len(place(settings(parallelism="replicas"), int(14.0 * GIB), [T4, T4]).groups) == 2
    assert len(place(settings(), int(14.0 * GIB), [T4, T4]).groups) == 1


@pytest.mark.parametrize(("size", "gpus"), [(LLAMA_70B, [T4, T4]), (GEMMA_FP16, [T4])])
def test_what_fits_nowhere_is_refused(size: float, gpus: list[Gpu]) -> None:
    with pytest.raises(ModelError, match="can hold beside a batch"):
        place(settings(), int(size), gpus)


def test_devices_are_taken_as_named() -> None:
    assert place(settings(devices=["cpu", "cpu"]), int(LLAMA_70B), []).groups == (("cpu",), ("cpu",))
    assert place(settings(), 1, []).groups == (("cpu",),)
    assert not place(settings(), 1, []).gpu
    assert place(settings(devices=["cuda"]), 1, [T4, T4]).groups == (("cuda:0",),)
    assert place(settings(devices=["cuda:1"], parallelism="replicas"), 1, [T4, T4]).groups == (("cuda:1",),)
    assert place(settings(devices=["cuda:1", "cuda:0"], parallelism="pipeline"), 1, [T4, T4]).groups == (
        ("cuda:1", "cuda:0"),
    )
    twice = settings(devices=["cuda:0", "cuda:0"])
    assert len(place(twice, int(3 * GIB), [T4]).groups) == 2
    with pytest.raises(ModelError):  # one of them fits, two do not
        place(twice, int(GEMMA_INT8), [T4])


@pytest.mark.parametrize(
    "values",
    [
        {"devices": ["cuda:2"]},
        {"devices": ["tpu"]},
        {"devices": ["mps"]},
        {"devices": ["cpu", "cpu"], "parallelism": "pipeline"},
        {"devices": ["cuda:0", "cuda:0"], "parallelism": "pipeline"},
        {"devices": ["cuda:0", "cpu"], "parallelism": "pipeline"},
        {"devices": ["cuda:0"], "parallelism": "pipeline"},
    ],
)
def test_what_can_not_be_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        place(settings(**values), 1, [T4, T4])


def held(config: Config, base: Path) -> int:
    """Bytes of a loaded base, scales of quantised weights included."""
    loaded = load_base(str(base), config.model, torch.bfloat16, torch.device("cpu"))
    tensors = [*loaded.parameters()]
    scales = [one.quant_state for one in tensors if hasattr(one, "quant_state")]
    more = [tensor for one in scales for tensor in (one.absmax, one.state2.absmax)]
    return sum(one.nbytes for one in [*tensors, *more])


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_bytes_are_told_from_the_heads_of_the_files(
    config_for: Callable[..., Config], tmp_path: Path, quantization: str
) -> None:
    config = config_for("gemma2", model={"quantization": quantization})
    base = Path(config.model.base)
    bundle = open_bundle(hollow_bundle(tmp_path / "bundle", config, "test"))
    adapter = (tmp_path / "bundle" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert model_bytes(bundle) - adapter == pytest.approx(held(config, base), rel=0.02)
    assert model_bytes(bundle, base) == model_bytes(bundle)


def test_what_is_not_loaded_does_not_count(config_for: Callable[..., Config], tmp_path: Path) -> None:
    bundle = open_bundle(hollow_bundle(tmp_path / "bundle", config_for(), "test"))
    base, adapter = tmp_path / "base", (tmp_path / "bundle" / "adapter" / "adapter_model.safetensors").stat().st_size
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="are not there"):
        model_bytes(bundle, base)
    weights = {"model.norm.weight": torch.zeros(10), "lm_head.weight": torch.zeros(100, 100)}
    save_file({**weights, "packed": torch.zeros(5, 5, dtype=torch.int32)}, base / "model.safetensors")
    assert model_bytes(bundle, base) == 10 * 2 + 25 * 4 + adapter


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_the_cpu() -> None:
    assert choose(settings(), int(LLAMA_70B)).groups == (("cpu",),)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_are_found_without_a_context_in_this_process() -> None:
    placed = choose(settings(), GIB)
    assert len(placed.groups) == torch.cuda.device_count()
    assert torch.cuda.get_device_name(0) in placed.why
