"""The GPU's benchmark, rehearsed on a CPU: the code, the floors and what goes wrong, no figures."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import torchformer
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    bench,
    environment,
    kernels,
    parity,
    processes,
    report,
    results,
    shapes,
    steps,
)
from benchmarks.gpu import sections as gpu
from benchmarks.gpu.__main__ import SECTIONS, Section
from benchmarks.gpu.processes import Processes
from benchmarks.gpu.timing import Clock
from benchmarks.harness import BenchmarkError
from npformer import storage
from torchformer import fast
from torchformer.masks import CAUSAL

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
HERE = f"{Path(__file__).stem}:"  # of functions that another process is to call
CEILINGS = {"bf16_tflops": 1.0, "float32_tflops": 4.0, "copy_tb_per_s": 1.0}
TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
ENVIRONMENT = {"created": "2026-01-02T", "device": "NVIDIA H200", "torch": "2.11.0"}


# --- The whole of it --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """once.sh as on a card, its three calls side by side: folder, exit code and output of each."""
    folder = tmp_path_factory.mktemp("once")
    once = [str(ROOT / "benchmarks" / "gpu" / "once.sh")]
    calls = {
        what: subprocess.Popen(
            [*once, str(folder / what), *([] if what == "first" else [what])],
            env={**os.environ, "ONCE_DEVICE": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for what in ("first", "second", "rest")
    }
    said = {what: call.communicate()[0] for what, call in calls.items()}
    return folder, {what: (call.returncode, said[what]) for what, call in calls.items()}


def test_every_part_of_the_one_run_is_rehearsed(rehearsal):
    folder, calls = rehearsal
    for what, (code, said) in calls.items():
        logged = (folder / what / f"{what}.log").read_text()
        assert code == 0, f"{said}\n{logged}"
        assert "failed" not in said
        assert said == (folder / what / "summary.txt").read_text()
        files = [path for path in (folder / what).rglob("*") if path.is_file()]
        assert len(files) <= 8, files  # no more come back from a card
        assert all(path.stat().st_size < 2**24 for path in files)
    done = re.findall(r": (.*): done in", "".join(said for _, said in calls.values()))
    parts = ["release model", "release model in float16", "ddp, fsdp and tp on one device"]
    parts += ["device tests in float32, graph tests", "device tests in bfloat16"]
    assert set(parts) <= set(done)
    for name in SECTIONS:
        if not name.startswith("breakdown"):
            assert re.search(f"    {name}: measured, ", "".join(said for _, said in calls.values()))
    assert "all have trained: ddp fsdp tp" in (folder / "second" / "second.log").read_text()


def test_the_released_model_comes_back_in_float16(rehearsal):
    from npformer import checkpoint

    release = rehearsal[0] / "second" / "release"
    _, weights = checkpoint.load(release)
    assert {w.dtype for w in weights.values()} == {np.dtype("float16")}
    assert json.loads((release / "run.json").read_text())["precision"] == "bfloat16"
    torchformer.Transformer.load(release)


def test_every_section_is_measured(rehearsal):
    folder = rehearsal[0]
    first, rest = (results.load(folder / what / "bench.json") for what in ("first", "rest"))
    assert set(first["results"]) | set(rest["results"]) == set(SECTIONS)
    assert "ceilings" in rest["results"]  # where they are missing they are measured
    for content in (first, rest):
        for name, rows in content["results"].items():
            assert results.is_whole(rows), (name, rows)
            assert content["measured"][name]["seconds"] > 0
        assert "host" not in json.dumps(content["environment"]).lower()
    found = first["results"] | rest["results"]
    assert all(row["ok"] for row in found["parity"].values())
    assert {f"layers of {name}, compiled, 64" for name in "ABC"} <= set(found["parity"])
    assert all(row["ok"] for row in found["levers"].values() if "ok" in row)
    rows = [found["training B"], found["training C"], found["drift"]]
    rows += [*found["training A"].values(), *found["decoding"].values()]
    for row in rows:
        assert 0 < row["of_the_floor"] < 1
        assert 0 < row["of_measured_ceiling"] <= row["mfu_of_measured_ceiling"]
    losses = [row["loss"] for row in found["training A"].values()]
    assert max(losses) - min(losses) < 2**-8 * max(losses)  # the same weights and batches
    for row in [*found["training A"].values(), *found["training A ragged"].values()]:
        assert row["compile_seconds"] >= 0
    for name in "ABC":
        assert sum(found[f"breakdown {name}"]["shares"].values()) == pytest.approx(1)
        assert 0 < len(found[f"breakdown {name}"]["kernels"]) <= 20
    assert all(row["same_tokens"] == 1 for row in found["decoding"].values())
    assert all("failed" not in row for row in found["smoke"].values())
    assert [row["name"] for row in found["ladder"]] == [
        "NumPy float64",
        "NumPy float32",
        "torch float32, CPU",
        "CPU, bf16, eager",
        "+ fused attention (SDPA)",
        "+ fused AdamW",
    ]
    for row in found["ladder"]:  # twice the roundings of an entry, at the most
        rounding = 2**-8 if "bf16" in row["name"] or "+" in row["name"] else 2**-18
        assert row["gradient_error"] < 2 * rounding


def test_two_folders_of_one_card_become_one_report(rehearsal, tmp_path, capsys):
    others = [["--from", str(rehearsal[0] / what / "bench.json")] for what in ("first", "rest")]
    assert command.main(["--out", str(tmp_path), "--report", *others[0], *others[1]]) == 0
    content = results.load(tmp_path / "bench.json")
    assert set(content["results"]) == set(SECTIONS)
    text = capsys.readouterr().out
    assert all(f"## {name}\n" in text for name in SECTIONS)
    pytest.importorskip("matplotlib")
    for name in ("breakdown", "crossover", "ladder", "roofline"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "device", "said"),
    [
        ([], "cpu", "usage: once.sh OUT"),
        (["OUT", "third"], "cpu", "unknown part 'third'"),
        (["OUT", "rest", "soon"], "cpu", "S must be a number of seconds, got 'soon'"),
        (["OUT"], "tpu", "ONCE_DEVICE must be cuda or cpu, got 'tpu'"),
    ],
)
def test_the_script_refuses_in_one_line(arguments, device, said, tmp_path):
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu" / "once.sh"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "ONCE_DEVICE": device},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# --- Sections as processes --------------------------------------------------------------------


def dies(bench, seconds):
    bench.give("dies", {"found before": {"seconds": 1.0}})
    os._exit(3)


def fails(bench, seconds):
    raise ValueError("as a section may")


def hangs(bench, seconds):
    bench.give("hangs", {"found before": {"seconds": 1.0}})
    time.sleep(60)


def has_no_room(bench, seconds):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 46.00 GiB")


def works(bench, seconds):
    return {"ceiling": bench.rows("ceilings").get("copy_tb_per_s"), "there": sorted(bench.results)}


@pytest.fixture
def sections(monkeypatch):
    """Sections that cost nothing in place of the real ones."""

    def put(**found):
        chosen = {name: Section(HERE + f, 0.5) for name, f in found.items()}
        monkeypatch.setattr(command, "SECTIONS", chosen)
        monkeypatch.setattr(command, "SLACK", 0.5)
        monkeypatch.setattr(processes, "PRELOADED", ["benchmarks.gpu.bench"])

    return put


def content_of(folder, **found):
    """A bench.json as a CPU writes it."""
    content = results.empty()
    content["environment"] = environment.environment(CPU)
    content["results"] = {"ceilings": CEILINGS, **found}
    results.save_content(folder / "bench.json", content)
    return content


def run(folder, *arguments):
    code = command.main(["--device", "cpu", "--out", str(folder), *arguments])
    return code, results.load(folder / "bench.json")


def test_a_section_that_dies_fails_or_hangs_costs_no_other(sections, tmp_path, capfd):
    sections(dies="dies", fails="fails", hangs="hangs", short="has_no_room", works="works")
    content_of(tmp_path)
    code, content = run(tmp_path)
    found = content["results"]
    assert code == 1
    assert found["dies"] == "failed: its process died (exit code 3)"
    assert found["fails"] == "failed: ValueError: as a section may"
    assert found["hangs"] == "failed: stopped after 2 s"
    assert found["short"].startswith(f"skipped: too little memory on {environment.TOYS} (")
    assert found["works"]["ceiling"] == 1.0  # handed on
    rows = {"found before": {"seconds": 1.0}}
    assert content["unfinished"] == {"dies": rows, "hangs": rows}
    assert "found before" in (tmp_path / "report.md").read_text()
    assert "== short: skipped: too little memory" in capfd.readouterr().out


def test_the_next_call_goes_on_from_there(sections, tmp_path, capfd):
    """What is whole is kept; what was lost is tried again, and so is all of it with --again."""
    sections(dies="works", part="works", works="works")
    part = {"a": {"seconds": 1.0}, "b": {"failed": "RuntimeError: once"}}
    content_of(tmp_path, dies="failed: its process died (exit code 3)", part=part, works={"old": 1})
    code, content = run(tmp_path)
    assert code == 0
    assert content["results"]["works"] == {"old": 1}
    assert content["results"]["dies"]["ceiling"] == content["results"]["part"]["ceiling"] == 1.0
    assert "works: is there" in capfd.readouterr().out
    _, content = run(tmp_path, "--again", "--only", "works")
    assert content["results"]["works"]["ceiling"] == 1.0
    assert "ceilings" in content["results"]  # nobody asked for these again


def test_a_run_that_is_killed_leaves_what_it_has_found_whole(tmp_path):
    """And no process of it stays behind on the card."""
    code = (
        "import os, signal, sys\n"
        "from benchmarks.gpu import __main__ as command, processes\n"
        "processes.PRELOADED = ['benchmarks.gpu.bench']\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"names = {{'works': 'works', 'hangs': 'tells_who_it_is'}}\n"
        f"command.SECTIONS = {{k: command.Section('{HERE}' + v, 9.0) for k, v in names.items()}}\n"
        f"command.main(['--device', 'cpu', '--out', {str(tmp_path)!r}])\n"
    )
    content_of(tmp_path)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths, "HERE": str(tmp_path)}
    )
    pid = tmp_path / "pid"
    until(pid.exists)
    process.terminate()
    assert process.wait(20) == 143
    content = results.load(tmp_path / "bench.json")
    assert results.is_whole(content["results"]["works"])
    assert "hangs" not in content["results"]
    until(lambda: not is_running(int(pid.read_text())))


def tells_who_it_is(bench, seconds):
    storage.write(Path(os.environ["HERE"]) / "pid", str(os.getpid()).encode())
    time.sleep(60)


def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_process_ends_when_nobody_listens_any_more(tmp_path):
    """As after a SIGKILL, which lets nobody tidy up."""
    connection, other = Processes().context.Pipe()
    child = Processes().context.Process(
        target=_child_of_nobody, args=(other, str(tmp_path / "pid"))
    )
    child.start()
    other.close()
    until((tmp_path / "pid").exists)
    connection.close()
    child.join(20)
    assert child.exitcode == 1


def _child_of_nobody(connection, path):
    from benchmarks.gpu.processes import _child

    _child(connection, f"{HERE}sleeps", (path,))


def sleeps(give, path):
    storage.write(path, str(os.getpid()).encode())
    time.sleep(60)


def test_importing_the_sections_asks_nothing_of_the_card():
    """They are forked from a process that has imported them, and CUDA does not survive a fork."""
    code = (
        "import torch\n"
        "def refuse(*_): raise AssertionError('asked')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import importlib, sys, threading\n"
        "from benchmarks.gpu.processes import PRELOADED\n"
        "for name in PRELOADED: importlib.import_module(name)\n"
        "assert threading.active_count() == 1\n"
        "assert 'torch._inductor.async_compile' not in sys.modules\n"  # it starts processes
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sections_are_measured_in_the_order_in_which_they_were_asked_for(sections, tmp_path):
    """And the ceilings before them, where neither the folder nor anybody has them."""
    sections(works="works", ceilings="works", last="works")
    content = content_of(tmp_path)
    del content["results"]["ceilings"]
    for chosen, order in [
        ("works,ceilings,last", ["works", "ceilings", "last"]),
        ("last,works", ["ceilings", "last", "works"]),
    ]:
        results.save_content(tmp_path / "bench.json", content)
        assert list(run(tmp_path, "--only", chosen)[1]["results"]) == order


def test_a_section_for_which_no_time_is_left_is_skipped_and_says_so(sections, tmp_path, capfd):
    sections(works="works")
    content_of(tmp_path)
    code, content = run(tmp_path, "--budget", "0")
    assert code == 0
    assert content["results"]["works"].startswith("skipped: 0 s were left, it takes ")


def test_names_with_commas_can_be_chosen(sections, monkeypatch):
    assert command.choose("training A ragged,levers") == ["training A ragged", "levers"]
    assert command.choose("ceilings, training A, ragged,drift") == [
        "ceilings",
        "training A ragged",
        "drift",
    ]
    assert command.choose("training A,Training B") == ["training A", "training B"]
    assert command.choose("breakdown") == ["breakdown B"]
    sections(**{"a": "works", "a, b": "works", "b": "works"})
    assert command.choose("a,b") == ["a, b"]
    assert command.choose("b,a") == ["b", "a"]
    with pytest.raises(BenchmarkError, match="unknown section 'c', of: a, a, b, b"):
        command.choose("a,c")


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device here"),
        (["--device", "cpu", "--only", "banana"], "unknown section 'banana'"),
        (["--device", "cpu", "--only", "training A,banana"], "unknown section 'banana'"),
        (["--budget", "nan"], "--budget must be a number of seconds, got nan"),
        (["--budget", "-1"], "--budget must be a number of seconds, got -1"),
        (["--report"], "there is nothing to report"),
        (["--from", "/nowhere/bench.json"], "/nowhere/bench.json: not a result"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere: cannot write there"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(arguments, said, tmp_path, capfd):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert command.main(["--out", str(tmp_path), *arguments]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_results_of_two_kinds_of_card_are_refused_by_name(tmp_path, capfd):
    content = content_of(tmp_path)
    content["environment"] |= ENVIRONMENT
    results.save_content(tmp_path / "bench.json", content)
    before = (tmp_path / "bench.json").read_bytes()
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert "bench.json holds results of NVIDIA H200, these are of CPU, toy sizes" in error
    assert "give another --out" in error
    assert (tmp_path / "bench.json").read_bytes() == before
    other = results.empty() | {"environment": ENVIRONMENT | {"device": "NVIDIA H100"}}
    with pytest.raises(BenchmarkError, match="holds results of NVIDIA H200, these are of NVIDIA H"):
        results.merge(tmp_path, content, other)
    other["environment"] = ENVIRONMENT | {"torch": "2.13.0"}
    with pytest.raises(BenchmarkError, match=r"of torch 2\.11\.0, these are of torch 2\.13\.0"):
        results.merge(tmp_path, content, other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": "npformer-gpu-1", "resul', "not a result of this benchmark"),
        ("[]", "the schema is None"),
        ('{"schema": "npformer-benchmark-1"}', "the schema is 'npformer-benchmark-1'"),
        ('{"schema": "npformer-gpu-1", "results": 3}', "it lacks 'environment'"),
        (json.dumps(results.empty()), "does not say which card"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(text, said, tmp_path, capfd):
    path = tmp_path / "bench.json"
    path.write_text(text)
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert str(path) in error
    assert said in error
    assert error.count("\n") == 1
    assert path.read_text() == text


def test_a_card_without_bfloat16_is_refused(monkeypatch):
    def refuse(precision, device):
        raise ValueError(f"Tesla T4 does not have {precision}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "check_precision", refuse)
    with pytest.raises(ValueError, match=r"^Tesla T4 does not have bfloat16$"):
        environment.environment(torch.device("cuda"))


SMI = """#!/bin/sh
case "$1" in
  --query-gpu=driver_version) echo 580.95 ;;
  --query-gpu=power.limit) echo '700.00 W' ;;
  --query-gpu=clocks.sm) echo '[N/A]' ;;
  --query-gpu=temperature.gpu) echo '[Not Supported]' ;;
  *) echo "Field is not a valid field to query." ; exit 2 ;;
