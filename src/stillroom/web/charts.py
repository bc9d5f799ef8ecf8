"""The three pictures of the report. Each is drawn twice, for a page and for a phone, and the style sheet shows one of the two."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from stillroom.web.drawing import FONT, LINE, Box, Scale, canvas, line, marker, placed, polyline, rounded_domain, text, text_width, wrapped
from stillroom.web.format import Style, significant, tick
from stillroom.web.markup import Html, el, join
from stillroom.web.readings import Measured

WIDE, NARROW = 720.0, 336.0
NAMES = {"teacher": "Teacher", "student": "Student", "label_only": "Label-only", "student_before": "Student before training"}

_MOST_CURVE_POINTS = 400


def both(draw: Callable[[float], Html]) -> Html:
    """The picture for a page and the one for a phone."""
    return join(draw(WIDE), draw(NARROW))


def legend(keys: Iterable[str]) -> Html:
    """What the marks mean."""
    entries = [el("li", el("svg", marker(key, 8, 8), width=16, height=16, viewBox="0 0 16 16", aria_hidden="true"), " ", NAMES[key]) for key in keys]
    return el("ul", entries, class_="legend")


# --- quality: dots and intervals ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the chart: a family, or all items, and what each model scores there."""

    name: str
    note: str
    scores: dict[str, Measured]


def dots(rows: Sequence[Row], label: str) -> tuple[Html, float]:
    """Shares with their intervals, one row each, models one below the other in a row; and where the axis begins."""
    lows = [score.low if score.low is not None else score.value for row in rows for score in row.scores.values()]
    floor = 0.0 if min(lows) < 0.4 else math.floor(min(lows) * 10 - 0.2) / 10
    return both(lambda width: _dots(rows, label, floor, width)), floor


def _dots(rows: Sequence[Row], label: str, floor: float, width: float) -> Html:
    narrow = width < 500
    left = 12.0 if narrow else 14 + min(220.0, max(text_width(row.name) for row in rows))
    scale = Scale(floor, 1.0, left + 8, width - 26)
    parts: list[Html] = []
    y = LINE + 8
    for index, row in enumerate(rows):
        if index:
            parts.append(line(0, y, width, y, "rule"))
        drawn, y = _dots_row(row, scale, y, left, narrow, width)
        parts.append(drawn)
    ticks = scale.ticks(6)
    percents = [f"{at * 100:g}" + ("\u202f%" if at == ticks[-1] else "") for at in ticks]
    grid = [line(scale(at), LINE + 8, scale(at), y, "grid") for at in ticks]
    axis = [
        text(scale(at), height, words, anchor="middle", class_="tick")
        for at, words in zip(ticks, percents, strict=True)
        for height in (LINE, y + LINE)
    ]
    return canvas(width, y + LINE + 8, label, grid, parts, axis)


def _dots_row(row: Row, scale: Scale, top: float, left: float, narrow: bool, width: float) -> tuple[Html, float]:
    lines = wrapped(row.name, width - 24 if narrow else left - 12)
    name_height = LINE * (len(lines) + 1)
    dots_height = 12.0 * len(row.scores)
    height = name_height + dots_height + 18 if narrow else max(name_height, dots_height) + 16
    words = join(
        text(0, top + 8 + FONT, lines, class_="name"),
        text(0, top + 9 + FONT + LINE * len(lines), row.note, class_="note"),
    )
    first = top + (name_height + 16 if narrow else (height - dots_height) / 2 + 6)
    marks = [_dot(key, score, scale, first + 12 * index) for index, (key, score) in enumerate(row.scores.items())]
    return join(words, marks), top + height


def _dot(key: str, score: Measured, scale: Scale, y: float) -> Html:
    clipped = [min(1.0, max(scale.low, end)) for end in (score.low, score.high) if end is not None]
    whisker = line(scale(clipped[0]), y, scale(clipped[1]), y, f"whisker {key.replace('_', '-')}") if len(clipped) == 2 else None
    return join(whisker, marker(key, scale(min(1.0, max(scale.low, score.value))), y))


# --- the trade ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One model in the picture of the trade."""

    key: str
    size: float
    height: Measured
    speed: float | None
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """What the two axes are called, how their numbers are written, and whether the upward one holds shares."""

    size: str
    size_style: Style
    height: str
    height_style: Style
    shares: bool


def trade(points: Sequence[Point], label: str, axes: Axes) -> Html:
    """Size to the right on a logarithmic axis, `height` upwards with its interval, speed as the area of the disc around the mark."""
    return both(lambda width: _trade(points, label, axes, width))


