"""Records of terms: what one instrument (a licence, a service's terms, a policy, a dataset's card) says, clause by clause, in our own words.

A catalogue file is YAML with some of these lists:

    records         what instruments say (`Record`)
    models          which instruments a model or dataset comes under, and what it was made from (`Subject`)
    authorisations  written permissions (`Authorisation`); only in a user's own files

docs/reference/terms.md documents every field. Records are versioned data: what is true of a text on a date is never edited, a new version gets a new
record. Paraphrases are ours; texts of services' terms are not kept here.
"""

from __future__ import annotations

import re
from datetime import date
from functools import cached_property
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.entitlement.facts import FACTS, Condition, check_condition

Grade: TypeAlias = Literal["P1", "P2", "S", "M"]
GRADES: dict[Grade, str] = {
    "P1": "the text itself was read",
    "P2": "the text was read in part, or in somebody's copy",
    "S": "somebody's description of the text was read",
    "M": "from memory, not looked up",
}
Effect: TypeAlias = Literal["permit", "prohibit", "oblige", "silent"]
Action: TypeAlias = Literal[
    "generate-for-training",
    "train-on-output",
    "train-competing",
    "use-logits",
    "init-from-weights",
    "publish-dataset",
    "distribute-student",
    "serve-student",
    "commercial-use",
    "evaluate-only",
]
DutyKind: TypeAlias = Literal[
    "name-prefix",
    "display",
    "notice-file",
    "licence-copy",
    "flow-down-restrictions",
    "change-notice",
    "non-commercial",
    "attribution",
    "no-distribution",
    "share-alike",
    "policy",
    "exclude-data",
    "other",
]
Access: TypeAlias = Literal["weights", "api", "host", "consumer", "dataset"]
Kind: TypeAlias = Literal["licence", "service-terms", "policy", "host-terms", "dataset-terms"]

_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*@\d{4}(-\d{2}-\d{2})?")
_FAMILY = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MOST_WORDS = 60


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Evidence(_Part):
    """How well a statement is founded: `grade` (GRADES), where it was read, and by whom and when."""

    grade: Grade
    source: str = Field(min_length=4)
    reviewed: date | None = None


class Duty(_Part):
    """What the student must carry. `text` is the exact string where there is one (a prefix, a line to show); `flows_to` is who carries it."""

    kind: DutyKind
    text: str | None = None
    flows_to: tuple[Literal["student-weights", "service", "documentation", "licence", "dataset", "maker"], ...] = ("student-weights",)

    @model_validator(mode="after")
    def _has_its_text(self) -> Duty:
        if self.kind in ("name-prefix", "display") and not self.text:
            raise ValueError(f"a duty of kind {self.kind} needs its exact `text`")
        return self


class Clause(_Part):
    """One clause: its effect on some actions when a condition holds, unless another does.

    `actions` and `when` are both needed: a clause bears on a use that includes one of its actions and of which `when` holds.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    locator: str = Field(min_length=1)
    effect: Effect
    actions: tuple[Action, ...] = Field(min_length=1)
    when: dict[str, Any] = Field(default_factory=dict)
    unless: dict[str, Any] | None = None
    duty: Duty | None = None
    paraphrase: str = Field(min_length=10)
    evidence: Evidence | None = None
    """Where it differs from the record's."""

    @field_validator("when", "unless")
    @classmethod
    def _condition(cls, value: Condition | None) -> Condition | None:
        if value is not None:
            check_condition(value)
        return value

    @field_validator("paraphrase")
    @classmethod
    def _short(cls, value: str) -> str:
        if len(value.split()) > _MOST_WORDS:
            raise ValueError(f"a paraphrase has at most {_MOST_WORDS} words, and this one {len(value.split())}")
        return " ".join(value.split())

    @model_validator(mode="after")
    def _duty_where_it_obliges(self) -> Clause:
        if (self.effect == "oblige") != (self.duty is not None):
            raise ValueError("a clause that obliges has a `duty`, and no other has")
        return self


class AppliesTo(_Part):
    """What an instrument covers. `providers` are whose service or model it is; `hosts` the names of a host; `licences` the ids that declare it."""

    access: tuple[Access, ...] = Field(min_length=1)
    providers: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


