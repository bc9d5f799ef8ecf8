"""Drawn targets through a whole student: over many draws the mean gradient is the dense one, in every block; that of renormalised top-k is not."""

from __future__ import annotations

from functools import cache

import numpy
import torch
from torch import Tensor

from helpers import tiny_model
from stillroom.models.loading import body_of, head_of
from stillroom.objectives.divergences import forward_kl
from stillroom.objectives.tensors import as_tensors
from stillroom.targets.kinds import DrawnTargets, FullTargets

DRAWS, TIMES, SIZE, ROWS = 12, 2000, 61, 9


@cache
def teacher_RV() -> Tensor:
    return torch.log_softmax(2.0 * torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(3)), dim=-1)


def drawn(generator: numpy.random.Generator) -> DrawnTargets:
    """DRAWS ids for each row, by numpy's own sampler."""
    p_RV = teacher_RV().double().exp().numpy()
    counts_RV = generator.multinomial(DRAWS, p_RV / p_RV.sum(1, keepdims=True))
    rows, ids = counts_RV.nonzero()
    return DrawnTargets(
        vocabulary="v",
        temperature=1.0,
        draws=DRAWS,
        offsets_R1=numpy.concatenate([[0], numpy.cumsum(numpy.bincount(rows, minlength=ROWS))]),
        ids_U=ids.astype(numpy.int32),
        counts_U=counts_RV[rows, ids].astype(numpy.int32),
        entropy_R=-(p_RV * numpy.log(p_RV)).sum(1).astype(numpy.float32),
    )


def test_the_mean_gradient_over_many_draws_is_the_dense_one_in_every_block() -> None:
    """Along the dense gradient, and along a direction fixed beforehand: within 4 standard errors, for each parameter of a student of one layer."""
    student = tiny_model("mistral", rows=SIZE, layers=1, width=16, seed=2, spread=0.2)
    parameters = dict(student.named_parameters())
    states_RD = body_of(student)(input_ids=torch.arange(ROWS)[None] * 5 % SIZE, use_cache=False).last_hidden_state[0]
    logits_RV = head_of(student)(states_RD)

    def gradient(value_R: Tensor) -> dict[str, Tensor]:
        return dict(zip(parameters, torch.autograd.grad(value_R.mean(), list(parameters.values()), retain_graph=True), strict=True))

    dense = gradient(forward_kl().nats(logits_RV, FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=teacher_RV()), 1.0))
    fixed = torch.Generator().manual_seed(1)
    directions = {name: torch.stack([one / one.norm(), torch.randn(one.shape, generator=fixed)]) for name, one in dense.items()}

    def along(one: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (directions[name] * one[name]).flatten(1).sum(1).double() for name in one}

    rng = numpy.random.default_rng(7)
    samples: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for _ in range(TIMES):
        for name, value in along(gradient(forward_kl().nats(logits_RV, as_tensors(drawn(rng), "cpu"), 1.0))).items():
            samples[name].append(value)
    expected = along(dense)
    kept_RV = teacher_RV().masked_fill(teacher_RV() < teacher_RV().topk(DRAWS).values[:, -1:], -torch.inf).log_softmax(-1)
    renormalised = along(gradient(forward_kl().nats(logits_RV, FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=kept_RV), 1.0)))
    biased = 0
    for name, values in samples.items():
        table = torch.stack(values)
        error = table.std(0) / TIMES**0.5
        assert ((table.mean(0) - expected[name]).abs() <= 4 * error).all(), name
        biased += bool(((renormalised[name] - expected[name]).abs() > 4 * error).any())
    assert len(samples) > 8
    assert biased > len(samples) / 2, "the test would not see a biased target"
