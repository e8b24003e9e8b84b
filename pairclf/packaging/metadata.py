"""Metadata of the kernel, its datasets and models for Kaggle's client, and Kaggle's limits.

Keys and limits are those of the `kaggle` client 2.2 (`kernels_push`, `dataset_create_new`, `model_instance_create`).
The client leaves two things unchecked: it takes a missing `enable_internet` for true, so it is always written; and
Kaggle names a thing by its title, so a title always becomes the slug of its id.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from packaging.utils import canonicalize_name
from pydantic import Field

from pairclf.config import Package, Section
from pairclf.errors import ConfigError, PackagingError
from pairclf.hardware import MACHINES, REFUSED_MACHINES
from pairclf.inference.deadline import seconds_until

Payload = Literal["bundle", "wheels"]
"""What is uploaded beside the kernel: trained bundles, and what the kernel installs."""

PAYLOADS: tuple[Payload, ...] = ("bundle", "wheels")


class PackagePart(Section):
    """A folder that becomes one dataset, or one model, on Kaggle."""

    payload: Payload = Field(description="what it holds")
    kind: Literal["dataset", "model"] = Field(description="what it becomes")
    folder: str = Field(description="its folder below the package's: bundle, bundle-2, wheels")
    source: str = Field(description="owner/slug of a dataset, owner/model/framework/instance of a model")
    marker: str = Field(description="name of its marker file: pairclf-PAYLOAD-HASH.json")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the marker file, in hex")
    bytes: int = Field(description="of all its files")


KERNEL = "kernel"
"""The kernel's folder in a package."""

KERNEL_METADATA = "kernel-metadata.json"
DATASET_METADATA = "dataset-metadata.json"
MODEL_METADATA = "model-metadata.json"
INSTANCE_METADATA = "model-instance-metadata.json"
READ_BY_THE_CLIENT = (DATASET_METADATA, MODEL_METADATA, INSTANCE_METADATA)
"""Files that Kaggle's client reads and does not upload."""

FRAMEWORK = "other"
"""Of our model instances, in the SDK's words (`ModelFramework`), of which the adapters' own, peft, is none."""


class Limits(NamedTuple):
    """What one dataset or model instance may hold: bytes, and entries at its top level (a folder is one)."""

    size: int
    top: int


LIMITS = Limits(size=100 * 10**9, top=50)
"""Kaggle's page on datasets ("Technical specifications"): 200 GB and 50 top-level files. The half of the bytes is for
files of older builds, which `push` keeps in a dataset."""

LICENCES: dict[str, str | None] = {
    "apache-2.0": "Apache 2.0",
    "CC0-1.0": "CC0: Public Domain",
    "CC-BY-3.0": "Attribution 3.0 Unported (CC BY 3.0)",
    "CC-BY-3.0-IGO": "Attribution 3.0 IGO (CC BY 3.0 IGO)",
    "CC-BY-4.0": "Attribution 4.0 International (CC BY 4.0)",
    "CC-BY-NC-4.0": "Attribution-NonCommercial 4.0 International (CC BY-NC 4.0)",
    "CC-BY-NC-ND-4.0": "Attribution-NonCommercial-NoDerivatives 4.0 International (CC BY-NC-ND 4.0)",
    "CC-BY-NC-SA-3.0-IGO": "Attribution-NonCommercial-ShareAlike 3.0 IGO (CC BY-NC-SA 3.0 IGO)",
    "CC-BY-NC-SA-4.0": "CC BY-NC-SA 4.0",
    "CC-BY-ND-4.0": "Attribution-NoDerivatives 4.0 International (CC BY-ND 4.0)",
    "CC-BY-SA-3.0": "CC BY-SA 3.0",
    "CC-BY-SA-4.0": "CC BY-SA 4.0",
    "CDLA-Permissive-1.0": "Community Data License Agreement - Permissive - Version 1.0",
    "CDLA-Sharing-1.0": "Community Data License Agreement - Sharing - Version 1.0",
    "AGPL-3.0": "GNU Affero General Public License 3.0",
    "FDL-1.3": "GNU Free Documentation License 1.3",
    "LGPL-3.0": "GNU Lesser General Public License 3.0",
    "GPL-2.0": "GPL 2",
    "GPL-3.0": "GPL 3",
    "ODC-BY-1.0": "ODC Attribution License (ODC-By)",
    "PDDL": "ODC Public Domain Dedication and Licence (PDDL)",
    "ODbL-1.0": None,
    "DbCL-1.0": None,
    "copyright-authors": None,
    "other": None,
    "unknown": None,
}
"""`{a dataset's word: a model's}`, of the lists in the client's docs; None: models have no such licence."""

