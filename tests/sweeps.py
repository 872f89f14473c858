"""A small sweep: two batches, two methods, two learning rates, three seeds of which one searches."""

from knltrain.sweep.plan import Sweep


def sweep_of(recipe="cifar-256", **changes):
    axes = {"batches": (256, 1024), "optimizers": ("sgd", "lars"), "lr_factors": (0.5, 1.0), "seeds": (0, 1, 2),
            "search_seeds": (0,), "fields": {"data": "shapes"}}  # fmt: skip
    return Sweep(recipe=recipe, **{**axes, **changes})
