"""From prompts to token ids and back, and which of the ids are answers.

An answer is what a model has to produce: everything after the prompt (the generation prompt included) up to and with its end token. Where
answers stand is found from how the template renders longer and longer parts of a conversation, never from the value of a token id: padding
with the end token, or an end token inside a question, changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillroom.core.errors import DataError, ModelError
from stillroom.core.identities import TokenIds, TokenSequence
from stillroom.models.loading import resolve, silence
from stillroom.targets.vocabulary import Vocabulary

Message: TypeAlias = Mapping[str, Any]

# Any of these says that a directory has a tokenizer; without one, transformers would build an empty tokenizer from config.json.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


class PromptLike(Protocol):
    """What is rendered: a text, or the turns of a conversation (exactly one of the two)."""

    @property
    def text(self) -> str | None: ...
    @property
    def messages(self) -> Sequence[Any] | None: ...


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or hub id. Raises ModelError 'model-missing', 'model-no-tokenizer', 'model-unsupported'."""
    directory, _ = resolve(source, revision)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise _no_tokenizer(f"{directory} without any of {', '.join(_TOKENIZER_FILES)}", "Copy the tokenizer's files there.")
    try:
        with silence():
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # third-party code over a user's files: whatever it raises is said of those files
        first = next(iter(str(error).splitlines()), "")
        raise _no_tokenizer(
            f"{directory}, whose tokenizer cannot be read: {type(error).__name__}: {first}", "Fetch or copy its files again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            "model-unsupported",
            found=f"{directory} with a {type(tokenizer).__name__}, which cannot say where in the text its tokens lie",
            expected="a tokenizer with a tokenizer.json",
            do="Convert it with transformers: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY).",
        )
    return tokenizer


def _no_tokenizer(found: str, do: str) -> ModelError:
    return ModelError("model-no-tokenizer", found=found, expected="a directory with tokenizer.json", do=do)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, rows: int, end_ids: Iterable[int] = ()) -> Vocabulary:
    """The tokenizer's vocabulary under a head of `rows` rows. An answer ends at `end_ids`, the tokenizer's end token, or the chat template's."""
    return Vocabulary.from_tokenizer(tokenizer, rows, sorted({*end_ids, *Renderer(tokenizer).end_ids}))


