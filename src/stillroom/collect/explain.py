"""Why a call is not one that was made before: what differs between the two, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stillroom.collect.wire import Call

_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What the store knows of a call: its state (None where it has none such), and the stored call that is nearest to it but for `differences`."""

    key: str
    state: str | None
    reason: str | None
    attempts: int
    nearest: str | None
    nearest_state: str | None
    differences: tuple[str, ...]

    def __str__(self) -> str:
        known = (
            "is not in the store" if self.state is None else f"is {self.state}{f' ({self.reason})' if self.reason else ''}, attempts: {self.attempts}"
        )
        lines = [f"call {self.key} {known}"]
        if self.nearest is None:
            lines.append("  no other call is like it")
        else:
            lines.append(f"  nearest: call {self.nearest}, {self.nearest_state}; what differs:")
            lines += [f"    {difference}" for difference in self.differences]
        return "\n".join(lines)


def differences(asked: Call, stored: Call) -> tuple[str, ...]:
    """The fields of body, endpoint and sample that differ, each with both values. Empty for one and the same call."""
    return tuple(_differences("", _tree(asked), _tree(stored)))


def _tree(call: Call) -> dict[str, Any]:
    return {"body": call.body, "endpoint": call.endpoint.identity, "sample": call.sample}


def _differences(path: str, asked: Any, stored: Any) -> Iterator[str]:
    if isinstance(asked, dict) and isinstance(stored, dict):
        for name in sorted(asked.keys() | stored.keys()):
            yield from _differences(f"{path}.{name}" if path else name, asked.get(name, _ABSENT), stored.get(name, _ABSENT))
    elif isinstance(asked, list | tuple) and isinstance(stored, list | tuple):
        for place in range(max(len(asked), len(stored))):
            one, other = (values[place] if place < len(values) else _ABSENT for values in (asked, stored))
            yield from _differences(f"{path}[{place}]", one, other)
    elif asked != stored or isinstance(asked, bool) != isinstance(stored, bool):
        yield f"{path}: {_shown(asked, stored)} asked, {_shown(stored, asked)} stored"


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _shown(value: Any, other: Any) -> str:
    """A value, of a long text only the part around the place where the other begins to differ."""
    if not isinstance(value, str) or not isinstance(other, str):
        text = repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    place = next((at for at, (one, two) in enumerate(zip(value, other, strict=False)) if one != two), min(len(value), len(other)))
    begin = max(0, place - _SHOWN // 3)
    end = begin + _SHOWN
    return f"{'...' if begin else ''}{value[begin:end]!r}{'...' if end < len(value) else ''}"
