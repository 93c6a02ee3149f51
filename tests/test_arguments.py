"""Command lines that ask for too much, or for nothing that there is: one line, at once."""

import errno
import resource

import numpy as np
import pytest

import npformer
from npformer import arguments, cli, compare, training
from npformer.checkpoint import CheckpointError, blame
from npformer.explain import MOST_PAIRS, explain_mask, load_mask
from npformer.testing.__main__ import main as kit
from torchformer.parallel import main as parallel

NINES = "9" * 20


def test_a_config_file_of_names_within_names_is_refused_at_once(tmp_path, capsys):
    """x.x.x.x of 100 KB: 3 GB and 10 s in the parser, which keeps every beginning of it."""
    file = tmp_path / "c.toml"
    for text, why in (
        ("x." * 50_000 + "x = 1", "larger than 0.0625 MiB"),
        ("x." * 1000 + "x = 1", "a line is longer than 1000 bytes"),
        ("#" * 999 + "\n[recipe]\nx." + "x." * 480 + "x = 1", "unknown key 'x'"),
    ):
        file.write_text(text)
        assert cli.main(["train", "sort", "--config", str(file)]) == 2
        assert why in capsys.readouterr().err


REFUSED = {
    "npformer": (
        cli.main,
        {
            (
                "train",
                "sort",
                "--minutes",
                "1e308",
            ): "--minutes: must be a number above 0 and up to",
            ("train", "sort", "--minutes", "inf"): "--minutes: must be a number above 0",
            ("train", "sort", "--minutes", "nan"): "got 'nan'",
            ("train", "sort", "--minutes", "soon"): "got 'soon'",
            ("train", "sort", "--steps", NINES): "--steps: must be a whole number from 1 to",
            ("train", "sort", "--steps", "1.5"): "got '1.5'",
            ("train", "sort", "--patience", "0"): "--patience: must be a whole number from 1",
            (
                "train",
                "sort",
                "--threads",
                "100000",
            ): "--threads: must be a whole number from 1 to 256",
            ("train", "sort", "--seed", "-1"): "--seed: must be a whole number from 0 to",
            ("train", "sort", "--seed", "9" * 5000): "got '99999999999999999999999999999999",
            ("train", "sort", "--out", ""): "--out: is empty, a name was expected",
            ("train", "--resume", ""): "--resume: is empty",
            ("demo", "--steps", "many\nlines"): "got 'many\\nlines'",
            (
                "pronounce",
                "a",
                "--nbest",
                "100000",
            ): "--nbest: must be a whole number from 1 to 100",
            ("pronounce", "a", "--beam", "100000"): "--beam: must be a whole number from 1 to 100",
            (
                "mask",
                "3",
                "--window",
                NINES,
            ): "--window: must be a whole number from 1 to 2147483647",
            ("mask", "3", "--pad", NINES): "--pad: must be a whole number from 0 to 2147483647",
            ("mask", NINES): f"got '{NINES}'",
            ("mask", "3", "x\x1b[31m"): "got 'x\\x1b[31m'",
            ("diff", "a", "b", "--bound", "0"): "--bound: must be a number above 0",
            ("diff", "a", "b", "--bound", "1e400"): "got '1e400'",
            ("lesson", NINES): "must be a whole number from 1 to 99",
            ("leson",): "invalid choice: 'leson'",
            ("predict",): "the following arguments are required: DIR",
        },
    ),
    "kit": (
        kit,
        {
            (
                "--target",
                "a:b",
                "--examples",
                NINES,
            ): "--examples: must be a whole number from 1 to",
            ("--target", "a:b", "--seed", "-1"): "--seed: must be a whole number from 0",
            ("--target", "a:b", "--time-limit", "1e308"): "--time-limit: must be a number above 0",
            ("--bounds", NINES): "--bounds: must be a whole number from 1 to",
            ("--check", ""): "--check: is empty",
            (): "one of the arguments --target --dump --check --bounds is required",
        },
    ),
    "parallel": (
        parallel,
        {
            ("sort", "--steps", "0"): "--steps: must be a whole number from 1",
            ("sort", "--save-every", "0"): "--save-every: must be a whole number from 1",
            ("sort", "--seed", "-1"): "--seed: must be a whole number from 0",
            ("sort", "--config", ""): "--config: is empty",
        },
    ),
}


@pytest.mark.parametrize(
    ("program", "line"), [(p, line) for p, (_, lines) in REFUSED.items() for line in lines]
)
def test_a_number_beyond_sense_is_refused_in_one_line(program, line, capsys):
    main, lines = REFUSED[program]
    with pytest.raises(SystemExit) as end:
        main([*line])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert lines[line] in err
    assert len(err) < 700
    assert err.isprintable() or err[:-1].isprintable()


def test_limits_are_those_that_are_said():
    parse = arguments.whole_number(1, 10)
    assert [parse("1"), parse(" 10 ")] == [1, 10]
    for text in ("0", "11", "", "1e1", "0x1", "None"):
        with pytest.raises(Exception, match="must be a whole number from 1 to 10, got"):
            parse(text)
    assert arguments.positive_number(2.5)("2.5") == 2.5


