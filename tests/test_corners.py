"""What seldom happens, and then happens as it should."""

import itertools
import json
import signal
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from npformer import allocator, checkpoint, compare, plot, presets, tasks, training
from npformer.testing import __main__ as kit
from npformer.testing import cases, conformance, gradcheck, judge, reference, variants
from npformer.testing import worker as workers

# --- Training ---------------------------------------------------------------------------------


def small():
    task = tasks.load("sort")
    chosen = presets.settings(task, "notes")
    chosen["model"] |= {"d_model": 16, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 32}
    config, recipe = presets.build(task, chosen)
    recipe = replace(recipe, batch_size=8, steps=12, evaluate_every=4, dev_examples=8)
    return task, config, recipe


def run(folder, **options):
    task, config, recipe = small()
    recipe = replace(recipe, **options.pop("recipe", {}))
    trainer = options.pop("trainer", None) or training.Trainer(config, recipe, 0)
    return training.run(trainer, task, folder, recipe=recipe, test_examples=4, **options)


class Clock:
    """Goes on when it is told to: a step takes as long as a test says, on any machine."""

    def __init__(self):
        self.now = 1000.0  # no clock begins at 0

    def __call__(self):
        return self.now


class Slow(training.Trainer):
    """Each step takes some of the clock's seconds."""

    def __init__(self, clock, seconds):
        _, config, recipe = small()
        super().__init__(config, recipe, 0)
        self.clock, self.seconds = clock, iter(seconds)

    def step(self, batch, rate):
        self.clock.now += next(self.seconds)
        return super().step(batch, rate)


ENDLESS = {"steps": 10**9, "evaluate_every": 10**6, "warmup": 5}


def test_the_schedule_ends_where_the_time_does(tmp_path):
    clock = Clock()
    trainer = Slow(clock, itertools.repeat(0.25))
    outcome = run(tmp_path, trainer=trainer, clock=clock, minutes=16 / 60, recipe=ENDLESS)
    assert outcome.ended == "time"
    steps = outcome.progress.history["steps"]
    assert [s["total"] for s in steps] == 20 * [10**9] + 44 * [64]  # known after some steps
    assert steps[-1]["rate"] < steps[20]["rate"] / 100  # of a cosine that ends there
    assert outcome.progress.seconds == steps[-1]["seconds"] == 16
    tokens = steps[0]["tokens_per_second"] * 0.25
    assert tokens == round(tokens) > 0


def test_a_run_that_becomes_slower_ends_earlier(tmp_path):
    clock = Clock()
    trainer = Slow(clock, 32 * [0.25] + 32 * [0.5])
    outcome = run(tmp_path, trainer=trainer, clock=clock, minutes=16 / 60, recipe=ENDLESS)
    assert outcome.ended == "time"
    assert outcome.progress.step == 48  # 32 in half the time, and half as many in the other
    totals = [s["total"] for s in outcome.progress.history["steps"]]
    assert (totals[31], totals[-1]) == (64, 49)


def test_no_step_begins_after_the_time(tmp_path):
    clock = Clock()
    trainer = Slow(clock, itertools.repeat(6.0))
    outcome = run(tmp_path, trainer=trainer, clock=clock, minutes=0.25, recipe={"steps": 10**9})
    assert (outcome.ended, outcome.progress.step) == ("time", 3)  # the third ends after 18 s of 15


def test_the_time_of_a_run_is_that_of_all_its_sessions(tmp_path):
    clock = Clock()
    options = {"clock": clock, "recipe": {"steps": 12}}
    run(tmp_path, trainer=Slow(clock, itertools.repeat(1.0)), minutes=0.1, **options)
    clock.now += 10**6  # nobody was training
    outcome = run(
        tmp_path, trainer=Slow(clock, itertools.repeat(1.0)), minutes=0.15, resume=True, **options
    )
    assert (outcome.ended, outcome.progress.step, outcome.progress.seconds) == ("time", 9, 9.0)


def test_a_score_that_was_asked_for_ends_the_run(tmp_path):
    outcome = run(tmp_path, target=-1.0)
    assert (outcome.ended, outcome.progress.step) == ("early", 4)


def test_patience_ends_the_run(tmp_path):
    outcome = run(tmp_path, patience=1, recipe={"rate": 1e-12, "steps": 1000})
    assert outcome.ended == "early"
    assert outcome.progress.step < 1000


def test_a_loss_that_is_no_number_is_said_and_the_best_kept(tmp_path):
    _, config, recipe = small()
    trainer = training.Trainer(config, recipe, 0)
    step = trainer.step
    trainer.step = lambda batch, rate: step(batch, rate) if trainer.optimizer.steps < 5 else np.nan
    with pytest.raises(ValueError, match="the loss is nan at step 6: try a lower rate"):
        run(tmp_path, trainer=trainer)
    assert (tmp_path / checkpoint.MODEL).exists()


