"""Hyper-parameters and options: rows of the table of test_refusals.py."""

from dataclasses import fields

from refusals import NO_INTEGERS, NO_NUMBERS, SMALL, Row, rows

import npformer
import torchformer


def _config() -> list[Row]:
    """One class for both twins, so both are asked through their own name for it."""
    found = []
    values = {int: NO_INTEGERS, float: [*NO_NUMBERS, -0.1, float("nan"), float("inf")]}
    values |= {str: [None, 1, "", "no such"], bool: [1, 0, "true"]}
    for field in fields(npformer.TransformerConfig):
        kind = bool if field.name == "final_norm" else type(field.default)
        kind = kind if kind in values else int
        ours, theirs = (
            lambda value, name=field.name, package=package: package.TransformerConfig(
                **{f.name: getattr(SMALL, f.name) for f in fields(SMALL)} | {name: value}
            )
            for package in (npformer, torchformer)
        )
        found += rows(f"config {field.name}", ours, theirs, f"^{field.name} ", values[kind])
    return found


ROWS = [*_config()]
