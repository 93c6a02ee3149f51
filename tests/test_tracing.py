"""The trace: the numbers that were there, under names that say where; and the first difference."""

import cProfile
import json
import pstats
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from zoo import ZOO, planted

import npformer
from npformer import checkpoint, cli, cross_entropy, tasks, tracing, training
from npformer.testing.models import make_model
from npformer.tracing import Trace, difference
from torchformer.convert import to_torch
from torchformer.tracing import trace as torch_trace

CONFIG = npformer.TransformerConfig(
    9, 9, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=2, n_decoder_layers=2, max_len=8
)
SRC, TGT, TARGETS = np.array([[3, 4, 5]]), np.array([[1, 6, 7, 8]]), np.array([[6, 7, 8, 2]])


def traced(model=None):
    return npformer.trace(model or make_model(CONFIG, 0), SRC, TGT, target=TARGETS)


def torch_traced():
    src, tgt, target = map(torch.from_numpy, (SRC, TGT, TARGETS))
    return torch_trace(to_torch(make_model(CONFIG, 0)), src, tgt, target=target)


def test_the_values_are_those_of_the_step():
    model = make_model(CONFIG, 0)
    seen = traced(model)
    logits, _ = model(SRC, TGT)
    loss, _ = cross_entropy(logits, TARGETS, CONFIG.tgt_pad_id)
    np.testing.assert_array_equal(seen["logits"].value, logits)
    assert seen.about["loss"] == loss
    weights = seen["encoder.layers.0.self_attn.weights"].value
    assert weights.shape == (1, 2, 3, 3)
    np.testing.assert_allclose(weights.sum(axis=-1), 1)
    memory, _ = model.encode(SRC)
    np.testing.assert_array_equal(seen["memory"].value, memory)


def test_names_say_where_and_every_layer_has_its_own():
    seen = traced()
    names = [entry.name for entry in seen]
    for stack in ("encoder", "decoder"):
        for i in range(2):
            layer = f"{stack}.layers.{i}"
            for name in ("self_attn.scores", "self_attn.weights", "norm1.y", "feed_forward.h"):
                assert f"{layer}.{name}" in names, f"{layer}.{name}"
            for name in ("self_attn.dscores", "self_attn.dq", "feed_forward.da"):
                assert f"{layer}.{name}" in names, f"{layer}.{name}"
    assert len(set(names)) == len(names)


def test_forward_comes_before_backward_and_the_last_layer_goes_back_first():
    seen = traced()
    phases = [entry.phase for entry in seen]
    assert phases == sorted(phases, reverse=True)  # forward, then backward
    names = [entry.name for entry in seen]
    assert names.index("decoder.layers.1.self_attn.dscores") < names.index(
        "decoder.layers.0.self_attn.dscores"
    )
    assert names.index("decoder.layers.0.self_attn.dscores") < names.index(
        "encoder.layers.1.self_attn.dscores"
    )


def test_gradients_are_those_of_the_step():
    model = make_model(CONFIG, 0)
    seen = traced(model)
    assert not any(p.grad.any() for p in model.parameters())  # as if nobody had looked
    dlogits = seen["loss.dlogits"].value.reshape(1, 4, 9)
    p = np.exp(seen["logits"].value)
    p /= p.sum(axis=-1, keepdims=True)
    p[0, np.arange(4), TARGETS[0]] -= 1
    np.testing.assert_allclose(dlogits, p / 4, atol=1e-12)


def test_the_formula_is_the_line_and_the_letters_its_comment():
    entry = traced()["encoder.layers.0.self_attn.scores"]
    assert entry.file == "npformer/ops.py"
    lines = (tracing.PACKAGE / "ops.py").read_text().splitlines()
    assert "scores" in lines[entry.line - 1]
    assert entry.formula in lines[entry.line - 1]
    assert entry.letters == "(..., T, S)"


def test_the_formula_is_of_the_value_as_it_was_not_of_what_became_of_it():
    """e is exp(x) when its sum is taken, and divided in place afterwards."""
    seen = traced()
    attention = "decoder.layers.1.cross_attn"
    e, total = seen[f"{attention}.softmax.e"], seen[f"{attention}.total"]
    np.testing.assert_allclose(e.value.sum(axis=-1, keepdims=True), total.value)
    assert e.formula == "e = _exp_up_to_scale(x, mask)"
    seen_ids = [entry for entry in seen if entry.name.endswith(("sorted_ids", "starts"))]
    assert seen_ids
    for entry in seen_ids:  # not the line in which they are an index
        assert entry.formula.startswith(entry.name.split(".")[-1].split("#")[0] + " =")


def test_watching_leaves_no_trace_of_itself():
    model, before = make_model(CONFIG, 0), sys.getprofile()
    logits, _ = model(SRC, TGT)
    traced(model)
    assert sys.getprofile() is before
    np.testing.assert_array_equal(model(SRC, TGT)[0], logits)
    with pytest.raises(ValueError, match="tgt has 9 positions"):
        npformer.trace(model, SRC, np.ones((1, 9), int))
    assert sys.getprofile() is before


