"""Parameter groups: weights, which LARS scales and which decay; normalisation; and all that is added or multiplied."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.Embedding)
# Matrices that a module declares itself, and that are added to its data: position embeddings, tokens, tables of biases.
_ADDED = re.compile(
    r"(^|_)(pos|position|positional|rel|bias|biases|token|tokens|embed|embedding|embeddings|table)(_|\d|$)"
)
_NUMBERS = re.compile(r"((?<=[._])|^)\d+(?=\.)")  # in a parameter's path, of repeated layers

Which = Literal["all", "not-norm", "weights"]
_MEMBERS: dict[str, set[str]] = {
    "all": {"weight", "norm", "bias"},
    "not-norm": {"weight", "bias"},
    "weights": {"weight"},
}


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups as torch.optim takes them; as a string, a table for people of what is in which."""

    def __str__(self) -> str:
        return "\n".join(line for group in self for line in _describe(group))


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_on: Which, adapt_on: Which | None = None
) -> ParameterGroups:
    """Sorts a model's trainable parameters into the groups ``weight``, ``norm`` and ``bias``.

    * ``weight``: the matrices and kernels of layers: convolutions, dense layers, attention, recurrent layers,
      embeddings; and matrices that a module of another type declares itself;
    * ``norm``: all that belongs to normalisation;
    * ``bias``: all other vectors, whatever their names and dimensions of size 1: biases, slopes of PReLU, layer scales,
      class tokens; and position embeddings and tables of biases.

    Args:
        model: the model. A parameter that two modules share is listed once, with the first of them.
        weight_decay: decay of the groups selected by ``decay_on``; the others get 0.
        decay_on: ``all`` groups, ``not-norm`` for all but normalisation, or ``weights`` only.
        adapt_on: the groups whose learning rate LARS adapts, as the key ``adapt``; None omits the key.

    Returns:
        Parameter groups as torch.optim takes them, empty ones left out, each with its kind under ``kind`` and its
        parameters' names in the model under ``names``. Print them to see what went where.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``decay_on`` or ``adapt_on`` is none of these words.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups takes the model, not {type(model).__name__}")
    for name, which in (("decay_on", decay_on), ("adapt_on", adapt_on)):
        if which not in (*_MEMBERS, *([None] if name == "adapt_on" else [])):
            raise ValueError(f"{name} {which!r}: one of {', '.join(_MEMBERS)}")
    members: dict[str, dict[str, nn.Parameter]] = {"weight": {}, "norm": {}, "bias": {}}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            members[_kind(module, name, parameter)][f"{path}.{name}" if path else name] = parameter
    groups = ParameterGroups()
    for kind, named in members.items():
        if named:
            decay = weight_decay if kind in _MEMBERS[decay_on] else 0.0
            group: dict[str, Any] = {
                "params": list(named.values()),
                "names": list(named),
                "kind": kind,
                "weight_decay": decay,
            }
            if adapt_on is not None:
                group["adapt"] = kind in _MEMBERS[adapt_on]
            groups.append(group)
    return groups


def _kind(module: nn.Module, name: str, parameter: Tensor) -> str:
    """The group of a parameter that a module declares itself."""
    if isinstance(module, _NORMS):
        return "norm"
    if isinstance(module, _LAYERS) and "weight" in name and name != "weight_g":  # the lengths of weight_norm's rows
        return "weight" if parameter.dim() > 1 else "bias"
    if sum(size > 1 for size in parameter.shape) < 2:
        return "norm" if "Norm" in type(module).__name__ else "bias"
    # What has a first dimension of 1 is added to a batch.
    return "bias" if parameter.shape[0] == 1 or _ADDED.search(name) else "weight"


def _describe(group: dict[str, Any]) -> Iterable[str]:
    """The lines of a group: what holds for all, and a line for each name, in which * stands for numbers."""
    alike: dict[str, list[Tensor]] = {}
    for name, parameter in zip(group["names"], group["params"], strict=True):
        alike.setdefault(_NUMBERS.sub("*", name), []).append(parameter)
    adapted = {True: ", adapted", False: ", not adapted"}.get(group.get("adapt", ""), "")
    numbers = sum(parameter.numel() for parameter in group["params"])
    yield (f"{group['kind']}: {len(group['params'])} tensors, {numbers:,} numbers; weight decay "
           f"{group['weight_decay']:g}{adapted}")  # fmt: skip
    for pattern, parameters in alike.items():
        shapes = dict.fromkeys("x".join(map(str, parameter.shape)) or "1" for parameter in parameters)
        some = ", ".join(list(shapes)[:3]) + (", …" if len(shapes) > 3 else "")
        yield f"  {pattern}" + (f" ({len(parameters)})" if len(parameters) > 1 else "") + f": {some}"
