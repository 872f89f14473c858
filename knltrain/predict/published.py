"""Published runs, and their predictions.

A system may have a parameter that was fitted to one of these runs; the other runs check the model. Each run lists the
assumptions that its source does not state.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import msgspec

from knltrain.config import CheckpointConfig, CommConfig, RunConfig
from knltrain.predict.run import Job, Prediction, predict
from knltrain.predict.systems import Sourced, System, load

# A bucket for each gradient, as MLSL sends them.
_ONE_GRADIENT_MB = 1e-6


@dataclass(frozen=True)
class Published:
    """A run that others have published.

    Attributes:
        name: for people.
        system: one that comes with the package.
        nodes: of it.
        model: as a configuration names it.
        epochs: passes over ImageNet.
        global_batch: images a step.
        minutes: published.
        source: of these numbers.
        assumed: what the source does not say.
        role: fitted (a parameter of the system was chosen so that this run comes out) or check.
        comm: type of the gradients on the wire, and bucket size.
        overlap: gradients are sent during the backward pass.
    """

    name: str
    system: str
    nodes: int
    model: str
    epochs: float
    global_batch: int
    minutes: float
    source: str
    assumed: str
    role: str
    comm: CommConfig = CommConfig(bucket_mb=_ONE_GRADIENT_MB)
    overlap: bool = False

    def job(self, system: System | None = None) -> Job:
        """The run as something to predict."""
        config = RunConfig(
            model=self.model,
            image_size=224 if self.model == "resnet50" else 227,
            epochs=self.epochs,
            global_batch=self.global_batch,
            comm=self.comm,
            checkpoint=CheckpointConfig(every=self.epochs),
        )
        return Job(config=config, system=system or load(self.system), nodes=self.nodes, overlap=self.overlap)


_PAPER = "arXiv 1709.05011"
_UNSAID = (
    "32K images a step; gradients are sent layer by layer after the backward pass; evaluated once an epoch, "
    "one checkpoint"
)

RUNS = (
    Published("AlexNet, 512 Xeon Phi", "knl7250-opa", 512, "alexnet", 100, 32768, 24, f"{_PAPER}, first version",
              _UNSAID, "fitted"),
    Published("ResNet-50, 512 Xeon Phi", "knl7250-opa", 512, "resnet50", 90, 32768, 60, f"{_PAPER}, first version",
              _UNSAID, "check"),
    Published("ResNet-50, 2,048 Xeon Phi", "knl7250-opa", 2048, "resnet50", 90, 32768, 20, "ICPP 2018", _UNSAID,
              "check"),
    Published("ResNet-50, 64 epochs, 2,048 Xeon Phi", "knl7250-opa", 2048, "resnet50", 64, 32768, 14,
              f"{_PAPER}, last version", _UNSAID, "check"),
    Published("AlexNet, 1,024 nodes of two Xeon 8160", "xeon8160-opa", 1024, "alexnet", 100, 32768, 11, "ICPP 2018",
              f"{_UNSAID}; 2,048 processors are 1,024 nodes", "fitted"),
    Published("ResNet-50, 1,024 nodes of two Xeon 8160", "xeon8160-opa", 1024, "resnet50", 90, 32768, 48,
              f"{_PAPER}, second version", f"{_UNSAID}; its 1,024 CPUs are nodes, as those of AlexNet's 11 minutes",
              "check"),
    Published("ResNet-50, 16 nodes of two Xeon 8480+", "xeon8480-200g", 16, "resnet50", 35.2, 3264, 88.15,
              "MLPerf Training v3.0", "35.2 epochs, the reference's mean to 75.9 %; gradients are sent in float32 "
              "during the backward pass, in PyTorch's buckets of 25 MiB", "fitted", CommConfig(bucket_mb=25.0), True),
)  # fmt: skip


def validate() -> list[dict[str, Any]]:
    """Predicts every published run.

    Returns:
        For each: ``run``, ``system``, ``nodes``, ``role``, ``published_min``, ``predicted_min``, ``deviation`` (of the
        prediction, over the published time), ``assumed`` and ``source``.
    """
    rows = []
    for run in RUNS:
        minutes = predict(run.job()).total_s / 60
        rows.append({"run": run.name, "system": run.system, "nodes": run.nodes, "role": run.role,
                     "published_min": run.minutes, "predicted_min": minutes,
                     "deviation": minutes / run.minutes - 1, "assumed": run.assumed,
                     "source": run.source})  # fmt: skip
    return rows


def fit_sum_rate(run: Published, low: float = 0.01, high: float = 100.0) -> float:
    """Returns the ``network.sum_gb_per_s`` of the run's system with which the run takes what was published.

    Bisection; the time falls with the rate.

    Args:
        run: a published one.
        low: GB/s that are too few.
        high: GB/s that are too many.
    """
    system = load(run.system)
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        if _with_sum_rate(run, system, middle).total_s / 60 > run.minutes:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _with_sum_rate(run: Published, system: System, rate: float) -> Prediction:
    network = msgspec.structs.replace(system.network, sum_gb_per_s=Sourced(rate, "tried"))
    return predict(dataclasses.replace(run.job(), system=msgspec.structs.replace(system, network=network)))
