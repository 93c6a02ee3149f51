"""From a trained model to an answer: the output grows by one token at a time."""

import torch
from torch import Tensor

from torchformer.masks import padding_mask
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
    memory = model.encode(src)  # (B, S, C)
    memory_mask = padding_mask(src, model.config.src_pad_id)  # (B, 1, 1, S)
    running = torch.arange(len(src), device=src.device)  # the samples that have not stopped
    tgt = torch.full((len(src), 1), sos_id, device=src.device)  # (B, 1)
    while len(running) and tgt.shape[1] <= max_len:
        logits = model.decode(tgt, memory, memory_mask)  # (B, T, V)
        last = logits[:, -1].clone()  # (B, V)
        last[:, [model.config.tgt_pad_id, sos_id]] = -torch.inf
        chosen = last.argmax(dim=-1)  # (B,)
        going_on = chosen != eos_id
        running, chosen = running[going_on], chosen[going_on]
        memory, memory_mask = memory[going_on], memory_mask[going_on]
        tgt = torch.cat([tgt[going_on], chosen[:, None]], dim=1)  # (B, T + 1)
        for sample, token in zip(running.tolist(), chosen.tolist(), strict=True):
            answers[sample].append(token)
    return answers


def check_max_len(max_len: int, positions: int) -> None:
    if not 1 <= max_len < positions:
        raise ValueError(
            f"max_len must be 1 to {positions - 1}, got {max_len}: the model has {positions} "
            "positions, and one is the start token's"
        )
