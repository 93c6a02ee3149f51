"""How an English word is pronounced: by the dictionary, or by the model that the package brings.

    npformer.pronounce(["hypothesis", "npformer"])

The model has learned from the CMU Pronouncing Dictionary (tasks/g2p.py) and lies in weights/g2p,
with a certificate of where it is from and what it can do.  NumPy runs it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from npformer.decoding import beam_search, greedy
from npformer.ops import Array
from npformer.tasks import EOS, SOS, g2p, pad
from npformer.tasks.ipa import to_ipa
from npformer.tasks.spelling import named, plain, spell, variant
from npformer.tasks.task import shown
from npformer.transformer import Transformer

SHIPPED = Path(__file__).parent / "weights" / "g2p"
N_TOGETHER = 256  # words that are decoded as one batch
N_ROWS = 640  # hypotheses of all of them: their keys and values take 400 MB at the most
Way = tuple[Sequence[str], float | None]  # phones with all stress that is known, and their score


@dataclass(frozen=True)
class Pronunciation:
    """One way to say a word, and the others that were asked for."""

    word: str
    phones: tuple[str, ...]  # ARPAbet, as ("HH", "AY", ...), or with stress ("HH", "AY0", ...)
    source: str  # "dictionary" or "model"
    score: float | None = None  # the model's log-probability per phone; greedy has none
    others: tuple["Pronunciation", ...] = ()  # the next best
    spoken: tuple[str, ...] = field(default=(), repr=False)  # phones with all stress there is

    def __str__(self) -> str:
        return " ".join(self.phones)

    @property
    def ipa(self) -> str:
        """With the marks of stress where `phones` have it.

        Stress says which vowel it is as well: AH1 is ʌ and AH0 ə, ER1 ɝ and ER0 ɚ.  The dictionary
        has it always; the model that ships has not, and there the likelier one stands.
        """
        spoken = self.spoken or self.phones
        return to_ipa(spoken, marks=spoken == self.phones)


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
    errors: Literal["raise", "return"] = "raise",
) -> list[Any]:
    """A Pronunciation of each word, in their order.

    nbest     so many ways to say it at most: `.others` has all but the first
    beam      of the search that the model does; 1 is greedy, two to three times as fast
    model     ask the model even where the dictionary knows the word
    stress    with stress digits: 1 primary, 2 secondary, 0 none
    weights   a folder of `npformer train g2p` instead of the model that the package brings
    errors    "return": a word that is refused has its ValueError in the place of the answer

    Capitals, accents and the punctuation around a word make no difference, and "tomato(2)" is the
    dictionary's second way to say tomato.  A word that the dictionary does not have is of letters
    and apostrophes, at most 40.

    Raises ValueError, before anything is computed, which names the first word that is none or
    whose stress is asked for and not known.
    """
    if errors not in ("raise", "return"):
        raise ValueError(f'errors must be "raise" or "return", got {errors!r}')
    if isinstance(words, bytes) or not isinstance(words, Iterable):
        raise TypeError(f"words must be a word or several, got {words!r}: bytes need .decode()")
    words = [words] if isinstance(words, str) else list(words)
    voice = shipped() if weights is None else Pronouncer.load(weights)
    options = {"nbest": nbest, "beam": beam, "model": model, "stress": stress}
    return voice.answer(words, **options, errors=errors)


class _Asked(NamedTuple):
    """What is known of a word before the model is asked."""

    listed: list[list[str]]  # the ways to say it by the dictionary
    letters: list[int]  # ids, for the model, where there are none


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
        self,
        words: Sequence[str],
        *,
        nbest: int,
        beam: int,
        model: bool,
        stress: bool,
        ipa: bool = False,
        errors: str = "return",
    ) -> list[Any]:
        """For each word its Pronunciation, or the ValueError that says why there is none.

        ipa      ways are different where their IPA is, even if the phones without stress are not
        errors   "raise": the first error is raised, before the model is asked
        """
        if not all(isinstance(n, int | np.integer) and n >= 1 for n in (nbest, beam)):
            raise ValueError(f"nbest and beam must be at least 1, got {nbest!r} and {beam!r}")
        asked = [self._ask(word, model, stress) for word in words]
        refused = [each for each in asked if isinstance(each, ValueError)]
        if refused and errors == "raise":
            others = f" (and {len(refused) - 1} more are refused)" if len(refused) > 1 else ""
            raise ValueError(f"{refused[0]}{others}")

        def answer_of(i: int, ways: Iterable[Way], source: str) -> Pronunciation:
            different: dict[Any, Pronunciation] = {}
            for spoken, score in ways:
                phones = tuple(spoken if stress else (p.rstrip("012") for p in spoken))
                way = Pronunciation(words[i], phones, source, score, (), tuple(spoken))
                different.setdefault(way.ipa if ipa else phones, way)
            first, *others = list(different.values())[:nbest]
            return replace(first, others=tuple(others)) if others else first

        answers: list[Any] = list(asked)
        for i, each in enumerate(asked):
            if isinstance(each, _Asked) and each.listed:
                answers[i] = answer_of(i, ((way, None) for way in each.listed), "dictionary")
        unknown = [(i, each.letters) for i, each in enumerate(asked) if isinstance(each, _Asked)]
        unknown = [(i, letters) for i, letters in unknown if letters]
        for start in range(0, len(unknown), N_TOGETHER):
            part = unknown[start : start + N_TOGETHER]
            found = self._decode([letters for _, letters in part], nbest, beam)
            for (i, _), ways in zip(part, found, strict=True):
                answers[i] = answer_of(i, ways, "model")
        return answers

    def _ask(self, word: str, model: bool, stress: bool) -> "_Asked | ValueError":
        try:
            if not isinstance(word, str):
                raise ValueError(f"{word!r} is no word, its type is {type(word).__name__}")
            if not model and (listed := look_up(word)):
                return _Asked(listed, [])
            letters = self._letters(word)
            if stress and not self.task.stress:
                raise ValueError(
                    f"{shown(word)}: the model knows no stress, only the dictionary does; "
                    "npformer train g2p-stress makes one that does"
                )
            return _Asked([], letters)
        except ValueError as error:
            return error

    def _letters(self, word: str) -> list[int]:
        """The ids of a word for the model.  Raises ValueError, naming it."""
        spelling = spell(word)
        if spelling.odd:
            several = "; several words are given one by one" if spelling.odd.isspace() else ""
            known = look_up(word)
            who = "the model reads" if known else "a word that is not in the dictionary is"
            raise ValueError(
                f"{shown(word)} has {named(spelling.odd)}: {who} letters a-z and "
                f"apostrophes{several}"
            )
        return self.task.spelled(spelling.word, word)

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
        ids = self._letters(word)
        src = np.array([ids])  # (1, S)
        options: dict[str, Any] = {"max_len": self.task.max_tgt_len, "sos_id": SOS, "eos_id": EOS}
        (answer,) = greedy(self.model, src, **options)
        seen = cross_attention(self.model, src, np.array([[SOS, *answer]]))  # (L, H, T, S)
        phones = [*self.task.tgt_vocabulary.decode(answer), "end"]
        return Alignment(self.task.src_vocabulary.decode(ids), phones, seen.mean(axis=(0, 1)))


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


def look_up(word: str) -> list[list[str]]:
    """Every pronunciation that the dictionary has of a word as it was typed, with stress digits.

    As it stands, or else without the punctuation around it.  Raises ValueError for one that is
    nothing but punctuation, and for the third way to say a word that has two.
    """
    if ways := g2p.look_up(plain(word)):
        return ways
    text, n = variant(word)
    spelled = next(filter(g2p.look_up, [text, *spell(text).ways]), "")
    ways = g2p.look_up(spelled)
    if 0 < len(ways) < n:
        raise ValueError(f"{shown(word)}: the ways to say {spelled} are {len(ways)}")
    return ways[n - 1 : n] if n else ways
