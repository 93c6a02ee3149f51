"""What both twins say of decoding: a hypothesis, and which options make sense (no numbers here)."""

import math
from typing import Any, NamedTuple


class Hypothesis(NamedTuple):
    """A whole answer, without start and end token, and how good it is: see `beam_search`."""

    tokens: list[int]
    score: float


def check_decoding(model: Any, max_len: int) -> None:
    """Raises ValueError where there is no source, or no room for `max_len` tokens and a start."""
    check_max_len(max_len, model.config.max_len)
    if model.encoder is None:
        raise ValueError("the model is decoder-only, there is no source to decode from")


def check_max_len(max_len: int, positions: int) -> None:
    """Raises ValueError where the start token and `max_len` more do not fit the positions."""
    if not 1 <= max_len < positions:
        raise ValueError(
            f"max_len must be 1 to {positions - 1}, got {max_len}: the model has {positions} "
            "positions, and one is the start token's"
        )


def check_beams(num_beams: int, num_return_sequences: int) -> None:
    """Raises ValueError unless 1 <= num_return_sequences <= num_beams."""
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences must be 1 to num_beams = {num_beams}, got {num_return_sequences}"
        )


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for a temperature, top_k or top_p that means nothing."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}; for 0 there is greedy")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (all tokens), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
