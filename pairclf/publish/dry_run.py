"""A dry run: print requests and answer them locally, as Kaggle would for an account without datasets or kernels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pairclf.console import stdout

if TYPE_CHECKING:
    import requests

_LONGEST = 200  # characters of a text that are worth printing: a kernel's source is not


class DryRun:
    """Answers requests instead of Kaggle. At first nothing exists; whatever is created is ready at once."""

    def __init__(self) -> None:
        self._files: dict[str, list[str]] = {}  # of datasets, models and kernels, by the last part of their slug

    def __call__(self, request: requests.PreparedRequest) -> requests.Response:
        path = urlsplit(str(request.url)).path
        body = json.loads(request.body) if isinstance(request.body, str | bytes) and request.body else {}
        _show(str(request.method), path, body, request.headers)
        if request.method == "PUT":
            return _response(request, 200, {})
        name = path.rpartition("/")[2]
        slug = str(body.get("instanceSlug") or body.get("datasetSlug") or body.get("modelSlug") or body.get("slug", ""))
        slug = slug.rpartition("/")[2] or str(body.get("kernelSlug", ""))
        inner = body.get("body", {})
        creating = {"CreateDataset", "CreateDatasetVersion", "CreateModel", "CreateModelInstance", "SaveKernel"}
        if name in creating:
            files = inner.get("files") or body.get("files") or []
            self._files[inner.get("instanceSlug", slug)] = [file["token"] for file in files]
        elif name in _ASK_FIRST and slug not in self._files:
            return _response(request, 404, {"code": 404, "message": "not there yet"})
        return _response(request, 200, self._answer(name, body, self._files.get(slug, [])))

    def _answer(self, name: str, body: dict[str, Any], files: list[str]) -> dict[str, Any]:
        listed = [{"name": file} for file in files]
        answers: dict[str, dict[str, Any]] = {
            "StartBlobUpload": {
                "token": body.get("name"),
                "createUrl": f"https://storage.googleapis.com/{body.get('name')}",
            },
            "GetDatasetStatus": {"status": "READY"},
            "ListDatasetFiles": {"datasetFiles": listed},
            "GetModelInstance": {"versionNumber": 1},
            "ListModelInstanceVersionFiles": {"files": listed},
            "SaveKernel": {"versionNumber": 1},
            "GetKernelSessionStatus": {"status": "COMPLETE"},
            "ListKernelSessionOutput": {"files": [{"fileName": "submission.csv"}], "log": "[]"},
            "CreateCodeSubmission": {"ref": 1},
            "ListSubmissions": {"submissions": []},
        }
        return answers.get(name, {"status": "ok"})


_ASK_FIRST = ("GetDatasetStatus", "GetModel", "GetModelInstance", "GetKernel")


def _show(method: str, path: str, body: dict[str, Any], headers: Any) -> None:
    if method == "PUT":
        stdout.print(f"PUT {path}: {int(headers.get('Content-Length', 0)):,} bytes")
    else:
        stdout.print(f"{method} {path}\n{json.dumps(_short(body), indent=2, ensure_ascii=False)}")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return f"<{len(value):,} characters>" if isinstance(value, str) and len(value) > _LONGEST else value


def _response(request: requests.PreparedRequest, status: int, body: dict[str, Any]) -> requests.Response:
    import requests

    response = requests.Response()
    response.status_code, response.request, response.url = status, request, str(request.url)
    response.headers["Content-Type"] = "application/json"
    response._content = json.dumps(body).encode()
    return response
