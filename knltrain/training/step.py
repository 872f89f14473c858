"""One optimizer update on a global batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from knltrain.comm.gradients import data_parallel, prime_ddp_buckets
from knltrain.data.loader import Batch
from knltrain.data.order import random_bits
from knltrain.node.memory import resident_mb
from knltrain.runlog.run_log import RunLog
from knltrain.training.failure_dump import StepNumbers
from knltrain.training.gradient_norm import norms_of
from knltrain.training.state import Run

# Separates the random numbers of dropout from those of the data, which use 0 and 1.
_DROPOUT = 2


class Stepper:
    """Takes the steps of a run.

    It holds the model in DistributedDataParallel, and so must be gone before the process group is closed.

    Args:
        run: its state is changed.
        log: gets the row of each step.
    """

    def __init__(self, run: Run, log: RunLog) -> None:
        self._run, self._log = run, log
        config, engine = run.config, run.state.engine
        self._model, self._clock = data_parallel(
            engine.model, config.comm, run.group, engine.optimizer.accumulated, run.state.noise.add
        )
        part = run.rank_batch(run.state.step)
        size = part.image_size or config.image_size
        images = torch.empty((part.local_batch, 3, size, size), dtype=engine.dtype, device="meta")
        prime_ddp_buckets(self._model, self._clock, images, engine.autocast())

    def train_step(self, batches: Iterator[Batch]) -> bool:
        """Makes one update.

        ::

            for each micro-batch of this rank:
                loss = cross-entropy(model(images), labels)
                backward                         gradients are all-reduced during the last one
            over all ranks: mean loss, norm of the gradient, has anyone been asked to stop?
            optimizer step, if loss and gradient are finite; else as health.policy says

        Args:
            batches: of micro-batches.

        Returns:
            Whether any rank has been asked to stop.

        Raises:
            RewindError, SharedError: as :meth:`StepGuard.check_step` and :meth:`DivergenceCheck.check_step`.
        """
        run, state, start = self._run, self._run.state, time.perf_counter()
        step, part, lr = state.step, run.rank_batch(state.step), run.lr(state.step)
        losses, data_s = [], 0.0
        state.begin_step(lr, part)
        for micro in range(part.accumulate):
            wait_start = time.perf_counter()
            images, labels = next(batches)
            data_s += time.perf_counter() - wait_start
            seed_dropout(run.config.seed, step, run.group.rank * part.accumulate + micro)
            last = micro == part.accumulate - 1
            with no_sync_unless_last(self._model, last=last):
                loss = self._loss(images, labels)
                (loss / part.accumulate).backward()
            if not last:
                state.noise.end_micro_batch(micro, state.engine)
                state.engine.optimizer.accumulate_fp32()
            losses.append(loss.item())
        numbers, norms, squares, interrupted = self._over_ranks(lr, losses)
        if state.guard.check_step(numbers, state.progress()):
            state.divergence.check_step(numbers)
            state.noise.update(squares, numbers.norm)
            self._update(norms)
        state.step = run.group.last_step = step + 1
        self._report(numbers, data_s, step_s=time.perf_counter() - start)
        return interrupted

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._run.state.engine.autocast():
            logits = self._model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self._run.config.label_smoothing)

    def _over_ranks(self, lr: float, losses: list[float]) -> tuple[StepNumbers, dict[str, float], float, bool]:
        """What all ranks decide by.

        Returns:
            Loss and norm; the norms of this rank's layers; the sum of the noise scale's squares; whether any rank has
            been asked to stop.
        """
        run, gradients = self._run, self._run.state.engine.gradients()
        norms = dict(zip(gradients, norms_of(gradients.values()), strict=True))
        loss_sum, norm_sum, squares, stops = run.group.sum(
            sum(losses), math.hypot(*norms.values()), run.state.noise.squares, run.stop.requested
        )
        ranks = run.group.world_size
        numbers = StepNumbers(run.state.step + 1, lr, losses, loss_sum / len(losses) / ranks, norm_sum / ranks)
        return numbers, norms, squares, stops > 0

    def _update(self, norms: dict[str, float]) -> None:
        """The optimizer's step, and that of the weights' average."""
        run, state, done = self._run, self._run.state, self._run.state.step + 1
        if run.group.is_first and run.due.trust_ratios(done):
            self._log.trust_ratios(done, run.epoch(done), state.engine.optimizer.trust_ratios(norms))
        state.engine.optimizer.step()
        if state.average:
            state.average.update(state.engine.state_dict(), done - state.guard.skipped_steps)

    def _report(self, numbers: StepNumbers, data_s: float, *, step_s: float) -> None:
        run, comm = self._run, self._clock.pop_step()
        images = run.rank_batch(numbers.step - 1).global_batch
        self._log.step({
            "step": numbers.step, "epoch": run.epoch(numbers.step), "loss": numbers.loss, "lr": numbers.lr,
            "grad_norm": numbers.norm, "images_per_s": images / step_s, "data_s": data_s, "step_s": step_s,
            "comm_s": comm.on_wire, "exposed_comm_s": comm.exposed, "rss_mb": resident_mb(), **run.state.noise.row(),
        })  # fmt: skip


def no_sync_unless_last(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """The context in which gradients are all-reduced in the backward pass of a step's last micro-batch only."""
    if isinstance(model, DistributedDataParallel) and not last:
        context: contextlib.AbstractContextManager[None] = model.no_sync()
        return context
    return contextlib.nullcontext()


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Makes what is dropped a function of the seed and of the micro-batch's position in the run."""
    # Not torch.manual_seed: in a CUDA build it queues a call for a device that will never be there, at every step.
    torch.default_generator.manual_seed(int(random_bits(seed, _DROPOUT, step, micro_batch)[0]))
