"""Pronouncing words: the dictionary, the model that ships, bad input, streams."""

import contextlib
import functools
import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import npformer
from npformer import checkpoint, cli, pronounce, pronunciation, streams, tasks, training
from npformer.pronunciation import SHIPPED, Pronouncer
from npformer.tasks import g2p
from npformer.tasks.ipa import CONSONANTS, UNSTRESSED, VOWELS, to_ipa
from npformer.tasks.spelling import plain
from npformer.testing.conformance import OUTPUT

TASK = g2p.G2P()
UNKNOWN = "hypotheticality"  # not in the dictionary


def said(capsys, *arguments):
    code = cli.main(["pronounce", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


# --- The function -----------------------------------------------------------------------------


def test_words_of_the_dictionary_come_from_it_and_others_from_the_model():
    known, unknown = pronounce(["hypothesis", UNKNOWN])
    assert (str(known), known.source) == ("HH AY P AA TH AH S AH S", "dictionary")
    assert unknown.source == "model"
    assert str(unknown).startswith("HH AY P AH TH")
    assert unknown.score < 0


def test_the_model_is_asked_for_known_words_too_where_it_is_wished():
    (answer,) = pronounce("transformer", model=True)  # on which it was trained
    assert (str(answer), answer.source) == ("T R AE N S F AO R M ER", "model")


def test_the_shipped_model_is_right_about_most_words_it_never_saw():
    words = TASK.test()[::100]
    asked = ["".join(TASK.src_vocabulary.decode(e.src)) for e in words]
    answers = [
        TASK.tgt_vocabulary.encode(answer.phones) for answer in pronounce(asked, model=True, beam=1)
    ]
    assert TASK.score(words, answers)["word_error_rate"] < 0.35  # of 126; 27 % of all


def test_the_ways_to_say_a_word_are_those_of_the_dictionary_in_its_order():
    (answer,) = pronounce("tomato", nbest=5)
    assert [str(answer), *map(str, answer.others)] == ["T AH M EY T OW", "T AH M AA T OW"]
    (answer,) = pronounce("tomato", nbest=5, stress=True)
    assert [str(answer), *map(str, answer.others)] == ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]
    (answer,) = pronounce("tomato")
    assert answer.others == ()


def test_n_best_of_the_model_are_different_and_best_first():
    (answer,) = pronounce(UNKNOWN, nbest=4, beam=2)  # a beam of at least as many
    ways = [answer, *answer.others]
    assert len({way.phones for way in ways}) == 4
    scores = [way.score for way in ways]
    assert scores == sorted(scores, reverse=True)


def test_a_batch_is_each_word_alone():
    words = [UNKNOWN, "transformerize", "x", "qi'ing", "numpyfication"]
    voice = Pronouncer(npformer.Transformer.load(SHIPPED, np.float64), TASK)
    options = {"nbest": 2, "beam": 5, "model": True, "stress": False}
    for word, answer in zip(words, voice.answer(words, **options), strict=True):
        (alone,) = voice.answer([word], **options)
        assert alone.phones == answer.phones
        # A mean of log p: logits of some tens that agree to OUTPUT of the largest
        assert alone.score == pytest.approx(answer.score, abs=100 * OUTPUT)


@pytest.mark.parametrize("beam", [1, 3])
def test_both_twins_say_the_same_of_the_shipped_model(beam):
    import torch

    import torchformer

    words = TASK.test()[::200]
    src = tasks.pad([e.src for e in words])
    options = {"max_len": TASK.max_tgt_len}
    model, twin = npformer.Transformer.load(SHIPPED), torchformer.Transformer.load(SHIPPED).eval()
    if beam == 1:
        ours = npformer.greedy(model, src, **options)
        assert ours == torchformer.greedy(twin, torch.from_numpy(src), **options)
    else:
        ours = npformer.beam_search(model, src, num_beams=beam, **options)
        theirs = torchformer.beam_search(twin, torch.from_numpy(src), num_beams=beam, **options)
        assert [h[0].tokens for h in ours] == [h[0].tokens for h in theirs]


def test_a_model_with_stress_says_stress_and_one_without_does_not():
    (answer,) = pronounce("hypothesis", stress=True)
    assert str(answer) == "HH AY0 P AA1 TH AH0 S AH0 S"
    with pytest.raises(ValueError, match=f"'{UNKNOWN}': the model knows no stress"):
        pronounce(UNKNOWN, stress=True)
    task = g2p.G2P(stress=True)
    voice = Pronouncer(random_model(task), task)
    options = {"nbest": 3, "beam": 3, "model": True}
    (with_stress,) = voice.answer(["hello"], stress=True, **options)
    (without,) = voice.answer(["hello"], stress=False, **options)
    assert set(with_stress.phones) <= set(g2p.STRESSED)
    assert set(without.phones) <= set(g2p.PHONES)
    ways = [without.phones, *(way.phones for way in without.others)]
    assert len(set(ways)) == len(ways)


def random_model(task):
    sizes = (len(task.src_vocabulary), len(task.tgt_vocabulary))
    config = npformer.TransformerConfig(*sizes, d_model=16, n_heads=2, d_ff=16, max_len=64)
    return npformer.Transformer(config, np.random.default_rng(0))


def test_the_stress_task_trains_and_its_folder_speaks(tmp_path, capsys):
    out = str(tmp_path / "run")
    arguments = ["train", "g2p-stress", "--steps", "2", "--out", out, "--config"]
    (tmp_path / "small.toml").write_text(
        "[model]\nd_model = 16\nn_heads = 2\nd_ff = 16\nn_encoder_layers = 1\n"
        "n_decoder_layers = 1\n[recipe]\nbatch_size = 4\ndev_examples = 2\nevaluate_every = 1\n"
    )
    task = g2p.G2P(stress=True)
    assert len(task.tgt_vocabulary) == 3 + 24 + 3 * 15
    # The whole test set would take longer than all other tests: two words of it are enough
    task.test = lambda: task.examples("test")[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load", lambda name: task)
        assert cli.main([*arguments, str(tmp_path / "small.toml")]) == 0
    capsys.readouterr()
    code, stdout, _ = said(capsys, UNKNOWN, "--stress", "--weights", out, "--json")
    assert code == 0
    assert json.loads(stdout)["source"] == "model"


# --- The dictionary, and spelling --------------------------------------------------------------


def test_looking_up_is_the_dictionary():
    for word in list(g2p.dictionary())[::997]:
        ways = [[p.rstrip("012") for p in way] for way in g2p.look_up(word)]
        distinct = [way for i, way in enumerate(ways) if way not in ways[:i]]
        assert distinct == g2p.dictionary()[word]
    assert g2p.look_up(UNKNOWN) == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Café", "cafe"),
        ("NAÏVE", "naive"),
        (" don’t ", "don't"),
        ("ﬁne", "fine"),
        ("straße", "strasse"),
    ],
)
def test_case_accents_and_apostrophes_make_no_difference(word, expected):
    assert plain(word) == expected
    (answer,) = pronounce(word)
    assert answer.phones == pronounce(expected)[0].phones