MARGIN = 300.0
"""Seconds between deadline and the end of the competition's hours: what comes after the last row takes some."""

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PROJECT = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_SOURCE = re.compile(r"\w[\w.-]*/\w[\w.-]*((/\w[\w.-]*){2}/[1-9]\d*)?")  # a mount's folder is made of it: no ..
_NAME_LENGTHS = (5, 40)  # a notebook's slug has 5 to 50 characters, a dataset's 6 to 50, and `-bundle-99` takes 10


def folder_of(payload: Payload, number: int) -> str:
    """The folder of a payload's part, and the end of its slug: `bundle`, `bundle-2`, ..."""
    return payload if number == 1 else f"{payload}-{number}"


def marker_name(payload: Payload, digest: str) -> str:
    """The name of the marker file with this SHA-256: `pairclf-bundle-0123456789ab.json`."""
    return f"pairclf-{payload}-{digest[:12]}.json"


def package_part(package: Package, payload: Payload, number: int, *, sha256: str, size: int) -> PackagePart:
    """A part of a payload, whose names follow from the settings, its number and its marker's SHA-256."""
    return PackagePart(
        payload=payload,
        kind="model" if _is_model(package, payload) else "dataset",
        folder=folder_of(payload, number),
        source=source_of(package, payload, number),
        marker=marker_name(payload, sha256),
        sha256=sha256,
        bytes=size,
    )


def _is_model(package: Package, payload: Payload) -> bool:
    return payload == "bundle" and package.bundles_as == "model"


def source_of(package: Package, payload: Payload, number: int) -> str:
    """`owner/name-bundle` of a dataset; of a model `owner/name-bundle/other/part-1`, an instance a part."""
    if _is_model(package, payload):
        return f"{package.owner}/{package.name}-{payload}/{FRAMEWORK}/part-{number}"
    return f"{package.owner}/{package.name}-{folder_of(payload, number)}"


def deadline_seconds(package: Package) -> float | None:
    """The package's deadline in seconds; None if it is no duration."""
    try:
        today, tomorrow = (seconds_until(package.due, datetime(2020, 1, day, tzinfo=UTC)) for day in (1, 2))
    except ConfigError:
        return None
    return today if today == tomorrow else None  # a time of day comes nearer


def check_package(package: Package) -> None:
    """Refuse settings that Kaggle would refuse. All errors are shown at once.

    Raises:
        PackagingError: names each setting, its value and the rule that it breaks.
    """
    broken = [
        f"package.{name}={getattr(package, name)!r}: it {rule}" for name, holds, rule in _rules(package) if not holds
    ]
    if broken:
        lines = "\n".join(f"  {line}" for line in broken)
        raise PackagingError(
            f"Kaggle would refuse these settings:\n{lines}", remedy="change these settings and package again"
        )


def _rules(package: Package) -> Iterator[tuple[str, bool, str]]:
    """`(setting, whether the rule holds, the rule)`."""
    short, long = _NAME_LENGTHS
    yield "owner", bool(_OWNER.fullmatch(package.owner)), "is a Kaggle user's or organisation's slug"
    is_own = package.owner.lower() != Package.model_fields["owner"].default
    yield "owner", is_own, "is still the placeholder: set it to your Kaggle user's slug"
    yield "name", bool(_SLUG.fullmatch(package.name)), "is lower-case words joined by single hyphens"
    yield "name", short <= len(package.name) <= long, f"has {short} to {long} characters"
    yield "competition", bool(_SLUG.fullmatch(package.competition)), "is a competition's slug"
    yield (
        "base_model_source",
        package.base_model_source is None or bool(_SOURCE.fullmatch(package.base_model_source)),
        "has five parts, owner/model/framework/instance/version, and the version is a number; or two, owner/slug",
    )
    shape = package.machine_shape
    if shape in REFUSED_MACHINES:
        yield "machine_shape", False, f"is {REFUSED_MACHINES[shape]}; there are {', '.join(MACHINES)}"
    else:
        yield "machine_shape", shape in MACHINES, f"is none of {', '.join(MACHINES)}{_nearest(shape, MACHINES)}"
    as_model = package.bundles_as == "model"
    names = [name for name, other in LICENCES.items() if other is not None or not as_model]
    yield "license", _licence(package) is not None, f"is none that Kaggle knows{_nearest(package.license, names)}"
    if as_model and (licence := _licence(package)) is not None:
        yield "license", LICENCES[licence] is not None, "is none that a model may have: choose bundles_as=dataset"
    yield "extra_packages", all(map(_PROJECT.fullmatch, package.extra_packages)), "are names of packages"
    torch = [name for name in package.extra_packages if canonicalize_name(name) == "torch"]
    yield "extra_packages", not torch, "leave out torch: the image's own fits its GPU driver"
    seconds = deadline_seconds(package)
    yield "deadline", seconds is not None, "is a duration, from the notebook's first second on, such as 8h30m"
    room = package.limit - MARGIN
    yield (
        "deadline",
        seconds is None or seconds <= room,
        f"ends 5 minutes before time_limit_hours={package.limit / 3600:g} at the latest",
    )


