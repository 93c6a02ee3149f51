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
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import npformer
from npformer import checkpoint, options, runs, schedules, storage
from npformer.arguments import THREADS
from npformer.checkpoint import parse_json
from npformer.config import TransformerConfig
from npformer.decoding import greedy
from npformer.ops import Array, Rng, cross_entropy
from npformer.optim import Adam, clip_grad_norm
from npformer.parallel import BatchThreads
from npformer.runs import HISTORY, RECENT, RESUME, RUN, load_run
from npformer.tasks import EOS, PAD, SOS, Batch, Example, Task, pad
from npformer.transformer import Transformer

__all__ = ["HISTORY", "RECENT", "RESUME", "RUN", "load_run"]
MOST = {"batch_size": 2**16, "dev_examples": 10**6, "average": 1000}  # beyond sense, before harm


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
        for each in fields(self):  # NumPy's scalars come out as Python's, which JSON can write
            object.__setattr__(self, each.name, _checked(each.name, getattr(self, each.name)))

    def schedule_for(self, config: TransformerConfig, total: int) -> schedules.Schedule:
        if self.schedule == "constant":
            return schedules.constant(self.rate)
        if self.schedule == "noam":
            return schedules.noam(config.d_model, self.warmup, self.rate)
        if self.schedule == "inverse_sqrt":
            return schedules.inverse_sqrt(self.rate, self.warmup)
        return schedules.cosine(self.rate, min(self.warmup, total), total)


def _checked(name: str, value: Any) -> Any:
    """A field of the recipe, of its kind and in its range: JSON and TOML bring anything."""
    if name == "schedule":
        return options.choice(name, value, ("constant", "noam", "inverse_sqrt", "cosine"))
    if name in ("rate", "clip", "eps"):
        return options.positive(name, value)
    if name == "label_smoothing":
        return options.probability(name, value)
    if name == "betas":
        return options.pair_of_betas(value)
    return options.integer(name, value, 0 if name == "average" else 1, MOST.get(name, 10**9))


