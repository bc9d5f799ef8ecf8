"""A teacher whose weights are here: text by decoding, distributions by one forward pass.

B sequences, T positions, R scored rows, V vocabulary size, K kept ids, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stillroom.core.errors import ModelError
from stillroom.core.identities import ModelRef, Sampling, TokenIds, TokenSequence
from stillroom.models.batching import by_length, pack_rectangle
from stillroom.models.loading import body_of, head_of, teacher_head_arrays
from stillroom.models.rollouts import decode
from stillroom.targets.kinds import FullTargets, HiddenTargets, TargetRequest, Targets, TextTargets, TopKTargets
from stillroom.targets.protocols import LogitsTransform
from stillroom.targets.vocabulary import Vocabulary

# Log-probabilities (rows times vocabulary) that are made at once where only something small is kept of them: 32 MiB in float32.
VALUES_AT_ONCE = 2**23
# The same where two models are compared in float64, with half a dozen intermediate results of 16 MiB.
COMPARED_AT_ONCE = 2**21


@dataclass(frozen=True, slots=True)
class LocalTeacher:
    """Implements targets.protocols.Teacher over a `transformers` causal language model in evaluation mode.

    `transform`, where given, changes the distribution that is sampled and that `targets` reports; hidden states cannot carry such a change.
    """

    model: PreTrainedModel
    ref: ModelRef
    vocabulary: Vocabulary
    at_once: int = 256
    transform: LogitsTransform | None = None

    @property
    def capabilities(self) -> frozenset[str]:
        kinds = {"text", "top_k", "full", "hidden"}
        return frozenset(kinds - {"top_k", "full", "hidden"} if self.transform is not None else kinds)

    def generate(self, prompts: Sequence[TokenIds], sampling: Sampling) -> list[TokenIds]:
        """One completion for each prompt, the end token included where it was reached."""
        return decode(
            self.model,
            prompts,
            sampling,
            end_ids=frozenset(self.vocabulary.end_ids),
            size=self.vocabulary.size,
            at_once=self.at_once,
            transform=self.transform,
        )

    def targets(self, sequences: Sequence[TokenSequence], request: TargetRequest) -> Targets:
        """Targets for the scored rows of `sequences`, laid end to end, as torch tensors on the model's device (text: on the CPU).

        Hidden states are rounded to bfloat16 as a store rounds them, so that live and stored targets are the same numbers.
        """
        if request.kind not in self.capabilities:
            raise ModelError(
                "targets-unsupported",
                found=f"a request for {request.kind} targets",
                expected=f"one of {', '.join(sorted(self.capabilities))}",
                do="Set targets.kind to one of these.",
            )
        if request.kind == "text":
            return text_targets(sequences, self.vocabulary)
        states_RD = self.hidden_states(sequences)
        if request.kind == "hidden":
            return HiddenTargets(
                vocabulary=self.vocabulary.fingerprint,
                temperature=request.temperature,
                states_RD=states_RD.to(torch.bfloat16),
                head=teacher_head_arrays(self.model, self.vocabulary.size),
            )
        if request.kind == "top_k":
            return self._top_k(states_RD, request)
        return FullTargets(
            vocabulary=self.vocabulary.fingerprint,
            temperature=request.temperature,
            log_probs_RV=self.log_probs(states_RD, request.temperature),
        )

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """The last hidden state (after the final norm) of every scored row, R x D float32, in the order of `sequences`."""
        body = body_of(self.model)
        parts: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
        for group in by_length([len(sequence.ids) for sequence in sequences], self.at_once):
            rectangle = pack_rectangle([sequences[index] for index in group], self.model.device)
            states_BTD = body(input_ids=rectangle.ids_BT, use_cache=False).last_hidden_state
            states_RD = states_BTD.reshape(-1, states_BTD.shape[-1]).index_select(0, rectangle.rows_R).float()
            counts = [len(sequences[index].scored_rows) for index in group]
            for index, part in zip(group, states_RD.split(counts), strict=True):
                parts[index] = part
        return torch.cat(parts)

    def log_probs(self, states_RD: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log-probabilities (nats, float32, R x V) that the head gives to hidden states, at `temperature`."""
        return head_log_probs(self.model, states_RD, self.vocabulary.size, temperature)

    def _top_k(self, states_RD: torch.Tensor, request: TargetRequest) -> TopKTargets:
        size = self.vocabulary.size
        ids_RK, log_probs_RK, tail_log_mass_R = head_top_k(self.model, states_RD, size, min(request.k, size), request.temperature)
        return TopKTargets(
            vocabulary=self.vocabulary.fingerprint,
            temperature=request.temperature,
            ids_RK=ids_RK,
            log_probs_RK=log_probs_RK,
            tail_log_mass_R=tail_log_mass_R,
        )


@torch.inference_mode()
def head_log_probs(model: PreTrainedModel, states_RD: torch.Tensor, size: int, temperature: float) -> torch.Tensor:
    """Log-probabilities (nats, float32, R x `size`) that the head of `model` gives to hidden states, at `temperature`."""
    logits_RV = head_of(model)(states_RD.to(model.dtype))[:, :size].float()
    return torch.log_softmax(logits_RV / temperature, dim=-1)


@torch.inference_mode()
def head_top_k(
    model: PreTrainedModel, states_RD: torch.Tensor, size: int, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of those: the `k` most probable ids (int32, R x k), their log-probabilities, and the log of the mass of all others (R)."""
    ids, kept, tails = [], [], []
    for chunk_RD in states_RD.split(max(1, VALUES_AT_ONCE // size)):
        log_probs_RV = head_log_probs(model, chunk_RD, size, temperature)
        log_probs_RK, ids_RK = log_probs_RV.topk(k, dim=-1)
        # The tail is summed over the ids that are not kept: 1 - sum(kept) would cancel.
        tails.append(log_probs_RV.scatter(-1, ids_RK, -torch.inf).logsumexp(-1))
        ids.append(ids_RK.to(torch.int32))
        kept.append(log_probs_RK)
        del log_probs_RV  # or it would live beside the next one
    return torch.cat(ids), torch.cat(kept), torch.cat(tails)


def text_targets(sequences: Sequence[TokenSequence], vocabulary: Vocabulary) -> TextTargets:
    """The token that each scored row of `sequences` predicts."""
    tokens = [sequence.ids[row + 1] for sequence in sequences for row in sequence.scored_rows]
    return TextTargets(vocabulary=vocabulary.fingerprint, token_ids_R=torch.tensor(tokens, dtype=torch.int64))
