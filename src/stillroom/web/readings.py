"""What the report says about one number: that it was measured, or why not. The JSON is read here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from stillroom.web.format import THIN, Style, count, interval
from stillroom.web.markup import Html, el, join

Node: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A number with what stands behind it."""

    value: float
    n: int | None
    low: float | None
    high: float | None
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class Missing:
    """No number, and why."""

    why: str


Reading: TypeAlias = Measured | Missing


def dig(node: object, *path: str) -> Any:
    """The value at `path`, or None where the report does not have it."""
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def read(node: object, *path: str) -> Reading:
    """The number at `path`. A number that is not finite, and one that the report does not have, is missing with a reason."""
    found = dig(node, *path)
    if not isinstance(found, Mapping):
        return Missing("the report does not have it")
    if "absent" in found:
        return Missing(str(found["absent"]) or "no reason was recorded")
    value = _finite(found.get("value"))
    if value is None:
        return Missing("the measurement was not a finite number")
    n = found.get("n")
    return Measured(
        value=value,
        n=int(n) if isinstance(n, int | float) else None,
        low=_finite(found.get("low")),
        high=_finite(found.get("high")),
        unit=str(found.get("unit") or ""),
        source=str(found.get("source") or ""),
    )


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def value_only(reading: Reading, style: Style) -> Html:
    """The number alone, its raw value and source in the title; or the reason of its absence."""
    match reading:
        case Missing(why):
            return el("span", "absent: ", el("bdi", why), class_="absent")
        case Measured():
            raw = f"{reading.value!r} {reading.unit}".strip()
            title = raw + (f", from {reading.source}" if reading.source else "")
            return el("data", style(reading.value), value=repr(reading.value), title=title)


def spread(reading: Reading, style: Style, *, with_n: bool = True) -> Html | None:
    """Interval and n, as far as there are any."""
    if isinstance(reading, Missing):
        return None
    parts = []
    if reading.low is not None and reading.high is not None:
        parts.append(interval(style, reading.low, reading.high))
    if with_n and reading.n is not None:
        parts.append(sample_size(reading.n))
    if not parts:
        return None
    title = f"95 % interval: {reading.low!r} to {reading.high!r}" if reading.low is not None and reading.high is not None else None
    return el("span", ", ".join(parts), class_="spread", title=title)


def sample_size(n: int) -> str:
    """`n = 2,000`, never broken."""
    return f"n{THIN}={THIN}{count(n)}"


def shown(reading: Reading, style: Style, *, with_n: bool = True) -> Html:
    """Number, interval and n, or the reason of their absence."""
    return join(value_only(reading, style), " ", spread(reading, style, with_n=with_n))


def shared_n(readings: Iterable[Reading]) -> int | None:
    """The n that all measured readings have in common, None if they differ or have none."""
    found = {reading.n for reading in readings if isinstance(reading, Measured)}
    return found.pop() if len(found) == 1 else None
