"""What the guard's tests share: keys by number, texts from a keyed sampler, and how many rejections are more than chance."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from stillroom.guard.decoys import LiveKey
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.schemes import Scheme
from stillroom.targets.vocabulary import Vocabulary

# A test over random keys fails by chance less often than this.
CHANCE = 1e-6


def key(number: int) -> Key:
    return Key(hashlib.sha256(f"a key of a test: {number}".encode()).digest())


def live_key(number: int, decoys: int = 0) -> LiveKey:
    return LiveKey(key(number), decoys)


def more_than_chance(count: int, trials: int, share: float) -> bool:
    """Whether so many of `trials` independent events of probability at most `share` happen less often than once in a million."""
    return log_binomial_tail(trials, share, count) < math.log(CHANCE)


def vocabulary(size: int, rows: int | None = None) -> Vocabulary:
    return Vocabulary(tokens=tuple(f"<{index}>".encode() for index in range(size)), special={}, end_ids=(), rows=rows or size)


def random_model(size: int, rng: np.random.Generator, spread: float = 1.5) -> np.ndarray:
    """Log-probabilities of the next token after each token."""
    logits = rng.normal(size=(size, size)) * spread
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def write(scheme: Scheme | None, with_key: Key | None, model: np.ndarray, texts: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Texts of an order-1 model, from the keyed sampler or (None) from the model itself: texts x length."""
    size = len(model)
    window = 1 if scheme is None else scheme.window
    ids = rng.integers(0, size, size=(texts, window))
    candidates = np.broadcast_to(np.arange(size), (texts, size))
    while ids.shape[1] < length:
        log_probs = model[ids[:, -1]]
        if scheme is not None:
            assert with_key is not None
            log_probs = scheme.watermarked(with_key, ids[:, -window:], candidates, log_probs)
        drawn = np.argmax(log_probs + rng.gumbel(size=(texts, size)), axis=1)
        ids = np.concatenate([ids, drawn[:, None]], axis=1)
    return ids
