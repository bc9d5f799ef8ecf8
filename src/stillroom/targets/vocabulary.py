"""What the ids of a model mean: id -> bytes, which ids are special, and never a mere number.

`size` counts the real tokens, `rows` the width of a model's logits, which may be padded beyond `size`: one tokenizer under heads of 151,936
and of 152,064 rows is one vocabulary, and two tokenizers of equal size are two. Only the bytes decide; and where two tokenizers have the same tokens,
a probe of hard texts (`hard_texts`) decides whether they also cut texts into them alike.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from stillroom.core.errors import ModelError, VocabularyError
from stillroom.core.identities import TokenIds

_FINGERPRINT_DOMAIN = b"stillroom vocabulary 1\n"
_METASPACE = "\u2581"

# Texts on which tokenizers with the same tokens have been seen to differ: by their normaliser, their pre-tokenizer, their merges or their special tokens.
_HARD_TEXTS = (
    # numerals: digit by digit, in threes from the left or from the right, with separators, in other scripts
    "0", "7 42 365", "1234567890", "12345678901234567890", "3.14159", "-1.5e-10", "1,234,567.89", "2024-02-29T23:59:60Z", "0x1F4A9", "\u0663\u0664\u0665", "\u00b2\u00bd\u2167\u4e94",
    # white space: at the ends, in runs, of every kind
    "", " ", "  ", " a", "a ", "a  b", "a        b", "\t", "\t\tx", "\n", "\n\n\n", " \n \n", "a\n  b\n\tc", "a\r\nb\rc", "\u00a0a\u3000b\u2009c", "\u2581a \u2581",
    # Unicode normal forms: composed and decomposed, ligatures, compatibility characters, syllables and their letters
    "caf\u00e9", "cafe\u0301", "\u00c5\u212b", "\ufb01\u017f\u1e9b\u0323", "\ud55c\uae00", "\u1112\u1161\u11ab\u1100\u1173\u11af", "\uff21\uff11\uff01", "\u1e69 s\u0323\u0307", "\ufdfa",
    # emoji: alone, joined, with skin tones, flags, variation selectors
    "\U0001f642", "a\U0001f642b", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea", "\u2764\ufe0f\u2764",
    # control characters and what cannot be seen
    "\x00", "a\x00b", "\x07\x1b[0m\x7f", "\x85\u2028\u2029", "\u200b\u200d\u00ad", "\ufeffa", "\u202eabc\u202c", "\ufffd", "\ue000\U0010ffff",
    # words, case, punctuation, code, scripts without spaces
    "don't DON'T we'Ll", "HelloWORLD helloWorld", "\u0130\u0131\u00df\u03a3\u03c3\u03c2", "!!!???...---", "(a)[b]{c}<d>", "``''\"\u201cq\u201d", "def f(x):\n    return x**2  # y", "https://a.b/c?d=e&f=%20",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "\u4e2d\u6587\uff0c\u6807\u70b9\u3002", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u064e\u0651\u0629", "a" * 70,
    # what looks like a special token, whether or not it is one
    "<s>", "</s>", "<unk>", "[INST] x [/INST]", "<|endoftext|>", "<|im_start|>user\n", "<|eot_id|>", "<start_of_turn>", "<0x0A>", "<|end", "\u0120a",
)  # fmt: skip
_PROBED_SPECIAL = 64


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The meaning of every id, and the width of the logits of the model at hand.

    `tokens[i]` are the bytes of id i (an id that the tokenizer does not use has none: b""); `special` maps the text of each special token to
    its id; `end_ids` are the ids that end an answer; `rows` is the width of the model's logits, at least `size`. Rows from `size` on are padding.
    `encodings` has the ids that the tokenizer makes of each of its `hard_texts`; empty where there is no tokenizer.
    """

    tokens: tuple[bytes, ...] = field(repr=False)
    special: Mapping[str, int] = field(repr=False, hash=False)
    end_ids: tuple[int, ...]
    rows: int
    encodings: Mapping[str, TokenIds] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special", MappingProxyType(dict(self.special)))
        object.__setattr__(self, "encodings", MappingProxyType(dict(self.encodings)))
        object.__setattr__(self, "end_ids", tuple(self.end_ids))
        if self.rows < len(self.tokens):
            raise ModelError(
                "model-unsupported",
                found=f"a tokenizer of {len(self.tokens)} ids over logits of {self.rows} rows",
                expected="at least as many rows as ids",
                why="the model cannot say or read its own last tokens",
                do="Resize the model's embeddings to its tokenizer, or remove the tokens that were added to it.",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """How it goes to another process: made again there, for its read-only mappings cannot go as they are."""
        special, encodings = dict(self.special), dict(self.encodings)
        return partial(Vocabulary, tokens=self.tokens, special=special, end_ids=self.end_ids, rows=self.rows, encodings=encodings), ()

    @property
    def size(self) -> int:
        """Number of real tokens."""
        return len(self.tokens)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the bytes of every id in order, then the sorted special ids. Neither `rows` nor `end_ids` nor `encodings` enters.

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

    def first_encoding_difference(self, other: Vocabulary) -> str | None:
        """The first text that both have been probed with and that becomes other ids in `self` than in `other`; None if there is none."""
        for text, mine in self.encodings.items():
            theirs = other.encodings.get(text, mine)
            if mine != theirs:
                return f"{text!r} is {self._written(mine)} in the one and {other._written(theirs)} in the other"
        return None

    def _written(self, ids: TokenIds) -> str:
        return " ".join(repr(self.tokens[i]) if i < self.size else f"id {i}" for i in ids) or "nothing"

    def _meaning(self, index: int) -> str:
        if index >= self.size:
            return "no token"
        return f"{self.tokens[index]!r}{' (special)' if index in self.special_ids else ''}"

    def bytes_of(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes of a sequence, without those of special tokens unless asked for."""
        return b"".join(self.tokens[i] for i in ids if not (skip_special and i in self.special_ids))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, rows: int, end_ids: Iterable[int] | None = None) -> Vocabulary:
        """Reads a Hugging Face tokenizer (anything with `get_vocab`, `added_tokens_decoder` and `encode`).

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
        encodings = {text: tuple(tokenizer.encode(text, add_special_tokens=False)) for text in hard_texts(special)}
        return cls(tokens=tuple(tokens), special=special, end_ids=tuple(end_ids), rows=rows, encodings=encodings)


def hard_texts(special: Mapping[str, int]) -> tuple[str, ...]:
    """The texts that a tokenizer is probed with: numerals, runs of white space, Unicode normal forms, emoji, control characters and such, and its own
    special tokens inside a text (the first 64 by id).
    """
    in_order = sorted(special, key=lambda text: special[text])[:_PROBED_SPECIAL]
    return (*_HARD_TEXTS, *(f"a{text} {text}b" for text in in_order))


def require_same(teacher: Vocabulary, student: Vocabulary) -> None:
    """Raises VocabularyError 'vocabulary-mismatch' unless every id means the same in both, naming the first that does not, and every text that both
    were probed with becomes the same ids, naming the first that does not. The widths of the logits may differ.
    """
    if not teacher.same_as(student):
        raise VocabularyError(
            "vocabulary-mismatch",
            found=f"{teacher.first_difference(student)} (first the teacher's, {teacher.size} tokens; then the student's, {student.size} tokens)",
            expected="every id to mean the same in both (the widths of the logits may differ)",
            why="a distribution over the teacher's ids would teach the student other tokens",
            do="Use a student with the teacher's tokenizer, or build one with `from_scratch` or `from_teacher`.",
        )
    difference = teacher.first_encoding_difference(student)
    if difference is not None:
        raise VocabularyError(
            "vocabulary-mismatch",
            found=f"the same tokens, but {difference} (first the teacher's, then the student's)",
            expected="both tokenizers to cut every text into the same tokens",
            why="the student would be taught, and later asked, in other tokens than it has learned to read",
            do="Use a student with the teacher's tokenizer; or, if that is what you want, copy the teacher's tokenizer files over the student's.",
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
