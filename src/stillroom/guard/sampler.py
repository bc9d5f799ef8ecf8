"""A keyed scheme put into a teacher, whatever serves it: a function from (context ids, logits) to logits.

It is a `targets.protocols.LogitsTransform` for our own teachers, a logits processor for `transformers.generate`, and a plain function for any other server,
on numpy arrays and on torch tensors alike, which stay on their device but for the candidates. It keeps no state: what it does with a row follows from that
row's context alone, so rows may leave and join a batch, and two servers with one key do the same.

What it takes are the logits of the model, before temperature and truncation, both of which are its own: it truncates (`top_k`, then `top_p`, as
`transformers` does), and what it returns, drawn from at `temperature` with nothing cut off after it, has the watermarked distribution. In
`transformers.generate` that is `logits_processor=[sampler], do_sample=True, temperature=sampler.temperature, top_k=0, top_p=1.0`.

The scheme acts among the `candidates` most probable tokens of the truncated distribution, and leaves their mass together, and every token beyond them, as
they are. Which tokens these are does not depend on the key, so a scheme that does not distort does not distort then either.

B rows, T positions, V logits of a row, S real tokens of the vocabulary, M candidates.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy
from numpy.typing import NDArray

from stillroom.core.errors import GuardError
from stillroom.core.identities import Json, TokenIds
from stillroom.guard.keys import Key
from stillroom.guard.schemes import Scheme
from stillroom.targets.kinds import Array
from stillroom.targets.vocabulary import Vocabulary

Floats = NDArray[numpy.float64]

# A distribution with less to choose than this carries no evidence worth having: one in a hundred such tokens differs from the most probable, about.
LEAST_BITS = 0.08

ELIGIBLE = "watermarked"
SHORT = "with too short a context"
REPEATED = "whose window was used before in the same answer"
OUTSIDE = "of requests outside the share"
NO_CHOICE = "with next to nothing to choose"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedSampler:
    """A scheme, a key, and whose logits it is for.

    `top_k` None keeps all tokens, and so does `top_p` 1. `begins_after`: the tokens after whose last occurrence an answer begins, such as those that a chat
    template ends a prompt with; without them the whole context counts as the answer where windows are compared, which watermarks less. `share`: of the
    requests, chosen by the key; a request is watermarked whole or not at all. What tells requests apart is the prompt (everything up to `begins_after`), or
    the name given to `for_request`. `pad_id`: what rows are padded with on the left.
    """

    scheme: Scheme
    key: Key
    vocabulary: Vocabulary
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    candidates: int = 256
    share: float = 1.0
    begins_after: TokenIds = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0.0:
            _refuse(
                "temperature 0", "a temperature above 0", "without a random choice there is none that a key could make, and nothing to find later"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            _refuse(f"temperature {self.temperature}", "a temperature above 0")
        if (self.top_k is not None and self.top_k < 2) or self.candidates < 2:
            _refuse(f"top_k {self.top_k} and {self.candidates} candidates", "at least 2 of each", "one token leaves nothing to choose")
        if not 0.0 < self.top_p <= 1.0 or not 0.0 <= self.share <= 1.0:
            _refuse(f"top_p {self.top_p} and share {self.share}", "top_p in (0, 1] and share in [0, 1]")

    def __call__(self, context_BT: Array, logits_BV: Array) -> Array:
        """New logits for the next token of each context; same shape, type and device. Raises GuardError 'guard-logits' and 'guard-sampler'."""
        ids_BM, logits_BM, kept_BM = self._candidates(logits_BV)
        windows_BK, why_B = self._windows(_numbers(context_BT))
        rows = numpy.flatnonzero(why_B == _WHY.index(ELIGIBLE))
        some = slice(0, self.candidates)
        if len(rows):
            scaled_RM = numpy.where(kept_BM, logits_BM / self.temperature, -numpy.inf)[rows, some]
            mass_R1 = numpy.logaddexp.reduce(scaled_RM, axis=1, keepdims=True)
            changed_RM = self.scheme.watermarked(self.key, windows_BK[rows], ids_BM[rows, some], scaled_RM - mass_R1)
            logits_BM[rows, some] = (changed_RM + mass_R1) * self.temperature
        return self._placed(logits_BV, ids_BM, numpy.where(kept_BM, logits_BM, -numpy.inf))

    def for_request(self, name: str) -> KeyedSampler:
        """The sampler for all tokens of the request that has this name: one that watermarks, or one that does not, as the key says."""
        return replace(self, share=float(self._is_chosen(b"name\n" + name.encode("utf-8", "surrogatepass"))))

    def survey(self, context_BT: Array, logits_BV: Array) -> Survey:
        """What the sampler can do with these rows: how many it would watermark, why not the others, and how much there is to choose. Changes nothing."""
        _, logits_BM, kept_BM = self._candidates(logits_BV)
        scaled_BM = numpy.where(kept_BM, logits_BM / self.temperature, -numpy.inf)[:, : self.candidates]
        log_probs_BM = scaled_BM - numpy.logaddexp.reduce(scaled_BM, axis=1, keepdims=True)
        bits_B = -(numpy.exp(log_probs_BM) * numpy.where(numpy.isfinite(log_probs_BM), log_probs_BM, 0.0)).sum(axis=1) / math.log(2.0)
        _, why_B = self._windows(_numbers(context_BT))
        why_B = numpy.where((why_B == _WHY.index(ELIGIBLE)) & (bits_B < LEAST_BITS), _WHY.index(NO_CHOICE), why_B)
        counts = {why: int((why_B == number).sum()) for number, why in enumerate(_WHY)}
        return Survey(positions=len(why_B), counts=counts, bits=float(bits_B.sum()))

    def as_json(self) -> Json:
        """All that the distribution depends on beside the key."""
        return {
            "scheme": self.scheme.as_json(),
            "vocabulary": self.vocabulary.fingerprint,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "candidates": self.candidates,
            "share": self.share,
            "begins_after": list(self.begins_after),
            "pad_id": self.pad_id,
        }

    # -- the distribution ----------------------------------------------------------------------------------------------

    def _candidates(self, logits_BV: Array) -> tuple[NDArray[numpy.int64], Floats, NDArray[numpy.bool_]]:
        """Ids and logits of each row's most probable tokens, falling, and which of them the truncation keeps; beyond them it keeps none or, without
        truncation, all.
        """
        width, size = int(logits_BV.shape[-1]), self.vocabulary.size
        if width not in (size, self.vocabulary.rows):
            raise GuardError(
                "guard-logits",
                found=f"logits of {width:,} columns",
                expected=f"{size:,}, the tokens of the vocabulary"
                + (f", or {self.vocabulary.rows:,}, the rows of the model" if self.vocabulary.rows != size else ""),
                why="the ids would mean other tokens to the sampler than to the detector, which would find nothing",
                do="Make the sampler with the vocabulary of the model that it is put into.",
            )
        real_BS = logits_BV[:, :size]
        if self.top_k is not None:
            ids_BM, logits_BM = _largest(real_BS, min(self.top_k, size))
            return ids_BM, logits_BM, self._in_nucleus(logits_BM, numpy.logaddexp.reduce(logits_BM / self.temperature, axis=1))
        ids_BM, logits_BM = _largest(real_BS, min(self.candidates, size))
        if self.top_p == 1.0:
            return ids_BM, logits_BM, numpy.ones(ids_BM.shape, numpy.bool_)
        log_mass_B = _log_mass(real_BS, self.temperature)
        kept_BM = self._in_nucleus(logits_BM, log_mass_B)
        while kept_BM[:, -1].any() and ids_BM.shape[1] < size:  # the nucleus may reach beyond them
            ids_BM, logits_BM = _largest(real_BS, min(16 * ids_BM.shape[1], size))
            kept_BM = self._in_nucleus(logits_BM, log_mass_B)
        return ids_BM, logits_BM, kept_BM

    def _in_nucleus(self, logits_BM: Floats, log_mass_B: Floats) -> NDArray[numpy.bool_]:
        """The most probable tokens until they have `top_p` of the mass, the one that reaches it included."""
        if self.top_p == 1.0:
            return numpy.ones(logits_BM.shape, numpy.bool_)
        probabilities_BM = numpy.exp(logits_BM / self.temperature - log_mass_B[:, None])
        before_BM = numpy.cumsum(probabilities_BM, axis=1) - probabilities_BM
        kept_BM = before_BM < self.top_p
        kept_BM[:, 0] = True
        return kept_BM

    def _placed(self, logits_BV: Array, ids_BM: NDArray[numpy.int64], new_BM: Floats) -> Array:
        """Logits like `logits_BV` with the new ones in place; where there is truncation, and in the padding, nothing else."""
        whole = self.top_k is None and self.top_p == 1.0
        size = self.vocabulary.size
        if hasattr(logits_BV, "new_tensor"):
            out = logits_BV.detach().clone() if whole else logits_BV.new_full(tuple(logits_BV.shape), -math.inf)
            out.scatter_(1, out.new_tensor(ids_BM, dtype=_index_type(out)), out.new_tensor(new_BM))
        else:
            out = logits_BV.copy() if whole else numpy.full_like(logits_BV, -numpy.inf)
            numpy.put_along_axis(out, ids_BM, new_BM.astype(out.dtype), axis=1)
        if whole:
            out[:, size:] = -math.inf
        return out

    # -- the windows ---------------------------------------------------------------------------------------------------

    def _windows(self, context_BT: NDArray[numpy.int64]) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """The window of each row, and as a number of `_WHY` whether it is watermarked."""
        if 0.0 < self.share < 1.0 and not self.begins_after:
            _refuse(
                f"a share of {self.share} of the requests, and nothing that tells one request from another",
                "`begins_after`, or a sampler made by `for_request`",
                "a request must be watermarked whole or not at all",
            )
        length = self.scheme.window
        windows_BK = numpy.zeros((len(context_BT), length), numpy.int64)
        why_B = numpy.empty(len(context_BT), numpy.int64)
        for row, ids_T in enumerate(context_BT):
            why = self._why(ids_T[_first_other(ids_T, self.pad_id) :])
            if why == ELIGIBLE:
                windows_BK[row] = ids_T[-length:]
            why_B[row] = _WHY.index(why)
        return windows_BK, why_B

    def _why(self, ids_T: NDArray[numpy.int64]) -> str:
        length = self.scheme.window
        if self.share == 0.0:
            return OUTSIDE
        if len(ids_T) < length:
            return SHORT
        begin = _after_last(ids_T, self.begins_after)
        if self.share < 1.0 and (begin is None or not self._is_chosen(b"prompt\n" + ids_T[:begin].astype("<u4").tobytes())):
            return OUTSIDE
        # The windows that tokens of the answer had: those that end from the prompt's last token on, but for the newest.
        first = length - 1 if begin is None else max(begin - 1, length - 1)
        ends = numpy.arange(first, len(ids_T) - 1)
        for back in range(length):
            ends = ends[ids_T[ends - back] == ids_T[-1 - back]]
        return REPEATED if len(ends) else ELIGIBLE

    def _is_chosen(self, request: bytes) -> bool:
        if self.share in (0.0, 1.0):
            return self.share == 1.0
        word = int.from_bytes(hmac.digest(self.key.subkey("share").secret, request, "sha256")[:8], "big")
        return word < int(self.share * 2**64)


_WHY = (ELIGIBLE, SHORT, REPEATED, OUTSIDE, NO_CHOICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a sampler could do at some positions: `counts` by what becomes of them, and the entropy of all their candidates together, in bits."""

    positions: int
    counts: dict[str, int]
    bits: float

    @staticmethod
    def of(parts: Sequence[Survey]) -> Survey:
        """Several as one."""
        counts = {why: sum(part.counts.get(why, 0) for part in parts) for why in _WHY}
        return Survey(positions=sum(part.positions for part in parts), counts=counts, bits=math.fsum(part.bits for part in parts))

    @property
    def eligible_share(self) -> float | None:
        """Of the positions, those that carry a watermark; None without positions."""
        return self.counts[ELIGIBLE] / self.positions if self.positions else None

    @property
    def mean_bits(self) -> float | None:
        """How much there was to choose at a position on average; None without positions."""
        return self.bits / self.positions if self.positions else None

    def require(self, least_share: float = 0.05) -> None:
        """Raises GuardError 'guard-sampler' where fewer positions than `least_share` carry a watermark: such a teacher would be served in vain."""
        share = self.eligible_share
        if share is None or share < least_share:
            others = "; ".join(f"{count:,} {why}" for why, count in self.counts.items() if count and why != ELIGIBLE)
            _refuse(
                f"{self.counts[ELIGIBLE]:,} of {self.positions:,} positions that can carry a watermark" + (f" ({others})" if others else ""),
                f"at least {least_share:.0%} of them",
                "answers in which there is next to nothing to choose teach a student nothing of the key",
                "Serve with a higher temperature, use twins or canaries instead, or watermark other answers.",
            )


