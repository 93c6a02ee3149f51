"""One table: what is refused where, the same for both twins, at the entrance and in one line.

Its rows are in refusals_*.py.
"""

import pytest
import refusals_decoding
import refusals_options
from refusals import Row

ROWS = [*refusals_options.ROWS, *refusals_decoding.ROWS]
BY_OPTION: dict[str, list[Row]] = {}
for row in ROWS:
    BY_OPTION.setdefault(row.option or row.what, []).append(row)


BOTH = [
    (option, package)
    for option, found in BY_OPTION.items()
    for package in ("npformer", "torchformer")
    if any(getattr(row, package) for row in found)  # else there is no such thing there
]


@pytest.mark.parametrize(("option", "package"), BOTH)
def test_refuses(option, package):
    for row in BY_OPTION[option]:
        if (call := getattr(row, package)) is None:
            continue
        with pytest.raises(row.error, match=row.message) as caught:
            call()
        assert "\n" not in str(caught.value), row.what


def test_no_row_is_there_twice():
    names = [row.what for row in ROWS]
    assert len(names) == len(set(names))
