"""Which runs a sweep consists of, and how each of them is started. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knltrain import config as configuration
from knltrain.config import RunConfig
from knltrain.errors import ConfigError
from knltrain.recipes import RECIPES, at_batch

# Fields that the sweep sets for each run.
OWN_FIELDS = frozenset(
    {"recipe", "out", "resume", "global_batch", "seed", "optim.name", "optim.lr", "optim.lr_scaling"}
)
_AXES = ("batches", "optimizers", "lr_factors", "seeds", "search_seeds")
# A method at a batch; each has a best learning rate.
Cell = tuple[str, int]


@dataclass(frozen=True)
class Point:
    """A run of a sweep.

    Attributes:
        optimizer: the method.
        batch: images a step.
        factor: of the learning rate that the method's rule gives for this batch.
        seed: of the run.
        config: all of it.
    """

    optimizer: str
    batch: int
    factor: float
    seed: int
    config: RunConfig

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.config.peak_lr

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.optimizer}-b{self.batch}-lr{self.lr:g}-seed{self.seed}"

    def folder(self, out: Path) -> Path:
        """Where it trains, in a sweep's folder."""
        return out / "runs" / self.name

    def words(self, out: Path) -> list[str]:
        """The arguments of its command: the recipe, and every field that differs from the recipe."""
        usual = configuration.flatten(configuration.as_dict(RECIPES[self.config.recipe].config()))
        fields = configuration.flatten(configuration.as_dict(self.config)) | {"out": str(self.folder(out))}
        words = ["train", "--recipe", self.config.recipe]
        for name, value in fields.items():
            if value != usual[name]:
                words += [f"--{name.replace('_', '-')}", _as_flag(value)]
        return words


