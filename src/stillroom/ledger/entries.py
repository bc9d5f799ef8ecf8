"""What a ledger entry says: schema version 1, fixed for good.

`ledger.jsonl` has one line per record and stage, each `{"entry": {...}, "hash": "..."}` in canonical JSON (RFC 8785), so that a line has one
spelling. All digests are SHA-256 in 64 lower-case hexadecimal digits. `hash` is SHA-256(0x00 || canonical JSON of `entry`): the leaf hash of
RFC 6962 section 2.1, so the lines as they are become the leaves of a Merkle tree, and a signature over (number of leaves, root) or over the last
hash signs the ledger.

In every entry:

    version    1
    sequence   position of the line in the file, from 0
    previous   hash of the entry before; 64 zeros in the first
    time       when the entry was written, ISO 8601 in UTC to the millisecond
    stage      "collect" | "freeze" | "train"
    record     commitment to the record's id (see below); the same in all stages of a record

In a "collect" entry, what was learned from whom:

    prompt         commitment to the prompt: its text in UTF-8; chat messages as canonical JSON
    output         commitment to what the teacher wrote, likewise
    prompt_source  {name, sha256}: the file (its name and digest) or the dataset (its id; sha256 null)
    signal         "text" | "drawn" | "top_k" | "hidden" | "full": what was taken of the teacher's distributions
    teacher        {kind, source, revision, weights_sha256, licence}: fields of ModelRef, of a directory only its last name; what is not known is null
    sampling       {temperature, top_p, max_new_tokens, seed}; top_p null where it was not limited, seed as decimal digits in a text
    access         {path: "local" | "self-hosted" | "api", endpoint, account}: how the teacher was reached; account is a pseudonym
    response       null, or what an endpoint said of itself: {model, id, fingerprint}
    tokens         {prompt, output, reasoning}; reasoning null where the teacher does not tell
    terms          digests of the records of terms that were asked, sorted
    decision       digest of the entitlement verdict

In a "freeze" entry: `collected`, the hash of the record's collect entry; `kept`, whether the transfer set has it; `reason`, why not, else null.
In a "train" entry: `collected`, likewise. It says that a training step consumed the record.

**Salts.** A digest of a short text can be guessed by trying texts. So `record`, `prompt` and `output` are commitments, SHA-256(salt || bytes), and
each salt is HMAC-SHA256(secret of the run, "<field>:<record id>"). The secret is in `ledger.secret`, which only its owner can read and **which is
never to be published**; neither are salts in the ledger. To prove what one commitment stands for, disclose its salt and the text: no other field of
that entry, and no other entry, can be guessed from it. Record ids (targets.store.record_id) are digests without a salt: do not publish them where
texts are secret.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

from stillroom.core.identities import Json, ModelRef, Sampling

VERSION = 1
GENESIS = "0" * 64

Stage: TypeAlias = Literal["collect", "freeze", "train"]
Field: TypeAlias = Literal["record", "prompt", "output"]

COMMON_FIELDS = frozenset({"version", "sequence", "previous", "time", "stage", "record"})
STAGE_FIELDS: dict[str, frozenset[str]] = {
    "collect": frozenset(
        {"prompt", "output", "prompt_source", "signal", "teacher", "sampling", "access", "response", "tokens", "terms", "decision"},
    ),
    "freeze": frozenset({"collected", "kept", "reason"}),
    "train": frozenset({"collected"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """Where a prompt came from: a file's name and digest, or a dataset's id and None."""

    name: str
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How the teacher was reached. `account` is a pseudonym, never a name or a key."""

    path: Literal["local", "self-hosted", "api"] = "local"
    endpoint: str | None = None
    account: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What an endpoint said of itself when it answered."""

    model: str | None
    id: str | None
    fingerprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What is the same for all records of one collection."""

    teacher: ModelRef
    sampling: Sampling
    prompt_source: PromptSource
    signal: Literal["text", "drawn", "top_k", "hidden", "full"]
    terms: tuple[str, ...]
    decision: str
    access: Access = Access()
    top_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A record came into being: the teacher answered, or its distributions over given answers were taken."""

    record_id: str
    prompt: str
    output: str
    prompt_tokens: int
    output_tokens: int
    circumstances: Circumstances
    response: Response | None = None
    reasoning_tokens: int | None = None
    stage: Literal["collect"] = "collect"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A record was let into the transfer set, or kept out for a reason."""

    record_id: str
    reason: str | None = None
    stage: Literal["freeze"] = "freeze"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A training step consumed a record."""

    record_id: str
    stage: Literal["train"] = "train"


Entry: TypeAlias = Collected | Frozen | Trained


def derive_salt(secret: bytes, field: str, record_id: str) -> bytes:
    """The salt (32 bytes) of one commitment."""
    return hmac.digest(secret, f"{field}:{record_id}".encode(), "sha256")


def commitment(salt: bytes, content: str) -> str:
    """SHA-256(salt || UTF-8 of `content`): what anyone computes to check a salt and a text that were disclosed to them."""
    return hashlib.sha256(salt + content.encode()).hexdigest()


def leaf_hash(entry_json: bytes) -> str:
    """The hash of an entry, given its canonical JSON."""
    return hashlib.sha256(b"\x00" + entry_json).hexdigest()


@lru_cache(maxsize=16)
def shared_facts(circumstances: Circumstances) -> Json:
    """The fields of a collect entry that are the same for all records of a collection; the dict is shared and not to be changed."""
    teacher, sampling = circumstances.teacher, circumstances.sampling
    return {
        "prompt_source": asdict(circumstances.prompt_source),
        "signal": circumstances.signal,
        "teacher": {
            "kind": teacher.kind,
            # A path names its owner's home; the digest of the weights is what identifies a local model.
            "source": Path(teacher.source).name if teacher.kind == "directory" else teacher.source,
            "revision": teacher.revision,
            "weights_sha256": teacher.weights_sha256,
            "licence": teacher.licence,
        },
        "sampling": {
            "temperature": _plain(sampling.temperature),
            "top_p": None if circumstances.top_p is None else _plain(circumstances.top_p),
            "max_new_tokens": sampling.max_new_tokens,
            # A user's seed may be larger than a JSON number holds.
            "seed": str(sampling.seed),
        },
        "access": asdict(circumstances.access),
        "terms": sorted(circumstances.terms),
        "decision": circumstances.decision,
    }


def record_facts(entry: Collected, commit: Callable[[Field, str], str]) -> Json:
    """The other fields of a collect entry, `record` aside; `commit(field, content)` makes its commitments."""
    return {
        "prompt": commit("prompt", entry.prompt),
        "output": commit("output", entry.output),
        "response": None if entry.response is None else asdict(entry.response),
        "tokens": {"prompt": entry.prompt_tokens, "output": entry.output_tokens, "reasoning": entry.reasoning_tokens},
    }


def _plain(number: float) -> float | int:
    """The same JSON number, as an int where it is one: 1.0 and 1 are both written 1, and of ints the encoder knows that without looking."""
    return int(number) if float(number).is_integer() else number
