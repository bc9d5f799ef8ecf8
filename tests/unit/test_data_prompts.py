"""Reading prompts: what is good comes back whole, what is not is named by file and line, and no bytes at all raise anything but DataError."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillroom.core.errors import DataError, StillroomError
from stillroom.core.hashing import sha256_file
from stillroom.data import Message, Prompt, load_prompts

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_rows_become_prompts(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path, {"prompt": "one", "answer": "1", "family": "numbers", "more": [1]}, {"prompt": " zwei\n", "answer": None}, {"messages": CHAT}
    )
    loaded = load_prompts(path)
    one, two, chat = loaded.prompts
    assert (one.text, one.messages, one.answer, one.family) == ("one", None, "1", "numbers")
    assert (two.text, two.answer, two.family) == (" zwei\n", None, None)
    assert chat.text is None
    assert chat.messages == (Message("system", "Be brief."), Message("user", "2 + 2?"), Message("assistant", "4"))
    assert (loaded.rows, loaded.duplicates, loaded.conflicts) == (3, 0, 0)
    assert (loaded.source, loaded.source_sha256) == ("prompts.jsonl", sha256_file(path))
    assert one.content == "one"
    assert json.loads(chat.content) == CHAT


def test_parquet_gives_the_same_prompts_as_json(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p {n}", "messages": None, "answer": str(n) if n % 2 else None, "other": n} for n in range(2500)]
    rows[7] |= {"prompt": None, "messages": CHAT}
    assert load_prompts(parquet(tmp_path, rows)).prompts == load_prompts(jsonl(tmp_path, *rows)).prompts


def test_an_id_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    first = {p.text: p.id for p in load_prompts(jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b", "answer": "x"})).prompts}
    second = {p.text: p.id for p in load_prompts(jsonl(tmp_path, {"prompt": "b", "family": "f"}, {"prompt": "c"}, {"prompt": "a"})).prompts}
    assert first["a"] == second["a"]
    assert first["b"] == second["b"]
    one_turn = Prompt.of((Message("user", "a"),))
    assert len({first["a"], first["b"], second["c"], one_turn.id, Prompt.of((Message("assistant", "a"),)).id}) == 5


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}, {"prompt": "a "}]
    loaded = load_prompts(jsonl(tmp_path, *rows))
    assert [(p.text, p.answer) for p in loaded.prompts] == [("a", "1"), ("b", None), ("a ", None)]
    assert (loaded.rows, loaded.duplicates, loaded.conflicts) == (5, 2, 1)


def test_a_limit_counts_distinct_prompts_and_stops_reading(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": 3})
    assert [p.text for p in load_prompts(path, limit=2).prompts] == ["a", "b"]
    with pytest.raises(DataError, match="line 4"):
        load_prompts(path, limit=3)


def test_a_byte_order_mark_crlf_blank_lines_and_a_missing_last_line_feed_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "\xe2\x80\xa8b"}')
    assert [p.text for p in load_prompts(path).prompts] == ["a", "\u2028b"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"prompt": "a"', "is not JSON"),
        ("nonsense", "is not JSON"),
        ("[", "begins a JSON array"),
        ('["a"]', "is a list, not an object"),
        ("3", "is a number, not an object"),
        ("null", "is null, not an object"),
        ('{"question": "a", "answer": "b"}', "has neither `prompt` nor `messages`; it has question, answer"),
        ("{}", "it has nothing"),
        ('{"prompt": null}', "has neither"),
        ('{"prompt": 3}', "`prompt` that is a number"),
        ('{"prompt": ["a"]}', "`prompt` that is a list"),
        ('{"prompt": ""}', "`prompt` that is empty"),
        ('{"prompt": " \\n"}', "`prompt` that is empty"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        ('{"prompt": "a", "answer": 4}', "`answer` that is a number"),
        ('{"prompt": "a", "family": ""}', "`family` that is empty"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "has both"),
        ('{"messages": []}', "`messages` that are empty"),
        ('{"messages": "hello"}', "`messages` that are a text"),
        ('{"messages": ["hello"]}', "`messages[0]` that is a text"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}]}', "`messages[1]` with the role 'wizard'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "with the role ['user']"),
        ('{"messages": [{"content": "a"}]}', "with the role None"),
        ('{"messages": [{"role": "user", "content": ""}]}', "`messages[0].content` that is empty"),
        ('{"messages": [{"role": "user"}]}', "`messages[0].content` that is null"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "a system turn only"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "a system turn after"),
        ("[" * 100_000, "is not JSON"),
        ("1" * 5000, "is not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, told: str) -> None:
    path = tmp_path / "prompts.jsonl"
    for number, before in ((1, ""), (3, '{"prompt": "good"}\n\n')):
        path.write_text(before + row + "\n", encoding="utf-8")
        if row == "[" and number == 3:
            continue
        with pytest.raises(DataError) as raised:
            load_prompts(path)
        assert raised.value.code == "prompts-invalid"
        assert f"{path} line {number} " in raised.value.found
        assert told in raised.value.found
        assert len(raised.value.found) < 500


@pytest.mark.parametrize(("content", "told"), [(b'{"prompt": "\xff"}', "is not UTF-8"), ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16")])
def test_what_is_not_utf_8_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"line 1 {told}"):
        load_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_no_rows_is_an_error_of_its_own(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(DataError) as raised:
        load_prompts(tmp_path / "prompts.jsonl")
    assert raised.value.code == "prompts-empty"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "prompts.parquet")
    with pytest.raises(DataError) as raised:
        load_prompts(tmp_path / "prompts.parquet")
    assert raised.value.code == "prompts-empty"


def test_a_file_that_is_not_there_or_is_none_or_of_another_kind(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError) as raised:
            load_prompts(path)
        assert raised.value.code == "prompts-missing"
    (tmp_path / "prompts.csv").write_text("prompt\na\n")
    with pytest.raises(DataError, match=r"unknown kind, `\.csv`"):
        load_prompts(tmp_path / "prompts.csv")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"columns question, answer") as raised:
        load_prompts(parquet(tmp_path, [{"question": "a", "answer": "b"}]))
    assert "`prompt`" in raised.value.expected
    with pytest.raises(DataError, match=r"row 2 has `prompt` that is a number|row 1 has `prompt` that is a number"):
        load_prompts(parquet(tmp_path, [{"prompt": 1}, {"prompt": 2}]))
    with pytest.raises(DataError, match="row 2 has neither"):
        load_prompts(parquet(tmp_path, [{"prompt": "a"}, {"prompt": None}]))
    path = parquet(tmp_path, [{"prompt": "a"}])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_prompts(path)


def test_a_dataset_is_read_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of JSON lines is a dataset to `datasets`, which so needs no network."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "answer": "1", "id": 3}\n{"prompt": "b", "answer": null, "id": 4}\n')
    loaded = load_prompts(dataset=str(folder))
    assert [(p.text, p.answer) for p in loaded.prompts] == [("a", "1"), ("b", None)]
    assert (loaded.source, loaded.source_sha256) == (str(folder), None)
    with pytest.raises(DataError) as raised:
        load_prompts(dataset=str(folder), split="validation")
    assert raised.value.code == "prompts-missing"
    with pytest.raises(DataError) as raised:
        load_prompts(dataset=str(tmp_path / "none"))
    assert raised.value.code == "prompts-missing"


def test_without_the_extra_a_dataset_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StillroomError, match="pip install") as raised:
        load_prompts(dataset="org/name")
    assert raised.value.code == "missing-extra"


def test_exactly_one_source() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        load_prompts()
    with pytest.raises(ValueError, match="exactly one"):
        load_prompts("a.jsonl", dataset="b")


def load_bytes(content: bytes, suffix: str) -> None:
    """Either it loads, and then every prompt is whole, or DataError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"prompts{suffix}"
        path.write_bytes(content)
        try:
            loaded = load_prompts(path)
        except DataError:
            return
    assert loaded.prompts
    assert loaded.rows == len(loaded.prompts) + loaded.duplicates
    for prompt in loaded.prompts:
        assert (prompt.text is None) != (prompt.messages is None)
        assert prompt.content.strip()
        assert prompt == Prompt.of(prompt.text or prompt.messages or "", answer=prompt.answer, family=prompt.family)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3),
    max_leaves=6,
)
rows = st.dictionaries(st.sampled_from(["prompt", "messages", "answer", "family", "x"]), values, max_size=4)


@given(st.binary(max_size=300))
@example(b"\xef\xbb\xbf")
@example(b"\xef\xbb\xbf\xef\xbb\xbf{}")
@example(b'{"prompt":"\x00"}')
@example(b'{"prompt":"a"}\n\x00')
def test_any_bytes_load_or_are_refused(content: bytes) -> None:
    load_bytes(content, ".jsonl")


@given(st.lists(rows | values, max_size=3))
def test_any_json_loads_or_is_refused(found: list[Any]) -> None:
    load_bytes("\n".join(json.dumps(row) for row in found).encode(), ".jsonl")


@given(st.binary(max_size=300).map(lambda content: b"PAR1" + content + b"PAR1") | st.binary(max_size=300))
def test_any_bytes_called_parquet_load_or_are_refused(content: bytes) -> None:
    load_bytes(content, ".parquet")


def _small_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"prompt": "alpha", "answer": "1"}, {"prompt": "beta", "answer": None}]), sink)
    return sink.getvalue()


@given(st.integers(0, len(_small_parquet())))
@settings(max_examples=60)
def test_a_truncated_parquet_is_refused(length: int) -> None:
    load_bytes(_small_parquet()[:length], ".parquet")
