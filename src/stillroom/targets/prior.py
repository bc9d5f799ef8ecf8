"""What is expected of drawn targets before they are seen: the probabilities that `packing` codes them with. Made once from a store's first shard.

- Ids: a class bigram (Brown et al. 1992, section 3). The token before decides a context, every id has a class, and in context c id v weighs
  1 + (frequency_v x weight of its class in c) / 2^16, so that every id stays possible.
- A row's unique ids come in ascending order. Of m ids that are still to come, the next is the one whose share of the weight that is left is the
  smallest of m, which were it uniform would have the quantiles 1 - (1 - p)^(1/m). These are tabled; ids and token use one code.
- Counts: given n unique ids among N draws, as a Pitman-Yor process of discount 0.6 shares them out (Pitman 2006, section 3.2). Nothing is stored.
- How many ids are unique, and whether the row's own token is among them; entropy, given the number of unique ids: as often as they were seen.

Suffixes: R rows, V vocabulary size, C contexts, G classes, N draws, J steps of the quantiles, H bins of entropy, B groups of numbers of unique ids.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zipfile import BadZipFile

import numpy
from numpy.typing import NDArray

from stillroom.targets.coding import PRECISION, WHOLE, Family, Integers, Search, cumulative_of
from stillroom.targets.kinds import DrawnTargets

MOST_DRAWS = 255
ENTROPY_STEPS_PER_NAT = 512
# What all ids weigh in one context, at most; more would leave an id without an interval where the quantiles are steepest.
MOST_WEIGHT = 1 << 24
MOST_IDS = 1 << 22

_CONTEXTS = 64
_CLASSES = 128
_ROUNDS = 8
_QUANTILES = 128
_BINS_PER_NAT = 16
_STEPS_PER_BIN = ENTROPY_STEPS_PER_NAT // _BINS_PER_NAT
_DISCOUNT = 0.6
_LOG_SCALE = 1 << 16
# Ids from which the classes are learned: more do not change them much.
_ENOUGH_IDS = 1 << 20
# The first group of 1 unique id, of 2, of 3, of 4 to 5, and so on.
_GROUPS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181)


@dataclass(frozen=True, kw_only=True)
class DrawnPrior:
    """The tables of prior.npz; docs/reference/target-store.md says how they are read."""

    draws: int
    context_V: NDArray[numpy.uint8]
    class_V: NDArray[numpy.uint8]
    frequency_V: NDArray[numpy.uint32]
    weights_CG: NDArray[numpy.uint64]
    quantiles_NJ: NDArray[numpy.uint32]  # row m: of m ids, from 0 to 2^31
    unique_X: NDArray[numpy.uint32]  # symbol 2 (n - 1), and one more if the row's token is among the n ids
    entropy_BH: NDArray[numpy.uint32]
    entropy_group_N: NDArray[numpy.uint8]

    @property
    def size(self) -> int:
        """V."""
        return len(self.class_V)

    def to_bytes(self) -> bytes:
        """The file prior.npz."""
        contents = io.BytesIO()
        numpy.savez_compressed(contents, allow_pickle=False, **{name: getattr(self, field) for name, field in _ARRAYS.items()})
        return contents.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> DrawnPrior:
        """Raises ValueError if it is not such a file."""
        try:
            with numpy.load(io.BytesIO(data), allow_pickle=False) as arrays:
                tables: dict[str, Any] = {field: arrays[name] for name, field in _ARRAYS.items()}
        except (OSError, EOFError, BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"is not a prior of drawn targets: {error}") from error
        return cls(draws=len(tables["entropy_group_N"]) - 1, **tables)

    # -- ready for coding

    @cached_property
    def weight_before(self) -> NDArray[numpy.uint32]:
        """Entry c x V + v: the weight of all ids before id v in context c, and of all contexts before c. One more entry at the end."""
        before = numpy.empty(len(self.weights_CG) * self.size + 1, dtype=numpy.uint32)
        before[0] = 0
        for context, weights_G in enumerate(self.weights_CG):
            weight_V = 1 + (self.frequency_V * weights_G[self.class_V] >> numpy.uint64(16))
            begin = context * self.size
            before[begin + 1 : begin + 1 + self.size] = before[begin] + numpy.cumsum(weight_V).astype(numpy.uint32)
        return before

    @cached_property
    def places(self) -> Search:
        """Finds places in `weight_before`."""
        return Search(self.weight_before, shift=8)

    @cached_property
    def quantiles(self) -> Integers:
        """Row after row of the table of quantiles, row m in [m, m + 1) x 2^32, so that one sorted array serves all."""
        rows = numpy.arange(len(self.quantiles_NJ), dtype=numpy.int64)[:, None] << 32
        return (self.quantiles_NJ.astype(numpy.int64) + rows).reshape(-1)

    @cached_property
    def steps(self) -> Search:
        """Finds places in `quantiles`."""
        return Search(self.quantiles, shift=22)

    @cached_property
    def unique(self) -> Family:
        return Family(self.unique_X.astype(numpy.int64), numpy.array([len(self.unique_X)]))

    @cached_property
    def entropy(self) -> Family:
        """Entropy in steps, one context for each group; within a bin all steps are equally probable."""
        groups, bins = self.entropy_BH.shape
        edges = numpy.append(self.entropy_BH.astype(numpy.int64), numpy.full((groups, 1), WHOLE), axis=1)
        steps = numpy.arange(_STEPS_PER_BIN)
        fine = edges[:, :-1, None] + numpy.diff(edges, axis=1)[:, :, None] * steps // _STEPS_PER_BIN
        return Family(fine.reshape(-1), numpy.full(groups, bins * _STEPS_PER_BIN))

    @cached_property
    def counts(self) -> Family:
        """How often the next id was drawn, less 1, in the context `count_context(m, s)`: m ids, at least 2, still share s draws."""
        share, ways = _sharing(self.draws)
        cumulative = [
            cumulative_of(share[1 : s - m + 2] * ways[m - 1, s - 1 : m - 2 : -1]) for m in range(2, self.draws + 1) for s in range(m, self.draws + 1)
        ]
        sizes = numpy.array([len(one) for one in cumulative], dtype=numpy.int64)
        return Family(numpy.concatenate([numpy.empty(0, dtype=numpy.int64), *cumulative]), sizes)

    def count_context(self, ids_S: Integers, draws_S: Integers) -> Integers:
        """The context of `counts` in which `ids_S` ids still share `draws_S` draws: all pairs from (2, 2), (2, 3), ... in order."""
        before = ids_S - 2
        contexts: Integers = before * (self.draws - 1) - before * (before - 1) // 2 + draws_S - ids_S
        return contexts


_ARRAYS = {
    "context": "context_V",
    "class": "class_V",
    "frequency": "frequency_V",
    "weights": "weights_CG",
    "quantiles": "quantiles_NJ",
    "unique": "unique_X",
    "entropy": "entropy_BH",
    "entropy_group": "entropy_group_N",
}


def quantised_entropy(entropy_R: NDArray[Any], size: int) -> Integers:
    """The nearest step, of 1/512 nat, in what `size` ids can have. Raises ValueError for what is no entropy of that many ids."""
    steps = numpy.rint(numpy.asarray(entropy_R, dtype=numpy.float64) * ENTROPY_STEPS_PER_NAT)
    most = math.log(size) * ENTROPY_STEPS_PER_NAT
    # A float32 sum over the whole vocabulary may be off by more than the last step.
    if not ((steps >= -8) & (steps <= most + 8)).all():
        raise ValueError(f"an entropy of drawn targets is not between 0 and log({size}) nats")
    return numpy.clip(steps, 0, math.floor(most) + 1).astype(numpy.int64)


def _sharing(draws: int) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """share[c]: weight of one id's being drawn c times; ways[m, s]: of m ids' being drawn s times together."""
    share = numpy.zeros(draws + 2)
    share[1] = 1.0
    for c in range(1, draws + 1):
        share[c + 1] = share[c] * (c - _DISCOUNT) / (c + 1)
    ways = numpy.zeros((draws + 1, draws + 1))
    ways[0, 0] = 1.0
    for m in range(1, draws + 1):
        # In a fixed order of additions and without any function but + and x: the same bits on every machine.
        for c in range(1, draws + 1):
            ways[m, c:] += share[c] * ways[m - 1, : draws + 1 - c]
    return share, ways


# -- estimating ----------------------------------------------------------------------------------------------------------


def estimate_prior(targets: DrawnTargets, contexts_R: Integers, labels_R: Integers, size: int) -> DrawnPrior:
    """The prior of a store whose first rows are `targets` (numpy). `contexts_R` is the token before the one that each row predicts, `labels_R` that one."""
    if not 1 <= targets.draws <= MOST_DRAWS or not 2 <= size <= MOST_IDS:
        raise ValueError(f"drawn targets have 1 to {MOST_DRAWS} draws over 2 to {MOST_IDS} ids, not {targets.draws} over {size}")
    unique_R = numpy.diff(targets.offsets_R1)
    row_U = numpy.repeat(numpy.arange(len(unique_R)), unique_R)[:_ENOUGH_IDS]
    ids_U = numpy.asarray(targets.ids_U[:_ENOUGH_IDS], dtype=numpy.int64)
    context_V, class_V, weights_CG, frequency_V = _classes(contexts_R[row_U], ids_U, size)
    among_R = numpy.zeros(len(unique_R), dtype=numpy.int64)
    rows_U = numpy.repeat(numpy.arange(len(unique_R)), unique_R)
    among_R[rows_U[targets.ids_U == labels_R[rows_U]]] = 1
    group_N = numpy.searchsorted(_GROUPS, numpy.arange(targets.draws + 1), side="right").clip(1) - 1
    return DrawnPrior(
        draws=targets.draws,
        context_V=context_V,
        class_V=class_V,
        frequency_V=frequency_V,
        weights_CG=weights_CG,
        quantiles_NJ=_quantiles(targets.draws),
        unique_X=cumulative_of(numpy.bincount(2 * (unique_R - 1) + among_R, minlength=2 * targets.draws) + 0.5).astype(numpy.uint32),
        entropy_BH=_entropies(group_N[unique_R], quantised_entropy(targets.entropy_R, size), int(group_N[-1]) + 1, size),
        entropy_group_N=group_N.astype(numpy.uint8),
    )


def _quantiles(draws: int) -> NDArray[numpy.uint32]:
    steps_J = numpy.arange(_QUANTILES + 1) / _QUANTILES
    # Row 0 is not used; with one id to come all places are equally probable, exactly.
    table = [numpy.rint(WHOLE * (1 - (1 - steps_J) ** (1 / max(ids, 1)))) for ids in range(draws + 1)]
    return numpy.array(table).astype(numpy.uint32)


def _entropies(group_R: Integers, steps_R: Integers, groups: int, size: int) -> NDArray[numpy.uint32]:
    bins = (math.floor(math.log(size) * ENTROPY_STEPS_PER_NAT) + 1) // _STEPS_PER_BIN + 1
    seen_BH = numpy.bincount(group_R * bins + steps_R // _STEPS_PER_BIN, minlength=groups * bins).reshape(groups, bins).astype(numpy.float64)
    # What a group has not shown yet is as in all groups together; what none has shown stays possible. No bin has fewer intervals than steps.
    likely_BH = seen_BH + 2.0 * (seen_BH.sum(axis=0) + 0.1) / (seen_BH.sum() + 0.1 * bins)
    floor_BH = likely_BH + likely_BH.sum(axis=1, keepdims=True) * 2.0**-16
    return numpy.array([cumulative_of(row_H) for row_H in floor_BH]).astype(numpy.uint32)


def _classes(
    before_U: Integers, ids_U: Integers, size: int
) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8], NDArray[numpy.uint64], NDArray[numpy.uint32]]:
    """Contexts of tokens, classes of ids, the weight of each class in each context, the frequency of each id.

    Context 0 is that of tokens that were not seen, in which classes are as frequent as overall; the last class is that of ids that were not seen.
    Otherwise contexts and classes are those under which the pairs are the most probable, as far as moving one after the other finds them: each
    token goes to the context, then each id to the class, that makes its own pairs the most probable.
    """
    tokens, token_P = numpy.unique(before_U, return_inverse=True)
    ids, id_P = numpy.unique(ids_U, return_inverse=True)
    pairs, times_P = numpy.unique(token_P * len(ids) + id_P, return_counts=True)
    token_P, id_P = pairs // max(len(ids), 1), pairs % max(len(ids), 1)
    contexts, classes = _CONTEXTS - 1, _CLASSES - 1
    # The most frequent each begin as one of their own, all others together.
    context_T = numpy.minimum(_rank(numpy.bincount(token_P, times_P, len(tokens))), contexts - 1)
    class_I = numpy.minimum(_rank(numpy.bincount(id_P, times_P, len(ids))), classes - 1)
    for _ in range(_ROUNDS):
        class_I = _best(id_P, context_T[token_P], times_P, class_I, contexts, classes)
        context_T = _best(token_P, class_I[id_P], times_P, context_T, classes, contexts)
    times_CG = numpy.bincount(context_T[token_P] * classes + class_I[id_P], times_P, contexts * classes).reshape(contexts, classes)
    context_V, class_V = numpy.zeros(size, dtype=numpy.uint8), numpy.full(size, classes, dtype=numpy.uint8)
    context_V[tokens], class_V[ids] = context_T + 1, class_I
    seen_I = numpy.bincount(id_P, times_P, len(ids))
    frequency_V = numpy.ones(size, dtype=numpy.uint32)
    frequency_V[ids] = seen_I
    weights_CG = _weights(times_CG, seen_I, numpy.bincount(class_V, frequency_V, _CLASSES), size)
    return context_V, class_V, weights_CG, frequency_V


def _best(item_P: Integers, other_P: Integers, times_P: Integers, group_I: Integers, others: int, groups: int) -> Integers:
    """For each item the group whose members meet the others' groups most nearly as it does. Whole numbers throughout, so that no rounding decides."""
    times_IO = numpy.bincount(item_P * others + other_P, times_P, len(group_I) * others).reshape(-1, others)
    times_GO = numpy.zeros((groups, others))
    numpy.add.at(times_GO, group_I, times_IO)
    smooth_GO = times_GO + 0.5 * others * times_IO.sum(axis=0) / max(times_IO.sum(), 1)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        log_GO = numpy.rint(numpy.log2(smooth_GO / smooth_GO.sum(axis=1, keepdims=True)) * _LOG_SCALE)
    # Sums of whole numbers under 2^53 are exact in float64 in whatever order a matrix product takes them.
    best: Integers = (times_IO @ numpy.nan_to_num(log_GO, neginf=-64.0 * _LOG_SCALE).T).argmax(axis=1)
    return best


