"""Parameter groups by module type, never by a substring of a name."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)

Which = Literal["all", "not-norm", "weights"]
_MEMBERS: dict[str, set[str]] = {
    "all": {"weight", "norm", "bias"},
    "not-norm": {"weight", "bias"},
    "weights": {"weight"},
}


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_on: Which, adapt_on: Which | None = None
) -> list[dict[str, Any]]:
    """Sorts a model's trainable parameters into the groups ``weight``, ``norm`` and ``bias``.

    Args:
        model: the model. A parameter that two modules share is listed once, with the first of them.
        weight_decay: decay of the groups selected by ``decay_on``; the others get 0.
        decay_on: ``all`` groups, ``not-norm`` for all but normalisation, or ``weights`` only.
        adapt_on: the groups whose learning rate LARS adapts, as the key ``adapt``; None omits the key.

    Returns:
        Parameter groups as torch.optim takes them, empty ones left out, each with its kind under ``kind`` and its
        parameters' names in the model under ``names``.
    """
    members: dict[str, dict[str, nn.Parameter]] = {"weight": {}, "norm": {}, "bias": {}}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            kind = "norm" if isinstance(module, _NORMS) else "bias" if name == "bias" else "weight"
            members[kind][f"{path}.{name}" if path else name] = parameter
    groups = []
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
