"""A teacher whose weights are here: text by decoding, distributions by one forward pass.

B sequences, T positions, R scored rows, V vocabulary size, K kept ids, D width, N draws, S blocks of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stillroom.core.errors import ModelError
from stillroom.core.identities import ModelRef, Sampling, TokenIds, TokenSequence
from stillroom.models.batching import by_length
from stillroom.models.loading import head_of, teacher_head_arrays
from stillroom.models.packing import scored_states
from stillroom.models.rollouts import decode
from stillroom.targets.codecs import LARGEST_SCALE, SMALLEST_SCALE
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, SampledTargets, TargetRequest, Targets, TextTargets, TopKTargets
from stillroom.targets.protocols import LogitsTransform
from stillroom.targets.store import record_id
from stillroom.targets.vocabulary import Vocabulary

# Log-probabilities (rows times vocabulary) that are made at once where only something small is kept of them: 32 MiB in float32.
VALUES_AT_ONCE = 2**23
# The same for ids that are drawn, 64 MiB: so many rows that reading the head's weights again for each chunk costs little.
DRAWN_AT_ONCE = 2**24
# How many of those are exponentiated and summed at once: few enough to stay in a processor's cache from one pass to the next.
_WEIGHTS_AT_ONCE = 2**20
# The same where two models are compared in float64, with half a dozen intermediate results of 16 MiB.
COMPARED_AT_ONCE = 2**21
# A draw first finds a block of so many ids, then an id in it: a running sum over the whole vocabulary would take longer than the rest together.
_BLOCK = 128
_DRAWS_DOMAIN = b"stillroom draws 1\n"


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
        kinds = {"text", "sampled", "drawn", "top_k", "full", "hidden"}
        return frozenset({"text"} if self.transform is not None else kinds)

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

        Hidden states are rounded to `request.state_dtype` as a store rounds them, so that live and stored targets are the same numbers. Ids are
        drawn by a seed that depends on `request.seed` and a record's own tokens, so that they are the same whatever it is asked together with.
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
                states_RD=rounded_states(states_RD, request.state_dtype),
                head=teacher_head_arrays(self.model, self.vocabulary.size),
            )
        if request.kind == "top_k":
            return self._top_k(states_RD, request)
        if request.kind == "sampled":
            return self._sampled(sequences, states_RD, request)
        if request.kind == "drawn":
            return self._drawn(sequences, states_RD, request)
        return FullTargets(
            vocabulary=self.vocabulary.fingerprint,
            temperature=request.temperature,
            log_probs_RV=self.log_probs(states_RD, request.temperature),
        )

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """The last hidden state (after the final norm) of every scored row, R x D float32, in the order of `sequences`."""
        parts: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
        for group in by_length([len(sequence.ids) for sequence in sequences], self.at_once):
            states_RD = scored_states(self.model, [sequences[index] for index in group]).float()
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

    def _sampled(self, sequences: Sequence[TokenSequence], states_RD: torch.Tensor, request: TargetRequest) -> SampledTargets:
        tokens_R = text_targets(sequences, self.vocabulary).token_ids_R.to(states_RD.device)
        size = self.vocabulary.size
        parts = [
            head_log_probs(self.model, chunk_RD, size, request.temperature).gather(-1, some_R[:, None]).squeeze(-1)
            for chunk_RD, some_R in zip(states_RD.split(_rows_at_once(size)), tokens_R.split(_rows_at_once(size)), strict=True)
        ]
        return SampledTargets(
            vocabulary=self.vocabulary.fingerprint, temperature=request.temperature, token_ids_R=tokens_R, log_probs_R=torch.cat(parts)
        )

    def _drawn(self, sequences: Sequence[TokenSequence], states_RD: torch.Tensor, request: TargetRequest) -> DrawnTargets:
        places_RN = torch.from_numpy(draw_places(sequences, request.draws, request.seed)).to(states_RD.device)
        ids_RN, entropy_R = head_draws(self.model, states_RD, self.vocabulary.size, places_RN, request.temperature)
        offsets_R1, ids_U, counts_U = unique_draws(ids_RN)
        return DrawnTargets(
            vocabulary=self.vocabulary.fingerprint,
            temperature=request.temperature,
            draws=request.draws,
            offsets_R1=offsets_R1,
            ids_U=ids_U,
            counts_U=counts_U,
            entropy_R=entropy_R,
        )


def _rows_at_once(size: int) -> int:
    return max(1, VALUES_AT_ONCE // size)


@torch.inference_mode()
def head_log_probs(model: PreTrainedModel, states_RD: torch.Tensor, size: int, temperature: float) -> torch.Tensor:
    """Log-probabilities (nats, float32, R x `size`) that the head of `model` gives to hidden states, at `temperature`."""
    logits_RV = head_of(model)(states_RD.to(model.dtype))[:, :size].float().div_(temperature)
    return torch.log_softmax(logits_RV, dim=-1, out=logits_RV)


@torch.inference_mode()
def head_top_k(
    model: PreTrainedModel, states_RD: torch.Tensor, size: int, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of those: the `k` most probable ids (int32, R x k), their log-probabilities, and the log of the mass of all others (R)."""
    ids, kept, tails = [], [], []
    for chunk_RD in states_RD.split(_rows_at_once(size)):
        log_probs_RV = head_log_probs(model, chunk_RD, size, temperature)
        log_probs_RK, ids_RK = log_probs_RV.topk(k, dim=-1)
        # The tail is summed over the ids that are not kept: 1 - sum(kept) would cancel.
        tails.append(log_probs_RV.scatter_(-1, ids_RK, -torch.inf).logsumexp(-1))
        ids.append(ids_RK.to(torch.int32))
        kept.append(log_probs_RK)
        del log_probs_RV  # or it would live beside the next one
    return torch.cat(ids), torch.cat(kept), torch.cat(tails)


