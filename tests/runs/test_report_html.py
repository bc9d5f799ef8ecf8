"""The report in a real browser: nothing broken, nothing overflowing, nothing asked of a network. Chromium is driven over the DevTools pipe.

Without a Chromium the test is skipped; with CI=true that is a failure. A directory in STILLROOM_SCREENSHOTS receives pictures to look at.
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.runs.report import Report
from stillroom.web import render, write

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent
FIXTURE = HERE.parent / "fixtures" / "report.json"
CHECKS = (HERE / "report_html_checks.js").read_text(encoding="utf-8")
WIDTHS = (360, 768, 1280)
SCHEMES = ("light", "dark")
PRINTED_WIDTH = 673  # of A4 between the margins that the style sheet sets

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync "
    "--disable-default-apps --disable-extensions --disable-dev-shm-usage --hide-scrollbars --mute-audio --remote-debugging-pipe"
).split()


# --- the browser ----------------------------------------------------------------------------------------------------------------------


class Chromium:
    """One page of a headless Chromium, spoken to over file descriptors 3 and 4 (null-terminated JSON): no port, no driver, no dependency."""

    def __init__(self, binary: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # fds 3 and 4 are what the browser expects; a child of our own moves them there, since other threads may be running here
        place = (
            "import fcntl,os,sys; a,b=(fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]); "
            "os.dup2(a,3); os.dup2(b,4); os.execvp(sys.argv[3], sys.argv[3:])"
        )
        command = [sys.executable, "-c", place, str(theirs_in), str(theirs_out), binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        target = self._attach()
        self._session: str | None = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session = None

    def _attach(self) -> str:
        for _ in range(100):
            pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
            if pages:
                return str(pages[0]["targetId"])
            time.sleep(0.1)
        raise RuntimeError("Chromium opened no page")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one DevTools command. Raises RuntimeError if the browser refuses, dies or says nothing for a minute."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._calls:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return dict(reply["result"])
            self.events.append(reply)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], 60)[0]:
                raise RuntimeError("Chromium has said nothing for a minute")
            received = os.read(self._in, 1 << 20)
            if not received:
                raise RuntimeError("Chromium has ended")
            self._buffer += received
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))

    def open(self, path: Path) -> None:
        """Loads a file and waits until it has loaded; events before are forgotten."""
        self.events = []
        self.call("Page.navigate", url=path.as_uri())
        self._wait_for("Page.loadEventFired")

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def view(self, width: int, scheme: str, *, media: str = "screen") -> None:
        """A window of this width, colour scheme and medium."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it prints on A4."""
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)["data"])

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A browser, or a visible skip; with CI=true its absence is a failure."""
    names = [os.environ.get("STILLROOM_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
    binary = next((path for name in names if name and (path := shutil.which(name))), None)
    if binary is None:
        message = "no Chromium found: install it (apt-get install chromium), or name it in STILLROOM_CHROMIUM"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    browser = Chromium(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# --- the reports ----------------------------------------------------------------------------------------------------------------------

ABSENT = {"absent": "it was not asked for, and this is a reason of some length so that it has to wrap in a narrow column of a phone"}
LONG_WORD = "Donaudampfschifffahrtselektrizit\u00e4tenhauptbetriebswerkbauunterbeamtengesellschaft_" * 3
HOSTILE = (
    "<script>document.title='owned'</script><img src=http://example.com/x onerror=alert(1)>",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 12:30 \u202e reversed",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600 e\u0301 \u65e5\u672c\u8a9e",
    "x" * 5000,
    "word " * 1000,
    "one\ntwo\n\n\tthree\n" * 12,
    "\x00\x07\x1b[31mred\x7f\r\n",
    "",
)


def base() -> dict[str, Any]:
    """The report as a demo gives it."""
    return dict(json.loads(FIXTURE.read_text(encoding="utf-8")))


def nothing_measured() -> dict[str, Any]:
    """Every number absent that may be."""
    report = base()
    for model in report["quality"].values():
        model.clear()
        model.update(ABSENT)
    for model in ("teacher", "student", "student_before", "label_only"):
        report["quality"][model] = {"exact_match": ABSENT, "families": {}}
    report["fidelity"] = dict.fromkeys(report["fidelity"], ABSENT)
    report["cost"] = {who: dict.fromkeys(costs, ABSENT) for who, costs in report["cost"].items()}
    report["making"] |= {"teacher_tokens": ABSENT, "training_tokens": ABSENT, "updates": ABSENT, "wall_seconds": {}}
    report |= {"curves": [], "samples": []}
    report["provenance"] |= {"decisions": [], "commands": [], "terms": {}, "target_store_sha256": None, "machine": {}, "versions": {}}
    return report


def without_items() -> dict[str, Any]:
    """Prompts alone: no exact match, samples that nobody scored."""
    report = base()
    for model in ("teacher", "student", "student_before", "label_only"):
        report["quality"][model] = {"exact_match": ABSENT, "families": {}}
    report["quality"]["gap_recovered"] = ABSENT
    for sample in report["samples"]:
        sample |= {"expected": None, "family": None, "teacher_right": None, "student_right": None}
    return report


def without_label_only() -> dict[str, Any]:
    """Items, but no labelled pairs to train a baseline on."""
    report = base()
    report["quality"] |= {"label_only": {"exact_match": ABSENT, "families": {}}, "gap_recovered": ABSENT}
    return report


def one_point_no_samples() -> dict[str, Any]:
    """A run of one step."""
    report = base()
    return report | {"curves": [{"step": 1, "name": "train", "nats": 2.5}], "samples": []}


def many_families() -> dict[str, Any]:
    """Forty families with long names, some of which have nowhere to break."""
    report = base()
    names = [f"family {index} of expressions that people write in letters, minutes and messages" for index in range(20)]
    names += [f"{index}_{LONG_WORD[: 40 + 5 * index]}" for index in range(15)] + [f"\u6642\u9593\u8868\u73fe{index}" * 9 for index in range(5)]
    for model in ("teacher", "student", "label_only", "student_before"):
        given = list(report["quality"][model]["families"].values())
        report["quality"][model]["families"] = {name: given[index % 5] | {"n": 50 + index} for index, name in enumerate(names)}
    return report


def hostile() -> dict[str, Any]:
    """Text that tries to be markup, to turn the line round, or not to end; wherever text may stand."""
    report = base()
    pairs = [(left, right) for left in HOSTILE for right in (HOSTILE[0], left[::-1], left[:-1] + "!")]
    report["samples"] = [
        {"prompt": left, "expected": right, "family": HOSTILE[0], "teacher": left, "student": right, "teacher_right": index % 2 == 0, "student_right": False, "agree": False}
        for index, (left, right) in enumerate(pairs)
    ] * 3  # fmt: skip
    report["title"] = LONG_WORD + HOSTILE[0]
    provenance = report["provenance"]
    provenance |= {"recipe_name": LONG_WORD, "verdict": HOSTILE[0], "commands": [f"stillroom run {LONG_WORD}", HOSTILE[0]]}
    provenance["terms"] |= {"document": "javascript:alert(1)", "licence": LONG_WORD, "obligations": [LONG_WORD, HOSTILE[1], HOSTILE[0]]}
    provenance["decisions"] = [{"what": LONG_WORD, "chosen": HOSTILE[0], "why": HOSTILE[1]}]
    provenance["machine"] = {LONG_WORD: HOSTILE[2], HOSTILE[0]: LONG_WORD}
    provenance["teacher"]["source"] = "/" + "/".join([LONG_WORD] * 3)
    report["making"]["wall_seconds"] = {LONG_WORD: report["making"]["prompts"]}
    report["making"]["money"] = {"value": 0.00042, "unit": LONG_WORD[:30], "source": HOSTILE[0]}
    return report


def extremes() -> dict[str, Any]:
    """Numbers at the ends of their ranges, a student that is worse and slower, three models on one spot."""
    report = base()
    for model in ("teacher", "student", "label_only"):
        report["quality"][model]["exact_match"] |= {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    report["quality"]["gap_recovered"] |= {"value": -1.25, "low": -40.0, "high": 7.5}
    for who, parameters, speed in (("teacher", 7.1e11, 1e-5), ("student", 7.0e11, 8.9e-6)):
        report["cost"][who]["parameters"]["value"] = parameters
        report["cost"][who]["bytes"]["value"] = parameters * 2e6
        report["cost"][who]["tokens_per_second"] |= {"value": speed, "low": speed * 0.9, "high": speed * 1.1}
        report["cost"][who]["latency_p50_seconds"] |= {"value": 400_000.0, "low": 1e-9, "high": 500_000.0}
    report["cost"]["ratios"]["parameters"]["value"] = 1.01
    report["cost"]["ratios"]["tokens_per_second"] |= {"value": 0.125, "low": 0.1, "high": 0.2}
    report["fidelity"]["forward_kl_nats"] |= {"value": 0.0, "low": 0.0, "high": 0.0}
    report["curves"] = [{"step": step, "name": "train", "nats": 3.0 - step / 9000} for step in range(30_000)]
    report["curves"] += [{"step": step * 1000, "name": "validation", "nats": 3.0 - step / 9} for step in range(30)]
    return report


def close_together() -> dict[str, Any]:
    """Scores so close that labels have to get out of each other's way, all of them high."""
    report = base()
    for model, value in (("teacher", 0.962), ("student", 0.958), ("label_only", 0.951), ("student_before", 0.93)):
        scores = [report["quality"][model]["exact_match"], *report["quality"][model]["families"].values()]
        for score in scores:
            score |= {"value": value, "low": value - 0.008, "high": value + 0.008}
    report["cost"]["teacher"]["parameters"]["value"] = 1.1 * report["cost"]["student"]["parameters"]["value"]
    report["curves"] = [entry | {"nats": entry["nats"] - 0.3} for entry in report["curves"]]
    return report


