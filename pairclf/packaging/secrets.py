"""Secrets: what no file may carry that leaves this machine: credentials, and who works on it and where.

Two kinds are looked for. Whatever has the form of a credential, in all that was made here. And this machine's own:
its credentials where the clients keep them, its folders, its user's and its host's name. A finding names the file, the
line and the kind, and never shows what was found.

Not everything is looked through for everything, as a refusal must mean something:

    tokenizers, third-party wheels, binary      may hold any word: credentials and this machine's folders alone
    probe rows of a bundle                      are people's prompts, and may hold paths: this machine's credentials
    weights (safetensors)                       are numbers: their header alone
    a name that is a word of our own sources    is found where it stands for a user or a host: /adam/, ~adam, adam@
"""

from __future__ import annotations

import getpass
import io
import json
import mmap
import netrc
import os
import re
import socket
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pairclf
from pairclf.errors import PackagingError
from pairclf.model.bundle import MANIFEST
from pairclf.packaging.sources import checkout, shipped

FORMS = {
    "a Kaggle token": rb"\bKGAT_[A-Za-z0-9_-]{16,}",
    "a Kaggle key": rb"""(?i:\bkaggle_key|\bkey)[\\"'\]]*\s*[:=]\s*[\\"']*[0-9a-f]{32}(?![0-9a-f])""",
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})",
    "a W&B key": rb"""(?i:\bwandb_api_key|\bwandb\.login\(\s*key)[\\"'\]]*\s*[:=]\s*[\\"']*[0-9a-f]{40}\b""",
    "an API key": rb"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{32,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
"""Credentials by their form."""

VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "WANDB_API_KEY"),
    *("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "GH_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
)
"""Environment variables that hold credentials."""

_COMMON = """
admin build builder cloud colab container debian default docker fedora host jenkins jovyan kaggle linux local localhost
machine main nobody node notebook python root runner server test tester ubuntu user vagrant vscode work worker workspace
"""
ANYBODY = frozenset(_COMMON.split())
"""Names that tell nothing of anybody."""

_SHORTEST_NAME, _SHORTEST_CREDENTIAL = 4, 8  # letters; a shorter one is found everywhere
_SHOWN = 10  # findings
_WHOLE = rb"(?<![A-Za-z0-9])%s(?![A-Za-z0-9])"
_FOLDER = rb"(?<![A-Za-z0-9])%s(?![A-Za-z0-9._-])"  # /home/me is none in /home/me-too
_AS_NAME = rb"(?:(?<=[/\\])%s(?=[/\\])|(?<=~)%s(?![A-Za-z0-9])|(?<![A-Za-z0-9])%s@|(?<=@)%s(?![A-Za-z0-9]))"
_IN_LIBRARIES = "a private key"  # its first line stands in every library that reads one, and in their tests
_HEAD = 8192  # bytes, of which a file's kind is told


@dataclass(frozen=True, slots=True)
class Search:
    """Patterns by kind, in the order of their weight."""

    credentials: dict[str, re.Pattern[bytes]]
    """This machine's."""
    binary: dict[str, re.Pattern[bytes]]
    """The above, forms, and this machine's folders, two levels deep or deeper: nobody else has them."""
    everything: dict[str, re.Pattern[bytes]]
    """The above, home, and names."""

    @property
    def library(self) -> dict[str, re.Pattern[bytes]]:
        return {kind: pattern for kind, pattern in self.binary.items() if kind != _IN_LIBRARIES}


def refuse_secrets(folder: Path, owner: str, parts: Iterable[str]) -> None:
    """Look through all that would be uploaded.

    Args:
        folder: of the package.
        owner: the Kaggle user, whose name is in every address, and may be that of the user here.
        parts: names of the folders in it that are uploaded; its record and its rehearsal are not.

    Raises:
        PackagingError: names files, lines and kinds.
    """
    search = _search(owner)
    files = (path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file())
    found = list(dict.fromkeys(finding for path in files for finding in _findings(path, folder, search)))
    if found:
        lines = "\n".join(f"  {line}" for line in found[:_SHOWN])
        more = f"\n  and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
        raise PackagingError(
            f"what is to be uploaded holds what is nobody's business:\n{lines}{more}",
            remedy="take it out where it comes from (paths in settings: relative ones), and train or package again",
        )


# --- what is looked for ----------------------------------------------------------------------------------------------


def _search(owner: str) -> Search:
    credentials = {kind: _any_of(values) for kind, values in _credentials().items() if values}
    home, deep = Path.home(), [path for path in _folders() if len(path.parts) > 2]
    folders = {"a folder of this machine": _any_of(map(str, deep), _FOLDER)} if deep else {}
    at_home = {} if len(home.parts) < 2 else {"the home folder of this machine": _any_of([str(home)], _FOLDER)}
    forms = {kind: re.compile(pattern) for kind, pattern in FORMS.items()}
    binary = credentials | forms | folders
    return Search(credentials, binary, binary | at_home | dict(_names(owner)))


def _any_of(values: Iterable[str], whole: bytes = _WHOLE) -> re.Pattern[bytes]:
    """Any of these as whole words, as they are or as JSON writes them."""
    forms = {form for value in values for form in (value, json.dumps(value)[1:-1])}
    return re.compile(b"|".join(whole % re.escape(form.encode()) for form in sorted(forms)))


def _folders() -> Iterator[Path]:
    for path in (Path.home(), Path.cwd(), checkout(), Path(tempfile.gettempdir())):
        if path is not None and not path.is_relative_to("/kaggle"):  # which everybody has there
            yield from {path, path.resolve()}


