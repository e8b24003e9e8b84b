"""`package`: the Kaggle notebook and the datasets or models that it attaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pairclf.config.section import Section
from pairclf.task import HOURS, competition


class Package(Section):
    competition: str = Field("lmsys-chatbot-arena", description="slug of the competition")
    owner: str = Field("your-kaggle-name", description="Kaggle user that owns the notebook and its datasets")
    name: str = Field("pairclf-demo", description="slug of the notebook; its datasets are NAME-bundle and NAME-wheels")
    kernel_type: Literal["notebook", "script", "server"] = Field(
        "notebook",
        description="script: a .py file; server: a notebook that answers batches of the competition's "
        "kaggle_evaluation gateway",
    )
    ensemble: Path | None = Field(
        None, description="YAML file of an ensemble to package (docs/export.md); null: the mean of the run's bundles"
    )
    bundles_as: Literal["dataset", "model"] = Field("dataset", description="type of the bundles' upload on Kaggle")
    base_model_source: str | None = Field(
        None,
        description="Kaggle model (owner/model/framework/instance/version) or dataset (owner/slug) with the base "
        "model; null: it is in pairclf's wheel or in the bundles",
    )
    machine_shape: str = Field("NvidiaTeslaT4", description="Kaggle's name of the machine; NvidiaTeslaT4 is two T4s")
    time_limit_hours: float | None = Field(
        None,
        gt=0,
        description="the competition's time limit for a notebook, in hours; null: that of a known competition, or 9",
    )
    deadline: str | None = Field(
        None,
        description="when the submission must be complete, measured from the notebook's start, e.g. 8h30m; null: 30 "
        "minutes before the time limit, or a tenth of it if that is less",
    )
    python_versions: list[Annotated[str, BeforeValidator(str), Field(pattern=r"^3\.\d+$")]] = Field(
        ["3.12", "3.13"], min_length=1, description="Python versions that Kaggle's image may have"
    )
    image_freezes: Path | None = Field(
        None, description="folder with pip freeze outputs of Kaggle's images (python3.12.txt, ...); null: pairclf's own"
    )
    extra_packages: list[str] = Field(
        [], description="packages to include besides those that pairclf needs and the image lacks"
    )
    license: str = Field("Apache 2.0", description="license of the uploads, as Kaggle names it")

    @property
    def limit(self) -> float:
        """Seconds that the notebook may run."""
        known = competition(self.competition)
        return 3600 * (self.time_limit_hours or (HOURS if known is None else known.hours))

    @property
    def due(self) -> str:
        """The deadline; where none is given, what follows from the limit."""
        if self.deadline is not None:
            return self.deadline
        minutes = int((self.limit - min(1800, self.limit / 10)) / 60)
        return f"{minutes // 60}h{minutes % 60}m"
