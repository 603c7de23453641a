"""Before an exact minimisation: leave out the values that no best assignment needs.

A value `a` of a variable goes if another value `b` of it is never worse, whatever the other variables are: summed over
the tables that mention the variable, the most that `b` can cost more than `a` is at most 0. The minimum stays what it
was. One removal makes others possible, so variables are visited again until nothing changes. In sharding problems most
choices go that way (an activation held in blocks that no neighbour holds), and a problem too wide to solve becomes
narrow. Source: Goldstein, Efficient rotamer elimination applied to protein side-chains and related spin glasses, 1994.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Factor = tuple[tuple[int, ...], torch.Tensor]


def undominated(domains: Sequence[int], factors: Sequence[Factor]) -> list[torch.Tensor]:
    """Per variable the indices of the values that are left, in order; at least one each."""
    alive = [torch.arange(size) for size in domains]
    touching: list[list[Factor]] = [[] for _ in domains]
    for factor in factors:
        for variable in factor[0]:
            touching[variable].append(factor)
    waiting = dict.fromkeys(range(len(domains)))
    while waiting:
        variable = next(iter(waiting))
        del waiting[variable]
        kept = _undominated(variable, alive, touching[variable])
        if len(kept) < len(alive[variable]):
            alive[variable] = alive[variable][kept]
            waiting.update(dict.fromkeys(near for variables, _ in touching[variable] for near in variables))
    return alive


def restricted(factors: Sequence[Factor], alive: Sequence[torch.Tensor]) -> list[Factor]:
    """The tables over the values that are left."""
    found = []
    for variables, table in factors:
        for dim, variable in enumerate(variables):
            if len(alive[variable]) < table.shape[dim]:
                table = table.index_select(dim, alive[variable])
        found.append((variables, table))
    return found


def _undominated(variable: int, alive: Sequence[torch.Tensor], factors: Sequence[Factor]) -> list[int]:
    """Positions among a variable's remaining values that no other one replaces."""
    count = len(alive[variable])
    if count == 1:
        return [0]
    excess = torch.zeros(count, count, dtype=torch.float64)  # [b, a]: the most that b can cost more than a
    for variables, table in restricted(factors, alive):
        costs = table.movedim(variables.index(variable), 0).reshape(count, -1)
        more = costs.unsqueeze(1) - costs.unsqueeze(0)
        more = more.masked_fill(
            torch.isinf(costs).unsqueeze(0).expand_as(more), -torch.inf
        )  # where a is forbidden, b is no worse
        excess += more.amax(-1)
    never_worse = (excess <= 0).tolist()  # nan, of inf - inf, compares false
    kept = list(range(count))
    for a in reversed(range(count)):  # between equals the first stays
        if any(never_worse[b][a] for b in kept if b != a):
            kept.remove(a)
    return kept
