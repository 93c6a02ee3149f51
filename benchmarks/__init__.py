"""How fast, and against what: each module is a command, `python -m benchmarks.training --help`.

harness.py      how anything is timed, and when a ratio may be formed
configs.py      the three sizes: S, M and B
contenders.py   one training step, by each contender
training.py     the step against torch.nn.Transformer and against its own matrix products
ops.py          every op, forward and backward
startup.py      from process start to the end of the first step
memory.py       peak memory against depth, length and batch
tables.py       draw the tables again from a result file
"""
