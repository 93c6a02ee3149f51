"""From a trained model to an answer: the output grows by one token at a time.

In training all positions are predicted at once, each from the true tokens before it.  Here there
is no truth to look at: each token is chosen from the logits of the last position and then becomes
part of the input.  What was computed for the earlier ones is kept, see cache.py.

    greedy         the most likely token each time
    beam_search    the most likely answer, as far as a few candidates kept side by side can tell
    sample         a token by its probability: another answer each time

Options are named as in Hugging Face's `generate`.  Pad and start tokens are never chosen, unless
`eos_id` names them.
"""

import math
from itertools import compress

import numpy as np

from npformer.answers import (
    Hypothesis,
    Ids,
    check_beams,
    check_decoding,
    check_rng,
    check_sampling,
    not_finite,
)
from npformer.cache import Cache
from npformer.ops import Array, Rng, log_softmax, softmax
from npformer.transformer import Transformer


def greedy(
    model: Transformer, src: Array, *, max_len: int, sos_id: int = 1, eos_id: Ids = 2
) -> list[list[int]]:
    """The most likely next token, again and again, until `eos_id` or `max_len` tokens.

    src (B, S) ids   ->   B lists of ids, without `sos_id` and `eos_id`.  Each sample stops on its
    own, and those that are done are no longer computed.  Ties go to the lower id.

    eos_id   one id or several, each of which ends an answer; None: only max_len does

    Raises ValueError where max_len + 1 exceeds the model's positions, for an id that the vocabulary
    does not have, and for logits that are NaN.  A source is padded on the right: pads before a
    token count as positions, so that its answer is not the one it gets without them.
    """
    max_len, sos_id, allowed, goes_on = choices(model, max_len, sos_id, eos_id)
    cache = model.start(src)
    answers: list[list[int]] = [[] for _ in src]
    running = list(range(len(src)))  # the samples that have not stopped
    token = np.full(len(src), sos_id)  # (B,)
    while running and cache.length < max_len:
        logits, cache = next_logits(model, token, cache, allowed, running)  # (B, V)
        token = logits.argmax(axis=-1)  # (B,)
        going_on = goes_on[token]
        if not going_on.all():
            running = [*compress(running, going_on)]
            token, cache = token[going_on], cache.select(going_on)
        for sample, chosen in zip(running, token.tolist(), strict=True):
            answers[sample].append(chosen)
    return answers


def beam_search(
    model: Transformer,
    src: Array,
    *,
    max_len: int,
    num_beams: int = 5,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = True,
    sos_id: int = 1,
    eos_id: Ids = 2,
) -> list[list[Hypothesis]]:
    """The best answers found by keeping the `num_beams` best beginnings at every length.

    src (B, S) ids   ->   for each sample its `num_return_sequences` best hypotheses, best first;
    fewer where so many cannot be said.  With several ends an answer may come once for each.

    score = log p(tokens) / n ** length_penalty, with n the tokens chosen, the end among them.  A
    beginning that ends leaves the beam, which is narrower from then on   [Sutskever et al. 2014,
    § 3.2]; what `max_len` cuts off counts as it is.  So with one beam this is `greedy`.

    `early_stopping` ends a sample's search as soon as nothing in its beam can become better than
    what it has: it costs no hypothesis.  Raises ValueError for options that make no sense.
    """
    max_len, sos_id, allowed, goes_on = choices(model, max_len, sos_id, eos_id)
    num_beams, num_return_sequences, length_penalty = check_beams(
        num_beams, num_return_sequences, length_penalty, early_stopping, max_len
    )
    cache, B, K = model.start(src), len(src), num_beams
    cache = cache.select(np.repeat(np.arange(B), K))  # beams of a sample side by side
    found: list[list[Hypothesis]] = [[] for _ in src]
    running = list(range(B))  # the samples that have not stopped
    tokens = np.full((B, K, 1), sos_id)
    scores = np.full((B, K), -np.inf)  # log p of each beginning; -inf: nobody is there
    scores[:, 0] = 0
    while running and cache.length < max_len:
        logits, cache = next_logits(model, tokens[:, :, -1].reshape(-1), cache, allowed, running)
        log_p, _ = log_softmax(logits.astype(np.float64))  # (B K, V)
        V = log_p.shape[-1]
        # Every beginning, gone on with by every token
        extended = (scores.reshape(-1, 1) + log_p).reshape(-1, K * V)  # (B, K V)
        best = np.argsort(-extended, axis=-1, kind="stable")[:, :K]  # (B, K)
        row = np.arange(len(running))[:, np.newaxis]  # (B, 1)
        scores = extended[row, best]  # (B, K)
        places = K - np.array([len(found[sample]) for sample in running])  # how wide the beam is
        scores[np.arange(K) >= places[:, np.newaxis]] = -np.inf
        beam, token = np.divmod(best, V)  # whose continuation, by what   (B, K)
        tokens = np.concatenate([tokens[row, beam], token[:, :, np.newaxis]], axis=-1)

        n = tokens.shape[-1] - 1  # tokens (B, K, 1 + n)
        is_alive = np.isfinite(scores)
        is_end, is_cut = is_alive & ~goes_on[token], is_alive & (n == max_len)
        for i, k in zip(*np.nonzero(is_end | is_cut), strict=True):
            answer = tokens[i, k, 1:].tolist()
            score = float(scores[i, k]) / n**length_penalty
            found[running[i]].append(Hypothesis(answer[:-1] if is_end[i, k] else answer, score))
        scores[is_end] = -np.inf

        hope = scores.max(axis=-1)  # (B,)
        hope /= (max_len if length_penalty > 0 else n + 1) ** length_penalty  # at the very best
        going_on = np.isfinite(hope)
        if early_stopping:
            for i, sample in enumerate(running):
                top = sorted((h.score for h in found[sample]), reverse=True)
                if len(top) >= num_return_sequences and top[num_return_sequences - 1] >= hope[i]:
                    going_on[i] = False
        rows = (row * K + beam)[going_on].reshape(-1)
        cache, running = cache.select(rows), [*compress(running, going_on)]
        tokens, scores = tokens[going_on], scores[going_on]
    best_first = (sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found)
    return [hypotheses[:num_return_sequences] for hypotheses in best_first]


