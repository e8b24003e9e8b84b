"""Distributed training: launch modes, gathering of sharded weights, and settings that a mode does not support."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pairclf.config import Config
from pairclf.console import counted
from pairclf.errors import ConfigError
from pairclf.model.backbone import name_of, pick_device, pick_dtype
from pairclf.model.engine import Classifier

Mode = Literal["plain", "zero2", "zero3", "fsdp"]
"""plain: each process has the whole model. zero2: DeepSpeed with full weights in each process (stage 0, 1 or 2).
zero3, fsdp: the weights are sharded over the processes."""

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Timeout of collective operations. torch's 10 minutes are too short: one process may tokenise or score alone."""


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator for this launch: one process or many, with DeepSpeed or FSDP, in the device's precision.

    Raises:
        ConfigError: the launch is inconsistent.
    """
    on_cpu = _is_set("ACCELERATE_USE_CPU") or pick_device().type == "cpu"
    _refuse_launch(on_cpu)
    dtype, _ = pick_dtype(config.model.dtype, torch.device("cpu") if on_cpu else pick_device())
    deepspeed = _is_set("ACCELERATE_USE_DEEPSPEED")
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=COLLECTIVE_TIMEOUT)]
    if on_cpu:  # an installed DeepSpeed is imported by Accelerate, and would warn that it finds no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if deepspeed:
        _prepare_deepspeed(on_cpu)
    accelerator = Accelerator(
        # The classifier autocasts itself; Accelerate provides only float16's loss scale.
        mixed_precision="fp16" if dtype == torch.float16 and not deepspeed else "no",
        cpu=on_cpu and not deepspeed,  # cpu=True would silently disable DeepSpeed
        kwargs_handlers=handlers if "LOCAL_RANK" in os.environ else None,
    )
    if deepspeed:
        # While it is set, transformers shards every model under ZeRO-3, in a collective operation; but the main process
        # must load one alone, to score and verify the bundle.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        # Settings that pairclf controls must not come from DeepSpeed's file.
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "gradient_clipping": config.train.max_grad_norm or 0.0,  # 0: none
            "gradient_accumulation_steps": 1,
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
        }
    return accelerator


def mode_of(accelerator: Accelerator) -> Mode:
    """The mode of this launch."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "zero3" if accelerator.state.deepspeed_plugin.zero_stage == 3 else "zero2"
    return "plain"


def shards(accelerator: Accelerator) -> bool:
    """Whether an engine (DeepSpeed, FSDP) reduces the gradients itself, in backward."""
    return mode_of(accelerator) != "plain"


def prepare_model(
    accelerator: Accelerator, classifier: Classifier, optimizer: Optimizer
) -> tuple[nn.Module, Optimizer]:
    """Wrap classifier and optimizer in the engine; in plain mode only the optimizer, for float16's loss scale."""
    if mode_of(accelerator) == "plain":
        return classifier, accelerator.prepare(optimizer)
    if mode_of(accelerator) == "fsdp":
        backbone: Any = classifier.backbone
        # FSDP gathers one decoder layer at a time; the model knows the layer's class.
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(backbone._no_split_modules)
    model, prepared = accelerator.prepare(classifier, optimizer)
    return model, prepared


