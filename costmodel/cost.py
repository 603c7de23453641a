"""What one op, a stage or a whole model costs: FLOPs and bytes, as numbers or as sympy expressions in the batch and
sequence sizes.

A `Cost` says nothing about seconds; `costmodel.roofline` turns it into seconds on a `Hardware`, `costmodel.collectives`
prices the bytes that are communicated. One set of formulas serves both uses: a symbolic size makes the fields sympy
expressions, `Cost.at` substitutes numbers into them later. Plain ints never pass through sympy, so adding up 10,000
numeric costs takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

from costmodel.errors import BadArgument

Amount: TypeAlias = int | float | sympy.Expr  # a count of FLOPs or bytes; a float only after division or scaling by one


@dataclass(frozen=True, slots=True)
class Product:
    """The shape of a matrix product [m, k] x [k, n], `batch` times: what decides how well it fills a device.

    `rows`: lengths of the operands' rows in memory, in elements (kernels load 16 bytes at once where they divide them). `fused`:
    attention in one kernel, m queries and n keys of k features for each of `batch` heads.
    """

    m: Amount
    n: Amount
    k: Amount
    batch: Amount = 1
    rows: tuple[Amount, ...] = ()
    fused: bool = False

    def changed(self, change: Callable[[Amount], Amount]) -> Product:
        """The product with `change` done to every size."""
        rows = tuple(change(size) for size in self.rows)
        return Product(change(self.m), change(self.n), change(self.k), change(self.batch), rows, self.fused)


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs, bytes and kernels of a forward and the backward that follows it. Every field adds up over ops.

    `saved_bytes` is what eager autograd keeps from forward to backward, parameters excluded. `communicated_bytes`
    counts what collectives put on the wire per rank, forward and backward together. The kernel counts turn into launch
    overhead. The products say which shapes the FLOPs come in, where they are matrix products.
    """

    forward_flops: Amount = 0
    backward_flops: Amount = 0
    read_bytes: Amount = 0
    written_bytes: Amount = 0
    backward_read_bytes: Amount = 0
    backward_written_bytes: Amount = 0
    saved_bytes: Amount = 0
    communicated_bytes: Amount = 0
    forward_kernels: int = 0
    backward_kernels: int = 0
    forward_products: tuple[Product, ...] = ()
    backward_products: tuple[Product, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_flops + other.forward_flops,
            self.backward_flops + other.backward_flops,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.backward_read_bytes + other.backward_read_bytes,
            self.backward_written_bytes + other.backward_written_bytes,
            self.saved_bytes + other.saved_bytes,
            self.communicated_bytes + other.communicated_bytes,
            self.forward_kernels + other.forward_kernels,
            self.backward_kernels + other.backward_kernels,
            self.forward_products + other.forward_products,
            self.backward_products + other.backward_products,
        )

    def scaled(self, factor: Amount) -> Cost:
        """The amounts of FLOPs and bytes multiplied by `factor` (a shard's share, say), products as so many of them; the kernels stay:
        a shard launches as many.
        """
        values = {name: getattr(self, name) * factor for name in AMOUNTS}
        forward, backward = (
            tuple(replace(product, batch=product.batch * factor) for product in side)
            for side in (self.forward_products, self.backward_products)
        )
        return replace(self, **values, forward_products=forward, backward_products=backward)

    def at(self, sizes: Mapping[str, int]) -> Cost:
        """The cost with every symbolic size replaced by its number. BadArgument naming the size if one is missing."""
        if self.is_numeric:
            return self
        return _substituted(self, tuple(sorted(sizes.items())))

    @property
    def is_numeric(self) -> bool:
        return not any(isinstance(getattr(self, name), sympy.Basic) for name in AMOUNTS)


AMOUNTS = (
    "forward_flops", "backward_flops", "read_bytes", "written_bytes",
    "backward_read_bytes", "backward_written_bytes", "saved_bytes", "communicated_bytes",
)  # fmt: skip

ZERO = Cost()


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of many costs. Symbolic terms are collected first and added by sympy once, instead of once per cost."""
    sums: list[Any] = [0] * len(AMOUNTS)
    terms: list[list[sympy.Expr]] = [[] for _ in AMOUNTS]
    forward_kernels = backward_kernels = 0
    forward_products: list[Product] = []
    backward_products: list[Product] = []
    for cost in costs:
        for index, name in enumerate(AMOUNTS):
            amount = getattr(cost, name)
            if isinstance(amount, sympy.Basic):
                terms[index].append(amount)
            else:
                sums[index] += amount
        forward_kernels += cost.forward_kernels
        backward_kernels += cost.backward_kernels
        forward_products += cost.forward_products
        backward_products += cost.backward_products
    amounts = [sympy.Add(number, *exprs) if exprs else number for number, exprs in zip(sums, terms, strict=True)]
    kernels = {"forward_kernels": forward_kernels, "backward_kernels": backward_kernels}
    products = {"forward_products": tuple(forward_products), "backward_products": tuple(backward_products)}
    return Cost(**dict(zip(AMOUNTS, amounts, strict=True)), **kernels, **products)  # type: ignore[arg-type]


def number_at(amount: Amount, sizes: Mapping[str, int]) -> int | float:
    """`amount` with its symbolic sizes replaced: an int where the result is whole, else a float. BadArgument if a size
    is missing.
    """
    if not isinstance(amount, sympy.Basic):
        return amount
    replacements = {}
    for symbol in amount.free_symbols:
        name = str(symbol)
        if name not in sizes:
            raise BadArgument(
                f"no number for the size {name}", why=f"a cost depends on it: {amount}", use=f'a mapping with "{name}"'
            )
        replacements[symbol] = sympy.Integer(sizes[name])
    value = amount.xreplace(replacements)
    return int(value) if value.is_Integer else float(value)


@lru_cache(maxsize=16384)
def _substituted(cost: Cost, sizes: tuple[tuple[str, int], ...]) -> Cost:
    by_name = dict(sizes)
    amounts: dict[str, Any] = {name: number_at(getattr(cost, name), by_name) for name in AMOUNTS}
    forward, backward = (
        tuple(product.changed(lambda size: number_at(size, by_name)) for product in side)
        for side in (cost.forward_products, cost.backward_products)
    )
    return replace(cost, **amounts, forward_products=forward, backward_products=backward)
