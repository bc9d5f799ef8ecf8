"""Importing: every row becomes a prompt with an answer, or is rejected with a reason, and what is written can be read back as prompts."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core.errors import DataError
from stillroom.core.hashing import sha256_file
from stillroom.data import Message, load_prompts
from stillroom.data.importing import REJECTIONS, Imported, Rejected, RejectionReason, import_answers, read_answers

ASKED = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
]
STORED = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_730_000_000,
    "model": "gpt-x-2026-01-01",
    "system_fingerprint": "fp_1",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "4", "refusal": None}}],
    "messages": ASKED,
}
PAIR = {"prompt": "Capital of Peru?", "completion": "Lima"}


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(folder: Path, row: Any) -> Imported | Rejected:
    (one,) = read_answers(jsonl(folder, row))
    return one


def test_a_stored_completion_keeps_who_answered(tmp_path: Path) -> None:
    path = jsonl(tmp_path, STORED)
    (one,) = read_answers(path)
    assert isinstance(one, Imported)
    assert one.prompt.messages == (Message("system", "Be brief."), Message("user", "2 + 2?"))
    assert one.prompt.answer == "4"
    origin = one.origin
    assert (origin.file_sha256, origin.row, origin.form) == (sha256_file(path), 1, "completions")
    assert (origin.model, origin.fingerprint, origin.created, origin.finish_reason, origin.response_id) == (
        "gpt-x-2026-01-01",
        "fp_1",
        1_730_000_000,
        "stop",
        "chatcmpl-1",
    )


@pytest.mark.parametrize("where", ["input", "request"])
def test_what_was_asked_may_stand_elsewhere(where: str, tmp_path: Path) -> None:
    row = {name: value for name, value in STORED.items() if name != "messages"}
    one = only(tmp_path, row | ({"input": ASKED} if where == "input" else {"request": {"messages": ASKED}}))
    assert isinstance(one, Imported)
    assert len(one.prompt.messages or ()) == 2


def test_fine_tuning_rows_and_pairs(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}, {"role": "user", "content": "c"}]
    one = only(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "d"}]})
    assert isinstance(one, Imported)
    assert (len(one.prompt.messages or ()), one.prompt.answer) == (3, "d")
    bedrock = {
        "system": [{"text": "S"}],
        "messages": [{"role": "user", "content": [{"text": "u"}]}, {"role": "assistant", "content": [{"text": "v"}]}],
    }
    one = only(tmp_path, bedrock)
    assert isinstance(one, Imported)
    assert (one.prompt.messages, one.prompt.answer) == ((Message("system", "S"), Message("user", "u")), "v")
    for pair in (PAIR, {"instruction": "Capital of Peru?", "output": "Lima"}, {"question": "Capital of Peru?", "answer": "Lima", "model": "m"}):
        one = only(tmp_path, pair)
        assert isinstance(one, Imported)
        assert (one.prompt.text, one.prompt.answer) == ("Capital of Peru?", "Lima")


def turn(content: Any, role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER = turn("u", "user")
REJECTED: list[tuple[RejectionReason, Any]] = [
    ("not-an-object", [1]),
    ("unknown-form", {"text": "x"}),
    ("unknown-form", {}),
    ("no-question", {"completion": "x"}),
    ("no-question", {"messages": [turn("x")]}),
    ("no-question", {"choices": STORED["choices"]}),
    ("no-answer", {"prompt": "x"}),
    ("no-answer", {"prompt": "x", "completion": " "}),
    ("no-answer", {"messages": [USER]}),
    ("no-answer", {"messages": [USER, turn("")]}),
    ("no-answer", STORED | {"choices": []}),
    ("no-answer", STORED | {"choices": [{"message": {"content": None}}]}),
    ("refused", STORED | {"choices": [{"message": {"content": None, "refusal": "I can't."}}]}),
    ("cut-off", STORED | {"choices": [STORED["choices"][0] | {"finish_reason": "length"}]}),  # type: ignore[index]
    ("cut-off", PAIR | {"finish_reason": "content_filter"}),
    ("tools", {"messages": [USER, turn("x", tool_calls=[{"id": "1"}])]}),
    ("tools", {"messages": [USER, turn("r", "tool"), turn("x")]}),
    ("tools", {"messages": [USER, turn("x")], "tools": [{"type": "function"}]}),
    ("not-text", {"messages": [turn([{"type": "image_url", "image_url": {}}], "user"), turn("x")]}),
    ("weight", {"messages": [USER, turn("x", weight=0)]}),
    ("weight", {"messages": [USER, turn("x", weight=0), USER, turn("y")]}),
    ("invalid", {"messages": [turn("x", "narrator"), turn("y")]}),
    ("invalid", {"messages": "x"}),
    ("invalid", {"messages": [3, turn("x")]}),
    ("invalid", {"prompt": 3, "completion": "x"}),
    ("invalid", {"prompt": "\ud800", "completion": "x"}),
]


@pytest.mark.parametrize(("reason", "row"), REJECTED, ids=lambda value: str(value)[:40])
def test_a_row_that_cannot_be_used_is_rejected_for_its_reason(reason: str, row: Any, tmp_path: Path) -> None:
    one = only(tmp_path, row)
    assert isinstance(one, Rejected)
    assert (one.reason, one.row) == (reason, 1)
    assert one.evidence


def test_every_reason_can_happen() -> None:
    assert {reason for reason, _ in REJECTED} | {"not-json", "duplicate"} == set(REJECTIONS) == set(get_args(RejectionReason))


def test_an_import_is_written_counted_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [json.dumps(STORED), "{", json.dumps(PAIR), "", json.dumps(PAIR | {"completion": "Cusco"}), "\ud800"]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode("utf-8", "surrogatepass"))
    counts = import_answers(path, tmp_path / "out.jsonl", rejected_to=tmp_path / "rejected.jsonl")
    assert (counts.rows, counts.imported, counts.rejected) == (5, 2, {"not-json": 2, "duplicate": 1})
    loaded = load_prompts(tmp_path / "out.jsonl")
    assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [(None, "4"), ("Capital of Peru?", "Lima")]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written[0]["origin"]["model"] == "gpt-x-2026-01-01"
    assert written[1]["origin"] == {"file_sha256": sha256_file(path), "row": 3, "form": "pairs"}
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["row"], one["reason"]) for one in rejected] == [(2, "not-json"), (5, "duplicate"), (6, "not-json")]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "rejected.jsonl"]


def test_parquet_gives_what_json_gives(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{n}", "response": f"a{n}" if n % 3 else None, "messages": None} for n in range(2500)]
    rows[4] = {"prompt": None, "response": None, "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    found = list(read_answers(tmp_path / "in.parquet"))
    same = list(read_answers(jsonl(tmp_path, *rows)))
    assert [one.prompt for one in found if isinstance(one, Imported)] == [one.prompt for one in same if isinstance(one, Imported)]
    assert [one for one in found if isinstance(one, Rejected)] == [one for one in same if isinstance(one, Rejected)]
    assert len(found) == 2500


@pytest.mark.parametrize(("name", "content", "code"), [("in.csv", b"a,b", "prompts-invalid"), ("in.parquet", b"PAR1", "prompts-invalid"), ("in.jsonl", b"", "prompts-empty"), ("in.jsonl", b"{}\n", "prompts-empty")])  # fmt: skip
def test_a_file_of_which_nothing_can_be_used_leaves_nothing(name: str, content: bytes, code: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        import_answers(tmp_path / name, tmp_path / "out.jsonl", rejected_to=tmp_path / "rejected.jsonl")
    assert caught.value.code == code
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompts-missing"):
        read_answers(tmp_path / "none.jsonl")


KEYS = st.sampled_from(["messages", "choices", "message", "role", "content", "prompt", "completion", "weight", "type", "text", "finish_reason", "created", "model", "system", "input", "tools", "id"])  # fmt: skip
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["user", "assistant", "system", "text", "stop"])
TREES = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(TREES.map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=6))
def test_whatever_the_lines_each_is_one_or_the_other(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        found = list(read_answers(path))
        numbers = [one.origin.row if isinstance(one, Imported) else one.row for one in found]
        assert numbers == [n for n, line in enumerate(lines, start=1) if (line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line).strip()]
        with contextlib.suppress(DataError):
            counts = import_answers(path, Path(folder) / "out.jsonl")
            loaded = load_prompts(Path(folder) / "out.jsonl")
            assert (loaded.rows, loaded.duplicates) == (counts.imported, 0)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200).map(lambda data: b"PAR1" + data + b"PAR1"))
def test_no_bytes_make_parquet_raise_anything_else(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.parquet"
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            list(read_answers(path))


def test_two_hundred_thousand_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"prompt": "p{n}", "completion": "a"}}\n' for n in range(200_000)), encoding="utf-8")
    assert import_answers(path, tmp_path / "out.jsonl").imported == 200_000


def test_the_command_says_what_became_of_every_row(tmp_path: Path) -> None:
    jsonl(tmp_path, PAIR, {"text": "x"})
    command = [sys.executable, "-m", "stillroom.cli", "import", "in.jsonl", "--to", "out.jsonl"]
    command[1:3] = ["-c", "from stillroom.cli import main; main()"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 of 2 rows of in.jsonl are in out.jsonl", f"1 rejected, unknown-form: {REJECTIONS['unknown-form']}"]
