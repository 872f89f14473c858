"""How a step executes: native kernels, plain PyTorch, torch.compile, or Intel's extension.

An engine takes a model and its optimizer and gives back the pair that trains, and the context in which a forward pass
runs. State dicts keep their keys and their float32 weights whatever the engine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from knltrain.config import EngineName, Precision
from knltrain.errors import ConfigError
from knltrain.models.convolutions import use
from knltrain.models.fused import FusedConv2d, fuse
from knltrain.node.topology import Node, onednn_restriction
from knltrain.node.tuning_cache import stored_engine
from knltrain.ops.bf16 import onednn_computes_bf16, widen_layer_norms
from knltrain.ops.native import load_error
from knltrain.optim import MasterOptimizer
from knltrain.training.compile_cache import remove_cut_libraries

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Engine:
    """A model and an optimizer, ready to train.

    Attributes:
        name: fused, eager, compile or ipex.
        precision: bf16 (float32 weights to the optimizer) or fp32.
        model: in channels-last memory format.
        optimizer: of the model's float32 weights.
        masters: the optimizer's float32 weights, by name, of which the model has bf16 working copies.
    """

    name: str
    precision: str
    model: nn.Module
    optimizer: MasterOptimizer
    masters: dict[str, Tensor] = field(default_factory=dict)

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
        return {name: self.masters[name].detach() if name in self.masters else state[name] for name in state}

    def gradients(self) -> dict[str, Tensor]:
        """What the optimizer's next step takes, by parameter name, in the order of the model's layers."""
        named = ((name, self.optimizer.gradient(parameter)) for name, parameter in self.model.named_parameters())
        return {name: gradient for name, gradient in named if gradient is not None}

    def weights(self) -> dict[str, Tensor]:
        """The float32 weights that the optimizer updates, by parameter name, as they lie in memory."""
        return {
            name: parameter.detach()
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }


def autocast(precision: str) -> AbstractContextManager[object]:
    """The context of a forward pass in fp32 or bf16."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def choose_precision(asked: Precision, node: Node, *, force: bool, warn: Callable[[str], None] = warnings.warn) -> str:
    """Resolves ``auto``, refuses bf16 where the processor would only emulate it, and warns where fp32 is faster.

    Whoever forces bf16 knows both, and is told nothing.

    Raises:
        ConfigError: bf16 without AVX512_BF16 or AMX, and not forced.
    """
    if asked == "auto":
        return "bf16" if node.gains_from_bf16 else "fp32"
    if asked != "bf16" or force:
        return asked
    if not node.computes_bf16:
        restriction = onednn_restriction()
        lacks = (
            f"may use neither AVX512_BF16 nor AMX with {restriction}"
            if restriction
            else "has neither AVX512_BF16 nor AMX"
        )
        raise ConfigError(
            f"precision bf16: {node.cpu_model} {lacks} and would emulate it, slower than fp32. "
            "Use --precision fp32, or --force-bf16 true to have it all the same"
        )
    if not node.gains_from_bf16:
        warn(
            f"precision bf16: {node.cpu_model} hides its AMX and multiplies bf16 at half of fp32's rate; "
            "--precision fp32 is faster, and takes more memory"
        )
    return asked


def set_fp32_precision(asked: Literal["ieee", "bf16"], *, precision: str, engine: str, node: Node) -> None:
    """Has PyTorch compute products of float32 as asked, in this process: torch.backends.mkldnn's ``fp32_precision``.

    Args:
        asked: bf16: factors are rounded, products are added up in float32; ieee: as PyTorch does anyway.
        precision: as :func:`choose_precision` resolved it.
        engine: as :func:`choose_engine` resolved it.
        node: where it runs.

    Raises:
        ConfigError: bf16 where there are no products of float32, or none of PyTorch's; without AMX, which alone is
            faster so; with a PyTorch that has no such setting.
    """
    if asked == "ieee":
        return
    if precision != "fp32":
        raise ConfigError(
            "fp32-precision bf16: there are no products of float32; leave it out, or add --precision fp32"
        )
    if engine == "ipex":
        raise ConfigError("fp32-precision bf16: engine ipex has products of its own; add --engine fused or eager")
    if "amx_bf16" not in node.flags:
        raise ConfigError(
            f"fp32-precision bf16: {node.cpu_model} has no AMX that PyTorch may use, and is not faster so"
        )
    for kind in ("conv", "matmul"):
        products = getattr(torch.backends.mkldnn, kind, None)
        if products is None:
            raise ConfigError(f"fp32-precision bf16: torch {torch.__version__} has no such setting; 2.9 and later have")
        products.fp32_precision = asked


