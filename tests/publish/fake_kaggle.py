# ruff: noqa: N802 - the names are Kaggle's
"""A stand-in for Kaggle on loopback: the SDK's calls, JSON as its classes write and read it, and faults by script.

What it keeps is what a test looks at: `datasets`, `instances`, `kernels`, `submissions`, and `calls`, all that came.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import zipfile
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kagglesdk.blobs.types import blob_api_service as blob_types
from kagglesdk.competitions.types import competition_api_service as competition_types
from kagglesdk.datasets.types import dataset_api_service as dataset_types
from kagglesdk.datasets.types.dataset_enums import DatabundleVersionStatus
from kagglesdk.kernels.types import kernels_api_service as kernel_types
from kagglesdk.models.types import model_api_service as model_types
from kagglesdk.security.types import oauth_service as security_types

USER, KEY, TOKEN = "someone", "5ecret0f5omeone", "KGAT_70ken0f5omeone"
TYPES = (security_types, blob_types, competition_types, dataset_types, kernel_types, model_types)


@dataclass(frozen=True)
class Fault:
    """What becomes of one call.

    Attributes:
        status: of the answer, with `message`; 0: the connection is dropped.
        after: do what was asked first, so that only the answer is lost.
        cut: of an upload, the bytes that arrive before the connection is dropped.
    """

    status: int = 0
    message: str = "by the script"
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    cut: int | None = None


@dataclass
class Blob:
    name: str
    size: int
    content: bytes = b""


@dataclass
class Dataset:
    """Versions newest last; `busy` polls of its status are answered with "processing" before the last one shows."""

    request: dict[str, Any]
    versions: list[dict[str, bytes]] = field(default_factory=list)
    coming: dict[str, bytes] | None = None
    busy: int = 0
    failed: bool = False


@dataclass
class Run:
    """How a kernel's run goes: so many polls in the queue, and its end."""

    polls: int = 2
    status: str = "COMPLETE"
    failure: str = ""
    log: str = '[{"time": 1.5, "data": "hello\\n"}, {"time": 61.0, "data": "done\\n"}]'
    files: tuple[str, ...] = ("submission.csv", "scores.parquet")


@dataclass
class Saved:
    request: dict[str, Any]
    run: Run


