"""The backbone: a pretrained model without its LM head, quantised and with adapters as the config says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from huggingface_hub import constants, file_exists, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from pairclf.bundles.base import ask_hub
from pairclf.bundles.model_files import adapter_beside, weight_map
from pairclf.config import Lora, Model
from pairclf.console import console
from pairclf.errors import ModelError, cut
from pairclf.hardware import dtype_of
from pairclf.model import attention
from pairclf.model.families import Family, class_of, family_of, has_encoder_alone, idle_modules
from pairclf.model.precision import keep_in_float32
from pairclf.trust import granted

LINEAR = (nn.Linear, Conv1D)
"""Linear modules. transformers' `Conv1D`, of GPT-2 and its like, is one with a transposed weight."""

_UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    *(AssertionError, SafetensorError, StrictDataclassError),
)
"""The exceptions that transformers raises for files with nonsense in them: nearly all kinds."""


_REPORTERS = ("modeling_utils", "distributed.tensor_parallel")
"""Modules of transformers that tell of the weights that were loaded."""


def pick_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why (`hardware.dtype_of`)."""
    name, why = dtype_of(setting, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    return getattr(torch, name), why


def name_of(dtype: torch.dtype) -> str:
    """`float16`, ..."""
    return str(dtype).removeprefix("torch.")


def load_tokenizer(source: str) -> Any:
    """The tokenizer that stands with a model or in a bundle, as `resolve_base` or `open_bundle` found it.

    Raises:
        ModelError: it can't be loaded.
    """
    if not Path(source).is_dir():
        ask_hub(source)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=granted().remote_code)
    except BaseException as error:
        # tokenizers raises `Exception` for a tokenizer.json that it can't read; a panic of Rust is not even that.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the tokenizer of {source} can't be loaded: {_said(error)}", remedy=_tokenizer_remedy(error)
        ) from error


def _tokenizer_remedy(error: BaseException) -> str | None:
    """What to install for a tokenizer without a tokenizer.json, such as DeBERTa-v3's; transformers names tiktoken."""
    asked = any(name in str(error) for name in ("tiktoken", "sentencepiece", "protobuf"))
    return "pip install 'pairclf[sentencepiece]'" if asked and find_spec("sentencepiece") is None else None


def read_settings(source: str | Path, pooling: str | None = None) -> PretrainedConfig:
    """transformers' config of a model in a folder, or of a hub id.

    Args:
        source: the folder, or the id.
        pooling: `model.pooling`. Of an encoder-decoder, mean reads the encoder alone: the config is then that of a
            model without a decoder, which is not loaded.

    Raises:
        ModelError: it can't be read.
    """
    if not Path(source).is_dir():
        ask_hub(str(source))
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=granted().remote_code)
    except _UNREADABLE as error:
        raise ModelError(
            f"the model {source} can't be loaded: {_said(error)}",
            remedy="give a folder with config.json and *.safetensors, or a hub id",
        ) from error
    if pooling == "mean" and has_encoder_alone(settings):
        settings.is_encoder_decoder = False
    return settings


def empty_model(settings: PretrainedConfig) -> nn.Module:
    """A model of that config without weights.

    Raises:
        ModelError: transformers makes none of it.
    """
    try:
        with torch.device("meta"):
            family, trust = family_of(settings), granted().remote_code
            model: nn.Module = family.loader.from_config(settings, trust_remote_code=trust, **family.options(settings))
    except _UNREADABLE as error:
        raise ModelError(f"a {settings.model_type} can't be made of its config.json: {_said(error)}") from error
    return model


def _said(error: BaseException) -> str:
    """The message of another library's exception, on one line."""
    return cut(f"{type(error).__name__}: {' '.join(str(error).split())}", 400)


