"""python -m npformer.testing --target pkg.module:factory   (docs/testing-kit.md)"""

import argparse
import sys
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """0: all agree; 1: something differs; 2: the command itself is wrong, said in one line."""
    options = _parser().parse_args(arguments)
    try:
        from npformer.testing import cases, worker
    except ImportError as error:
        return _refuse(f"the kit needs {error.name}: pip install 'npformer[test]'")
    from npformer.testing.report import Report

    try:
        levels = tuple(options.level or cases.LEVELS)
        found = cases.make_cases(
            levels, options.examples, options.seed, options.dtype, _fixed(options.fix)
        )
        report = Report(worker.verdicts(options.target, found, options.time_limit))
    except (ValueError, TypeError, OSError, worker.TargetError) as error:
        return _refuse(str(error))
    if options.json:
        try:
            report.write_json(options.json)
        except OSError as error:
            return _refuse(f"--json {options.json}: {error.strerror}")
    print(report.text())
    return report.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m npformer.testing",
        description="Run another implementation of the Transformer through npformer's tests.",
        epilog="Exit code: 0 all agree, 1 something differs, 2 the command is wrong.",
    )
    add = parser.add_argument
    add(
        "--target",
        metavar="pkg.module:factory",
        required=True,
        help="a function without arguments that returns the adapter, target(op, arrays, options)",
    )
    add(
        "--level",
        action="append",
        choices=("op", "layer", "block", "model", "decoding"),
        help="only this level; may be given several times (default: all)",
    )
    add("--examples", type=_positive, default=20, metavar="N", help="of each operation (20)")
    add("--seed", type=int, default=0, metavar="N", help="of all cases (0)")
    add("--dtype", choices=("float64", "float32"), default="float64", help="(float64)")
    add(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of TransformerConfig that is not to vary: --fix norm_first=false",
    )
    add(
        "--time-limit",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds for a case, which is asked twice (60)",
    )
    add("--json", metavar="FILE", help="write every verdict there as well")
    return parser


def _fixed(texts: list[str]) -> dict[str, Any]:
    """{"norm_first": False} of ["norm_first=false"].  Raises ValueError."""
    import json
    from dataclasses import fields

    from npformer.config import TransformerConfig

    known = {field.name for field in fields(TransformerConfig)}
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise ValueError(f"--fix {text}: expected NAME=VALUE, a field of TransformerConfig")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _refuse(message: str) -> int:
    print(f"python -m npformer.testing: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
