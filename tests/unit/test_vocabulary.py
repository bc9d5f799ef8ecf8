"""A vocabulary is what its ids mean: real tokenizers, trained here on a few sentences."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stillroom.core.errors import ModelError, VocabularyError
from stillroom.targets.vocabulary import Vocabulary, require_same

ENGLISH = ["the quick brown fox jumps over the lazy dog", "every second Tuesday at 9:30", "from 1999-12-31 to 2000-01-01", "café at noon"] * 4
LATIN = ["gallia est omnis divisa in partes tres", "quarum unam incolunt belgae", "aliam aquitani tertiam celtae", "anno 1234 die 5"] * 4
HARD = ["", " ", "  two  spaces ", "naïve café", "日本語", "🙂 emoji", "tab\there", "line\nbreak", "zero\u200bwidth", "12345", "\u2581metaspace"]


def byte_level(corpus: list[str], size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def metaspace(corpus: list[str]) -> PreTrainedTokenizerFast:
    """As the SentencePiece models of the Llama and Gemma families are written in tokenizer.json."""
    specials = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False))
    # Byte tokens are ordinary entries of such a model, not added ones.
    plain = Tokenizer(models.BPE(vocab=tokenizer.get_vocab(), merges=_merges(tokenizer), byte_fallback=True, fuse_unk=True))
    plain.normalizer, plain.decoder = tokenizer.normalizer, tokenizer.decoder
    plain.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def english() -> PreTrainedTokenizerFast:
    return byte_level(ENGLISH)


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return metaspace(ENGLISH)


def test_byte_level_ids_mean_their_bytes(english: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(english, rows=len(english))
    assert vocabulary.size == vocabulary.rows == len(english) == 300
    for text in [*ENGLISH, *HARD]:
        assert vocabulary.bytes_of(english.encode(text, add_special_tokens=False)) == text.encode()
    assert any(len(token) > 1 and token.startswith(b" ") for token in vocabulary.tokens)
    assert {bytes([byte]) for byte in range(256)} <= set(vocabulary.tokens)


def test_metaspace_ids_mean_their_bytes(pieces: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(pieces, rows=pieces.backend_tokenizer.get_vocab_size())
    for text in [*ENGLISH, *HARD]:
        if "\u2581" not in text:  # such a model cannot tell its own space mark from a space
            assert vocabulary.bytes_of(pieces.encode(text, add_special_tokens=False)) == text.encode()
    assert vocabulary.tokens[pieces.convert_tokens_to_ids("<0x0A>")] == b"\n"
    assert set(vocabulary.special) == {"<s>", "</s>"}


@given(st.text(max_size=40))
def test_any_text_comes_back_as_its_bytes(text: str) -> None:
    tokenizer, vocabulary = _cached_english()
    assert vocabulary.bytes_of(tokenizer.encode(text, add_special_tokens=False)) == text.encode("utf-8", "surrogatepass")


_CACHE: list[Any] = []


def _cached_english() -> tuple[PreTrainedTokenizerFast, Vocabulary]:
    if not _CACHE:
        tokenizer = byte_level(ENGLISH)
        _CACHE.extend([tokenizer, Vocabulary.from_tokenizer(tokenizer, rows=len(tokenizer))])
    return _CACHE[0], _CACHE[1]


def test_special_and_end_ids(english: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(english, rows=512)
    assert vocabulary.special == {"<|end|>": 0, "<|pad|>": 1}
    assert vocabulary.end_ids == (english.eos_token_id,)
    assert Vocabulary.from_tokenizer(english, rows=512, end_ids=[7, 9]).end_ids == (7, 9)
    assert vocabulary.bytes_of([0, 1]) == b""
    assert vocabulary.bytes_of([0], skip_special=False) == b"<|end|>"


def test_padded_heads_are_one_vocabulary(english: PreTrainedTokenizerFast) -> None:
    narrow = Vocabulary.from_tokenizer(english, rows=304)
    wide = Vocabulary.from_tokenizer(english, rows=512, end_ids=[5])
    assert narrow.rows != wide.rows
    assert narrow.same_as(wide)
    assert narrow.first_difference(wide) is None
    require_same(narrow, wide)


def test_equal_width_is_not_equal_meaning(english: PreTrainedTokenizerFast) -> None:
    teacher = Vocabulary.from_tokenizer(english, rows=320)
    student = Vocabulary.from_tokenizer(byte_level(LATIN), rows=320)
    assert (teacher.size, teacher.rows) == (student.size, student.rows)
    first = next(i for i in range(teacher.size) if teacher.tokens[i] != student.tokens[i])
    with pytest.raises(VocabularyError) as caught:
        require_same(teacher, student)
    assert caught.value.code == "vocabulary-mismatch"
    assert f"id {first} " in caught.value.found
    assert repr(teacher.tokens[first]) in caught.value.found
    assert repr(student.tokens[first]) in caught.value.found


def test_a_missing_or_added_token_is_named() -> None:
    one = Vocabulary(tokens=(b"a", b"b"), special={}, end_ids=(), rows=4)
    more = Vocabulary(tokens=(b"a", b"b", b"c"), special={}, end_ids=(), rows=4)
    assert one.first_difference(more) == "id 2 is no token in the one and b'c' in the other"
    assert more.first_difference(one) == "id 2 is b'c' in the one and no token in the other"
    # An id without a token is not the same as no id: the logits have a row for it.
    hole = Vocabulary(tokens=(b"a", b"b", b""), special={}, end_ids=(), rows=4)
    assert not one.same_as(hole)


def test_a_token_that_is_special_in_one_only_is_a_difference() -> None:
    plain = Vocabulary(tokens=(b"a", b"<e>"), special={}, end_ids=(), rows=2)
    special = replace(plain, special={"<e>": 1})
    assert not plain.same_as(special)
    assert plain.first_difference(special) == "id 1 is b'<e>' in the one and b'<e>' (special) in the other"


@given(st.lists(st.binary(max_size=4), max_size=6), st.lists(st.binary(max_size=4), max_size=6), st.sets(st.integers(0, 5), max_size=3))
def test_fingerprint_and_first_difference_agree(left: list[bytes], right: list[bytes], special: set[int]) -> None:
    def make(tokens: list[bytes]) -> Vocabulary:
        return Vocabulary(tokens=tuple(tokens), special={str(i): i for i in special if i < len(tokens)}, end_ids=(), rows=8)

    assert make(left).same_as(make(right)) == (make(left).first_difference(make(right)) is None) == (left == right)


def test_fingerprint_is_what_its_docstring_says() -> None:
    vocabulary = Vocabulary(tokens=(b"ab", b"", b"<e>"), special={"<e>": 2}, end_ids=(2,), rows=8)
    text = b"stillroom vocabulary 1\n" + struct.pack("<I", 3) + struct.pack("<I", 2) + b"ab" + struct.pack("<I", 0) + struct.pack("<I", 3) + b"<e>"
    assert vocabulary.fingerprint == hashlib.sha256(text + struct.pack("<II", 1, 2)).hexdigest()


def test_more_ids_than_rows_is_refused(english: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError) as caught:
        Vocabulary.from_tokenizer(english, rows=len(english) - 1)
    assert caught.value.code == "model-unsupported"


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_an_added_token_is_its_own_text(make: Callable[[list[str]], PreTrainedTokenizerFast]) -> None:
    """Its characters are not those of the scheme: a space is a space, and a letter that stands for a byte elsewhere is itself."""
    tokenizer = make(ENGLISH)
    tokenizer.add_tokens([AddedToken("é\u0120", special=False), AddedToken("\u2581x", special=False), AddedToken("<|über me|>", special=True)])
    vocabulary = Vocabulary.from_tokenizer(tokenizer, rows=1024)
    for text, special in (("é\u0120", False), ("\u2581x", False), ("<|über me|>", True)):
        index = tokenizer.convert_tokens_to_ids(text)
        assert vocabulary.tokens[index] == text.encode()
        assert (index in vocabulary.special_ids) == special
