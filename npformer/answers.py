"""What both twins say of decoding: a hypothesis, and which options make sense (no arrays here)."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from npformer.options import flag, integer, number, real

Ids = int | Iterable[int] | None  # of tokens that end an answer; None: none does


class Hypothesis(NamedTuple):
    """A whole answer, without start and end token, and how good it is: see `beam_search`."""

    tokens: list[int]
    score: float


class Asked(NamedTuple):
    """The options of every way to decode, checked, as Python's own numbers."""

    max_len: int
    sos_id: int
    ends: list[int]  # the tokens that end an answer
    never: list[int]  # those that are never chosen: pad and start, unless they end


def check_decoding(model: Any, max_len: int, sos_id: int, eos_id: Ids) -> Asked:
    """Raises ValueError for no source, no room for `max_len` tokens and a start, no such token."""
    max_len = check_max_len(max_len, model.config.max_len)
    if model.encoder is None:
        raise ValueError("the model is decoder-only, there is no source to decode from")
    V = model.config.tgt_vocab_size
    sos_id, ends = token_id("sos_id", sos_id, V), end_ids(eos_id, V)
    never = {model.config.tgt_pad_id, sos_id} - {*ends}
    return Asked(max_len, sos_id, ends, never_ids(sorted(never), ends, V))


def token_id(name: str, value: Any, vocab_size: int) -> int:
    token = integer(name, value)
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name} must be 0 to {vocab_size - 1}, a token's, got {token}")
    return token


def end_ids(eos_id: Ids, vocab_size: int) -> list[int]:
    """`eos_id` as a list: of one id, of several, or of none where it is None."""
    if eos_id is None:
        return []
    try:
        several = [*eos_id]  # pyright: ignore[reportGeneralTypeIssues]
    except TypeError:
        several = [eos_id]
    if not several:
        raise ValueError("eos_id is empty: pass None where nothing but the length ends an answer")
    return [token_id("eos_id", token, vocab_size) for token in several]


def never_ids(never: Iterable[int], ends: list[int], vocab_size: int) -> list[int]:
    """`never` as a list: tokens that are not chosen, and so do not end an answer either."""
    checked = [token_id("never", token, vocab_size) for token in never]
    if both := sorted({*checked} & {*ends}):
        raise ValueError(f"never and eos_id contradict each other: {both[0]} is in both")
    if len({*checked}) == vocab_size:
        raise ValueError(f"none of the {vocab_size} tokens may be chosen: eos_id names none either")
    return checked


def check_max_len(max_len: int, positions: int) -> int:
    """Raises ValueError where the start token and `max_len` more do not fit the positions."""
    max_len = integer("max_len", max_len)
    if not 1 <= max_len < positions:
        raise ValueError(
            f"max_len must be 1 to {positions - 1}, got {max_len}: the model has {positions} "
            "positions, and one is the start token's"
        )
    return max_len


def check_beams(
    num_beams: int,
    num_return_sequences: int,
    length_penalty: float,
    early_stopping: bool,
    max_len: int,
) -> tuple[int, int, float]:
    """Raises ValueError unless 1 <= num_return_sequences <= num_beams, and where some length to
    the power of the penalty is no positive number."""
    num_beams = integer("num_beams", num_beams, 1)
    num_return_sequences = integer("num_return_sequences", num_return_sequences)
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences must be 1 to num_beams = {num_beams}, got {num_return_sequences}"
        )
    flag("early_stopping", early_stopping)
    length_penalty = number("length_penalty", length_penalty)
    if abs(length_penalty) * math.log(max_len) > 600:  # e^600 = 10^260
        raise ValueError(f"length_penalty is a power of the length, got {length_penalty}")
    return num_beams, num_return_sequences, length_penalty


def check_sampling(temperature: float, top_k: int, top_p: float) -> tuple[float, int, float]:
    """Raises ValueError for a temperature, top_k or top_p that means nothing."""
    temperature, top_k = real("temperature", temperature), integer("top_k", top_k, 0)
    top_p = real("top_p", top_p)
    if not 1e-30 < temperature < math.inf:  # a logit divided by less may overflow
        raise ValueError(f"temperature must be positive, got {temperature}; for 0 there is greedy")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    return temperature, top_k, top_p


def check_rng(rng: Any, kind: type, example: str) -> None:
    """Raises TypeError where `rng` is none of the library's generators, a seed for example."""
    if not isinstance(rng, kind):
        raise TypeError(f"rng must be a generator, such as {example}, got {rng!r}")


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
