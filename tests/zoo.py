"""The bug zoo: mistakes that people make in a Transformer, as patches of our own code.

Each is planted, the kit is asked, and the kit must see it where it was planted and name the tensor
(test_zoo.py).  [measured] are those found in public implementations.
"""

import ast
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import npformer

PACKAGE = Path(npformer.__file__).parent


class Bug(NamedTuple):
    """One mistake."""

    name: str
    how: str  # it comes about, in a line
    file: str  # in npformer/
    edits: tuple[tuple[str, str], ...]  # what stands there once, and what somebody wrote instead
    where: str  # level.operation of the kit at which it must be seen
    tensor: str  # the first to be out, in the order in which they are made; * is anything


def bug(name: str, how: str, file: str, *edits: tuple[str, str], where: str, tensor: str) -> Bug:
    return Bug(name, how, file, edits, where, tensor)


# --- Planting ---------------------------------------------------------------------------------


def patched_source(planted: Bug) -> str:
    """The file with the bug in it.  Raises ValueError where the text is not there just once."""
    source = (PACKAGE / planted.file).read_text()
    for before, after in planted.edits:
        if source.count(before) != 1:
            raise ValueError(f"{planted.name}: {before!r} is there {source.count(before)} times")
        source = source.replace(before, after)
    return source


@contextmanager
def planted(bug: Bug) -> Iterator[list[str]]:
    """The bug is in npformer while inside, for everybody who has imported from it already.

    Every function whose code the patch changes runs the new code.  Yields their names.
    """
    path = PACKAGE / bug.file
    changed = []
    old = _functions(ast.parse(path.read_text()))
    new = _functions(ast.parse(patched_source(bug)))
    module_name = ".".join(["npformer", *Path(bug.file).with_suffix("").parts])
    module = __import__(module_name, fromlist=["*"])
    assert old.keys() == new.keys(), "a patch changes functions, it adds none"
    restore = []
    namespace: dict[str, Any] = {"__name__": module_name}
    exec(compile(patched_source(bug), path, "exec"), namespace)
    for name in old:
        if ast.dump(old[name]) != ast.dump(new[name]):
            live, patched = _find(vars(module), name), _find(namespace, name)
            restore.append((live, live.__code__))
            live.__code__ = patched.__code__
            changed.append(name)
    assert changed, "nothing has changed"
    try:
        yield changed
    finally:
        for function, code in restore:
            function.__code__ = code


