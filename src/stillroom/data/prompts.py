"""Prompts, from JSON lines, Parquet or a `datasets` id: read strictly, told apart by content.

A row has `prompt`, a text, or `messages`, the turns of a conversation [{role, content}, ...]; and may have `answer`, the right answer, and `family`,
what it is reported under. Other columns are passed over.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.core import optional
from stillroom.core.errors import DataError
from stillroom.core.hashing import canonical_json, sha256_file, sha256_hex

Role: TypeAlias = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
COLUMNS = ("prompt", "messages", "answer", "family")

_EXPECTED = "rows with `prompt` (a text) or `messages` (a list of {role, content}), and if wanted `answer` and `family` (texts)"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a teacher is asked: a text or a conversation, exactly one of the two.

    `id` is a digest of that content alone, wherever the row stood and whatever its answer. A conversation that ends with an assistant's turn holds
    its own answer.
    """

    id: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    answer: str | None = None
    family: str | None = None

    @classmethod
    def of(cls, content: str | tuple[Message, ...], *, answer: str | None = None, family: str | None = None) -> Prompt:
        """The prompt with this content, under its id."""
        if isinstance(content, str):
            return cls(id=sha256_hex(canonical_json({"prompt": content})), text=content, answer=answer, family=family)
        turns = [{"role": message.role, "content": message.content} for message in content]
        return cls(id=sha256_hex(canonical_json({"messages": turns})), messages=content, answer=answer, family=family)

    @property
    def content(self) -> str:
        """The text, or the conversation as canonical JSON: what a ledger commits to."""
        if self.text is not None:
            return self.text
        return canonical_json([{"role": message.role, "content": message.content} for message in self.messages or ()]).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPrompts:
    """Distinct prompts in the order in which they first appear.

    `rows` were read, of which `duplicates` had the content of an earlier one and were dropped; of those `conflicts` gave another answer than it.
    `source` is the file's name or the dataset's id, `source_sha256` the file's digest.
    """

    prompts: tuple[Prompt, ...]
    rows: int
    duplicates: int
    conflicts: int
    source: str
    source_sha256: str | None

    @property
    def sha256(self) -> str:
        """The identity of the prompts and answers, in order, wherever they came from."""
        return sha256_hex(canonical_json([[prompt.id, prompt.answer] for prompt in self.prompts]))


def load_prompts(path: str | Path | None = None, *, dataset: str | None = None, split: str = "train", limit: int | None = None) -> LoadedPrompts:
    """The prompts of a file (.jsonl, .ndjson, .json with one object a line, .parquet) or of one `split` of a dataset: exactly one of the two.

    With `limit`, reading stops at so many distinct prompts; what follows is not looked at. Raises DataError 'prompts-missing', 'prompts-empty',
    'prompts-invalid' (naming file and line or row), StillroomError 'missing-extra' where a dataset is asked for and `datasets` is not installed.
    """
    if (path is None) == (dataset is None):
        raise ValueError("give exactly one of path and dataset")
    if dataset is not None:
        return _distinct(_dataset_rows(dataset, split), limit, source=dataset, sha256=None)
    assert path is not None
    file = Path(path).expanduser()
    try:
        digest = sha256_file(file)
    except OSError as error:
        raise _missing(f"{file}: {error.strerror}", "Check the path.") from error
    return _distinct(_reader(file)(file), limit, source=file.name, sha256=digest)


def _distinct(rows: Iterable[tuple[str, Any]], limit: int | None, *, source: str, sha256: str | None) -> LoadedPrompts:
    found: dict[str, Prompt] = {}
    read = duplicates = conflicts = 0
    for where, row in rows:
        if limit is not None and len(found) >= limit:
            break
        read += 1
        prompt = read_row(row, where)
        first = found.setdefault(prompt.id, prompt)
        if first is not prompt:
            duplicates += 1
            conflicts += prompt.answer != first.answer
    if not found:
        raise DataError("prompts-empty", found=f"no rows in {source}", expected="at least one row", do="Put prompts there, or name another source.")
    return LoadedPrompts(prompts=tuple(found.values()), rows=read, duplicates=duplicates, conflicts=conflicts, source=source, source_sha256=sha256)


