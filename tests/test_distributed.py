"""Two processes are one: every gradient is the single process's, and the NumPy twin's.

The processes talk by gloo, on the CPU, in float64; where a GPU is, the same code talks by nccl.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import npformer
import torchformer
from npformer import checkpoint, tasks
from npformer.testing.models import Batch as ModelBatch
from npformer.testing.models import make_model, numpy_step
from torchformer.convert import to_torch

ROOT = Path(__file__).parent.parent
ENGINES = ("ddp", "fsdp", "tp")
SIZES = {"d_model": 16, "n_heads": 4, "d_ff": 24, "n_encoder_layers": 2, "n_decoder_layers": 2}
NO_DROPOUT = {f"{k}_dropout": 0.0 for k in ("embedding", "attention", "activation", "sublayer")}
CONFIG = npformer.TransformerConfig(13, 13, **SIZES, **NO_DROPOUT, activation="gelu")
SMOOTHING, RATE, CLIP = 0.1, 1e-2, 0.5
BOUND = 1e-12  # of the largest gradient: what the README says of float64
WEIGHTS = 1e-10  # after some steps of Adam: the contract of training, as in test_optim.py


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def batch_of(step):
    return tasks.load("sort").batch(step, 6, seed=0)  # ragged: the ranks have unequal targets


def join(rank, world, port):
    """What torchrun tells a process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))


def rank_main(rank, world, port, folder, n_steps, connection):
    """One process: some steps by each engine in turn; from rank 0, what they came to."""
    join(rank, world, port)
    from torchformer import parallel

    with parallel.group("cpu") as mesh:
        found = {engine: train(engine, mesh, folder / engine, n_steps) for engine in ENGINES}
        if rank == 0:
            connection.send(found)


def train(engine, mesh, folder, n_steps):
    """Steps from where the folder is; gradients, loss and norm of the first, weights after."""
    from torchformer import parallel
    from torchformer.training import train_step

    spread = parallel.spread(to_torch(make_model(CONFIG, 0)), engine, mesh)
    parameters = dict(spread.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=RATE, foreach=False)
    first = 1
    if folder.exists():
        first = 1 + parallel.load(folder, spread, optimizer)
    gradients, norms = {}, []

    def clip_grad_norm(given, max_norm):
        """Sees the gradients of a step as they are."""
        if not gradients:
            gradients.update(
                {
                    name.removeprefix("module."): parallel.whole(p.grad).numpy().copy()
                    for name, p in parameters.items()
                }
            )
        norms.append(float(parallel.clip_grad_norm(given, max_norm)))

    for step in range(first, first + n_steps):
        src, tgt = (torch.as_tensor(ids) for ids in parallel.part_of(batch_of(step), engine))
        n_targets = parallel.share_of_targets(tgt, engine)
        how = {"clip": CLIP, "clip_grad_norm": clip_grad_norm, "label_smoothing": SMOOTHING}
        loss = train_step(spread, (src, tgt), optimizer, n_targets, **how)
        gradients.setdefault("loss", np.array(parallel.mean_loss(loss, engine)))
    parallel.save(folder, spread, optimizer, first + n_steps - 1)
    weights = parallel.full_weights(spread)
    return gradients, weights, norms[0]


def started(main, world, *arguments):
    """A process for each rank, forked from one in which torch has been imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchformer.parallel", "torch._dynamo"])
    arguments = (world, free_port(), *arguments)
    ranks = [context.Process(target=main, args=(rank, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def run(world, folder, n_steps):
    """What rank 0 sends; fails where a rank has failed."""
    ours, theirs = multiprocessing.get_context("forkserver").Pipe()
    ranks = started(rank_main, world, folder, n_steps, theirs)
    theirs.close()
    try:
        found = ours.recv() if ours.poll(200) else None
    except EOFError:
        found = None
    for process in ranks:
        process.join(60)
        process.kill()
    ours.close()
    assert found is not None, [process.exitcode for process in ranks]
    return found


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Two ranks make two steps, one rank goes on for two, two ranks for a last one."""
    folder = tmp_path_factory.mktemp("shards")
    return [run(2, folder, 2), run(1, folder, 2), run(2, folder, 1)]