@torch.no_grad()
def gathered_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The full trained weights by name, float32, on the CPU, in the main process; `{}` in the others.

    All processes must call it. Weights are gathered one at a time, to limit memory to the largest.
    """
    unwrapped: nn.Module = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    weights: dict[str, Tensor] = {}
    for name, weight in unwrapped.named_parameters():
        if weight.requires_grad and (whole := _gather_weight(weight, accelerator)) is not None:
            weights[name] = whole
    return weights


def _gather_weight(weight: nn.Parameter, accelerator: Accelerator) -> Tensor | None:
    """A full copy of one sharded weight in the main process; None in the others."""
    if hasattr(weight, "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return _cpu_copy(weight) if accelerator.is_main_process else None
    whole: Tensor = weight
    if isinstance(weight, DTensor):  # FSDP
        whole = weight.to(accelerator.device).full_tensor()  # type: ignore[attr-defined]
    return _cpu_copy(whole) if accelerator.is_main_process else None


def _cpu_copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)


def check_settings(config: Config, accelerator: Accelerator) -> None:
    """Check that the launch mode supports all settings, before anything is loaded.

    Raises:
        ConfigError: the first entry of `ILLEGAL_SETTINGS` that applies.
    """
    mode = mode_of(accelerator)
    for modes, key, legal, reason, remedy in ILLEGAL_SETTINGS:
        value = _value(config, key, accelerator.device)
        if mode in modes and not legal(value):
            raise ConfigError(f"{key}={value} can't be trained under {TITLES[mode]}: {reason}", remedy=remedy)


def _value(config: Config, key: str, device: torch.device) -> Any:
    if key == "model.dtype":
        return name_of(pick_dtype(config.model.dtype, device)[0])
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


TITLES: dict[Mode, str] = {
    "plain": "plain processes",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "fsdp": "FSDP",
}

Legal = Callable[[Any], bool]
_PLAIN = "train in plain processes: --processes N, or configs/accelerate/ddp.yaml"

ILLEGAL_SETTINGS: tuple[tuple[tuple[Mode, ...], str, Legal, str, str], ...] = (
    (
        ("zero3", "fsdp"),
        "model.quantization",
        lambda value: value == "none",
        # https://github.com/huggingface/transformers/issues/29266, https://github.com/huggingface/peft/issues/2016
        "quantised weights can't be sharded, or would silently stay whole in every process",
        f"{_PLAIN} (a quantised base fits), or set model.quantization=none",
    ),
    (
        ("zero3", "fsdp"),
        "train.loss",
        lambda value: value == "labels",
        "the LM head may be the embedding, of which each process holds a part",
        f"{_PLAIN}, or set train.loss=labels",
    ),
    (
        ("zero3", "fsdp"),
        "model.label_scoring",
        lambda value: value == "trie",
        "the LM head may be the embedding, of which each process holds a part",
        f"{_PLAIN}, or set model.label_scoring=trie",
    ),
    (
        ("zero2", "zero3", "fsdp"),
        "model.dtype",
        lambda value: value != "float16",
        "the engine takes the step without the loss scale that float16 needs",
        f"{_PLAIN}, or set model.dtype=bfloat16 where the GPU has it",
    ),
    (
        ("zero2", "zero3"),
        "train.optim",
        lambda value: value != "adafactor",
        "ZeRO flattens the weights, but Adafactor needs their rows and columns: the training would differ",
        f"set train.optim=adamw_torch, or {_PLAIN}",
    ),
    (
        ("fsdp",),
        "train.optim",
        lambda value: value == "adamw_torch",
        "the optimizers of bitsandbytes and transformers don't support sharded weights (DTensor)",
        f"set train.optim=adamw_torch, whose state is sharded, or {_PLAIN}",
    ),
    (
        ("zero3", "fsdp"),
        "train.eval_steps",
        lambda value: value is None,
        "each process would score its own rows with only its shard of the weights",
        f"set train.eval_steps=null (and keep_weights=last, early_stopping_patience=null), or {_PLAIN}",
    ),
    (
        ("zero3", "fsdp"),
        "train.ema_decay",
        lambda value: value is None,
        "the average needs full weights, and each process has only its shard",
        f"set train.ema_decay=null, or {_PLAIN}",
    ),
    (
        ("zero2", "zero3", "fsdp"),
        "train.average_checkpoints",
        lambda value: value == 1,
        "an engine's checkpoints hold shards, which can't be averaged",
        f"set train.average_checkpoints=1, or {_PLAIN}",
    ),
)
"""(modes, setting, whether a value is legal, why others are not, remedy)."""


def _is_set(name: str) -> bool:
    """Whether a launcher's environment variable is true (`accelerate launch` also writes True)."""
    return os.environ.get(name, "").lower() in {"1", "true", "yes", "y", "on", "t"}


def _refuse_launch(on_cpu: bool) -> None:
    """Check that the launch started what it was asked for.

    Raises:
        ConfigError: several processes were requested and one started; more processes than GPUs; FSDP without GPUs.
    """
    # `accelerate launch --cpu --num_processes 2` sets a master address and starts one process without a rank.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as always on CPUs",
            remedy="without accelerate: pairclf train ... --processes N",
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and local > torch.cuda.device_count():
        raise ConfigError(
            f"{local} processes were started on this machine, which has {counted(torch.cuda.device_count(), 'GPU')}",
            remedy=f"--processes {torch.cuda.device_count()}, or set one process per GPU in the launcher's config",
        )
    if on_cpu and _is_set("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "Accelerate runs FSDP only on GPUs: each process would train the whole model",
            remedy="pairclf train ... --processes N",
        )


def _prepare_deepspeed(on_cpu: bool) -> None:
    """Prepare DeepSpeed before Accelerate starts it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("the launch asks for DeepSpeed", remedy="pip install 'pairclf[deepspeed]'") from error
    if on_cpu:  # use gloo: its own CPU collectives would be compiled for minutes at first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
