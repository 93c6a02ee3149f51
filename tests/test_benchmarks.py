"""The benchmarks: what is compared is the same, what is unequal is refused, tables are the JSON."""

import importlib
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import npformer
from benchmarks import __main__ as whole
from benchmarks import decoding, harness, plots, roofline, tables, training
from benchmarks.configs import SIZES, Size
from benchmarks.contenders import Floor, Problem, make
from benchmarks.harness import BenchmarkError, Contender, Measurement, Result, Run, measure

pytest.importorskip("threadpoolctl", reason="the benchmarks pin threads with it")

ROOT = Path(__file__).parent.parent
TINY = Size("tiny", 16, 1, 2, 32, 11, 3, 5)


def one():
    return 1


def run_of(times, threads=1):
    run = Run({"kind": "step"}, [])
    run.measurements = [Measurement(n, run.id, threads, s) for n, s in times.items()]
    return run


# --- Measuring --------------------------------------------------------------------------------


def test_a_median_its_spread_and_a_ratio_round_by_round():
    run = run_of({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]})
    assert run["a"].median == 4.0
    assert run["a"].spread == pytest.approx((17 - 3) / 2 / 4)  # half the distance of the quartiles
    assert run.ratio("a", "b") == 3.0  # of 2, 3, 4: not 4 / 1, the ratio of the medians


def test_results_of_different_runs_are_not_compared():
    a, b = run_of({"a": [1.0]})["a"], run_of({"b": [1.0]})["b"]
    with pytest.raises(BenchmarkError, match="a and b were measured in different runs"):
        harness.ratio(a, b)


def test_unequal_threads_are_not_compared():
    contenders = [Contender("a", lambda: None, one), Contender("b", lambda: None, lambda: 2)]
    with pytest.raises(BenchmarkError, match="unequal threads are not compared: a 1, b 2"):
        measure(contenders, rounds=1)


@pytest.mark.parametrize(
    ("file", "is_numpys"),
    [
        ("numpy.libs/libscipy_openblas64_-32a4b2a6.so", True),
        ("numpy/.dylibs/libscipy_openblas64_.dylib", True),
        ("lib/libmkl_rt.so.2", True),
        ("scipy.libs/libscipy_openblas-6cdc3b4a.so", False),  # transformers loads it when it likes
        ("scipy/.dylibs/libscipy_openblas.dylib", False),
        ("torch/lib/libopenblas.so", False),
    ],
)
def test_the_threads_of_numpy_are_those_of_its_own_blas(file, is_numpys, monkeypatch):
    import threadpoolctl

    pool = {"user_api": "blas", "num_threads": 7, "filepath": f"/site-packages/{file}"}
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [pool])
    assert harness.numpy_threads() == (7 if is_numpys else 1)


def test_who_says_one_thread_and_takes_two_cores_is_caught(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "process_time", lambda: 3.0 * next(ticks))  # three cores' worth
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0 * next(ticks))
    with pytest.raises(BenchmarkError, match=r"a computed with .* cores, not with 1"):
        measure([Contender("a", lambda: None, one)], rounds=2)


def test_contenders_take_turns_and_the_order_turns_round(monkeypatch):
    seen = []
    contenders = [Contender(name, lambda name=name: seen.append(name), one) for name in "abc"]
    monkeypatch.setattr(time, "perf_counter", Ticking(0.01))  # longer than a slot: one call in each
    monkeypatch.setattr(time, "process_time", Ticking(0.01))
    run = measure(contenders, rounds=4, slot=0.001)
    warm_up = 3 * 3  # once, and two calls to see how long one takes
    assert "".join(seen[warm_up:]) == "abccbaabccba"
    assert [len(m.samples) for m in run.measurements] == [4, 4, 4]


def test_threads_are_pinned_and_given_back():
    import torch

    with harness.pinned(2):  # whatever the tests run with
        with harness.pinned(1):
            assert (harness.numpy_threads(), harness.torch_threads()) == (1, 1)
        assert (harness.numpy_threads(), harness.torch_threads()) == (2, 2)
    assert torch.get_num_threads() == 1


# --- What is compared is the same -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torchformer", "torch", "fused", "threads"])
def test_every_contender_computes_the_same_loss_and_gradients(backend):
    problem = Problem(TINY, 0.0, clip=True)
    steps = {name: make(name, problem, threads=2)[1] for name in ("npformer", backend)}
    training.check_same(steps)


