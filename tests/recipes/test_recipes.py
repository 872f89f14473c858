"""The published numbers, written down a second time from the sources."""

import pytest

from knltrain.config import RunConfig
from knltrain.config.schedule import make_schedule
from knltrain.errors import ConfigError
from knltrain.models import build_model
from knltrain.recipes import IMAGENET_IMAGES, RECIPES, at_batch

# name: model, batch, epochs, peak LR, warm-up epochs, LR at step 0, momentum, weight decay, optimizer
PUBLISHED = {
    "alexnet-512": ("alexnet", 512, 100, 2, 2, 0, 0.9, 5e-4, "lars/paper"),
    "alexnet-4k": ("alexnet", 4096, 100, 10, 2, 0, 0.9, 5e-4, "lars/paper"),
    "alexnet-8k": ("alexnet", 8192, 100, 10, 3.84, 1, 0.9, 5e-4, "lars/paper"),
    "alexnet-bn-512": ("alexnet_bn", 512, 100, 2, 5, 0, 0.9, 5e-4, "lars/paper"),
    "alexnet-bn-8k": ("alexnet_bn", 8192, 100, 14, 3.84, 1, 0.9, 5e-4, "lars/paper"),
    "alexnet-bn-16k": ("alexnet_bn", 16384, 100, 23, 5.12, 1, 0.9, 5e-4, "lars/paper"),
    "alexnet-bn-32k": ("alexnet_bn", 32768, 100, 32, 10.23, 1, 0.9, 5e-4, "lars/paper"),
    "resnet50-256": ("resnet50", 256, 90, 0.1, 0, 0.1, 0.9, 1e-4, "sgd/nesterov"),
    "resnet50-8k": ("resnet50", 8192, 100, 30, 5, 0, 0.9, 5e-4, "lars/paper"),
    "resnet50-8k-goyal": ("resnet50", 8192, 90, 3.2, 5, 0.1, 0.9, 1e-4, "sgd/nesterov"),
    "resnet50-16k": ("resnet50", 16384, 100, 33, 12, 0, 0.9, 5e-4, "lars/paper"),
    "resnet50-32k": ("resnet50", 32768, 90, 40, 12, 0, 0.9, 5e-4, "lars/paper"),
    "resnet50-32k-64ep": ("resnet50", 32768, 64, 40, 12, 0, 0.9, 5e-4, "lars/paper"),
    "resnet50-ffcv-16": ("resnet50", 4096, 16, 1.7, 2, 1.7e-4, 0.9, 1e-4, "sgd/heavy-ball"),
    "resnet50-ffcv-32": ("resnet50", 4096, 32, 1.7, 2, 1.7e-4, 0.9, 1e-4, "sgd/heavy-ball"),
    "resnet50-ffcv-88": ("resnet50", 4096, 88, 1.7, 2, 1.7e-4, 0.9, 1e-4, "sgd/heavy-ball"),
    "resnet50-32k-nus": ("resnet50", 32768, 90, 32, 14, 0, 0.9, 1e-4, "lars/mlperf"),
    "resnet50-32k-mlperf": ("resnet50", 32768, 58, 21.2, 16, 0, 0.94, 2.5e-5, "lars/mlperf"),
}
# name: model, batch, epochs, peak LR, warm-up epochs, weight decay, optimizer
OWN = {
    "cifar-256": ("alexnet_bn_small", 256, 15, 0.1, 2, 5e-4, "sgd/nesterov"),
    "cifar-2k": ("alexnet_bn_small", 2048, 15, 6.4, 2, 5e-4, "lars/mlperf"),
    "cifar-2k-goyal": ("alexnet_bn_small", 2048, 15, 0.8, 2, 5e-4, "sgd/nesterov"),
    "cifar-8k": ("alexnet_bn_small", 8192, 15, 3.2, 2, 5e-4, "lars/mlperf"),
    "cifar-8k-goyal": ("alexnet_bn_small", 8192, 15, 3.2, 2, 5e-4, "sgd/nesterov"),
    "cifar-resnet20-256": ("resnet20", 256, 30, 0.2, 2, 1e-4, "sgd/nesterov"),
    "cifar-resnet20-2k": ("resnet20", 2048, 30, 3.2, 2, 1e-4, "lars/mlperf"),
    "cifar-resnet20-2k-goyal": ("resnet20", 2048, 30, 1.6, 2, 1e-4, "sgd/nesterov"),
    "cifar-resnet20-8k": ("resnet20", 8192, 30, 6.4, 2, 1e-4, "lars/mlperf"),
    "cifar-resnet20-8k-goyal": ("resnet20", 8192, 30, 6.4, 2, 1e-4, "sgd/nesterov"),
    "cifar-2k-nesterov": ("alexnet_bn_small", 2048, 15, 0.8, 2, 5e-4, "lars/nesterov"),
    "cifar-2k-lamb": ("alexnet_bn_small", 2048, 15, 0.02, 2, 0.01, "lamb/mlperf"),
    "cifar-2k-ema": ("alexnet_bn_small", 2048, 15, 6.4, 2, 5e-4, "lars/mlperf"),
    "cifar-2k-collapse": ("alexnet_bn_small", 2048, 15, 6.4, 2, 5e-4, "lars/mlperf"),
    "cifar-2k-resizing": ("alexnet_bn_small", 2048, 15, 6.4, 2, 5e-4, "lars/mlperf"),
    "cifar-8k-batches": ("alexnet_bn_small", 8192, 15, 3.2, 2, 5e-4, "lars/mlperf"),
    "quickstart": ("alexnet_bn_small", 512, 6, 2, 1, 5e-4, "lars/mlperf"),
}