def test_a_second_ctrl_c_does_not_wait():
    with training._graceful_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_who_handles_ctrl_c_already_goes_on_to():
    seen, before = [], signal.getsignal(signal.SIGINT)
    for theirs in (lambda *_: seen.append("theirs"), signal.SIG_IGN):
        signal.signal(signal.SIGINT, theirs)
        try:
            with training._graceful_interrupt() as interrupted:
                signal.raise_signal(signal.SIGINT)
                assert interrupted() == (theirs is not signal.SIG_IGN)
            assert signal.getsignal(signal.SIGINT) is theirs
        finally:
            signal.signal(signal.SIGINT, before)
    assert seen == ["theirs"]


def test_who_takes_ctrl_c_over_during_training_keeps_it():
    theirs, before = (lambda *_: None), signal.getsignal(signal.SIGINT)
    try:
        with training._graceful_interrupt():
            signal.signal(signal.SIGINT, theirs)
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_somebody_elses():
    seen = []

    def work():
        with training._graceful_interrupt() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_run_of_another_version_is_refused(tmp_path):
    run(tmp_path)
    path = tmp_path / training.RESUME
    tensors, metadata = checkpoint.load_tensors(path)
    progress = json.loads(metadata["progress"])
    progress.pop("best")
    metadata["progress"] = json.dumps(progress)
    checkpoint.save_tensors(path, tensors, metadata)
    with pytest.raises(checkpoint.CheckpointError, match="not a run of this version"):
        run(tmp_path, resume=True)


def test_an_average_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="average must be at least 0, got -1"):
        training.Recipe(average=-1)


def test_without_glibc_or_matplotlib_there_is_less_and_nothing_breaks(monkeypatch, tmp_path):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")  # somebody has decided
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert allocator.keep_freed_memory() is False
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    assert allocator.keep_freed_memory() is False
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert allocator.keep_freed_memory() is False
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it is an ImportError
    history = {"steps": [], "evaluations": []}
    assert plot.draw_history(history, tasks.load("sort"), tmp_path / "a.png") is False
    assert plot.draw_alignment((["a"], ["b"], np.ones((1, 1))), tmp_path / "a.png") is False
    assert not list(tmp_path.iterdir())


# --- The kit ----------------------------------------------------------------------------------


def test_fields_that_are_fixed():
    assert cases.parse_fixed(["activation=relu", "norm_first=True", "d_ff=7"]) == {
        "activation": "relu",
        "norm_first": True,
        "d_ff": 7,
    }
    found = cases.make_cases(("model", "decoding"), 2, fixed={"n_encoder_layers": 0})
    assert {case.op for case in found} == {"decoder_only"}
    with pytest.raises(ValueError, match="no model with clear answers was found"):
        cases.make_cases(("decoding",), 1, fixed={"tgt_vocab_size": 4, "share_embeddings": False})
    with pytest.raises(ValueError, match="--only banana: the operations are matmul, "):
        cases.check_operations(["banana"])


@pytest.mark.parametrize("option", ["--examples", "--time-limit"])
def test_numbers_that_make_no_sense_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        kit.main(["--target", "a:b", option, "0"])
    assert stop.value.code == 2
    assert "must be" in capsys.readouterr().err


def test_an_answer_that_is_not_the_same_twice():
    (case,) = cases.make_cases(("layer",), 1, only=("linear",))
    y = np.zeros((2, 3))
    assert judge.changed(case, {"y": y}, {"x": y}) == (
        "two calls with the same inputs return different names"
    )
    assert "y has another shape" in judge.changed(case, {"y": y}, {"y": y[:1]})
    assert judge.changed(case, {"y": y}, {"y": y}) == ""


def test_what_cannot_be_an_array_is_named():
    class Odd:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("on another device")

    with pytest.raises(workers.BadAnswer, match=r"y cannot be made an array: .*another device"):
        workers._as_array("y", Odd())
    assert workers._takes_nothing(dict)  # a builtin does not say


def test_a_case_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        checkpoint.load_tensors(tmp_path / "nothing.safetensors")


def test_the_reference_without_a_gradient_to_start_from():
    x = np.array([[1.0, -2.0]])
    found = reference.target()("relu", {"x": x}, {})
    assert list(found) == ["y"]


def test_a_variant_that_makes_no_sense_for_a_case_explains_nothing():
    (case,) = cases.make_cases(("layer",), 1, only=("linear",))

    def broken():
        raise ValueError("there are no heads here")

    variant = variants.Variant("broken", broken)
    assert variants._distance(case, {}, (variant,)) == np.inf
    assert variants._distance(case, {}, (variant,), changes=True) == 0


def test_inputs_without_a_name_are_numbered():
    assert gradcheck._input_name(lambda *xs: None, (1, 2), 1) == "input 1"
    assert gradcheck._input_name(dict, (1,), 0) == "input 0"


def test_a_refusal_is_that_of_no_grad_and_a_row_out_of_bound_is_a_failure():
    def other(dy):
        raise RuntimeError("out of paper")

    assert not conformance._refuses(other, np.ones(1))
    rows = compare.compare_tensors({"y": np.ones(2)}, {"y": np.zeros(2)}, {"y": 0.5})
    with pytest.raises(AssertionError, match="layer\n"):
        conformance.demand("layer", rows)
