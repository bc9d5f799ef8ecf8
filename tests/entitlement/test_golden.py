"""What the catalogue says of known situations: outcome, deciding clause, what would change it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import terms_cases
from stillroom.entitlement.library import builtin, matches

CASES = terms_cases.cases()


@pytest.mark.parametrize("case", CASES, ids=[f"{case['file']}: {case['name']}" for case in CASES])
def test_case(case: dict[str, Any]) -> None:
    verdict = terms_cases.decided(case)
    expected = case["expect"]
    assert verdict.outcome == expected["outcome"], (verdict.question, [(r.standing, r.cited, r.says) for r in verdict.reasons])
    if "decided_by" in expected:
        assert verdict.reasons[0].cited == expected["decided_by"]
    if "changed_by" in expected:
        assert any(expected["changed_by"] in change for change in (*verdict.changed_by, verdict.question or "")), (
            verdict.changed_by,
            verdict.question,
        )
    if "asks" in expected:
        assert verdict.asks == expected["asks"], verdict.question
    assert set(expected.get("obligations", ())) <= {obligation.duty for obligation in verdict.obligations}
    assert set(expected.get("unmet", ())) <= {obligation.duty for obligation in verdict.obligations if obligation.met is False}


def test_every_record_has_a_case() -> None:
    asked = {instrument.split()[0] for case in CASES for instrument in terms_cases.decided(case).instruments}
    assert set(builtin().records) <= asked, f"no case for {sorted(set(builtin().records) - asked)}"


@given(name=st.text("ab-", max_size=8), pattern=st.text("ab-*", max_size=6))
def test_a_pattern_matches_as_a_shell_pattern_does(name: str, pattern: str) -> None:
    assert matches(name, pattern) == fnmatchcase(name, pattern)
