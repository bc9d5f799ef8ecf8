"""What can be done with the rows of any kind of targets: name the kind, count them, take some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, assert_never

import numpy

from stillroom.targets.kinds import TARGET_KINDS, DrawnTargets, FullTargets, HiddenTargets, SampledTargets, Targets, TextTargets, TopKTargets

T = TypeVar("T", bound=Targets)


def kind_of(targets: Targets) -> str:
    """The kind's name in `TARGET_KINDS`."""
    return next(name for name, kind in TARGET_KINDS.items() if isinstance(targets, kind))


def row_count(targets: Targets) -> int:
    """R, the number of scored rows."""
    match targets:
        case TextTargets():
            return int(targets.token_ids_R.shape[0])
        case SampledTargets():
            return int(targets.log_probs_R.shape[0])
        case DrawnTargets():
            return int(targets.entropy_R.shape[0])
        case TopKTargets():
            return int(targets.ids_RK.shape[0])
        case HiddenTargets():
            return int(targets.states_RD.shape[0])
        case FullTargets():
            return int(targets.log_probs_RV.shape[0])
        case _:
            assert_never(targets)


def slice_targets(targets: T, start: int, stop: int) -> T:
    """Rows `start` to `stop` (exclusive) of the same kind: views, no copies (but for the offsets of drawn targets). A teacher's head is shared."""
    rows = slice(start, stop)
    match targets:
        case TextTargets():
            return replace(targets, token_ids_R=targets.token_ids_R[rows])
        case SampledTargets():
            return replace(targets, token_ids_R=targets.token_ids_R[rows], log_probs_R=targets.log_probs_R[rows])
        case DrawnTargets():
            offsets_R1 = targets.offsets_R1[start : stop + 1]
            entries = slice(int(offsets_R1[0]), int(offsets_R1[-1]))
            return replace(
                targets,
                offsets_R1=offsets_R1 - offsets_R1[0],
                ids_U=targets.ids_U[entries],
                counts_U=targets.counts_U[entries],
                entropy_R=targets.entropy_R[rows],
            )
        case TopKTargets():
            return replace(
                targets,
                ids_RK=targets.ids_RK[rows],
                log_probs_RK=targets.log_probs_RK[rows],
                tail_log_mass_R=targets.tail_log_mass_R[rows],
            )
        case HiddenTargets():
            return replace(targets, states_RD=targets.states_RD[rows])
        case FullTargets():
            return replace(targets, log_probs_RV=targets.log_probs_RV[rows])


def concatenate(parts: Sequence[T]) -> T:
    """The rows of all parts, which are of one kind, vocabulary and temperature, end to end. numpy arrays, at least one part; a head is the first's."""
    first = parts[0]
    assert all(type(part) is type(first) for part in parts), "targets of different kinds are not one"

    def joined(name: str) -> Any:
        return numpy.concatenate([getattr(part, name) for part in parts])

    match first:
        case TextTargets():
            return replace(first, token_ids_R=joined("token_ids_R"))
        case SampledTargets():
            return replace(first, token_ids_R=joined("token_ids_R"), log_probs_R=joined("log_probs_R"))
        case DrawnTargets():
            counts = numpy.concatenate([numpy.diff(part.offsets_R1) for part in parts if isinstance(part, DrawnTargets)])
            offsets_R1 = numpy.append(0, numpy.cumsum(counts))
            return replace(first, offsets_R1=offsets_R1, ids_U=joined("ids_U"), counts_U=joined("counts_U"), entropy_R=joined("entropy_R"))
        case TopKTargets():
            return replace(first, ids_RK=joined("ids_RK"), log_probs_RK=joined("log_probs_RK"), tail_log_mass_R=joined("tail_log_mass_R"))
        case HiddenTargets():
            return replace(first, states_RD=joined("states_RD"))
        case FullTargets():
            return replace(first, log_probs_RV=joined("log_probs_RV"))