@torch.inference_mode()
def head_draws(
    model: PreTrainedModel, states_RD: torch.Tensor, size: int, places_RN: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of those: the id (int64, R x N) at each place in [0, 1) of the distribution's running sum, and the whole distribution's entropy in nats (R)."""
    ids = torch.empty(places_RN.shape, dtype=torch.int64, device=states_RD.device)
    entropy_R = torch.empty(len(states_RD), device=states_RD.device)
    few = max(1, _WEIGHTS_AT_ONCE // size)
    # One piece of memory for the weights of all; what lies past the last id stays 0.
    weights_RV = torch.zeros(few, size + -size % _BLOCK, device=states_RD.device)
    start = 0
    for chunk_RD in states_RD.split(max(1, DRAWN_AT_ONCE // size)):
        logits_RV = head_of(model)(chunk_RD.to(model.dtype))[:, :size].float()
        for some_RV in logits_RV.split(few):
            rows = slice(start, start := start + len(some_RV))
            # At 1 it changes nothing, and takes a tenth of the time of all the rest.
            scaled_RV = some_RV if temperature == 1.0 else some_RV.div_(temperature)
            ids[rows], entropy_R[rows] = _draw(scaled_RV, weights_RV[: len(some_RV)], places_RN[rows])
        del logits_RV, some_RV, scaled_RV  # or they would live beside the next ones
    return ids, entropy_R


def _draw(logits_RV: torch.Tensor, weights_RV: torch.Tensor, places_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and entropies of one small chunk. Both tensors are written over; `weights_RV` may be wider than the logits, with 0 past them."""
    # An id without any probability must not make 0 x infinity below.
    logits_RV.sub_(logits_RV.amax(dim=-1, keepdim=True)).clamp_(min=-1e4)
    torch.exp(logits_RV, out=weights_RV[:, : logits_RV.shape[1]])
    ids_RN = _find(weights_RV.view(len(weights_RV), weights_RV.shape[1] // _BLOCK, _BLOCK), places_RN)
    total_R = weights_RV.sum(dim=-1).double()
    weighted_R = logits_RV.mul_(weights_RV[:, : logits_RV.shape[1]]).sum(dim=-1).double()
    # The distribution of a single id can come out a hair under zero.
    return ids_RN, (total_R.log() - weighted_R / total_R).clamp_(min=0.0).float()


def _find(weights_RSB: torch.Tensor, places_RN: torch.Tensor) -> torch.Tensor:
    """The id whose part of the running sum of its row's weights each place, a share of their sum, lies in.

    Running sums are in float64; a block's own is in float32, whose rounding moves a probability by 10^-7 of itself.
    """
    rows, blocks, _ = weights_RSB.shape
    until_RS = weights_RSB.sum(dim=-1).double().cumsum(dim=-1)
    wanted_RN = places_RN * until_RS[:, -1:]
    blocks_RN = _first_above(until_RS, wanted_RN)
    within_RN = wanted_RN - torch.nn.functional.pad(until_RS, (1, 0)).gather(-1, blocks_RN)
    chosen = blocks_RN + blocks * torch.arange(rows, device=weights_RSB.device)[:, None]
    until_NB = weights_RSB.reshape(-1, _BLOCK).index_select(0, chosen.reshape(-1)).cumsum(dim=-1, dtype=torch.float64)
    return blocks_RN * _BLOCK + _first_above(until_NB, within_RN.reshape(-1, 1)).view_as(blocks_RN)


def _first_above(until: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where running sums first pass `wanted`. What rounding carries past the end stays inside, at something with a weight."""
    return torch.searchsorted(until, torch.minimum(wanted, until[..., -1:] * (1 - 2**-52)), right=True).clamp_(max=until.shape[-1] - 1)


def draw_places(sequences: Sequence[TokenSequence], draws: int, seed: int) -> NDArray[numpy.float64]:
    """Uniform numbers in [0, 1), R x `draws`: those of a record's rows depend on `seed` and the record alone.

    Philox 4x64 (Salmon et al. 2011), keyed with the first 16 bytes of SHA-256 of the domain line, the record's id and u64 seed, little-endian; the
    upper 53 bits of each of its numbers.
    """
    rows: list[Any] = [numpy.empty((0, draws))]
    for sequence in sequences:
        digest = sha256(_DRAWS_DOMAIN + bytes.fromhex(record_id(sequence)) + seed.to_bytes(8, "little")).digest()
        numbers = numpy.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(len(sequence.scored_rows) * draws)
        rows.append((numbers >> numpy.uint64(11)).reshape(-1, draws) * 2.0**-53)
    return numpy.concatenate(rows)


def unique_draws(ids_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's ids once, ascending, and how often each was drawn: offsets (int64, R + 1), ids and counts (int32)."""
    sorted_RN = ids_RN.sort(dim=-1).values
    first_RN = torch.ones_like(sorted_RN, dtype=torch.bool)
    first_RN[:, 1:] = sorted_RN[:, 1:] != sorted_RN[:, :-1]
    offsets_R1 = torch.nn.functional.pad(first_RN.sum(dim=-1).cumsum(0), (1, 0))
    places_U = first_RN.reshape(-1).nonzero().squeeze(-1)
    counts_U = torch.diff(places_U, append=places_U.new_tensor([ids_RN.numel()]))
    return offsets_R1, sorted_RN.reshape(-1)[places_U].to(torch.int32), counts_U.to(torch.int32)


def rounded_states(states_RD: torch.Tensor, state_dtype: str) -> torch.Tensor:
    """float32 states as a store of this `state_dtype` gives them back: see `targets.codecs`, whose roundings these are, bit for bit."""
    if state_dtype == "bfloat16":
        return states_RD.to(torch.bfloat16)
    if state_dtype == "float32":
        return states_RD
    assert state_dtype == "int8", f"no state_dtype {state_dtype!r}"
    # A tensor as the divisor: by a number, a GPU multiplies with the inverse.
    steps_R1 = states_RD.abs().amax(dim=-1, keepdim=True) / torch.tensor(127.0, device=states_RD.device)
    scales_R1 = ((steps_R1.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return (states_RD / scales_R1).round() * scales_R1


def text_targets(sequences: Sequence[TokenSequence], vocabulary: Vocabulary) -> TextTargets:
    """The token that each scored row of `sequences` predicts."""
    tokens = [sequence.ids[row + 1] for sequence in sequences for row in sequence.scored_rows]
    return TextTargets(vocabulary=vocabulary.fingerprint, token_ids_R=torch.tensor(tokens, dtype=torch.int64))
