"""`pairclf try`: the page's verdicts are the judge's, it answers its own address alone, and it keeps nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from html.parser import HTMLParser
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import polars as pl
import pytest
from clocks_support import PATIENCE
from starlette.testclient import TestClient
from support.runs import random_bundle, run_config

import pairclf
from pairclf.api import judge as judges
from pairclf.errors import ConfigError, DataError
from pairclf.inference.resident import ResidentEnsemble
from pairclf.playground import server
from pairclf.playground.page import page
from pairclf.playground.server import MAX_BODY, create_app, require_extra, serve
from pairclf.playground.verdict import Playground
from pairclf.task import LMSYS

if TYPE_CHECKING:
    from support.browser import Browser

ADDRESS = "http://127.0.0.1:8000"
OWN = {"Origin": ADDRESS}
PAIR = {"fields": {"prompt": ["what?"]}, "answers": [["good answer"], ["bad answer"]]}
ANSWERS = ["bad answer", "good answer", "other"]
HOSTILE = "</script><script>alert(1)</script><!-- \u202e\x1b[2J & \ud83d"


def client_of(playground: Playground) -> TestClient:
    return TestClient(create_app(playground, "token"), base_url=ADDRESS)


@pytest.fixture(scope="module")
def judge(classical_bundles: list[Path]) -> Iterator[pairclf.Judge]:
    with pairclf.load(classical_bundles, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def data(classical_config: dict[str, Any]) -> Path:
    return Path(classical_config["data"]["folder"]) / "train.parquet"


@pytest.fixture(scope="module")
def client(judge: pairclf.Judge, data: Path) -> TestClient:
    return client_of(Playground(judge, data))


def post(client: TestClient, path: str, body: object) -> dict[str, Any]:
    response = client.post(f"/token/{path}", json=body, headers=OWN)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_verdicts_are_those_of_the_judge(client: TestClient, judge: pairclf.Judge) -> None:
    verdict = post(client, "verdict", PAIR)
    scores = judge.predict(orders=True, prompt="what?", response_a="good answer", response_b="bad answer")
    for entry, name in zip(verdict["classes"], LMSYS.classes, strict=True):
        assert entry["name"] == name
        assert entry["probabilities"] == [*scores.select(name, f"{name}_AB", f"{name}_BA").row(0)]
    assert verdict["cut"] == verdict["rewards"] == []
    ranked = post(client, "verdict", PAIR | {"answers": [[answer] for answer in ANSWERS]})
    table = judge.rank("what?", ANSWERS)
    assert ranked["score"] == "strength"
    assert [(answer["rank"], answer["score"]) for answer in ranked["ranking"]] == table.select(
        "rank", "strength"
    ).rows()


def test_a_row_of_the_file_is_loaded_by_its_id_and_scored(client: TestClient, judge: pairclf.Judge, data: Path) -> None:
    rows = pl.read_parquet(data)
    row = post(client, "row", {"id": str(rows["id"][4])})
    assert row == {
        "id": str(rows["id"][4]),
        "fields": {"prompt": [rows["prompt"][4]]},
        "answers": [[rows["response_a"][4]], [rows["response_b"][4]]],
    }
    assert post(client, "row", {"id": ""})["id"] == str(rows["id"][0])
    scores = judge.predict(rows[4:5].select(LMSYS.fields))
    mean = [entry["probabilities"][0] for entry in post(client, "verdict", row)["classes"]]
    assert mean == pytest.approx(scores.select(LMSYS.classes).row(0), abs=1e-12)
    response = client.post("/token/row", content=json.dumps({"id": HOSTILE}), headers=OWN)
    assert response.status_code == 422
    assert "no row has this id" in response.json()["error"]
    assert "\x1b" not in response.json()["error"]


def test_what_was_cut_is_said_for_pairs_and_for_rankings_and_models_load_once(
    base_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []

    class Counted(ResidentEnsemble):
        def __init__(self, *arguments: Any) -> None:
            loads.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(judges, "ResidentEnsemble", Counted)
    bundle = random_bundle(tmp_path / "fold0" / "bundle", run_config(tmp_path, base_of("llama")))
    long = ["word " * 200]
    with pairclf.load(bundle, device="cpu") as judge:
        playground = Playground(judge)
        verdict = playground.verdict({"fields": {"prompt": ["Why?"]}, "answers": [["So."], long]})
        [cut] = verdict["cut"]
        assert (cut["bundle"], cut["text"]) == (judge.ensemble.members[0].name, 1)
        assert cut["tokens"] > 100
        first, second = (entry["probabilities"][1:] for entry in verdict["classes"][:2])
        assert first != second
        ranked = playground.verdict({"fields": {"prompt": ["Why?"]}, "answers": [["So."], long, ["No."]]})
        assert [entry["text"] for entry in ranked["cut"]] == [1]
        assert sorted(answer["rank"] for answer in ranked["ranking"]) == [1, 2, 3]
    assert len(loads) == 1


def test_a_reward_models_verdict_has_rewards(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(tmp_path, base_of("llama"), model={"readout": "reward"}, inputs={"max_length": 300})
    with pairclf.load(random_bundle(tmp_path / "fold0" / "bundle", config)) as judge:
        playground = Playground(judge)
        answers = [["So."], ["Or so, at length."], ["No."]]
        verdict = playground.verdict({"fields": {"prompt": ["Why?"]}, "answers": answers[:2]})
        assert [len(entry["probabilities"]) for entry in verdict["classes"]] == [1, 1, 1]
        ranked = playground.verdict({"fields": {"prompt": ["Why?"]}, "answers": answers})
        assert ranked["score"] == "reward"
        rewards = [answer["score"] for answer in ranked["ranking"]]
        assert verdict["rewards"] == pytest.approx(rewards[:2], abs=1e-5)


def test_a_task_of_one_text_has_its_own_form(tmp_path: Path) -> None:
    texts = ["good", "bad", "good and bad", "neither"] * 6
    labels = {"kind": [1, 0, 1, 0] * 6, "rude": [0, 1, 1, 0] * 6}
    pl.DataFrame({"id": range(24), "text": texts, **labels}).write_parquet(tmp_path / "train.parquet")
    task = {"name": "tone", "fields": ["text"], "classes": ["kind", "rude"], "multi_label": True}
    config = {
        "task": task, "approach": "classical", "output_dir": str(tmp_path / "run"),
        "data": {"folder": str(tmp_path), "train": "train.parquet"},
        "folds": {"near_duplicate_threshold": None}, "classical": {"n_features": 512},
    }  # fmt: skip
    with pairclf.load(pairclf.fit(config), device="cpu") as judge:
        playground = Playground(judge)
        assert (playground.form["fields"], playground.form["sides"]) == (["text"], [])
        verdict = playground.verdict({"fields": {"text": ["good"]}, "answers": []})
        assert [len(entry["probabilities"]) for entry in verdict["classes"]] == [1, 1]
        with pytest.raises(DataError, match="and no answers"):
            playground.verdict(PAIR)


def test_half_a_surrogate_pair_is_read_as_in_files(client: TestClient) -> None:
    body = json.dumps(PAIR | {"answers": [["\ud83d"], [None]]})  # as JavaScript writes it
    response = client.post("/token/verdict", content=body, headers=OWN)
    replaced = post(client, "verdict", PAIR | {"answers": [["\ufffd"], [None]]})
    assert response.json()["classes"] == replaced["classes"]


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"fields": {}, "answers": [["a"], ["b"]]},
        PAIR | {"answers": [["a"]]},
        PAIR | {"answers": [["a"], "b"]},
        PAIR | {"answers": [["a"], [1]]},
        PAIR | {"fields": {"prompt": "what?"}},
        PAIR | {"fields": {"prompt": ["what?"], "other": ["x"]}},
    ],
    ids=repr,
)
def test_a_request_that_is_no_row_is_one_message(body: object, client: TestClient) -> None:
    response = client.post("/token/verdict", content=json.dumps(body), headers=OWN)
    assert response.status_code == 422
    assert "no row of task 'lmsys'" in response.json()["error"]


def test_answers_of_several_turns_are_not_ranked(client: TestClient) -> None:
    response = client.post("/token/verdict", json=PAIR | {"answers": [["a", "b"], ["c"], ["d"]]}, headers=OWN)
    assert response.json()["error"].startswith("more than two answers are compared, and one of them has several turns")


# --- who is answered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/token/", {}, 200),
        ("GET", "/token/", {"Host": "localhost:8000"}, 200),
        ("POST", "/token/row", OWN, 200),
        ("GET", "/", {}, 404),
        ("GET", "/tokem/", {}, 404),
        ("POST", "/verdict", OWN, 404),
        ("POST", "/tokem/row", OWN, 404),
        ("GET", "/token/row", {}, 405),
        ("GET", "/token/../", {}, 404),
        ("GET", "/token/", {"Host": "evil.example:8000"}, 403),
        ("GET", "/token/", {"Host": "127.0.0.1.evil.example"}, 403),
        ("GET", "/token/", {"Host": ""}, 403),
        ("GET", "/token/", {"Origin": "http://evil.example"}, 403),
        ("POST", "/token/row", {}, 403),
        ("POST", "/token/row", {"Origin": "null"}, 403),
        ("POST", "/token/row", {"Origin": "http://127.0.0.1:8001"}, 403),
        ("POST", "/token/row", {"Origin": "http://evil.example"}, 403),
        ("POST", "/token/row", {"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ],
)
def test_only_the_page_itself_is_answered(
    method: str, path: str, headers: dict[str, str], status: int, client: TestClient
) -> None:
    body = json.dumps({"id": ""}) if method == "POST" else None
    response = client.request(method, path, content=body, headers=headers)
    assert response.status_code == status
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    ("body", "status"),
    [("{", 400), (b"\xff", 400), ("[" * 100_000, 400), (" " * MAX_BODY + "{}", 413), ("NaN", 422)],
    ids=["not whole", "not UTF-8", "deep", "large", "number"],
)
def test_a_body_that_is_no_request_is_refused(body: str | bytes, status: int, client: TestClient) -> None:
    assert client.post("/token/row", content=body, headers=OWN).status_code == status


def test_the_page_asks_its_server_alone_and_is_kept_nowhere(client: TestClient) -> None:
    response = client.get("/token/")
    assert "connect-src &#x27;self&#x27;" in response.text
    assert "default-src &#x27;none&#x27;" in response.text
    assert response.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["referrer-policy"] == "no-referrer"


class Scripts(HTMLParser):
    """Counts the scripts of a page, and the tags that it should not have."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def test_hostile_names_are_shown_and_never_obeyed(client: TestClient) -> None:
    def tags(name: str) -> list[str]:
        form = {"task": name, "fields": [name], "sides": [], "classes": [name], "turns": True, "bundles": [name]}
        parser = Scripts()
        parser.feed(page({**form, "data": name}))
        return parser.tags

    assert tags(HOSTILE) == tags("plain")
    verdict = client.post("/token/verdict", content=json.dumps(PAIR | {"answers": [[HOSTILE], ["b"]]}), headers=OWN)
    assert verdict.headers["content-type"] == "application/json"
    assert "alert" not in verdict.text


