"""What a use is, in facts that terms turn on, and conditions over them in three-valued logic: a fact that nobody has stated is unknown.

A condition is a mapping. Its keys are facts, all of which must hold:

    {task: classifier}                     is this value; true and false for yes and no
    {release: [none, internal]}            is one of these
    {group_revenue_usd: {over: 20000000}}  is more than this
    {territories: {within: [EU, GB]}}      has one of these countries; likewise domicile. EU and EEA stand for their members

or `any: [...]` and `all: [...]` over conditions, and `not: {...}`. An empty condition always holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

FactValue: TypeAlias = bool | int | str | frozenset[str]
Facts: TypeAlias = Mapping[str, FactValue]
Condition: TypeAlias = Mapping[str, Any]

_EU = frozenset("AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE".split())
GROUPS = {"EU": _EU, "EEA": _EU | {"IS", "LI", "NO"}}
# JSON holds no larger whole number exactly, and digests are made of JSON.
_LARGEST = 2**53 - 1
NEVER: Condition = {"any": []}
"""The condition that never holds."""
# Stands for every country that no condition names.
_ELSEWHERE = "ZZ"


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: what kind of value it has, the choices where it is a choice, and the question that asks for it.

    `stated` is False for facts that are read off the recipe and its sources and cannot be stated in `intent`.
    """

    kind: Literal["choice", "flag", "number", "country", "countries"]
    question: str
    choices: tuple[str, ...] = ()
    stated: bool = True


FACTS: dict[str, Fact] = {
    "purpose": Fact("choice", "Will outputs train a model, or only evaluate one?", ("train", "evaluate")),
    "method": Fact("choice", "What of the teacher is learned from?", ("text", "logprobs", "logits", "hidden", "weights"), stated=False),
    "modality": Fact("choice", "What does the teacher produce?", ("text", "image", "audio", "video"), stated=False),
    "in_family": Fact("flag", "Does the student start from weights under this same licence?", stated=False),
    "task": Fact("choice", "What will the student do?", ("general-llm", "narrow-generative", "classifier", "embedder", "non-language")),
    "competes": Fact("flag", "Does the student, or what it is used in, compete with the teacher's provider? Who says so, and why?"),
    "release": Fact(
        "choice",
        "Who will be able to use the student: nobody (none), your organisation (internal), the public through a service (hosted), "
        "or anybody who gets its weights (weights)?",
        ("none", "internal", "hosted", "weights"),
    ),
    "commercial": Fact("flag", "Will the student be used commercially?"),
    "publish_dataset": Fact("flag", "Will the teacher's outputs themselves be published?"),
    "monthly_users": Fact("number", "How many monthly active users do your products have, affiliates included?"),
    "group_revenue_usd": Fact("number", "What was your group's revenue over the last 12 months, in US dollars?"),
    "model_as_a_service": Fact("flag", "Do you offer models as a service to others?"),
    "assistant_business": Fact("flag", "Do you offer a product that is an AI assistant for work?"),
    "domicile": Fact("country", "In which country are you established (two-letter code)?"),
    "territories": Fact("countries", "In which countries will the student be used or offered (two-letter codes)?"),
}


def holds(condition: Condition, facts: Facts) -> bool | None:
    """Whether `condition` holds: None where it depends on a fact that is not there."""
    return _all(_one(key, test, facts) for key, test in condition.items())


def facts_of(*conditions: Condition) -> frozenset[str]:
    """Names of the facts that these conditions look at."""
    return frozenset(name for name, _ in _tests(conditions))


def domain(name: str, conditions: Iterable[Condition]) -> tuple[FactValue, ...]:
    """Values of a fact that stand for all others, as far as these conditions can tell them apart."""
    fact = FACTS[name]
    if fact.kind == "flag":
        return (True, False)
    if fact.kind == "choice":
        return fact.choices
    tests = [test for tested, test in _tests(conditions) if tested == name]
    if fact.kind == "number":
        bounds = sorted({int(test["over"]) for test in tests if isinstance(test, Mapping)})
        return (0, *(bound + 1 for bound in bounds))
    named = sorted({code for test in tests if isinstance(test, Mapping) for code in test["within"]} | {t for t in tests if isinstance(t, str)})
    countries = [min(GROUPS[code]) if code in GROUPS else code for code in named] + [_ELSEWHERE]
    return tuple(frozenset({code}) for code in countries) if fact.kind == "countries" else tuple(countries)


def check_condition(condition: Any) -> None:
    """Raises ValueError, saying what is wrong, where `condition` is not one."""
    if not isinstance(condition, Mapping):
        raise ValueError(f"a condition is a mapping, not {condition!r:.60}")
    for key, test in condition.items():
        if key in ("any", "all"):
            if not isinstance(test, list):
                raise ValueError(f"`{key}` takes a list of conditions, not {test!r:.60}")
            for part in test:
                check_condition(part)
        elif key == "not":
            check_condition(test)
        elif key in FACTS:
            _check_test(key, FACTS[key], test)
        else:
            raise ValueError(f"{key!r} is not a fact; the facts are {', '.join(FACTS)}")


def check_value(name: str, value: Any) -> FactValue:
    """`value` as the fact has it. Raises ValueError, saying what the fact takes."""
    fact = FACTS[name]
    match fact.kind:
        case "flag" if isinstance(value, bool):
            return value
        case "choice" if value in fact.choices:
            return str(value)
        case "number" if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
            return value
        case "country" if _is_country(value):
            return str(value)
        case "countries" if isinstance(value, (list, tuple, set, frozenset)) and value and all(map(_is_country, value)):
            return frozenset(value)
    expected = {
        "flag": "true or false",
        "choice": f"one of {', '.join(fact.choices)}",
        "number": "a whole number",
        "country": "a two-letter country code such as DE",
        "countries": "a list of two-letter country codes such as [DE, US]",
    }
    raise ValueError(f"{name} takes {expected[fact.kind]}, not {value!r:.60}")