def choose_engine(asked: EngineName, *, model: str, precision: str, node: Node, threads: int) -> str:
    """Resolves ``auto``, and refuses an engine whose parts are missing.

    ``auto`` is what ``knltrain tune`` found to be the fastest for this model on this kind of node, or else fused where
    its kernels run, or else eager.

    Args:
        asked: what the configuration says.
        model: as the configuration names it.
        precision: as :func:`choose_precision` resolved it.
        node: where it is to run.
        threads: compute threads of a rank.

    Raises:
        ConfigError: no kernels for fused, no compiler for torch.compile, no IPEX, or an IPEX made for another torch;
            or bf16 where PyTorch would sum it in bf16, by any other engine than fused.
    """
    if asked != "auto":
        refuse_missing_parts(asked, precision)
        return asked
    measured = stored_engine(model, precision, node, threads)
    if measured is not None and measured in get_args(EngineName):  # the file may be of a later version, or anybody's
        try:
            refuse_missing_parts(measured, precision)
            return measured
        except ConfigError as error:
            warnings.warn(f"the fastest engine by `knltrain tune` is {measured}, but: {error}", stacklevel=2)
    default = "eager" if load_error() else "fused"
    refuse_missing_parts(default, precision)
    return default


def refuse_missing_parts(asked: str, precision: str) -> None:
    """Refuses an engine that does not run here, or not in this precision.

    Raises:
        ConfigError: as :func:`choose_engine`.
    """
    if asked == "fused" and (reason := load_error()):
        raise ConfigError(f"engine fused: no native kernels: {reason}; or use --engine eager")
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
    if precision == "bf16" and asked != "fused" and not onednn_computes_bf16():
        remedy = "--precision fp32" if load_error() else "--engine fused, which sums in float32, or --precision fp32"
        raise ConfigError(
            f"engine {asked} in bf16: this processor lacks AVX-512 with BW, DQ and VL, or ONEDNN_MAX_CPU_ISA hides it; "
            f"PyTorch then sums weight gradients in bf16 and loses up to half of them. Use {remedy}"
        )


def build_engine(
    name: str,
    precision: str,
    model: nn.Module,
    optimizer: MasterOptimizer,
    convolutions: Mapping[str, Sequence[str]] | None = None,
) -> Engine:
    """Prepares a model and its optimizer for training.

    Args:
        name: as :func:`choose_engine` resolved it.
        precision: as :func:`choose_precision` resolved it.
        model: channels-last, with its initial or resumed weights; changed in place.
        optimizer: of the model's parameters; changed in place.
        convolutions: what native kernels compute, as :func:`knltrain.models.convolutions.choose` decided; by
            default nothing.

    Raises:
        ConfigError: fused in bf16, with a convolution that it leaves to PyTorch, where PyTorch would sum it in bf16.
    """
    model.train()
    masters = {}
    if precision == "bf16":
        widen_layer_norms(model)
    if name == "fused":
        fuse(model)
        use(model, convolutions or {})
        if precision == "bf16":
            _refuse_sums_in_bf16(model)
            masters = _use_working_copies(model, optimizer)
    elif name == "compile":
        remove_cut_libraries()
        # In place, so that names in state dicts stay as they are. Each shape is compiled by itself: the second would
        # give code for any shape, but not in a run that goes on with it, or with an evaluation, and so other bits.
        model.compile(dynamic=False)
    elif name == "ipex":
        model, optimizer = _ipex_optimize(model, optimizer, DTYPES[precision])
    return Engine(name, precision, model, optimizer, masters)


def _refuse_sums_in_bf16(model: nn.Module) -> None:
    """Refuses a network with a convolution that is left to PyTorch, where PyTorch would sum it in bf16."""
    left = [
        f"{path} ({type(module).__name__})"
        for path, module in model.named_modules()
        if isinstance(module, _ConvNd) and not isinstance(module, FusedConv2d)
    ]
    if left and not onednn_computes_bf16():
        raise ConfigError(
            f"engine fused in bf16: PyTorch computes {', '.join(left[:3])}{', …' if len(left) > 3 else ''}, and sums "
            "such weight gradients in bf16 on this processor. Use --precision fp32"
        )


def _use_working_copies(model: nn.Module, optimizer: MasterOptimizer) -> dict[str, Tensor]:
    """Replaces the weights of convolutions and dense layers by bf16 copies that the optimizer keeps up to date.

    Returns:
        The float32 weights, which are the optimizer's, by their names in the model.
    """
    copies: dict[Tensor, nn.Parameter] = {}
    masters: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        for name, master in list(module.named_parameters(recurse=False)):
            if master not in copies:
                copies[master] = nn.Parameter(master.detach().to(torch.bfloat16), master.requires_grad)
            setattr(module, name, copies[master])
            masters[f"{path}.{name}" if path else name] = master
    optimizer.use_working_copies(copies)
    return masters


def _ipex_optimize(
    model: nn.Module, optimizer: MasterOptimizer, dtype: torch.dtype
) -> tuple[nn.Module, MasterOptimizer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports use interfaces that Python has deprecated since
        import intel_extension_for_pytorch as ipex

        logger = logging.getLogger("IPEX")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it announces the deprecation of options that nobody set
        try:
            optimized: tuple[nn.Module, MasterOptimizer] = ipex.optimize(
                model, dtype=dtype, optimizer=optimizer, inplace=True
            )
        finally:
            logger.setLevel(level)
    model, optimizer = optimized
    # By their float32 masters. Otherwise the gradients of micro-batches would be summed in bf16.
    copies = {
        master: made.parameter
        for master, made in getattr(optimizer, "params_attr", {}).items()
        if made.parameter is not None and made.parameter.dtype == torch.bfloat16
    }
    optimizer.use_working_copies(copies)
    return model, optimizer