class Trainer:
    """One model, its optimizer and its random numbers, in NumPy."""

    backend = "numpy"

    def __init__(self, config: TransformerConfig, recipe: Recipe, seed: int = 0, threads: int = 1):
        """`threads` > 1: that many cores work on each batch, see parallel.py (threadpoolctl)."""
        seed = options.integer("seed", seed, 0)
        threads = options.integer("threads", threads, 1, THREADS)  # run.json may say anything
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

    @property
    def rngs(self) -> list[Rng]:
        return self.threads.rngs if self.threads else [self.rng]

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """All that the next step depends on besides the weights: arrays, and what JSON can hold."""
        return self.optimizer.state_dict(), {"rng": [rng.bit_generator.state for rng in self.rngs]}

    def load(
        self, weights: Mapping[str, Array], arrays: Mapping[str, Array], values: Mapping[str, Any]
    ) -> None:
        """Go on from these `weights` and this `state`: all of it is compared before any is loaded.

        Raises ValueError where they are another model's or another optimizer's.
        """
        checkpoint.check_arrays(self.weights(), weights)
        checkpoint.check_arrays(self.optimizer.state_dict(), arrays)
        states, n = values["rng"], len(values["rng"])
        if n != len(self.rngs):
            raise ValueError(f"the run was trained with {n} thread{'s' if n > 1 else ''}")
        for state in states:
            np.random.default_rng(0).bit_generator.state = state  # one that NumPy takes
        self.load_weights(weights)
        self.optimizer.load_state_dict(arrays)
        for rng, state in zip(self.rngs, states, strict=True):
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
    since_best: int = 0  # evaluations without a better one
    recent: list[int] = field(default_factory=list)  # the steps whose weights are in recent/
    history: dict[str, list] = field(default_factory=lambda: {"steps": [], "evaluations": []})

    def __post_init__(self):
        """Raises ValueError for what no run has written: a file brings anything."""
        counts = (self.step, self.best_step, self.since_best, *_listed(self.recent))
        if not all(_is_count(n) for n in counts):
            raise ValueError("the progress has a step that is no step")
        if not (_is_number(self.seconds) and 0 <= self.seconds < math.inf):
            raise ValueError(f"the progress has {self.seconds!r} seconds")
        if not (self.best is None or _is_number(self.best)):
            raise ValueError(f"the progress has the best score {self.best!r}")
        history = self.history if isinstance(self.history, dict) else {}
        entries = [*_listed(history.get("steps")), *_listed(history.get("evaluations"))]
        if set(history) != {"steps", "evaluations"} or not all(
            isinstance(e, dict) and _is_count(e.get("step")) and all(map(_is_number, e.values()))
            for e in entries
        ):
            raise ValueError("the progress has a history that is none")

    @classmethod
    def from_json(cls, text: str) -> "Progress":
        values = parse_json(text)
        names = {f.name for f in fields(cls)}
        later = {"since_best", "recent"}  # than the first version
        if not (isinstance(values, dict) and names - later <= set(values) <= names):
            raise ValueError("not a run of this version")
        return cls(**values)

    @property
    def is_evaluated(self) -> bool:
        """Have the weights of this step been scored?"""
        evaluations = self.history["evaluations"]
        return bool(evaluations) and evaluations[-1]["step"] == self.step


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]  # what is no list is no count either


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


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
    overwrite: bool = False,
    report: Reporter | None = None,
    test_examples: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Train for `recipe.steps` or `minutes`, what ends first; the best checkpoint is in `folder`.

    `patience`: stop after that many evaluations without a better score; `target`: stop at a score
    that good.  Where the time will end first, the schedule is stretched to end with it.  Ctrl-C (or
    SIGTERM, SIGHUP) saves and returns.  With `resume` the run in `folder` goes on where it stopped,
    was interrupted or was killed, and ends with the same best checkpoint and the same weights, bit
    for bit, as one that never stopped (where no `minutes` limit it: no clock ticks the same twice).

    A folder that holds a run is refused, unless it is resumed, or `overwrite` removes that run's
    files first; nothing that a run did not write is touched.

    clock   seconds, from any start
    """
    seed = options.integer("seed", seed, 0)
    for name, n in (("patience", patience), ("test_examples", test_examples)):
        if n is not None:
            options.integer(name, n, 1)
    if minutes is not None:
        options.positive("minutes", minutes)
    about = {"task": task.name, "backend": trainer.backend, "seed": seed, **(about or {})}
    about |= {"plan": {"minutes": minutes, "patience": patience, "target": target}}
    about |= {"recipe": asdict(recipe), "versions": versions()}
    about.pop("results", None)  # of the run as it ended before
    folder, report = Path(folder), report or Silent()
    with runs.locked(folder):
        run = _Run(trainer, task, folder, recipe, about, report, clock, test_examples)
        run.begin(resume, overwrite)
        ended = run.train()
        scores = {} if ended == "interrupted" else run.finish(ended)
        return Outcome(ended, run.progress, scores)


@dataclass
class _Run:
    """What `run` is in the middle of."""

    trainer: Any
    task: Task
    folder: Path
    recipe: Recipe
    about: dict[str, Any]
    report: Reporter
    clock: Callable[[], float]
    test_examples: int | None

    def begin(self, resume: bool, overwrite: bool) -> None:
        """Where it goes on, or its first files; a folder that cannot be written fails here."""
        self.dev = _spread(self.task.dev(), self.recipe.dev_examples)
        self.progress = Progress()
        if resume and has_begun(self.folder):
            self.progress = self._load()
        elif not resume:
            runs.claim(self.folder, "run", overwrite, "resume it, ")
            runs.clear(self.folder, "run")
        checkpoint.save_json(self.folder / RUN, self.about)
        self.started = self.clock() - self.progress.seconds
        if self.progress.step == 0:
            self.save()  # from now on there is something to go on from
        self._forget()  # what was left by a run that was killed

    def train(self) -> str:
        """Step by step to the end, or to an interruption; says which."""
        progress, recipe, report = self.progress, self.recipe, self.report
        batches = self.trainer.batches(self.task, progress.step + 1, int(self.about["seed"]))
        with _graceful_interrupt() as interrupted:
            while not (ended := self.why_it_ends()):
                is_due = progress.step > 0 and progress.step % recipe.evaluate_every == 0
                if is_due and not progress.is_evaluated:
                    self.evaluate_and_save()
                    continue
                entry = self.take_step(next(batches))
                progress.step += 1
                progress.history["steps"].append(entry)
                report.step(entry)
                if interrupted():
                    self.save()  # no evaluation: a run that never stopped would not have it
                    return "interrupted"
            if not progress.is_evaluated:
                self.evaluate_and_save()
        return ended

    def finish(self, ended: str) -> dict[str, float]:
        """The last weights averaged, where the recipe says so; the best tested."""
        trainer, task, progress = self.trainer, self.task, self.progress
        is_averaged = "averaged" in progress.history["evaluations"][-1]
        if self.recipe.average > 1 and progress.recent and not is_averaged:
            last = trainer.weights()
            trainer.load_weights(self._average())
            self.evaluate(averaged=len(progress.recent))
            trainer.load_weights(last)  # those that more steps would go on from
            self.save()
        _, best = checkpoint.load(self.folder)
        trainer.load_weights(best)
        test = _spread(task.test(), self.test_examples) if self.test_examples else task.test()
        scores = score(trainer.answer, task, test)
        results = {"ended": ended, "best_step": progress.best_step, "test_examples": len(test)}
        checkpoint.save_json(
            self.folder / HISTORY, progress.history | {"test": scores}, indent=None
        )
        checkpoint.save_json(self.folder / RUN, self.about | {"results": results | scores})
        return scores

    def seconds(self) -> float:
        return self.clock() - self.started

    def used(self) -> float:
        """The part of the time that is over."""
        minutes = self.about["plan"]["minutes"]
        return 0.0 if minutes is None else self.seconds() / (60 * minutes)

    def why_it_ends(self) -> str | None:
        plan, progress = self.about["plan"], self.progress
        if progress.step >= self.recipe.steps:
            return "done"
        if self.used() >= 1:
            return "time"
        is_good = plan["target"] is not None and progress.best is not None
        if is_good and not self.task.better(plan["target"], progress.best):
            return "early"
        if plan["patience"] is not None and progress.since_best >= plan["patience"]:
            return "early"
        return None

    def take_step(self, batch: Batch) -> dict[str, float]:
        """One update of the weights, and what there is to say about it."""
        step, total, used = self.progress.step + 1, self.recipe.steps, self.used()
        if step > 20 and used:  # the schedule's end is where the time will be up
            total = min(total, max(step, math.ceil((step - 1) / used)))
        rate = self.recipe.schedule_for(self.trainer.config, total)(step)
        before = self.clock()
        loss = self.trainer.step(batch, rate)
        took = self.clock() - before
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {step}: try a lower rate; the best checkpoint so far "
                f"is kept in {self.folder}"
            )
        n_tokens = int((batch.src != PAD).sum() + (batch.tgt_out != PAD).sum())
        return {
            "step": step,
            "total": total,
            "loss": loss,
            "rate": rate,
            "tokens_per_second": n_tokens / took if took else 0.0,
            "seconds": self.seconds(),
        }

    def evaluate(self, **how: int) -> None:
        """Score the weights as they are; keep them if they are the best so far."""
        progress, metric = self.progress, self.task.metric
        entry = {"step": progress.step, "seconds": self.seconds()}
        entry |= score(self.trainer.answer, self.task, self.dev) | how
        is_best = self.task.better(entry[metric], progress.best)
        progress.since_best += 1
        if is_best:
            progress.best, progress.best_step, progress.since_best = entry[metric], entry["step"], 0
            checkpoint.save(self.folder, self.trainer.config, self.trainer.weights())
        progress.history["evaluations"].append(entry)
        self.report.evaluation(entry, is_best)

    def evaluate_and_save(self) -> None:
        # In this order: whoever is killed on the way evaluates once more, with the same result
        self._keep()
        self.evaluate()
        self.save()
        self._forget()

    def save(self) -> None:
        """Weights, optimizer, random numbers and progress in one file: none is out of step."""
        self.progress.seconds = self.seconds()
        arrays, values = self.trainer.state()
        tensors = {f"model.{name}": x for name, x in self.trainer.weights().items()}
        tensors |= {f"state.{name}": x for name, x in arrays.items()}
        metadata = {
            "task": self.task.name,
            "backend": self.trainer.backend,
            "config": self.trainer.config.to_json(),
            "recipe": json.dumps(asdict(self.recipe)),
            "seed": str(self.about["seed"]),
            "progress": json.dumps(vars(self.progress)),
            "values": json.dumps(values),
        }
        checkpoint.save_tensors(self.folder / RESUME, tensors, metadata)
        checkpoint.save_json(self.folder / HISTORY, self.progress.history, indent=None)

    def _load(self) -> Progress:
        """Put the trainer where the run stopped.

        Raises CheckpointError for another run, or for a state that does not fit; then nothing has
        been loaded, and nothing written.
        """
        path = self.folder / RESUME
        tensors, metadata = checkpoint.load_tensors(path)
        checkpoint.check_finite(path, {k: x for k, x in tensors.items() if x.dtype.kind == "f"})
        with checkpoint.blame(path):
            for name in ("task", "backend", "seed"):
                ours = str(self.about[name])
                # The first version's has no task; it is in its run.json
                if (theirs := metadata.get(name, ours)) != ours:
                    raise ValueError(f"the run has the {name} {theirs}, not {ours}")
            if TransformerConfig.from_json(metadata["config"]) != self.trainer.config:
                raise ValueError("the run has another model configuration")
            theirs, ours = Recipe(**parse_json(metadata["recipe"])), asdict(self.recipe)
            for name, value in asdict(theirs).items():
                if name != "steps" and ours[name] != value:  # more steps may be wanted
                    raise ValueError(f"the run was trained with {name} {value}, not {ours[name]}")
            progress = Progress.from_json(metadata["progress"])
            if self.recipe.average > 1 and progress.history["evaluations"] and not progress.recent:
                progress.recent = self._recent_of_the_first_version(progress.step)
            parts: dict[str, dict[str, Array]] = {"model": {}, "state": {}}
            for name, x in tensors.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = x
            self._check_others(progress)
            self.trainer.load(parts["model"], parts["state"], parse_json(metadata["values"]))
            return progress

    def _check_others(self, progress: Progress) -> None:
        """What will be written, and what is read only when the run ends: best weights and last.

        So that whatever is wrong there is said before the first step, and before anything changes.
        """
        for name in (RUN, HISTORY, RESUME, checkpoint.CONFIG, checkpoint.MODEL):
            path = self.folder / name
            with checkpoint.blame(path):
                if path.exists():
                    storage.check_regular(path)
                storage.stage(path).drop()
        expected = {name: x.shape for name, x in self.trainer.weights().items()}
        if progress.best is not None:
            config, best = checkpoint.load(self.folder)
            checkpoint.check_finite(self.folder / checkpoint.MODEL, best)
            with checkpoint.blame(self.folder):
                checkpoint.check_state(expected, best)
                if config != self.trainer.config:
                    raise ValueError("the best checkpoint has another model configuration")
        for step in progress.recent:
            path = _snapshot(self.folder, step)
            kept, _ = checkpoint.load_tensors(path)
            with checkpoint.blame(path):
                checkpoint.check_state(expected, kept)
            checkpoint.check_finite(path, kept)

    def _keep(self) -> None:
        """The weights at this step beside those of the evaluations before it, to be averaged."""
        n, progress = self.recipe.average, self.progress
        if n > 1:
            path = _snapshot(self.folder, progress.step)
            checkpoint.save_tensors(path, self.trainer.weights(), {})
            progress.recent = [*progress.recent, progress.step][-n:]

    def _recent_of_the_first_version(self, last: int) -> list[int]:
        """It averaged whatever lay in recent/, and wrote down nothing."""
        steps = [int(path.stem) for path in runs.listed(self.folder / RECENT)]
        return [step for step in steps if step <= last][-self.recipe.average :]

    def _forget(self) -> None:
        """Remove the weights that will not be averaged; after the save that says so."""
        kept = [_snapshot(self.folder, step) for step in self.progress.recent]
        for path in runs.listed(self.folder / RECENT):
            if path not in kept:
                path.unlink()

    def _average(self) -> dict[str, Array]:
        """Their mean: nearer to the middle of the valley than any of them.

        [Vaswani et al. 2017, § 6.1] does so with the last checkpoints.
        """
        paths = [_snapshot(self.folder, step) for step in self.progress.recent]
        kept = [checkpoint.load_tensors(path)[0] for path in paths]
        return {name: np.mean([x[name] for x in kept], axis=0) for name in kept[0]}


def has_begun(folder: Path) -> bool:
    """Is there anything to go on from?  Killed before its first save, a run has its name only."""
    return any((folder / name).exists() for name in (RESUME, checkpoint.MODEL, HISTORY))


def _snapshot(folder: Path, step: int) -> Path:
    return folder / RECENT / f"{step:08d}.safetensors"


def score(
    decode: Callable[[list[list[int]], int], list[list[int]]],
    task: Task,
    examples: Iterable[Example],
) -> dict[str, float]:
    """The answers of `decode` (sources, max_len) to the examples, scored by the task.

    Similar lengths go together, 256 at once.
    """
    examples = list(examples)
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


@contextmanager
def _graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C, SIGTERM or SIGHUP is noted and acted on between steps, another is as usual.

    But not another SIGHUP: where a terminal is closed, the kernel and the shell both send one.

    What else handles these signals is called as well, and is there again afterwards.
    """
    seen: list[int] = []
    before: dict[int, Any] = {}

    def note(signum, frame):
        if seen and signum != getattr(signal, "SIGHUP", None):
            raise KeyboardInterrupt
        seen.append(signum)
        usual = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None)
        if before[signum] not in usual:
            before[signum](signum, frame)

    if threading.current_thread() is threading.main_thread():  # else somebody else handles signals
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        for signum in (getattr(signal, name) for name in names):  # Windows has no SIGHUP
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup and `&` ask for
                before[signum] = signal.signal(signum, note)
    try:
        yield lambda: bool(seen)
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is note:  # else somebody has taken over
                signal.signal(signum, handler or signal.SIG_DFL)


def versions() -> dict[str, str]:
    return {
        "npformer": npformer.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        **({"torch": sys.modules["torch"].__version__} if "torch" in sys.modules else {}),
    }
