"""Steps by which a user's own rule decides: a Python function, a regular expression, a JSON schema.

Nothing runs but what the user names. A rule that cannot be used at all is an error before any row is looked at; a rule that fails on a row drops that
row, for the reason 'verifier-error', and never the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NoReturn, TypeAlias

from stillroom.core.errors import DataError
from stillroom.core.hashing import sha256_file
from stillroom.core.identities import Json
from stillroom.data.curation import Finding, Row, Sifted, sift_each
from stillroom.data.json_schema import JsonSchema
from stillroom.data.words import shortened

Verify: TypeAlias = Callable[[Any, str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionVerifier:
    """Keeps what a Python function says True of.

    The function gets the prompt (its text, or its turns as a list of {role, content}) and the answer. It returns True to keep the row, False to drop
    it, or a text, which drops it and says why. Whatever else it returns or raises drops the row for the reason 'verifier-error'.
    """

    name: ClassVar[str] = "verifier-function"
    target: str
    sha256: str | None
    function: Verify = field(repr=False, compare=False)

    @classmethod
    def load(cls, target: str) -> FunctionVerifier:
        """The function named by `package.module:function` or `path/to/file.py:function`, whose module is imported, and so run, now.

        Raises DataError 'verifier-invalid' where it cannot be.
        """
        where, colon, name = target.rpartition(":")
        if not colon or not where or not name.isidentifier():
            _refuse(f"the verifier {target!r:.100}", "module:function, or file.py:function")
        path = Path(where).expanduser() if where.endswith(".py") else None
        module = _module(where, path)
        function = getattr(module, name, None)
        if not callable(function):
            _refuse(f"{where} has no function {name}", "one that is defined there")
        file = path or (Path(module.__file__) if module.__file__ is not None else None)
        return cls(target=target, sha256=sha256_file(file) if file is not None and file.is_file() else None, function=function)

    @property
    def settings(self) -> Json:
        """Which function it is, and the digest of the file that it is in."""
        return {"target": self.target, "sha256": self.sha256}

    def sift(self, rows: Sequence[Row]) -> Sifted:
        return sift_each(self.name, rows, self._judge)

    def _judge(self, row: Row) -> Finding | None:
        turns = row.prompt.messages
        prompt = row.prompt.text if turns is None else [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            said = self.function(prompt, row.answer)
        except (Exception, SystemExit) as error:  # a user's code may raise anything, and may call sys.exit; Ctrl-C goes through
            return Finding(reason="verifier-error", evidence=shortened(f"{type(error).__name__}: {error}", 160))
        match said:
            case True:
                return None
            case False:
                return Finding(reason="verifier", evidence=f"{self.target} says no")
            case str():
                return Finding(reason="verifier", evidence=shortened(said, 160))
        return Finding(reason="verifier-error", evidence=f"{self.target} returned {type(said).__name__}, not True, False or a text")


def _module(where: str, path: Path | None) -> ModuleType:
    try:
        if path is None:
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(f"stillroom_verifier_{path.stem}", path)
        if spec is None or spec.loader is None:
            _refuse(f"{path}", "a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        _refuse(f"{where}: {type(error).__name__}: {shortened(str(error), 160)}", "a module that can be imported")
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexVerifier:
    """Keeps answers in which `pattern` is found; with `whole`, which it matches from end to end; with `forbid`, the others.

    The pattern is Python's. One that repeats a repetition, as (a+)+ does, can take for ever on some answers: that is its author's to see to.
    """

    name: ClassVar[str] = "verifier-regex"
    pattern: str
    whole: bool = False
    forbid: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            _refuse(f"the pattern {self.pattern!r:.100}: {error}", "a regular expression")

    def sift(self, rows: Sequence[Row]) -> Sifted:
        compiled = re.compile(self.pattern)
        find = compiled.fullmatch if self.whole else compiled.search
        return sift_each(self.name, rows, lambda row: self._finding(find(row.answer)))

    def _finding(self, found: re.Match[str] | None) -> Finding | None:
        if self.forbid:
            return Finding(reason="verifier", evidence=f"has {shortened(found[0])!r}") if found else None
        return None if found else Finding(reason="verifier", evidence=f"does not match {shortened(self.pattern)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaVerifier:
    """Keeps answers that are JSON and fit a schema; with `fenced`, also where the JSON alone stands in a Markdown code fence.

    Which part of JSON Schema is understood is said in `json_schema`. Strict JSON: no NaN, no key twice.
    """

    name: ClassVar[str] = "verifier-schema"
    schema: JsonSchema
    fenced: bool = True

    @property
    def settings(self) -> Json:
        return {"schema": self.schema.root, "fenced": self.fenced}

    def sift(self, rows: Sequence[Row]) -> Sifted:
        return sift_each(self.name, rows, self._judge)

    def _judge(self, row: Row) -> Finding | None:
        try:
            value = json.loads(
                _unfenced(row.answer) if self.fenced else row.answer, parse_constant=_refuse_constant, object_pairs_hook=_object_of_distinct
            )
        except (ValueError, RecursionError) as error:
            return Finding(reason="verifier", evidence=shortened(f"not JSON: {error}", 160))
        try:
            fault = self.schema.fault(value)
        except (ArithmeticError, RecursionError, ValueError) as error:  # numbers beyond a double, a schema that asks of itself without end
            return Finding(reason="verifier-error", evidence=f"{type(error).__name__}: {shortened(str(error))}")
        return Finding(reason="verifier", evidence=shortened(fault, 160)) if fault else None


def _unfenced(answer: str) -> str:
    text = answer.strip()
    first, line_feed, rest = text.partition("\n")
    if line_feed and first.rstrip() in ("```", "```json") and rest.endswith("```"):
        return rest.removesuffix("```")
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object_of_distinct(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse(found: str, expected: str) -> NoReturn:
    raise DataError("verifier-invalid", found=found, expected=expected, do="Mend the recipe's verifier, or leave it out.")
