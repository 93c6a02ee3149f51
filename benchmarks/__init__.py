"""How fast, and against what: each module is a command, `python -m benchmarks.training --help`.

harness.py      how anything is timed, and when a ratio may be formed
configs.py      the three sizes: S, M and B
contenders.py   one training step, by each contender
training.py     the step against torch.nn.Transformer and against its own matrix products
breakdown.py    where the step's time goes, op by op
decoding.py     64 tokens, with and without a cache, beside Hugging Face's Marian
ops.py          every op, forward and backward
startup.py      from process start to the end of the first step
memory.py       peak memory against depth, length and batch
sweep.py        the step against the width of the model
roofline.py     each op under the machine's two ceilings
tables.py       draw the tables of result files, and those of the README
plots.py        draw the pictures
__main__.py     everything, one after the other: python -m benchmarks
"""
