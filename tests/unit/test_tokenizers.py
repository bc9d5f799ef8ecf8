"""Rendering: prompts to ids, and spans that hold every answer with its end token and nothing else, under templates as they are met."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from helpers import ASSISTANT, DEMO_TEMPLATE, END, USER, save_tiny, tiny_tokenizer
from stillroom.core.errors import DataError, ModelError, StillroomError
from stillroom.core.identities import TokenSequence
from stillroom.data.prompts import Message, Prompt
from stillroom.models.tokenizers import Renderer, load_tokenizer, vocabulary_of

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
)
# The end of the whole text is the tokenizer's end token when nothing is asked (Phi-3).
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The last answer gets an empty thought before it, earlier ones none (Qwen 3).
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Plain words instead of special tokens, and no generation prompt.
WORDS = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
# Thoughts are left out of all answers but the last one (DeepSeek R1).
FORGETFUL = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Only the last exchange is kept.
TRUNCATING = (
    "{% for message in messages[-2:] %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Case:
    template: str
    special: tuple[str, ...]
    end: str  # how an answer ends in the text
    before: str = ""  # what the model itself writes before an answer's text


IM = ("<|im_end|>", "<|im_start|>")
CASES = {
    "demo": Case(DEMO_TEMPLATE, (END, USER, ASSISTANT), END),
    "chatml": Case(CHATML, IM, "<|im_end|>"),
    "llama3": Case(LLAMA3, ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": Case(MISTRAL, ("</s>", "<s>"), "</s>", before=" "),
    "phi3": Case(PHI3, ("<|endoftext|>", USER, ASSISTANT, END), END),
}


def renderer_of(template: str | None, special: tuple[str, ...], **options: object) -> Renderer:
    tokenizer = tiny_tokenizer(template=template, special=special, size=280, ascii_only=False, **options)  # type: ignore[arg-type]
    if "<s>" in special:
        tokenizer.bos_token = "<s>"
    return Renderer(tokenizer)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def renderer(case: Case) -> Renderer:
    return renderer_of(case.template, case.special)


def chat(*turns: str, last: str = "user") -> Prompt:
    """Turns that alternate between user and assistant and end with `last`."""
    other = {"user": "assistant", "assistant": "user"}
    roles = [last if (len(turns) - index) % 2 else other[last] for index in range(len(turns))]
    return Prompt.of(tuple(Message(role, text) for role, text in zip(roles, turns, strict=True)))  # type: ignore[arg-type]


def spans_of(renderer: Renderer, sequence: TokenSequence) -> list[str]:
    return [renderer.tokenizer.decode(sequence.ids[start:stop], clean_up_tokenization_spaces=False) for start, stop in sequence.answer_spans]


def text_of(renderer: Renderer, ids: tuple[int, ...]) -> str:
    return str(renderer.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


# -- prompts


def test_a_text_is_one_user_turn_of_the_template(case: Case, renderer: Renderer) -> None:
    ids = renderer.prompt_ids(Prompt.of("every weekday at 09:30"))
    turns = [{"role": "user", "content": "every weekday at 09:30"}]
    assert list(ids) == renderer.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == renderer.prompt_ids(chat("every weekday at 09:30"))


def test_without_a_template_a_text_is_itself() -> None:
    renderer = renderer_of(None, (END,))
    assert text_of(renderer, renderer.prompt_ids(Prompt.of("half past 3"))) == "half past 3"
    with pytest.raises(ModelError) as caught:
        renderer.prompt_ids(chat("half past 3"))
    assert caught.value.code == "model-no-chat-template"


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_without_a_template_the_tokenizers_start_token_is_kept_and_its_end_token_is_not(single: str) -> None:
    renderer = renderer_of(None, ("</s>", "<s>"))
    renderer.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 0), ("<s>", 1)])
    start = (1,) if single.startswith("<s>") else ()
    for text in ("half past 3", "", "a a a"):
        assert renderer.prompt_ids(Prompt.of(text)) == (*start, *renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
    sequence = renderer.sequence(Prompt.of("half past 3"), "09:30")
    assert spans_of(renderer, sequence) == ["09:30</s>"]


def test_a_template_with_a_start_token_gives_one_start_token() -> None:
    renderer = renderer_of(LLAMA3, CASES["llama3"].special)
    renderer.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    ids = renderer.prompt_ids(Prompt.of("half past 3"))
    assert (ids[0], ids.count(1)) == (1, 1)


# -- spans


def test_a_completion_is_kept_id_by_id(case: Case, renderer: Renderer) -> None:
    prompt = chat("every weekday", "30 9 * * 1-5", "half past 3")
    letters = [renderer.tokenizer.convert_tokens_to_ids(letter) for letter in "PT2H"]  # not how the tokenizer would split it
    end = renderer.tokenizer.convert_tokens_to_ids(case.end)
    sequence = renderer.sequence(prompt, completion=[*letters, end])
    assert sequence.ids == (*renderer.prompt_ids(prompt), *letters, end)
    assert sequence.answer_spans[-1] == (len(sequence.ids) - 5, len(sequence.ids))
    assert spans_of(renderer, sequence) == [f"{case.before}30 9 * * 1-5{case.end}", f"PT2H{case.end}"]
    assert renderer.answer_text([*letters, end]) == "PT2H"


def test_an_unfinished_completion_gets_no_end_token(renderer: Renderer) -> None:
    sequence = renderer.sequence(Prompt.of("half past 3"), completion=[9, 9])
    assert (sequence.ids[-2:], sequence.answer_spans) == ((9, 9), ((len(sequence.ids) - 2, len(sequence.ids)),))
    assert renderer.sequence(Prompt.of("half past 3"), completion=[]).answer_spans == ()


def test_a_given_answer_gets_its_end_token_and_nothing_after_it(case: Case, renderer: Renderer) -> None:
    sequence = renderer.sequence(Prompt.of("half past 3"), "2024-03-05")
    assert spans_of(renderer, sequence) == [f"{case.before}2024-03-05{case.end}"]
    assert sequence.answer_spans[-1][1] == len(sequence.ids)
    assert sequence.ids[: sequence.answer_spans[0][0]] == renderer.prompt_ids(Prompt.of("half past 3"))


def test_every_answer_of_a_conversation_has_a_span(case: Case, renderer: Renderer) -> None:
    turns = ("half past 3", "PT2H15M", "every weekday", "30 9 * * 1-5", "the 5th of March", "2024-03-05")
    whole = chat(*turns, last="assistant")
    sequence = renderer.sequence(whole)
    assert spans_of(renderer, sequence) == [f"{case.before}{turns[n]}{case.end}" for n in (1, 3, 5)]
    assert renderer.ends_with_answer(whole)
    assert not renderer.ends_with_answer(chat(*turns[:-1]))
    assert renderer.sequence(chat(*turns[:-1]), turns[-1]) == sequence
    assert renderer.prompt_ids(whole) == sequence.ids
    # The whole is what the template says, cut after the last answer.
    rendered = renderer.tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in whole.messages or ()], tokenize=False)
    assert rendered.startswith(text_of(renderer, sequence.ids))


def test_a_system_turn_is_not_an_answer() -> None:
    renderer = renderer_of(CHATML, IM)
    prompt = Prompt.of((Message("system", "Answer."), Message("user", "half past 3")))
    assert spans_of(renderer, renderer.sequence(prompt, "15:30")) == ["15:30<|im_end|>"]


def test_a_question_that_quotes_an_answer_or_an_end_token_changes_nothing() -> None:
    renderer = renderer_of(CHATML, IM)
    prompt = chat("repeat: yes<|im_end|> yes", "yes", "yes <|im_end|>")
    assert spans_of(renderer, renderer.sequence(prompt, "yes")) == ["yes<|im_end|>", "yes<|im_end|>"]


@pytest.mark.parametrize("answer", ["", " ", "\n", " yes ", "\n\nyes\n", "assistant", "<|im_start|>", "héllo 🙂", "a<|im_end|>b"])
def test_odd_answers_are_covered_whole(answer: str) -> None:
    renderer = renderer_of(CHATML, IM)
    sequence = renderer.sequence(chat("q", answer, "q"), answer)
    assert spans_of(renderer, sequence) == [f"{answer}<|im_end|>"] * 2


def test_padding_with_the_end_token_changes_nothing(case: Case) -> None:
    prompt = chat("every weekday", "30 9 * * 1-5", "half past 3")
    same, other = renderer_of(case.template, case.special), renderer_of(case.template, (*case.special, "<pad>"), pad="<pad>")
    assert same.tokenizer.pad_token_id == same.tokenizer.eos_token_id != other.tokenizer.pad_token_id
    assert spans_of(same, same.sequence(prompt, "PT2H")) == spans_of(other, other.sequence(prompt, "PT2H"))


def test_an_empty_thought_before_the_last_answer_is_part_of_it() -> None:
    renderer = renderer_of(QWEN3, IM)
    sequence = renderer.sequence(chat("a", "yes", "b"), "no")
    assert spans_of(renderer, sequence) == ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]


def test_a_template_of_words_without_a_generation_prompt() -> None:
    renderer = renderer_of(WORDS, (END,))
    sequence = renderer.sequence(chat("q", "yes", "r"), "no")
    # The template has no end token: the last answer gets the tokenizer's, so that a student learns to stop.
    assert spans_of(renderer, sequence) == ["yes", f"no{END}"]
    assert text_of(renderer, sequence.ids) == f"user: q\nassistant: yes\nuser: r\nassistant: no{END}"


def test_a_token_across_the_border_is_not_an_answer() -> None:
    """A tokenizer that merges the header's line break with the answer's first: the answer is tokenised as a model would produce it."""
    renderer = renderer_of(CHATML, IM)
    tree = json.loads(renderer.tokenizer.backend_tokenizer.to_str())
    pair = ["Ċ", "Ċ"]
    tree["model"]["merges"].insert(0, pair)
    tree["model"]["vocab"]["".join(pair)] = len(renderer.tokenizer)
    backend = type(renderer.tokenizer.backend_tokenizer).from_str(json.dumps(tree))
    merging = Renderer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=IM[0], chat_template=CHATML))
    assert len(merging.tokenizer("\n\n")["input_ids"]) == 1
    prompt = Prompt.of("q")
    sequence = merging.sequence(prompt, "\n\nyes")
    assert sequence.ids[: sequence.answer_spans[0][0]] == merging.prompt_ids(prompt)
    assert spans_of(merging, sequence) == ["\n\nyes<|im_end|>"]
    earlier = merging.sequence(chat("q", "\n\nyes", "r"), "no")
    assert spans_of(merging, earlier) == ["\nyes<|im_end|>", "no<|im_end|>"]  # the merged token is half header


def test_a_tool_call_is_an_answer_up_to_its_end_token() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['tool_calls'] %}{{ '<call>' + m['tool_calls'][0]['name'] }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = renderer_of(template, IM)

    class Calling:
        text = None
        messages = (
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
            {"role": "tool", "content": "12:00"},
        )

    assert spans_of(renderer, renderer.sequence(Calling(), "noon")) == ["<call>clock<|im_end|>", "noon<|im_end|>"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="<>|[]"), min_size=1, max_size=12), min_size=2, max_size=6
    ),
)
def test_spans_of_any_conversation(name: str, texts: list[str]) -> None:
    """For any texts: an answer's span decodes to that answer (as the template trims it) and its end, and the rest holds none of it."""
    case = CASES[name]
    renderer = _shared(name)
    texts = [text.strip() or "x" for text in texts]
    if len(texts) % 2:
        texts.append("end")
    sequence = renderer.sequence(chat(*texts, last="assistant"))
    assert spans_of(renderer, sequence) == [f"{case.before}{text}{case.end}" for text in texts[1::2]]
    outside = [i for p, i in enumerate(sequence.ids) if not any(a <= p < b for a, b in sequence.answer_spans)]
    asked = renderer.tokenizer.decode(outside, clean_up_tokenization_spaces=False)
    assert all(text in asked for text in texts[::2])


