"""Adapters that break the rules, each in one case: the kit has to name it and to go on."""

import os
import time

import numpy as np

from npformer.testing.reference import reference


def _spoiling(spoil):
    """A factory of the right answers, but for the second layer_norm case that is asked."""

    def factory():
        asked = []

        def target(op, arrays, options):
            if op == "layer_norm":
                same = [np.array_equal(arrays["x"], x) for x in asked]
                if not any(same):
                    asked.append(arrays["x"].copy())
                if len(asked) == 2 and np.array_equal(arrays["x"], asked[1]):
                    return spoil(op, arrays, options)
            return reference(op, arrays, options)

        return target

    return factory


def _changed(change):
    return _spoiling(lambda *question: change(reference(*question)))


def _raise(op, arrays, options):
    raise RuntimeError("something\nbroke")


def _write(op, arrays, options):
    answer = reference(op, arrays, options)
    arrays["x"] *= 2
    return answer


def _hang(op, arrays, options):
    time.sleep(1000)


def _die(op, arrays, options):
    os._exit(3)


_calls = []


def _differ(op, arrays, options):
    _calls.append(1)
    answer = reference(op, arrays, options)
    return answer | {"d.x": answer["d.x"] + len(_calls)}


raises = _spoiling(_raise)
writes = _spoiling(_write)
hangs = _spoiling(_hang)
dies = _spoiling(_die)
differs = _spoiling(_differ)
shape = _changed(lambda answer: answer | {"d.bias": answer["d.bias"][None]})
dtype = _changed(lambda answer: answer | {"y": answer["y"].astype(np.float32)})
fewer = _changed(lambda answer: {k: x for k, x in answer.items() if k != "d.weight"})
more = _changed(lambda answer: answer | {"d.eps": np.zeros(())})
no_output = _changed(lambda answer: {"d.x": answer["d.x"]})
a_list = _changed(lambda answer: list(answer.values()))
text = _changed(lambda answer: answer | {"y": "none"})
nan = _changed(lambda answer: answer | {"y": answer["y"] * np.nan})


def values_only():
    """No gradients at all: that is allowed."""
    return lambda *question: {
        k: x for k, x in reference(*question).items() if not k.startswith("d.")
    }


def nothing():
    def target(op, arrays, options):
        raise NotImplementedError(f"no {op} here")

    return target


def wants_arguments(op, arrays, options):
    return {}


def returns_nothing():
    return None


not_a_function = 3
