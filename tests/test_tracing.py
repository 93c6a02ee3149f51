"""The trace: the numbers that were there, under names that say where; and the first difference."""

import ast
import cProfile
import functools
import json
import pstats
import re
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
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


MODELS = {
    CONFIG: "post-norm",
    replace(CONFIG, norm_first=True, activation="gelu", positions="learned"): "pre-norm",
    replace(CONFIG, n_encoder_layers=0, activation="gelu_tanh", tie_head=True): "decoder-only",
}


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
    assert entry.formula == "scores = _times(q @ k.mT, scale)"


def test_every_formula_makes_the_tensor_and_has_run():
    """What changes it in place comes after, and what was skipped is not there."""
    seen = traced()
    for entry in seen:
        local = entry.name.split(".")[-1].split("#")[0]
        made, _, _ = entry.formula.partition(" = ")
        assert local in made.split(", "), (entry.name, entry.formula)
        for line in entry.refined.splitlines():
            assert re.match(rf"{local}(\[.*?\])? [-+*/]?= ", line), (entry.name, line)
    assert seen["loss.dlogits"].formula == "dlogits = p * scale"
    assert seen["loss.dlogits"].refined.splitlines() == [
        "dlogits[rows, labels] -= scale * (1 - label_smoothing)",
        "dlogits[~counted] = 0",
    ]  # and not the line of the smoothing, of which there is none
    losses = seen["loss.losses"]
    assert losses.formula.startswith("losses = (1 - label_smoothing) * (log_total")
    assert losses.refined == ""
    assert seen["encoder.layers.0.norm1.layer_norm.y"].refined == "y += bias"


@pytest.mark.parametrize("config", MODELS, ids=MODELS.get)
def test_every_tensor_has_its_equation(config):
    model = make_model(config, 0)
    source = None if config.n_encoder_layers == 0 else SRC
    seen = npformer.trace(model, source, TGT, target=TARGETS, rng=np.random.default_rng(0))
    for entry in seen:
        assert re.search(r" (=|←) ", entry.equation), entry.name
    for name, said in {
        "self_attn.scores": "weights = softmax(q kᵀ / √D)",
        "self_attn.weights": "y = exp(x) / Σ exp(x)",
        "self_attn.dscores": "dx = y (dy - Σ dy y)",
        "self_attn.dq": "dq = dscores k / √D",
        "self_attn.dk": "dk = dscoresᵀ q / √D",
        "self_attn.dv": "dv = weightsᵀ dy",
        "self_attn.q": "y = x Wᵀ + b",
        "q_proj.dx": "dx = dy W, dW = dyᵀ x, db = Σ dy",
        "norm1.rstd": "xhat = (x - mean) / √(var + eps)",
        "norm1.mean_dxhat": "dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))",
        "loss.losses": "loss = mean of -Σᵥ t_v log p_v",
        "loss.dlogits": "dlogits = (p - t) / n",
        "tgt_embedding.dweight": "dweight[v] = Σ of the rows of dy where the id is v",
    }.items():
        module, local = name.split(".")
        shown = [e for e in seen if re.search(rf"\b{module}(\.\w+)?\.{local}(#|$)", e.name)]
        assert any(said in entry.equation for entry in shown), name


def test_every_tensor_of_the_twin_has_its_equation():
    for entry in torch_traced():
        assert re.search(r" (=|←) ", entry.equation), (entry.name, entry.formula)


# --- The order ---------------------------------------------------------------------------------


def test_entries_come_in_the_order_in_which_the_lines_ran():
    names = [entry.name for entry in traced()]
    norm = [name for name in names if name.startswith("encoder.layers.0.norm1.")]
    locals_ = [name.removeprefix("encoder.layers.0.norm1.") for name in norm]
    assert locals_[:8] == [
        *("x_rows", "mean", "centred", "variance", "rstd", "xhat", "layer_norm.y", "y")
    ]
    backward = ("dy_rows", "dy_xhat", "mean_dxhat", "mean_dxhat_xhat", "layer_norm.dx", "dx")
    assert locals_[8:14] == [*backward]
    loss = [name.removeprefix("loss.") for name in names if name.startswith("loss.")]
    made = ("ids", "counted", "labels", "rows", "logits_rows", "shifted", "e", "total", "p")
    assert loss == [*made, "log_total", "losses", "loss", "dlogits"]


def spoiled(value, which=None):
    """A value with a bug in it; of several, which."""
    if which is not None:
        return tuple(spoiled(v) if i == which else v for i, v in enumerate(value))
    if getattr(value, "dtype", None) in (bool, torch.bool):
        return ~value
    if isinstance(value, torch.Tensor | float | int):
        return value * 1.01 + 0.01
    return value[::-1].copy() if value.dtype.kind in "iu" else value * 1.01 + 0.01


