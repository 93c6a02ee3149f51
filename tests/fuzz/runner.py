"""Forked workers that run mutations one after the other, and a parent that watches them."""

import contextlib
import faulthandler
import json
import os
import re
import resource
import select
import shutil
import signal
import stat
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

from tests.fuzz.mutations import fresh
from tests.fuzz.targets import TARGETS, hurry

SECONDS, MEGABYTES = 5, 512  # of this process's own time: other programs may run as well
WAITED = 4 * SECONDS  # of a clock: it is waiting for something that does not come
LINE = re.compile(r"input \d+: ")  # an input that is refused has its own line, and others go on


class Hang(BaseException):
    """Took too long."""


DIVERGED = re.compile(r"the (loss is|logits are) ")  # weights of any size may: the run had begun


def _hang(number, _):
    took = number == signal.SIGPROF
    raise Hang(f"took more than {SECONDS} s" if took else f"waited for more than {WAITED} s")


def snapshot(folder):
    """Every name, and what is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        data = path.read_bytes() if stat.S_ISREG(mode) else b""
        found[str(path.relative_to(folder))] = (mode, data)
    return found


def memory(key):
    """In MB: VmRSS now, VmHWM the most since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024


def forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def once(target, good, folder, seed, i):
    """One mutation: None, or what is wrong; and what came of it."""
    rng = np.random.default_rng([seed, i])
    fresh(good, folder)
    said = target.mutate(rng, folder)
    before, problem, code, err = snapshot(folder), "", None, ""
    forget_peak()
    at_first = memory("VmRSS")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITED)
    try:
        code, err = target.run(rng, folder)
    except ValueError as error:  # of a library call: a refusal
        code, err = 2, f"{error}\n"
    except Hang as hang:
        problem = f"{hang}:\n{traceback.format_exc(limit=-3)}"
    except BaseException:
        problem = traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir("/")
    grown = memory("VmHWM") - at_first
    lines = [line for line in err.splitlines() if not LINE.search(line)]
    if problem:
        pass
    elif code not in (0, 1, 2, 130):
        problem = f"exit code {code}"
    elif code == 2 and not err.strip():
        problem = "refused without a word"
    elif len(lines) > 1:
        problem = f"said in {len(lines)} lines: {err[:300]!r}"
    elif re.search(r"Unable to allocate|memory for|MemoryError", err):
        problem = f"asked for memory first: {err.strip()[:200]}"
    elif grown > MEGABYTES:
        problem = f"took {grown:.0f} MB"
    elif (
        code == 2
        and (changed := differences(before, snapshot(folder)))
        and len(lines) == 1
        and not DIVERGED.search(err)
    ):
        problem = f"refused, and changed {changed}: {err.strip()[:200]}"
    if (folder / "UNPICKLED").exists() or Path("/UNPICKLED").exists():
        problem = "something was unpickled"
    return {"i": i, "said": said[:600], "problem": problem, "code": code, "err": err.strip()[:200]}


def differences(before, after):
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def work(target, good, seed, numbers, pipe):
    """The worker: a line of JSON before each mutation and one after."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    warnings.simplefilter("ignore")
    faulthandler.disable()  # the parent sees it, and says it once
    size = int(memory("VmSize") * 2**20) + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    home = Path(
        tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    )
    try:
        for i in numbers:
            os.write(pipe, f"{json.dumps({'start': i})}\n".encode())
            found = once(target, good, home / "x", seed, i)
            os.write(pipe, f"{json.dumps(found)}\n".encode())
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Worker:
    """One of them, seen by the parent."""

    def __init__(self, target, good, seed, numbers):
        self.rest, self.buffer, self.current = list(numbers), b"", None
        self.pipe, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self.pipe)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                work(target, good, seed, self.rest, theirs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(theirs)
        self.heard = time.monotonic()

    def read(self):
        """The lines that have come; None at the end."""
        data = os.read(self.pipe, 1 << 16)
        self.heard = time.monotonic()
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self):
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        return status


def fuzz(what, n, seed=0, workers=1, only=None, tell=None):
    """The findings among n mutations, and how many ended with which exit code.

    tell    is called with every result
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-good-") as home:
        target, good = TARGETS[what](), Path(home) / "good"
        good.mkdir()
        before = Path.cwd()
        target.make(good)
        hurry()
        numbers = [only] if only is not None else range(n)
        running = [Worker(target, good, seed, list(numbers)[k::workers]) for k in range(workers)]
        findings, codes = [], {}
        while running:
            ready, _, _ = select.select([w.pipe for w in running], [], [], 1.0)
            for w in list(running):
                lines = w.read() if w.pipe in ready else []
                for line in lines or []:
                    if "start" in line:
                        w.current = line["start"]
                        continue
                    w.rest.remove(line["i"])
                    w.current = None
                    codes[line["code"]] = codes.get(line["code"], 0) + 1
                    if line["problem"]:
                        findings.append(line)
                    if tell:
                        tell(line)
                silent = time.monotonic() - w.heard > 2 * WAITED
                if lines is None or silent:
                    status, died = w.end(), w.current
                    running.remove(w)
                    if died is not None:
                        why = "did not come back" if silent else f"the process died ({status})"
                        findings.append({"i": died, "said": "", "problem": why})
                        w.rest.remove(died)
                    if w.rest:
                        running.append(Worker(target, good, seed, w.rest))
        os.chdir(before)
        return findings, codes
