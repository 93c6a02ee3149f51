"""Greedy decoding with nothing but fixed shapes, so that it can be compiled and replayed.

decoding.py is the form to read: its cache grows, and those samples that are done leave the batch.
Each of that is another shape for the GPU, and a question that the CPU has to ask it.  Here

    the cache has room for the whole answer from the start, and is written in place
    the position is a tensor, and what lies after it is masked
    q, k and v are one product, of weights laid together beforehand
    on the CPU, products of few rows are oneDNN's, in its own layout, where that is faster
    everybody decodes to the end; who has ended is looked at every few tokens

and on CUDA one step is one graph, launched at once.  The tokens are those of decoding.greedy.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npformer import answers
from npformer.answers import Ids
from npformer.options import integer
from torchformer.cache import Cache, around
from torchformer.transformer import Transformer

Step = Callable[[Tensor, Tensor, int | None], Tensor]  # StaticDecoder.step


@torch.no_grad()
def greedy(
    model: Transformer,
    src: Tensor,
    *,
    max_len: int,
    sos_id: int = 1,
    eos_id: Ids = 2,
    look_every: int = 8,
    compiled: bool | None = None,
) -> list[list[int]]:
    """As decoding.greedy: the most likely next token until `eos_id` or `max_len` tokens.

    look_every   tokens between two looks whether everybody has ended: each look is a wait
    compiled     torch.compile the step, and record it as a CUDA graph; by default on CUDA
    """
    max_len, sos_id, ends, never = answers.check_decoding(model, max_len, sos_id, eos_id)
    prompt = torch.full((len(src), 1), sos_id, device=src.device)
    chosen = _continued(model, prompt, max_len, src, never, ends, look_every, compiled)
    return [up_to(row, ends) for row in chosen.tolist()]


@torch.no_grad()
def continued(
    model: Transformer,
    prompt: Tensor,
    n_tokens: int,
    *,
    src: Tensor | None = None,
    never: list[int] | None = None,
    eos_id: Ids = None,
    look_every: int = 8,
    compiled: bool | None = None,
) -> Tensor:
    """The `n_tokens` most likely tokens after `prompt`, one after the other.

    prompt (B, P)   src (B, S), or None for a decoder-only model   ->   tokens (B, n_tokens)

    never    tokens that are not chosen; nor is the pad, unless it is an `eos_id`
    eos_id   once every sample has chosen it, or one of several, the rest is left as it, or the
             first of them; None: nobody ends

    Raises ValueError for a pad in the prompt: prompts of one length are continued together, those
    of another in another call.
    """
    V, pad_id = model.config.tgt_vocab_size, model.config.tgt_pad_id
    ends = answers.end_ids(eos_id, V)
    pads = [] if pad_id in ends else [pad_id]  # a pad is not attended to, and here all are
    never = answers.never_ids([*(never or []), *pads], ends, V)
    model._check_ids("prompt", "(B, P)", prompt)
    if bool((prompt == pad_id).any()):
        raise ValueError(
            f"prompt has pads (tgt_pad_id = {pad_id}), so its rows differ in length, and would not "
            "be continued as each is alone: continue those of one length together, without pads"
        )
    return _continued(model, prompt, n_tokens, src, never, ends, look_every, compiled)


def _continued(
    model: Transformer,
    prompt: Tensor,
    n_tokens: int,
    src: Tensor | None,
    never: list[int],
    ends: list[int],
    look_every: int,
    compiled: bool | None,
) -> Tensor:
    B, P = prompt.shape
    n_tokens, look_every = integer("n_tokens", n_tokens, 1), integer("look_every", look_every, 1)
    answers.check_max_len(P + n_tokens - 1, model.config.max_len)
    if B == 0:
        return prompt.new_empty((0, n_tokens))
    logits, cache = model.step(prompt, model.start(src))  # (B, P, V)
    is_compiled = prompt.is_cuda if compiled is None else compiled
    is_packed = not is_compiled and n_tokens >= 16 and packing_pays(model, cache, prompt[:, -1])
    decoder = StaticDecoder(model, cache, P + n_tokens, never, is_packed)
    tokens = torch.full((B, n_tokens), ends[0] if ends else 0, device=prompt.device)
    end_tokens = torch.tensor(ends, dtype=tokens.dtype, device=prompt.device)
    token = decoder.choose(logits[:, -1], decoder.position - 1)  # (B,)
    # Not fullgraph, nor one shape only: past dynamo's limit of shapes a step runs as it is written
    step: Step = torch.compile(decoder.step) if is_compiled else decoder.step
    if is_compiled and prompt.is_cuda:
        step = Recorded(step, token, decoder.position)
    for i in range(n_tokens):
        tokens[:, i] = token
        if i + 1 == n_tokens:
            break
        is_look = ends and i % look_every == look_every - 1
        if is_look and torch.isin(tokens[:, : i + 1], end_tokens).any(dim=1).all():
            break
        # One graph needs one shape: all of the room.  Without, what is not there yet is left out
        n_seen = None if is_compiled else P + i + 1
        token = step(token, decoder.position, n_seen)
        decoder.position += 1
    not_finite = (~decoder.top.T.isfinite()).nonzero().tolist()  # the earliest position first
    if not_finite:
        at, sample = not_finite[0]
        raise answers.not_finite([float(decoder.top[sample, at])], [sample], at - P + 2)
    return tokens


class Recorded:
    """A step as one CUDA graph: its kernels are recorded here, and launched at once by each call.

    A graph reads and writes where it did when it was recorded.  So `token` is copied to its place,
    `position` must be the same tensor, moved in place, and the result is written over next time.
    (torch.compile's own graphs refuse: the keys and values, written in place, are no parameters.)
    """

    def __init__(self, step: Step, token: Tensor, position: Tensor):
        self.token = token.clone()
        call = partial(step, self.token, position, None)
        self.graph, self.next = record(call)

    def __call__(self, token: Tensor, position: Tensor, n_seen: int | None) -> Tensor:
        self.token.copy_(token)
        self.graph.replay()
        return self.next


def record(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `call`, and where its result will be.  `call` runs three times before."""
    stream = torch.cuda.Stream()  # not the default one, which cannot be recorded
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is made once, compiled kernels and workspaces, is made now
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def up_to(tokens: list[int], ends: list[int]) -> list[int]:
    places = (i for i, token in enumerate(tokens) if token in ends)
    return tokens[: next(places, None)]


class StaticDecoder:
    """A model and the caches of one batch, from which `step` makes the next token.

    room     positions to make room for
    never    tokens that are not chosen
    packed   see `product`; what is compiled cannot read such weights
    """

    def __init__(
        self, model: Transformer, cache: Cache, room: int, never: list[int], packed: bool = False
    ):
        device, dtype = model.tgt_embedding.weight.device, model.tgt_embedding.weight.dtype
        assert cache.tgt_mask is not None  # the prompt has been read
        self.model, self.room, self.packed = model, room, packed
        self.position = torch.tensor([cache.length], device=device)  # of the next token
        self.forbidden = torch.zeros(model.config.tgt_vocab_size, dtype=torch.bool, device=device)
        self.forbidden[never] = True
        # The logit of the token chosen at each position: NaN if any was   (B, room)
        self.top = torch.zeros((len(cache.tgt_mask), room), dtype=dtype, device=device)
        positions: Any = model.tgt_positions
        table = positions.table if hasattr(positions, "table") else positions.weight
        self.positions = table[:room].to(dtype)  # (room, C)
        # A pad in the prompt stays masked; what is decoded here is attended to
        B, self.has_pads = len(cache.tgt_mask), not bool(cache.tgt_mask.all())
        self.known = torch.ones((B, 1, 1, room), dtype=torch.bool, device=device)
        self.known[..., : cache.length] = cache.tgt_mask
        self.places = torch.arange(room, device=device)
        self.memory_open = self.has_memory = None  # no mask: every kernel is faster without one
        if cache.memory_mask is not None and not bool(cache.memory_mask.all()):
            some = cache.memory_mask.any(dim=-1, keepdim=True)  # (B, 1, 1, 1)
            self.memory_open = cache.memory_mask | ~some
            self.has_memory = None if bool(some.all()) else some
        self.head = product(model.head or model.tgt_embedding, packed=packed)  # tied: the table
        self.layers = [
            StaticLayer(layer, held, room, packed)
            for layer, held in zip(model.decoder.layers, cache.layers, strict=True)
        ]

    def step(self, token: Tensor, position: Tensor, n_seen: int | None) -> Tensor:
        """token (B,) at `position` (1,)   ->   the most likely next token (B,)

        n_seen   position + 1, to read no more of the room; None: all of it, and mask the rest
        """
        model = self.model
        scale = math.sqrt(model.config.d_model) if model.config.scale_embedding else 1.0
        x = model.tgt_embedding(token) * scale + self.positions[position]  # (B, C)
        if n_seen is None:
            visible = self.known & (self.places <= position)  # (B, 1, 1, room)
        else:
            visible = self.known[..., :n_seen] if self.has_pads else None  # (B, 1, 1, n_seen)
        for layer in self.layers:
            x = layer.step(x, position, n_seen, visible, self.memory_open, self.has_memory)
        y = model.decoder.norm(x) if model.decoder.norm else x
        return self.choose(self.head(y), position)

    def choose(self, logits: Tensor, position: Tensor) -> Tensor:
        """logits (B, V) of what comes after `position` (1,)   ->   the most likely token (B,)"""
        top, token = logits.masked_fill(self.forbidden, -torch.inf).max(dim=-1)
        self.top.index_copy_(1, position, top[:, None])
        return token


class StaticLayer:
    """One decoder layer with its keys and values (B, H, room, D), written in place."""

    def __init__(self, layer: Any, held: Any, room: int, packed: bool):
        self.layer = layer
        own, wide = layer.self_attn, layer.feed_forward
        self.qkv = product(own.q_proj, own.k_proj, own.v_proj, packed=packed)
        self.own_out = product(own.out_proj, packed=packed)
        if held.memory:
            across = layer.cross_attn
            self.ask = product(across.q_proj, packed=packed)
            self.memory_out = product(across.out_proj, packed=packed)
        self.expand = product(wide.linear1, packed=packed)
        self.contract = product(wide.linear2, packed=packed)
        self.keys, self.values = (self._room(x, room) for x in (held.own.keys, held.own.values))
        self.memory: Any = held.memory

    @staticmethod
    def _room(x: Tensor, room: int) -> Tensor:
        B, H, S, D = x.shape
        larger = x.new_zeros((B, H, room, D))
        larger[:, :, :S] = x
        return larger

    def step(
        self,
        x: Tensor,
        position: Tensor,
        n_seen: int | None,
        visible: Tensor | None,
        memory_open: Tensor | None,
        has_memory: Tensor | None,
    ) -> Tensor:
        """x (B, C)   ->   y (B, C), as the layer makes it of the one new position."""
        layer = self.layer
        B, C = x.shape

        def look_back(x: Tensor) -> Tensor:
            heads = self.qkv(x).view(B, 3, -1, 1, layer.self_attn.d_head)
            q, k, v = heads.unbind(1)  # (B, H, 1, D)
            self.keys.index_copy_(2, position, k)
            self.values.index_copy_(2, position, v)
            keys, values = self.keys[:, :, :n_seen], self.values[:, :, :n_seen]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
            return self.own_out(y.reshape(B, C))

        def ask_memory(x: Tensor) -> Tensor:
            q = self.ask(x).view(B, -1, 1, layer.cross_attn.d_head)  # (B, H, 1, D)
            keys, values = self.memory.keys, self.memory.values
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=memory_open)
            if has_memory is not None:
                y = torch.where(has_memory, y, 0)
            return self.memory_out(y.reshape(B, C))

        def feed_forward(x: Tensor) -> Tensor:
            return self.contract(layer.feed_forward.activation(self.expand(x)))

        norms = [layer.norm1, layer.norm2]
        x = around(look_back, x, norms[0], layer.norm_first)
        if self.memory is not None:
            x = around(ask_memory, x, norms[1], layer.norm_first)
            norms.append(layer.norm3)
        return around(feed_forward, x, norms[-1], layer.norm_first)


