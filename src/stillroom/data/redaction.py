"""Secrets and personal data are taken out of a prompt before it leaves the machine, and put back into the answer.

What is found is replaced by a placeholder such as `<EMAIL_1>`; within one `Redactor` the same secret always gets the same placeholder, numbered in the
order of first appearance. The rules are by shape, and by checksum where there is one. They find what looks like what they know, and nothing else: names
of people, addresses and passwords in prose are not found, so this lowers a risk and does not remove it.

The table from placeholders to secrets is in memory alone, unless the user asks for a file, which only its owner can read.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias

from stillroom.core import durable
from stillroom.core.errors import DataError
from stillroom.data.prompts import Message, Prompt

Span: TypeAlias = tuple[int, int]

# What a placeholder looks like. Text that looks so by itself is a finding too, of this kind, so that it comes back as it was.
_PLACEHOLDER = re.compile(r"<[A-Z][A-Z_]{0,30}_[0-9]{1,9}>")
LITERAL = "LITERAL"
_TOKEN = re.compile(r"[A-Za-z0-9+/_.~!@#$%^&*=-]{3,}+")
_PASSES = 12
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Finds one kind of secret. `find` gives where they stand; it is asked only of texts that have one of `hints`, if there are any."""

    kind: str
    find: Callable[[str], Iterable[Span]]
    hints: tuple[str, ...] = ()


def _shape(pattern: str, check: Callable[[str], bool] = lambda found: True) -> Callable[[str], Iterator[Span]]:
    """Finds what `pattern` matches (its group `secret` where it has one) and `check` accepts."""
    compiled = re.compile(pattern)
    group = "secret" if "secret" in compiled.groupindex else 0

    def find(text: str) -> Iterator[Span]:
        at = 0
        while found := compiled.search(text, at):
            accepted = check(found[group])
            if accepted:
                yield found.span(group)
            # What was no secret may hide the beginning of one.
            at = max(found.end(group) if accepted else found.start(group), found.start() + 1)

    return find


# --- checks --------------------------------------------------------------------------------------------------------------------------------


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(int(digit) for digit in digits[-1::-2])) % 10 == 0


def _is_card(digits: str) -> bool:
    """A number that a card network gives out, by length and first digits, with the right check digit."""
    length, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    network = (
        (digits[0] == "4" and length in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)
        or (two in (34, 37) and length == 15)
        or ((four == 6011 or two == 65 or 644 <= three <= 649 or 3528 <= four <= 3589) and length == 16)
        or ((two in (36, 38) or 300 <= three <= 305) and length == 14)
        or (two == 62 and 16 <= length <= 19)
    )
    return network and len(set(digits)) > 1 and luhn(digits)


_DIGIT_RUN = re.compile(r"(?<![\w.,])[0-9]++(?:[ -][0-9]++)*+")
_GOES_ON = re.compile(r"\w|[.,][0-9]")
_DIGITS = re.compile(r"[0-9]+")


def _find_cards(text: str) -> Iterator[Span]:
    """Groups of digits, with a space or a hyphen between them, that are a card's number together; other groups may stand beside them."""
    for run in _DIGIT_RUN.finditer(text):
        groups = [(part.start() + run.start(), part.end() + run.start()) for part in _DIGITS.finditer(run[0])]
        if _GOES_ON.match(text, run.end()):
            del groups[-1]
        first = 0
        while first < len(groups):
            last = _card_from(text, groups, first)
            if last is not None:
                yield groups[first][0], groups[last][1]
            first = first + 1 if last is None else last + 1


def _card_from(text: str, groups: list[Span], first: int) -> int | None:
    """The last group of the longest card number that begins with this group."""
    digits, best = "", None
    for last in range(first, min(first + 19, len(groups))):
        begin, end = groups[last]
        if len(digits) + end - begin > 19 or end - begin < 3:  # cards are printed in groups of three to six digits
            break
        digits += text[begin:end]
        if len(digits) >= 13 and _is_card(digits):
            best = last
    return best


# Length of an account number by country (the IBAN registry, ISO 13616).
_IBAN_LENGTHS = {
    code: int(length)
    for length, codes in {
        "15": "NO",
        "16": "BE",
        "18": "DK FI FO GL NL SD",
        "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK",
        "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA",
        "23": "AE GI IL IQ OM SO TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST",
        "26": "IS TR",
        "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HU LB NI PL SV",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU",
        "31": "MT SC",
        "32": "LC",
        "33": "RU",
    }.items()
    for code in codes.split()
}
_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ A-Za-z0-9])")


