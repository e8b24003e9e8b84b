"""Upload a part to Kaggle: folders as archives, files of older versions, resumable uploads.

All state lies in this user's cache, under the build's identity, and none in the package: a package of another person
must not decide where bytes go, what was sent, or which folders are removed.

$XDG_CACHE_HOME/pairclf/uploads/IDENTITY/PART/        what is uploaded, without folders: FOLDER.zip, files, metadata
                                         PART.json    progress of each file
                                         PART-old/    files of older versions, which a new version would drop
                                         kernel/      the kernel with the versions of its models
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field

from pairclf.config import Section, checked
from pairclf.console import Advance, console, counted, progress
from pairclf.errors import ConfigError, PackagingError
from pairclf.files import (
    ZIP_EPOCH,
    atomic_file,
    cache_folder,
    check_name,
    locked,
    private_folder,
    sha256_file,
    write_private,
    zip_member,
)
from pairclf.packaging.build_record import Build, parse_json, read_marker
from pairclf.packaging.metadata import READ_BY_THE_CLIENT, PackagePart
from pairclf.publish.client import ATTEMPTS, KaggleClient, KaggleError

_COMPLETE = (200, 201)  # and 308 is: go on
_EXPIRED = 6 * 24 * 3600.0  # seconds; the store forgets an unfinished upload after a week


class FileUpload(Section):
    """The upload of one file."""

    sha256: str = Field(description="of its bytes, in hex")
    url: str = Field(description="where its bytes go")
    token: str = Field(description="stands for it in the request that makes the dataset or the model")
    since: float = Field(description="seconds since 1970")


class UploadState(Section):
    """Progress of a part's upload; without it, the upload starts again."""

    marker: str = Field(description="of the part; another one begins again")
    sent: bool = Field(False, description="whether Kaggle took the request that makes the version")
    blobs: dict[str, FileUpload] = Field({}, description="by file name")


@contextmanager
def upload_folder(build: Build, *, dry: bool) -> Iterator[Path]:
    """The folder for a build's uploads, locked against other processes; it stays until the upload is complete.

    `dry`: an empty folder instead, which is removed in any case.
    """
    top = private_folder(private_folder(cache_folder()) / "uploads")
    if dry:
        with TemporaryDirectory(dir=top, prefix="dry-") as scratch:
            yield Path(scratch)
        return
    with upload_lock(build):
        yield private_folder(top / build.identity)
        shutil.rmtree(top / build.identity)


@contextmanager
def upload_lock(build: Build) -> Iterator[None]:
    """Lock a build: only one process at a time pushes or submits it."""
    top = private_folder(private_folder(cache_folder()) / "uploads")
    with locked(top / f"{build.identity}.lock"):
        yield