def phrase(name: str, value: FactValue) -> str:
    """A fact as a person would say it: 'release is internal', 'not commercial'."""
    words = name.replace("_", " ")
    if value is True:
        return words
    if value is False:
        return f"not {words}"
    return f"{words} is {', '.join(sorted(value)) if isinstance(value, frozenset) else value}"


def describe_condition(condition: Condition) -> str:
    """A condition in words."""
    parts = []
    for key, test in condition.items():
        if key in ("any", "all"):
            parts.append("(" + (" or " if key == "any" else " and ").join(describe_condition(part) for part in test) + ")")
        elif key == "not":
            parts.append(f"not ({describe_condition(test)})")
        elif isinstance(test, Mapping):
            word, value = next(iter(test.items()))
            parts.append(f"{key.replace('_', ' ')} {word} {', '.join(value) if isinstance(value, list) else f'{value:,}'}")
        elif isinstance(test, list):
            parts.append(f"{key.replace('_', ' ')} is {' or '.join(map(str, test))}")
        else:
            parts.append(phrase(key, test))
    return " and ".join(parts) or "always"


# --- conditions that are partly known ---------------------------------------------------------------------------------------------------


def settled(condition: Condition, known: Facts) -> Condition:
    """The condition with these facts put in."""
    found: dict[str, Any] = {}
    for key, test in condition.items():
        if key in ("any", "all"):
            found[key] = [settled(part, known) for part in test]
        elif key == "not":
            found[key] = settled(test, known)
        elif key in known:
            if not holds({key: test}, known):
                return NEVER
        else:
            found[key] = test
    return found


def with_meanings(condition: Condition, meanings: Mapping[str, Condition]) -> Condition:
    """The condition with each flag in `meanings` put for the condition under which it is yes."""
    parts: list[Condition] = []
    for key, test in condition.items():
        if key in ("any", "all"):
            parts.append({key: [with_meanings(part, meanings) for part in test]})
        elif key == "not":
            parts.append({"not": with_meanings(test, meanings)})
        elif key in meanings:
            parts.append(meanings[key] if test is True else {"not": meanings[key]})
        else:
            parts.append({key: test})
    return parts[0] if len(parts) == 1 else {"all": parts}


def left_open(condition: Condition, facts: Facts) -> Condition:
    """What is left of a condition when all that is known has been put in."""
    parts: list[Condition] = []
    for key, test in condition.items():
        one = {key: test}
        if holds(one, facts) is True:
            continue
        if key == "all":
            parts += [left for part in test if (left := left_open(part, facts))]
        elif key == "any":
            options = [left for part in test if holds(part, facts) is not False and (left := left_open(part, facts))]
            parts.append({"any": options} if len(options) > 1 else options[0])
        else:
            parts.append(one)
    return parts[0] if len(parts) == 1 else {"all": parts} if parts else {}


def _one(key: str, test: Any, facts: Facts) -> bool | None:
    if key == "any":
        return _any(holds(part, facts) for part in test)
    if key == "all":
        return _all(holds(part, facts) for part in test)
    if key == "not":
        inner = holds(test, facts)
        return None if inner is None else not inner
    value = facts.get(key)
    return None if value is None else _passes(value, test)


def _passes(value: FactValue, test: Any) -> bool:
    if isinstance(test, Mapping):
        if "over" in test:
            assert isinstance(value, int)
            return bool(value > test["over"])
        wanted = frozenset().union(*(GROUPS.get(code, frozenset({code})) for code in test["within"]))
        return bool(wanted & (value if isinstance(value, frozenset) else {value}))
    return value in test if isinstance(test, list) else bool(value == test)


def _all(values: Iterable[bool | None]) -> bool | None:
    unknown = False
    for value in values:
        if value is False:
            return False
        unknown = unknown or value is None
    return None if unknown else True


def _any(values: Iterable[bool | None]) -> bool | None:
    found = _all(None if value is None else not value for value in values)
    return None if found is None else not found


def _tests(conditions: Iterable[Condition]) -> Iterator[tuple[str, Any]]:
    for condition in conditions:
        for key, test in condition.items():
            if key in ("any", "all"):
                yield from _tests(test)
            elif key == "not":
                yield from _tests([test])
            else:
                yield key, test


def _check_test(name: str, fact: Fact, test: Any) -> None:
    if isinstance(test, Mapping):
        word = {"number": "over", "country": "within", "countries": "within"}.get(fact.kind)
        if set(test) != {word}:
            raise ValueError(f"{name} is tested with {word or 'a value or a list of values'}, not with {', '.join(map(str, test))}")
        if word == "over":
            check_value(name, test["over"])
        elif not isinstance(test["within"], list) or not all(
            _is_country(code) or (isinstance(code, str) and code in GROUPS) for code in test["within"]
        ):
            raise ValueError(f"{name}: `within` takes a list of two-letter country codes, EU or EEA, not {test['within']!r:.60}")
        return
    if fact.kind in ("number", "countries"):
        raise ValueError(f"{name} is tested with {'over' if fact.kind == 'number' else 'within'}, not with {test!r:.60}")
    for value in test if isinstance(test, list) else [test]:
        check_value(name, value)


def _is_country(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 2 and value.isascii() and value.isupper()
