"""Call somebody else's code, which may raise, hang, crash or write to what it was given.

It runs in a process of its own, that can be ended and started anew without losing the other cases.

That process is no prison: the code runs as whoever started the kit, and may do all that they may.
Answers come through a pipe of multiprocessing, which pickles; an adapter that sent something else
could do nothing with it that it cannot do at once.  No file and no other user can write there.
"""

import copy
import importlib
import inspect
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from npformer import streams
from npformer.testing.cases import Case
from npformer.testing.judge import Verdict, changed, judge

Array = np.ndarray
Target = Callable[[str, dict[str, Array], dict[str, Any]], dict[str, Array]]
START_LIMIT = 300.0  # seconds for the import: frameworks take their time


class TargetError(ValueError):
    """There is no target: the message is one line."""


def load_target(spec: str) -> Target:
    """The adapter that `pkg.module:factory` makes.  Raises TargetError."""
    module_name, colon, factory_name = spec.partition(":")
    if not (module_name and colon and factory_name):
        raise TargetError(f"--target must look like pkg.module:factory, got {spec!r}")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        if not callable(factory):
            raise TargetError(f"{spec} is no function, its type is {type(factory).__name__}")
        if not _takes_nothing(factory):
            raise TargetError(
                f"{spec} wants arguments; name a function without any, that returns the adapter "
                "target(op, arrays, options)"
            )
        target = factory()
    except TargetError:
        raise
    except BaseException as error:  # SystemExit as well: anything may happen on import
        raise TargetError(f"{spec} cannot be imported: {_one_line(error)}") from None
    if not callable(target):
        raise TargetError(f"{spec} returned a {type(target).__name__}, not an adapter")
    return target  # type: ignore[return-value]


def _takes_nothing(factory: Callable) -> bool:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin, which does not say
        return True
    return True


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


# --- One case, in whatever process ------------------------------------------------------------


class BadAnswer(Exception):
    """The adapter broke the rules; the message says which."""


def call(target: Target, case: Case) -> dict[str, Array]:
    """The answer, checked for what can only be seen beside the call.  Raises BadAnswer.

    NotImplementedError, for an operation or option that the target does not have, passes through.
    """
    first, second = (_call_once(target, case) for _ in range(2))
    if difference := changed(case, first, second):
        raise BadAnswer(difference)
    return first


def _call_once(target: Target, case: Case) -> dict[str, Array]:
    arrays = {name: x.copy() for name, x in case.arrays.items()}
    given = dict(arrays)
    try:
        answer = target(case.op, given, copy.deepcopy(case.options))
    except NotImplementedError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((f for f in reversed(frames) if "npformer" not in f.filename), frames[-1])
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        raise BadAnswer(f"raised {_one_line(error)} ({where})") from None
    for name, x in arrays.items():
        if not np.array_equal(x, case.arrays[name], equal_nan=np.issubdtype(x.dtype, np.inexact)):
            raise BadAnswer(f"wrote to its input {name}")
    if not isinstance(answer, dict):
        raise BadAnswer(f"returned a {type(answer).__name__}, not a dict of arrays")
    return {str(name): _as_array(name, x) for name, x in answer.items()}


def _as_array(name: Any, x: Any) -> Array:
    try:
        array = np.asarray(x)
    except Exception as error:
        raise BadAnswer(f"{name} cannot be made an array: {_one_line(error)}") from None
    if array.dtype.kind not in "fiub":
        raise BadAnswer(f"{name} is a {type(x).__name__}, not an array of numbers")
    return array.copy()


def answer_of(target: Target, case: Case) -> Verdict:
    """Ask and judge, in this process and without a time limit."""
    try:
        return judge(case, call(target, case))
    except NotImplementedError as error:
        return Verdict(case, "skipped", str(error) or "not implemented")
    except BadAnswer as error:
        return Verdict(case, "failed", str(error))


# --- A process of its own ---------------------------------------------------------------------


def _serve(connection: Connection, spec: str, path: list[str]) -> None:
    sys.path[:] = path
    streams.use_utf8()  # an adapter may print what it likes
    try:
        target = load_target(spec)
    except TargetError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while (case := connection.recv()) is not None:
        try:
            connection.send(("answer", call(target, case)))
        except NotImplementedError as error:
            connection.send(("skipped", str(error) or "not implemented"))
        except BadAnswer as error:
            connection.send(("failed", str(error)))


class Worker:
    """`spec` in a process; verdict after verdict.  Raises TargetError if it cannot be imported.

    path   folders to look for it in, before those of this process
    """

    def __init__(self, spec: str, limit: float = 60.0, path: Sequence[str] = ()):
        self.spec, self.limit, self.path = spec, limit, [*path, *sys.path]
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # forking does not go with threads or CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.spec, self.path), daemon=True
        )
        self.process.start()
        theirs.close()
        failure = self._receive(START_LIMIT)
        if failure is not None:
            self.close()
            text = failure if isinstance(failure, str) else failure[1]
            raise TargetError(text if self.spec in text else f"{self.spec}, on import: {text}")

    def ask(self, case: Case) -> Verdict:
        if not self.process.is_alive():
            self.start()
        self.connection.send(case)
        kind, value = self._receive(self.limit)
        return judge(case, value) if kind == "answer" else Verdict(case, kind, value)

    def _receive(self, limit: float) -> Any:
        try:
            if self.connection.poll(limit):
                return self.connection.recv()
            self.process.kill()
            self.process.join()
            return "failed", f"no answer within {limit:g} s"
        except (EOFError, ConnectionError):
            self.process.join()
            return "failed", f"the process ended without an answer (exit {self.process.exitcode})"

    def close(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def verdicts(spec: str, cases: Iterable[Case], limit: float = 60.0) -> Iterator[Verdict]:
    """Every case put to the target, in order.  Raises TargetError if there is no target."""
    with Worker(spec, limit) as worker:
        for case in cases:
            yield worker.ask(case)
