"""What is fuzzed: a good folder, what is done to it, and the commands that then read it."""

import contextlib
import copy
import importlib
import io
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from npformer import checkpoint, cli, runs, tasks, training
from tests.fuzz import mutations

SMALL = """
[model]
d_model = 8
n_heads = 2
d_ff = 8
n_encoder_layers = 1
n_decoder_layers = 1
[recipe]
batch_size = 4
evaluate_every = 2
dev_examples = 4
average = 2
"""


SLOW = (
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "torchformer.check",
    "rich.progress",
)
SLOW += ("torchformer.training", "torchformer.parallel", "torch._dynamo", "npformer.page")


def few(examples):
    return lambda self: examples(self)[:4]


def hurry():
    """Long things made short, for as long as this process lives: nothing of them reads a file.

    And what is slow to import or to read is there before the workers are forked.
    """
    from npformer import pronunciation
    from npformer.tasks import digits, g2p

    for name in SLOW:
        importlib.import_module(name)
    pronunciation.shipped()
    g2p.entries()
    g2p.dictionary()

    for Task in (digits.Digits, g2p.G2P):
        Task.test = few(Task.test)  # type: ignore[method-assign]
    run = training.run

    def short(trainer, task, folder, *, recipe, **options):
        if not options.get("resume"):  # else it is to be as it was
            recipe = replace(recipe, steps=1, dev_examples=2)
        left, step = [12], trainer.step

        def few_steps(*arguments):
            left[0] -= 1
            if left[0] < 0:  # it was asked to go on for longer than we have
                raise KeyboardInterrupt
            return step(*arguments)

        trainer.step = few_steps
        return run(trainer, task, folder, recipe=recipe, **options, test_examples=2)

    training.run = short
    cli.draw_history = lambda *_: False
    sys.modules["torch"].set_num_threads = lambda n: None  # of a forked process they may hang


def command(main, line, stdin=b"312\n"):
    """The exit code, and what was said on standard error."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(line)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdin = before
    return code, err.getvalue()


class Target:
    """`make` once; then for each mutation a copy of it, `mutate`, `run`."""

    def make(self, folder: Path) -> None: ...

    def mutate(self, rng, folder: Path) -> str:
        return mutations.in_folder(rng, folder)

    def run(self, rng, folder: Path):
        """Exit code and standard error.  A ValueError is a refusal as well."""
        raise NotImplementedError


def train(folder: Path, backend: str = "numpy") -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(SMALL)
        config.flush()
        line = ["train", "sort", "--config", config.name, "--steps", "4"]
        code, err = command(cli.main, [*line, "--out", str(folder), "--backend", backend])
    assert code == 0, err
    assert (folder / runs.RECENT).is_dir()


class Checkpoints(Target):
    """config.json, model.safetensors and run.json, read by both twins and by the commands."""

    def make(self, folder):
        train(folder / "run")
        for name in (runs.HISTORY, runs.RESUME, runs.LOSS):
            (folder / "run" / name).unlink(missing_ok=True)
        for path in (folder / "run" / runs.RECENT).iterdir():
            path.unlink()
        (folder / "run" / runs.RECENT).rmdir()

    def run(self, rng, folder):
        run, kind = str(folder / "run"), rng.integers(10)
        if kind < 4:
            import npformer

            npformer.Transformer.load(run)
        elif kind < 7:
            import torchformer

            torchformer.Transformer.load(run)
        elif kind == 7:
            return command(cli.main, ["check", run])
        else:
            return command(cli.main, ["predict", run, "312", "9"])
        return 0, ""


class Resumes(Target):
    """resume.safetensors, run.json and recent/, by `train --resume`."""

    def make(self, folder):
        train(folder / "numpy")
        train(folder / "torch", "torch")

    def mutate(self, rng, folder):
        self.backend = ("numpy", "torch")[rng.integers(2)]
        return f"{self.backend}: {super().mutate(rng, folder / self.backend)}"

    def run(self, rng, folder):
        return command(cli.main, ["train", "--resume", str(folder / self.backend), "--steps", "6"])


class Shards(Target):
    """shards/, by the loader that torchrun's --resume uses, in a group of one."""

    def make(self, folder):
        import torch

        from npformer import TransformerConfig
        from torchformer import Transformer, parallel

        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
        sizes = {"d_model": 8, "n_heads": 2, "d_ff": 8}
        sizes |= {"n_encoder_layers": 1, "n_decoder_layers": 1}
        model = Transformer(TransformerConfig(13, 13, **sizes), np.random.default_rng(0))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        with parallel.group("cpu"):
            parallel.save(folder / "shards", model, optimizer, 7)
        self.model = model

    def run(self, rng, folder):
        import torch
        import torch.distributed as dist

        from torchformer import parallel

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        try:
            parallel.load(folder / "shards", model, optimizer)
        except ValueError:
            for p, x in zip(self.model.parameters(), model.parameters(), strict=True):
                assert torch.equal(p, x), "a refusal has loaded something"
            raise
        return 0, ""


