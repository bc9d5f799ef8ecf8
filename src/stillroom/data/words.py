"""Text as the curation steps compare it: case, accents of width and spacing do not count; punctuation separates words.

A word is a run of letters, digits and underscores. In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each
character is one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_SPACES = re.compile(r"\s+")


def normalised(text: str) -> str:
    """`text` in NFKC, case folded, with every run of white space as one space and none at its ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _SPACES.sub(" ", text.casefold()).strip()


def words(text: str) -> list[str]:
    """The words of `text`, normalised, in order."""
    return _WORD.findall(normalised(text))


def identity(text: str) -> str:
    """What exact comparison goes by: the words alone; where there are none (a formula, an emoji), the normalised text."""
    return " ".join(words(text)) or normalised(text)


def grams(found: Sequence[str], length: int) -> Iterator[str]:
    """Every run of `length` words, joined by spaces, in order; none where there are fewer."""
    for start in range(len(found) - length + 1):
        yield " ".join(found[start : start + length])


def digest(text: str) -> bytes:
    """16 bytes that stand for `text` in an index: two texts with the same are taken to be one."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shortened(text: str, characters: int = 80) -> str:
    """The beginning of `text` on one line, for evidence."""
    line = _SPACES.sub(" ", text[: 4 * characters]).strip()
    return line if len(line) <= characters and len(text) <= 4 * characters else line[: characters - 3] + "..."
