"""From a trained model to an answer: the output grows by one token at a time.

In training all positions are predicted at once, each from the true tokens before it.  Here there
is no truth to look at: each token is chosen from the logits of the last position and then becomes
part of the input.  What was computed for the earlier ones is kept, see cache.py.
"""

import numpy as np

from npformer.ops import Array
from npformer.transformer import Transformer


def greedy(
    model: Transformer, src: Array, *, max_len: int, sos_id: int = 1, eos_id: int = 2
) -> list[list[int]]:
    """The most likely next token, again and again, until `eos_id` or `max_len` tokens.

    src (B, S) ids   ->   B lists of ids, without `sos_id` and `eos_id`.  Each sample stops on its
    own, and those that are done are no longer computed.  Ties go to the lower id; pad and sos are
    never chosen.  Raises ValueError where max_len + 1 exceeds the model's positions.
    """
    check_max_len(max_len, model.config.max_len)
    if model.encoder is None:
        raise ValueError("greedy: the model is decoder-only, there is no source to decode from")
    answers: list[list[int]] = [[] for _ in src]
    cache = model.start(src)
    running = np.arange(len(src))  # the samples that have not stopped
    token = np.full(len(src), sos_id)  # (B,)
    while running.size and cache.length < max_len:
        logits, cache = model.step(token[:, np.newaxis], cache)  # (B, 1, V)
        last = logits[:, -1].copy()  # (B, V)
        last[:, [model.config.tgt_pad_id, sos_id]] = -np.inf
        token = last.argmax(axis=-1)  # (B,)
        going_on = token != eos_id
        if not going_on.all():
            running, token, cache = running[going_on], token[going_on], cache.select(going_on)
        for sample, chosen in zip(running.tolist(), token.tolist(), strict=True):
            answers[sample].append(chosen)
    return answers


def check_max_len(max_len: int, positions: int) -> None:
    """Raises ValueError where the start token and `max_len` more do not fit the positions."""
    if not 1 <= max_len < positions:
        raise ValueError(
            f"max_len must be 1 to {positions - 1}, got {max_len}: the model has {positions} "
            "positions, and one is the start token's"
        )
