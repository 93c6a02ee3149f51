"""pytest --npformer-target pkg.module:factory: each case of npformer's kit as a test of its own.

This file is imported by every pytest run of an environment that has npformer in it.  So it imports
nothing at all, not even npformer (which brings NumPy), until the option is given.
"""


def pytest_addoption(parser):
    group = parser.getgroup("npformer", "another implementation through npformer's cases")
    group.addoption(
        "--npformer-target",
        metavar="pkg.module:factory",
        help="a function without arguments that returns the adapter, target(op, arrays, options)",
    )
    group.addoption(
        "--npformer-level",
        action="append",
        choices=("op", "layer", "block", "model", "decoding"),
        help="only this level; may be given several times (default: all)",
    )
    group.addoption(
        "--npformer-examples", type=int, default=20, metavar="N", help="of each operation (20)"
    )
    group.addoption("--npformer-seed", type=int, default=0, metavar="N", help="of the cases (0)")
    group.addoption(
        "--npformer-dtype", choices=("float64", "float32"), default="float64", help="(float64)"
    )
    group.addoption(
        "--npformer-fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of TransformerConfig that is not to vary",
    )
    group.addoption(
        "--npformer-time-limit", type=float, default=60.0, metavar="S", help="for a case (60)"
    )


def pytest_configure(config):
    if config.getoption("--npformer-target"):
        from npformer.testing.plugin import Kit

        config.pluginmanager.register(Kit(config), "npformer-kit")