class Traces(Target):
    """trace.json and trace.safetensors, by `npformer diff`."""

    def make(self, folder):
        train(folder.parent / "traced")
        for name in "ab":
            line = ["trace", str(folder.parent / "traced"), "31", "--out", str(folder / name)]
            code, err = command(cli.main, line)
            assert code == 0, err

    def mutate(self, rng, folder):
        return super().mutate(rng, folder / "a")

    def run(self, rng, folder):
        pair = [str(folder / "a"), str(folder / "b")]
        return command(cli.main, ["diff", *(pair if rng.random() < 0.5 else pair[::-1])])


class Kit(Target):
    """manifest.json, cases and answers, by `python -m npformer.testing --check`."""

    def make(self, folder):
        from npformer.testing import exchange
        from npformer.testing.cases import LEVELS, make_cases
        from npformer.testing.reference import reference

        chosen = ("softmax", "layer_norm", "linear", "sinusoidal_positions", "feed_forward")
        chosen += ("causal_attention", "cross_entropy", "encoder_layer", "decoder_only", "greedy")
        cases = make_cases(LEVELS, 1, 0, only=chosen)
        exchange.dump(folder / "kit", cases)
        for case in cases:
            answer = reference(case.op, case.arrays, case.options)
            path = folder / "kit" / "answers" / f"{case.name}.safetensors"
            checkpoint.save_tensors(path, answer, {})

    def mutate(self, rng, folder):
        said = super().mutate(rng, folder / "kit")
        path = folder / "kit" / "manifest.json"
        if rng.random() < 0.8:  # else the checksum alone would refuse whatever else is changed
            with contextlib.suppress(ValueError, OSError, TypeError, AttributeError, KeyError):
                manifest = checkpoint.load_json(path)
                manifest.pop("checksum", None)
                for entry in manifest["cases"]:
                    entry.pop("checksum", None)
                checkpoint.save_json(path, manifest)
        return said

    def run(self, rng, folder):
        from npformer.testing.__main__ import main

        return command(main, ["--check", str(folder / "kit")])


LINES = (
    "predict RUN 312 --backend numpy --json",
    "check RUN --json",
    "train sort --steps 3 --config small.toml --seed 1 --patience 3 --minutes 1 --out new --json",
    "train sort --preset notes --threads 2 --backend torch --device cpu --precision float32",
    "train --resume RUN --steps 5",
    "demo --steps 2 --seed 1 --out new --json",
    "export RUN new --dtype float16 --overwrite",
    "pronounce hello --nbest 3 --beam 5 --model --stress --ipa --json",
    "pronounce --plot picture.png thought",
    "trace RUN 312 --match scores --out traced --overwrite",
    "diff trace trace --bound 1e-3",
    "attention RUN 312 --out picture.png",
    "explain RUN 312 --out page.html",
    "mask 3 4 5 0 0 --pad 0 --causal --window 2 --file mask.npy",
    "embeddings RUN --out picture.png",
    "lesson 7",
)
KIT = (
    "--dump new --examples 1 --seed 3 --only softmax --dtype float32 --level op --overwrite",
    "--check kit --json verdicts.json",
    "--dump new --fix norm_first=false --only feed_forward --fix d_ff=8 --examples 2 --level layer",
)


class Commands(Target):
    """Command lines of `npformer` and of the kit, in a folder with one file of each kind."""

    def make(self, folder):
        train(folder / "RUN")
        (folder / "small.toml").write_text(SMALL)
        np.save(folder / "mask.npy", np.tri(5, dtype=bool))
        code, err = command(
            cli.main, ["trace", str(folder / "RUN"), "31", "--out", str(folder / "trace")]
        )
        assert code == 0, err
        Kit().make(folder)

    def mutate(self, rng, folder):
        os.mkfifo(folder / "fifo")
        lines = LINES + KIT if rng.random() < 0.9 else LINES
        self.line = lines[rng.integers(len(lines))].split()
        self.is_kit = self.line[0].startswith("--")
        words = sorted({word for each in (KIT if self.is_kit else LINES) for word in each.split()})
        words = [w for w in words if w not in ("lesson",)] + ["fifo", ".", "/dev/null", "--"]
        words += tasks.NAMES if not self.is_kit else []
        if rng.random() < 0.85:
            self.line = mutations.in_arguments(rng, self.line, words)
        said = mutations.in_folder(rng, folder) if rng.random() < 0.25 else ""
        return f"{self.line}  {said}"

    def run(self, rng, folder):
        from npformer.testing.__main__ import main

        lines = [b"312\n", b"", b"1" * 10**6, b"hello\n\xff\n", b"\n\n"]
        os.chdir(folder)
        if not self.is_kit and "--run" in self.line:
            return 0, ""  # a lesson may take as long as it likes
        return command(
            main if self.is_kit else cli.main, self.line, lines[rng.integers(len(lines))]
        )


TARGETS = {
    "checkpoints": Checkpoints,
    "resumes": Resumes,
    "shards": Shards,
    "traces": Traces,
    "kit": Kit,
    "commands": Commands,
}
