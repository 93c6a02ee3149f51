"""How an English word is pronounced: by the dictionary, or by the model that the package brings.

    npformer.pronounce(["hypothesis", "npformer"])

The model has learned from the CMU Pronouncing Dictionary (tasks/g2p.py) and lies in weights/g2p,
with a certificate of where it is from and what it can do.  NumPy runs it.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from npformer.decoding import beam_search, greedy
from npformer.ops import Array
from npformer.tasks import EOS, SOS, g2p, pad
from npformer.tasks.ipa import to_ipa
from npformer.transformer import Transformer

SHIPPED = Path(__file__).parent / "weights" / "g2p"
N_TOGETHER = 256  # words that are decoded as one batch
N_ROWS = 640  # hypotheses of all of them: their keys and values take 400 MB at the most
LONGEST_LINE = 4096  # bytes; what follows is not even looked at


@dataclass(frozen=True)
class Pronunciation:
    """One way to say a word, and the others that were asked for."""

    word: str
    phones: tuple[str, ...]  # ARPAbet, as ("HH", "AY", ...), or with stress ("HH", "AY0", ...)
    source: str  # "dictionary" or "model"
    score: float | None = None  # the model's log-probability per phone; greedy has none
    others: tuple["Pronunciation", ...] = ()  # the next best

    def __str__(self) -> str:
        return " ".join(self.phones)

    @property
    def ipa(self) -> str:
        return to_ipa(self.phones)


class Alignment(NamedTuple):
    """Which letters each phone was read from: the cross-attention, a mean over heads and layers."""

    letters: list[str]
    phones: list[str]  # the last is the end
    weights: Array  # (T phones, S letters), rows that sum to 1


def pronounce(
    words: str | Iterable[str],
    *,
    nbest: int = 1,
    beam: int = 5,
    model: bool = False,
    stress: bool = False,
    weights: str | Path | None = None,
) -> list[Pronunciation]:
    """A pronunciation of each word, in their order.

    nbest     so many ways to say it at most: `.others` has all but the first
    beam      of the search that the model does; 1 is greedy, two to three times as fast
    model     ask the model even where the dictionary knows the word
    stress    with stress digits: 1 primary, 2 secondary, 0 none
    weights   a folder of `npformer train g2p` instead of the model that the package brings

    Raises ValueError, naming the word, for one that is not of letters (accents are dropped) and
    apostrophes or is longer than 40, and where stress is asked for and not known.
    """
    words = [words] if isinstance(words, str) else list(words)
    voice = shipped() if weights is None else Pronouncer.load(weights)
    answers = []
    for i in range(0, len(words), N_TOGETHER):
        asked = words[i : i + N_TOGETHER]
        answers += voice.answer(asked, nbest=nbest, beam=beam, model=model, stress=stress)
    for answer in answers:
        if isinstance(answer, ValueError):
            raise answer
    return answers


class Pronouncer:
    """A model and, in front of it, the dictionary."""

    def __init__(self, model: Transformer, task: g2p.G2P):
        self.model, self.task = model, task

    @classmethod
    def load(cls, folder: str | Path) -> "Pronouncer":
        """Raises CheckpointError for a folder without a model of pronunciation, or with NaN."""
        from npformer.checkpoint import MODEL, CheckpointError, check_finite
        from npformer.training import RUN, load_run

        task = load_run(folder)["task"]
        if task not in g2p.NAMES:
            raise CheckpointError(f"{Path(folder) / RUN}: a model of {task}, not of pronunciation")
        model = Transformer.load(folder)
        weights = {name: p.data for name, p in model.named_parameters()}
        check_finite(Path(folder) / MODEL, weights)
        return cls(model, g2p.make(task))

    def answer(
        self, words: Sequence[str], *, nbest: int, beam: int, model: bool, stress: bool
    ) -> list[Any]:
        """For each word its Pronunciation, or the ValueError that says why there is none."""
        if nbest < 1 or beam < 1:
            raise ValueError(f"nbest and beam must be at least 1, got {nbest} and {beam}")
        answers: list[Any] = [None] * len(words)
        unknown: list[tuple[int, list[int]]] = []  # where, and the letters' ids
        for i, word in enumerate(words):
            try:
                spelled = plain(word)
                ids = self.task.parse(spelled)
                known = [] if model else g2p.look_up(spelled)
                if known:
                    ways = [(way, None) for way in _distinct(known, stress)]
                    answers[i] = _best(word, ways[:nbest], "dictionary")
                elif stress and not self.task.stress:
                    raise ValueError(
                        f"{g2p.shown(word)}: the model knows no stress, only the dictionary does; "
                        "npformer train g2p-stress makes one that does"
                    )
                else:
                    unknown.append((i, ids))
            except ValueError as error:
                answers[i] = error
        if unknown:
            found = self._decode([ids for _, ids in unknown], nbest, beam)
            for (i, _), hypotheses in zip(unknown, found, strict=True):
                ways = _distinct([way for way, _ in hypotheses], stress)
                scores = {_without(way, stress): score for way, score in reversed(hypotheses)}
                answers[i] = _best(words[i], [(way, scores[way]) for way in ways], "model")
        return answers

    def _decode(self, sources: list[list[int]], nbest: int, beam: int) -> list[list]:
        """Of each word the phones and their score, best first."""
        n_words = max(1, N_ROWS // max(beam, nbest))
        if len(sources) > n_words:
            parts = [sources[i : i + n_words] for i in range(0, len(sources), n_words)]
            return [answer for part in parts for answer in self._decode(part, nbest, beam)]
        decode, src = self.task.tgt_vocabulary.decode, pad(sources)
        options: dict[str, Any] = {"max_len": self.task.max_tgt_len, "sos_id": SOS, "eos_id": EOS}
        if beam == nbest == 1:
            return [[(decode(ids), None)] for ids in greedy(self.model, src, **options)]
        options |= {"num_beams": max(beam, nbest), "num_return_sequences": nbest}
        found = beam_search(self.model, src, **options)
        return [[(decode(h.tokens), h.score) for h in hypotheses] for hypotheses in found]

    def align(self, word: str) -> Alignment:
        """Where the model looks while it says the word, by greedy decoding."""
        src = np.array([self.task.parse(plain(word))])  # (1, S)
        options: dict[str, Any] = {"max_len": self.task.max_tgt_len, "sos_id": SOS, "eos_id": EOS}
        (answer,) = greedy(self.model, src, **options)
        seen = cross_attention(self.model, src, np.array([[SOS, *answer]]))  # (L, H, T, S)
        phones = [*self.task.tgt_vocabulary.decode(answer), "end"]
        return Alignment(list(plain(word)), phones, seen.mean(axis=(0, 1)))


@cache
def shipped() -> Pronouncer:
    """The one that the package brings."""
    return Pronouncer.load(SHIPPED)


def cross_attention(model: Transformer, src: Array, tgt: Array) -> Array:
    """src (1, S)   tgt (1, T)   ->   the weights of every decoder layer and head (L, H, T, S)"""
    from npformer.tracing import trace

    seen = trace(model, src, tgt)
    layers = range(model.config.n_decoder_layers)
    return np.stack([seen[f"decoder.layers.{i}.cross_attn.weights"].value[0] for i in layers])


def plain(word: str) -> str:
    """Lower case, without accents, and with the straight apostrophe."""
    letters = unicodedata.normalize("NFKD", word.strip().replace("’", "'")).casefold()
    return "".join(c for c in letters if not unicodedata.combining(c))


def arriving(stream: BinaryIO) -> Iterator[list[str]]:
    """The lines of a stream as they come, up to N_TOGETHER at once: none waits for another.

    Of a line longer than LONGEST_LINE only the beginning is kept, so memory is bounded.
    """
    pending = b""
    while chunk := stream.read1(1 << 16):  # type: ignore[attr-defined]
        *lines, pending = (pending + chunk).split(b"\n")
        pending = pending[:LONGEST_LINE]
        for i in range(0, len(lines), N_TOGETHER):
            yield [_text(line) for line in lines[i : i + N_TOGETHER]]
    if pending:
        yield [_text(pending)]


def _text(line: bytes) -> str:
    # What is not UTF-8 becomes U+FFFD, which is no letter: refused as any other
    return line[:LONGEST_LINE].decode("utf-8", errors="replace").rstrip("\r")


def _without(phones: Sequence[str], stress: bool) -> tuple[str, ...]:
    return tuple(phones if stress else (phone.rstrip("012") for phone in phones))


def _distinct(ways: Iterable[Sequence[str]], stress: bool) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(_without(way, stress) for way in ways))


def _best(word: str, ways: Sequence[tuple[tuple[str, ...], float | None]], source: str):
    first, *others = (Pronunciation(word, way, source, score) for way, score in ways)
    return Pronunciation(word, first.phones, source, first.score, tuple(others))
