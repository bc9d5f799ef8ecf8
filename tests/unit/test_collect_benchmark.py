"""benchmarks/collect.py at toy size: every client does every request, and one JSON object comes out."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import collect as benchmark


def test_a_run_at_toy_size() -> None:
    arguments = benchmark.parsed(["--requests", "20", "--logprob-requests", "8", "--repeats", "1", "--limit-seconds", "3", "--latency-ms", "1"])
    found = benchmark.measure(arguments)
    assert set(found["limits"]) == set(benchmark.LIMITS)
    assert set(found["text"]) == set(found["logprobs"]) == set(benchmark.PEERS)
    assert found["moving_limits"]["answered"] > 0
