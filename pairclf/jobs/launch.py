"""Processes and devices: one process or many, who launched them, and what can't go together there."""

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
from pairclf.errors import ConfigError
from pairclf.model.backbone import pick_device, pick_dtype
from pairclf.model.engine import Classifier

Mode = Literal["plain", "zero2", "zero3", "fsdp"]
"""plain: each process has the whole model. zero2: DeepSpeed with whole weights in each process (stage 0, 1 or 2).
zero3, fsdp: each process has its share of the weights."""

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other. torch's 10 minutes are less than one of them may tokenise or score alone."""


def make_accelerator(config: Config) -> Accelerator:
    """One process or many, in the precision that the device computes in, with DeepSpeed or FSDP if launched so.

    Raises:
        ConfigError: the launch can't do what it says.
    """
    on_cpu = _said("ACCELERATE_USE_CPU") or pick_device().type == "cpu"
    _refuse_launch(on_cpu)
    dtype, _ = pick_dtype(config.model.dtype, torch.device("cpu") if on_cpu else pick_device())
    deepspeed = _said("ACCELERATE_USE_DEEPSPEED")
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=PATIENCE)]
    if on_cpu:  # where DeepSpeed is installed, Accelerate imports it, and it complains of finding no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if deepspeed:
        _ready_deepspeed(on_cpu)
    accelerator = Accelerator(
        # The classifier autocasts itself; Accelerate is asked for float16's loss scale alone.
        mixed_precision="fp16" if dtype == torch.float16 and not deepspeed else "no",
        cpu=on_cpu and not deepspeed,  # with it, Accelerate would run without DeepSpeed and not say so
        kwargs_handlers=handlers if "LOCAL_RANK" in os.environ else None,
    )
    if deepspeed:
        # As long as it is set, transformers loads every model in shares under ZeRO-3, with all processes taking part;
        # the main process must be able to load one alone, to score and to prove the bundle.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        # What pairclf decides must not be decided a second time by DeepSpeed's own file.
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "gradient_clipping": config.train.clip or 0.0,  # 0: none
            "gradient_accumulation_steps": 1,
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
        }
    return accelerator


def mode_of(accelerator: Accelerator) -> Mode:
    """How the processes share the work."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "zero3" if accelerator.state.deepspeed_plugin.zero_stage == 3 else "zero2"
    return "plain"


def shards(accelerator: Accelerator) -> bool:
    """Whether an engine (DeepSpeed, FSDP) reduces the gradients itself, within backward."""
    return mode_of(accelerator) != "plain"


def prepare_model(
    accelerator: Accelerator, classifier: Classifier, optimizer: Optimizer
) -> tuple[nn.Module, Optimizer]:
    """Hand classifier and optimizer to the engine; without one the optimizer alone is wrapped, for float16's scale."""
    if mode_of(accelerator) == "plain":
        return classifier, accelerator.prepare(optimizer)
    if mode_of(accelerator) == "fsdp":
        backbone: Any = classifier.backbone
        # A decoder layer at a time is gathered; the class is the model's to know, not the launch config's.
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(backbone._no_split_modules)
    model, prepared = accelerator.prepare(classifier, optimizer)
    return model, prepared


