"""Training: the five lines of a step, and the loop around them that both twins share.

    trainer = Trainer(config, recipe, seed=0)
    outcome = run(trainer, task, folder="runs/sort", steps=3000)

`Trainer` is NumPy's; torchformer/training.py has its twin, with the same methods.  `run` only
calls those: it evaluates, keeps the best checkpoint, stops early, saves and resumes.

What is in the folder
    config.json, model.safetensors   the best checkpoint, which both twins load
    run.json                         task, recipe, seed, versions, results
    history.json                     loss, rate and scores over time
    resume.safetensors               the last state of everything, to go on from
    recent/                          the last few weights, where the recipe averages them
"""

import json
import math
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import npformer
from npformer import checkpoint, schedules
from npformer.checkpoint import CheckpointError
from npformer.config import TransformerConfig
from npformer.decoding import greedy
from npformer.ops import Array, Rng, cross_entropy
from npformer.optim import Adam, clip_grad_norm
from npformer.parallel import BatchThreads
from npformer.tasks import EOS, PAD, SOS, Batch, Example, Task, pad
from npformer.transformer import Transformer

RUN, HISTORY, RESUME, RECENT = "run.json", "history.json", "resume.safetensors", "recent"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for both twins."""

    batch_size: int = 64  # sequences
    steps: int = 3000
    schedule: str = "cosine"  # or "constant", "noam", "inverse_sqrt"
    rate: float = 1e-3  # the peak (of noam: a factor on the paper's)
    warmup: int = 100  # steps
    betas: tuple[float, float] = (0.9, 0.98)  # of Adam (§ 5.3)
    eps: float = 1e-9
    label_smoothing: float = 0.0
    clip: float = 1.0  # the L2 norm that all gradients together may have
    evaluate_every: int = 250  # steps
    dev_examples: int = 500  # of the held-out ones, for choosing the best checkpoint
    average: int = 0  # so many of the last weights evaluated are averaged in the end; 0: none

    def __post_init__(self):
        for name in ("batch_size", "steps", "warmup", "evaluate_every", "dev_examples"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.average, int) or isinstance(self.average, bool) or self.average < 0:
            raise ValueError(f"average must be an integer of at least 0, got {self.average!r}")
        for name in ("rate", "clip", "eps"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.schedule not in ("constant", "noam", "inverse_sqrt", "cosine"):
            raise ValueError(f"unknown schedule {self.schedule!r}")
        if not (_is_number(self.label_smoothing) and 0 <= self.label_smoothing <= 1):
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing!r}")
        betas = tuple(self.betas) if isinstance(self.betas, list | tuple) else ()
        if len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", betas)

    def schedule_for(self, config: TransformerConfig, total: int) -> schedules.Schedule:
        if self.schedule == "constant":
            return schedules.constant(self.rate)
        if self.schedule == "noam":
            return schedules.noam(config.d_model, self.warmup, self.rate)
        if self.schedule == "inverse_sqrt":
            return schedules.inverse_sqrt(self.rate, self.warmup)
        return schedules.cosine(self.rate, min(self.warmup, total), total)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Trainer:
    """One model, its optimizer and its random numbers, in NumPy."""

    backend = "numpy"

    def __init__(self, config: TransformerConfig, recipe: Recipe, seed: int = 0, threads: int = 1):
        """`threads` > 1: that many cores work on each batch, see parallel.py (threadpoolctl)."""
        self.config, self.recipe = config, recipe
        self.model = Transformer(config, rng=np.random.default_rng(seed))
        self.rng = np.random.default_rng([seed, 1])  # of dropout
        self.optimizer = Adam(self.model.parameters(), 0.0, recipe.betas, recipe.eps)
        self.threads = BatchThreads(self.model, threads, self.rng) if threads > 1 else None

    def step(self, batch: Batch, rate: float) -> float:
        """One update of the weights; returns the loss, in nats per target token."""
        n_targets = int((batch.tgt_out != PAD).sum())

        def add_gradients(model: Transformer, src: Array, tgt: Array, rng: Rng) -> float:
            logits, backward_model = model(src, tgt[:, :-1], rng=rng)  # (B, T, V)
            loss, backward_loss = cross_entropy(
                logits, tgt[:, 1:], PAD, self.recipe.label_smoothing, n_targets
            )
            backward_model(backward_loss(1.0))
            return float(loss)

        self.optimizer.zero_grad()
        if self.threads:
            loss = self.threads.run(add_gradients, batch.src, batch.tgt)
        else:
            loss = add_gradients(self.model, batch.src, batch.tgt, self.rng)
        clip_grad_norm(self.optimizer.parameters, self.recipe.clip)
        self.optimizer.rate = schedules.constant(rate)
        self.optimizer.step()
        return loss

    def batches(self, task: Task, first_step: int, seed: int) -> Iterator[Batch]:
        step = first_step
        while True:
            yield task.batch(step, self.recipe.batch_size, seed)
            step += 1

    def answer(self, sources: Sequence[list[int]], max_len: int) -> list[list[int]]:
        """Greedy answers to a batch of sources."""
        return greedy(self.model, pad(sources), max_len=max_len, sos_id=SOS, eos_id=EOS)

    def weights(self) -> dict[str, Array]:
        return self.model.state_dict()

    def load_weights(self, state: Mapping[str, Array]) -> None:
        self.model.load_state_dict(state)

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """All that the next step depends on besides the weights: arrays, and what JSON can hold."""
        rngs = self.threads.rngs if self.threads else [self.rng]
        return self.optimizer.state_dict(), {"rng": [rng.bit_generator.state for rng in rngs]}

    def load_state(self, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(arrays)
        rngs = self.threads.rngs if self.threads else [self.rng]
        if len(values["rng"]) != len(rngs):
            n = len(values["rng"])
            raise ValueError(f"the run was trained with {n} thread{'s' if n > 1 else ''}")
        for rng, state in zip(rngs, values["rng"], strict=True):
            rng.bit_generator.state = state


class Reporter(Protocol):
    """Is told what happens; cli.py has one with a progress bar, one that prints, one for JSON."""

    def step(self, entry: dict[str, float]) -> None: ...
    def evaluation(self, entry: dict[str, float], is_best: bool) -> None: ...


class Silent:
    """Reports nothing."""

    def step(self, entry: dict[str, float]) -> None: ...
    def evaluation(self, entry: dict[str, float], is_best: bool) -> None: ...


@dataclass
class Progress:
    """Where a run stands; what resume.safetensors holds besides arrays."""

    step: int = 0
    seconds: float = 0.0  # spent training, over all its sessions
    best: float | None = None  # the task's metric at the best checkpoint
    best_step: int = 0
    history: dict[str, list] = field(default_factory=lambda: {"steps": [], "evaluations": []})


@dataclass
class Outcome:
    """How a run ended: "done", "early" (no progress), "time" or "interrupted"."""

    ended: str
    progress: Progress
    scores: dict[str, float]  # of the best checkpoint on the task's test examples


def run(
    trainer,
    task: Task,
    folder: str | Path,
    *,
    recipe: Recipe,
    seed: int = 0,
    minutes: float | None = None,
    patience: int | None = None,
    target: float | None = None,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: Reporter | None = None,
    test_examples: int | None = None,
) -> Outcome:
    """Train for `recipe.steps` or `minutes`, what ends first; the best checkpoint is in `folder`.

    `patience`: stop after that many evaluations without a better score; `target`: stop at a score
    that good.  Where the time will end first, the schedule is stretched to end with it.  Ctrl-C
    saves and returns.  With `resume` the run in `folder` goes on where it stopped, and ends with
    the same weights, bit for bit, as one that never stopped.
    """
    folder, report = Path(folder), report or Silent()
    progress = _resume(trainer, folder, seed, recipe) if resume else Progress()
    about = {"task": task.name, "backend": trainer.backend, "seed": seed, **(about or {})}
    about |= {"recipe": asdict(recipe), "versions": versions()}
    checkpoint.save_json(folder / RUN, about)  # a folder that cannot be written fails here already
    if not resume:
        shutil.rmtree(folder / RECENT, ignore_errors=True)
    dev = _spread(task.dev(), recipe.dev_examples)
    evaluations = progress.history["evaluations"]
    session = _Clock(progress.seconds)
    since_best, ended = 0, "done"

    def evaluate(**about) -> bool:
        """Score the weights as they are; save them if they are the best so far."""
        entry = {"step": progress.step, "seconds": session.seconds()}
        entry |= score(trainer.answer, task, dev)
        entry |= about
        is_best = task.better(entry[task.metric], progress.best)
        if is_best:
            progress.best, progress.best_step = entry[task.metric], progress.step
            checkpoint.save(folder, trainer.config, trainer.weights())
        evaluations.append(entry)
        progress.seconds = session.seconds()
        _save_resume(trainer, folder, progress, seed, recipe)
        checkpoint.save_json(folder / HISTORY, progress.history, indent=None)
        report.evaluation(entry, is_best)
        return is_best

    total = recipe.steps
    batches = trainer.batches(task, progress.step + 1, seed)
    with _graceful_interrupt() as interrupted:
        while progress.step < total:
            if minutes is not None:
                used = session.seconds() / (60 * minutes)
                if used >= 1:
                    ended = "time"
                    break
                if progress.step >= 20:  # the schedule's end is where the time will be up
                    reachable = max(progress.step + 1, math.ceil(progress.step / used))
                    total = min(recipe.steps, reachable)
            batch = next(batches)
            step = progress.step + 1
            rate = recipe.schedule_for(trainer.config, total)(step)
            started = time.perf_counter()
            loss = trainer.step(batch, rate)
            tokens = int((batch.src != PAD).sum() + (batch.tgt_out != PAD).sum())
            entry = {
                "step": step,
                "total": total,
                "loss": loss,
                "rate": rate,
                "tokens_per_second": tokens / (time.perf_counter() - started),
                "seconds": session.seconds(),
            }
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {step}: try a lower rate; the best checkpoint so "
                    f"far is kept in {folder}"
                )
            progress.step = step
            progress.history["steps"].append(entry)
            report.step(entry)
            if interrupted():
                ended = "interrupted"
                break
            if step % recipe.evaluate_every == 0 and step < total:
                _keep(trainer, folder / RECENT, step, recipe.average)
                since_best = 0 if evaluate() else since_best + 1
                if target is not None and not task.better(target, progress.best):
                    ended = "early"
                    break
                if patience is not None and since_best >= patience:
                    ended = "early"
                    break
        if not evaluations or evaluations[-1]["step"] != progress.step:
            if ended != "interrupted":
                _keep(trainer, folder / RECENT, progress.step, recipe.average)
            evaluate()
    averaged = bool(evaluations) and "averaged" in evaluations[-1]
    if recipe.average > 1 and ended != "interrupted" and not averaged:
        trainer.load_weights(_average(folder / RECENT))
        evaluate(averaged=recipe.average)
    if ended == "interrupted":
        return Outcome(ended, progress, {})
    _, best = checkpoint.load(folder)
    trainer.load_weights(best)
    test = _spread(task.test(), test_examples) if test_examples else task.test()
    scores = score(trainer.answer, task, test)
    results = {"ended": ended, "best_step": progress.best_step, "test_examples": len(test)}
    checkpoint.save_json(folder / RUN, about | {"results": results | scores})
    checkpoint.save_json(folder / HISTORY, progress.history | {"test": scores}, indent=None)
    return Outcome(ended, progress, scores)


def _keep(trainer, folder: Path, step: int, n: int) -> None:
    """The weights at this step beside those of the n - 1 evaluations before it; older ones go."""
    if n < 2:
        return
    checkpoint.save_tensors(folder / f"{step:08d}.safetensors", trainer.weights(), {})
    for old in sorted(folder.glob("*.safetensors"))[:-n]:
        old.unlink()


def _average(folder: Path) -> dict[str, Array]:
    """The mean of the weights in that folder: nearer to the middle of the valley than any of them.

    [Vaswani et al. 2017, § 6.1] does so with the last checkpoints.
    """
    kept = [checkpoint.load_tensors(path)[0] for path in sorted(folder.glob("*.safetensors"))]
    return {name: np.mean([x[name] for x in kept], axis=0) for name in kept[0]}


def score(
    decode: Callable[[list[list[int]], int], list[list[int]]],
    task: Task,
    examples: Sequence[Example],
) -> dict[str, float]:
    """The answers of `decode` (sources, max_len) to the examples, scored by the task.

    Similar lengths go together, 256 at once.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].src))
    answers: list[list[int]] = [[] for _ in examples]
    for start in range(0, len(order), 256):
        part = order[start : start + 256]
        found = decode([examples[i].src for i in part], task.max_tgt_len)
        for i, answer in zip(part, found, strict=True):
            answers[i] = answer
    return task.score(examples, answers)


