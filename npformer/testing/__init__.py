"""What the tests are made of, for any implementation of a Transformer that needs an oracle.

    gradcheck.py    is this backward the derivative of that forward?   (numpy only)
    strategies.py   Hypothesis strategies: shapes, arrays, masks and tokens that find mistakes
    op_cases.py     one record for each op: its twin in torch, its inputs, its bounds

and the kit, python -m npformer.testing, that runs any implementation through all of it:

    reference.py    what npformer says, operation by operation: also the shape of an adapter
    cases.py        the questions, at five levels, with their answers and bounds
    judge.py        is an answer right?
    variants.py     "you match if ...": the conventions that are not ours
    worker.py       calling code that may raise, hang, crash or write to its inputs
    report.py       what is said in the end

The comparison itself is npformer/compare.py.  Hypothesis and torch come with `npformer[test]`;
`import npformer` never imports this package.
"""

from npformer.testing.gradcheck import as_op, gradient_check

__all__ = ["as_op", "gradient_check"]