def later():
    """Called after the trace, for a profiler to see."""


@pytest.mark.parametrize("run", [traced, lambda: torch_traced()], ids=["numpy", "torch"])
def test_a_profiler_and_a_debugger_go_on_beside_the_trace(run):
    names, alone = [], [entry.name for entry in run()]
    told, debugger = [], lambda *_: None
    before, tracer = sys.getprofile(), sys.gettrace()

    def hook(frame, event, _):
        told.append((event, frame.f_code.co_name))

    try:
        sys.setprofile(hook)
        sys.settrace(debugger)
        names = [entry.name for entry in run()]
        assert (sys.getprofile(), sys.gettrace()) == (hook, debugger)
        later()
    finally:
        sys.setprofile(before)
        sys.settrace(tracer)
    assert names == alone
    for seen in (("call", "encode"), ("return", "encode"), ("call", "later")):
        assert seen in told  # the step, and what came after it


def test_cprofile_goes_on_after_the_trace():
    alone, profile, before = [e.name for e in traced()], cProfile.Profile(), sys.getprofile()
    profile.enable()
    try:
        names = [entry.name for entry in traced()]
        later()
    finally:
        profile.disable()
        sys.setprofile(before)
    assert names == alone
    assert {"trace", "later"} <= {name for _, _, name in pstats.Stats(profile).stats}


def test_a_profiler_that_cannot_be_paused_is_named(monkeypatch):
    monkeypatch.setattr(sys, "getprofile", lambda: {"of": "somebody"})
    with pytest.raises(ValueError, match=r"\{'of': 'somebody'\} is profiling and cannot be paused"):
        traced()


def test_forward_alone_and_a_decoder_only_model():
    seen = npformer.trace(make_model(CONFIG, 0), SRC, TGT)
    assert {entry.phase for entry in seen} == {"forward"}
    config = npformer.TransformerConfig(
        9, 9, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=0, n_decoder_layers=1
    )
    seen = npformer.trace(make_model(config, 0), None, TGT, target=TARGETS)
    assert "decoder.layers.0.self_attn.weights" in seen


def test_a_trace_is_written_and_read_as_it_was(tmp_path):
    seen = traced()
    seen.save(tmp_path / "a")
    again = Trace.load(tmp_path / "a")
    assert [e.name for e in again] == [e.name for e in seen]
    for a, b in zip(seen, again, strict=True):
        np.testing.assert_array_equal(a.value, b.value)
        assert (a.phase, a.letters, a.formula, a.file, a.line) == (
            (b.phase, b.letters, b.formula, b.file, b.line)
        )
    assert difference(seen, again) is None


