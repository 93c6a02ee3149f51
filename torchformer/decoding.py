"""From a trained model to an answer: the output grows by one token at a time.

    greedy         the most likely token each time
    beam_search    the most likely answer, as far as a few candidates kept side by side can tell
    sample         a token by its probability: another answer each time

Options are named as in Hugging Face's `generate`.  Pad and start tokens are never chosen, unless
`eos_id` names them.
"""

import math
from itertools import compress

import torch
from torch import Tensor

from npformer.answers import (
    Hypothesis,
    Ids,
    check_beams,
    check_decoding,
    check_rng,
    check_sampling,
    not_finite,
)
from torchformer.cache import Cache
from torchformer.transformer import Transformer


@torch.no_grad()
def greedy(
    model: Transformer, src: Tensor, *, max_len: int, sos_id: int = 1, eos_id: Ids = 2
) -> list[list[int]]:
    """The most likely next token, again and again, until `eos_id` or `max_len` tokens.

    src (B, S) ids   ->   B lists of ids, without `sos_id` and `eos_id`.  Each sample stops on its
    own, and those that are done are no longer computed.

    eos_id   one id or several, each of which ends an answer; None: only max_len does
    """
    max_len, sos_id, allowed, goes_on = choices(model, src, max_len, sos_id, eos_id)
    cache = model.start(src)
    answers: list[list[int]] = [[] for _ in src]
    running = list(range(len(src)))  # the samples that have not stopped
    token = torch.full((len(src),), sos_id, device=src.device)  # (B,)
    while running and cache.length < max_len:
        logits, cache = next_logits(model, token, cache, allowed, running)  # (B, V)
        token = logits.argmax(dim=-1)  # (B,)
        going_on = goes_on[token]
        if not going_on.all():
            running = [*compress(running, going_on.tolist())]
            token, cache = token[going_on], cache.select(going_on)
        for sample, chosen in zip(running, token.tolist(), strict=True):
            answers[sample].append(chosen)
    return answers


