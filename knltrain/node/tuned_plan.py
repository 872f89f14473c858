"""The plan of a node as ``knltrain tune`` measured it, or else by the rules."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from knltrain.node.affinity import Plan, asked_threads, plan_node
from knltrain.node.topology import Node
from knltrain.node.tuning_cache import stored_layout


def tuned_plan(node: Node, ranks_per_node: int | None = None, *, environ: Mapping[str, str] | None = None) -> Plan:
    """Places ranks on a node: as many as were the fastest, unless a number is asked for.

    Args:
        node: what they may use together.
        ranks_per_node: explicit; what was measured counts only if it is the same number.
        environ: the environment, by default this process's.

    Raises:
        ConfigError: as :func:`~knltrain.node.affinity.plan_node`.
    """
    environ = os.environ if environ is None else environ
    best = stored_layout(node)
    if best is None or ranks_per_node not in (None, best.layout.ranks_per_node):
        return plan_node(node, ranks_per_node, environ=environ)
    layout = best.layout
    plan = plan_node(node, layout.ranks_per_node, environ=tuned_threads(node, layout.ranks_per_node, environ))
    number = "number of ranks asked for; threads" if ranks_per_node else "ranks and threads"
    asked = "; threads as OMP_NUM_THREADS says" if asked_threads(environ) else ""
    origin = f"{number} measured by knltrain tune with {best.of}; --local-batch {layout.local_batch} was fastest{asked}"
    return dataclasses.replace(plan, origin=origin)


def tuned_threads(node: Node, ranks_per_node: int, environ: Mapping[str, str]) -> Mapping[str, str]:
    """Returns the environment with the ``OMP_NUM_THREADS`` that was the fastest, unless the user has set one.

    A rank that is alone on its node was measured without anybody to communicate with: then the rules count.
    """
    best = stored_layout(node)
    if best is None or asked_threads(environ) or not 1 < ranks_per_node == best.layout.ranks_per_node:
        return environ
    return {**environ, "OMP_NUM_THREADS": str(best.layout.threads)}
