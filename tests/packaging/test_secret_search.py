from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pairclf.errors import PackagingError
from pairclf.packaging import credential_forms, secret_search, unpack
from pairclf.packaging.credential_forms import SECRET_FORMS as KNOWN
from pairclf.packaging.credential_forms import VARIABLES, WordIndex
from pairclf.packaging.secret_search import refuse_secrets

PLACES = ("KAGGLE_CONFIG_DIR", "HF_HOME", "HF_TOKEN_PATH", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's folder on a machine of `marigold`'s, called `tulip`."""
    home = tmp_path / "home" / "marigold"
    (home / ".kaggle").mkdir(parents=True)
    (home / "work").mkdir()
    for name in (*VARIABLES, *PLACES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    monkeypatch.setattr("getpass.getuser", lambda: "marigold")
    monkeypatch.setattr("socket.gethostname", lambda: "tulip.example.org")
    made = tmp_path / "package"
    for name in ("kernel", "bundle/fold0/tokenizer", "wheels/wheels-0"):
        (made / name).mkdir(parents=True)
    return made


def told(folder: Path, name: str, content: str | bytes) -> str:
    """What is said of a package with that file; empty: nothing."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        refuse_secrets(folder, "someone", ["kernel", "bundle", "wheels"])
    except PackagingError as error:
        return str(error)
    return ""


def wheel(folder: Path, name: str, member: str, text: str) -> None:
    with zipfile.ZipFile(folder / "wheels" / "wheels-0" / f"{name}-1-py3-none-any.whl", "w") as archive:
        archive.writestr(member, text)


def header(text: str) -> bytes:
    content = json.dumps({"__metadata__": {"note": text}}).encode()
    return struct.pack("<Q", len(content)) + content + b"\0" * 64


# Made up here, piece by piece, so that nobody's scanner takes them for real ones.
MIXED = "q7Zk2Lw9Xv4Bn8Tm1Rc6Yd3Fg5Hj0PsQaWeUiOo7Kx2Vb9Nz4Mq8Lt1Rw5Ty9Bc3Df6Gh8Jk0Mn2Pq4Rs6Tv8Wx0Za2Cd4Ef6"
HEX = "3f9a1c7e5b2d8046" * 4
JWT = ".".join(["eyJ" + "hbGciOiJIUzI1NiJ9", "eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0", MIXED[:43]])
KEY = "-----BEGIN " + "%sPRIVATE KEY%s-----"

SHAPES: dict[str, tuple[str, str]] = {
    "kaggle token": ("a Kaggle token", "KGAT_" + MIXED[:32]),
    "kaggle.json": ("a Kaggle key", '{"username": "x", "key": "' + HEX[:32] + '"}'),
    "kaggle setdefault": ("a Kaggle key", f'os.environ.setdefault("KAGGLE_KEY", "{HEX[:32]}")'),
    "kaggle item": ("a Kaggle key", f"os.environ['KAGGLE_KEY'] = '{HEX[:32]}'"),
    "kaggle export": ("a Kaggle key", f"export KAGGLE_KEY={HEX[:32]}"),
    "kaggle setx": ("a Kaggle key", f"setx KAGGLE_KEY {HEX[:32]}"),
    "kaggle keyword": ("a Kaggle key", f"os.environ.update(KAGGLE_KEY='{HEX[:32]}')"),
    "kaggle typed": ("a Kaggle key", f'KAGGLE_KEY: str = "{HEX[:32]}"'),
    "kaggle tuple": ("a Kaggle key", f'[("KAGGLE_KEY", b"{HEX[:32]}")]'),
    "kaggle api key": ("a Kaggle key", f"kaggle_api_key => '{HEX[:32]}'"),
    "hugging face": ("a Hugging Face token", "hf_" + MIXED[:34]),
    "hugging face organisation": ("a Hugging Face token", "api_org_" + MIXED[:34]),
    "hugging face escaped": ("a Hugging Face token", r'"print(\"x\")\nhf_' + MIXED[:34] + '"'),
    "hugging face in a query": ("a Hugging Face token", "https://host/?next=a%26token%3Dhf_" + MIXED[:34]),
    "hugging face behind a name": ("a Hugging Face token", "MY_hf_" + MIXED[:34]),
    "mlflow": ("the value of a variable for credentials", f"MLFLOW_TRACKING_PASSWORD={MIXED[:24]}"),
    "address with a token alone": ("a password in an address", f"git clone https://{HEX[:40]}@git.example.org/a"),
    "wandb variable": ("a W&B key", f'os.environ["WANDB_API_KEY"] = "{HEX[:40]}"'),
    "wandb setdefault": ("a W&B key", f'environ.setdefault("WANDB_API_KEY", "{HEX[:40]}")'),
    "wandb login": ("a W&B key", f"wandb.login(key='{HEX[:40]}')"),
    "wandb login position": ("a W&B key", f'wandb.login("{HEX[:40]}")'),
    "wandb shell": ("a W&B key", f"!wandb login --relogin {HEX[:40]}"),
    "wandb netrc": ("a W&B key", f"machine api.wandb.ai\n  login user\n  password {HEX[:40]}\n"),
    "wandb new": ("a W&B key", "wandb_v1_" + MIXED[:77]),
    "netrc": ("a password in netrc form", f"machine git.example.org login me password {MIXED[:12]}"),
    "aws id": ("an AWS key", "AKIA" + "ABCDEFGH01234567"),
    "aws secret": ("an AWS secret key", f"aws_secret_access_key = {MIXED[:39]}/"),
    "aws secret json": ("an AWS secret key", f'"SecretAccessKey": "{MIXED[:40]}"'),
    "aws secret keyword": ("an AWS secret key", f'boto3.client("s3", aws_secret_access_key="{MIXED[:40]}")'),
    "github": ("a GitHub token", "ghp_" + MIXED[:36]),
    "github oauth": ("a GitHub token", "gho_" + MIXED[:36]),
    "github server": ("a GitHub token", "ghs_" + MIXED[:36]),
    "github refresh": ("a GitHub token", "ghr_" + MIXED[:36]),
    "github user": ("a GitHub token", "ghu_" + MIXED[:36]),
    "github fine": ("a GitHub token", "github_pat_" + MIXED[:22] + "_" + MIXED[:59]),
    "gitlab": ("a GitLab token", "glpat-" + MIXED[:20]),
    "gitlab deploy": ("a GitLab token", "gldt-" + MIXED[:20]),
    "gitlab runner": ("a GitLab token", "GR1348941" + MIXED[:20]),
    "openai": ("an API key", "sk-" + "proj-" + MIXED[:40]),
    "anthropic": ("an API key", "sk-ant-" + "api03-" + MIXED[:93] + "AA"),
    "groq": ("an API key", "gsk_" + MIXED[:52]),
    "google api": ("a Google key", "AIza" + MIXED[:35]),
    "google client": ("a Google key", "GOCSPX-" + MIXED[:28]),
    "google access": ("a Google key", "ya29." + MIXED[:60]),
    "google service account": ("a Google service account", f'"private_key_id": "{HEX[:40]}"'),
    "slack": ("a Slack token", "xoxb-" + "123456789012-123456789012-" + MIXED[:24]),
    "slack app": ("a Slack token", "xapp-" + "1-A0123456789-0123456789012-" + HEX[:64]),
    "slack hook": ("a Slack token", "https://hooks.slack.com/services/" + "T01234567/B01234567/" + MIXED[:24]),
    "discord hook": ("a bot's token", "https://discord.com/api/webhooks/" + "123456789012345678/" + MIXED[:68]),
    "telegram": ("a bot's token", "123456789" + ":AA" + MIXED[:33]),
    "jwt": ("a JSON web token", JWT),
    "azure storage": ("an Azure key", "AccountName=x;Account" + "Key=" + MIXED[:86] + "=="),
    "azure bus": ("an Azure key", "Endpoint=sb://x/;SharedAccess" + "Key=" + MIXED[:43] + "="),
    "azure signature": (
        "an Azure key",
        "https://x.blob.core.windows.net/y?sv=2024-01-01&sp=r&sig=" + MIXED[:43] + "%3D",
    ),
    "azure client": ("an Azure key", "secret: " + MIXED[:3] + "8Q~" + MIXED[:34]),
    "stripe": ("a Stripe key", "sk_" + "live_" + MIXED[:24]),
    "stripe restricted": ("a Stripe key", "rk_" + "test_" + MIXED[:24]),
    "npm": ("an npm token", "npm_" + MIXED[:36]),
    "npmrc": ("an npm token", "//registry.npmjs.org/:_authToken=" + "a1b2c3d4-e5f6-7890-abcd-ef1234567890"),
    "pypi": ("a PyPI token", "pypi-" + "AgEIcHlwaS5vcmc" + MIXED[:70]),
    "sendgrid": ("a service's token", "SG." + MIXED[:22] + "." + MIXED[:43]),
    "docker": ("a service's token", "dckr_pat_" + MIXED[:27]),
    "shopify": ("a service's token", "shpat_" + HEX[:32]),
    "databricks": ("a service's token", "dapi" + HEX[:32]),
    "rsa": ("a private key", KEY % ("RSA ", "")),
    "pkcs8": ("a private key", KEY % ("ENCRYPTED ", "")),
    "openssh": ("a private key", KEY % ("OPENSSH ", "")),
    "pgp": ("a private key", KEY % ("PGP ", " BLOCK")),
    "putty": ("a private key", "PuTTY-User-" + "Key-File-2: ssh-rsa"),
    "ssh2": ("a private key", "---- BEGIN SSH2 " + "ENCRYPTED PRIVATE KEY ----"),
    "age": ("a private key", "AGE-SECRET-" + "KEY-1" + MIXED[:58].upper()),
    "address": ("a password in an address", f"git clone https://me:{MIXED[:14]}@git.example.org/x.git"),
    "address of a database": ("a password in an address", f"postgresql+psycopg://me:{MIXED[:8]}@10.0.0.1:5432/x"),
    "address without a user": ("a password in an address", f"redis://:{MIXED[:16]}@cache:6379"),
    "header": ("a credential in a header", f'curl -H "Authorization: Bearer {MIXED[:40]}"'),
    "header in python": ("a credential in a header", f"headers={{'Authorization': 'token {MIXED[:40]}'}}"),
    "variable": ("the value of a variable for credentials", f"HF_TOKEN={MIXED[:30]}"),
    "variable in docker": ("the value of a variable for credentials", f"ENV OPENAI_API_KEY {MIXED[:30]}"),
    "home": ("somebody's home folder", "cwd: /home/peregrine/data"),
    "home on a mac": ("somebody's home folder", '"/Users/peregrine/x.csv"'),
    "home on windows": ("somebody's home folder", r"C:\Users\Peregrine\x.csv"),
    "home in /var": ("somebody's home folder", "/var/home/peregrine/x"),
    "home on a server": ("somebody's home folder", "/nfs/home/peregrine/x"),
    "home on windows, seen from linux": ("somebody's home folder", "/mnt/c/Users/peregrine/x"),
    "home on windows escaped": ("somebody's home folder", r'"C:\\Users\\Peregrine\\x.csv"'),
}


@pytest.mark.parametrize(
    "name",
    ["bundle/fold0/notes-without-suffix", "bundle/fold0/config.yaml", "kernel/a.ipynb"],
    ids=["notes", "config", "notebook"],
)
def test_refuse_secrets_finds_every_shape_and_never_shows_it(folder: Path, name: str) -> None:
    for kind, text in SHAPES.values():
        said = told(folder, name, f"first line\nvalue: {text}\n")
        assert f"{Path(name).name}, line 2: {kind}" in said or f"{Path(name).name} (escaped): {kind}" in said, text
        assert MIXED[:8] not in said
        assert HEX[:16] not in said
        assert "peregrine" not in said.lower()


def archive(content: bytes, name: str = "a.txt", kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w", kind) as made:
        made.writestr(name, content)
    return stream.getvalue()


def tar(content: bytes, mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode=mode) as made:  # type: ignore[call-overload]
        entry = tarfile.TarInfo("deep/a.txt")
        entry.size = len(content)
        made.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def table(content: bytes) -> bytes:
    frame = pl.DataFrame(
        {"n": range(300), "text": [[{"said": content.decode() if n == 250 else "x"}] for n in range(300)]}
    )
    frame.write_parquet(stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()


def notebook(content: bytes) -> bytes:
    cell = {"cell_type": "code", "outputs": [{"name": "stdout", "text": ["x\n" + content.decode()]}], "source": []}
    return json.dumps({"cells": [cell], "metadata": {"kept": json.dumps({"said": content.decode()})}}).encode()


def wrapped(content: bytes) -> bytes:
    return base64.encodebytes(b"some words before, long enough for several lines of base64: " * 3 + content)


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": archive,
    "zip in zip": lambda content: archive(archive(content), "b.zip"),
    "zip in gzip in zip": lambda content: archive(gzip.compress(archive(content)), "b.gz"),
    "zip behind a program": lambda content: b"\x7fELF" + b"\0" * 900 + archive(content),
    "name in zip": lambda content: archive(b"", content.decode().strip()),
    "tar": tar,
    "tar.gz": lambda content: tar(content, "w:gz"),
    "tar in zip": lambda content: archive(tar(content), "b.tar"),
    "base64": lambda content: b'data: "' + base64.b64encode(content) + b'"',
    "base64 within": lambda content: b"/x/" + base64.b64encode(b"12345 " + content),
    "base64 of addresses": lambda content: base64.urlsafe_b64encode(b"\xff\xfe\xfd" + content),
    "base64 in lines": wrapped,
    "base64 in base64": lambda content: base64.b64encode(b"x " + base64.b64encode(content)),
    "gzip in base64": lambda content: b"x = '" + base64.b64encode(gzip.compress(content * 3)) + b"'",
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "UTF-16 big": lambda content: content.decode().encode("utf-16-be"),
    "UTF-16 in base64": lambda content: base64.b64encode(content.decode().encode("utf-16-le")),
    "UTF-32": lambda content: content.decode().encode("utf-32"),
    "UTF-32 big": lambda content: content.decode().encode("utf-32-be"),
    "late UTF-16": lambda content: b"plain words, line by line\n" * 2000 + content.decode().encode("utf-16-le"),
    "late UTF-16 at an odd byte": lambda content: b"x" * 20001 + b"\xff" + content.decode().encode("utf-16-be"),
    "late": lambda content: b"plain words\n" * 400_000 + content,
    "parquet": table,
    "notebook": notebook,
    "JSON in JSON": lambda content: json.dumps(json.dumps(["\n" + content.decode()])).encode(),
    "escapes": lambda content: "".join(f"\\u{one:04x}" for one in content).encode(),
}


def test_refuse_secrets_finds_a_token_behind_every_encoding(folder: Path) -> None:
    for name, encode in ENCODINGS.items():
        said = told(folder, "bundle/fold0/notes", encode(f'{{"token": "hf_{MIXED[:34]}"}}\n'.encode()))
        assert "a Hugging Face token" in said, name
        assert MIXED[:8] not in said, name


def test_what_lies_over_the_end_of_a_piece_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "SIZE", 500)
    monkeypatch.setattr(unpack, "OVERLAP", 60)
    for at in range(400, 620, 7):
        text = b".\n" * (at // 2) + b" hf_" + MIXED[:34].encode() + b" " + b"." * 600
        assert f"line {at // 2 + 1}: a Hugging Face token" in told(folder, "bundle/fold0/notes", text)


def locked_zip() -> bytes:
    content = bytearray(archive(b"text"))
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(start) + place] |= 1  # the flag of encryption
    return bytes(content)


def bomb() -> bytes:
    """400 MB in some kilobytes, twice compressed."""
    layer = lzma.compress(b"\0" * (1 << 20), preset=0)
    return gzip.compress(b"".join(layer for _ in range(100)) * 4)


def nested() -> bytes:
    content = b"text"
    for _ in range(unpack.MAX_DEPTH + 1):
        content = gzip.compress(content)
    return content


UNSEARCHABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "encrypted": (locked_zip, "can't be opened"),
    "cut off": (lambda: gzip.compress(bytes(MIXED, "ascii") * 99)[:-20], "can't be opened"),
    "damaged zip": (lambda: archive(b"text" * 999)[:-30], "can't be opened"),
    "bomb": (bomb, "unpacks to more than"),
    "too deep": (nested, "archives lie in each other"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(40), "of a kind that can't be opened"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(40), "of a kind that can't be opened"),
    "damaged parquet": (lambda: b"PAR1" + bytes(40) + b"PAR1", "a table that can't be read"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "a pickle"),
    "pickle in zip": (lambda: archive(pickle.dumps([1, 2]), "x/data.pkl"), "a pickle"),
}


