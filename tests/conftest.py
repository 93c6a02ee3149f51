"""How the tests run: on every core, with one thread each.

    pytest                          all files, in as many processes as there are cores
    pytest tests/test_masks.py      in this one: another takes longer to start than most files run
    pytest -n 0                     all files, in this one
    pytest -m slow                  what takes long;  -m real: what needs checkpoints of others

How many examples Hypothesis draws: HYPOTHESIS_PROFILE=dev, ci (the default) or deep.
"""

import os

THREADS = ("OMP", "OPENBLAS", "MKL", "VECLIB", "NUMEXPR")
os.environ.update({f"{library}_NUM_THREADS": "1" for library in THREADS})  # before NumPy and torch

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

settings.register_profile(  # nothing that a slow machine would fail
    "every", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
every = settings.get_profile("every")
settings.register_profile("dev", every, max_examples=10)
settings.register_profile("ci", every, max_examples=50)
settings.register_profile("deep", every, max_examples=2000)
settings.register_profile(  # tests/mutation.py: the same examples for every mutant, unshrunk
    "mutation",
    every,
    max_examples=25,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# --- Where they run ---------------------------------------------------------------------------

LONGEST = ("lessons", "distributed", "kit", "kit_files", "ops", "benchmarks", "pronunciation")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, where that is installed, looks
def pytest_cmdline_main(config):
    """Without -n: a process for every core, unless single files were asked for."""
    option = config.option
    if getattr(option, "numprocesses", 0) is not None:  # -n was given, or there is no xdist
        return
    if option.usepdb or option.capture == "no" or option.tx or is_worker(config):
        return
    if cores() > 1 and any(Path(argument).is_dir() for argument in config.args):
        option.numprocesses = min(cores(), 8)
        option.dist = "loadfile"  # what a file makes once is made once
        option.loadscopereorder = False  # ours is the order, see below


def is_worker(config):
    """One of the processes, and not the one that started them."""
    return hasattr(config, "workerinput")


def cores():
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    """Without -m: neither slow nor real, unless named.  The longest files begin."""
    if not config.option.markexpr and not any("::" in argument for argument in config.args):
        left_out = [i for i in items if any(map(i.get_closest_marker, ("slow", "real")))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if is_worker(config):
        order = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.name, len(order)))


# --- What is asked ----------------------------------------------------------------------------
def pytest_addoption(parser):
    group = parser.getgroup("npformer's own tests")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the torch twin (cpu)"
    )
    group.addoption(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        default="float32",
        help="of the torch twin on that device (float32)",
    )
