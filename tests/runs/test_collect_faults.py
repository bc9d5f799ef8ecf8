"""Randomised schedules of faults and deaths: no row is lost, nothing is sent twice unless nobody knows what became of it, and the account brackets the bill.

What a schedule is and what is held of it stands in collect_schedules.py. `benchmarks/collect_faults.py` goes through the same ones and writes down what
they came to.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from runs.collect_schedules import ALL, every, follow_all


def test_a_sample_of_schedules_without_a_death(tmp_path: Path) -> None:
    tally = follow_all((("faults", number) for number in range(12)), tmp_path)
    assert tally.schedules == {"faults": 12}
    assert tally.unknown > 0


def test_a_sample_of_schedules_with_deaths(tmp_path: Path) -> None:
    tally = follow_all((("deaths", number) for number in range(4)), tmp_path)
    assert sum(kills * schedules for kills, schedules in tally.kills.items()) >= 4


def test_a_sample_of_schedules_in_which_no_more_can_be_written(tmp_path: Path) -> None:
    assert follow_all((("disk", number) for number in range(2)), tmp_path).disk_full >= 1


def test_a_sample_of_schedules_in_which_a_byte_is_altered(tmp_path: Path) -> None:
    follow_all((("bytes", number) for number in range(2)), tmp_path)


@pytest.mark.soak
def test_a_thousand_schedules(tmp_path: Path) -> None:
    tally = follow_all(every(), tmp_path, at_once=4)
    assert tally.schedules == ALL
    assert sum(schedules for kills, schedules in tally.kills.items() if kills >= 2) >= 150