# --- rows of each kind of source: where a row stands, and the row -------------------------------------------------------------------------


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows
    if suffix in _JSON_SUFFIXES:
        return _json_rows
    raise _invalid(str(path), f"is of an unknown kind, `{suffix or 'no suffix'}`", expected="a .jsonl or .parquet file")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            text = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where)
            if not text.strip():
                continue
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                if number == 1 and text.strip() == "[":
                    raise _invalid(where, "begins a JSON array", expected="one JSON object on each line") from error
                raise _invalid(where, f"is not JSON: {error}", expected="one JSON object on each line") from error


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        utf_16 = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "is UTF-16" if utf_16 else f"is not UTF-8: {error.reason} at byte {error.start + 1} of the line"
        raise _invalid(where, found, expected="UTF-8") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in COLUMNS if name in names]
            _require_columns(names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # Arrow's own errors are of all these kinds
        first = next(iter(str(error).splitlines()), "")
        raise _invalid(str(path), f"cannot be read as Parquet after row {number}: {first}", expected="a Parquet file") from error


def _dataset_rows(dataset: str, split: str) -> Iterator[tuple[str, Any]]:
    datasets = optional.load("datasets", extra="train")
    try:
        loaded = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # third-party code over a network and a user's names: whatever it raises is said of them
        first = next(iter(str(error).splitlines()), "")
        raise _missing(
            f"dataset {dataset}, split {split}: {type(error).__name__}: {first}",
            "Check the id and the split; behind a firewall, download the data and name the file under prompts.path.",
        ) from error
    _require_columns(loaded.column_names, f"dataset {dataset}")
    for number, row in enumerate(loaded.select_columns([name for name in COLUMNS if name in loaded.column_names]), start=1):
        yield f"dataset {dataset} row {number}", row


def _require_columns(names: Iterable[str], where: str) -> None:
    there = list(names)
    if "prompt" not in there and "messages" not in there:
        raise _invalid(where, f"has columns {', '.join(there) or 'none'}")


# --- one row ------------------------------------------------------------------------------------------------------------------------------


def read_row(row: Any, where: str) -> Prompt:
    """The prompt that an object of `prompt` or `messages` says; `where` it stood, for the message of DataError 'prompts-invalid'."""
    if not isinstance(row, dict):
        raise _invalid(where, f"is {_kind(row)}, not an object")
    text, messages = row.get("prompt"), row.get("messages")
    if text is None and messages is None:
        raise _invalid(where, f"has neither `prompt` nor `messages`; it has {', '.join(map(str, row)) or 'nothing'}")
    if text is not None and messages is not None:
        raise _invalid(where, "has both `prompt` and `messages`", expected="one of them")
    answer, family = (None if row.get(name) is None else _text(row[name], name, where) for name in ("answer", "family"))
    content = _text(text, "prompt", where) if text is not None else _messages(messages, where)
    return Prompt.of(content, answer=answer, family=family)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _invalid(where, f"has `messages` that are {'empty' if value == [] else _kind(value)}", expected="a list of {role, content}")
    messages = tuple(_message(turn, f"messages[{index}]", where) for index, turn in enumerate(value))
    if any(message.role == "system" for message in messages[1:]):
        raise _invalid(where, "has a system turn after the first turn", expected="system first or not at all")
    if messages[-1].role == "system":
        raise _invalid(where, "has a system turn only", expected="a user's turn")
    return messages


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _invalid(where, f"has `{name}` that is {_kind(turn)}", expected="an object {role, content}")
    role = turn.get("role")
    if role not in ROLES:
        raise _invalid(where, f"has `{name}` with the role {role!r:.60}", expected=f"one of {', '.join(ROLES)}")
    return Message(cast(Role, role), _text(turn.get("content"), f"{name}.content", where))


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise _invalid(where, f"has `{name}` that is {_kind(value)}", expected="a text")
    if not value.strip():
        raise _invalid(where, f"has `{name}` that is empty", expected="a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _invalid(where, f"has `{name}` with half a surrogate pair at character {error.start + 1}", expected="Unicode text") from error
    return value


_KINDS = {"NoneType": "null", "bool": "a boolean", "int": "a number", "float": "a number", "str": "a text", "list": "a list", "dict": "an object"}


def _kind(value: Any) -> str:
    name = type(value).__name__
    return _KINDS.get(name, f"a {name}")


def _invalid(where: str, what: str, *, expected: str = _EXPECTED) -> DataError:
    return DataError("prompts-invalid", found=f"{where} {what}", expected=expected, do="Mend it there, or name another source.")


def _missing(found: str, do: str) -> DataError:
    return DataError("prompts-missing", found=found, expected="a readable file or dataset", do=do)
