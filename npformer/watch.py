"""Look into a function while it runs: its named locals, as they are when it returns.

The interpreter's profiling hook reads them, so the code that is watched need not know, and costs
nothing more when nobody watches.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def returns(function: Callable[..., Any]) -> Iterator[list[dict[str, Any]]]:
    """Inside, each call of a plain Python function adds its locals to the list, by name.

    with returns(ops.attention_weights) as calls:
        model.infer(src, tgt)
    calls[0]["scores"]
    """
    code, calls = function.__code__, []  # type: ignore[attr-defined]

    def hook(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is code:
            calls.append(dict(frame.f_locals))

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        yield calls
    finally:
        sys.setprofile(before)
