"""The schemes that a sampler writes with and a detector scores: a closed union.

Each has one method that writes and one that scores, over the same keyed function of (key, window, token); the law of its scores under the null; and
`mean`, what one score is on average there.
"""

from __future__ import annotations

from typing import TypeAlias

from stillroom.core.errors import GuardError
from stillroom.core.identities import Json
from stillroom.guard.gumbel import GumbelMax
from stillroom.guard.red_green import RedGreen
from stillroom.guard.tournament import Tournament

Scheme: TypeAlias = RedGreen | GumbelMax | Tournament
SCHEMES: tuple[type[Scheme], ...] = (RedGreen, GumbelMax, Tournament)


def scheme_from_json(settings: Json) -> Scheme:
    """The scheme whose `as_json` this is. Raises GuardError 'guard-plan'."""
    for kind in SCHEMES:
        if settings.get("scheme") == kind.name:
            try:
                return kind(**{name: value for name, value in settings.items() if name != "scheme"})
            except (TypeError, ValueError) as error:
                raise _unknown(str(error)) from error
    raise _unknown(f"a scheme {settings.get('scheme')!r}")


def _unknown(found: str) -> GuardError:
    names = ", ".join(kind.name for kind in SCHEMES)
    return GuardError("guard-plan", found=found, expected=f"one of {names}, with its settings", do="Take the settings as the plan has them.")
