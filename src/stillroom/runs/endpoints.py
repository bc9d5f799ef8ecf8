"""A teacher behind an endpoint, as a plan knows it: whom to ask, at what price, under which caps, what a stored probe proved and what a stored pilot
projects. Makes no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal, NoReturn

from stillroom.collect.probe import ProbeReport, Signal, signal
from stillroom.collect.spend import Caps, Price, PriceList
from stillroom.collect.store import RequestStore
from stillroom.collect.wire import Call, Endpoint, Messages, Settings, chat_body, completion_body
from stillroom.core.errors import DataError, ModelError
from stillroom.core.identities import ModelRef, TokenIds
from stillroom.data import Prompt
from stillroom.runs.directory import REQUESTS
from stillroom.runs.projection import Pilot, kept_pilot
from stillroom.runs.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointTeacher:
    """Whom to ask and on what terms. `store` is the request store's place, None where there is no run directory to put it in."""

    ref: ModelRef
    endpoint: Endpoint
    price: Price | None
    caps: Caps
    store: Path | None
    probe: ProbeReport | None
    pilot: Pilot | None

    @property
    def source(self) -> str:
        return self.ref.source

    @property
    def licence(self) -> str | None:
        return self.ref.licence


def endpoint_of(recipe: Recipe) -> Endpoint:
    """The recipe's endpoint. Raises CollectError 'endpoint-invalid'."""
    section = recipe.teacher.endpoint
    assert section is not None
    return Endpoint.parse(section.url, section.model, route=section.route, key_variable=section.key_variable, allow_http=section.allow_http)


def store_of(recipe: Recipe, directory: Path | None) -> Path | None:
    """Where the recipe's requests are kept: in a store of its own choice, else in the run's directory."""
    if recipe.buying.store is not None:
        return Path(recipe.buying.store).expanduser()
    return directory / REQUESTS if directory is not None else None


def endpoint_teacher(recipe: Recipe, directory: Path | None) -> EndpointTeacher:
    """What a recipe says of its endpoint, and what the store has of it.

    Raises CollectError 'endpoint-invalid', 'probe-invalid'; SpendError where prices cannot be read, or nothing bounds what may be spent.
    """
    endpoint, section = endpoint_of(recipe), recipe.buying
    price = PriceList.from_yaml(Path(section.prices).expanduser()).price(endpoint) if section.prices is not None else None
    caps = Caps.of(money=None if section.max_money is None else Decimal(str(section.max_money)), tokens=section.max_tokens)
    caps.require_for(price, endpoint)
    place = store_of(recipe, directory)
    probe, pilot = _stored(place, endpoint)
    return EndpointTeacher(
        ref=ModelRef(
            source=endpoint.model,
            kind="endpoint",
            revision=None,
            weights_sha256=None,
            architecture=None,
            parameters=None,
            licence=recipe.terms.licence,
        ),
        endpoint=endpoint,
        price=price,
        caps=caps,
        store=place,
        probe=probe,
        pilot=pilot,
    )


def _stored(place: Path | None, endpoint: Endpoint) -> tuple[ProbeReport | None, Pilot | None]:
    """What a probe and a pilot found, as far as they were made."""
    if place is None or not place.exists():
        return None, None
    with RequestStore.open(place, read_only=True) as store:
        probe, pilot = store.recall("probe", endpoint), store.recall("pilot", endpoint)
    return None if probe is None else ProbeReport.from_json(probe), kept_pilot(pilot)


# -- what can be had -------------------------------------------------------------------------------------------------------------


def require_askable(recipe: Recipe) -> None:
    """Raises ModelError 'targets-unsupported' for what only weights can give, naming what an endpoint gives in its place."""
    targets = recipe.targets
    found = [
        what
        for what, wanted in (
            (f"targets.kind: {targets.kind}", targets.kind not in ("auto", "text", "top_k")),
            ("targets.live", targets.live),
            ("student.from_teacher", recipe.student.from_teacher is not None),
            ("a term on hidden states", any(term.divergence in ("hidden_cosine", "hidden_mse") for term in recipe.objective.terms)),
            (f"targets.kind: top_k over prompts.answers: {recipe.prompts.answers}", targets.kind == "top_k" and recipe.prompts.answers != "teacher"),
        )
        if wanted
    ]
    if found:
        raise ModelError(
            "targets-unsupported",
            found=f"{' and '.join(found)}, of a teacher behind an endpoint",
            expected="text, or top_k where teacher.tokenizer is given and the endpoint's log-probabilities are proved",
            why="hidden states, whole distributions, layers and answers to other people's text take the teacher's weights",
            do="Set targets.kind to text, top_k or auto, or give teacher.model.",
        )


