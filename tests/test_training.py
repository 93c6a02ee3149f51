"""The loop: resuming changes nothing, the best checkpoint is kept, tasks are what they say."""

import contextlib
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import npformer
import torchformer.training
from npformer import checkpoint, presets, tasks, training
from npformer.tasks import EOS, PAD, SOS

TRAINERS = {"numpy": training.Trainer, "torch": torchformer.training.Trainer}
WAYS = TRAINERS | {"numpy, 2 threads": partial(training.Trainer, threads=2)}


def small(task):
    chosen = presets.settings(task, "notes")
    chosen["model"] |= {"d_model": 16, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 32}
    config, recipe = presets.build(task, chosen)
    return config, replace(recipe, batch_size=8, steps=12, evaluate_every=4, dev_examples=8)


class StopAt(training.Silent):
    """Presses Ctrl-C at a step."""

    def __init__(self, step):
        self.at = step

    def step(self, entry):
        if entry["step"] == self.at:
            import signal

            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("backend", WAYS)
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path, backend):
    task = tasks.load("sort")
    config, recipe = small(task)

    def go(folder, **options):
        trainer = WAYS[backend](config, recipe, 3)
        outcome = training.run(
            trainer, task, folder, recipe=recipe, seed=3, test_examples=8, **options
        )
        return outcome

    assert go(tmp_path / "whole").ended == "done"
    assert go(tmp_path / "parts", report=StopAt(7)).ended == "interrupted"
    assert go(tmp_path / "parts", resume=True).ended == "done"
    whole, parts = (load_file(tmp_path / name / training.RESUME) for name in ("whole", "parts"))
    assert set(whole) == set(parts)
    for name, x in whole.items():
        np.testing.assert_array_equal(x, parts[name], err_msg=name)


@pytest.mark.parametrize("backend", TRAINERS)
def test_the_last_weights_are_averaged_and_judged_like_any_others(tmp_path, backend):
    task = tasks.load("sort")
    config, recipe = small(task)
    recipe = replace(recipe, average=2)  # of those at the steps 8 and 12

    class Watch(training.Silent):
        def __init__(self):
            self.seen = []

        def evaluation(self, entry, is_best):
            self.seen.append((entry, trainer.weights()))

    trainer, watch = TRAINERS[backend](config, recipe, 3), Watch()
    go = partial(training.run, task=task, recipe=recipe, seed=3, test_examples=8)
    go(trainer, folder=tmp_path / "whole", report=watch)
    entries, weights = zip(*watch.seen, strict=True)
    assert [entry["step"] for entry in entries] == [4, 8, 12, 12]
    assert [entry.get("averaged") for entry in entries] == [None, None, None, 2]
    for name, x in weights[3].items():
        np.testing.assert_array_equal(x, (weights[1][name] + weights[2][name]) / 2, err_msg=name)

    go(TRAINERS[backend](config, recipe, 3), folder=tmp_path / "parts", report=StopAt(10))
    trainer, watch = TRAINERS[backend](config, recipe, 3), Watch()
    go(trainer, folder=tmp_path / "parts", report=watch, resume=True)
    assert watch.seen[-1][0]["averaged"] == 2
    for name, x in weights[3].items():
        np.testing.assert_array_equal(x, watch.seen[-1][1][name], err_msg=name)
    trainer, watch = TRAINERS[backend](config, recipe, 3), Watch()
    go(trainer, folder=tmp_path / "parts", report=watch, resume=True)
    assert watch.seen == []  # what is done is done


def test_both_twins_train_alike(tmp_path):
    """Without dropout the same seed gives the same weights, batches and, nearly, losses."""
    task = tasks.load("sort")
    config, recipe = small(task)
    config = replace(config, **presets.NO_DROPOUT, activation="gelu")
    losses = {}
    for backend, Trainer in TRAINERS.items():
        trainer = Trainer(config, recipe, 3)
        losses[backend] = [
            trainer.step(task.batch(step, 8, seed=3), rate=1e-3) for step in range(1, 11)
        ]
    eps = float(np.finfo(np.float32).eps)
    for ours, theirs in zip(*losses.values(), strict=True):
        # ten steps of some hundred roundings each
        assert abs(ours - theirs) <= 1000 * eps * abs(theirs)


def test_what_a_run_leaves_behind(tmp_path):
    task = tasks.load("sort")
    config, recipe = small(task)
    trainer = training.Trainer(config, recipe, 0)
    outcome = training.run(trainer, task, tmp_path, recipe=recipe, test_examples=8)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "run.json", "history.json"} <= names
    history = json.loads((tmp_path / "history.json").read_text())
    assert [entry["step"] for entry in history["evaluations"]] == [4, 8, 12]
    assert history["test"] == outcome.scores
    assert npformer.Transformer.load(tmp_path).config == config