def test_refuse_secrets_refuses_what_can_not_be_looked_through(folder: Path) -> None:
    for name, (content, why) in UNSEARCHABLE.items():
        assert why in told(folder, "bundle/fold0/notes", content()), name


def test_metadata_of_weights_and_tables_are_looked_through(folder: Path) -> None:
    token = "hf_" + MIXED[:34]
    assert "its header: a Hugging Face token" in told(folder, "bundle/model.safetensors", header(token))
    said = told(folder, "bundle/model.safetensors", header(base64.b64encode(token.encode()).decode()))
    assert "its header (base64): a Hugging Face token" in said
    (folder / "bundle/model.safetensors").write_bytes(b"")
    pl.DataFrame({"n": [1]}).write_parquet(folder / "bundle" / "x", metadata={"note": token})
    assert "a Hugging Face token" in told(folder, "kernel/a.py", "")


PLAIN: dict[str, str | bytes] = {
    "hashes": "\n".join([HEX[:32], HEX[:40], HEX, f"sha256: {HEX}", f"md5={HEX[:32]}", f"commit {HEX[:40]}"]),
    "cache key of another length": f"key: {HEX[:33]}",
    "uuid": "id: a1b2c3d4-e5f6-7890-abcd-ef1234567890",
    "weights in base64": base64.b64encode(np.random.default_rng(0).bytes(60_000)),
    "random bytes": np.random.default_rng(1).bytes(300_000),
    "floats": np.random.default_rng(2).normal(size=30_000).astype("<f4").tobytes(),
    "zeros": bytes(100_000),
    "placeholders": "hf_" + "x" * 34 + " KAGGLE_KEY=your-kaggle-key-goes-here AKIA" + "IOSFODNN7EXAMPLE sk-" + "x" * 40,
    "code that reads": 'key = os.environ["KAGGLE_KEY"]; HF_TOKEN = UserSecretsClient().get_secret("HF_TOKEN")',
    "code that reads by default": 'os.environ.get("WANDB_API_KEY", settings.default_key_2)',
    "addresses": "https://huggingface.co:443/a@b https://user:password@host http://x.org/a:b@c ssh://git@github.com/x",
    "templates of addresses": "https://${USER}:${TOKEN}@host https://{user}:{password}@host https://<user>:<key>@host",
    "homes of nobody": "/home/user/x /home/jovyan /home/runner/work /Users/Shared C:\\Users\\Public /home/ /home",
    "home in an address": "https://example.org/home/welcome and example.org/Users/peregrine",
    "public key": "-----BEGIN " + "PUBLIC KEY-----\nssh-rsa " + MIXED,
    "words like forms": f"task-{MIXED.lower()} risk-adjusted-of-the-portfolio hf_hub_download npm_config_registry_of_us"
    " task-specific-classification-of-many-different-kinds hf_home sk-learn KGAT_ BEGIN PRIVATE KEY AKIA",
    "settings": "sk_learn_live_test: 1\nglpat: 2\nkey: value\npassword: null\nauthorization: none",
}


