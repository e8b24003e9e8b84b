"""Convert a model's weights from pickles (pytorch_model.bin) to safetensors, which pairclf reads.

    python scripts/convert_bin.py FOLDER NEW

FOLDER is a model as it was downloaded; NEW gets its weights as safetensors, its config and its tokenizer. torch reads
the pickles with `weights_only=True`, which builds tensors and nothing else, in this process, which does nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shutil import copy2
from typing import Any

import torch
from safetensors.torch import save_file

INDEX, SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
KEPT = {".json", ".txt", ".model", ".jinja", ".md"}
"""Endings of the files that come along: config, tokenizer, licence. No code, and no other weights."""


def convert(source: Path, new: Path) -> list[str]:
    """Write the model of `source` into the new folder `new`.

    Returns:
        The names of the weights' files in it.

    Raises:
        FileNotFoundError: there are no pickles in `source`.
        FileExistsError: `new` is there already.
    """
    index = source / INDEX
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    parts = sorted({Path(name).name for name in weight_map.values()}) or [SINGLE]
    if missing := [name for name in parts if not (source / name).is_file()]:
        raise FileNotFoundError(f"{source} holds no {missing[0]}")
    new.mkdir(parents=True)
    names = ["model.safetensors" if len(parts) == 1 else f"{Path(name).stem}.safetensors" for name in parts]
    converted: dict[str, str] = {}
    size = 0
    for part, name in zip(parts, names, strict=True):
        loaded: dict[str, Any] = torch.load(source / part, map_location="cpu", weights_only=True)
        # Cloned: safetensors refuses tensors that share memory, as tied embeddings do.
        tensors = {key: value.clone().contiguous() for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        save_file(tensors, new / name, metadata={"format": "pt"})
        converted |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(parts) > 1:
        table = {"metadata": {"total_size": size}, "weight_map": converted}
        (new / "model.safetensors.index.json").write_text(json.dumps(table, indent=1))
    for path in source.iterdir():
        if path.is_file() and path.suffix in KEPT and not path.name.endswith(".index.json"):
            copy2(path, new / path.name)
    return names


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print("\n".join(convert(Path(sys.argv[1]), Path(sys.argv[2]))))