def product(
    first: nn.Linear | nn.Embedding, *others: nn.Linear, packed: bool
) -> Callable[[Tensor], Tensor]:
    """x (..., C)   ->   what linears make of it, side by side, by one product.

    For few rows, reading the weights is most of the work.  `packed`, on the CPU: oneDNN reads them
    as they lie, where the BLAS behind F.linear rearranges them first, every time; see packing_pays.
    """
    weight: Tensor = first.weight
    bias: Any = first.bias if isinstance(first, nn.Linear) else None
    if others:
        weight = torch.cat([weight, *(part.weight for part in others)])
        bias = torch.cat([bias, *(part.bias for part in others)])
    if packed and can_pack(weight):
        w, b = weight.to_mkldnn(), None if bias is None else bias.to_mkldnn()
        return lambda x: F.linear(x.to_mkldnn(), w, b).to_dense()
    return lambda x: F.linear(x, weight, bias)


def can_pack(weight: Tensor) -> bool:
    is_float32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_float32_on_cpu and torch.backends.mkldnn.is_available()


def packing_pays(model: Transformer, cache: Cache, token: Tensor) -> bool:
    """Is a step with packed weights the faster one, on this machine?   token (B,)

    It depends on whose the processor is: Intel's MKL rearranges as fast as oneDNN reads, on AMD's
    oneDNN may be twice as fast.  So it is tried, once for each shape of model and batch.
    """
    if not can_pack(model.tgt_embedding.weight):
        return False
    key = (model.config, len(token), torch.get_num_threads())
    if key not in _PAYS:
        n_seen = cache.length + 1
        plain, packed = (StaticDecoder(model, cache, n_seen, [], p) for p in (False, True))
        times: dict[StaticDecoder, list[float]] = {plain: [], packed: []}
        for _ in range(3):
            for decoder, took in times.items():
                start = time.perf_counter()
                decoder.step(token, decoder.position, n_seen)
                took.append(time.perf_counter() - start)
        _PAYS[key] = min(times[packed]) < min(times[plain])
    return _PAYS[key]


_PAYS: dict[Any, bool] = {}  # what packing_pays has found out
