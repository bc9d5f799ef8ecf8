"""Writing: token ids in, token ids out, with a key-value cache. One decoder for teachers and students, so that their speeds compare.

B sequences in the batch, T positions, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from stillroom.core.identities import Sampling, TokenIds
from stillroom.core.seeds import derive_seed
from stillroom.models.arithmetic import not_compiled
from stillroom.models.batching import by_length, left_padded
from stillroom.targets.protocols import LogitsTransform

# Finished sequences leave the batch once they are this share of it: shrinking the cache costs a copy.
_SHRINK_BELOW = 0.6


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    sampling: Sampling,
    *,
    end_ids: frozenset[int],
    size: int,
    at_once: int = 256,
    stop_at_end: bool = True,
    transform: LogitsTransform | None = None,
) -> list[TokenIds]:
    """One completion for each prompt, the end token included where it was reached within `sampling.max_new_tokens`.

    Only the first `size` ids (the real tokens) can be drawn. With `stop_at_end` False every completion has exactly `max_new_tokens` tokens.
    Prompts of similar length are decoded together, `at_once` at most; the grouping and the draws are functions of the arguments alone.
    """
    completions: list[TokenIds] = [()] * len(prompts)
    for number, group in enumerate(by_length([len(prompt) for prompt in prompts], at_once)):
        generator = torch.Generator().manual_seed(derive_seed(sampling.seed, "rollout", number))
        part = [prompts[index] for index in group]
        stop = end_ids if stop_at_end else frozenset[int]()
        with not_compiled(model):
            written = _decode_group(model, part, sampling, stop, size, generator, transform)
        for index, tokens in zip(group, written, strict=True):
            completions[index] = tokens
    return completions


def _decode_group(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    sampling: Sampling,
    end_ids: frozenset[int],
    size: int,
    generator: torch.Generator,
    transform: LogitsTransform | None,
) -> list[TokenIds]:
    device = model.device
    inputs_BT, mask_BT = left_padded(prompts, 0, device)
    context_BT = inputs_BT
    positions_BT = None if mask_BT is None else (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    written: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for _ in range(sampling.max_new_tokens):
        output = model(
            input_ids=inputs_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits_BV = output.logits[:, -1, :size]
        if transform is not None:
            logits_BV = transform(context_BT, logits_BV)
        next_B = choose_tokens(logits_BV, sampling.temperature, generator)
        for slot, token in zip(active, next_B.tolist(), strict=True):
            if not (written[slot] and written[slot][-1] in end_ids):
                written[slot].append(token)
        going = [row for row, slot in enumerate(active) if written[slot][-1] not in end_ids]
        if not going:
            break
        if transform is not None:
            context_BT = torch.cat([context_BT, next_B[:, None]], dim=1)
        if mask_BT is not None:
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(active), 1))], dim=1)
        if len(going) < _SHRINK_BELOW * len(active):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            next_B = next_B[keep]
            context_BT = context_BT[keep]
            mask_BT = None if mask_BT is None else mask_BT[keep]
            active = [active[row] for row in going]
        inputs_BT = next_B[:, None]
        positions_BT = None if mask_BT is None else mask_BT.sum(-1, keepdim=True) - 1
    return [tuple(tokens) for tokens in written]


def choose_tokens(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """The most probable token at temperature 0, else a draw; draws use CPU noise, so that they are the same on every device."""
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    noise = torch.rand(logits_BV.shape, generator=generator).clamp_(min=1e-20)
    gumbel = -torch.log(-torch.log(noise))
    return (logits_BV.float() / temperature + gumbel.to(logits_BV.device)).argmax(-1)