@dataclass(frozen=True)
class Renderer:
    """Prompts and answers as token ids, by one tokenizer and its chat template."""

    tokenizer: PreTrainedTokenizerFast

    # -- prompts

    def prompt_ids(self, prompt: PromptLike) -> TokenIds:
        """What a model is given to answer.

        A text is one user turn where there is a chat template, else the text with the tokenizer's own start tokens. A conversation that ends
        with a user's or tool's turn gets the generation prompt; one that ends with an answer ends there.
        Raises ModelError 'model-no-chat-template'; DataError 'prompts-invalid' where the template refuses the conversation.
        """
        messages = self._messages(prompt)
        if messages is None:
            return self._plain(prompt.text or "")
        if _is_answer(messages[-1]):
            return self.sequence(prompt).ids
        return self._encode(self._render(messages, open_answer=True))

    def ends_with_answer(self, prompt: PromptLike) -> bool:
        """Whether the conversation's last turn is already an answer, so that nothing is left to generate."""
        return bool(prompt.messages) and _is_answer(_plain_message((prompt.messages or ())[-1]))

    def sequence(self, prompt: PromptLike, answer: str | None = None, *, completion: Sequence[int] | None = None) -> TokenSequence:
        """The prompt, then an answer, with the spans of every answer and its end token; nothing follows the last one.

        `completion` is taken id by id, as a model produced it; `answer` is a text and gets the end token of the template (the tokenizer's, where
        the template has none or there is none); with neither, the conversation must end with an answer. Raises as `prompt_ids`.
        """
        assert answer is None or completion is None, "an answer or a completion, not both"
        messages = self._messages(prompt)
        if messages is None:
            ids = self._plain(prompt.text or "")
            new = tuple(completion) if completion is not None else self._ended(self._encode(answer or ""))
            return TokenSequence(ids=ids + new, answer_spans=_span(len(ids), len(ids) + len(new)))
        if completion is not None:
            encoded = _Encoded.of(self, self._render(messages, open_answer=True))
            spans = self._spans(messages, encoded)
            return TokenSequence(ids=(*encoded.ids, *completion), answer_spans=spans + _span(len(encoded.ids), len(encoded.ids) + len(completion)))
        if answer is not None:
            messages = [*messages, {"role": "assistant", "content": answer}]
        elif not _is_answer(messages[-1]):
            raise _bad_messages("a conversation that ends with a question, and no answer to it", "End it with an assistant turn.")
        return self._answered(messages)

    def _answered(self, messages: Sequence[Message]) -> TokenSequence:
        """A conversation that ends with an answer."""
        text = self._render(messages, open_answer=False)
        begin, end = self._extent(messages, len(messages) - 1, text)
        encoded = _Encoded.of(self, text[:end])
        spans = self._spans(messages[:-1], encoded)
        # The prompt is tokenised by itself, as it is when a model is asked: no token may reach from it into the answer.
        prompt = self._render(messages[:-1], open_answer=True)
        before = self._encode(prompt) + self._encode(text[len(prompt) : begin])
        whole = encoded.ids if encoded.ids[: len(before)] == before else before + self._encode(text[begin:end])
        whole = before + self._ended(whole[len(before) :])
        return TokenSequence(ids=whole, answer_spans=spans + _span(len(before), len(whole)))

    # -- and back

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokenizer's end token, and the token with which the chat template ends an answer."""
        ids = {self.tokenizer.eos_token_id}
        with suppress(DataError):  # a template of an unusual kind; the first prompt will say so
            ids.add(self.sequence(_Text("Hello"), "Yes").ids[-1])
        return tuple(sorted(i for i in ids if i in self._special_texts))

    def answer_text(self, completion: Sequence[int]) -> str:
        """The text of an answer up to its end token, without special tokens."""
        ids = list(completion)
        stop = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids))
        return self._decode(ids[:stop], skip_special=True)

    def loses_text(self, prompt: PromptLike) -> bool:
        """Whether some of the prompt's text does not come back from its own token ids (an alphabet that lacks a byte, a normaliser)."""
        texts = [prompt.text] if prompt.messages is None else [_plain_message(message).get("content") for message in prompt.messages]
        return any(self._decode(self._encode(text), skip_special=False) != text for text in texts if isinstance(text, str))

    # -- where answers stand in a rendered conversation

    def _spans(self, messages: Sequence[Message], encoded: _Encoded) -> tuple[tuple[int, int], ...]:
        """Token positions of the answers among `messages`, which are rendered in `encoded` with whatever follows them."""
        answers = [index for index, message in enumerate(messages) if _is_answer(message)]
        extents = [self._extent(messages, index, encoded.text) for index in answers]
        return tuple(span for begin, end in extents for span in _span(encoded.place(begin), encoded.place(end)))

    def _extent(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
        """Characters of `text` that the answer `messages[index]` and its end token take up: from the end of the generation prompt on."""
        before, after = self._render(messages[:index], open_answer=True), self._render(messages[: index + 1], open_answer=False)
        if not text.startswith(before):
            raise _not_a_prefix(index)
        begin = len(before)
        turn = text[begin : len(after)] if text.startswith(after) else None
        at = _find(_content_of(messages[index]), text[begin:] if turn is None else turn)
        if turn is None and (at is None or at[0] > 0):
            # The turn looks different now that others follow it, and its text does not stand where it must begin.
            raise _not_a_prefix(index)
        if at is None:
            # A turn whose text is made by the template (a tool call): all of it, up to the last end token in it.
            ends = [found.end() for found in self._special_pattern.finditer(text, begin, len(after))]
            return begin, ends[-1] if ends else begin + len((turn or "").rstrip())
        start, stop = begin + at[0], begin + at[1]
        if text[begin:start].strip() and before == self._render(messages[:index], open_answer=False):
            begin = start  # no generation prompt: what stands before the text is the turn's header, not an answer
        ending = self._end_pattern.match(text, stop)
        return begin, ending.end() if ending and (turn is None or ending.end() <= len(after)) else stop

    # -- the template

    def _messages(self, prompt: PromptLike) -> list[Message] | None:
        """The turns of a prompt; None for a text where the tokenizer has no chat template."""
        if prompt.messages is None:
            return [{"role": "user", "content": prompt.text or ""}] if self.tokenizer.chat_template else None
        if not self.tokenizer.chat_template:
            raise ModelError(
                "model-no-chat-template",
                found="prompts with chat messages, and a tokenizer without a chat template",
                expected="a chat template, or plain prompts",
                do="Use the instruction-tuned model, add its chat_template.jinja to the directory, or give `prompt` instead of `messages`.",
            )
        if not prompt.messages:
            raise _bad_messages("a conversation without turns", "Give at least one turn.")
        return [_plain_message(message) for message in prompt.messages]

    def _render(self, messages: Sequence[Message], *, open_answer: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=open_answer)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages) or "no turns"
            raise _bad_messages(
                f"a conversation ({roles}) that the chat template refuses: {error}", "Give the turns that this template takes."
            ) from error
        assert isinstance(text, str)
        return text

    # -- the tokenizer

    @cached_property
    def _special_texts(self) -> dict[int, str]:
        tokenizer = self.tokenizer
        added = {int(index): str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_texts.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _end_pattern(self) -> re.Pattern[str]:
        """The end token that follows an answer's text, with the white space that a template may put between them."""
        return re.compile(rf"\s*(?:{self._special_pattern.pattern})")

    @cached_property
    def start_ids(self) -> TokenIds:
        """What the tokenizer puts before a text of its own accord. An end token that it may put after it would end the prompt."""
        whole, bare = self._encode("a", special=True), self._encode("a")
        return next((whole[:place] for place in range(len(whole)) if whole[place : place + len(bare)] == bare), ())

    def _plain(self, text: str) -> TokenIds:
        return self.start_ids + self._encode(text)

    def _ended(self, answer: TokenIds) -> TokenIds:
        """The answer with an end token, if it has none and the tokenizer has one."""
        end = self.tokenizer.eos_token_id
        return answer if end is None or (answer and answer[-1] in self._special_texts) else (*answer, end)

    def _encode(self, text: str, *, special: bool = False) -> TokenIds:
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


@dataclass(frozen=True)
class _Text:
    text: str | None
    messages: None = None


@dataclass(frozen=True)
class _Encoded:
    """A text, its token ids, and the character at which each token begins."""

    renderer: Renderer
    text: str
    ids: TokenIds
    starts: tuple[int, ...]

    @classmethod
    def of(cls, renderer: Renderer, text: str) -> _Encoded:
        out = renderer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return cls(renderer, text, tuple(out["input_ids"]), tuple(start for start, _ in out["offset_mapping"]))

    def place(self, character: int) -> int:
        """How many tokens stand before `character`. One that reaches across it counts: it is not wholly an answer's."""
        part = self.renderer._encode(self.text[:character])
        if self.ids[: len(part)] == part:
            return len(part)
        return next((place for place, start in enumerate(self.starts) if start >= character), len(self.ids))


def _span(begin: int, end: int) -> tuple[tuple[int, int], ...]:
    return ((begin, end),) if end > begin else ()


def _plain_message(message: Any) -> dict[str, Any]:
    """A turn as the mapping that templates take."""
    if isinstance(message, Mapping):
        return dict(message)
    return {"role": message.role, "content": message.content}


def _is_answer(message: Message) -> bool:
    return message.get("role") == "assistant"


def _content_of(message: Message) -> str | None:
    content = message.get("content")
    return content if isinstance(content, str) and not message.get("tool_calls") else None


def _find(content: str | None, text: str) -> tuple[int, int] | None:
    """Where a turn's text stands, as it is or without the white space around it."""
    for form in () if content is None else (content, content.strip()):
        at = text.find(form)
        if at >= 0:
            return at, at + len(form)
    return None


def _bad_messages(found: str, do: str) -> DataError:
    return DataError("prompts-invalid", found=found, expected="a conversation that the teacher's chat template takes", do=do)


def _not_a_prefix(index: int) -> DataError:
    return DataError(
        "prompts-invalid",
        found=f"a conversation whose turn {index} (an answer) the chat template changes or leaves out once later turns follow",
        expected="a template that renders a conversation's beginning the same whatever follows",
        why="it cannot be said which tokens are that answer",
        do="Split the conversation, so that each answer is the last turn of one; or give answers as the template keeps them.",
    )