def load_base(
    source: str, model: Model, dtype: torch.dtype, device: torch.device, others: Sequence[torch.device] = ()
) -> nn.Module:
    """The frozen base on `device`, quantised as `model.quantization` says, ready to be given adapters.

    With `others`, all of them GPUs as `device` is, its layers are laid over all in turn, each as full as the next;
    accelerate's hooks carry the states from one to the other, and the last ones back to `device`.

    Raises:
        ModelError: it can't be loaded, is of no family, or can't be adapted as set on this device.
    """
    config = read_settings(source, model.pooling)
    family = family_of(config)
    require_safetensors(source)
    if adapter := find_adapter_config_file(source):
        raise adapter_beside(Path(adapter))
    if model.quantization == "int8" and model.lora is not None and model.lora.use_dora and device.type == "cpu":
        # peft (0.21) moves the weight to dequantise it, and bitsandbytes loses its scales: the second pass fails.
        raise ModelError(
            "model.lora.use_dora=true does not run on a CPU over model.quantization=int8",
            remedy="set model.quantization=nf4 or none, or model.lora.use_dora=false, or use a GPU",
        )
    quantized = model.quantization != "none" or stored_as(config) is not None
    # It says for every int8 product that float32 becomes float16, which is its design.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded = _load_strictly(
        family.loader,
        source,
        config=config,
        **family.options(config),
        dtype=dtype,
        attn_implementation=_attention(model, config),
        **_quantization(model, dtype, family),
        **_placed(quantized, device, others),
        trust_remote_code=granted().remote_code,
    )
    if not quantized and not others:
        loaded.to(device)
    if stored_as(config) is not None:
        _require_packed(loaded, source)
        # transformers (5.23) leaves embedding and norms as they were saved: float16 and autocast to bfloat16 don't mix.
        for weight in loaded.parameters():
            weight.data = weight.data.to(dtype) if weight.is_floating_point() else weight.data
    keep_in_float32(loaded, family.float32_layers)
    if device.type == "cpu":
        _keep_full_precision(loaded)
    loaded.requires_grad_(model.lora is None and not quantized)
    for module in family.idle(loaded):  # weight decay would shrink what has no gradient
        module.requires_grad_(False)
    return loaded


def _require_packed(loaded: nn.Module, source: str) -> None:
    """bitsandbytes' layers take plain weights without a word, where config.json says that they are quantised."""
    for name, module in loaded.named_modules():
        weight: Any = module.weight if isinstance(module, Linear4bit | Linear8bitLt) else None
        if weight is not None and weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
            raise ModelError(
                f"config.json of {source} says that its weights are quantised, and {name}.weight is {weight.dtype}",
                remedy="remove quantization_config from config.json if it was left from another model",
            )


def stored_as(settings: Any) -> str | None:
    """How the files of a model hold its weights, by its transformers config; None: they are not quantised."""
    quantization: Any = getattr(settings, "quantization_config", None) or {}
    fields: dict[str, Any] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = fields.get("quant_method")
    if method == "bitsandbytes":
        return "int8" if fields.get("load_in_8bit") else "nf4"
    return None if method is None else str(getattr(method, "value", method))


def stored_weights(folder: Path) -> str | None:
    """`stored_as` of the model in a folder."""
    return stored_as(read_settings(folder))


def _placed(quantized: bool, device: torch.device, others: Sequence[torch.device]) -> dict[str, Any]:
    """Options of `from_pretrained` that say where the weights go."""
    if others:
        free = {gpu.index: torch.cuda.mem_get_info(gpu)[0] for gpu in (device, *others)}
        return {"device_map": "balanced", "max_memory": free}
    return {"device_map": {"": device}} if quantized else {}


def _attention(model: Model, config: Any) -> str | None:
    """The implementation's name, as transformers wants it; None leaves the choice to transformers."""
    if model.attn_implementation != "auto":
        return model.attn_implementation
    # A class that does not go through the attention interface, or that is not known before its code is loaded, keeps
    # the attention that it brings. That is right for padded batches; packed ones are refused by the classifier.
    return attention.NAME if attention.reads_topology(class_of(config)) else None


