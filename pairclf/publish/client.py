"""Requests to Kaggle through its own client, for `push`, `submit` and the ledger.

Only this module imports `kaggle` and `kagglesdk`. Metadata go through that client's validators and requests. This
module adds a limit to every wait, uploads that can be resumed, and errors in answers of status 200. The client finds
the credentials; they are neither stored nor printed.
"""

from __future__ import annotations

import inspect
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pairclf.console import console
from pairclf.errors import PackagingError

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
Upload = Callable[[Path], str]
"""Uploads a file, and returns its token for a request."""

ATTEMPTS = 6
"""Attempts of a request that was lost or rate-limited."""

FAILED_KERNEL = ("ERROR", "CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED")
_STORES = ("kaggle.com", "storage.googleapis.com", "www.googleapis.com")
"""Hosts, and those below them, to which Kaggle sends an upload's bytes."""
_TIMEOUT = (30.0, 300.0)  # seconds to connect, and between two bytes of an answer
_LONGEST_PAUSE = 900.0  # seconds, whatever Retry-After says
_PAGE = 200  # entries
_REPEATABLE = ("Get", "List", "Download", "Start", "Introspect")  # requests that change nothing when sent twice
_IMPORT = threading.Lock()


@dataclass(frozen=True, slots=True)
class WaitClock:
    """Sleeps and measures seconds; injected, so that tests need not wait."""

    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


class KaggleError(PackagingError):
    """Kaggle refused a request (`status`: of HTTP), or was not reached (`None`)."""

    def __init__(self, what: str, *, status: int | None, remedy: str | None = None) -> None:
        self.status = status
        super().__init__(what, remedy=remedy)

    @property
    def may_succeed_later(self) -> bool:
        """Whether the request may have succeeded, or may succeed when it is repeated."""
        return self.status is None or self.status >= 500


@dataclass(frozen=True, slots=True)
class KaggleKernel:
    """The newest version of a kernel on Kaggle: its source and inputs."""

    version: int
    source: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KernelOutput:
    """The output of a kernel's last run: names of files, and the log."""

    files: list[str]
    log: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of the log: `time` in seconds since the start, `data` the text. Empty if it is not JSON."""
        try:
            events = json.loads(self.log)
        except ValueError:
            return []
        return [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []

    @property
    def seconds(self) -> float | None:
        """Duration of the run, by the log's last line."""
        times = [float(event["time"]) for event in self.events if "time" in event]
        return max(times, default=None)

    @property
    def text(self) -> str:
        return "".join(str(event.get("data", "")) for event in self.events) or self.log


