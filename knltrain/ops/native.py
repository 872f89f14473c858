"""The native kernels: which variant runs here, on which threads, and why not if none does."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from knltrain.errors import ConfigError

_log = logging.getLogger(__name__)
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
# With fewer elements a task than this, starting a thread costs more than it saves.
_MIN_ELEMENTS_PER_TASK = 8192


@functools.cache
def kernels() -> Any | None:
    """The module of native kernels, ready to be called, or None with one warning where there is none.

    Raises:
        ConfigError: KNLTRAIN_ISA names a variant that does not exist or that this processor does not run.
    """
    module, reason = _load()
    if module is None:
        _log.warning("knltrain runs without its native kernels: %s", reason)
        return None
    module.use_isa(isa())
    openmp = _openmp_of_torch()
    if openmp is None:
        _log.warning("torch's OpenMP runtime was not found: the native kernels run on one thread")
    else:
        module.use_openmp(*openmp)
    return module


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        _kernels = importlib.import_module("knltrain._kernels")
    except ModuleNotFoundError:
        return None, "they were not built; install g++ or clang++, then install knltrain again"
    except ImportError as error:
        return None, f"they do not load ({error}); install knltrain again"
    if not _kernels.supported_isas():
        return None, "this processor has no AVX2"
    return _kernels, ""


def load_error() -> str | None:
    """Why the native kernels cannot run here, or None if they can."""
    module, reason = _load()
    return None if module is not None else reason


def isa() -> str | None:
    """The variant of the kernels that runs here: the best, or what KNLTRAIN_ISA names. None without kernels.

    Raises:
        ConfigError: KNLTRAIN_ISA names a variant that does not exist or that this processor does not run.
    """
    module, _ = _load()
    if module is None:
        return None
    supported: list[str] = module.supported_isas()
    asked = os.environ.get("KNLTRAIN_ISA")
    if asked and asked not in supported:
        raise ConfigError(f"KNLTRAIN_ISA={asked}: this processor runs {', '.join(supported)}; unset it or name one")
    return asked or supported[-1]


def best_isa() -> str | None:
    """The best variant that this processor runs, whatever KNLTRAIN_ISA says. None without kernels."""
    module, _ = _load()
    return None if module is None else str(module.supported_isas()[-1])


def has_openmp() -> bool:
    """Whether torch's OpenMP runtime was found, on whose threads the kernels run."""
    return _openmp_of_torch() is not None


def _openmp_of_torch() -> list[int] | None:
    """Addresses of OpenMP's entry points in the runtime that torch's own threads come from."""
    # A preloaded runtime comes before the one that torch was linked to, for torch too.
    libraries = [ctypes.CDLL(None)]
    torch_cpu = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    if os.path.exists(torch_cpu):
        libraries.append(ctypes.CDLL(torch_cpu))
    for library in libraries:
        if all(hasattr(library, name) for name in _OPENMP):
            return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _OPENMP]
    return None


def tasks_for(elements: int) -> int:
    """Into how many tasks the work on so many elements is cut: torch's thread count, or fewer for little work."""
    return max(1, min(torch.get_num_threads(), elements // _MIN_ELEMENTS_PER_TASK))


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check_devices(**tensors: Tensor | None) -> None:
    """Refuses tensors that are not on the CPU, before torch chooses an implementation by device.

    Raises:
        ValueError: one is not on the CPU.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the kernels read CPU memory")


def check_images(dtypes: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    """Refuses tensors that are not N x C x H x W, channels-last, and of the first one's type.

    Raises:
        ValueError: one is not on the CPU, or has another type, number of dimensions or layout.
    """
    for name, tensor in tensors.items():
        check(name, tensor, dtypes)
        dtypes = (tensor.dtype,)
        if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
                             "it must be N x C x H x W, channels-last")  # fmt: skip


def new_images(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised N x C x H x W tensor, channels-last, of another tensor's type and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> None:
    """Refuses a tensor that a kernel cannot read.

    Raises:
        ValueError: not on the CPU, another type, or another shape.
    """
    check_devices(**{name: tensor})
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.layout}; the kernels read dense tensors")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {shape}")
