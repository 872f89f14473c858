"""Arguments of oneCCL's collectives from tensors: addresses, counts, types; and their validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# ccl::datatype. Data that is moved but not reduced may have any type, as bytes.
_TYPES = {torch.int8: 0, torch.uint8: 1, torch.int32: 4, torch.int64: 6,
          torch.float16: 8, torch.float32: 9, torch.float64: 10, torch.bfloat16: 11}  # fmt: skip
_BYTE = _TYPES[torch.uint8]
# ccl::reduction. AVG is SUM of tensors divided beforehand. For bool, SUM and PRODUCT are MAX and MIN.
_SUM, _PRODUCT, _MIN, _MAX = range(4)
_REDUCTIONS = {"SUM": _SUM, "AVG": _SUM, "PRODUCT": _PRODUCT, "MIN": _MIN, "MAX": _MAX}
_BOOL_REDUCTIONS = {_SUM: _MAX, _PRODUCT: _MIN, _MIN: _MIN, _MAX: _MAX}


def chain(steps: Any) -> Callable[[], None] | None:
    """Returns a function that calls all of ``steps`` that are not None; None if there is none."""
    present = [step for step in steps if step is not None]

    def finish() -> None:
        for step in present:
            step()

    return finish if present else None


def _check(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"ccl takes dense tensors in CPU memory; this one is {tensor.layout} on {tensor.device}")


def contiguous_out(tensor: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
    """Returns a contiguous tensor for oneCCL to write to, and a function that copies it back, None if not needed."""
    _check(tensor)
    if tensor.is_contiguous():
        return tensor, None
    flat = tensor.contiguous()

    def finish() -> None:
        tensor.copy_(flat)

    return flat, finish


def data_args(tensor: Tensor) -> tuple[int, int, int]:
    """Returns address, count and type of a tensor that is moved but not reduced."""
    _check(tensor)
    dtype = _TYPES.get(tensor.dtype)
    if dtype is None:
        return tensor.data_ptr(), tensor.numel() * tensor.element_size(), _BYTE
    return tensor.data_ptr(), tensor.numel(), dtype


def reduce_args(tensor: Tensor, op: int) -> tuple[int, int, int, int]:
    """Returns address, count, type and reduction of a tensor that is reduced."""
    _check(tensor)
    if tensor.dtype == torch.bool:
        return tensor.data_ptr(), tensor.numel(), _BYTE, _BOOL_REDUCTIONS[op]
    return tensor.data_ptr(), tensor.numel(), _TYPES[tensor.dtype], op


def name_of(options: Any) -> str:
    """Returns the name of the reduction in torch's options."""
    op = getattr(options, "reduceOp", dist.ReduceOp.SUM)
    return next((name for name, value in dist.ReduceOp.RedOpType.__members__.items() if op == value), str(op))


def reduction(what: str, options: Any, tensors: list[Tensor], size: int) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Returns oneCCL's reduction, and a function to apply to each tensor beforehand.

    Raises:
        ValueError: oneCCL has no such reduction, or not for these tensors.
    """
    name = name_of(options)
    if name not in _REDUCTIONS:
        raise ValueError(f"{what}: oneCCL has no reduction {name}; it has {', '.join(_REDUCTIONS)}")
    for tensor in tensors:
        if tensor.dtype not in _TYPES and tensor.dtype != torch.bool:
            raise ValueError(f"{what}: oneCCL does not reduce {tensor.dtype}")
        if name == "AVG" and not tensor.is_floating_point():
            raise ValueError(f"{what}: AVG needs floating-point tensors, not {tensor.dtype}; use SUM")
    if name == "AVG":
        return _SUM, lambda tensor: tensor.div_(size)
    return _REDUCTIONS[name], lambda tensor: tensor


def root_of(options: Any, size: int) -> int:
    """Returns the root rank in torch's options.

    Raises:
        ValueError: there is no such rank.
    """
    root = int(getattr(options, "rootRank", 0))
    if not 0 <= root < size:
        raise ValueError(f"rank {root} is not one of this group's {size}")
    return root


def check_pieces(what: str, pieces: list[Tensor], local: Tensor, size: int) -> None:
    """Checks that there is a tensor for each rank, all of one size and type.

    Raises:
        ValueError: there is not.
    """
    if len(pieces) != size:
        raise ValueError(f"{what}: {len(pieces)} tensors for {size} ranks")
    for piece in pieces:
        if piece.numel() != local.numel() or piece.dtype != local.dtype:
            raise ValueError(
                f"{what}: {tuple(piece.shape)}, {piece.dtype} does not match {tuple(local.shape)}, {local.dtype}"
            )


def check_whole(what: str, whole: Tensor, part: Tensor, size: int) -> None:
    """Checks that a contiguous tensor has room for the parts of all ranks.

    Raises:
        ValueError: it does not.
    """
    if whole.numel() != size * part.numel() or whole.dtype != part.dtype:
        raise ValueError(
            f"{what}: {tuple(whole.shape)}, {whole.dtype} is not {size} times {tuple(part.shape)}, {part.dtype}"
        )
    if not whole.is_contiguous():
        raise ValueError(f"{what}: the tensor of all ranks is not contiguous")


def split(whole: Tensor, size: int) -> tuple[Tensor, ...]:
    """Splits a tensor into equal parts, one for each rank."""
    return whole.view(-1).chunk(size) if whole.numel() else (whole,) * size


def check_exchange(what: str, outputs: list[Tensor], inputs: list[Tensor], size: int) -> None:
    """Checks that there are an input and an output tensor for each rank, all of one type.

    Raises:
        ValueError: there is not.
    """
    if len(outputs) != size or len(inputs) != size:
        raise ValueError(f"{what}: {len(inputs)} inputs and {len(outputs)} outputs for {size} ranks")
    if len(types := {tensor.dtype for tensor in (*outputs, *inputs)}) > 1:
        raise ValueError(f"{what}: all tensors need one type, not {' and '.join(sorted(map(str, types)))}")


def rows_of(tensor: Tensor, sizes: list[int], ranks: int) -> list[Tensor]:
    """Splits the first dimension into the sizes given for each rank, or into equal parts.

    Raises:
        ValueError: the sizes do not make up the tensor.
    """
    if not tensor.is_contiguous():
        raise ValueError("all_to_all_single: a tensor is not contiguous")
    rows = tensor.shape[0] if tensor.ndim else 0
    if not sizes and rows % ranks:
        raise ValueError(f"all_to_all_single: {rows} rows do not divide by {ranks} ranks")
    sizes = sizes or [rows // ranks] * ranks
    if len(sizes) != ranks or sum(sizes) != rows:
        raise ValueError(f"all_to_all_single: sizes {sizes} for {ranks} ranks and {rows} rows")
    return list(tensor.split(sizes))
