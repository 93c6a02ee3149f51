"""Greedy decoding with nothing but fixed shapes, so that it can be compiled and replayed.

decoding.py is the form to read: its cache grows, and those samples that are done leave the batch.
Each of that is another shape for the GPU, and a question that the CPU has to ask it.  Here

    the cache has room for the whole answer from the start, and is written in place
    the position is a tensor, and what lies after it is masked
    q, k and v are one product, of weights laid together beforehand
    on the CPU, products of few rows are oneDNN's, in its own layout, where that is faster
    everybody decodes to the end; who has ended is looked at every few tokens

and on CUDA one step is one graph, launched at once.  The tokens are those of decoding.greedy.

    decoder = FastDecoder(model, batch_size, room)      # once: caches and graph stay
    first = decoder.prefill(prompt)                     # (B,): what comes after the prompt
    tokens = decoder.decode(n_tokens)                   # (B, n_tokens): and what after that
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npformer import answers
from npformer.answers import Ids
from npformer.options import integer
from torchformer import ops
from torchformer.cache import Cache, around
from torchformer.captured import aside, record
from torchformer.transformer import Transformer

Step = Callable[[Tensor, Tensor, int | None], Tensor]  # StaticDecoder.step
ALIGNED = 64  # the room's length is a multiple of it: masks then lie as the kernels want them


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
    compiled     torch.compile the step; by default on CUDA
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
    never: Iterable[int] | None = None,
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
    never = answers.never_ids([*([] if never is None else never), *pads], ends, V)
    model._check_ids("prompt", "(B, P)", prompt)
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
    model._check_source(src)
    B, P = prompt.shape
    n_tokens, look_every = integer("n_tokens", n_tokens, 1), integer("look_every", look_every, 1)
    room = answers.check_max_len(P + n_tokens - 1, model.config.max_len)
    if B == 0:
        return prompt.new_empty((0, n_tokens))
    src_len = 0 if src is None else src.shape[1]
    decoder = FastDecoder(model, B, room, src_len=src_len, never=never, compiled=compiled)
    return decoder.continued(prompt, n_tokens, src, ends, look_every)


class FastDecoder:
    """Decoding of one batch after the other: the caches and the recorded step are made once.

    batch_size   B: of all the batches
    room         positions of a prompt and of what follows it, less the last one, which nobody reads
    src_len      S: the longest source, 0 for a decoder-only model; shorter ones are padded
    never        tokens that are not chosen
    compiled     torch.compile the step; None: on CUDA
    recorded     the step is one CUDA graph; None: on CUDA

    `recording_seconds` is what it took to compile and to record.  Changed weights are seen, but for
    those that were laid together: call `read_weights` then.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        room: int,
        *,
        src_len: int = 0,
        never: Iterable[int] = (),
        compiled: bool | None = None,
        recorded: bool | None = None,
    ):
        if not 1 <= room <= model.config.max_len:
            most = model.config.max_len
            raise ValueError(f"room must be 1 to {most} positions (max_len), got {room}")
        never = answers.never_ids(never, [], model.config.tgt_vocab_size)
        device = model.tgt_embedding.weight.device
        is_cuda = device.type == "cuda"
        is_compiled = is_cuda if compiled is None else compiled
        is_recorded = is_cuda if recorded is None else recorded
        # One graph needs one shape: all of the room.  Without, what is not there yet is left out
        self.is_fixed = is_compiled or is_recorded
        packed = not self.is_fixed and room >= 16 and packing_pays(model, batch_size)
        self.model, self.room, self.length = model, room, 0
        aligned = -(-room // ALIGNED) * ALIGNED if self.is_fixed else room
        self.decoder = StaticDecoder(model, batch_size, aligned, src_len, never, packed)
        self.token = torch.zeros(batch_size, dtype=torch.int64, device=device)  # the last one
        # Not fullgraph, nor one shape only: past dynamo's limit of shapes it runs as it is written
        self.step: Step = torch.compile(self.decoder.step) if is_compiled else self.decoder.step
        self.replay: Callable[[], None] | None = None
        started = time.perf_counter()
        if is_recorded:
            self._record(torch.cuda.Stream() if is_cuda else None)
        self.recording_seconds = time.perf_counter() - started if is_recorded else 0.0

    def _record(self, stream: Any) -> None:
        """The step as a graph.  It reads and writes where it does now, so all is changed in place.

        (torch.compile's own graphs refuse: keys and values, written in place, are no parameters.)
        """
        with aside(stream):
            for _ in range(3):  # what is made once, compiled kernels and workspaces, is made now
                self.decoder.position.zero_()
                self._advance(None)
        graph, _ = record(partial(self._advance, None), stream)
        self.replay = graph.replay

    def _advance(self, n_seen: int | None) -> None:
        self.token.copy_(self.step(self.token, self.decoder.position, n_seen))
        self.decoder.position += 1

    @torch.no_grad()
    def read_weights(self) -> None:
        """After an update of the model's weights."""
        self.decoder.read_weights()

    @torch.no_grad()
    def prefill(self, prompt: Tensor, src: Tensor | None = None) -> Tensor:
        """Begin anew: read the prompt at once, and choose what comes after it.

        prompt (B, P)   src (B, S), or None for a decoder-only model   ->   tokens (B,)
        """
        B, P = prompt.shape
        if len(self.token) != B or not 1 <= P <= self.room:
            expected = f"({len(self.token)}, 1 to {self.room})"
            raise ValueError(f"prompt must be {expected}: batch_size, room; got {(B, P)}")
        if src is not None:
            pads = self.decoder.src_len - src.shape[1]
            if pads < 0:
                longest = self.decoder.src_len
                raise ValueError(f"src has {src.shape[1]} positions, at most {longest} (src_len)")
            src = F.pad(src, (0, pads), value=self.model.config.src_pad_id)
        logits, cache = self.model.step(prompt, self.model.start(src))  # (B, P, V)
        self.decoder.fill(cache, self.is_fixed)
        self.length = P
        self.token.copy_(self.decoder.choose(logits[:, -1], self.decoder.position - 1))
        return self.token.clone()

    @torch.no_grad()
    def decode(self, n_tokens: int, ends: Iterable[int] = (), look_every: int = 8) -> Tensor:
        """The `n_tokens` after the last one: one step each.   ->   tokens (B, n_tokens)

        ends   once every sample has chosen one of them, the rest is left as the first of them
        """
        n_tokens = integer("n_tokens", n_tokens, 0)
        look_every = integer("look_every", look_every, 1)
        ends = [answers.token_id("ends", end, len(self.decoder.forbidden)) for end in ends]
        if self.length + n_tokens > self.room:
            raise ValueError(
                f"{n_tokens} tokens more than {self.length} do not fit into the room of {self.room}"
            )
        tokens = self.token.new_full((len(self.token), 1 + n_tokens), ends[0] if ends else 0)
        tokens[:, 0] = self.token
        end_tokens = self.token.new_tensor(ends)
        for i in range(1, 1 + n_tokens):
            is_look = ends and i % look_every == 0
            if is_look and torch.isin(tokens[:, :i], end_tokens).any(dim=1).all():
                break
            self.length += 1
            if self.replay:
                self.replay()
            else:
                self._advance(None if self.is_fixed else self.length)
            tokens[:, i] = self.token
        return tokens[:, 1:]

    def continued(
        self,
        prompt: Tensor,
        n_tokens: int,
        src: Tensor | None = None,
        ends: Iterable[int] = (),
        look_every: int = 8,
    ) -> Tensor:
        """prompt (B, P)   ->   tokens (B, n_tokens): prefill and decode.

        Raises ValueError for a pad in the prompt, and where the logits are not finite.
        """
        is_pad = prompt == self.model.config.tgt_pad_id
        is_start = is_pad.shape[1] == 1 and bool(is_pad.all())  # answers may start with the pad
        if bool(is_pad.any()) and not is_start:
            raise ValueError(
                "prompt has pads, so its rows differ in length, and would not be continued as each "
                "is alone: continue those of one length together, without pads"
            )
        first = self.prefill(prompt, src)
        tokens = torch.cat([first[:, None], self.decode(n_tokens - 1, ends, look_every)], dim=1)
        top = self.decoder.top
        not_finite = (~top.T.isfinite()).nonzero().tolist()  # the earliest position first
        if not_finite:
            at, sample = not_finite[0]
            n = at - prompt.shape[1] + 2
            raise answers.not_finite([float(top[sample, at])], [sample], n)
        return tokens


def up_to(tokens: list[int], ends: Sequence[int]) -> list[int]:
    places = (i for i, token in enumerate(tokens) if token in ends)
    return tokens[: next(places, None)]


class StaticDecoder:
    """A model and the caches of one batch, from which `step` makes the next token.

    room     positions to make room for
    packed   see `Product`; what is compiled cannot read such weights
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        room: int,
        src_len: int = 0,
        never: Sequence[int] = (),
        packed: bool = False,
    ):
        device, dtype = model.tgt_embedding.weight.device, model.tgt_embedding.weight.dtype
        self.model, self.packed, self.src_len = model, packed, src_len
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the next token
        self.forbidden = torch.zeros(model.config.tgt_vocab_size, dtype=torch.bool, device=device)
        self.forbidden[list(never)] = True
        # The logit of the token chosen at each position: NaN if any was   (B, room)
        self.top = torch.zeros((batch_size, room), dtype=dtype, device=device)
        positions: Any = model.tgt_positions
        table = positions.table if hasattr(positions, "table") else positions.weight
        self.positions = table[:room].to(dtype)  # (room, C)
        self.places = torch.arange(room, device=device)
        yes = partial(torch.ones, dtype=torch.bool, device=device)
        self.known, self.has_pads = yes((batch_size, 1, 1, room)), False
        self.memory_known: Any = yes((batch_size, 1, 1, src_len)) if src_len else None
        self.memory_mask = self.memory_known
        self.head = Product(model.head or model.tgt_embedding, packed=packed)  # tied: the table
        self.layers = [
            StaticLayer(layer, batch_size, room, src_len, packed) for layer in model.decoder.layers
        ]

    def read_weights(self) -> None:
        self.head.read_weights()
        for layer in self.layers:
            for x in vars(layer).values():
                if isinstance(x, Product):
                    x.read_weights()

    def fill(self, cache: Cache, is_fixed: bool) -> None:
        """Begin with what the model has made of a prompt.

        A pad in it stays masked; what is decoded here is attended to.  Unless the shapes are fixed,
        the masks are looked at: every kernel is faster without one.
        """
        for layer, held in zip(self.layers, cache.layers, strict=True):
            layer.keys[:, :, : cache.length] = held.own.keys
            layer.values[:, :, : cache.length] = held.own.values
            if self.src_len:
                layer.memory_keys.copy_(held.memory.keys)
                layer.memory_values.copy_(held.memory.values)
        self.known.fill_(True)
        self.known[..., : cache.length] = cache.tgt_mask
        self.position.fill_(cache.length)
        self.top.zero_()
        if self.src_len:
            self.memory_known.copy_(cache.memory_mask)
        if not is_fixed:
            self.has_pads = not bool(self.known.all())
            is_full = self.src_len and bool(self.memory_known.all())
            self.memory_mask = None if is_full else self.memory_known

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
            x = layer.step(x, position, n_seen, visible, self.memory_mask)
        y = model.decoder.norm(x) if model.decoder.norm else x
        return self.choose(self.head(y), position)

    def choose(self, logits: Tensor, position: Tensor) -> Tensor:
        """logits (B, V) of what comes after `position` (1,)   ->   the most likely token (B,)"""
        top, token = logits.masked_fill(self.forbidden, -torch.inf).max(dim=-1)
        self.top.index_copy_(1, position, top[:, None])
        return token


class StaticLayer:
    """One decoder layer with its keys and values (B, H, room, D), written in place."""

    def __init__(self, layer: Any, batch_size: int, room: int, src_len: int, packed: bool):
        self.layer = layer
        own, wide = layer.self_attn, layer.feed_forward
        self.qkv = Product(own.q_proj, own.k_proj, own.v_proj, packed=packed)
        self.own_out = Product(own.out_proj, packed=packed)
        n_heads = own.q_proj.out_features // own.d_head

        def empty(length: int) -> Tensor:
            return own.q_proj.weight.new_zeros((batch_size, n_heads, length, own.d_head))

        self.keys, self.values = empty(room), empty(room)
        self.has_memory = src_len > 0
        if self.has_memory:
            across = layer.cross_attn
            self.ask = Product(across.q_proj, packed=packed)
            self.memory_out = Product(across.out_proj, packed=packed)
            self.memory_keys, self.memory_values = empty(src_len), empty(src_len)
        self.expand = Product(wide.linear1, packed=packed)
        self.contract = Product(wide.linear2, packed=packed)

    def step(
        self,
        x: Tensor,
        position: Tensor,
        n_seen: int | None,
        visible: Tensor | None,
        memory_mask: Tensor | None,
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
            y = ops.attention(q, keys, values, visible)
            return self.own_out(y.reshape(B, C))

        def ask_memory(x: Tensor) -> Tensor:
            q = self.ask(x).view(B, -1, 1, layer.cross_attn.d_head)  # (B, H, 1, D)
            y = ops.attention(q, self.memory_keys, self.memory_values, memory_mask)
            return self.memory_out(y.reshape(B, C))

        def feed_forward(x: Tensor) -> Tensor:
            return self.contract(layer.feed_forward.activation(self.expand(x)))

        norms = [layer.norm1, layer.norm2]
        x = around(look_back, x, norms[0], layer.norm_first)
        if self.has_memory:
            x = around(ask_memory, x, norms[1], layer.norm_first)
            norms.append(layer.norm3)
        return around(feed_forward, x, norms[-1], layer.norm_first)


class Product:
    """x (..., C)   ->   what linears make of it, side by side, by one product.

    For few rows, reading the weights is most of the work.  `packed`, on the CPU: oneDNN reads them
    as they lie, where the BLAS behind F.linear rearranges them first, every time; see packing_pays.
    """

    def __init__(self, first: nn.Linear | nn.Embedding, *others: nn.Linear, packed: bool):
        self.parts = (first, *others)
        self.packed = packed and can_pack(first.weight)
        self.weight = self._side_by_side("weight")
        self.bias: Any = self._side_by_side("bias") if isinstance(first, nn.Linear) else None
        self._pack()

    def _side_by_side(self, name: str) -> Tensor:
        parts = [getattr(part, name) for part in self.parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _pack(self) -> None:
        if self.packed:
            self.w = self.weight.to_mkldnn()
            self.b = None if self.bias is None else self.bias.to_mkldnn()

    def read_weights(self) -> None:
        """In place, where they were copied: a recorded step goes on reading there."""
        if len(self.parts) > 1:
            self.weight.copy_(self._side_by_side("weight"))
            self.bias.copy_(self._side_by_side("bias"))
        self._pack()

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return F.linear(x.to_mkldnn(), self.w, self.b).to_dense()
        return F.linear(x, self.weight, self.bias)


def can_pack(weight: Tensor) -> bool:
    is_float32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_float32_on_cpu and torch.backends.mkldnn.is_available()


def packing_pays(model: Transformer, batch_size: int) -> bool:
    """Is a step with packed weights the faster one, on this machine?

    It depends on whose the processor is: Intel's MKL rearranges as fast as oneDNN reads, on AMD's
    oneDNN may be twice as fast.  So it is tried, once for each shape of model and batch.
    """
    if not can_pack(model.tgt_embedding.weight):
        return False
    key = (model.config, batch_size, torch.get_num_threads())
    if key not in _PAYS:
        src_len = 1 if model.encoder else 0
        plain, packed = (
            StaticDecoder(model, batch_size, 1, src_len, packed=p) for p in (False, True)
        )
        token = torch.zeros(batch_size, dtype=torch.int64)
        times: dict[StaticDecoder, list[float]] = {plain: [], packed: []}
        for _ in range(3):
            for decoder, took in times.items():
                start = time.perf_counter()
                decoder.step(token, decoder.position, 1)
                took.append(time.perf_counter() - start)
        _PAYS[key] = min(times[packed]) < min(times[plain])
    return _PAYS[key]


_PAYS: dict[Any, bool] = {}  # what packing_pays has found out
