"""Answers that were bought or written before: files of other systems as prompts with answers, for `prompts.answers: given`.

    completions   stored chat completions: an object with `choices`, and what was asked in `messages`, `input` or `request.messages`
    fine-tuning   {"messages": [...]}, the last turn being the assistant's; also with `weight` on assistant turns
    pairs         prompt and answer in two columns: `prompt` or `input` or `question` or `instruction`, and `completion` or `response` or `answer` or `output`

Each as JSON lines or Parquet; the form is recognised row by row. Content may be a text or a list of text parts, as OpenAI and Bedrock write it. A row
that cannot be a prompt with an answer is rejected for one of `REJECTIONS`, and what is not JSON at all as well: nothing is passed over in silence.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.core import durable
from stillroom.core.errors import DataError, ResourceError
from stillroom.core.hashing import sha256_file
from stillroom.core.identities import Json
from stillroom.data.prompts import Prompt, read_row
from stillroom.data.words import shortened

RejectionReason: TypeAlias = Literal[
    "not-json",
    "not-an-object",
    "unknown-form",
    "no-question",
    "no-answer",
    "refused",
    "cut-off",
    "tools",
    "not-text",
    "weight",
    "invalid",
    "duplicate",
]
REJECTIONS: dict[RejectionReason, str] = {
    "not-json": "the line is not JSON in UTF-8",
    "not-an-object": "the row is JSON, and not an object",
    "unknown-form": "it has neither choices, nor messages, nor a pair of columns that are known",
    "no-question": "there is an answer and nothing that was asked",
    "no-answer": "what was asked has no answer, or an empty one",
    "refused": "the endpoint marked the answer as a refusal",
    "cut-off": "the finish reason says that the answer was cut off or filtered",
    "tools": "it uses tools or functions, which a text student cannot learn",
    "not-text": "a turn has an image, audio or a file in it",
    "weight": "an assistant turn has weight 0: the last one is not to be learned, or one before it is and Stillroom would score it",
    "invalid": "a turn is not a turn, or a text is not Unicode",
    "duplicate": "the same was asked in an earlier row, whose answer is kept",
}

_QUESTIONS = ("prompt", "input", "question", "instruction", "inputs")
_ANSWERS = ("completion", "response", "answer", "output", "target")
_CUT_OFF = frozenset({"length", "max_tokens", "content_filter"})
_TOOLS = ("tool_calls", "function_call", "tools", "functions", "tool_call_id")
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an imported answer came from: the file's digest, the row's number (from 1), and what the row says of who answered; None: it does not say."""

    file_sha256: str
    row: int
    form: str
    model: str | None = None
    fingerprint: str | None = None
    created: int | None = None
    finish_reason: str | None = None
    response_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A prompt with its answer in `answer`, and where it came from."""

    prompt: Prompt
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that is no prompt with an answer: its number, why, and what shows it. Of several choices the first is the answer; the others are passed over."""

    row: int
    reason: RejectionReason
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCounts:
    """What became of a file's rows: rows = imported + all rejected."""

    source: str
    source_sha256: str
    rows: int
    imported: int
    rejected: dict[RejectionReason, int]


def read_answers(path: Path) -> Iterator[Imported | Rejected]:
    """Every row of a .jsonl, .ndjson, .json (an object a line) or .parquet file, in order, as one or the other; one row is in memory at a time.

    Of rows that ask the same, the first that has an answer is kept. Raises DataError 'prompts-missing' where the file cannot be read,
    'prompts-invalid' where it is of another kind.
    """
    file = path.expanduser()
    try:
        digest = sha256_file(file)
    except OSError as error:
        raise DataError("prompts-missing", found=f"{file}: {error.strerror}", expected="a file that can be read", do="Check the path.") from error
    return _told_apart(_rows(file), digest)


def import_answers(path: Path, to: Path, *, rejected_to: Path | None = None) -> ImportCounts:
    """Writes the rows of `path` that are prompts with answers to `to`, as JSON lines that `load_prompts` reads, each with its `origin`.

    `to` appears whole or not at all. The others go to `rejected_to`, if there is one: row, reason, evidence. Raises as `read_answers`, and DataError
    'prompts-empty' where no row could be used, ResourceError 'disk-full' and 'path-unwritable'.
    """
    with durable.unwritable_reported(to, "--to or --rejected"):
        _require_apart(path, to, rejected_to)
        rejected, imported = _written(path, to, rejected_to)
    return ImportCounts(
        source=path.name, source_sha256=sha256_file(path.expanduser()), rows=imported + rejected.total(), imported=imported, rejected=dict(rejected)
    )


