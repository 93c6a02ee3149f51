"""Training: the twin of npformer.training.Trainer, with the same methods, for the same loop.

On several devices, and on several machines, as a program of its own:

    torchrun --nproc-per-node 2 -m torchformer.training g2p --parallel ddp
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from npformer.checkpoint import check_arrays
from npformer.config import TransformerConfig
from npformer.tasks import EOS, PAD, SOS, Batch, Task, pad
from torchformer.decoder import DecoderLayer
from torchformer.decoding import greedy
from torchformer.encoder import EncoderLayer
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
    ):
        """How it is computed is the trainer's business, not the model's:

        precision   "bfloat16": products and attention in bfloat16 by torch.autocast; parameters,
                    norms, softmax and loss stay float32
        compiled    torch.compile, layer by layer, and the loss

        Dropout reads the random numbers of the process, so they are seeded here (torch.manual_seed)
        and go on from step to step: other code that draws from them draws from the same row.
        """
        self.config, self.recipe, self.device = config, recipe, torch.device(device)
        self.precision = check_precision(precision, self.device)
        self.model = Transformer(config, rng=np.random.default_rng(seed), device=self.device)
        self.cross_entropy: Any = cross_entropy
        if compiled:
            self.cross_entropy = torch.compile(cross_entropy, fullgraph=True)
            for layer in self.model.modules():
                if isinstance(layer, EncoderLayer | DecoderLayer):
                    layer.compile(fullgraph=True)
        self.losses = LateNumber(self.device)
        self.model.right_padded = True  # as all tasks pad
        torch.manual_seed(seed)  # of dropout
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True
        )

    def step(self, batch: Batch, rate: float) -> float:
        """One update of the weights; returns the loss, in nats per target token."""
        self.model.train()
        self.optimizer.zero_grad()
        try:
            loss = self.add_gradients(batch)
        except torch.OutOfMemoryError:
            loss = None
        if loss is None:  # outside the except clause, which holds on to the activations
            raise ValueError(self._what_would_fit(batch))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return self.losses.next(loss)

    def add_gradients(self, batch: Batch) -> Tensor:
        """Forward and backward; returns the loss, which may not have been computed yet."""
        src, tgt = (self._on_device(ids) for ids in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.model(src, tgt[:, :-1])
        loss = self.cross_entropy(logits, tgt[:, 1:], PAD, self.recipe.label_smoothing)
        loss.backward()
        return loss.detach()

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
        while n > 1:
            n //= 2
            self.optimizer.zero_grad()
            try:
                self.add_gradients(Batch(batch.src[:n], batch.tgt[:n]))
            except torch.OutOfMemoryError:
                continue
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
        src = torch.from_numpy(pad(sources)).to(self.device)
        return greedy(self.model.eval(), src, max_len=max_len, sos_id=SOS, eos_id=EOS)

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
            arrays |= {f"optimizer.{i}.{name}": as_numpy(x) for name, x in state.items()}
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


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = PAD, label_smoothing: float = 0.0
) -> Tensor:
    """The mean over the targets that count, in float32.   logits (B, T, V)   targets (B, T)

    Compiled, half-precision logits are read as they are: no float32 copy of them is written.
    """
    rows = logits.float().flatten(0, 1)  # (B * T, V)
    return F.cross_entropy(
        rows, targets.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing
    )


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


class _Batches(Dataset):
    """The task's batches by step, as the NumPy twin sees them."""

    def __init__(self, task: Task, size: int, seed: int):
        self.task, self.size, self.seed = task, size, seed

    def __getitem__(self, step: int) -> Batch:
        return self.task.batch(step, self.size, self.seed)


if __name__ == "__main__":
    from torchformer.parallel import main  # here: torch's engines take a second to import

    sys.exit(main())
