from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.errors import PackagingError
from pairclf.files import sha256_file, sha256_tree
from pairclf.packaging.metadata import LIMITS, Limits
from pairclf.packaging.payload import divide, seal, split

names = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3).map("/".join)
payloads = st.dictionaries(names, st.integers(0, 10), min_size=1, max_size=30)


@given(payloads, st.integers(10, 40), st.integers(2, 6))
def test_every_file_is_in_exactly_one_part_and_each_part_within_the_limits(
    sizes: dict[str, int], size: int, top: int
) -> None:
    parts = divide(sizes, Limits(size, top))
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    for part in parts:
        assert part
        assert sum(sizes[name] for name in part) <= size
        assert len({PurePosixPath(name).parts[0] for name in part}) + 1 <= top
    assert divide(dict(reversed(sizes.items())), Limits(size, top)) == parts


def test_what_fits_stays_in_one_part() -> None:
    assert len(divide({f"bundle/{number}": 10**9 for number in range(60)}, LIMITS)) == 1
    assert len(divide({f"{number}.whl": 1 for number in range(50)}, LIMITS)) == 2, "the marker takes a place too"


def test_one_file_over_the_limit_is_refused_with_a_remedy() -> None:
    with pytest.raises(PackagingError, match=r"a/weights has 11 bytes[\s\S]*export"):
        divide({"a/weights": 11}, Limits(10, 50))


def test_parts_are_folders_of_their_own_and_their_markers_tell_all(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    for name in ("x/1", "x/2", "y/1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("0123456789"[: 6 if name[0] == "x" else 4])
    before = sha256_tree(folder)
    parts = split(folder, "bundle", Limits(10, 50))
    assert [part.name for part in parts] == ["bundle", "bundle-2"]
    listed: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        files = sha256_tree(part)
        marker, digest = seal(part, "bundle", number)
        assert marker.name == f"pairclf-bundle-{digest[:12]}.json"
        assert sha256_file(marker) == digest
        assert json.loads(marker.read_text()) == {"payload": "bundle", "part": number, "files": files}
        listed |= files
    assert listed == before
