"""One table: what is refused where, the same for both twins, at the entrance and in one line.

Its rows are in refusals_*.py.
"""

import pytest
import refusals_decoding
import refusals_options

ROWS = [*refusals_options.ROWS, *refusals_decoding.ROWS]
TWINS = [
    pytest.param(row, call, id=f"{row.what} {package}")
    for row in ROWS
    for package, call in (("npformer", row.npformer), ("torchformer", row.torchformer))
    if call is not None
]


@pytest.mark.parametrize(("row", "call"), TWINS)
def test_refuses(row, call):
    with pytest.raises(row.error, match=row.message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_no_row_is_there_twice():
    names = [row.what for row in ROWS]
    assert len(names) == len(set(names))
