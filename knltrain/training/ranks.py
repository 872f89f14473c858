"""What must be the same on all ranks of a run, compared before they compute anything together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import knltrain
from knltrain import config as configuration
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.data.identity import identity
from knltrain.data.loader import Dataset

# A node may have its own copy of the data, and other cores.
_MAY_DIFFER = {"data", "stage", "workers"}


def same_fields(config: RunConfig) -> dict[str, object]:
    """Returns the fields that all ranks must have, and the versions of knltrain and torch, by name."""
    flat = configuration.flatten(configuration.as_dict(config))
    fields = {name: value for name, value in flat.items() if name not in _MAY_DIFFER}
    return {**fields, "knltrain": knltrain.__version__, "torch": torch.__version__}


def require_same_data(parts: Mapping[str, Dataset], folder: str, group: Group) -> None:
    """Compares the data of the ranks: images, labels and class names. All ranks call it at once.

    Args:
        parts: by name, open data sets.
        folder: of the data, for the message.
        group: the ranks.

    Raises:
        ConfigError: a rank has other data than rank 0.
    """
    if group.world_size == 1:
        return
    found: dict[str, object] = {}
    for part, dataset in parts.items():
        known = {"classes": list(dataset.classes), **identity(dataset)}
        found |= {f"{part} {name}": value for name, value in known.items()}
    group.require_same(found, f"{folder} must hold the same data on all nodes; copy it anew, or use --stage")
