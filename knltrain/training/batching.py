"""How a global batch is divided over ranks and micro-batches."""

from __future__ import annotations

import dataclasses

from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule, make_schedule
from knltrain.data.loader import RankBatch
from knltrain.errors import ConfigError
from knltrain.models import refuse_single_values

# So many images that every phase of a schedule has steps, before the data is opened.
_MANY_IMAGES = 10**9


def rank_batch_of(config: RunConfig, rank: int, world_size: int, batch: int | None = None) -> RankBatch:
    """Divides a batch, by default the global batch, over ranks and micro-batches.

    Raises:
        ConfigError: it does not divide; the message names sizes that do.
    """
    name, batch = ("global-batch", config.global_batch) if batch is None else ("schedule.batches", batch)
    if batch % world_size:
        down = batch // world_size * world_size
        near = f"{down} or {down + world_size}" if down else str(world_size)
        raise ConfigError(f"{name} {batch} is not a multiple of {world_size} ranks; take {near}")
    of_rank = batch // world_size
    local = min(config.local_batch or of_rank, of_rank)
    if of_rank % local:
        divisor = next(size for size in range(local, 0, -1) if of_rank % size == 0)
        raise ConfigError(
            f"local-batch {local} does not divide the {of_rank} images a rank has in a step of {name} {batch}; take "
            f"{divisor}"
        )
    return RankBatch(batch, local, rank, world_size)


def rank_batches_by_size(config: RunConfig, rank: int, world_size: int) -> dict[int, RankBatch]:
    """Divides every batch that a run will have, by its size; before the data is opened, which takes longer.

    Raises:
        ConfigError: as :func:`rank_batch_of`.
    """
    changed = {batch: rank_batch_of(config, rank, world_size, batch) for batch in config.schedule.batches}
    return {**changed, config.global_batch: rank_batch_of(config, rank, world_size)}


def refuse_untrainable_batches(config: RunConfig, by_size: dict[int, RankBatch]) -> None:
    """Checks that batch norm can normalise every micro-batch that a run will have; before the data is opened.

    Args:
        config: of the run.
        by_size: as :func:`rank_batches_by_size` divided its batches.

    Raises:
        ConfigError: a micro-batch of one image has one value per channel; the message says what to raise.
    """
    parts = rank_batches_of(by_size, make_schedule(config, _MANY_IMAGES))
    singles = [part for part in parts if part.local_batch == 1]
    if not singles:
        return
    part = singles[0]
    if part.accumulate > 1:
        remedy = "raise local-batch"
    else:
        remedy = f"raise the batch of {part.global_batch} to {2 * part.world_size} or more"
        remedy += ", or use fewer ranks" if part.world_size > 1 else ""
    refuse_single_values(config, [part.image_size or config.image_size for part in singles], remedy)


def rank_batches_of(by_size: dict[int, RankBatch], schedule: Schedule) -> tuple[RankBatch, ...]:
    """This rank's part of the batches of each phase of a schedule.

    Args:
        by_size: as :func:`rank_batches_by_size` divided them.
        schedule: of the run.
    """
    return tuple(
        dataclasses.replace(
            by_size[phase.batch],
            first_step=phase.first_step,
            first_image=phase.first_image,
            image_size=phase.image_size,
            augmented=phase.augmented,
        )
        for phase in schedule.phases
    )