def test_requests_wait_for_each_other(judge: pairclf.Judge) -> None:
    class Slow(Playground):
        active = most = 0

        def verdict(self, request: object) -> dict[str, Any]:
            self.active += 1
            self.most = max(self.most, self.active)
            time.sleep(0.05)
            self.active -= 1
            return {}

        row = verdict

    slow = Slow(judge)
    with client_of(slow) as client:
        threads = [Thread(target=post, args=(client, path, {})) for path in ("verdict", "row", "verdict")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert slow.most == 1


def test_nothing_is_written(
    client: TestClient, classical_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for a moment: a file that comes and goes changes the time of its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def times() -> dict[Path, int]:
        folders = [tmp_path, Path(classical_config["output_dir"]), Path(classical_config["data"]["folder"])]
        return {path: path.stat().st_mtime_ns for top in folders for path in [top, *top.rglob("*")]}

    before = times()
    post(client, "verdict", PAIR)
    post(client, "verdict", PAIR | {"answers": [[answer] for answer in ANSWERS]})
    post(client, "row", {"id": ""})
    assert times() == before


# --- the command -----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_before_a_model_is_loaded(
    judge: pairclf.Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port} of 127\.0\.0\.1 can't be had"):
            serve(Playground(judge), port=port)
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)needs anyio, starlette, uvicorn.*pip install 'pairclf\[try\]'"):
        require_extra()


@contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and the address that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pairclf.__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def served(*arguments: object) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    """The command `pairclf try`, and the address that it prints."""
    return started([sys.executable, "-m", "pairclf", "try", *map(str, arguments)])


def test_the_command_serves_until_ctrl_c(classical_bundles: list[Path], data: Path) -> None:
    with served(classical_bundles[0], "--data", data) as (process, address):
        with urlopen(address) as response:
            assert b"Try a judge" in response.read()
        own = {"Origin": address.rsplit("/", 2)[0]}
        request = Request(f"{address}verdict", json.dumps(PAIR).encode(), own)
        with urlopen(request) as response:
            assert len(json.load(response)["classes"]) == 3
        gone = HTTPConnection(urlsplit(address).netloc)  # closed in the middle of a body
        gone.request("POST", urlsplit(address).path + "verdict", "{", own | {"Content-Length": "9"})
        gone.close()
        with urlopen(address):  # the server has seen it
            pass
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, messages
    assert "good answer" not in messages
    assert "Traceback" not in messages


SLOW = """
import time
from pairclf.playground.server import serve
from pairclf.playground.verdict import Playground

class Slow(Playground):
    form = {"task": "t", "fields": [], "sides": [], "classes": [], "turns": False, "bundles": [], "data": None}
    def __init__(self): pass
    def warm_up(self): pass
    def verdict(self, request):
        print("asked", flush=True)
        time.sleep(3600)

serve(Slow())
"""