def _find_ibans(text: str) -> Iterator[Span]:
    """Account numbers of the length of their country with the right check digits (ISO 13616), with or without single spaces."""
    for start in _IBAN_START.finditer(text):
        length = _IBAN_LENGTHS.get(start[0][:2].upper())
        if length is None:
            continue
        end, number = start.start(), ""
        while end < len(text) and len(number) < length:
            sign = text[end]
            if sign.isascii() and sign.isalnum():
                number += sign
            elif sign != " " or text[end - 1] == " ":
                break
            end += 1
        whole = end == len(text) or not (text[end].isascii() and text[end].isalnum())
        if len(number) == length and whole and int("".join(str(int(sign, 36)) for sign in number[4:] + number[:4])) % 97 == 1:
            yield start.start(), end


def _is_public_looking(text: str) -> bool:
    """Whether an address could say something of someone: not one that means "here", "anywhere" or a mask."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or text.startswith("255.") or text.endswith((".0.0", ".0.0.0")))


def _is_ipv6(text: str) -> bool:
    """An address and not a piece of code: it has a digit, and a group of at least three."""
    return any(sign.isdigit() for sign in text) and any(len(group) >= 3 for group in text.split(":")) and _is_public_looking(text)


# Attributes of arrays and the like, which follow `matrix@other.` as a domain would.
_NOT_DOMAINS = frozenset("T H shape dtype transpose conj values data sum dot mean flatten reshape numpy item size cuda cpu".split())


_LOCAL_BACKWARDS = re.compile(r"[\w+-][\w.+%'-]{0,63}+")
_DOMAIN = re.compile(r"(?:[^\W_][\w-]{0,62}+\.){1,7}[^\W\d_]{2,24}+(?![\w@])")


def _find_mails(text: str) -> Iterator[Span]:
    """Around each @: at most 64 characters of a mailbox before it and a domain with a dot after it."""
    at = text.find("@")
    while at >= 0:
        local = _LOCAL_BACKWARDS.match(text[max(0, at - 64) : at][::-1])
        domain = _DOMAIN.match(text, at + 1)
        if local and domain and domain[0].rpartition(".")[2] not in _NOT_DOMAINS:
            yield at - len(local[0].rstrip("'.%-")), domain.end()
        at = text.find("@", at + 1)


def _is_phone(text: str) -> bool:
    digits = sum(sign.isdigit() for sign in text)
    return (8 if text.startswith("+") else 10) <= digits <= 15


def entropy_bits(text: str) -> float:
    """Shannon's entropy of the characters of `text`, in bits for each."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def _is_random(text: str) -> bool:
    """What is drawn and not written: letters and digits mixed, at least 3 bits a character (English words have less than that at such lengths)."""
    return any(sign.isdigit() for sign in text) and any(sign.isalpha() for sign in text) and entropy_bits(text) >= 3.0


