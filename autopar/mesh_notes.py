"""Notes on where the axes of a mesh lie: which stay inside of nodes, which cross them, and what that costs a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from costmodel.hardware import Hardware
from costmodel.mesh import axis_stride, nodes_spanned

Seconds = Callable[[Hardware], float]  # of a step's traffic on one axis, by the machine


def mesh_notes(mesh: Mapping[str, int], hardware: Hardware, seconds: Mapping[str, Seconds]) -> list[str]:
    """One note on all axes, and one with the price for every axis of `seconds` that leaves its node."""
    num_ranks, width = math.prod(mesh.values()), hardware.devices_per_node
    axes = [axis for axis, size in mesh.items() if size > 1]
    if not axes:
        return []
    nodes = {axis: nodes_spanned(mesh, axis, width) for axis in axes}
    found = {count: [f"{axis}={mesh[axis]}" for axis in axes if nodes[axis] == count] for count in sorted(set(nodes.values()))}
    places = [f"{' and '.join(listed)} {'inside a node' if count == 1 else f'over {count} nodes'}" for count, listed in found.items()]
    layout = f"{num_ranks} ranks in one node" if num_ranks <= width else f"{width} ranks a node, {-(-num_ranks // width)} nodes"
    notes = [f"{layout}, {' x '.join(mesh)} from the outside in: {'; '.join(places)}"]
    together = replace(hardware, devices_per_node=max(num_ranks, width))
    for axis, seconds_on in seconds.items():
        if nodes.get(axis, 1) > 1:
            across, inside = seconds_on(hardware), seconds_on(together)
            price = f"its traffic takes {_milliseconds(across)} a step, inside a node it would take {_milliseconds(inside)}"
            if hardware.axis_link(mesh[axis], axis_stride(mesh, axis)).num_nodes == 1:
                price = f"some of its groups lie in {nodes[axis]} nodes, and it is priced as if none did ({_milliseconds(across)} a step)"
            notes.append(f"{axis}={mesh[axis]} crosses nodes: {price}{_remedy(mesh, axis, width)}")
    return notes


def _remedy(mesh: Mapping[str, int], axis: str, width: int) -> str:
    """What keeps an axis inside a node, if anything does."""
    if axis != "tp":
        return ""
    if mesh[axis] <= width and width % mesh[axis] == 0:
        return "; as the last of mesh_order it stays inside"
    most = max(size for size in range(1, width + 1) if width % size == 0 and size <= mesh[axis])
    return f"; tp={most} stays inside" if most > 1 else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
