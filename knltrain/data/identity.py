"""What a part of a data set is, in a few values that are compared between ranks and with checkpoints."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knltrain.data.loader import Dataset


def identity(dataset: Dataset) -> dict[str, str | int]:
    """Describes one part of a data set: equal for a copy elsewhere, and for the same folder on another node.

    No image is read. Pixels that were changed in place in a folder of images are not noticed.

    Args:
        dataset: the part, open.

    Returns:
        ``images``, their number; ``classes_sha256``, of the class names in the order of their numbers;
        ``labels_sha256``, of the labels in the order of the images; ``files_sha256``, of where the images are: the
        manifest's checksums if ``knltrain prepare`` wrote the folder, the index of tar files, or the names in a folder.
    """
    return {
        "images": len(dataset),
        "classes_sha256": hashlib.sha256(json.dumps(dataset.classes).encode()).hexdigest(),
        "labels_sha256": hashlib.sha256(dataset.labels.tobytes()).hexdigest(),
        "files_sha256": dataset.files_sha256(),
    }
