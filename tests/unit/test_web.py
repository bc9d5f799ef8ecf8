"""The report's parts without a browser: numbers, escaping, differences, sentences, ticks, labels that keep apart."""

from __future__ import annotations

import html
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core.errors import RunError
from stillroom.web import format as f
from stillroom.web import render, write
from stillroom.web.charts import thin
from stillroom.web.difference import difference
from stillroom.web.drawing import Box, Scale, placed, rounded_domain, text_width, wrapped
from stillroom.web.markup import VOID, clean, el, escape
from stillroom.web.readings import Measured, Missing, read, shown
from stillroom.web.sentences import verdict

FIXTURE = Path(__file__).parent.parent / "fixtures" / "report.json"


def fixture() -> dict[str, Any]:
    return dict(json.loads(FIXTURE.read_text(encoding="utf-8")))


# --- numbers --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "value", "expected"),
    [
        (f.significant, 1210.4, "1,210"),
        (f.significant, 9.996, "10.0"),
        (f.significant, 0.01234, "0.0123"),
        (f.significant, -0.5, "\u22120.500"),
        (f.significant, 3.2e-7, "3.20 × 10⁻⁷"),
        (f.significant, 0, "0"),
        (f.si, 417_024, "417 k"),
        (f.si, 999_999, "1.00 M"),
        (f.si, 12, "12.0"),
        (f.size, 6_841_240, "6.84 MB"),
        (f.count, 999_999, "999,999"),
        (f.count, 2_012_472, "2.01 M"),
        (f.percent, 0.9731, "97.3 %"),
        (f.percent, 1.0, "100 %"),
        (f.percent, 0.9997, "99.97 %"),
        (f.percent, 0.9999999, "more than 99.999 %"),
        (f.percent, 1e-7, "less than 0.001 %"),
        (f.percent, -0.125, "\u221212.5 %"),
        (f.percent, 1.034, "103.4 %"),
        (f.percent_in_words, 0.974, "97 %"),
        (f.percent_in_words, 0.997, "99.7 %"),
        (f.points, -0.0512, "\u22125.1"),
        (f.points, 0.0, "0.0"),
        (f.times, 8.183, "8.2×"),
        (f.times, 12.4, "12×"),
        (f.times, 123.4, "123×"),
        (f.rate, 2106.3, "2,110 tokens/s"),
        (f.rate, 36.14, "36.1 tokens/s"),
        (f.seconds, 0.02714, "27.1 ms"),
        (f.seconds, 0.0000071, "7.10 µs"),
        (f.seconds, 31.2, "31.2 s"),
        (f.seconds, 59.97, "1 min"),
        (f.seconds, 142.8, "2 min 23 s"),
        (f.seconds, 7500, "2 h 5 min"),
        (f.money("USD"), 0, "0.00 USD"),
        (f.money("EUR"), 12.345, "12.35 EUR"),
        (f.money("USD"), 0.0042, "0.0042 USD"),
        (f.tick(f.si), 1e6, "1 M"),
        (f.tick(f.si), 2.5e6, "2.5 M"),
        (f.tick(f.significant), 100.0, "100"),
        (f.tick(f.significant), 1000.0, "1,000"),
        (f.tick(f.significant), 0.03, "0.03"),
    ],
)
def test_numbers_read_well(style: f.Style, value: float, expected: str) -> None:
    assert style(value).replace(f.THIN, " ") == expected


