"""The sections that say what it costs, what it took, and where it came from."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stillroom.web import format as f
from stillroom.web.markup import Child, Html, el, join
from stillroom.web.parts import fact, facts, lead, section, table
from stillroom.web.readings import Measured, Missing, Node, Reading, dig, read, shown, value_only
from stillroom.web.results import decision_list
from stillroom.web.sentences import allowed

_COSTS: tuple[tuple[str, str, f.Style, str], ...] = (
    ("parameters", "Parameters", f.si, ""),
    ("bytes", "Weights on disk", f.size, ""),
    ("flops_per_token", "Arithmetic per token", f.flops, "One decoding step with an empty context."),
    ("tokens_per_second", "Speed, batch 1", f.rate, "Greedy decoding."),
    ("tokens_per_second_batch_32", "Speed, batch 32", f.rate, "Greedy decoding."),
    ("latency_p50_seconds", "Time to answer, median", f.seconds, "One whole answer at batch 1."),
    ("latency_p95_seconds", "Time to answer, 95th percentile", f.seconds, "One whole answer at batch 1."),
    ("peak_memory_bytes", "Peak memory", f.size, "A fresh process that loads the model and answers, beyond the libraries."),
)

_PURPOSES = {"collect": "Collecting", "evaluate": "Evaluating", "compare": "Comparing"}
_STAGES = {
    "plan": "Planning",
    "collect": "Collecting the teacher\u2019s targets",
    "train": "Training",
    "label_only": "Training the label-only baseline",
    "evaluate": "Evaluating",
    "report": "Reporting",
}


def costs(report: Node) -> Html:
    """Teacher and student beside each other, with ratios."""
    rows: list[list[Child]] = []
    for key, name, style, explained in _COSTS:
        teacher, student = (read(report, "cost", who, key) for who in ("teacher", "student"))
        ratio = read(report, "cost", "ratios", key)
        head = join(el("b", name), el("span", explained, class_="why") if explained else None)
        rows.append([head, shown(teacher, style), shown(student, style), shown(ratio, f.times)])
    words = "Measured on the machine named under Provenance. The ratio is turned so that above 1 the student is better."
    heads = ["Measure", "Teacher", "Student", "Ratio"]
    return section("cost", "What it costs to run", lead(words), table("Cost of teacher and student", heads, rows, class_="numbers costs"))


def making(report: Node) -> Html:
    """Tokens, time and money that went into the student."""
    rows: list[list[Child]] = [
        ["Prompts", shown(read(report, "making", "prompts"), f.count)],
        ["Tokens the teacher wrote", shown(read(report, "making", "teacher_tokens"), f.count)],
        [
            join("Tokens the student was trained on", el("span", "Scored tokens, repeats counted.", class_="why")),
            shown(read(report, "making", "training_tokens"), f.count),
        ],
        ["Optimiser steps", shown(read(report, "making", "updates"), f.count)],
        *_stage_rows(report),
    ]
    money = read(report, "making", "money")
    rows.append(["Money", shown(money, f.money(money.unit if isinstance(money, Measured) else ""))])
    return section("making", "What it took to make", table("Tokens, time and money", ["What", "Amount"], rows, class_="numbers making"))


def collection(report: Node) -> Html | None:
    """What was asked of the teacher's endpoint and what became of it; nothing where the teacher was here."""
    node: Mapping[str, Any] | None = dig(report, "collection")
    if not node:
        return None
    asked: Mapping[str, Any] = node.get("rows") or {}
    shows = (
        ("Requested", "requested", _number), ("Accepted", "accepted", _number), ("Rejected", "rejected", _by_reason), ("Failed", "failed", _by_reason),
        ("Pending", "pending", _number),
    )  # fmt: skip
    # A column for each purpose, of which there are few: reasons are words, and need room on a phone.
    heads: list[Child] = ["Rows", *(el("bdi", _PURPOSES.get(purpose, purpose)) for purpose in asked)]
    rows: list[list[Child]] = [[name, *(show(found.get(key)) for found in asked.values())] for name, key, show in shows]
    words = join(
        "Log-probabilities of ", _number(node.get("logprobs_verified")), " answers passed verification, and of ", _number(_sum(node.get("logprobs_demoted"))),
        " did not", *_in_brackets(node.get("logprobs_demoted")), ". ", _paid_for_itself(read(report, "collection", "break_even_calls")),
    )  # fmt: skip
    return section(
        "collection",
        "What was asked of the endpoint",
        lead(words),
        table("Rows by what became of them", heads, rows, class_="numbers asked") if asked else None,
        table("Spent, reserved, projected and allowed", ["What", "Tokens", "Money"], _amounts(report), class_="numbers making"),
    )


