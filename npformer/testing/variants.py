"""Where an implementation misses: is it right by another convention?  "You match if ..."

A variant changes npformer itself while the reference is computed once more: it replaces an op, an
option or a mask.  An implementation matches a variant if all cases of the operation do, those
included that were right before.  Two variants at a time are tried where none is enough by itself.

Which of these is called right is a matter of definition (ours: README and DESIGN); which of them
somebody else means is what has to be known before weights are exchanged.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npformer import decoder, encoder, feedforward, masks, ops, positional, transformer
from npformer.testing.cases import Case, cast
from npformer.testing.reference import reference

Array = np.ndarray
Patch = tuple[Any, str, Any]  # an object, the name of its attribute (or key), the new value


@dataclass(frozen=True)
class Variant:
    """One convention that is not ours."""

    meaning: str  # completes "you match if ..."
    patches: Callable[[], list[Patch]] = list  # what to replace while it is computed
    inputs: Callable[[Case], Case | None] | None = None  # or what to change of the question


def explain(cases: list[Case], answers: list[dict[str, Array]]) -> str | None:
    """The variant under which all the answers to one operation are right, as a sentence, or None.

    cases    those of one operation, of which at least one was missed
    answers  one for each
    """
    for gradients in (True, False):
        wanted = [
            _only(case, answer, gradients) for case, answer in zip(cases, answers, strict=True)
        ]
        if found := _best(cases, wanted):
            ways = [" and ".join(variant.meaning for variant in chosen) for chosen in found]
            rest = "" if gradients else " (the values; the gradients differ for another reason)"
            return f"you match if {', or if '.join(ways)}{rest}"
    return None


def _only(case: Case, answer: dict[str, Array], gradients: bool) -> dict[str, Array]:
    """What of the answer can be compared with a variant of the reference."""
    return {
        name: x
        for name, x in answer.items()
        if name in case.expected and (gradients or not name.startswith("d."))
    }


def _best(cases: list[Case], answers: list[dict[str, Array]]) -> list[tuple[Variant, ...]]:
    """The fewest variants that explain all; several choices if the cases cannot tell them apart."""
    limit = LIMIT[cases[0].dtype]
    as_it_is = [_distance(case, answer, ()) for case, answer in zip(cases, answers, strict=True)]
    hardest = int(np.argmax(as_it_is))
    missed = sorted(range(len(cases)), key=lambda i: -as_it_is[i])[:4]
    matter = [
        v for v in VARIANTS if any(_distance(cases[i], {}, (v,), changes=True) for i in missed)
    ]
    # Of tokens alone not two: with little to compare, too many pairs fit.
    for k in (1, 2) if "tokens" not in answers[hardest] else (1,):
        scored = []
        for chosen in itertools.combinations(matter, k):
            first = _distance(cases[hardest], answers[hardest], chosen)
            if not first < min(limit, as_it_is[hardest] / 10):
                continue
            pairs = zip(cases, answers, strict=True)
            worst = max(_distance(case, answer, chosen) for case, answer in pairs)
            if worst < limit:
                scored.append((worst, chosen))
        if scored:
            closest = min(worst for worst, _ in scored)
            return [chosen for worst, chosen in scored if worst <= max(10 * closest, limit / 1e3)]
    return []


def _distance(
    case: Case, answer: dict[str, Array], variants: tuple[Variant, ...], changes: bool = False
) -> float:
    """How far the answer is from the variants; with `changes`, these from what is expected."""
    try:
        expected = by_variant(case, variants) if variants else case.expected
    except (ValueError, FloatingPointError, IndexError):
        return math.inf if not changes else 0.0  # it does not make sense for this case
    if changes:
        return _apart(expected, case.expected)
    apart = _apart(answer, expected)
    if variants and LIMIT[case.dtype] <= apart < 0.1:
        # Near a constant row some formulas magnify every rounding: measure that, do not count it.
        apart -= 10 * _apart(by_variant(_nudged(case), variants), expected)
    return apart


LIMIT = {dtype: math.sqrt(np.finfo(dtype).eps) for dtype in ("float32", "float64")}


def _nudged(case: Case) -> Case:
    """Every input up or down by half an ulp."""
    rng, half = np.random.default_rng(0), np.finfo(case.dtype).eps / 2
    floats = cast({k: x for k, x in case.arrays.items() if x.dtype.kind == "f"}, np.float64)
    nudged = {k: x * (1 + half * rng.choice([-1, 1], x.shape)) for k, x in floats.items()}
    return replace(case, arrays=case.arrays | nudged)


def _apart(answer: dict[str, Array], expected: dict[str, Array]) -> float:
    """The largest error of any tensor: an output's of itself, a gradient's of the largest one."""
    worst = 0.0
    sizes = {name: float(np.abs(e[np.isfinite(e)]).max(initial=0)) for name, e in expected.items()}
    largest = max((size for name, size in sizes.items() if name.startswith("d.")), default=0.0)
    for name, x in answer.items():
        e = expected.get(name)
        if e is None or np.shape(x) != np.shape(e):
            return math.inf
        scale = largest if name.startswith("d.") else sizes[name]
        with np.errstate(invalid="ignore"):
            error = np.where((x == e) | (np.isnan(x) & np.isnan(e)), 0.0, np.abs(x - e * 1.0))
        error = np.where(np.isnan(error), np.inf, error)
        worst = max(worst, float(error.max(initial=0)) / (scale or 1.0))
    return worst


def by_variant(case: Case, variants: tuple[Variant, ...]) -> dict[str, Array]:
    """What would be expected by another convention, in float64."""
    with ExitStack() as stack, np.errstate(all="ignore"):
        for variant in variants:
            if variant.inputs is not None:
                changed = variant.inputs(case)
                if changed is None:
                    continue
                case = changed
            stack.enter_context(patched(variant.patches()))
        return reference(case.op, cast(case.arrays, np.float64), case.options)


@contextmanager
def patched(patches: list[Patch]) -> Iterator[None]:
    """Other values for attributes (of dicts: for keys) while inside."""
    before = [(owner, name, _get(owner, name)) for owner, name, _ in patches]
    for patch in patches:
        _set(*patch)
    try:
        yield
    finally:
        for patch in reversed(before):
            _set(*patch)


def _get(owner: Any, name: str) -> Any:
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


# --- GELU, LayerNorm ---------------------------------------------------------------------------


def _gelu_as(name: str) -> Callable[[], list[Patch]]:
    """Both names of GELU mean this one."""

    def patches() -> list[Patch]:
        function, table = getattr(ops, name), feedforward.ACTIVATIONS
        return [(owner, g, function) for owner in (ops, table) for g in ("gelu", "gelu_tanh")]

    return patches


def _layer_norm(unbiased: bool, outside: bool) -> Callable:
    """y = w (x - mean) / s + b, with s = √(k var + eps) or √(k var) + eps, k = C / (C - 1) or 1."""

    def layer_norm(x, weight, bias, eps=1e-5):
        C = x.shape[-1]
        centred = x - x.mean(axis=-1, keepdims=True)
        k = np.divide(C, C - 1) if unbiased else 1.0  # of one feature: NaN, as in torch
        variance = k * np.square(centred).mean(axis=-1, keepdims=True)
        root = np.sqrt(variance if outside else variance + eps)
        s = root + eps if outside else root
        y = weight * (centred / s) + bias

        def backward(dy):
            dxhat = dy * weight
            dvariance = -(dxhat * centred).sum(axis=-1, keepdims=True) / (2 * root * s * s)
            dcentred = dxhat / s + dvariance * 2 * k / C * centred
            batch_axes = tuple(range(x.ndim - 1))
            dx = dcentred - dcentred.mean(axis=-1, keepdims=True)
            return dx, (dy * centred / s).sum(axis=batch_axes), dy.sum(axis=batch_axes)

        return y, backward

    return layer_norm


def _eps_is(eps: float) -> Callable[[], list[Patch]]:
    """Whatever is asked for; on top of any other LayerNorm."""

    def patches() -> list[Patch]:
        inner = ops.layer_norm
        return [(ops, "layer_norm", lambda x, weight, bias, own=1e-5: inner(x, weight, bias, eps))]

    return patches


def _norm_variant(meaning: str, **kind: Any) -> Variant:
    return Variant(meaning, lambda: [(ops, "layer_norm", _layer_norm(**kind))])


# --- Where the norms stand -------------------------------------------------------------------


def _other_placement() -> list[Patch]:
    """Each layer by its other method: pre_norm where it would be post_norm."""

    def patch(Layer):
        def forward(self, *args):
            return (Layer.post_norm if self.norm_first else Layer.pre_norm)(self, *args)

        forward_with_defaults = _filling(Layer.forward, forward)
        return (Layer, "forward", forward_with_defaults)

    return [patch(encoder.EncoderLayer), patch(decoder.DecoderLayer)]


def _filling(original: Callable, forward: Callable) -> Callable:
    """`forward` with the None's that the original's optional arguments default to."""
    n = original.__code__.co_argcount

    def filled(self, *args):
        return forward(self, *args, *[None] * (n - 1 - len(args)))

    return filled


def _other_final_norm() -> list[Patch]:
    """No norm after a stack that has one, a plain one (weight 1, bias 0) after one without."""

    def patch(Stack):
        original = Stack.forward

        def forward(self, x, *args):
            norm, self.norm = self.norm, None
            try:
                y, backward_stack = original(self, x, *args)
            finally:
                self.norm = norm
            if norm is not None:
                return y, backward_stack
            C = y.shape[-1]
            z, backward_norm = ops.layer_norm(y, np.ones(C, y.dtype), np.zeros(C, y.dtype))
            return z, lambda dz: backward_stack(backward_norm(dz)[0])

        return (Stack, "forward", forward)

    return [patch(encoder.Encoder), patch(decoder.Decoder)]


# --- Attention ---------------------------------------------------------------------------------


def _scores_times(factor: Callable[[Array], float]) -> Callable[[], list[Patch]]:
    """Scores are multiplied by this as well as by 1/√D."""

    def patches() -> list[Patch]:
        original = ops.attention_weights

        def attention_weights(q, k, mask=None):
            c = factor(q)
            weights, backward = original(q * c, k, mask)

            def backward_scaled(dweights):
                dq, dk = backward(dweights)
                return dq * c, dk

            return weights, backward_scaled

        return [(ops, "attention_weights", attention_weights)]

    return patches


def _model_width(q: Array) -> int:
    """C = H D where there are heads."""
    return q.shape[-1] * (q.shape[1] if q.ndim == 4 else 1)


def _masked_as(fill: float) -> Callable[[], list[Patch]]:
    """Masked scores become `fill`: where a row has no key at all, uniform weights or NaN."""

    def softmax(x, mask=None):
        filled = x if mask is None else np.where(mask, x, fill)
        e = np.exp(filled - filled.max(axis=-1, keepdims=True))
        y = e / e.sum(axis=-1, keepdims=True)

        def backward(dy):
            dx = y * (dy - (y * dy).sum(axis=-1, keepdims=True))
            return dx if mask is None else np.where(mask, dx, 0.0)

        return y, backward

    return lambda: [(ops, "softmax", softmax)]


def _inverted_masks(case: Case) -> Case | None:
    """Every mask that is given means the opposite."""
    given = [name for name in case.arrays if name.endswith("mask")]
    if not given:
        return None
    return replace(case, arrays=case.arrays | {name: ~case.arrays[name] for name in given})


def _causal(
    other: Callable[[int, int], int] | None = None, strict: bool = False
) -> Callable[[], list[Patch]]:
    """Another alignment of the causal mask: an offset of its own, or without the diagonal."""
    original = masks.causal_mask

    def causal_mask(T, S=None, offset=0):
        S = offset + T if S is None else S
        return original(T, S, (offset if other is None else other(T, S)) - strict)

    return lambda: [(masks, "causal_mask", causal_mask), (transformer, "causal_mask", causal_mask)]


# --- Weights, embeddings, positions -------------------------------------------------------------


def _transposed_weights() -> list[Patch]:
    """y = x W + b, with W stored (in, out): silent only where W is square."""
    original = ops.linear

    def linear(x, weight, bias=None):
        if weight.shape[0] != weight.shape[1]:
            return original(x, weight, bias)
        y, backward = original(x, weight.T, bias)

        def backward_transposed(dy):
            dx, dweight, *dbias = backward(dy)
            return dx, dweight.T, *dbias

        return y, backward_transposed

    return [(ops, "linear", linear)]


def _padding_row_learns() -> list[Patch]:
    original = ops.embedding
    return [(ops, "embedding", lambda ids, weight, padding_idx=None: original(ids, weight))]


def _embedding_scale(case: Case) -> Case | None:
    config = case.options.get("config")
    if config is None:
        return None
    other = config | {"scale_embedding": not config["scale_embedding"]}
    return replace(case, options=case.options | {"config": other})


def _table(frequency: Callable, layout: str, first: int = 0) -> Callable[[], list[Patch]]:
    """Another sinusoidal table.  frequency(i, C) of the pair i; layout "pairs" or "halves"."""

    def table(n, d_model):
        angle = (np.arange(n)[:, np.newaxis] + first) * frequency(
            np.arange(-(-d_model // 2)), d_model
        )
        if layout == "halves":
            return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :d_model]
        return np.stack([np.sin(angle), np.cos(angle)], axis=2).reshape(n, -1)[:, :d_model]

    return lambda: [(positional, "sinusoidal_table", table)]


def _as_printed(i: Array, C: int) -> Array:
    return 10000.0 ** (-2 * i / C)


def _tensor2tensor(i: Array, C: int) -> Array:
    return 10000.0 ** (-i / max(C // 2 - 1, 1))


def _columns(i: Array, C: int) -> Array:
    return 10000.0 ** (-4 * i / C)


# --- The loss -----------------------------------------------------------------------------------


def _loss_times(factor: Callable[[Array, int], float]) -> Callable[[], list[Patch]]:
    """The loss is multiplied by factor(targets, number of those that count)."""

    def patches() -> list[Patch]:
        original = ops.cross_entropy

        def cross_entropy(logits, targets, ignore_index=None, label_smoothing=0.0, n_targets=None):
            ignored = (
                np.zeros(targets.shape, bool) if ignore_index is None else targets == ignore_index
            )
            n = int((~ignored).sum()) if n_targets is None else n_targets
            c = factor(targets, n)
            loss, backward = original(logits, targets, ignore_index, label_smoothing, n_targets)
            return loss * c, lambda dloss=1.0: backward(float(dloss) * c)

        return [(ops, "cross_entropy", cross_entropy)]

    return patches


def _smoothed_over_the_others() -> list[Patch]:
    """t = 1 - ε at the target and ε / (V - 1) elsewhere: torch's rule with ε V / (V - 1)."""
    original = ops.cross_entropy

    def cross_entropy(logits, targets, ignore_index=None, label_smoothing=0.0, n_targets=None):
        V = logits.shape[-1]
        smoothing = min(label_smoothing * V / max(V - 1, 1), 1.0)
        return original(logits, targets, ignore_index, smoothing, n_targets)

    return [(ops, "cross_entropy", cross_entropy)]


