"""The command line: `npformer demo | train | check | predict | export | pronounce`."""

import argparse
import difflib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import npformer
from npformer import arguments, checkpoint, presets, runs, streams, tasks, training
from npformer.allocator import keep_freed_memory
from npformer.arguments import SEEDS, STEPS, THREADS, path, positive_number, typed, whole_number
from npformer.checkpoint import CheckpointError, blame, to_json
from npformer.decoding import greedy
from npformer.options import integer
from npformer.plot import draw_alignment, draw_history
from npformer.tasks import EOS, SOS, Task, pad
from npformer.tasks.task import Batch, Vocabulary, make_batch
from npformer.transformer import Transformer

GET_TORCH = "pip install 'npformer[torch]'"
BEAMS, IDS = 100, 2**31 - 1  # at most so many of a search; and up to there a token's number


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all well;  1: the twins disagree;  2: bad input, said in one line."""
    refusals = (ValueError, TypeError, MemoryError, MissingError)
    return streams.program(parser(), arguments, lambda options: options.run(options), *refusals)


class MissingError(Exception):
    """Something that was asked for is not installed or not there."""


def parser() -> argparse.ArgumentParser:
    top = arguments.Parser(
        prog="npformer",
        description="The Transformer in plain NumPy, every gradient written by hand, and its twin "
        "in PyTorch, proven equal.",
        epilog="Start with: npformer demo.  Exit code: 0 all is well; 1 something differs; 2 it "
        "cannot be done, and a line on standard error says why.",
    )
    top.add_argument("--version", action="version", version=f"npformer {npformer.__version__}")
    top.set_defaults(run=lambda _: top.print_help() or 0)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train in NumPy for half a minute, convert to PyTorch, compare the two",
        description="Train the Transformer on sorting digits in NumPy, convert it to PyTorch, "
        "and compare logits, loss, every gradient and decoded answers of the two.",
    )
    demo.add_argument("--steps", type=whole_number(1, STEPS), help="training steps (default 1500)")
    demo.add_argument(
        "--seed", type=whole_number(0, SEEDS), default=0, help="of weights and data (0)"
    )
    demo.add_argument(
        "--out", type=path, default="runs/demo", help="folder to save to (default runs/demo)"
    )
    demo.set_defaults(run=run_demo)

    train = commands.add_parser(
        "train",
        help="train a model on a task, with NumPy or PyTorch",
        description="Train a model.  Tasks: sort, reverse, repeats (sort few different digits), "
        "permutation (sort 0-9), digits (a mix of the sorting tasks), g2p (how English words are "
        "pronounced).  The best checkpoint on held-out data is kept; Ctrl-C saves and leaves.",
    )
    train.add_argument("task", nargs="?", choices=tasks.NAMES, metavar="TASK", help="see above")
    train.add_argument(
        "--backend", choices=("numpy", "torch"), help="which twin trains (default numpy)"
    )
    train.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="for --backend torch"
    )
    train.add_argument("--steps", type=whole_number(1, STEPS), help="stop after so many steps")
    train.add_argument(
        "--minutes",
        type=positive_number(arguments.MINUTES),
        help="stop after so much time, with that of the sessions before a --resume",
    )
    train.add_argument(
        "--patience",
        type=whole_number(1, STEPS),
        help="stop after so many evaluations without a better one",
    )
    train.add_argument("--preset", help="model and recipe: default, notes, ... (default: default)")
    train.add_argument(
        "--config", type=path, metavar="FILE.toml", help="tables [model], [recipe] to change"
    )
    train.add_argument(
        "--seed", type=whole_number(0, SEEDS), help="of weights, data and dropout (default 0)"
    )
    train.add_argument(
        "--threads",
        type=whole_number(1, THREADS),
        help="processor cores to use.  numpy: threads that share each batch, with BLAS at one "
        "(default: no such threads, BLAS as it likes); torch: its own (default all)",
    )
    train.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="for --backend torch: bfloat16 by autocast (default float32)",
    )
    train.add_argument(
        "--compile", action="store_true", help="for --backend torch: torch.compile each layer"
    )
    train.add_argument(
        "--capture",
        action=argparse.BooleanOptionalAction,
        help="for --backend torch: launch each step as one CUDA graph, which small models need; it "
        "holds the memory of a step for each of some lengths (default: on CUDA)",
    )
    train.add_argument(
        "--out", type=path, metavar="DIR", help="folder to save to (default runs/TASK)"
    )
    train.add_argument(
        "--resume",
        type=path,
        metavar="DIR",
        help="go on with the run in this folder, for as long as it was to go on; --steps, "
        "--minutes and --patience say otherwise",
    )
    train.set_defaults(run=run_train)

    check = commands.add_parser(
        "check",
        help="compare the twins on a checkpoint; exit code 1 if they disagree",
        description="Load a checkpoint into both twins and compare logits, loss and every gradient "
        "in float64 and float32, and the answers they decode.",
    )
    check.add_argument("folder", metavar="DIR", help="a folder that `train` or `demo` saved")
    check.set_defaults(run=run_check)

    predict = commands.add_parser(
        "predict",
        help="the model's answer to each input",
        description="What the model in DIR answers, a line for each input or, where none is given, "
        "for each line of standard input.  A bad input gives an empty line, and a line on standard "
        "error; all others are answered, and in the end the exit code is 2.",
    )
    predict.add_argument("folder", metavar="DIR", help="a folder that `train` or `demo` saved")
    predict.add_argument(
        "inputs",
        nargs="*",
        type=streams.argument,
        metavar="INPUT",
        help="as the model's task has them: 312 of digits, hypothesis of g2p",
    )
    predict.add_argument(
        "--backend", choices=("numpy", "torch"), default="numpy", help="which twin answers (numpy)"
    )
    predict.set_defaults(run=run_predict)

    export = commands.add_parser(
        "export",
        help="a trained model as a folder that needs NumPy alone, with a certificate",
        description="Write the best checkpoint of a run, without what only training needs, to a "
        "new folder.  certificate.json says how far the twins agree on it (logits, loss, "
        "gradients, the answers to held-out inputs), and how well it does on all of them.",
    )
    export.add_argument("folder", metavar="DIR", help="a folder that `train` or `demo` saved")
    export.add_argument("out", metavar="OUT", help="a new folder")
    export.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the weights on disk (default float32); they are computed with in float32",
    )
    export.set_defaults(run=run_export)

    pronounce = commands.add_parser(
        "pronounce",
        help="how English words are pronounced",
        description="The sounds of each word in ARPAbet (hello: HH AH L OW), or where none is "
        "given of each line of standard input, as it comes: from the CMU dictionary, or for words "
        "that it does not have from the model in this package.  Capitals, accents and punctuation "
        "around a word make no difference; tomato(2) is the second way to say it.  An input that "
        "is no word gives one line on standard error, all others are answered, and in the end the "
        "exit code is 2.",
    )
    add = pronounce.add_argument
    add(
        "words",
        nargs="*",
        type=streams.argument,
        metavar="WORD",
        help="such as hypothesis, or don't",
    )
    add(
        "--nbest",
        type=whole_number(1, BEAMS),
        default=1,
        metavar="N",
        help="so many ways to say it (1)",
    )
    add(
        "--beam",
        type=whole_number(1, BEAMS),
        default=5,
        metavar="K",
        help="width of the search (5); 1: greedy",
    )
    add("--model", action="store_true", help="ask the model for words in the dictionary as well")
    add("--weights", type=path, metavar="DIR", help="a model of your own, by `npformer train g2p`")
    add(
        "--stress",
        action="store_true",
        help="with stress: 1 primary, 2 secondary, 0 none.  The dictionary has it; the model in "
        "this package has not, and words that it would have to say are refused",
    )
    add(
        "--ipa",
        action="store_true",
        help="in the letters of the IPA.  Of words from the model in this package, which knows no "
        "stress, which vowels are ə or ɚ is a guess",
    )
    add(
        "--plot",
        type=path,
        metavar="FILE.png",
        help="draw which letters each sound of the word comes from, as the model says it, whether "
        "the dictionary has the word or not",
    )
    add(
        "--json",
        action="store_true",
        help='print one JSON object a word and nothing else; one that is no word has an "error"',
    )
    pronounce.set_defaults(run=run_pronounce)

    trace = commands.add_parser(
        "trace",
        help="every tensor of one step, forward and backward, with its formula",
        description="Run the model on the input, with its own answer as the target, and list every "
        "named intermediate: name, shape, size of the numbers, where in the source it is made.",
    )
    trace.add_argument("folder", metavar="DIR", help="a folder that `train` or `demo` saved")
    trace.add_argument(
        "input", type=streams.argument, metavar="INPUT", help="such as 312, or hypothesis"
    )
    trace.add_argument(
        "--out", type=path, metavar="TRACE", help="save it there, for `npformer diff`"
    )
    trace.add_argument("--match", default="", metavar="TEXT", help="only names with this in them")
    trace.set_defaults(run=run_trace)

    diff = commands.add_parser(
        "diff",
        help="the first tensor in which two traces differ",
        description="Compare two traces, forward and then backward.  Exit code 1 if they differ.",
    )
    diff.add_argument("a", metavar="A", help="a folder by `npformer trace --out`, or any program's")
    diff.add_argument("b", metavar="B", help="the one that is right")
    diff.add_argument(
        "--bound", type=positive_number(1e300), help="of the error (1e-10; float32: 1e-3)"
    )
    diff.set_defaults(run=run_diff)

    attention = commands.add_parser(
        "attention",
        help="a picture of the attention weights of every layer and head",
        description="Draw who attends to whom while the model answers, tokens on the axes.",
    )
    attention.add_argument("folder", metavar="DIR", help="a folder that `train` or `demo` saved")
    attention.add_argument(
        "input", type=streams.argument, metavar="INPUT", help="such as 312, or hypothesis"
    )
    attention.add_argument("--out", type=path, default="attention.png", metavar="FILE.png")
    attention.set_defaults(run=run_attention)

    explain = commands.add_parser(
        "explain",
        help="one step of the model as a page to click through",
        description="Write a single HTML file, that needs no network: the model as a map, every "
        "tensor forward and backward as a heat map, with its formula and its line of source.",
    )
    explain.add_argument("folder", metavar="DIR", help="a folder that `train` or `demo` saved")
    explain.add_argument(
        "input", type=streams.argument, metavar="INPUT", help="such as 312, or hypothesis"
    )
    explain.add_argument("--out", type=path, default="page.html", metavar="PAGE.html")
    explain.set_defaults(run=run_explain)

    mask = commands.add_parser(
        "mask",
        help="who may attend to whom, and why not",
        description="Explain the mask of a sequence of token ids, with the broadcasting on the "
        "way.  A mask in a file (.npy) may be boolean of either polarity, 0/1 or additive.",
    )
    mask.add_argument(
        "ids", nargs="*", type=whole_number(0, IDS), metavar="ID", help="such as 3 4 5 0 0"
    )
    mask.add_argument(
        "--pad", type=whole_number(0, IDS), default=0, metavar="ID", help="of a pad (0)"
    )
    mask.add_argument("--causal", action="store_true", help="no key after the query")
    mask.add_argument(
        "--window", type=whole_number(1, IDS), metavar="N", help="at most N keys back"
    )
    mask.add_argument("--file", type=path, metavar="MASK.npy", help="a mask that is given besides")
    mask.set_defaults(run=run_mask)

    embeddings = commands.add_parser(
        "embeddings",
        help="a picture of the token and position vectors",
        description="Draw how alike the model's token vectors are, and its positions (the cosine "
        "of each pair), and the tokens in the plane that shows most of their spread.",
    )
    embeddings.add_argument("folder", metavar="DIR", help="a folder that `train` or `demo` saved")
    embeddings.add_argument("--out", type=path, default="embeddings.png", metavar="FILE.png")
    embeddings.set_defaults(run=run_embeddings)

    for command in (demo, train, check, predict, export):
        command.add_argument("--json", action="store_true", help="print JSON and nothing else")
    for command in (demo, train, export, trace):
        command.add_argument(
            "--overwrite", action="store_true", help="replace what was written to that folder"
        )
    lesson = commands.add_parser(
        "lesson",
        help="the questions that learners ask, answered by code that runs",
        description="Print a lesson or, without a number, what they are about.",
    )
    lesson.add_argument(
        "number", nargs="?", type=whole_number(1, 99), metavar="N", help="of the lesson"
    )
    lesson.add_argument(
        "--run",
        dest="live",
        action="store_true",
        help="run its code as it is shown, and compare what comes out",
    )
    lesson.set_defaults(run=run_lesson)

    return top


# --- The commands -----------------------------------------------------------------------------


def run_demo(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    say = _quiet if options.json else _say
    task = tasks.load("sort")
    config, recipe = presets.build(task, presets.settings(task, "demo"))
    recipe = replace(recipe, steps=options.steps or recipe.steps)
    keep_freed_memory()
    say("1. Training a Transformer to sort digits, in NumPy alone (312 -> 123) ...")
    with runs.locked(options.out):
        overwrite = options.overwrite or runs.is_demo(options.out)
        runs.claim(options.out, "run", overwrite)
        trainer = training.Trainer(config, recipe, options.seed)
        with _reporter(task, options.json) as report:
            outcome = training.run(
                trainer,
                task,
                options.out,
                recipe=recipe,
                seed=options.seed,
                minutes=1.0,  # on a slow machine the schedule is shortened to fit
                about={"kind": "demo", "preset": "demo", "config": config.to_json()},
                overwrite=overwrite,
                report=report,
            )
    if outcome.ended == "interrupted":
        say(f"Interrupted; go on with: npformer train --resume {typed(options.out)}")
        return 130
    scores = outcome.scores
    say(
        f"   {outcome.progress.step} steps in {outcome.progress.seconds:.0f} s.  Held-out "
        f"sequences sorted exactly: {scores['exact_match']:.1%} of lengths 3-8, "
        f"{scores['exact_match_long']:.1%} of lengths 6-8."
    )
    model = Transformer.load(options.out)
    examples = task.test()[:200]
    result: dict[str, Any] = {"steps": outcome.progress.step, "scores": scores}
    hint = (
        f"Next: npformer predict {typed(options.out)} 8675309    npformer train g2p --minutes 10\n"
        "      and read npformer/ops.py"
    )
    try:
        import torchformer.check  # noqa: F401
    except ImportError as error:
        if error.name != "torch":
            raise
        say(f"2. The comparison with PyTorch is skipped: torch is not installed ({GET_TORCH}).")
        for example in examples[:3]:
            answer = _answers("numpy", model, [example.src], task)[0]
            say(f"   {task.format(example.src)} -> {task.format(answer)}")
        say(hint)
        result |= {"agree": None, "skipped": f"torch is not installed: {GET_TORCH}"}
    else:
        say("2. The same weights in PyTorch: are the two the same function?")
        result |= _compare(model, task, examples, say)
        say(hint)
        say(result["verdict"])
    result["seconds"] = time.perf_counter() - started
    if options.json:
        print(to_json(result, indent=2))
    return 1 if result["agree"] is False else 0


def run_train(options: argparse.Namespace) -> int:
    say = _quiet if options.json else _say
    if options.resume:
        folder, about = Path(options.resume), _as_it_began(options)
        with blame(folder / training.RUN):
            task = tasks.load(about["task"])
            config = npformer.TransformerConfig.from_json(about["config"])
            recipe = training.Recipe(**about["recipe"])
    else:
        if options.task is None:
            raise ValueError(f"which task? one of {', '.join(tasks.NAMES)}")
        task = tasks.load(options.task)
        chosen = presets.settings(task, options.preset or "default", options.config)
        config, recipe = presets.build(task, chosen)
        folder = Path(options.out) if options.out else _free_folder(task.name)
        about = {"kind": "train", "preset": options.preset or "default", "config": config.to_json()}
        about |= {"backend": options.backend or "numpy", "seed": options.seed or 0}
        about |= {"threads": options.threads, "precision": options.precision or "float32"}
        about |= {"compile": options.compile, "capture": options.capture}
        about |= {"plan": {"minutes": None, "patience": None}}
    plan, seed = about["plan"], about["seed"]
    if options.steps or options.minutes:  # else as the run began
        plan["minutes"] = options.minutes
        recipe = replace(recipe, steps=options.steps or NO_LIMIT)
    if options.patience:
        plan["patience"] = options.patience
    arguments.check_room("to train this model", presets.bytes_to_train(task, config, recipe))
    keep_freed_memory()
    engine = (options.device, about["precision"], about["compile"], about["capture"])
    with runs.locked(folder):
        if not options.resume:
            runs.claim(folder, "run", options.overwrite, f"--resume {typed(folder)}, ")
        trainer = _trainer(about["backend"], config, recipe, seed, about["threads"], engine)
        say(
            f"Training {task.name} with {about['backend']}: {config.n_encoder_layers}+"
            f"{config.n_decoder_layers} layers, d_model {config.d_model}, "
            f"{config.n_parameters:,} parameters -> {folder}"
        )
        with _reporter(task, options.json) as report:
            outcome = training.run(
                trainer,
                task,
                folder,
                recipe=recipe,
                seed=seed,
                minutes=plan["minutes"],
                patience=plan["patience"],
                about=about,
                resume=bool(options.resume),
                overwrite=options.overwrite,
                report=report,
            )
        drawn = draw_history(outcome.progress.history, task, folder / runs.LOSS)
    progress = outcome.progress
    if outcome.ended == "interrupted":
        say(
            f"Stopped at step {progress.step}.  Go on with: npformer train --resume {typed(folder)}"
        )
    else:
        say(
            f"{progress.step} steps in {progress.seconds:.0f} s; the best checkpoint is of step "
            f"{progress.best_step}.  Held-out test data: {_percentages(outcome.scores)}"
        )
        if drawn:
            say(f"Loss curve: {folder / runs.LOSS}")
        it = typed(folder)
        say(f"Next: npformer predict {it} {_example(task)}    npformer check {it}")
    if options.json:
        summary = {"folder": str(folder), "ended": outcome.ended, "steps": progress.step}
        summary |= {"seconds": progress.seconds, "best_step": progress.best_step}
        print(to_json(summary | outcome.scores, indent=2))
    return 130 if outcome.ended == "interrupted" else 0


NO_LIMIT = 10**9  # steps: the time ends the run


def _as_it_began(options: argparse.Namespace) -> dict[str, Any]:
    """What run.json says of the run to resume.  Raises ValueError where an option differs from it.

    `plan` is how long it was to go on; what the command line says of that comes first.
    """
    folder = Path(options.resume)
    earlier = {"threads": None, "precision": "float32", "compile": False, "capture": None}
    about = earlier | {"plan": {}} | training.load_run(folder)  # of an earlier version
    plan = about["plan"] = {"minutes": None, "patience": None} | about["plan"]
    has_end = about["recipe"].get("steps") != NO_LIMIT or plan["minutes"]
    if not (has_end or options.steps or options.minutes):
        raise ValueError(f"the run in {folder} was to end with its time: say --minutes or --steps")
    for name in ("task", "backend", "seed", "threads", "precision"):
        if getattr(options, name) not in (None, about[name]):
            raise ValueError(f"the run in {folder} has {name} {about[name]}")
    if options.compile and not about["compile"]:
        raise ValueError(f"the run in {folder} is not compiled")
    if options.capture not in (None, about["capture"]):
        raise ValueError("--resume goes on as it began: no --capture, no --no-capture")
    if options.preset or options.config or options.out or options.overwrite:
        raise ValueError("--resume goes on as it began: no --preset, --config, --out, --overwrite")
    return about


def run_check(options: argparse.Namespace) -> int:
    say = _quiet if options.json else print
    _need_torch("check compares NumPy with PyTorch")
    model, task = _load(options.folder, verify=True)
    result = _compare(model, task, task.test()[:200], say)
    say(f"Next: npformer predict {typed(options.folder)} {_example(task)}")
    say(result["verdict"])
    if options.json:
        print(to_json(result, indent=2))
    return 0 if result["agree"] else 1


def run_predict(options: argparse.Namespace) -> int:
    if options.backend == "torch":
        _need_torch("--backend torch")
    model, task = _load(options.folder)
    failed, between = False, "["
    for text, ids, error in _inputs(options.inputs, task):
        if error is not None:
            failed = True
            print(f"npformer predict: {error}", file=sys.stderr)
            result = {"input": text, "error": error}
        else:
            answer = task.format(_answers(options.backend, model, [ids], task)[0])
            result = {"input": text, "output": answer}
        if options.json:  # one list, item by item: there may be no end of them
            item = to_json(result, indent=2).replace("\n", "\n  ")  # in a string it is \\n
            print(f"{between}\n  {item}", end="")
            between = ","
        else:
            print(result.get("output", ""), flush=True)
    if options.json:
        print("[]" if between == "[" else "\n]")
    return 2 if failed else 0


def run_export(options: argparse.Namespace) -> int:
    say = _quiet if options.json else print
    _need_torch("the certificate compares NumPy with PyTorch")
    out = Path(options.out)
    runs.claim(out, "export", options.overwrite)
    if out.exists() and set(os.listdir(out)) - set(runs.FILES):  # it is to be given away whole
        raise ValueError(f"{out} is there already, and has other files in it: name a new folder")
    model, task = _load(options.folder, verify=True)
    for parameter in model.parameters():
        parameter.data[...] = parameter.data.astype(options.dtype)
    test = task.test()
    say(f"Weights in {options.dtype}: are the twins one function on them?")
    agreement = _compare(model, task, test[:200], say)
    if not agreement["agree"]:
        say(agreement["verdict"])
        return 1
    say(f"Scoring all {len(test):,} held-out inputs ...")
    scores = training.score(lambda sources, _: _answers("numpy", model, sources, task), task, test)
    certificate = {
        **agreement,
        "weights": options.dtype,
        "device": "cpu",
        "versions": training.versions(),
        "test_examples": len(test),
        **scores,
    }
    run = training.load_run(options.folder) | {"kind": "export", "data": task.provenance()}
    with runs.locked(out):
        runs.claim(out, "export", options.overwrite)
        runs.clear(out, "export")
        checkpoint.save_json(out / runs.RUN, run)
        weights = {k: x.astype(options.dtype) for k, x in model.state_dict().items()}
        checkpoint.save(out, model.config, weights)
        checkpoint.save_json(out / runs.CERTIFICATE, certificate)
    size = sum((out / name).stat().st_size for name in runs.FILES) / 1e6
    say(f"Held-out test data: {_percentages(scores)}")
    say(f"{out}: {size:.2f} MB.  Next: npformer predict {typed(out)} {_example(task)}")
    say(agreement["verdict"])
    if options.json:
        print(to_json(certificate, indent=2))
    return 0


def run_pronounce(options: argparse.Namespace) -> int:
    from npformer import pronunciation

    wanted = {name: getattr(options, name) for name in ("nbest", "beam", "model", "stress")}
    voice = pronunciation.Pronouncer.load(options.weights or pronunciation.SHIPPED)
    if options.plot:
        return _plot_alignment(voice, options)
    if options.words:
        chunks: Any = [options.words]
    else:
        _invite("A word a line")
        chunks = streams.arriving()
    n, refused = 0, False
    for words in chunks:
        answers = voice.answer(words, **wanted, ipa=options.ipa and not options.json)
        for word, answer in zip(words, answers, strict=True):
            n += 1
            if isinstance(answer, ValueError):
                refused = True
                print(f"npformer pronounce: input {n}: {answer}", file=sys.stderr)
                if options.json:
                    print(to_json({"word": word, "error": str(answer)}, ensure_ascii=False))
            elif options.json:
                print(to_json(_as_json(answer), ensure_ascii=False))
            else:
                _print_pronunciation(answer, options.ipa)
        streams.flush()
    return 2 if refused else 0


def _print_pronunciation(answer: Any, ipa: bool) -> None:
    """As in the dictionary: word, word(2), word(3) are the ways to say it, best first."""
    for i, way in enumerate((answer, *answer.others), 1):
        entry = answer.word.strip() if i == 1 else f"{answer.word.strip()}({i})"
        print(f"{entry}  {way.ipa if ipa else way}")


def _as_json(answer: Any) -> dict[str, Any]:
    about = {"word": answer.word, "phones": str(answer), "ipa": answer.ipa}
    about |= {"source": answer.source, "score": answer.score}
    if answer.others:
        ways = answer.others
        about["others"] = [{"phones": str(w), "ipa": w.ipa, "score": w.score} for w in ways]
    return about


def _plot_alignment(voice: Any, options: argparse.Namespace) -> int:
    words, file = options.words, options.plot
    if len(words) != 1:
        raise ValueError(f"--plot draws one word, got {len(words)}")
    others = [f"--{name}" for name in ("json", "ipa", "stress") if getattr(options, name)]
    if others := others + ["--nbest"] * (options.nbest > 1):
        raise ValueError(f"--plot draws the one way that the model says: no {', no '.join(others)}")
    alignment = voice.align(words[0])
    if not draw_alignment(alignment, file):
        raise MissingError("--plot needs matplotlib: pip install 'npformer[plot]'")
    print(f"{words[0]}  {' '.join(alignment.phones[:-1])}  as the model says it -> {file}")
    return 0


def run_trace(options: argparse.Namespace) -> int:
    if options.out:
        runs.claim(options.out, "trace", options.overwrite)
    seen = _traced(options.folder, options.input).seen
    listed = [entry for entry in seen if options.match in entry.name]
    widths = [max((len(e.name) for e in listed), default=0)]
    for entry in listed:
        top = float(np.abs(entry.value).max(initial=0))
        shape = f"{entry.letters or ''} {entry.shape}".strip()
        print(f"{entry.name:<{widths[0]}}  {shape:<30} max {top:<9.3g} {entry.file}:{entry.line}")
        for line in (entry.formula, *entry.refined.splitlines()):
            print(f"{'':<{widths[0]}}    {line}")
    print(f"{len(listed)} of {len(seen)} tensors; loss {seen.about['loss']:.4f}")
    if options.out:
        runs.clear(options.out, "trace")
        seen.save(options.out)
        other = f"npformer diff {typed(options.out)} OTHER"
        print(f"Saved: {options.out}    compare with another: {other}")
    return 0


def run_diff(options: argparse.Namespace) -> int:
    from npformer.tracing import Trace, difference

    found = difference(Trace.load(options.a), Trace.load(options.b), options.bound)
    if found is None:
        print("no difference: every tensor that both have is the same within the bound")
        return 0
    how = "created here" if found.created else "something before it is not in both traces"
    print(f"first difference, in {found.phase}: {found.name}  ({how}; {found.at})")
    print(found.report)
    if n := len(found.inherited):
        more = ", ..." if n > 3 else ""
        print(f"inherited by {n} after it: {', '.join(found.inherited[:3])}{more}")
    return 1


def run_attention(options: argparse.Namespace) -> int:
    from npformer.plot import draw_attention

    it = _traced(options.folder, options.input)
    if not draw_attention(it.seen, it.source, it.target, it.said, options.out):
        raise MissingError("attention needs matplotlib: pip install 'npformer[plot]'")
    print(f"{options.input} -> {' '.join(it.target[1:])}    {options.out}")
    return 0


def run_explain(options: argparse.Namespace) -> int:
    from npformer.page import write_page

    it = _traced(options.folder, options.input)
    c = it.model.config
    about = (
        f"{it.task.name}: {''.join(it.source)} -> {' '.join(it.target[1:])}.  "
        f"{c.n_encoder_layers}+{c.n_decoder_layers} layers, d_model {c.d_model}, {c.n_heads} "
        f"heads; loss {it.seen.about['loss']:.4f}; {len(it.seen)} tensors"
    )
    size = write_page(
        it.seen,
        options.out,
        src=it.batch.src[0].tolist(),
        tgt=it.batch.tgt_in[0].tolist(),
        source=it.source,
        target=it.target,
        said=it.said,
        vocabularies=(_names(it.task.src_vocabulary), _names(it.task.tgt_vocabulary)),
        pad_ids=(c.src_pad_id, c.tgt_pad_id),
        about=about,
    )
    print(f"{about}\n{options.out}: {size / 1e6:.1f} MB; open it in a browser")
    return 0


def run_embeddings(options: argparse.Namespace) -> int:
    from npformer.plot import draw_embeddings

    model, task = _load(options.folder)
    sides = {"target": (model.tgt_embedding, task.tgt_vocabulary.tokens)}
    if model.src_embedding is not None:
        sides = {"source": (model.src_embedding, task.src_vocabulary.tokens)} | sides
    tables = {side: (table.weight.data, tokens) for side, (table, tokens) in sides.items()}
    positions: Any = model.tgt_positions
    rows = positions.table if hasattr(positions, "table") else positions.weight.data
    if not draw_embeddings(tables, rows[: task.max_tgt_len + 1], options.out):
        raise MissingError("embeddings needs matplotlib: pip install 'npformer[plot]'")
    print(
        f"{', '.join(f'{len(tokens)} {side} tokens' for side, (_, tokens) in sides.items())}, "
        f"{len(rows)} positions -> {options.out}"
    )
    return 0


def run_mask(options: argparse.Namespace) -> int:
    from npformer.explain import explain_mask, load_mask

    given = load_mask(options.file) if options.file else None
    ids = np.array([options.ids]) if options.ids else None
    tokens = [str(i) for i in options.ids] or None
    kind = {"ids": ids, "pad_id": options.pad, "causal": options.causal, "tokens": tokens}
    print(explain_mask(given, **kind, window=options.window))
    return 0


# --- What they share --------------------------------------------------------------------------


def run_lesson(options: argparse.Namespace) -> int:
    from npformer import lessons

    if options.number is None:
        for path in lessons.files():
            print(f"{int(path.name[:2]):3}  {lessons.title(path.read_text(encoding='utf-8'))}")
        print("\nnpformer lesson N prints one, npformer lesson N --run runs its code as well.")
        return 0
    text = lessons.find(options.number).read_text(encoding="utf-8")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    pieces = lessons.run(text) if options.live else lessons.split(text)
    seen = []

    def noted() -> Iterator[Any]:
        for piece in pieces:
            seen.append(piece)
            yield piece

    for part in lessons.shown(noted(), colour=colour):
        print(part, end="", flush=True)
    if options.live:
        lines = text.splitlines(), lessons.joined(iter(seen)).splitlines()
        differ = [line for line in difflib.ndiff(*lines) if line.startswith(("- ", "+ "))]
        print(
            "It is not what is written down (-) that came out here, but (+):"
            if differ
            else "All of it came out as it is written down.",
            *differ,
            sep="\n",
        )
    return 0


def _compare(model: Transformer, task: Task, examples: Sequence[tasks.Example], say) -> dict:
    """The table of the comparison, its verdict and its numbers."""
    from torchformer.check import compare

    # Each source with the answer to another: at the right answers a trained model's gradients are
    # almost 0, and there would be nothing but rounding to compare.
    answers = [e.references[0] for e in examples[:32]]
    shuffled = zip(examples[:32], answers[1:] + answers[:1], strict=True)
    rows = compare(model, make_batch([(e.src, answer) for e, answer in shuffled]))
    sources = [example.src for example in examples]
    ours, theirs = (_answers(backend, model, sources, task) for backend in ("numpy", "torch"))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    say(f"   {'':<10} {'precision':<9} {'error':>8} {'allowed':>8}")
    for row in rows:
        at = f"   worst: {row.where}" if row.where else ""
        mark = "ok" if row.holds else "OUT"
        say(f"   {row.name:<10} {row.dtype:<9} {row.error:>8.1e} {row.bound:>8.1e}  {mark}{at}")
    for source, a, b in zip(sources[:3], ours, theirs, strict=False):
        say(f"   {_text(task, source)} -> NumPy {task.format(a)}   PyTorch {task.format(b)}")
    agree = all(row.holds for row in rows) and same == len(examples)
    n = sum(1 for _ in model.named_parameters())
    verdict = (
        f"{'agree' if agree else 'disagree'}: logits, loss and the gradients of {n} parameters; "
        f"{same} of {len(examples)} decoded answers are the same"
    )
    return {
        "agree": agree,
        "verdict": verdict,
        "comparisons": [vars(row) | {"holds": row.holds} for row in rows],
        "same_answers": same,
        "answers": len(examples),
    }


def _answers(backend: str, model: Transformer, sources: list[list[int]], task: Task) -> list:
    if backend == "numpy":
        return greedy(model, pad(sources), max_len=task.max_tgt_len, sos_id=SOS, eos_id=EOS)
    import torch

    import torchformer
    from torchformer.convert import to_torch

    twin = to_torch(model).eval()
    src = torch.from_numpy(pad(sources))
    return torchformer.greedy(twin, src, max_len=task.max_tgt_len, sos_id=SOS, eos_id=EOS)


def _example(task: Task) -> str:
    return "hypothesis" if task.name.startswith("g2p") else "31524"


class _Traced(NamedTuple):
    """One input through a model, with its own answer as the target."""

    seen: Any  # the Trace
    model: Transformer
    task: Task
    batch: Batch
    source: list[str]  # tokens
    target: list[str]  # the tokens that were read: the start, then the answer
    said: list[str]  # and what was to be said next: the answer, then the end


def _traced(folder: str, text: str) -> _Traced:
    from npformer.tracing import trace

    model, task = _load(folder)
    ids = task.parse(text)
    (answer,) = _answers("numpy", model, [ids], task)
    batch = make_batch([(ids, answer)])
    seen = trace(model, batch.src, batch.tgt_in, target=batch.tgt_out)
    source, target = task.src_vocabulary.decode(ids), task.tgt_vocabulary.decode(answer)
    return _Traced(seen, model, task, batch, source, ["start", *target], [*target, "end"])


def _names(vocabulary: Vocabulary) -> list[str]:
    """Every token, by id, as it is called in pictures."""
    return ["pad", "start", "end", *vocabulary.tokens[3:]]


def _text(task: Task, ids: Sequence[int]) -> str:
    return "".join(task.src_vocabulary.decode(ids))


def _load(folder: str, verify: bool = False) -> tuple[Transformer, Task]:
    """`verify`: the checksum also of a file so large that it is not done by the way."""
    about = training.load_run(folder)
    with blame(Path(folder) / training.RUN):
        task = tasks.load(about["task"])
    if verify:
        checkpoint.verify(Path(folder) / checkpoint.MODEL)
    model = Transformer.load(folder)
    weights = {name: p.data for name, p in model.named_parameters()}
    checkpoint.check_finite(Path(folder) / checkpoint.MODEL, weights)
    sizes = (len(task.src_vocabulary), len(task.tgt_vocabulary))
    if (model.config.src_vocab_size, model.config.tgt_vocab_size) != sizes:
        raise CheckpointError(f"{folder}: the model's vocabularies are not those of {task.name}")
    return model, task


def _inputs(given: Sequence[str], task: Task) -> Iterator[tuple[str, list[int], str | None]]:
    """Each input with its ids, or with what is wrong with it."""
    if not given:
        _invite("An input a line")
    lines = given or (line for chunk in streams.arriving() for line in chunk)
    for i, text in enumerate(lines, 1):
        try:
            yield text, task.parse(text), None
        except ValueError as error:
            yield text, [], f"input {i}: {error}"


def _invite(what: str) -> None:
    """For whoever sits before a terminal that waits."""
    if sys.stdin.isatty():
        print(f"{what}; Ctrl-D ends.", file=sys.stderr)


def _trainer(backend: str, config, recipe, seed: int, threads: int | None, engine: tuple):
    device, precision, compiled, captured = engine
    if backend == "numpy":
        if precision != "float32" or compiled or captured is not None:
            raise ValueError("--precision, --compile and --capture need --backend torch")
        if device == "cuda":
            raise ValueError("--device cuda needs --backend torch: NumPy runs on the CPU")
        try:
            return training.Trainer(config, recipe, seed, threads or 1)
        except ImportError as error:
            raise MissingError(f"--threads {threads}: {error}") from None
    _need_torch("--backend torch")
    import torch

    import torchformer.training

    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("--device cuda: torch finds no CUDA device here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:  # of the command line, or of a run.json that may say anything
        torch.set_num_threads(integer("threads", threads, 1, THREADS))
    return torchformer.training.Trainer(config, recipe, seed, device, precision, compiled, captured)


def _need_torch(what: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingError(f"{what}, and torch is not installed: {GET_TORCH}") from None


def _free_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that holds no run."""
    folders = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10**6))
    return next(folder for folder in folders if not (folder / training.RUN).exists())