def single(steps):
    """The same steps by one process: the first gradients, the last weights and the last norm."""
    model = to_torch(make_model(CONFIG, 0))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, foreach=False)
    first = {}
    for step in range(1, steps + 1):
        src, tgt = (torch.as_tensor(ids) for ids in batch_of(step))
        loss = torch.nn.functional.cross_entropy(
            model(src, tgt[:, :-1]).mT, tgt[:, 1:], ignore_index=0, label_smoothing=SMOOTHING
        )
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            first = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
            first["loss"] = np.array(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return first, {k: x.numpy() for k, x in model.state_dict().items()}, float(norm)


def assert_same(found, expected, bound=BOUND):
    assert found.keys() == expected.keys()
    scale = max(float(np.abs(x).max()) for x in expected.values())
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=bound * scale, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_have_the_gradients_of_one_process_and_of_numpy(engine, phases):
    found, _, norm = phases[0][engine]
    expected, _, expected_norm = single(1)
    assert_same(found, expected)
    assert norm == pytest.approx(expected_norm, rel=BOUND)
    batch = ModelBatch(*batch_of(1), {}, SMOOTHING)
    ours = numpy_step(make_model(CONFIG, 0), batch)
    ours.pop("logits")
    assert_same(found, ours)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_on_two_ranks_then_one_then_two_are_the_steps_of_one_process(engine, phases):
    for (_, weights, _), steps in zip([phase[engine] for phase in phases], (2, 4, 5), strict=True):
        assert_same(weights, single(steps)[1], WEIGHTS)


@contextlib.contextmanager
def alone(monkeypatch):
    from torchformer import parallel

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with parallel.group("cpu"):
        yield parallel


def small_model():
    model = to_torch(make_model(CONFIG, 0))
    return model, torch.optim.Adam(model.parameters(), lr=RATE)


@pytest.mark.parametrize("crash", ["while writing", "before it counts", "before the old one goes"])
def test_a_crash_while_saving_leaves_a_checkpoint_whole(crash, tmp_path, monkeypatch):
    def crashing(*arguments, **options):
        raise KeyboardInterrupt

    model, optimizer = small_model()
    with alone(monkeypatch) as parallel:
        parallel.save(tmp_path / "shards", model, optimizer, 7)
        expected = {name: x.clone() for name, x in model.state_dict().items()}
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        zeros = {name: x.clone() for name, x in model.state_dict().items()}
        with monkeypatch.context() as patch:
            if crash == "while writing":
                patch.setattr(os, "fsync", crashing)
            elif crash == "before it counts":
                patch.setattr(checkpoint, "save_json", crashing)
            else:
                patch.setattr(Path, "unlink", crashing)
            with pytest.raises(KeyboardInterrupt):
                parallel.save(tmp_path / "shards", model, optimizer, 8)
        step, whole = (8, zeros) if crash == "before the old one goes" else (7, expected)
        assert parallel.load(tmp_path / "shards", model, optimizer) == step
        for name, x in model.state_dict().items():
            assert torch.equal(x, whole[name]), name
        parallel.save(tmp_path / "shards", model, optimizer, 9)
        assert parallel.load(tmp_path / "shards", model, optimizer) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert len(list((tmp_path / "shards").iterdir())) == 2  # the index and one rank's


def rewrite(folder, change, places=None):
    """One rank's file with other tensors, or with other places for them, and a right checksum."""
    (path,) = folder.glob("*.safetensors")
    tensors, metadata = checkpoint.load_tensors(path)
    where = json.loads(metadata["places"])
    change(tensors, where)
    checkpoint.save_tensors(path, tensors, {"places": json.dumps(where)})


HEAD = "model.head.bias"


def misplace(tensors, where):
    where[HEAD]["start"] = [1]


def halve(tensors, where):
    tensors[HEAD] = tensors[HEAD][:5]


def grow(tensors, where):
    tensors[HEAD], where[HEAD]["whole"] = np.ones(10**5, np.float32), [10**5]


def shrink(tensors, where):
    name = "optimizer.head.bias.exp_avg"
    tensors[name], where[name] = np.ones(1, np.float32), {"start": [0], "whole": [1]}


def double(tensors, where):
    tensors[HEAD] = tensors[HEAD].astype(np.float32)


SHARDS = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "index.json: no such file"),
    "no file of a rank": (lambda f: next(f.glob("*.safetensors")).unlink(), ".*: no such file"),
    "a negative step": (
        lambda folder: checkpoint.save_json(
            folder / "index.json", {"format_version": 1, "step": -1, "generation": 1, "world": 1}
        ),
        "index.json: step is -1",
    ),
    "another version's": (
        lambda f: ((f / "index.json").unlink(), (f / ".metadata").write_bytes(b"")),
        "of an earlier version, which pickled",
    ),
    "a piece outside": (lambda f: rewrite(f, misplace), f"a piece of {HEAD} lies outside"),
    "a piece missing": (lambda f: rewrite(f, halve), f"a piece of {HEAD} is missing"),
    "too many numbers": (lambda f: rewrite(f, grow), rf"{HEAD} is \(100000,\), the model's is"),
    "state of a single number": (lambda f: rewrite(f, shrink), r"exp_avg is \(1,\), the model's"),
    "another dtype": (lambda f: rewrite(f, double), f"{HEAD} is F32 .*, not torch.float64"),
    "a name too few": (lambda f: rewrite(f, lambda t, w: (t.pop(HEAD), w.pop(HEAD))), "lacks"),
    "a place too few": (lambda f: rewrite(f, lambda t, w: w.pop(HEAD)), "where its pieces belong"),
}


