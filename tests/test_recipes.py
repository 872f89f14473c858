"""The published numbers, written down a second time from the sources."""

import pytest

from knltrain.config import RunConfig
from knltrain.errors import ConfigError
from knltrain.models import build_model
from knltrain.recipes import RECIPES, at_batch

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
    "resnet50-32k-mlperf": ("resnet50", 32768, 58, 21.2, 16, 0, 0.94, 2.5e-5, "lars/mlperf"),
}
# name: model, batch, epochs, peak LR, warm-up epochs, weight decay, optimizer
OWN = {
    "cifar-256": ("alexnet_bn_small", 256, 15, 0.1, 2, 5e-4, "sgd/nesterov"),
    "cifar-2k": ("alexnet_bn_small", 2048, 15, 16, 2, 5e-4, "lars/mlperf"),
    "cifar-2k-goyal": ("alexnet_bn_small", 2048, 15, 0.8, 2, 5e-4, "sgd/nesterov"),
    "cifar-8k": ("alexnet_bn_small", 8192, 15, 12, 3, 5e-4, "lars/mlperf"),
    "cifar-8k-goyal": ("alexnet_bn_small", 8192, 15, 3.2, 2, 5e-4, "sgd/nesterov"),
    "cifar-resnet20-256": ("resnet20", 256, 30, 0.2, 2, 1e-4, "sgd/nesterov"),
    "cifar-resnet20-2k": ("resnet20", 2048, 30, 16, 2, 1e-4, "lars/mlperf"),
    "cifar-resnet20-2k-goyal": ("resnet20", 2048, 30, 1.6, 2, 1e-4, "sgd/nesterov"),
    "cifar-resnet20-8k": ("resnet20", 8192, 30, 32, 2, 1e-4, "lars/mlperf"),
    "cifar-resnet20-8k-goyal": ("resnet20", 8192, 30, 6.4, 2, 1e-4, "sgd/nesterov"),
    "quickstart": ("alexnet_bn_small", 512, 8, 10, 1, 5e-4, "lars/mlperf"),
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
        ("cifar-256", "lars", 2048, 16, 2),
        ("cifar-2k", "lars", 8192, 32, 2),
        ("cifar-8k", "lars", 2048, 6, 3),
        ("cifar-8k", "sgd", 8192, 3.2, 2),
        ("alexnet-bn-32k", "lars", 8192, 16, 10.23),
        ("alexnet-bn-32k", "sgd", 512, 0.08, 0),
        ("resnet50-256", "lars", 8192, 10.6, 16),
        ("resnet50-8k", "sgd", 8192, 3.2, 5),
    ):
        config, base = at_batch(name, optimizer, batch), RECIPES[name].config()
        assert (config.optim.name, config.global_batch) == (optimizer, batch)
        assert config.peak_lr == pytest.approx(lr)
        assert config.schedule.warmup_epochs == pytest.approx(warmup, abs=0.005)
        kept = ("recipe", "data", "model", "epochs", "local_batch", "augment", "label_smoothing")
        assert [getattr(config, field) for field in kept] == [getattr(base, field) for field in kept]


def test_an_optimizer_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match="alexnet-512 has no rule for the optimizer 'sgd'; it has one for lars"):
        at_batch("alexnet-512", "sgd", 512)