def test_refuse_secrets_passes_what_is_no_secret(folder: Path) -> None:
    for name, text in PLAIN.items():
        assert told(folder, "bundle/fold0/notes", text) == "", name


def test_half_a_hash_is_no_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever content is cut: pieces of it, and the ranges around words."""
    monkeypatch.setattr(unpack, "SIZE", 700)
    monkeypatch.setattr(unpack, "OVERLAP", 200)
    hashes = "\n".join(f'"key{"y" * (number % 9)}": "{HEX}", "key": "{HEX}",' for number in range(300))
    assert told(folder, "bundle/fold0/hashes.json", hashes) == ""


def test_half_a_hash_is_no_key_within_a_piece(folder: Path) -> None:
    hashes = "\n".join(f'"key": "{HEX}", "{"y" * (number % 9)}": 1' for number in range(3000))
    assert told(folder, "bundle/fold0/hashes.json", hashes) == ""


def test_a_published_credential_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + MIXED[:34]
    assert "a Hugging Face token" in told(folder, "kernel/a.py", token)
    monkeypatch.setattr(credential_forms, "PUBLISHED", frozenset({hashlib.sha256(token.encode()).hexdigest()}))
    assert told(folder, "kernel/a.py", token) == ""


def test_our_own_sources_pass(folder: Path) -> None:
    """Else no wheel of pairclf could be uploaded; and nobody's scanner should find anything in them."""
    top = Path(secret_search.__file__).parents[1]
    for path in sorted(top.rglob("*.py")):
        (folder / "kernel" / "-".join(path.relative_to(top).parts)).write_bytes(path.read_bytes())
    assert told(folder, "kernel/a.py", "") == ""


