"""Runs that are killed at every file operation and at random moments: none is lost, none is torn.

    python tests/kills.py --kills 300 [--backend torch] [--seed 0]

Each kill is a child process that trains a tiny model and is killed (SIGKILL) just before its n-th
file operation in the run's folder, or after a random number of lines of Python.  Its run is
resumed, often to be killed once more, and has to end with the files of a run that never stopped:
the same names, tensors, best checkpoint and history, bit for bit but for the clock's readings.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from npformer import checkpoint, presets, tasks, training

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
TIMES = ("seconds", "tokens_per_second")  # what a clock said


def train(folder: Path, backend: str, resume: bool) -> None:
    """Twelve steps, three evaluations and an average; the run goes on where there is one."""
    task = tasks.load("sort")
    chosen = presets.settings(task, "notes")
    chosen["model"] |= {"d_model": 8, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 8}
    config, recipe = presets.build(task, chosen)
    recipe = replace(recipe, batch_size=4, steps=12, evaluate_every=3, dev_examples=4, average=2)
    if backend == "torch":
        import torchformer.training

        trainer: Any = torchformer.training.Trainer(config, recipe, 3)
    else:
        trainer = training.Trainer(config, recipe, 3)
    training.run(trainer, task, folder, recipe=recipe, seed=3, test_examples=4, resume=resume)


def in_a_child(work: Callable[[], None]) -> int:
    """The exit status of `work` in a process of its own: 0, or that of the signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_file_operation(n: int, folder: Path) -> None:
    """Kill this process just before its n-th operation on a file in `folder`, counted from 0."""
    left = n

    def audit(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(audit)


def die_at_call(n: int) -> None:
    """Kill this process at its n-th call of a Python function."""
    left = n

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.setprofile(count)


def contents(folder: Path) -> dict[str, Any]:
    """All that is in the folder, without the clock's readings."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            tensors, metadata = checkpoint.load_tensors(path)
            if "progress" in metadata:
                metadata["progress"] = timeless(json.loads(metadata["progress"]))
            kept = {k: v for k, v in metadata.items() if k != "checksum"}
            found[name] = {k: (x.dtype.str, x.tobytes()) for k, x in tensors.items()}, kept
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def n_file_operations(root: Path, backend: str) -> int:
    """Of a run that is not killed."""
    count = 0
    folder = root / "counted"

    def work() -> None:
        def audit(event: str, arguments: tuple) -> None:
            nonlocal count
            count += event in FILE_EVENTS and str(arguments[0]).startswith(str(folder))

        sys.addaudithook(audit)
        train(folder, backend, resume=False)
        (root / "count").write_text(str(count))

    assert in_a_child(work) == 0
    return int((root / "count").read_text())


def kill_and_resume(folder: Path, backend: str, rng: random.Random, at: int | None) -> int:
    """One run, killed until it ends by itself; returns how often."""
    kills = 0
    while True:
        begun = (folder / training.RUN).exists()

        def work(begun: bool = begun, kills: int = kills) -> None:
            if kills == 0 and at is not None:
                die_at_file_operation(at, folder)
            elif kills < 3:
                die_at_call(int(10 ** rng.uniform(2, 5.2)))
            train(folder, backend, resume=begun)

        status = in_a_child(work)
        rng.random()  # the parent's numbers go on as the child's did
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, f"exit status {status} after {kills} kills (at {at})"
        kills += 1


def main() -> int:
    parser = argparse.ArgumentParser("python tests/kills.py", description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=300, metavar="N", help="at least so many (300)"
    )
    parser.add_argument("--backend", choices=("numpy", "torch"), default="numpy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, started = random.Random(options.seed), time.monotonic()
    if options.backend == "torch":
        import torchformer.training  # once, not in every child

        torchformer.training.torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole = root / "whole"
        assert in_a_child(lambda: train(whole, options.backend, resume=False)) == 0
        expected, n = contents(whole), n_file_operations(root, options.backend)
        kills = runs = 0
        while kills < options.kills:
            folder = root / str(runs)
            kills += kill_and_resume(folder, options.backend, rng, runs if runs < n else None)
            found = contents(folder)
            assert sorted(found) == sorted(expected), f"run {runs}: {sorted(found)}"
            for path, value in expected.items():
                assert found[path] == value, f"run {runs}: {path} is not what it was to be"
            runs += 1
    print(
        f"{kills} kills of {runs} runs, {min(n, runs)} of them at each of {n} file operations: all "
        f"went on and ended as one that never stopped ({time.monotonic() - started:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
