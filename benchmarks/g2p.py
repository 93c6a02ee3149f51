"""Pronunciation: how often it is wrong on the held-out words, and words per second."""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import (
    ROOT,
    BenchmarkError,
    Contender,
    Measurement,
    Run,
    measure,
    numpy_threads,
    pinned,
    torch_threads,
)
from npformer import Transformer, beam_search, greedy
from npformer.checkpoint import CheckpointError
from npformer.pronunciation import SHIPPED
from npformer.tasks import EOS, SOS, g2p, pad
from npformer.training import load_run, score

DESCRIPTION = """\
Score a model of pronunciation on the held-out words of the CMU dictionary, which no training saw:
word and phoneme error rate, greedy and with a beam of 5, both twins, and in how many words the
twins differ.  Then words per second, one by one and 256 at once, and the first answer of a fresh
process.

Where g2p-en 2.1.0 is installed (pip install g2p-en), its GRU, which is NumPy as well, stands
beside them on the same words.  It was trained on the whole dictionary: for it they are not held
out.

  python -m benchmarks.g2p                      the model in the package
  python -m benchmarks.g2p runs/g2p --quick     another; 1,000 of the words
"""
NPFORMER, TWIN, PEER = "npformer", "torchformer", "g2p-en (has seen these words)"
Answer = Callable[[list[list[int]], int], list[list[int]]]  # sources, max_len -> tokens
N_ONE_BY_ONE, N_TOGETHER, BEAM = 40, 256, 5


# --- Who answers ------------------------------------------------------------------------------


def by_numpy(model: Transformer, beam: int) -> Answer:
    def answer(sources: list[list[int]], max_len: int) -> list[list[int]]:
        options: Any = {"max_len": max_len, "sos_id": SOS, "eos_id": EOS}
        if beam == 1:
            return greedy(model, pad(sources), **options)
        found = beam_search(model, pad(sources), num_beams=beam, **options)
        return [hypotheses[0].tokens for hypotheses in found]

    return answer


def by_torch(model: Transformer, beam: int) -> Answer:
    import torch

    import torchformer
    from torchformer.convert import to_torch

    twin = to_torch(model).eval()

    def answer(sources: list[list[int]], max_len: int) -> list[list[int]]:
        src = torch.from_numpy(pad(sources))
        options: Any = {"max_len": max_len, "sos_id": SOS, "eos_id": EOS}
        if beam == 1:
            return torchformer.greedy(twin, src, **options)
        found = torchformer.beam_search(twin, src, num_beams=beam, **options)
        return [hypotheses[0].tokens for hypotheses in found]

    return answer