@pytest.mark.parametrize(
    ("phones", "expected"),
    [
        ("HH AH0 L OW1", "həˈloʊ"),
        ("HH AH L OW", "həloʊ"),
        ("B AH T ER", "bʌtɚ"),  # a word has a stressed vowel
        ("F ER", "fɝ"),
        ("B AH1 T ER0", "ˈbʌtɚ"),
        ("AH2 P", "ˌʌp"),
        ("HH AY0 P AA1 TH AH0 S AH0 S", "haɪˈpɑθəsəs"),
        ("IH0 K S T R EH1 M", "ɪkˈstɹɛm"),
        ("S IH1 NG ER0", "ˈsɪŋɚ"),
        ("R EH1 D Y UW2 S", "ˈɹɛdˌjus"),
        ("S T R EH1 NG K TH", "ˈstɹɛŋkθ"),
        ("S", "s"),
        ("", ""),
    ],
)
def test_ipa_puts_the_mark_before_the_syllable(phones, expected):
    assert to_ipa(phones.split()) == expected


def test_every_phone_has_letters_of_its_own():
    said = {phone: to_ipa([phone]) for phone in g2p.STRESSED}
    assert len({to_ipa([phone]) for phone in g2p.PHONES}) == 39
    assert all(said.values())
    assert set(CONSONANTS) | set(g2p.VOWELS) == set(g2p.PHONES)


