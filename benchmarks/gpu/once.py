"""What once.sh needs of Python: python -m benchmarks.gpu.once keep RUN OUT | engines DEVICE DIR"""

import shutil
import sys
import traceback
from pathlib import Path

from npformer import checkpoint, training


def keep(run: Path, out: Path) -> int:
    """The model of a run, trained to its end or not, in half the bytes; what `export` reads."""
    config, weights = checkpoint.load(run)
    checkpoint.save(out, config, {name: x.astype("float16") for name, x in weights.items()})
    for name in (training.RUN, training.HISTORY):
        if (run / name).exists():  # history.json: of a run that came to its end
            shutil.copy(run / name, out)
    print((out / training.RUN).read_text())
    return 0


def engines(device: str, folder: Path) -> int:
    """A few steps by each way of training on several devices, on one: torch is imported once."""
    from torchformer import parallel

    failed = []
    for engine in parallel.ENGINES:
        out = str(folder / engine)
        chosen = ["sort", "--parallel", engine, "--steps", "4", "--device", device, "--out", out]
        try:
            code = parallel.main(chosen)
        except Exception:
            traceback.print_exc()
            code = 1
        failed += [engine] if code else []
    print("failed:", *failed) if failed else print("all have trained:", *parallel.ENGINES)
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    what, first, second = arguments
    try:
        return keep(Path(first), Path(second)) if what == "keep" else engines(first, Path(second))
    except checkpoint.CheckpointError as error:
        print(f"once: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
