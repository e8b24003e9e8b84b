from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.config import Package
from pairclf.errors import PackagingError
from pairclf.packaging.metadata import check_package, dataset_metadata, kernel_metadata, slugify

GOOD = {"owner": "someone", "name": "a-notebook"}


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("owner", "some one", "slug"),
        ("owner", "", "slug"),
        ("name", "four", "5 to 43 characters"),
        ("name", "n" * 44, "5 to 43 characters"),
        ("name", "A-Notebook", "lower-case"),
        ("name", "a--notebook", "single hyphens"),
        ("competition", "LMSYS - Chatbot Arena", "competition's slug"),
        ("base_model_source", "google/gemma-2/transformers/gemma-2-9b-it", "five parts"),
        ("base_model_source", "google/gemma-2/transformers/gemma-2-9b-it/latest", "version is a number"),
        ("machine_shape", "", "Kaggle's word"),
        ("machine_shape", "NvidiaTeslaP100", "retired"),
        ("licence", " ", "exactly one"),
        ("wheels", ["bitsandbytes==0.50"], "names of packages"),
        ("wheels", ["Torch"], "leave out torch"),
    ],
)
def test_setting_is_refused_by_name_value_and_rule(setting: str, value: object, rule: str) -> None:
    with pytest.raises(PackagingError) as caught:
        check_package(Package.model_validate(GOOD | {setting: value}))
    assert f"package.{setting}={value!r}" in str(caught.value)
    assert rule in str(caught.value)


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(PackagingError, match="3 of Kaggle's rules") as caught:
        kernel_metadata(Package(owner="?", name="a-notebook", competition="?", licence=""), "a.ipynb")
    assert all(f"package.{name}" in str(caught.value) for name in ("owner", "competition", "licence"))


def test_kernel_has_no_internet_and_attaches_what_is_made_beside_it() -> None:
    source = "google/gemma-2/transformers/gemma-2-9b-it/2"
    package = Package.model_validate(GOOD | {"base_model_source": source})
    made = kernel_metadata(package, "a-notebook.ipynb")
    assert made["enable_internet"] is False
    assert (made["enable_gpu"], made["machine_shape"]) == (True, "NvidiaTeslaT4")
    assert made["is_private"] is True
    assert made["dataset_sources"] == [dataset_metadata(package, kind)["id"] for kind in ("bundle", "wheels")]
    assert made["model_sources"] == [source]


words = st.lists(st.text("abz019", min_size=1, max_size=8), min_size=1, max_size=6)


@given(words.map("-".join).filter(lambda name: 5 <= len(name) <= 43))
def test_titles_turn_into_the_slugs_of_their_ids_within_the_limits(name: str) -> None:
    package = Package(owner="someone", name=name)
    kernel = kernel_metadata(package, f"{name}.ipynb")
    datasets = [dataset_metadata(package, "bundle"), dataset_metadata(package, "wheels")]
    for made, shortest in [(kernel, 5), *((dataset, 6) for dataset in datasets)]:
        slug = made["id"].removeprefix("someone/")
        assert slugify(made["title"]) == slug
        assert shortest <= len(made["title"]) <= 50
        assert shortest <= len(slug) <= 50
    for dataset in datasets:
        assert len(dataset["licenses"]) == 1
        assert 20 <= len(dataset["subtitle"]) <= 80
