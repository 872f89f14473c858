"""What `input.py` and `training_input.py` compare: knltrain's formats, and other people's loaders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from knltrain.data.manifest import Format
from knltrain.errors import KnltrainError
from knltrain.runlog.console import Console

BATCH = 64


def prepare_formats(data: str, folder: Path, console: Console) -> tuple[dict[str, Path], dict[str, Any]]:
    """Packs the images of a folder: as raw pixels, as JPEGs of 256 pixels, and as they are.

    Returns:
        Where each format is (``raw``, ``tar``, ``originals``, ``folder``: what was given, ``ffcv``: where FFCV is
        installed), and what was prepared.

    Raises:
        KnltrainError: it has no train/, or an image cannot be decoded.
    """
    from knltrain.data.prepare import prepare

    root = Path(data)
    if not (root / "train").is_dir():
        raise KnltrainError(f"{root / 'train'}: no such folder")
    roots, prepared = {"folder": root}, {}
    packed: tuple[tuple[str, Format, int], ...] = (("raw", "raw", 256), ("tar", "tar", 256), ("originals", "tar", 0))
    for name, kind, size in packed:
        roots[name] = folder / name
        console.line(f"preparing {name}")
        prepared[name] = prepare(root, roots[name], console, format=kind, size=size, workers=None, on_bad="fail")
    roots["ffcv"] = folder / "train.beton"
    with contextlib.suppress(ImportError):
        _write_for_ffcv(root, roots["ffcv"])
    return roots, prepared


def read_by_knltrain(root: Path, size: int, augment: str) -> Iterator[int]:
    """The loader of training, one decode thread, batches in bf16."""
    import sys

    import torch

    from knltrain.config import AugmentConfig, RunConfig
    from knltrain.data.datasets import open_folder
    from knltrain.data.loader import Loader, RankBatch

    resize = round(size * 256 / 224)
    config = RunConfig(image_size=size, augment=AugmentConfig(name=augment, resize=resize))  # type: ignore[arg-type]
    loader = Loader(open_folder(root, "train"), config, dtype=torch.bfloat16, workers=1)
    for _, labels in loader.training(RankBatch(BATCH, BATCH, 0, 1), 0, sys.maxsize):
        yield len(labels)


def _decode_all(root: Path, size: int, augment: str) -> Iterator[int]:
    """The same, every image decoded whole at its full size before anything is cut out of it."""
    from knltrain.data.decode import EncodedImage

    EncodedImage.around = lambda image, box, _: (image.pixels(), box)  # type: ignore[method-assign]
    yield from read_by_knltrain(root, size, augment)


def _decode_all_and_pillow(root: Path, size: int, augment: str) -> Iterator[int]:
    """And what is cut out is resampled by Pillow."""
    from knltrain.data import loader

    loader.kernels = lambda: None  # type: ignore[attr-defined]
    yield from _decode_all(root, size, augment)


def _torchvision(root: Path, size: int, augment: str) -> Iterator[int]:
    """ImageFolder and DataLoader as torchvision's reference training has them, in this process."""
    import torch
    from torchvision import datasets

    dataset = datasets.ImageFolder(str(root / "train"), torchvision_transform(size, augment))
    while True:
        for _, labels in torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=0):
            yield len(labels)


def torchvision_transform(size: int, augment: str) -> Any:
    """What torchvision's reference training does to an image."""
    import torch
    from torchvision import transforms

    cut = (
        [transforms.RandomResizedCrop(size)]
        if augment == "rrc"
        else [transforms.Resize(round(size * 256 / 224)), transforms.RandomCrop(size)]
    )
    rest = [
        transforms.RandomHorizontalFlip(), transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]  # fmt: skip
    return transforms.Compose([*cut, *rest])


