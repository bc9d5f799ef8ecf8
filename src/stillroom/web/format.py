"""Numbers as a reader wants them: few digits, SI sizes, a narrow no-break space before the unit. The raw value goes into a title."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable
from typing import TypeAlias

Style: TypeAlias = Callable[[float], str]

THIN = "\u202f"
MINUS = "\u2212"
TIMES = "\u00d7"

_SI = ("", "k", "M", "G", "T", "P", "E")
_SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def significant(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, thousands grouped by commas; a power of ten where the decimals would not fit."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -5 < exponent < 12:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}{THIN}{TIMES}{THIN}10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", MINUS)
    rounded = round(value, digits - 1 - exponent)
    exponent = math.floor(math.log10(abs(rounded)))  # 9.996 has become 10.0
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}".replace("-", MINUS)


def count(value: float) -> str:
    """A whole number: exact below a million, three significant digits and an SI prefix above."""
    if abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", MINUS)
    return si(value)


def si(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: 1.21 M, 4.85 MB."""
    step = 0
    while step + 1 < len(_SI) and abs(float(f"{value:.3g}")) >= 1000:
        value, step = value / 1000, step + 1
    return f"{significant(value)}{THIN}{_SI[step]}{unit}".rstrip(THIN)


def size(value: float) -> str:
    """Bytes, decimal prefixes."""
    return si(value, "B")


def flops(value: float) -> str:
    """Floating-point operations, decimal prefixes."""
    return si(value, "FLOP")


def percent(value: float) -> str:
    """A share with one decimal; never rounded onto 0 or 100 unless it is there."""
    if value in (0.0, 1.0):
        return f"{value * 100:.0f}{THIN}%"
    shown = value * 100
    for decimals in (1, 2, 3):
        text = f"{shown:.{decimals}f}"
        if float(text) not in (0.0, 100.0):
            return f"{text}{THIN}%".replace("-", MINUS)
    return f"less than 0.001{THIN}%" if abs(value) < 0.5 else f"more than 99.999{THIN}%" if value < 1 else f"100{THIN}%"


def percent_in_words(value: float) -> str:
    """A share for a sentence: a whole percentage, with decimals only where it would be rounded onto 0 or 100."""
    text = f"{value * 100:.0f}"
    return percent(value) if float(text) in (0.0, 100.0) else f"{text}{THIN}%".replace("-", MINUS)


def points(value: float) -> str:
    """A difference of two shares, signed, in percentage points."""
    text = f"{value * 100:+.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", MINUS)


def times(value: float) -> str:
    """A ratio: 8.2x."""
    return f"{significant(value, 2 if abs(value) < 100 else 3)}{TIMES}"


def nats(value: float) -> str:
    """Nats, three significant digits."""
    return f"{significant(value)}{THIN}nats"


def rate(value: float) -> str:
    """Tokens per second."""
    return f"{count(float(f'{value:.3g}')) if abs(value) >= 100 else significant(value)} tokens/s"


def seconds(value: float) -> str:
    """A time in the units that people say: 12.3 ms, 4.21 s, 1 min 32 s, 2 h 5 min."""
    if abs(value) < 1e-3:
        return f"{significant(value * 1e6)}{THIN}\u00b5s"
    if abs(value) < 1:
        return f"{significant(value * 1e3)}{THIN}ms"
    if abs(value) < 59.95:
        return f"{significant(value)}{THIN}s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest if hours == 0 else 0, "s")]
    return " ".join(f"{number:,}{THIN}{unit}" for number, unit in parts if number)


def money(currency: str) -> Style:
    """Amounts in `currency`: two decimals, or two significant digits below a unit."""
    return lambda value: f"{value:,.2f}{THIN}{currency}" if abs(value) >= 1 or value == 0 else f"{significant(value, 2)}{THIN}{currency}"


def interval(style: Style, low: float, high: float) -> str:
    """Both ends, the unit once where it is the same; a dash between, or `to` where a minus stands before."""
    first, second = style(low), style(high)
    unit = _unit(first)
    if unit == _unit(second) and " " not in first.removesuffix(unit):
        first = first.removesuffix(unit)
    return f"{first} to {second}" if low < 0 else f"{first}\u2013{second}"


def _unit(text: str) -> str:
    return text[len(text.rstrip(string.ascii_letters + f" /%{TIMES}{THIN}\u00b5")) :]


def tick(style: Style) -> Style:
    """`style` without trailing zeros, for the numbers along an axis."""
    return lambda value: re.sub(r"(\.\d*?)0+(?!\d)", lambda found: found[1].rstrip("."), style(value))


def moment(written: str) -> str:
    """An ISO 8601 time for the eye: 2025-11-24 07:12 UTC. What is not one stays as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(?:Z|\+00:00)", written)
    return f"{found[1]} {found[2]}\u00a0UTC" if found else written
