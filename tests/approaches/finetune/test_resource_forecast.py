"""The fit check: operations against torch's own counter, memory dial by dial, and what is said of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tokenizers import tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from pairclf.approaches.finetune import resource_forecast
from pairclf.approaches.finetune.resource_forecast import (
    Clocks,
    ResourceForecast,
    busy,
    describe,
    describe_error,
    memory_warning,
    training_operations,
)
from pairclf.config import Config, override, resolve
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.cost import Cost, cost_of, cost_of_model
from pairclf.model.engine import Classifier, build
from pairclf.model.layouts import padded

CPU = torch.device("cpu")
LENGTHS = [40, 90, 120, 30, 60, 100, 80, 20, 50, 110]
EAGER = {"attn_implementation": "eager"}  # torch counts no fused attention on a CPU
FORECAST = ResourceForecast(
    21.34e9, 24e9, {"base": 5.9e9, "activations": 12.5e9, "gradients": 1e3}, 7.4 * 3600, "1 GFLOP a row"
)


def counted(classifier: Classifier, tokens: int, *, backward: bool) -> int:
    """What torch counts of a pass over one sequence."""
    batch = padded([Item(0, 0, np.ones(tokens, dtype=np.int32))])
    with FlopCounterMode(display=False) as counter:
        logits = classifier(batch.inputs, batch.read_at, batch.lengths)
        if backward:
            logits.sum().backward()
    return int(counter.get_total_flops())


def unmasked(cost: Cost) -> Cost:
    """torch counts the masked half of attention as well."""
    return replace(cost, quadratic=2 * cost.quadratic)


LORA = {"r": 4, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        pytest.param("llama", None, id="llama-whole"),
        pytest.param("llama", LORA, id="llama-lora"),
        pytest.param("gemma2", LORA, id="gemma2-lora"),
        pytest.param("qwen2", {**LORA, "first_layer": 1}, id="qwen2-upper_layers"),
    ],
)
def test_training_operations_are_those_that_torch_counts(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None
) -> None:
    classifier = build(config_for(kind, model={"lora": lora, **EAGER}, train={"layout": "padded"}), CPU)
    cost = unmasked(cost_of_model(classifier.backbone))
    for tokens in (16, 256):
        assert cost.of([tokens]) == pytest.approx(counted(classifier, tokens, backward=False), rel=0.01)
        exact = counted(classifier, tokens, backward=True)
        # Of the lowest layer that the backward pass reaches, it leaves out the gradients of its inputs: a part of one
        # layer in two here, of one in forty in a real model. Full fine-tuning leaves nothing out.
        found = training_operations(cost, [tokens], recompute=False)
        assert found == pytest.approx(exact, rel=0.01 if lora is None else 0.08)
        for wrong in (
            replace(cost, trained=0.0 if lora is None else cost.linear),
            replace(cost, linear=cost.linear / 2),
        ):
            assert training_operations(wrong, [tokens], recompute=False) != pytest.approx(exact, rel=0.08)


def test_cost_of_model_has_no_backward_pass_below_the_adapters(config_for: Callable[..., Config]) -> None:
    lora = {"r": 4, "first_layer": 1}
    cost = cost_of_model(build(config_for("llama", model={"lora": lora}), CPU).backbone)
    assert cost.reached == 0.5  # one layer of two
    assert 0 < cost.trained < 0.2 * cost.linear
    whole = cost_of(config_for("llama"))
    assert (whole.reached, whole.trained) == (1, whole.linear)


def test_training_operations_count_recomputation_as_a_second_forward_pass(config_for: Callable[..., Config]) -> None:
    """Counted for hours alone; with checkpointing, gradients run through every layer."""
    config = config_for("llama", model={"lora": {"r": 4, "lora_dropout": 0.0}, **EAGER}, train={"layout": "padded"})
    classifier = build(config, CPU)
    checkpoint_gradients(classifier.backbone)
    classifier.train()
    cost = unmasked(cost_of_model(classifier.backbone))
    executed = counted(classifier, 64, backward=True)
    assert training_operations(cost, [64], recompute=True) == pytest.approx(executed, rel=0.02)
    assert training_operations(cost, [64], recompute=False) < 0.75 * executed


def test_peak_of_name_knows_a_gpu_by_the_words_of_its_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12, "NVIDIA A10G": 70e12, "NVIDIA A10": 125e12, "NVIDIA A100-SXM4-40GB": 312e12,
        "Tesla T4": 65e12, "Tesla P100-PCIE-16GB": 18.7e12, "Tesla V100-SXM2-16GB": 125e12,
        "NVIDIA GeForce RTX 4090": 165e12, "Quadro K2000": None,
    }  # fmt: skip
    assert {name: resource_forecast.peak_of_name(name) for name in names} == names
    assert resource_forecast.peak_of(CPU) is None


def parts_of(config: Config, lengths: list[int] = LENGTHS) -> ResourceForecast:
    classifier = build(config, CPU)
    return resource_forecast.forecast_resources(config, classifier, lengths, rows_seen=100, device=CPU, processes=1)


def test_forecast_parts_move_with_their_dials(config_for: Callable[..., Config]) -> None:
    config = config_for("llama", train={"layout": "packed", "swap": "none", "per_device_train_batch_size": 4})
    plain = parts_of(config)

    def moved(*overrides: str, lengths: list[int] = LENGTHS) -> dict[str, float]:
        """Each part over what it is in the plain config."""
        parts = parts_of(override(config, overrides), lengths).parts
        return {name: parts[name] / (plain.parts.get(name) or 1) for name in parts}

    assert moved("train.optim=adafactor")["optimizer"] < 0.5
    assert moved("train.ema_decay=0.99")["average"] == plain.parts["gradients"]
    assert moved("model.lora.r=8")["gradients"] == pytest.approx(2, rel=0.05)  # and a head
    assert moved("model.lora.r=8")["base"] == 1
    assert moved("model.quantization=nf4")["base"] < 0.6
    assert moved("train.tokens_per_batch=130")["activations"] < 0.6
    assert moved("train.per_device_train_batch_size=1")["activations"] < 0.6
    assert moved("train.swap=both")["activations"] == pytest.approx(2, rel=0.1)
    assert moved("train.layout=padded")["activations"] > 1.1
    assert moved("model.lora.lora_dropout=0.5")["activations"] > 1.1
    assert moved("model.lora.first_layer=1")["activations"] < 0.9
    assert moved("train.gradient_checkpointing=true")["activations"] < 0.95  # two layers alone: little to save
    assert moved(lengths=[2 * one for one in LENGTHS])["activations"] > 1.9
    assert sum(plain.parts.values()) <= plain.memory_bytes


@pytest.mark.parametrize(
    ("optimizer", "shape", "size"),
    [
        ("adamw_torch", (64, 64), 8 * 4096),
        ("adamw_8bit", (64, 64), 2 * 4096 * (1 + 4 / 256)),
        ("adamw_8bit", (63, 64), 8 * 63 * 64),
        ("paged_adamw_32bit", (64, 64), 8 * 4096),
        ("adafactor", (64, 32), 4 * 96),
        ("adafactor", (64,), 4 * 64),
    ],
)
def test_state_bytes_are_what_an_optimizer_keeps(optimizer: str, shape: tuple[int, ...], size: float) -> None:
    from pairclf.approaches.finetune.optimizers import OPTIMIZERS

    weight = torch.nn.Parameter(torch.ones(shape))
    assert resource_forecast.state_bytes(optimizer, weight) == size
    made = OPTIMIZERS[optimizer]([{"params": [weight], "lr": 1e-3}], betas=(0.9, 0.999))
    weight.grad = torch.ones(shape)
    made.step()
    kept = sum(one.nbytes for one in made.state[weight].values() if isinstance(one, torch.Tensor))
    # What else stands there: the step's number, and the map from 8 bits to numbers, which all weights share.
    assert size - 1 <= kept <= size + 2 * 256 * 4 + 8


@pytest.mark.parametrize(
    ("kind", "lora", "layout"),
    [
        pytest.param("llama", None, "padded", id="llama-whole-padded"),
        pytest.param("llama", {"r": 4, "lora_dropout": 0.1}, "packed", id="llama-lora-packed"),
        pytest.param("gemma2", None, "packed", id="gemma2-whole-packed"),
        pytest.param("gemma2", {"r": 4, "lora_dropout": 0.1}, "padded", id="gemma2-lora-padded"),
    ],
)
def test_kept_by_length_tells_what_a_long_batch_keeps(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None, layout: str
) -> None:
    config = config_for(kind, model={"lora": lora}, train={"layout": layout})
    classifier = build(config, CPU)
    coefficients = resource_forecast.kept_coefficients(config, classifier)
    shape, exact = resource_forecast.measure_kept_bytes(config, classifier, 500)
    tokens = np.array(shape, dtype=float)
    found = coefficients @ np.array([1.0, tokens.sum(), (tokens**2).sum()])
    assert found == pytest.approx(exact, rel=0.02)
    if kind == "gemma2":  # soft-capped: its scores are written out, and a formula without squares is far off
        assert coefficients[:2] @ np.array([1.0, tokens.sum()]) < 0.7 * exact


def test_kept_bytes_frees_what_it_kept(config_for: Callable[..., Config]) -> None:
    """An operation that keeps its own result, as attention does, held itself: 900 tokens' worth stayed for good."""
    config = config_for("llama", train={"layout": "packed"})
    classifier = build(config, CPU)
    seen: list[weakref.ref[torch.Tensor]] = []

    def look(module: torch.nn.Module, given: tuple[object, ...]) -> None:
        seen.extend(weakref.ref(one) for one in given if isinstance(one, torch.Tensor) and one.requires_grad)

    for module in classifier.modules():
        module.register_forward_pre_hook(look)
    resource_forecast.measure_kept_bytes(config, classifier, 64)
    assert len(seen) > 10
    assert not any(one() is not None for one in seen)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Twelve layers, whose memory is small."""
    folder = tmp_path_factory.mktemp("deep")
    tiny_tokenizer(folder)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12}
    AutoModel.from_config(AutoConfig.for_model("llama", **sizes, **heads)).save_pretrained(folder)
    model = {"base": str(folder), "quantization": "none", "lora": {"r": 4}}
    return resolve({"inputs": {"max_length": 160}, "model": model, "train": {"swap": "none"}})


@pytest.mark.parametrize(
    ("skipped", "checkpointing"), [(0, True), (4, False), (10, True), (11, False)], ids=lambda value: str(value)
)
def test_grown_by_layer_ends_when_enough_layers_have_run(
    deep: Config, monkeypatch: pytest.MonkeyPatch, skipped: int, checkpointing: bool
) -> None:
    """With a memory that grows by 1,000 bytes at the first layer that is watched, and by 10 at each other."""
    config = override(deep, [f"train.gradient_checkpointing={str(checkpointing).lower()}"])
    classifier = build(config, CPU)
    if checkpointing:
        checkpoint_gradients(classifier.backbone)
    run, read = [0], [-1]
    layers = next(one for one in classifier.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == 12)
    for layer in layers:
        layer.register_forward_hook(lambda *_: run.append(run.pop() + 1))

    def memory(device: torch.device) -> int:
        read.append(read.pop() + 1)
        return 990 * (read[0] > 0) + 10 * read[0]

    monkeypatch.setattr(resource_forecast, "memory_now", memory)
    classifier.eval()
    grown = resource_forecast.heap_growth_of_layer(config, classifier, [9, 7], skipped=skipped)
    assert grown == (10 if skipped < 11 else 0)  # of one layer nothing can be said
    assert run == [min(12, skipped + resource_forecast.WATCHED_LAYERS)]
    assert not any(one.training for one in classifier.modules())
    assert not any(one._forward_pre_hooks for one in layers)


@pytest.mark.parametrize("first", [0, 8])
def test_activations_count_the_heap_of_every_layer_that_keeps_something(
    deep: Config, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    config = override(deep, [f"model.lora.first_layer={first}"])
    classifier, skips = build(config, CPU), []

    def grown(*_: object, skipped: int) -> float:
        skips.append(skipped)
        return 1e9

    monkeypatch.setattr(resource_forecast, "heap_growth_of_layer", grown)
    small = resource_forecast._activations(config, classifier, [[50, 40], [90]])
    assert not skips  # a heap that is small beside the process
    monkeypatch.setattr(resource_forecast, "MIN_WATCHED_BYTES", 0)
    assert resource_forecast._activations(config, classifier, [[50, 40], [90]]) == pytest.approx(
        1e9 * (12 - first), rel=0.01
    )
    checkpointed = override(config, ["train.gradient_checkpointing=true"])
    assert resource_forecast._activations(checkpointed, classifier, [[50, 40]]) == pytest.approx(12e9, rel=0.01)
    assert skips == [first, first]
    monkeypatch.setattr(resource_forecast, "heap_growth_of_layer", lambda *_, skipped: 0.0)  # never less than is kept
    least = resource_forecast._activations(config, classifier, [[50, 40], [90]])
    assert small > least > small * (12 - first) / (12 - first + resource_forecast.BACKWARD_LAYERS["cpu"])


def test_forecast_leaves_no_trace(config_for: Callable[..., Config]) -> None:
    """Neither in the random numbers, nor in gradients, mode or checkpointing."""
    config = config_for("llama", model={"lora": {"r": 4, "lora_dropout": 0.5}}, train={"gradient_checkpointing": True})
    classifier = build(config, CPU)
    checkpoint_gradients(classifier.backbone)
    classifier.eval()
    state = torch.get_rng_state()
    resource_forecast.forecast_resources(config, classifier, LENGTHS, rows_seen=100, device=CPU, processes=1)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(one.training for one in classifier.modules())
    assert all(one.grad is None for one in classifier.parameters())
    assert any(getattr(one, "gradient_checkpointing", False) for one in classifier.modules())


def test_forecast_hours_grow_with_rows_and_shrink_with_processes(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource_forecast, "_measured_speed", lambda *_: (1e9, 1.0))
    config = config_for("llama", train={"swap": "none", "layout": "packed", "gradient_checkpointing": False})
    classifier = build(config, CPU)

    def seconds(config: Config, rows: float, processes: int = 1) -> float:
        lengths = [50] * 64
        return resource_forecast.forecast_resources(
            config, classifier, lengths, rows_seen=rows, device=CPU, processes=processes
        ).seconds

    one = seconds(config, 64)
    operations = training_operations(cost_of_model(classifier.backbone), [50] * 64, recompute=False)
    assert one == pytest.approx(operations / 1e9)
    assert seconds(config, 640) == pytest.approx(10 * one)
    assert seconds(config, 64, processes=2) == pytest.approx(one / 2)
    assert seconds(override(config, ["train.swap=both"]), 64) == pytest.approx(2 * one)
    assert seconds(override(config, ["train.gradient_checkpointing=true"]), 64) > 1.3 * one


@pytest.mark.parametrize(("slow", "share"), [(1.0, 1.0), (50.0, 0.02)])
def test_hours_are_a_free_machines_however_busy_it_is(
    config_for: Callable[..., Config], slow: float, share: float
) -> None:
    """Passes of 2 CPU-seconds, the first one of 100, of which each takes `slow` seconds."""
    config = config_for("llama", train={"swap": "none", "layout": "packed"})
    classifier = build(config, CPU)
    computed = iter([0.0, 100.0, 100.0, 102.0])

    def clock() -> Clocks:
        cpu = next(computed)
        return Clocks(wall=slow * cpu, cpu=cpu)

    lengths = [50] * 64
    found = resource_forecast.forecast_resources(
        config, classifier, lengths, rows_seen=640, device=CPU, processes=1, clock=clock
    )
    cost = cost_of_model(classifier.backbone)
    speed = cost.of([50] * config.train.per_device_train_batch_size) / 2
    assert found.seconds == pytest.approx(10 * training_operations(cost, lengths, recompute=False) / speed)
    assert found.share == pytest.approx(share)
    assert (busy(found) is None) == (share == 1)


def test_a_busy_machine_is_named_with_both_times() -> None:
    assert busy(FORECAST) is None
    text = busy(replace(FORECAST, seconds=720.0, share=0.38))
    assert text is not None
    for part in ("the machine is busy", "gets 38% of the CPU time", "takes about 12 min", "share about 32 min"):
        assert part in text


def test_describe_and_verdict_are_sentences() -> None:
    text = describe(FORECAST)
    assert text.startswith("fit check: 21.3 GB of 24.0 GB (base 5.90, activations 12.50), about 7.4 h (1 GFLOP a row)")
    assert describe_error(FORECAST, 20.1e9, 8 * 3600).endswith("took 20.1 GB (-6%) and 8.0 h (+8%)")
    assert resource_forecast.peak_memory(CPU) > 50e6


def test_warning_has_a_remedy_for_what_does_not_fit(config_for: Callable[..., Config]) -> None:
    assert memory_warning(FORECAST, config_for()) is None
    short = replace(FORECAST, available_bytes=16e9)
    text = memory_warning(short, config_for())
    assert text is not None
    for part in ("21.3 GB", "16.0 GB", "train.tokens_per_batch (now 16384)", "train.gradient_checkpointing=true"):
        assert part in text
    spent = memory_warning(short, config_for(train={"gradient_checkpointing": True, "optim": "adafactor"}))
    assert spent is not None
    assert not any(word in spent for word in ("gradient_checkpointing", "adamw_8bit"))