# -- arrays of either kind ---------------------------------------------------------------------------------------------


def _numbers(array: Any) -> NDArray[Any]:
    return array.detach().cpu().numpy() if hasattr(array, "detach") else numpy.asarray(array)


def _index_type(tensor: Any) -> Any:
    """The type that torch indexes with, without importing torch."""
    return tensor.new_zeros((1,)).argmax().dtype


def _largest(logits_BS: Any, count: int) -> tuple[NDArray[numpy.int64], Floats]:
    """Ids and logits of the `count` largest of each row, falling."""
    if hasattr(logits_BS, "topk"):
        logits_BS = logits_BS.detach()
        values, ids = logits_BS.topk(count, dim=-1) if count < logits_BS.shape[1] else logits_BS.sort(dim=-1, descending=True)
        return ids.cpu().numpy(), values.double().cpu().numpy()
    ids_BM = numpy.argpartition(logits_BS, logits_BS.shape[1] - count, axis=1)[:, logits_BS.shape[1] - count :]
    values_BM = numpy.take_along_axis(logits_BS, ids_BM, axis=1)
    order_BM = numpy.argsort(-values_BM, axis=1, kind="stable")
    return numpy.take_along_axis(ids_BM, order_BM, axis=1), numpy.take_along_axis(values_BM, order_BM, axis=1).astype(numpy.float64)


