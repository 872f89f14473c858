"""Numbers that have gone bad: seen before they become weights, and before they become a checkpoint.

Everything that is decided here follows from sums over all ranks, so that all ranks decide alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knltrain.checkpoint import Progress, Snapshot, write
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule
from knltrain.data.loader import Dataset, RankBatch
from knltrain.data.order import samples
from knltrain.errors import SharedError
from knltrain.ops.native import isa
from knltrain.training.engine import Engine

# So much above chance a loss counts as diverged. A network that has learnt nothing yet is within a hundredth of chance.
_ABOVE_CHANCE = 1.05


# Numbers in a piece of a gradient that one thread sums up.
_ROW = 2**15


class RewindError(Exception):
    """The run is to go back to its last checkpoint; the message says why."""


class Watch:
    """Looks at what every step is made of, and at the weights now and then.

    Args:
        config: of the run; ``health`` says what is done.
        out: the run's folder.
        group: the ranks.
        engine: whose gradients and weights are looked at.
        schedule: of the run.
        shares: this rank's part of every batch of each phase.
        dataset: the training set.
        warn: told what is done about a bad step, where the run goes on.

    Attributes:
        norms: of the gradients that :meth:`gradient_norm` has looked at last, by parameter name.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        group: Group,
        engine: Engine,
        schedule: Schedule,
        shares: Sequence[RankBatch],
        dataset: Dataset,
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._out, self._group, self._engine = config, out, group, engine
        self._schedule, self._shares = schedule, shares
        self._images, self._warn = len(dataset), warn
        # Of a network that takes all classes for equally likely; smoothing the labels does not change it.
        self._diverged = _ABOVE_CHANCE * math.log(max(2, len(dataset.classes)))
        self._quiet_epochs = max(config.schedule.warmup_epochs, 1.0)
        self._buffers: list[Tensor] = list(engine.model.buffers()) if config.health.policy == "skip" else []
        self._before: list[Tensor] = []
        self.norms: dict[str, float] = {}

    def begin_step(self) -> None:
        """Remembers what the forward pass changes, for a step that is then left out."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def gradient_norm(self) -> float:
        """The norm of the gradient that the optimizer would take, equal on all ranks; of bf16 gradients to 3 digits."""
        gradients = self._engine.gradients()
        self.norms = dict(zip(gradients, norms_of(gradients.values()), strict=True))
        return math.hypot(*self.norms.values())

    def judge(self, progress: Progress, lr: float, losses: Sequence[float], mean_loss: float, norm: float) -> Progress:
        """Decides whether the optimizer may take a step.

        Args:
            progress: where the run stands before it.
            lr: its learning rate.
            losses: of this rank's micro-batches.
            mean_loss: over all ranks.
            norm: the gradient's, over all ranks.

        Returns:
            ``progress`` with its counts brought up to date: where ``skipped_in_a_row`` is not 0, the step is left out,
            and what its forward pass has changed is as before.

        Raises:
            RewindError: the run is to go back to its last checkpoint.
            SharedError: it is to end. What it stood on is in OUT/failed.
        """
        health = self._config.health
        if math.isfinite(mean_loss) and math.isfinite(norm):
            above = progress.steps_above_chance + 1 if mean_loss > self._diverged else 0
            above = above if self._schedule.epoch(progress.step) >= self._quiet_epochs else 0
            if health.divergence_steps and above >= health.divergence_steps:
                raise SharedError(self._diverged_at(progress.step + 1, mean_loss, lr))
            return dataclasses.replace(progress, skipped_in_a_row=0, steps_above_chance=above)
        skips = health.policy == "skip" and progress.skipped_in_a_row < health.max_skips
        rewinds = health.policy == "rewind" and progress.rewinds < health.max_rewinds
        why = self._what_is_bad(progress.step + 1, lr, losses, mean_loss)
        where = self._save_aside(progress, lr, losses, mean_loss, norm, whole=not (skips or rewinds))
        if skips:
            self._warn(f"{why}; the step is left out, {where}")
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)
            return dataclasses.replace(
                progress, skipped_steps=progress.skipped_steps + 1, skipped_in_a_row=progress.skipped_in_a_row + 1
            )
        if rewinds:
            raise RewindError(f"{why}, {where}")
        raise SharedError(f"{why}; {where}. {self._advice(progress)}; checkpoints in {self._out} are good")

    def compare_weights(self, step: int, *, before_checkpoint: bool) -> None:
        """Every so many steps and before checkpoints: are all ranks' weights the same, to the last bit, and numbers?

        A bit that flips in a momentum buffer is in the weights a step later, and bf16 copies are written anew from the
        weights at every step; so the weights are enough. Batch norm's running statistics differ by design.

        Raises:
            SharedError: they are not. Nothing has been written since they were.
        """
        every = self._config.health.compare_every
        if before_checkpoint:
            bad = [name for name, weight in self._engine.weights().items() if not _finite(weight)]
            if self._group.sum(len(bad)) != [0]:
                raise SharedError(
                    f"step {step} has made weights that are no numbers ({bad[0] if bad else 'on another rank'}) out of "
                    f"numbers: {self._advice(None)}; checkpoints in {self._out} are good"
                )
        if self._group.world_size > 1 and every and (before_checkpoint or step % every == 0):
            weights = self._engine.weights()
            rows = self._group.gather(fingerprint(weights.values()))
            if not (rows == rows[0]).all():
                raise SharedError(self._who_differs(step, rows, list(weights)))

    def _diverged_at(self, step: int, loss: float, lr: float) -> str:
        count = self._config.health.divergence_steps
        return (
            f"diverged: at step {step} (epoch {self._epoch(step):.2f}, learning rate {lr:.4g}) the loss is {loss:.4g}, "
            f"and has been above {self._diverged:.4g}, 5 % more than a guess has, for {count} steps; lower optim.lr or "
            "lengthen schedule.warmup-epochs in another --out; --health.divergence-steps 0 goes on"
        )

    def _what_is_bad(self, step: int, lr: float, losses: Sequence[float], mean_loss: float) -> str:
        """One line that is the same on all ranks, which all call this."""
        of_ranks = self._group.gather(torch.tensor([sum(losses) / len(losses)], dtype=torch.float64))[:, 0].tolist()
        norms = self._norms()
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        what = f"at step {step} (epoch {self._epoch(step):.2f}, learning rate {lr:.4g}) "
        blamed = [rank for rank, loss in enumerate(of_ranks) if not math.isfinite(loss)]
        if blamed:
            what += f"the loss of {self._names(blamed)} is {of_ranks[blamed[0]]}"
        else:
            what += f"the loss is {mean_loss:.4g} and every rank's a number, but the gradient is not"
        if bad:
            what += f"; the first layer with a bad gradient is {bad[0]}, {len(bad)} of {len(norms)} have one"
        return what

    def _advice(self, progress: Progress | None) -> str:
        health = self._config.health
        if progress and health.policy == "skip":
            return f"{health.max_skips} steps in a row were left out: lower optim.lr, or --health.policy rewind"
        if progress and health.policy == "rewind":
            return f"gone back {health.max_rewinds} times: lower optim.lr, or look at the images of that step"
        return "lower optim.lr or lengthen schedule.warmup-epochs, or go on with --health.policy skip or rewind"

    def _norms(self) -> dict[str, float]:
        return {
            name: float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
            for name, gradient in self._engine.gradients().items()
        }

    def _save_aside(
        self, progress: Progress, lr: float, losses: Sequence[float], mean_loss: float, norm: float, *, whole: bool
    ) -> str:
        """Writes what a step was made of to OUT/failed, with the weights as they were before it where ``whole``."""
        step = progress.step + 1
        folder = self._out / "failed" / f"step-{step:08}"
        batches = [
            samples(self._config.seed, self._images, first, stop).tolist()
            for first, stop in self._shares[self._schedule.index(progress.step)].ranges(progress.step)
        ]
        rank = self._group.rank
        mine = {"rank": rank, "host": self._group.hosts[rank], "losses": losses, "samples": batches}
        problem = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / f"rank-{rank:04}.json", mine)
            if self._group.is_first:
                report = {"step": step, "epoch": self._epoch(step), "lr": lr, "loss": mean_loss, "grad_norm": norm,
                          "gradient_norms": self._norms(), "progress": dataclasses.asdict(progress)}  # fmt: skip
                _write_json(folder / "report.json", report)
                if whole:
                    snapshot = Snapshot()
                    snapshot.take(progress, self._engine.state_dict(), self._engine.optimizer, meta={})
                    write(snapshot, folder / "state")
        except OSError as error:
            problem = f"{folder} could not be written ({error.strerror})"
        # Until all have written: the end of one rank ends the others.
        (problems,) = self._group.sum(bool(problem))
        if problems:
            return problem or f"{folder} could not be written whole"
        return f"{'its state' if whole else 'its record'} is in {folder}"

    def _who_differs(self, step: int, rows: Tensor, names: Sequence[str]) -> str:
        by_row: dict[tuple[int, ...], list[int]] = {}
        for rank, row in enumerate(rows.tolist()):
            by_row.setdefault(tuple(row), []).append(rank)
        groups = sorted(by_row.values(), key=len, reverse=True)
        majority = groups[0] if len(groups[0]) > len(groups[1]) else []
        others = [rank for ranks in groups for rank in ranks if ranks is not majority]
        first = next(name for column, name in zip(rows.T, names, strict=True) if not (column == column[0]).all())
        where = f"in {first}" if (rows != rows[0]).any(0).sum() == 1 else f"first in {first}"
        if majority:
            who = f"the weights of {self._names(others)} differ from the others' ({where})"
        else:
            who = f"the weights of {self._names(others)} differ ({where}), and which are right cannot be told"
        return (
            f"after step {step} {who}: a processor or memory there is at fault, unless nodes have other processors "
            f"(this one computes with {isa()}; KNLTRAIN_ISA makes all the same). Leave the host out; the same command "
            "goes on from the last checkpoint, before which the weights were compared"
        )

    def _names(self, ranks: Sequence[int]) -> str:
        named = [f"rank {rank} on {self._group.hosts[rank]}" for rank in ranks[:8]]
        return " and ".join(named) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _epoch(self, step: int) -> float:
        return self._schedule.epoch(step)


def norm_of(gradients: Iterable[Tensor]) -> float:
    """The norm of many tensors together; the same for any number of threads.

    Args:
        gradients: float32 or bf16, dense.
    """
    return math.hypot(*norms_of(gradients))


def norms_of(gradients: Iterable[Tensor]) -> list[float]:
    """The norm of each tensor, likewise."""
    return [_norm(gradient) for gradient in gradients]


def _norm(gradient: Tensor) -> float:
    norm = math.sqrt(_squares(gradient))
    # Squares may be too large for float32 without anything being bad.
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _squares(gradient: Tensor) -> float:
    flat = _in_memory(gradient)
    whole = flat.numel() // _ROW * _ROW
    # Rows are shared out among threads. A single norm is one thread's work.
    squares = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double().square().sum()
    return float(squares) + float(torch.linalg.vector_norm(flat[whole:])) ** 2


def fingerprint(weights: Iterable[Tensor]) -> Tensor:
    """One 64-bit integer a tensor: the sum of its bits, eight bytes at a time, modulo 2^64.

    Any one bit that differs shows. It reads at the speed of memory, which a checksum does not.

    Args:
        weights: float32, dense.
    """
    return torch.stack([_sum_of_bits(weight) for weight in weights])


def _sum_of_bits(weight: Tensor) -> Tensor:
    flat = _in_memory(weight)
    even = flat.numel() // 2 * 2
    return flat[:even].view(torch.int64).sum() + flat[even:].view(torch.int32).sum()


def _finite(weight: Tensor) -> bool:
    # A sum of numbers may be none; then each is looked at.
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())


def _in_memory(tensor: Tensor) -> Tensor:
    """A dense tensor's numbers in the order in which they lie in memory."""
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return (tensor if dense else tensor.contiguous()).as_strided((tensor.numel(),), (1,))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON has no infinity and nothing that is no number: they are written as words."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.write_text(json.dumps(_in_words(value), indent=2) + "\n", "utf-8")


def _in_words(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_words(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_in_words(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
