"""From one twin to the other and back: nothing is lost, nothing is shared."""

import numpy as np
import pytest
import torch
from hypothesis import given

import npformer
import torchformer
from npformer.testing.models import configs, make_model
from npformer.testing.strategies import seeds
from torchformer.convert import to_numpy, to_torch

CONFIG = npformer.TransformerConfig(
    11, 9, d_model=6, n_heads=2, d_ff=7, n_encoder_layers=1, n_decoder_layers=1, max_len=9
)
KINDS = {np.float32: torch.float32, np.float64: torch.float64}
each_kind = pytest.mark.parametrize(("ours", "theirs"), list(KINDS.items()), ids=str)


def tensors(model):
    """A copy of the numbers of either twin."""
    return {name: np.asarray(x).copy() for name, x in model.state_dict().items()}


def assert_same_numbers(module, model, theirs):
    """What the torch module holds is what the NumPy model holds, rounded to `theirs`."""
    state = module.state_dict()
    assert list(state) == list(model.state_dict())
    for name, x in model.state_dict().items():
        assert state[name].dtype == theirs, name
        assert torch.equal(state[name], torch.from_numpy(x).to(theirs)), name


# --- Exact ------------------------------------------------------------------------------------


@each_kind
@given(config=configs(dropout=True), seed=seeds)
def test_every_model_goes_there_and_back_bit_for_bit(config, seed, ours, theirs):
    model = make_model(config, seed, ours)
    twin = to_torch(model)
    assert type(twin) is torchformer.Transformer
    assert twin.config == config
    assert_same_numbers(twin, model, theirs)
    back = to_numpy(twin)
    assert type(back) is npformer.Transformer
    assert back.config == config
    assert back.dtype == np.dtype(ours)
    found = back.state_dict()
    for name, x in model.state_dict().items():
        assert found[name].dtype == ours, name
        assert found[name].tobytes() == x.tobytes(), name


@each_kind
@given(config=configs(dropout=True), seed=seeds)
def test_every_module_comes_here_and_goes_back_bit_for_bit(config, seed, ours, theirs):
    module = torchformer.Transformer(config, np.random.default_rng(seed), theirs)
    with torch.no_grad():
        for parameter in module.parameters():  # biases not 0, LayerNorm weights not 1
            parameter += torch.arange(parameter.numel(), dtype=theirs).view_as(parameter) / 7
    model = to_numpy(module)
    assert model.config == config
    assert model.dtype == np.dtype(ours)
    assert_same_numbers(module, model, theirs)
    assert_same_numbers(to_torch(model), model, theirs)


def test_a_tied_or_shared_table_is_one_parameter_in_both():
    config = npformer.TransformerConfig(9, 9, 6, 2, 7, 1, 1, share_embeddings=True, tie_head=True)
    for model in (make_model(config, 0), to_torch(make_model(config, 0))):
        names = [name for name, _ in model.named_parameters()]
        assert [n for n in names if "embedding" in n or "head" in n] == ["tgt_embedding.weight"]
        assert list(model.state_dict()) == names


def test_nan_and_infinity_go_along():
    model = make_model(CONFIG, 0, np.float32)
    model.head.bias.data[:3] = np.nan, np.inf, -np.inf
    bias = to_numpy(to_torch(model)).head.bias.data
    np.testing.assert_array_equal(bias, model.head.bias.data)


@given(seed=seeds)
def test_weights_that_an_optimizer_packed_convert_like_any_others(seed):
    model = make_model(CONFIG, seed, np.float32)
    npformer.SGD(model.parameters(), 0.1).step()  # now every parameter is a view of one buffer
    assert_same_numbers(to_torch(model), model, torch.float32)


# --- Other precisions -------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ours", KINDS)
def test_a_dtype_that_is_asked_for_rounds_once(ours, theirs):
    model = make_model(CONFIG, 0, ours)
    assert_same_numbers(to_torch(model, dtype=theirs), model, theirs)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_keeps_every_bit(half):
    module = torchformer.Transformer(CONFIG, np.random.default_rng(0), half)
    with torch.no_grad():
        module.head.bias[:2] = torch.tensor([1e30, 1e-30])  # one half's range is not the other's
    model = to_numpy(module)
    assert model.dtype == np.float32
    assert_same_numbers(module.float(), model, torch.float32)
    model.infer(np.array([[3]]), np.array([[1]]))  # it is a model that runs