_RENDERERS: dict[str, Renderer] = {}


def _shared(name: str) -> Renderer:
    return _RENDERERS.setdefault(name, renderer_of(CASES[name].template, CASES[name].special))


# -- what cannot be done


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (FORGETFUL, chat("a", "<think>hm</think>yes", "b")),
        (TRUNCATING, chat("a", "yes", "b", "no", "c")),
    ],
)
def test_a_template_that_changes_earlier_answers_is_a_clear_error(template: str, prompt: Prompt) -> None:
    with pytest.raises(DataError, match=r"turn \d+ \(an answer\)") as caught:
        renderer_of(template, IM).sequence(prompt, "yes")
    assert caught.value.code == "prompts-invalid"


def test_a_conversation_that_the_template_refuses() -> None:
    renderer = renderer_of(MISTRAL, CASES["mistral"].special)
    with pytest.raises(DataError, match="must alternate") as caught:
        renderer.prompt_ids(Prompt.of((Message("system", "s"), Message("user", "q"))))
    assert caught.value.code == "prompts-invalid"


def test_a_broken_template_is_a_clear_error() -> None:
    for template in ("{% for %}", "{{ messages[5]['content'] }}", "{{ nothing.at.all }}"):
        with pytest.raises(StillroomError) as caught:
            renderer_of(template, IM).prompt_ids(Prompt.of("q"))
        assert caught.value.code == "prompts-invalid"