def _names(owner: str) -> Iterator[tuple[str, re.Pattern[bytes]]]:
    """Patterns of user and host. One that is a word of our own sources (adam, gemma, mark) tells nothing by itself."""
    host = socket.gethostname()
    known, ours = ANYBODY | {owner.lower()}, _our_words()
    for kind, name in (("user", _user()), ("host", host), ("host", host.partition(".")[0])):
        if len(name) >= _SHORTEST_NAME and name.lower() not in known:
            literal = re.escape(name.encode())
            form = _AS_NAME if name.lower() in ours else _WHOLE
            yield f"the {kind}'s name of this machine", re.compile(form.replace(b"%s", literal), re.IGNORECASE)


def _our_words() -> set[str]:
    sources = [shipped("kaggle/notebook.py"), *Path(pairclf.__file__).parent.rglob("*.py")]
    return {word for path in sources for word in re.findall(r"[a-z0-9]+", path.read_text(encoding="utf-8").lower())}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        return ""


def _credentials() -> dict[str, list[str]]:
    """`{where it is kept: values}`, where Kaggle's, Hugging Face's and other clients look for them."""
    home = Path.home()
    kept = {f"the value of {name}": [os.environ.get(name, "")] for name in VARIABLES}
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "kaggle"
    folders = [home / ".kaggle", settings, *map(Path, filter(None, [os.environ.get("KAGGLE_CONFIG_DIR")]))]
    kept["the credential in kaggle.json"] = [_entry(one / "kaggle.json", "key") for one in folders]
    kept["the credential in access_token"] = [_content(one / "access_token") for one in folders]
    tokens = [_entry(one / "credentials.json", key) for one in folders for key in ("refresh_token", "access_token")]
    kept["a credential in .kaggle/credentials.json"] = tokens
    caches = [home / ".cache", *map(Path, filter(None, [os.environ.get("XDG_CACHE_HOME")]))]
    hubs = [*(one / "huggingface" for one in caches), *map(Path, filter(None, [os.environ.get("HF_HOME")]))]
    paths = [*(one / "token" for one in hubs), *map(Path, filter(None, [os.environ.get("HF_TOKEN_PATH")]))]
    kept["the credential of the Hugging Face client"] = [_content(path) for path in paths]
    kept["a password in .netrc"] = _passwords(home / ".netrc")
    return {kind: [one for one in values if len(one) >= _SHORTEST_CREDENTIAL] for kind, values in kept.items()}


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # none is kept there
        return ""


def _entry(path: Path, key: str) -> str:
    try:
        return str(json.loads(_content(path) or "{}").get(key) or "")
    except (ValueError, AttributeError):  # a file that Kaggle's client can't read either
        return ""


def _passwords(path: Path) -> list[str]:
    try:
        return [entry[2] or "" for entry in netrc.netrc(path).hosts.values()]
    except (OSError, netrc.NetrcParseError):
        return []


# --- where it is looked for ------------------------------------------------------------------------------------------


def _findings(path: Path, top: Path, search: Search) -> Iterator[str]:
    name = path.relative_to(top).as_posix()
    yield from _matches(name.encode(), f"{name}: its name", search.everything, lines=False)
    if path.suffix in (".whl", ".zip"):
        is_library = path.suffix == ".whl" and not path.name.startswith("pairclf-")
        patterns = search.library if is_library else search.everything
        yield from _archive(path, name, patterns)
    elif path.suffix == ".safetensors":
        yield from _matches(_header(path), f"{name}: its header", search.everything, lines=False)
    elif path.name == MANIFEST:
        yield from _manifest(path, name, search)
    else:
        yield from _content_findings(path, name, search)


def _content_findings(path: Path, name: str, search: Search) -> Iterator[str]:
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
        if not head:
            return
        is_binary = b"\0" in head
        by_chance = path.parent.name == "tokenizer" or (is_binary and not _is_wide(head))
        patterns = search.binary if by_chance else search.everything
        if _is_wide(head):
            yield from _matches(path.read_bytes().replace(b"\0", b""), name, patterns)
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield from _matches(content, name, patterns, lines=not is_binary)


def _is_wide(head: bytes) -> bool:
    """Whether it is text in UTF-16: every other byte of most letters is zero."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    few, many = sorted((head[::2].count(0), head[1::2].count(0)))
    return many > 0.4 * len(head) and few < 0.05 * len(head)


def _matches(
    content: bytes | mmap.mmap, where: str, patterns: dict[str, re.Pattern[bytes]], *, lines: bool = True
) -> Iterator[str]:
    """The first match of each kind."""
    for kind, pattern in patterns.items():
        if (found := pattern.search(content)) is not None:
            number = content[: found.start()].count(b"\n") + 1
            yield f"{where}{f', line {number}' if lines else ''}: {kind}"


def _header(path: Path) -> bytes:
    """The JSON before a safetensors file's weights; empty where it is none."""
    with path.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return start + stream.read(min(size, 100 << 20))  # the format's own limit of a header


def _manifest(path: Path, name: str, search: Search) -> Iterator[str]:
    """A bundle's manifest: its probe rows hold people's prompts."""
    text = path.read_bytes()
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        yield from _matches(text, name, search.everything)
        return
    yield from _matches(text, name, search.credentials)
    ours = json.dumps({key: value for key, value in tree.items() if key != "probes"}, ensure_ascii=False)
    yield from _matches(ours.encode(), name, search.everything, lines=False)


def _archive(path: Path, name: str, patterns: dict[str, re.Pattern[bytes]]) -> Iterator[str]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    except zipfile.BadZipFile:
        yield from _matches(path.read_bytes(), name, patterns)
        return
    with archive:
        for member in archive.namelist():
            yield from _matches(member.encode(), f"{name}: a name in it", patterns, lines=False)
            yield from _matches(archive.read(member), f"{name}: {member}", patterns)
