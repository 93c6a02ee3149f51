"""What has not been built in yet: each as a row beside the step that is, and with its own parity.

They change a model that is there, by hooks and a subclass, so that a card can say what they would
bring before anything is rewritten.  Ragged batches by token count are in "training A ragged".
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, Rows
from benchmarks.gpu.parity import Case, compared, one_layer, padded
from benchmarks.gpu.steps import Step, make_model
from benchmarks.gpu.timing import reason
from torchformer import ops
from torchformer.attention import MultiHeadAttention, merge_heads, split_heads
from torchformer.positional import LearnedPositions, SinusoidalPositions


class Packed(MultiHeadAttention):
    """Self-attention's q, k and v by one product, of weights laid together in the compiled step."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, rng: Any = None
    ) -> Tensor:
        if query is not key:
            return super().forward(query, key, value, mask, rng)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = (torch.cat([getattr(part, k) for part in parts]) for k in ("weight", "bias"))
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)  # (B, T, C) each
        qh, kh, vh = (split_heads(a, self.d_head) for a in (q, k, v))  # (B, H, T, D)
        return self.out_proj(merge_heads(ops.attention(qh, kh, vh, mask)))


def packed_qkv(model: Any) -> None:
    for module in model.modules():
        if type(module) is MultiHeadAttention:
            module.__class__ = Packed


def bf16_residuals(model: Any) -> None:
    """The stream of residuals in bfloat16: half the bytes of every norm and sum."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | LearnedPositions | SinusoidalPositions):
            module.register_forward_hook(lambda module, inputs, y: y.bfloat16())


def pad_row_by_a_hook(model: Any) -> None:
    """The tied head reads the table as it is; the gradient of the pad's row is cleared after."""
    table, pad_id = model.tgt_embedding.weight, model.config.tgt_pad_id

    def clear(weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad[pad_id] = 0

    table.register_post_accumulate_grad_hook(clear)
    model._tied_head = lambda x: F.linear(x, table)


LEVERS: dict[str, tuple[Callable[[Any], None], str]] = {  # and for which settings
    "packed q, k, v": (packed_qkv, "AB"),
    "bf16 residuals": (bf16_residuals, "AB"),
    "pad row by a hook": (pad_row_by_a_hook, "B"),
}


def levers(bench: Bench, seconds: float) -> Rows:
    """Of A and B.  A lever whose parity is not "ok" is none, however fast."""
    rows: Rows = {}
    for name in "BA" if bench.clock.is_cuda else "B":
        setting = bench.settings[name]
        steps = {name: Step(setting, bench.device)}
        config = one_layer(setting, 64)
        for lever, (change, whose) in LEVERS.items():
            if name in whose:
                model = make_model(setting.config, bench.device)
                change(model)
                steps[f"{name}, {lever}"] = Step(setting, bench.device, model=model)
                case = Case(config, padded(config, 3, 64), "bfloat16", True, change)
                try:
                    rows[f"{name}, {lever}"] = compared(case, bench.device)
                except Exception as error:  # one lever must not cost the others
                    rows[f"{name}, {lever}"] = {"failed": reason(error)}
                    bench.clock.check_sound()
        measured = bench.clock.compare(steps, seconds / 6)
        base = measured[name].get("seconds")
        for row, step in steps.items():
            rows[row] = bench.training_row(step, measured[row]) | rows.get(row, {})
            if base and "seconds" in measured[row]:
                rows[row]["times_as_fast"] = base / measured[row]["seconds"]
        bench.give("levers", rows)
    return rows
