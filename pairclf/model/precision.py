"""Compute in float32 what overflows float16: a backbone for a moment, or single layers of it always."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within, every module of `model` computes in float32 of the weights that it has; afterwards it is as before.

    A module's weights are copied to float32 when it is called and let go when it is done, so that memory grows by one
    module's and not by a second model's. An embedding copies the rows that are looked up alone. NF4 weights are
    dequantised as ever, and multiplied in float32. The caller sees to it that autocast is off. bitsandbytes' int8
    layers go on computing in float16.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, Linear4bit):
                undo.callback(setattr, module, "compute_dtype", module.compute_dtype)
                undo.callback(setattr, module, "compute_type_is_set", module.compute_type_is_set)
                module.compute_dtype, module.compute_type_is_set = torch.float32, True
            elif isinstance(module, Linear8bitLt):
                undo.callback(_put_back, module, module.__dict__.get("forward"))
                module.__dict__["forward"] = partial(_dequantised, module)
            elif any(weight.dtype in HALVES for weight in module.parameters(recurse=False)):
                for handle in _upcast(module):
                    undo.callback(handle.remove)
        yield


class LinearInFloat32(nn.Linear):
    """A linear layer that computes in float32, under autocast too, and gives float32."""

    def forward(self, states: Tensor) -> Tensor:
        """`(..., in)` of any dtype -> `(..., out)` float32."""
        with torch.autocast(states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(states.float(), self.weight.float(), bias)


def keep_in_float32(model: nn.Module, names: Collection[str]) -> None:
    """Store the linear layers of these names in float32, and compute them so, whatever the rest computes in."""
    for name, module in model.named_modules():
        # Not in a layer that a base's files hold quantised.
        if type(module) is nn.Linear and name.rsplit(".", 1)[-1] in names:
            module.float().__class__ = LinearInFloat32  # to peft, it still is a `nn.Linear`


def _dequantised(module: Any, states: Tensor) -> Tensor:
    """An int8 layer in float32; bitsandbytes itself computes in int8, and in float16 for large activations."""
    held = module.state if module.weight.CB is None else module.weight
    weight = held.CB.float() * (held.SCB.float() / 127)[:, None]  # a row's scale is its largest magnitude
    return functional.linear(states.float(), weight, None if module.bias is None else module.bias.float())


def _put_back(module: nn.Module, forward: Any) -> None:
    del module.__dict__["forward"]
    if forward is not None:  # accelerate's, say
        module.__dict__["forward"] = forward


def _upcast(module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Let float32 copies stand before a module's weights while it is called.

    They lie in the module's `__dict__`, where Python looks before it asks torch for a parameter.
    """
    names = [name for name, weight in module.named_parameters(recurse=False) if weight.dtype in HALVES]

    def before(module: nn.Module, positional: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(module, nn.Embedding):
            ids, places = positional[0].unique(return_inverse=True)
            module.padding_idx = None  # it says whose gradient is zero, and may lie beyond these rows
            module.__dict__["weight"] = module.weight[ids].float()
            return (places, *positional[1:])
        for name in names:
            module.__dict__[name] = getattr(module, name).float()
        return positional

    padding: Any = getattr(module, "padding_idx", None)

    def after(module: nn.Module, positional: tuple[Any, ...], out: Any) -> None:
        for name in names:
            del module.__dict__[name]
        if isinstance(module, nn.Embedding):
            module.padding_idx = padding

    return module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)