esac
"""


def test_a_driver_that_does_not_tell_its_clocks_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.driver() == {}  # there is no nvidia-smi
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    assert environment.driver() == {"driver": "580.95", "power_limit": "700.00 W"}
    program.write_text("#!/bin/sh\necho '580.95, 700.00 W, 1980 MHz, 345 MHz, 2619 MHz, 31'\n")
    assert environment.driver() == {
        "driver": "580.95",
        "power_limit": "700.00 W",
        "clock_max": "1980 MHz",
        "clock_now": "345 MHz",
        "memory_clock_max": "2619 MHz",
        "temperature": "31",
    }


# --- The clock --------------------------------------------------------------------------------


class FakeTime:
    """A clock that only the contenders move."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def takes(self, *seconds):
        """A call that takes so long: the first time, the second, ...; then always the last."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def fake(monkeypatch):
    from benchmarks.gpu import timing

    fake = FakeTime()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_one_slow_contender_does_not_eat_the_time_of_the_others(fake):
    calls = {"slow": fake.takes(50.0, 40.0), "quick": fake.takes(3.01, 0.01)}
    rows = Clock(CPU).compare(calls, 10.0)
    assert rows["slow"] == {"compile_seconds": 10.0, "seconds": 40.0, "spread": 0.0, "samples": 1}
    assert rows["quick"]["samples"] == 5
    assert rows["quick"]["seconds"] == pytest.approx(0.01)
    assert rows["quick"]["compile_seconds"] == pytest.approx(3.0)
    assert fake.now < 50 + 40 + 3 + 6


def test_timing_keeps_to_the_time_that_it_has(fake):
    rows = Clock(CPU).compare({"a": fake.takes(1.0), "b": fake.takes(0.1)}, 6.0)
    assert [row["samples"] for row in rows.values()] == [3, 5]
    assert fake.now < 6.0 + 2 * (2 + 1) * 1.1


def test_a_contender_that_fails_has_a_row_that_says_so(fake, capfd):
    def fails():
        raise RuntimeError("no such kernel\nand more")

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    calls = {"a": fails, "b": fake.takes(1.0), "c": too_large}
    rows = Clock(CPU).compare(calls, 6.0)
    assert rows["a"] == {"failed": "RuntimeError: no such kernel"}
    assert rows["c"] == {"failed": "too little memory"}
    assert rows["b"]["seconds"] == 1.0
    with pytest.raises(RuntimeError, match="no such kernel"):
        Clock(CPU).time(fails, 1.0)


# --- What is compared is the same -------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # a fast path of inference
def test_torchformer_and_its_reference_have_the_same_weights_and_tokens():
    """In float32, before the first step, both lose the same: on full batches and on ragged ones."""
    setting = shapes.settings(CPU)["A"]
    plain: dict = {"bf16": False, "compiled": False}
    padded = steps.ragged_batches(setting, "padded")
    for batches, masks in ((steps.full_batches(setting), False), (padded, True)):
        ours = steps.Step(setting, CPU, batches=batches, **plain)
        model = steps.Reference(setting, steps.weights_of(ours.model), masks)
        theirs = steps.Step(setting, CPU, model=model, batches=batches, **plain)
        for step in (ours, theirs):
            step()
        assert float(ours.first_loss) == pytest.approx(float(theirs.first_loss), rel=1e-5)

    def pairs(batches):  # without their pads, in any order
        rows = [row for batch in batches for row in zip(*batch, strict=True)]
        return sorted([[int(i) for i in x if i] for x in row] for row in rows)

    n_padded = sum(batch.src.size for batch in padded)
    for how in ("by length", "by tokens"):
        together = steps.ragged_batches(setting, how)
        assert pairs(together) == pairs(padded)
        assert sum(batch.src.size for batch in together) < n_padded
        room = setting.batch * setting.length
        assert all(batch.src.size <= room for batch in together)


def test_a_timed_step_learns_and_is_the_trainers():
    setting = shapes.settings(CPU)["B"]
    step = steps.Step(setting, CPU, compiled=False, batches=steps.full_batches(setting)[:1])
    losses = []
    for _ in range(4):
        losses.append(float(step.update(*step.held[0][0])))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


class OnHost(TorchDispatchMode):
    """The largest array that is made in the host's memory."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if isinstance(y, torch.Tensor) and y.device.type == "cpu":
            self.largest = max(self.largest, y.numel())
        return y


