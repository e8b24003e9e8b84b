"""Processes and devices: one process or many, and what was launched how."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from pairclf.config import Config
from pairclf.model.backbone import pick_device, pick_dtype


def make_accelerator(config: Config) -> Accelerator:
    """One process or many, in the precision that the device computes in, with DeepSpeed if it was launched so."""
    device = pick_device()
    dtype, _ = pick_dtype(config.model.dtype, device)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"  # as `accelerate launch` says it
    on_cpu = device.type == "cpu"
    accelerator = Accelerator(
        # The classifier autocasts itself; Accelerate is asked for float16's loss scale alone.
        mixed_precision="fp16" if dtype == torch.float16 else "no",
        cpu=on_cpu and not deepspeed,  # with it, Accelerate would run without DeepSpeed and not say so
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and deepspeed else None,
    )
    if deepspeed:  # what the loop decides must not be decided a second time by DeepSpeed's own file
        ours = {"gradient_clipping": config.train.clip, "gradient_accumulation_steps": 1}
        accelerator.state.deepspeed_plugin.deepspeed_config |= {**ours, "train_micro_batch_size_per_gpu": 1}
    return accelerator