_AMOUNTS = (
    ("spent", "Spent", "As the endpoint counted, a probe with it."),
    ("answers", "Of it, for answers", None),
    ("pilot", "A pilot had projected for them", "Before they were bought."),
    ("reserved", "Reserved", "May have been billed without an answer: the worst case of those requests."),
    ("projected", "Still to be bought", "At what an answer cost on average."),
    ("cap", "Cap", None),
)


def _amounts(report: Node) -> list[list[Child]]:
    rows: list[list[Child]] = []
    for key, name, why in _AMOUNTS:
        tokens, money = (read(report, "collection", f"{key}_{unit}") for unit in ("tokens", "money"))
        style = f.money(money.unit if isinstance(money, Measured) else "")
        rows.append([join(name, el("span", why, class_="why") if why else None), shown(tokens, f.count), shown(money, style)])
    return rows


def _paid_for_itself(calls: Reading) -> Child:
    """The break-even volume as a sentence."""
    if isinstance(calls, Missing):
        return join("After how many calls the student has paid for itself is not known: ", el("bdi", calls.why), ".")
    return join("The student has paid for itself after ", shown(calls, f.count), " calls that the teacher would have answered.")


_GATES = {
    "collecting": ("Collecting", "There is no answer, or none that can be learned from."),
    "last-gate": ("Last gate", "Too long, cut off, empty, or there already."),
}


def curation(report: Node) -> Html | None:
    """What was left out of what the student saw, step by step; nothing where the report does not say."""
    node: Mapping[str, Any] | None = dig(report, "curation")
    if not node:
        return None
    steps = list(node.get("steps") or [])
    rows: list[list[Child]] = [
        [_step_name(str(step.get("step"))), _number(step.get("before")), _dropped(step), _number(step.get("after"))] for step in steps
    ]
    words = join(
        "Of ", value_only(read(report, "curation", "requested"), f.count), " answers the student could learn from ",
        value_only(read(report, "curation", "accepted"), f.count), ". curation.jsonl has each of the others, with what shows why.",
    )  # fmt: skip
    return section(
        "curation",
        "What was left out, and why",
        lead(words),
        table("Answers by step", ["Step", "Before", "Left out, of those before", "After"], rows, class_="numbers"),
        *[_hits(split) for split in node.get("splits") or []],
        _replaced(node.get("redaction")),
    )


def _step_name(name: str) -> Html:
    title, explained = _GATES.get(name, (name.replace("-", " ").capitalize(), ""))
    return join(el("bdi", title), el("span", explained, class_="why") if explained else None)


def _dropped(step: Mapping[str, Any]) -> Child:
    """Each reason with its count and its share."""
    parts = []
    for reason, count in (step.get("left_out") or {}).items():
        share = read(step.get("shares") or {}, reason)
        parts.append(el("div", _number(count), " ", el("bdi", str(reason).replace("-", " ")), " (", value_only(share, f.percent), ")"))
    return join(*parts) if parts else "0"


def _hits(split: Mapping[str, Any]) -> Html:
    """How many evaluation items stood in answers, and what could not be looked for."""
    most = ", ".join(f"{item} in {count:,}" for item, count in (split.get("most_often") or {}).items())
    return el(
        "p",
        "Of ", value_only(read(split, "items"), f.count), " items of ", el("bdi", str(split.get("split"))), ", ",
        value_only(read(split, "hit"), f.count), " stood in answers that were left out for it. ",
        value_only(read(split, "by_overlap"), f.count), " items would be found by their words wherever they stood, ",
        value_only(read(split, "by_prompt_alone"), f.count), " by their whole prompt alone.",
        join(" Most often: ", el("bdi", most), ".") if most else None,
    )  # fmt: skip


