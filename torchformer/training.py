"""Training: the twin of npformer.training.Trainer, with the same methods, for the same loop.

On several devices, and on several machines, as a program of its own:

    torchrun --nproc-per-node 2 -m torchformer.training g2p --parallel ddp
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from npformer.checkpoint import check_arrays
from npformer.config import TransformerConfig
from npformer.options import integer, probability
from npformer.tasks import EOS, PAD, SOS, Batch, Task, pad
from torchformer.captured import CapturedStep, options_of
from torchformer.decoder import DecoderLayer
from torchformer.decoding import greedy
from torchformer.encoder import EncoderLayer
from torchformer.fast import FastDecoder, up_to
from torchformer.ops import unknown_id
from torchformer.transformer import Transformer, as_numpy


class Trainer:
    """One model, its optimizer and its random numbers, in PyTorch."""

    backend = "torch"

    def __init__(
        self,
        config: TransformerConfig,
        recipe,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "float32",
        compiled: bool = False,
        captured: bool | None = None,
    ):
        """How it is computed is the trainer's business, not the model's:

        precision   "bfloat16": products and attention in bfloat16 by torch.autocast; parameters,
                    norms, softmax and loss stay float32
        compiled    torch.compile, layer by layer, and the loss
        captured    a step of training or of decoding is one CUDA graph, see captured.py; None: if
                    the device is CUDA

        Dropout reads the random numbers of the process, so they are seeded here (torch.manual_seed)
        and go on from step to step: other code that draws from them draws from the same row.
        """
        seed = integer("seed", seed, 0)
        self.config, self.recipe, self.device = config, recipe, torch.device(device)
        check_precision(precision, self.device)
        self.model = Transformer(config, rng=np.random.default_rng(seed), device=self.device)
        self.how: dict[str, Any] = {  # of add_gradients
            "precision": precision,
            "label_smoothing": recipe.label_smoothing,
        }
        if compiled:
            self.how["cross_entropy"] = torch.compile(cross_entropy, fullgraph=True)
            for layer in self.model.modules():
                if isinstance(layer, EncoderLayer | DecoderLayer):
                    layer.compile(fullgraph=True)
        self.losses = LateNumber(self.device)
        self.model.right_padded = True  # as all tasks pad
        torch.manual_seed(seed % 2**64)  # of dropout; torch has no longer seeds
        is_captured = check_captured(captured, self.device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            # A graph reads the rate where it was recorded: on the device
            lr=torch.zeros((), device=self.device) if is_captured else 0.0,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=True,
            capturable=is_captured,
        )
        self.captured: CapturedStep | None = None
        self.decoders: dict[tuple[int, int, int], FastDecoder] = {}
        if is_captured:
            self.captured = CapturedStep(
                self._update, recipe.batch_size, config.max_len, self.device
            )

    def step(self, batch: Batch, rate: float) -> float:
        """One update of the weights; returns the loss, in nats per target token."""
        self.model.train()
        set_rate(self.optimizer, rate)
        try:
            if self.captured:
                loss = self.captured(batch)
            else:
                loss = self._update(*map(self._on_device, batch), **options_of(batch))
        except torch.OutOfMemoryError:
            loss = None
        if loss is None:  # outside the except clause, which holds on to the activations
            raise ValueError(self._what_would_fit(batch))
        return self.losses.next(loss)

    def _update(self, src: Tensor, tgt: Tensor, **options: Any) -> Tensor:
        return train_step(
            self.model,
            (src, tgt),
            self.optimizer,
            count_targets(tgt),
            clip=self.recipe.clip,
            **self.how,
            **options,
        )

    def _on_device(self, ids: np.ndarray) -> Tensor:
        x = torch.as_tensor(ids)
        # From pinned memory the copy goes on beside the computation
        return x.pin_memory().to(self.device, non_blocking=True) if self._is_cuda else x

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _what_would_fit(self, batch: Batch) -> str:
        """The error after an out-of-memory: halves the batch until a step of it does fit."""
        n = B = len(batch.tgt)
        if self.captured and self.captured.graphs:  # which keep their memory
            self.captured.forget()
            n = 2 * B
        while n > 1:
            n //= 2
            self.optimizer.zero_grad()
            src, tgt = (self._on_device(ids[:n]) for ids in batch)
            try:
                add_gradients(self.model, (src, tgt), count_targets(tgt), **self.how)
            except torch.OutOfMemoryError:
                continue
            if n == B:
                return f"out of memory with a batch of {B} and CUDA graphs: --no-capture would fit"
            return f"out of memory with a batch of {B}; {n} would fit (batch_size = {n})"
        return f"out of memory with a batch of {B}, and with one of 1: a smaller model is needed"

    def batches(self, task: Task, first_step: int, seed: int) -> Iterator[Batch]:
        steps = range(first_step, 2**31)
        data = _Batches(task, self.recipe.batch_size, seed)
        # A generator of its own: else the loader takes a number from dropout's, and a resumed run
        # would not see the masks of one that never stopped.
        return iter(DataLoader(data, batch_size=None, sampler=steps, generator=torch.Generator()))

    def answer(self, sources: Sequence[list[int]], max_len: int) -> list[list[int]]:
        """Greedy answers to a batch of sources."""
        model, ids = self.model.eval(), pad(sources)
        src = torch.from_numpy(ids).to(self.device)
        if not self.captured:
            return greedy(model, src, max_len=max_len, sos_id=SOS, eos_id=EOS)
        # As the steps: one graph for each of a few shapes, kept for the next evaluation
        B, S = len(ids), min(-(-ids.shape[1] // 16) * 16, self.config.max_len)
        if (B, S, max_len) not in self.decoders:
            self.decoders[B, S, max_len] = FastDecoder(
                model, B, max_len, src_len=S, never=[PAD, SOS], compiled=False, recorded=True
            )
        decoder = self.decoders[B, S, max_len]
        decoder.read_weights()
        chosen = decoder.continued(torch.full((B, 1), SOS, device=self.device), max_len, src, [EOS])
        return [up_to(row, [EOS]) for row in chosen.tolist()]

    def weights(self) -> dict[str, np.ndarray]:
        # A copy: on the CPU .numpy() shares the memory that the optimizer goes on writing to.
        return {name: as_numpy(x).copy() for name, x in self.model.state_dict().items()}

    def load_weights(self, state: Mapping[str, np.ndarray]) -> None:
        self.model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All that the next step depends on besides the weights: arrays, and what JSON can hold."""
        arrays = {"rng.cpu": torch.get_rng_state().numpy()}
        if self.device.type == "cuda":
            arrays["rng.cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        for i, state in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{i}.{name}": as_numpy(x).copy() for name, x in state.items()}
        return arrays, {}

    def load(
        self,
        weights: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        values: Mapping[str, Any],
    ) -> None:
        """Go on from these `weights` and this `state`: all of it is compared before any is loaded.

        Raises ValueError where they are another model's or another optimizer's.
        """
        check_arrays(self.weights(), weights)
        check_arrays(self._expected_state(has_begun="optimizer.0.step" in arrays), arrays)
        state: dict[int, dict[str, Tensor]] = {}
        for key, x in arrays.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = torch.from_numpy(x)
        try:  # the numbers of a generator are checked by torch
            torch.Generator().set_state(torch.from_numpy(arrays["rng.cpu"]))
            torch.set_rng_state(torch.from_numpy(arrays["rng.cpu"]))
            if self._is_cuda:
                torch.cuda.set_rng_state(torch.from_numpy(arrays["rng.cuda"]), self.device)
        except RuntimeError as error:
            raise ValueError(f"the state of the random numbers is none ({error})") from None
        self.load_weights(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.captured:
            self.captured.forget()  # graphs write to the state that was

    def _expected_state(self, has_begun: bool) -> dict[str, np.ndarray]:
        """`state`, with zeros for the optimizer; before the first step that has none."""
        arrays, _ = self.state()
        expected = {name: x for name, x in arrays.items() if name.startswith("rng.")}
        for i, p in enumerate(self.model.parameters()):
            if has_begun:
                zeros = np.zeros(p.shape, as_numpy(p).dtype)
                expected |= {f"optimizer.{i}.{name}": zeros for name in ("exp_avg", "exp_avg_sq")}
                expected[f"optimizer.{i}.step"] = np.zeros((), np.float32)
        return expected


# --- One step, for this trainer, for parallel.py and for the benchmark ------------------------


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = PAD,
    label_smoothing: float = 0.0,
    n_targets: int | Tensor | None = None,
) -> Tensor:
    """The mean over the targets that count, in float32 or 64.   logits (B, T, V)   targets (B, T)

    `n_targets` is what to divide by, where a step has more targets than these: None, their number.
    Compiled, half-precision logits are read as they are: no float32 copy of them is written.
    """
    label_smoothing = probability("cross_entropy: label_smoothing", label_smoothing)
    if not (n_targets is None or isinstance(n_targets, Tensor)):
        n_targets = integer("cross_entropy: n_targets", n_targets, least=1)
    rows = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (B * T, V)
    try:
        total = F.cross_entropy(
            rows,
            targets.flatten(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
    except IndexError:
        counted = targets[targets != ignore_index]
        raise unknown_id("cross_entropy", counted, rows.shape[-1]) from None
    if n_targets is None:
        n_targets = (targets != ignore_index).sum()
    return total / (n_targets.to(total.dtype) if isinstance(n_targets, Tensor) else n_targets)


def count_targets(tgt: Tensor) -> Tensor:
    """How many tokens a batch asks for, counted on its device: nobody waits.   tgt (B, T + 1)"""
    return (tgt[:, 1:] != PAD).sum()


def add_gradients(
    model: nn.Module,
    batch: tuple[Tensor | None, Tensor],
    n_targets: int | Tensor,
    *,
    precision: str = "float32",
    label_smoothing: float = 0.0,
    cross_entropy: Callable[..., Tensor] = cross_entropy,
    **options: Any,
) -> Tensor:
    """Forward and backward; returns the loss, which may not have been computed yet.

    options   of the model's forward, such as src_mask
    """
    src, tgt = batch
    with torch.autocast(tgt.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(src, tgt[:, :-1], **options)  # (B, T, V)
    loss = cross_entropy(logits, tgt[:, 1:], PAD, label_smoothing, n_targets)
    loss.backward()
    return loss.detach()


def train_step(
    model: nn.Module,
    batch: tuple[Tensor | None, Tensor],
    optimizer: torch.optim.Optimizer,
    n_targets: int | Tensor,
    *,
    clip: float = 1.0,
    clip_grad_norm: Callable[..., Any] = nn.utils.clip_grad_norm_,
    **how: Any,
) -> Tensor:
    """One update of the weights; returns the loss, in nats per target token.

    batch       src (B, S), or None for a decoder-only model;  tgt (B, T + 1), as tasks.Batch
    n_targets   the target tokens of the whole step, of which the batch may be a part
    how         see add_gradients

    Nothing waits for the device here, so that a step can be recorded (captured.py).
    """
    optimizer.zero_grad()
    loss = add_gradients(model, batch, n_targets, **how)
    clip_grad_norm(list(model.parameters()), clip)
    optimizer.step()
    return loss


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of the next steps; a rate that is a tensor is written to, as graphs read it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class LateNumber:
    """Numbers from the device without waiting for it: on CUDA each is that of the step before.

    To ask for this step's loss would be to wait until it is computed, with the GPU idle until the
    next batch arrives.  On the CPU there is nothing to wait for.
    """

    def __init__(self, device: torch.device):
        self.is_late = device.type == "cuda"
        self.waiting: tuple[Tensor, Any] | None = None

    def next(self, x: Tensor) -> float:
        if not self.is_late:
            return x.item()
        host = torch.empty((), dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        before, self.waiting = self.waiting or (host, copied), (host, copied)
        before[1].synchronize()
        return before[0].item()


def check_precision(precision: str, device: torch.device) -> str:
    """Raises ValueError for one that there is not, or that the device does not have."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
    if precision == "bfloat16" and device.type == "cuda":
        with torch.cuda.device(device):  # emulated, it is slower than float32
            has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        if not has_it:
            raise ValueError(f"{torch.cuda.get_device_name(device)} does not have bfloat16")
    return precision


def check_captured(captured: bool | None, device: torch.device) -> bool:
    """Whether steps are captured: None leaves it to the device.  Raises ValueError."""
    if captured and device.type != "cuda":
        raise ValueError(f"--capture needs a CUDA device, got {device.type}")
    return device.type == "cuda" if captured is None else captured


class _Batches(Dataset):
    """The task's batches by step, as the NumPy twin sees them."""

    def __init__(self, task: Task, size: int, seed: int):
        self.task, self.size, self.seed = task, size, seed

    def __getitem__(self, step: int) -> Batch:
        return self.task.batch(step, self.size, self.seed)


if __name__ == "__main__":
    from torchformer.parallel import main  # here: torch's engines take a second to import

    sys.exit(main())