def _spread(examples: Sequence[Example], n: int) -> list[Example]:
    """n of the examples, at equal distances: dictionaries are sorted, a prefix would be all A."""
    if n >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // n] for i in range(n)]


class _Clock:
    def __init__(self, seconds_before: float):
        self.start = time.perf_counter() - seconds_before

    def seconds(self) -> float:
        return time.perf_counter() - self.start


@contextmanager
def _graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is noted and acted on between steps, the second one is as usual."""
    seen = []

    def note(signum, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(signum)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: somebody else handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def _save_resume(trainer, folder: Path, progress: Progress, seed: int, recipe: Recipe) -> None:
    """Weights, optimizer, random numbers and progress in one file, so that none is out of step."""
    arrays, values = trainer.state()
    tensors = {f"model.{name}": x for name, x in trainer.weights().items()}
    tensors |= {f"state.{name}": x for name, x in arrays.items()}
    metadata = {
        "backend": trainer.backend,
        "config": trainer.config.to_json(),
        "recipe": json.dumps(asdict(recipe)),
        "seed": str(seed),
        "progress": json.dumps(vars(progress)),  # asdict would copy a long history first
        "values": json.dumps(values),
    }
    checkpoint.save_tensors(folder / RESUME, tensors, metadata)


def _resume(trainer, folder: Path, seed: int, recipe: Recipe) -> Progress:
    tensors, metadata = checkpoint.load_tensors(folder / RESUME)
    with checkpoint.blame(folder / RESUME):
        if metadata["backend"] != trainer.backend:
            raise CheckpointError(
                f"{folder / RESUME}: the run was trained with --backend {metadata['backend']}"
            )
        if TransformerConfig.from_json(metadata["config"]) != trainer.config:
            raise CheckpointError(f"{folder / RESUME}: the run has another model configuration")
        if metadata["seed"] != str(seed):
            raise CheckpointError(f"{folder / RESUME}: the run has the seed {metadata['seed']}")
        names = {f.name for f in fields(Progress)}
        progress = json.loads(metadata["progress"])
        if set(progress) != names:
            raise CheckpointError(f"{folder / RESUME}: not a run of this version")
        part = lambda prefix: {  # noqa: E731
            name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)
        }
        trainer.load_weights(part("model."))
        trainer.load_state(part("state."), json.loads(metadata["values"]))
        return Progress(**progress)


def load_run(folder: str | Path) -> dict[str, Any]:
    """run.json of a trained folder: its task, recipe and seed.  Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    about = checkpoint.load_json(folder / RUN)
    if not isinstance(about, dict) or not {"task", "backend", "seed", "recipe"} <= set(about):
        raise CheckpointError(f"{folder / RUN}: does not say what was trained")
    return about


def versions() -> dict[str, str]:
    return {
        "npformer": npformer.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        **({"torch": sys.modules["torch"].__version__} if "torch" in sys.modules else {}),
    }
