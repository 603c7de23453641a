"""Size expressions made shorter by what sizes are: integers of 1 or more, that fit in an int64.

torch.export bounds the ends of slices, so that `x[:, 1:]` of T tokens has T - 1 + Max(0, 1 - T) of them, or ends at
Min(T, 2^63 - 1). Writing each size s as 1 + s', with s' >= 0, sympy sees the sign of most differences: an argument of a
Max or Min goes where another one is known to be as far. Nothing else is rewritten. An expression without Max and Min
costs one look.
"""

from __future__ import annotations

import sympy

from passes.ir import size_symbol

_LARGEST = 2**63 - 1


def simplified(expr: sympy.Expr) -> sympy.Expr:
    """The same size, without the arguments of Max and Min that never decide."""
    if not any(_kind(part) for part in sympy.preorder_traversal(expr)):
        return expr
    above = {
        symbol: 1 + sympy.Symbol(f"{symbol}_above_1", integer=True, nonnegative=True)
        for symbol in expr.free_symbols
        if symbol == size_symbol(str(symbol))
    }
    return _simplified(expr, above)


def _simplified(expr: sympy.Expr, above: dict[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    if not expr.args:
        return expr
    args = [_simplified(arg, above) for arg in expr.args]
    kind = _kind(expr)
    if not kind:
        return expr.func(*args)
    kept = list(args)
    for arg in args:
        others = [other for other in kept if other is not arg]
        if any(_never_decides(kind, arg, other, above) for other in others):
            kept = others
    return kept[0] if len(kept) == 1 else expr.func(*kept)


def _kind(expr: sympy.Basic) -> str:
    """ "Max" or "Min" for sympy's functions of that name and for torch's."""
    name = type(expr).__name__
    return name if name in ("Max", "Min") else ""


def _never_decides(kind: str, arg: sympy.Expr, other: sympy.Expr, above: dict[sympy.Symbol, sympy.Expr]) -> bool:
    """True if `other` is always as large (as small, for Min)."""
    if kind == "Min" and arg == _LARGEST:
        return True
    difference = other - arg if kind == "Max" else arg - other
    return bool(sympy.expand(difference.xreplace(above)).is_nonnegative)