def _percentages(scores: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in scores.items())


def _quiet(*_: object) -> None:
    pass


def _say(text: str) -> None:
    """Print what a long work has to say; it goes on where nobody listens any more (`| head -1`)."""
    try:
        print(text, flush=True)
    except OSError:
        streams.forget_output()
        with suppress(OSError):  # of a terminal that was closed, both are gone
            print("npformer: the output is closed; the work goes on without it", file=sys.stderr)


# --- Progress ---------------------------------------------------------------------------------


def _reporter(task: Task, quiet: bool):
    if quiet:
        return _Quiet()
    return _Bar(task) if sys.stdout.isatty() else _Lines()


class _Quiet(training.Silent):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class _Lines(_Quiet):
    """A line for each evaluation: for logs and pipes."""

    def __init__(self):
        self.last = {"loss": math.nan, "tokens_per_second": math.nan}  # before the first step

    def step(self, entry):
        self.last = entry

    def evaluation(self, entry, is_best):
        scores = {k: v for k, v in entry.items() if k not in ("step", "seconds", "averaged")}
        mark = "  (best so far)" if is_best else ""
        if n := entry.get("averaged"):
            mark = f"  (the last {n} weights averaged){mark}"
        _say(
            f"   step {entry['step']:>6}  {entry['seconds']:6.0f} s  loss {self.last['loss']:.3f}  "
            f"{self.last['tokens_per_second']:,.0f} tokens/s  {_percentages(scores)}{mark}"
        )


class _Bar(_Quiet):
    """A live progress bar: for people."""

    def __init__(self, task: Task):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.task, self.loss, self.score = task, 0.0, ""
        self.progress = Progress(
            TextColumn("  "),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("{task.fields[score]}", style="green"),
            TimeRemainingColumn(),
        )
        self.bar = self.progress.add_task("", total=1, loss=0.0, speed=0.0, score="")

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        with suppress(OSError):  # the terminal was closed, and the work went on
            self.progress.stop()

    def step(self, entry):
        self.loss = entry["loss"] if not self.loss else 0.95 * self.loss + 0.05 * entry["loss"]
        self.progress.update(
            self.bar,
            completed=entry["step"],
            total=entry["total"],
            loss=self.loss,
            speed=entry["tokens_per_second"],
        )

    def evaluation(self, entry, is_best):
        metric = self.task.metric
        score = f"{metric.replace('_', ' ')} {entry[metric]:.1%}"
        self.progress.update(self.bar, score=score)
