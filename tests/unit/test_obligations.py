"""From obligations to what must be there: every kind of duty, conflicts with the smallest way out, the licence, and the exact texts."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from itertools import combinations, permutations
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.entitlement.library import Catalogue, Source, builtin
from stillroom.entitlement.obligations import (
    CHECKLIST,
    LICENSE,
    NOTICE,
    README,
    Artefact,
    Conflict,
    Owed,
    account,
    artefacts,
    conflicts,
    propose_licence,
    smallest_drops,
    text_of,
    ticked,
    title_of,
    union,
    verdicts_by_source,
)
from stillroom.entitlement.reading import parse_terms
from stillroom.entitlement.records import DutyKind, Record
from stillroom.entitlement.verdict import Circumstances, Obligation, Reason, Use, Verdict, decide
from terms_cases import cases, circumstances_of, decided, sources_of, use_of

KINDS: tuple[DutyKind, ...] = get_args(DutyKind)
TODAY = date(2026, 11, 24)


def obligation(
    duty: DutyKind, source: str = "some/teacher", *, family: str = "house", text: str | None = None, condition: str | None = None
) -> Obligation:
    if text is None and duty in ("name-prefix", "display"):
        text = {"name-prefix": "Llama", "display": "Built with Qwen"}[duty]
    return Obligation(
        duty=duty,
        record=f"{family}@2026-01-01",
        clause=duty,
        source=source,
        says=f"What {family} says of {duty}.",
        text=text,
        flows_to=("student-weights",),
        title=f"The {family} licence",
        url=f"https://example.org/{family}",
        condition=condition,
    )


def owed(duty: DutyKind, **fields: str | None) -> Owed:
    return union({"some/teacher": [obligation(duty, **fields)]}, ["some/teacher"])[0]  # type: ignore[arg-type]


def allowing(*obligations: Obligation) -> Verdict:
    return Verdict(outcome="allow-with-obligations" if obligations else "allow", reasons=(), obligations=obligations)


def denying(says: str, *facts: str) -> Verdict:
    reason = Reason(standing="prohibits", source="s", role="teacher", record="grok-2@2025", clause="no-other", says=says, facts=facts)
    return Verdict(outcome="deny", reasons=(reason,))


def record(family: str, spdx: str | None = None) -> Record:
    text = f"""
records:
  - id: {family}@2024-01-01
    kind: licence
    provider: somebody
    title: The {family} licence
    effective: 2024-01-01
    url: https://example.org/{family}
    spdx: {spdx or "null"}
    fixed: true
    applies_to: {{access: [weights]}}
    evidence: {{grade: P1, source: the text}}
    clauses:
      - {{id: a, locator: all, effect: silent, actions: [train-on-output], paraphrase: It says nothing about that at all.}}