def test_this_file_has_nothing_that_another_scanner_takes_for_real() -> None:
    content = Path(__file__).read_bytes()
    words = WordIndex(content.lower())
    assert [form.kind for form in KNOWN if form.anywhere and form.find(content, words) is not None] == []


def test_every_form_of_the_table_is_tried_here() -> None:
    texts = [text.encode() for _, text in SHAPES.values()]
    unused = [
        form.pattern.pattern
        for form in KNOWN
        if not any(form.find(one, WordIndex(one.lower())) is not None for one in texts)
    ]
    assert unused == []


CARRIED = ("kaggle token", "kaggle.json", "wandb variable", "hugging face", "aws id", "github", "openai", "rsa")
"""Shapes that are looked for in every kind of file."""


def test_refuse_secrets_finds_credentials_in_tokenizers_archives_and_binary_files(folder: Path) -> None:
    for kind, text in (SHAPES[name] for name in CARRIED):
        assert kind in told(folder, "bundle/fold0/tokenizer/tokenizer_config.json", f'{{"token": {text}}}')
        (folder / "bundle/fold0/tokenizer/tokenizer_config.json").unlink()
        assert kind in told(folder, "bundle/fold0/optimizer.pt", b"\0\1\2" + text.encode())
        (folder / "bundle/fold0/optimizer.pt").unlink()
        wheel(folder, "other", "other/x.py", text)
        assert (kind in told(folder, "kernel/a.py", "")) == (kind != "a private key")
        next((folder / "wheels" / "wheels-0").iterdir()).unlink()


