"""Goes through the schedules of faults and deaths of `make soak`, and writes down what they came to. Ends at the first that is not as it must be.

python benchmarks/collect_faults.py            some minutes
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import _common

sys.path.insert(0, str(_common.ROOT / "tests"))

from runs.collect_schedules import every, follow_all

CAVEATS = [
    "The endpoint is the fake one, on the loopback: its faults are those that its settings name, drawn independently for each request.",
    "Deaths are of the process (SIGKILL), not of the machine: what a power failure leaves on a disk is SQLite's to answer for, and was not tried.",
    "A file can grow no further by a limit on its size (RLIMIT_FSIZE), which fails as a quota does; a full disk is tried in tests/unit/test_request_store.py.",
    "Bytes are altered in the database, one in each schedule; SQLite takes an altered write-ahead log for one that was not finished, and says nothing.",
]


def main() -> None:
    arguments = _common.parser(__doc__ or "")
    arguments.add_argument("--directory", type=Path, help="where stores are made; by default the system's place for temporary files")
    given = arguments.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        tally = follow_all(every(), Path(directory), at_once=4)
    data = {
        "schedules": dict(tally.schedules),
        "schedules_in_all": tally.schedules.total(),
        "violations": 0,  # the first one ends this program
        "schedules_by_kills": {str(kills): tally.kills[kills] for kills in sorted(tally.kills)},
        "kills": sum(kills * schedules for kills, schedules in tally.kills.items()),
        "schedules_with_two_kills_or_more": sum(schedules for kills, schedules in tally.kills.items() if kills >= 2),
        "processes_that_could_write_no_more": tally.disk_full,
        "altered_bytes_told": tally.altered_told,
        "rows": tally.rows,
        "rows_lost": 0,  # each is looked for by name, in every schedule
        "attempts": tally.attempts,
        "attempts_of_unknown_outcome": tally.unknown,
        "requests_received": tally.received,
        "requests_done_and_billed": tally.done,
        "requests_refused_429": tally.refused,
        "faults": dict(tally.faults.most_common()),
        "schedules_that_met_their_cap": tally.cap_reached,
        "largest_reserved_picos": tally.worst_reserved_picos,
        "largest_reserved_share_of_cap": round(tally.worst_reserved_share_of_cap, 4),
        "seconds": round(time.monotonic() - began, 1),
    }
    _common.finish("collect-faults", data, caveats=CAVEATS, as_json=given.json)


if __name__ == "__main__":
    main()