def _nothing_ignored() -> list[Patch]:
    original = ops.cross_entropy

    def cross_entropy(logits, targets, ignore_index=None, label_smoothing=0.0, n_targets=None):
        return original(logits, targets, None, label_smoothing, n_targets)

    return [(ops, "cross_entropy", cross_entropy)]


# --- All of them --------------------------------------------------------------------------------

VARIANTS = [
    Variant("GELU is the tanh approximation", _gelu_as("gelu_tanh")),
    Variant("GELU is the exact one, by erf", _gelu_as("gelu")),
    _norm_variant("LayerNorm's eps is outside the root", unbiased=False, outside=True),
    _norm_variant("LayerNorm's variance is unbiased, over C - 1", unbiased=True, outside=False),
    _norm_variant(
        "LayerNorm's variance is unbiased and its eps outside the root", unbiased=True, outside=True
    ),
    *[
        Variant(f"LayerNorm's eps is {eps:g}", _eps_is(eps))
        for eps in (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)
    ],
    Variant("pre-norm and post-norm are exchanged (norm_first)", _other_placement),
    Variant("the final norm is left out, or is there where it is not asked for", _other_final_norm),
    Variant("a mask's True means the opposite: may not attend", inputs=_inverted_masks),
    Variant("a query with nothing to attend to gives NaN", _masked_as(-np.inf)),
    Variant("a query with nothing to attend to attends to all alike", _masked_as(-1e30)),
    Variant("the causal mask starts at offset 0", _causal(lambda T, S: 0)),
    Variant("the causal mask ends at the last key, offset S - T", _causal(lambda T, S: S - T)),
    Variant("the causal mask leaves out the query's own position", _causal(strict=True)),
    Variant("scores are not divided by √D", _scores_times(lambda q: q.shape[-1] ** 0.5)),
    Variant("scores are divided by D, not √D", _scores_times(lambda q: q.shape[-1] ** -0.5)),
    Variant(
        "scores are divided by √C, the model width, not √D",
        _scores_times(lambda q: (q.shape[-1] / _model_width(q)) ** 0.5),
    ),
    Variant("weights are transposed, stored (in, out)", _transposed_weights),
    Variant("the row of padding_idx gets a gradient", _padding_row_learns),
    Variant(
        "embeddings are scaled by √C where they are not, or the reverse", inputs=_embedding_scale
    ),
    Variant("positions are all sines, then all cosines", _table(_as_printed, "halves")),
    Variant(
        "positions are all sines, then all cosines, the frequency 10000^(-i / (C/2 - 1))",
        _table(_tensor2tensor, "halves"),
    ),
    Variant("the positions' exponent is 2 (2i) / C, twice too much", _table(_columns, "pairs")),
    Variant("positions count from 1", _table(_as_printed, "pairs", first=1)),
    Variant("the loss is a sum, not a mean", _loss_times(lambda targets, n: n)),
    Variant(
        "the loss is divided by the batch, not by the tokens",
        _loss_times(lambda targets, n: n / max(len(np.atleast_1d(targets)), 1)),
    ),
    Variant(
        "the loss is divided by all tokens, the ignored ones too",
        _loss_times(lambda targets, n: n / max(targets.size, 1)),
    ),
    Variant("label smoothing gives ε / (V - 1) to the other classes", _smoothed_over_the_others),
    Variant("no target is ignored", _nothing_ignored),
]
