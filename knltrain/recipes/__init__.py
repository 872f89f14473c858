"""Named recipes: functions that return a configuration, each with its source in the docstring.

Sources are cited by the keys of ``SOURCES``.
"""

from knltrain.recipes import imagenet, small
from knltrain.recipes.registry import IMAGENET_IMAGES, RECIPES, SOURCES, at_batch

__all__ = ["IMAGENET_IMAGES", "RECIPES", "SOURCES", "at_batch", "imagenet", "small"]
