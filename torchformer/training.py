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
from torch.utils.data import DataLoader, Dataset

from npformer.config import TransformerConfig
from npformer.tasks import EOS, PAD, SOS, Batch, Task, pad
from torchformer.decoding import greedy
from torchformer.transformer import Transformer, as_numpy


class Trainer:
    """One model, its optimizer and its random numbers, in PyTorch."""

    backend = "torch"

    def __init__(self, config: TransformerConfig, recipe, seed: int = 0, device: str = "cpu"):
        self.config, self.recipe, self.device = config, recipe, torch.device(device)
        self.model = Transformer(config, rng=np.random.default_rng(seed), device=self.device)
        self.model.right_padded = True  # as all tasks pad
        torch.manual_seed(seed)  # of dropout
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True
        )

    def step(self, batch: Batch, rate: float) -> float:
        """One update of the weights; returns the loss, in nats per target token."""
        model, recipe = self.model.train(), self.recipe
        src, tgt = (torch.as_tensor(ids).to(self.device) for ids in batch)
        logits = model(src, tgt[:, :-1])
        loss = F.cross_entropy(
            logits.mT, tgt[:, 1:], ignore_index=PAD, label_smoothing=recipe.label_smoothing
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.item()

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

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        torch.set_rng_state(torch.from_numpy(arrays["rng.cpu"]))
        if self.device.type == "cuda" and "rng.cuda" in arrays:
            torch.cuda.set_rng_state(torch.from_numpy(arrays["rng.cuda"]), self.device)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, x in arrays.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = torch.from_numpy(x)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class _Batches(Dataset):
    """The task's batches by step, as the NumPy twin sees them."""

    def __init__(self, task: Task, size: int, seed: int):
        self.task, self.size, self.seed = task, size, seed

    def __getitem__(self, step: int) -> Batch:
        return self.task.batch(step, self.size, self.seed)


if __name__ == "__main__":
    from torchformer.parallel import main  # here: torch's engines take a second to import

    sys.exit(main())
