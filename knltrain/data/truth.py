"""Lists of the classes of ImageNet's validation images, which lie in one folder or archive."""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Set
from pathlib import Path

from knltrain.errors import DataError
from knltrain.files import open_regular

_WNID = re.compile(r"n\d{8}")
_LIST = "LOC_val_solution.csv"
# Kaggle's archive has the images in ILSVRC/Data/CLS-LOC/val, and this list beside ILSVRC.
_LEVELS_ABOVE = 4


def find_truth(images: Path, names: Set[str]) -> tuple[dict[str, str], Path] | None:
    """Returns the class of each validation image, by its name without suffix, and the file that lists them.

    A list is a text or CSV file in the folder of ``images`` or in ``images``, with a line for each image: its name, a
    comma or blank, and its class (nXXXXXXXX); the rest of a line is ignored. ``LOC_val_solution.csv`` is such a list,
    and may be further up; ``LOC_train_solution.csv`` has none of these names.

    Args:
        images: their archive, or their folder.
        names: of the images, without suffixes.

    Returns:
        None if there is no list.

    Raises:
        DataError: a list cannot be read.
    """
    folders = [images.absolute().parent, *([images] if images.is_dir() else [])]
    lists = [path for folder in folders for path in sorted([*folder.glob("*.csv"), *folder.glob("*.txt")])]
    lists += [folder / _LIST for folder in images.absolute().parents[1:_LEVELS_ABOVE] if (folder / _LIST).exists()]
    for path in lists:
        if (truth := _read_list(path)).keys() & names:
            return truth, path
    for folder in folders:
        for path in sorted(folder.glob("ILSVRC2012_devkit*.tar.gz")):
            return _devkit(path), path
    return None


def no_truth(images: Path) -> DataError:
    """Returns the error for images that come without a list."""
    return DataError(
        f"{images} comes without its classes: put ILSVRC2012_devkit_t12.tar.gz or {_LIST} beside it"
        + ("" if images.is_file() else ", or its images into a folder for each class")
    )


def _read_list(path: Path) -> dict[str, str]:
    """Reads a list; returns nothing if the file is another's."""
    truth = {}
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
            for row in csv.reader(text):
                words = " ".join(row).split()
                if len(words) >= 2 and _WNID.fullmatch(words[1]):
                    truth[Path(words[0]).stem] = words[1]
    except (csv.Error, UnicodeDecodeError):
        return {}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; see that it can be read, or remove it") from None
    return truth


def _devkit(path: Path) -> dict[str, str]:
    """Reads the classes from the devkit, whose own numbering of classes is only in its MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(
            f"{path}: reading it takes SciPy (pip install scipy); LOC_val_solution.csv beside it does as well"
        ) from None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file) as tar:
            files = {Path(info.name).name: info for info in tar if info.isfile()}
            meta = tar.extractfile(files["meta.mat"])
            truth = tar.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            assert meta is not None
            assert truth is not None
            synsets = loadmat(meta, squeeze_me=True)["synsets"]
            wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
            numbers = [int(line) for line in truth.read().split()]
            return {f"ILSVRC2012_val_{place:08}": wnids[number] for place, number in enumerate(numbers, 1)}
    except Exception as error:  # tarfile, zlib and SciPy raise many types for damage
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: {error.strerror}; see that it can be read") from None
        raise DataError(f"{path}: not the devkit, or damaged ({error or type(error).__name__})") from None