def test_to_numpy_in_another_precision():
    module = torchformer.Transformer(CONFIG, np.random.default_rng(0), torch.float32)
    model = to_numpy(module, np.float64)
    assert model.dtype == np.float64
    for name, x in module.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], x.double().numpy(), err_msg=name)
    rounded = to_numpy(to_torch(make_model(CONFIG, 0, np.float64)), np.float32)
    for name, x in make_model(CONFIG, 0, np.float64).state_dict().items():
        np.testing.assert_array_equal(rounded.state_dict()[name], x.astype(np.float32))


# --- Independent ------------------------------------------------------------------------------


@given(config=configs(), seed=seeds)
def test_the_copy_shares_nothing_with_the_original(config, seed):
    model = make_model(config, seed, np.float32)
    twin = to_torch(model)
    back = to_numpy(twin)
    for model_written, others in ((model, (twin, back)), (back, (model, twin))):
        before = [tensors(other) for other in others]
        for parameter in model_written.parameters():
            parameter.data += 1
            parameter.grad += 1
        for other, expected in zip(others, before, strict=True):
            for name, x in tensors(other).items():
                np.testing.assert_array_equal(x, expected[name], err_msg=name)
    before = model.state_dict()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)
    assert all(parameter.grad is None for parameter in twin.parameters())


def test_the_copy_can_be_trained():
    twin = to_torch(make_model(CONFIG, 0, np.float32))
    twin(torch.tensor([[3, 4]]), torch.tensor([[1, 5]])).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in twin.parameters())
    model = to_numpy(twin)
    logits, backward = model(np.array([[3, 4]]), np.array([[1, 5]]))
    backward(logits)
    assert model.head.weight.grad.any()


# --- Where ------------------------------------------------------------------------------------


def test_a_device_can_be_named():
    model = make_model(CONFIG, 0, np.float32)
    for device in (None, "cpu", torch.device("cpu")):
        twin = to_torch(model, device)
        assert {p.device.type for p in twin.parameters()} == {"cpu"}
        assert {b.device.type for b in twin.buffers()} <= {"cpu"}
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        to_torch(model, "abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_cuda_device_that_is_not_there_is_refused():
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        to_torch(make_model(CONFIG, 0, np.float32), "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@given(config=configs(), seed=seeds)
def test_to_a_cuda_device_and_back_bit_for_bit(config, seed):
    model = make_model(config, seed, np.float32)
    twin = to_torch(model, "cuda")
    assert {x.device.type for x in (*twin.parameters(), *twin.buffers())} == {"cuda"}
    for name, x in to_numpy(twin).state_dict().items():
        assert x.tobytes() == model.state_dict()[name].tobytes(), name


# --- What is refused --------------------------------------------------------------------------


def test_what_is_no_twin_is_refused():
    model = make_model(CONFIG, 0, np.float32)
    module = to_torch(model)
    for other in (torch.nn.Linear(2, 3), model, torch.nn.Sequential(module), module.state_dict()):
        with pytest.raises(TypeError, match=r"to_numpy: expected a torchformer\.Transformer, got"):
            to_numpy(other)
    for other in (module, npformer.Linear(2, 3, rng=np.random.default_rng(0)), CONFIG, "model"):
        with pytest.raises(TypeError, match=r"to_torch: expected an npformer\.Transformer, got"):
            to_torch(other)


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble, np.int64, np.complex128, bool])
def test_a_dtype_that_npformer_does_not_calculate_in_is_refused(dtype):
    module = torchformer.Transformer(CONFIG, np.random.default_rng(0))
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got "):
        to_numpy(module, dtype)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got "):
        npformer.Transformer(CONFIG, np.random.default_rng(0), dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_dtype_that_torchformer_does_not_calculate_in_is_refused(dtype):
    with pytest.raises(TypeError, match="floating point"):
        to_torch(make_model(CONFIG, 0, np.float32), dtype=dtype)
