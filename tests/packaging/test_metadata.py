from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slugify import slugify  # the rule of Kaggle's client
from support.records import make_package, make_part

from pairclf.config import Package, load_config
from pairclf.errors import PackagingError
from pairclf.hardware import MACHINES
from pairclf.packaging.metadata import (
    LICENCES,
    Payload,
    check_package,
    dataset_metadata,
    deadline_seconds,
    kernel_metadata,
    source_of,
)


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("owner", "some one", "slug"),
        ("owner", "", "slug"),
        ("name", "four", "5 to 40 characters"),
        ("name", "n" * 41, "5 to 40 characters"),
        ("name", "A-Notebook", "lower-case"),
        ("name", "a--notebook", "single hyphens"),
        ("competition", "LMSYS - Chatbot Arena", "competition's slug"),
        ("base_model_source", "google/gemma-2/transformers/gemma-2-9b-it", "five parts"),
        ("base_model_source", "google/gemma-2/transformers/gemma-2-9b-it/latest", "version is a number"),
        ("base_model_source", "gemma-2-9b-it", "or two"),
        ("base_model_source", "../..", "or two"),
        ("base_model_source", "google/../../../1", "or two"),
        ("machine_shape", "", "none of NvidiaTeslaT4"),
        ("machine_shape", "NvidiaTeslaT4x2", "the nearest is NvidiaTeslaT4"),
        (
            "machine_shape",
            "NvidiaTeslaP100",
            "retired: Kaggle would run it on NvidiaTeslaT4; there are NvidiaTeslaT4, Nv",
        ),
        ("machine_shape", "NvidiaTeslaT4Highmem", "for Kaggle's staff alone"),
        ("machine_shape", "TpuV5E8", "a TPU"),
        ("license", " ", "none that Kaggle knows"),
        ("license", "Apache-2", "the nearest is apache-2.0"),
        ("extra_packages", ["bitsandbytes==0.50"], "names of packages"),
        ("extra_packages", ["Torch"], "leave out torch"),
        ("deadline", "2026-01-31T18:00:00+00:00", "a duration"),
        ("deadline", "soon", "a duration"),
        ("deadline", "8h56m", "5 minutes before time_limit_hours=9"),
    ],
)
def test_setting_is_refused_by_name_value_and_rule(setting: str, value: object, rule: str) -> None:
    with pytest.raises(PackagingError) as caught:
        check_package(make_package(**{setting: value}))
    assert f"package.{setting}={value!r}" in str(caught.value)
    assert rule in str(caught.value)


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(PackagingError, match="Kaggle would refuse these settings") as caught:
        check_package(Package(owner="?", name="a-notebook", competition="?", license=""))
    assert all(f"package.{name}" in str(caught.value) for name in ("owner", "competition", "license"))


@pytest.mark.parametrize("owner", ["your-kaggle-name", "YOUR-KAGGLE-NAME"])
def test_placeholder_is_no_owner(owner: str) -> None:
    with pytest.raises(PackagingError, match=f"package.owner='{owner}': it is still the placeholder"):
        check_package(Package(owner=owner))


@pytest.mark.parametrize(
    ("settings", "limit", "due"),
    [
        ({}, 9.0, "8h30m"),
        ({"competition": "another"}, 9.0, "8h30m"),
        ({"competition": "llm-classification-finetuning"}, 9.0, "8h30m"),
        ({"competition": "wsdm-cup-multilingual-chatbot-arena"}, 4.75, "4h16m"),
        ({"competition": "wsdm-cup-multilingual-chatbot-arena", "time_limit_hours": 12}, 12.0, "11h30m"),
        ({"time_limit_hours": 12, "deadline": "2h"}, 12.0, "2h"),
    ],
)
def test_hours_and_deadline_follow_from_the_competition(settings: dict[str, object], limit: float, due: str) -> None:
    package = make_package(**settings)
    check_package(package)
    assert (package.limit / 3600, package.due) == (limit, due)


def test_deadline_just_in_time_is_kept() -> None:
    check_package(make_package(time_limit_hours=9, deadline="8h55m"))
    assert deadline_seconds(Package(deadline="1h30m")) == 5400


@pytest.mark.parametrize("name", ["lmsys", "wsdm"])
def test_shipped_configs_need_an_owner_only(name: str) -> None:
    config = load_config(Path("configs", "kaggle", f"{name}.yaml"), ["package.owner=someone"])
    check_package(config.package)
    assert config.output_dir == Path("runs", name, "gemma2-9b-qlora")
    assert config.task.name == name


def test_base_model_may_be_a_dataset_and_a_script_is_one() -> None:
    package = make_package(base_model_source="someone/gemma", machine_shape="None")
    made = kernel_metadata(package, "a-notebook.py", [make_part(package, "bundle")])
    assert made["kernel_type"] == "script"
    assert made["dataset_sources"][-1] == "someone/gemma"
    assert made["model_sources"] == []
    assert (made["enable_gpu"], made["machine_shape"]) == (False, "")


@pytest.mark.parametrize("given_as", ["apache-2.0", "Apache 2.0", "APACHE 2.0"])
def test_licence_is_known_in_the_words_of_datasets_and_of_models(given_as: str) -> None:
    package = make_package(license=given_as)
    assert dataset_metadata(package, "bundle", "someone/x-bundle")["licenses"] == [{"name": "apache-2.0"}]
    assert LICENCES["apache-2.0"] == "Apache 2.0"
    with pytest.raises(PackagingError, match="none that a model may have"):
        check_package(make_package(license="other", bundles_as="model"))


def test_machines_say_what_a_rehearsal_holds_them_to() -> None:
    assert (MACHINES["NvidiaTeslaT4"].memory_gb, MACHINES["NvidiaTeslaT4"].disk_gb) == (29, 20)
    assert all(machine.cores and machine.memory_gb and machine.disk_gb for machine in MACHINES.values())


words = st.lists(st.text("abz019", min_size=1, max_size=8), min_size=1, max_size=6)


@given(words.map("-".join).filter(lambda name: 5 <= len(name) <= 40), st.integers(1, 99))
def test_titles_turn_into_the_slugs_of_their_ids_within_the_limits(name: str, number: int) -> None:
    package = make_package(name=name)
    kernel = kernel_metadata(package, f"{name}.ipynb", [])
    payloads: tuple[Payload, ...] = ("bundle", "wheels")
    datasets = [dataset_metadata(package, payload, source_of(package, payload, number)) for payload in payloads]
    for made, shortest in [(kernel, 5), *((dataset, 6) for dataset in datasets)]:
        slug = made["id"].removeprefix("someone/")
        assert slugify(made["title"]) == slug
        assert shortest <= len(made["title"]) <= 50
        assert shortest <= len(slug) <= 50
    for dataset in datasets:
        assert len(dataset["licenses"]) == 1
        assert 20 <= len(dataset["subtitle"]) <= 80
