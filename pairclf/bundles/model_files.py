"""What the files of a model may ask for: looked at before transformers reads them.

transformers runs the Python files that an `auto_map` names, loads another model where a folder holds an adapter, and
fetches kernels by the name of a hub repository. The person at the command decides that, and not a file: code is refused
without `--trust-remote-code`, and the rest always.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pairclf.errors import ModelError, quoted
from pairclf.files import parsed, read_plain
from pairclf.trust import REMOTE_CODE, granted

CONFIG, TOKENIZER_CONFIG, ADAPTER_CONFIG = "config.json", "tokenizer_config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON, MAX_INDEX = 4 << 20, 64 << 20
"""Bytes of a settings file, and of the index of a sharded model."""

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""What a model's own files may name: attention that transformers brings, and no repository of kernels."""

_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_EXPERTS_KEYS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines")
_PATH_KEYS = ("transformers_weights", "vocab_file", "merges_file", "tokenizer_file", "gguf_file")
_QUANTISERS = ("bitsandbytes", "gptq", "awq", "compressed-tensors", "hqq", "quanto")
"""Quantisation that installed packages compute; others (mxfp4, fp8) fetch kernels from the hub."""

_TOKENIZER_CLASS = re.compile(r"\w*(Tokenizer|TokenizerFast|TokenizersBackend|SentencePieceBackend|PythonBackend)")
"""Any other class of transformers would be asked to load the folder, a model for one."""


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """A JSON file that somebody else may have written.

    Raises:
        ModelError: it can't be read, is larger than `most` bytes, or is no JSON.
    """
    try:
        return parsed(read_plain(path, most))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} can't be used: {quoted(str(error))}", where=path) from error


def weight_map(index: Path) -> dict[str, str]:
    """`{weight: file}` of a sharded model.

    Raises:
        ModelError: it is no such index, or names a file that is not in its own folder.
    """
    tree = read_json(index, MAX_INDEX)
    files = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(files, dict):
        raise ModelError(f"{index.name} has no weight_map", where=index)
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index.name} names {quoted(file)}, which is no safetensors file beside it", where=index)
    return files


def check_model_folder(folder: Path) -> None:
    """Do nothing if the files in a folder of a model, or of a tokenizer, ask for nothing that was not permitted.

    Links are followed: the hub's cache is made of them.

    Raises:
        ModelError: names the file, and what it asks for.
    """
    for entry in sorted(folder.iterdir()):
        if not entry.exists():  # a link that leads nowhere
            continue
        mode = entry.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ModelError(f"{entry.name} is neither a file nor a folder", where=entry, remedy="remove it")
        if entry.suffix == ".py" and not granted().remote_code:
            raise _code(entry, f"{entry.name} is code")
    if (folder / ADAPTER_CONFIG).exists():
        raise adapter_beside(folder / ADAPTER_CONFIG)
    for path in sorted(folder.glob("*config.json")):
        _check_settings(path)
    if (folder / INDEX).exists():
        parts = set(weight_map(folder / INDEX).values())
        if (folder / WEIGHTS).exists() and parts != {WEIGHTS}:
            raise ModelError(
                f"there are both {WEIGHTS}, which transformers would load, and {INDEX}, which names other files",
                where=folder,
                remedy="remove the one that was left from an earlier model",
            )


def adapter_beside(path: Path) -> ModelError:
    """The error about an adapter that transformers would load together with the model beside it."""
    return ModelError(
        f"{ADAPTER_CONFIG} beside a model makes transformers load another model, or this one with an adapter",
        where=path,
        remedy=f"remove {ADAPTER_CONFIG} and adapter_model.safetensors if they were left there by mistake; otherwise "
        "merge the adapter into the model, and give the folder of the merged model",
    )


def _check_settings(path: Path) -> None:
    """A file of settings: every name and value in it, however deep."""
    tree = read_json(path)
    for key, value in _pairs(tree):
        if key in _CODE_KEYS and value and not granted().remote_code:
            raise _code(path, f"{path.name} names code to run ({key}: {quoted(value)})")
        refused = (
            (key in _ATTENTION_KEYS and _names(value) - {*ATTENTION, *(f"paged|{name}" for name in ATTENTION)})
            or (key in _EXPERTS_KEYS and _names(value) - {*_EXPERTS})
            or (key == "quant_method" and _names(value) - {*_QUANTISERS})
            or (key in _PATH_KEYS and _is_elsewhere(value, path.name == TOKENIZER_CONFIG))
            or (key == "use_kernels" and value)
        )
        if refused:
            raise ModelError(f"{key}: {quoted(value)} is not what a model's files may ask for", where=path)
    named = tree.get("tokenizer_class") if isinstance(tree, dict) else None
    is_known = isinstance(named, str) and _TOKENIZER_CLASS.fullmatch(named)
    if named is not None and not is_known and not granted().remote_code:
        raise ModelError(f"tokenizer_class: {quoted(named)} is no tokenizer of transformers", where=path)


def _code(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{what}, and code that comes with a model is not run",
        where=path,
        remedy=f"read it, and give {REMOTE_CODE} if you trust it; or remove it, if transformers knows the model",
    )


def _pairs(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key and its value in nested JSON."""
    remaining = [tree]
    while remaining:
        node = remaining.pop()
        if isinstance(node, Mapping):
            yield from node.items()
            remaining += node.values()
        elif isinstance(node, list):
            remaining += node


def _names(value: Any) -> set[str]:
    """The names in a value: one, one for each part of a model, or none."""
    return {str(name) for name in (value.values() if isinstance(value, Mapping) else [value]) if name is not None}


def _is_elsewhere(value: Any, if_there: bool) -> bool:
    """Whether a value is a path out of the folder; `if_there`: one at which something stands on this machine.

    Tokenizers of older versions keep the path that they were made from, which no other machine has.
    """
    if value is None:
        return False
    if not isinstance(value, str):
        return True
    return Path(value).name != value and (not if_there or os.path.exists(value))
