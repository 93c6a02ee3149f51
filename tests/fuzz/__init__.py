"""A fuzzer for what is read: files that were damaged or forged, and command lines.

    python -m tests.fuzz --what checkpoints --mutations 10000 --seed 1
    python -m tests.fuzz --what checkpoints --seed 1 --only 4711        that one again, in detail

Each mutation is made in a fresh copy of a good folder and run in this program's own process, in
forked workers.  A finding is an exception that escapes, more than one line on standard error, 5
seconds, 512 MB, or a file that a refusal has changed.  Everything follows from seed and number.
"""
