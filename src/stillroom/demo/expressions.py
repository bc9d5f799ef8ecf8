"""The demo's task: English time expressions and the machine notation that each of them means.

Five families, every answer computed by ordinary Python, so that exact match is exact:

    date       "the 3rd of March 2024"                     -> 2024-03-03
    relative   "the day after 28 February 2024"            -> 2024-02-29
               "3 weeks ago at 9:30 am"                    -> now-3w/d+9h+30m
    period     "the end of the second quarter of 1987"     -> 1987-06-30
    duration   "two hours and fifteen minutes"             -> PT2H15M
    schedule   "every weekday at 30 past 9 in the morning" -> 30 9 * * 1-5

An expression is a *phrasing* (a template) and *values* (what fills it); typos and letter case are surface noise on top. A combination of
phrasing and values is held out when a hash of it says so (`is_held_out`), whatever the noise: no training set may contain it.
"""

from __future__ import annotations

import calendar
import datetime
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

FAMILIES = ("date", "relative", "period", "duration", "schedule")

HELD_OUT_ONE_IN = 16
TYPO_PROBABILITY = 0.15
LOWERCASE_PROBABILITY = 0.35

_FIRST_DAY = datetime.date(1950, 1, 1).toordinal()
_DAYS = datetime.date(2050, 1, 1).toordinal() - _FIRST_DAY
_FIRST_YEAR, _YEARS = 1950, 100

