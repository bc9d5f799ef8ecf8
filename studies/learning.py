"""Models of the studies: two tokenizers, small Llamas, and their training by Stillroom's own engine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stillroom.core.identities import TokenSequence
from stillroom.models.local import text_targets
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.models.tokenizers import vocabulary_of
from stillroom.objectives.divergences import DIVERGENCES
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.targets.protocols import Batch
from studies import tales

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
END = 0
CONTEXT_TOKENS = 256
# Nearly every word is one token; nearly every word is several.
WORDS, PIECES = 800, 160


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, trained on the study's own corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = (f"{question.text} {answer}" for question, answer in islice(tales.corpus(0), 20_000))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [letter for letter in letters if len(letter.encode()) == 1 or letter in "\u0120\u010a"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=printable, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], model_max_length=CONTEXT_TOKENS)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def fresh(tokenizer: PreTrainedTokenizerFast, *, layers: int, width: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=-(-width * 8 // 3 // 16) * 16,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            eos_token_id=END,
            bos_token_id=None,
            pad_token_id=END,
        )
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: tales.Question) -> tuple[int, ...]:
    """The rendered question."""
    _, user, assistant = (int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL)
    return (user, *tokenizer.backend_tokenizer.encode(question.text, add_special_tokens=False).ids, assistant)


def encoded(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[tales.Question, str]]) -> list[TokenSequence]:
    """Questions with their answers, of which the answer and its end token are scored."""
    _, user, assistant = (int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL)
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    asked = [one.ids for one in encode([question.text for question, _ in pairs], add_special_tokens=False)]
    answered = [one.ids for one in encode([answer for _, answer in pairs], add_special_tokens=False)]
    return [as_sequence((user, *question, assistant), (*answer, END)) for question, answer in zip(asked, answered, strict=True)]


def as_sequence(prompt: Sequence[int], completion: Sequence[int]) -> TokenSequence:
    """A prompt and what was written after it, which is scored."""
    return TokenSequence(ids=(*prompt, *completion), answer_spans=((len(prompt), len(prompt) + len(completion)),))


def student_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> TransformersStudent:
    """The engine over `model`."""
    return TransformersStudent(model, vocabulary_of(tokenizer, len(tokenizer), (END,)), OptimiserSettings(weight_decay=0.1, betas=(0.9, 0.98)))


def epochs(sequences: Sequence[TokenSequence], *, times: int, per_step: int, seed: int) -> Iterator[list[TokenSequence]]:
    """Steps of `per_step` sequences, each sequence `times` times, shuffled anew each time; what is left of a pass is a smaller step."""
    rng = random.Random(f"order {seed}")
    for _ in range(times):
        order = list(range(len(sequences)))
        rng.shuffle(order)
        for begin in range(0, len(order), per_step):
            yield [sequences[index] for index in order[begin : begin + per_step]]


def train(
    student: TransformersStudent,
    steps: Iterable[list[TokenSequence]],
    *,
    count: int,
    peak: float,
    warmup: int = 100,
    told: Callable[[int, float], None] | None = None,
) -> None:
    """Minimises the cross-entropy of the scored tokens over `count` steps; the rate rises to `peak` and falls as a cosine. `told` gets step and nats."""
    objective = Objective(terms=(WeightedTerm(divergence=DIVERGENCES["cross_entropy"]()),))
    for step, sequences in enumerate(islice(steps, count)):
        targets = text_targets(sequences, student.vocabulary)
        batch = Batch(sequences=tuple(sequences), targets=targets, labels=targets)
        sums = student.forward_backward(batch, objective, batch.scored_weight)
        fraction = (step + 1 - warmup) / max(1, count - warmup)
        rate = (step + 1) / warmup if step < warmup else 0.5 * (1.0 + math.cos(math.pi * fraction))
        student.optim_step(peak * rate)
        if told is not None:
            told(step, sums.objective_nats / sums.scored_tokens)
