"""The study's task: a question with a checkable result, answered by a few made-up sentences that end in it.

    larger: 17, 42          Rosa carried the narrow lantern to the mill. ... Answer: 42

The sentences are drawn from a grammar of templates and weighted words, the result is computed. So answers vary (`entropy_bits` of the grammar a word,
known exactly) and exact match of the result says what a change of the sampler costs. Families:

    larger   of two numbers below 100        first    of two words in the alphabet
    sum      of two numbers below 20         later    of two days of the week

A question is held out when a hash of it says so: no training set of the teacher has it.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HELD_OUT_ONE_IN = 16
SENTENCES = (2, 3, 4)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_RESULT = re.compile(r"Answer: (\w+)$")

WORDS: dict[str, tuple[str, ...]] = {
    "name": tuple(
        "Rosa Emil Clara Hugo Ines Otto Vera Paul Lena Karl Nora Felix Olga Bruno Greta Anton Ida Viktor Alma Jonas Berta Simon Tilda Marek".split()
    ),
    "thing": tuple(
        "lantern basket ladder kettle mirror anchor candle blanket hammer violin barrel carpet saddle bottle wagon pillow compass shovel curtain trumpet bucket "
        "feather ribbon needle button chisel goblet parcel pebble helmet cradle drum".split()
    ),
    "place": tuple(
        "mill harbour orchard chapel bakery meadow station cellar tower market forge bridge garden quarry stable library island valley tavern school".split()
    ),
    "quality": tuple(
        "narrow heavy golden dusty broken quiet crooked hollow painted rusty slender polished wooden faded woollen ancient little splendid muddy plain silver curious "
        "borrowed forgotten spotted folded sturdy wrinkled frozen gentle crimson stolen".split()
    ),
    "carried": tuple("carried dragged brought pushed sold lent mended hid painted washed measured lost found admired borrowed polished".split()),
    "went": tuple("walked wandered hurried drifted rode climbed sailed crept marched strolled ran returned".split()),
    "manner": tuple("slowly proudly quietly gladly often rarely calmly sadly bravely nearly always barely twice again alone early".split()),
    "weather": tuple("rain snow thunder fog sunshine wind frost hail drizzle mist".split()),
    "moment": tuple("dawn noon dusk midnight supper breakfast harvest easter".split()),
}
TEMPLATES: tuple[str, ...] = (
    "{name} {carried} the {quality} {thing} to the {place}.",
    "{name} {went} {manner} past the {quality} {place}.",
    "At {moment} the {quality} {thing} was {manner} {carried}.",
    "The {thing} near the {place} looked {quality} and {quality}.",
    "In the {weather} {name} {manner} {carried} a {quality} {thing}.",
    "{name} and {name} {went} from the {place} to the {place}.",
    "After the {weather} every {thing} in the {place} was {quality}.",
    "A {quality} {thing} and a {quality} {thing} stood in the {place}.",
    "By {moment} {name} had {manner} {carried} the {thing}.",
    "{name} {went} through the {weather} with a {quality} {thing}.",
)
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, what its result is, and the family that it belongs to."""

    text: str
    result: str
    family: str

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(self.text.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def questions(count: int, *, seed: int, held_out: bool) -> list[Question]:
    """`count` questions, families in equal parts, drawn with replacement on one side of the held-out rule."""
    rng = random.Random(f"questions {seed} {held_out}")
    makers = (_larger, _sum, _first, _later)
    found: list[Question] = []
    while len(found) < count:
        question = makers[len(found) % len(makers)](rng)
        if question.held_out == held_out:
            found.append(question)
    return found


def tale(question: Question, rng: random.Random) -> str:
    """One answer: some sentences, and the result."""
    return " ".join([*(sentence(rng) for _ in range(rng.choice(SENTENCES))), f"Answer: {question.result}"])


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar."""
    return _SLOT.sub(lambda slot: rng.choices(WORDS[slot[1]], weights=weights(slot[1]))[0], rng.choice(TEMPLATES))


def weights(slot: str) -> Sequence[float]:
    """How likely each word of a slot is, up to a factor: the n-th as n ** -0.4."""
    return [number**-0.4 for number in range(1, len(WORDS[slot]) + 1)]


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer ends in the question's result."""
    found = _RESULT.search(answer.strip())
    return found is not None and found[1] == question.result


def entropy_bits() -> tuple[float, float]:
    """Of one sentence of the grammar, on average: bits, and words with its full stop."""
    of_slot = {slot: _entropy(weights(slot)) for slot in WORDS}
    bits = math.log2(len(TEMPLATES)) + sum(of_slot[slot] for template in TEMPLATES for slot in _SLOT.findall(template)) / len(TEMPLATES)
    return bits, sum(len(template.split()) + 1 for template in TEMPLATES) / len(TEMPLATES)


def _entropy(some: Sequence[float]) -> float:
    total = sum(some)
    return -sum(one / total * math.log2(one / total) for one in some)


def _larger(rng: random.Random) -> Question:
    one, other = rng.sample(range(100), 2)
    return Question(f"larger: {one}, {other}", str(max(one, other)), "larger")


def _sum(rng: random.Random) -> Question:
    one, other = rng.randrange(20), rng.randrange(20)
    return Question(f"sum: {one}, {other}", str(one + other), "sum")


def _first(rng: random.Random) -> Question:
    one, other = rng.sample(WORDS["thing"], 2)
    return Question(f"first: {one}, {other}", min(one, other), "first")


def _later(rng: random.Random) -> Question:
    one, other = rng.sample(_DAYS, 2)
    return Question(f"later: {one}, {other}", max(one, other, key=_DAYS.index), "later")


def corpus(seed: int) -> Iterator[tuple[Question, str]]:
    """Questions outside the held-out rule with an answer each, without end."""
    rng = random.Random(f"corpus {seed}")
    number = 0
    while True:
        for question in questions(256, seed=seed * 1_000_003 + number, held_out=False):
            yield question, tale(question, rng)
        number += 1
