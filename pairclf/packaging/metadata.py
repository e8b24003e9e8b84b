"""kernel-metadata.json and dataset-metadata.json, within Kaggle's limits.

Keys and limits are those of the `kaggle` client 2.2 (`kernels_push`, `dataset_create_new`) and what it leaves
unchecked: internet off is always written, because the client takes a missing `enable_internet` for true, and a title
always turns into the slug of its id, because Kaggle would rename the notebook otherwise.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pairclf.config import Package
from pairclf.errors import PackagingError

Payload = Literal["bundle", "wheels"]
"""The two datasets of a package: trained bundles, and what the notebook installs."""

PAYLOADS: tuple[Payload, ...] = ("bundle", "wheels")
"""In the order in which kernel-metadata.json attaches them."""

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PROJECT = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_MODEL_SOURCE = re.compile(r"[\w.-]+(/[\w.-]+){3}/[1-9]\d*")
_NAME_LENGTHS = (5, 43)  # a notebook's slug has 5 to 50 characters, a dataset's 6 to 50, and `-bundle` takes 7


def slugify(title: str) -> str:
    """The slug that Kaggle makes of a title: lower case, every other character a hyphen, none doubled."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def dataset_id(package: Package, payload: Payload) -> str:
    """`owner/name-bundle` or `owner/name-wheels`."""
    return f"{package.owner}/{package.name}-{payload}"


def check_package(package: Package) -> None:
    """Refuse settings that Kaggle would refuse, all of them at once.

    Raises:
        PackagingError: names each setting, its value and the rule that it breaks.
    """
    short, long = _NAME_LENGTHS
    source, torch = package.base_model_source, [name for name in package.wheels if slugify(name) == "torch"]
    rules: list[tuple[str, Any, bool, str]] = [
        ("owner", package.owner, bool(_OWNER.fullmatch(package.owner)), "is a Kaggle user's or organisation's slug"),
        ("name", package.name, bool(_SLUG.fullmatch(package.name)), "is lower-case words joined by single hyphens"),
        ("name", package.name, short <= len(package.name) <= long, f"has {short} to {long} characters"),
        ("competition", package.competition, bool(_SLUG.fullmatch(package.competition)), "is a competition's slug"),
        (
            "base_model_source",
            source,
            source is None or bool(_MODEL_SOURCE.fullmatch(source)),
            "has five parts, owner/model/framework/instance/version, and the version is a number",
        ),
        ("machine_shape", package.machine_shape, package.machine_shape.isalnum(), "is Kaggle's word for a machine"),
        (
            "machine_shape",
            package.machine_shape,
            package.machine_shape != "NvidiaTeslaP100",
            "is not a retired machine",
        ),
        ("licence", package.licence, bool(package.licence.strip()), "names exactly one licence"),
        ("wheels", package.wheels, all(map(_PROJECT.fullmatch, package.wheels)), "are names of packages"),
        ("wheels", package.wheels, not torch, "leave out torch: the image's own fits its GPU driver"),
    ]
    broken = [f"package.{name}={value!r}: it {rule}" for name, value, holds, rule in rules if not holds]
    if broken:
        lines = "\n".join(f"  {line}" for line in broken)
        raise PackagingError(
            f"{len(broken)} of Kaggle's rules are broken:\n{lines}", remedy="change these settings and package again"
        )


def kernel_metadata(package: Package, code_file: str) -> dict[str, Any]:
    """kernel-metadata.json of the notebook `code_file`.

    Raises:
        PackagingError: see `check_package`.
    """
    check_package(package)
    return {
        "id": f"{package.owner}/{package.name}",
        "title": _title(package.name),
        "code_file": code_file,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": package.machine_shape.startswith("Nvidia"),
        "enable_tpu": package.machine_shape.startswith("Tpu"),
        "enable_internet": False,
        "machine_shape": package.machine_shape,
        "keywords": [],
        "dataset_sources": [dataset_id(package, payload) for payload in PAYLOADS],
        "competition_sources": [package.competition],
        "kernel_sources": [],
        "model_sources": [] if package.base_model_source is None else [package.base_model_source],
    }


def dataset_metadata(package: Package, payload: Payload) -> dict[str, Any]:
    """dataset-metadata.json of one of the two datasets.

    Raises:
        PackagingError: see `check_package`.
    """
    check_package(package)
    subtitles = {
        "bundle": "Trained classifiers, to be scored by pairclf",
        "wheels": "What the pairclf notebook installs without internet",
    }
    identity = dataset_id(package, payload)
    return {
        "title": _title(identity.partition("/")[2]),
        "id": identity,
        "subtitle": subtitles[payload],
        "licenses": [{"name": package.licence}],
        "keywords": [],
    }


def _title(slug: str) -> str:
    return slug.replace("-", " ").capitalize()