def behind_an_endpoint(*, purposes: tuple[str, ...] = ("collect", "evaluate", "compare")) -> dict[str, Any]:
    """What was asked of an endpoint, with reasons of many words."""
    report = base()
    reasons = {"unverified-logprobs": 1_234_567, "unterminated-reasoning": 12, "near-duplicate": 3, "x" * 80: 1, HOSTILE[0]: 2}
    rows = {"requested": 2_345_678, "accepted": 1_111_093, "rejected": reasons, "failed": {"content-filtered": 1}, "pending": 0}
    asked = {purpose: rows | ({} if purpose == "collect" else {"rejected": {}, "failed": {}}) for purpose in purposes}
    spent = {"value": 123_456_789.0, "unit": "tokens", "source": "requests.json"}
    report["collection"] = {
        "rows": asked, "logprobs_verified": 1_000_000, "logprobs_demoted": {"mass-above-one": 1_234_567}, "spent_tokens": spent,
        "reserved_tokens": spent, "spent_money": {"value": 12.3456789, "unit": "USD", "source": "requests.json, at prices of 2026-11-01"},
        "reserved_money": ABSENT, "cap_tokens": spent, "cap_money": ABSENT, "break_even_calls": ABSENT,
        "answers_tokens": spent, "answers_money": ABSENT, "projected_tokens": spent | {"low": 120_000_000.0, "high": 130_000_000.0},
        "projected_money": ABSENT, "pilot_tokens": spent | {"low": 120_000_000.0, "high": 130_000_000.0, "n": 20},
        "pilot_money": {"value": 12.34, "low": 11.9, "high": 13.1, "n": 20, "unit": "USD", "source": "requests.json"},
    }  # fmt: skip
    return report