def test_shards_that_do_not_fit_are_refused_and_nothing_is_loaded(tmp_path, monkeypatch):
    model, optimizer = small_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with alone(monkeypatch) as parallel:
        for what, (damage, message) in SHARDS.items():
            folder = tmp_path / what
            parallel.save(folder, model, optimizer, 7)
            damage(folder)
            with pytest.raises(checkpoint.CheckpointError, match=message) as caught:
                parallel.load(folder, model, optimizer)
            assert str(caught.value).startswith(str(folder)), what
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_on_the_second_of_two_nodes_a_rank_takes_a_device_of_its_own_node(monkeypatch):
    """Ranks 0 to 3 on two machines of two devices: rank 3 is there number 1, and not 3."""
    from torchformer import parallel

    taken, wrapped = [], []
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(parallel.dist, name, lambda *_: None)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)
    mesh = SimpleNamespace(device_type="cuda", get_local_rank=lambda: 3)  # in the mesh, that is
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_: mesh)
    monkeypatch.setattr(
        parallel, "DistributedDataParallel", lambda model, device_ids: wrapped.append(device_ids)
    )
    with parallel.group("cuda") as group:
        parallel.spread(torch.nn.Linear(1, 1), "ddp", group)
    assert taken == [1]
    assert wrapped == [[1]]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(ValueError, match="rank 2 of this node has no device, there are 2"),
        parallel.group("cuda"),
    ):
        pass


def torchrun(*arguments):
    """Two ranks.   -> its exit code, stdout and stderr"""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "--master-port", str(free_port()), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def program_main(rank, world, port, arguments, folder):
    """python -m torchformer.training, as torchrun starts it; what it says goes to two files."""
    join(rank, world, port)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    from torchformer import parallel

    sys.exit(parallel.main(arguments))


