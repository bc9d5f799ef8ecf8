"""Matching the student's last hidden states with the teacher's: a term of an objective beside the divergences.

Shapes: R scored rows, D width of the student, E width of the teacher. Both states are those after the final norm, which a head would turn into
logits. What is compared is W h with the teacher's state, h being the student's and W a matrix E x D that is learned with the student
(`new_projections`): it belongs to the state of training, is saved and resumed with it, and is left out of the student that is exported. Without a
projection W is the identity, and the widths must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillroom.core.errors import RecipeError
from stillroom.core.seeds import derive_seed
from stillroom.objectives.divergences import require_kind
from stillroom.targets.kinds import HiddenTargets, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMatch:
    """A named distance per row between projected student states and teacher states; zero, with zero gradient, where they are equal; no unit.

    `per_row(projected_RE, teacher_RE)` gives one number per row. `learned`: whether a projection is trained with the student.
    """

    name: str
    per_row: Callable[[Tensor, Tensor], Tensor]
    learned: bool
    kinds: tuple[str, ...] = ("hidden",)
    softens: bool = False
    """match_temperature does not act on states."""

    def check(self, kind: str, target_temperature: float, match_temperature: float) -> None:
        """Raises StillroomError 'targets-unsupported' unless targets have the teacher's states. No temperature matters."""
        require_kind(self.name, kind, self.kinds)

    def check_widths(self, student_width: int, teacher_width: int) -> None:
        """Raises RecipeError 'recipe-invalid' if states of these widths cannot be compared."""
        if not self.learned and student_width != teacher_width:
            raise RecipeError(
                "recipe-invalid",
                found=f"{self.name} without a projection, between states of {student_width} numbers (student) and {teacher_width} (teacher)",
                expected="equal widths, or a learned projection",
                do=f"Give {self.name} a learned projection.",
            )

    def compare_R(self, states_RD: Tensor, targets: Targets, projections: nn.ModuleDict | None) -> Tensor:
        """The distance of each row, in float32 or wider, differentiable in the states and the projection. Targets are tensors on their device."""
        assert isinstance(targets, HiddenTargets), "StateMatch.check refuses this at plan time"
        wide = torch.promote_types(states_RD.dtype, torch.float32)
        projected_RE = states_RD.to(wide)
        if self.learned:
            assert projections is not None, f"{self.name} has a learned projection, which the student must hold"
            projected_RE = projections[self.name](projected_RE)
        teacher_RE: Tensor = targets.states_RD.to(wide)
        # A live teacher's states may come from inference mode, and autograd refuses to keep such a tensor.
        return self.per_row(projected_RE, teacher_RE.clone() if teacher_RE.is_inference() else teacher_RE)


def hidden_cosine(*, learned: bool = True) -> StateMatch:
    """1 - cos(W h, teacher's state): between 0 and 2, whatever the lengths of the two."""

    def per_row(projected_RE: Tensor, teacher_RE: Tensor) -> Tensor:
        return 1.0 - torch.nn.functional.cosine_similarity(projected_RE, teacher_RE, dim=-1)

    return StateMatch(name="hidden_cosine", per_row=per_row, learned=learned)


def hidden_mse(*, learned: bool = True) -> StateMatch:
    """The mean over the teacher's E numbers of (W h - teacher's state)^2."""

    def per_row(projected_RE: Tensor, teacher_RE: Tensor) -> Tensor:
        return (projected_RE - teacher_RE).square().mean(dim=-1)

    return StateMatch(name="hidden_mse", per_row=per_row, learned=learned)


STATE_MATCHES: dict[str, Callable[..., StateMatch]] = {"hidden_cosine": hidden_cosine, "hidden_mse": hidden_mse}


def new_projections(matches: Iterable[StateMatch], *, student_width: int, teacher_width: int, seed: int) -> nn.ModuleDict:
    """A projection (float32, on the CPU) for each of an objective's `state_matches` that learns one, by its name; empty where none does.

    Entries are drawn from a normal distribution of variance 1 / student_width, which keeps lengths in the mean; they are a function of the arguments,
    and the global generator is as before. Raises RecipeError as `StateMatch.check_widths`.
    """
    projections = nn.ModuleDict()
    for match in matches:
        match.check_widths(student_width, teacher_width)
        if match.learned:
            generator = torch.Generator().manual_seed(derive_seed(seed, "projection", match.name))
            projection = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
            with torch.no_grad():
                projection.weight.normal_(std=student_width**-0.5, generator=generator)
            projections[match.name] = projection
    return projections
