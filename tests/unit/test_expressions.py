"""The demo's task: its answers against independent parsers, its held-out rule, its size."""

from __future__ import annotations

import datetime
import re

from stillroom.demo import expressions
from stillroom.demo.expressions import FAMILIES, PHRASINGS, draw, is_held_out


def test_there_are_enough_families_and_inputs() -> None:
    assert len(FAMILIES) >= 5
    assert {phrasing.family for phrasing in PHRASINGS} == set(FAMILIES)
    assert len({phrasing.name for phrasing in PHRASINGS}) == len(PHRASINGS)
    assert expressions.distinct_inputs() > 10**7


def test_the_count_of_inputs_is_of_distinct_texts() -> None:
    """Two combinations give two texts: a sample of them without noise has no two alike with different answers, and next to none alike at all."""
    texts: dict[str, set[str]] = {}
    for phrasing in PHRASINGS:
        for start in range(0, phrasing.combinations, max(1, phrasing.combinations // 60)):
            rest, values = start, []
            for size in phrasing.domains:
                rest, value = divmod(rest, size)
                values.append(value)
            text, answer = phrasing.render(*values)
            texts.setdefault(text, set()).add(answer)
    assert all(len(answers) == 1 for answers in texts.values()), [text for text, answers in texts.items() if len(answers) > 1][:5]
    assert len(texts) > 9000


def test_no_training_draw_holds_anything_held_out_and_no_held_out_draw_anything_else() -> None:
    for seed in (0, 1, 7):
        assert not any(is_held_out(e.phrasing, e.values) for e in draw(3000, seed=seed, held_out=False))
        assert all(is_held_out(e.phrasing, e.values) for e in draw(1000, seed=seed, held_out=True))


def test_the_rule_holds_out_one_in_sixteen() -> None:
    share = sum(is_held_out("date/dotted", (day,)) for day in range(20_000)) / 20_000
    assert abs(share - 1 / expressions.HELD_OUT_ONE_IN) < 0.006


def test_the_evaluation_items_are_distinct_and_in_equal_shares() -> None:
    items = draw(2000, seed=0, held_out=True)
    assert [sum(e.family == family for e in items) for family in FAMILIES] == [400] * 5
    assert len({(e.phrasing, e.values) for e in items}) > 1990


def test_draws_are_repeatable_and_differ_by_seed() -> None:
    assert draw(200, seed=0, held_out=False) == draw(200, seed=0, held_out=False)
    assert draw(200, seed=0, held_out=False) != draw(200, seed=1, held_out=False)


def test_noise_occurs_and_leaves_digits_alone() -> None:
    drawn = draw(4000, seed=3, held_out=False)
    clean = {e: next(p for p in PHRASINGS if p.name == e.phrasing).render(*e.values)[0] for e in drawn}
    assert 0.05 < sum(e.text.lower() != clean[e].lower() for e in drawn) / len(drawn) < 0.2
    assert 0.2 < sum(e.text != clean[e] and e.text == e.text.lower() for e in drawn) / len(drawn) < 0.5
    assert all(re.findall(r"\d+", e.text) == re.findall(r"\d+", clean[e]) for e in drawn)


def test_answers_have_the_form_of_their_notation() -> None:
    forms = {
        "date": r"\d{4}-\d\d-\d\d(T\d\d:\d\d)?",
        "relative": r"\d{4}-\d\d-\d\d|now[+-]\d+[mhdwMy](/[dwMy](\+\d+h\+\d+m)?)?",
        "period": r"\d{4}-\d\d-\d\d",
        "duration": r"P(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(\d+H)?(\d+M)?(\d+S)?)?",
        "schedule": r"(\*/)?\d+ (\*|\d+|\d+-\d+) (\*|\d+) (\*|\d+) (\*|[0-6]|1-5|0,6)",
    }
    wrong = [e for e in draw(3000, seed=11, held_out=False) if not re.fullmatch(forms[e.family], e.answer)]
    assert not wrong


def test_known_answers() -> None:
    """Written by hand."""
    known = {
        ("date/dotted", (datetime.date(2024, 3, 5).toordinal() - datetime.date(1950, 1, 1).toordinal(),)): ("5.3.2024", "2024-03-05"),
        ("date/slashed", (datetime.date(2024, 3, 5).toordinal() - datetime.date(1950, 1, 1).toordinal(),)): ("3/5/2024", "2024-03-05"),
        ("relative/day-after/day-month-year", (datetime.date(2024, 2, 28).toordinal() - datetime.date(1950, 1, 1).toordinal(),)): (
            "the day after 28 February 2024",
            "2024-02-29",
        ),
        ("relative/month-before/day-month-year", (datetime.date(2023, 3, 31).toordinal() - datetime.date(1950, 1, 1).toordinal(),)): (
            "one month before 31 March 2023",
            "2023-02-28",
        ),
        ("relative/now/ago/digits", (3, 1)): ("2 weeks ago", "now-2w"),
        ("period/end-of/month", (74, 1)): ("the end of February 2024", "2024-02-29"),
        ("period/start-of/quarter", (40, 2)): ("the start of Q3 1990", "1990-07-01"),
        ("duration/hours-minutes/and/words", (1, 14)): ("two hours and fifteen minutes", "PT2H15M"),
        ("duration/and-a-half-hours", (2,)): ("3 and a half hours", "PT3H30M"),
        ("schedule/weekdays/12h/day-first", (0, 21, 5)): ("every weekday at 9:05 pm", "5 21 * * 1-5"),
        ("schedule/daily/12h/day-first", (0, 0, 30)): ("every day at 12:30 am", "30 0 * * *"),
        ("schedule/yearly/24h/day-first", (28 + 3, 7, 0)): ("every year on 4 February at 7:00", "0 7 4 2 *"),
        ("schedule/weekly/24h/day-first", (6, 7, 0)): ("every Sunday at 7:00", "0 7 * * 0"),
    }
    by_name = {phrasing.name: phrasing for phrasing in PHRASINGS}
    for (name, values), expected in known.items():
        assert by_name[name].render(*values) == expected
