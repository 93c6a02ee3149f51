"""From a trained model to an answer: the output grows by one token at a time."""

import torch
from torch import Tensor

from torchformer.transformer import Transformer


@torch.no_grad()
def greedy(
    model: Transformer, src: Tensor, *, max_len: int, sos_id: int = 1, eos_id: int = 2
) -> list[list[int]]:
    """The most likely next token, again and again, until `eos_id` or `max_len` tokens.

    src (B, S) ids   ->   B lists of ids, without `sos_id` and `eos_id`.  Each sample stops on its
    own, and those that are done are no longer computed.  Call model.eval() first.
    """
    check_max_len(max_len, model.config.max_len)
    if model.encoder is None:
        raise ValueError("greedy: the model is decoder-only, there is no source to decode from")
    answers: list[list[int]] = [[] for _ in src]
    cache = model.start(src)
    running = torch.arange(len(src), device=src.device)  # the samples that have not stopped
    token = torch.full((len(src),), sos_id, device=src.device)  # (B,)
    while len(running) and cache.length < max_len:
        logits, cache = model.step(token[:, None], cache)  # (B, 1, V)
        last = logits[:, -1].clone()  # (B, V)
        last[:, [model.config.tgt_pad_id, sos_id]] = -torch.inf
        token = last.argmax(dim=-1)  # (B,)
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
