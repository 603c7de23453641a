"""Where the ranks of a mesh lie: which ranks an axis brings together, how far they are apart, and how many nodes they span.

A mesh is a mapping from axis to size, the outermost axis first: the last one changes fastest, so its ranks are next to each other. Ranks
fill node after node, as launchers number them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

REPLICA_AXIS = "dp"


def axis_stride(mesh: Mapping[str, int], axis: str) -> int:
    """How many ranks lie from one rank of an axis to the next: the sizes of the axes after it, multiplied."""
    axes = list(mesh)
    return math.prod(mesh[name] for name in axes[axes.index(axis) + 1 :])


def axis_groups(mesh: Mapping[str, int], axis: str) -> list[range]:
    """The ranks that differ in their coord on one axis only, for all coords on the others."""
    stride = axis_stride(mesh, axis)
    span = stride * mesh[axis]
    starts = range(0, math.prod(mesh.values()), span)
    return [range(first, first + span, stride) for start in starts for first in range(start, start + stride)]


def nodes_spanned(mesh: Mapping[str, int], axis: str, devices_per_node: int) -> int:
    """The most nodes that ranks of one group of an axis lie in. 1: all of its traffic stays inside of nodes, as that of an axis the mesh
    does not have.
    """
    if axis not in mesh:
        return 1
    return max(len({rank // devices_per_node for rank in group}) for group in axis_groups(mesh, axis))
