"""The search for secrets that no uploaded file may contain: credentials, and this machine's user, host and folders.

Three kinds are searched for: anything that looks like a credential (`credential_forms.SECRET_FORMS`), in all files made
here; this machine's own credentials, folders, user name and host name; and home folders of anybody. A finding names
the file, the line and the kind, and never shows the secret.

To keep false alarms rare, some files are searched for less:

    tokenizers, binary files                    may contain any word: exact forms and this machine's folders only
    third-party wheels                          the same, without opening archives or decoding
    probe rows of a bundle                      are people's prompts, and may contain paths: own credentials only
    weights (safetensors)                       are numbers: only their header
    a name that is a word of our own sources    only where it names a user or a host: /adam/, ~adam, adam@

Archives are opened, and encoded text is decoded (`unpack`). Files that can't be searched are refused: pickles,
encrypted or damaged archives, and archives that unpack to too much.
"""

from __future__ import annotations

import getpass
import io
import json
import netrc
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pairclf
from pairclf.bundles.contents import MANIFEST, BundleFiles
from pairclf.errors import PackagingError
from pairclf.files import home_folder
from pairclf.own_files import checkout, shipped
from pairclf.packaging.credential_forms import SECRET_FORMS, VARIABLES, SecretForm, WordIndex, literal_form
from pairclf.packaging.unpack import (
    UnpackBudget,
    UnpackedFile,
    UnsearchableError,
    decoded,
    header,
    is_pickle,
    packed_in_base64,
    pieces,
    unpacked_files,
)

_COMMON = """
admin build builder cloud colab container debian default docker fedora host jenkins jovyan kaggle linux local localhost
machine main nobody node notebook python root runner server test tester ubuntu user vagrant vscode work worker workspace
"""
_IN_PATHS = """
all circleci conda example me name oem public shared someone travis user_name username vsts you your-name yourname
"""
ANYBODY = frozenset(_COMMON.split())
"""Common user and host names, which identify nobody."""

_SHORTEST_NAME, _SHORTEST_CREDENTIAL = 4, 8  # letters; shorter ones would match anywhere
_SHOWN = 10  # findings
_WHOLE = rb"(?<![A-Za-z0-9])%s(?![A-Za-z0-9])"
_FOLDER = rb"(?<![A-Za-z0-9])%s(?![A-Za-z0-9._-])"  # /a/b is none in /a/b-c
_AS_NAME = rb"(?:(?<=[/\\])%s(?=[/\\])|(?<=~)%s(?![A-Za-z0-9])|(?<![A-Za-z0-9])%s@|(?<=@)%s(?![A-Za-z0-9]))"
_ANYBODYS = (
    rb"(?i)(?<![A-Za-z0-9._-])(?:(?:/(?:var|mnt|export|data|nfs|lustre|[a-z]|mnt/[a-z]))?/(?:home|Users)|[A-Za-z]:[\\/]{1,4}Users)[\\/]{1,4}"
    rb"(?!(?:%s)(?![A-Za-z0-9._-]))[a-z0-9_][a-z0-9._-]+"
)
_IN_LIBRARIES = "a private key"  # its first line is in every library that reads keys, and in their tests
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt")
_HEAD = 8192  # bytes, from which a file's kind is detected


@dataclass(frozen=True, slots=True)
class SecretForms:
    """The forms to search for, by kind of file."""

    credentials: tuple[SecretForm, ...]
    """This machine's."""
    binary: tuple[SecretForm, ...]
    """The above, exact forms, and this machine's folders of at least two levels, which are unique to it."""
    everything: tuple[SecretForm, ...]
    """The above, all forms, home, anybody's home, and names."""

    @property
    def library(self) -> tuple[SecretForm, ...]:
        return tuple(form for form in self.binary if form.kind != _IN_LIBRARIES)


def refuse_secrets(folder: Path, owner: str, parts: Iterable[str]) -> None:
    """Search all files to be uploaded.

    Args:
        folder: of the package, which has these `parts`.
        owner: the Kaggle user, whose name is in every address and may equal the local user's.

    Raises:
        PackagingError: names files, lines and kinds.
    """
    search = _search(owner)
    files = (path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file())
    findings = list(dict.fromkeys(finding for path in files for finding in _findings(path, folder, search)))
    if findings:
        lines = "\n".join(f"  {line}" for line in findings[:_SHOWN])
        more = f"\n  and {len(findings) - _SHOWN:,} more" if len(findings) > _SHOWN else ""
        raise PackagingError(
            f"files to be uploaded contain secrets or private paths:\n{lines}{more}",
            remedy="remove them at their source (use relative paths in settings), and train or package again",
        )


