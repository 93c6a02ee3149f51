"""One step of a model as a page: a single file that opens from disk and asks the network nothing.

The map on the left has every tensor of the trace in the order in which it was made, forward and
backward; on the right are the values as a heat map, the formula, the line of source, the gradient.
"""

import base64
import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from npformer import checkpoint, ops
from npformer.explain import MARKS, MEANINGS, explain_mask, reasons_of
from npformer.masks import causal_mask, padding_mask
from npformer.tracing import Entry, Trace

MOST_ROWS, FEWER_ROWS, MOST_COLUMNS, MOST_PAGES = 32, 16, 64, 16


def write_page(
    seen: Trace,
    path: str | Path,
    *,
    src: Sequence[int],
    tgt: Sequence[int],
    source: Sequence[str],
    target: Sequence[str],
    pad_ids: tuple[int, int] = (0, 0),
    about: str = "",
) -> int:
    """Write the page of a trace of one sample; returns its size in bytes.

    src, tgt         the ids that were read;  source, target: their tokens, as text
    about            a line on top

    Raises CheckpointError if the file cannot be written.
    """
    src, tgt, source, target = list(src), list(tgt), list(source), list(target)
    blocks: dict[str, int] = {}  # the values, each once: many a tensor is another under a new name
    content = {
        "about": about,
        "tokens": {"source": source, "target": target},
        "masks": _masks(src, tgt, source, target, pad_ids),
        "reasons": _reasons(src, tgt, pad_ids),
        "meanings": {mark: MEANINGS[name] for name, mark in MARKS.items()},
        "entries": [_entry(entry, blocks) for entry in seen],
        "blocks": list(blocks),
        "first": next((i for i, e in enumerate(seen) if e.name.endswith("self_attn.weights")), 0),
    }
    template = resources.files("npformer").joinpath("page.html").read_text(encoding="utf-8")
    # In a script element only "<" can end it: a token "</script>" is text as any other
    text = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = template.replace("__POLICY__", policy(template)).replace("__DATA__", text).encode()
    checkpoint.write_atomically(path, page)
    return len(page)


def policy(page: str) -> str:
    """The content-security policy of a page: its own script and style, and nothing else at all.

    Whatever a token may smuggle in, the browser neither runs it nor asks the network for it.
    """

    def hashes(element: str) -> str:
        found = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "base-uri 'none'; form-action 'none'"
    )


def _masks(src, tgt, source, target, pad_ids) -> dict[str, str]:
    """The three attentions' masks in words."""
    source_ids, target_ids = np.array([src]), np.array([tgt])
    own = explain_mask(ids=source_ids, pad_id=pad_ids[0], tokens=source)
    causal = explain_mask(ids=target_ids, pad_id=pad_ids[1], causal=True, tokens=target)
    kind = {"n_queries": len(tgt), "query_tokens": target}
    cross = explain_mask(ids=source_ids, pad_id=pad_ids[0], tokens=source, **kind)
    return {"encoder": own, "decoder": causal, "cross": cross}


def _reasons(src, tgt, pad_ids) -> dict[str, list[str]]:
    """Of the three attentions, a row of marks for each query."""
    S, T = len(src), len(tgt)
    source = {"padding": padding_mask(np.array([src]), pad_ids[0])}
    target = {"padding": padding_mask(np.array([tgt]), pad_ids[1]), "causal": causal_mask(T)}
    kinds = {"encoder": (source, S, S), "decoder": (target, T, T), "cross": (source, T, S)}
    return {
        name: ["".join(row) for row in reasons_of(parts, (1, 1, rows, columns))[0, 0]]
        for name, (parts, rows, columns) in kinds.items()
    }


def _entry(entry: Entry, blocks: dict[str, int]) -> dict[str, Any]:
    shown = np.atleast_1d(entry.value).astype(np.float32)
    if shown.ndim > 2:
        shown = shown.reshape(-1, *shown.shape[-2:])[:MOST_PAGES]
    shown = shown[..., :MOST_COLUMNS]
    attention = _attention_of(entry)
    axes = _axes(entry, attention)
    n_rows = MOST_ROWS if axes[-2] else FEWER_ROWS  # of tokens, or of features
    shown = shown[..., :n_rows, :] if shown.ndim > 1 else shown
    left_out = entry.value.size - shown.size
    data = base64.b64encode(np.ascontiguousarray(shown).tobytes()).decode()
    return {
        "name": entry.name,
        "phase": entry.phase,
        "shape": list(entry.shape),
        "shown": list(shown.shape),
        "dtype": entry.dtype,
        "letters": entry.letters,
        "formula": entry.formula,
        "equation": _equation(entry),
        "file": entry.file,
        "line": entry.line,
        "axes": axes,
        "mask": attention,
        "cut": f"{left_out:,} of {entry.value.size:,} values are left out" if left_out else "",
        "block": blocks.setdefault(data, len(blocks)),
    }


def _attention_of(entry: Entry) -> str | None:
    """Whose mask it is, for the (queries, keys) of an attention."""
    last = entry.name.split(".")[-1].split("#")[0]
    if last not in ("scores", "weights", "dropped", "dscores", "dweights"):
        return None
    return "cross" if "cross_attn" in entry.name else entry.name.split(".")[0]


def _axes(entry: Entry, attention: str | None) -> list[str | None]:
    """Of the two last axes: the tokens of which side, if of any."""
    if attention is not None:
        rows = "source" if attention == "encoder" else "target"
        return [rows, "target" if attention == "decoder" else "source"]
    if entry.value.ndim < 2:
        return [None, None]
    side = "source" if entry.name.startswith(("encoder", "src", "memory")) else "target"
    per_token = entry.value.ndim >= 3 or entry.letters.startswith(("(B, T", "(B, S"))
    return [side if per_token else None, None]


def _equation(entry: Entry) -> str:
    """The first line of the op's docstring, where the formula calls one."""
    if entry.phase == "backward":
        return ""
    for name in ("softmax", "attention", "linear", "layer_norm", "relu", "gelu", "cross_entropy"):
        if f"{name}(" in entry.formula:
            return (inspect.getdoc(getattr(ops, name)) or "").split("\n")[0]
    return ""
