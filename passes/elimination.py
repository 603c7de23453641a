"""Exact minimisation of a sum of small cost tables over discrete variables: bucket elimination (nonserial dynamic programming).

Variables are eliminated one by one, cheapest first (smallest joint table over the neighbours that remain); each elimination adds up
the tables that mention the variable and takes the minimum over it, which leaves one table over its neighbours. Going back through
the eliminations gives the assignment. The result is the true minimum; time and memory are exponential only in the width of the
graph, which is small for neural networks (a residual stream and a few shared values), linear in depth. Where it is not, values that no
best assignment needs are left out first (`passes.dominance`). Where it still is not (a recurrence written out step by step), the
variables that make it wide take their values from a given assignment, one by one until the rest can be solved: the result is then
the best with these values, and never worse than the given one.
Source: Bertelè and Brioschi, Nonserial Dynamic Programming, 1972; Dechter, Bucket elimination, 1999.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import prod

import torch

from passes.dominance import Factor, restricted, undominated

LARGEST_TABLE = 50_000_000
WIDE = 100_000  # entries of a table from which on it pays to leave out dominated values first


def minimise(
    domains: Sequence[int], factors: Sequence[tuple[tuple[int, ...], torch.Tensor]], fallback: Sequence[int] | None = None
) -> tuple[list[int], float]:
    """The assignment (one index per variable) with the least sum of tables, and that sum (inf if every assignment is forbidden).

    domains[v]: number of values of variable v. factors: (variables, table) with table.shape = their domains, in that order; inf forbids.
    fallback: an assignment that is allowed, for graphs too wide for an exact answer; MemoryError for them without it.
    """
    found = _eliminate(domains, factors, WIDE)
    if found is not None:
        return found
    alive = undominated(domains, factors)
    found = _eliminate([len(left) for left in alive], restricted(factors, alive), LARGEST_TABLE)
    if found is None and fallback is not None:
        found = _eliminate(domains, factors, WIDE, fallback)
        assert found is not None
        return found
    if found is None:
        raise MemoryError(
            "the sharding problem is too wide: an exact answer needs a table of more than 50 million entries"
        )
    assignment, least = found
    return [int(left[index]) for left, index in zip(alive, assignment, strict=True)], least


def _eliminate(
    domains: Sequence[int], factors: Sequence[Factor], largest: int, fallback: Sequence[int] | None = None
) -> tuple[list[int], float] | None:
    """The assignment and the sum; None if a table of more than `largest` entries is needed and there is no fallback."""
    touching: list[list[int]] = [[] for _ in domains]
    tables: list[tuple[tuple[int, ...], torch.Tensor] | None] = []
    neighbours: list[set[int]] = [set() for _ in domains]
    constant = 0.0
    for variables, table in factors:
        if not variables:
            constant += float(table)
            continue
        for variable in variables:
            touching[variable].append(len(tables))
            neighbours[variable].update(variables)
        tables.append((variables, table))
    for variable, around in enumerate(neighbours):
        around.discard(variable)

    def weight(variable: int) -> int:
        return domains[variable] * prod(domains[near] for near in neighbours[variable])

    heap: list[tuple[int, int]] = [(weight(variable), variable) for variable in range(len(domains))]
    heapq.heapify(heap)
    done = [False] * len(domains)
    steps: list[tuple[int, tuple[int, ...], torch.Tensor]] = []
    given: dict[int, int] = {}
    while heap:
        cost, variable = heapq.heappop(heap)
        if done[variable] or cost != weight(variable):
            continue
        if cost > largest and fallback is None:
            return None
        if cost > largest:  # the variable that most others meet is given its value
            fixed = max((variable, *sorted(neighbours[variable])), key=lambda v: (len(neighbours[v]), -v))
            value = fallback[fixed]  # type: ignore[index]
            given[fixed], done[fixed], around = value, True, neighbours[fixed]
            for index in set(touching[fixed]):
                entry = tables[index]
                if entry is not None:
                    position = entry[0].index(fixed)
                    rest, left = entry[0][:position] + entry[0][position + 1 :], entry[1].select(position, value)
                    constant += 0.0 if rest else float(left)
                    tables[index] = (rest, left) if rest else None
            for near in around:
                neighbours[near].discard(fixed)
            for near in (variable, *sorted(around)):
                if not done[near]:
                    heapq.heappush(heap, (weight(near), near))
            continue
        done[variable] = True
        rest = tuple(sorted(neighbours[variable]))
        order = (*rest, variable)
        total = torch.zeros([domains[v] for v in order], dtype=torch.float64)
        for index in set(touching[variable]):
            entry = tables[index]
            if entry is not None:
                total = total + _aligned(*entry, order)
                tables[index] = None
        least, choice = total.min(dim=-1)
        steps.append((variable, rest, choice))
        for near in rest:
            neighbours[near].discard(variable)
            neighbours[near].update(v for v in rest if v != near)
        if rest:
            for near in rest:
                touching[near] = [index for index in touching[near] if tables[index] is not None]
                touching[near].append(len(tables))
                heapq.heappush(heap, (weight(near), near))
            tables.append((rest, least))
        else:
            constant += float(least)
    assignment = [given.get(variable, 0) for variable in range(len(domains))]
    for variable, rest, choice in reversed(steps):
        assignment[variable] = int(choice[tuple(assignment[v] for v in rest)])
    return assignment, constant


def _aligned(variables: tuple[int, ...], table: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The table with its dims in the order of `order`, size 1 where it does not mention a variable."""
    positions = sorted(range(len(variables)), key=lambda k: order.index(variables[k]))
    table = table.permute(positions)
    shape = [1] * len(order)
    for k in positions:
        shape[order.index(variables[k])] = -1
    sizes = iter(table.shape)
    return table.reshape([next(sizes) if size == -1 else 1 for size in shape])
