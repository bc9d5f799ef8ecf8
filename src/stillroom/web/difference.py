"""Two texts, and which of their characters differ."""

from __future__ import annotations

import difflib
import os
from typing import TypeAlias

from stillroom.web.markup import Html, el, join

Pieces: TypeAlias = list[tuple[bool, str]]
"""(differs, text), which joined give the whole text."""

_MOST_PAIRS = 1_000_000  # of characters compared; beyond it the matcher would take seconds for one sample
_FEWEST_ALIKE = 0.4  # of the longer text; below it, marks letter by letter are confetti, not information


def difference(left: str, right: str) -> tuple[Pieces, Pieces]:
    """Both texts cut into pieces that are alike and pieces that differ, on whole characters.

    What is alike at both ends is found in any case; what lies between is matched inside if it is not too long and enough is alike.
    """
    start = len(os.path.commonprefix((left, right)))
    ending = len(os.path.commonprefix((left[start:][::-1], right[start:][::-1])))
    inner_left, inner_right = left[start : len(left) - ending], right[start : len(right) - ending]
    pieces_left: Pieces = [(True, inner_left)]
    pieces_right: Pieces = [(True, inner_right)]
    if len(inner_left) * len(inner_right) <= _MOST_PAIRS:
        codes = difflib.SequenceMatcher(None, inner_left, inner_right, autojunk=False).get_opcodes()
        alike = start + ending + sum(a2 - a1 for tag, a1, a2, _, _ in codes if tag == "equal")
        if alike >= _FEWEST_ALIKE * max(len(left), len(right)):
            pieces_left = [(tag != "equal", inner_left[a1:a2]) for tag, a1, a2, _, _ in codes]
            pieces_right = [(tag != "equal", inner_right[b1:b2]) for tag, _, _, b1, b2 in codes]
    head, tail = (False, left[:start]), (False, left[len(left) - ending :])
    return _merged([head, *pieces_left, tail]), _merged([head, *pieces_right, tail])


def _merged(pieces: Pieces) -> Pieces:
    merged: Pieces = []
    for differs, text in pieces:
        if not text:
            continue
        if merged and merged[-1][0] == differs:
            merged[-1] = (differs, merged[-1][1] + text)
        else:
            merged.append((differs, text))
    return merged


def marked(pieces: Pieces) -> Html:
    """The pieces as text in which those that differ are marked; a marked line break is shown as a return arrow before it."""
    return join(el("mark", text.replace("\n", "\u21b5\n")) if differs else text for differs, text in pieces)
