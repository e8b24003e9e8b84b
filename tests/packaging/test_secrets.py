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
    "a Hugging Face token": "hf_" + SOUGHT[:34],
    "an AWS key": "AKIA" + "ABCDEFGH01234567",
    "a GitHub token": "ghp_" + SOUGHT[:36],
    "an API key": "sk-" + "proj-" + SOUGHT,
    "a private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's folder on a machine of `marigold`'s, called `tulip`."""
    home = tmp_path / "home" / "marigold"
    (home / ".kaggle").mkdir(parents=True)
    (home / "work").mkdir()
    for name in (*secrets.VARIABLES, "KAGGLE_CONFIG_DIR", "HF_HOME"):
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
        refuse_secrets(folder, "someone")
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
    wheel(folder, "other", "other/tests/key.py", f"{FORMS['a private key']} by marigold in /root/.cargo")
    assert told(folder, "kernel/a.py", "") == ""
    wheel(folder, "other", "other/where.py", str(Path.cwd()))
    assert "other-1-py3-none-any.whl: other/where.py, line 1: a folder" in told(folder, "kernel/a.py", "")
    wheel(folder, "other", "other/fine.py", "")
    wheel(folder, "pairclf", "pairclf/x.py", FORMS["a private key"])
    assert "pairclf/x.py, line 1: a private key" in told(folder, "kernel/a.py", "")


def test_prompts_and_vocabularies_may_say_what_they_like(folder: Path) -> None:
    prompt = f"why does {FORMS['an API key']} not work in /root/marigold, /home/x/tulip and {Path.home()}?"
    manifest = {"name": "fold0", "probes": [{"fields": {"prompt": [prompt]}}]}
    assert told(folder, "bundle/fold0/bundle.json", json.dumps(manifest)) == ""
    assert told(folder, "bundle/fold0/tokenizer/tokenizer.json", '["marigold", "tulip", "/root/"]') == ""
    manifest["name"] = "marigold"
    assert "user's name" in told(folder, "bundle/fold0/bundle.json", json.dumps(manifest))


def test_names_that_tell_nothing_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "someone ran the notebook as root on ubuntu; submission; abc; someones"
    for user in ("root", "abc", "someone", "submission", "Kaggle"):
        monkeypatch.setattr("getpass.getuser", lambda user=user: user)
        assert told(folder, "kernel/a.py", text) == ""


def test_home_of_root_is_found_where_it_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    assert "line 1: the home folder" in told(folder, "bundle/fold0/config.yaml", "folder: /root/data")
    assert told(folder, "bundle/fold0/config.yaml", "url: https://x.org/root_of/rooted") == ""


def test_record_is_not_uploaded_and_may_name_folders(folder: Path) -> None:
    assert told(folder, "build.json", str(Path.home())) == ""


def test_many_findings_are_counted(folder: Path) -> None:
    for number in range(15):
        (folder / "bundle" / f"{number}.txt").write_text(FORMS["an AWS key"])
    assert "and 5 more" in told(folder, "kernel/a.py", "")
