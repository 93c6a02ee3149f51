"""Sorting and reversing digits: small enough to learn in a minute, hard enough to need attention.

    sort          3 to 8 random digits, sorted               312     ->  1 2 3
    reverse       3 to 8 random digits, in reverse           312     ->  2 1 3
    repeats       the same as sort, but from 2 to 4 different digits only: counting is what is hard
    permutation   the ten digits in any order, sorted        the answer is always 0123456789
    digits        a mix of sort, repeats and permutation

Tokens: pad, start, end are 0, 1, 2, and the digit d is d + 3.  A tenth of all sequences, chosen by
hash, is held out: no model is ever trained on one of them.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from npformer.ops import Rng
from npformer.tasks.task import Batch, Example, Task, Vocabulary, fold, make_batch

SHORTEST, LONGEST = 3, 8
HELD_OUT = 10  # one sequence in ten


class Digits(Task):
    """A sequence of digits in, the same digits in another order out."""

    metric = "exact_match"  # the fraction of sequences that come out right from first to last
    lower_is_better = False
    max_src_len = max_tgt_len = 10

    def __init__(self, name: str):
        self.name = name
        self.src_vocabulary = self.tgt_vocabulary = Vocabulary("0123456789")

    def draw(self, rng: Rng) -> list[int]:
        """One sequence of digits, held out or not."""
        kind = self.name
        if kind == "digits":
            kind = ("sort", "repeats", "permutation")[rng.integers(3)]
        if kind == "permutation":
            return rng.permutation(10).tolist()
        n = rng.integers(SHORTEST, LONGEST + 1)
        if kind == "repeats":
            few = rng.choice(10, size=rng.integers(2, 5), replace=False)
            return few[rng.integers(len(few), size=n)].tolist()
        return rng.integers(10, size=n).tolist()

    def answer(self, digits: Iterable[int]) -> list[int]:
        return [*digits][::-1] if self.name == "reverse" else sorted(digits)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        pairs = []
        while len(pairs) < size:
            digits = self.draw(rng)
            if not is_held_out(digits):
                pairs.append((_ids(digits), _ids(self.answer(digits))))
        return make_batch(pairs)

    def dev(self) -> list[Example]:
        return self._held_out(500, seed=1)

    def test(self) -> list[Example]:
        return self._held_out(2000, seed=2)

    @cache  # noqa: B019  tasks live as long as the process
    def _held_out(self, n: int, seed: int) -> list[Example]:
        """n different held-out sequences; those of dev and test may have some in common."""
        rng = np.random.default_rng(seed)
        found: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        while len(found) < n:
            digits = self.draw(rng)
            if is_held_out(digits):
                found[tuple(digits)] = None
        return [Example(_ids(digits), [_ids(self.answer(digits))]) for digits in found]

    def score(self, examples: Iterable[Example], answers: Iterable[list[int]]) -> dict[str, float]:
        """exact_match over all, and over the long ones (6 digits and more) alone."""
        examples = list(examples)
        right = [list(a) in e.references for e, a in zip(examples, answers, strict=True)]
        long = [r for e, r in zip(examples, right, strict=True) if len(e.src) >= 6]
        scores = {"exact_match": sum(right) / len(right)}
        if long:
            scores["exact_match_long"] = sum(long) / len(long)
        return scores

    def provenance(self) -> dict[str, str]:
        return {
            "source": "digits drawn from the seed",
            "split": f"crc32 of the digits as text, mod {HELD_OUT}: 0 is held out",
        }

    def parse(self, text: str) -> list[int]:
        ids = self.src_vocabulary.encode(text.replace(" ", "").replace(",", "").strip())
        return self._check_length(ids, text, "digits, such as 312")

    def format(self, ids: Iterable[int]) -> str:
        return "".join(self.tgt_vocabulary.decode(ids))


def is_held_out(digits: Sequence[int]) -> bool:
    return fold("".join(map(str, digits)), HELD_OUT) == 0


def _ids(digits: Sequence[int]) -> list[int]:
    return [d + 3 for d in digits]


def make(name: str) -> Digits:
    return Digits(name)
