"""ARPAbet in the letters of the International Phonetic Alphabet, as for American English."""

from collections.abc import Sequence

CONSONANTS = {
    "B": "b",
    "CH": "tʃ",
    "D": "d",
    "DH": "ð",
    "F": "f",
    "G": "ɡ",
    "HH": "h",
    "JH": "dʒ",
    "K": "k",
    "L": "l",
    "M": "m",
    "N": "n",
    "NG": "ŋ",
    "P": "p",
    "R": "ɹ",
    "S": "s",
    "SH": "ʃ",
    "T": "t",
    "TH": "θ",
    "V": "v",
    "W": "w",
    "Y": "j",
    "Z": "z",
    "ZH": "ʒ",
}
VOWELS = {
    "AA": "ɑ",
    "AE": "æ",
    "AH": "ʌ",
    "AO": "ɔ",
    "AW": "aʊ",
    "AY": "aɪ",
    "EH": "ɛ",
    "ER": "ɝ",
    "EY": "eɪ",
    "IH": "ɪ",
    "IY": "i",
    "OW": "oʊ",
    "OY": "ɔɪ",
    "UH": "ʊ",
    "UW": "u",
}
UNSTRESSED = {"AH0": "ə", "ER0": "ɚ"}  # what else an unstressed vowel is, ARPAbet does not say
MARKS = {"1": "ˈ", "2": "ˌ"}  # primary and secondary stress
# With what, of more than one consonant, a syllable may begin: there goes the mark.
_TWO = "PL PR PY BL BR BY TR TW DR DW KL KR KW KY GL GR GW FL FR FY VY MY SP ST SK SL SM SN SW SF"
_THREE = "SPL SPR SPY STR SKR SKW SKY"
ONSETS = {tuple(onset) for onset in f"{_TWO} {_THREE}".split()}
ONSETS |= {("TH", "R"), ("TH", "W"), ("SH", "R"), ("HH", "Y")}


def to_ipa(phones: Sequence[str], marks: bool = True) -> str:
    """["HH", "AH0", "L", "OW1"] -> "həˈloʊ", or without stress marks "həloʊ".

    Without stress digits there are no marks either, and which AH and ER are stressed is a guess.
    """
    written = ""
    between: list[str] = []  # the consonants since the last vowel
    for phone in _reduced(phones):
        if phone in CONSONANTS:
            between.append(phone)
            continue
        vowel = phone.rstrip("012")
        mark = MARKS.get(phone[len(vowel) :], "") if marks else ""
        n = _onset(between, starts=not written)
        coda, onset = between[: len(between) - n], between[len(between) - n :]
        written += _letters(coda) + mark + _letters(onset)
        written += UNSTRESSED.get(phone, VOWELS[vowel])
        between = []
    return written + _letters(between)


def _reduced(phones: Sequence[str]) -> list[str]:
    """Without any digits, AH and ER as AH0 and ER0 where they are likely to be unstressed.

    A word has a stressed vowel: where all are AH or ER, the first is taken for it.  The others are
    taken to be unstressed.  So 94 % of the dictionary's pronunciations come out as with digits.
    """
    vowels = [phone for phone in phones if phone not in CONSONANTS]
    if any(vowel[-1].isdigit() for vowel in vowels):
        return list(phones)
    reduced = [f"{phone}0" if f"{phone}0" in UNSTRESSED else phone for phone in phones]
    if vowels and {*vowels} <= {"AH", "ER"}:
        first = phones.index(vowels[0])
        reduced[first] = vowels[0]
    return reduced


def _onset(consonants: Sequence[str], starts: bool) -> int:
    """How many of the consonants before a vowel belong to its syllable: as many as may be."""
    if starts or len(consonants) < 2:
        return 0 if consonants == ["NG"] and not starts else len(consonants)
    return next((n for n in (3, 2) if tuple(consonants[-n:]) in ONSETS), 1)


def _letters(consonants: Sequence[str]) -> str:
    return "".join(CONSONANTS[phone] for phone in consonants)