# --- The whole dictionary -----------------------------------------------------------------------


@functools.cache
def printed():
    """Each word of the dictionary with its ways, read from the file by other means than ours."""
    text = g2p._unpacked().decode("utf-8")
    ways = {}
    for word, phones in re.findall(r"^([^\s(]+)(?:\(\d+\))? ([^#\n]+)", text, re.MULTILINE):
        ways.setdefault(word, []).append(phones.strip())
    assert len(ways) == 124_926 + 1_126
    return ways


def in_letters(phones):
    """IPA without the marks of stress."""
    table = (
        CONSONANTS
        | UNSTRESSED
        | {f"{v}{n}": letters for v, letters in VOWELS.items() for n in "12"}
    )
    table |= {f"{v}0": letters for v, letters in VOWELS.items() if f"{v}0" not in UNSTRESSED}
    return "".join(table[phone] for phone in phones.split())


def without_digits(phones):
    return re.sub("[012]", "", phones)


def test_every_word_of_the_dictionary_is_said_as_the_dictionary_says():
    for stress, shown in ((True, str), (False, without_digits)):
        answers = pronounce(printed(), stress=stress, nbest=99)
        for answer, (word, ways) in zip(answers, printed().items(), strict=True):
            assert (answer.word, answer.source) == (word, "dictionary")
            expected = list(dict.fromkeys(map(shown, ways)))
            assert [str(answer), *map(str, answer.others)] == expected, word
            if not stress:
                assert answer.ipa == in_letters(ways[0]), word