class KaggleClient:
    """Requests to Kaggle, in this package's terms.

    Every method raises `KaggleError` where Kaggle refuses or is not reached, and `PackagingError` where its client
    finds the metadata wrong.

    Args:
        clock: for waits.
        pretend: answers instead of Kaggle, and nothing is sent: a dry run; `None`: requests are sent.
    """

    def __init__(
        self, clock: WaitClock, pretend: Callable[[requests.PreparedRequest], requests.Response] | None = None
    ) -> None:
        self.clock = clock
        self.dry = pretend is not None
        self._pretend = pretend
        self._extended = _import_client()
        self._api = self._extended.KaggleApi()
        self._connect = self._api.build_kaggle_client
        # Its methods look these up on the object: connections with limits, and one place where requests are repeated.
        self._api.build_kaggle_client = self._client
        self._api.with_retry = lambda function: function
        self._sign_in()

    def _sign_in(self) -> None:
        if self.dry:
            self._api.config_values = {"username": "", "key": ""}
            return
        said = io.StringIO()  # the client's own help, of which the remedy below is the short form
        try:
            with _IMPORT, redirect_stdout(said), _kaggle_errors("signing in"):
                self._api.authenticate()
        except SystemExit as error:
            raise PackagingError(
                "Kaggle's client finds no valid credentials",
                remedy="`kaggle auth login`, or a token from kaggle.com/settings in KAGGLE_API_TOKEN",
            ) from error

    @property
    def user(self) -> str:
        return str(self._api.config_values.get("username", ""))

    def say(self, text: str) -> None:
        """Print a status; a dry run prints none."""
        if not self.dry:
            console.print(text)

    # --- on the wire -------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        client = self._connect()
        http = client.http_client()
        http._init_session()
        http._session.send = partial(self.send, http._session.send)
        return client

    def send(
        self, send: Callable[..., requests.Response], request: requests.PreparedRequest, **settings: Any
    ) -> requests.Response:
        """Send one request; repeat it after 429, and if it was lost and changes nothing."""
        from requests import exceptions

        if self._pretend is not None:
            return self._pretend(request)
        settings["timeout"] = _TIMEOUT
        name = "Upload" if request.method == "PUT" else str(request.url).rpartition("/")[2]
        for attempt in range(1, ATTEMPTS + 1):
            response, lost = None, None
            try:
                response = send(request, **settings)
            except (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError) as error:
                lost = error
            limited = response is not None and response.status_code == 429
            broken = response is None or response.status_code >= 500
            if attempt == ATTEMPTS or not (limited or (broken and name.startswith(_REPEATABLE))):
                break
            pause = (_retry_after(response) if limited else None) or 2.0**attempt
            reason = "too many requests" if limited else "no answer"
            console.print(f"{name}: {reason}; again in {pause:.0f} s ({attempt} of {ATTEMPTS - 1})")
            self.clock.sleep(pause)
        if lost is not None:
            raise lost
        assert response is not None
        return response

    def wait(self, what: str, limit: float, look: Callable[[], T | None]) -> T:
        """Call `look` until it returns something else than `None`, and return that.

        `look` is called after 5 s, 8 s, ... and at last once a minute, for `limit` seconds.

        Raises:
            PackagingError: it did not happen in time.
        """
        start, pause = self.clock.now(), 5.0
        while (result := look()) is None:
            waited = self.clock.now() - start
            if pause == 5.0:
                console.print(f"waiting for {what}, at most {limit / 60:,.0f} min")
            if waited > limit:
                raise PackagingError(
                    f"waited {waited / 60:,.0f} min for {what}, without success",
                    remedy="look at its page on Kaggle, then run the same command again to continue",
                )
            self.clock.sleep(pause)
            pause = min(60.0, pause * 1.6)
        return result

    def retry(self, what: str, step: Callable[[], T]) -> T:
        """Run `step`, and repeat it if a request was lost. `step` checks the state before it changes anything."""
        for attempt in range(1, ATTEMPTS):
            try:
                return step()
            except KaggleError as error:
                if not error.may_succeed_later:
                    raise
                console.print(f"{what}: {error.what}; looking again in {2**attempt} s")
                self.clock.sleep(2.0**attempt)
        return step()

    # --- datasets ----------------------------------------------------------------------------------------------------

    def dataset_status(self, source: str) -> str | None:
        """`ready`, `failed`, or a stage between; `None`: no such dataset, for which Kaggle answers 403."""
        return _none_if_missing((403, 404), f"the status of {source}", lambda: str(self._api.dataset_status(source)))

    def dataset_files(self, source: str) -> dict[str, int]:
        """`{path: bytes}` of the newest version."""

        def page(token: str) -> tuple[list[Any], str]:
            answer = self._api.dataset_list_files(source, page_token=token, page_size=_PAGE)
            _refuse(answer.error_message, f"the files of {source}")
            return answer.files, answer.next_page_token

        with _kaggle_errors(f"the files of {source}"):
            return {file.name: file.total_bytes for file in _pages(page)}

    def download(self, source: str, name: str, target: Path) -> None:
        """Download one file of the dataset's newest version."""
        from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

        request = ApiDownloadDatasetRequest()
        request.owner_slug, _, request.dataset_slug = source.partition("/")
        request.file_name = name
        with _kaggle_errors(f"downloading {name} of {source}"), self._client() as client:
            response = client.datasets.dataset_api_client.download_dataset(request)
            self._api.download_file(response, str(target), client.http_client(), quiet=True)

    def create_dataset(self, folder: Path, upload: Upload) -> None:
        """Create a private dataset of the files in `folder`, by its dataset-metadata.json; it holds no folders."""
        what = f"creating the dataset of {folder.name}"
        self._create(what, self._api.dataset_create_new, str(folder), upload=upload, public=False)

    def create_version(self, folder: Path, notes: str, upload: Upload) -> None:
        """Create a new version of the dataset that dataset-metadata.json names; the older ones stay."""
        self._create(
            f"a new version of {folder.name}", self._api.dataset_create_version, str(folder), notes, upload=upload
        )

    def _create(self, what: str, create: Callable[..., Any], *arguments: str, upload: Upload, **settings: bool) -> None:
        """Let the client create something, and upload its files by `upload`.

        Its own upload begins a lost file from scratch, and leaves out one that failed.
        """
        self._api._upload_blob = lambda path, *_, **__: upload(Path(path))
        try:
            with _kaggle_errors(what):
                answer = create(*arguments, quiet=True, dir_mode="zip", **settings)
                _refuse(answer.error, what, getattr(answer, "status", "ok"))
        finally:
            del self._api._upload_blob

    def start_upload(self, path: Path, *, model: bool) -> tuple[str, str]:
        """Start an upload; returns the address for the bytes and the file's token."""
        from kagglesdk.blobs.types.blob_api_service import ApiBlobType, ApiStartBlobUploadRequest

        request = ApiStartBlobUploadRequest()
        request.type = ApiBlobType.MODEL if model else ApiBlobType.DATASET
        request.name = path.name
        request.content_length = path.stat().st_size
        request.last_modified_epoch_seconds = int(path.stat().st_mtime)
        with _kaggle_errors(f"uploading {path.name}"), self._client() as client:
            answer = client.blobs.blob_api_client.start_blob_upload(request)
        return answer.create_url, answer.token

    def check_store(self, url: str) -> None:
        """Refuse to send a file's bytes to an address that is none of Kaggle's.

        Raises:
            PackagingError: the address has neither the origin to which the client sends its requests, nor https and
                the host of a store that Kaggle uses.
        """
        from kagglesdk.kaggle_env import get_endpoint, get_env

        target, own = urlsplit(url), urlsplit(get_endpoint(get_env()))
        host = (target.hostname or "").lower()
        is_store = any(host == store or host.endswith(f".{store}") for store in _STORES)
        plain = target.scheme == "https" and target.netloc.lower() in (host, f"{host}:443")
        if not (plain and is_store) and (target.scheme, target.netloc) != (own.scheme, own.netloc):
            raise PackagingError(
                f"upload address {target.scheme}://{target.netloc[-100:]} is none of {', '.join(_STORES)}",
                remedy="nothing was sent there; push again from another network, and report it if it stays",
            )

    # --- models ------------------------------------------------------------------------------------------------------

    def has_model(self, model: str) -> bool:
        """Whether there is `owner/model`."""
        asked = _none_if_missing((403, 404), f"the model {model}", lambda: self._api.model_get(model))
        return asked is not None

    def instance_version(self, instance: str) -> int | None:
        """The newest version of `owner/model/framework/instance`; `None`: no such instance."""
        what = f"the model instance {instance}"
        instance_info = _none_if_missing((403, 404), what, lambda: self._api.model_instance_get(instance))
        return None if instance_info is None else int(instance_info.version_number)

    def instance_files(self, instance: str) -> set[str]:
        """The paths in its newest version; empty as long as none can be listed."""

        def page(token: str) -> tuple[list[Any], str]:
            answer = self._api.model_instance_files(instance, page_token=token, page_size=_PAGE)
            return answer.files, answer.nextPageToken

        what = f"the files of {instance}"
        return _none_if_missing((404,), what, lambda: {file.name for file in _pages(page)}) or set()

    def create_model(self, folder: Path) -> None:
        """Create a model by model-metadata.json in `folder`."""
        with _kaggle_errors(f"creating the model of {folder.name}"):
            _refuse(self._api.model_create_new(str(folder)).error, "creating the model")

    def create_instance(self, folder: Path, upload: Upload) -> None:
        """Create a model instance by model-instance-metadata.json in `folder`."""
        what = f"creating the model instance of {folder.name}"
        self._create(what, self._api.model_instance_create, str(folder), upload=upload)

    def create_instance_version(self, instance: str, folder: Path, notes: str, upload: Upload) -> None:
        create = self._api.model_instance_version_create
        self._create(f"a new version of {instance}", create, instance, str(folder), notes, upload=upload)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def push_kernel(self, folder: Path, *, run: bool = True) -> tuple[int, str]:
        """Save the kernel in `folder` as a new version, which starts its run; `run=False`: it starts none.

        Returns:
            The version, and the address of its page.

        Raises:
            KaggleError: also where the answer, of status 200, names an error or sources that are not attached.
            PackagingError: `run=False`, and the client is older than 2.2.5.
        """
        options = {} if run else {"no_run": True}
        if options.keys() - inspect.signature(self._api.kernels_push).parameters.keys():
            raise PackagingError(
                "--no-run needs kaggle 2.2.5 or newer", remedy="pip install -U kaggle, or push without it"
            )
        with _kaggle_errors("pushing the kernel"):
            answer = self._api.kernels_push(str(folder), **options)
            _refuse(answer.error, "pushing the kernel")
            kinds = ("dataset", "competition", "kernel", "model")
            invalid = {kind: getattr(answer, f"invalid_{kind}_sources") or [] for kind in kinds}
            named = [f"{kind} {source}" for kind, sources in invalid.items() for source in sources]
            if named:
                raise KaggleError(
                    f"Kaggle did not attach {', '.join(named)}",
                    status=200,
                    remedy="check the slugs, accept rules and licences on the site, and push again",
                )
        version = int(answer.version_number or 0)
        if version < 1:
            raise KaggleError("Kaggle did not say which version of the kernel it made", status=None)
        return version, str(answer.url)

    def kernel(self, source: str) -> KaggleKernel | None:
        """The newest version of `owner/slug`; `None`: no such kernel."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        request = ApiGetKernelRequest()
        request.user_name, _, request.kernel_slug = source.partition("/")

        def ask() -> Any:
            with self._client() as client:
                return client.kernels.kernels_api_client.get_kernel(request)

        answer = _none_if_missing((403, 404), f"the kernel {source}", ask)
        if answer is None or answer.metadata is None or answer.blob is None:
            return None
        metadata = answer.metadata.to_dict()
        version = int(metadata.get("currentVersionNumber") or 0)
        return KaggleKernel(version, answer.blob.source, metadata) if version else None

    def kernel_status(self, source: str) -> tuple[str, str]:
        """`QUEUED`, `RUNNING`, `COMPLETE` or one of `FAILED_KERNEL`, and Kaggle's message about a failure."""
        with _kaggle_errors(f"the status of {source}"):
            answer = self._api.kernels_status(source)
        return answer.status.name, answer.failure_message or ""

    def kernel_output(self, source: str) -> KernelOutput:
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        logs: list[str] = []

        def page(token: str) -> tuple[list[Any], str]:
            request = ApiListKernelSessionOutputRequest()
            request.user_name, _, request.kernel_slug = source.partition("/")
            request.page_size, request.page_token = _PAGE, token
            with self._client() as client:
                answer = client.kernels.kernels_api_client.list_kernel_session_output(request)
            logs.append(answer.log or "")
            return answer.files, answer.next_page_token

        with _kaggle_errors(f"the output of {source}"):
            files = [file.file_name for file in _pages(page)]
        return KernelOutput(files, logs[0])

    # --- competitions ------------------------------------------------------------------------------------------------

    def submit(self, competition: str, kernel: str, version: int, file: str, description: str) -> int:
        """Submit one version of a kernel to a code competition; returns the submission's number."""
        with _kaggle_errors(f"submitting {kernel}, version {version}, to {competition}"):
            answer = self._api.competition_submit_code(
                file, description, competition=competition, kernel=kernel, kernel_version=version, quiet=True
            )
            if not answer.ref:
                _refuse(answer.message or "no submission was made", "submitting")
        return int(answer.ref)

    def submissions(self, competition: str) -> list[Mapping[str, Any]]:
        """The user's newest submissions, newest first: `ref`, `status`, `publicScore`, `description`, ..."""
        with _kaggle_errors(f"the submissions to {competition}"):
            entries = self._api.competition_submissions(competition, page_size=_PAGE) or []
        return [entry.to_dict(ignore_defaults=False) for entry in entries]


