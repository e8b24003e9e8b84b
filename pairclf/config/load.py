"""Load configs: YAML files and `key=value` overrides to a checked `Config`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pairclf.config.dump import tree_of
from pairclf.config.parse import MAX_YAML, parse_yaml
from pairclf.config.section import checked
from pairclf.config.tree import Config
from pairclf.errors import ConfigError, cut, quoted
from pairclf.files import read_plain


def resolve(tree: Mapping[str, Any], where: object = "config") -> Config:
    """A checked config from a plain mapping.

    Raises:
        ConfigError: with every unknown key, wrong value and contradiction at once.
    """
    return checked(
        Config, tree, where, "`pairclf config` prints every setting with its help; docs/tasks.md has whole configs"
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check the result, and settle the run folder.

    Raises:
        ConfigError: the file can't be read, is not YAML, or holds settings that can't be used.
    """
    config = resolve(_overridden(_read(path), overrides), path)
    config.output_dir = config.output_dir or run_folder(path)
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `key=value` overrides, checked anew.

    Raises:
        ConfigError: an override is malformed, unknown or wrong.
    """
    return resolve(_overridden(tree_of(config), overrides), f"overrides {' '.join(overrides)}")


def run_folder(path: Path) -> Path:
    """The run folder of a config file, which mirrors its path.

    >>> run_folder(Path("configs/lmsys/a.yaml")).as_posix()
    'runs/lmsys/a'
    """
    parts = path.with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts else parts[-1:]
    return Path("runs", *below)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, merged into that of the file that its `extends` names (relative to it)."""
    try:
        whole = path.resolve()
        if whole in seen:
            raise ConfigError(f"extends comes back to {path}", where=seen[0])
        text = read_plain(path, MAX_YAML)
    except (OSError, ValueError) as error:
        of_run = sorted(path.glob("*/config.yaml"))[:1] if os.path.isdir(path) else []
        remedy = "give the path of a YAML file" + "".join(f"; of this run: {name}" for name in of_run)
        why = "it is a folder" if os.path.isdir(path) else cut(error)
        raise ConfigError(f"config {cut(path)} can't be read: {why}", remedy=remedy) from error
    tree = parse_yaml(text, path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"a config is a mapping of sections, not a {type(tree).__name__}", where=path)
    parent = tree.pop("extends", None)
    return tree if parent is None else _merge(_read(path.parent / str(parent), (*seen, whole)), tree)


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        key, equals, yaml_text = text.partition("=")
        if not equals or not key:
            remedy = "e.g. train.num_train_epochs=2, without blanks around `=`"
            raise ConfigError(f"override {quoted(text)} is not of the form key=value", remedy=remedy)
        value = parse_yaml(yaml_text, f"override {quoted(text)}")
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged into `base`, section by section; lists and scalars are replaced, and so is what `over` empties."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and bool(value) and isinstance(below, Mapping)
        merged[key] = _merge(dict(below), value) if both and below is not None else value
    return merged
