"""Redaction: no planted secret is left, everything comes back, and ordinary text is left alone."""

from __future__ import annotations

import contextlib
import json
import random
import stat
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core.errors import DataError
from stillroom.data import Message, Prompt
from stillroom.data.redaction import LITERAL, Redactor, entropy_bits, luhn
from stillroom.demo.expressions import draw

MEGABYTE = 1_000_000


def letters(seed: int, length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Drawn, so that no key-shaped text stands in this file."""
    found = random.Random(seed)
    return "".join(found.choice(alphabet) for _ in range(length))


SECRETS: dict[str, list[str]] = {
    "API_KEY": [
        f"sk-proj-{letters(1, 40)}",
        f"sk-ant-api03-{letters(2, 60)}",
        f"AIza{letters(3, 35)}",
        f"hf_{letters(4, 34)}",
        f"gsk_{letters(5, 52)}",
        f"sk_live_{letters(6, 24)}",
        f"SG.{letters(7, 22)}.{letters(8, 43)}",
        f"npm_{letters(9, 36)}",
        f"pypi-{letters(10, 80)}",
    ],
    "GITHUB_TOKEN": [f"ghp_{letters(11, 36)}", f"github_pat_{letters(12, 60)}", f"glpat-{letters(13, 20)}"],
    "SLACK_TOKEN": [f"xoxb-{letters(14, 12, string.digits)}-{letters(15, 24)}"],
    "AWS_KEY": [f"AKIA{letters(16, 16, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ234567')}"],
    "JWT": [f"eyJ{letters(17, 30)}.eyJ{letters(18, 60)}.{letters(19, 43)}"],
    "PRIVATE_KEY": [
        f"-----BEGIN {kind} KEY-----\n{letters(20, 300)}\n-----END {kind} KEY-----" for kind in ("RSA PRIVATE", "PRIVATE", "OPENSSH PRIVATE")
    ],
    "EMAIL": ["ada.lovelace+notes@example.org", "o'brien@mail.example.co.uk", "jürgen@müller.de", "x_1@a-b.io"],
    "CARD": ["4111 1111 1111 1111", "5500000000000004", "3782-822463-10005", "6011000990139424"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO9386011117947"],
    "PHONE": ["+49 30 1234567", "+1 (555) 010-9999", "(555) 123-4567", "+442071838750"],
    "IP": ["203.0.113.7", "192.168.1.20", "2001:db8::8a2e:370:7334", "fe80::1ff:fe23:4567:890a"],
}
PLANTED = [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets]
AROUND = ["{}", "is {}.", "({})", '"{}"', "a {}, b", "\n{}\n", "é {} 我", "x={};", "{} {}"]


@pytest.mark.parametrize(("kind", "secret"), PLANTED, ids=lambda value: value[:12])
@pytest.mark.parametrize("around", AROUND)
def test_each_secret_is_replaced_by_its_kind_wherever_it_stands(kind: str, secret: str, around: str) -> None:
    text = around.replace("{}", secret)
    redactor = Redactor()
    found = redactor.redact(text)
    assert secret not in found.text
    assert found.placeholders == {f"<{kind}_1>"}
    assert redactor.restore(found.text, found.placeholders).text == text


@pytest.mark.parametrize(
    "text",
    [
        "api_key = '{}'", 'API_KEY="{}"', "password: {}", "Authorization: Bearer {}", "token={}", "secret => {}", '{{"client_secret": "{}"}}', "export DB_PASSWORD={}",
        "my password is {}", "https://user:{}@host/db",
    ],
)  # fmt: skip
def test_a_random_text_is_a_secret_where_it_is_called_one_and_then_everywhere(text: str) -> None:
    secret = letters(21, 20)
    redactor = Redactor()
    found = redactor.redact(f"{text.replace('{{', '{').replace('}}', '}').replace('{}', secret)} and again: {secret}.")
    assert secret not in found.text
    assert found.text.count("<SECRET_1>") == 2
    assert secret not in redactor.redact(f"Later, {secret} by itself").text


NEAR_MISSES = [
    "Version 1.2.3.4 of v 10.0.0.1 at 127.0.0.1, mask 255.255.255.0, 0.0.0.0.",
    "4111 1111 1111 1112 has a wrong check digit; 1234567890123456 is no card.",
    "DE89 3704 0044 0532 0130 01 has a wrong checksum. AB12 is a postcode.",
    "std::vector<int> a::b x[1::2] 12:30:45 fe::dead",
    "y = A@B.T + X@W.shape; @app.route('/x'); git@github.com:a/b.git; @someone",
    "token = tokenizer.encode2(text); password = get_password1(user); secret_key: str",
    "The order 123456789 of 2024-01-15 costs +1.2345678 and 555-1234.",
    "sk-learn, sk-short, eyJ, hf_hub, AKIA, xoxb-",
    "The secret is out: tokens per second matter. My password is a secret.",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "550e8400-e29b-41d4-a716-446655440000",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "3.14159265358979323846 2.71828182845904523536 299792458",
]


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_what_is_no_secret_is_left(text: str) -> None:
    assert Redactor().redact(text).text == text


def test_ordinary_prompts_code_and_text_are_left_alone() -> None:
    """Measured: of 2,000 of the demo's prompts, and of the lines of this repository's own code and documents, how many are touched."""
    assert [one.text for one in draw(2000, seed=5, held_out=False) if Redactor().redact(one.text).placeholders] == []
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "src").rglob("*.py"), *(root / "docs").rglob("*.md")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    touched = [line for line in lines if Redactor().redact(line).placeholders]
    assert len(lines) > 20_000
    assert len(touched) <= len(lines) // 1000, "\n".join(touched)


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from([secret for _, secret in PLANTED]),
    st.sampled_from(
        ["<EMAIL_1>", "<EMAIL_2>", "<LITERAL_1>", "<", ">", "_1>", "<EMAIL", "@", ".com", "password=", " ", "+49", "4111 1111 ", "://a:", "1.2."]
    ),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=1, max_size=4))
def test_everything_comes_back_whatever_the_texts_and_whatever_placeholders_are_in_them(texts: list[str]) -> None:
    redactor = Redactor()
    done = [redactor.redact(text) for text in texts]
    assert [redactor.restore(one.text, one.placeholders).text for one in done] == texts
    for text, one in zip(texts, done, strict=True):
        again = redactor.redact(one.text)
        assert redactor.restore(again.text, again.placeholders).text == one.text
        assert all(placeholder.startswith(f"<{LITERAL}_") for placeholder in again.placeholders), f"{text!r} still had a secret: {one.text!r}"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PLANTED), min_size=1, max_size=6), st.sampled_from([" ", "\n", ", ", " — ", " 我 "]))
def test_no_planted_secret_survives(planted: list[tuple[str, str]], between: str) -> None:
    redactor = Redactor()
    found = redactor.redact(f"x{between}" + between.join(secret for _, secret in planted) + f"{between}y")
    assert all(secret not in found.text for _, secret in planted)
    assert all(secret not in repr((redactor, found, redactor.counts)) for _, secret in planted)


def test_the_same_secret_has_the_same_placeholder_and_another_has_another() -> None:
    redactor = Redactor()
    first = redactor.redact("a@example.org b@example.org a@example.org")
    second = redactor.redact("b@example.org c@example.org")
    assert first.text == "<EMAIL_1> <EMAIL_2> <EMAIL_1>"
    assert second.text == "<EMAIL_2> <EMAIL_3>"
    (count,) = redactor.counts
    assert (count.kind, count.places, count.distinct) == ("EMAIL", 5, 3)


def test_an_answer_gets_back_the_secrets_of_its_own_prompt_alone() -> None:
    redactor = Redactor()
    redactor.redact("other@example.org")
    mine = redactor.redact("me@example.org")
    restored = redactor.restore("To <EMAIL_2>, not <EMAIL_1> or <PHONE_9>", mine.placeholders)
    assert restored.text == "To me@example.org, not <EMAIL_1> or <PHONE_9>"
    assert restored.unknown == ("<EMAIL_1>", "<PHONE_9>")


def test_a_conversation_is_redacted_turn_by_turn() -> None:
    redactor = Redactor()
    prompt = Prompt.of((Message("system", "Ask boss@example.org."), Message("user", "I am me@example.org")), answer="kept@example.org", family="f")
    done = redactor.redact_prompt(prompt)
    assert done.prompt.messages == (Message("system", "Ask <EMAIL_1>."), Message("user", "I am <EMAIL_2>"))
    assert (done.prompt.answer, done.prompt.family, done.original_id) == (prompt.answer, "f", prompt.id)
    assert done.prompt.id != prompt.id
    assert redactor.redact_prompt(Prompt.of("nothing here")).prompt == Prompt.of("nothing here")


def test_what_is_allowed_stays() -> None:
    redactor = Redactor(allowed={"help@example.org"})
    assert redactor.redact("help@example.org me@example.org").text == "help@example.org <EMAIL_1>"


def test_a_table_is_readable_by_its_owner_alone_and_goes_on_where_it_was(tmp_path: Path) -> None:
    redactor = Redactor()
    first = redactor.redact("a@example.org, +49 30 1234567 and <EMAIL_1>")
    path = tmp_path / "table.json"
    redactor.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    later = Redactor()
    later.load(path)
    assert later.restore(first.text, first.placeholders).text == "a@example.org, +49 30 1234567 and <EMAIL_1>"
    assert later.redact("b@example.org a@example.org").text == "<EMAIL_2> <EMAIL_1>"
    path.chmod(0o644)
    with pytest.raises(DataError, match="redaction-table"):
        Redactor().load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2, "secrets": {}}', b'{"version": 1, "secrets": {"EMAIL": "planted"}}', b"\xff", b"[" * 100_000,
                                     b'{"version": 1, "secrets": {"<A_1>": "planted", "<A_2>": "planted"}}'])  # fmt: skip
def test_a_table_that_is_none_is_refused_without_its_content(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(DataError) as caught:
        Redactor().load(path)
    assert caught.value.code == "redaction-table"
    assert "planted" not in str(caught.value)
    with pytest.raises(DataError):
        Redactor().load(tmp_path / "missing.json")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | st.recursive(st.none() | st.text(max_size=8), lambda inner: st.dictionaries(st.sampled_from(["version", "secrets", "<A_1>"]), inner | st.just(1))).map(lambda tree: json.dumps(tree).encode()))  # fmt: skip
def test_no_bytes_make_a_table_raise_anything_else(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.json"
        path.touch(mode=0o600)
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            Redactor().load(path)


@pytest.mark.parametrize("piece", ["a", "1", "1 ", "@", "a@", "a.", "sk-", "eyJ", "eyJaaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "+1", "+1 1", "token ", "token=", "://a:", "<A_1>", "ab:", "1.", "GB82 ", "(555) ", "password is ", "é@é.", "4111 "])  # fmt: skip
def test_no_text_takes_more_than_time_in_proportion(piece: str) -> None:
    """A rule that backtracked would need 10^12 steps for a megabyte, which nobody would live to see."""
    text = (piece * (MEGABYTE // len(piece) + 1))[:MEGABYTE]
    redactor = Redactor()
    found = redactor.redact(text)
    assert redactor.restore(found.text, found.placeholders).text == text


def test_checks() -> None:
    assert luhn("79927398713")
    assert not luhn("79927398710")
    assert entropy_bits("aaaa") == 0
    assert entropy_bits("abcd") == 2
