"""What the accused can check: a listing made from a bundle, for those whose model it accuses.

It says what was fixed before and who has to confirm that, what follows from what, what does not, what innocent explanations are left, and how to
repeat the test on one's own model. It takes no side: it is the same whether the bundle holds or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.guard import evidence
from stillroom.guard.detector import CLAIMS, NEGATIVE, Null, Plan
from stillroom.guard.registration import Registered

INNOCENT: dict[Null, tuple[str, ...]] = {
    "key": (
        "Your training data had public pages on which others had put this teacher's answers. Look for them; ask which keys were live before your data ends: "
        "a key that was used only later must show nothing.",
        "You bought or licensed data from somebody who had used this teacher within its terms.",
        "Your model was shown text with the mark while it was tested, and repeated it. Look whether passages from the questions were left out of the score.",
        "The key was chosen, out of many, to fit your model as it already was. If a hash of its commitment was held before your model was trained, it could "
        "only be chosen to fit a predecessor.",
    ),
    "coin": (
        "Your training data had public pages on which somebody had put the very answers that were served.",
        "You bought or licensed data from somebody to whom those answers were served.",
        "The log was written after your model was asked. It could not be if a hash of it was held before.",
    ),
    "code": (
        "Your training data had public pages on which somebody had put these answers: search for the questions, and for the codes beside them.",
        "You bought or licensed data from somebody to whom those answers were served.",
        "Your model, or a tool that it used, read the codes while it was tested, in a search result or in an earlier conversation.",
        "The key was tried until the codes were what your model answers anyway. If a hash of the commitment was held before your model was trained, they could "
        "only be tried on a predecessor; if the codes depend on a public random number that came later, on none: look the number up.",
    ),
}


def listing(path: Path, *, held: Sequence[str] = (), tests: Mapping[str, evidence.Recomputed] = evidence.RECOMPUTED) -> str:
    """The listing for the bundle at `path`, in Markdown. Raises GuardError 'guard-evidence' where its files are not as they were written."""
    bundle = evidence.opened(path)
    found = evidence.verify(path, held=held, tests=tests)
    lines = ["# What you can check", "", f"Bundle {found.bundle_sha256}.", ""]
    lines += ["## What does not hold", "", *(f"- {failure}" for failure in found.failures), ""] if found.failures else []
    lines += _fixed_before(bundle.registered, found)
    for name, plan in bundle.registered.plans.items():
        lines += _of_test(name, plan, bundle, tests)
    lines += _beyond(bundle.registered)
    return "\n".join(lines)


def _fixed_before(registered: Registered, found: evidence.Verification) -> list[str]:
    rows = [
        f"| {entry['time']} | {entry['kind']} {entry.get('name', '')} | {entry_hash} |"
        for entry, entry_hash in zip(registered.entries, registered.hashes, strict=True)
    ]
    return [
        "## What was fixed before",
        "",
        "The times are the owner's word, unless somebody else got one of these hashes at the time: ask who, and ask them. A hash covers the lines above it.",
        "",
        "| time | what | hash |",
        "|---|---|---|",
        *rows,
        "",
        *(f"- {note}" for note in found.notes),
        "",
    ]


def _of_test(name: str, plan: Plan, bundle: evidence.Opened, tests: Mapping[str, evidence.Recomputed]) -> list[str]:
    result, rejected = bundle.results["findings"].get(name), bundle.results["family"].get("rejected")
    known: Json = result if isinstance(result, dict) else {}
    verdict = "rejected" if isinstance(rejected, list) and name in rejected else "not rejected"
    told = f"no p: {known['refused']}" if known.get("refused") else f"ln p = {known.get('log_p')}; of all tests together, it is {verdict}"
    files = [f"- `data/{name}/{file}`: {len(data):,} bytes, SHA-256 {sha256_hex(data)}" for file, data in bundle.data(name).items()]
    again = tests[plan.test].again if plan.test in tests else "This version of Stillroom does not know the test."
    return [
        f"## {name}",
        "",
        f"Test {plan.test}, settings {canonical_json(plan.settings).decode()}, fixed in advance: {canonical_json(plan.scope).decode()}. It is said: {told}.",
        "",
        f"Null: {CLAIMS[plan.null].null}",
        "",
        "Recomputed from the bundle by `stillroom guard verify`, without the teacher: that the secrets are those committed to, the statistic, p, the calibration's counts. "
        "It follows from these files:",
        "",
        *(files or ["- none"]),
        "",
        f"Not in the bundle, and only your model can show it: that the answers are its. {again} Then `stillroom.guard.evidence.rerun` gives the finding for yours.",
        "",
        "Innocent explanations, which the test cannot exclude:",
        "",
        *(f"- {explanation}" for explanation in INNOCENT[plan.null]),
        f"- It would not even then prove: {CLAIMS[plan.null].does_not_prove}",
        "",
    ]


def _beyond(registered: Registered) -> list[str]:
    return [
        "## What to ask",
        "",
        f"- Were these {len(registered.plans)} tests all that were tried? Only a seal that somebody else held shows it; another registration of the same owner would tell.",
        "- A p of 10^-k costs 10^k trials to make up, by who may choose secrets and has your model or one that behaves as it does. Where no hash was held and no "
        "public random number is in the secrets, ask for a p that is out of anybody's reach.",
        "- Were the students of the calibration like your model: its size, its training data, its base? The exact tests do not need it; scores do.",
        f"- {NEGATIVE}",
        "",
    ]
