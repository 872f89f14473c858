"""How a step executes: plain PyTorch, torch.compile, or Intel's extension.

An engine takes a model and its optimizer and gives back the pair that trains, and the context in which a forward pass
runs. State dicts keep their keys and their float32 weights whatever the engine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import shutil
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knltrain.config import EngineName, Precision
from knltrain.errors import ConfigError
from knltrain.node.topology import Node

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Engine:
    """A model and an optimizer, ready to train.

    Attributes:
        name: eager, compile or ipex.
        precision: bf16 (autocast, float32 weights to the optimizer) or fp32.
        model: in channels-last memory format.
        optimizer: of the model's float32 weights.
    """

    name: str
    precision: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def dtype(self) -> torch.dtype:
        """The type that images are fed in, and that convolutions compute in."""
        return DTYPES[self.precision]

    def autocast(self) -> AbstractContextManager[object]:
        """The context of every forward pass, training and evaluation alike."""
        return autocast(self.precision)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's float32 weights and its buffers, under the model's own names."""
        state: dict[str, Tensor] = self.model.state_dict()
        return state


def autocast(precision: str) -> AbstractContextManager[object]:
    """The context of a forward pass in fp32 or bf16."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def choose_precision(asked: Precision, node: Node, *, force: bool) -> str:
    """Resolves ``auto``, and refuses bf16 where the processor would only emulate it.

    Raises:
        ConfigError: bf16 without AVX512_BF16 or AMX, and not forced.
    """
    if asked == "auto":
        return "bf16" if node.computes_bf16 else "fp32"
    if asked == "bf16" and not node.computes_bf16 and not force:
        raise ConfigError(
            f"precision bf16: {node.cpu_model} has neither AVX512_BF16 nor AMX and would emulate it, slower than "
            "fp32. Use --precision fp32, or --force-bf16 true to have it all the same"
        )
    return asked


def choose_engine(asked: EngineName) -> str:
    """Resolves ``auto`` to eager, and refuses an engine whose parts are missing.

    Raises:
        ConfigError: no compiler for torch.compile, no IPEX, or an IPEX made for another torch.
    """
    if asked == "compile" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError("engine compile: torch.compile needs g++ or clang++ on the PATH; install one or use eager")
    if asked == "ipex":
        if importlib.util.find_spec("intel_extension_for_pytorch") is None:
            raise ConfigError(
                "engine ipex: intel-extension-for-pytorch is not installed; pip install 'knltrain[intel]'"
            )
        ours = torch.__version__.split("+")[0]
        theirs = importlib.metadata.version("intel-extension-for-pytorch")
        if ours.split(".")[:2] != theirs.split(".")[:2]:
            raise ConfigError(
                f"engine ipex: intel-extension-for-pytorch {theirs} does not load with torch {ours}; "
                "pip install 'knltrain[intel]' in an environment of its own, or use --engine eager"
            )
    return "eager" if asked == "auto" else asked


def build_engine(name: str, precision: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Prepares a model and its optimizer for training.

    Args:
        name: as :func:`choose_engine` resolved it.
        precision: as :func:`choose_precision` resolved it.
        model: channels-last, with its initial or resumed weights; changed in place.
        optimizer: of the model's parameters; changed in place.
    """
    model.train()
    if name == "compile":
        # In place, so that names in state dicts stay as they are.
        model.compile()
    elif name == "ipex":
        model, optimizer = _ipex_optimize(model, optimizer, DTYPES[precision])
    return Engine(name, precision, model, optimizer)


def _ipex_optimize(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> tuple[nn.Module, torch.optim.Optimizer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports use interfaces that Python has deprecated since
        import intel_extension_for_pytorch as ipex

        logger = logging.getLogger("IPEX")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it announces the deprecation of options that nobody set
        try:
            for group in optimizer.param_groups:
                group.pop("fused", None)  # its own fused step takes the place of torch's
            optimized: tuple[nn.Module, torch.optim.Optimizer] = ipex.optimize(
                model, dtype=dtype, optimizer=optimizer, inplace=True
            )
        finally:
            logger.setLevel(level)
    return optimized