def test_a_verdict_that_takes_long_is_given_up_at_ctrl_c() -> None:
    with started([sys.executable, "-c", SLOW]) as (process, address):
        own = {"Origin": address.rsplit("/", 2)[0]}
        asked = HTTPConnection(urlsplit(address).netloc)
        asked.request("POST", urlsplit(address).path + "verdict", "{}", own)
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert json.load(asked.getresponse()) == {"error": "the server has ended"}
        _, messages = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, messages
    assert "Traceback" not in messages


@pytest.mark.thorough
def test_a_browser_shows_verdicts_of_typed_and_loaded_rows(
    browser: Browser, classical_bundles: list[Path], pairs_of_words: tuple[pl.DataFrame, object], tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    rows = pairs_of_words[0].head(3).with_columns(id=pl.Series(["1", "2", "<b>3"]))
    hostile = HOSTILE.removesuffix("\ud83d") + " \u05d0\u05d1"
    rows.with_columns(prompt=pl.concat_str("prompt", pl.lit(hostile))).write_parquet(tmp_path / "rows.parquet")

    def texts(selector: str) -> list[str]:
        return [found.text for found in browser.find(selector)]

    def press(name: str) -> None:
        next(button for button in browser.find("button") if button.text == name).click()

    def wait() -> None:
        for _ in range(600):
            if texts("#status") == [""]:
                return
            time.sleep(0.1)
        raise AssertionError("no answer came")

    with served(*classical_bundles, "--data", tmp_path / "rows.parquet") as (_, address):
        browser.open(address, size="phone", dark=True)
        assert texts("textarea") == ["", "", ""]
        for area, text in zip(browser.find("textarea"), ["what?", "good answer", "bad answer"], strict=True):
            area.send_keys(text)
        press("Score")
        wait()
        cells = texts("#verdict td")
        assert cells[:1] + cells[4:5] == ["winner_model_a", "winner_model_b"]
        assert float(cells[1]) > float(cells[5])
        press("Add an answer")
        browser.find("textarea")[3].send_keys("other", Keys.CONTROL + Keys.ENTER)
        wait()
        assert texts("#verdict th") == ["answer", "strength", "rank"]
        press("Remove")

        browser.find("#id")[0].send_keys("<b>3")
        press("Load")
        wait()
        prompt = browser.find("textarea")[0].get_property("value")
        assert prompt.startswith("prompt 2</script><script>alert(1)")
        browser.find("textarea")[1].send_keys(" and bad")
        press("Score")
        wait()
        assert texts("#verdict th") == ["class", "P", "change", "P, AB", "P, BA"]
        assert texts("#verdict td")[2].startswith(("+0.", "−0."))
        assert texts("#verdict p.quiet")[1] == "change: of P, from the loaded row"
        assert [text for text in texts("h3") if text.endswith("changed")] == ["A: response_a changed"]

        assert browser.overflow() == 0
        assert browser.console() == []
        assert {request.split("/")[2] for request in browser.requests()} == {address.split("/")[2]}
        browser.find("#id")[0].send_keys("none")
        press("Load")
        wait()
        assert texts("#error")[0].startswith("no row has this id")