def _import_client() -> Any:
    """Import the client's module. Its import would sign in over the network: that is done later."""
    try:
        from kagglesdk.kaggle_http_client import KaggleHttpClient
    except ImportError as error:
        raise PackagingError("the package kaggle is not installed", remedy="pip install 'pairclf[kaggle]'") from error
    with _IMPORT, redirect_stdout(io.StringIO()):
        call = KaggleHttpClient.call
        KaggleHttpClient.call = _not_yet
        try:
            from kaggle.api import kaggle_api_extended
        except (ImportError, OSError) as error:
            raise PackagingError(
                f"Kaggle's client can't be imported: {error}",
                remedy="pip install 'pairclf[kaggle]'; KAGGLE_CONFIG_DIR names a folder that it may write to",
            ) from error
        finally:
            KaggleHttpClient.call = call
    return kaggle_api_extended


def _not_yet(*_: object, **__: object) -> None:
    raise RuntimeError("nothing is sent for an import")


def _retry_after(response: requests.Response | None) -> float | None:
    text = "" if response is None else response.headers.get("Retry-After", "")
    return min(_LONGEST_PAUSE, float(text)) if text.isdecimal() else None


@contextmanager
def _kaggle_errors(what: str) -> Iterator[None]:
    """Turn errors of the client and of requests into ours, with Kaggle's message."""
    from requests import exceptions

    try:
        yield
    except exceptions.HTTPError as error:
        status = None if error.response is None else error.response.status_code
        refused = f"Kaggle refused {what}: {status}, {_message(error)}"
        raise KaggleError(refused, status=status, remedy=_REMEDIES.get(status or 0)) from error
    except exceptions.RequestException as error:
        raise KaggleError(
            f"Kaggle was not reached for {what}: {type(error).__name__}",
            status=None,
            remedy="run the same command again to continue",
        ) from error
    except (ValueError, KeyError) as error:
        raise PackagingError(
            f"Kaggle's client refused {what}: {error}", remedy="change it and package again"
        ) from error


