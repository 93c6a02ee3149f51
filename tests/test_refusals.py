"""One table: what is refused where, the same for both twins, at the entrance and in one line.

Its rows are in refusals_*.py.
"""

import re

import pytest
import refusals_decoding
import refusals_options
from refusals import Row

ROWS = [*refusals_options.ROWS, *refusals_decoding.ROWS]
BY_OPTION: dict[str, list[Row]] = {}
for row in ROWS:
    BY_OPTION.setdefault(row.option or row.what, []).append(row)


@pytest.mark.parametrize("package", ["npformer", "torchformer"])
@pytest.mark.parametrize("option", BY_OPTION)
def test_refuses(option, package):
    for row in BY_OPTION[option]:
        call = getattr(row, package)
        if call is None:  # there is no such thing in torchformer
            continue
        try:
            call()
        except row.error as error:
            assert re.search(row.message, str(error)), (row.what, error)
            assert "\n" not in str(error), row.what
        else:
            pytest.fail(f"{row.what}: not refused")


def test_no_row_is_there_twice():
    names = [row.what for row in ROWS]
    assert len(names) == len(set(names))