def test_a_contender_that_computes_something_else_is_caught():
    problem = Problem(TINY, 0.0, clip=True)
    steps = {name: make(name, problem)[1] for name in ("npformer", "torch")}
    weight = next(steps["torch"].model.parameters())
    weight.data *= 1.5
    with pytest.raises(BenchmarkError, match=r"torch has the loss|differ in the gradient"):
        training.check_same(steps)


def test_a_timed_step_learns():
    """Each contender really updates: after some steps at a real rate the loss is lower."""
    problem = Problem(TINY, 0.0, clip=True)
    for backend in ("npformer", "torchformer", "torch", "fused", "threads"):
        _, step = make(backend, problem, threads=2)
        if hasattr(step.optimizer, "param_groups"):
            step.optimizer.param_groups[0]["lr"] = 1e-2
        else:
            step.optimizer.rate = npformer.schedules.constant(1e-2)
        before, _ = step.gradients()
        for _ in range(5):
            step()
        after, _ = step.gradients()
        assert after < before - 0.1, backend


def test_the_floor_is_the_matrix_products_of_the_step_and_nothing_else():
    """Counted by hand, from the shapes: forward, dx and dweight, each 2 N I O."""
    size = SIZES["S"]
    N, C, F, V, T, D = 32 * 12, 64, 256, 13, 12, 16
    encoder, decoder = 4 * C * C + 2 * C * F, 8 * C * C + 2 * C * F
    linear = 3 * 2 * N * (3 * (encoder + decoder) + C * V)
    attention = 3 * 3 * 6 * 2 * 32 * 4 * T * T * D  # 9 attentions, 6 products each
    assert Floor(size).flops == linear + attention


def test_everybody_decodes_the_same_tokens():
    problem = decoding.Problem(replace(TINY, vocab_size=13), batch=2)
    backends = [b for b in decoding.BACKENDS if harness.is_installed(decoding.BACKENDS[b][1])]
    answers = {decoding.BACKENDS[b][0]: decoding.MAKE[b](problem)() for b in backends}
    assert len(answers) >= 4
    decoding.check_same(answers)
    first = answers[decoding.NPFORMER]
    assert len({tuple(answer) for answer in first}) == 2  # the source matters
    other = {**answers, decoding.TORCH: [[9] * decoding.N_TOKENS] * 2}
    with pytest.raises(BenchmarkError, match="decode different tokens"):
        decoding.check_same(other)


# --- Results, tables and the README -----------------------------------------------------------