def _log_mass(logits_BS: Any, temperature: float) -> Floats:
    if hasattr(logits_BS, "logsumexp"):
        return numpy.asarray((logits_BS.detach().float() / temperature).logsumexp(dim=-1).double().cpu().numpy())
    scaled_BS = logits_BS.astype(numpy.float64) / temperature
    largest_B1 = scaled_BS.max(axis=1, keepdims=True)
    return numpy.asarray(numpy.log(numpy.exp(scaled_BS - largest_B1).sum(axis=1)) + largest_B1[:, 0])


# -- token ids ---------------------------------------------------------------------------------------------------------


def _first_other(ids_T: NDArray[numpy.int64], pad_id: int) -> int:
    """Where the padding on the left ends."""
    other = ids_T != pad_id
    return int(other.argmax()) if other.any() else len(ids_T)


def _after_last(ids_T: NDArray[numpy.int64], marker: TokenIds) -> int | None:
    """The position after the last occurrence of `marker`; None where there is none."""
    if not marker:
        return None
    ends = numpy.arange(len(marker) - 1, len(ids_T))
    for back, token in enumerate(reversed(marker)):
        ends = ends[ids_T[ends - back] == token]
    return int(ends[-1]) + 1 if len(ends) else None


def _refuse(found: str, expected: str, why: str = "", do: str = "Change the sampler's settings.") -> NoReturn:
    raise GuardError("guard-sampler", found=found, expected=expected, why=why, do=do)