@given(st.floats(1e-4, 1e11))
def test_three_digits_are_within_half_a_percent(value: float) -> None:
    assert float(f.significant(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_no_share_is_rounded_onto_none_or_all(value: float) -> None:
    assert f.percent(value).replace(f.THIN, " ") not in ("0 %", "100 %", "0.0 %", "100.0 %")


def test_intervals_say_their_unit_once() -> None:
    assert f.interval(f.percent, 0.962, 0.979).replace(f.THIN, " ") == "96.2–97.9 %"
    assert f.interval(f.percent, -0.1, 0.2).replace(f.THIN, " ") == "−10.0 to 20.0 %"
    assert f.interval(f.times, 5.0, 5.3) == "5.0–5.3×"
    assert f.interval(f.size, 999_000, 1_200_000).replace(f.THIN, " ") == "999 kB–1.20 MB"
    assert f.interval(f.seconds, 92, 100).replace(f.THIN, " ") == "1 min 32 s–1 min 40 s"


def test_moments() -> None:
    assert f.moment("2025-11-24T07:12:00Z") == f.moment("2025-11-24T07:12:33.250+00:00") == "2025-11-24 07:12\u00a0UTC"
    assert f.moment("yesterday") == "yesterday"


# --- readings -------------------------------------------------------------------------------------------------------------------------


def test_an_absence_keeps_its_reason_and_is_never_a_number() -> None:
    assert read({"a": {"absent": "no items"}}, "a") == Missing("no items")
    assert isinstance(read({}, "a", "b"), Missing)
    for value in (None, float("nan"), float("inf"), "3"):
        assert isinstance(read({"a": {"value": value}}, "a"), Missing)
    assert "absent: " in shown(Missing("<no> items"), f.percent)
    assert "<no>" not in shown(Missing("<no> items"), f.percent)


def test_a_number_shows_its_interval_n_raw_value_and_source() -> None:
    text = shown(Measured(0.97312, 2000, 0.962, 0.979, "ratio", "evals/student.json"), f.percent).replace(f.THIN, " ")
    assert "97.3 %" in text
    assert "96.2–97.9 %, n = 2,000" in text
    assert 'title="0.97312 ratio, from evals/student.json"' in text


# --- markup ---------------------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_text_comes_through_as_text(text: str) -> None:
    element = el("p", text, title=text)
    inner = element[element.index(">") + 1 : -len("</p>")]
    assert "<" not in inner
    assert html.unescape(inner) == clean(text)
    element.encode()  # nothing that UTF-8 cannot carry is left


def test_what_html_cannot_carry_is_shown() -> None:
    assert escape("a\x00b\x1b\x7f\ud800\r\n\tc") == "a\u2400b\u241b\u2421\ufffd\u240d\n\tc"


class _Balance(HTMLParser):
    """Fails at the first element that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_self_contained() -> None:
    page = render(fixture(), metrics=[{"step": step, "learning_rate": 1e-3, "wall": {"tokens_per_second": 100.0 + step}} for step in range(5)])
    balance = _Balance()
    balance.feed(page)
    balance.close()
    assert balance.open == []
    assert re.findall(r'(?:src|href)="(?!#|data:,)', page) == []
    assert "url(" not in page
    assert "@import" not in page
    assert "tokens per second over training" in page.lower()
    assert "Learning rate over training" in page


@pytest.mark.parametrize("report", [{}, {"schema_version": 1, "provenance": {}, "quality": None, "samples": None, "curves": None}])
def test_a_report_without_anything_still_renders(report: dict[str, Any]) -> None:
    page = render(report)
    assert "Neither the student’s quality nor its cost was measured." in page
    assert "absent: <bdi>the report does not have it</bdi>" in page


def test_rendering_is_repeatable() -> None:
    assert render(fixture()) == render(fixture())


# --- differences ----------------------------------------------------------------------------------------------------------------------


@given(st.text("ab01- \n", max_size=40), st.text("ab01- \n", max_size=40))
def test_pieces_make_the_whole_and_what_is_alike_is_alike(left: str, right: str) -> None:
    pieces_left, pieces_right = difference(left, right)
    assert "".join(text for _, text in pieces_left) == left
    assert "".join(text for _, text in pieces_right) == right
    alike = ["".join(text for differs, text in pieces if not differs) for pieces in (pieces_left, pieces_right)]
    assert alike[0] == alike[1]
    if left == right:
        assert not any(differs for differs, _ in pieces_left + pieces_right)


def test_one_digit_is_one_mark() -> None:
    left, right = difference("2024-03-03", "2024-03-13")
    assert left == [(False, "2024-03-"), (True, "0"), (False, "3")]
    assert right == [(False, "2024-03-"), (True, "1"), (False, "3")]


def test_long_texts_are_compared_in_time() -> None:
    left, right = difference("ab" * 5000 + "x", "ba" * 5000 + "y")
    assert "".join(text for _, text in left) == "ab" * 5000 + "x"
    assert any(differs for differs, _ in right)


# --- sentences ------------------------------------------------------------------------------------------------------------------------


def _said(**changes: Any) -> str:
    report = fixture()
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = report
        for parent in parents:
            node = node[parent]
        node[last] = value
    return verdict(report).replace(f.THIN, " ")


def number(value: float) -> dict[str, Any]:
    return {"value": value, "unit": "ratio", "source": "test"}


NONE = {"absent": "not asked for"}


def test_the_verdict_says_what_the_numbers_say() -> None:
    assert _said() == "The student keeps 94 % of what the labels alone do not give, is 8.2× smaller and answers 5.1× faster."
    worse = _said(quality__gap_recovered=number(-0.2), cost__ratios__parameters=number(0.5), cost__ratios__tokens_per_second=number(1.01))
    assert worse == (
        "The student keeps nothing of what the labels alone do not give (gap recovered −20 %), "
        "is 2.0× larger than the teacher and answers as fast as the teacher."
    )
    assert "all of what the labels alone do not give, and more (103 %)" in _said(quality__gap_recovered=number(1.03))


def test_the_verdict_falls_back_on_what_was_measured() -> None:
    without_gap = _said(quality__gap_recovered=NONE)
    assert without_gap.startswith("The student gets 96.5 % of the items exactly right where the teacher gets 99.4 %, is 8.2× smaller")
    without_items = _said(quality__gap_recovered=NONE, quality__student={"exact_match": NONE}, cost__ratios__parameters=NONE)
    assert without_items.startswith("The student would write the same next token as the teacher 99 % of the time, is 8.1× smaller")
    nothing = _said(quality={}, fidelity={}, cost__ratios__tokens_per_second=NONE)
    assert nothing == "How well the student answers was not measured; it is 8.2× smaller."
    assert _said(quality={}, fidelity={}, cost={}) == "Neither the student’s quality nor its cost was measured."


# --- drawing --------------------------------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 9))
def test_ticks_lie_inside_and_are_evenly_spaced(low: float, span: float, most: int) -> None:
    ticks = Scale(low, low + span, 0, 1).ticks(most)
    assert 1 <= len(ticks) <= most
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


@given(st.floats(1e-6, 1e6), st.floats(5, 1e9))
def test_logarithmic_ticks_lie_inside(low: float, ratio: float) -> None:
    ticks = Scale(low, low * ratio, 0, 1, logarithmic=True).ticks(6)
    assert 1 <= len(ticks) <= 6
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in ticks)


@given(st.lists(st.floats(0, 1), min_size=1))
def test_a_domain_holds_its_values(values: list[float]) -> None:
    low, high = rounded_domain(values, at_least=0.05, bounds=(0.0, 1.0))
    assert 0 <= low <= min(values) <= max(values) <= high <= 1
    assert high > low


@given(st.text(st.characters(codec="utf-8"), max_size=80), st.floats(30, 300))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: float) -> None:
    lines = wrapped(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(text_width(line) <= width or len(line) == 1 for line in lines)


def test_a_label_keeps_off_what_is_taken() -> None:
    within = Box(0, 0, 400, 300)
    taken = [Box(180, 130, 220, 170)]
    for _ in range(4):
        box = placed((200, 150), ["Student", "97.2 %"], 26, taken, within, below_first=False)
        assert all(box.overlap(other) == 0 for other in taken)
        assert box.overlap(within) == pytest.approx((box.right - box.left) * (box.bottom - box.top))
        taken.append(box)


def test_thinned_curves_keep_their_mean() -> None:
    points = [(float(step), math.sin(step)) for step in range(1200)]
    thinned = thin(points, 400)
    assert len(thinned) == 400
    assert sum(value for _, value in thinned) / 400 == pytest.approx(sum(value for _, value in points) / 1200)
    assert thin(points[:400], 400) == points[:400]


# --- files ----------------------------------------------------------------------------------------------------------------------------


def test_write_refuses_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunError) as missing:
        write(tmp_path)
    assert missing.value.code == "run-not-a-run"
    for content in ("{", "[]", '{"schema_version": 2}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(RunError) as corrupt:
            write(tmp_path)
        assert corrupt.value.code == "run-corrupt"
    assert not (tmp_path / "report.html").exists()


def test_the_fixture_is_what_its_maker_makes() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import json, make_report; print(json.dumps(make_report.report()))"],
        cwd=FIXTURE.parent, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FIXTURE.parents[2] / "src"), str(FIXTURE.parent)])},
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert json.loads(made.stdout) == fixture()