def test_resuming_another_run_is_refused(tmp_path):
    task = tasks.load("sort")
    config, recipe = small(task)
    training.run(training.Trainer(config, recipe), task, tmp_path, recipe=recipe, test_examples=4)
    other = training.Trainer(replace(config, d_ff=48), recipe)
    with pytest.raises(checkpoint.CheckpointError, match="another model configuration"):
        training.run(other, task, tmp_path, recipe=recipe, resume=True)
    threaded = training.Trainer(config, recipe, threads=2)
    with pytest.raises(checkpoint.CheckpointError, match="was trained with 1 thread"):
        training.run(threaded, task, tmp_path, recipe=recipe, resume=True)
    again = training.Trainer(config, recipe)
    with pytest.raises(checkpoint.CheckpointError, match="seed"):
        training.run(again, task, tmp_path, recipe=recipe, seed=9, resume=True)


@pytest.mark.parametrize("name", [n for n in tasks.NAMES if not n.startswith("g2p")])
def test_digit_tasks(name):
    task = tasks.load(name)
    batch = task.batch(1, 16, seed=0)
    again = task.batch(1, 16, seed=0)
    np.testing.assert_array_equal(batch.src, again.src)
    held_out = {tuple(e.src) for e in task.dev() + task.test()}
    for src, tgt in zip(batch.src.tolist(), batch.tgt.tolist(), strict=True):
        src = [i for i in src if i != PAD]
        answer = src[::-1] if name == "reverse" else sorted(src)
        assert [i for i in tgt if i != PAD] == [SOS, *answer, EOS]
        assert tuple(src) not in held_out
    np.testing.assert_array_equal(batch.tgt_in[:, 1:], batch.tgt_out[:, :-1])
    assert task.format(task.parse("312")) == "312"


def test_g2p_split_and_scores():
    task = tasks.load("g2p")
    sizes = [len(task.examples(side)) for side in ("train", "dev", "test")]
    assert sizes == [109_896, 2_513, 12_517]
    examples = task.test()[:50]
    right = [e.references[-1] for e in examples]
    assert task.score(examples, right) == {"phoneme_error_rate": 0, "word_error_rate": 0}
    wrong = [r[:-1] for r in right]
    scores = task.score(examples, wrong)
    assert scores["word_error_rate"] > 0.9
    assert 0 < scores["phoneme_error_rate"] <= 50 / (sum(map(len, right)) - 50)
    every = np.concatenate([task.batch(s, 4096, 0).src[:, 0] for s in range(1, 30)])
    assert len(every) == len(task._pairs())  # an epoch is every pair once


# --- How the torch twin computes ------------------------------------------------------------------


def test_bfloat16_trains_nearly_as_float32_and_keeps_float32_weights():
    task = tasks.load("sort")
    config, recipe = small(task)
    config = replace(config, **presets.NO_DROPOUT, activation="gelu")
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = torchformer.training.Trainer(config, recipe, 3, precision=precision)
        losses[precision] = [trainer.step(task.batch(i, 8, seed=3), 1e-3) for i in range(1, 11)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]  # it has made a difference
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)  # of 2^-8 each


def test_a_precision_that_there_is_not_is_refused():
    task = tasks.load("sort")
    config, recipe = small(task)
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16, got 'float8'"):
        torchformer.training.Trainer(config, recipe, precision="float8")


def test_a_card_that_only_emulates_bfloat16_is_refused(monkeypatch):
    """Such as a T4, which says that it has it unless it is asked without emulation."""
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "Tesla T4")
    device = torch.device("cuda")
    assert torchformer.training.check_precision("float32", device) == "float32"
    with pytest.raises(ValueError, match="Tesla T4 does not have bfloat16"):
        torchformer.training.check_precision("bfloat16", device)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's tracer looks at it itself
def test_compiled_layers_take_the_same_steps(monkeypatch):
    """By the backend that only traces: a graph break would be an error.

    Models and batches of several sizes: from the second on, sizes are symbols.
    """
    task = tasks.load("sort")
    config, recipe = small(task)
    config = replace(config, **presets.NO_DROPOUT)
    compile = torch.compile  # of the loss, and behind Module.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile(f, **o, backend="eager"))
    for width, heads in ((16, 4), (24, 2), (12, 3)):
        sized = replace(config, d_model=width, n_heads=heads)
        plain = torchformer.training.Trainer(sized, recipe, 3)
        compiled = torchformer.training.Trainer(sized, recipe, 3, compiled=True)
        for i, n in enumerate((8, 8, 7), 1):
            batch = task.batch(i, n, seed=3)
            assert compiled.step(batch, 1e-3) == pytest.approx(plain.step(batch, 1e-3), rel=1e-5)


def test_out_of_memory_says_the_batch_that_would_fit(monkeypatch):
    task = tasks.load("sort")
    config, recipe = small(task)
    trainer = torchformer.training.Trainer(config, recipe, 3)
    forward = trainer.model.forward

    def limited(src, tgt, *args):
        if len(src) > room["for"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(src, tgt, *args)

    room = {"for": 5}
    monkeypatch.setattr(trainer.model, "forward", limited)
    with pytest.raises(ValueError, match="out of memory with a batch of 8; 4 would fit"):
        trainer.step(task.batch(1, 8, seed=3), 1e-3)
    room["for"] = 0
    with pytest.raises(ValueError, match="and with one of 1: a smaller model"):
        trainer.step(task.batch(1, 8, seed=3), 1e-3)