def _as_flag(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "null" if value is None else str(value)


@dataclass(frozen=True)
class Sweep:
    """Batches x optimizers x learning rates x seeds of a recipe.

    Attributes:
        recipe: its name.
        fields: fields that are others than the recipe's in every run, by dotted name.
        batches: images a step.
        optimizers: methods, each with a rule of the recipe's.
        lr_factors: what the rule's learning rate is multiplied by.
        seeds: of the best learning rate of each method and batch.
        search_seeds: those of them with which every learning rate is tried; the best is chosen by their mean.
        lr_factors_at: those of a method at a batch, where they are others; as many for every method.

    Raises:
        ConfigError: something is given twice, a search seed is no seed, a method is searched more than another at the
            same batch, or a run of it cannot be configured.
    """

    recipe: str
    fields: Mapping[str, str]
    batches: tuple[int, ...]
    optimizers: tuple[str, ...]
    lr_factors: tuple[float, ...]
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]
    lr_factors_at: Mapping[Cell, tuple[float, ...]] = field(default_factory=dict)
    # To configure a run takes milliseconds, and each is asked for many times.
    _points: dict[tuple[str, int, float, int], Point] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for axis in _AXES:
            values = getattr(self, axis)
            if twice := [value for value in values if values.count(value) > 1]:
                raise ConfigError(f"--{axis.replace('_', '-')}: {twice[0]} is given twice")
        if strangers := [seed for seed in self.search_seeds if seed not in self.seeds]:
            raise ConfigError(f"--search-seeds {strangers[0]} is not one of --seeds {','.join(map(str, self.seeds))}")
        for cell in self.lr_factors_at:
            if cell not in self.cells:
                raise ConfigError(f"--lr-factors {_name(cell)}: this sweep has no {cell[0]} at {cell[1]}")
        for batch in self.batches:
            sizes = {optimizer: len(self.factors(optimizer, batch)) for optimizer in self.optimizers}
            if len(set(sizes.values())) > 1:
                raise ConfigError(
                    f"--lr-factors: at {batch}, " + ", ".join(f"{name} has {size}" for name, size in sizes.items())
                    + "; a comparison is fair where every method is searched alike: give as many for each"
                )  # fmt: skip
        names = [point.name for point in self.search()]
        if same := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"--lr-factors: two of them give the same learning rate ({same[0]}); remove one")

    @property
    def cells(self) -> list[Cell]:
        """Methods and batches."""
        return [(optimizer, batch) for batch in self.batches for optimizer in self.optimizers]

    @property
    def later_seeds(self) -> tuple[int, ...]:
        """Seeds that only the best learning rates are trained with."""
        return tuple(seed for seed in self.seeds if seed not in self.search_seeds)

    @property
    def num_tasks(self) -> int:
        """Runs in all: those of the search, then those with the later seeds."""
        return len(self.search()) + len(self.cells) * len(self.later_seeds)

    def factors(self, optimizer: str, batch: int) -> tuple[float, ...]:
        """Factors on the rule's learning rate for a method at a batch."""
        return self.lr_factors_at.get((optimizer, batch), self.lr_factors)

    def point(self, optimizer: str, batch: int, factor: float, seed: int) -> Point:
        """Configures a run."""
        key = (optimizer, batch, factor, seed)
        if key not in self._points:
            config = configuration.override(at_batch(self.recipe, optimizer, batch), {**self.fields, "seed": seed})
            config = configuration.override(config, {"global_batch": batch, "optim.lr": config.optim.lr * factor})
            self._points[key] = Point(*key, config)
        return self._points[key]

    def search(self, *cells: Cell) -> list[Point]:
        """The runs that every learning rate gets, of all methods and batches or of those named."""
        return [
            self.point(optimizer, batch, factor, seed)
            for optimizer, batch in cells or self.cells
            for factor in self.factors(optimizer, batch)
            for seed in self.search_seeds
        ]

    def base(self) -> RunConfig:
        """The configuration of the first method at the first batch, for what all runs have in common."""
        return self.point(self.optimizers[0], self.batches[0], 1.0, self.seeds[0]).config

    def as_dict(self) -> dict[str, Any]:
        """The sweep as JSON types."""
        lists = {axis: list(getattr(self, axis)) for axis in _AXES}
        others = {_name(cell): list(factors) for cell, factors in self.lr_factors_at.items()}
        return {"recipe": self.recipe, "fields": dict(self.fields), **lists, "lr_factors_at": others}

    def command(self, out: Path) -> str:
        """The command that makes it."""
        return " ".join(shlex.quote(word) for word in self._words(out))

    def _words(self, out: Path) -> Iterator[str]:
        yield from ("knltrain", "sweep", "--recipe", self.recipe)
        for axis in _AXES:
            values: Sequence[object] = getattr(self, axis)
            if axis != "search_seeds" or self.later_seeds:
                yield from (f"--{axis.replace('_', '-')}", _listed(values))
        for cell, factors in self.lr_factors_at.items():
            yield from ("--lr-factors", f"{_name(cell)}={_listed(factors)}")
        for name, value in self.fields.items():
            yield from (f"--{name.replace('_', '-')}", value)
        yield from ("--out", str(out))


def _name(cell: Cell) -> str:
    return f"{cell[0]}:{cell[1]}"


def _listed(values: Sequence[object]) -> str:
    return ",".join(configuration.as_typed(value) if isinstance(value, float) else str(value) for value in values)


def removed_values(sweep: Sweep, before: Mapping[str, Any]) -> list[str]:
    """Lists values of an earlier sweep that this one lacks: a sweep may grow but not shrink."""
    missing = []
    for axis in _AXES:
        if axis != "lr_factors":
            gone = [value for value in before[axis] if value not in getattr(sweep, axis)]
            if gone:
                missing.append(f"--{axis.replace('_', '-')} without {_listed(gone)}")
    for cell in sweep.cells:
        if cell[0] in before["optimizers"] and cell[1] in before["batches"]:
            earlier = before["lr_factors_at"].get(_name(cell), before["lr_factors"])
            gone = [factor for factor in earlier if factor not in sweep.factors(*cell)]
            if gone:
                missing.append(f"--lr-factors for {_name(cell)} without {_listed(gone)}")
    return missing