def _find_private_keys(text: str) -> Iterator[Span]:
    """From BEGIN to END, or to the end of the text where the end was cut off."""
    at = 0
    for begin in re.finditer(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----", text):
        if begin.start() < at:
            continue
        end = text.find("-----END ", begin.end())
        close = text.find("-----", end + 9) if end >= 0 else -1
        at = close + 5 if close >= 0 else len(text)
        yield begin.start(), at


# --- rules ---------------------------------------------------------------------------------------------------------------------------------

# Every repetition below is bounded, or possessive and begun at one place only, so that each takes time in proportion to the text.
_ALONE = r"(?<![A-Za-z0-9])"
_KEYS: dict[str, tuple[str, ...]] = {
    # OpenAI, Anthropic, OpenRouter, DeepSeek and others that begin so
    rf"{_ALONE}sk-[A-Za-z0-9_-]{{20,}}+": ("sk-",),
    rf"{_ALONE}AIza[A-Za-z0-9_-]{{35}}": ("AIza",),
    rf"{_ALONE}ya29\.[A-Za-z0-9_-]{{20,}}+": ("ya29.",),
    rf"{_ALONE}(?:gsk_|xai-|pplx-|r8_|hf_|nvapi-|fw_|csk-|dapi)[A-Za-z0-9_-]{{30,}}+": (
        "gsk_",
        "xai-",
        "pplx-",
        "r8_",
        "hf_",
        "nvapi-",
        "fw_",
        "csk-",
        "dapi",
    ),
    rf"{_ALONE}(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{{16,}}+": ("_live_", "_test_"),
    rf"{_ALONE}whsec_[A-Za-z0-9+/=]{{24,}}+": ("whsec_",),
    rf"{_ALONE}SG\.[A-Za-z0-9_-]{{16,40}}\.[A-Za-z0-9_-]{{30,}}+": ("SG.",),
    rf"{_ALONE}npm_[A-Za-z0-9]{{36,}}+": ("npm_",),
    rf"{_ALONE}pypi-[A-Za-z0-9_-]{{40,}}+": ("pypi-",),
    rf"{_ALONE}do[opr]_v1_[a-f0-9]{{64}}": ("_v1_",),
    rf"{_ALONE}[0-9]{{8,10}}:AA[A-Za-z0-9_-]{{33}}": (":AA",),
    rf"{_ALONE}(?:SK|AC)[0-9a-f]{{32}}(?![0-9a-f])": ("SK", "AC"),
}
_CONTEXT = r"(?:api[_-]?key|apikey|secret|token|passw(?:or)?d|passwd|pwd|passphrase|credential|auth|bearer|private[_-]?key|access[_-]?key|client[_-]?key|signature)s?"

RULES: tuple[Rule, ...] = (
    Rule(kind="PRIVATE_KEY", find=_find_private_keys, hints=("PRIVATE KEY",)),
    Rule(
        kind="JWT",
        find=_shape(r"(?<![A-Za-z0-9_.-])eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{8,}+(?:\.[A-Za-z0-9_-]{0,}+){0,3}"),
        hints=("eyJ",),
    ),
    Rule(kind="AWS_KEY", find=_shape(r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Za-z0-9])"), hints=("AKIA", "ASIA", "ABIA", "ACCA")),
    Rule(
        kind="GITHUB_TOKEN",
        find=_shape(rf"{_ALONE}(?:gh[pousr]_[A-Za-z0-9]{{36,}}+|github_pat_[A-Za-z0-9_]{{22,}}+|glpat-[A-Za-z0-9_-]{{20,}}+)"),
        hints=("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
    ),
    Rule(
        kind="SLACK_TOKEN",
        find=_shape(rf"{_ALONE}(?:xox[abceoprs]-|xapp-)[A-Za-z0-9-]{{10,}}+|hooks\.slack\.com/services/[A-Za-z0-9/_-]{{20,}}+"),
        hints=("xox", "xapp-", "hooks.slack.com"),
    ),
    *(Rule(kind="API_KEY", find=_shape(pattern), hints=hints) for pattern, hints in _KEYS.items()),
    Rule(kind="SECRET", find=_shape(r"://[^\s/:@<>\"']{1,64}:(?P<secret>[^\s/:@<>\"']{3,128})@"), hints=("://",)),
    Rule(
        kind="SECRET",
        find=_shape(
            rf"(?i:{_CONTEXT})[\w.-]{{0,24}}+[\"'\])]{{0,2}}(?: ?(?::|=>?|:=|is) ?|[ \t]{{1,4}})(?i:(?:bearer|basic) )?[\"']?(?P<secret>[A-Za-z0-9+/_.~!@#$%^&*-]{{10,512}}+={{0,2}})(?![\w(\[])",
            _is_random,
        ),
    ),
    Rule(kind="EMAIL", find=_find_mails, hints=("@",)),
    Rule(kind="IBAN", find=_find_ibans),
    Rule(kind="CARD", find=_find_cards),
    Rule(
        kind="PHONE",
        find=_shape(
            r"(?<![\w.+/-])\+[1-9](?:[ -]?\(?[0-9]++\)?)*+(?!\w|[.,][0-9])"
            r"|(?<![\w.+/-])(?:\([0-9]{3}\) ?|[0-9]{3}[-.])[0-9]{3}[-.][0-9]{4}(?![\w-]|\.[0-9])",
            _is_phone,
        ),
    ),
    Rule(
        kind="IP",
        find=_shape(r"(?<![\w.-])(?<![vV] )(?<![vV]ersion )(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.[0-9])", _is_public_looking),
        hints=(".",),
    ),
    Rule(kind="IP", find=_shape(r"(?<![\w:.])[0-9A-Fa-f:]{6,45}+(?![\w:])", lambda text: ":" in text and _is_ipv6(text)), hints=(":",)),
)

# Not anyone's: addresses that version control and package tools write everywhere.
ALLOWED = frozenset({"git@github.com", "git@gitlab.com", "git@bitbucket.org", "noreply@github.com"})


# --- redacting and restoring ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Redacted:
    """A text without its secrets. `placeholders` are those that stand in it: only these are put back into an answer to it."""

    text: str
    placeholders: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactedPrompt:
    """A prompt without its secrets, under the id of that text; `original_id` is the id that it has with them."""

    prompt: Prompt
    original_id: str
    placeholders: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """An answer with the secrets of its prompt put back. `unknown` are placeholders in it that its prompt did not have; they are left as they are."""

    text: str
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCount:
    """How much of one kind was replaced: in how many places, and how many different ones. The values are in no report."""

    kind: str
    places: int
    distinct: int


class Redactor:
    """Replaces secrets by placeholders for one run, and puts them back.

    `allowed` are texts that are never replaced. Which number a secret gets depends on the order in which texts come: redact the prompts of a run in one
    order, all of them, before anything that depends on their text is made. Nothing that is printed of a Redactor has a secret in it.
    """

    __slots__ = ("_allowed", "_numbers", "_places", "_placeholders", "_rules", "_secrets")

    def __init__(self, *, allowed: Iterable[str] = ALLOWED, rules: tuple[Rule, ...] = RULES) -> None:
        self._allowed = frozenset(allowed)
        self._rules = rules
        self._placeholders: dict[str, str] = {}
        self._secrets: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()
        self._places: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"Redactor({len(self._secrets)} placeholders)"

    def redact(self, text: str) -> Redacted:
        """`text` without what the rules find; `restore` of it gives `text` again, whatever `text` is, also where it has placeholders in it."""
        pieces: list[tuple[str, bool]] = [(text, False)]  # and whether nothing more is to be found in it
        placed: set[str] = set()
        # What stands between two placeholders is looked at again by itself: with its neighbours gone, it may look like a secret now.
        for _ in range(_PASSES):
            if all(settled for _, settled in pieces):
                break
            pieces = [part for piece in pieces for part in ([piece] if piece[1] else self._split(piece[0], placed))]
        return Redacted(text="".join(piece for piece, _ in pieces), placeholders=frozenset(placed))

    def redact_prompt(self, prompt: Prompt) -> RedactedPrompt:
        """The prompt with each of its texts redacted, its answer and family as they were: what may be sent."""
        texts = [prompt.text] if prompt.text is not None else [turn.content for turn in prompt.messages or ()]
        done = [self.redact(text) for text in texts]
        content: str | tuple[Message, ...] = done[0].text if prompt.text is not None else ()
        if prompt.messages is not None:
            content = tuple(Message(turn.role, one.text) for turn, one in zip(prompt.messages, done, strict=True))
        return RedactedPrompt(
            prompt=Prompt.of(content, answer=prompt.answer, family=prompt.family),
            original_id=prompt.id,
            placeholders=frozenset().union(*(one.placeholders for one in done)),
        )

    def restore(self, answer: str, placeholders: frozenset[str]) -> Restored:
        """`answer` with those of `placeholders` that stand in it replaced by what they stood for: those of its own prompt, and of no other."""
        unknown: dict[str, None] = {}

        def secret(found: re.Match[str]) -> str:
            if found[0] in placeholders and found[0] in self._secrets:
                return self._secrets[found[0]]
            unknown[found[0]] = None
            return found[0]

        return Restored(text=_PLACEHOLDER.sub(secret, answer), unknown=tuple(unknown))

    @property
    def counts(self) -> tuple[KindCount, ...]:
        """How much was replaced, by kind, in order of their names. LITERAL is text that looked like a placeholder by itself."""
        distinct = Counter(map(_kind_of, self._secrets))
        return tuple(KindCount(kind=kind, places=self._places[kind], distinct=distinct[kind]) for kind in sorted(distinct))

    def save(self, path: Path) -> None:
        """Writes the table of placeholders and secrets, readable by its owner alone: who has this file has the secrets."""
        tree = {"version": _VERSION, "secrets": self._secrets}
        durable.write_bytes_atomic(path, json.dumps(tree, ensure_ascii=True, indent=1).encode(), mode=0o600)

    def load(self, path: Path) -> None:
        """Goes on with the placeholders of a saved table; nothing may have been replaced before.

        Raises DataError 'redaction-table' where the file cannot be used, or can be read by others than its owner.
        """
        assert not self._secrets, "a table is loaded before anything is replaced"
        try:
            mode = path.stat().st_mode
            tree = json.loads(path.read_bytes())
        except OSError as error:
            _refuse(f"{path}: {error.strerror}")
        except (ValueError, RecursionError):  # its text is not in the message: it has secrets in it
            _refuse(f"{path} is not JSON")
        if stat.S_IMODE(mode) & 0o077:
            _refuse(f"{path} can be read by others: its mode is {stat.S_IMODE(mode):o}", "mode 600")
        secrets = tree.get("secrets") if isinstance(tree, dict) and tree.get("version") == _VERSION else None
        if not isinstance(secrets, dict) or not all(isinstance(secret, str) and _PLACEHOLDER.fullmatch(name) for name, secret in secrets.items()):
            _refuse(f"{path} is not a table of version {_VERSION}")
        if len(set(secrets.values())) != len(secrets):
            _refuse(f"{path} has two placeholders for one secret")
        self._secrets = dict(secrets)
        self._placeholders = {secret: name for name, secret in secrets.items()}
        for name in secrets:
            kind, _, number = name[1:-1].rpartition("_")
            self._numbers[kind] = max(self._numbers[kind], int(number))

    # --- one piece of text ------------------------------------------------------------------------------------------------------------------

    def _split(self, text: str, placed: set[str]) -> list[tuple[str, bool]]:
        """`text` as placeholders and what is between them; whole, and settled, where nothing is found."""
        found = self._found(text)
        if not found:
            return [(text, True)]
        parts: list[tuple[str, bool]] = []
        at = 0
        for begin, end, kind in found:
            placeholder = self._placeholder(text[begin:end], kind)
            placed.add(placeholder)
            parts += [(text[at:begin], begin == at), (placeholder, True)]
            at = end
        return [*parts, (text[at:], at == len(text))]

    def _found(self, text: str) -> list[tuple[int, int, str]]:
        """What to replace, in order and apart from each other: where findings overlap, all that they cover, under the kind of the longest."""
        found = [(*span, LITERAL) for span in _shape(_PLACEHOLDER.pattern)(text)]
        for rule in self._rules:
            if not rule.hints or any(hint in text for hint in rule.hints):
                found += [(begin, end, rule.kind) for begin, end in rule.find(text) if text[begin:end] not in self._allowed]
        known = {text[begin:end] for begin, end, kind in found if kind == "SECRET"}
        found += [(*span, "SECRET") for span in self._said_again(text, known)]
        apart: list[tuple[int, int, str]] = []
        longest = 0
        for begin, end, kind in sorted(found):
            if not apart or begin >= apart[-1][1]:
                apart.append((begin, end, kind))
                longest = end - begin
                continue
            first, last, earlier = apart[-1]
            apart[-1] = (first, max(last, end), kind if end - begin > longest else earlier)
            longest = max(longest, end - begin)
        return apart

    def _said_again(self, text: str, known: set[str]) -> Iterator[Span]:
        """Where a secret that was recognised by its context, here or earlier in the run, stands without it."""
        if not known and not self._numbers["SECRET"]:
            return
        for token in _TOKEN.finditer(text):
            for value in (token[0], token[0].rstrip(".!=*&")):
                if value in known or self._placeholders.get(value, "").startswith("<SECRET_"):
                    yield token.start(), token.start() + len(value)
                    break

    def _placeholder(self, secret: str, kind: str) -> str:
        placeholder = self._placeholders.get(secret)
        if placeholder is None:
            self._numbers[kind] += 1
            placeholder = f"<{kind}_{self._numbers[kind]}>"
            self._placeholders[secret] = placeholder
            self._secrets[placeholder] = secret
        self._places[_kind_of(placeholder)] += 1
        return placeholder


def _kind_of(placeholder: str) -> str:
    return placeholder[1:].rpartition("_")[0]


def _refuse(found: str, expected: str = "a table that Stillroom wrote") -> NoReturn:
    raise DataError("redaction-table", found=found, expected=expected, do="Name the file that this run wrote, or go on without one in a new run.")