class Ticking:
    """A clock that goes on by as much at every look: nothing here waits or depends on a machine."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def __call__(self):
        self.now += self.seconds
        return self.now


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Everything once, as small as it goes: one command as a user runs it, two by the clock."""
    folder = tmp_path_factory.mktemp("results")
    done = run_module("benchmarks.roofline", "--config", "S", "--rounds", "2", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert "saved" in done.stdout
    command = ["--quick", "--config", "S", "--dropout", "0.1", "--rounds", "2", "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", Ticking(0.1))
        patch.setattr(time, "process_time", Ticking(0.1))
        for name, options in (("steps", []), ("profile", ["--profile"])):
            training.main(
                [*command, str(folder / name), *options]
            )  # the name of a file is its second
    return folder


def run_module(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_result_says_where_and_how_and_nothing_of_whose(results):
    (path,) = (results / "steps").glob("*-training.json")
    content = json.loads(path.read_text())
    assert content["schema"] == harness.SCHEMA
    about = content["environment"]
    assert {"cpu", "blas", "numpy", "torch", "python", "commit", "keeps_freed_memory"} <= set(about)
    assert all(m["threads"] == 1 for run in content["runs"] for m in run["measurements"])
    import platform

    assert platform.node() not in path.read_text()


def test_tables_and_plots_are_drawn_from_the_files(results, tmp_path):
    loaded = {}
    for path in results.rglob("*.json"):
        result = Result.load(path)
        result.options["quick"] = False
        loaded[tables.kind_of(result)] = result
        assert tables.draw(path).startswith(result.benchmark)
    assert set(loaded) == {"training", "breakdown", "roofline"}
    text = "a\n<!-- benchmarks:training -->\nold\n<!-- /benchmarks -->\nb\n"
    filled = tables.fill(text, loaded)
    run = loaded["training"].runs[0]
    ratio = f"{run.ratio('npformer', 'torch.nn.Transformer'):.2f}"
    assert "old" not in filled
    assert "S, dropout 0.1" in filled
    assert ratio in filled
    assert tables.fill(filled, loaded) == filled
    pytest.importorskip("matplotlib")
    drawn = list(plots.draw_all(loaded, tmp_path))
    assert [path.name for path in drawn] == ["breakdown.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_what_is_above_the_roof_of_the_memory_is_explained(results):
    """An op can only be there if a cache holds its arrays, whose own roof is measured as well."""
    pytest.importorskip("matplotlib")
    fresh = Result.load(next(results.glob("*-roofline.json")))
    (run,) = fresh.runs
    assert roofline.moved(run, roofline.COPY_CACHED) > 0
    assert set(roofline.points(run)[2]).isdisjoint(roofline.CEILINGS)
    assert "roof: cache" in roofline.draw(fresh.runs)
    (axes,) = plots.draw_roofline(fresh).axes
    assert {"-", "--"} <= {line.get_linestyle() for line in axes.lines}
    committed = tables.newest_of(tables.RESULTS.glob("*.json"))["roofline"]
    for axes, run in zip(plots.draw_roofline(committed).axes, committed.runs, strict=True):
        top, copying, found = roofline.points(run)
        above = [name for name, (x, rate) in found.items() if rate > 1.05 * min(top, x * copying)]
        assert all(run.about["bytes"][name] < 2**24 for name in above)  # a cache of 32 MiB
        lines = {line.get_linestyle() for line in axes.lines}
        said = " ".join(text.get_text() for text in axes.texts)
        assert "--" in lines or all(f"{name} moves" in said for name in above)


def test_quick_results_do_not_get_into_the_readme(results):
    assert tables.newest_of(sorted(results.rglob("*-training.json"))) == {}


def test_the_readme_has_the_tables_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert tables.fill(text, tables.newest_of(tables.RESULTS.glob("*.json"))) == text


def test_a_crossover_is_where_a_line_stays_below():
    assert plots.first_win([9, 5, 3], [4, 4, 4]) == 2
    assert plots.first_win([1, 5, 3], [4, 4, 4]) == 2  # an early win that does not last
    assert plots.first_win([1, 1], [2, 2]) == 0
    assert plots.first_win([3, 3], [2, 2]) is None


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("training --config Q", "unknown configuration 'Q': choose of S, M, B"),
        ("training --backends numpy", "unknown backend 'numpy'"),
        ("training --out /proc/nowhere", "--out /proc/nowhere: cannot write there"),
        ("training --dropout 2", "expected probabilities below 1"),
        ("training --rounds 0", "expected a number of at least 1, got '0'"),
        ("decoding --batch x", "expected a number of at least 1, got 'x'"),
        ("tables", "name result files, or --readme"),
        ("tables nowhere.json", "nowhere.json: not a result file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, message, capsys):
    module, *arguments = command.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{module}").main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1 or "usage" in error


def test_a_backend_that_is_not_installed_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(harness, "is_installed", lambda package: package != "transformers")
    with pytest.raises(SystemExit) as stop:
        decoding.main(["--backends", "marian", "--quick", "--out", "/tmp"])
    assert stop.value.code == 2
    assert "transformers is not installed: pip install transformers" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"schema": "other-1"}', "[]", "not json", '{"runs": 1}'])
def test_a_file_of_another_schema_is_refused(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=re.escape(str(path))):
        Result.load(path)


def test_a_truncated_result_is_refused(results, tmp_path):
    content = json.loads(next(results.glob("*.json")).read_text())
    del content["runs"][0]["measurements"][0]["samples"]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BenchmarkError, match="not a whole result file"):
        Result.load(path)


def test_the_whole_set_names_only_commands_that_exist():
    for name in whole.WHOLE:
        for quick in (False, True):
            module, *_ = whole.command_of(name, quick).split()
            assert (ROOT / "benchmarks" / f"{module}.py").exists()
    done = run_module("benchmarks", "--only", "nothing")
    assert done.returncode == 2
    assert "unknown benchmark 'nothing'" in done.stderr


def test_the_weights_of_a_problem_hide_nothing():
    weights = Problem(TINY, 0.1, clip=True).weights
    assert all(np.ptp(w) > 0 for w in weights.values())
