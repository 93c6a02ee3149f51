"""How many examples Hypothesis draws: HYPOTHESIS_PROFILE=dev, ci (the default) or deep."""

import os

from hypothesis import HealthCheck, Phase, settings

settings.register_profile("dev", max_examples=10, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None)
settings.register_profile(
    "deep", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(  # tests/mutation.py: the same examples for every mutant, unshrunk
    "mutation",
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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