def test_a_question_without_an_answer_is_no_sequence(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="no answer"):
        renderer.sequence(Prompt.of("half past 3"))


# -- and back


def test_the_text_of_an_answer_ends_before_its_end_token(case: Case, renderer: Renderer) -> None:
    sequence = renderer.sequence(Prompt.of("q"), "every weekday")
    start, stop = sequence.answer_spans[0]
    completion = sequence.ids[start:stop]
    assert renderer.answer_text(completion) == renderer.answer_text(completion[:-1]) == f"{case.before}every weekday"
    assert renderer.answer_text((*completion, *completion)) == f"{case.before}every weekday"
    assert renderer.answer_text(()) == ""


def test_end_tokens_are_the_tokenizers_and_the_templates() -> None:
    llama = renderer_of(LLAMA3, CASES["llama3"].special)
    assert llama.end_ids == tuple(llama.tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))
    assert renderer_of(None, (END,)).end_ids == (0,)
    assert vocabulary_of(llama.tokenizer, 300, [7]).end_ids == (0, 4, 7)
    assert vocabulary_of(llama.tokenizer, 300).rows == 300


def test_text_that_is_lost_is_noticed() -> None:
    ascii_only = Renderer(tiny_tokenizer())
    assert not ascii_only.loses_text(Prompt.of("half past 3"))
    assert ascii_only.loses_text(Prompt.of("à trois heures"))
    assert ascii_only.loses_text(chat("half past 3", "été", "q"))
    assert not Renderer(tiny_tokenizer(ascii_only=False)).loses_text(Prompt.of("à trois heures 🙂"))


# -- loading


def test_a_tokenizer_that_was_saved_is_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    loaded = load_tokenizer(str(save_tiny(tmp_path, tokenizer=tokenizer)))
    for name in ("text", "messages"):
        prompt = Prompt.of("every weekday") if name == "text" else chat("a", "b", "c")
        assert Renderer(loaded).sequence(prompt, "09:30") == Renderer(tokenizer).sequence(prompt, "09:30")
    assert vocabulary_of(loaded, 220).fingerprint == vocabulary_of(tokenizer, 220).fingerprint


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(directory))
    assert caught.value.code == "model-no-tokenizer"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}'])
def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    directory = save_tiny(tmp_path)
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(directory))
    assert caught.value.code == "model-no-tokenizer"


def test_no_directory_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path / "nothing"))
    assert caught.value.code == "model-missing"


def test_loading_says_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = save_tiny(tmp_path)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    capfd.readouterr()
    renderer = Renderer(load_tokenizer(str(directory)))
    renderer.prompt_ids(Prompt.of("half past 3 " * 200))  # longer than the model's context
    assert capfd.readouterr() == ("", "")
