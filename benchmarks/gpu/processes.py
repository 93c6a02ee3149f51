"""A section is a process: what spoils its CUDA context, kills it or never ends costs nothing else.

The processes are forked from one in which torch has been imported, and which has asked nothing of
the card: importing torch again takes seconds each time, and CUDA does not survive a fork.
"""

import multiprocessing
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# What torch.compile else imports in each of them, half a second long, is among them
PRELOADED = ["torch._dynamo", "functorch.compile", "networkx", "benchmarks.gpu.sections"]
Give = Callable[[str, Any], None]  # a section's name, and its rows so far


class Lost(Exception):
    """The process did not come to its end: one line that says why."""


class Processes:
    """Calls functions, each in a process of its own, and waits for each as long as it may take."""

    def __init__(self, method: str = "forkserver"):
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(PRELOADED)

    def call(self, function: str, *arguments: Any, limit: float, give: Give) -> Any:
        """What `function` ("module:name") returns for (give, *arguments).

        `give(name, rows)` is called here with what it is called with there, at once.  Raises Lost.
        """
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_child, args=(theirs, function, arguments))
        process.start()
        theirs.close()
        end = time.monotonic() + limit
        try:
            while ours.poll(max(0.0, end - time.monotonic())):
                kind, *said = ours.recv()
                if kind == "given":
                    give(*said)
                elif kind == "returned":
                    return said[0]
                else:
                    raise Lost(said[0])
            raise Lost(f"failed: stopped after {limit:.0f} s")
        except (EOFError, ConnectionError):
            process.join(10)
            raise Lost(f"failed: its process died ({_exit(process.exitcode)})") from None
        finally:
            process.kill()
            process.join(10)  # one that is stuck in the driver is left behind
            ours.close()


def _exit(code: int | None) -> str:
    if code is None:
        return "and has not ended"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _child(connection: Connection, function: str, arguments: tuple[Any, ...]) -> None:
    from benchmarks.gpu.timing import is_out_of_memory, reason  # imports torch

    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    try:
        found = pkgutil.resolve_name(function)(
            lambda name, rows: connection.send(("given", name, rows)), *arguments
        )
        connection.send(("returned", found))
    except Exception as error:
        why = reason(error)
        connection.send(("lost", f"{'skipped' if is_out_of_memory(error) else 'failed'}: {why}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: tearing CUDA down takes a second, or never ends


def _end_with(connection: Connection) -> None:
    """Nobody hears this process any more: the card is for those who come after."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
