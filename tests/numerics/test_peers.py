"""Our divergences against what other packages compute: values and gradients in tests/fixtures, written by benchmarks/peers.py.

TRL's `generalized_jsd_loss(beta)` is forward KL at beta = 0, reverse KL at beta = 1, and between them generalized JSD with beta as the teacher's weight;
at the ends it is another quantity and no limit of those between. Its "batchmean" is a mean over the labels that are not -100.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from stillroom.objectives.divergences import Divergence, forward_kl, generalized_jsd, reverse_kl
from stillroom.objectives.objective import Objective, WeightedTerm, backward_chunked
from stillroom.targets.kinds import FullTargets, TextTargets

TRL = json.loads((Path(__file__).parents[1] / "fixtures" / "trl_jsd.json").read_text(encoding="utf-8"))
EACH = pytest.mark.parametrize(
    ("case", "result"),
    [(case, result) for case in TRL["cases"] for result in case["results"]],
    ids=lambda tree: str(tree.get("seed", tree.get("beta"))),
)


def logits(seed: int, shape: tuple[int, ...], spread: float) -> numpy.ndarray:
    raw = numpy.random.Philox(seed).random_raw(4 * int(numpy.prod(shape))).reshape(4, *shape)
    return spread * 3**0.5 * ((raw >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53 * 2 - 1).sum(axis=0) / 2


def inputs(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits (B, T, V), and labels."""
    seed, shape = case["seed"], tuple(case["shape"])
    student, teacher = (logits(2 * seed + which, shape, case["spread"]) for which in (0, 1))
    labels = (numpy.random.Philox(1000 + seed).random_raw(shape[0] * shape[1]) % 3).astype(numpy.int64).reshape(shape[:2])
    labels[labels == 0] = -100
    if shape[0] > 2:
        labels[-1] = -100
    assert hashlib.sha256(student.tobytes() + teacher.tobytes() + labels.tobytes()).hexdigest() == case["inputs_sha256"]
    return torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(labels)


def of_beta(beta: float) -> Divergence:
    """The change of convention."""
    if beta == 0:
        return forward_kl()
    return reverse_kl() if beta == 1 else generalized_jsd(weight_on_teacher=beta)


@EACH
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_value_and_gradient_are_trls(case: dict[str, Any], result: dict[str, Any], dtype: torch.dtype, relative: float) -> None:
    student_BTV, teacher_BTV, labels_BT = inputs(case)
    rows_BT = labels_BT != -100
    assert 0 < int(rows_BT.sum()) < rows_BT.numel()
    objective = Objective(terms=(WeightedTerm(divergence=of_beta(result["beta"])),), match_temperature=case["temperature"])
    log_probs_RV = torch.log_softmax(teacher_BTV[rows_BT].to(dtype), dim=-1)
    gradient_RV, sums = backward_chunked(
        student_BTV[rows_BT].to(dtype),
        torch.clone,
        size=student_BTV.shape[-1],
        objective=objective,
        targets=FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=log_probs_RV),
        labels=TextTargets(vocabulary="v", token_ids_R=labels_BT[rows_BT]),
        divide_by=int(rows_BT.sum()),
        rows_per_chunk=4,
    )
    assert sums.objective_nats / sums.scored_tokens == pytest.approx(result["value"], rel=relative)
    assert float(gradient_RV.norm()) == pytest.approx(result["gradient_norm"], rel=relative)
    inner = float((gradient_RV.double() * teacher_BTV[rows_BT]).sum())
    assert inner == pytest.approx(result["gradient_times_teacher"], rel=relative, abs=relative * result["gradient_norm"])
    if "gradient" in result:
        expected_BTV = torch.tensor(result["gradient"], dtype=torch.float64)
        assert not expected_BTV[~rows_BT].any(), "TRL gives what is masked no gradient"
        assert float((gradient_RV.double() - expected_BTV[rows_BT]).norm()) <= relative * result["gradient_norm"]


def test_the_fixture_is_of_the_version_and_the_weights_that_are_promised() -> None:
    assert TRL["versions"]["trl"] == "1.16.0"
    assert all([result["beta"] for result in case["results"]] == [0.0, 0.1, 0.5, 0.9, 1.0] for case in TRL["cases"])
