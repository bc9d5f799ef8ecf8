"""What the ids of a model mean: id -> bytes, which ids are special, and never a mere number.

`size` counts the real tokens, `rows` the width of a model's logits, which may be padded beyond `size`: one tokenizer under heads of 151,936
and of 152,064 rows is one vocabulary, and two tokenizers of equal size are two. Only the bytes decide.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from stillroom.core.errors import ModelError, VocabularyError

_FINGERPRINT_DOMAIN = b"stillroom vocabulary 1\n"
_METASPACE = "\u2581"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The meaning of every id, and the width of the logits of the model at hand.

    `tokens[i]` are the bytes of id i (an id that the tokenizer does not use has none: b""); `special` maps the text of each special token to
    its id; `end_ids` are the ids that end an answer; `rows` is the width of the model's logits, at least `size`. Rows from `size` on are padding.
    """

    tokens: tuple[bytes, ...] = field(repr=False)
    special: Mapping[str, int] = field(repr=False, hash=False)
    end_ids: tuple[int, ...]
    rows: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "special", MappingProxyType(dict(self.special)))
        object.__setattr__(self, "end_ids", tuple(self.end_ids))
        if self.rows < len(self.tokens):
            raise ModelError(
                "model-unsupported",
                found=f"a tokenizer of {len(self.tokens)} ids over logits of {self.rows} rows",
                expected="at least as many rows as ids",
                why="the model cannot say or read its own last tokens",
                do="Resize the model's embeddings to its tokenizer, or remove the tokens that were added to it.",
            )

    @property
    def size(self) -> int:
        """Number of real tokens."""
        return len(self.tokens)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the bytes of every id in order, then the sorted special ids. Neither `rows` nor `end_ids` enters.

        Hashed: the domain line, u32 size, then per id u32 length and the bytes, then u32 count and u32 per special id; all little-endian.
        """
        digest = hashlib.sha256(_FINGERPRINT_DOMAIN + struct.pack("<I", self.size))
        digest.update(b"".join(struct.pack("<I", len(token)) + token for token in self.tokens))
        special = sorted(self.special_ids)
        digest.update(struct.pack(f"<I{len(special)}I", len(special), *special))
        return digest.hexdigest()

    def same_as(self, other: Vocabulary) -> bool:
        """Whether every id means the same in both; the widths of the logits may differ."""
        return self.fingerprint == other.fingerprint

    def first_difference(self, other: Vocabulary) -> str | None:
        """The first id that does not mean the same, with what it means in `self` and in `other`; None if there is none."""
        for index in range(max(self.size, other.size)):
            mine, theirs = self._meaning(index), other._meaning(index)
            if mine != theirs:
                return f"id {index} is {mine} in the one and {theirs} in the other"
        return None

    def _meaning(self, index: int) -> str:
        if index >= self.size:
            return "no token"
        return f"{self.tokens[index]!r}{' (special)' if index in self.special_ids else ''}"

    def bytes_of(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes of a sequence, without those of special tokens unless asked for."""
        return b"".join(self.tokens[i] for i in ids if not (skip_special and i in self.special_ids))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, rows: int, end_ids: Iterable[int] | None = None) -> Vocabulary:
        """Reads a Hugging Face tokenizer (anything with `get_vocab` and `added_tokens_decoder`).

        Byte-level BPE tokens are mapped back to their bytes; SentencePiece-like tokens have their metaspace made a space and <0xNN> made a
        byte; added tokens, and tokens of any other scheme, are their own UTF-8 text. `end_ids` defaults to the tokenizer's end token.
        Raises ModelError 'model-unsupported' if the tokenizer has more ids than the model has rows.
        """
        ids = dict(tokenizer.get_vocab())
        added = {int(index): token for index, token in tokenizer.added_tokens_decoder.items()}
        to_bytes = _scheme(tokenizer)
        tokens = [b""] * (max([*ids.values(), *added], default=-1) + 1)
        for text, index in ids.items():
            tokens[index] = to_bytes(text)
        for index, token in added.items():
            tokens[index] = str(token).encode("utf-8")
        special = {str(token): index for index, token in added.items() if token.special}
        if end_ids is None:
            end = tokenizer.eos_token_id
            end_ids = () if end is None else (int(end),)
        return cls(tokens=tuple(tokens), special=special, end_ids=tuple(end_ids), rows=rows)


def require_same(teacher: Vocabulary, student: Vocabulary) -> None:
    """Raises VocabularyError 'vocabulary-mismatch', naming the first id that differs, unless every id means the same in both."""
    if teacher.same_as(student):
        return
    raise VocabularyError(
        "vocabulary-mismatch",
        found=f"{teacher.first_difference(student)} (first the teacher's, {teacher.size} tokens; then the student's, {student.size} tokens)",
        expected="every id to mean the same in both (the widths of the logits may differ)",
        why="a distribution over the teacher's ids would teach the student other tokens",
        do="Use a student with the teacher's tokenizer, or build one with `from_scratch` or `from_teacher`.",
    )


# -- from the text of a token to its bytes ----------------------------------------------------------------------------


def _scheme(tokenizer: Any) -> Callable[[str], bytes]:
    """The function from the text of an ordinary token to its bytes. A fast tokenizer says in its JSON how it decodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # A slow tokenizer over a SentencePiece model has no JSON, but its scheme is known.
        return _metaspace_bytes if hasattr(tokenizer, "sp_model") else _literal_bytes
    parts = json.loads(backend.to_str())
    decoder = list(_walk(parts.get("decoder")))
    if any(part.get("type") == "ByteLevel" for part in decoder):
        return _byte_level_bytes
    pieces = [*decoder, *_walk(parts.get("pre_tokenizer")), *_walk(parts.get("normalizer"))]
    if any(part.get("type") in ("Metaspace", "ByteFallback") or _METASPACE in json.dumps(part, ensure_ascii=False) for part in pieces):
        return _metaspace_bytes
    return _literal_bytes


def _walk(tree: Any) -> Iterable[dict[str, Any]]:
    """Every mapping in a JSON tree that has a type."""
    if isinstance(tree, dict):
        if "type" in tree:
            yield tree
        for value in tree.values():
            yield from _walk(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _walk(value)


def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level_bytes(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in text)
    except KeyError:
        return text.encode("utf-8")  # as the tokenizers library decodes a token outside the alphabet


def _metaspace_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace(_METASPACE, " ").encode("utf-8")


def _literal_bytes(text: str) -> bytes:
    return text.encode("utf-8")
