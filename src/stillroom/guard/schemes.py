"""The schemes that a sampler writes with and a detector scores: a closed union.

Each has one method that writes and one that scores, over the same keyed function of (key, window, token); the law of its scores under the null;
`mean`, what one score is on average there, and `most`, the largest.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TypeAlias

from stillroom.core.errors import GuardError
from stillroom.guard.gumbel import GumbelMax
from stillroom.guard.red_green import RedGreen
from stillroom.guard.tournament import Tournament

Scheme: TypeAlias = RedGreen | GumbelMax | Tournament
SCHEMES: tuple[type[Scheme], ...] = (RedGreen, GumbelMax, Tournament)


def scheme_from_json(settings: object) -> Scheme:
    """The scheme whose `as_json` this is. Raises GuardError 'guard-plan'."""
    values = dict(settings) if isinstance(settings, dict) else {}
    name = values.pop("scheme", None)
    for kind in SCHEMES:
        if name == kind.name and values.keys() == {field.name for field in fields(kind)}:
            if not all(type(value) is int if of in ("window", "layers") else type(value) in (int, float) for of, value in values.items()):
                raise _unknown("settings that are no numbers")
            try:
                return kind(**values)
            except ValueError as error:
                raise _unknown(str(error)) from error
    raise _unknown(f"a scheme {name!r} with the settings {', '.join(map(repr, values)) or 'none'}")


def _unknown(found: str) -> GuardError:
    names = ", ".join(kind.name for kind in SCHEMES)
    return GuardError("guard-plan", found=found, expected=f"one of {names}, with its settings", do="Take the settings as the plan has them.")