def obtainable(recipe: Recipe, teacher: EndpointTeacher, vocabulary_size: int) -> Signal:
    """The richest targets that this recipe can collect, and why no richer ones."""
    asked, targets = recipe.buying.top_logprobs, recipe.targets
    if recipe.prompts.answers != "teacher":
        some = "the answers are" if recipe.prompts.answers == "given" else "some answers are"
        return Signal(kind="text", why=f"{some} given, and an endpoint has no distributions over them")
    if recipe.teacher.tokenizer is None:
        return Signal(kind="text", why="teacher.tokenizer is not given, so that its tokens have no ids")
    if teacher.probe is None and asked == "auto":
        return Signal(kind="text", why="no probe of the endpoint is stored: stillroom probe shows what it gives")
    found = (
        signal(teacher.probe) if teacher.probe is not None else Signal(kind="top_k", k=int(asked), why="the recipe says so, and nothing was probed")
    )
    if found.kind == "text":
        return found
    at = 1.0 if found.reported == "before" else recipe.generation.sampling_temperature
    if abs(at - targets.target_temperature) > 1e-9:
        return Signal(
            kind="text", why=f"its log-probabilities are at temperature {at:g}, and targets.target_temperature is {targets.target_temperature:g}"
        )
    most = found.k if asked == "auto" else min(found.k, asked)
    return Signal(kind="top_k", k=min(most, targets.k, vocabulary_size), why=found.why, reported=found.reported, usage_trusted=found.usage_trusted)


def require_signal(kind: str, possible: Signal, reads_text_alone: bool) -> None:
    """Raises ModelError 'targets-unsupported' where the endpoint gives less than `kind`, or than the objective needs."""
    if possible.kind == "top_k" or (kind in ("auto", "text") and reads_text_alone):
        return
    raise ModelError(
        "targets-unsupported",
        found=f"a teacher that gives text alone: {possible.why}",
        expected="top_k" if kind == "top_k" else "targets that every term of the objective can be computed from",
        do="Change what is named there; or learn from the text: targets.kind: text, objective.terms: [{divergence: cross_entropy}].",
    )


def refuse_conversation() -> NoReturn:
    """A conversation for a route that takes text."""
    raise DataError(
        "prompts-invalid",
        found="prompts with chat messages, for the completions route",
        expected="texts; or the chat route; or teacher.tokenizer, whose template renders them",
        do="Set teacher.endpoint.route to chat, or give teacher.tokenizer.",
    )


# -- bodies ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asking:
    """How prompts become calls: the same for collecting, evaluating and comparing. `prompt_ids` is the renderer's, where the teacher's tokens are known."""

    endpoint: Endpoint
    max_new_tokens: int
    prompt_ids: Callable[[Prompt], TokenIds] | None = None

    def call(self, prompt: Prompt, *, temperature: float, top_logprobs: int | None = None) -> Call:
        """The call that gives the answer to a prompt. No seed is in it: what makes a collection repeatable is the store."""
        settings = Settings(max_tokens=self.max_new_tokens, temperature=temperature, top_logprobs=top_logprobs)
        if self.endpoint.route == "chat":
            return Call(endpoint=self.endpoint, body=chat_body(self.endpoint, _messages(prompt), settings))
        return Call(endpoint=self.endpoint, body=completion_body(self.endpoint, self._text(prompt), settings))

    def _text(self, prompt: Prompt) -> str | Sequence[int]:
        if self.prompt_ids is not None:
            return self.prompt_ids(prompt)
        return prompt.text if prompt.text is not None else refuse_conversation()


def _messages(prompt: Prompt) -> Messages:
    if prompt.text is not None:
        return [{"role": "user", "content": prompt.text}]
    return [{"role": message.role, "content": message.content} for message in prompt.messages or ()]


def access_path(recipe: Recipe) -> Literal["local", "self-hosted", "api"]:
    """How the ledger says that the teacher was reached."""
    if recipe.teacher.endpoint is None:
        return "local"
    return "self-hosted" if recipe.terms.access == "weights" else "api"
