"""What nobody may see is nowhere: not in a file of a run, not in what is printed or logged, not in an exception, however the endpoint behaves.

And nothing but the endpoint is asked: whole runs in a process in which any other connection ends it.
"""

from __future__ import annotations

import base64
import itertools
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from scripted import Scripted, asked_recipe, completion, scripted_endpoint
from stillroom.core.errors import StillroomError
from stillroom.data import TransferSet
from stillroom.runs import run
from stillroom.runs.planning import prepare
from tiny_run import write_rows

KEY = 'sk-Pl4nted+k3y/with"quote==0123456789'
SECRETS = {
    "mail": "ada.lovelace@example.org",
    "card": "4111 1111 1111 1111",
    "account": "DE89 3704 0044 0532 0130 00",
    "maker's key": "sk-proj-A1b2C3d4E5f6G7h8I9j0K1l2",
    "cloud key": "AKIAIOSFODNN7EXAMPLE",
    "phone": "+49 30 901820",
    "password": "hunter2Xq7/Zz9+kk",
    "token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlLXBsYW50ZWQ",
}  # fmt: skip
CALLED = {"password": "the password is {}", "account": "account {}"}


def said(name: str) -> str:
    return CALLED.get(name, "this: {}").format(SECRETS[name])


def forms(secret: str) -> set[bytes]:
    """The secret as it is and as it is written in JSON, in a URL and in base64, wherever in a longer text it begins."""
    texts = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret)[1:-1].replace("/", "\\/"),
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
    }
    for encode, before in itertools.product((base64.b64encode, base64.urlsafe_b64encode), range(3)):
        signs = encode(b" " * before + secret.encode()).decode()
        texts.add(signs[-(-8 * before // 6) : 8 * (before + len(secret)) // 6])
    return {text.encode() for text in texts}


def parts(path: Path) -> Iterator[bytes]:
    """A file's bytes; of a database also every value, inflated where it was deflated."""
    data = path.read_bytes()
    yield data
    if not data.startswith(b"SQLite format 3"):
        return
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for value in itertools.chain.from_iterable(db.execute(f'SELECT * FROM "{name}"')):
                if isinstance(value, bytes):
                    yield value
                    with suppress(zlib.error):
                        yield zlib.decompressobj().decompress(value)
                elif isinstance(value, str):
                    yield value.encode(errors="replace")


def found_in(folder: Path, secrets: Mapping[str, str]) -> list[str]:
    """Where which secret is, in a name or in a file."""
    wanted = {name: forms(secret) for name, secret in secrets.items()}
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [
        f"{name} in {path}"
        for path in files
        for part in (*parts(path), str(path).encode())
        for name, some in wanted.items()
        if any(s in part for s in some)
    ]


def requires_absent(text: str, secrets: Mapping[str, str]) -> None:
    here = [name for name, secret in secrets.items() if any(form in text.encode(errors="replace") for form in forms(secret))]
    assert not here, f"{here} in {text}"


def wicked(number: int, prompt: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes] | None:
    """Failures and refusals that repeat what was sent, in every way of writing it; answers that have the key in them come after these."""
    key = headers["Authorization"].removeprefix("Bearer ")
    written = [form.decode() for form in sorted(forms(key))]
    error = {"error": {"message": f"No: {headers['Authorization']} in {prompt}; {' '.join(written)}", "code": key, "type": "server_error"}}
    echoed = {"x-request-id": key, "set-cookie": f"key={quote(key)}", "x-echo": written[0], "retry-after": "0"}
    match number:
        case 0:
            return 500, echoed, json.dumps(error).encode()
        case 1:
            return 429, echoed, json.dumps(error).encode()
        case 2:
            return 502, echoed | {"content-type": "text/html"}, f"<html>{error}</html>".encode()
        case 3:
            return 200, echoed, json.dumps(error).encode()
        case 4:
            return 401, echoed, json.dumps({"error": f"Incorrect API key provided: {key} ({written})"}).encode()
        case 5:
            return 302, echoed | {"location": f"http://127.0.0.1:9/?key={quote(key)}"}, b""
        case 6:
            return 400, echoed, json.dumps(error | {"prompt": prompt}).encode()
    body = completion("scripted", f"You, {headers['Authorization']}, said: {prompt} {written[number % len(written)]}")
    return 200, echoed, json.dumps(body | {"id": key, "system_fingerprint": key}).encode()


def planted_recipe(folder: Path, url: str) -> Any:
    """Every secret in a prompt, in a conversation, in an item with its answer, and in a labelled pair."""
    recipe = asked_recipe(folder, url, ["x"], [{"prompt": f"Item {said(name)}", "answer": secret} for name, secret in SECRETS.items()])
    tree = recipe.model_dump(mode="json")
    rows: list[dict[str, Any]] = [{"prompt": f"Prompt {said(name)}"} for name in SECRETS]
    rows += [
        {"messages": [{"role": "system", "content": f"You know {said(name)}."}, {"role": "user", "content": f"Is it {secret}?"}]}
        for name, secret in SECRETS.items()
    ]
    tree["prompts"]["path"] = str(write_rows(folder / "planted.jsonl", rows))
    pairs = [{"prompt": f"Pair {said(name)}", "answer": secret} for name, secret in SECRETS.items()]
    tree["evaluation"]["label_only"] = {"path": str(write_rows(folder / "pairs.jsonl", pairs)), "patience": 1, "validate_every": 1}
    tree["curation"] = {"steps": []}  # what repeats everything is an echo, and here it is to be learned from
    return type(recipe).from_tree(tree)


_Stillroom = Callable[..., tuple[int, str, str]]


def test_planted_secrets_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stillroom: _Stillroom) -> None:
    monkeypatch.setenv("SCRIPTED_KEY", KEY)
    secrets = SECRETS | {"key": KEY}
    (tmp_path / "all").mkdir()
    handler = logging.FileHandler(tmp_path / "all" / "log")
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    raised: list[StillroomError] = []
    try:
        with scripted_endpoint(Scripted(before=wicked)) as server:
            recipe = planted_recipe(tmp_path / "in", server.base_url)
            (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
            directory = tmp_path / "all" / "run"
            for _ in range(4):  # the refused key and the redirect each end it, and it goes on
                try:
                    run(recipe, out=directory, until="collected")
                    break
                except StillroomError as error:
                    raised.append(error)
            for words in (
                ("run", tmp_path / "recipe.yaml", "--out", directory),
                ("compare", directory, "--prompt", f"Prompt {SECRETS['mail']}"),
                ("requests", directory / "requests.sqlite"),
            ):
                code, out, err = stillroom(*words)
                assert code == 0, err
                # On the screen are the words of whoever typed them, restored; the key is not.
                requires_absent(out + err, {"key": KEY} if words[0] == "compare" else secrets)
            sent = b"".join(server.bodies)
            prepared = prepare(recipe, out=directory)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
    assert raised
    for error in raised:
        requires_absent("".join(traceback.format_exception(error)), secrets)
        requires_absent(repr(error) + repr(error.__dict__), secrets)
    requires_absent(repr(prepared) + repr(prepared.inputs) + repr(recipe), secrets)
    assert not [name for name, secret in SECRETS.items() if any(form in sent for form in forms(secret))]
    assert re.search(rb"<EMAIL_1>", sent)
    assert found_in(tmp_path / "all", secrets) == []
    assert TransferSet.load(directory / "transfer_set.json").accepted >= 8
    # What was looked for is what was planted, and the look finds it.
    assert len({line.partition(" in ")[0] for line in found_in(tmp_path / "in", SECRETS)}) == len(SECRETS)


def test_the_search_finds_what_is_sent_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without redaction the same look finds the same secrets, in a database too."""
    monkeypatch.setenv("SCRIPTED_KEY", KEY)
    with scripted_endpoint(Scripted()) as server:
        recipe = planted_recipe(tmp_path / "in", server.base_url)
        recipe = recipe.model_copy(update={"collection": recipe.collection.model_copy(update={"redaction": "off"})})
        run(recipe, out=tmp_path / "run", until="collected")
    found = found_in(tmp_path / "run", SECRETS)
    for name in SECRETS:
        assert any(line.startswith(f"{name} in") and line.endswith("requests.sqlite") for line in found), name
        assert any(line.startswith(f"{name} in") and line.endswith("collect.jsonl") for line in found), name


# --- the network --------------------------------------------------------------------------------------------------------------------------

GUARD = '''\
"""Ends the process at any connection but the one that is allowed, and at any look-up of a name."""
import os, sys

allowed = tuple(os.environ["ALLOWED_ADDRESS"].split(" "))

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        wrong = not isinstance(address, tuple) or (str(address[0]), str(address[1])) != allowed
    elif event == "socket.getaddrinfo":
        wrong = arguments[0] not in (None, allowed[0])
    else:
        wrong = event in ("socket.gethostbyname", "socket.gethostbyaddr")
    if wrong:
        with open(os.environ["VIOLATIONS"], "a") as file:
            file.write(f"{event} {arguments[1:]} {arguments[0] if event == 'socket.getaddrinfo' else ''}\\n")
        os._exit(97)

sys.addaudithook(guard)
'''


def guarded(folder: Path, address: str, *words: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The words as a Python command under the guard, and what the guard wrote."""
    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    violations = folder / "violations"
    violations.write_text("")
    online = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment = online | {
        "PYTHONPATH": os.pathsep.join([str(folder / "guard"), str(Path(__file__).resolve().parents[2] / "src")]),
        "ALLOWED_ADDRESS": address,
        "VIOLATIONS": str(violations),
        "SCRIPTED_KEY": KEY,
    }
    done = subprocess.run([sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    return done, violations.read_text()


def test_a_whole_run_connects_to_the_endpoint_and_to_nothing_else(tmp_path: Path) -> None:
    items = [{"prompt": f"{number} days", "answer": f"P{number}D"} for number in range(3)]
    with scripted_endpoint(Scripted()) as server:
        recipe = asked_recipe(tmp_path / "in", server.base_url, [f"{number} hours" for number in range(6)], items)
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
        host, port = server.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        done, violations = guarded(tmp_path, f"{host} {port}", "-m", "stillroom", "run", "recipe.yaml", "--out", "run")
    assert violations == ""
    assert done.returncode == 0, done.stderr
    assert server.received == 9
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('example.org', 443)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    ],
)
def test_the_guard_ends_what_goes_elsewhere(tmp_path: Path, attempt: str) -> None:
    done, violations = guarded(tmp_path, "127.0.0.1 1", "-c", attempt)
    assert done.returncode == 97
    assert violations.startswith("socket.")