# --- Memory -----------------------------------------------------------------------------------


def test_a_mask_of_30_000_ids_is_refused_before_there_is_one(capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cli.main(["mask", "--causal", *["3"] * 30_000]) == 2
    err = capsys.readouterr().err
    assert "900,000,000 pairs of 30,000 queries and 30,000 keys are too many to explain" in err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 50_000  # KB
    with pytest.raises(ValueError, match="too many to explain"):
        explain_mask(causal=True, tokens=["a"] * 5000)
    with pytest.raises(ValueError, match="too many to explain"):
        explain_mask(np.ones((64, 16, 200, 200), bool))
    assert "may attend" in explain_mask(np.tri(int(MOST_PAIRS**0.5) // 8, dtype=bool))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: None, "not a .npy file"),
        (lambda file: file.write(b"\x93NUMPY"), "not a .npy file"),
        (lambda file: file.write(b"PK\x03\x04" + bytes(100)), "not a .npy file"),
        (lambda file: np.save(file, np.array([None]), allow_pickle=True), "an array of object"),
        (lambda file: np.save(file, np.array(["a"])), "an array of <U1"),
        (lambda file: np.save(file, np.zeros(3, "M8[s]")), "an array of datetime64"),
        (lambda file: np.save(file, np.zeros(3, "f4,i4")), "an array of"),
        (lambda file: forge(file, "(100000000000,)"), "24 bytes of numbers, (100000000000,) of"),
        (lambda file: forge(file, "(-3,)"), "bytes of numbers, (-3,) of float64 are -24"),
        (lambda file: forge(file, "(" * 200 + ")" * 200), "not a .npy file"),
        (lambda file: forge(file, "__import__('os').mkdir('x')"), "not a .npy file"),
    ],
)
def test_a_file_that_is_no_mask_is_refused(make, said, tmp_path, capsys):
    path = tmp_path / "mask.npy"
    with open(path, "wb") as file:
        make(file)
    assert cli.main(["mask", "--file", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"npformer mask: {path}: ")
    assert err.count("\n") == 1
    assert said in err


def forge(file, shape):
    """A .npy file of 24 bytes of numbers that says it has another shape."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(600) + "\n"
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(24))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [bool, "i1", ">i4", "f2", "f8"])
def test_a_mask_is_read_as_numpy_reads_it(order, dtype, tmp_path):
    mask = np.asarray(np.tri(3, 5), dtype, order=order)
    np.save(tmp_path / "m.npy", mask)
    np.testing.assert_array_equal(load_mask(tmp_path / "m.npy"), mask)


def test_memory_is_compared_with_what_there_is(monkeypatch):
    arguments.check_room("this", 1000)
    monkeypatch.setattr(arguments, "memory", lambda: 2e9)
    with pytest.raises(ValueError, match=r"^to think needs 3\.0 GB of memory, there are 2\.0$"):
        arguments.check_room("to think", 3 * 10**9)


def test_the_memory_there_is_respects_the_limit_of_the_process():
    assert 10**8 < arguments.memory() < float("inf")


# --- Errors that escaped ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-320, 1e-160, 1e-100, 1.0, 1e160, 1e300])
@pytest.mark.parametrize("factor", [-2.0, 1e-160, 1e150])
def test_a_report_of_numbers_of_any_size_says_the_factor(size, factor):
    expected = np.array([1.0, 2.0, -3.0]) * size
    with np.errstate(over="ignore", under="ignore"):
        actual = expected * factor
    said = compare.report("x", actual, expected, 0.0)
    assert said is not None
    assert "3 of 3 entries are out of bound" in said
    if 1e-100 <= size <= 1.0 and factor == -2.0:
        assert f"actual = {factor:g} * expected" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "more than there is memory for"),
        (MemoryError("Unable to allocate 7.3 TiB"), "Unable to allocate 7.3 TiB"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "no such file"),
        (OverflowError("int too large to convert to float"), "int too large to convert to float"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded"),
        (KeyError("name"), "lacks 'name'"),
    ],
)
def test_what_goes_wrong_with_a_file_is_said_with_its_name(error, said):
    with pytest.raises(CheckpointError) as caught, blame("a/b"):
        raise error
    assert str(caught.value) == f"a/b: {said}"


def test_threads_have_a_limit_whoever_asks_for_them():
    config = npformer.TransformerConfig(13, 13, d_model=8, n_heads=2, d_ff=8)
    with pytest.raises(ValueError, match="threads must be at most 256, got 200000000"):
        training.Trainer(config, training.Recipe(), threads=200_000_000)


def test_sizes_of_a_recipe_have_limits():
    for name, most in training.MOST.items():
        training.Recipe(**{name: most})
        with pytest.raises(ValueError, match=f"{name} must be at most {most}, got"):
            training.Recipe(**{name: most + 1})
    with pytest.raises(ValueError, match="steps must be at most"):
        training.Recipe(steps=10**400)
