"""From a trained model to an answer: the output grows by one token at a time.

In training all positions are predicted at once, each from the true tokens before it.  Here there
is no truth to look at: each token is chosen from the logits of the last position and then becomes
part of the input.
"""

import numpy as np

from npformer.masks import padding_mask
from npformer.module import no_grad
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
    with no_grad():
        memory, _ = model.encode(src)  # (B, S, C)
        memory_mask = padding_mask(src, model.config.src_pad_id)  # (B, 1, 1, S)
        running = np.arange(len(src))  # the samples that have not stopped
        tgt = np.full((len(src), 1), sos_id)  # (B, 1)
        while running.size and tgt.shape[1] <= max_len:
            logits, _ = model.decode(tgt, memory, memory_mask)  # (B, T, V)
            last = logits[:, -1].copy()  # (B, V)
            last[:, [model.config.tgt_pad_id, sos_id]] = -np.inf
            chosen = last.argmax(axis=-1)  # (B,)
            going_on = chosen != eos_id
            running, chosen = running[going_on], chosen[going_on]
            memory, memory_mask = memory[going_on], memory_mask[going_on]
            tgt = np.concatenate([tgt[going_on], chosen[:, np.newaxis]], axis=1)  # (B, T + 1)
            for sample, token in zip(running.tolist(), chosen.tolist(), strict=True):
                answers[sample].append(token)
    return answers


def check_max_len(max_len: int, positions: int) -> None:
    if not 1 <= max_len < positions:
        raise ValueError(
            f"max_len must be 1 to {positions - 1}, got {max_len}: the model has {positions} "
            "positions, and one is the start token's"
        )