def require_safetensors(source: str) -> None:
    """Do nothing unless the weights of a model, in a folder or on the hub, are pickles alone. Nothing is fetched.

    Raises:
        ModelError: they are.
    """

    def has(*names: str) -> bool:
        if Path(source).is_dir():
            return any((Path(source) / name).is_file() for name in names)
        if constants.HF_HUB_OFFLINE:
            return any(isinstance(try_to_load_from_cache(source, name), str) for name in names)
        return any(file_exists(source, name) for name in names)

    if not has(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) and has(WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise ModelError(
            f"the weights of {source} are in {WEIGHTS_NAME}, a pickle, which can run code when it is read",
            remedy="convert them once, with `python scripts/convert_bin.py FOLDER NEW` of pairclf's repository, and "
            "set model.base=NEW",
        )


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a model, in a folder or in the hub's cache, where they are fetched to if need be.

    Raises:
        ModelError: they are not there.
    """
    try:
        # In transformers' order: where there are both, it reads the single file.
        if single := cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
            return [Path(single)]
        index = Path(str(cached_file(source, SAFE_WEIGHTS_INDEX_NAME)))
        return [Path(str(cached_file(source, part))) for part in sorted(set(weight_map(index).values()))]
    except OSError as error:
        raise ModelError(
            f"the weights of {source} are not there: {' '.join(str(error).split())[:300]}",
            remedy="copy the model again: config.json and every *.safetensors, from one source",
        ) from error


def _load_strictly(loader: Any, source: str, **options: Any) -> nn.Module:
    """Load every weight of the backbone from the files: transformers fills a missing one at random, with a warning."""
    try:
        with _without_report():
            loaded, info = loader.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    except _UNREADABLE as error:
        raise ModelError(
            f"the weights of {source} can't be loaded: {_said(error)}",
            remedy="copy the model again: config.json and every *.safetensors, from one source",
        ) from error
    lacking = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if lacking:
        raise ModelError(
            f"{len(lacking)} weights of {source} are missing or of another shape, {lacking[0]} first",
            remedy="copy the model again: config.json and every *.safetensors, from one source",
        )
    model: nn.Module = loaded
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Within, transformers prints no table of the weights that a model leaves in its files: an LM head, a decoder.

    At that level it (5.23) compares weights with its plan of tensor parallelism, and lists all that are not split.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in _REPORTERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _keep_full_precision(loaded: nn.Module) -> None:
    """Compute NF4 layers in float32 in evaluation as in training.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks a 4-bit weight at its first evaluation: scales and products
    become bfloat16, so that scores would differ between CPUs by 1e-2, and shapes not divisible by 32 fail an assertion.
    """
    for module in loaded.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization(model: Model, dtype: torch.dtype, family: Family) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise; none for weights that are to stay as their files hold them.

    A `quantization_config` of None would make transformers (5.23) forget the files' own, and read int8 as numbers.
    """
    if model.quantization == "none":
        return {}
    skipped = {"llm_int8_skip_modules": list(family.float32_layers) or None}  # of NF4, too
    if model.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **skipped)}  # type: ignore[no-untyped-call]
    # NF4 with double quantisation, as in QLoRA: https://arxiv.org/abs/2305.14314
    nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
        **skipped,
    )
    return {"quantization_config": nf4}


def add_adapters(base: nn.Module, lora: Lora) -> nn.Module:
    """Wrap the base with LoRA adapters; they are float32 and the only parameters that train.

    Raises:
        ModelError: no linear module of the base has one of the names in `lora.target_modules`.
    """
    every = [name for name, module in base.named_modules() if isinstance(module, LINEAR)]
    if not every:
        raise ModelError(
            f"model.lora: {type(base).__name__} has no linear module, which is all that gets an adapter",
            remedy="set model.lora=null, or use another base",
        )
    idle = idle_modules(base)
    linear = [name for name in every if base.get_submodule(name) not in idle]
    leaves = {name.rsplit(".", 1)[-1] for name in linear}
    targets = sorted(leaves) if lora.target_modules == "all-linear" else lora.target_modules
    if unknown := sorted(set(targets) - leaves):
        raise ModelError(
            f"model.lora.target_modules names {unknown}, which the base has not",
            remedy=f"choose among {sorted(leaves)}",
        )
    if lora.first_layer or len(linear) < len(every):
        # By whole names: peft's own `layers_to_transform` finds no layer in a base without a prefix.
        targets = [
            name for name in linear if name.rsplit(".", 1)[-1] in targets and layer_number(name) >= lora.first_layer
        ]
    if not targets:
        raise ModelError(f"model.lora.first_layer={lora.first_layer} leaves no layer of the base an adapter")
    peft_config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in linear),
    )
    adapted: nn.Module = get_peft_model(base, peft_config)
    return adapted


def checkpoint_gradients(backbone: nn.Module) -> None:
    """Let the backbone recompute its activations in backward.

    Without re-entry: gradients then reach the adapters although no input of theirs asks for one.
    """
    model: Any = backbone
    # transformers 5.23 renamed it; earlier versions know the old name alone.
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def layer_number(name: str) -> int:
    """`layers.7.mlp.up_proj.weight` -> 7; what stands outside the layers counts as below them all."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
