"""What can be done with the rows of any kind of targets: name the kind, count them, take some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, assert_never

from stillroom.targets.kinds import TARGET_KINDS, FullTargets, HiddenTargets, Targets, TextTargets, TopKTargets

T = TypeVar("T", bound=Targets)


def kind_of(targets: Targets) -> str:
    """The kind's name in `TARGET_KINDS`."""
    return next(name for name, kind in TARGET_KINDS.items() if isinstance(targets, kind))


def row_count(targets: Targets) -> int:
    """R, the number of scored rows."""
    match targets:
        case TextTargets():
            return int(targets.token_ids_R.shape[0])
        case TopKTargets():
            return int(targets.ids_RK.shape[0])
        case HiddenTargets():
            return int(targets.states_RD.shape[0])
        case FullTargets():
            return int(targets.log_probs_RV.shape[0])
        case _:
            assert_never(targets)


def slice_targets(targets: T, start: int, stop: int) -> T:
    """Rows `start` to `stop` (exclusive) of the same kind: views, no copies. A teacher's head is shared."""
    rows = slice(start, stop)
    match targets:
        case TextTargets():
            return replace(targets, token_ids_R=targets.token_ids_R[rows])
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
