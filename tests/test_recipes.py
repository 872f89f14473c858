"""The published numbers, written down a second time from the sources."""

import pytest

from knltrain.config import RunConfig
from knltrain.models import build_model
from knltrain.recipes import RECIPES

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
OWN = {"cifar-256", "cifar-2k", "cifar-8k", "quickstart"}


def test_all_recipes_are_there():
    assert set(RECIPES) == set(PUBLISHED) | OWN


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