def sample(
    model: Transformer,
    src: Array,
    *,
    max_len: int,
    rng: Rng,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sos_id: int = 1,
    eos_id: Ids = 2,
) -> list[list[int]]:
    """Each token drawn by its probability: softmax(logits / temperature), less the unlikely ones.

    src (B, S) ids   ->   B lists of ids, as `greedy` gives them

    temperature    below 1 the likely become likelier, above 1 all become more alike
    top_k          only the k most likely tokens; 0: all
    top_p          only the fewest tokens whose probabilities reach p   [Holtzman et al. 2020]
    """
    max_len, sos_id, allowed, goes_on = choices(model, max_len, sos_id, eos_id)
    temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
    check_rng(rng, np.random.Generator, "np.random.default_rng(0)")
    cache = model.start(src)
    answers: list[list[int]] = [[] for _ in src]
    running, token = list(range(len(src))), np.full(len(src), sos_id)  # (B,)
    while running and cache.length < max_len:
        logits, cache = next_logits(model, token, cache, allowed, running)  # (B, V)
        p = probabilities(logits.astype(np.float64), temperature, top_k, top_p)  # (B, V)
        # The first token at which the running total exceeds a number drawn from [0, 1)
        total = p.cumsum(axis=-1)
        token = (total > rng.random((len(p), 1)) * total[:, -1:]).argmax(axis=-1)  # (B,)
        going_on = goes_on[token]
        if not going_on.all():
            running = [*compress(running, going_on)]
            token, cache = token[going_on], cache.select(going_on)
        for sample, chosen in zip(running, token.tolist(), strict=True):
            answers[sample].append(chosen)
    return answers


def probabilities(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """logits (B, V)   ->   p (B, V), 0 for the tokens that `top_k` and then `top_p` leave out."""
    logits = logits / temperature
    order = np.argsort(-logits, axis=-1, kind="stable")  # (B, V): the likely ones first
    ranked = np.take_along_axis(logits, order, axis=-1)  # (B, V)
    if top_k:
        ranked[:, top_k:] = -np.inf
    p, _ = softmax(ranked)
    p[p.cumsum(axis=-1) - p >= top_p] = 0  # those before it have reached top_p already
    kept = np.empty_like(p)
    np.put_along_axis(kept, order, p / p.sum(axis=-1, keepdims=True), axis=-1)
    return kept


def choices(
    model: Transformer, max_len: int, sos_id: int, eos_id: Ids
) -> tuple[int, int, Array, Array]:
    """max_len and sos_id, checked; which tokens may be chosen (V,), and which do not end (V,).

    Pad and start may not be chosen, unless `eos_id` names them.
    """
    max_len, sos_id, ends, never = check_decoding(model, max_len, sos_id, eos_id)
    allowed, goes_on = np.ones((2, model.config.tgt_vocab_size), bool)
    allowed[never], goes_on[ends] = False, False
    return max_len, sos_id, allowed, goes_on


def next_logits(
    model: Transformer, token: Array, cache: Cache, allowed: Array, samples: list[int]
) -> tuple[Array, Cache]:
    """What may come after `token` (B,): logits (B, V), -inf where not `allowed` (V,).

    Raises ValueError, naming one of `samples`, where there is no most likely token: for NaN, and
    where none of those that are allowed is possible.
    """
    logits, cache = model.step(token[:, np.newaxis], cache)  # (B, 1, V)
    last = np.where(allowed, logits[:, -1], -np.inf)  # (B, V)
    top = last.max(axis=-1).tolist()  # (B,)
    if not all(map(math.isfinite, top)):
        raise not_finite(top, samples, cache.length)
    return last, cache
