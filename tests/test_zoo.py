"""The bug zoo through the kit: each is seen where it was planted, and the tensor is named."""

import fnmatch
import functools

import numpy as np
import pytest
from zoo import ZOO, planted

from npformer.testing.cases import make_cases
from npformer.testing.worker import answer_of


@functools.cache
def cases(where):
    """Those of one operation, as many as the kit's command makes if nothing else is said."""
    level, op = where.split(".")
    return make_cases((level,), 20 if level == "op" else 12, only=(op,))


def asked(where):
    from npformer.testing.reference import reference

    with np.errstate(all="ignore"):  # a bug may divide by 0; its numbers shall be seen
        return [answer_of(reference, case) for case in cases(where)]


@pytest.mark.parametrize("bug", ZOO, ids=lambda bug: f"zoo-{bug.name}")
def test_the_kit_sees_it_and_names_the_tensor(bug):
    right = cases(bug.where)  # what is right is computed before the bug is in
    with planted(bug):
        verdicts = asked(bug.where)
    assert len(verdicts) == len(right)
    failed = [v for v in verdicts if v.status == "failed"]
    assert failed, f"not seen: {bug.how}"
    first_out = [next(row.name for row in v.rows if not row.ok) for v in failed if v.rows]
    named = fnmatch.filter(first_out, bug.tensor)
    assert len(named) > len(first_out) / 2, (bug.tensor, first_out)
    if bug.tensor.startswith("d."):  # only a gradient is wrong: the values are not suspected
        assert all(name.startswith("d.") for name in first_out), first_out
    assert all(named[0] in v.note for v in failed[:1] if v.rows)
    assert all(v.status == "ok" for v in asked(bug.where)), "it is still there"


def test_zoo_has_forty_and_those_that_were_measured():
    assert len({bug.name for bug in ZOO}) == len(ZOO) >= 40
    assert sum(bug.how.startswith("[measured]") for bug in ZOO) == 9
