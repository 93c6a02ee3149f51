"""What both twins say of decoding: a hypothesis, and which options make sense (no numbers here)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Ids = int | Sequence[int] | None  # of tokens that end an answer; None: only its length does


class Hypothesis(NamedTuple):
    """A whole answer, without start and end token, and how good it is: see `beam_search`."""

    tokens: list[int]
    score: float


def check_decoding(
    model: Any, max_len: int, sos_id: int, eos_id: Ids
) -> tuple[list[int], list[int]]:
    """The tokens that end an answer, and those that are never chosen: pad and start.

    A token that ends may be chosen, even if it is the pad or the start as well.  Raises ValueError
    where there is no source, no room for `max_len` tokens and a start, or no such token.
    """
    check_max_len(max_len, model.config.max_len)
    if model.encoder is None:
        raise ValueError("the model is decoder-only, there is no source to decode from")
    V = model.config.tgt_vocab_size
    ends = end_ids(eos_id, V)
    never = {model.config.tgt_pad_id, token_id("sos_id", sos_id, V)} - {*ends}
    return ends, never_ids(sorted(never), ends, V)


def check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number, got {value!r}")


def token_id(name: str, value: Any, vocab_size: int) -> int:
    """`value`, an integer of any kind.  Raises ValueError where the vocabulary does not have it."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_integer or not 0 <= value < vocab_size:
        raise ValueError(
            f"{name} must be a token of the vocabulary, an integer from 0 to {vocab_size - 1}, "
            f"got {value!r}"
        )
    return int(value)


def end_ids(eos_id: Ids, vocab_size: int) -> list[int]:
    """`eos_id` as a list: one id, or several, or none where it is None."""
    if eos_id is None:
        return []
    if not isinstance(eos_id, Sequence) or isinstance(eos_id, str):
        return [token_id("eos_id", eos_id, vocab_size)]
    if not eos_id:
        raise ValueError("eos_id is empty; where only max_len ends an answer, pass None")
    return [token_id("eos_id", token, vocab_size) for token in eos_id]


def never_ids(never: Sequence[int], ends: list[int], vocab_size: int) -> list[int]:
    """`never` as a list: tokens that are not chosen, and so do not end an answer either."""
    checked = [token_id("never", token, vocab_size) for token in never]
    if both := sorted({*checked} & {*ends}):
        raise ValueError(f"never and eos_id contradict each other: both have the token {both[0]}")
    if len({*checked}) == vocab_size:
        raise ValueError(f"no token may be chosen: all {vocab_size} are pads, starts or in never")
    return checked


def not_finite(top: list[float], samples: list[int], position: int) -> ValueError:
    """The error for logits from which nothing can be chosen, naming the first sample that has some.

    top       the largest logit of each row: NaN if any is, infinite if one is, -inf if all are
    samples   whose the rows are, each as many side by side as it has beams
    """
    row = next(i for i, x in enumerate(top) if not math.isfinite(x))
    return ValueError(
        f"the logits are {'NaN' if math.isnan(top[row]) else 'infinite'} at token {position} of "
        f"sample {samples[row * len(samples) // len(top)]}: a weight of the model is NaN or "
        "infinite, or so large that a sum overflowed"
    )


def check_max_len(max_len: int, positions: int) -> None:
    """Raises ValueError where the start token and `max_len` more do not fit the positions."""
    check_integer("max_len", max_len)
    if not 1 <= max_len < positions:
        raise ValueError(
            f"max_len must be 1 to {positions - 1}, got {max_len}: the model has {positions} "
            "positions, and one is the start token's"
        )


def check_beams(
    num_beams: int,
    num_return_sequences: int,
    length_penalty: float,
    early_stopping: bool,
    max_len: int,
) -> None:
    """Raises ValueError unless 1 <= num_return_sequences <= num_beams, and for other nonsense."""
    for name, n in (("num_beams", num_beams), ("num_return_sequences", num_return_sequences)):
        check_integer(name, n)
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences must be 1 to num_beams = {num_beams}, got {num_return_sequences}"
        )

    check_number("length_penalty", length_penalty)
    if not abs(length_penalty) * math.log(max_len + 1) < 700:  # n ** penalty would be infinite or 0
        raise ValueError(f"length_penalty must be a small number, got {length_penalty}")
    if not isinstance(early_stopping, bool):
        raise ValueError(f"early_stopping must be True or False, got {early_stopping!r}")


def check_rng(rng: Any, kind: type, example: str) -> None:
    """Raises TypeError where `rng` is no generator of the library's."""
    if not isinstance(rng, kind):
        raise TypeError(f"rng must be a generator, such as {example}, got {rng!r}")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for a temperature, top_k or top_p that means nothing."""
    check_number("temperature", temperature)
    check_integer("top_k", top_k)
    check_number("top_p", top_p)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}; for 0 there is greedy")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (all tokens), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