def _trade(points: Sequence[Point], label: str, axes: Axes, width: float) -> Html:
    height = 330.0 if width < 500 else 380.0
    largest = 22.0 if width < 500 else 30.0
    bottom = height - 54
    x, y = _trade_scales(points, axes, width, bottom - largest)
    radii = _radii(points, largest)
    centres = [(x(point.size), y(point.height.value)) for point in points]
    within = Box(x.start - 20, y.stop - 12, width, bottom)
    taken = [Box(cx - r, cy - r, cx + r, cy + r) for (cx, cy), r in zip(centres, radii, strict=True)]
    taken += [Box(cx - 2, y(_ends(point)[1]), cx + 2, y(_ends(point)[0])) for (cx, _), point in zip(centres, points, strict=True)]
    discs, marks, labels = [], [], []
    for point, (cx, cy), radius in zip(points, centres, radii, strict=True):
        box = placed((cx, cy), point.words, radius + 6, taken, within, below_first=width < 500)
        taken.append(box)
        name = point.key.replace("_", "-")
        discs.append(el("circle", cx=cx, cy=cy, r=radius, class_=f"disc {name}"))
        low, high = (y(end) for end in _ends(point))
        marks.append(join(line(cx, low, cx, high, f"whisker {name}"), marker(point.key, cx, cy, 5.5)))
        labels.append(_label(point.words, box, cx))
        if abs((box.top + box.bottom) / 2 - cy) > LINE * 1.5 and not box.left < cx < box.right:
            labels.append(line(cx, cy, box.left - 3 if box.left > cx else box.right + 3, (box.top + box.bottom) / 2, "leader"))
    return canvas(width, height, label, _trade_axes(x, y, axes, bottom, width), discs, marks, labels)


def _label(words: Sequence[str], box: Box, cx: float) -> Html:
    """The words in their box, flush with the side that faces their point."""
    if box.right < cx:
        return text(box.right, box.top + FONT, words, anchor="end", class_="label")
    if box.left > cx:
        return text(box.left, box.top + FONT, words, class_="label")
    return text((box.left + box.right) / 2, box.top + FONT, words, anchor="middle", class_="label")


def _trade_scales(points: Sequence[Point], axes: Axes, width: float, lowest: float) -> tuple[Scale, Scale]:
    sizes = [point.size for point in points]
    middle, ratio = math.sqrt(min(sizes) * max(sizes)), max(4.0, max(sizes) / min(sizes))
    span = ratio**0.5 * ratio ** (0.30 if width < 500 else 0.22)
    ends = [end for point in points for end in _ends(point)]
    if axes.shares:
        domain = rounded_domain(ends, at_least=0.05, bounds=(0.0, 1.0))
    else:
        domain = (0.0, max(ends) * 1.15)
    y = Scale(*domain, lowest, 54.0)  # above and below, room for the disc of a model at the domain's end
    gutter = 10 + max(text_width(axes.height_style(at)) for at in y.ticks(6))
    return Scale(middle / span, middle * span, gutter + 24, width - 14, logarithmic=True), y


def _ends(point: Point) -> tuple[float, float]:
    value = point.height.value
    return (value if point.height.low is None else point.height.low, value if point.height.high is None else point.height.high)


def _radii(points: Sequence[Point], most: float) -> list[float]:
    """Areas in proportion to the speeds; never smaller than the mark in the middle."""
    fastest = max((point.speed or 0.0 for point in points), default=0.0)
    return [max(7.0, most * math.sqrt(point.speed / fastest)) if point.speed and fastest > 0 else 7.0 for point in points]


def _trade_axes(x: Scale, y: Scale, axes: Axes, bottom: float, width: float) -> Html:
    left = x.start - 20
    rows = [
        join(line(left, y(at), width, y(at), "grid"), text(left - 6, y(at) + 4, axes.height_style(at), anchor="end", class_="tick"))
        for at in y.ticks(6)
    ]
    titles = [
        text(0, FONT + 2, axes.height, class_="axis-title"),
        text((left + width) / 2, bottom + 48, axes.size, anchor="middle", class_="axis-title"),
    ]
    return join(rows, line(left, bottom, width, bottom, "axis"), _columns(x, bottom, axes.size_style, 8 if width >= 500 else 5, width), titles)


def _columns(x: Scale, bottom: float, style: Style, most: int, width: float) -> list[Html]:
    """The marks along the lower axis; one whose words would touch the last one's or the edge is left out."""
    drawn, until = [], 0.0
    for at in x.ticks(most):
        words = style(at)
        half = text_width(words) / 2
        if x(at) - half < until or x(at) + half > width:
            continue
        until = x(at) + half + 8
        drawn.append(join(line(x(at), bottom, x(at), bottom + 5, "axis"), text(x(at), bottom + 19, words, anchor="middle", class_="tick")))
    return drawn


# --- curves ---------------------------------------------------------------------------------------------------------------------------

