"""The plan of a node with the layout that ``knltrain tune`` measured, otherwise by the rules."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from knltrain.node.affinity import Plan, asked_threads, plan_node
from knltrain.node.topology import Node
from knltrain.node.tuning_cache import stored_layout


def tuned_plan(node: Node, ranks_per_node: int | None = None, *, environ: Mapping[str, str] | None = None) -> Plan:
    """Places ranks on a node, with the measured fastest number of ranks unless one is given.

    Args:
        node: the part of the node that the ranks share.
        ranks_per_node: explicit number; a measured layout is used only if it has the same.
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
    """Returns the environment with the measured fastest ``OMP_NUM_THREADS``, unless the user has set one.

    A single rank on a node was measured without communication: then the rules apply.
    """
    best = stored_layout(node)
    if best is None or asked_threads(environ) or not 1 < ranks_per_node == best.layout.ranks_per_node:
        return environ
    return {**environ, "OMP_NUM_THREADS": str(best.layout.threads)}