def _replaced(node: Mapping[str, Any] | None) -> Html | None:
    """What was taken out of the texts before anything was sent."""
    if not node:
        return None
    title = el("h3", "What the endpoint did not see")
    if node.get("mode") == "off":
        return join(title, el("p", "Redaction was off: the endpoint saw every text as it is."))
    kinds: Mapping[str, Any] = node.get("kinds") or {}
    rows: list[list[Child]] = [
        [el("bdi", kind), *(shown(read(found, key), f.count) for key in ("places", "distinct", "texts"))] for kind, found in kinds.items()
    ]
    then = {"restored": "The student learned from the texts with their secrets in them.", "placeholders": "Nobody else saw them: neither the student nor this report."}  # fmt: skip
    words = join(
        "In ", value_only(read(node, "texts"), f.count), " texts, what looks like a secret was replaced. ", then.get(str(node.get("mode"))), " ",
        value_only(read(node, "placeholders_unknown"), f.count), " placeholders stand in an answer and not in its prompt.",
    )  # fmt: skip
    found = (
        table("Replaced, by kind", ["Kind", "Places", "Different ones", "Texts"], rows, class_="numbers") if rows else el("p", "Nothing was found.")
    )
    return join(title, el("p", words), found)


def _number(value: Any) -> Html:
    return el("data", f"{value:,}" if isinstance(value, int) else "not recorded", value=str(value))


def _sum(counts: Any) -> int:
    return sum(counts.values()) if isinstance(counts, Mapping) else 0


def _reasons(counts: Any) -> list[str]:
    return [f"{count:,} {str(reason).replace('-', ' ')}" for reason, count in counts.items()] if isinstance(counts, Mapping) else []


def _in_brackets(counts: Any) -> list[Child]:
    reasons = _reasons(counts)
    return [" (", el("bdi", ", ".join(reasons)), ")"] if reasons else []


def _by_reason(counts: Any) -> Child:
    """A line for each reason."""
    return join(el("div", el("bdi", reason)) for reason in _reasons(counts)) if counts else "0"


def _stage_rows(report: Node) -> list[list[Child]]:
    stages = dig(report, "making", "wall_seconds") or {}
    readings = {name: read(stages, name) for name in _ordered(tuple(_STAGES), stages)}
    measured = {name: reading.value for name, reading in readings.items() if isinstance(reading, Measured)}
    if not readings:
        return [["Wall time", shown(Missing("no stage recorded its time"), f.seconds)]]
    total = sum(measured.values())
    rows: list[list[Child]] = []
    for name, reading in readings.items():
        bar = _bar(measured[name] / total) if name in measured and total > 0 else None
        rows.append([join("Wall time: ", el("bdi", _STAGES.get(name, name))), join(shown(reading, f.seconds), bar)])
    if len(measured) > 1:
        rows.append(["Wall time, these together", el("data", f.seconds(total), value=repr(total), title=f"{total!r} seconds")])
    return rows


def _bar(share: float) -> Html:
    """The stage's share of the time."""
    rect = el("rect", x=0, y=0, width=f"{share * 100:.2f}%", height=4, class_="bar")
    return el("svg", el("rect", x=0, y=0, width="100%", height=4, class_="track"), rect, class_="share", height=4, aria_hidden="true")


def provenance(report: Node) -> Html:
    """Hashes, versions, machine, decisions: what one needs to believe or to repeat the numbers."""
    node: Mapping[str, Any] = dig(report, "provenance") or {}
    decisions = node.get("decisions") or []
    hashes = [
        ("Recipe", node.get("recipe_sha256")),
        ("Transfer set", node.get("transfer_set_sha256")),
        ("Target store", node.get("target_store_sha256") or _absent("this run stored no targets")),
        ("Ledger head", node.get("ledger_head")),
    ]
    return section(
        "provenance",
        "Provenance",
        table("Models", ["Fact", "Teacher", "Student"], _model_rows(node), class_="models"),
        facts("Hashes (SHA-256)", hashes, code=True),
        el(
            "div",
            el("div", facts("Run", _run_facts(report, node)), facts("Machine", node.get("machine") or {"Machine": None})),
            el("div", facts("Versions", node.get("versions") or {"Versions": None})),
            class_="columns",
        ),
        el("h3", "Decisions taken"),
        decision_list(decisions) if decisions else el("p", "No decision was recorded: everything went as the recipe asked."),
    )