def test_what_is_no_trace_is_refused(tmp_path, capsys):
    traced().save(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trace.json").write_text("{}")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "trace.json").write_text(json.dumps({"format_version": 2}))
    for name in ("empty", "broken", "later", "nowhere"):
        assert cli.main(["diff", str(tmp_path / name), str(tmp_path / "good")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert name in error
    seen = traced()
    with pytest.raises(KeyError, match="the trace has no scores; there are encoder"):
        seen["scores"]
    other = Trace([tracing.Entry("theirs", "forward", np.ones(1), "", "", "", 0)])
    with pytest.raises(ValueError, match="no name in common"):
        difference(seen, other)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_twin_gives_the_same_names_and_the_same_numbers(norm_first):
    config = replace(CONFIG, norm_first=norm_first, activation="gelu")
    model = make_model(config, 0)
    ours = npformer.trace(model, SRC, TGT, target=TARGETS)
    ids = [torch.tensor(x) for x in (SRC, TGT, TARGETS)]
    theirs = torch_trace(to_torch(model), *ids[:2], target=ids[2])
    assert theirs.about["loss"] == pytest.approx(ours.about["loss"], rel=1e-12)
    common = [entry.name for entry in ours if entry.name in theirs]
    for name in ("q", "k", "v", "qh", "scores", "weights", "yh", "dscores", "dweights"):
        for layer in ("encoder.layers.1.self_attn", "decoder.layers.0.cross_attn"):
            assert f"{layer}.{name}" in common, f"{layer}.{name}"
    assert len(common) > 100
    found = difference(ours, theirs)
    assert found is None, found
    with planted(ZOO_BY_NAME["no-root-of-d"]):
        wrong = npformer.trace(model, SRC, TGT, target=TARGETS)
    found = difference(wrong, theirs)
    assert found is not None
    assert found.name == "encoder.layers.0.self_attn.scores"


def test_traces_of_other_models_and_inputs_are_refused(tmp_path, capsys):
    other = replace(CONFIG, d_ff=16)
    with pytest.raises(ValueError, match="different models: d_ff is 12 in one, 16 in the other"):
        difference(traced(), traced(make_model(other, 0)))
    shorter = npformer.trace(make_model(CONFIG, 0), SRC[:, :2], TGT, target=TARGETS)
    with pytest.raises(ValueError, match=r"different inputs: shapes \[\[1, 3\], \[1, 4\]\] and"):
        difference(traced(), shorter)
    traced().save(tmp_path / "a")
    traced(make_model(other, 0)).save(tmp_path / "b")
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


IN_THE_MODEL = ("op.softmax", "op.attention", "op.linear", "op.layer_norm", "op.embedding")
SEEN_HERE = [
    bug
    for bug in ZOO
    if bug.where.startswith(IN_THE_MODEL)
    and bug.name
    not in (
        "masked-rows-are-uniform",  # no row of this input has nothing to attend to,
        "softmax-without-its-maximum",  # no score is that large,
        "the-pad-row-learns",  # there is no pad,
        "runs-added-unsorted",  # the ids come sorted,
        "softmax-gradient-by-the-batch",  # which is 1,
        "repeated-ids-count-once",  # no id is there twice,
        "variance-by-squares",  # rounding is not seen,
        "dropout-skipped-going-back",  # and nothing is dropped
        "dropout-before-softmax-weights",
        "dv-before-dropout",
    )
]


@pytest.mark.parametrize("bug", SEEN_HERE, ids=lambda bug: f"zoo-{bug.name}")
def test_zoo_the_op_that_was_broken_is_named(bug):
    """The line that made the first different tensor stands in the function that was patched, or
    in the one that called it."""
    right = traced()
    with planted(bug) as changed:
        wrong = traced()
    found = difference(wrong, right)
    assert found is not None
    assert len(found.inherited) > 3
    file, line = found.at.split(":")
    lines = (tracing.PACKAGE.parent / file).read_text().splitlines()
    here = next(
        text for text in reversed(lines[: int(line)]) if text.lstrip().startswith("def ")
        and not text.lstrip().startswith("def backward")
    )  # fmt: skip
    named = here.split("def ")[1].split("(")[0]
    callers = {"attention_weights": {"attention"}, "softmax": {"attention_weights"}}
    allowed = set(changed) | set().union(*(callers.get(name, set()) for name in changed))
    returned = ("y", "dx", "dy_rows", "dweight", "dbias")  # without a name until the caller has it
    assert named in allowed or found.name.split(".")[-1] in returned, found


ZOO_BY_NAME = {bug.name: bug for bug in ZOO}


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("no-root-of-d", "self_attn.scores"),
        ("softmax-over-queries", "self_attn.softmax"),
        ("heads-merged-without-transpose", "self_attn"),
        ("gamma-outside-the-means", "norm"),
        ("mean-path-forgotten", "norm"),
        ("scale-forgotten-going-back", "attn"),
        ("dw-by-reshape", "dweight"),
        ("relu-learns-at-zero", None),  # nothing is exactly 0 here
        ("embeddings-not-scaled", ""),
        ("decoder-not-causal", "mask"),
        ("residual-through-the-norm", None),  # pre-norm, and this model is post-norm
        ("only-the-query-learns", "encoder.dx"),
    ],
)
def test_zoo_the_first_difference_is_where_the_bug_is(name, first):
    right = traced()
    with planted(ZOO_BY_NAME[name]):
        wrong = traced()
    found = difference(wrong, right)
    if first is None:
        assert found is None
        return
    assert found is not None
    assert first in found.name, found.name
    bug = ZOO_BY_NAME[name]
    if bug.tensor.startswith("d."):
        assert found.phase == "backward"


@pytest.fixture
def run_folder(tmp_path):
    task, folder = tasks.load("sort"), tmp_path / "run"
    sizes = (len(task.src_vocabulary), len(task.tgt_vocabulary))
    config = npformer.TransformerConfig(*sizes, d_model=16, n_heads=2, d_ff=16, max_len=16)
    npformer.Transformer(config, np.random.default_rng(0)).save(folder)
    about = {"task": "sort", "backend": "numpy", "seed": 0, "recipe": {}}
    checkpoint.save_json(folder / training.RUN, about)
    return folder


def test_the_commands(run_folder, tmp_path, capsys):
    out = str(tmp_path / "seen")
    assert cli.main(["trace", str(run_folder), "312", "--out", out, "--match", "scores"]) == 0
    said = capsys.readouterr().out
    assert "encoder.layers.0.self_attn.scores" in said
    assert "scores = q @ k.mT" in said or "scores *= scale" in said
    assert "Saved: " in said
    assert cli.main(["diff", out, out]) == 0
    assert "no difference" in capsys.readouterr().out
    seen = Trace.load(out)
    entry = seen["encoder.layers.1.self_attn.scores"]
    entry.value[0, 0, 1, 1] += 1
    seen.save(tmp_path / "other")
    assert cli.main(["diff", str(tmp_path / "other"), out]) == 1
    said = capsys.readouterr().out
    assert "first difference, in forward: encoder.layers.1.self_attn.scores" in said
    assert "(0, 0, 1, 1)" in said
    pytest.importorskip("matplotlib")
    png = tmp_path / "attention.png"
    assert cli.main(["attention", str(run_folder), "312", "--out", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    png = tmp_path / "embeddings.png"
    assert cli.main(["embeddings", str(run_folder), "--out", str(png)]) == 0
    assert "13 source tokens, 13 target tokens" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    for command in (["trace", str(run_folder), "3x2"], ["attention", str(run_folder), ""]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
