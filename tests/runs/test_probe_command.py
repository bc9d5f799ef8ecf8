"""`stillroom probe` and `stillroom requests` as a user has them: against the fake endpoint, endpoints that say their key, and llama.cpp."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from servers import TEACHER, llama_server
from stillroom.collect.collector import Policy
from stillroom.collect.probe import ProbeReport
from stillroom.collect.spend import in_units
from stillroom.collect.store import RequestStore
from stillroom.collect.wire import Endpoint, Response
from stillroom.runs import probing
from stillroom.testing.fake_endpoint import Running, fake_endpoint
from stillroom.testing.settings import make_settings

ROOT = Path(__file__).resolve().parents[2]
OWN = ("--access", "weights", "--licence", "own")
HURRIED = Policy(attempts=3, first_wait_seconds=0.01)
KEY = "sk-planted/0123456789abcdefQRSTUV"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "terms"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def honest() -> Iterator[Running]:
    with fake_endpoint() as running:
        yield running


def endpoint_of(running: Running) -> Endpoint:
    return Endpoint.parse(running.base_url, "fake-teacher")


def kept_report(running: Running, store: str = "requests.sqlite") -> dict[str, Any] | None:
    with RequestStore.open(store, read_only=True) as opened:
        opened.verify()
        return opened.recall("probe", endpoint_of(running))


# --- what it finds and keeps --------------------------------------------------------------------------------------------------------


def test_the_report_is_printed_kept_and_read_again(stillroom: Run, honest: Running) -> None:
    code, page, _ = stillroom("probe", honest.base_url, "--model", "fake-teacher", *OWN)
    assert code == 0
    for words in ("top_logprobs     proved", "prompt_logprobs  refuted", "token_ids        not supported", "context          not tested", "k = 20"):
        assert words in page
    sent, bill = honest.bill.received, honest.bill
    assert f"{bill.prompt_tokens + bill.completion_tokens:,} tokens spent, 0 tokens reserved in all" in page
    kept = kept_report(honest)
    assert kept is not None
    report = ProbeReport.from_json(kept)
    assert report.calls == sent

    code, again, _ = stillroom("probe", honest.base_url, "--model", "fake-teacher", *OWN)
    assert code == 0
    assert honest.bill.received == sent, "what was found before was bought again"
    assert "none now" in again
    assert page.split("signal")[0] == again.split("signal")[0]

    code, anew, _ = stillroom("probe", honest.base_url, "--model", "fake-teacher", *OWN, "--again")
    assert code == 0
    assert honest.bill.received == 2 * sent
    assert f"{sent} made, by {sent} requests" in anew
    assert (kept_report(honest) or {})["number"] == 1


def test_a_question_more_asks_only_that(stillroom: Run, honest: Running, tmp_path: Path) -> None:
    """The calls that were made are read from the store: the report of all of them is that of a probe which asked all at once."""
    probe = ("probe", honest.base_url, "--model", "fake-teacher", *OWN, "--json")
    first = json.loads(stillroom(*probe)[1])
    sent = honest.bill.received
    second = json.loads(stillroom(*probe, "--context-test", "6000")[1])
    assert honest.bill.received == sent + 1
    context = next(finding for finding in second["findings"] if finding["name"] == "context")
    assert (context["verdict"], context["value"]) == ("proved", "error")
    assert [one for one in second["findings"] if one["name"] != "context"] == [one for one in first["findings"] if one["name"] != "context"]
    assert second["this_command"]["sent"] == 1
    at_once = json.loads(stillroom(*probe, "--context-test", "6000", "--store", str(tmp_path / "other.sqlite"))[1])
    assert at_once["findings"] == second["findings"]
    # And what was found is not lost when nothing more is asked.
    assert json.loads(stillroom(*probe)[1])["overflow_tokens"] == 6000


@pytest.mark.parametrize(
    ("lie", "name", "verdict", "kind"),
    [
        ("mass-above-one", "entries", "refuted", "text"),
        ("seed-ignored", "seed", "refuted", "top_k"),
        ("logprobs-unsupported", "logprobs", "not-supported", "text"),
    ],
)
def test_lies_are_told(stillroom: Run, lie: str, name: str, verdict: str, kind: str) -> None:
    with fake_endpoint(make_settings({"lies": [lie]})) as running:
        code, out, _ = stillroom("probe", running.base_url, "--model", "fake-teacher", *OWN, "--json")
    found = json.loads(out)
    assert code == 0
    assert {finding["name"]: finding["verdict"] for finding in found["findings"]}[name] == verdict
    assert found["signal"]["kind"] == kind


def test_faults_are_asked_again_and_the_account_still_holds(stillroom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PATIENCE", HURRIED)
    order = ["http-500", "none", "drop-after-work", "none", "error-in-200", "none", "cut-json", "none", "drop-before-work"]
    with fake_endpoint(make_settings({"faults_in_order": order})) as running:
        code, out, _ = stillroom("probe", running.base_url, "--model", "fake-teacher", *OWN, "--json")
        bill = running.bill
    found = json.loads(out)
    assert code == 0
    assert [finding["name"] for finding in found["findings"] if finding["verdict"] == "not-tested"] == ["context"]
    done = found["this_command"]
    settled, reserved = done["spent"]["tokens"], done["reserved"]["tokens"]
    assert settled <= bill.prompt_tokens + bill.completion_tokens <= settled + reserved
    assert reserved > 0
    assert done["sent"] == bill.received == found["calls"] + sum(bill.faults.values())
    assert set(bill.faults) >= {"http-500", "drop-after-work", "cut-json"}


# --- whether it may, and for how much ----------------------------------------------------------------------------------------------


def denying(tmp_path: Path) -> tuple[str, ...]:
    """The options of a teacher whose provider forbids models that compete, and a recipe with such a student."""
    tree = {
        "teacher": {"model": "gpt-5.2"},
        "terms": {"access": "api:openai"},
        "intent": {"task": "general-llm", "release": "weights", "commercial": True},
        "student": {"from_scratch": {"layers": 2, "width": 8, "heads": 2, "feed_forward": 8}},
        "prompts": {"path": "prompts.jsonl"},
    }
    path = tmp_path / "denied.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return ("--recipe", str(path))


@pytest.mark.parametrize(
    ("options", "exit_code", "says"),
    [
        ((), 5, "--access"),
        (("--access", "weights"), 5, "--licence"),
        (("--access", "host:nobody-knows"), 5, "nobody-knows"),
        (("--access", "weights", "--licence", "llama3.1"), 5, "--recipe"),
        (None, 4, "entitlement-denied"),
    ],
)
def test_without_the_right_to_there_is_no_request(
    stillroom: Run, honest: Running, tmp_path: Path, options: tuple[str, ...] | None, exit_code: int, says: str
) -> None:
    code, out, err = stillroom("probe", honest.base_url, "--model", "fake-teacher", *(denying(tmp_path) if options is None else options))
    assert (code, out) == (exit_code, "")
    assert says in err
    assert honest.bill.received == 0
    assert honest.requests == []
    assert not Path("requests.sqlite").exists()


def test_options_go_before_the_recipe_and_its_intent_holds_with_them(stillroom: Run, honest: Running, tmp_path: Path) -> None:
    recipe = denying(tmp_path)
    assert stillroom("probe", honest.base_url, "--model", "fake-teacher", *OWN, *recipe)[0] == 0
    # The recipe's own `weights` is a default: it says nothing of who serves at another machine.
    text = Path(recipe[1]).read_text(encoding="utf-8").replace("access: api:openai", "licence: own")
    Path(recipe[1]).write_text(text, encoding="utf-8")
    assert stillroom("probe", "https://endpoint.invalid/v1", "--model", "m", *recipe)[0] == 5
    assert stillroom("probe", honest.base_url, "--model", "fake-teacher", *recipe, "--store", "other.sqlite")[0] == 0
    Path(recipe[1]).write_text(text.replace("task: general-llm", "purpose: evaluate"), encoding="utf-8")
    code, _, err = stillroom("probe", honest.base_url, "--model", "fake-teacher", *recipe)
    assert (code, "recipe-invalid" in err) == (2, True)


def test_a_cap_ends_a_probe_and_a_higher_one_goes_on(stillroom: Run, honest: Running) -> None:
    probe = ("probe", honest.base_url, "--model", "fake-teacher", *OWN)
    code, _, err = stillroom(*probe, "--max-tokens", "900")
    assert (code, "spend-cap-reached" in err) == (2, True)
    bill = honest.bill
    assert bill.done > 0
    assert bill.prompt_tokens + bill.completion_tokens <= 900
    assert kept_report(honest) is None
    code, page, _ = stillroom(*probe)
    assert code == 0
    assert f"{bill.received} had been bought before" in page
    assert honest.bill.received == len({(one.key, one.attempt) for one in honest.requests})
    whole = json.loads(stillroom(*probe, "--json")[1])
    assert whole["calls"] == honest.bill.received, "a call was sent twice"
    assert stillroom(*probe, "--again", "--max-tokens", "0")[0] == 2


def test_money_is_counted_to_the_last_digit(stillroom: Run, honest: Running) -> None:
    prices = {"as_of": "2026-11-24", "currency": "USD", "prices": [{"base_url": honest.base_url, "model": "fake-teacher", "input": 1, "output": 4}]}
    probe = ("probe", honest.base_url, "--model", "fake-teacher", *OWN)
    assert "price-unknown" in stillroom(*probe, "--max-money", "1")[2]
    text = yaml.safe_dump(prices).replace("'2026-11-24'", "2026-11-24")
    Path("prices.yaml").write_text(text, encoding="utf-8")
    code, out, err = stillroom(*probe, "--prices", "prices.yaml", "--max-money", "0.01", "--json")
    assert code == 0, err
    assert Decimal(json.loads(out)["this_command"]["spent"]["money"]) * 10**6 == honest.bill.exact_micro_dollars
    code, page, _ = stillroom("requests", "requests.sqlite")
    assert f"({in_units(int(honest.bill.exact_micro_dollars * 10**6)).normalize():f} USD)" in page
    assert "spend-cap-reached" in stillroom(*probe, "--again", "--prices", "prices.yaml", "--max-money", "0.0001")[2]


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------


def test_errors_are_clear(stillroom: Run, honest: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PATIENCE", HURRIED)
    for arguments, says in {
        (honest.base_url, "--model", "another"): "not-found from 'another'",
        ("http://127.0.0.1:1/v1", "--model", "m"): "no connection",
        ("http://user:word@127.0.0.1/v1", "--model", "m"): "endpoint-invalid",
        (honest.base_url, "--model", "m", "--key-variable", "NO_SUCH_KEY"): "key-unusable",
        (honest.base_url, "--model", "m", "--prices", "nowhere.yaml"): "prices-invalid",
        (honest.base_url, "--model", "m", "--access", "somehow"): "Invalid value for --access",
        (honest.base_url, "--model", "m", "--tokenizer", "nowhere"): "[model-",
    }.items():
        code, out, err = stillroom("probe", *OWN, *arguments)
        assert (code, out) == (2, ""), err
        assert says in err, err
    assert kept_report(honest) is None  # nothing is remembered of a probe without one answer


def test_an_endpoint_that_only_fails(stillroom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PATIENCE", HURRIED)
    with fake_endpoint(make_settings({"faults": {"http-503": 1.0}})) as running:
        code, _, err = stillroom("probe", running.base_url, "--model", "fake-teacher", *OWN)
        assert (code, "endpoint-refuses" in err) == (2, True)
        assert kept_report(running) is None


def test_a_probe_that_is_killed_goes_on_and_pays_once(tmp_path: Path) -> None:
    with fake_endpoint(make_settings({"latency_ms": 120})) as running:
        command = [sys.executable, "-m", "stillroom", "probe", running.base_url, "--model", "fake-teacher", *OWN, "--json"]
        for number in (signal.SIGKILL, signal.SIGINT):
            begun = running.bill.received
            process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
            until = time.monotonic() + 120
            while running.bill.received < begun + 4 and time.monotonic() < until:
                time.sleep(0.02)
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
            assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), (out, err)
            assert out == ""
            assert number == signal.SIGKILL or "interrupted" in err
        received = running.bill.received
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), check=True)
        found, bill = json.loads(done.stdout), running.bill
    assert 8 <= received < bill.received
    # All but the one call that was under way when the process was killed were sent once.
    assert found["calls"] <= bill.received <= found["calls"] + 1
    with RequestStore.open("requests.sqlite", read_only=True) as store:
        spend = store.spend()
    assert spend.settled.tokens <= bill.prompt_tokens + bill.completion_tokens <= spend.settled.tokens + spend.reserved.tokens
    assert spend.unknown <= 1


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}


# --- the key -----------------------------------------------------------------------------------------------------------------------


class Chatty:
    """An endpoint that says the key it was sent, in answers or in a refusal."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.sent = 0

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Response:
        assert headers["Authorization"] == f"Bearer {KEY}"
        self.sent += 1
        said = f"{headers['Authorization']} asked, its key {KEY} is known"
        usage = {"prompt_tokens": 5, "completion_tokens": 5}
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "text": said, "finish_reason": "stop"}
        document: dict[str, Any] = {"model": f"m {KEY}", "system_fingerprint": KEY, "choices": [choice], "usage": usage}
        if self.status != 200:
            document = {"error": {"message": said, "type": KEY, "code": KEY}}
        return Response(status=self.status, headers={"x-request-id": KEY}, body=json.dumps(document).encode(), seconds=0.0)

    async def close(self) -> None: ...


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_a_planted_key_is_nowhere(stillroom: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int) -> None:
    chatty = Chatty(status)
    monkeypatch.setenv("PLANTED", KEY)
    monkeypatch.setattr(probing, "open_transport", lambda: chatty)
    monkeypatch.setattr(probing, "PATIENCE", HURRIED)
    probe = ("probe", "https://endpoint.invalid/v1", "--model", "m", *OWN, "--key-variable", "PLANTED")
    told = [stillroom(*probe), stillroom(*probe, "--json"), stillroom("requests", "requests.sqlite", "--json")]
    assert [code for code, _, _ in told] == ([0, 0, 0] if status == 200 else [2, 2, 0])
    assert chatty.sent > 0
    texts = [out + err for _, out, err in told]
    with RequestStore.open("requests.sqlite") as store:
        dump = "\n".join(store._connections[-1].iterdump())
        bodies = [store.raw(key.hex()) or b"" for (key,) in store._rows_of("SELECT key FROM calls")]
    assert (status == 200) == any(bodies)
    for piece in (KEY, KEY.replace("/", "\\/"), KEY[3:], KEY[-16:]):
        assert not any(piece in text for text in (*texts, dump))
        assert not any(piece.encode() in data for data in bodies)
        assert not any(piece.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_bad_key(stillroom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", KEY)
    with fake_endpoint(make_settings({"api_keys": ["sk-another-key-0000000000"]})) as running:
        code, out, err = stillroom("probe", running.base_url, "--model", "fake-teacher", *OWN, "--key-variable", "PLANTED")
    assert (code, out) == (2, "")
    assert "bad-key" in err
    assert "PLANTED" in err
    assert KEY not in err


# --- stillroom requests ------------------------------------------------------------------------------------------------------------


def test_requests_counts_and_explains(stillroom: Run, honest: Running) -> None:
    report = json.loads(stillroom("probe", honest.base_url, "--model", "fake-teacher", *OWN, "--json")[1])
    one, other = next(finding["calls"] for finding in report["findings"] if finding["name"] == "temperature")
    code, text, _ = stillroom("requests", "requests.sqlite", "--explain", one[:16])
    assert code == 0
    assert text.startswith(f"call {one} is answered")
    assert json.loads(stillroom("requests", "requests.sqlite", "--explain", other, "--json")[1])["nearest"] is not None
    code, page, _ = stillroom("requests", "requests.sqlite")
    assert code == 0
    for word in ("requested  0", "pending", "spent", "reserved", "cap"):
        assert word in page
    counted = json.loads(stillroom("requests", "requests.sqlite", "--json")[1])
    assert counted["spend"]["settled"] == report["this_command"]["spent"]
    for wrong, says in (
        (("requests.sqlite", "--explain", "xyz"), "hexadecimal"),
        (("requests.sqlite", "--explain", "0" * 64), "no call"),
        (("gone",), "no file"),
    ):
        code, out, err = stillroom("requests", *wrong)
        assert (code, out) == (2, "")
        assert says in err


# --- a real server -----------------------------------------------------------------------------------------------------------------


def test_llama_cpp_with_the_bundled_teacher(stillroom: Run) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    with llama_server(TEACHER) as server:
        probe = ("probe", server.base_url, "--model", server.model, *OWN, "--tokenizer", str(TEACHER), "--context-test", "600", "--json")
        code, out, err = stillroom(*probe)
    assert code == 0, err
    found = json.loads(out)
    verdicts = {finding["name"]: finding["verdict"] for finding in found["findings"]}
    assert [name for name, verdict in verdicts.items() if verdict != "proved"] == ["echo", "prompt_logprobs"]
    assert found["signal"]["kind"] == "top_k"
    assert found["tokenizer"] is not None
    # The server fails on a schema whose value its tokenizer cannot say. Whether that was billed nobody knows: two attempts stay reserved.
    with RequestStore.open("requests.sqlite", read_only=True) as store:
        assert store.spend().unknown == 2
    assert 0 < found["this_command"]["reserved"]["tokens"] < 2_000
