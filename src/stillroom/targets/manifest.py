"""What a target store says of itself: what its targets are, where they came from, and the checksum of every file.

The file is JSON with sorted keys and two spaces of indentation, so that it has one text for one content; its last check is its own `sha256`, over the
canonical JSON (RFC 8785) of everything else. docs/reference/target-store.md describes every field.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import ModelRef, Sampling
from stillroom.targets.codecs import Codec, CodecError, DrawnCodec, bytes_per_row, codec_from, describe

FORMAT = "stillroom target store"
SCHEMA = 2
ROW_CONVENTION = "row t is the distribution after token t: it predicts token t + 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """What every target of a store depends on; two stores with the same identity hold the same numbers for the same tokens.

    `vocabulary` is the fingerprint, `vocabulary_size` its number of real tokens; `chat_template_sha256` None where there is no template;
    `temperature` the one that targets are made at; `generation` how the teacher's answers were drawn; `arithmetic` what the teacher computed in: float32,
    bfloat16, or int8, which is bfloat16 with linear layers kept in eight bits.
    """

    teacher: ModelRef
    vocabulary: str
    vocabulary_size: int
    chat_template_sha256: str | None
    codec: Codec
    temperature: float
    generation: Sampling
    arithmetic: str = "float32"

    def differences(self, other: StoreIdentity) -> list[str]:
        """What differs, a line each: field, what `self` has, what `other` has. A teacher with the same weights is the same wherever it lies."""
        mine, theirs = _identity_json(self), _identity_json(other)
        if self.teacher.weights_sha256 is not None and self.teacher.weights_sha256 == other.teacher.weights_sha256:
            mine["teacher"] = theirs["teacher"] = {}
        flat_mine, flat_theirs = _flat(mine), _flat(theirs)
        names = [*flat_mine, *(name for name in flat_theirs if name not in flat_mine)]
        pairs = ((name, flat_mine.get(name, "absent"), flat_theirs.get(name, "absent")) for name in names)
        return [f"{name}: {here!r} here, {there!r} asked for" for name, here, there in pairs if here != there]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the store, by its path within the store."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry(FileEntry):
    """A shard's targets, its index, and how much it holds."""

    index: FileEntry
    records: int
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadEntry:
    """The teacher's head: its arrays as .npy files (bfloat16 as uint16), and the plain numbers of `TeacherHead`."""

    weight: FileEntry
    bias: FileEntry | None
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything in manifest.json."""

    identity: StoreIdentity
    head: HeadEntry | None = None
    prior: FileEntry | None = None
    codec_error: CodecError | None = None
    shards: tuple[ShardEntry, ...] = ()

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file but the manifest."""
        once = (None if self.head is None else self.head.weight, None if self.head is None else self.head.bias, self.prior)
        return (*(entry for entry in once if entry is not None), *(entry for shard in self.shards for entry in (shard, shard.index)))

    @property
    def bytes_per_row(self) -> float | None:
        """Bytes of targets for each scored row. Of drawn targets as measured, with tokens, indices and prior; None before there is a row."""
        if not isinstance(self.identity.codec, DrawnCodec):
            return bytes_per_row(self.identity.codec)
        return sum(entry.bytes for entry in self.files) / self.rows if self.rows else None

    @property
    def sha256(self) -> str:
        """Identity of the store's whole content: it covers the checksum of every file."""
        return sha256_hex(canonical_json(self._body()))

    def to_bytes(self) -> bytes:
        """The text of manifest.json."""
        return _text(self._body() | {"sha256": self.sha256})

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "row_convention": ROW_CONVENTION,
            **_identity_json(self.identity),
            "bytes_per_row": self.bytes_per_row,
            "codec_error": None if self.codec_error is None else asdict(self.codec_error),
            "head": None if self.head is None else asdict(self.head),
            "prior": None if self.prior is None else asdict(self.prior),
            "shards": [asdict(shard) for shard in self.shards],
            "records": self.records,
            "rows": self.rows,
            "tokens": self.tokens,
        }


def manifest_from_bytes(data: bytes) -> Manifest:
    """Reads manifest.json. Raises ValueError, saying what is wrong, if a single byte is not as `Manifest.to_bytes` wrote it."""
    tree = _tree(data)
    if tree.get("format") != FORMAT:
        raise ValueError(f"is not the manifest of a target store (format {tree.get('format')!r})")
    if tree.get("schema") != SCHEMA:
        raise ValueError(f"has schema {tree.get('schema')!r}, this version of Stillroom reads schema {SCHEMA}")
    stated = tree.get("sha256")
    body = {name: value for name, value in tree.items() if name != "sha256"}
    actual = sha256_hex(canonical_json(body))
    if stated != actual:
        raise ValueError(f"does not match its own checksum: it states {stated}, its content gives {actual}")
    try:
        manifest = _manifest(tree)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"lacks or misstates a field: {error}") from error
    if manifest.to_bytes() != data:
        raise ValueError("is not written as a manifest is written, though its values are whole")
    return manifest


def _tree(data: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"holds {type(tree).__name__}, not a mapping")
    return tree


def _text(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, allow_nan=False, sort_keys=True, indent=2) + "\n").encode()


def _identity_json(identity: StoreIdentity) -> dict[str, Any]:
    return {
        "teacher": asdict(identity.teacher),
        "vocabulary": {"fingerprint": identity.vocabulary, "size": identity.vocabulary_size},
        "chat_template_sha256": identity.chat_template_sha256,
        "codec": describe(identity.codec),
        "target_temperature": identity.temperature,
        "generation": asdict(identity.generation),
        "arithmetic": identity.arithmetic,
    }


def _manifest(tree: dict[str, Any]) -> Manifest:
    identity = StoreIdentity(
        teacher=ModelRef(**tree["teacher"]),
        vocabulary=tree["vocabulary"]["fingerprint"],
        vocabulary_size=tree["vocabulary"]["size"],
        chat_template_sha256=tree["chat_template_sha256"],
        codec=codec_from(tree["codec"]),
        temperature=tree["target_temperature"],
        generation=Sampling(**tree["generation"]),
        arithmetic=tree["arithmetic"],
    )
    return Manifest(
        identity=identity,
        head=None if tree["head"] is None else _head(tree["head"]),
        prior=None if tree["prior"] is None else FileEntry(**tree["prior"]),
        codec_error=None if tree["codec_error"] is None else CodecError(**tree["codec_error"]),
        shards=tuple(ShardEntry(**{**shard, "index": FileEntry(**shard["index"])}) for shard in tree["shards"]),
    )


def _head(tree: dict[str, Any]) -> HeadEntry:
    bias = None if tree["bias"] is None else FileEntry(**tree["bias"])
    return HeadEntry(weight=FileEntry(**tree["weight"]), bias=bias, scale=tree["scale"], softcap=tree["softcap"])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
