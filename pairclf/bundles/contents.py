"""Which files may lie in a bundle's folder, and where its parts lie: the only place that knows their names.

    bundle.json         the manifest (`manifest.py`)
    config.yaml         the resolved config: task, class order, rendering recipe, quantisation, ...
    trained_on.parquet  what `identity.prompt_marks` keeps of the prompts that it was trained on, sorted, each once

of a language model (`model/weights.py`):

    tokenizer/          as transformers saves it
    adapter/            as peft saves it: opens with plain `PeftModel.from_pretrained`
    backbone/           instead of adapter/, where the whole model was trained, or adapters were merged into it; as its
                        own config.json says it may hold quantised weights (`pairclf export`)
    head.safetensors    float32; linear: weight (C, H) and bias (C,); two_layer: inner.weight (H, H), inner.bias (H,),
                        outer.weight (C, H), outer.bias (C,); label_tokens: weight (E, H), bias (E,),
                        the LM head's rows of the E tokens in the labels' trie, prior (C,); reward: weight (1, H),
                        tie ()
    examples.json       of a few-shot prompt: training rows that it is shown before each row (`examples.py`)

of a classical one (`approaches/classical.py`):

    classical.safetensors  float64 arrays, named in `approaches/classical_model.py`
    lightgbm-0.txt         trees in LightGBM's text format, where lightgbm is a model of it; with several labels a row
                           one file a label
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pairclf.console import console
from pairclf.errors import BundleError, quoted
from pairclf.trust import LINKED_FILES, REMOTE_CODE, granted

MANIFEST = "bundle.json"
CONFIG = "config.yaml"
TRAINED_ON = "trained_on.parquet"


@dataclass(frozen=True, slots=True)
class BundleFiles:
    """Where the parts of a bundle lie; which of them there are hangs on its approach."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / CONFIG

    @property
    def trained_on(self) -> Path:
        return self.folder / TRAINED_ON

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def adapter_weights(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    @property
    def head(self) -> Path:
        return self.folder / "head.safetensors"

    @property
    def examples(self) -> Path:
        return self.folder / "examples.json"

    @property
    def classical(self) -> Path:
        return self.folder / "classical.safetensors"


_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json|(vocab|merges|dict)\.txt|"
    r"(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model|(source|target)\.spm|vocab\.bpe|bpe\.codes|"
    r"chat_template\.(jinja|json)"
)
_FILES = {
    "": r"(bundle|examples)\.json|config\.yaml|trained_on\.parquet|(head|classical)\.safetensors|lightgbm-\d+\.txt",
    "adapter": r"adapter_config\.json|adapter_model\.safetensors",
    "backbone": r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|quant_log\.csv|"
    rf"(generation_|quantize_)?config\.json|{_TOKENIZER}",
    "tokenizer": _TOKENIZER,
    "tokenizer/additional_chat_templates": r"[\w-]+\.jinja",
    "backbone/additional_chat_templates": r"[\w-]+\.jinja",
}
"""Names of files in each folder of a bundle; what has another name is refused."""

_CODE = {"backbone": r"[A-Za-z_]\w*\.py", "tokenizer": r"[A-Za-z_]\w*\.py"}
"""What may be there besides, where the person at the command trusts the bundle's code."""


def _unknown(folder: Path, part: str = "") -> Iterator[tuple[str, str]]:
    """`(posix path, why)` of what does not belong in a bundle. Nothing is opened, and no link is followed."""
    names, trust = _FILES[part], granted()
    names += "|" + _CODE[part] if trust.remote_code and part in _CODE else ""
    for entry in sorted(os.scandir(folder / part), key=lambda entry: entry.name):
        name = f"{part}/{entry.name}" if part else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _unknown(folder, name) if name in _FILES else [(name, "an unknown folder")]
        elif entry.is_symlink() and not (trust.linked_files and Path(entry.path).is_file()):
            yield name, f"a link (links to files are permitted by {LINKED_FILES})"
        elif not entry.is_file():
            yield name, "no regular file"
        elif not re.fullmatch(names, entry.name):
            code = entry.name.endswith(".py")
            yield name, f"code (permitted by {REMOTE_CODE})" if code else "an unknown file"


def refuse_unknown(folder: Path) -> None:
    """Raises `BundleError` if something in the folder does not belong in a bundle."""
    if unknown := list(islice(_unknown(folder), 5)):
        listed = "; ".join(f"{quoted(name)}: {why}" for name, why in unknown)
        raise BundleError(
            f"the bundle's folder holds files that are not part of a bundle: {listed}",
            where=folder,
            remedy="move them out of the folder, such as .DS_Store or README.md: it may hold only what `pairclf train` "
            "writes (docs/prediction.md)",
        )


def remove_unknown(new: Path) -> None:
    """Files that a tokenizer or a quantiser wrote besides, from a bundle that is being written; it is proven later."""
    for name, _ in list(_unknown(new)):
        if (new / name).is_file():
            console.print(f"note: {name} is not kept in the bundle")
            (new / name).unlink()
