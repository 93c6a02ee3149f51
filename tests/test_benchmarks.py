"""The benchmarks: what is compared is the same, what is unequal is refused, tables are the JSON."""

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
from benchmarks import decoding, harness, plots, tables, training
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


def test_contenders_take_turns_and_the_order_turns_round():
    seen = []
    contenders = [
        Contender(name, lambda name=name: (seen.append(name), time.sleep(0.01)), one)
        for name in "abc"
    ]
    run = measure(contenders, rounds=4, slot=0.001)
    warm_up = 3 * 3  # once, and two calls to see how long one takes
    assert "".join(seen[warm_up:]) == "abccbaabccba"
    assert [len(m.samples) for m in run.measurements] == [4, 4, 4]


def test_threads_are_pinned_and_given_back():
    import torch

    before = harness.numpy_threads(), torch.get_num_threads()
    with harness.pinned(1):
        assert (harness.numpy_threads(), harness.torch_threads()) == (1, 1)
    assert (harness.numpy_threads(), torch.get_num_threads()) == before


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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Everything once, as small as it goes; the commands as a user runs them."""
    folder = tmp_path_factory.mktemp("results")
    for command in (
        "training --quick --config S --dropout 0.1 --rounds 2",
        "training --quick --config S --dropout 0.1 --rounds 2 --profile",
        "roofline --config S --rounds 2",
    ):
        module, *arguments = command.split()
        done = run_module(f"benchmarks.{module}", *arguments, "--out", str(folder))
        assert done.returncode == 0, done.stderr
        assert "saved" in done.stdout
        time.sleep(1.01)  # the name of a file is its second
    return folder


def run_module(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_result_says_where_and_how_and_nothing_of_whose(results):
    path = sorted(results.glob("*-training.json"))[0]
    content = json.loads(path.read_text())
    assert content["schema"] == harness.SCHEMA
    about = content["environment"]
    assert {"cpu", "blas", "numpy", "torch", "python", "commit", "keeps_freed_memory"} <= set(about)
    assert all(m["threads"] == 1 for run in content["runs"] for m in run["measurements"])
    import platform

    assert platform.node() not in path.read_text()


def test_tables_and_plots_are_drawn_from_the_files(results, tmp_path):
    loaded = {}
    for path in sorted(results.glob("*.json")):
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


def test_quick_results_do_not_get_into_the_readme(results):
    assert tables.newest_of(sorted(results.glob("*-training.json"))) == {}


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
def test_bad_input_is_one_line_and_exit_code_2(command, message):
    module, *arguments = command.split()
    done = run_module(f"benchmarks.{module}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 or "usage" in done.stderr


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


# --- The GPU's, on a CPU ----------------------------------------------------------------------


def test_the_gpu_benchmark_runs_through_on_a_cpu(tmp_path):
    """All sections, on toy sizes: the code, not the figures."""
    from benchmarks.gpu import SECTIONS

    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["results"]) == list(SECTIONS)
    assert not any(isinstance(section, str) for section in found["results"].values())  # skipped
    assert "host" not in json.dumps(found["environment"]).lower()
    assert all(row["ok"] for row in found["results"]["parity"].values())
    rows = found["results"]["ladder"]
    assert [row["name"] for row in rows] == [
        "NumPy float64",
        "NumPy float32",
        "torch float32, CPU",
        "CPU, bf16, eager",
        "+ fused attention (SDPA)",
        "+ fused AdamW",
    ]
    for row in rows:  # twice the roundings of an entry, at the most
        assert row["gradient_error"] < 2 * (
            2**-8 if "bf16" in row["name"] or "+" in row["name"] else 2**-18
        )
    results = found["results"]
    floors = [results["training B"], results["training C"], results["drift"]]
    floors += [*results["training A"].values(), *results["decoding"].values()]
    assert all(0 < row["of_the_floor"] < 1 for row in floors)
    losses = [row["loss"] for row in results["training A"].values()]
    assert max(losses) - min(losses) < 2**-8 * max(losses)  # the same weights and batches
    report = (tmp_path / "report.md").read_text()
    assert all(f"## {name}" in report for name in SECTIONS)
    pytest.importorskip("matplotlib")
    for name in ("breakdown", "crossover", "ladder", "roofline"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda"], "torch finds no CUDA device here"),
        (["--device", "cpu", "--only", "banana"], "unknown section 'banana'"),
    ],
)
def test_the_gpu_benchmark_refuses_in_one_line(arguments, said, tmp_path, capsys):
    import torch

    from benchmarks import gpu

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_the_gpu_benchmark_refuses_a_card_without_bfloat16(monkeypatch, tmp_path, capsys):
    import torch

    from benchmarks import gpu

    def refuse(precision, device):
        raise ValueError(f"Tesla T4 does not have {precision}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "check_precision", refuse)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("gpu: Tesla T4 does not have bfloat16\n")


def test_a_section_that_does_not_fit_is_skipped_and_says_so(tmp_path, capsys):
    from benchmarks import gpu

    arguments = ["--out", str(tmp_path), "--device", "cpu", "--only", "crossover"]
    assert gpu.main([*arguments, "--budget", "0"]) == 0
    assert "skipped: 0 s were left of 0" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # a fast path of inference
def test_the_gpu_benchmark_compares_the_same_weights_and_tokens():
    """In float32, before the first step, both lose the same: on full batches and on ragged ones."""
    import torch

    from benchmarks import gpu

    cpu = torch.device("cpu")
    setting = gpu.settings(cpu)["A"]
    plain: dict = {"bf16": False, "compiled": False}
    padded = gpu.ragged_batches(setting, by_length=False)
    for batches, masks in ((gpu.full_batches(setting), False), (padded, True)):
        ours = gpu.Step(setting, cpu, batches=batches, **plain)
        model = gpu.Reference(setting, masks)
        theirs = gpu.Step(setting, cpu, model=model, batches=batches, **plain)
        for _ in batches:
            a, b = float(ours.loss().detach()), float(theirs.loss().detach())
            assert a == pytest.approx(b, rel=1e-5)
    together = gpu.ragged_batches(setting, by_length=True)

    def pairs(batches):  # without their pads, in any order
        rows = [row for src, *rest in batches for row in zip(src, *rest, strict=True)]
        return sorted([[int(i) for i in x if i] for x in row] for row in rows)

    assert pairs(together) == pairs(padded)
    assert sum(src.numel() for src, *_ in together) < sum(src.numel() for src, *_ in padded)


def test_the_floors_are_those_of_the_shapes():
    """FLOP against PyTorch's own count, bytes of decoding against the arrays that it reads."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import gpu, gpu_shapes
    from torchformer import fast

    cpu = torch.device("cpu")
    for name, setting in gpu.settings(cpu).items():
        c, n = setting.config, setting.batch * setting.length
        step = gpu.Step(setting, cpu, bf16=False, compiled=False)
        with gpu.written_out_attention(), FlopCounterMode(display=False) as counted:
            step.loss().backward()
        masked_out = n * c.n_decoder_layers * 12 * setting.length * c.d_model / 2
        assert counted.get_total_flops() == gpu.training_work(setting).flops + masked_out, name
        sizes = {k: p.numel() for k, p in step.model.named_parameters() if p.ndim == 2}
        multiply = sum(s for k, s in sizes.items() if "positions" not in k)  # tied: the table too
        assert sum(gpu_shapes.matrices(c)) == multiply
    decoder = fast.StaticDecoder(step.model, 2, 7)
    held = sum(x.numel() for layer in decoder.layers for x in (layer.keys, layer.values))
    assert gpu.decoding_work(c, 2, 7, 4).n_bytes == 4 * (multiply + held)


