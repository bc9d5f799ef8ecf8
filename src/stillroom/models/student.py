"""The student: five verbs over one `transformers` model, its optimiser and its position in training.

Sum in the objective, count over the whole step, divide once. B sequences, T positions, R scored rows, V vocabulary size, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from stillroom.core import durable
from stillroom.core.errors import RunError
from stillroom.core.identities import Sampling, TokenIds, TokenSequence
from stillroom.models.batching import by_length
from stillroom.models.loading import head_of, prove_split
from stillroom.models.offload import HostOptimiser
from stillroom.models.packing import scored_states
from stillroom.models.parallel import ALONE, Processes, Sharded, Sharding, read_parts, shard, state_number, whole_tensor, write_parts
from stillroom.models.rollouts import decode
from stillroom.objectives.objective import Objective, backward_chunked, sums_chunked
from stillroom.targets.protocols import Batch, StepSums
from stillroom.targets.vocabulary import Vocabulary

T = TypeVar("T")

# A checkpoint in parts has neither of these files.
_WEIGHTS, _OPTIMISER = "weights.safetensors", "optimiser.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


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

    With several `processes` each accumulates the gradient of its own batches, and `optim_step` adds them up. With `sharding` each holds a part
    (models.parallel): every verb is called by all of them, and `model` may have its parameters on the meta device.
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
        processes: Processes = ALONE,
        sharding: Sharding | None = None,
    ) -> None:
        self.model = model.float()
        # Without dropout: its draws from a global generator could not be resumed, and a teacher's distribution is not a label to overfit.
        self.model.eval()
        self.optim_steps = 0
        self._vocabulary = vocabulary
        self._settings = settings
        self._dtype = dtype
        self._rows_per_chunk = rows_per_chunk
        self._processes = processes
        device = model.device if sharding is None else sharding.device
        self._projections = (projections or nn.ModuleDict()).to(device)
        self._sharded: Sharded | None = None if sharding is None else shard(self.model, self._projections, sharding, dtype)
        if sharding is not None and sharding.weights is not None:
            with torch.no_grad():
                self._whole(partial(prove_split, self.model, str(sharding.weights)))
        self._optimiser = optimiser_of(self._parameters.values(), settings, device)

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is learned, by name: the model's, then the projections'."""
        named = dict(self.model.named_parameters()) | dict(self._projections.named_parameters(prefix="projections"))
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    @property
    def processes(self) -> Processes:
        return self._processes

    @property
    def in_step(self) -> bool:
        """Whether all processes must go forward and backward equally often, if need be with a batch of nothing."""
        return self._sharded is not None

    def forward_backward(self, batch: Batch, objective: Objective, divide_by: float) -> StepSums:
        """Adds the gradient of (sum over scored rows) / `divide_by`; returns undivided sums. A batch without scored rows adds nothing."""
        if batch.scored_tokens == 0:
            return self._pass_nothing(objective)

        def forward() -> tuple[torch.Tensor, torch.Tensor, StepSums]:
            with self._arithmetic():
                states_RD = self._states(batch.sequences)
                return states_RD, *backward_chunked(
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

        states_RD, gradient_RD, sums = self._whole(forward)
        states_RD.backward(gradient_RD)
        return sums

    @torch.no_grad()
    def score(self, batch: Batch, objective: Objective) -> StepSums:
        """The objective's sums on `batch` without any gradient: what the validation curve is drawn from."""
        if batch.scored_tokens == 0:
            return self._pass_nothing(objective)

        def forward() -> StepSums:
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

        return self._whole(forward)

    def _pass_nothing(self, objective: Objective) -> StepSums:
        """No rows: nothing is computed, but where parts are exchanged the others must not wait for this process's."""
        if self._sharded is not None:
            states_RD = self._whole(partial(self._no_states, objective))
            if torch.is_grad_enabled():
                states_RD.backward(torch.zeros_like(states_RD))
        return StepSums(objective_nats=0.0, terms_nats={}, scored_tokens=0)

    def _no_states(self, objective: Objective) -> torch.Tensor:
        """Of a token whose row is not scored; what only scored rows would give a gradient gets one of zeros: all must add up the same parameters."""
        if torch.is_grad_enabled():
            learned = [self._projections[match.name] for match in objective.state_matches if match.learned]
            for parameter in [one for module in (head_of(self.model).module, *learned) for one in module.parameters()]:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        with self._arithmetic():
            return self._states([TokenSequence(ids=(0,), answer_spans=())])

    def _whole(self, action: Callable[[], T]) -> T:
        """`action`, in which the model's parameters are whole."""
        if self._sharded is None:
            return action()
        result: T = self._sharded(action)
        if not torch.is_grad_enabled():
            # After a backward pass parts alone are kept. Nothing else would let go of the whole, which the next step makes stale.
            self._sharded.reshard()  # type: ignore[operator]
        return result

    def optim_step(self, learning_rate: float) -> float:
        """One AdamW step on the clipped gradient; the gradient is gone afterwards. Returns the norm before clipping."""
        parameters = self._parameters.values()
        if self._sharded is None:
            self._processes.sum_gradients(parameters)
        norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_norm)))
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
        ends = frozenset(self.vocabulary.end_ids)
        with torch.no_grad():
            return self._whole(lambda: decode(self.model, prompts, sampling, end_ids=ends, size=self.vocabulary.size))

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """For each sequence the log-probability (nats) of each of its scored tokens, at temperature 1."""
        results: list[list[float]] = [[]] * len(sequences)
        for group in by_length([len(sequence.ids) for sequence in sequences], 64):
            part = [sequences[index] for index in group]
            log_probs_RV = torch.log_softmax(self._whole(partial(self._logits_of, part)), dim=-1)
            next_R = torch.tensor([s.ids[row + 1] for s in part for row in s.scored_rows], device=log_probs_RV.device)
            chosen = log_probs_RV.gather(-1, next_R[:, None]).squeeze(-1)
            for index, rows in zip(group, chosen.split([len(s.scored_rows) for s in part]), strict=True):
                results[index] = rows.tolist()
        return results

    def save(self, directory: Path) -> None:
        """Weights, optimiser state and counters into `directory`, as safetensors and JSON: `load` goes on bit for bit.

        In parts, all processes give it one `directory`, which is there already.
        """
        directory.mkdir(parents=True, exist_ok=True)
        weights, moments, steps = self._state()
        counters: dict[str, Any] = {"optim_steps": self.optim_steps}
        if self._sharded is None:
            save_file({name: value.contiguous().cpu() for name, value in weights.items()}, directory / _WEIGHTS)
            whole = moments | {f"step:{name}": step for name, step in steps.items()}
            save_file({name: value.contiguous().cpu() for name, value in whole.items()}, directory / _OPTIMISER)
        else:
            durable.write_point()
            write_parts(weights | moments, directory, self._processes)
            durable.write_point()
            counters["steps"] = {name: float(step) for name, step in steps.items()}
        if self._sharded is None or self._processes.is_first:
            durable.write_json_atomic(directory / "student.json", counters)

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, whole or in parts. Raises RunError 'run-corrupt' where a file is damaged or is of another model."""
        named = self._parameters
        try:
            counters = durable.read_json(directory / "student.json")
            steps = {name: torch.tensor(step) for name, step in counters["steps"].items()} if "steps" in counters else _steps_in(directory)
            state = {name: {key: torch.zeros_like(named[name]) for key in _MOMENTS} for name in steps}
            wanted = {name: parameter.detach() for name, parameter in named.items()}
            wanted |= {f"{key}:{name}": moments[key] for name, moments in state.items() for key in _MOMENTS}
            if self._sharded is None and (directory / _WEIGHTS).exists():
                found = load_file(directory / _WEIGHTS) | load_file(directory / _OPTIMISER)
                for name, tensor in wanted.items():
                    tensor.copy_(found[name])
            else:
                read_parts(wanted, directory)
            for name, step in steps.items():
                self._optimiser.state[named[name]] = {"step": step.to(named[name].device), **state[name]}
            self.optim_steps = int(counters["optim_steps"])
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise RunError(
                "run-corrupt",
                found=f"checkpoint {directory}: {error}",
                expected="a checkpoint of this student",
                do=f"Remove {directory} and run again.",
            ) from error

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights by name, moments by "moment:name", and each parameter's count of steps by name."""
        weights = {name: parameter.detach() for name, parameter in self._parameters.items()}
        moments: dict[str, torch.Tensor] = {}
        steps: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            if state := self._optimiser.state.get(parameter):
                moments |= {f"{key}:{name}": state[key].detach() for key in _MOMENTS}
                steps[name] = state["step"].detach()
        return weights, moments, steps

    def require_same(self) -> None:
        """Raises RunError 'processes-differ' unless all processes hold the same weights, or, in parts, weights after as many steps."""
        if self._processes.size > 1:
            tensors = [] if self._sharded is not None else list(self._parameters.values())
            self._processes.require_same("a student", (state_number(tensors) + self.optim_steps) % 2**63)

    def whole_model(self) -> PreTrainedModel | None:
        """The model with whole parameters, in the first process; in parts it is a copy on the CPU, and all processes call this and others get None."""
        if self._sharded is None:
            return self.model if self._processes.is_first else None
        whole = type(self.model)(self.model.config).float().eval() if self._processes.is_first else None
        own = {} if whole is None else dict(whole.named_parameters())
        for name, parameter in self.model.named_parameters():
            value = whole_tensor(parameter.detach())
            if name in own:
                own[name].detach().copy_(value)
        if whole is not None:
            whole.generation_config = self.model.generation_config
        return whole

    def _states(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        return scored_states(self.model, sequences)

    def _logits_of(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """Logits of the scored rows over the real tokens, float32."""
        return head_of(self.model)(self._states(sequences))[:, : self.vocabulary.size].float()

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


def _steps_in(directory: Path) -> dict[str, torch.Tensor]:
    """How often each parameter was stepped, of a checkpoint of whole tensors."""
    with safe_open(directory / _OPTIMISER, framework="pt") as file:
        return {name.removeprefix("step:"): file.get_tensor(name) for name in file.keys() if name.startswith("step:")}  # noqa: SIM118


def named_gradients(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The accumulated gradient of each parameter that has one."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad
