"""The student: five verbs over one `transformers` model, its optimiser and its position in training.

Sum in the objective, count over the whole step, divide once. B sequences, T positions, R scored rows, V vocabulary size, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from stillroom.core import durable
from stillroom.core.errors import RunError
from stillroom.core.identities import Sampling, TokenIds, TokenSequence
from stillroom.models.batching import by_length
from stillroom.models.loading import head_of
from stillroom.models.offload import HostOptimiser
from stillroom.models.packing import scored_states
from stillroom.models.rollouts import decode
from stillroom.objectives.objective import Objective, backward_chunked, sums_chunked
from stillroom.targets.protocols import Batch, StepSums
from stillroom.targets.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserSettings:
    """AdamW, and the norm that the gradient is clipped to. Weight decay falls on matrices alone."""

    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    offload: bool = False
    """Whether its state is kept in host memory while the model is on an accelerator."""


class TransformersStudent:
    """Implements targets.protocols.Student. Weights and optimiser state are float32; with `dtype` bfloat16 the arithmetic is autocast.

    `projections` (objectives.matching.new_projections) are learned beside the model where an objective matches hidden states: they are clipped,
    decayed, saved and loaded with its parameters, and are no part of `model`, which is what is exported. Parameters that require no gradient
    (what models.adapters freezes) are not learned, and are in no checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        settings: OptimiserSettings,
        *,
        dtype: torch.dtype = torch.float32,
        rows_per_chunk: int = 2048,
        projections: nn.ModuleDict | None = None,
    ) -> None:
        self.model = model.float()
        # Without dropout: its draws from a global generator could not be resumed, and a teacher's distribution is not a label to overfit.
        self.model.eval()
        self.optim_steps = 0
        self._vocabulary = vocabulary
        self._settings = settings
        self._dtype = dtype
        self._rows_per_chunk = rows_per_chunk
        self._projections = (projections or nn.ModuleDict()).to(model.device)
        self._optimiser = optimiser_of(self._parameters.values(), settings, model.device)

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is learned, by name: the model's, then the projections'."""
        named = dict(self.model.named_parameters()) | dict(self._projections.named_parameters(prefix="projections"))
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def forward_backward(self, batch: Batch, objective: Objective, divide_by: float) -> StepSums:
        """Adds the gradient of (sum over scored rows) / `divide_by`; returns undivided sums. A batch without scored rows adds nothing."""
        if batch.scored_tokens == 0:
            return StepSums(objective_nats=0.0, terms_nats={}, scored_tokens=0)
        with self._arithmetic():
            states_RD = self._states(batch.sequences)
            gradient_RD, sums = backward_chunked(
                states_RD.detach(),
                head_of(self.model),
                size=self.vocabulary.size,
                objective=objective,
                targets=batch.targets,
                labels=batch.labels,
                divide_by=divide_by,
                rows_per_chunk=self._rows_per_chunk,
                weights_R=batch.weights_R,
                projections=self._projections,
            )
        states_RD.backward(gradient_RD)
        return sums

    @torch.no_grad()
    def score(self, batch: Batch, objective: Objective) -> StepSums:
        """The objective's sums on `batch` without any gradient: what the validation curve is drawn from."""
        if batch.scored_tokens == 0:
            return StepSums(objective_nats=0.0, terms_nats={}, scored_tokens=0)
        with self._arithmetic():
            return sums_chunked(
                self._states(batch.sequences),
                head_of(self.model),
                size=self.vocabulary.size,
                objective=objective,
                targets=batch.targets,
                labels=batch.labels,
                rows_per_chunk=self._rows_per_chunk,
                weights_R=batch.weights_R,
                projections=self._projections,
            )

    def optim_step(self, learning_rate: float) -> float:
        """One AdamW step on the clipped gradient; the gradient is gone afterwards. Returns the norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.clip_norm))
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.step()
        self.drop_gradient()
        self.optim_steps += 1
        return norm

    @property
    def checkpoint_bytes(self) -> int:
        """What `save` writes: learned weights and two moments, all float32."""
        return 12 * sum(parameter.numel() for parameter in self._parameters.values())

    def drop_gradient(self) -> None:
        """Forgets what has been accumulated (after a micro-batch that did not fit)."""
        self._optimiser.zero_grad(set_to_none=True)

    def sample(self, prompts: Sequence[TokenIds], sampling: Sampling) -> list[TokenIds]:
        """One completion for each prompt, the end token included where it was reached."""
        return decode(self.model, prompts, sampling, end_ids=frozenset(self.vocabulary.end_ids), size=self.vocabulary.size)

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """For each sequence the log-probability (nats) of each of its scored tokens, at temperature 1."""
        results: list[list[float]] = [[]] * len(sequences)
        for group in by_length([len(sequence.ids) for sequence in sequences], 64):
            part = [sequences[index] for index in group]
            log_probs_RV = torch.log_softmax(self._logits(self._states(part)), dim=-1)
            next_R = torch.tensor([s.ids[row + 1] for s in part for row in s.scored_rows], device=log_probs_RV.device)
            chosen = log_probs_RV.gather(-1, next_R[:, None]).squeeze(-1)
            for index, rows in zip(group, chosen.split([len(s.scored_rows) for s in part]), strict=True):
                results[index] = rows.tolist()
        return results

    def save(self, directory: Path) -> None:
        """Weights, optimiser state and counters into `directory`, as safetensors and JSON: `load` goes on bit for bit."""
        directory.mkdir(parents=True, exist_ok=True)
        named = self._parameters
        save_file({name: p.detach().contiguous().cpu() for name, p in named.items()}, directory / "weights.safetensors")
        state: dict[str, torch.Tensor] = {}
        for name, parameter in named.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                state[f"{key}:{name}"] = value.detach().contiguous().cpu()
        save_file(state, directory / "optimiser.safetensors")
        durable.write_json_atomic(directory / "student.json", {"optim_steps": self.optim_steps})

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote. Raises RunError 'run-corrupt' where a file is damaged or is of another model."""
        named = self._parameters
        try:
            weights = load_file(directory / "weights.safetensors")
            state = load_file(directory / "optimiser.safetensors")
            self.optim_steps = int(durable.read_json(directory / "student.json")["optim_steps"])
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(weights[name])
            for name, parameter in named.items():
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}:{name}" in state]
                if keys:
                    device = {key: torch.device("cpu") if key == "step" and parameter.device.type == "cpu" else parameter.device for key in keys}
                    self._optimiser.state[parameter] = {key: state[f"{key}:{name}"].to(device[key]) for key in keys}
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise RunError(
                "run-corrupt",
                found=f"checkpoint {directory}: {error}",
                expected="a checkpoint of this student",
                do=f"Remove {directory} and run again.",
            ) from error

    def _states(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        return scored_states(self.model, sequences)

    def _logits(self, states_RD: torch.Tensor) -> torch.Tensor:
        """Logits over the real tokens, float32."""
        return head_of(self.model)(states_RD)[:, : self.vocabulary.size].float()

    def _arithmetic(self) -> torch.autocast | nullcontext[None]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.model.device.type, self._dtype)


def optimiser_of(parameters: Iterable[nn.Parameter], settings: OptimiserSettings, device: torch.device) -> torch.optim.Optimizer | HostOptimiser:
    """The optimiser of a student whose weights are on `device`."""
    if settings.offload and device.type != "cpu":
        return HostOptimiser(parameters, lambda copies: adamw(copies, settings))
    return adamw(parameters, settings)


def adamw(parameters: Iterable[nn.Parameter], settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over parameters that are all on one device."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=settings.betas, fused=True)


def named_gradients(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The accumulated gradient of each parameter that has one."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad
