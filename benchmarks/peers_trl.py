"""Values and gradients of TRL's `generalized_jsd_loss`, as `tests/fixtures/trl_jsd.json`. Run by benchmarks/peers.py, where TRL is installed.

The inputs are not in the file: they are a function of a seed (`logits`, of which tests/numerics/test_peers.py has its own copy), and their SHA-256 is
kept. B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gold.gold_trainer import GOLDTrainer

PATH = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "trl_jsd.json"
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
# (seed, B, T, V, spread of the logits, temperature)
CASES = ((0, 2, 5, 11, 3.0, 1.0), (1, 3, 4, 7, 8.0, 2.0), (2, 2, 3, 13, 0.2, 0.5), (3, 2, 6, 997, 5.0, 1.0))
# Of larger gradients than this the file has the norm and the inner product with the teacher's logits alone.
KEPT_NUMBERS = 200


def logits(seed: int, shape: tuple[int, ...], spread: float) -> numpy.ndarray:
    """Sums of four uniform numbers, centred: close to normal, and made of raw bits, whose stream numpy promises to keep."""
    raw = numpy.random.Philox(seed).random_raw(4 * int(numpy.prod(shape))).reshape(4, *shape)
    return spread * 3**0.5 * ((raw >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53 * 2 - 1).sum(axis=0) / 2


def masked(seed: int, batch: int, positions: int) -> numpy.ndarray:
    """Labels, of which about a third are -100; the last sequence's are -100 throughout where there is more than one other."""
    labels = (numpy.random.Philox(1000 + seed).random_raw(batch * positions) % 3).astype(numpy.int64).reshape(batch, positions)
    labels[labels == 0] = -100
    if batch > 2:
        labels[-1] = -100
    return labels


def case(seed: int, batch: int, positions: int, size: int, spread: float, temperature: float) -> dict[str, Any]:
    student, teacher = logits(2 * seed, (batch, positions, size), spread), logits(2 * seed + 1, (batch, positions, size), spread)
    labels = torch.from_numpy(masked(seed, batch, positions))
    results = []
    for beta in BETAS:
        found = [_value_and_gradient(trainer, student, teacher, labels, beta, temperature) for trainer in (GKDTrainer, GOLDTrainer)]
        assert found[0][0] == found[1][0], "TRL's two trainers have two functions of this name: here they agree"
        assert torch.equal(found[0][1], found[1][1])
        value, gradient = found[0]
        inner = float((gradient * torch.from_numpy(teacher)).sum())
        result = {"beta": beta, "value": value, "gradient_norm": float(gradient.norm()), "gradient_times_teacher": inner}
        results.append(result | ({"gradient": gradient.tolist()} if gradient.numel() <= KEPT_NUMBERS else {}))
    return {
        "seed": seed,
        "shape": [batch, positions, size],
        "spread": spread,
        "temperature": temperature,
        "inputs_sha256": hashlib.sha256(student.tobytes() + teacher.tobytes() + labels.numpy().tobytes()).hexdigest(),
        "results": results,
    }


def _value_and_gradient(
    trainer: Any, student: numpy.ndarray, teacher: numpy.ndarray, labels: torch.Tensor, beta: float, temperature: float
) -> tuple[float, torch.Tensor]:
    student_BTV = torch.from_numpy(student).clone().requires_grad_()
    loss = trainer.generalized_jsd_loss(student_BTV, torch.from_numpy(teacher), labels=labels, beta=beta, temperature=temperature)
    loss.backward()
    assert student_BTV.grad is not None
    return loss.item(), student_BTV.grad


def main() -> None:
    tree = {
        "what": "trl.experimental.gkd.GKDTrainer.generalized_jsd_loss (and GOLDTrainer's), float64, reduction batchmean: value, gradient by student logits",
        "versions": {name: metadata.version(name) for name in ("trl", "torch", "transformers", "numpy")},
        "cases": [case(*one) for one in CASES],
    }
    PATH.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    print(f"written to {PATH}")


if __name__ == "__main__":
    main()
