"""What the charts are drawn with: scales and their ticks, text that knows roughly how wide it is, markers, labels that keep apart."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stillroom.web.markup import Html, el

FONT = 12.0
LINE = 16.0

_NARROW = frozenset("iIljtfr.,:;'|![]() \u202f-")
_BROAD = frozenset("mwMWGOQ%@\u2026")


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] onto [start, stop], linearly or by the logarithm."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round numbers inside the domain, at most so many."""
        return _log_ticks(self.low, self.high, most) if self.logarithmic else _linear_ticks(self.low, self.high, most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (power * m) <= most - 1 + 1e-9)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**p for p in powers for m in multiples if low * (1 - 1e-9) <= m * 10.0**p <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def rounded_domain(values: Iterable[float], *, at_least: float, bounds: tuple[float, float] = (-math.inf, math.inf)) -> tuple[float, float]:
    """A domain that holds all values with some air, ends on round numbers, spans `at_least`, and stays within `bounds`."""
    found = list(values)
    low, high = min(found), max(found)
    air = max((high - low) * 0.08, (at_least - (high - low)) / 2, 1e-12)
    low, high = low - air, high + air
    step = 10.0 ** math.floor(math.log10(high - low)) / 2
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return max(low, bounds[0]), min(high, bounds[1])


def text_width(text: str, font: float = FONT) -> float:
    """A safe guess at how wide `text` is set in a sans-serif face: on the broad side, since the face is the reader's."""
    return sum(_em(character) for character in text) * font


def _em(character: str) -> float:
    if unicodedata.combining(character) or character == "\u200d":
        return 0.0
    if unicodedata.east_asian_width(character) in "WF" or unicodedata.category(character) == "So":
        return 1.35
    if character in _NARROW:
        return 0.42
    if character in _BROAD:
        return 1.0
    return 0.74 if character.isupper() else 0.65


def wrapped(text: str, width: float, font: float = FONT) -> list[str]:
    """`text` on lines at most so wide, broken after spaces, slashes, hyphens and underscores where it can be, inside a word where it must."""
    lines, line = [], ""
    for word in re.findall(r"[^\s/_-]*[\s/_-]?", " ".join(text.split())):
        if text_width((line + word).rstrip(), font) <= width:
            line += word
            continue
        if line:
            lines.append(line.rstrip())
        line = word
        while text_width(line.rstrip(), font) > width and len(line) > 1:
            fits = next(k for k in range(len(line) - 1, 0, -1) if k == 1 or text_width(line[:k], font) <= width)
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def text(x: float, y: float, lines: str | Sequence[str], *, anchor: str = "start", class_: str | None = None) -> Html:
    """Text at (x, y), the first baseline; further lines below it."""
    given = [lines] if isinstance(lines, str) else list(lines)
    spans = [el("tspan", line, x=x, dy=None if index == 0 else LINE) for index, line in enumerate(given)]
    return el("text", given[0] if len(given) == 1 else spans, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """A straight line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def marker(key: str, x: float, y: float, r: float = 4.5) -> Html:
    """The mark of one model, told apart by shape as well as by colour: teacher disc, student diamond, label-only square, before triangle."""
    match key:
        case "teacher":
            return el("circle", cx=x, cy=y, r=r, class_="mark teacher")
        case "student":
            d = r * 1.3
            return el("path", d=_path([(x, y - d), (x + d, y), (x, y + d), (x - d, y)]) + "Z", class_="mark student")
        case "label_only":
            d = r * 0.85
            return el("rect", x=x - d, y=y - d, width=2 * d, height=2 * d, class_="mark label-only")
        case _:
            return el("path", d=_path([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]) + "Z", class_="mark before")


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def polyline(points: Iterable[tuple[float, float]], class_: str) -> Html:
    """An open line through the points."""
    return el("path", d=_path(points), class_=class_)


def canvas(width: float, height: float, label: str, *children: Html | Iterable[Html], data: str | None = None) -> Html:
    """An SVG picture that scales with its column; `label` is what a screen reader says of it."""
    which = "narrow" if width < 500 else "wide"
    box = f"0 0 {width:g} {height:g}"
    return el(
        "svg", *children, viewBox=box, role="img", aria_label=label, class_=f"chart {which}", data_points=data, preserveAspectRatio="xMidYMid meet"
    )


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that something occupies."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


def placed(at: tuple[float, float], lines: Sequence[str], distance: float, taken: Sequence[Box], within: Box, *, below_first: bool) -> Box:
    """Where a label for the point `at` stands best: the place with the least overlap with `taken` and the least of it outside `within`.

    It is tried beside the point, higher and lower beside it, below and above; the nearest of equally free places wins.
    """
    width, height = max(text_width(entry) for entry in lines), LINE * len(lines)
    beside = [
        (max(within.left, min(within.right - width, wished)), at[1] - height / 2 + shift * LINE / 2, abs(shift) + cost)
        for shift in range(-20, 21)
        for wished, cost in ((at[0] + distance, 0.5), (at[0] - distance - width, 1.0))
    ]
    straight = [(at[0] - width / 2, at[1] + distance, 0.0 if below_first else 4.0), (at[0] - width / 2, at[1] - distance - height, 4.5)]
    boxes = [(Box(left, top, left + width, top + height), cost) for left, top, cost in [*beside, *straight]]

    def badness(candidate: tuple[Box, float]) -> float:
        box, cost = candidate
        return (width * height - box.overlap(within)) * 4 + sum(box.overlap(other) for other in taken) + cost

    return min(boxes, key=badness)[0]