# --- what is searched for --------------------------------------------------------------------------------------------


def _search(owner: str) -> SecretForms:
    own = tuple(_any_of(kind, values) for kind, values in _credentials().items() if values)
    home, deep = home_folder(), [path for path in _folders() if len(path.parts) > 2]
    folders = (_any_of("a folder of this machine", map(str, deep), _FOLDER),) if deep else ()
    named = home is not None and len(home.parts) > 1
    at_home = (_any_of("the home folder of this machine", [str(home)], _FOLDER),) if named else ()
    binary = own + tuple(form for form in SECRET_FORMS if form.anywhere) + folders
    inexact = tuple(form for form in SECRET_FORMS if not form.anywhere)
    return SecretForms(own, binary, binary + inexact + at_home + tuple(_names(owner)) + (_anybodys_home(),))


def _any_of(kind: str, values: Iterable[str], whole: bytes = _WHOLE) -> SecretForm:
    """A form that matches any of these values as a whole word, plain or escaped as in JSON."""
    return literal_form(kind, [form.encode() for value in values for form in (value, json.dumps(value)[1:-1])], whole)


def _anybodys_home() -> SecretForm:
    nobody = b"|".join(re.escape(name.encode()) for name in sorted(ANYBODY | set(_IN_PATHS.split())))
    pattern = re.compile(_ANYBODYS.replace(b"%s", nobody))
    return SecretForm("somebody's home folder", (b"/home", b"users"), pattern, anywhere=False)


def _folders() -> Iterator[Path]:
    for path in (home_folder(), Path.cwd(), checkout(), Path(tempfile.gettempdir())):
        if path is not None and not path.is_relative_to("/kaggle"):  # which everybody has there
            yield from {path, path.resolve()}


def _names(owner: str) -> Iterator[SecretForm]:
    """Forms of the user's and the host's name. A word of our own sources (adam) counts only where it is a name."""
    host = socket.gethostname()
    public, ours = ANYBODY | {owner.lower()}, _our_words()
    for kind, name in (("user", _user()), ("host", host), ("host", host.partition(".")[0])):
        if len(name) >= _SHORTEST_NAME and name.lower() not in public:
            whole = _AS_NAME if name.lower() in ours else _WHOLE
            yield literal_form(f"the {kind}'s name of this machine", [name.encode()], whole, re.IGNORECASE)


@cache
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
    home = home_folder() or Path("/")  # where there is none, nothing is kept in it
    kept = {f"the value of {name}": [os.environ.get(name, "")] for name in VARIABLES}
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "kaggle"
    folders = [home / ".kaggle", settings, *_named("KAGGLE_CONFIG_DIR")]
    kept["the credential in kaggle.json"] = [_entry(value / "kaggle.json", "key") for value in folders]
    kept["the credential in access_token"] = [_content(value / "access_token") for value in folders]
    tokens = [_entry(value / "credentials.json", key) for value in folders for key in ("refresh_token", "access_token")]
    kept["a credential in .kaggle/credentials.json"] = tokens
    hubs = [*(cache / "huggingface" for cache in (home / ".cache", *_named("XDG_CACHE_HOME"))), *_named("HF_HOME")]
    paths = [*(value / "token" for value in hubs), *_named("HF_TOKEN_PATH")]
    kept["the credential of the Hugging Face client"] = [_content(path) for path in paths]
    kept["a password in .netrc"] = _passwords(home / ".netrc")
    return {kind: [value for value in values if len(value) >= _SHORTEST_CREDENTIAL] for kind, values in kept.items()}


def _named(variable: str) -> list[Path]:
    """The folder or file that an environment variable names, if it is set."""
    return [Path(os.environ[variable])] if os.environ.get(variable) else []


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


# --- where it is searched for ----------------------------------------------------------------------------------------


def _findings(path: Path, top: Path, search: SecretForms) -> Iterator[str]:
    name = path.relative_to(top).as_posix()
    yield from _matches(name.encode(), f"{name}: its name", search.everything)
    if path.name == MANIFEST:
        yield from _manifest(path, name, search)
        return
    is_library = path.suffix == ".whl" and not path.name.startswith("pairclf-")
    budget = UnpackBudget.of(path.stat().st_size)
    with path.open("rb") as content:
        try:
            for leaf in unpacked_files(content, budget, nested=not is_library):
                yield from _leaf(leaf, path, name, search, budget)
        except UnsearchableError as error:
            yield f"{name}: {error}"


