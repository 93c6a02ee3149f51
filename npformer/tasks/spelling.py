"""What was typed   ->   how the dictionary and the model spell it.

    “Café,”   ->   cafe            ‘Tis   ->   'tis            x‑RAY   ->   x-ray

Accents go, capitals become small, and each letter, apostrophe or hyphen that Unicode has in several
forms becomes the plain one.  Signs that merely contain a letter do not become that letter: Nº is
not "no", nor is Google™ "googletm".
"""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

from npformer.tasks.task import shown

# Letters that are no letter with an accent, and that English spells in this way
LETTERS = {"æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ħ": "h"}
LETTERS |= {"ŧ": "t", "ŋ": "ng", "ı": "i", "ĳ": "ij"}
APOSTROPHES = "’‘‛ʼʻʹ′`´ꞌ"
HYPHENS = "‐‑‒–−﹣"
# What may stand around a word, unspoken
AROUND = frozenset("'\"“”„‟‚«»‹›「」『』《》〈〉.,;:!?¡¿…、。()[]{}-—―™®℠")
PLAIN = LETTERS | dict.fromkeys(APOSTROPHES, "'") | dict.fromkeys(HYPHENS, "-")


def plain(text: str) -> str:
    """Small letters, without accents, with plain apostrophes and hyphens."""
    return "".join(map(_plain, text)).strip()


@lru_cache(maxsize=4096)
def _plain(character: str) -> str:
    kind, _, code = unicodedata.decomposition(character).partition(" ")
    if kind in ("<wide>", "<narrow>"):  # Ａ, as in East Asian type
        character = chr(int(code, 16))
    # casefold knows ligatures (ﬁ) and ß; NFD parts a letter from its accents, and nothing else
    parts = unicodedata.normalize("NFD", character.casefold())
    seen = (c for c in parts if unicodedata.category(c) not in ("Mn", "Cf"))  # accents; invisible
    return "".join(PLAIN.get(c, c) for c in seen)


class Spelling(NamedTuple):
    """A word as it may be meant."""

    ways: list[str]  # for the dictionary, likeliest first
    word: str  # for the model
    odd: str  # the first character as typed that the model has no letter for, or ""


def spell(text: str) -> Spelling:
    """The punctuation around a word is left out, but may be the word's own: 'tis, dogs', mr.

    Raises ValueError where there is no letter.
    """
    places = [i for i, c in enumerate(text) if re.search("[a-z]", _plain(c))]
    if not places:
        raise ValueError(_without_letters(text))
    start, end = places[0], places[-1] + 1
    before, word, after = plain(text[:start]), plain(text[start:end]), plain(text[end:])
    around = [c for c in (text[:start] + text[end:]).strip() if not AROUND.issuperset(_plain(c))]
    odd = [c for c in text[start:end] if not re.fullmatch("[a-z']*", _plain(c))] + around
    lead, trail = "'" * before.endswith("'"), after[:1] if after[:1] in ("'", ".") else ""
    heads, tails = [lead, ""], [trail, ""]
    if quoted := "'" in before and "'" in after:  # a pair: the word's own is less likely
        heads, tails = ["", lead], ["", trail] if trail == "'" else tails
    ways = [head + word + tail for head in heads for tail in tails]
    own = word if quoted else lead + word + trail.strip(".")
    return Spelling([] if around else ways, own, odd[0] if odd else "")


def variant(text: str) -> tuple[str, int]:
    """ "tomato(2)", as the dictionary numbers the ways to say a word -> tomato, 2; without, 0."""
    around = re.escape("".join(AROUND))
    found = re.fullmatch(rf"(.*[a-z][^(]*)\(([1-9][0-9]?)\)[{around}]*", plain(text), re.DOTALL)
    return (found[1], int(found[2])) if found else (text, 0)


def named(character: str) -> str:
    """A character in a message: many look like another one."""
    name = "" if character.isascii() else unicodedata.name(character, "")
    return f"{character!r} ({name})" if name else repr(character)


def _without_letters(text: str) -> str:
    expected = "expected a word, such as hypothesis"
    seen = [c for c in text.strip() if _plain(c).strip()]
    if not seen:
        return f"{shown(text)} is empty input: {expected}"
    odd = next((c for c in seen if not AROUND.issuperset(_plain(c))), seen[0])
    return f"{shown(text)} has {named(odd)} and no letter a-z: {expected}"
