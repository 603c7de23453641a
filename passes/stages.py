"""The stages pass: one graph per pipeline stage from the localized graph and a `CutPlan`.

A stage's graph takes, in this order, the values received from earlier stages (by source stage, then in the order they
are made), the model inputs it reads, the loss shares, and the sizes. It returns what it sends on, then the model's
outputs; those all leave from the last stage, which receives the ones that earlier stages make. What does not depend on
parameters is copied into every stage that needs it.

Buffers that forward updates (`meta["mutates"]`: running statistics, counters). An update that depends on parameters has
its place in one stage, and the cut keeps every reader of that buffer there too. One that does not (a counter) runs on
every stage that holds the buffer, each on its own copy and with equal results; where nothing else reads the buffer, on
the stage of the call that follows it. Updates run once per microbatch, in order, as they would when the microbatches
are fed to the untouched model one after the other: batch statistics are those of a microbatch, and a counter counts
microbatches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.ir import is_state, is_trainable, size_expr, tensor_type


@dataclass(frozen=True)
class Crossing:
    """A value that goes from stage `source` to the stages `to`; `gradient`: the loss depends on it there."""

    name: str
    source: int
    to: tuple[int, ...]
    node: fx.Node
    gradient: bool


@dataclass(frozen=True)
class StageGraph:
    """One stage: its graph and how it meets the others. Names are node names, the same in every stage."""

    index: int
    module: fx.GraphModule
    receives: tuple[Crossing, ...]
    sends: tuple[Crossing, ...]
    outputs: tuple[tuple[int, str], ...]  # (leaf of the model's output, name of the node that gives it)


def split_stages(
    module: fx.GraphModule, stage_of: Mapping[fx.Node, int], num_stages: int, outputs: Sequence[fx.Node | None], loss: fx.Node | None,
    weight_state: Collection[str] = (),
) -> list[StageGraph]:  # fmt: skip
    """One graph per stage. `outputs[k]` is the node of the model's k-th output leaf (None for a constant one); `weight_state` names the
    state that the loss terms' weights are computed from: every stage with a term needs it.
    """
    graph = module.graph
    last = num_stages - 1
    influences = _ancestors(loss)
    users: dict[fx.Node, set[int]] = {node: {stage_of[u] for u in node.users if u in stage_of} for node in stage_of}
    leaves = [node for node in outputs if node is not None] + ([loss] if loss is not None else [])
    for node in leaves:
        if node in stage_of:
            users[node].add(last)
    crossings = []
    for node in graph.nodes:
        if node in stage_of:
            to = tuple(sorted(s for s in users[node] if s > stage_of[node]))
            if to:
                gradient = is_trainable(node) and any(_feeds(node, u, stage_of, influences, to) for u in [node])
                crossings.append(Crossing(node.name, stage_of[node], to, node, gradient))
    updates = _update_homes(graph, stage_of, last)
    return [
        _stage(module, index, stage_of, updates, crossings, outputs, loss, last, weight_state)
        for index in range(num_stages)
    ]


def _update_homes(graph: fx.Graph, stage_of: Mapping[fx.Node, int], last: int) -> dict[fx.Node, int]:
    """The updates of buffers that have no stage of their own, and the stage of the call that follows each."""
    homes: dict[fx.Node, int] = {}
    stage = last
    for node in reversed(graph.nodes):
        stage = stage_of.get(node, stage)
        if node.meta.get("mutates") and node not in stage_of:
            homes[node] = stage
    return homes


def _ancestors(loss: fx.Node | None) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [loss] if loss is not None else []
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _feeds(
    node: fx.Node, _: fx.Node, stage_of: Mapping[fx.Node, int], influences: set[fx.Node], to: tuple[int, ...]
) -> bool:
    """True if some later stage uses the value on the way to the loss."""
    return any(user in influences and stage_of.get(user) in to for user in node.users) or (
        node in influences and not any(u in influences for u in node.users)
    )


def _stage(
    module: fx.GraphModule, index: int, stage_of: Mapping[fx.Node, int], updates: Mapping[fx.Node, int], crossings: Sequence[Crossing],
    outputs: Sequence[fx.Node | None], loss: fx.Node | None, last: int, weight_state: Collection[str],
) -> StageGraph:  # fmt: skip
    receives = tuple(sorted((c for c in crossings if index in c.to), key=lambda c: c.source))
    sends = tuple(c for c in crossings if c.source == index)
    received = {c.node for c in receives}
    wanted = [node for node, stage in stage_of.items() if stage == index]
    results: list[fx.Node] = [c.node for c in sends]
    named: list[tuple[int, str]] = []
    if index == last:
        for leaf, node in enumerate(outputs):
            if node is not None:
                results.append(node)
                named.append((leaf, node.name))
        if loss is not None and loss not in outputs:
            results.append(loss)
    needed: set[fx.Node] = set()
    stack = [*wanted, *results, *(node for node, stage in updates.items() if stage == index)]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if is_state(node):
            stack.extend(update for update in updates if node.target in update.meta["mutates"])
        if node not in received:
            stack.extend(node.all_input_nodes)
    if any(_is_share(node) for node in needed):
        needed.update(node for node in module.graph.nodes if is_state(node) and node.target in weight_state)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for crossing in receives:
        copies[crossing.node] = graph.create_node(
            "placeholder", crossing.name, name=crossing.name
        )  # fx would put a name of its own in lower case
        copies[crossing.node].meta = {**crossing.node.meta, "received": crossing.source}
    order = list(module.graph.nodes)
    for kind in (_is_input, _is_share, _is_size):
        for node in order:
            if node in needed and kind(node) and node not in copies:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
    for node in order:
        if node in needed and node not in copies and node.op != "output":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    for node, copy in copies.items():
        if not copy.meta:
            copy.meta = dict(node.meta)
    graph.output(tuple(copies[node] for node in results))
    return StageGraph(index, fx.GraphModule(module, graph), receives, sends, tuple(named))


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and tensor_type(node) is not None and "loss_share" not in node.meta


def _is_share(node: fx.Node) -> bool:
    return node.op == "placeholder" and "loss_share" in node.meta


def _is_size(node: fx.Node) -> bool:
    return node.op == "placeholder" and size_expr(node) is not None


def stage_edges(stages: Sequence[StageGraph]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(edges, gradient edges) between stages: (from, to) wherever a value crosses, and wherever a gradient comes back."""
    forward = {(c.source, to) for stage in stages for c in stage.sends for to in c.to}
    backward = {(c.source, to) for stage in stages for c in stage.sends for to in c.to if c.gradient}
    return sorted(forward), sorted(backward)


def held_in_stages(stages: Sequence[StageGraph]) -> dict[str, tuple[int, ...]]:
    """For every parameter, buffer and constant the stages that hold it."""
    found: dict[str, set[int]] = {}
    for stage in stages:
        for node in stage.module.graph.nodes:
            if is_state(node):
                found.setdefault(str(node.target), set()).add(stage.index)
    return {name: tuple(sorted(held)) for name, held in found.items()}