def test_refuse_secrets_finds_kaggle_keys_as_people_write_them(folder: Path) -> None:
    key = "0123456789abcdef" * 2
    for text in (
        "export KAGGLE_KEY=%s",
        "kaggle_key: %s",
        "key: %s",
        "'key': '%s'",
        r'"{\"key\": \"%s\"}"',
        "username: x\nkey:  '%s'",
    ):
        assert "a Kaggle key" in told(folder, "bundle/fold0/notes", text % key), text
        longer = text % (key + "0")  # a hash of another length
        assert "a Kaggle key" not in told(folder, "bundle/fold0/notes", longer), text


def test_archive_in_a_bundle_is_opened(folder: Path) -> None:
    with zipfile.ZipFile(folder / "bundle" / "notes.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", 3 * (SHAPES["aws id"][1] + "\n"))
    assert "notes.zip: a.txt, line 1: an AWS key" in told(folder, "kernel/a.py", "")


def test_record_in_a_bundle_is_looked_through(folder: Path) -> None:
    assert "an AWS key" in told(folder, "bundle/fold0/build.json", SHAPES["aws id"][1])


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        (None, ".config/kaggle/kaggle.json"),
        (None, ".config/kaggle/access_token"),
        (None, ".kaggle/credentials.json"),
        ("KAGGLE_CONFIG_DIR", "kaggle.json"),
        ("XDG_CONFIG_HOME", "kaggle/kaggle.json"),
        ("XDG_CACHE_HOME", "huggingface/token"),
        ("HF_HOME", "token"),
        ("HF_TOKEN_PATH", ""),
    ],
)
def test_credentials_are_looked_for_where_clients_keep_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None, name: str
) -> None:
    value, kept = "fedcba98-no-form-of-its-own", Path.home() / name
    if variable is not None:
        kept = tmp_path / "elsewhere" / name
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(value if kept.suffix != ".json" else json.dumps({"key": value, "refresh_token": value}))
    assert "the credential" in (said := told(folder, "bundle/fold0/notes", value)) or "a credential" in said