_REMEDIES = {
    401: "the credentials are not valid: get a new token from kaggle.com/settings",
    403: "are they the owner's credentials, and were the competition's rules and the licences accepted on the site?",
    404: "check the slug",
    429: "wait some minutes, and run the same command again to continue",
}


def _message(error: requests.HTTPError) -> str:
    """The answer's message, without the address that requests adds."""
    if error.response is None:
        return "no answer"
    try:
        return str(error.response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.response.reason)


def _refuse(said: str | None, what: str, status: str | None = "ok") -> None:
    """Raise an error that an answer of HTTP status 200 holds.

    Raises:
        KaggleError: it does.
    """
    if said or (status or "ok").lower() == "error":
        raise KaggleError(f"Kaggle refused {what}: {said or status}", status=200)


def _none_if_missing(missing: tuple[int, ...], what: str, ask: Callable[[], T]) -> T | None:
    """The answer of `ask`; None if Kaggle answers that it does not exist."""
    try:
        with _kaggle_errors(what):
            return ask()
    except KaggleError as error:
        if error.status in missing:
            return None
        raise


def _pages(page: Callable[[str], tuple[list[Any], str]]) -> Iterator[Any]:
    """The entries of all pages; `page` takes a token and returns its entries and the next token."""
    token = ""
    while True:
        entries, token = page(token)
        yield from entries or []
        if not token:
            return