def test_all_recipes_are_there():
    assert set(RECIPES) == set(PUBLISHED) | set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_own_numbers(name):
    config = RECIPES[name].config()
    optimizer = f"{config.optim.name}/{config.optim.variant}"
    found = (config.model, config.global_batch, config.epochs, config.peak_lr, config.schedule.warmup_epochs)
    assert (*found, config.optim.weight_decay, optimizer) == OWN[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_sources(name):
    config = RECIPES[name].config()
    model, batch, epochs, lr, warmup, first_lr, momentum, decay, optimizer = PUBLISHED[name]
    assert (config.model, config.global_batch, config.epochs) == (model, batch, epochs)
    assert config.peak_lr == pytest.approx(lr)
    assert config.schedule.warmup_epochs == pytest.approx(warmup, abs=0.005)
    if config.schedule.warmup_epochs:
        assert config.schedule.warmup_lr == first_lr
    assert (config.optim.momentum, config.optim.weight_decay) == (momentum, decay)
    assert f"{config.optim.name}/{config.optim.variant}" == optimizer
    assert config.optim.trust_coefficient == 0.001


@pytest.mark.parametrize("name", RECIPES)
def test_each_is_complete(name):
    recipe = RECIPES[name]
    config = recipe.config()
    assert isinstance(config, RunConfig)
    assert config.recipe == name
    assert recipe.build.__doc__
    assert recipe.published
    assert recipe.measured
    assert config.global_batch % config.local_batch == 0
    # The options fit the network: building it refuses one that has no effect.
    build_model(
        config.model, num_classes=10, image_size=config.image_size, zero_init_residual=config.zero_init_residual
    )


def test_mlperf_recipe_has_the_references_schedule():
    config = RECIPES["resnet50-32k-mlperf"].config()
    assert (config.schedule.name, config.schedule.end_lr, config.label_smoothing) == ("poly-after-warmup", 1e-4, 0.1)
    assert config.local_batch == 128


@pytest.mark.parametrize("name", RECIPES)
def test_at_its_own_batch_a_recipe_is_what_it_was(name):
    config = RECIPES[name].config()
    assert at_batch(name, config.optim.name, config.global_batch) == config


def test_the_rates_of_other_batches_and_methods():
    """SGD with the batch, LARS with its root; data, network and length stay those of the recipe."""
    for name, optimizer, batch, lr, warmup in (
        ("cifar-256", "sgd", 8192, 3.2, 2),
        ("cifar-256", "lars", 2048, 3.2, 2),
        ("cifar-2k", "lars", 8192, 12.8, 2),
        ("cifar-8k", "lars", 2048, 1.6, 2),
        ("cifar-8k", "sgd", 8192, 3.2, 2),
        ("cifar-8k", "lamb", 8192, 0.04, 2),
        ("cifar-2k-lamb", "lars", 2048, 3.2, 2),
        ("alexnet-bn-32k", "lars", 8192, 16, 10.23),
        ("alexnet-bn-32k", "sgd", 512, 0.08, 0),
        ("resnet50-256", "lars", 8192, 10.6, 16),
        ("resnet50-256", "sgd", 8192, 3.2, 5),
        ("resnet50-8k-goyal", "sgd", 256, 0.1, 0),
        ("resnet50-8k", "sgd", 8192, 3.2, 5),
    ):
        config, base = at_batch(name, optimizer, batch), RECIPES[name].config()
        assert (config.optim.name, config.global_batch) == (optimizer, batch)
        assert config.peak_lr == pytest.approx(lr)
        assert config.schedule.warmup_epochs == pytest.approx(warmup, abs=0.005)
        kept = ("recipe", "data", "model", "epochs", "local_batch", "augment", "label_smoothing")
        assert [getattr(config, field) for field in kept] == [getattr(base, field) for field in kept]


def test_batches_that_a_run_begins_with_stay_the_same_part():
    config = at_batch("cifar-8k-batches", "lars", 2048)
    assert (config.schedule.batches, config.schedule.batch_epochs, config.optim.lr) == ((512,), (2,), 1.6)


def test_an_optimizer_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match="alexnet-512 has no rule for the optimizer 'sgd'; it has one for lars"):
        at_batch("alexnet-512", "sgd", 512)


def ffcv_size(epoch, start, end):
    """As the source finds it: from 160 to 192 between two epochs, in multiples of 32, halves to the even one."""
    if epoch <= start or epoch >= end:
        return 160 if epoch <= start else 192
    return round((160 + 32 * (epoch - start) / (end - start)) / 32) * 32


@pytest.mark.parametrize("epochs, start, end", [(16, 11, 13), (32, 23, 27), (88, 65, 76)])
def test_ffcv_recipes_have_the_sources_sizes_and_rates(epochs, start, end):
    config = RECIPES[f"resnet50-ffcv-{epochs}"].config()
    course = make_schedule(config, IMAGENET_IMAGES)
    steps = [round(epoch * IMAGENET_IMAGES / 4096 + 1) for epoch in range(epochs)]
    assert [course.phase(step).image_size for step in steps] == [
        ffcv_size(epoch, start, end) for epoch in range(epochs)
    ]
    assert (config.image_size, config.resize, config.label_smoothing, config.optim.decay_on) == (
        256, 293, 0.1, "not-norm")  # fmt: skip
    assert course.lr(config, 0) == 1.7e-4
    for epoch in (4, 9, 15):
        line = 1.7 * (epochs - epoch) / (epochs - 2)
        assert course.lr(config, round(epoch * IMAGENET_IMAGES / 4096)) == pytest.approx(line, rel=0.01)