@pytest.mark.parametrize("user", ["adam", "gemma", "mark", "Adam"])
def test_names_that_are_words_are_found_where_they_are_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: user)
    assert told(folder, "bundle/fold0/config.yaml", f"optimizer: {user}, {user}w, gemma/{user}: mark the adam") == ""
    for text in (f"/data/{user}/runs", f"by {user}@host.org", f"~{user}/runs", rf"C:\Users\{user}\runs"):
        assert "user's name" in told(folder, "bundle/fold0/config.yaml", text), text


@pytest.mark.parametrize("kept", ["HF_TOKEN", "kaggle.json", "access_token", "token", ".netrc"])
def test_credentials_of_this_machine_are_found_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    home, value = Path.home(), "a-plain-word-17"
    hub = home / ".cache" / "huggingface"
    hub.mkdir(parents=True)
    if kept == "HF_TOKEN":
        monkeypatch.setenv(kept, value)
    elif kept == ".netrc":
        (home / kept).write_text(f"machine api.wandb.ai login user password {value}\n")
    elif kept == "kaggle.json":
        (home / ".kaggle" / kept).write_text(json.dumps({"username": "x", "key": value}))
    else:
        (hub if kept == "token" else home / ".kaggle").joinpath(kept).write_text(value)
    content = json.dumps({"probes": [{"text": f"say {value}"}]})
    for name in ("bundle/fold0/bundle.json", "bundle/fold0/tokenizer/tokenizer.json", "bundle/x.bin"):
        said = told(folder, name, f"{content}\0" if name.endswith(".bin") else content)
        assert name in said
        assert value not in said