def forked(*arguments, folder, ranks):
    """The same of the program without torchrun, which imports torch in each process."""
    processes = started(program_main, ranks, arguments, folder)
    for process in processes:
        process.join(300)
        process.kill()
    out, err = (
        "".join((folder / f"{name}{rank}").read_text() for rank in range(ranks))
        for name in ("out", "err")
    )
    return subprocess.CompletedProcess(arguments, max(p.exitcode for p in processes), out, err)


def small(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(
        "[model]\nd_model = 16\nn_heads = 2\nd_ff = 16\nn_encoder_layers = 1\n"
        "n_decoder_layers = 1\n[recipe]\nbatch_size = 8\n"
    )
    return str(file)


def test_torchrun_trains_saves_resumes_and_both_twins_read_it_fsdp(tmp_path):
    out = str(tmp_path / "run")
    common = ["sort", "--parallel", "fsdp", "--device", "cpu", "--config", small(tmp_path)]
    done = torchrun("-m", "torchformer.training", *common, "--steps", "3", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "fsdp on 2 x cpu: sort, steps 1 to 3" in done.stdout
    again = forked(*common, "--steps", "3", "--out", out, folder=tmp_path, ranks=2)
    assert again.returncode == 2
    assert again.stderr.count("holds a run: --resume") == 1
    more = forked(*common, "--steps", "5", "--out", out, "--resume", folder=tmp_path, ranks=1)
    assert more.returncode == 0, more.stderr
    assert "steps 4 to 5" in more.stdout
    assert "Warning" not in done.stderr + more.stderr
    model, twin = npformer.Transformer.load(out), torchformer.Transformer.load(out)
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x, twin.state_dict()[name].numpy(), err_msg=name)


def test_what_is_resumed_is_the_run_that_was_asked_for_ddp(tmp_path, monkeypatch, capsys):
    """A group of one; a run that was killed before its first save begins anew."""
    from torchformer import parallel

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    out, config = str(tmp_path / "run"), small(tmp_path)
    other = tmp_path / "other.toml"

    def resumed(task="sort", toml=config, *options):
        words = [task, "--device", "cpu", "--out", out, "--config", str(toml), "--steps", "2"]
        return parallel.main([*words, *options])

    def files():
        return {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}

    assert resumed() == 0
    before = files()
    for old, new, reason in (
        ("n_heads = 2", "n_heads = 4", "has n_heads 2, not 4"),
        ("batch_size = 8", "batch_size = 4", "has batch_size 8, not 4"),
        ("d_ff = 16", "d_ff = 16\nactivation = 'gelu'", "has activation relu, not gelu"),
    ):
        other.write_text(Path(config).read_text().replace(old, new))
        assert resumed("sort", other, "--resume") == 2
        assert reason in capsys.readouterr().err
    assert resumed("reverse", config, "--resume") == 2
    assert "has the task sort" in capsys.readouterr().err
    assert resumed("sort", config, "--resume", "--seed", "7") == 2
    assert "has the seed 0" in capsys.readouterr().err
    assert files() == before
    for path in [*before]:
        if path.name != "run.json":
            path.unlink()
    (tmp_path / "run" / "shards").rmdir()
    assert resumed("sort", config, "--resume") == 0
    for path, content in before.items():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == content, path


def test_ranks_that_do_not_divide_the_heads_are_refused_in_one_line_tp(tmp_path):
    common = ["sort", "--parallel", "tp", "--device", "cpu", "--config", small(tmp_path)]
    done = forked(*common, folder=tmp_path, ranks=3)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 3
    assert done.stderr.count("--parallel tp: 3 ranks do not divide n_heads=2") == 3


def test_a_rank_that_dies_ends_the_others_ddp(tmp_path):
    """By torchrun, in less than the time limit: the other rank waits for gradients."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, torch\nfrom torchformer import parallel\n"
        "with parallel.group('cpu') as mesh:\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise SystemExit('rank 1 has had enough')\n"
        "    torch.distributed.barrier()\n"
    )
    done = torchrun(str(script))
    assert done.returncode != 0
    assert "rank 1 has had enough" in done.stderr