@pytest.mark.parametrize("options", [[], ["--ipa"], ["--stress"], ["--stress", "--ipa"]])
def test_the_command_says_the_words_of_the_dictionary_as_it_does(options, capsys, monkeypatch):
    words = list(printed())[len(options) :: 9]
    stream = io.BytesIO("\n".join(words).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
    code, out, err = said(capsys, *options)
    assert (code, err) == (0, "")
    for line, word in zip(out.splitlines(), words, strict=True):
        first = printed()[word][0]
        expected = first if options == ["--stress"] else without_digits(first)
        if "--ipa" in options:
            expected = in_letters(first)
            line = re.sub("[ˈˌ]", "", line) if "--stress" in options else line
        assert line == f"{word}  {expected}"


def test_ways_that_differ_in_what_is_shown_are_different_ways(capsys):
    assert said(capsys, "permit", "--nbest", "9")[1] == "permit  P ER M IH T\n"
    lines = "permit  pɚmɪt\npermit(2)  pɝmɪt\n"
    assert said(capsys, "permit", "--nbest", "9", "--ipa")[1] == lines
    assert said(capsys, "about", "--ipa")[1] == "about  əbaʊt\n"
    (answer,) = map(json.loads, said(capsys, "about", "--json")[1].splitlines())
    assert (answer["phones"], answer["ipa"]) == ("AH B AW T", "əbaʊt")


# --- The command ------------------------------------------------------------------------------


def test_a_line_a_word_and_numbered_ways(capsys):
    code, out, err = said(capsys, "hypothesis", "Tomato", "--nbest", "2")
    assert (code, err) == (0, "")
    assert out == (
        "hypothesis  HH AY P AA TH AH S AH S\nTomato  T AH M EY T OW\nTomato(2)  T AH M AA T OW\n"
    )
    assert said(capsys, "hello", "--stress", "--ipa")[1] == "hello  həˈloʊ\n"


def test_json_is_one_object_a_word(capsys):
    code, out, _ = said(capsys, "tomato", "4x4", UNKNOWN, "--json", "--nbest", "2")
    assert code == 2
    known, refused, unknown = map(json.loads, out.splitlines())
    assert known["phones"] == "T AH M EY T OW"
    assert known["source"] == "dictionary"
    assert known["others"][0]["phones"] == "T AH M AA T OW"
    assert "'4'" in refused["error"]
    assert unknown["source"] == "model"
    assert unknown["score"] < 0


BAD = {
    "": "empty input",
    "   ": "empty input",
    "ice cream": "has ' '",
    "4x4": "has '4'",
    "слово": "has 'с'",
    "語": "has '語'",
    "a\x00b": r"has '\x00'",
    "a" * 41: "41 tokens are too many: at most 40",
    "a" * 10_000: "10000 tokens are too many",
    "(" * 10_000: "has '('",
}


def test_bad_words_are_refused_one_line_each_and_the_others_answered(capsys):
    code, out, err = said(capsys, "hello", *BAD, "world")
    assert code == 2
    assert out == "hello  HH AH L OW\nworld  W ER L D\n"
    lines = err.splitlines()
    assert len(lines) == len(BAD)
    for i, (line, expected) in enumerate(zip(lines, BAD.values(), strict=True), 2):
        assert line.startswith(f"npformer pronounce: input {i}: ")
        assert expected in line
        assert len(line) < 200


SIGNS = [
    "™",
    "Nº",
    "Noº",
    "№",
    "½",
    "m²",
    "Ⅳ",
    "①",
    "ª",
    "℃",
    "𝐡𝐢",
    "ℹ",
    "Ⓐ",
    "ʰa",
    "a\N{COMBINING ENCLOSING KEYCAP}",
]
NOTHING = [
    "'",
    "''",
    "’",
    '"',
    "...",
    "-",
    "--",
    "—",
    "!",
    "\N{COMBINING ACUTE ACCENT}",
    "\ufeff",
    "",
]
NO_WORDS = [
    "Foo-Bar",
    "R2D2",
    "tomato(3)",
    "tomato(0)",
    "аbout",
    "no.1",
    "A" * 41,
    None,
    np.nan,
    7,
    b"hi",
]


@pytest.mark.parametrize("word", [*SIGNS, *NOTHING, *NO_WORDS])
def test_what_is_no_word_is_refused_as_it_was_typed(word):
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the message is looked at below
        pronounce(["hello", word, "world"])
    shown = repr(word) if len(str(word)) <= 40 else repr(word[:36] + " ...")
    assert str(refused.value).startswith(shown)
    (before, error, after) = pronounce(["hello", word, "world"], errors="return")
    assert (str(before), str(after)) == ("HH AH L OW", "W ER L D")
    assert str(error) == str(refused.value)


def test_the_function_refuses_before_the_model_is_asked(monkeypatch):
    def computed(*_):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(Pronouncer, "_decode", computed)
    with pytest.raises(ValueError, match=r"^'4x4' has '4'.* \(and 2 more are refused\)$"):
        pronounce([UNKNOWN, "4x4", "hello", "", "5"])
    for words in (None, 5, b"hello"):
        with pytest.raises(TypeError, match="words must be a word or several"):
            pronounce(words)
    with pytest.raises(ValueError, match="errors must be"):
        pronounce("hello", errors="ignore")
    with pytest.raises(ValueError, match="nbest and beam must be at least 1, got nan and 5"):
        pronounce("hello", nbest=np.nan)


MEANT = {
    "hello": "'hello' ‘hello’ “hello” „hello“ «hello» ‹hello› \"hello\" `hello` ``hello'' ‘hello,’ "
    "hello, hello! hello?! hello. hello... (hello) [hello]; HELLO Hello: "
    "ｈｅｌｌｏ ＨＥＬＬＯ！ —hello— \ufeffhello hel\u200blo hel\u00adlo hello™ hello® ¡hello!",
    "don't": "don’t don‘t donʼt don`t don´t don′t don＇t DON’T “don’t” 'don't' don't.",
    "it's": "it`s it´s itʼs it’s",
    "'tis": "‘tis ʼtis ’tis `tis ´tis 'Tis “‘Tis”",
    "'em": "’em ‘em 'em, “’em”",
    "dogs'": "dogs’ dogs'. “dogs’”",
    "cause": "'cause' ‘cause’",  # in quotes it is not 'cause
    "x-ray": "X-Ray x‐ray x‑ray x–ray x−ray x－ray 'x-ray' x-ray,",
    "mr.": "Mr. “Mr.” Mr., (mr.) 'mr.'",
    "u.s.": "U.S. U.S., (U.S.)",
    "coca-cola": "Coca-Cola Coca‑Cola™",
    "world": "「world」 『World』 《world》 〈world〉 ‚world‘ ｢ｗｏｒｌｄ｣ world。 world，",
    "google": "Google™ Google™\ufe0f",
    "cafe": "café cafe\u0301 CAFÉ",
    "office": "oﬃce ＯＦＦＩＣＥ",
    "caesar": "cæsar CÆSAR ＣÆSAR",
    "oeuvre": "œuvre",
    "lodz": "łodz ŁÓDŹ",
    "bjorn": "bjørn Björn",
    "istanbul": "İstanbul ıstanbul",
    "strasse": "straße STRAẞE",
    "tomato": "tomato(1) Tomato(1)",
    "aeon": "æon",
}


@pytest.mark.parametrize("word", MEANT)
def test_however_it_is_typed_it_is_the_word(word):
    (expected,) = pronounce(word, nbest=9)
    typed = MEANT[word].split()
    for answer, text in zip(pronounce(typed, nbest=9), typed, strict=True):
        assert (answer.phones, answer.source) == (expected.phones, expected.source), text
        assert answer.word == text
    if word == "cause":
        assert str(pronounce("'cause")[0]) == "K AH Z"


def test_a_way_to_say_a_word_can_be_named():
    (answer,) = pronounce("Tomato(2)", nbest=5)
    assert (str(answer), answer.others) == ("T AH M AA T OW", ())
    with pytest.raises(ValueError, match=r"'tomato\(3\)': the ways to say tomato are 2"):
        pronounce("tomato(3)")


@pytest.mark.parametrize(
    "typed",
    [
        *(
            "“tomato(2)”",
            "Tomato(2)!",
            "'tomato(2)'",
            "(tomato(2))",
            "«TOMATO(2)»,",
            " tomato(2). ",
        ),
        *("tomato(2)…", "tōmato(2)?"),
    ],
)
def test_a_way_that_is_named_may_have_punctuation_around_it(typed):
    (answer,) = pronounce(typed, nbest=5)
    assert (str(answer), answer.others, answer.word) == ("T AH M AA T OW", (), typed)
    with pytest.raises(ValueError, match="the ways to say tomato are 2") as error:
        pronounce(typed.replace("2", "3"))
    assert str(error.value).startswith(repr(typed.replace("2", "3").strip()))


def test_of_a_word_in_the_dictionary_it_is_not_said_that_it_is_not_there(capsys, tmp_path):
    for arguments in (["--model"], ["--plot", str(tmp_path / "a.png")]):
        for word in ("x-ray", "mr.-and-4", "coca-cola"):
            code, _, err = said(capsys, word, *arguments)
            assert code == 2
            assert f"'{word}' has " in err
            expected = (
                "a word that is not in the dictionary" if word == "mr.-and-4" else "the model"
            )
            assert f"{expected} {'is' if '4' in word else 'reads'} letters a-z" in err


def test_wrong_options_are_refused_in_one_line(capsys, tmp_path):
    for arguments, message in {
        ("hello", "--weights", str(tmp_path / "nowhere")): "no such checkpoint folder",
        ("hello", "world", "--plot", str(tmp_path / "a.png")): "--plot draws one word, got 2",
        ("hello", "--plot", str(tmp_path / "a.png"), "--json"): "no --json",
        ("hello", "--plot", str(tmp_path / "a.png"), "--ipa"): "no --ipa",
        ("hello", "--plot", str(tmp_path / "a.png"), "--stress"): "no --stress",
        ("hello", "--plot", str(tmp_path / "a.png"), "--nbest", "2"): "no --nbest",
    }.items():
        code, out, err = said(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err
    with pytest.raises(ValueError, match="nbest and beam must be at least 1"):
        pronounce("hello", nbest=0)
    with pytest.raises(SystemExit):
        cli.main(["pronounce", "hello", "--beam", "0"])


def test_weights_of_another_task_are_refused(tmp_path, capsys):
    sort = tmp_path / "sort"
    npformer.Transformer(npformer.TransformerConfig(13, 13), np.random.default_rng(0)).save(sort)
    about = {"task": "sort", "backend": "numpy", "seed": 0, "recipe": {}}
    checkpoint.save_json(sort / training.RUN, about)
    code, _, err = said(capsys, "hello", "--weights", str(sort))
    assert code == 2
    assert "a model of sort, not of pronunciation" in err


# --- Streams ----------------------------------------------------------------------------------


def process(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "npformer", "pronounce", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def test_each_line_is_answered_when_it_comes():
    """Nobody waits for a batch to fill, nor for the end."""
    with process() as running:
        for word, phones in (("hello", b"HH AH L OW"), ("world", b"W ER L D")):
            running.stdin.write(f"{word}\n".encode())
            running.stdin.flush()
            assert phones in running.stdout.readline()
    assert running.returncode == 0


def test_binary_in_a_stream_is_refused_and_the_stream_goes_on():
    rng = np.random.default_rng(0)
    noise = rng.bytes(100_000).replace(b"\n", b"")  # one line of it, longer than any buffer
    out, err = process().communicate(b"hello\n" + noise + b"\nworld\r\n\xff\xfe\nend", timeout=60)
    assert out.decode() == "hello  HH AH L OW\nworld  W ER L D\nend  EH N D\n"
    first, second = err.decode().splitlines()
    assert "input 2: " in first
    assert "input 4: " in second
    assert len(first) < 200


def test_a_reader_that_goes_away_is_no_error():
    with process() as running:
        running.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            running.stdin.write(b"hello\n" * 100_000)
            running.stdin.close()
        assert running.stderr.read() == b""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_long_stream_takes_no_more_memory_than_a_short_one():
    def ask(running, n):
        words = (f"{UNKNOWN}{'s' * (i % 3)}\n" if i % 400 == 0 else "hello\n" for i in range(n))
        lines = "".join(words).encode()

        def feed():
            running.stdin.write(lines)
            running.stdin.flush()

        feeder = threading.Thread(target=feed)
        feeder.start()
        out = [running.stdout.readline() for _ in range(n)]
        feeder.join()
        assert out.count(b"hello  HH AH L OW\n") == n - -(-n // 400)
        status = Path(f"/proc/{running.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    with process() as running:
        short, long = ask(running, 6_000), ask(running, 54_000)
    assert running.returncode == 0
    assert long < short + 2048  # kB; the lines alone are 350 kB more


def test_arriving_cuts_lines_as_they_are():
    class Dribble(io.BytesIO):
        def read1(self, n=-1):
            return super().read1(3)

    chunks = list(streams.arriving(Dribble(b"\xef\xbb\xbfab\ncdef\r\n\ng")))
    assert [line for chunk in chunks for line in chunk] == ["ab", "cdef", "", "g"]
    many = list(streams.arriving(io.BytesIO(b"x\n" * 600)))
    assert [len(chunk) for chunk in many] == [256, 256, 88]
    (long, whole), end = streams.arriving(
        io.BytesIO(b"ice" + b" " * 5000 + b"cream\n\xff\n\xef\xbb\xbfz")
    )
    assert long == "ice" + " " * 4093 + "\ufffd"  # it is not "ice"
    assert (whole, *end) == ("\ufffd", "\ufeffz")  # a mark only where a text begins
    assert list(streams.arriving(io.BytesIO(b"\xef\xbb\xbfz"))) == [["z"]]


# --- What ships -------------------------------------------------------------------------------


def test_what_ships_is_small_and_says_where_it_is_from():
    about = json.loads((SHIPPED / "run.json").read_text())
    assert about["task"] == "g2p"
    assert about["data"] == TASK.provenance()
    assert about["data"]["sha256"].startswith("81917843c7f44ce2")  # the released file's
    assert {"recipe", "seed", "versions", "results", "preset"} <= set(about)
    tensors, _ = checkpoint.load_tensors(SHIPPED / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float16)}
    packed = sum(path.stat().st_size for path in SHIPPED.iterdir())
    packed += sum(
        path.stat().st_size for path in (SHIPPED.parents[1] / "tasks").iterdir() if path.is_file()
    )
    assert packed < 4e6


def test_the_certificate_says_that_the_twins_agree():
    certificate = json.loads((SHIPPED / "certificate.json").read_text())
    assert certificate["agree"] is True
    assert certificate["same_answers"] == certificate["answers"] == 200
    assert certificate["test_examples"] == 12_517
    assert certificate["word_error_rate"] <= 0.272
    assert {"numpy", "torch", "python", "npformer"} <= set(certificate["versions"])
    for row in certificate["comparisons"]:
        assert row["error"] <= row["bound"]


def test_a_word_is_aligned_with_its_sounds(tmp_path, capsys):
    voice = pronunciation.shipped()
    letters, phones, weights = voice.align("Thought")
    assert letters == list("thought")
    assert phones[-1] == "end"
    assert weights.shape == (len(phones), len(letters))
    rounding = len(letters) * np.finfo(np.float32).eps
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=0, atol=rounding)
    file = tmp_path / "thought.png"
    pytest.importorskip("matplotlib")
    code, out, _ = said(capsys, "thought", "--plot", str(file))
    assert code == 0
    assert out == f"thought  TH AO T  as the model says it -> {file}\n"
    assert file.read_bytes().startswith(b"\x89PNG")


# --- Export -----------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A run of the sorting task, as `train` leaves it."""
    task, folder = tasks.load("sort"), tmp_path / "run"
    sizes = (len(task.src_vocabulary), len(task.tgt_vocabulary))
    config = npformer.TransformerConfig(*sizes, d_model=16, n_heads=2, d_ff=16, max_len=16)
    npformer.Transformer(config, np.random.default_rng(0)).save(folder)
    about = {"task": "sort", "backend": "numpy", "seed": 0, "recipe": {}}
    checkpoint.save_json(folder / training.RUN, about)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_export_answers_as_its_certificate_says(run_folder, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    assert cli.main(["export", str(run_folder), str(out), "--dtype", dtype]) == 0
    assert "agree: logits, loss and the gradients" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "run.json", "certificate.json"}
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["agree"] is True
    assert certificate["weights"] == dtype
    before, after = npformer.Transformer.load(run_folder), npformer.Transformer.load(out)
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        np.testing.assert_array_equal(a.data.astype(dtype).astype(np.float32), b.data, name)
    task = tasks.load("sort")
    answers = npformer.greedy(after, tasks.pad([e.src for e in task.test()[:50]]), max_len=10)
    assert len(answers) == 50
    assert cli.main(["check", str(out)]) == 0


def test_an_export_does_not_overwrite_and_needs_a_run(run_folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for arguments, message in (
        ((str(run_folder), str(tmp_path / "full")), "is there already"),
        ((str(tmp_path / "nowhere"), str(tmp_path / "out")), "no such checkpoint folder"),
    ):
        assert cli.main(["export", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert message in err
    assert not (tmp_path / "out").exists()


def test_a_first_answer_imports_neither_torch_nor_anything_heavy():
    script = (
        "import sys; from npformer.cli import main; main(['pronounce', 'hello'])\n"
        "heavy = {'torch', 'matplotlib', 'rich', 'hypothesis', 'pytest'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