class PartUpload:
    """The upload of a part of the folder `package`, which is only read; `uploads`: see `upload_folder`."""

    def __init__(self, package: Path, part: PackagePart, kaggle: KaggleClient, uploads: Path) -> None:
        self.part, self._kaggle = part, kaggle
        self.source = package / part.folder
        self.folder = uploads / part.folder
        self._old = uploads / f"{part.folder}-old"
        self._path = uploads / f"{part.folder}.json"
        self._state = self._read()

    @property
    def sent(self) -> bool:
        return self._state.sent

    def _read(self) -> UploadState:
        if self._path.is_file():
            try:
                state = checked(UploadState, parse_json(self._path), self._path, "")
            except (PackagingError, ConfigError) as error:
                console.print(f"note: the upload of {self.part.folder} begins again: {error.what}")
            else:
                if state.marker == self.part.marker:
                    return state
        return UploadState(marker=self.part.marker)

    def _write(self) -> None:
        write_private(self._path, self._state.model_dump_json(indent=2) + "\n")

    def mark_sent(self) -> None:
        self._state.sent = True
        self._write()

    def clear(self) -> None:
        """Remove the packed files: the part is uploaded."""
        for folder in (self.folder, self._old):
            shutil.rmtree(folder, ignore_errors=True)
        self._path.unlink(missing_ok=True)

    def complete(self, listed: Collection[str]) -> bool:
        """Whether one folder among `listed` holds the marker and every file that it names."""
        files = read_marker(self.source / self.part.marker)
        markers = (path for path in listed if path.rpartition("/")[2] == self.part.marker)
        roots = (path.removesuffix(self.part.marker) for path in markers)
        return any(all(f"{root}{name}" in listed for name in files) for root in roots)

    # --- what goes up ------------------------------------------------------------------------------------------------

    def pack(self, old: Mapping[str, Path]) -> None:
        """Fill `folder`: each folder of the part becomes an archive, which Kaggle unpacks.

        The client does the same with `-r zip`, but with another name and time in each run, so that no upload could be
        resumed. `old`: `{posix path: file}` of earlier builds.
        """
        own = {path.relative_to(self.source).as_posix(): path for path in self.source.rglob("*") if path.is_file()}
        groups: dict[str, dict[str, Path]] = {}
        for name, path in sorted({**old, **own}.items()):
            top, _, below = name.partition("/")
            groups.setdefault(top, {})[below] = path
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for top, files in groups.items():
            target = self.folder / (top if "" in files else f"{top}.zip")
            if "" in files:
                shutil.copyfile(files[""], target)
            else:
                _zip(files, target)
            os.utime(target, (ZIP_EPOCH, ZIP_EPOCH))

    def old_builds(self, listed: Mapping[str, int], size: int, top: int) -> dict[str, Path]:
        """The files of earlier builds, which a new version must also hold: their kernels look for them.

        Each earlier build moves into a folder of its own, named like its marker, so that no file of two builds can
        clash. A kernel finds it there: it looks for its marker at any depth, and for the files beside it.

        `listed`: `{path: bytes}` of the newest version; `size`, `top`: bytes and top-level entries that it may have.

        Returns:
            `{posix path: file}`, each compared with the hash in its marker.

        Raises:
            PackagingError: old and new together are over a limit; a file is not what its marker says.
        """
        old_files: dict[str, tuple[str, str]] = {}  # new path: old path, hash
        fetched: dict[str, Path] = {}
        for marker in sorted(filter(self._is_marker, listed)):
            root, _, name = marker.rpartition("/")
            if name == self.part.marker:  # this very part is there, and torn
                continue
            check_name(name, f"a file of {self.part.source}")
            home = name.removesuffix(".json")
            fetched[f"{home}/{name}"] = self._fetch(marker, f"{home}/{name}", None)
            for path, digest in read_marker(fetched[f"{home}/{name}"]).items():
                old_files[f"{home}/{path}"] = (f"{root}/{path}".lstrip("/"), digest)
        self._check_room(listed, old_files, len(fetched), size, top)
        for path, (old_path, digest) in old_files.items():
            fetched[path] = self._fetch(old_path, path, digest)
        return fetched

    def _is_marker(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        return name.startswith(f"pairclf-{self.part.payload}-") and name.endswith(".json")

    def _check_room(
        self, listed: Mapping[str, int], old_files: Mapping[str, tuple[str, str]], builds: int, size: int, top: int
    ) -> None:
        old_paths = {old_path for old_path, _ in old_files.values()}
        if unknown := [name for name in listed if name not in old_paths and not self._is_marker(name)]:
            console.print(
                f"note: {self.part.source} has {counted(len(unknown), 'file')} that no package put there, such as "
                f"{unknown[0]}; the new version is made without them, the older versions keep them"
            )
        old = sum(listed.get(name, 0) for name in old_paths)
        entries = builds + sum(path.name not in READ_BY_THE_CLIENT for path in self.source.iterdir())
        if self.part.bytes + old > size or entries > top:
            raise PackagingError(
                f"{self.part.source} would have {(self.part.bytes + old) / 1e9:,.1f} GB in {entries} entries with its "
                f"{builds} older builds; a dataset has at most {size / 1e9:,.1f} GB in {top}",
                remedy="change package.name; or delete the dataset on Kaggle, which older kernels will miss",
            )
        if old:
            console.print(f"{self.part.source}: {old / 1e9:,.2f} GB of {builds} older builds go along")

    def _fetch(self, name: str, path: str, digest: str | None) -> Path:
        """Download a file of the newest version below `PART-old`, unless an earlier run did."""
        target = self._old / path
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as temporary:
                self._kaggle.download(self.part.source, name, temporary)
                _unwrap(temporary, digest)
        if digest is not None and sha256_file(target) != digest:
            target.unlink()
            raise PackagingError(f"{name} of {self.part.source} is not what its marker says", remedy="run push again")
        return target

    # --- and how -----------------------------------------------------------------------------------------------------

    def upload(self, path: Path) -> str:
        """Upload a file, from where an earlier run stopped; returns its token.

        Raises:
            KaggleError: the store was not reached, or refused them, several times.
        """
        digest, blob = sha256_file(path), self._state.blobs.get(path.name)
        for attempt in range(1, ATTEMPTS + 1):
            fresh = blob is None or blob.sha256 != digest or time.time() - blob.since > _EXPIRED
            if blob is None or fresh:
                url, token = self._kaggle.start_upload(path, model=self.part.kind == "model")
                blob = FileUpload(sha256=digest, url=url, token=token, since=time.time())
                self._state.blobs[path.name] = blob
                self._write()
            done = self._put(path, blob.url, fresh=fresh)
            if done:
                return blob.token
            if done is None:  # the store knows nothing of it
                blob = None
            if attempt < ATTEMPTS:
                console.print(f"{path.name}: the upload was interrupted; retrying in {2**attempt} s")
                self._kaggle.clock.sleep(2.0**attempt)
        raise KaggleError(
            f"{path.name} could not be uploaded in {ATTEMPTS} tries",
            status=None,
            remedy="run the same command again to continue the upload",
        )

    def _put(self, path: Path, url: str, *, fresh: bool) -> bool | None:
        """Send the missing bytes. True: all are there; False: it broke off; `None`: the store forgot the upload."""
        import requests

        self._kaggle.check_store(url)
        size, start = path.stat().st_size, 0
        with requests.Session() as session:
            put = partial(self._request, session, url)
            if not fresh:
                status_response = put({"Content-Range": f"bytes */{size}", "Content-Length": "0"}, b"")
                if status_response is None or status_response.status_code >= 500:
                    return False
                if status_response.status_code in _COMPLETE:
                    return True
                if status_response.status_code != 308:
                    return None
                last = status_response.headers.get("Range", "").rpartition("-")[2]  # of `bytes=0-1023`
                start = int(last) + 1 if last.isdecimal() else 0
            headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
            title, visible = f"uploading {path.name}", not self._kaggle.dry
            with path.open("rb") as stream, progress(title, size, done=start, visible=visible) as advance:
                stream.seek(start)
                sent = put(headers, _ProgressReader(stream, size - start, advance))
        if sent is None or sent.status_code >= 500 or sent.status_code == 308:
            return False
        return True if sent.status_code in _COMPLETE else None

    def _request(self, session: Any, url: str, headers: Mapping[str, str], data: Any) -> Any:
        import requests

        request = session.prepare_request(requests.Request("PUT", url, headers=dict(headers), data=data))
        try:
            return self._kaggle.send(partial(session.send, allow_redirects=False), request)
        except requests.RequestException:  # what arrived is asked of the store
            return None


class _ProgressReader:
    """The rest of a file as a request's body of known length, which reports progress."""

    def __init__(self, stream: BufferedReader, size: int, advance: Advance) -> None:
        self._stream, self._size, self._advance = stream, size, advance

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        chunk = self._stream.read(size)
        self._advance(len(chunk))
        return chunk

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(1 << 20):
            yield chunk


def _zip(files: Mapping[str, Path], target: Path) -> None:
    """Write an archive without compression, which would not make weights smaller; equal files give equal bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, path in sorted(files.items()):
            member = zip_member(name)
            member.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(member, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _unwrap(path: Path, digest: str | None) -> None:
    """Unpack a file that Kaggle sent in an archive of its own."""
    if not zipfile.is_zipfile(path) or (digest is not None and sha256_file(path) == digest):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) == 1:
            content = archive.open(members[0])
            inner = path.with_name(f"{path.name}.inner")
            with content, inner.open("wb") as sink:
                shutil.copyfileobj(content, sink)
            os.replace(inner, path)