"""
    return parse_terms(text, family).records[0]


# --- the union ------------------------------------------------------------------------------------------------------------------------


def test_the_union_tells_each_duty_once_with_all_its_sources() -> None:
    duties = {
        "a/one": [obligation("display", "a/one"), obligation("policy", "a/one")],
        "b/two": [obligation("display", "b/two")],
        "c/three": [obligation("display", "c/three", family="other")],
    }
    found = union(duties, duties)
    assert [(one.duty, one.family, one.sources) for one in found] == [
        ("display", "house", ("a/one", "b/two")),
        ("display", "other", ("c/three",)),
        ("policy", "house", ("a/one",)),
    ]


def test_what_reached_no_batch_obliges_to_nothing() -> None:
    duties = {"a/one": [obligation("display", "a/one")], "b/two": [obligation("policy", "b/two")]}
    assert [one.duty for one in union(duties, ["b/two"])] == ["policy"]
    assert union(duties, []) == ()
    assert union(duties, ["nobody"]) == ()


def test_a_teacher_of_the_teacher_is_told_with_who_brought_it() -> None:
    (found,) = union({"a/student-of-qwen": [obligation("display", "qwen/big")]}, ["a/student-of-qwen"])
    assert found.sources == ("qwen/big (through a/student-of-qwen)",)


@pytest.mark.parametrize(
    ("one", "other", "expected"), [(None, "x", None), ("x", None, None), ("x", "x", "x"), ("x", "y", "x, or y"), (None, None, None)]
)
def test_a_duty_that_one_source_brings_for_certain_is_certain(one: str | None, other: str | None, expected: str | None) -> None:
    duties = {"a": [obligation("policy", "a", condition=one)], "b": [obligation("policy", "b", condition=other)]}
    assert union(duties, duties)[0].condition == expected


@given(st.permutations(["a", "b", "c"]))
def test_the_union_does_not_depend_on_the_order_of_sources(order: list[str]) -> None:
    duties = {name: [obligation(duty, name) for duty in KINDS] for name in order}
    assert union(duties, order) == union({name: duties[name] for name in sorted(duties)}, sorted(order))


# --- by source ------------------------------------------------------------------------------------------------------------------------

TWO_LICENCES = """
records:
  - id: family-licence@2024-01-01
    kind: licence
    provider: somebody
    title: The Family Licence
    effective: 2024-01-01
    url: https://example.org/family
    fixed: true
    applies_to: {access: [weights, dataset]}
    evidence: {grade: P1, source: the text}
    clauses:
      - {id: grant, locator: "1", effect: permit, actions: [train-on-output, use-logits, init-from-weights], paraphrase: All of that is allowed.}
      - id: kin
        locator: "2"
        effect: oblige
        actions: [distribute-student]
        when: {in_family: true}
        duty: {kind: notice-file, text: Kin of the family}
        paraphrase: Who is of the family says so in a notice.
      - id: stranger
        locator: "3"
        effect: oblige
        actions: [distribute-student]
        when: {in_family: false}
        duty: {kind: display, text: Built with Family}
        paraphrase: Who is not of the family shows a line.
  - id: plain@2024-01-01
    kind: licence
    provider: somebody
    title: A Plain Licence
    effective: 2024-01-01
    url: https://example.org/plain
    fixed: true
    applies_to: {access: [weights, dataset]}
    evidence: {grade: P1, source: the text}
    clauses:
      - {id: grant, locator: "1", effect: permit, actions: [train-on-output, use-logits, init-from-weights], paraphrase: All of that is allowed.}