def _require_apart(path: Path, to: Path, rejected_to: Path | None) -> None:
    """Raises ResourceError 'path-unwritable' where one file would be written over another of the three, IsADirectoryError where one is to be a directory."""
    three = [one.expanduser().resolve() for one in (path, to, rejected_to) if one is not None]
    if len(set(three)) < len(three):
        raise ResourceError(
            "path-unwritable",
            found=f"one file twice among {', '.join(map(str, three))}",
            expected="a file to read, one for what was imported, and another for what was rejected",
            why="one would be written over the other",
            do="Choose another --to or --rejected.",
        )
    for one in three[1:]:
        if one.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(one))


def _written(path: Path, to: Path, rejected_to: Path | None) -> tuple[Counter[RejectionReason], int]:
    partial = to.with_name(f".{to.name}.partial")
    partial_rejected = None if rejected_to is None else rejected_to.with_name(f".{rejected_to.name}.partial")
    for left in (partial, partial_rejected):
        if left is not None:
            left.unlink(missing_ok=True)  # what a crash left
    rejected: Counter[RejectionReason] = Counter()
    imported = 0
    try:
        if partial_rejected is not None:
            partial_rejected.touch()  # so that it says "none" where there are none
        for batch in _batches(read_answers(path)):
            good = [one for one in batch if isinstance(one, Imported)]
            bad = [one for one in batch if isinstance(one, Rejected)]
            imported += len(good)
            rejected.update(one.reason for one in bad)
            durable.append_lines(partial, map(_line, good), sync=False)
            if partial_rejected is not None:
                durable.append_lines(partial_rejected, (json.dumps(asdict(one), ensure_ascii=False) for one in bad), sync=False)
        if not imported:
            raise DataError(
                "prompts-empty",
                found=f"{path}: {_counts_text(rejected)}",
                expected="at least one row that is a prompt with an answer",
                do="Look at the forms that `stillroom import` reads; convert the file to one of them.",
            )
        for written, final in ((partial, to), (partial_rejected, rejected_to)):
            if written is not None and final is not None and written.exists():
                _publish(written, final)
    finally:
        for left in (partial, partial_rejected):
            if left is not None:
                left.unlink(missing_ok=True)
    return rejected, imported


def _publish(written: Path, final: Path) -> None:
    with written.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(written, final)


def _batches(rows: Iterable[Imported | Rejected]) -> Iterator[list[Imported | Rejected]]:
    batch: list[Imported | Rejected] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    yield batch


def _line(one: Imported) -> str:
    prompt = one.prompt
    asked: Json = {"prompt": prompt.text} if prompt.text is not None else {"messages": [asdict(turn) for turn in prompt.messages or ()]}
    origin = {name: value for name, value in asdict(one.origin).items() if value is not None}
    return json.dumps(asked | {"answer": prompt.answer, "origin": origin}, ensure_ascii=False)


def _counts_text(rejected: Counter[RejectionReason]) -> str:
    return ", ".join(f"{count} x {REJECTIONS[reason]}" for reason, count in rejected.most_common()) or "no rows"


# --- rows of each kind of file -------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Each row with its number; what is no JSON is given as the Rejected that it becomes."""
    match path.suffix.lower():
        case ".parquet":
            return _parquet_rows(path)
        case ".jsonl" | ".ndjson" | ".json":
            return _json_rows(path)
    raise DataError("prompts-invalid", found=f"{path} is of an unknown kind", expected="a .jsonl or .parquet file", do="Convert it to one of them.")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            try:
                yield number, json.loads(text.decode())
            except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are both ValueErrors
                yield number, Rejected(row=number, reason="not-json", evidence=shortened(str(error), 160))


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            wanted = {
                *_QUESTIONS,
                *_ANSWERS,
                *_TOOLS,
                "messages",
                "choices",
                "request",
                "model",
                "system_fingerprint",
                "created",
                "finish_reason",
                "id",
            }
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[name for name in file.schema_arrow.names if name in wanted]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # Arrow's own errors are of all these kinds
        raise DataError(
            "prompts-invalid",
            found=f"{path} cannot be read as Parquet after row {number}: {shortened(str(error), 160)}",
            expected="a Parquet file",
            do="Mend it there, or name another source.",
        ) from error


def _told_apart(rows: Iterable[tuple[int, Any]], digest: str) -> Iterator[Imported | Rejected]:
    seen: dict[bytes, int] = {}
    for number, row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            one = _read(row, number, digest)
        except _Unfit as unfit:
            yield Rejected(row=number, reason=unfit.reason, evidence=shortened(unfit.evidence, 160))
            continue
        first = seen.setdefault(bytes.fromhex(one.prompt.id)[:16], number)
        if first == number:
            yield one
        else:
            yield Rejected(row=number, reason="duplicate", evidence=f"asks what row {first} asks")


# --- one row -------------------------------------------------------------------------------------------------------------------------------


