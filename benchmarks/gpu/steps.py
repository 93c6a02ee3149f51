"""One training step, as the trainer makes it, and those that it is compared with."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchformer
from benchmarks.configs import Size
from benchmarks.gpu.shapes import Setting
from benchmarks.torch_reference import TorchTransformer, to_reference
from npformer import TransformerConfig
from npformer.tasks import Batch
from torchformer.captured import CapturedStep, options_of
from torchformer.decoder import DecoderLayer
from torchformer.encoder import EncoderLayer
from torchformer.training import add_gradients, count_targets, cross_entropy, train_step
from torchformer.transformer import as_numpy

# --- Batches ----------------------------------------------------------------------------------


def full_batches(setting: Setting) -> list[Batch]:
    """Four, random and without a pad.   src (B, T)   tgt (B, T + 1)"""
    rng, B, T = np.random.default_rng(0), setting.batch, setting.length
    vocab = setting.config.tgt_vocab_size
    return [
        Batch(rng.integers(3, vocab, (B, T)), rng.integers(3, vocab, (B, T + 1))) for _ in range(4)
    ]


def pairs(setting: Setting) -> Batch:
    """Four batches of them, of lengths from a quarter of the full one to all of it, 0 after it."""
    rng, T = np.random.default_rng(0), setting.length
    lengths = rng.integers(T // 4, T + 1, 4 * setting.batch)[:, np.newaxis]
    vocab = setting.config.tgt_vocab_size
    src = rng.integers(3, vocab, (len(lengths), T)) * (np.arange(T) < lengths)
    tgt = rng.integers(3, vocab, (len(lengths), T + 1)) * (np.arange(T + 1) < lengths + 1)
    return Batch(src, tgt)


def ragged_batches(setting: Setting, how: str) -> list[Batch]:
    """All pairs, in four batches or about four:

    padded      as they come, to the full length
    by length   those of like length together, to the longest among them (and to a multiple of 8, as
                tensor cores like it)
    by tokens   so too, and of the shorter ones more: no batch has more tokens than a padded one
    """
    src, tgt = pairs(setting)
    lengths = (src != 0).sum(axis=1)
    if how == "padded":
        parts = np.split(np.arange(len(lengths)), 4)
    else:
        order = np.argsort(lengths, kind="stable")
        parts = np.split(order, 4) if how == "by length" else list(by_tokens(order, setting))
    batches = []
    for part in parts:
        T = setting.length if how == "padded" else rounded_up(lengths[part].max())
        batches.append(Batch(src[part, :T], tgt[part, : T + 1]))
    return batches


def by_tokens(order: np.ndarray, setting: Setting) -> Iterator[np.ndarray]:
    """From the longest down, as many at a time as have room."""
    lengths = (pairs(setting).src != 0).sum(axis=1)
    room = setting.batch * setting.length
    while len(order):
        n = max(1, room // rounded_up(lengths[order[-1]]))
        order, part = order[:-n], order[-n:]
        yield part


def rounded_up(length: int) -> int:
    return math.ceil(length / 8) * 8


# --- Models -----------------------------------------------------------------------------------


class OnDevice(torchformer.Transformer):
    """A Transformer that draws its weights where they are to be: a billion take the host a minute.

    By the rule of torchformer.Transformer.initialise; the numbers are others.
    """

    @torch.no_grad()
    def initialise(self, rng: np.random.Generator) -> None:
        torch.manual_seed(0)
        for name, parameter in self.named_parameters():
            if "embedding" in name or "positions" in name:
                nn.init.normal_(parameter, std=self.config.d_model**-0.5)
                if "embedding" in name:
                    parameter[self.config.tgt_pad_id] = 0
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif "norm" not in name:
                parameter.zero_()


def make_model(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> torchformer.Transformer:
    with device:
        return OnDevice(config, np.random.default_rng(0), dtype, device)


class Reference(TorchTransformer):
    """torch.nn.Transformer with the weights of a torchformer of A, and masks for its pads."""

    def __init__(self, setting: Setting, weights: dict[str, np.ndarray], masks: bool):
        c = setting.config
        shape = (c.d_model, c.n_encoder_layers, c.n_heads, c.d_ff, c.tgt_vocab_size)
        super().__init__(Size("A", *shape, setting.batch, setting.length), masks=masks)
        self.src_embedding = self.tgt_embedding
        self.head = nn.Linear(c.d_model, c.tgt_vocab_size, bias=False)
        self.head.weight = self.tgt_embedding.weight
        state = {name: torch.from_numpy(w) for name, w in to_reference(weights).items()}
        missing, unexpected = self.load_state_dict(state, strict=False)
        assert set(missing) <= {"src_embedding.weight", "head.weight"}, missing  # the same weight
        assert not unexpected, unexpected


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: as_numpy(w) for name, w in model.state_dict().items()}


# --- The step ---------------------------------------------------------------------------------


def compiler(device: torch.device) -> str:
    """Of torch.compile.  On a CPU it only takes the graph: C++ would take longer than the rest."""
    return "inductor" if device.type == "cuda" else "eager"


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """As the trainer does it: layer by layer, which are all of one graph or two."""
    torch._dynamo.config.recompile_limit = 64  # of shapes and of levers; eight are its own idea
    for layer in model.modules():
        if isinstance(layer, EncoderLayer | DecoderLayer):
            layer.compile(fullgraph=True, dynamic=False, backend=compiler(device))


class Step:
    """torchformer.training.train_step with AdamW, on another batch each time.

    model     None: a torchformer of the setting
    compiled  ours layer by layer, and the loss
    captured  as one CUDA graph for each shape, recorded by the first call of it
    """

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        *,
        model: nn.Module | None = None,
        batches: list[Batch] | None = None,
        bf16: bool = True,
        compiled: bool = True,
        fused: bool = True,
        captured: bool = False,
    ):
        self.setting, self.device, self.bf16 = setting, device, bf16
        self.is_ours = model is None or isinstance(model, torchformer.Transformer)
        self.model: Any = make_model(setting.config, device) if model is None else model.to(device)
        if self.is_ours:
            self.model.right_padded = True
            if compiled:
                compile_layers(self.model, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-4, fused=fused or None, capturable=captured
        )
        self.batches, self.i = batches or full_batches(setting), 0
        self.cross_entropy: Any = cross_entropy
        if compiled:
            self.cross_entropy = torch.compile(
                cross_entropy, dynamic=False, backend=compiler(device)
            )
        self.captured: CapturedStep | None = None
        if captured:
            n = max(len(batch.tgt) for batch in self.batches)
            self.captured = CapturedStep(self.update, n, setting.config.max_len, device)
        else:  # they are there before they are asked for
            self.held = [
                (tuple(torch.tensor(ids, device=device) for ids in batch), options_of(batch))
                for batch in self.batches
            ]
        self.recorded: set[tuple[int, ...]] = set()
        self.first_loss: Any = None  # with the weights as they were made

    def __call__(self) -> None:
        if self.captured:
            batch = self.batches[self.i]
            loss = self.captured(batch)
            if batch.src.shape not in self.recorded:  # it runs a shape once, and then records it
                self.recorded.add(batch.src.shape)
                loss = loss.clone()
                self.captured(batch)
        else:
            (src, tgt), options = self.held[self.i]
            loss = self.update(src, tgt, **options)
        if self.first_loss is None:
            self.first_loss = loss.clone()
        self.i = (self.i + 1) % len(self.batches)

    def all_batches(self) -> None:
        """A step with each: with batches of several shapes, this is what is timed."""
        for _ in self.batches:
            self()

    def update(self, src: Tensor, tgt: Tensor, **options: Any) -> Tensor:
        batch, how = self._called(src, tgt, options)
        return train_step(self.model, batch, self.optimizer, count_targets(tgt), **how)

    def gradients(self, src: Tensor, tgt: Tensor) -> dict[str, np.ndarray]:
        """Of the loss of one batch, in float64 on the host."""
        self.optimizer.zero_grad()
        ids = Batch(src.cpu().numpy(), tgt.cpu().numpy())
        batch, how = self._called(src, tgt, options_of(ids))
        add_gradients(self.model, batch, count_targets(tgt), **how)
        return {n: as_numpy(p.grad.double()) for n, p in self.model.named_parameters()}

    def _called(self, src: Tensor, tgt: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
        has_source = self.setting.config.n_encoder_layers > 0
        how: dict[str, Any] = {"cross_entropy": self.cross_entropy}
        how["precision"] = "bfloat16" if self.bf16 else "float32"
        if has_source and self.is_ours:
            how |= options
        return (src if has_source else None, tgt), how


# --- Contenders -------------------------------------------------------------------------------


@contextmanager
def written_out_attention():
    """torchformer without the fused kernels: scores, softmax and a second product."""
    fused = torchformer.ops.attention

    def attention(q, k, v, mask=None, p=0.0, rng=None):
        return F.dropout(torchformer.ops.attention_weights(q, k, mask), p) @ v

    torchformer.ops.attention = attention
    try:
        yield
    finally:
        torchformer.ops.attention = fused


def contenders_a(
    setting: Setting, device: torch.device, ours: dict[str, list[Batch]], theirs: list[Batch],
    masks: bool,
) -> dict[str, Step]:  # fmt: skip
    """torchformer on each of `ours`, and torch.nn.Transformer with the same weights on `theirs`."""
    steps = {name: Step(setting, device, batches=batches) for name, batches in ours.items()}
    first = next(iter(steps.values()))
    weights = weights_of(first.model)
    if device.type == "cuda":
        steps["torchformer, one CUDA graph"] = Step(
            setting, device, batches=first.batches, captured=True
        )

    def reference(bf16: bool, compiled: bool) -> Step:
        model: Any = Reference(setting, weights, masks).to(device)
        if compiled:
            model = torch.compile(model, backend=compiler(device))
        return Step(setting, device, model=model, batches=theirs, bf16=bf16, compiled=compiled)

    if not masks:
        steps["nn.Transformer, eager float32"] = reference(bf16=False, compiled=False)
    steps["nn.Transformer, eager bf16"] = reference(bf16=True, compiled=False)
    steps["nn.Transformer, compiled bf16"] = reference(bf16=True, compiled=True)
    return steps
