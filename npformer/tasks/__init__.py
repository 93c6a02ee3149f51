"""What is learned: a task knows its vocabularies, its data and how to score an answer.

    task = tasks.load("sort")
    batch = task.batch(step=1, size=64, seed=0)     # src (B, S), tgt (B, T + 1), padded
    task.parse("312"), task.format([4, 5, 6])       # text -> ids -> text

Both twins train from the same batches: the batch of a step depends on the seed and the step alone,
so a run that is resumed sees what it would have seen.
"""

import importlib
from functools import cache

from npformer.tasks.task import EOS, PAD, SOS, Batch, Example, Task, Vocabulary, pad

NAMES = ("sort", "reverse", "repeats", "permutation", "digits", "g2p", "g2p-stress")

__all__ = [
    "EOS",
    "NAMES",
    "PAD",
    "SOS",
    "Batch",
    "Example",
    "Task",
    "Vocabulary",
    "load",
    "pad",
]


@cache
def load(name: str) -> Task:
    """The task of that name, each time the same one, which keeps the examples that it has made.

    Raises ValueError for an unknown one.
    """
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}, there are: {', '.join(NAMES)}")
    module = importlib.import_module(
        f"npformer.tasks.{'g2p' if name.startswith('g2p') else 'digits'}"
    )
    return module.make(name)