@pytest.mark.parametrize("where", ["home", "cwd", "name", "host"])
def test_folders_and_names_of_this_machine_are_found(folder: Path, where: str) -> None:
    sought = {"home": str(Path.home() / "data"), "cwd": str(Path.cwd()), "name": "by marigold.", "host": "on tulip"}
    kinds = {"home": "folder", "cwd": "folder", "name": "user's name", "host": "host's name"}
    for name in ("kernel/a.ipynb", "bundle/fold0/adapter_config.json"):
        said = told(folder, name, json.dumps({"path": sought[where]}))
        assert kinds[where] in said
        (folder / name).unlink()
    assert kinds[where] in told(folder, "bundle/model.safetensors", header(sought[where]))


def test_name_of_a_file_tells_too(folder: Path) -> None:
    (folder / "bundle" / "fold-of-marigold").mkdir()
    assert "its name: the user's name" in told(folder, "bundle/fold-of-marigold/x", "")


def test_own_wheel_is_looked_through_and_others_for_this_machine_alone(folder: Path) -> None:
    wheel(folder, "other", "other/tests/key.py", f"{SHAPES['rsa'][1]} by marigold in /srv/.cargo")
    assert told(folder, "kernel/a.py", "") == ""
    wheel(folder, "other", "other/where.py", str(Path.cwd()))
    assert "other-1-py3-none-any.whl: other/where.py, line 1: a folder" in told(folder, "kernel/a.py", "")
    wheel(folder, "other", "other/fine.py", "")
    wheel(folder, "pairclf", "pairclf/x.py", SHAPES["rsa"][1])
    assert "pairclf/x.py, line 1: a private key" in told(folder, "kernel/a.py", "")


def test_prompts_and_vocabularies_may_say_what_they_like(folder: Path) -> None:
    prompt = f"why does {SHAPES['openai'][1]} not work in /srv/marigold, /home/x/tulip and {Path.home()}?"
    manifest = {"name": "fold0", "probes": [{"fields": {"prompt": [prompt]}}]}
    assert told(folder, "bundle/fold0/bundle.json", json.dumps(manifest)) == ""
    assert told(folder, "bundle/fold0/tokenizer/tokenizer.json", '["marigold", "tulip", "/srv/"]') == ""
    manifest["name"] = "marigold"
    assert "user's name" in told(folder, "bundle/fold0/bundle.json", json.dumps(manifest))


def test_names_that_tell_nothing_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "someone ran the notebook as root on ubuntu; submission; abc; someones"
    for user in ("root", "abc", "someone", "submission", "Kaggle"):
        monkeypatch.setattr("getpass.getuser", lambda user=user: user)
        assert told(folder, "kernel/a.py", text) == ""


def test_home_at_the_top_is_found_where_it_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/owner")
    assert "line 1: the home folder" in told(folder, "bundle/fold0/config.yaml", "folder: /owner/data")
    assert told(folder, "bundle/fold0/config.yaml", "url: https://x.org/owner_of/owners") == ""


def test_record_is_not_uploaded_and_may_name_folders(folder: Path) -> None:
    assert told(folder, "build.json", str(Path.home())) == ""


def test_many_findings_are_counted(folder: Path) -> None:
    for number in range(15):
        (folder / "bundle" / f"{number}.txt").write_text(SHAPES["aws id"][1])
    assert "and 5 more" in told(folder, "kernel/a.py", "")
