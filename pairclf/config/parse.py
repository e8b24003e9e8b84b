"""Parse YAML: the scalars of YAML 1.2, with limits on size and aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml

from pairclf.errors import ConfigError, cut, quoted

MAX_YAML, MAX_NODES = 1 << 20, 100_000
"""Bytes of a YAML file, and values that it may have once every alias is expanded."""

_UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""NUL and surrogates: quoted YAML can write them, and every call that gets them as a path raises."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `off` and `no` are words and `1e-4` is a number (PyYAML alone reads YAML 1.1).

    Nested aliases, by which a few lines can stand for billions of values, are refused before a value is made.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > MAX_NODES:
            raise yaml.YAMLError(f"with its aliases expanded it has more than {MAX_NODES:,} values")
        return node


def _expanded(node: yaml.Node, counts: dict[int, int]) -> int:
    """Values that a node stands for. A node within itself stands for more than any limit.

    Raises:
        yaml.YAMLError: a text has a character that neither a file's name nor any other text can have; or a mapping has
            a key twice, of which YAML would drop the first.
    """
    if isinstance(node, yaml.ScalarNode):
        if match := _UNUSABLE.search(node.value):
            raise yaml.YAMLError(f"{quoted(node.value)} has the character U+{ord(match[0]):04X}\n{node.start_mark}")
        return 1
    if id(node) not in counts:
        counts[id(node)] = MAX_NODES + 1  # until it is counted: a node that meets it lies within it
        pairs = isinstance(node, yaml.MappingNode)
        names: dict[str, yaml.Node] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if pairs else []:
            if names.setdefault(key.value, key) is not key:
                raise yaml.YAMLError(f"the key {quoted(key.value)} stands twice\n{key.start_mark}")
        children = [child for pair in node.value for child in pair] if pairs else node.value
        counts[id(node)] = min(1 + sum(_expanded(child, counts) for child in children), MAX_NODES + 1)
    return counts[id(node)]


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|nan)$", re.IGNORECASE),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: object) -> Any:
    """Parse YAML as this project reads it.

    Raises:
        ConfigError: with YAML's own line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        said = " ".join(str(error).replace(' "<unicode string>",', "").split())
        remedy = "indent with spaces, never tabs; write each key once; put texts with `: ` or ` #` in quotes"
        raise ConfigError(f"not valid YAML: {cut(said, 1000)}", where=where, remedy=remedy) from error
