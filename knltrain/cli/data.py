"""The data commands, ``prepare`` and ``data``: parsing and printing only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from knltrain import config as configuration
from knltrain.cli.options import JSON, config_of_recipe, field_options, given_fields, reports_errors
from knltrain.config import RunConfig
from knltrain.errors import ConfigError


@click.command()
@click.argument("src", required=False)
@click.argument("dst", required=False)
@click.option("--format", type=click.Choice(["raw", "tar"]), default="raw", show_default=True,
              help="raw: pixels, read at memory speed; tar: JPEGs, a seventh of the size.")  # fmt: skip
@click.option("--size", type=click.IntRange(min=0, max=16384), default=256, show_default=True,
              help="Short side, pixels; raw images are square. 0 with tar: keep the original images.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1, max=1024), help="Processes; default one per core.")
@click.option("--on-bad", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="End, or skip images that cannot be decoded; DST/rejected.jsonl lists them.")  # fmt: skip
@field_options("classes", "class_order")
@click.option("--verify", metavar="DST", help="Only compare a prepared folder with its checksums.")
@JSON
@reports_errors
def prepare(
    src: str | None, dst: str | None, format: Literal["raw", "tar"], size: int, workers: int | None, on_bad: str,
    verify: str | None, as_json: bool, classes: str | None, class_order: str | None,
) -> None:  # fmt: skip
    """Convert the images of SRC to few large files in DST, for train's --data; decodes each once.

    SRC holds train/CLASS/IMAGE and val/CLASS/IMAGE, or WebDataset's train-*.tar and val-*.tar, or ImageNet's
    ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar with LOC_val_solution.csv or the devkit beside them. The val
    part may also be called validation or valid.
    """
    from knltrain.data import prepare as preparing
    from knltrain.data.classes import read_choice
    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    if verify is not None:
        if src is not None:
            raise ConfigError("--verify with SRC: it only reads DST; give one of them")
        result = preparing.verify(Path(verify), console, workers=workers)
    else:
        if src is None or dst is None:
            raise ConfigError("give SRC, the images, and DST, the folder to write; or --verify DST")
        result = preparing.prepare(
            Path(src), Path(dst), console, format=format, size=size, workers=workers, on_bad=on_bad,
            choice=read_choice(class_order or "", classes or ""),
        )  # fmt: skip
        if result["images_per_s"]:
            counts = ", ".join(f"{count:,} {part}" for part, count in result["counts"].items())
            console.line(
                f"{dst}: {counts} images in {result['bytes'] / 1e9:.2f} GB, {result['rejected']:,} rejected; "
                f"{result['images_per_s']:,.0f} img/s"
            )
    if as_json:
        click.echo(json.dumps(result))


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="FOLDER | cifar10 ARCHIVE DIR")
@click.option("--recipe", metavar="NAME", help="Show the images with this recipe's augmentation.")
@click.option("--sheet", metavar="FILE", default="contact-sheet.png", show_default=True, help="File of the picture.")
@JSON
@field_options("classes", "class_order", "image_size", "augment.name", "augment.resize")
@click.pass_context
@reports_errors
def data(
    context: click.Context, words: tuple[str, ...], recipe: str | None, sheet: str, as_json: bool, **values: str | None
) -> None:
    """Describe a data FOLDER, measure how fast it is read, and draw a batch as the network sees it.

    `knltrain data cifar10 ARCHIVE DIR` makes such a folder: DIR/train/CLASS/NNNNN.png and DIR/val/CLASS/NNNNN.png of
    the published cifar-10-python.tar.gz. A folder that is called cifar10 is looked at where it is the only word.
    """
    if len(words) > 1:
        result = _unpack(context, words, as_json=as_json)
    else:
        config = configuration.override(config_of_recipe(recipe) if recipe else RunConfig(), given_fields(values))

        from knltrain.data.inspect import describe
        from knltrain.runlog.console import Console

        result = describe(Path(words[0]), Path(sheet), Console(json=as_json), config=config)
    if as_json:
        click.echo(json.dumps(result))


def _unpack(context: click.Context, words: Sequence[str], *, as_json: bool) -> dict[str, Any]:
    if words[0] != "cifar10" or len(words) != 3:
        raise ConfigError(f"{' '.join(words)}: give one FOLDER to look at, or cifar10 ARCHIVE DIR")
    useless = [
        option.opts[0] for option in context.command.params
        if option.name not in ("words", "as_json")
        and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    ]  # fmt: skip
    if useless:
        raise ConfigError(f"{' '.join(useless)} has no effect with cifar10 ARCHIVE DIR")

    from knltrain.data.cifar import unpack_cifar10
    from knltrain.runlog.console import Console

    result = unpack_cifar10(Path(words[1]), Path(words[2]))
    counts = " and ".join(f"{count:,} {part}" for part, count in result["counts"].items())
    Console(json=as_json).line(f"{result['out']}: {counts} images of 32 x 32 px in {len(result['classes'])} classes")
    return result
