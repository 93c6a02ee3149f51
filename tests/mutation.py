"""Are the tests any good?  Change the code in small ways and see if a test fails each time.

    pip install mutmut
    python tests/mutation.py                 400 mutants, a sample that a seed fixes
    python tests/mutation.py --all           all of them: some hours
    python tests/mutation.py --again         the survivors once more, with new tests
    python tests/mutation.py --show          the survivors of what has been run, as diffs

mutmut makes the mutants of ops.py, attention.py, masks.py, encoder.py, decoder.py and optim.py,
in a folder of their own (mutants/), and runs those tests of a fast subset that reach the changed
function ([tool.mutmut] in pyproject.toml).  Interrupted, it goes on where it was.  Texts of errors
are not changed.  docs/mutation.md has the result, and why each survivor is none that matters.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("ops", "attention", "masks", "encoder", "decoder", "optim")
KILLED, SURVIVED = {1, 3}, {0}
OTHER = {
    33: "no tests",
    34: "skipped",
    36: "timeout",
    24: "timeout",
    -24: "timeout",
    152: "timeout",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every mutant, not a sample")
    parser.add_argument("--sample", type=int, default=400, metavar="N", help="so many (400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (0)")
    parser.add_argument("--again", action="store_true", help="first run the survivors once more")
    parser.add_argument("--show", action="store_true", help="run nothing, show the survivors")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    options = parser.parse_args()
    if not results():
        mutmut("run", "--max-children", "1", "npformer.masks.x_padding_mask__mutmut_1")
    names = sorted(results())
    if not options.all:
        names = sorted(random.Random(options.seed).sample(names, min(options.sample, len(names))))
    if options.again:
        run_in_parts([n for n in names if results()[n] not in KILLED], options.processes)
    while not options.show and (left := [n for n in names if results()[n] is None]):
        run_in_parts(left, options.processes)
    return report(names, options.show)


def run_in_parts(names: list[str], processes: int | None) -> None:
    """So that what is done is kept, whenever one stops."""
    for i in range(0, len(names), 50):
        mutmut("run", "--max-children", str(processes or 1), *names[i : i + 50])


def results() -> dict[str, int | None]:
    """Each mutant with the exit code of its tests; None where they have not run."""
    found = {}
    for name in FILES:
        path = ROOT / "mutants" / "npformer" / f"{name}.py.meta"
        if path.exists():
            found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def mutmut(*arguments: str) -> str:
    """Hypothesis draws fewer examples, and the same ones each time."""
    environment = os.environ | {"HYPOTHESIS_PROFILE": "mutation", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    show = arguments[0] == "show"
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=show)
    if done.returncode:
        sys.exit(f"mutmut {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout or ""


def report(names: list[str], show: bool) -> int:
    codes = results()
    survivors = [n for n in names if codes[n] is not None and codes[n] not in KILLED]
    print(f"\n{'file':<12}{'mutants':>8}{'killed':>8}{'others':>8}")
    for file in (*FILES, ""):
        here = [n for n in names if n.startswith(f"npformer.{file}")]
        ran = Counter(codes[n] in KILLED for n in here if codes[n] is not None)
        print(f"{file or 'all':<12}{ran.total():>8}{ran[True]:>8}{ran[False]:>8}")
    ran = [n for n in names if codes[n] is not None]
    print(f"score: {100 * (len(ran) - len(survivors)) / max(len(ran), 1):.1f} % of {len(ran)}\n")
    for name in survivors:
        code = codes[name]
        print(f"{name}: {'survived' if code in SURVIVED else OTHER.get(code or 0, f'exit {code}')}")
        if show:
            print(mutmut("show", name))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
