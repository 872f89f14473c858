"""The tables of layers against the modules themselves, and buckets against DistributedDataParallel's."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from knltrain.config import OptimConfig
from knltrain.errors import ConfigError
from knltrain.models import build_model
from knltrain.models.alexnet import LocalResponseNorm
from knltrain.ops.native import load_error
from knltrain.optim import build_optimizer
from knltrain.predict.layers import KNOWN, Gradient, buckets, gradients_of, layers_of, times_from_profile
from knltrain.training.engine import build_engine

SIZES = {"alexnet": (227, 224, 67), "alexnet_bn": (227, 130), "alexnet_bn_small": (32, 48), "resnet20": (32, 45),
         "resnet50": (224, 100)}  # fmt: skip
COMPUTING = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.ReLU,
             LocalResponseNorm)  # fmt: skip


def walked(model, size):
    """What the modules of a network see when one image passes, by path and in the order of the calls."""
    with torch.device("meta"):
        network = build_model(model, num_classes=1000, image_size=size)
        seen = {}
        for path, module in network.named_modules():
            if isinstance(module, COMPUTING):

                def note(module, inputs, output, path=path):
                    seen[path] = (module, inputs[0].shape, output.shape)

                module.register_forward_hook(note)
        # The convolution's kernel for local response normalisation has no meta form of its own.
        with contextlib.suppress(NotImplementedError):
            network(torch.empty(1, 3, size, size))
    return network, seen


def arithmetic(module, output):
    """Independent of the table: multiply-adds from the weights and the output's size."""
    places = output[2] * output[3] if isinstance(module, nn.Conv2d) else 1
    return 2 * module.weight.numel() * places


@pytest.mark.parametrize("model, size", [(model, size) for model in KNOWN for size in SIZES[model]])
def test_layers_are_those_of_the_modules(model, size):
    network, seen = walked(model, size)
    table = {layer.name: layer for layer in layers_of(model, image_size=size)}
    assert sum(layer.num_parameters for layer in table.values()) == sum(p.numel() for p in network.parameters())
    names = [name for name in table if name in seen]
    assert names == [path for path in seen if path in table], "in the order of the calls"
    first = next(path for path, (module, *_) in seen.items() if isinstance(module, nn.Conv2d))
    for path, (module, before, after) in seen.items():
        if isinstance(module, nn.ReLU):
            assert path in table
        layer = table[path]
        assert sorted(layer.parameters) == sorted(p.numel() for p in module.parameters()), path
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert layer.forward_flops == arithmetic(module, after), path
            assert layer.backward_flops == (1 if path == first else 2) * layer.forward_flops, path
            assert layer.forward_values == before.numel() + after.numel(), path
    if model.startswith("resnet"):  # its ReLUs are calls of a function, and counted with the batch norms
        assert set(seen) == set(table) - {"avgpool", "(loss)"}
    else:
        assert set(seen) == set(table) - {"(loss)"}


def test_totals_are_the_published_ones():
    """1.5 and 7.7 G operations an image, 61 and 25 M parameters (quoted from ICPP 2018); v1.5 computes 6 % more."""
    totals = {}
    for model, size in (("alexnet", 227), ("resnet50", 224)):
        layers = layers_of(model, image_size=size)
        totals[model] = (sum(layer.forward_flops for layer in layers), sum(layer.num_parameters for layer in layers))
    assert totals["alexnet"] == (pytest.approx(1.5e9, rel=0.05), 60_965_224)
    assert totals["resnet50"] == (pytest.approx(7.7e9, rel=0.07), 25_557_032)


@pytest.mark.parametrize("model, size, words", [("lenet", 32, "--layers FILE"), ("resnet50", 31, "at least 32")])
def test_what_is_not_known_is_refused(model, size, words):
    with pytest.raises(ConfigError, match=words):
        layers_of(model, image_size=size)


@pytest.fixture
def alone():
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "model, size, engine, precision, bucket_mb",
    [
        ("alexnet_bn_small", 32, "eager", "fp32", 0.5),
        ("resnet50", 32, "eager", "fp32", 25.0),
        ("resnet50", 32, "eager", "fp32", 1e-6),
        ("resnet50", 32, "fused", "bf16", 3.0),
    ],
)
def test_buckets_are_those_of_the_trainer(alone, model, size, engine, precision, bucket_mb):
    if engine == "fused" and load_error():
        pytest.skip(f"no kernels: {load_error()}")
    torch.set_num_threads(1)
    network = build_model(model, num_classes=1000, image_size=size).to(memory_format=torch.channels_last)
    built = build_engine(engine, precision, network, build_optimizer(network, OptimConfig()))
    parallel = DistributedDataParallel(built.model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
    left = []

    def hook(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        left.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, hook)
    for _ in range(2):  # buckets are made anew after the first step, in the order in which gradients became ready
        left.clear()
        images = torch.randn(2, 3, size, size).to(built.dtype).to(memory_format=torch.channels_last)
        with built.autocast():
            logits = parallel(images)
        logits.float().sum().backward()
    layers = layers_of(model, image_size=size)
    gradients = [gradient for layer in reversed(layers) for gradient in gradients_of(layer, precision)]
    ours = [
        sum(gradients[index].elements * gradients[index].itemsize for index in bucket)
        for bucket in buckets(gradients, bucket_mb)
    ]
    whole = len(ours) - len({gradient.itemsize for gradient in gradients})
    assert len(left) == len(ours)
    # Which of the last ones comes first when there are two types is PyTorch's to say.
    assert left[:whole] == ours[:whole]
    assert sorted(left) == sorted(ours)


def test_a_bucket_is_full_with_the_gradient_that_fills_it():
    one = Gradient(2**18, 4)  # 1 MiB
    small = Gradient(10, 4)
    assert buckets([one, small, one, one], 1.0) == [[0], [1, 2], [3]]
    assert buckets([small, one, small], 2.0) == [[0, 1, 2]]
    assert buckets([], 2.0) == []
    assert buckets([Gradient(10, 2), small, Gradient(10, 2)], 1.0) == [[0, 2], [1]]


PROFILE = {
    "batch": 8,
    "precision": "bf16",
    "step_s": {"median": 1.0},
    "profiled_step_s": 2.0,
    "optimizer_s": 0.2,
    "other_s": 0.4,
    "layers": [
        {"layer": "fc", "kind": "linear", "forward_s": 0.2, "backward_s": 0.4, "gradient_bytes": 200},
        {"layer": "bn", "kind": "norm", "forward_s": 0.2, "backward_s": 0.6, "gradient_bytes": 80},
    ],
}


def test_a_profile_is_read_in_the_order_of_the_forward_pass():
    times, batch, optimizer_s = times_from_profile(PROFILE)
    assert [time.name for time in times] == ["(rest)", "bn", "fc"]
    assert (batch, optimizer_s) == (8, 0.1)
    assert sum(time.forward_s + time.backward_s for time in times) + optimizer_s == pytest.approx(1.0), "without it"
    assert [time.gradients for time in times] == [(), (Gradient(20, 4),), (Gradient(100, 2),)]


@pytest.mark.parametrize(
    "change",
    [{"layers": None}, {"batch": "many"}, {"batch": 0}, {"profiled_step_s": 0}, {"layers": [{"layer": "fc"}]},
     {"step_s": {"median": -1.0}}],
)  # fmt: skip
def test_what_is_no_profile_is_one_line(change):
    with pytest.raises(ConfigError, match="--layers"):
        times_from_profile({**PROFILE, **change}, "--layers")