models:
  - names: [fam/*]
    provider: somebody
    instruments: [family-licence]
    evidence: {grade: P1, source: the card}
  - names: [made/from-fam]
    provider: somebody
    instruments: [plain]
    made_from: [fam/teacher]
    evidence: {grade: P1, source: the card}
"""


def test_obligations_by_source_know_facts_of_all_sources() -> None:
    catalogue = Catalogue.of([parse_terms(TWO_LICENCES, "test")])
    use = Use(facts={"purpose": "train", "method": "text", "release": "weights"})
    teacher, base = Source(name="fam/teacher", access="weights"), Source(name="fam/small", access="weights", role="base")
    found = verdicts_by_source([teacher, base], use, catalogue, Circumstances(today=TODAY))
    # The base makes the student one of the family, so the teacher asks for the notice and not for the line.
    assert [one.duty for one in found["fam/teacher"].obligations] == ["notice-file"]
    assert [one.duty for one in found["fam/small"].obligations] == ["notice-file"]
    alone = verdicts_by_source([teacher], use, catalogue, Circumstances(today=TODAY))
    assert [one.duty for one in alone["fam/teacher"].obligations] == ["display"]


def test_duties_follow_teachers_of_the_teacher() -> None:
    catalogue = Catalogue.of([parse_terms(TWO_LICENCES, "test")])
    use = Use(facts={"purpose": "train", "method": "hidden", "release": "weights"})
    found = verdicts_by_source([Source(name="made/from-fam", access="weights")], use, catalogue, Circumstances(today=TODAY))
    duties = union({name: verdict.obligations for name, verdict in found.items()}, found)
    assert [(one.duty, one.sources) for one in duties] == [("display", ("fam/teacher (through made/from-fam)",))]
    assert [name.partition("@")[0] for name in found["made/from-fam"].instruments] == ["family-licence", "plain"]


def test_together_the_sources_bring_what_the_verdict_obliges_to() -> None:
    catalogue = Catalogue.of([parse_terms(TWO_LICENCES, "test")])
    sources = [
        Source(name="made/from-fam", access="weights"),
        Source(name="fam/small", access="weights", role="base"),
        Source(name="fam/data", access="dataset", role="dataset"),
    ]
    for method in ("text", "hidden", "weights"):
        use = Use(facts={"purpose": "train", "method": method, "release": "weights"})
        whole = decide(sources, use, catalogue, Circumstances(today=TODAY))
        found = verdicts_by_source(sources, use, catalogue, Circumstances(today=TODAY))
        assert whole.allows
        assert {(one.record, one.clause) for verdict in found.values() for one in verdict.obligations} == {
            (one.record, one.clause) for one in whole.obligations
        }


# --- every instrument on file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["name"]))
def test_golden_cases_have_their_artefacts(case: dict[str, Any]) -> None:
    whole = decided(case)
    sources, use = sources_of(case), use_of(case)
    found = verdicts_by_source(sources, use, builtin(), circumstances_of(case))
    if not whole.allows:
        denied = [one for one in conflicts(found, use.facts) if one.kind == "denied"]
        # What is denied for all together is denied for one by itself, and dropping that one is told.
        assert bool(denied) == (whole.outcome == "deny")
        assert all(one.drop for one in denied)
        return
    assert all(verdict.allows for verdict in found.values())
    duties = union({name: verdict.obligations for name, verdict in found.items()}, found)
    assert {(one.duty, one.cited) for one in duties} == {(one.duty, f"{one.record}#{one.clause}") for one in whole.obligations}
    proposal = propose_licence(duties, use.facts)
    wanted = [artefact for duty in duties for artefact in artefacts(duty, hosted=True)]
    assert all(artefact.text.strip() for artefact in wanted)
    items = account(duties, conflicts(found, use.facts), proposal, {}, hosted=True)
    assert all(item.do for item in items if not item.met)


def test_an_instrument_that_bars_other_models_is_a_conflict_with_one_way_out() -> None:
    sources = [
        Source(name="meta-llama/Llama-3.1-70B-Instruct", access="weights"),
        Source(name="some/exaone-answers", access="dataset", role="dataset", licence="exaone-1.1-nc"),
        Source(name="meta-llama/Meta-Llama-3-8B", access="weights", role="base"),
    ]
    use = Use(facts={"purpose": "train", "method": "text", "modality": "text", "release": "weights", "commercial": False, "domicile": "US"})
    found = verdicts_by_source(sources, use, builtin(), Circumstances(today=TODAY))
    (denied,) = (one for one in conflicts(found, use.facts) if one.kind == "denied")
    assert denied.drop == (("some/exaone-answers",),)
    assert "exaone" in denied.says


# --- conflicts ------------------------------------------------------------------------------------------------------------------------


def test_two_prefixes_that_no_name_can_have() -> None:
    verdicts = {
        "meta-llama/Llama-3.1-8B": allowing(obligation("name-prefix", text="Llama")),
        "LGAI-EXAONE/EXAONE": allowing(obligation("name-prefix", text="EXAONE")),
    }
    (found,) = conflicts(verdicts, {})
    assert found.kind == "name-prefix"
    assert "Llama (meta-llama/Llama-3.1-8B)" in found.says
    assert "EXAONE (LGAI-EXAONE/EXAONE)" in found.says
    assert found.drop == (("LGAI-EXAONE/EXAONE",), ("meta-llama/Llama-3.1-8B",))


def test_the_smallest_set_is_the_odd_one_out() -> None:
    verdicts = {name: allowing(obligation("name-prefix", name, text=text)) for name, text in (("a", "Llama"), ("b", "EXAONE"), ("c", "Llama"))}
    (found,) = conflicts(verdicts, {})
    assert found.drop == (("b",),)


def test_prefixes_that_one_name_can_have_are_no_conflict() -> None:
    verdicts = {name: allowing(obligation("name-prefix", name, text=text)) for name, text in (("a", "Llama"), ("b", "Llama-3"), ("c", "Llama"))}
    assert conflicts(verdicts, {}) == ()


def test_one_source_may_conflict_with_itself() -> None:
    verdicts = {"a": allowing(obligation("name-prefix", "a", text="Llama"), obligation("name-prefix", "b", family="other", text="EXAONE"))}
    (found,) = conflicts(verdicts, {})
    assert found.drop == (("a",),)


@pytest.mark.parametrize(("commercial", "clashes"), [(True, True), (False, False), (None, False)])
def test_non_commercial_and_a_commercial_intent(commercial: bool | None, clashes: bool) -> None:
    verdicts = {"nc": allowing(obligation("non-commercial", "nc")), "free": allowing(obligation("policy", "free"))}
    found = conflicts(verdicts, {} if commercial is None else {"commercial": commercial})
    assert [(one.kind, one.drop) for one in found] == ([("non-commercial", (("nc",),))] if clashes else [])


@pytest.mark.parametrize("other", ["share-alike", "flow-down-restrictions", "non-commercial"])
def test_share_alike_and_what_its_licence_cannot_meet(other: DutyKind) -> None:
    verdicts = {"sa": allowing(obligation("share-alike", "sa", family="sa")), "b": allowing(obligation(other, "b", family="b"))}
    (found,) = conflicts(verdicts, {})
    assert found.kind == "share-alike"
    assert found.drop == (("b",), ("sa",))
    same = {"sa": allowing(obligation("share-alike", "sa", family="sa")), "b": allowing(obligation(other, "b", family="sa"))}
    assert conflicts(same, {}) == ()


def test_what_its_own_terms_deny_is_said_to_be_denied_already() -> None:
    verdicts = {"grok": denying("Outputs may not improve any other model.", "not in family"), "free": allowing()}
    (found,) = conflicts(verdicts, {"in_family": False})
    assert found.kind == "denied"
    assert "grok-2@2025#no-other" in found.says
    assert "deny this use already" in found.says
    assert found.drop == (("grok",),)


sets = st.lists(st.frozensets(st.sampled_from("abcdef"), min_size=1, max_size=3), max_size=6)


@given(sets)
def test_the_smallest_sets_are_exact(clashes: list[frozenset[str]]) -> None:
    names = sorted({name for clash in clashes for name in clash})
    hitting = [set(some) for size in range(len(names) + 1) for some in combinations(names, size) if all(clash & set(some) for clash in clashes)]
    least = min((len(some) for some in hitting), default=0)
    expected = {tuple(sorted(some)) for some in hitting if len(some) == least} if clashes else set()
    found = smallest_drops(clashes)
    assert set(found) == expected
    assert list(found) == sorted(set(found))


@given(sets.flatmap(lambda one: st.tuples(st.just(one), st.permutations(one))))
def test_the_smallest_sets_do_not_depend_on_order(pair: tuple[list[frozenset[str]], list[frozenset[str]]]) -> None:
    assert smallest_drops(pair[0]) == smallest_drops(pair[1])


def test_conflicts_do_not_depend_on_the_order_of_sources() -> None:
    verdicts = {
        "a": allowing(obligation("name-prefix", "a", text="Llama"), obligation("share-alike", "a", family="sa")),
        "b": allowing(obligation("name-prefix", "b", text="EXAONE"), obligation("non-commercial", "b", family="nc")),
        "c": denying("No training on outputs at all."),
    }
    found = {conflicts({name: verdicts[name] for name in order}, {"commercial": True}) for order in permutations(verdicts)}
    assert len(found) == 1
    assert [one.kind for one in found.pop()] == ["denied", "name-prefix", "non-commercial", "share-alike"]


# --- the licence ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duties", "licence"),
    [
        ((), "Apache-2.0"),
        (("name-prefix", "display", "notice-file", "licence-copy", "change-notice", "attribution", "policy", "exclude-data", "other"), "Apache-2.0"),
        (("flow-down-restrictions", "licence-copy"), "Apache-2.0 with use restrictions"),
        (("share-alike",), "The house licence"),
        (("non-commercial", "attribution"), "CC-BY-NC-4.0"),
        (("non-commercial", "flow-down-restrictions"), "The house licence"),
        (("no-distribution",), "no licence (it stays inside)"),
        (("no-distribution", "share-alike", "non-commercial"), "no licence (it stays inside)"),
    ],
)
def test_the_most_permissive_licence_that_meets_all_duties(duties: tuple[DutyKind, ...], licence: str) -> None:
    found = propose_licence([owed(duty) for duty in duties], {})
    assert found.licence == licence
    assert found.why
    assert all(one.why for one in found.rejected)
    names = [found.licence, *(one.licence for one in found.rejected)]
    assert len(set(names)) == len(names) == 7
    assert {"Apache-2.0", "MIT", "CDLA-Permissive-2.0", "CC-BY-NC-4.0", "no licence (it stays inside)"} <= set(names)


def test_each_rejected_licence_has_its_reason() -> None:
    why = {one.licence: one.why for one in propose_licence([owed("flow-down-restrictions")], {}).rejected}
    assert why["Apache-2.0"] == "it passes on no use restrictions, as The house licence asks (house@2026-01-01#flow-down-restrictions)"
    assert why["MIT"] == why["Apache-2.0"]
    assert why["CDLA-Permissive-2.0"] == "it is a licence for data, and the student is weights"
    assert why["the teacher's own licence"] == "no duty ties the student to it"
    assert "no duty asks for that" in why["CC-BY-NC-4.0"]
    assert "Apache-2.0 with use restrictions" in why["no licence (it stays inside)"]


def test_weights_under_a_licence_that_is_not_permissive_stay_under_it() -> None:
    found = propose_licence([], {}, [record("llama-3.2")])
    assert (found.licence, found.family) == ("The llama-3.2 licence", "llama-3.2")
    assert propose_licence([], {}, [record("apache-2.0", "Apache-2.0"), record("mit", "MIT")]).licence == "Apache-2.0"


def test_reused_weights_with_restrictions_of_a_teacher_on_top() -> None:
    found = propose_licence([owed("flow-down-restrictions", family="gemma")], {}, [record("llama-3.2")])
    assert found.licence == "The llama-3.2 licence with use restrictions"
    assert [one.family for one in found.restrictions] == ["gemma"]


@pytest.mark.parametrize(
    ("duties", "reused"),
    [
        ([("share-alike", "one"), ("share-alike", "two")], []),
        ([("share-alike", "one"), ("flow-down-restrictions", "two")], []),
        ([("non-commercial", "one"), ("flow-down-restrictions", "two")], []),
        ([("non-commercial", "one")], ["llama-3.2"]),
        ([], ["llama-3.2", "gemma"]),
    ],
)
def test_where_no_licence_will_do_it_is_none(duties: list[tuple[DutyKind, str]], reused: list[str]) -> None:
    found = propose_licence([owed(duty, family=family) for duty, family in duties], {}, [record(family) for family in reused])
    assert found.family is None
    assert found.licence.startswith("no licence")


@pytest.mark.parametrize(
    ("facts", "duties", "data"),
    [
        ({"publish_dataset": True}, ("display",), "CDLA-Permissive-2.0"),
        ({"publish_dataset": False}, (), None),
        ({}, (), None),
        ({"publish_dataset": True}, ("non-commercial",), None),
        ({"publish_dataset": True}, ("flow-down-restrictions",), None),
    ],
)
def test_a_licence_for_the_transfer_set_where_it_is_published(facts: dict[str, bool], duties: tuple[DutyKind, ...], data: str | None) -> None:
    assert propose_licence([owed(duty) for duty in duties], facts).data == data


duty_lists = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(["one", "two", "three"])), max_size=6, unique=True)


@given(duty_lists)
def test_a_proposal_meets_what_it_says(duties: list[tuple[DutyKind, str]]) -> None:
    found = propose_licence([owed(duty, family=family) for duty, family in duties], {})
    kinds = {duty for duty, _ in duties}
    if "no-distribution" in kinds:
        assert found.family is None
    if "non-commercial" in kinds:
        assert not found.licence.startswith("Apache")
    if "flow-down-restrictions" in kinds:
        assert found.licence != "Apache-2.0"
        assert found.licence != "CC-BY-NC-4.0"
    if "share-alike" in kinds:
        assert found.family in {family for duty, family in duties if duty == "share-alike"} | {None}


# --- artefacts ------------------------------------------------------------------------------------------------------------------------


def files_with(*some: Artefact) -> dict[str, str]:
    """The least content with which these are there."""
    found = {README: "", NOTICE: "", LICENSE: "text\n", CHECKLIST: ""}
    for artefact in some:
        content = found.get(artefact.file, "")
        match artefact.how:
            case "title":
                content = f"# {artefact.text}-x\n{content}"
            case "line" | "file":
                content += f"\n{artefact.text}\n"
            case "tick":
                content += f"- [x] {artefact.text}\n"
        found[artefact.file] = content
    return found


WHERE: dict[DutyKind, list[tuple[str, str]]] = {
    "name-prefix": [(README, "title")],
    "display": [(README, "line")],
    "notice-file": [(NOTICE, "line")],
    "licence-copy": [("LICENSES/house.txt", "file")],
    "flow-down-restrictions": [(LICENSE, "line")],
    "change-notice": [(NOTICE, "line")],
    "non-commercial": [(LICENSE, "line"), (README, "line")],
    "attribution": [(README, "line"), (NOTICE, "line")],
    "no-distribution": [(README, "never")],
    "share-alike": [(LICENSE, "line")],
    "policy": [(README, "line")],
    "exclude-data": [(CHECKLIST, "tick")],
    "other": [(CHECKLIST, "tick")],
}


def test_the_table_has_every_kind() -> None:
    assert set(WHERE) == set(KINDS)


@pytest.mark.parametrize("duty", KINDS)
def test_every_duty_has_its_artefact_and_each_is_held(duty: DutyKind) -> None:
    one = owed(duty)
    found = artefacts(one, hosted=False)
    assert [(artefact.file, artefact.how) for artefact in found] == WHERE[duty]
    assert all(artefact.text and artefact.where and artefact.duty == duty for artefact in found)
    files = files_with(*found)
    proposal = propose_licence([one], {})
    (item,) = (line for line in account([one], [], proposal, files, hosted=False) if line.owed == one)
    assert item.met == (duty != "no-distribution")
    assert bool(item.do) != item.met
    for artefact in found:
        less = {name: content for name, content in files.items() if name != artefact.file}
        (item,) = (line for line in account([one], [], proposal, less, hosted=False) if line.owed == one)
        assert not item.met
        assert item.do


def test_the_exact_text_is_used_where_there_is_one() -> None:
    assert text_of(owed("notice-file", text="  Llama 3.1 is licensed under ...\n")) == "Llama 3.1 is licensed under ..."
    assert "https://example.org/house" in text_of(owed("notice-file"))
    assert text_of(owed("display", text="Built with Qwen")) == "Built with Qwen"


def test_a_line_must_stand_by_itself() -> None:
    (artefact,) = artefacts(owed("display", text="Built with Qwen"), hosted=False)
    assert artefact.present({README: "# x\n\nBuilt with Qwen\n"})
    assert artefact.present({README: "Built with Qwen"})
    assert not artefact.present({README: "# x\n\n- display [Built with Qwen]: the documentation shows Built with Qwen\n"})
    assert not artefact.present({})


def test_a_service_that_must_show_a_line_is_for_a_person_to_see_to() -> None:
    service = replace(owed("display"), flows_to=("service", "documentation"))
    assert [artefact.how for artefact in artefacts(service, hosted=True)] == ["line", "tick"]
    assert [artefact.how for artefact in artefacts(service, hosted=False)] == ["line"]
    assert [artefact.how for artefact in artefacts(owed("display"), hosted=True)] == ["line"]


def test_what_only_the_data_carries_is_for_a_person_to_see_to() -> None:
    data = replace(owed("attribution"), flows_to=("dataset",))
    assert [artefact.how for artefact in artefacts(data, hosted=False)] == ["tick"]


def test_a_name_prefix_is_unmet_and_then_met() -> None:
    one = owed("name-prefix", text="Llama")
    proposal = propose_licence([one], {})
    unmet = account([one], [], proposal, {README: "# tiny-x\n", LICENSE: "text"}, hosted=False)
    assert [item.met for item in unmet] == [True, False]
    assert "begins with 'Llama'" in unmet[1].do
    assert all(item.met for item in account([one], [], proposal, {README: "---\n# a: b\n---\n\n# Llama-tiny-ä\n", LICENSE: "text"}, hosted=False))


@pytest.mark.parametrize("name", ["Llama 3 x", "Llama-3-x", "Llama_3.x"])
def test_hyphens_stand_for_blanks(name: str) -> None:
    (artefact,) = artefacts(owed("name-prefix", text="Llama 3"), hosted=False)
    assert artefact.present({README: f"# {name}\n"})


@pytest.mark.parametrize("name", ["llama-x", "tiny-Llama", "Ｌlama-x", " xLlama", ""])
def test_a_name_that_only_looks_like_it_does_not_begin_with_the_prefix(name: str) -> None:
    (artefact,) = artefacts(owed("name-prefix", text="Llama"), hosted=False)
    assert not artefact.present({README: f"# {name}\n"})


def test_a_duty_that_depends_on_a_fact_says_so() -> None:
    one = owed("exclude-data", condition="monthly users over 100,000,000")
    (_, item) = account([one], [], propose_licence([one], {}), {LICENSE: "text"}, hosted=False)
    assert not item.met
    assert "monthly users over 100,000,000" in item.do
    assert "intent" in item.do


def test_conflicts_come_first_and_say_what_to_leave_out() -> None:
    conflict = Conflict(kind="name-prefix", says="no name begins with both", clashes=(frozenset({"a", "b"}),))
    first, *_ = account([], [conflict], propose_licence([], {}), {LICENSE: "text"}, hosted=False)
    assert (first.met, first.do) == (False, "Leave out a or b, and run again without it.")


@pytest.mark.parametrize("text", ["# a\n# b\n", "no heading", "", "---\nx: 1\n---\n", "---\nnever closed\n# a\n"])
def test_the_title_of_odd_pages(text: str) -> None:
    assert title_of(text) == ("a" if "# a" in text else "")


@given(st.text(max_size=60))
def test_ticks_of_any_text(text: str) -> None:
    assert all(f"] {line}" in text for line in ticked(text))


def test_a_tick_is_of_its_exact_line() -> None:
    (artefact,) = artefacts(owed("other"), hosted=False)
    assert artefact.present({CHECKLIST: f"- [X] {artefact.text}\n"})
    assert not artefact.present({CHECKLIST: f"- [ ] {artefact.text}\n"})
    assert not artefact.present({CHECKLIST: f"- [x] {artefact.text} changed since\n"})
