"""Which card, and in which state: what a reader needs to judge a figure, and never whose it is."""

import importlib.metadata
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from torchformer.training import check_precision

TOYS = "CPU, toy sizes, traced and not compiled"
QUERIES = {  # nvidia-smi's name: ours
    "driver_version": "driver",
    "power.limit": "power_limit",
    "clocks.max.sm": "clock_max",
    "clocks.sm": "clock_now",
    "clocks.max.mem": "memory_clock_max",
    "temperature.gpu": "temperature",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Raises ValueError where there is no such device, or one that cannot do what is measured."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    check_precision("bfloat16", device)
    about: dict[str, Any] = {
        "created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else TOYS,
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about |= {"memory_gib": round(card.total_memory / 2**30, 1)}
        about |= {"multiprocessors": card.multi_processor_count}
        about |= {"cuda": torch.version.cuda or "", "cudnn": torch.backends.cudnn.version()}
        about |= {"triton": version("triton")} | driver()
    about |= {"numpy": np.__version__, "python": sys.version.split()[0]}
    about["commit"] = harness.git_commit() or os.environ.get("COMMIT")
    return {name: value for name, value in about.items() if value is not None}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> dict[str, str]:
    """Driver, clocks and power, as far as nvidia-smi is there and tells: not every driver does."""
    names = list(QUERIES)
    answers = query(names)
    if answers is None:  # one name that it does not know, and it answers none
        answers = [(query([name]) or [""])[0] for name in names]
    found = zip(QUERIES.values(), answers, strict=True)
    return {name: answer for name, answer in found if answer and not answer.startswith("[")}


def query(names: list[str]) -> list[str] | None:
    """What nvidia-smi says of the first card, or None."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    answers = [answer.strip() for answer in lines[0].split(",")] if lines else []
    return answers if done.returncode == 0 and len(answers) == len(names) else None
