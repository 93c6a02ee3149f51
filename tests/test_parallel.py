"""One step by several threads: the same gradients to rounding, the same bits run after run."""

import sys

import numpy as np
import pytest

import npformer
from npformer.parallel import BatchThreads
from npformer.tasks import PAD
from npformer.training import Recipe, Trainer

SMALL = npformer.TransformerConfig(11, 9, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=1)
KINDS_OF_DROPOUT = [f"{x}_dropout" for x in ("embedding", "attention", "activation", "sublayer")]


def threaded_step(threads, dropout=0.0, dtype=np.float64, n=7):
    """Loss and gradients of one step on n sequences of different lengths."""
    config = npformer.TransformerConfig(
        11, 9, d_model=8, n_heads=2, d_ff=12, **dict.fromkeys(KINDS_OF_DROPOUT, dropout)
    )
    model = npformer.Transformer(config, np.random.default_rng(0), dtype)
    rng = np.random.default_rng(1)
    src, tgt = rng.integers(3, 9, (n, 6)), rng.integers(3, 9, (n, 6))
    for i in range(n):  # pads: the parts have different numbers of targets
        src[i, 2 + i % 5 :] = tgt[i, 2 + i % 4 :] = PAD

    def add_gradients(model, src, tgt, rng):
        logits, backward_model = model(src, tgt[:, :-1], rng=rng)
        n_targets = 18
        loss, backward_loss = npformer.cross_entropy(logits, tgt[:, 1:], PAD, 0.0, n_targets)
        backward_model(backward_loss(1.0))
        return float(loss)

    rng = np.random.default_rng(2)
    if threads == 1:
        loss = add_gradients(model, src, tgt, rng)
    else:
        loss = BatchThreads(model, threads, rng).run(add_gradients, src, tgt)
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("threads", [2, 3, 16])  # 16: more than there are sequences
def test_threads_add_up_to_the_step_of_one(threads):
    loss, gradients = threaded_step(threads)
    expected_loss, expected = threaded_step(1)
    assert loss == pytest.approx(expected_loss, rel=1e-14)
    largest = max(abs(g).max() for g in expected.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], 0, 1e-13 * largest, err_msg=name)


def test_threads_give_the_same_bits_run_after_run():
    loss, gradients = threaded_step(2, dropout=0.2, dtype=np.float32)
    for _ in range(5):
        again, gradients_again = threaded_step(2, dropout=0.2, dtype=np.float32)
        assert again == loss
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(gradients_again[name], gradient, err_msg=name)


def test_every_thread_has_its_own_random_numbers():
    rngs = BatchThreads(npformer.Transformer(SMALL), 3, np.random.default_rng(0)).rngs
    assert len({rng.integers(2**60) for rng in rngs}) == 3


def test_a_view_has_the_weights_but_not_the_gradients():
    model = npformer.Transformer(SMALL, np.random.default_rng(0))
    view = model.view()
    for (name, p), (same_name, q) in zip(
        model.named_parameters(), view.named_parameters(), strict=True
    ):
        assert name == same_name
        assert q.data is p.data
        assert not np.shares_memory(q.grad, p.grad)


def test_a_parameter_that_was_replaced_since_is_seen():
    """The other threads went on with the old one: another loss, and its gradient to the new one."""
    model = npformer.Transformer(SMALL, np.random.default_rng(0))
    threads = BatchThreads(model, 2, np.random.default_rng(0))
    ids = np.ones((2, 3), int)
    assert threads.run(lambda *_: 1.0, ids, ids) == 2
    model.head.bias = npformer.Parameter(np.zeros(9, np.float32))
    with pytest.raises(ValueError, match="other Parameters than when these threads were made"):
        threads.run(lambda *_: 1.0, ids, ids)


def test_an_error_in_a_thread_is_raised_and_blas_gets_its_threads_back():
    model = npformer.Transformer(SMALL, np.random.default_rng(0))
    workers = BatchThreads(model, 2, np.random.default_rng(0))

    def fail(*_):
        raise ValueError("as a part would")

    before = [pool["num_threads"] for pool in workers.blas.info()]
    with pytest.raises(ValueError, match="as a part would"):
        workers.run(fail, np.ones((4, 3), int), np.ones((4, 3), int))
    assert [pool["num_threads"] for pool in workers.blas.info()] == before


def test_threads_without_threadpoolctl_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    model = npformer.Transformer(SMALL, np.random.default_rng(0))
    with pytest.raises(ImportError, match="pip install threadpoolctl"):
        BatchThreads(model, 2, np.random.default_rng(0))
    with pytest.raises(ImportError, match="needs threadpoolctl"):
        Trainer(SMALL, Recipe(), threads=2)
