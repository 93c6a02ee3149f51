"""What pytest_npformer.py loads when its option is given: the cases as pytest items."""

from collections.abc import Iterator
from typing import Any

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
        self.verdicts: list[Verdict] = []

    def option(self, name: str) -> Any:
        return self.config.getoption(f"--npformer-{name}")

    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        try:
            levels = tuple(self.option("level") or LEVELS)
            size = (self.option("examples"), self.option("seed"), self.option("dtype"))
            cases = make_cases(levels, *size, parse_fixed(self.option("fix")))
            if not self.config.getoption("collectonly"):
                self.worker = Worker(self.option("target"), self.option("time-limit"))
        except (TargetError, ValueError, TypeError) as error:
            raise pytest.UsageError(f"npformer: {error}") from None
        items += [
            CaseItem.from_parent(
                session, name=case.name, nodeid=f"npformer::{case.name}", kit=self, case=case
            )
            for case in cases
        ]

    def pytest_sessionfinish(self) -> None:
        if self.worker is not None:
            self.worker.close()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.conventions():
            terminalreporter.write_line(line)

    def conventions(self) -> Iterator[str]:
        for (level, op), group in Report(self.verdicts).groups().items():
            if meaning := explained(group):
                yield f"{level}.{op}: {meaning}"


class CaseItem(pytest.Item):
    """One case."""

    def __init__(self, *, kit: Kit, case: Case, **kwargs: Any):
        super().__init__(**kwargs)
        self.kit, self.case = kit, case

    def runtest(self) -> None:
        assert self.kit.worker is not None
        verdict = self.kit.worker.ask(self.case)
        self.kit.verdicts.append(verdict)
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
