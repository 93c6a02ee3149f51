"""The kit for other implementations: npformer itself passes, what is wrong is named."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npformer import ops
from npformer.testing import gradient_check, worker
from npformer.testing.__main__ import main
from npformer.testing.cases import LEVELS, Case, cast, make_cases
from npformer.testing.judge import judge
from npformer.testing.reference import OPERATIONS, reference
from npformer.testing.report import Report, explained
from npformer.testing.strategies import random_like
from npformer.testing.variants import VARIANTS, by_variant, patched

OURS = "npformer.testing.reference:target"
TESTS = Path(__file__).parent


@functools.cache
def cases(level, n=6, dtype="float64"):
    return make_cases((level,), n, 0, dtype)


def report_of(target, questions):
    return Report(worker.answer_of(target, case) for case in questions)


# --- The cases --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("level", LEVELS)
def test_npformer_itself_passes(level, dtype):
    report = report_of(reference, cases(level, dtype=dtype))
    assert report.exit_code == 0, report.text()
    assert all(v.has_gradients for v in report.verdicts) or level == "decoding"
    if dtype == "float32" and level != "decoding":  # the bounds are not so wide as to say nothing
        assert 1e-3 < max(v.worst.tolerances for v in report.verdicts) <= 1


def test_every_operation_has_cases_and_every_case_another_name():
    found = [case for level in LEVELS for case in cases(level)]
    assert {case.op for case in found} == set(OPERATIONS)
    assert len({case.name for case in found}) == len(found)
    assert all(case.arrays[name].dtype.kind in "fib" for case in found for name in case.arrays)
    json.dumps([case.options for case in found])  # what another language can read


def test_a_seed_is_all_that_the_cases_depend_on():
    first, again, other = (make_cases(LEVELS, 2, seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert (a.name, a.options) == (b.name, b.options)
        for name, x in a.arrays.items():
            np.testing.assert_array_equal(x, b.arrays[name])
        for name, x in a.expected.items():
            np.testing.assert_array_equal(x, b.expected[name])
    assert any(a.options != b.options for a, b in zip(first, other, strict=True))


def test_what_is_fixed_does_not_vary():
    found = make_cases(("block", "model"), 4, fixed={"activation": "gelu", "norm_first": False})
    for case in found:
        options = case.options.get("config", case.options)
        assert (options["activation"], options["norm_first"]) == ("gelu", False)


def test_no_answer_of_a_decoding_case_is_trivial():
    for case in cases("decoding"):
        assert len(np.unique(case.expected["tokens"])) > 3
        assert not np.isin(case.expected["tokens"], [1, 2]).any()  # sos and eos are left out


# --- Wrong numbers are named ------------------------------------------------------------------


def test_a_wrong_gradient_in_a_model_is_marked_in_a_table_in_backward_order():
    case = cases("model")[0]
    names = list(case.expected)
    assert names[:4] == ["logits", "loss", "d.head.weight", "d.head.bias"]
    assert names[-1] == "d.src_embedding.weight"
    wrong = ["d.encoder.layers.0.norm1.weight", "d.encoder.layers.1.norm1.weight"]
    answer = case.expected | {name: 2 * case.expected[name] for name in wrong}
    verdict = judge(case, answer)
    assert verdict.status == "failed"
    marked = [line for line in verdict.note.splitlines() if line.startswith(">")]
    assert len(marked) == 1
    assert marked[0].split()[1] == wrong[1]  # the last layer's comes first
    assert "the first difference" in marked[0]
    assert "constant factor: actual = 2 * expected" in verdict.note
    shown = [line[2:].split()[0] for line in verdict.note.splitlines()[1 : len(names) + 1]]
    assert shown == names


def test_a_difference_names_the_case_the_tensor_and_the_index():
    def target(op, arrays, options):
        answer = reference(op, arrays, options)
        if op == "softmax" and arrays["x"].size > 4:
            answer["d.x"] = answer["d.x"] + 1e-3 * (np.arange(answer["d.x"].size) == 3).reshape(
                answer["d.x"].shape
            )
        return answer

    text = report_of(target, cases("op")).text()
    assert re.search(r"op\.softmax-\d: x \(", text)
    assert re.search(r"d\.x .*: 1 of \d+ entries are out of bound", text)
    assert "worst at (" in text
    assert "tolerances" in text


# --- You match if ... -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.meaning)
def test_an_implementation_by_another_convention_is_told_which(variant):
    """At the lowest level where it shows; a mistake above that would be found there as well."""

    def target(op, arrays, options):
        question = Case("", "", op, "float64", arrays, options, {}, {})
        return by_variant(question, (variant,))

    told = []
    for level in ("op", "layer", "block", "model"):
        groups = report_of(target, cases(level, 12)).groups().values()
        for group in groups:
            if any(v.status == "failed" for v in group):
                told.append(explained(group))
        if told:
            break
    assert told, "no case sees the difference"
    assert f"you match if {variant.meaning}" in told
    assert all(variant.meaning in said for said in told)  # or another that these cases do not see


def test_two_conventions_at_once_are_told_apart():
    chosen = [VARIANTS[0], next(v for v in VARIANTS if "post-norm" in v.meaning)]

    def target(op, arrays, options):
        return by_variant(Case("", "", op, "float64", arrays, options, {}, {}), tuple(chosen))

    group = report_of(target, [c for c in cases("block") if c.op == "encoder_layer"]).verdicts
    assert explained(group) == (
        "you match if GELU is the tanh approximation and pre-norm and post-norm are exchanged "
        "(norm_first)"
    )


def test_a_wrong_gradient_under_another_convention_is_no_match():
    def target(op, arrays, options):
        question = Case("", "", op, "float64", arrays, options, {}, {})
        answer = by_variant(question, (VARIANTS[2],))
        return answer | {"d.x": 2 * answer["d.x"]}

    questions = [case for case in cases("layer") if case.op == "layer_norm"]
    said = explained(report_of(target, questions).verdicts)
    assert said == (
        "you match if LayerNorm's eps is outside the root (the values; the gradients differ for "
        "another reason)"
    )


def test_what_no_convention_explains_is_not_explained():
    def target(op, arrays, options):
        return {name: x * 1.01 for name, x in reference(op, arrays, options).items()}

    assert all(
        explained(group) is None for group in report_of(target, cases("layer")).groups().values()
    )


PIECES = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b, 1e-3), [(3, 2, 5), (5,), (5,)]),
    "softmax": (lambda x: ops.softmax(x, np.tri(4, 5, dtype=bool)), [(2, 4, 5)]),
    "attention_weights": (lambda q, k: ops.attention_weights(q, k), [(2, 3, 4, 5), (2, 3, 6, 5)]),
    "linear": (lambda x, w, b: ops.linear(x, w, b), [(2, 4), (4, 4), (4,)]),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, np.array([[1, 0, 2], [2, 2, 0]]), 0, 0.1),
        [(2, 3, 4)],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.meaning)
def test_the_variants_have_the_gradients_of_their_values(variant):
    patches = variant.patches()
    replaced = {name for owner, name, _ in patches if owner is ops} & set(PIECES)
    for name in replaced:
        op, shapes = PIECES[name]
        with patched(patches):
            gradient_check(name, op, *(random_like(s, np.float64, 3) for s in shapes))


# --- Other libraries --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # a fast path of inference
def test_torch_nn_passes(level, dtype, importable):
    target = worker.load_target("adapters.torch_nn:adapter")
    report = report_of(target, cases(level, dtype=dtype))
    assert report.exit_code == 0, report.text()
    asked = {v.case.op for v in report.compared}
    assert {v.case.op for v in report.verdicts} - asked <= {
        *("attention_weights", "dropout", "sinusoidal_positions", "decoder_only")
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "annotated",
            "LayerNorm's variance is unbiased and its eps outside the root and "
            "LayerNorm's eps is 1e-06",
        ),
        ("eps_outside", "LayerNorm's eps is outside the root"),
        ("not_scaled", "scores are not divided by √D"),
        ("from_the_start", "the causal mask starts at offset 0"),
        ("two_halves", "positions are all sines, then all cosines"),
    ],
)
@pytest.mark.filterwarnings("ignore:std:UserWarning")  # of one feature
def test_other_conventions_by_autograd_are_told(name, said, importable):
    """The variants are ours, these formulas and their gradients are not."""
    target = worker.load_target(f"adapters.torch_nn:{name}")
    ops_asked = {"layer_norm", "causal_attention", "sinusoidal_positions"}
    questions = [case for case in cases("layer", 12) if case.op in ops_asked]
    groups = report_of(target, questions).groups().values()
    told = [explained(group) for group in groups if any(v.status == "failed" for v in group)]
    if name == "eps_outside":  # 1e-5 always, whatever it is given
        said += " and LayerNorm's eps is 1e-05"
    assert told == [f"you match if {said}"]


def test_jax_passes(importable):
    pytest.importorskip("jax", reason="JAX is not installed")
    target = worker.load_target("adapters.jax_numpy:adapter")
    questions = [case for level in ("op", "layer") for case in cases(level, 2)]
    report = report_of(target, questions)
    assert report.exit_code == 0, report.text()
    assert {v.case.op for v in report.compared} >= {"layer_norm", "multi_head_attention"}


def test_what_jax_means_by_its_defaults_is_told(importable):
    pytest.importorskip("jax", reason="JAX is not installed")
    target = worker.load_target("adapters.jax_numpy:by_default")
    report = report_of(target, [case for case in cases("op", 6) if case.op == "gelu"])
    assert explained(report.verdicts) == "you match if GELU is the tanh approximation"


# --- Adapters that break the rules ------------------------------------------------------------


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))  # worker processes get the same path


SAID = {
    "raises": r"raised RuntimeError: something broke \(bad\.py:\d+\)",
    "writes": "wrote to its input x",
    "differs": "not deterministic: d.x differs between two calls with the same inputs",
    "shape": r"d\.bias \(1, \d\) float64: expected the shape \(\d,\)",
    "dtype": "y is float32, not float64",
    "fewer": r"2 gradients, expected 3: missing d\.weight",
    "more": r"4 gradients, expected 3: unknown d\.eps",
    "no_output": "0 outputs, expected 1: missing y",
    "a_list": "returned a list, not a dict of arrays",
    "text": "y is a str, not an array of numbers",
    "nan": "actual is NaN in",
}


@pytest.mark.parametrize("name", SAID)
def test_a_bad_adapter_is_named_case_by_case(name, importable):
    target = worker.load_target(f"adapters.bad:{name}")
    report = report_of(
        target, [case for case in cases("layer") if case.op in ("layer_norm", "linear")]
    )
    assert report.exit_code == 1
    assert [v.case.name for v in report.failed] == ["layer.layer_norm-1"], report.text()
    assert re.search(SAID[name], report.failed[0].note)
    assert "layer.layer_norm-1: x (" in report.text()


def test_values_without_gradients_are_enough(importable):
    report = report_of(worker.load_target("adapters.bad:values_only"), cases("layer"))
    assert report.exit_code == 0
    assert not any(v.has_gradients for v in report.verdicts)
    assert "none" in report.text()


def test_what_is_not_implemented_is_skipped_and_nothing_at_all_is_a_failure(importable):
    report = report_of(worker.load_target("adapters.bad:nothing"), cases("block"))
    assert report.exit_code == 1
    assert report.summary() == "nothing was compared, 12 skipped"
    assert "block    skipped: encoder_layer, decoder_layer" in report.text()
    assert report.verdicts[0].note == "no encoder_layer here"


@pytest.mark.parametrize(
    ("name", "said"),
    [("hangs", "no answer within 1 s"), ("dies", "the process ended without an answer (exit 3)")],
)
def test_a_hang_or_a_crash_costs_one_case_and_not_the_run(name, said, importable):
    questions = [case for case in cases("layer", 3) if case.op in ("layer_norm", "feed_forward")]
    verdicts = []
    with worker.Worker(f"adapters.bad:{name}") as target:
        for case in questions:  # a machine may be slow: only who hangs is not waited for
            target.limit = 1.0 if case.name == "layer.layer_norm-1" else 60.0
            verdicts.append(target.ask(case))
    report = Report(verdicts)
    assert [(v.case.name, v.note) for v in report.failed] == [("layer.layer_norm-1", said)]
    assert len(report.compared) == len(questions)


# --- The command ------------------------------------------------------------------------------


def test_the_command_writes_a_report_and_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = ["--target", OURS, "--level", "layer", "--examples", "2", "--json", str(path)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "all 14 cases agree" in text
    found = json.loads(path.read_text())
    assert found["summary"] == "all 14 cases agree"
    assert found["you_match_if"] == {}
    assert found["cases"][0]["tensors"]["d.weight"] == {
        "ok": True,
        "max_error": 0.0,
        "fraction_of_bound": 0.0,
    }


def test_the_command_exits_1_where_something_differs(importable, capsys):
    arguments = ["--level", "layer", "--examples", "2", "--target", "adapters.bad:shape"]
    assert main(arguments) == 1
    assert "1 of 14 cases differ" in capsys.readouterr().out


REFUSED = {
    "nowhere_at_all:f": "ModuleNotFoundError: No module named 'nowhere_at_all'",
    "adapters.bad:nobody": "has no attribute 'nobody'",
    "adapters.bad": "must look like pkg.module:factory",
    "adapters.bad:wants_arguments": "wants arguments; name a function without any",
    "adapters.bad:returns_nothing": "returned a NoneType, not an adapter",
    "adapters.bad:not_a_function": "is no function, its type is int",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_a_target_that_cannot_be_imported_is_one_line(spec, importable):
    with pytest.raises(worker.TargetError) as raised:
        worker.load_target(spec)
    assert REFUSED[spec] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_command_that_is_wrong_exits_2_with_one_line():
    command = [sys.executable, "-m", "npformer.testing", "--level", "op", "--target"]
    done = subprocess.run(
        [*command, "nowhere_at_all:f"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No module named 'nowhere_at_all'" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("fix", ["colour=red", "norm_first", "n_heads=3.5", "d_model=7"])
def test_what_cannot_be_fixed_is_refused(fix, capsys):
    assert main(["--target", OURS, "--level", "model", "--examples", "1", "--fix", fix]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert fix.partition("=")[0] in said


def test_the_inputs_are_what_the_adapter_gets():
    """float32 cases come as float32, contiguous, writable, and ids as int64."""

    def target(op, arrays, options):
        for x in arrays.values():
            assert x.dtype in (np.float32, np.int64, np.bool_)
            assert x.flags.c_contiguous
            assert x.flags.writeable
        return reference(op, arrays, options)

    questions = cases("op", dtype="float32") + cases("model", dtype="float32")
    assert report_of(target, questions).exit_code == 0
    assert cast(questions[0].arrays, np.float64)["dy"].dtype == np.float64
