"""How much of what an endpoint allows the rate controller uses, and how many requests are refused, over a grid of simulated endpoints.

    python benchmarks/rate_control.py [--json]            some minutes; deterministic: a simulated clock, nothing waits

Latency 0.05, 0.5, 2 and 10 s; a limit that stays, moves six times, falls to half, or doubles; told in headers or by refusals alone; on requests a minute, on
tokens a minute, or on how many are worked on at a time. At most 256 are in flight, and every limit can be reached with that. Used is what was let in
of what could have been, from the first second on; `late` is the same of the second half.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from typing import Any

import _common

sys.path.insert(0, str(_common.ROOT / "tests"))

from rate_simulation import Phase, Simulation

SECONDS = {0.05: 300.0, 0.5: 300.0, 2.0: 600.0, 10.0: 1200.0}
REQUESTS_A_MINUTE = {0.05: 3000.0, 0.5: 3000.0, 2.0: 3000.0, 10.0: 900.0}
PLACES = {0.05: 16, 0.5: 32, 2.0: 96, 10.0: 128}
SHARES = {"stays": (1.0,), "moves": (1.0, 0.5, 1.0, 0.25, 1.0, 0.75), "falls": (1.0, 0.5), "doubles": (0.5, 1.0)}
KINDS = ("requests", "tokens", "concurrency")
TOKENS = 100
NETWORK_SECONDS = 0.02
CAVEATS = [
    "The endpoint is simulated: buckets that save up a second's worth, latencies that are drawn within 30% of their mean, a network of 20 ms each way.",
    "Limits counted in windows, as some endpoints have them, let more in at once and were not simulated.",
    "A limit on how many are worked on at a time is never told in headers: with and without them it is the same.",
    "A place of a limited number counts as taken until its answer has come; the endpoint gives it away sooner, by the network's 20 ms, so that more than 1 may be used.",
    "The longer the latency the longer the run (5, 5, 10, 20 minutes): what is lost while a limit is looked for is a share of that.",
]


def phases(kind: str, limit: str, latency: float) -> list[Phase]:
    made = []
    for number, share in enumerate(SHARES[limit]):
        at, requests = number * SECONDS[latency] / len(SHARES[limit]), REQUESTS_A_MINUTE[latency] * share
        match kind:
            case "requests":
                made.append(Phase(at, requests))
            case "tokens":
                made.append(Phase(at, None, requests * TOKENS))
            case _:
                made.append(Phase(at, concurrency=max(1, round(PLACES[latency] * share))))
    return made


def measured(latency: float, limit: str, headers: bool, kind: str, seed: int = 0) -> dict[str, Any]:
    simulation = Simulation(
        phases(kind, limit, latency), SECONDS[latency], latency=latency, network_seconds=NETWORK_SECONDS, headers=headers, tokens=TOKENS, seed=seed
    )
    simulation.watch_from = SECONDS[latency] / 2
    simulation.run()
    return {
        "latency_seconds": latency,
        "limit": limit,
        "headers": headers,
        "limited": kind,
        "used": round(simulation.allowed_rate_taken, 4),
        "used_late": round(simulation.late_rate_taken, 4),
        "refused_share": round(simulation.refused_share, 4),
    }


def main() -> None:
    given = _common.parser(__doc__ or "").parse_args()
    found = [
        measured(latency, limit, headers, kind)
        for latency, limit, headers, kind in itertools.product(SECONDS, SHARES, (True, False), KINDS)
        if headers is False or kind != "concurrency"
    ]
    for one in found:
        if not given.json:
            print(
                "{latency_seconds:5} s  {limit:8} headers {headers!s:5} {limited:11}  used {used:.3f}  late {used_late:.3f}  refused {refused_share:.4f}".format(
                    **one
                )
            )
    data = {
        "least": {
            told: {
                name: max(values) if name == "refused_share" else min(values)
                for name in ("used", "used_late", "refused_share")
                if (values := [one[name] for one in found if one["headers"] == headers])
            }
            for told, headers in (("with_headers", True), ("without_headers", False))
        },
        "mean_used": {
            told: round(statistics.fmean(one["used"] for one in found if one["headers"] == headers), 4)
            for told, headers in (("with_headers", True), ("without_headers", False))
        },
        "grid": found,
    }
    _common.finish("rate-control", data, caveats=CAVEATS, as_json=given.json)


if __name__ == "__main__":
    main()