def _weights(times_CG: NDArray[Any], seen_I: NDArray[Any], frequency_G: NDArray[Any], size: int) -> NDArray[numpy.uint64]:
    """In context c class g has about (weights x frequency_G / 2^16) of MOST_WEIGHT, less 1 for every id."""
    total, unseen = seen_I.sum(), int(frequency_G[-1])
    # As much is left for ids that were not seen as ids that were seen once have (Good 1953).
    left = 0.0 if unseen == 0 else 1.0 if total == 0 else max(float((seen_I == 1).sum()), 1.0) / (total + 1.0)
    overall_G = times_CG.sum(axis=0) / max(total, 1)
    # A context that was seen little is as all contexts together.
    smooth_CG = times_CG + len(overall_G) * overall_G
    share_CG = numpy.vstack([overall_G, smooth_CG / numpy.maximum(smooth_CG.sum(axis=1, keepdims=True), 1e-300)]) * (1.0 - left)
    share_CG = numpy.hstack([share_CG, numpy.full((len(share_CG), 1), left)])
    weights: NDArray[numpy.uint64] = numpy.floor(share_CG * 2.0**16 * (MOST_WEIGHT - size) / numpy.maximum(frequency_G, 1)).astype(numpy.uint64)
    return weights


def _rank(times: NDArray[Any]) -> Integers:
    """0 for the most frequent, 1 for the next, ..."""
    rank = numpy.empty(len(times), dtype=numpy.int64)
    rank[numpy.argsort(-times, kind="stable")] = numpy.arange(len(times))
    return rank


assert PRECISION == 31, "the tables of quantiles are written for it"
