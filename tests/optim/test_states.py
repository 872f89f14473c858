"""Optimizers that are copied, pickled, or go on from a saved state; and weights that others write to in between."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from knltrain.optim import LAMB, LARS, SGD, parameter_groups

OPTIMIZERS = {
    "lars": lambda params: LARS(params, 0.5, weight_decay=1e-3, trust_coefficient=0.02, nesterov=True),
    "larc": lambda params: LARS(params, 0.5, clip=True),
    "lamb": lambda params: LAMB(params, 0.02, weight_decay=1e-2),
    "sgd": lambda params: SGD(params, 0.1, momentum=0.9, weight_decay=1e-3),
}


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 50), nn.Linear(50, 5)
    )
    return layers.to(memory_format=torch.channels_last)


def steps(model, optimizer, numbers):
    for number in numbers:
        optimizer.zero_grad()
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        model(images).square().mean().backward()
        optimizer.step()


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def saved_and_loaded(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "save": saved_and_loaded}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("carries_norms", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_takes_the_steps_that_the_original_takes(name, carries_norms, how):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.carries_norms = carries_norms
    steps(model, optimizer, range(3))
    other, its_optimizer = COPIES[how]((model, optimizer))
    steps(model, optimizer, range(3, 6))
    assert not same(model, other), "the copy has weights of its own"
    steps(other, its_optimizer, range(3, 6))
    assert same(model, other)


def test_a_copy_in_the_middle_of_a_step_keeps_the_sums_of_its_micro_batches():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    optimizer = SGD(layer.parameters(), lr=1.0)
    working = nn.Parameter(layer.weight.detach().bfloat16())
    optimizer.use_working_copies({layer.weight: working})
    working.grad = torch.full_like(working, 3.0)
    optimizer.accumulate_fp32()
    layer, optimizer = copy.deepcopy((layer, optimizer))
    (working,) = optimizer.working_copies.values()
    working.grad = torch.full_like(working, 4.0)
    optimizer.step()
    assert (layer.weight.item(), working.item()) == (-7.0, -7.0)


def written_data(model):
    for parameter in model.parameters():
        parameter.data = 3.0 * parameter.data


def written_in_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(3.0)


def written_with_numpy(model):
    for parameter in model.parameters():
        parameter.detach().numpy()[:] *= 3.0


def written_from_a_vector(model):
    vector_to_parameters(3.0 * parameters_to_vector(model.parameters()), model.parameters())


def loaded(model):
    model.load_state_dict({name: 3.0 * value for name, value in model.state_dict().items()})


WRITES = [written_data, written_in_data, written_with_numpy, written_from_a_vector, loaded]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_lars_sees_whatever_is_written_to_the_weights(write):
    model = network().to(memory_format=torch.contiguous_format)  # the vector takes no other
    optimizer = OPTIMIZERS["lars"](model.parameters())
    steps(model, optimizer, range(2))
    write(model)
    other = copy.deepcopy(model)
    fresh = OPTIMIZERS["lars"](other.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, [2])
    steps(other, fresh, [2])
    assert same(model, other)


def test_a_run_alone_carries_norms():
    assert not LARS(network().parameters()).carries_norms


# States of other optimizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_continues_torchs(momentum):
    """And theirs goes on from ours: the state means the same in both."""
    model = network()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=1e-3)
    steps(model, theirs, range(3))
    other = copy.deepcopy(model)
    ours = SGD(parameter_groups(other, weight_decay=1e-3, decay_on="all"), lr=9.9)
    with pytest.raises(ValueError, match="number of parameter groups"):
        ours.load_state_dict(theirs.state_dict())
    ours = SGD(other.parameters(), lr=9.9)
    ours.load_state_dict(theirs.state_dict())
    steps(model, theirs, range(3, 6))
    steps(other, ours, range(3, 6))
    for one, parameter in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options, named", [({"dampening": 0.5}, "dampening 0.5"), ({"maximize": True}, "maximize")])
def test_sgd_refuses_what_torchs_does_otherwise(options, named):
    model = network()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    steps(model, theirs, range(1))
    with pytest.raises(ValueError, match=named):
        SGD(model.parameters()).load_state_dict(theirs.state_dict())


def timms_lars(params):
    return pytest.importorskip("timm.optim", exc_type=ImportError).Lars(params, lr=0.1, momentum=0.9)


FOREIGN = {
    "torch's SGD": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), ("lars", "lamb"), "torch.optim.SGD"),
    "torch's AdamW": (torch.optim.AdamW, ("lars", "lamb", "sgd"), "of A"),
    "timm's Lars": (timms_lars, ("lars", "lamb", "sgd"), "timm's Lars"),
    "LARS": (OPTIMIZERS["lars"], ("lamb", "sgd"), "knltrain's LARS"),
    "LAMB": (OPTIMIZERS["lamb"], ("lars", "sgd"), "Adam's family"),
    "SGD": (OPTIMIZERS["sgd"], ("lars", "lamb"), "another optimizer"),
}


@pytest.mark.parametrize("made, into", [(made, into) for made, (_, all_, _) in FOREIGN.items() for into in all_])
def test_a_state_of_another_kind_is_refused_and_changes_nothing(made, into):
    model = network()
    theirs = FOREIGN[made][0](model.parameters())
    steps(model, theirs, range(1))
    other = copy.deepcopy(model)
    optimizer, undisturbed = OPTIMIZERS[into](model.parameters()), OPTIMIZERS[into](other.parameters())
    steps(model, optimizer, range(2))
    steps(other, undisturbed, range(2))
    says = "another optimizer" if (made, into) == ("torch's AdamW", "lamb") else FOREIGN[made][2]
    with pytest.raises(ValueError, match=f"cannot continue this state.*{says}.*begin .* without a state"):
        optimizer.load_state_dict(theirs.state_dict())
    steps(model, optimizer, [2])
    steps(other, undisturbed, [2])
    assert same(model, other)


def test_a_state_of_other_parameters_is_refused():
    optimizer = LARS([nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match=r"momentum_buffer has shape \(3,\), and its parameter \(4,\)"):
        LARS([nn.Parameter(torch.ones(4))]).load_state_dict(optimizer.state_dict())


def test_a_state_is_laid_out_as_the_weights_are_and_is_not_the_givers():
    """Else the update would take the slower way, and write to the state that it was given."""
    model = network()
    optimizer = LARS(model.parameters())
    steps(model, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries["momentum_buffer"] = entries["momentum_buffer"].contiguous()
    before = copy.deepcopy(state)
    other = copy.deepcopy(model)
    resumed = LARS(other.parameters())
    resumed.load_state_dict(state)
    steps(model, optimizer, range(1, 3))
    steps(other, resumed, range(1, 3))
    assert same(model, other)
    for index, entries in state["state"].items():
        assert torch.equal(entries["momentum_buffer"], before["state"][index]["momentum_buffer"])


def test_names_of_the_groups_outlive_a_state_that_has_none():
    layer = nn.Linear(2, 2)
    theirs = torch.optim.SGD([layer.weight], lr=0.1)
    ours = SGD(parameter_groups(layer, weight_decay=0.0, decay_on="all")[:1], lr=0.3)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.param_groups[0]["names"], ours.param_groups[0]["lr"]) == (["weight"], 0.1)
