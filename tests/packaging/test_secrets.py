from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest

from pairclf.errors import PackagingError
from pairclf.packaging import secrets
from pairclf.packaging.secrets import refuse_secrets

SOUGHT = "abcdefghijklmnopqrstuvwxyz0123456789ABCD"
FORMS = {
    "a Kaggle token": "KGAT_" + SOUGHT[:32],
    "a Kaggle key": '{"username": "x", "key": "' + "0123456789abcdef" * 2 + '"}',
    "a W&B key": 'os.environ["WANDB_API_KEY"] = "' + "0123456789" * 4 + '"',
    "a Hugging Face token": "hf_" + SOUGHT[:34],
    "an AWS key": "AKIA" + "ABCDEFGH01234567",
    "a GitHub token": "ghp_" + SOUGHT[:36],
    "an API key": "sk-" + "proj-" + SOUGHT,
    "a private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
}


PLACES = ("KAGGLE_CONFIG_DIR", "HF_HOME", "HF_TOKEN_PATH", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's folder on a machine of `marigold`'s, called `tulip`."""
    home = tmp_path / "home" / "marigold"
    (home / ".kaggle").mkdir(parents=True)
    (home / "work").mkdir()
    for name in (*secrets.VARIABLES, *PLACES):
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


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", ["bundle/fold0/config.yaml", "kernel/a.ipynb", "bundle/fold0/notes-without-suffix"])
def test_credential_is_found_by_its_form_and_never_shown(folder: Path, kind: str, name: str) -> None:
    said = told(folder, name, f"first line\nvalue: {FORMS[kind]}\n")
    assert f"{name}, line 2: {kind}" in said
    assert FORMS[kind] not in said
    assert SOUGHT[:12] not in said


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_credential_is_found_in_wide_text(folder: Path, kind: str, encoding: str) -> None:
    assert kind in told(folder, "bundle/fold0/notes.txt", f"first\nvalue: {FORMS[kind]}\n".encode(encoding))


@pytest.mark.parametrize("kind", FORMS)
def test_credential_is_found_in_tokenizers_archives_and_binary_files(folder: Path, kind: str) -> None:
    assert kind in told(folder, "bundle/fold0/tokenizer/tokenizer_config.json", f'{{"token": {FORMS[kind]}}}')
    (folder / "bundle/fold0/tokenizer/tokenizer_config.json").unlink()
    assert kind in told(folder, "bundle/fold0/optimizer.pt", b"\0\1\2" + FORMS[kind].encode())
    (folder / "bundle/fold0/optimizer.pt").unlink()
    wheel(folder, "other", "other/x.py", FORMS[kind])
    assert (kind in told(folder, "kernel/a.py", "")) == (kind != "a private key")


@pytest.mark.parametrize(
    "text",
    [
        "export KAGGLE_KEY=%s",
        "kaggle_key: %s",
        "key: %s",
        "'key': '%s'",
        r'"{\"key\": \"%s\"}"',
        "username: x\nkey:  '%s'",
    ],
)
def test_kaggle_key_is_found_as_people_write_it(folder: Path, text: str) -> None:
    key = "0123456789abcdef" * 2
    assert "a Kaggle key" in told(folder, "bundle/fold0/notes", text % key)
    assert told(folder, "bundle/fold0/notes", text % (key + "0")) == ""  # a hash of another length


def test_archive_in_a_bundle_is_opened(folder: Path) -> None:
    with zipfile.ZipFile(folder / "bundle" / "notes.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", 3 * (FORMS["an AWS key"] + "\n"))
    assert "notes.zip: a.txt, line 1: an AWS key" in told(folder, "kernel/a.py", "")


def test_record_in_a_bundle_is_looked_through(folder: Path) -> None:
    assert "an AWS key" in told(folder, "bundle/fold0/build.json", FORMS["an AWS key"])


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


def test_forms_are_all_tried_and_words_like_them_pass(folder: Path) -> None:
    assert FORMS.keys() == secrets.FORMS.keys()
    words = "task-specific-classification-of-many-different-kinds hf_home sk-learn KGAT_ BEGIN PRIVATE KEY AKIA"
    assert told(folder, "kernel/a.py", words) == ""


@pytest.mark.parametrize("kept", ["HF_TOKEN", "kaggle.json", "access_token", "token", ".netrc"])
@pytest.mark.parametrize("name", ["bundle/fold0/bundle.json", "bundle/fold0/tokenizer/tokenizer.json", "bundle/x.bin"])
def test_credentials_of_this_machine_are_found_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kept: str, name: str
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
    wheel(folder, "other", "other/tests/key.py", f"{FORMS['a private key']} by marigold in /srv/.cargo")
    assert told(folder, "kernel/a.py", "") == ""
    wheel(folder, "other", "other/where.py", str(Path.cwd()))
    assert "other-1-py3-none-any.whl: other/where.py, line 1: a folder" in told(folder, "kernel/a.py", "")
    wheel(folder, "other", "other/fine.py", "")
    wheel(folder, "pairclf", "pairclf/x.py", FORMS["a private key"])
    assert "pairclf/x.py, line 1: a private key" in told(folder, "kernel/a.py", "")


def test_prompts_and_vocabularies_may_say_what_they_like(folder: Path) -> None:
    prompt = f"why does {FORMS['an API key']} not work in /srv/marigold, /home/x/tulip and {Path.home()}?"
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
        (folder / "bundle" / f"{number}.txt").write_text(FORMS["an AWS key"])
    assert "and 5 more" in told(folder, "kernel/a.py", "")