def test_the_floor_is_of_the_precision_of_the_work():
    import torch

    from benchmarks import gpu

    bench = gpu.Bench(torch.device("cpu"), 1.0)
    bench.results["ceilings"] = {"bf16_tflops": 1.0, "float32_tflops": 4.0, "copy_tb_per_s": 1.0}
    work = gpu.Work(flops=8e12, n_bytes=1e12)
    for precision, floor in (("bf16", 8), ("float32", 2)):
        found = bench.against_the_card(work, 16.0, precision)
        assert found["floor_seconds"] == floor
        assert found["of_the_floor"] == found["of_measured_ceiling"] == floor / 16


def test_every_section_of_the_gpu_benchmark_may_compile_its_shapes(monkeypatch, tmp_path):
    """Dynamo keeps eight shapes of a function and refuses a ninth: each section starts anew."""
    import torch

    from benchmarks import gpu

    def doubled(sizes):
        compiled = torch.compile(
            lambda x: 2 * x, fullgraph=True, dynamic=False, backend="eager"
        )  # the same code, and so the same eight places, in both sections
        return {str(n): float(compiled(torch.ones(n)).sum()) for n in sizes}

    sections = {
        "first": (0.1, lambda bench, seconds: doubled(range(1, 7))),
        "second": (0.1, lambda bench, seconds: doubled(range(7, 13))),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert results["second"]["12"] == 24


def test_the_floor_is_what_takes_longer():
    from benchmarks.gpu_shapes import Work

    assert Work(10, 3).floor(flops_per_s=2, bytes_per_s=1) == 5
    assert Work(10, 30).floor(flops_per_s=2, bytes_per_s=1) == 30


def test_attention_written_out_is_the_fused_one_and_is_taken_back():
    import torch

    import torchformer
    from benchmarks import gpu

    fused = torchformer.ops.attention
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    with gpu.written_out_attention():
        assert torchformer.ops.attention is not fused
        found = torchformer.ops.attention(q, k, v, torchformer.masks.CAUSAL)
    assert torchformer.ops.attention is fused
    np.testing.assert_allclose(found, fused(q, k, v, torchformer.masks.CAUSAL), rtol=1e-12)


def test_it_is_seen_which_attention_pytorch_chose():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks import gpu

    q = torch.randn(1, 2, 8, 16)
    for backend in ("FLASH_ATTENTION", "MATH"):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            said = gpu.backend_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
        assert said == backend


def test_what_no_gpu_has_measured_says_so_in_every_cell():
    from benchmarks import gpu_report

    table = gpu_report.summary(None)
    cells = [c.strip() for line in table.splitlines() for c in line.split("|")[2:-1]]
    assert cells.count("not measured") == 3 * 7 + 5
    assert not any(character.isdigit() for cell in cells for character in cell)
    assert gpu_report.summary(None) in (ROOT / "README.md").read_text() or list(
        (ROOT / "benchmarks" / "results").glob("*-gpu.json")
    )
    row = {"tokens_per_second": 1234567.0, "of_the_floor": 0.5, "of_datasheet": 0.25}
    content = {
        "environment": {"created": "2026-01-02T", "device": "NVIDIA H200", "torch": "2.11"},
        "results": {
            "training A": {"torchformer": row, "nn.Transformer, eager bf16": {"ours_to_it": 2.0}},
            "training B": "skipped: 0 s were left of 540",
        },
    }
    table = gpu_report.summary(content)
    assert re.search(r"A, training.*\| *1,234,567 \| *50% \| *25% \|", table)
    assert re.search(r"B, training.*\| *not measured", table)
    assert re.search(r"full batches, against eager bf16 *\| *2.00 \|", table)
    assert "NVIDIA H200" in table