class Record(_Part):
    """One version of one instrument."""

    id: str
    """family@date: the family is the same for all versions of an instrument."""
    kind: Kind
    provider: str
    title: str
    effective: date
    superseded: date | None = None
    """The first day on which it was no longer in force, where a later version is known."""
    url: str = Field(min_length=8)
    variant: str | None = None
    """For whom this version is, where there are several: EEA, ROW."""
    spdx: str | None = None
    fixed: bool = False
    """A text that its version names and that never changes, as Apache-2.0. Otherwise it can be changed under its address."""
    text_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    review_by: date | None = None
    applies_to: AppliesTo
    incorporates: tuple[str, ...] = ()
    """Families of instruments that this one makes part of itself."""
    clauses: tuple[Clause, ...] = Field(min_length=1)
    evidence: Evidence
    flags: tuple[Literal["contested-provenance", "unilateral-change", "undefined-terms", "territorial", "under-reports"], ...] = ()
    notes: str = ""

    @field_validator("id")
    @classmethod
    def _named(cls, value: str) -> str:
        if not _ID.fullmatch(value):
            raise ValueError(f"an id is family@YYYY-MM-DD (or family@YYYY), in lower case, not {value!r}")
        return value

    @field_validator("incorporates")
    @classmethod
    def _families(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _FAMILY.fullmatch(name):
                raise ValueError(f"`incorporates` names families, without a date, not {name!r}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Record:
        if self.fixed == (self.review_by is not None):
            raise ValueError("a record has `fixed: true` or a `review_by` date, one of the two")
        ids = [clause.id for clause in self.clauses]
        if len(set(ids)) != len(ids):
            raise ValueError(f"clause ids must differ: {', '.join(ids)}")
        return self

    @property
    def family(self) -> str:
        return self.id.partition("@")[0]

    @cached_property
    def sha256(self) -> str:
        """Digest of the record itself: what a verdict and a ledger entry refer to."""
        return sha256_hex(canonical_json(self.model_dump(mode="json")))

    def evidence_of(self, clause: Clause) -> Evidence:
        """The clause's own evidence, or the record's."""
        return clause.evidence or self.evidence


class Subject(_Part):
    """A model or dataset as the catalogue knows it: names it goes by, instruments it comes under, and what it was made from."""

    names: tuple[str, ...] = Field(min_length=1)
    """Hub ids or service model names, lower case, with * for any characters: meta-llama/llama-3.1-*."""
    provider: str
    what: Literal["model", "dataset"] = "model"
    instruments: tuple[str, ...] = ()
    """Families of the records that its weights (or rows) come under; all of them."""
    made_from: tuple[str, ...] = ()
    """Names of models and datasets whose outputs it was trained on, as far as known: teachers of the teacher."""
    parameters: float | None = None
    """Of the largest, in units, for suggesting teachers of similar size."""
    suggest: str | None = None
    """The hub id to suggest, where it is a teacher that can be recommended for its terms."""
    evidence: Evidence
    flags: tuple[Literal["contested-provenance", "under-reports"], ...] = ()
    notes: str = ""

    @field_validator("names")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(name != name.lower() for name in value):
            raise ValueError("names are written in lower case")
        return value


class Authorisation(_Part):
    """A written permission: what it lifts, for whom, from when to when, and the document that shows it.

    `document` is a path relative to the file; its digest must be `document_sha256`, or the permission counts for nothing.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    grantor: str = Field(min_length=2)
    holder: str = Field(min_length=2)
    instruments: tuple[str, ...] = Field(min_length=1)
    actions: tuple[Action, ...] = Field(min_length=1)
    models: tuple[str, ...] = ("*",)
    granted: date
    expires: date
    scope: dict[str, Any] = Field(default_factory=dict)
    document: str
    document_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    conditions: tuple[str, ...] = ()
    """What it asks in return."""

    @field_validator("scope")
    @classmethod
    def _condition(cls, value: Condition) -> Condition:
        check_condition(value)
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Authorisation:
        if self.expires < self.granted:
            raise ValueError("it expires before it was granted")
        return self


class Alias(_Part):
    """Names in use for one licence family: ids of the Hugging Face hub, SPDX, ScanCode LicenseDB, common spellings."""

    family: str
    names: tuple[str, ...] = Field(min_length=1)


class HouseRule(_Part):
    """A fact that is taken to hold where others do, because instruments leave it undefined. A rule can only be stricter: none makes a fact untrue."""

    fact: str
    value: Literal[True]
    when: dict[str, Any]
    why: str

    @field_validator("fact")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if value not in FACTS:
            raise ValueError(f"{value!r} is not a fact; the facts are {', '.join(FACTS)}")
        if FACTS[value].kind != "flag":
            raise ValueError(f"a rule settles a fact that is true or false, and {value} is not")
        return value

    @field_validator("when")
    @classmethod
    def _condition(cls, value: Condition) -> Condition:
        check_condition(value)
        return value


class CatalogueFile(_Part):
    """The content of one catalogue file."""

    records: tuple[Record, ...] = ()
    models: tuple[Subject, ...] = ()
    aliases: tuple[Alias, ...] = ()
    house_rules: tuple[HouseRule, ...] = ()
    authorisations: tuple[Authorisation, ...] = ()