def by_g2p_en(task: g2p.G2P) -> Answer:
    """Its network alone: no dictionary, no tagger, none of the data that NLTK would fetch."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        peer: Any = harness.require("g2p_en.g2p", "peers").G2p
    network = peer.__new__(peer)
    network.graphemes = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    network.phonemes = ["<pad>", "<unk>", "<s>", "</s>", *sorted([*g2p.STRESSED, "UW"])]
    network.g2idx = {g: i for i, g in enumerate(network.graphemes)}
    network.idx2p = dict(enumerate(network.phonemes))
    network.load_variables()
    known = set(task.tgt_vocabulary.tokens)

    def answer(sources: list[list[int]], max_len: int) -> list[list[int]]:
        words = ["".join(task.src_vocabulary.decode(source)) for source in sources]
        said = [[p.rstrip("012") for p in network.predict(word)] for word in words]
        return [task.tgt_vocabulary.encode(p for p in phones if p in known) for phones in said]

    return answer


# --- What is measured -------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.Parser("g2p", DESCRIPTION, rounds=7, quick_rounds=3)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=SHIPPED,
        metavar="DIR",
        help="a folder of `npformer train g2p` or `npformer export` (default: the package's)",
    )
    parser.main(argv, measure_all, draw)


def measure_all(options: argparse.Namespace) -> list[Run]:
    folder, options.folder = options.folder, options.folder.name  # no paths in a result
    try:
        about = load_run(folder)
        model = Transformer.load(folder)
    except CheckpointError as error:
        raise BenchmarkError(str(error)) from None
    if about["task"] != "g2p":
        raise BenchmarkError(f"{folder}: a model of {about['task']}, not of g2p")
    task = g2p.G2P()
    words = task.test()
    if options.quick:
        words = words[:: len(words) // 1000][:1000]
    if harness.is_installed("torch"):
        harness.require("torch", "torch")  # before the threads are pinned: it has its own
    with pinned(options.threads):
        model_about = {"preset": about.get("preset"), "steps": about["recipe"]["steps"]}
        model_about["parameters"] = sum(p.data.size for p in model.parameters())
        scores = Run({"kind": "scores", "words": len(words), "model": model_about}, [])
        scores.about["scores"] = score_all(model, task, words)
        return [scores, *measure_speed(model, task, words, options), first_answer(options)]


def score_all(model: Transformer, task: g2p.G2P, words: list) -> list[dict[str, Any]]:
    answers: dict[str, list] = {}
    rows = []

    def add(name: str, beam: int | None, answer: Answer) -> None:
        said: dict[tuple[int, ...], list[int]] = {}

        def remembered(sources: list[list[int]], max_len: int) -> list[list[int]]:
            harness.progress(f"{name}, beam {beam}: {len(said)} of {len(words)} words")
            found = answer(sources, max_len)
            said.update(zip(map(tuple, sources), found, strict=True))
            return found

        row: dict[str, Any] = {"name": name, "beam": beam, **score(remembered, task, words)}
        answers[f"{name} {beam}"] = [said[tuple(e.src)] for e in words]
        if name == TWIN:
            ours = answers[f"{NPFORMER} {beam}"]
            pairs = zip(ours, answers[f"{name} {beam}"], strict=True)
            row["differ_from_npformer"] = sum(a != b for a, b in pairs)
        rows.append(row)

    for beam in (1, BEAM):
        add(NPFORMER, beam, by_numpy(model, beam))
        if harness.is_installed("torch"):
            add(TWIN, beam, by_torch(model, beam))
    if harness.is_installed("g2p_en"):
        add(PEER, None, by_g2p_en(task))
    return rows


def measure_speed(model: Transformer, task: g2p.G2P, words: list, options) -> list[Run]:
    """One by one: N words, each on its own.  At once: N words as one batch.  Greedy, and a beam."""
    few = [e.src for e in words[:: len(words) // N_ONE_BY_ONE]][:N_ONE_BY_ONE]
    many = [e.src for e in words[:: max(1, len(words) // N_TOGETHER)]][:N_TOGETHER]

    def one_by_one(name: str, answer: Answer, threads: Callable[[], int]) -> Contender:
        def call() -> None:
            for source in few:
                answer([source], task.max_tgt_len)

        return Contender(name, call, threads)

    def at_once(name: str, answer: Answer, threads: Callable[[], int]) -> Contender:
        return Contender(name, lambda: answer(many, task.max_tgt_len), threads)

    who = [(NPFORMER, by_numpy(model, 1), numpy_threads)]
    who += [(f"{NPFORMER}, beam {BEAM}", by_numpy(model, BEAM), numpy_threads)]
    if harness.is_installed("torch"):
        who += [(TWIN, by_torch(model, 1), torch_threads)]
    alone = [one_by_one(*each) for each in who]
    if harness.is_installed("g2p_en"):
        alone += [one_by_one(PEER, by_g2p_en(task), numpy_threads)]
    together = [at_once(*each) for each in who]
    return [
        measure(
            contenders,
            rounds=options.rounds,
            about={"kind": "speed", "how": how, "words": n},
            label=how,
        )
        for how, n, contenders in (
            ("one by one", len(few), alone),
            (f"{N_TOGETHER} at once", len(many), together),
        )
    ]


def first_answer(options: argparse.Namespace) -> Run:
    """Fresh processes, from before they exist to after they ended, as somebody at a shell waits."""
    commands = {
        "a word of the dictionary": ["hypothesis"],
        "a word that it does not have": ["hypotheticality", "--beam", "1"],
    }
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = os.environ | dict.fromkeys(variables, str(options.threads))
    run = Run({"kind": "first answer"}, [])
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(options.rounds + 1):
        for name, words in commands.items():
            command = [sys.executable, "-m", "npformer", "pronounce", *words]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
            seconds = time.perf_counter() - start
            if done.returncode:
                raise BenchmarkError(f"{name}: {done.stderr.strip()}")
            if i > 0:  # the first fills the file cache
                samples[name].append(seconds)
    run.measurements = [Measurement(n, run.id, options.threads, s) for n, s in samples.items()]
    return run


# --- What is shown ----------------------------------------------------------------------------


def draw(runs: list[Run]) -> str:
    scores, *timed, first = runs
    rows = []
    for row in scores.about["scores"]:
        beam = {None: "greedy", 1: "greedy"}.get(row["beam"], f"beam {row['beam']}")
        differ = row.get("differ_from_npformer")
        rows.append(
            [
                f"{row['name']}, {beam}",
                f"{100 * row['phoneme_error_rate']:.2f} %",
                f"{100 * row['word_error_rate']:.2f} %",
                "" if differ is None else f"{differ}",
            ]
        )
    n = scores.about["words"]
    header = [f"{n:,} words", "phoneme errors", "word errors", "differ from npformer"]
    tables = [harness.table(header, rows)]
    names = list(dict.fromkeys(m.name for run in timed for m in run.measurements))
    speeds = [
        [name, *(f"{run.about['words'] / run[name].median:,.0f}" if name in run else ""
                 for run in timed)]
        for name in names
    ]  # fmt: skip
    header = ["words per second", *(run.about["how"] for run in timed)]
    tables.append(harness.table(header, speeds))
    rows = [
        [m.name, harness.milliseconds(m), f"±{100 * m.spread:.0f} %"] for m in first.measurements
    ]
    tables.append(harness.table(["first answer of a process", "ms", "spread"], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
