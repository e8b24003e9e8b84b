"""Model cards: what a bundle is, its figures, data, biases and licence, as the README.md of a repository on the hub."""

from __future__ import annotations

from io import StringIO
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from pairclf import __version__
from pairclf.bundles.base import EMBEDDED
from pairclf.bundles.bundle import Bundle
from pairclf.config import dump_config
from pairclf.runs.evaluation_report import ReportedEvaluation
from pairclf.scores.figures import METRICS, ONE_ORDER, metrics_of, title


class Card(NamedTuple):
    """What the author says in a card; all else stands in the bundle.

    Attributes:
        license: its name on the hub; None: the card says that none is given.
        data: source and terms of the training data.
        evaluation: of the run; None: the card has the bundle's own figures alone.
    """

    license: str | None = None
    data: str = ""
    evaluation: ReportedEvaluation | None = None

    def text(self, bundle: Bundle, repo_id: str) -> str:
        """The card, with its header in YAML."""
        header = yaml.safe_dump(self._header(bundle, repo_id), sort_keys=False, allow_unicode=True)
        parts = [
            f"---\n{header}---",
            f"# {repo_id.partition('/')[2]}",
            _description(bundle),
            f"## Use\n\n{_use(bundle, repo_id)}",
            f"## Figures\n\n{self._figures(bundle)}",
            f"## Data\n\n{self._data(bundle)}",
            f"## Biases and limits\n\n{self._biases(bundle)}",
            f"## Licence\n\n{self._licence(bundle)}",
            f"## Settings\n\n```yaml\n{dump_config(bundle.config)}```",
        ]
        return "\n\n".join(parts) + "\n"

    def _header(self, bundle: Bundle, repo_id: str) -> dict[str, Any]:
        task, metrics = bundle.config.task, bundle.manifest.metrics
        header: dict[str, Any] = {"library_name": "pairclf", "pipeline_tag": "text-classification"}
        header["tags"] = ["pairclf", "preference", bundle.manifest.approach]
        if self.license is not None:
            header["license"] = self.license
        if (base := _base_on_hub(bundle)) is not None:
            header["base_model"] = base
            header["base_model_relation"] = "adapter" if bundle.manifest.weights == "adapter" else "finetune"
        values = [
            {"type": name, "name": title(name, task), "value": round(metrics[name], 6)}
            for name in metrics_of(task)
            if name in metrics
        ]
        if values:
            result = {
                "task": {"type": "text-classification"},
                "dataset": {"type": task.name, "name": f"held-out rows of {task.name}"},
                "metrics": values,
            }
            header["model-index"] = [{"name": repo_id.partition("/")[2], "results": [result]}]
        return header

    def _figures(self, bundle: Bundle) -> str:
        if self.evaluation is not None:
            page = Console(file=StringIO(), width=110, highlight=False, markup=False, soft_wrap=True, record=True)
            for table in self.evaluation.tables():
                page.print(table)
            seen = self.evaluation.seen
            warning = f"\n\n**{seen:,} of these rows were trained on: the figures do not hold for new rows.**"
            return f"```\n{page.export_text().rstrip()}\n```{warning if seen else ''}"
        metrics, task = bundle.manifest.metrics, bundle.config.task
        names = [name for name in metrics_of(task) if name in metrics]
        if not names:
            return "The model was trained on all rows: no rows were held out, and there are no figures of it."
        two = any(f"{name}{ONE_ORDER}" in metrics for name in names)
        lines = ["| metric | " + ("mean of both orders | one order |" if two else "value |")]
        lines.append("|---" * (3 if two else 2) + "|")
        for name in names:
            one = metrics.get(f"{name}{ONE_ORDER}")
            shown = "" if one is None else f"{one:.4f}"
            lines.append(f"| {METRICS[name].title} | {metrics[name]:.4f} |" + (f" {shown} |" if two else ""))
        rows = f"On {metrics['rows']:,.0f} held-out rows" if "rows" in metrics else "On held-out rows"
        fold = "" if bundle.manifest.fold is None else f" of fold {bundle.manifest.fold}"
        return f"{rows}{fold}, whose prompts it was not trained on:\n\n" + "\n".join(lines)

    def _data(self, bundle: Bundle) -> str:
        marks, manifest = bundle.trained_on(), bundle.manifest
        prompts = "an unknown number of prompts" if marks is None else f"{len(marks):,} prompts"
        prior = ", ".join(f"{name} {part:.1%}" for name, part in zip(manifest.classes, manifest.prior, strict=True))
        said = self.data or "The author says nothing of their source and terms."
        return (
            f"Trained on rows with {prompts}; labels of the task `{bundle.config.task.name}`: {prior}. {said}\n\n"
            f"`bundle.json` holds the texts of {len(manifest.probes)} rows (probes), with which a copy is verified; "
            "`trained_on.parquet` holds hashes of the prompts, by which it is known whether a row was trained on."
        )

    def _biases(self, bundle: Bundle) -> str:
        task, metrics = bundle.config.task, bundle.manifest.metrics
        lines = ["The model predicts what the raters of its data preferred, which is not what is correct or safe."]
        one, both = metrics.get(f"log_loss{ONE_ORDER}"), metrics.get("log_loss")
        if task.swappable:
            lines.append(
                "Raters favour long and formatted responses, and a model learns it. It may favour a side, too: "
                "score both orders and take their mean, as pairclf does"
                + ("." if one is None or both is None else f" (log loss {both:.4f}; in one order {one:.4f}).")
            )
        lines.append(
            "The slices and biases above are those that stand out in its evaluation."
            if self.evaluation is not None
            else "Its biases by slice were not measured for this card; `pairclf evaluate` does."
        )
        return "\n".join(f"- {line}" for line in lines)

    def _licence(self, bundle: Bundle) -> str:
        base = _base_on_hub(bundle)
        of_base = f" The terms of {base} hold for its weights." if base is not None else ""
        given = f"{self.license}." if self.license else "The author gives none."
        return f"{given}{of_base} The data may have terms of their own."


def _base_on_hub(bundle: Bundle) -> str | None:
    """The base model, where its name is one of the hub and not a folder."""
    base = bundle.manifest.base
    is_name = base is not None and base.count("/") == 1 and not base.startswith((EMBEDDED, "/", ".", "~"))
    return base if is_name else None


def _description(bundle: Bundle) -> str:
    manifest, task = bundle.manifest, bundle.config.task
    kind = {"adapter": "an adapter over", "whole": "all weights, trained from", "base": "the untouched weights of"}
    base = _base_on_hub(bundle) or "a base model of the author's"
    weights = f": {kind[manifest.weights]} {base}" if manifest.weights in kind else ""
    return (
        f"A bundle of [pairclf](https://pypi.org/project/pairclf/) {__version__}, approach `{manifest.approach}`"
        f"{weights}. From {', '.join(f'`{name}`' for name in task.fields)} it predicts the probabilities of "
        f"{', '.join(f'`{name}`' for name in task.classes)}."
    )


def _use(bundle: Bundle, repo_id: str) -> str:
    fields = ", ".join(f"{name}=..." for name in bundle.config.task.fields)
    lines = [
        "import pairclf",
        "",
        f'judge = pairclf.load("{repo_id}")  # revision="..." pins a commit',
        f"judge.predict({fields})",
    ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if bundle.manifest.weights == "adapter":
        text += "\n\nThe folder `adapter` opens with plain peft; the head is in `head.safetensors`."
    return text
