"""PyTorch operators made of Python functions.

torch.library.custom_op is not used, since the first call of its operators imports torch._dynamo: 2 s of CPU in every
process that trains. Operators of a torch.library.Library do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("knltrain", "FRAGMENT")  # operators live as long as it does


def operator(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the decorated function torch.ops.knltrain.NAME, with the schema that its annotations say.

    Args:
        name: of the operator.
        mutates: parameters whose tensors it writes to; then it returns nothing. Autograd raises an error where an
            overwritten value is still needed.

    Returns:
        A decorator that returns the function as it was.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _with_new_versions(function, mutates) if mutates else function, "CompositeExplicitAutograd")
        if mutates:
            register_fake(name)(lambda *arguments: None)
        return function

    return register


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Has torch.compile and torch.export take an operator's shapes and types from the decorated function."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]]
    decorator = torch.library.register_fake(f"knltrain::{name}", lib=_library)
    return decorator


def _with_new_versions(function: Callable[..., Any], mutates: tuple[str, ...]) -> Callable[..., Any]:
    """The function, which then increments the versions of the tensors that it writes to."""
    places = [index for index, name in enumerate(function.__annotations__) if name in mutates]

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        result = function(*arguments)
        for place in places:
            torch.autograd.graph.increment_version(arguments[place])
        return result

    return wrapper
