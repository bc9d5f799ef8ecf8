"""HTML built from values, safe by construction: a `str` is text and is escaped, an `Html` is markup and is not."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

VOID = frozenset({"meta", "link", "br", "hr", "input", "col", "wbr"})

_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
_REPLACED = {0x7F: "\u2421", **dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")}
_VISIBLE = str.maketrans(_CONTROL_PICTURES | _REPLACED)


class Html(str):
    """Markup that is already escaped."""

    __slots__ = ()


Child: TypeAlias = "Html | str | None | Iterable[Child]"
Attribute: TypeAlias = str | int | float | bool | None


def clean(text: str) -> str:
    """`text` with every character that HTML or UTF-8 cannot carry replaced by a visible stand-in; tabs and newlines stay."""
    return text.translate(_VISIBLE)


def escape(text: str) -> Html:
    """`text` as it can stand inside an element or a quoted attribute."""
    return Html(html.escape(clean(text), quote=True))


def join(*children: Child) -> Html:
    """The children one after the other: markup as it is, text escaped, None left out, iterables flattened."""
    parts: list[str] = []
    for child in children:
        match child:
            case None:
                continue
            case Html():
                parts.append(child)
            case str():
                parts.append(escape(child))
            case _:
                parts.append(join(*child))
    return Html("".join(parts))


def el(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """One element. `class_` becomes class, `aria_label` aria-label; None and False leave an attribute out, True gives it no value."""
    head = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{head}>")
    return Html(f"<{name}{head}>{join(*children)}</{name}>")


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{escape(text)}"'
