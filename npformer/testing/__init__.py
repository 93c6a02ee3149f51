"""What the tests are made of, for any implementation of a Transformer that needs an oracle.

    gradcheck.py    is this backward the derivative of that forward?   (numpy only)
    strategies.py   Hypothesis strategies: shapes, arrays, masks and tokens that find mistakes
    op_cases.py     one record for each op: its twin in torch, its inputs, its bounds

The comparison itself is npformer/compare.py.  Hypothesis and torch come with `npformer[test]`;
`import npformer` never imports this package.
"""

from npformer.testing.gradcheck import as_op, gradient_check

__all__ = ["as_op", "gradient_check"]