class _Unfit(Exception):
    """A row that is rejected."""

    def __init__(self, reason: RejectionReason, evidence: str) -> None:
        super().__init__(evidence)
        self.reason, self.evidence = reason, evidence


def _read(row: Any, number: int, digest: str) -> Imported:
    if not isinstance(row, dict):
        raise _Unfit("not-an-object", repr(row)[:160])
    present = {name: value for name, value in row.items() if value is not None}
    if used := [name for name in _TOOLS if present.get(name)]:
        raise _Unfit("tools", f"has {used[0]}")
    if "choices" in present:
        form, turns, finish = "completions", *_completion(present)
    elif "messages" in present:
        form, turns, finish = "fine-tuning", _conversation(present), _text_of(present.get("finish_reason"))
    else:
        form, turns, finish = "pairs", _pair(present), _text_of(present.get("finish_reason"))
    if finish is not None and finish.lower() in _CUT_OFF:
        raise _Unfit("cut-off", f"finish reason {finish}")
    asked, answer = turns[:-1], turns[-1]["content"]
    content: Json = {"prompt": asked[0]["content"]} if form == "pairs" else {"messages": asked}
    try:
        prompt = read_row(content | {"answer": answer}, f"row {number}")
    except DataError as error:
        raise _Unfit("invalid", error.found) from error
    created = present.get("created")
    origin = Origin(
        file_sha256=digest,
        row=number,
        form=form,
        model=_text_of(present.get("model")),
        fingerprint=_text_of(present.get("system_fingerprint")),
        created=created if type(created) is int else None,
        finish_reason=finish,
        response_id=_text_of(present.get("id")),
    )
    return Imported(prompt=prompt, origin=origin)


def _completion(row: Json) -> tuple[list[Json], str | None]:
    """The conversation and the first choice, as turns, and the finish reason."""
    request = row.get("request")
    asked = row.get("messages") or row.get("input") or (request.get("messages") if isinstance(request, dict) else None)
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    choices = row["choices"]
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict) or not isinstance(choices[0].get("message"), dict):
        raise _Unfit("no-answer", "has no choice with a message")
    if not isinstance(asked, list) or not asked:
        raise _Unfit("no-question", "has choices, and no messages that were asked")
    message = choices[0]["message"]
    if message.get("refusal"):
        raise _Unfit("refused", str(message["refusal"]))
    return _turns([*asked, message | {"role": "assistant"}]), _text_of(choices[0].get("finish_reason"))


def _conversation(row: Json) -> list[Json]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise _Unfit("invalid", "has messages that are no list of turns")
    system = row.get("system")
    first = [{"role": "system", "content": system}] if system else []
    turns = [*first, *messages]
    if not isinstance(turns[-1], dict) or turns[-1].get("role") != "assistant":
        raise _Unfit("no-answer", "does not end with a turn of the assistant")
    if len(turns) == len(first) + 1:
        raise _Unfit("no-question", "begins with the answer")
    if any(isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("weight") == 0 for turn in turns):
        raise _Unfit("weight", "an assistant turn has weight 0")
    return _turns(turns)


def _turns(messages: list[Any]) -> list[Json]:
    turns = []
    for turn in messages:
        if not isinstance(turn, dict):
            raise _Unfit("invalid", "has a turn that is no object")
        if turn.get("role") in ("tool", "function") or any(turn.get(name) for name in _TOOLS):
            raise _Unfit("tools", f"has a turn of the role {turn.get('role')}")
        role = "system" if turn.get("role") == "developer" else turn.get("role")
        turns.append({"role": role, "content": _content(turn.get("content"))})
    if not isinstance(turns[-1]["content"], str) or not turns[-1]["content"].strip():
        raise _Unfit("no-answer", "its answer is empty")
    return turns


def _content(value: Any) -> Any:
    """A text; parts of text are joined. What is neither is left to be refused with the row."""
    if not isinstance(value, list):
        return value
    parts = []
    for part in value:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            raise _Unfit("not-text", f"has a part of the type {kind}" if isinstance(kind, str) else "has a part of no type")
        parts.append(text)
    return "".join(parts)


def _pair(row: Json) -> list[Json]:
    asked = next((name for name in _QUESTIONS if name in row), None)
    answer = next((name for name in _ANSWERS if name in row), None)
    if asked is None and answer is None:
        raise _Unfit("unknown-form", f"has {', '.join(map(str, row)) or 'nothing'}")
    if asked is None:
        raise _Unfit("no-question", f"has {answer} alone")
    if answer is None or not isinstance(row[answer], str) or not row[answer].strip():
        raise _Unfit("no-answer", f"has {asked}, and no answer to it that is a text")
    return [{"role": "user", "content": row[asked]}, {"role": "assistant", "content": row[answer]}]


def _text_of(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
