"""python -m npformer.testing --target pkg.module:factory   (docs/testing-kit.md)"""

import argparse
import sys
from pathlib import Path
from typing import Any

from npformer import streams
from npformer.arguments import Parser, path, positive_number, whole_number


def main(arguments: list[str] | None = None) -> int:
    """0: all agree; 1: something differs; 2: the command itself is wrong, said in one line."""
    return streams.program(_parser(), arguments, _do, ValueError, TypeError)


def _do(options: argparse.Namespace) -> int:
    try:
        from npformer.testing import cases
    except ImportError as error:
        raise ValueError(f"the kit needs {error.name}: pip install 'npformer[test]'") from None
    fixed = cases.parse_fixed(options.fix)
    only = cases.check_operations(options.only)
    if options.bounds:
        return _bounds(options, only)
    if options.check:
        return _check(options)
    levels = tuple(options.level or cases.LEVELS)
    size = (options.examples, options.seed, options.dtype)
    found = cases.make_cases(levels, *size, fixed, only)
    return _dump(options, found) if options.dump else _run(options, found)


def _run(options: argparse.Namespace, found: list) -> int:
    from npformer.testing.worker import verdicts

    return _say(options, verdicts(options.target, found, options.time_limit))


def _dump(options: argparse.Namespace, found: list) -> int:
    from npformer.testing.exchange import dump

    dump(Path(options.dump), found, options.overwrite)
    print(
        f"{len(found)} cases in {options.dump}; answers go to {options.dump}/answers, then --check"
    )
    return 0


def _check(options: argparse.Namespace) -> int:
    from npformer.testing.exchange import check

    return _say(options, check(Path(options.check)))


def _say(options: argparse.Namespace, verdicts: Any) -> int:
    from npformer.testing.report import Report

    report = Report(verdicts)
    if options.json:
        report.write_json(options.json)
    print(report.text())
    return report.exit_code


def _bounds(options: argparse.Namespace, only: tuple[str, ...]) -> int:
    from npformer.testing import bounds

    found = []
    for used in bounds.measure(options.bounds, options.seed, only=only):
        found.append(used)
        if sys.stderr.isatty():
            print(f"{used.op} {used.dtype}", end="\033[K\r", file=sys.stderr)
    print(bounds.table(found))
    return 0 if all(used.ok for used in found) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m npformer.testing",
        description="Run another implementation of the Transformer through npformer's tests "
        "(docs/testing-kit.md).",
        epilog="Exit code: 0 all agree, 1 something differs, 2 the command is wrong.",
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--target",
        metavar="pkg.module:factory",
        help="a function without arguments that returns the adapter, target(op, arrays, options)",
    )
    mode.add_argument(
        "--dump", type=path, metavar="DIR", help="write the cases there, for any program"
    )
    mode.add_argument(
        "--check", type=path, metavar="DIR", help="score the answers that a program wrote there"
    )
    mode.add_argument(
        "--bounds",
        type=whole_number(1, 10**6),
        metavar="N",
        help="how much of each op's bound N examples use, npformer against PyTorch",
    )
    add = parser.add_argument
    add(
        "--level",
        action="append",
        choices=("op", "layer", "block", "model", "decoding"),
        help="only this level; may be given several times (default: all)",
    )
    add("--only", action="append", default=[], metavar="OP", help="only this operation; repeatable")
    add(
        "--examples",
        type=whole_number(1, 10**4),
        default=20,
        metavar="N",
        help="of each operation (20)",
    )
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="of all cases (0)")
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
        type=positive_number(86400),
        default=60.0,
        metavar="S",
        help="seconds for a case, which is asked twice (60)",
    )
    add("--json", type=path, metavar="FILE", help="write every verdict there as well")
    add("--overwrite", action="store_true", help="--dump: replace the cases that are there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
