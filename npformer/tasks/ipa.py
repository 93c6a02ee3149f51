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


def to_ipa(phones: Sequence[str]) -> str:
    """["HH", "AH0", "L", "OW1"] -> "həˈloʊ".  Without stress digits no marks, and AH is ʌ."""
    written = ""
    between: list[str] = []  # the consonants since the last vowel
    for phone in phones:
        if phone in CONSONANTS:
            between.append(phone)
            continue
        vowel = phone.rstrip("012")
        mark = MARKS.get(phone[len(vowel) :], "")
        n = _onset(between, starts=not written)
        coda, onset = between[: len(between) - n], between[len(between) - n :]
        written += _letters(coda) + mark + _letters(onset)
        written += UNSTRESSED.get(phone, VOWELS[vowel])
        between = []
    return written + _letters(between)


def _onset(consonants: Sequence[str], starts: bool) -> int:
    """How many of the consonants before a vowel belong to its syllable: as many as may be."""
    if starts or len(consonants) < 2:
        return 0 if consonants == ["NG"] and not starts else len(consonants)
    return next((n for n in (3, 2) if tuple(consonants[-n:]) in ONSETS), 1)


def _letters(consonants: Sequence[str]) -> str:
    return "".join(CONSONANTS[phone] for phone in consonants)