@torch.no_grad()
def beam_search(
    model: Transformer,
    src: Tensor,
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
    max_len, sos_id, allowed, goes_on = choices(model, src, max_len, sos_id, eos_id)
    num_beams, num_return_sequences, length_penalty = check_beams(
        num_beams, num_return_sequences, length_penalty, early_stopping, max_len
    )
    cache, B, K, device = model.start(src), len(src), num_beams, src.device
    rows = torch.arange(B, device=device).repeat_interleave(K)
    cache = cache.select(rows)  # beams of a sample side by side
    found: list[list[Hypothesis]] = [[] for _ in src]
    running = list(range(B))  # the samples that have not stopped
    tokens = torch.full((B, K, 1), sos_id, device=device)
    scores = torch.full((B, K), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0
    while running and cache.length < max_len:
        logits, cache = next_logits(model, tokens[:, :, -1].flatten(), cache, allowed, running)
        log_p = logits.double().log_softmax(dim=-1)  # (B K, V)
        V = log_p.shape[-1]
        # Every beginning, gone on with by every token
        extended = (scores.reshape(-1, 1) + log_p).reshape(-1, K * V)  # (B, K V)
        best = torch.argsort(-extended, dim=-1, stable=True)[:, :K]  # (B, K)
        row = torch.arange(len(running), device=device)[:, None]  # (B, 1)
        scores = extended[row, best]  # (B, K)
        places = torch.tensor([K - len(found[sample]) for sample in running])
        scores[torch.arange(K, device=device) >= places.to(device)[:, None]] = -torch.inf
        beam, token = best // V, best % V  # whose continuation, by what   (B, K)
        tokens = torch.cat([tokens[row, beam], token[:, :, None]], dim=-1)

        n = tokens.shape[-1] - 1  # tokens (B, K, 1 + n)
        is_alive = scores.isfinite()
        is_end, is_cut = is_alive & ~goes_on[token], is_alive & (n == max_len)
        for i, k in (is_end | is_cut).nonzero().tolist():
            answer = tokens[i, k, 1:].tolist()
            score = float(scores[i, k]) / n**length_penalty
            found[running[i]].append(Hypothesis(answer[:-1] if is_end[i, k] else answer, score))
        scores[is_end] = -torch.inf

        hope = scores.amax(dim=-1)  # (B,)
        hope /= (max_len if length_penalty > 0 else n + 1) ** length_penalty  # at the very best
        going_on = hope.isfinite()
        if early_stopping:
            for i, sample in enumerate(running):
                top = sorted((h.score for h in found[sample]), reverse=True)
                if len(top) >= num_return_sequences and top[num_return_sequences - 1] >= hope[i]:
                    going_on[i] = False
        rows = (row * K + beam)[going_on].flatten()
        cache, running = cache.select(rows), [*compress(running, going_on.tolist())]
        tokens, scores = tokens[going_on], scores[going_on]
    best_first = (sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found)
    return [hypotheses[:num_return_sequences] for hypotheses in best_first]


@torch.no_grad()
def sample(
    model: Transformer,
    src: Tensor,
    *,
    max_len: int,
    rng: torch.Generator,
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
    max_len, sos_id, allowed, goes_on = choices(model, src, max_len, sos_id, eos_id)
    temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
    check_rng(rng, torch.Generator, "torch.Generator().manual_seed(0)")
    cache = model.start(src)
    answers: list[list[int]] = [[] for _ in src]
    running = list(range(len(src)))
    token = torch.full((len(src),), sos_id, device=src.device)  # (B,)
    while running and cache.length < max_len:
        logits, cache = next_logits(model, token, cache, allowed, running)  # (B, V)
        p = probabilities(logits.double(), temperature, top_k, top_p)  # (B, V)
        token = torch.multinomial(p, 1, generator=rng)[:, 0]  # (B,)
        going_on = goes_on[token]
        if not going_on.all():
            running = [*compress(running, going_on.tolist())]
            token, cache = token[going_on], cache.select(going_on)
        for sample, chosen in zip(running, token.tolist(), strict=True):
            answers[sample].append(chosen)
    return answers


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (B, V)   ->   p (B, V), 0 for the tokens that `top_k` and then `top_p` leave out."""
    ranked, order = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    p = ranked.softmax(dim=-1)
    p[p.cumsum(dim=-1) - p >= top_p] = 0  # those before it have reached top_p already
    return torch.empty_like(p).scatter_(-1, order, p / p.sum(dim=-1, keepdim=True))


def choices(
    model: Transformer, src: Tensor, max_len: int, sos_id: int, eos_id: Ids
) -> tuple[int, int, Tensor, Tensor]:
    """max_len and sos_id, checked; which tokens may be chosen (V,), and which do not end (V,).

    Pad and start may not be chosen, unless `eos_id` names them.
    """
    max_len, sos_id, ends, never = check_decoding(model, max_len, sos_id, eos_id)
    device = src.device if isinstance(src, Tensor) else None  # `start` says what src must be
    allowed, goes_on = torch.ones((2, model.config.tgt_vocab_size), dtype=torch.bool, device=device)
    allowed[never], goes_on[ends] = False, False
    return max_len, sos_id, allowed, goes_on


def next_logits(
    model: Transformer, token: Tensor, cache: Cache, allowed: Tensor, samples: list[int]
) -> tuple[Tensor, Cache]:
    """What may come after `token` (B,): logits (B, V), -inf where not `allowed` (V,).

    Raises ValueError, naming one of `samples`, where there is no most likely token: for NaN, and
    where none of those that are allowed is possible.
    """
    logits, cache = model.step(token[:, None], cache)  # (B, 1, V)
    last = logits[:, -1].masked_fill(~allowed, -torch.inf)  # (B, V)
    top = last.amax(dim=-1).tolist()  # (B,)
    if not all(map(math.isfinite, top)):
        raise not_finite(top, samples, cache.length)
    return last, cache
