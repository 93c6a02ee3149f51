"""Training on several devices, by PyTorch's own engines; the model does not know.

    ddp     every rank has the whole model and a part of each batch; gradients are summed
    fsdp    the same, but each rank keeps only its share of parameters and optimizer state
    tp      every rank has all of the batch and a part of each layer: some of the heads, some of the
            feed-forward width

    torchrun --nproc-per-node 2 -m torchformer.training g2p --parallel fsdp

Whatever the engine, a step is the step of one process on the whole batch: the loss is divided by
the number of target tokens of all ranks together.
"""

import argparse
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from npformer import arguments, checkpoint, presets, runs, streams, tasks, training
from npformer.arguments import SEEDS, STEPS, whole_number
from npformer.config import TransformerConfig
from npformer.options import limit
from npformer.tasks import Batch
from torchformer.captured import options_of
from torchformer.shards import load, save
from torchformer.training import count_targets, set_rate, train_step
from torchformer.transformer import Transformer, as_numpy

ENGINES = ("ddp", "fsdp", "tp")


def local_rank() -> int:
    """Its number on its machine, and so that of its device; a rank counts through all machines."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def group(device: str) -> Iterator[DeviceMesh]:
    """The ranks that torchrun has started, as a mesh (world,); alone, a mesh of one.

    Raises ValueError where a rank would have no CUDA device of its own.
    """
    if device == "cuda":
        rank = local_rank()
        if torch.cuda.device_count() <= rank:
            raise ValueError(
                f"--device cuda: rank {rank} of this node has no device, there are "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(rank)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield init_device_mesh(device, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def spread(model: Transformer, engine: str, mesh: DeviceMesh) -> nn.Module:
    """The model over the ranks of the mesh: call and train what comes back.

    Raises ValueError for an engine that there is not, or a world size that does not divide the
    heads or the feed-forward width (tp).
    """
    if engine == "ddp":
        device_ids = [local_rank()] if mesh.device_type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids)
    if engine == "fsdp":
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)  # gathered before the layer runs, dropped after
        fully_shard(model, mesh=mesh)
        return model
    if engine == "tp":
        return _tensor_parallel(model, mesh)
    raise ValueError(f"--parallel {engine}: there are {', '.join(ENGINES)}")


def _tensor_parallel(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Columns of the first product, rows of the second: between them nobody has to talk.

    q, k, v: each rank makes some of the heads; out_proj adds up what all of them found.  linear1,
    linear2: some of the width F, the same way   [Shoeybi et al. 2019, § 3].
    """
    config, world = model.config, mesh.size()
    for name, n in (("n_heads", config.n_heads), ("d_ff", config.d_ff)):
        if n % world:
            raise ValueError(f"--parallel tp: {world} ranks do not divide {name}={n}")
    for layer in layers_of(model):
        plan: dict[str, Any] = {}
        for attention in ("self_attn", "cross_attn"):
            if hasattr(layer, attention):
                plan |= {f"{attention}.{p}_proj": ColwiseParallel() for p in "qkv"}
                plan[f"{attention}.out_proj"] = RowwiseParallel()
        plan |= {
            "feed_forward.linear1": ColwiseParallel(),
            "feed_forward.linear2": RowwiseParallel(),
        }
        parallelize_module(layer, mesh, plan)
    return model


def layers_of(model: Transformer) -> list[nn.Module]:
    stacks = [stack for stack in (model.encoder, model.decoder) if stack is not None]
    return [layer for stack in stacks for layer in stack.layers]


def part_of(batch: Batch, engine: str) -> Batch:
    """The samples of this rank: every world-th of them; under tp, all.

    Raises ValueError where there are fewer samples than ranks.
    """
    if engine == "tp":
        return batch
    rank, world = dist.get_rank(), dist.get_world_size()
    if len(batch.src) < world:
        raise ValueError(f"a batch of {len(batch.src)} cannot be shared by {world} ranks")
    return Batch(batch.src[rank::world], batch.tgt[rank::world])


def share_of_targets(tgt: Tensor, engine: str) -> Tensor:
    """What this rank divides its loss by: the targets of the whole batch, or its share of them.

    ddp and fsdp average the gradients of the ranks, where a sum is meant: hence by the world size.
    """
    n = count_targets(tgt)
    if engine == "tp":
        return n
    dist.all_reduce(n)
    return n.double() / dist.get_world_size()


