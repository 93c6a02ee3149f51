"""python -m tests.fuzz --what checkpoints --mutations 10000"""

import argparse
import os
import sys
import time

from tests.fuzz import __doc__ as description
from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--what", choices=[*TARGETS, "all"], default="all")
    add("--mutations", type=int, default=1000, metavar="N", help="of each (1000)")
    add("--seed", type=int, default=0)
    add("--only", type=int, metavar="I", help="this one alone")
    add("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    n_found = 0
    for what in TARGETS if options.what == "all" else [options.what]:
        start = time.perf_counter()
        tell = print if options.only is not None else None
        size = (options.mutations, options.seed, options.workers)
        if options.only is not None:
            size = (1, options.seed, 1)
        findings, codes = fuzz(what, *size, options.only, tell)
        seconds = time.perf_counter() - start
        outcomes = (
            f"{codes.get(2, 0)} refused, {codes.get(0, 0)} harmless, {codes.get(1, 0)} differ"
        )
        print(f"{what}: {sum(codes.values())} mutations in {seconds:.0f} s, {outcomes}, "
              f"{len(findings)} findings", flush=True)  # fmt: skip
        seen: dict[str, int] = {}
        for found in findings:
            kind = found["problem"].strip().splitlines()[-1][:60]
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] <= 2:
                print(f"  {found['i']}  {found['said']}\n    {found['problem'].strip()}\n")
        for kind, n in seen.items():
            print(f"  {n} x {kind}")
        n_found += len(findings)
    return 1 if n_found else 0


if __name__ == "__main__":
    sys.exit(main())