@contextmanager
def spoiled_line(file, line, local):
    """What that line gives to that local is wrong."""
    path = tracing.PACKAGE.parent / file
    module = sys.modules[file.removesuffix(".py").replace("/", ".")]
    tree, _ = tracing._parsed(str(path))  # parsed once
    around = next(node for node in tree.body if node.lineno <= line <= node.end_lineno)
    statement = next(
        node
        for node in ast.walk(around)
        if isinstance(node, ast.Assign | ast.AugAssign) and node.lineno == line
    )
    which = None
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):
        which = [name.id for name in statement.targets[0].elts].index(local)
    wrong, value = vars(module).copy(), statement.value
    call = ast.Call(ast.Name("_spoiled", ast.Load()), [value, ast.Constant(which)], [])
    statement.value = ast.fix_missing_locations(ast.copy_location(call, value))
    exec(compile(ast.Module([around], []), path, "exec"), wrong)
    statement.value = value
    functions = zoo._functions(ast.Module([around], []))
    name = next(name for name, n in functions.items() if n.lineno <= line <= n.end_lineno)
    live = zoo._find(vars(module), name)
    code, live.__code__ = live.__code__, zoo._find(wrong, name).__code__
    vars(module)["_spoiled"] = spoiled
    try:
        yield
    finally:
        live.__code__ = code
        del vars(module)["_spoiled"]


def misnamed(run, tried):
    """Of the bugs in any line of a step, those after which another tensor is named."""
    right = run()
    for i, entry in enumerate(right):
        if entry.formula.startswith("the gradient of"):
            continue  # autograd's, of no line
        local = entry.name.split(".")[-1].split("#")[0]
        lines = (tracing.PACKAGE.parent / entry.file).read_text().splitlines()
        place = entry.line
        for text in [entry.formula, *entry.refined.splitlines()]:
            while text != entry.formula and text not in lines[place - 1]:
                place += 1
            if (entry.file, place, local) not in tried:
                tried.add((entry.file, place, local))
                with spoiled_line(entry.file, place, local):
                    found = difference(run(), Trace(right.entries[: i + 1]))
                if found is None or found.name != entry.name or not found.created:
                    yield text, entry.name, found


SMALL = replace(CONFIG, n_encoder_layers=1, n_decoder_layers=1)
SPOILED = [
    replace(SMALL, final_norm=True),
    replace(SMALL, norm_first=True, activation="gelu", positions="learned", tie_head=True),
    replace(SMALL, n_encoder_layers=0, activation="gelu_tanh", attention_dropout=0.5),
]


def test_whichever_line_is_wrong_its_tensor_is_the_first_to_differ():
    """Every intermediate of every op and module, forward and backward."""
    tried = set()
    targets = np.array([[6, 7, 8, CONFIG.tgt_pad_id]])
    for config in SPOILED:
        model = make_model(config, 0)
        source = None if config.n_encoder_layers == 0 else SRC

        def run(model=model, source=source):
            rng = np.random.default_rng(0) if model.config.attention_dropout else None
            return npformer.trace(model, source, TGT, target=targets, rng=rng)

        assert list(misnamed(run, tried)) == []
    assert len(tried) > 200


def test_whichever_line_of_the_twin_is_wrong_its_tensor_is_the_first_to_differ():
    tried = set()
    src, tgt, target = map(torch.from_numpy, (SRC, TGT, TARGETS))
    for norm_first in (False, True):
        model = to_torch(make_model(replace(SMALL, norm_first=norm_first), 0))
        run = functools.partial(torch_trace, model, src, tgt, target=target)
        assert list(misnamed(run, tried)) == []
    assert len(tried) > 40


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


def test_a_debugger_is_told_every_line_of_the_step():
    told, before = [], sys.gettrace()

    def debugger(frame, event, _):
        told.append((event, frame.f_code.co_name))
        return debugger

    try:
        sys.settrace(debugger)
        names = [entry.name for entry in traced()]
    finally:
        sys.settrace(before)
    assert names == [entry.name for entry in traced()]
    assert told.count(("call", "layer_norm")) == told.count(("return", "layer_norm")) > 9
    assert told.count(("line", "layer_norm")) > 9 * told.count(("call", "layer_norm"))


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
        ("softmax-over-queries", "self_attn.total"),
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


@pytest.mark.parametrize("run", [traced, lambda: torch_traced()], ids=["numpy", "torch"])
def test_who_takes_the_hook_back_at_every_call_does_not_end_the_trace(run):
    """As coverage does, in C."""
    told, before, alone = [], sys.gettrace(), [entry.name for entry in run()]

    def coverage(frame, event, _):
        told.append((event, frame.f_code.co_name))
        if event == "call":
            sys.settrace(coverage)
        return coverage

    try:
        sys.settrace(coverage)
        names = [entry.name for entry in run()]
        assert sys.gettrace() is coverage
    finally:
        sys.settrace(before)
    assert names == alone
    assert {("call", "encode"), ("line", "encode"), ("return", "encode")} <= {*told}


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
    assert "scores = _times(q @ k.mT, scale)" in said
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
    assert "inherited" not in said  # nothing else was changed
    for name in ("loss.losses", "loss.loss"):
        seen[name].value[...] += 1
    seen.save(tmp_path / "third")
    assert cli.main(["diff", str(tmp_path / "third"), out]) == 1
    assert "inherited by 2 after it: loss.losses, loss.loss\n" in capsys.readouterr().out
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