def mean_loss(loss: Tensor, engine: str) -> float:
    """The loss of the whole batch, of which `loss` is this rank's part."""
    loss = loss.clone()
    if engine != "tp":
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_ for parameters of which some are spread and others are not."""
    max_norm = limit("max_norm", max_norm)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([whole(torch.linalg.vector_norm(g)) for g in gradients])
    norm = torch.linalg.vector_norm(norms)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor)
    return norm


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be spread over the ranks; every rank has to ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- Checkpoints ------------------------------------------------------------------------------


def export(folder: Path, model: nn.Module, config: Any) -> None:
    """The common folder that both twins read, written by rank 0."""
    weights = full_weights(model)
    if dist.get_rank() == 0:
        checkpoint.save(folder, config, weights)
    dist.barrier()


def full_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Every parameter whole, by its name in both twins: on rank 0, elsewhere nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: as_numpy(x) for name, x in state.items()}


# --- The program ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """0: trained;  2: what was asked for cannot be done, said in one line."""
    return streams.program(_parser(), arguments, _run, ValueError)


def _run(options: argparse.Namespace) -> int:
    with (
        warnings.catch_warnings(),
        group(options.device) as mesh,
        _folder(options) as folder,
    ):
        # FSDP is anxious for outputs that are views, should one write into them: here nobody does
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        _train(options, mesh, folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(
        "torchrun ... -m torchformer.training",
        description="Train on several devices.  Started by torchrun, once for each; alone, it is a "
        "group of one.  `npformer train --backend torch` is the command for a single device.",
    )
    add = parser.add_argument
    add("task", choices=tasks.NAMES, metavar="TASK", help=", ".join(tasks.NAMES))
    add("--parallel", choices=ENGINES, default="ddp", help="what is spread (ddp)")
    add("--preset", default="default", help="model and recipe (default)")
    add(
        "--config",
        type=arguments.path,
        metavar="FILE.toml",
        help="tables [model], [recipe] to change",
    )
    add("--steps", type=whole_number(1, STEPS), help="instead of the recipe's")
    add("--seed", type=whole_number(0, SEEDS - 2**20), default=0)
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, metavar="DIR", help="folder to save to (runs/TASK-parallel)")
    add("--resume", action="store_true", help="go on from what is in DIR, on any number of ranks")
    add("--overwrite", action="store_true", help="replace the run that is in DIR")
    add("--save-every", type=whole_number(1, STEPS), default=1000, metavar="N", help="steps (1000)")
    return parser


@contextmanager
def _folder(options: argparse.Namespace) -> Iterator[Path]:
    """Locked, and asked whose it is, by rank 0; where it is refused all ranks stop."""
    folder = options.out or Path("runs") / f"{options.task}-parallel"
    with ExitStack() as stack:
        refused: ValueError | None = None
        if dist.get_rank() == 0:
            try:
                stack.enter_context(runs.locked(folder))
                if not options.resume:
                    runs.claim(folder, "run", options.overwrite, "--resume, ")
                elif options.overwrite:
                    raise ValueError("--resume goes on with what --overwrite would replace")
            except ValueError as error:
                refused = error
        n_refused = torch.tensor(int(refused is not None), device=options.device)
        dist.all_reduce(n_refused)
        if n_refused.item():
            raise refused or ValueError(f"{folder} is refused, rank 0 says why")
        yield folder


def _train(options: argparse.Namespace, mesh: Any, folder: Path) -> None:
    task = tasks.load(options.task)
    chosen = presets.settings(task, options.preset, options.config)
    config, recipe = presets.build(task, chosen)
    total = options.steps or recipe.steps
    arguments.check_room("to train this model", presets.bytes_to_train(task, config, recipe))
    about = {"kind": "train", "task": task.name, "backend": "torch", "seed": options.seed}
    about |= {"preset": options.preset, "config": config.to_json(), "recipe": asdict(recipe)}
    about |= {"threads": None, "parallel": options.parallel, "ranks": mesh.size()}
    is_first = dist.get_rank() == 0
    model = Transformer(config, np.random.default_rng(options.seed), device=options.device)
    model.right_padded = True  # as all tasks pad
    # Each rank has its own part of the batch, and drops its own entries; under tp all have one
    seed = options.seed + (0 if options.parallel == "tp" else dist.get_rank())
    torch.manual_seed(seed % 2**64)
    spread_model = spread(model, options.parallel, mesh)
    parameters = list(spread_model.parameters())
    optimizer = torch.optim.Adam(
        parameters, lr=0.0, betas=recipe.betas, eps=recipe.eps, foreach=False
    )
    first = 1
    if options.resume:
        _check_it_is_that_run(folder, about)
        if (folder / runs.SHARDS).exists():  # else it was killed before its first save
            first = 1 + load(folder / runs.SHARDS, spread_model, optimizer)
    elif is_first:
        runs.clear(folder, "run")
        checkpoint.save_json(folder / runs.RUN, about | {"versions": training.versions()})
    schedule = recipe.schedule_for(config, total)
    if is_first:
        print(
            f"{options.parallel} on {mesh.size()} x {options.device}: {task.name}, steps {first} "
            f"to {total} -> {folder}",
            flush=True,
        )
    for step in range(first, total + 1):
        batch = part_of(task.batch(step, recipe.batch_size, options.seed), options.parallel)
        src, tgt = (torch.as_tensor(ids).to(options.device) for ids in batch)
        set_rate(optimizer, schedule(step))
        loss = train_step(
            spread_model,
            (src, tgt),
            optimizer,
            share_of_targets(tgt, options.parallel),
            label_smoothing=recipe.label_smoothing,
            clip=recipe.clip,
            clip_grad_norm=clip_grad_norm,
            **options_of(batch),
        )
        if step % max(1, total // 20) == 0 or step == total:
            loss = mean_loss(loss, options.parallel)
            if is_first:
                print(f"   step {step:>6}  loss {loss:.4f}", flush=True)
        if step % options.save_every == 0 or step == total:
            save(folder / runs.SHARDS, spread_model, optimizer, step)
    export(folder, spread_model, config)
    if is_first:
        checkpoint.save_json(folder / runs.RUN, about | {"versions": training.versions()})
        it = arguments.typed(folder)
        print(f"Next: npformer predict {it} ...    npformer check {it}", flush=True)


def _check_it_is_that_run(folder: Path, about: dict[str, Any]) -> None:
    """Raises ValueError unless the run to resume is of this task, seed, model and recipe.

    Engine and ranks may be others, and so may the number of steps.
    """
    before = runs.load_run(folder)
    for name in ("task", "backend", "seed"):
        if before[name] != about[name]:
            raise ValueError(f"the run in {folder} has the {name} {before[name]}")
    with checkpoint.blame(folder / runs.RUN):
        config = TransformerConfig.from_json(before["config"])
        recipe = asdict(training.Recipe(**before["recipe"]))
    ours = asdict(TransformerConfig.from_json(about["config"])) | about["recipe"]
    for name, value in (asdict(config) | recipe).items():
        if name != "steps" and ours[name] != value:
            raise ValueError(f"the run in {folder} has {name} {value}, not {ours[name]}")
