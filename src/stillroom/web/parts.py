"""Pieces that several sections are made of: sections, tables, boxes for text of any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.web.difference import Pieces, marked
from stillroom.web.markup import Child, Html, el, join

_LONG_CHARACTERS, _LONG_LINES = 420, 9


def section(anchor: str, title: str, *children: Child) -> Html:
    """A section with its heading."""
    return el("section", el("h2", title, id=f"{anchor}-title"), *children, id=anchor, aria_labelledby=f"{anchor}-title")


def lead(*children: Child) -> Html:
    """The sentence or two under a heading."""
    return el("p", *children, class_="lead")


def figure(caption: Child, *children: Child, key: Child = None) -> Html:
    """A picture with its legend and caption."""
    return el("figure", key, *children, el("figcaption", caption))


def table(caption: str, heads: Sequence[Child], rows: Sequence[Sequence[Child]], *, class_: str = "") -> Html:
    """A table with scoped headers; the first cell of each row heads it, and on a phone stands above the row.

    The roles are spelled out because a table that the style sheet lays out as a grid loses them in some browsers.
    """
    head = el("tr", [el("th", cell, scope="col", role="columnheader") for cell in heads], role="row")
    body = [el("tr", el("th", row[0], scope="row", role="rowheader"), [el("td", cell, role="cell") for cell in row[1:]], role="row") for row in rows]
    groups = el("thead", head, role="rowgroup"), el("tbody", body, role="rowgroup")
    return el("table", el("caption", caption), groups, role="table", class_=f"grid-{len(heads) - 1} {class_}".strip())


def facts(caption: str, entries: Mapping[str, Any] | Sequence[tuple[str, Any]], *, code: bool = False) -> Html:
    """A table of names and values without a visible head; a value that is not there says so."""
    pairs = list(entries.items()) if isinstance(entries, Mapping) else list(entries)
    rows = [el("tr", el("th", el("bdi", name), scope="row"), el("td", fact(value, code=code))) for name, value in pairs]
    return el("table", el("caption", caption), el("tbody", rows), class_="facts")


def fact(value: Any, *, code: bool = False) -> Html:
    """One value of the provenance, however long."""
    if isinstance(value, Html):
        return value
    if value is None or value == "" or value == []:
        return el("span", "not recorded", class_="absent")
    if isinstance(value, list | tuple):
        return join(el("div", el("bdi", str(entry))) for entry in value)
    return el("code" if code else "bdi", str(value))


def passage(content: str | Pieces, label: str, *, class_: str = "") -> Html:
    """Text as it is, line breaks and all, in its own direction. Long text scrolls in its box, which the keyboard can reach."""
    plain = content if isinstance(content, str) else "".join(piece for _, piece in content)
    classes = f"passage {class_}".strip()
    if not plain:
        return el("div", el("span", "(empty)", class_="absent"), class_=classes)
    inner = content if isinstance(content, str) else marked(content)
    if len(plain) <= _LONG_CHARACTERS and plain.count("\n") <= _LONG_LINES:
        return el("div", inner, class_=classes, dir="auto")
    return el("div", inner, class_=f"{classes} long", dir="auto", tabindex="0", role="region", aria_label=label)
