"""torchformer on a GPU: python -m benchmarks.gpu --out DIR

A card may be there for a quarter of an hour only.  So every section is a process of its own, which
may die without costing the others; what it has found is written at once, and the next call goes on
from there.  README.md beside this file says what to run, in which order, and what to do then.

    __main__.py      the command            shapes.py    the models, and what their steps must cost
    processes.py     a section, a process   timing.py    the clock
    results.py       bench.json             steps.py     one training step, and the contenders
    environment.py   which card             report.py    report.md, plots, the README's tables

    sections.py      what is measured; parity.py, kernels.py, ladder.py and levers.py: the longer
"""
