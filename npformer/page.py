"""One step of a model as a page: a single file that opens from disk and asks the network nothing.

The map on the left has every tensor of the trace by its place in the model, each with its number in
the order in which they were made, forward and backward; on the right are the values as a heat map,
the formula, the equation, the gradient.

Positions of the target are steps: one has read a token and says the next, written `read → said`,
here as in the other pictures (plot.py).
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from npformer import checkpoint
from npformer.config import TransformerConfig
from npformer.explain import MARKS, MEANINGS, explain_mask, reasons_of
from npformer.masks import causal_mask, padding_mask
from npformer.tracing import Entry, Trace, trace
from npformer.transformer import Transformer

# Whose mask it is, by who asks and who is asked
ATTENTIONS = {
    ("source", "source"): "encoder",
    ("target", "target"): "decoder",
    ("target", "source"): "cross",
}
MOST_ROWS, FEWER_ROWS, MOST_COLUMNS, MOST_PAGES = 32, 16, 64, 16


def write_page(
    seen: Trace,
    path: str | Path,
    *,
    src: Sequence[int],
    tgt: Sequence[int],
    source: Sequence[str],
    target: Sequence[str],
    said: Sequence[str] | None = None,
    vocabularies: tuple[Sequence[str], Sequence[str]] = ((), ()),
    pad_ids: tuple[int, int] = (0, 0),
    about: str = "",
) -> int:
    """Write the page of a trace of one sample; returns its size in bytes.

    src, tgt         the ids that were read, no src where the model is decoder-only
    source, target   their tokens, as text
    said             the tokens that were asked for; None: the target, one on, and then the end
    vocabularies     every token of the source's and of the target's, by id
    about            a line on top

    Raises CheckpointError if the file cannot be written.
    """
    src, tgt, source, target = list(src), list(tgt), list(source), list(target)
    blocks: dict[str, int] = {}  # the values, each once: many a tensor is another under a new name
    axes = axes_of(seen)
    gradients = gradients_of(seen)
    content = {
        "about": about,
        "tokens": {
            "source": source,
            "target": target,
            "source vocabulary": list(vocabularies[0]),
            "target vocabulary": list(vocabularies[1]),
        },
        "said": [*target[1:], "end"] if said is None else list(said),
        "masks": _masks(src, tgt, source, target, pad_ids),
        "reasons": _reasons(src, tgt, pad_ids),
        "meanings": {mark: MEANINGS[name] for name, mark in MARKS.items()},
        "entries": [_entry(entry, axes.get(entry.name, []), blocks) for entry in seen],
        "gradients": gradients,
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
    """The attentions' masks in words."""
    source_ids, target_ids = np.array([src]), np.array([tgt])
    causal = explain_mask(ids=target_ids, pad_id=pad_ids[1], causal=True, tokens=target)
    if len(src) == 0:
        return {"decoder": causal}
    own = explain_mask(ids=source_ids, pad_id=pad_ids[0], tokens=source)
    kind = {"n_queries": len(tgt), "query_tokens": target}
    cross = explain_mask(ids=source_ids, pad_id=pad_ids[0], tokens=source, **kind)
    return {"encoder": own, "decoder": causal, "cross": cross}


def _reasons(src, tgt, pad_ids) -> dict[str, list[str]]:
    """Of the attentions, a row of marks for each query."""
    S, T = len(src), len(tgt)
    target = {"padding": padding_mask(np.array([tgt]), pad_ids[1]), "causal": causal_mask(T)}
    kinds = {"decoder": (target, T, T)}
    if S:
        source = {"padding": padding_mask(np.array([src]), pad_ids[0])}
        kinds |= {"encoder": (source, S, S), "cross": (source, T, S)}
    return {
        name: ["".join(row) for row in reasons_of(parts, (1, 1, rows, columns))[0, 0]]
        for name, (parts, rows, columns) in kinds.items()
    }


def gradients_of(seen: Trace) -> dict[str, str]:
    """The name of a tensor -> that of its gradient: of x it is dx, in the same place.

    What has one name several times, as the x that goes through a stack, has its gradients in the
    opposite order: of x, x#2 and x#3 the first dx is that of x#3.
    """
    forward = [entry for entry in seen if entry.phase == "forward"]
    names = [entry.name.partition("#")[0] for entry in forward]
    left, found = Counter(names), {}
    for name, entry in zip(names, forward, strict=True):
        path, dot, local = name.rpartition(".")
        gradient = f"{path}{dot}d{local}" + (f"#{left[name]}" if left[name] > 1 else "")
        left[name] -= 1
        if gradient in seen and seen[gradient].phase == "backward":
            found[entry.name] = gradient
    return found


SIZES = {"source": 5, "target": 7, "source vocabulary": 31, "target vocabulary": 37}


def axes_of(seen: Trace) -> dict[str, list[str | None]]:
    """What each axis of each tensor counts: a key of SIZES, or None: samples, heads, features.

    Shapes alone do not say: a source may be as long as its answer, or as d_head.  So a small model
    with the same parts does the same step, and in it no two sizes are equal.
    """
    try:
        config = TransformerConfig.from_json(seen.about["config"])
    except (KeyError, TypeError, ValueError):  # another program's
        return {}
    S, T, source, target = SIZES.values()
    config = replace(
        config,
        src_vocab_size=target if config.share_embeddings else source,
        tgt_vocab_size=target,
        **{
            "d_model": 34,
            "n_heads": 2,
            "d_ff": 19,
            "max_len": 23,
            "src_pad_id": 0,
            "tgt_pad_id": 0,
        },
    )
    src = np.ones((1, S), int) if config.n_encoder_layers else None
    tgt = np.ones((1, T), int)
    drops = any(entry.name.endswith("factor") for entry in seen)
    rng = np.random.default_rng(0) if drops else None
    small = trace(Transformer(config, np.random.default_rng(0)), src, tgt, target=tgt, rng=rng)
    meanings = {size: name for name, size in SIZES.items()}
    return {
        # Sorted by id, an axis does not count positions
        e.name: [
            None if e.name.endswith(("order", "sorted_ids")) else meanings.get(n) for n in e.shape
        ]
        for e in small
    }


def _entry(entry: Entry, kinds: list[str | None], blocks: dict[str, int]) -> dict[str, Any]:
    shown = np.atleast_1d(entry.value).astype(np.float32)
    if shown.ndim > 2:
        shown = shown.reshape(-1, *shown.shape[-2:])[:MOST_PAGES]
    shown = shown[..., :MOST_COLUMNS]
    axes = [None, None, *(kinds if len(kinds) == entry.value.ndim else [])][-2:]
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
        "refined": entry.refined,
        "equation": entry.equation,
        "file": entry.file,
        "line": entry.line,
        "axes": axes,
        "mask": ATTENTIONS.get(tuple(axes)),
        "cut": f"{left_out:,} of {entry.value.size:,} values are left out" if left_out else "",
        "block": blocks.setdefault(data, len(blocks)),
    }