@torch.no_grad()
def gathered_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The trained weights by name, whole, float32, on the CPU: in the main process; `{}` in the others.

    All processes must call it. One weight at a time is gathered, so that no more memory is needed than for the largest.
    """
    unwrapped: nn.Module = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    weights: dict[str, Tensor] = {}
    for name, one in unwrapped.named_parameters():
        if one.requires_grad and (whole := _whole(one, accelerator)) is not None:
            weights[name] = whole
    return weights


def _whole(one: nn.Parameter, accelerator: Accelerator) -> Tensor | None:
    """A copy of one weight, its shares put together; None in processes that are not the main one."""
    if hasattr(one, "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([one]):
            return _copied(one) if accelerator.is_main_process else None
    whole: Tensor = one
    if isinstance(one, DTensor):  # FSDP
        whole = one.to(accelerator.device).full_tensor()  # type: ignore[attr-defined]
    return _copied(whole) if accelerator.is_main_process else None


def _copied(one: Tensor) -> Tensor:
    return one.detach().to("cpu", torch.float32, copy=True)


def refuse_illegal(config: Config, accelerator: Accelerator) -> None:
    """Do nothing if the settings can be trained as the processes were launched. To be called before anything is loaded.

    Raises:
        ConfigError: the first entry of `ILLEGAL` that applies.
    """
    mode = mode_of(accelerator)
    for modes, key, legal, reason, remedy in ILLEGAL:
        value = _value(config, key, accelerator.device)
        if mode in modes and not legal(value):
            raise ConfigError(f"{key}={value} can't be trained under {TITLES[mode]}: {reason}", remedy=remedy)


def _value(config: Config, key: str, device: torch.device) -> Any:
    if key == "model.dtype":
        return str(pick_dtype(config.model.dtype, device)[0]).removeprefix("torch.")
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

ILLEGAL: tuple[tuple[tuple[Mode, ...], str, Legal, str, str], ...] = (
    (
        ("zero3", "fsdp"),
        "model.quantization",
        lambda value: value == "none",
        # https://github.com/huggingface/transformers/issues/29266, https://github.com/huggingface/peft/issues/2016
        "quantised weights can't be laid in shares, or stay whole in every process, unsaid",
        f"{_PLAIN} (a quantised base fits), or set model.quantization=none",
    ),
    (
        ("zero2", "zero3", "fsdp"),
        "model.dtype",
        lambda value: value != "float16",
        "the engine takes the step, and would take it without the loss scale that float16 needs",
        f"{_PLAIN}, or set model.dtype=bfloat16 where the GPU has it",
    ),
    (
        ("zero2", "zero3"),
        "train.optimizer",
        lambda value: value != "adafactor",
        "ZeRO lays weights end to end, and Adafactor goes by their rows and columns: it would be another training",
        f"set train.optimizer=adamw, or {_PLAIN}",
    ),
    (
        ("fsdp",),
        "train.optimizer",
        lambda value: value == "adamw",
        "the optimizers of bitsandbytes and transformers know no weights in shares (DTensor)",
        f"set train.optimizer=adamw, whose state is in shares, or {_PLAIN}",
    ),
    (
        ("zero3", "fsdp"),
        "train.evaluate_every",
        lambda value: value is None,
        "each process scores rows of its own, and has a share of the weights alone",
        f"set train.evaluate_every=null (and keep=last, patience=null), or {_PLAIN}",
    ),
    (
        ("zero3", "fsdp"),
        "train.ema",
        lambda value: value is None,
        "the average is of whole weights, and each process has a share of them alone",
        f"set train.ema=null, or {_PLAIN}",
    ),
    (
        ("zero2", "zero3", "fsdp"),
        "train.average_last",
        lambda value: value == 1,
        "an engine's checkpoints are its own and hold shares, which can't be averaged",
        f"set train.average_last=1, or {_PLAIN}",
    ),
)
"""(modes, setting, which of its values are legal, why the others are not, what to do instead)."""


def _said(name: str) -> bool:
    """Whether a launcher's environment variable says yes, in its own words (`accelerate launch` writes True, too)."""
    return os.environ.get(name, "").lower() in {"1", "true", "yes", "y", "on", "t"}


def _refuse_launch(on_cpu: bool) -> None:
    """Do nothing if this process was launched as it seems.

    Raises:
        ConfigError: several processes were asked for and one was started; more of them than GPUs; FSDP without GPUs.
    """
    # `accelerate launch --cpu --num_processes 2` names a master and then starts one process, with no rank.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does on CPUs",
            remedy="without accelerate: pairclf train ... --processes N",
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and local > torch.cuda.device_count():
        raise ConfigError(
            f"{local} processes were started on this machine, which has {torch.cuda.device_count()} GPU(s)",
            remedy=f"--processes {torch.cuda.device_count()}, or as many in the launcher's config: one a GPU",
        )
    if on_cpu and _said("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "FSDP was asked for, and Accelerate runs it on GPUs alone: each process would train the whole model",
            remedy="pairclf train ... --processes N",
        )


def _ready_deepspeed(on_cpu: bool) -> None:
    """What DeepSpeed must find in place before Accelerate starts it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("the launch asks for DeepSpeed", remedy="pip install 'pairclf[deepspeed]'") from error
    if on_cpu:  # gloo in place of its own collectives, which it would compile for minutes at first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
