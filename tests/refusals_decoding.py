"""Ids, masks and the options of decoding: rows of the table of test_refusals.py."""

from refusals import Row

ROWS: list[Row] = []