def _leaf(leaf: UnpackedFile, path: Path, name: str, search: SecretForms, budget: UnpackBudget) -> Iterator[str]:
    """Search a file, or a member of it."""
    is_wheel, where = path.suffix == ".whl", ": ".join([name, *leaf.names])
    is_library = is_wheel and not path.name.startswith("pairclf-")
    inner = leaf.names[-1] if leaf.names else path.name
    if leaf.names:
        forms = search.library if is_library else search.everything
        yield from _matches(inner.encode(), f"{': '.join([name, *leaf.names[:-1]])}: a name in it", forms)
    if is_wheel and not leaf.names:
        return  # compressed: its members come one by one
    if inner.endswith(".safetensors") and (weights_header := header(leaf.content)) is not None:
        forms = search.library if is_library else search.everything
        yield from _texts(weights_header, f"{where}: its header", forms, behind_encodings=not is_library)
        return
    if not is_library and (inner.endswith(_PICKLES) or is_pickle(leaf.content)):
        yield f"{where}: a pickle, which runs code when it is loaded and can't be searched"
    leaf.content.seek(0)
    head = leaf.content.read(_HEAD)
    is_binary = b"\0" in head and not _is_wide(head)
    by_chance = is_binary or path.parent == BundleFiles(path.parents[1]).tokenizer
    forms = search.library if is_library else search.binary if by_chance else search.everything
    wide = forms if by_chance and not is_binary else search.everything
    for piece, lines in pieces(leaf.content):
        at = None if b"\0" in head else lines
        yield from _texts(piece, where, forms, wide, lines=at, behind_encodings=not is_library)
        for content in () if is_library else packed_in_base64(piece):
            yield from _packed(content, where, forms, wide, budget)


def _packed(
    content: bytes, where: str, forms: Sequence[SecretForm], wide: Sequence[SecretForm], budget: UnpackBudget
) -> Iterator[str]:
    """Search an archive that stood in a text as base64. Content that only begins like an archive is ignored."""
    try:
        for leaf in unpacked_files(io.BytesIO(content), budget, ("(base64)",)):
            for piece, _ in pieces(leaf.content):
                yield from _texts(piece, ": ".join([where, *leaf.names]), forms, wide)
    except UnsearchableError:
        if budget.left < 0:
            raise


def _is_wide(head: bytes) -> bool:
    """Whether it is text in UTF-16 or UTF-32: most bytes of every second place are zero, or of three in four places."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return True
    zeros = [head[place::4].count(0) * 4 for place in range(4)]
    few, many = 0.1 * len(head), 0.8 * len(head)
    is_zero = [count > many for count in zeros]
    return any(is_zero) and not all(is_zero) and all(count < few or count > many for count in zeros)


def _matches(content: bytes, where: str, forms: Sequence[SecretForm], *, lines: int | None = None) -> Iterator[str]:
    """The first match of each kind; with `lines`, the number of lines before `content`, its line is shown."""
    words, reported = WordIndex(content.lower()), set[str]()
    for form in forms:
        if form.kind not in reported and (place := form.find(content, words)) is not None:
            reported.add(form.kind)
            before = content.count(b"\n", 0, place)
            yield f"{where}{'' if lines is None else f', line {lines + before + 1}'}: {form.kind}"


def _texts(
    content: bytes,
    where: str,
    forms: Sequence[SecretForm],
    wide: Sequence[SecretForm] | None = None,
    *,
    lines: int | None = None,
    behind_encodings: bool = True,
) -> Iterator[str]:
    """The first match of each kind in the content, and in each text behind its encodings; `wide`: in UTF-16 or 32."""
    yield from _matches(content, where, forms, lines=lines)
    for encoding, text in decoded(content) if behind_encodings else ():
        encoded_forms = wide if wide is not None and encoding.startswith("UTF") else forms
        yield from _matches(text, f"{where} ({encoding})", encoded_forms)


def _manifest(path: Path, name: str, search: SecretForms) -> Iterator[str]:
    """A bundle's manifest: its probe rows hold people's prompts."""
    text = path.read_bytes()
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        yield from _matches(text, name, search.everything, lines=0)
        return
    yield from _matches(text, name, search.credentials, lines=0)
    ours = json.dumps({key: value for key, value in tree.items() if key != "probes"}, ensure_ascii=False)
    yield from _texts(ours.encode(), name, search.everything)