def _run_facts(report: Node, node: Node) -> list[tuple[str, Any]]:
    entries = node.get("ledger_entries")
    created = node.get("created")
    return [
        ("Seed", node.get("seed")),
        ("Ledger entries", f.count(entries) if isinstance(entries, int) else entries),
        ("Report made", f.moment(created) if isinstance(created, str) else created),
        ("Report schema", report.get("schema_version")),
    ]


def _model_rows(node: Node) -> list[list[Child]]:
    teacher, student = node.get("teacher") or {}, node.get("student") or {}
    keys = _ordered(
        ("source", "kind", "revision", "architecture", "layers", "width", "parameters", "weights_sha256", "licence"), [*teacher, *student]
    )
    named = {"weights_sha256": "Weights, SHA-256"}
    return [[named.get(key, key.replace("_", " ").capitalize()), *(_model_fact(key, side.get(key)) for side in (teacher, student))] for key in keys]


def _ordered(first: Sequence[str], found: Iterable[str]) -> list[str]:
    """The names found, those that are known in their own order, others after them."""
    names = dict.fromkeys(found)
    return [*(name for name in first if name in names), *(name for name in names if name not in first)]


def _model_fact(key: str, value: Any) -> Html:
    if key == "parameters" and isinstance(value, int):
        return el("data", f.si(value), value=str(value), title=f"{value} parameters")
    if value is None:
        return _absent({"revision": "a directory has none", "licence": "the model declares none"}.get(key, "not recorded"))
    return fact(value, code=key.endswith("sha256") or key in ("source", "revision"))


def _absent(why: str) -> Html:
    return el("span", f"absent: {why}", class_="absent")


def reproduce(report: Node) -> Html:
    """The commands that make this report again."""
    commands = dig(report, "provenance", "commands") or []
    if not commands:
        return section("reproduce", "How to reproduce", lead("The report records no commands."))
    node: Mapping[str, Any] = dig(report, "provenance") or {}
    words = join(
        "With the versions above, the recipe whose hash is ",
        el("code", str(node.get("recipe_sha256") or "")[:16]),
        f"\u2026 and seed {node.get('seed')}:",
    )
    lines = [command if isinstance(command, str) else shlex.join(command) for command in commands]
    return section("reproduce", "How to reproduce", lead(words), el("pre", el("code", "\n".join(lines)), tabindex="0", aria_label="Commands"))


def obligations(report: Node) -> Html:
    """What the teacher's terms say, and what the student must carry."""
    node: Mapping[str, Any] = dig(report, "provenance") or {}
    terms: Mapping[str, Any] = node.get("terms") or {}
    owed = terms.get("obligations") or []
    owed = [owed] if isinstance(owed, str) else owed
    names = {
        "teacher": "Looked up as",
        "access": "Reached through",
        "licence": "Licence declared",
        "reasons": "Why",
        "facts": "Known of the use",
        "assertions": "Asserted",
        "warnings": "Mind",
        "instruments": "Records asked, with their digests",
        "catalogue": "Catalogue of",
        "decision": "Decision, SHA-256",
    }
    told = [key for key in _ordered(tuple(names), terms) if key != "obligations" and terms[key] != []]
    rows = [(names.get(key, key.replace("_", " ").capitalize()), terms[key]) for key in told]
    return section(
        "obligations",
        "Terms and obligations",
        lead(allowed(str(node.get("verdict") or "not recorded"))),
        facts("Terms of the teacher", rows) if rows else el("p", "No terms were recorded."),
        el("h3", "Obligations"),
        el("ul", [el("li", el("bdi", str(entry))) for entry in owed]) if owed else el("p", "The terms as recorded ask for nothing."),
    )