def _nearest(word: str, candidates: Sequence[str] | Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; the nearest is {matches[0]}" if matches else ""


def _licence(package: Package) -> str | None:
    """The licence's name for datasets. It may be given by its name for models; None: Kaggle does not know it."""
    wanted_name = package.license.strip().casefold()
    words = ((name, {name.casefold(), (other or name).casefold()}) for name, other in LICENCES.items())
    return next((name for name, synonyms in words if wanted_name in synonyms), None)


def kernel_metadata(package: Package, code_file: str, parts: Sequence[PackagePart]) -> dict[str, Any]:
    """The content of kernel-metadata.json for a notebook or script that attaches `parts`.

    Our model instances stand in version 1: `push`, which learns the version, writes it there.
    """
    base = [] if package.base_model_source is None else [package.base_model_source]
    models = [f"{part.source}/1" for part in parts if part.kind == "model"]
    has_machine = package.machine_shape != "None"
    return {
        "id": f"{package.owner}/{package.name}",
        "title": title_of(package.name),
        "code_file": code_file,
        "language": "python",
        "kernel_type": "script" if PurePosixPath(code_file).suffix == ".py" else "notebook",
        "is_private": True,
        "enable_gpu": MACHINES[package.machine_shape].gpus > 0,
        "enable_tpu": False,
        "enable_internet": False,
        "machine_shape": package.machine_shape if has_machine else "",
        "keywords": [],
        "dataset_sources": [*(part.source for part in parts if part.kind == "dataset"), *filter(_is_dataset, base)],
        "competition_sources": [package.competition],
        "kernel_sources": [],
        "model_sources": [*models, *(source for source in base if not _is_dataset(source))],
    }


def _is_dataset(source: str) -> bool:
    return source.count("/") == 1


_SUBTITLES: dict[Payload, str] = {
    "bundle": "Trained classifiers, to be scored by pairclf",
    "wheels": "What the pairclf notebook installs without internet",
}


def part_metadata(package: Package, payload: Payload, source: str) -> dict[str, dict[str, Any]]:
    """`{file: content}` of a part's metadata: those of a dataset, or of a model and its instance."""
    if _is_model(package, payload):
        return model_metadata(package, source)
    return {DATASET_METADATA: dataset_metadata(package, payload, source)}


def dataset_metadata(package: Package, payload: Payload, source: str) -> dict[str, Any]:
    """The content of a part's dataset-metadata.json."""
    return {
        "title": title_of(source.partition("/")[2]),
        "id": source,
        "subtitle": _SUBTITLES[payload],
        "isPrivate": True,
        "licenses": [{"name": _licence(package)}],
        "keywords": [],
    }


def model_metadata(package: Package, source: str) -> dict[str, dict[str, Any]]:
    """`{file: content}` of a part's model-metadata.json and model-instance-metadata.json."""
    owner, model, framework, instance = source.split("/")
    licence = _licence(package)
    assert licence is not None  # check_package
    return {
        MODEL_METADATA: {
            "ownerSlug": owner,
            "title": title_of(model),
            "slug": model,
            "subtitle": _SUBTITLES["bundle"],
            "isPrivate": True,
            "description": f"Bundles of pairclf for the competition {package.competition}.",
            "publishTime": "",
            "provenanceSources": "",
        },
        INSTANCE_METADATA: {
            "ownerSlug": owner,
            "modelSlug": model,
            "instanceSlug": instance,
            "framework": framework,
            "overview": _SUBTITLES["bundle"],
            "usage": "Attach it to the notebook of the same package, which finds it by its marker file.",
            "licenseName": LICENCES[licence],
            "fineTunable": False,
            "trainingData": [],
            "modelInstanceType": "Unspecified",
            "baseModelInstance": "",
            "externalBaseModelUrl": "",
        },
    }


def title_of(slug: str) -> str:
    return slug.replace("-", " ").capitalize()
