"""What a measurement comes back as: a number that says how it was made, or an absence that says why. Both are JSON by pydantic."""

from __future__ import annotations

from typing import TypeAlias

from pydantic import BaseModel, ConfigDict


class Evidence(BaseModel):
    """Base of everything that evals writes to evals/*.json: frozen, closed, and exact on the way back (infinities as strings)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Absence(Evidence):
    """A number that cannot be given."""

    absent: str
    """Why, as a clause that can be shown to a reader."""


class Measured(Evidence):
    """A measured number with its unit and its method."""

    value: float
    low: float | None = None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None = None
    n: int | None = None
    """Observations behind the value."""
    unit: str
    how: str
    """How it was measured and what the interval is."""


Maybe: TypeAlias = Measured | Absence