class RefusalError(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class FakeKaggle:
    def __init__(self) -> None:
        self.url = ""
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.blobs: dict[str, Blob] = {}
        self.received = 0  # bytes of all uploads
        self.datasets: dict[str, Dataset] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.instances: dict[str, list[dict[str, bytes]]] = {}
        self.kernels: dict[str, list[Saved]] = defaultdict(list)
        self.runs: deque[Run] = deque()  # of the versions to come; a good one where it is empty
        self.errors: dict[str, dict[str, Any]] = {}  # fields of an answer whose status is 200 all the same
        self.submissions: list[dict[str, Any]] = []
        self.scores: deque[dict[str, Any]] = deque()
        self.processing = 2  # polls
        self.lock = threading.RLock()

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def bodies(self, name: str) -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == name]

    def IntrospectToken(self, asked: Any) -> Any:
        return answer("IntrospectTokenResponse", active=asked.token == TOKEN, username=USER)

    # --- the store ---------------------------------------------------------------------------------------------------

    def StartBlobUpload(self, asked: Any) -> Any:
        token = f"token{len(self.blobs)}"
        self.blobs[token] = Blob(asked.name, asked.content_length)
        return answer("ApiStartBlobUploadResponse", token=token, createUrl=f"{self.url}/store/{token}")

    def put(self, token: str, ranged: str, content: bytes) -> tuple[int, dict[str, str]]:
        """Resumable upload: `bytes */N` asks how far it is, `bytes a-b/N` goes on, nothing begins."""
        blob = self.blobs.get(token)
        if blob is None:
            return 404, {}
        if not ranged.startswith("bytes */"):
            start = int(ranged.removeprefix("bytes ").split("-")[0]) if ranged else 0
            if start != len(blob.content):
                return 400, {}
            blob.content += content
            self.received += len(content)
        if len(blob.content) == blob.size:
            return 200, {}
        return 308, {"Range": f"bytes=0-{len(blob.content) - 1}"} if blob.content else {}

    def _unpacked(self, files: list[Any]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for one in files:
            blob = self.blobs.get(one.token)
            if blob is None or len(blob.content) != blob.size:
                raise RefusalError(400, f"no upload {one.token}")
            if blob.name.endswith(".zip"):
                with zipfile.ZipFile(io.BytesIO(blob.content)) as archive:
                    found |= {f"{blob.name[:-4]}/{name}": archive.read(name) for name in archive.namelist()}
            else:
                found[blob.name] = blob.content
        return found

    # --- datasets ----------------------------------------------------------------------------------------------------

    def _dataset(self, asked: Any) -> Dataset:
        found = self.datasets.get(f"{asked.owner_slug}/{asked.dataset_slug}")
        if found is None:
            raise RefusalError(403, "Permission 'datasets.get' was denied")
        return found

    def CreateDataset(self, asked: Any) -> Any:
        source = f"{asked.owner_slug}/{asked.slug}"
        if source in self.datasets:
            return answer("ApiCreateDatasetResponse", status="error", error="The requested title is already in use")
        if "CreateDataset" in self.errors:
            return answer("ApiCreateDatasetResponse", **self.errors.pop("CreateDataset"))
        files = self._unpacked(asked.files)
        self.datasets[source] = Dataset(asked.to_dict(), coming=files, busy=self.processing)
        return answer("ApiCreateDatasetResponse", status="ok", ref=source)

    def CreateDatasetVersion(self, asked: Any) -> Any:
        found = self._dataset(asked)
        if found.busy:
            raise RefusalError(403, "the dataset is being processed")
        found.coming, found.busy = self._unpacked(asked.body.files), self.processing
        return answer("ApiCreateDatasetResponse", status="ok")

    def GetDatasetStatus(self, asked: Any) -> Any:
        found = self._dataset(asked)
        if found.failed:
            return answer("ApiGetDatasetStatusResponse", status="FAILED")
        if found.busy:
            found.busy -= 1
            stage = list(DatabundleVersionStatus)[1 + found.busy % 4].name
            return answer("ApiGetDatasetStatusResponse", status=stage)
        if found.coming is not None:
            found.versions.append(found.coming)
            found.coming = None
        return answer("ApiGetDatasetStatusResponse", status="READY")

    def ListDatasetFiles(self, asked: Any) -> Any:
        listed = sorted(self._dataset(asked).versions[-1].items())
        page = int(asked.page_token or 0)  # of two entries, whatever is asked for
        files = [{"name": name, "totalBytes": len(content)} for name, content in listed[page : page + 2]]
        more = str(page + 2) if page + 2 < len(listed) else ""
        return answer("ApiListDatasetFilesResponse", datasetFiles=files, nextPageToken=more)

    def DownloadDataset(self, asked: Any) -> Any:
        files = self._dataset(asked).versions[-1]
        if asked.file_name not in files:
            raise RefusalError(404, f"no file {asked.file_name}")
        return files[asked.file_name]

    # --- models ------------------------------------------------------------------------------------------------------

    def CreateModel(self, asked: Any) -> Any:
        self.models[f"{asked.owner_slug}/{asked.slug}"] = asked.to_dict()
        return answer("ApiCreateModelResponse", ref=asked.slug)

    def GetModel(self, asked: Any) -> Any:
        if f"{asked.owner_slug}/{asked.model_slug}" not in self.models:
            raise RefusalError(404, "no such model")
        return answer("ApiModel", slug=asked.model_slug)

    def _instance(self, asked: Any, slug: str, framework: Any) -> str:
        short = framework.name.removeprefix("MODEL_FRAMEWORK_").replace("_", "").lower()
        return f"{asked.owner_slug}/{asked.model_slug}/{short}/{slug}".lower()

    def CreateModelInstance(self, asked: Any) -> Any:
        if f"{asked.owner_slug}/{asked.model_slug}" not in self.models:
            raise RefusalError(404, "no such model")
        key = self._instance(asked, asked.body.instance_slug, asked.body.framework)
        self.instances[key] = [self._unpacked(asked.body.files)]
        return answer("ApiCreateModelResponse", ref=key)

    def CreateModelInstanceVersion(self, asked: Any) -> Any:
        key = self._instance(asked, asked.instance_slug, asked.framework)
        self.instances[key].append(self._unpacked(asked.body.files))
        return answer("ApiCreateModelResponse", ref=key)

    def GetModelInstance(self, asked: Any) -> Any:
        versions = self.instances.get(self._instance(asked, asked.instance_slug, asked.framework))
        if versions is None:
            raise RefusalError(404, "no such instance")
        return answer("ApiModelInstance", slug=asked.instance_slug, versionNumber=len(versions))

    def ListModelInstanceVersionFiles(self, asked: Any) -> Any:
        files = self.instances[self._instance(asked, asked.instance_slug, asked.framework)][-1]
        made = [{"name": name, "size": len(content)} for name, content in files.items()]
        return answer("ApiListModelInstanceVersionFilesResponse", files=made)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def SaveKernel(self, asked: Any) -> Any:
        versions = self.kernels[asked.slug]
        versions.append(Saved(asked.to_dict(), self.runs.popleft() if self.runs else Run()))
        ready = {source for source, found in self.datasets.items() if found.versions}
        said: dict[str, Any] = {"ref": asked.slug, "url": f"{self.url}/v{len(versions)}"}
        said["invalidDatasetSources"] = [one for one in asked.dataset_data_sources if one not in ready]
        said |= {"versionNumber": len(versions), **self.errors.pop("SaveKernel", {})}
        return answer("ApiSaveKernelResponse", **said)

    def _saved(self, asked: Any) -> list[Saved]:
        versions = self.kernels.get(f"{asked.user_name}/{asked.kernel_slug}")
        if not versions:
            raise RefusalError(404, "no such kernel")
        return versions

    def GetKernel(self, asked: Any) -> Any:
        versions = self._saved(asked)
        saved = versions[-1].request
        same = {"enableInternet", "isPrivate", "machineShape"}
        metadata = {name: value for name, value in saved.items() if name in same or name.endswith("DataSources")}
        metadata["currentVersionNumber"] = len(versions)
        source = json.dumps(json.loads(saved["text"]), indent=4) if saved["kernelType"] == "notebook" else saved["text"]
        return answer("ApiGetKernelResponse", metadata=metadata, blob={"source": source})

    def GetKernelSessionStatus(self, asked: Any) -> Any:
        run = self._saved(asked)[-1].run
        if run.polls:
            run.polls -= 1
            return answer("ApiGetKernelSessionStatusResponse", status="RUNNING" if run.polls else "QUEUED")
        return answer("ApiGetKernelSessionStatusResponse", status=run.status, failureMessage=run.failure)

    def ListKernelSessionOutput(self, asked: Any) -> Any:
        run = self._saved(asked)[-1].run
        files = [{"fileName": name, "url": f"{self.url}/out/{name}"} for name in run.files]
        return answer("ApiListKernelSessionOutputResponse", files=files, log=run.log)

    # --- competitions ------------------------------------------------------------------------------------------------

    def CreateCodeSubmission(self, asked: Any) -> Any:
        versions = self.kernels[f"{asked.kernel_owner}/{asked.kernel_slug}"]
        run = versions[asked.kernel_version - 1].run
        if asked.file_name not in run.files or run.status != "COMPLETE":
            raise RefusalError(400, f"this version has no {asked.file_name}")
        if "CreateCodeSubmission" in self.errors:
            return answer("ApiCreateCodeSubmissionResponse", **self.errors.pop("CreateCodeSubmission"))
        ref = 1000 + len(self.submissions)
        end = self.scores.popleft() if self.scores else {"status": "COMPLETE", "publicScore": "0.98765"}
        self.submissions.append({"ref": ref, "description": asked.submission_description, "polls": 2, "end": end})
        return answer("ApiCreateCodeSubmissionResponse", message="Successfully submitted", ref=ref)

    def ListSubmissions(self, asked: Any) -> Any:
        listed = []
        for one in reversed(self.submissions):
            end = {"status": "PENDING"} if one["polls"] else one["end"]
            one["polls"] = max(0, one["polls"] - 1)
            listed.append({"ref": one["ref"], "description": one["description"], **end})
        return answer("ApiListSubmissionsResponse", submissions=listed)


def answer(kind: str, **fields: Any) -> dict[str, Any]:
    """The JSON of an answer, through the SDK's class: a field that it does not know is a mistake of this file."""
    made = _type(kind)
    unknown = set(fields) - {one.json_name for one in made._fields}
    assert not unknown, f"{kind} has no {unknown}"
    found: dict[str, Any] = made.from_dict(fields).to_dict()
    return found


def _type(*kinds: str) -> Any:
    return next(getattr(module, kind) for module in TYPES for kind in kinds if hasattr(module, kind))


class _Handler(BaseHTTPRequestHandler):
    kaggle: FakeKaggle

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        name = self.path.rpartition("/")[2]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.kaggle.lock:
            self.kaggle.calls.append((name, body))
            fault = self.kaggle.faults[name].popleft() if self.kaggle.faults[name] else None
            if fault and not fault.after:
                self._fail(fault)
                return
            basic = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
            if name != "IntrospectToken" and self.headers.get("Authorization") not in (basic, f"Bearer {TOKEN}"):
                self._json(401, {"code": 401, "message": "Unauthenticated"})
                return
            request = _type(f"Api{name}Request", f"{name}Request")
            unknown = set(body) - {one.json_name for one in request._fields}
            assert not unknown, unknown
            try:
                found = getattr(self.kaggle, name)(request.from_dict(body))
            except RefusalError as refusal:
                self._json(refusal.status, {"code": refusal.status, "message": refusal.message})
                return
        if fault:
            self._fail(fault)
        elif isinstance(found, bytes):
            self._send(200, found, {"Content-Type": "application/octet-stream"})
        else:
            self._json(200, found)

    def do_PUT(self) -> None:
        token, length = self.path.rpartition("/")[2], int(self.headers.get("Content-Length", 0))
        with self.kaggle.lock:
            self.kaggle.calls.append(("PUT", {"token": token, "range": self.headers.get("Content-Range", "")}))
            fault = self.kaggle.faults["PUT"].popleft() if length and self.kaggle.faults["PUT"] else None
            content = self.rfile.read(length if fault is None or fault.cut is None else fault.cut)
            if fault is None or fault.cut is not None:
                status, headers = self.kaggle.put(token, self.headers.get("Content-Range", ""), content)
        if fault:
            self._fail(fault)
        else:
            self._send(status, b"", headers)

    def _fail(self, fault: Fault) -> None:
        if fault.status:
            self._json(fault.status, {"code": fault.status, "message": fault.message}, fault.headers)
        else:
            self.close_connection = True

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    broken: list[BaseException]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # a killed client's
            self.broken.append(error)


@contextmanager
def serve() -> Iterator[FakeKaggle]:
    kaggle = FakeKaggle()
    handler = type("Handler", (_Handler,), {"kaggle": kaggle})
    server = _Server(("127.0.0.1", 0), handler)
    server.broken = []
    kaggle.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield kaggle
    finally:
        server.shutdown()
        server.server_close()
    assert not server.broken, server.broken
