"""A vocabulary is what its ids mean: real tokenizers, trained here on a few sentences."""

from __future__ import annotations

import hashlib
import json
import struct
import unicodedata
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillroom.core.errors import ModelError, VocabularyError
from stillroom.targets.vocabulary import Vocabulary, hard_texts, require_same

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


def test_a_copy_is_the_same_and_as_read_only() -> None:
    one = Vocabulary(tokens=(b"a", b"<e>"), special={"<e>": 1}, end_ids=(1,), rows=4, encodings={"a": (0,)})
    copy = deepcopy(one)
    assert copy == one
    assert (copy.special, copy.encodings, copy.rows) == (one.special, one.encodings, one.rows)
    with pytest.raises(TypeError):
        copy.special["b"] = 0  # type: ignore[index]


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


# -- the probe: tokenizers with the same tokens that cut texts differently ------------------------------------------------


@pytest.fixture(scope="module")
def rich() -> PreTrainedTokenizerFast:
    """Its merges reach across words and through long numerals, as some of a large tokenizer's do; GPT-2's pattern keeps them from most of that."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [*ENGLISH, *["1234567890", "12345678901234567890", "x**2", "0x1F4A9", "return x", "def f(x):", " 42", " 365"] * 4]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def changed(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    """The same tokens and special tokens, with one thing in tokenizer.json changed."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    change(tree)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), eos_token="<|end|>", pad_token="<|pad|>")


def before(pre_tokenizer: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pre_tokenizer, tree["pre_tokenizer"]]}

    return change


def normalised(kind: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.update(normalizer=kind)


def as_text(tree: dict[str, Any]) -> None:
    tree["added_tokens"] = [token | {"single_word": True} for token in tree["added_tokens"]]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "numerals digit by digit": before({"type": "Digits", "individual_digits": True}),
    "numerals apart from words": before({"type": "Digits", "individual_digits": False}),
    "numerals in threes": before({"type": "Split", "pattern": {"Regex": "\\d{1,3}"}, "behavior": "Isolated", "invert": False}),
    "a space put before": lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
    "no words": lambda tree: tree["pre_tokenizer"].update(use_regex=False),
    "single spaces": normalised({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}),
    "no white space at the ends": normalised({"type": "Strip", "strip_left": True, "strip_right": True}),
    "newlines as in Unix": normalised({"type": "Replace", "pattern": {"String": "\r\n"}, "content": "\n"}),
    "composed": normalised({"type": "NFC"}),
    "decomposed": normalised({"type": "NFD"}),
    "compatible, composed": normalised({"type": "NFKC"}),
    "lower case": normalised({"type": "Lowercase"}),
    "no accents": normalised({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}),
    "no control characters": normalised({"type": "Replace", "pattern": {"Regex": "\\p{Cc}"}, "content": ""}),
    "no joiners": normalised({"type": "Replace", "pattern": {"String": "\u200d"}, "content": ""}),
    "no variation selectors": normalised({"type": "Replace", "pattern": {"String": "\ufe0f"}, "content": ""}),
    "nothing merged": lambda tree: tree["model"].update(merges=[]),
    "merged in another order": lambda tree: tree["model"].update(merges=tree["model"]["merges"][::-1]),
    "special tokens inside words are text": as_text,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_tokenizers_of_the_same_tokens_that_cut_texts_differently_are_refused(
    rich: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None]
) -> None:
    other = changed(rich, change)
    teacher, student = (Vocabulary.from_tokenizer(tokenizer, rows=512) for tokenizer in (rich, other))
    assert teacher.same_as(student), "the tokens alone would have passed"
    with pytest.raises(VocabularyError) as caught:
        require_same(teacher, student)
    assert caught.value.code == "vocabulary-mismatch"
    text = next(text for text in teacher.encodings if rich.encode(text, add_special_tokens=False) != other.encode(text, add_special_tokens=False))
    assert f"{text!r} is " in caught.value.found


def test_a_tokenizer_that_was_saved_and_loaded_is_the_same(english: PreTrainedTokenizerFast, pieces: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, tokenizer in (("english", english), ("pieces", pieces)):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        loaded.chat_template = "{{ messages }}"
        one, other = Vocabulary.from_tokenizer(tokenizer, rows=512), Vocabulary.from_tokenizer(loaded, rows=640, end_ids=[1])
        require_same(one, other)
        assert one.encodings == other.encodings


def test_the_probe_has_what_it_promises(english: PreTrainedTokenizerFast) -> None:
    texts = hard_texts({"<|end|>": 0, "<|pad|>": 1})
    assert len(texts) == len(set(texts))
    assert texts[-2:] == ("a<|end|> <|end|>b", "a<|pad|> <|pad|>b")
    assert len(hard_texts({f"<{i}>": i for i in range(1000)})) == len(texts) - 2 + 64
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert any(unicodedata.normalize(form, text) != text for text in texts)
    assert {unicodedata.category(character) for text in texts for character in text} >= {
        "Nd",
        "Nl",
        "No",
        "Zs",
        "Zl",
        "Zp",
        "Cc",
        "Cf",
        "Co",
        "Mn",
        "So",
    }
    assert set(Vocabulary.from_tokenizer(english, rows=320).encodings) == set(texts)


def test_vocabularies_are_compared_on_the_texts_that_both_were_probed_with() -> None:
    """One that was made without a tokenizer has none, and an id beyond the tokens is named as such."""
    bare = Vocabulary(tokens=(b"a", b"b"), special={}, end_ids=(), rows=4)
    one, other = replace(bare, encodings={"ab": (0, 1), "b": (1,)}), replace(bare, encodings={"ab": (0, 3), "c": ()})
    require_same(bare, one)
    require_same(one, bare)
    assert one == bare
    assert one.fingerprint == bare.fingerprint
    assert one.first_encoding_difference(other) == "'ab' is b'a' b'b' in the one and b'a' id 3 in the other"
    assert replace(bare, encodings={"ab": ()}).first_encoding_difference(one) == "'ab' is nothing in the one and b'a' b'b' in the other"


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=12, unique=True), st.data())
def test_of_two_tokenizers_of_equal_width_the_first_id_that_differs_is_named(tokens: list[bytes], data: st.DataObject) -> None:
    teacher = Vocabulary(tokens=tuple(tokens), special={}, end_ids=(), rows=16)
    changes = data.draw(st.sets(st.integers(0, len(tokens) - 1), min_size=1))
    student = replace(teacher, tokens=tuple(token + b"!" if place in changes else token for place, token in enumerate(tokens)), rows=16)
    with pytest.raises(VocabularyError) as caught:
        require_same(teacher, student)
    assert caught.value.found.startswith(f"id {min(changes)} is ")
