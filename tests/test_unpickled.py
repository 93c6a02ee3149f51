"""Nothing is unpickled, and nothing of a folder is executed: a trap in every file that is read."""

import ast
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import npformer
from npformer import checkpoint, cli, runs
from npformer.testing.__main__ import main as kit
from npformer.testing.models import make_model

ROOT = Path(__file__).parent.parent
CONFIG = npformer.TransformerConfig(
    13, 13, d_model=8, n_heads=2, d_ff=8, n_encoder_layers=1, n_decoder_layers=1, max_len=12
)


class Trap:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("UNPICKLED",)


def as_pickle(path):
    path.write_bytes(pickle.dumps(Trap(), protocol=2))


def as_torch(path):
    data = io.BytesIO()
    torch.save({"weights": Trap()}, data)
    path.write_bytes(data.getvalue())


def as_old_torch(path):
    torch.save({"weights": Trap()}, path, _use_new_zipfile_serialization=False)


def as_numpy(path):
    with open(path, "wb") as file:
        np.save(file, np.array([Trap()]), allow_pickle=True)


def as_npz(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array(file, np.array([Trap()]), allow_pickle=True)


TRAPS = (as_pickle, as_torch, as_old_torch, as_numpy, as_npz)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run, a trace, cases with answers and shards in one folder, where we are."""
    monkeypatch.chdir(tmp_path)
    make_model(CONFIG, 0).save("it")
    about = {"task": "sort", "backend": "numpy", "seed": 0, "recipe": {"average": 2}}
    checkpoint.save_json("it/run.json", about | {"config": CONFIG.to_json()})
    checkpoint.save_tensors("it/resume.safetensors", {"x": np.ones(1)}, {})
    checkpoint.save_tensors("it/recent/00000001.safetensors", {"x": np.ones(1)}, {})
    Path("it/history.json").write_text("{}")
    assert cli.main(["trace", "it", "31", "--out", "traced"]) == 0
    assert kit(["--dump", "cases", "--only", "softmax", "--examples", "1", "--level", "op"]) == 0
    name = next(Path("cases/cases").iterdir()).name
    shutil.copy(f"cases/cases/{name}", f"cases/answers/{name}")
    for made in ("traced", "cases"):
        shutil.copytree(made, "it", dirs_exist_ok=True)
    np.save("it/m.npy", np.tri(3, dtype=bool))
    Path("it/c.toml").write_text("")
    Path("it/result.json").write_text("{}")
    return Path("it")


QUICK = (["predict", "it", "31"], ["diff", "it", "it"], ["train", "--resume", "it"])
ALL = (
    *QUICK,
    ["predict", "it", "31", "--backend", "torch"],
    ["check", "it"],
    ["export", "it", "out"],
    ["pronounce", "hello", "--weights", "it"],
    ["trace", "it", "31"],
    ["attention", "it", "31"],
    ["explain", "it", "31"],
    ["embeddings", "it"],
    ["mask", "--file", "it/m.npy"],
    ["train", "sort", "--config", "it/c.toml", "--out", "it"],
)


def read_all(lines):
    """Every command that reads a file, or the quick ones; what each says does not matter here."""
    for line in lines:
        cli.main(line)
    kit(["--check", "it"])
    from benchmarks.harness import BenchmarkError, Result

    with pytest.raises(BenchmarkError):
        Result.load(Path("it/result.json"))


@pytest.mark.parametrize("trap", TRAPS)
def test_a_pickle_in_any_file_that_is_read_stays_one(trap, folder, monkeypatch, capsys):
    """All at once, and then each alone, with the others as they should be."""
    monkeypatch.setattr(cli, "_compare", lambda *_: {"agree": False, "verdict": ""})
    good = Path(shutil.copytree(folder, "good"))
    paths = [path.relative_to(good) for path in good.rglob("*") if path.is_file()]
    assert len(paths) >= 12
    for path in [None, *(paths if trap is as_pickle else [])]:
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        for each in paths if path is None else [path]:
            trap(folder / each)
        read_all(ALL if path is None else QUICK)
        assert not Path("UNPICKLED").exists(), path
    capsys.readouterr()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_pickle_among_the_shards_stays_one(trap, tmp_path, monkeypatch):
    """As torch.distributed.checkpoint wrote them, and as we do."""
    from torchformer import shards

    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for names in ((".metadata", "__0_0.distcp"), ("index.json",), ("index.json", "x")):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            trap(folder / name)
        if "x" in names:
            index = {"format_version": 1, "step": 1, "generation": 1, "world": 1}
            checkpoint.save_json(folder / runs.INDEX, index)
            (folder / "x").rename(folder / "00000001-00000-of-00001.safetensors")
        with pytest.raises(checkpoint.CheckpointError):
            shards.load(folder, model, optimizer)
    assert not Path("UNPICKLED").exists()


# --- And nobody can begin to ------------------------------------------------------------------

# What runs code that somebody else may have written, and where we may do so
RUNS = {"eval", "exec", "compile", "__import__", "execfile"}
MODULES = {
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "joblib",
    "dill",
    "cloudpickle",
    "yaml",
    "runpy",
}
CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("np", "save"), ("np", "savez")}
CALLS |= {("torch", "hub"), ("numpy", "load"), ("shutil", "rmtree"), ("os", "system")}
ALLOWED = {
    "npformer/lessons.py": {"eval", "exec", "compile"},  # of the lessons that we ship
    "torchformer/training.py": {"compile"},  # torch's, of a layer
}


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("npformer/**/*.py"), *ROOT.glob("torchformer/**/*.py")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_in_the_source_could_run_what_a_file_says(path):
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & (MODULES - allowed)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert module.split(".")[0] not in MODULES
            if module.startswith("torch.distributed.checkpoint"):
                assert module == "torch.distributed.checkpoint.state_dict"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS - allowed, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in CALLS, f"line {node.lineno}"
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            assert ast.unparse(node.value) == str(node.arg == "weights_only")


def test_the_trap_works(tmp_path, monkeypatch):
    """Else the tests above could not fail."""
    monkeypatch.chdir(tmp_path)
    for trap, load in (
        (as_pickle, lambda path: pickle.loads(path.read_bytes())),
        (as_torch, lambda path: torch.load(path, weights_only=False)),
        (as_old_torch, lambda path: torch.load(path, weights_only=False)),
        (as_numpy, lambda path: np.load(path, allow_pickle=True)),
    ):
        trap(tmp_path / "x")
        load(tmp_path / "x")
        assert Path("UNPICKLED").exists()
        Path("UNPICKLED").rmdir()