def test_weights_are_drawn_where_they_are_to_be_and_by_the_rule_of_the_model(monkeypatch):
    """No parameter is made on the host first, a billion of them take it a minute."""
    config = shapes.settings(CPU)["B"].config
    with OnHost() as host, monkeypatch.context() as patch:
        patch.setattr(torchformer.Transformer, "initialise", None)  # which draws by NumPy
        model = steps.make_model(config, torch.device("meta"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert host.largest < config.d_model**2
    ours = steps.make_model(config, CPU).state_dict()
    theirs = torchformer.Transformer(config, np.random.default_rng(0)).state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.shape == theirs[name].shape
        assert bool((x == 0).all()) == bool((theirs[name] == 0).all()), name
        assert float(x.std()) == pytest.approx(float(theirs[name].std()), rel=0.1), name
    assert not ours["tgt_embedding.weight"][config.tgt_pad_id].any()


def test_attention_written_out_is_the_fused_one_and_is_taken_back():
    fused = torchformer.ops.attention
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    with steps.written_out_attention():
        assert torchformer.ops.attention is not fused
        found = torchformer.ops.attention(q, k, v, CAUSAL)
    assert torchformer.ops.attention is fused
    np.testing.assert_allclose(found, fused(q, k, v, CAUSAL), rtol=1e-12)


def test_parity_sees_a_fault_of_the_compiled_layers(monkeypatch):
    """A wrong scale, as of a kernel that is wrong on some card: and nothing without it."""
    setting = shapes.settings(CPU)["B"]
    config = parity.one_layer(setting, 64)
    case = parity.Case(config, parity.padded(config, 3, 64), "bfloat16", False)
    assert parity.compared(case, CPU)["ok"]

    def wrong(model):
        for layer in model.decoder.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda module, inputs, y: 4 * y)

    row = parity.compared(case._replace(change=wrong), CPU)
    assert not row["ok"]
    assert row["of_allowed"] > 1


def test_the_lengths_of_parity_on_a_card_are_those_where_kernels_have_been_wrong():
    class Cuda(bench.Bench):
        def __init__(self):
            self.clock, self.settings = (
                Clock(torch.device("cuda")),
                shapes.settings(torch.device("cuda")),
            )

    lengths = {c.batch.src.shape[1] for c in parity.cases(Cuda()).values() if c.compiled}
    assert len(lengths) == 3
    assert all(T % 128 == 64 for T in lengths)
    for case in parity.cases(Cuda()).values():
        assert not case.batch.src.all()  # there are pads


def test_tokens_of_the_decoder_are_checked_before_they_are_timed():
    config = shapes.settings(CPU)["B"].config
    model = steps.make_model(config, CPU).eval()
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    chosen = fast.continued(model, prompt, 5)
    assert gpu.check_tokens(model, prompt, chosen) == 1.0
    chosen[1, 2] = (chosen[1, 2] + 1) % config.tgt_vocab_size
    with pytest.raises(RuntimeError, match="decodes other tokens than the eager decoder"):
        gpu.check_tokens(model, prompt, chosen)


# --- Floors -----------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The matrix products of a step: (rows, summed, columns) of each."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            a, b = args
            self.found.append((*a.shape, b.shape[1]))
        elif func is torch.ops.aten.addmm.default:
            _, a, b = args
            self.found.append((*a.shape, b.shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_the_operations_of_the_floor_are_those_that_pytorch_counts(name):
    """FLOP by kind against PyTorch's own count, and each product with its bytes."""
    setting = shapes.settings(CPU)[name]
    work = shapes.training_work(setting, size=4)
    step = steps.Step(setting, CPU, bf16=False, compiled=False)
    with (
        steps.written_out_attention(),
        FlopCounterMode(display=False) as counted,
        Products() as seen,
    ):
        step()
    counts = counted.get_flop_counts()["Global"]
    linears = [op for op in work.ops if op.flops and not op.name.startswith("attention,")]
    attentions = [op for op in work.ops if op.name.startswith("attention,")]
    aten = torch.ops.aten
    assert sum(op.n * op.flops for op in linears) == counts[aten.mm] + counts[aten.addmm]
    assert sum(op.n * (op.flops + op.masked_flops) for op in attentions) == counts[aten.bmm]
    assert counted.get_total_flops() == work.literature_flops
    masked = sum(op.n * op.masked_flops for op in attentions if "causal" in op.name)
    assert masked == sum(op.n * op.flops for op in attentions if "causal" in op.name)
    ours = sorted(x for op in linears for x in [(op.flops, op.n_bytes)] * op.n)
    theirs = sorted((2 * m * k * n, 4 * (m * k + k * n + m * n)) for m, k, n in seen.found)
    assert ours == theirs
    matrices = {k: p.numel() for k, p in step.model.named_parameters() if p.ndim == 2}
    multiply = sum(s for k, s in matrices.items() if "positions" not in k)  # tied: the table too
    assert sum(shapes.matrices(setting.config)) == multiply


def test_the_floors_of_an_h200_are_near_those_that_were_worked_out_for_it():
    """2.75M, 667k and 77k tokens/s, by products and copies as such a card measures them."""
    known = {"A": 2.75e6, "B": 667e3, "C": 77e3}
    for name, setting in shapes.settings(torch.device("cuda")).items():
        floor = shapes.training_work(setting).floor(780e12, 4.3e12)
        assert setting.tokens / floor == pytest.approx(known[name], rel=0.1)


def test_utilisation_is_counted_both_ways():
    setting = shapes.settings(torch.device("cuda"))["B"]
    c, N = setting.config, sum(shapes.matrices(setting.config))
    work = shapes.training_work(setting)
    attention = 12 * c.n_decoder_layers * c.d_model * setting.length
    assert work.literature_flops == setting.tokens * (6 * N + attention)
    assert work.flops == setting.tokens * (6 * N + attention / 2)


def test_the_bytes_of_decoding_are_the_arrays_that_it_reads():
    config = shapes.settings(CPU)["B"].config
    model = steps.make_model(config, CPU)
    decoder = fast.StaticDecoder(model, 2, 7)
    held = sum(x.numel() for layer in decoder.layers for x in (layer.keys, layer.values))
    work = shapes.decoding_work(config, 2, 7, 4)
    assert work.n_bytes == 4 * (sum(shapes.matrices(config)) + held)
    assert work.flops == 2 * 2 * sum(shapes.matrices(config)) + 2 * held


def test_a_floor_is_what_takes_longer_operation_by_operation():
    product, copy = shapes.Op("product", 1, 10, 3), shapes.Op("copy", 2, 0, 10)
    work = shapes.Work((product, copy))
    assert work.floor(flops_per_s=2, bytes_per_s=1) == 5 + 2 * 10  # not max(5, 23)
    assert (work.flops, work.n_bytes) == (10, 23)


def test_the_floor_is_of_the_precision_of_the_work():
    shared = bench.Bench(print, "cpu", {"ceilings": CEILINGS})
    work = shapes.Work((shapes.Op("product", 1, 8e12, 1e12, 4e12),))
    for precision, floor in (("bf16", 8), ("float32", 2)):
        found = shared.against_the_card(work, 16.0, precision)
        assert found["floor_seconds"] == floor
        assert found["of_the_floor"] == found["of_measured_ceiling"] == floor / 16
        assert found["mfu_of_measured_ceiling"] == 1.5 * floor / 16


def test_without_ceilings_there_is_a_row_without_a_floor():
    work = shapes.Work((shapes.Op("product", 1, 8e12, 1e12),))
    for ceilings in ({}, {"ceilings": "failed: RuntimeError: no"}):
        found = bench.Bench(print, "cpu", ceilings).against_the_card(work, 16.0)
        assert found == {"tflops": 0.5, "flop_per_byte": 8}


# --- Kernels ----------------------------------------------------------------------------------


def test_it_is_seen_which_attention_pytorch_chose():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 8, 16)
    for backend in ("FLASH_ATTENTION", "MATH"):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            said = kernels.backend_of(lambda: torchformer.ops.attention(q, q, q))
        assert said == backend


def test_attention_is_timed_alone():
    """Without the kernels of a sum, and nothing piles up: each call makes its gradients anew."""
    call = kernels.attention_call(shapes.settings(CPU)["B"], CPU, CAUSAL, "default")
    first, second = call(), call()
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    names = {event.key for event in seen.key_averages()}
    assert not names & {"aten::sum", "aten::add_", "aten::ones_like"}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention"),
        ("triton_per_fused__to_copy_add_native_layer_norm_3", "norms"),
        ("triton_red_fused_native_layer_norm_native_layer_norm_backward_7", "norms"),
        ("triton_poi_fused_gelu_2", "activation"),
        ("triton_poi_fused_gelu_backward_5", "activation"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "residuals"),
        ("triton_poi_fused__to_copy_1", "casts and copies"),
        (
            "void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>",
            "casts and copies",
        ),
        ("Memset (Device)", "casts and copies"),
        ("triton_red_fused_sum_4", "sums"),
        ("triton_red_fused__log_softmax_nll_loss_forward_0", "loss"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor<float, 2>>", "optimizer"),
        ("void at::native::embedding_backward_feature_kernel<float>", "embedding"),
        ("something_new", "rest"),
    ],
)
def test_a_kernel_is_of_one_kind(kernel, kind):
    assert kernels.kind_of(kernel) == kind


@TRACED
def test_a_profiler_that_sees_nothing_costs_only_the_breakdown(monkeypatch):
    class Blind:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return []

    monkeypatch.setattr(kernels, "profile", lambda activities: Blind())
    given = {}
    shared = bench.Bench(given.__setitem__, "cpu", {"ceilings": CEILINGS})
    row = gpu.training("B", shared, 0.1)
    assert row["tokens_per_second"] > 0
    assert given["breakdown B"] == "failed: RuntimeError: the profiler saw no kernel"


# --- The report -------------------------------------------------------------------------------


def test_what_no_gpu_has_measured_says_so_in_every_cell():
    table = report.summary(None)
    cells = [c.strip() for line in table.splitlines() for c in line.split("|")[2:-1]]
    assert cells.count("not measured") == 4 * 7 + 5
    assert not any(character.isdigit() for cell in cells[6:] for character in cell)
    assert table in (ROOT / "README.md").read_text() or list(
        (ROOT / "benchmarks" / "results").glob("*-gpu.json")
    )


def test_the_readme_is_drawn_from_what_was_measured(tmp_path):
    from benchmarks import tables

    row = {"tokens_per_second": 1234567.0, "of_the_floor": 0.5, "of_datasheet": 0.25}
    row["mfu_of_datasheet"] = 0.27
    content = results.empty() | {"environment": ENVIRONMENT}
    content["results"] = {
        "training A": {
            "torchformer": {"tokens_per_second": 1.0},
            "torchformer, one CUDA graph": row,
            "nn.Transformer, eager bf16": {"ours_to_it": 2.0},
            "nn.Transformer, compiled bf16": {"failed": "too little memory"},
        },
        "training B": "skipped: 0 s were left of 540",
        "training C": {"failed": "too little memory"},
        "decoding": "failed: stopped after 100 s",
    }
    content["unfinished"] = {"decoding": {"B, batch 1": row | {"tokens_per_second": 2500.0}}}
    results.save_content(tmp_path / "20270102-gpu.json", content)
    text = "<!-- benchmarks:gpu -->\nold\n<!-- /benchmarks -->"
    table = tables.fill(text, {}, tables.newest_gpu(tmp_path))
    assert re.search(r"A, training.*\| *1,234,567 \| *50% \| *25% \| *27% \|", table)
    assert re.search(r"B, training.*\| *not measured", table)
    assert re.search(r"C, training.*\| *not measured", table)
    assert re.search(r"B, decoding, one by one *\| *2,500 ", table)
    assert re.search(r"full batches, against eager bf16 *\| *2.00 \|", table)
    assert re.search(r"full batches, against compiled bf16 *\| *not measured \|", table)
    assert "NVIDIA H200, torch 2.11.0" in table


@pytest.mark.parametrize("rows", ["failed: RuntimeError: once", {}, [], None])
def test_whatever_has_failed_a_report_is_drawn_of_the_rest(rows, tmp_path):
    content = results.empty() | {"environment": ENVIRONMENT}
    content["results"] = {name: rows for name in SECTIONS if rows is not None}
    text = report.report(content)
    assert text.startswith("# torchformer on NVIDIA H200")
    assert text.count("failed") == (len(SECTIONS) if isinstance(rows, str) else 0)
    report.draw(content, tmp_path)
    assert not list(tmp_path.iterdir())
    assert report.summary(content).count("not measured") == 4 * 7 + 5
    content["results"] = {
        "ceilings": CEILINGS,
        "ladder": [{"name": "NumPy", "failed": "RuntimeError: once"}],
        "crossover": [],
        "breakdown B": {"shares": {}, "kernels": []},
        "training A": {"torchformer": {"failed": "too little memory"}},
    }
    report.report(content)
    report.draw(content, tmp_path)
    assert not list(tmp_path.iterdir())
    assert gpu.with_ratios({"torchformer": {"failed": "x"}, "other": {"tokens_per_second": 1.0}})


@TRACED
def test_the_first_row_may_have_failed_when_the_last_is_compared_with_it():
    for before in ({}, {"training B": "failed: once"}, {"training B": {"tokens_per_second": 2.0}}):
        row = gpu.drift(bench.Bench(print, "cpu", before | {"ceilings": CEILINGS}), 0.1)
        assert ("of_the_first" in row) == isinstance(before.get("training B"), dict)
