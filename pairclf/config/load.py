"""Load configs: YAML files and `key=value` overrides to a checked `Config`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pairclf.config.dump import tree_of
from pairclf.config.parse import MAX_YAML, parse_yaml
from pairclf.config.section import checked, settings
from pairclf.config.tree import Config
from pairclf.errors import ConfigError, cut, quoted
from pairclf.files import read_plain
from pairclf.own_files import or_shipped
from pairclf.task import TASKS, Task


def resolve(tree: Mapping[str, Any], where: object = "config") -> Config:
    """A checked config from a plain mapping.

    Raises:
        ConfigError: with every unknown key, wrong value and contradiction at once.
    """
    return checked(
        Config, tree, where, "`pairclf config` prints every setting with its help; docs/tasks.md has whole configs"
    )


def load_config(source: Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Take the settings of a YAML file, a mapping or a config, apply `key=value` overrides, and check the result.

    The run folder of a file mirrors its path, where `output_dir` names no other; a mapping has to name it.

    Raises:
        ConfigError: the file can't be read, is not YAML, or holds settings that can't be used.
    """
    if isinstance(source, Config):
        return override(source, overrides)
    if isinstance(source, Mapping):
        return resolve(_overridden(dict(source), overrides), "the config's mapping")
    config = resolve(_overridden(_read(source), overrides), source)
    config.output_dir = config.output_dir or run_folder(source)
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
    """The mapping in a YAML file, merged into that of the file that its `extends` names."""
    path = or_shipped(path)
    try:
        whole = path.resolve()
        if whole in seen:
            raise ConfigError(f"extends comes back to {path}", where=seen[0])
        text = read_plain(path, MAX_YAML)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [file.name for file in or_shipped(path.parent).glob("*.yaml")], n=1)
        remedy = "give the path of a YAML file" + "".join(f"; the nearest is {path.with_name(name)}" for name in near)
        raise ConfigError(f"there is no config {cut(path)}", remedy=remedy) from error
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
    return tree if parent is None else _merge(_read(_extended(path, str(parent)), (*seen, whole)), tree)


def _extended(path: Path, name: str) -> Path:
    """The file that a config extends: relative to the config; without one, `configs/...` is what it is in a command."""
    beside = path.parent / name
    own = Path(name).parts[:1] == ("configs",) and not os.path.lexists(beside)
    return or_shipped(Path(name)) if own else beside


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    tree = _not_implied(tree) if overrides else tree
    if any(text.startswith("task.") for text in overrides):
        tree = _with_whole_task(tree)
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


def _with_whole_task(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with its task spelled out, so that a part of a preset can be replaced: `task.metric=accuracy`."""
    task = tree.get("task", Config.model_fields["task"].default)
    whole = TASKS[task].task if isinstance(task, str) and task in TASKS else task
    return {**tree, "task": whole.model_dump(mode="json") if isinstance(whole, Task) else whole}


def _not_implied(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tree that its other settings do not imply.

    A config that was saved holds what was derived, such as the wording of examples; what is overridden may imply
    another wording, or none.
    """
    try:
        whole = resolve(tree)
    except ConfigError:  # the overrides may mend it
        return tree
    before: dict[str, Any] = {}
    while before != tree:  # what one setting implies may be implied by another one that is gone only now
        before = tree
        for key, _ in settings(Config):
            shorter = _without(tree, key.split("."))
            if shorter != tree and _is_valid_as(shorter, whole):
                tree = shorter
    return tree


def _without(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    name, *below = path
    if not below:
        return {key: value for key, value in tree.items() if key != name}
    return {**tree, name: _without(tree[name], below)} if isinstance(tree.get(name), dict) else tree


def _is_valid_as(tree: dict[str, Any], whole: Config) -> bool:
    try:
        return resolve(tree) == whole
    except ConfigError:
        return False


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged into `base`, section by section; lists and scalars are replaced, and so is what `over` empties."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if key == "template" and isinstance(below, str) and isinstance(value, Mapping):
            below = {"preset": below}  # `inputs.template: judge`, of which a part is replaced
        both = isinstance(value, Mapping) and bool(value) and isinstance(below, Mapping)
        merged[key] = _merge(dict(below), value) if both and below is not None else value
    return merged