_MONTHS = tuple(calendar.month_name[1:])
_SHORT_MONTHS = tuple(name[:3] for name in _MONTHS)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_CRON_WEEKDAYS = (1, 2, 3, 4, 5, 6, 0)
_UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
_TENS = ("", "", "twenty", "thirty", "forty", "fifty")
_ORDINAL_WORDS = ("first", "second", "third", "fourth")


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way of saying something: `render(*values)` gives the text and its answer, each value drawn below its entry in `domains`.

    The held-out rule hashes `name`: a name that changes would let in what the teacher has seen.
    """

    family: str
    name: str
    domains: tuple[int, ...]
    render: Callable[..., tuple[str, str]]

    @property
    def combinations(self) -> int:
        """How many combinations of values this phrasing has."""
        return math.prod(self.domains)


@dataclass(frozen=True, slots=True)
class Expression:
    """A text (noise included), the answer that is right for it, and where it came from."""

    text: str
    answer: str
    family: str
    phrasing: str
    values: tuple[int, ...]


# --- the words ----------------------------------------------------------------------------------------------------------------------


def _in_words(number: int) -> str:
    """`number` (0-59) spelled out."""
    if number < 20:
        return _UNITS[number]
    tens, unit = divmod(number, 10)
    return _TENS[tens] + (f"-{_UNITS[unit]}" if unit else "")


def _nth(number: int) -> str:
    suffix = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" + ("" if number == 1 else "s")


def _count_in_words(number: int, unit: str) -> str:
    return f"{_in_words(number)} {unit}" + ("" if number == 1 else "s")


def _day(index: int) -> datetime.date:
    return datetime.date.fromordinal(_FIRST_DAY + index)


def _plus_months(date: datetime.date, months: int) -> datetime.date:
    """The same day `months` later, or the last day of that month where it has no such day."""
    year, month = divmod(date.year * 12 + date.month - 1 + months, 12)
    return datetime.date(year, month + 1, min(date.day, calendar.monthrange(year, month + 1)[1]))


def _last_day(year: int, month: int) -> str:
    return datetime.date(year, month, calendar.monthrange(year, month)[1]).isoformat()


_DATE_FORMS: dict[str, Callable[[datetime.date], str]] = {
    "day-month-year": lambda d: f"{d.day} {_MONTHS[d.month - 1]} {d.year}",
    "month-day-year": lambda d: f"{_MONTHS[d.month - 1]} {d.day}, {d.year}",
    "nth-of-month": lambda d: f"the {_nth(d.day)} of {_MONTHS[d.month - 1]} {d.year}",
    "month-nth": lambda d: f"{_MONTHS[d.month - 1]} {_nth(d.day)} {d.year}",
    "short-month": lambda d: f"{d.day} {_SHORT_MONTHS[d.month - 1]} {d.year}",
    "short-month-first": lambda d: f"{_SHORT_MONTHS[d.month - 1]}. {d.day}, {d.year}",
    "dashed": lambda d: f"{d.day:02d}-{_SHORT_MONTHS[d.month - 1]}-{d.year}",
    "dotted": lambda d: f"{d.day}.{d.month}.{d.year}",
    "slashed": lambda d: f"{d.month}/{d.day}/{d.year}",
    "year-first": lambda d: f"{d.year}/{d.month:02d}/{d.day:02d}",
    "year-then-name": lambda d: f"{d.year}, {_MONTHS[d.month - 1]} {d.day}",
    "weekday": lambda d: f"{_WEEKDAYS[d.weekday()]}, {d.day} {_MONTHS[d.month - 1]} {d.year}",
    "in-the-year": lambda d: f"the {_nth(d.day)} day of {_MONTHS[d.month - 1]} in the year {d.year}",
}
_FORMS_WITH_TIME = ("day-month-year", "year-first")

_CLOCKS: dict[str, Callable[[int, int], str]] = {
    "24h": lambda h, m: f"{h}:{m:02d}",
    "12h": lambda h, m: f"{h % 12 or 12}:{m:02d} {'am' if h < 12 else 'pm'}",
    "dotted-12h": lambda h, m: f"{h % 12 or 12}.{m:02d}{'am' if h < 12 else 'pm'}",
    "past": lambda h, m: f"{m} past {h % 12 or 12} {_part_of_day(h)}" if m else f"{h % 12 or 12} o'clock {_part_of_day(h)}",
}


def _part_of_day(hour: int) -> str:
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


# --- the families ---------------------------------------------------------------------------------------------------------------------


def _dates() -> Iterator[Phrasing]:
    def written(form: Callable[[datetime.date], str]) -> Callable[..., tuple[str, str]]:
        return lambda day: (form(_day(day)), _day(day).isoformat())

    def with_time(form: Callable[[datetime.date], str], clock: Callable[[int, int], str]) -> Callable[..., tuple[str, str]]:
        return lambda day, h, m: (f"{form(_day(day))} at {clock(h, m)}", f"{_day(day).isoformat()}T{h:02d}:{m:02d}")

    def short_year(day: int) -> tuple[str, str]:
        date = _day(day) + datetime.timedelta(days=20 * 365 + 5)
        return f"{date.day} {_SHORT_MONTHS[date.month - 1]} '{date.year % 100:02d}", date.isoformat()

    for name, form in _DATE_FORMS.items():
        yield Phrasing("date", f"date/{name}", (_DAYS,), written(form))
    yield Phrasing("date", "date/short-year", (_DAYS,), short_year)
    for name in _FORMS_WITH_TIME:
        for clock in ("24h", "12h"):
            yield Phrasing("date", f"date/{name}/at/{clock}", (_DAYS, 24, 60), with_time(_DATE_FORMS[name], _CLOCKS[clock]))


def _relatives() -> Iterator[Phrasing]:
    """Relative to now: date math, as search engines and dashboards take it (now-3w/d). Relative to a date that is given: a date."""
    units = (("minute", "m"), ("hour", "h"), ("day", "d"), ("week", "w"), ("month", "M"), ("year", "y"))
    calendar_units = units[2:]
    wordings = {"ago": ("{} ago", "-"), "in": ("in {}", "+"), "from-now": ("{} from now", "+"), "back": ("{} back", "-")}
    spellings = {"digits": (99, _count), "words": (59, _count_in_words)}

    def from_now(wording: str, sign: str, counted: Callable[[int, str], str]) -> Callable[..., tuple[str, str]]:
        def render(unit: int, number: int) -> tuple[str, str]:
            word, letter = units[unit]
            return wording.format(counted(number + 1, word)), f"now{sign}{number + 1}{letter}"

        return render

    def start_of(wording: str, sign: str, opening: str) -> Callable[..., tuple[str, str]]:
        def render(unit: int, number: int) -> tuple[str, str]:
            word, letter = calendar_units[unit]
            return f"{opening} of the {word} {wording.format(_count(number + 1, word))}", f"now{sign}{number + 1}{letter}/{letter}"

        return render

    def at_time(wording: str, sign: str, clock: str) -> Callable[..., tuple[str, str]]:
        def render(unit: int, number: int, hour: int, minute: int) -> tuple[str, str]:
            word, letter = calendar_units[unit]
            text = f"{wording.format(_count(number + 1, word))} at {_CLOCKS[clock](hour, minute)}"
            return text, f"now{sign}{number + 1}{letter}/d+{hour}h+{minute}m"

        return render

    for name, (wording, sign) in wordings.items():
        for spelling, (most, counted) in spellings.items():
            yield Phrasing("relative", f"relative/now/{name}/{spelling}", (len(units), most), from_now(wording, sign, counted))
        for opening in ("the start", "beginning"):
            yield Phrasing("relative", f"relative/now/{opening}/{name}", (len(calendar_units), 99), start_of(wording, sign, opening))
    for name in ("ago", "in"):
        wording, sign = wordings[name]
        for clock in _CLOCKS:
            yield Phrasing("relative", f"relative/now/{name}/{clock}", (2, 30, 24, 60), at_time(wording, sign, clock))

    moves: dict[str, tuple[str, Callable[[datetime.date], datetime.date]]] = {
        "day-after": ("the day after {}", lambda date: date + datetime.timedelta(days=1)),
        "day-before": ("the day before {}", lambda date: date - datetime.timedelta(days=1)),
        "month-after": ("one month after {}", lambda date: _plus_months(date, 1)),
        "month-before": ("one month before {}", lambda date: _plus_months(date, -1)),
        "year-after": ("one year after {}", lambda date: _plus_months(date, 12)),
        "year-before": ("one year before {}", lambda date: _plus_months(date, -12)),
    }

    def moved(text: str, move: Callable[[datetime.date], datetime.date]) -> Callable[..., tuple[str, str]]:
        return lambda day: (text.format(_DATE_FORMS["day-month-year"](_day(day))), move(_day(day)).isoformat())

    for name, (text, move) in moves.items():
        yield Phrasing("relative", f"relative/{name}/day-month-year", (_DAYS,), moved(text, move))


def _periods() -> Iterator[Phrasing]:
    edges = {
        "start-of": ("the start of {}", False),
        "beginning-of": ("beginning of {}", False),
        "first-day-of": ("the first day of {}", False),
        "end-of": ("the end of {}", True),
        "last-day-of": ("last day of {}", True),
        "close-of": ("close of {}", True),
    }
    parts: dict[str, tuple[int, int, Callable[[int, int], str]]] = {
        "month": (12, 1, lambda year, part: f"{_MONTHS[part]} {year}"),
        "short-month": (12, 1, lambda year, part: f"{_SHORT_MONTHS[part]} {year}"),
        "month-of": (12, 1, lambda year, part: f"the month of {_MONTHS[part]}, {year}"),
        "quarter": (4, 3, lambda year, part: f"Q{part + 1} {year}"),
        "quarter-in-words": (4, 3, lambda year, part: f"the {_ORDINAL_WORDS[part]} quarter of {year}"),
        "half": (2, 6, lambda year, part: f"H{part + 1} {year}"),
        "half-in-words": (2, 6, lambda year, part: f"the {_ORDINAL_WORDS[part]} half of {year}"),
        "year": (1, 12, lambda year, part: f"{year}"),
        "the-year": (1, 12, lambda year, part: f"the year {year}"),
    }

    def edge_of(edge: str, at_end: bool, length: int, said: Callable[[int, int], str]) -> Callable[..., tuple[str, str]]:
        def render(year_index: int, part: int) -> tuple[str, str]:
            year, month = _FIRST_YEAR + year_index, part * length + 1
            answer = _last_day(year, month + length - 1) if at_end else datetime.date(year, month, 1).isoformat()
            return edge.format(said(year, part)), answer

        return render

    for edge_name, (edge, at_end) in edges.items():
        for part_name, (count, length, said) in parts.items():
            yield Phrasing("period", f"period/{edge_name}/{part_name}", (_YEARS, count), edge_of(edge, at_end, length, said))


def _durations() -> Iterator[Phrasing]:
    pairs = {
        "hours-minutes": ("hour", "minute", "PT{}H{}M", (47, 59)),
        "minutes-seconds": ("minute", "second", "PT{}M{}S", (59, 59)),
        "days-hours": ("day", "hour", "P{}DT{}H", (30, 23)),
        "years-months": ("year", "month", "P{}Y{}M", (30, 11)),
        "months-days": ("month", "day", "P{}M{}D", (11, 30)),
    }
    joins = {"and": "{} and {}", "comma": "{}, {}", "space": "{} {}"}

    def pair(first: str, second: str, notation: str, join: str, counted: Callable[[int, str], str]) -> Callable[..., tuple[str, str]]:
        return lambda a, b: (join.format(counted(a + 1, first), counted(b + 1, second)), notation.format(a + 1, b + 1))

    for pair_name, (first, second, notation, most) in pairs.items():
        for join_name, join in joins.items():
            yield Phrasing("duration", f"duration/{pair_name}/{join_name}/digits", most, pair(first, second, notation, join, _count))
            yield Phrasing("duration", f"duration/{pair_name}/{join_name}/words", most, pair(first, second, notation, join, _spelled))
    yield Phrasing("duration", "duration/compact-hm", (47, 59), lambda h, m: (f"{h + 1}h{m + 1}m", f"PT{h + 1}H{m + 1}M"))
    yield Phrasing("duration", "duration/short-units", (47, 59), lambda h, m: (f"{h + 1} hrs {m + 1} mins", f"PT{h + 1}H{m + 1}M"))
    yield Phrasing(
        "duration",
        "duration/days-hours-minutes",
        (30, 23, 59),
        lambda d, h, m: (f"{_count(d + 1, 'day')}, {_count(h + 1, 'hour')} and {_count(m + 1, 'minute')}", f"P{d + 1}DT{h + 1}H{m + 1}M"),
    )
    yield Phrasing("duration", "duration/and-a-half-hours", (47,), lambda h: (f"{h + 1} and a half hours", f"PT{h + 1}H30M"))
    yield Phrasing("duration", "duration/and-a-half-in-words", (47,), lambda h: (f"{_in_words(h + 1)} and a half hours", f"PT{h + 1}H30M"))
    yield Phrasing("duration", "duration/weeks", (59,), lambda w: (_count(w + 1, "week"), f"P{w + 1}W"))
    yield Phrasing("duration", "duration/weeks-in-words", (59,), lambda w: (_count_in_words(w + 1, "week"), f"P{w + 1}W"))


def _spelled(number: int, unit: str) -> str:
    return _count_in_words(number, unit)


def _schedules() -> Iterator[Phrasing]:
    def at(hour: int, minute: int, clock: str) -> str:
        return _CLOCKS[clock](hour, minute)

    days: dict[str, tuple[int, Callable[[int], tuple[str, str]]]] = {
        "daily": (1, lambda _: ("every day", "* * *")),
        "weekdays": (1, lambda _: ("every weekday", "* * 1-5")),
        "weekends": (1, lambda _: ("at weekends", "* * 0,6")),
        "weekly": (7, lambda n: (f"every {_WEEKDAYS[n]}", f"* * {_CRON_WEEKDAYS[n]}")),
        "on-weekday": (7, lambda n: (f"on {_WEEKDAYS[n]}s", f"* * {_CRON_WEEKDAYS[n]}")),
        "monthly": (28, lambda n: (f"on the {_nth(n + 1)} of every month", f"{n + 1} * *")),
        "monthly-day": (28, lambda n: (f"each month on day {n + 1}", f"{n + 1} * *")),
        "yearly": (
            12 * 28,
            lambda n: (f"every year on {n % 28 + 1} {_MONTHS[n // 28]}", f"{n % 28 + 1} {n // 28 + 1} *"),
        ),
    }

    def recurring(said: Callable[[int], tuple[str, str]], clock: str, time_first: bool) -> Callable[..., tuple[str, str]]:
        def render(which: int, hour: int, minute: int) -> tuple[str, str]:
            words, fields = said(which)
            text = f"at {at(hour, minute, clock)} {words}" if time_first else f"{words} at {at(hour, minute, clock)}"
            return text, f"{minute} {hour} {fields}"

        return render

    for day_name, (count, said) in days.items():
        for clock in _CLOCKS:
            for order, time_first in (("day-first", False), ("time-first", True)):
                name = f"schedule/{day_name}/{clock}/{order}"
                yield Phrasing("schedule", name, (count, 24, 60), recurring(said, clock, time_first))
    yield Phrasing("schedule", "schedule/hourly", (60,), lambda m: (f"every hour at {_count(m, 'minute')} past", f"{m} * * * *"))
    yield Phrasing(
        "schedule",
        "schedule/every-n-minutes-between",
        (28, 11, 11),
        lambda n, a, b: (f"every {n + 2} minutes between {a + 1} am and {b + 1} pm", f"*/{n + 2} {a + 1}-{b + 13} * * *"),
    )


PHRASINGS: tuple[Phrasing, ...] = (*_dates(), *_relatives(), *_periods(), *_durations(), *_schedules())
_BY_FAMILY = {family: tuple(p for p in PHRASINGS if p.family == family) for family in FAMILIES}


def distinct_inputs() -> int:
    """The number of combinations of phrasing and values: of distinct inputs, before any typo or change of case."""
    return sum(phrasing.combinations for phrasing in PHRASINGS)


# --- drawing --------------------------------------------------------------------------------------------------------------------------


def is_held_out(phrasing: str, values: Sequence[int]) -> bool:
    """True for the combinations that no training set may contain: one in `HELD_OUT_ONE_IN`, by a hash of phrasing and values alone."""
    key = f"{phrasing}:{','.join(map(str, values))}".encode()
    return hashlib.blake2b(key, digest_size=8).digest()[0] % HELD_OUT_ONE_IN == 0


def draw(count: int, *, seed: int, held_out: bool) -> list[Expression]:
    """`count` expressions, families in equal shares and phrasings uniform within a family, all on one side of the held-out rule.

    No combination of phrasing and values is drawn twice as long as its family has fresh ones (it tries a hundred times).
    """
    rng = random.Random(f"stillroom-demo:{seed}:{held_out}")
    seen: set[tuple[str, tuple[int, ...]]] = set()
    return [_draw_one(rng, FAMILIES[index % len(FAMILIES)], held_out, seen) for index in range(count)]


def _draw_one(rng: random.Random, family: str, held_out: bool, seen: set[tuple[str, tuple[int, ...]]]) -> Expression:
    tries = 0
    while True:
        phrasing = rng.choice(_BY_FAMILY[family])
        values = tuple(rng.randrange(size) for size in phrasing.domains)
        if is_held_out(phrasing.name, values) != held_out:
            continue
        tries += 1
        if (phrasing.name, values) not in seen or tries > 100:
            seen.add((phrasing.name, values))
            text, answer = phrasing.render(*values)
            return Expression(_with_noise(text, rng), answer, family, phrasing.name, values)


def _with_noise(text: str, rng: random.Random) -> str:
    if rng.random() < LOWERCASE_PROBABILITY:
        text = text.lower()
    if rng.random() < TYPO_PROBABILITY:
        text = _mistyped(text, rng)
    return text


def _mistyped(text: str, rng: random.Random) -> str:
    """`text` with one slip in one word of four letters or more: two letters swapped, one dropped, or one doubled."""
    words = text.split(" ")
    candidates = [index for index, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not candidates:
        return text
    index = rng.choice(candidates)
    word = words[index]
    at = rng.randrange(1, len(word) - 1)
    slip = rng.choice(("swap", "drop", "double"))
    if slip == "swap":
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif slip == "drop":
        word = word[:at] + word[at + 1 :]
    else:
        word = word[: at + 1] + word[at:]
    return " ".join([*words[:index], word, *words[index + 1 :]])