Series: TypeAlias = dict[str, list[tuple[float, float]]]
"""(step, value) by the curve's name, in the order of steps."""


def curves(series: Series, label: str, *, title: str = "nats per token", style: Style = significant) -> tuple[Html, bool]:
    """Values over steps, one line for each name, and whether the axis upwards is logarithmic (it is where values span a factor of 30)."""
    values = [value for points in series.values() for _, value in points]
    logarithmic = min(values) > 0 and max(values) / min(values) > 30
    thinned = {name: thin(points) for name, points in series.items()}
    return both(lambda width: _curves(thinned, label, title, style, logarithmic, width)), logarithmic


def thin(points: list[tuple[float, float]], most: int = _MOST_CURVE_POINTS) -> list[tuple[float, float]]:
    """At most so many points, each the mean of a run of neighbours; unchanged if there are few enough."""
    if len(points) <= most:
        return points
    run = math.ceil(len(points) / most)
    runs = [points[at : at + run] for at in range(0, len(points), run)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in runs]


def _curves(series: Series, label: str, title: str, style: Style, logarithmic: bool, width: float) -> Html:
    narrow = width < 500
    height = 250.0 if narrow else 300.0
    steps = [step for points in series.values() for step, _ in points]
    y = Scale(*_height_domain(series, logarithmic), height - 50, 50.0 if narrow else 30.0, logarithmic)
    gutter = 8 + max(text_width(tick(style)(at)) for at in y.ticks(6))
    ends = {name: f"{name} {style(points[-1][1])}" for name, points in series.items()}
    aside = 0.0 if narrow else max(text_width(words) for words in ends.values())
    x = Scale(min(steps), max(max(steps), min(steps) + 1), gutter + 6, width - 14 - aside)
    drawn = [_curve(name, points, x, y) for name, points in series.items()]
    data = json.dumps({name: [[step, value, round(x(step), 1), round(y(value), 1)] for step, value in points] for name, points in series.items()})
    words = _ends_above(ends, width) if narrow else _ends_beside(series, ends, x, y)
    axes = join(text(0, FONT + 2, title, class_="axis-title"), _curve_axes(x, y, tick(style), gutter, width, height))
    return canvas(width, height, label, axes, drawn, words, data=data)


def _height_domain(series: Series, logarithmic: bool) -> tuple[float, float]:
    values = [value for points in series.values() for _, value in points]
    if logarithmic:
        return min(values) / 1.15, max(values) * 1.15
    low, high = rounded_domain([*values, *([0.0] if min(values) > 0 else [])], at_least=max(1e-6, abs(max(values)) * 0.2))
    return (max(low, 0.0) if min(values) >= 0 else low), high


def _curve(name: str, points: list[tuple[float, float]], x: Scale, y: Scale) -> Html:
    at = [(x(step), y(value)) for step, value in points]
    marks = [el("circle", cx=cx, cy=cy, r=2.5, class_=f"vertex {name}") for cx, cy in at] if len(at) <= 30 else None
    return join(polyline(at, f"curve {name}") if len(at) > 1 else None, marks)


def _ends_beside(series: Series, ends: dict[str, str], x: Scale, y: Scale) -> list[Html]:
    """The name and last value of each curve at its end, pushed apart where two ends lie close."""
    order = sorted(series, key=lambda name: y(series[name][-1][1]))
    heights: list[float] = []
    for name in order:
        wished = y(series[name][-1][1]) + 4
        heights.append(max(wished, heights[-1] + LINE + 1) if heights else wished)
    excess = max(0.0, heights[-1] - y.start)
    return [text(x.stop + 9, at - excess, ends[name], class_=f"end {name}") for name, at in zip(order, heights, strict=True)]


def _ends_above(ends: dict[str, str], width: float) -> list[Html]:
    """The same on one line above the picture, where there is no room beside it."""
    drawn, at = [], 0.0
    for name, words in ends.items():
        drawn.append(
            join(line(at, FONT + LINE + 4, at + 16, FONT + LINE + 4, f"curve {name}"), text(at + 22, FONT + LINE + 8, words, class_=f"end {name}"))
        )
        at += width / len(ends)
    return drawn


def _curve_axes(x: Scale, y: Scale, style: Style, gutter: float, width: float, height: float) -> Html:
    rows = [
        join(line(gutter, y(at), x.stop, y(at), "grid"), text(gutter - 6, y(at) + 4, style(at), anchor="end", class_="tick")) for at in y.ticks(6)
    ]
    columns = _columns(x, y.start, lambda step: f"{step:,.0f}", 7 if width >= 500 else 5, width)
    caption = text((x.start + x.stop) / 2, height - 6, "optimiser steps", anchor="middle", class_="axis-title")
    return join(rows, line(gutter, y.start, x.stop, y.start, "axis"), columns, caption)