def many_purposes() -> dict[str, Any]:
    """A store that was used for more than one run asks for."""
    return behind_an_endpoint(purposes=("collect", "evaluate", "compare", "other", "something-of-your-own"))


def nothing_asked() -> dict[str, Any]:
    """A store without a row."""
    return behind_an_endpoint(purposes=())


VARIANTS: tuple[Callable[[], dict[str, Any]], ...] = (
    base, nothing_measured, without_items, without_label_only, one_point_no_samples, many_families, hostile, extremes, close_together,
    behind_an_endpoint, many_purposes, nothing_asked,
)  # fmt: skip


# --- the tests ------------------------------------------------------------------------------------------------------------------------


def written(report: dict[str, Any], directory: Path) -> Path:
    """report.html of a run directory that holds this report."""
    rows = [
        {"step": k, "name": "train", "learning_rate": k * 1e-6, "gradient_norm": 3 / (k + 1), "wall": {"tokens_per_second": 800 + k % 7}}
        for k in range(900)
    ]
    torn = '{"step": 901, "na'
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn, encoding="utf-8")
    (directory / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return write(directory)


def complaints(browser: Chromium, path: Path) -> list[str]:
    """What the browser has complained of or asked for since the page was opened."""
    found = []
    for event in browser.events:
        match event.get("method"):
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                found.append(json.dumps(event["params"])[:400])
            case "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if url != path.as_uri() and not url.startswith("data:"):
                    found.append(f"asked for {url}")
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_every_table_has_a_layout_for_phones(variant: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    page = written(variant(), tmp_path).read_text(encoding="utf-8")
    used = set(re.findall(r'<table[^>]* class="(grid-\d+)', page))
    assert len(used) > 1
    assert used <= set(re.findall(r"\.(grid-\d+) \{ --columns", page)), "a table is wider than the style sheet knows"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_nothing_is_broken(variant: Callable[[], dict[str, Any]], chromium: Chromium, tmp_path: Path) -> None:
    report = variant()
    Report.model_validate(report)
    path = written(report, tmp_path)
    chromium.open(path)
    chromium.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    problems = []
    views = [(width, scheme, "screen") for width in WIDTHS for scheme in SCHEMES] + [(PRINTED_WIDTH, scheme, "print") for scheme in SCHEMES]
    for width, scheme, media in views:
        chromium.view(width, scheme, media=media)
        problems += [f"{width} {scheme} {media}: {problem}" for problem in chromium.evaluate(CHECKS)]
        if shots := os.environ.get("STILLROOM_SCREENSHOTS"):
            Path(shots).mkdir(parents=True, exist_ok=True)
            chromium.picture(Path(shots) / f"{variant.__name__}-{width}-{scheme}-{media}.png")
    assert not problems, "\n".join(problems[:20])
    assert not complaints(chromium, path)
    assert chromium.evaluate("document.title") == report["title"]


def test_prints(chromium: Chromium, tmp_path: Path) -> None:
    chromium.open(written(base(), tmp_path))
    chromium.view(1280, "dark", media="")
    pdf = chromium.pdf()
    assert pdf.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 3 <= pages <= 14


def test_is_readable_without_its_script(chromium: Chromium, tmp_path: Path) -> None:
    path = written(base(), tmp_path)
    said = "(() => { const m = document.querySelector('main').cloneNode(true); m.querySelectorAll('.filter, .readout').forEach((e) => e.remove()); return m.textContent; })()"
    chromium.view(768, "light")
    chromium.open(path)
    with_script = chromium.evaluate(said)
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(path)
        assert chromium.evaluate("document.getElementById('sample-filter').children.length") == 0
        assert chromium.evaluate(said) == with_script
        assert chromium.evaluate(CHECKS) == []
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_samples_can_be_filtered_and_curves_read(chromium: Chromium, tmp_path: Path) -> None:
    report = base()
    chromium.view(1280, "light")
    chromium.open(written(report, tmp_path))
    shown = "[...document.querySelectorAll('.sample')].filter((e) => e.checkVisibility()).length"
    disagreements = sum(not sample["agree"] for sample in report["samples"])
    assert chromium.evaluate(shown) == len(report["samples"])
    chromium.evaluate("[...document.querySelectorAll('.filter button')].find((b) => b.textContent.startsWith('Disagree')).click()")
    assert chromium.evaluate(shown) == disagreements
    prompt = report["samples"][0]["prompt"]
    chromium.evaluate(
        f"(() => {{ const i = document.querySelector('.filter input'); i.value = {json.dumps(prompt)}; i.dispatchEvent(new Event('input')); }})()"
    )
    assert chromium.evaluate(shown) == sum(prompt in sample["prompt"] and not sample["agree"] for sample in report["samples"])

    chromium.evaluate("document.querySelector('#training svg.wide').scrollIntoView()")
    box = chromium.evaluate("document.querySelector('#training svg.wide').getBoundingClientRect().toJSON()")
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + box["width"] / 2, y=box["y"] + box["height"] / 2)
    assert re.match(r"train [\d.]+ at step [\d,]+; validation [\d.]+ at step", chromium.evaluate("document.querySelector('.readout').textContent"))


def test_the_checks_can_fail(chromium: Chromium, tmp_path: Path) -> None:
    """Each check is given a page on which it must speak up."""
    path = tmp_path / "broken.html"
    page = render(base() | {"samples": []})
    breakages = {
        "the page is": "document.querySelector('main').style.width = '3000px'",
        "holds": "document.querySelector('h2').style.cssText = 'white-space: nowrap; width: 1px'",
        "cut off": "document.querySelector('.verdict').style.cssText = 'height: 5px; overflow: hidden'",
        "keyboard": "document.querySelector('.verdict').style.cssText = 'height: 5px; overflow: auto'",
        "words overlap": "document.querySelectorAll('#quality svg.wide text').forEach((t) => t.setAttribute('y', 20))",
        "outside its picture": "document.querySelector('#quality svg.wide text').setAttribute('x', -50)",
        "the page says": "document.querySelector('.lead').textContent = 'it is NaN'",
        "is empty": "document.querySelector('td').textContent = ''",
        "contrast": "document.querySelector('.lead').style.color = 'rgb(150, 150, 150)'",
        "leads nowhere": "document.querySelector('#fidelity').id = 'elsewhere'",
        "without scope": "document.querySelector('th').removeAttribute('scope')",
        "without a description": "document.querySelector('svg.chart').removeAttribute('aria-label')",
    }
    path.write_text(page, encoding="utf-8")
    chromium.view(1280, "light")
    for expected, breakage in breakages.items():
        chromium.open(path)
        chromium.evaluate(breakage)
        assert any(expected in problem for problem in chromium.evaluate(CHECKS)), expected


def test_a_script_in_the_page_that_is_not_ours_does_not_run(chromium: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "injected.html"
    path.write_text(
        render(base()).replace("<main>", "<main><script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x'>"), encoding="utf-8"
    )
    chromium.open(path)
    assert chromium.evaluate("document.title") == base()["title"]
    assert any("Content Security Policy" in complaint for complaint in complaints(chromium, path))