def _webdataset(root: Path, size: int, augment: str) -> Iterator[int]:
    """WebDataset's own loader over the same tar files, with torchvision's transforms."""
    import webdataset
    from torchvision import transforms

    cut = transforms.RandomResizedCrop(size) if augment == "rrc" else transforms.RandomCrop(size, pad_if_needed=True)
    seen = transforms.Compose([
        cut, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    shards = [str(path) for path in sorted(root.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).shuffle(200).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(seen, lambda label: label).batched(BATCH, partial=True)
    while True:
        for _, labels in dataset:
            yield len(labels)


def _dali(root: Path, size: int, augment: str) -> Iterator[int]:
    """NVIDIA DALI's pipeline on the CPU, one thread; its random crops decode no more than they need either."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        shards = [str(path) for path in sorted(root.glob("train-*.tar"))]
        if shards:
            encoded, labels = fn.readers.webdataset(paths=shards, ext=["jpg", "cls"], random_shuffle=True)
        else:
            encoded, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True)
        if augment == "rrc":
            pixels = fn.decoders.image_random_crop(encoded)
            pixels = fn.resize(pixels, size=(size, size), interp_type=types.INTERP_TRIANGULAR)
        else:
            pixels = fn.resize(fn.decoders.image(encoded), resize_shorter=round(size * 256 / 224))
        images = fn.crop_mirror_normalize(
            pixels, mirror=fn.random.coin_flip(), output_layout="HWC", dtype=types.FLOAT, crop=(size, size),
            crop_pos_x=fn.random.uniform(range=(0, 1)), crop_pos_y=fn.random.uniform(range=(0, 1)),
            mean=[0.485 * 255, 0.456 * 255, 0.406 * 255], std=[0.229 * 255, 0.224 * 255, 0.225 * 255],
        )  # fmt: skip
        return images, labels

    built = pipeline()
    built.build()
    while True:
        yield len(built.run()[1])


def _write_for_ffcv(root: Path, path: Path) -> None:
    """FFCV's file, in which it keeps the images as JPEGs of its own making."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(ImageFolder(str(root / "train")))


def _ffcv(root: Path, size: int, augment: str) -> Iterator[int]:
    """FFCV's loader, one worker."""
    import numpy as np
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(),
             NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]  # fmt: skip
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    loader = Loader(str(root), BATCH, num_workers=1, order=OrderOption.RANDOM, pipelines=pipelines)
    while True:
        for _, labels in loader:
            yield len(labels)


# Name: what reads, of what, and how it is cut.
CONTESTANTS: dict[str, tuple[Callable[[Path, int, str], Iterator[int]], str, str]] = {
    "raw, crop-flip": (read_by_knltrain, "raw", "crop-flip"),
    "raw, rrc": (read_by_knltrain, "raw", "rrc"),
    "tar of 256 px, rrc": (read_by_knltrain, "tar", "rrc"),
    "tar of 256 px, crop-flip": (read_by_knltrain, "tar", "crop-flip"),
    "DALI, tar of 256 px, crop-flip": (_dali, "tar", "crop-flip"),
    "DALI, tar of 256 px, rrc": (_dali, "tar", "rrc"),
    "WebDataset, tar of 256 px, crop-flip": (_webdataset, "tar", "crop-flip"),
    "folder, rrc": (read_by_knltrain, "folder", "rrc"),
    "tar of originals, rrc": (read_by_knltrain, "originals", "rrc"),
    "tar of originals, decoded whole, rrc": (_decode_all, "originals", "rrc"),
    "tar of originals, decoded whole, Pillow, rrc": (_decode_all_and_pillow, "originals", "rrc"),
    "DALI, tar of originals, rrc": (_dali, "originals", "rrc"),
    "DALI, folder, rrc": (_dali, "folder", "rrc"),
    "FFCV, its JPEGs, rrc": (_ffcv, "ffcv", "rrc"),
    "torchvision, folder, rrc": (_torchvision, "folder", "rrc"),
    "WebDataset, tar of originals, rrc": (_webdataset, "originals", "rrc"),
}


def bars(lengths: Mapping[str, float], label: str, of_ours: Collection[str], unit: str, figure: Figure) -> Axes:
    """Draws a bar for each loader, knltrain's own in colour.

    Args:
        lengths: by loader.
        label: a format of a length, written at its end.
        of_ours: which loaders are knltrain's.
        unit: what the axis says.
        figure: where.
    """
    axis = figure.subplots()
    colours = ["#c1440e" if name in of_ours else "#8a99a8" for name in lengths]
    axis.barh([*lengths], [*lengths.values()], color=colours)
    for place, length in enumerate(lengths.values()):
        axis.text(length, place, f" {length:{label}}", va="center")
    axis.set_xlabel(unit)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return axis
