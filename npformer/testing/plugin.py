"""What pytest_npformer.py loads when its option is given: the cases as pytest items.

Under pytest-xdist each process asks some of the cases, and the one that has started them says what
came of all: a convention explains an operation only if all its cases agree.  The cases follow from
the options, so that only statuses and answers go from one to the other, as numbers and bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from npformer.testing.cases import LEVELS, Case, make_cases, parse_fixed
from npformer.testing.judge import Verdict
from npformer.testing.report import Report, explained
from npformer.testing.worker import TargetError, Worker


class Kit:
    """The hooks of one run."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.worker: Worker | None = None
        self.verdicts: dict[int, Verdict] = {}  # of each case, by its place among them
        self.packed: dict[int, Packed] = {}  # those of other processes

    def option(self, name: str) -> Any:
        return self.config.getoption(f"--npformer-{name}")

    def cases(self, n: int) -> list[Case]:
        levels = tuple(self.option("level") or LEVELS)
        size = (n, self.option("seed"), self.option("dtype"))
        return make_cases(levels, *size, parse_fixed(self.option("fix")))

    def start(self) -> Worker:
        # As `python -m npformer.testing` finds it, in the folder where the command was typed; and
        # beside the settings of pytest, which may name the target for all folders below.
        path = [str(self.config.invocation_params.dir), str(self.config.rootpath)]
        return Worker(self.option("target"), self.option("time-limit"), path)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self) -> None:
        """What its processes would stumble over is said before pytest-xdist starts them."""
        with _refused():
            self.cases(min(4, self.option("examples")))  # four have all there is of sizes
            self.start().close()

    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        with _refused():
            cases = self.cases(self.option("examples"))
            if not self.config.getoption("collectonly"):
                self.worker = self.start()
        items += [
            CaseItem.from_parent(
                session, name=case.name, nodeid=f"npformer::{case.name}", kit=self, i=i, case=case
            )
            for i, case in enumerate(cases)
        ]

    def pytest_sessionfinish(self) -> None:
        if self.worker is not None:
            self.worker.close()
        left: dict[str, Any] | None = getattr(self.config, "workeroutput", None)
        if left is not None:  # what a process of pytest-xdist leaves to the one that started it
            left["npformer"] = {i: _packed(verdict) for i, verdict in self.verdicts.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        left = getattr(node, "workeroutput", None) or {}  # nothing of one that has crashed
        self.packed |= left.get("npformer", {})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.conventions():
            terminalreporter.write_line(line)

    def conventions(self) -> Iterator[str]:
        if any(status == "failed" for status, _ in self.packed.values()):  # else none is asked for
            cases = self.cases(self.option("examples"))
            self.verdicts |= {i: _unpacked(cases[i], *each) for i, each in self.packed.items()}
        in_order = [verdict for _, verdict in sorted(self.verdicts.items())]
        for (level, op), group in Report(in_order).groups().items():
            if meaning := explained(group):
                yield f"{level}.{op}: {meaning}"


Packed = tuple[str, dict[str, tuple[str, tuple[int, ...], bytes]] | None]  # a status, an answer


def _packed(verdict: Verdict) -> Packed:
    """All that a convention is found by, in what pytest-xdist can send: no pickle."""
    if verdict.answer is None:
        return verdict.status, None
    return verdict.status, {
        name: (x.dtype.str, x.shape, x.tobytes()) for name, x in verdict.answer.items()
    }


def _unpacked(case: Case, status: str, answer: Any) -> Verdict:
    if answer is not None:
        answer = {k: np.ndarray(shape, dtype, data) for k, (dtype, shape, data) in answer.items()}
    return Verdict(case, status, answer=answer)


@contextmanager
def _refused() -> Iterator[None]:
    """What is wrong with the options is one line."""
    try:
        yield
    except (TargetError, ValueError, TypeError) as error:
        raise pytest.UsageError(f"npformer: {error}") from None


class CaseItem(pytest.Item):
    """One case."""

    def __init__(self, *, kit: Kit, i: int, case: Case, **kwargs: Any):
        super().__init__(**kwargs)
        self.kit, self.i, self.case = kit, i, case

    def runtest(self) -> None:
        assert self.kit.worker is not None
        verdict = self.kit.worker.ask(self.case)
        self.kit.verdicts[self.i] = verdict
        if verdict.status == "skipped":
            pytest.skip(verdict.note)
        if verdict.status == "failed":
            raise Different(verdict.note)

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        if isinstance(excinfo.value, Different):
            return str(excinfo.value)  # no traceback: it would be the kit's own
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        # Not the end of the node id: pytest would replace its dots
        return "npformer", None, f"{self.case.name} (npformer)"


class Different(Exception):
    """A case that failed; the message is its report."""
