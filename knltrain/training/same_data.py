"""Whether a run goes on with the data that its checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from knltrain.data.identity import identity
from knltrain.data.loader import Dataset

# Differences that a message names; the others it counts.
_MAX_NAMED = 3


def describe(train_set: Dataset, val_set: Dataset) -> dict[str, Any]:
    """Says of each part what tells it from others, and how many images each class has: a checkpoint's ``data``."""
    return {
        part: {
            **identity(dataset),
            "class_counts": np.bincount(dataset.labels, minlength=len(dataset.classes)).tolist(),
        }
        for part, dataset in (("train", train_set), ("val", val_set))
    }


def differences(state: Mapping[str, Any], classes: Sequence[str], data: Mapping[str, Any]) -> tuple[list[str], str]:
    """Compares a checkpoint's data with those that there are now.

    Args:
        state: the checkpoint's state; one of an earlier version says less, and less is compared.
        classes: the class names now.
        data: what :func:`describe` says now.

    Returns:
        What is other data, in words; and, where it is the same, what may be otherwise all the same, or nothing.
    """
    found = _classes(state["classes"], classes)
    before = state.get("data") or {"train": {"images": state["images"], "labels_sha256": state.get("labels_sha256")}}
    for part, now in data.items():
        then = before.get(part, {})
        if then.get("images", now["images"]) != now["images"]:
            found.append(f"{part}: {then['images']:,} -> {now['images']:,} images")
        if not found and then.get("class_counts", now["class_counts"]) != now["class_counts"]:
            counts = zip(classes, then["class_counts"], now["class_counts"], strict=True)
            found += _first([f"{part}: class {name!a} {was:,} -> {count:,} images"
                             for name, was, count in counts if was != count])  # fmt: skip
    then, now = before["train"], data["train"]
    if (then.get("labels_sha256") or now["labels_sha256"]) != now["labels_sha256"]:
        return found, (
            "images in another order than they have now: of the epoch that goes on, some come twice and others do not"
        )
    if then.get("files_sha256", now["files_sha256"]) != now["files_sha256"]:
        return found, "other files: nothing is lost if they are the same images, stored otherwise"
    return found, ""


def _classes(before: Sequence[str], now: Sequence[str]) -> list[str]:
    if len(before) != len(now):
        return [f"{len(before):,} -> {len(now):,} classes"]
    return _first([f"class {i} {was!a} -> {name!a}" for i, (was, name) in enumerate(zip(before, now, strict=True))
                   if was != name])  # fmt: skip


def _first(items: list[str]) -> list[str]:
    more = len(items) - _MAX_NAMED
    return [*items[:_MAX_NAMED], *([f"{more:,} more"] if more > 0 else [])]
