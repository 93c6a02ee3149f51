"""What every task shares: special tokens, vocabularies, padded batches, held-out examples."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from npformer.ops import Array

PAD, SOS, EOS = 0, 1, 2  # in every vocabulary; the first real token is 3
SPECIAL = ("<pad>", "<sos>", "<eos>")


class Vocabulary:
    """Tokens and their ids: 0, 1, 2 are pad, start and end, the given tokens follow."""

    def __init__(self, tokens: Iterable[str]):
        self.tokens = (*SPECIAL, *tokens)
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Raises ValueError, naming the token, for one that is not in the vocabulary."""
        ids = []
        for token in tokens:
            if token not in self.ids or token in SPECIAL:
                known = self.tokens[3:]
                listed = "".join(known) if all(len(t) == 1 for t in known) else " ".join(known)
                raise ValueError(f"unknown token {token!r}; the vocabulary is {listed}")
            ids.append(self.ids[token])
        return ids

    def decode(self, ids: Iterable[int]) -> list[str]:
        return [self.tokens[i] for i in ids]


class Batch(NamedTuple):
    """src (B, S) source ids;  tgt (B, T + 1) = SOS, the answer, EOS; both padded on the right.

    Teacher forcing: at each position the model reads the true tokens so far (`tgt_in`) and is
    asked for the next one (`tgt_out`): the same row, shifted by one.
    """

    src: Array
    tgt: Array

    @property
    def tgt_in(self) -> Array:  # (B, T)
        return self.tgt[:, :-1]

    @property
    def tgt_out(self) -> Array:  # (B, T)
        return self.tgt[:, 1:]


@dataclass(frozen=True)
class Example:
    """A source and every answer that counts as right, as ids without SOS and EOS."""

    src: list[int]
    references: list[list[int]]


def pad(sequences: Iterable[Iterable[int]]) -> Array:
    """Lists of ids   ->   (B, longest), filled with PAD on the right."""
    sequences = [list(sequence) for sequence in sequences]
    ids = np.full((len(sequences), max(map(len, sequences))), PAD)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids


def make_batch(pairs: Iterable[tuple[Iterable[int], Iterable[int]]]) -> Batch:
    pairs = list(pairs)
    return Batch(pad(src for src, _ in pairs), pad([SOS, *tgt, EOS] for _, tgt in pairs))


def fold(text: str, n: int) -> int:
    """Which of n folds a text falls into: a hash, so the split needs no list and never changes."""
    return zlib.crc32(text.encode()) % n


class Task:
    """Vocabularies, batches to train on, held-out examples, and the score of answers to them."""

    name: str
    src_vocabulary: Vocabulary
    tgt_vocabulary: Vocabulary
    max_src_len: int  # tokens
    max_tgt_len: int  # tokens of an answer, without SOS and EOS
    metric: str  # the score that decides which checkpoint is best
    lower_is_better: bool

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of step 1, 2, ...: `size` examples, none of them held out."""
        raise NotImplementedError

    def dev(self) -> list[Example]:
        """Held out, to choose the best checkpoint by."""
        raise NotImplementedError

    def test(self) -> list[Example]:
        """Held out, to be looked at once, at the end."""
        raise NotImplementedError

    def score(self, examples: Iterable[Example], answers: Iterable[list[int]]) -> dict[str, float]:
        """Fractions by name, `metric` among them."""
        raise NotImplementedError

    def provenance(self) -> dict[str, str]:
        """Where the data is from and how it is split, for whoever gets the weights."""
        raise NotImplementedError

    def parse(self, text: str) -> list[int]:
        """A line of input as source ids.  Raises ValueError with one clear line."""
        raise NotImplementedError

    def format(self, ids: Iterable[int]) -> str:
        """An answer as text."""
        raise NotImplementedError

    def better(self, score: float, best: float | None) -> bool:
        if best is None:
            return True
        return score < best if self.lower_is_better else score > best

    def _check_length(self, ids: list[int], text: str, what: str) -> list[int]:
        """`text` is what was typed, `what` is expected."""
        if not ids:
            raise ValueError(f"{shown(text)} is empty input: expected {what}")
        if len(ids) > self.max_src_len:
            raise ValueError(
                f"{shown(text)}: {len(ids)} tokens are too many: at most {self.max_src_len}"
            )
        return ids


def shown(text: str) -> str:
    """The text in a message: quoted, in one line, and not all of it if it is long."""
    text = text.strip()
    return repr(text if len(text) <= 40 else f"{text[:36]} ...")