def _functions(tree: ast.Module) -> dict[str, ast.AST]:
    """Functions and methods by qualified name; what is nested in one belongs to it."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def _find(namespace: dict[str, Any], name: str) -> types.FunctionType:
    first, *rest = name.split(".")
    found = namespace[first]
    for part in rest:
        found = vars(found)[part]
    return getattr(found, "__func__", found)  # of a classmethod, its function


# --- The bugs ---------------------------------------------------------------------------------

ZOO = [
    # Products
    bug(
        "broadcast-gradient-averaged",
        "what was copied forward is averaged back, not summed",
        "ops.py",
        ("return dy.sum(axis=(*range", "return dy.mean(axis=(*range"),
        where="op.matmul",
        tensor="d.a",
    ),
    bug(
        "broadcast-gradient-of-leading-axes-only",
        "axes that broadcasting put in front are summed, axes of length 1 are forgotten",
        "ops.py",
        (
            "return dy.sum(axis=(*range(n_added), *stretched)).reshape(shape)",
            "return np.resize(dy.sum(axis=tuple(range(n_added))), shape)",
        ),
        where="op.matmul",
        tensor="d.a",
    ),
    bug(
        "dw-by-reshape",
        "[measured] dW comes out (I, O) and is made to fit by reshape, not by a transpose",
        "ops.py",
        (
            "dweight = dy_rows.T @ x_rows  #",
            "dweight = (x_rows.T @ dy_rows).reshape(n_out, n_in)  #",
        ),
        where="op.linear",
        tensor="d.weight",
    ),
    bug(
        "bias-gradient-averaged",
        "db = mean over the rows: right only if the loss had not been averaged already",
        "ops.py",
        ("(dx, dweight, sum_rows(dy_rows))", "(dx, dweight, sum_rows(dy_rows) / n_rows)"),
        where="op.linear",
        tensor="d.bias",
    ),
    # Embedding
    bug(
        "repeated-ids-count-once",
        "dW[ids] += dy: NumPy adds a repeated id once",
        "ops.py",
        (
            "dweight[sorted_ids[starts]] = np.add.reduceat(dy_rows[order], starts, axis=0)",
            "dweight[flat_ids] += dy_rows",
        ),
        where="op.embedding",
        tensor="d.weight",
    ),
    bug(
        "the-pad-row-learns",
        "padding_idx is looked at in forward only",
        "ops.py",
        ("            dweight[padding_idx] = 0\n", "            pass\n"),
        where="op.embedding",
        tensor="d.weight",
    ),
    bug(
        "runs-added-unsorted",
        "rows are added up run by run without having been sorted by id",
        "ops.py",
        ("np.add.reduceat(dy_rows[order], starts", "np.add.reduceat(dy_rows, starts"),
        where="op.embedding",
        tensor="d.weight",
    ),
    # Softmax
    bug(
        "softmax-gradient-by-the-batch",
        "[measured] divided by the batch, as the loss has been already",
        "ops.py",
        ("dx = _times(dy - sum_last(dy * y), y)", "dx = _times(dy - sum_last(dy * y), y / len(y))"),
        where="op.softmax",
        tensor="d.x",
    ),
    bug(
        "softmax-gradient-is-its-diagonal",
        "y (1 - y), the sigmoid's: the other entries of the row are forgotten",
        "ops.py",
        ("dx = _times(dy - sum_last(dy * y), y)", "dx = _times(dy * (1 - y), y)"),
        where="op.softmax",
        tensor="d.x",
    ),
    bug(
        "softmax-over-queries",
        "axis=-2: columns sum to 1 where rows should",
        "ops.py",
        (
            "total = sum_last(e)  # (..., 1)\n",
            "total = e.sum(axis=-2 if e.ndim > 1 else -1, keepdims=True)\n",
        ),
        where="op.softmax",
        tensor="y",
    ),
    bug(
        "masked-rows-are-uniform",
        "masked scores are filled with -1e9, and a row of nothing else becomes 1/S each",
        "ops.py",
        ("if x.min(initial=0) > -60 and x.max(initial=0) < 60:", "if False:"),
        ("np.where(mask, x.dtype.type(0), np.inf)", "np.where(mask, x.dtype.type(0), 1e9)"),
        where="op.softmax",
        tensor="y",
    ),
    bug(
        "mask-times-scores",
        "scores are multiplied by the mask before the softmax: e⁰ is not 0",
        "ops.py",
        ("        e = np.exp(x)\n", "        e = np.exp(x if mask is None else x * mask)\n"),
        ("            e *= mask\n", "            pass\n"),
        where="op.softmax",
        tensor="y",
    ),
    bug(
        "softmax-without-its-maximum",
        "exp of large scores overflows",
        "ops.py",
        (
            "np.exp(scores - np.maximum(top, np.finfo(x.dtype).min))",
            "np.exp(np.minimum(scores, 80))",
        ),
        where="op.softmax",
        tensor="y",
    ),
    bug(
        "log-softmax-passes-on",
        "the gradient of -log Σ exp is forgotten but for its own entry",
        "ops.py",
        ("dx = dy - np.exp(y) * sum_last(dy)", "dx = dy - np.exp(y) * dy"),
        where="op.log_softmax",
        tensor="d.x",
    ),
    bug(
        "filled-entries-learn",
        "the gradient goes through masked_fill as if nothing had been overwritten",
        "ops.py",
        ("unbroadcast(np.where(mask, 0.0, dy), shape)", "unbroadcast(dy * (mask | ~mask), shape)"),
        where="op.masked_fill",
        tensor="d.x",
    ),
    # Attention
    bug(
        "no-root-of-d",
        "scores are not divided by √D",
        "ops.py",
        ("scale = q.shape[-1] ** -0.5", "scale = 1.0"),
        where="op.attention_weights",
        tensor="y",
    ),
    bug(
        "divided-by-d",
        "scores are divided by D, not √D",
        "ops.py",
        ("scale = q.shape[-1] ** -0.5", "scale = 1 / q.shape[-1]"),
        where="op.attention_weights",
        tensor="y",
    ),
    bug(
        "scale-forgotten-going-back",
        "1/√D is in forward and in dQ, not in dK",
        "ops.py",
        ("dk = _times(dscores.mT @ q, scale)", "dk = dscores.mT @ q"),
        where="op.attention_weights",
        tensor="d.k",
    ),
    bug(
        "dv-before-dropout",
        "[measured] dV from the weights before dropout: not those that multiplied V",
        "ops.py",
        ("dv = dropped.mT @ dy", "dv = weights.mT @ dy"),
        where="op.attention",
        tensor="d.v",
    ),
    bug(
        "dropout-skipped-going-back",
        "the weights' dropout has no backward",
        "ops.py",
        ("dweights = backward_dropout(dy @ v.mT)", "dweights = dy @ v.mT"),
        where="op.attention",
        tensor="d.q",
    ),
    bug(
        "dropout-before-softmax-weights",
        "dropped weights are normalised again, so that they sum to 1",
        "ops.py",
        (
            "y = dropped @ v  # (..., T, E)",
            "y = (dropped / np.maximum(sum_last(dropped), 1e-30)) @ v",
        ),
        where="op.attention",
        tensor="y",
    ),
    # LayerNorm
    bug(
        "gamma-outside-the-means",
        "[measured] dx = γ rstd (dy - mean(dy) - ...): γ belongs inside the means",
        "ops.py",
        (
            "mean_dxhat = dy_rows @ (weight / C)",
            "mean_dxhat = weight * (dy_rows.sum(axis=-1) / C)[:, None]",
        ),
        (
            "mean_dxhat_xhat = dy_xhat @ (weight / C)",
            "mean_dxhat_xhat = weight * (dy_xhat.sum(axis=-1) / C)[:, None]",
        ),
        ("dx -= xhat * mean_dxhat_xhat[:, np.newaxis]", "dx -= xhat * mean_dxhat_xhat"),
        ("dx -= mean_dxhat[:, np.newaxis]", "dx -= mean_dxhat"),
        where="op.layer_norm",
        tensor="d.x",
    ),
    bug(
        "eps-outside-the-root",
        "1 / (√var + eps)",
        "ops.py",
        ("rstd = (variance + eps) ** -0.5", "rstd = 1 / (variance**0.5 + eps)"),
        where="op.layer_norm",
        tensor="y",
    ),
    bug(
        "unbiased-variance",
        "np.var(ddof=1), or torch.std as it comes",
        "ops.py",
        ("[:, np.newaxis] / C  # (N, 1)", "[:, np.newaxis] / max(C - 1, 1)"),
        where="op.layer_norm",
        tensor="y",
    ),
    bug(
        "variance-by-squares",
        "mean(x²) - mean(x)² cancels where the mean is large",
        "ops.py",
        (
            "variance = np.vecdot(centred, centred)[:, np.newaxis] / C",
            "variance = np.maximum(sum_last(x_rows * x_rows) / C - (sum_last(x_rows) / C) ** 2, 0)",
        ),
        where="op.layer_norm",
        tensor="y",
    ),
    bug(
        "mean-path-forgotten",
        "x reaches the output through the mean as well",
        "ops.py",
        ("        dx -= mean_dxhat[:, np.newaxis]\n", ""),
        where="op.layer_norm",
        tensor="d.x",
    ),
    bug(
        "variance-path-forgotten",
        "x reaches the output through the variance as well",
        "ops.py",
        ("        dx -= xhat * mean_dxhat_xhat[:, np.newaxis]\n", ""),
        where="op.layer_norm",
        tensor="d.x",
    ),
    bug(
        "dgamma-from-dy",
        "dγ = Σ dy, which is dβ",
        "ops.py",
        ("sum_rows(dy_xhat), sum_rows(dy_rows)\n", "sum_rows(dy_rows), sum_rows(dy_rows)\n"),
        where="op.layer_norm",
        tensor="d.weight",
    ),
    # Activations, dropout
    bug(
        "relu-learns-at-zero",
        "x >= 0 for x > 0",
        "ops.py",
        ("dx = dy * (y != 0)", "dx = dy * (x >= 0)"),
        where="op.relu",
        tensor="d.x",
    ),
    bug(
        "gelu-without-its-density",
        "d(x Φ) = Φ: the product rule's second half is missing",
        "ops.py",
        ("dx = dy * (cdf + x * pdf)", "dx = dy * cdf"),
        where="op.gelu",
        tensor="d.x",
    ),
    bug(
        "gelu-by-tanh",
        "the approximation where the exact one is meant",
        "ops.py",
        (
            "cdf = 0.5 * (1 + erf(x * 0.5**0.5))",
            "cdf = 0.5 * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)))",
        ),
        where="op.gelu",
        tensor="y",
    ),
    bug(
        "gelu-tanh-without-the-three",
        "d(x³) = x²",
        "ops.py",
        ("(1 + 3 * 0.044715 * x_squared)", "(1 + 0.044715 * x_squared)"),
        where="op.gelu_tanh",
        tensor="d.x",
    ),
    bug(
        "dropout-without-scaling",
        "what is kept is not divided by 1 - p",
        "ops.py",
        ("factor *= 1 / (1 - p) if p < 1 else 0.0", "factor *= 1.0 if p < 1 else 0.0"),
        where="op.dropout",
        tensor="y",
    ),
    bug(
        "dropout-scaled-by-p",
        "1 / p for 1 / (1 - p)",
        "ops.py",
        ("factor *= 1 / (1 - p) if p < 1 else 0.0", "factor *= 1 / p if p < 1 else 0.0"),
        where="op.dropout",
        tensor="y",
    ),
    bug(
        "dropout-draws-again",
        "backward knows where, but not by how much",
        "ops.py",
        ("dx = dy * factor\n", "dx = dy * (factor > 0)\n"),
        where="op.dropout",
        tensor="d.x",
    ),
    # The loss
    bug(
        "loss-by-the-batch",
        "[measured] cross-entropy divided by B, not by the targets",
        "ops.py",
        ("counted.sum() if n_targets is None", "len(logits) if n_targets is None"),
        where="op.cross_entropy",
        tensor="y",
    ),
    bug(
        "target-found-by-value",
        "[measured] p == p[target]: another class of the same probability is taken for the target",
        "ops.py",
        ("dlogits[rows, labels] -=", "dlogits[p == p[rows, labels][:, None]] -="),
        where="op.cross_entropy",
        tensor="d.logits",
    ),
    bug(
        "ignored-targets-learn",
        "ignore_index is looked at in forward only",
        "ops.py",
        ("        dlogits[~counted] = 0\n", ""),
        where="op.cross_entropy",
        tensor="d.logits",
    ),
    bug(
        "ignored-targets-counted",
        "the mean is over all targets, the ignored ones too",
        "ops.py",
        ("counted.sum() if n_targets is None", "counted.size if n_targets is None"),
        where="op.cross_entropy",
        tensor="y",
    ),
    bug(
        "smoothing-over-the-others",
        "the smoothing goes to the gradient of the target alone",
        "ops.py",
        ("dlogits -= scale * label_smoothing / V", "dlogits -= 0 * scale"),
        where="op.cross_entropy",
        tensor="d.logits",
    ),
    bug(
        "incoming-gradient-dropped",
        "backward() as if the loss were always the last thing",
        "ops.py",
        ("scale = float(dloss) / max(n, 1)", "scale = 1 / max(n, 1)"),
        where="op.cross_entropy",
        tensor="d.logits",
    ),
    # Masks
    bug(
        "causal-mask-flipped",
        "np.triu for np.tril: only the future is seen",
        "masks.py",
        ("return key <= query", "return key >= query"),
        where="layer.causal_attention",
        tensor="y",
    ),
    bug(
        "causal-mask-strict",
        "tril(k=-1): nobody sees itself, the first nothing",
        "masks.py",
        ("return key <= query", "return key < query"),
        where="layer.causal_attention",
        tensor="y",
    ),
    bug(
        "causal-offset-forgotten",
        "with a cache the queries stand at the end, not at the start",
        "masks.py",
        (
            "query, key = np.arange(T)[:, np.newaxis] + offset, np.arange(S)\n    return key <=",
            "query, key = np.arange(T)[:, np.newaxis], np.arange(S)\n    return key <=",
        ),
        where="layer.causal_attention",
        tensor="y",
    ),
    bug(
        "padding-mask-inverted",
        "True means the opposite, as in nn.MultiheadAttention",
        "masks.py",
        ("return (ids != pad_id)", "return (ids == pad_id)"),
        where="model.transformer",
        tensor="logits",
    ),
    bug(
        "cross-attention-sees-pads",
        "the source's padding is masked in the encoder only",
        "transformer.py",
        (
            "y, backward_decoder = self.decoder(x, memory, mask, memory_mask, rng)",
            "y, backward_decoder = self.decoder(x, memory, mask, memory_mask | True, rng)",
        ),
        where="model.transformer",
        tensor="logits",
    ),
    # Heads and projections
    bug(
        "heads-merged-without-transpose",
        "(B, H, T, D) reshaped to (B, T, C): positions and heads are mixed up",
        "attention.py",
        (
            "return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)",
            "return x.reshape(B, T, H * D)",
        ),
        where="layer.multi_head_attention",
        tensor="y",
    ),
    bug(
        "heads-split-without-transpose",
        "(B, T, C) reshaped to (B, H, T, D) at once",
        "attention.py",
        (
            "return x.reshape(B, T, n_heads, C // n_heads).transpose(0, 2, 1, 3)",
            "return x.reshape(B, n_heads, T, C // n_heads)",
        ),
        where="layer.multi_head_attention",
        tensor="y",
    ),
    bug(
        "values-from-keys",
        "self-attention is all that was tried: there key and value are one",
        "attention.py",
        ("v, backward_v = self.v_proj(value)", "v, backward_v = self.v_proj(key)"),
        where="layer.multi_head_attention",
        tensor="y",
    ),
    bug(
        "dx-without-the-projections",
        "[measured] the gradients of q, k, v are returned as those of query, key, value",
        "attention.py",
        (
            "return backward_q(dq), backward_k(dk), backward_v(dv)",
            "_ = backward_q(dq), backward_k(dk), backward_v(dv)\n            return dq, dk, dv",
        ),
        where="layer.multi_head_attention",
        tensor="d.query",
    ),
    bug(
        "key-and-value-gradients-exchanged",
        "dK goes through V's projection, dV through K's",
        "attention.py",
        (
            "return backward_q(dq), backward_k(dk), backward_v(dv)",
            "return backward_q(dq), backward_k(dv), backward_v(dk)",
        ),
        where="layer.multi_head_attention",
        tensor="d.k_proj.weight",
    ),
    bug(
        "mask-of-the-first-sample",
        "one sample's mask for the whole batch",
        "attention.py",
        (
            "yh, backward_attention = ops.attention(qh, kh, vh, mask, self.dropout, rng)",
            "yh, backward_attention = ops.attention("
            "qh, kh, vh, None if mask is None else mask[:1], self.dropout, rng)",
        ),
        where="layer.multi_head_attention",
        tensor="y",
    ),
    # Modules
    bug(
        "gradient-names-do-not-match",
        "[measured] the gradient of γ is stored as that of β, and the reverse",
        "layers.py",
        (
            "            dx, dweight, dbias = backward_norm(dy)\n",
            "            dx, dbias, dweight = backward_norm(dy)\n",
        ),
        where="block.encoder_layer",
        tensor="d.norm2.weight",
    ),
    bug(
        "gradient-replaced",
        "= for +=: of a table that is used twice, only the last use counts",
        "layers.py",
        (
            "self.weight.grad += backward_embedding(dy)",
            "self.weight.grad[...] = backward_embedding(dy)",
        ),
        where="model.transformer",
        tensor="d.tgt_embedding.weight",
    ),
    bug(
        "activation-derivative-at-its-output",
        "relu's would do so; of gelu the derivative is taken at the wrong place",
        "feedforward.py",
        ("return backward_linear1(backward_activation(da))", "return backward_linear1(da)"),
        where="layer.feed_forward",
        tensor="d.linear1.weight",
    ),
    # Blocks
    bug(
        "residual-through-the-norm",
        "[measured] pre-norm: the residual's gradient goes through LayerNorm's backward too",
        "encoder.py",
        ("dh = dy + backward_norm2(dn2)", "dh = backward_norm2(dy + dn2)"),
        where="block.encoder_layer",
        tensor="d.norm2.weight",
    ),
    bug(
        "residual-forgotten",
        "pre-norm: nothing flows past the feed-forward network",
        "encoder.py",
        ("dh = dy + backward_norm2(dn2)", "dh = backward_norm2(dn2)"),
        where="block.encoder_layer",
        tensor="d.self_attn.out_proj.weight",
    ),
    bug(
        "only-the-query-learns",
        "x was the query, the key and the value: three gradients, one is kept",
        "encoder.py",
        (
            "return dsum1 + dq + dk + dv  # x was the residual, the query, the key and the value",
            "return dsum1 + dq",
        ),
        where="block.encoder_layer",
        tensor="d.x",
    ),
    bug(
        "post-norm-residual-before-the-sum",
        "post-norm: the residual's gradient is dy, not that of the sum under the norm",
        "encoder.py",
        (
            "dh = dsum2 + backward_ff(backward_drop2(dsum2))",
            "dh = dy + backward_ff(backward_drop2(dsum2))",
        ),
        where="block.encoder_layer",
        tensor="d.norm1.weight",
    ),
    bug(
        "memory-gradient-of-the-keys-alone",
        "the memory is key and value: two gradients, one is kept",
        "decoder.py",
        (
            "return dg + backward_norm1(dq + dk + dv), dk_memory + dv_memory",
            "return dg + backward_norm1(dq + dk + dv), dk_memory",
        ),
        where="block.decoder_layer",
        tensor="d.memory",
    ),
    bug(
        "cross-attention-asks-the-input",
        "post-norm: the second residual starts from x, not from what self-attention gave",
        "decoder.py",
        (
            "h, backward_norm2 = self.norm2(g + kept_c)",
            "h, backward_norm2 = self.norm2(x + kept_c)",
        ),
        where="block.decoder_layer",
        tensor="y",
    ),
    bug(
        "decoder-norms-shared",
        "copy and paste: norm2 where norm3 belongs",
        "decoder.py",
        ("n3, backward_norm3 = self.norm3(h)", "n3, backward_norm3 = self.norm2(h)"),
        where="block.decoder_layer",
        tensor="y",
    ),
    # Stacks and models
    bug(
        "memory-gradient-of-one-layer",
        "every decoder layer asks the memory; the gradient of the first is kept",
        "decoder.py",
        ("dmemory = dmemory + dmemory_layer", "dmemory = dmemory_layer"),
        where="model.transformer",
        tensor="d.encoder.*",
    ),
    bug(
        "layers-backward-in-forward-order",
        "reversed() forgotten",
        "encoder.py",
        ("for backward_layer in reversed(backwards):", "for backward_layer in backwards:"),
        where="model.transformer",
        tensor="d.encoder.layers.1.*",
    ),
    bug(
        "final-norm-skipped-going-back",
        "the final LayerNorm has no backward: its gradients stay 0",
        "encoder.py",
        ("            dx = backward_norm(dy)\n", "            dx = dy\n"),
        where="model.decoder_only",
        tensor="d.decoder.norm.weight",
    ),
    bug(
        "embeddings-not-scaled",
        "√C is missing",
        "transformer.py",
        ("positions(e * scale, offset)", "positions(e, offset)"),
        where="model.transformer",
        tensor="logits",
    ),
    bug(
        "embedding-scale-forgotten-going-back",
        "√C is in forward only",
        "transformer.py",
        ("(backward_dropout(dx)) * scale)", "(backward_dropout(dx)))"),
        where="model.transformer",
        tensor="d.tgt_embedding.weight",
    ),
    bug(
        "positions-averaged-over-the-batch",
        "every sample used the row: a sum, not a mean",
        "positional.py",
        ("drows = dy.sum(axis=0)", "drows = dy.mean(axis=0)"),
        where="model.transformer",
        tensor="d.tgt_positions.weight",
    ),
    bug(
        "all-sines-then-all-cosines",
        "the layout of tensor2tensor, not the paper's",
        "positional.py",
        ("table[:, 0::2] = np.sin(angle)", "table[:, : -(-d_model // 2)] = np.sin(angle)"),
        (
            "table[:, 1::2] = np.cos(angle)[:, : d_model // 2]",
            "table[:, -(-d_model // 2) :] = np.cos(angle)[:, : d_model // 2]",
        ),
        where="layer.sinusoidal_positions",
        tensor="y",
    ),
    bug(
        "position-exponent-doubled",
        "2i is taken for the column, which is 2i already",
        "positional.py",
        ("-math.log(10000) / d_model *", "-2 * math.log(10000) / d_model *"),
        where="layer.sinusoidal_positions",
        tensor="y",
    ),
    bug(
        "position-offset-forgotten",
        "with a cache every token stands at position 0",
        "positional.py",
        ("rows = self.table[offset : offset + x.shape[1]]", "rows = self.table[: x.shape[1]]"),
        where="layer.sinusoidal_positions",
        tensor="y",
    ),
    bug(
        "decoder-not-causal",
        "the target's padding mask alone: every token sees the answer",
        "transformer.py",
        (
            "padding_mask(tgt, self.config.tgt_pad_id) & causal_mask(tgt.shape[1])\n",
            "padding_mask(tgt, self.config.tgt_pad_id)\n",
        ),
        where="decoding.greedy",
        tensor="tokens",
    ),
]
