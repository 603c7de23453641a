"""Composite ops: what ATen itself makes of other ops, written as these where the op has no rule of its own.

Torch defines many ops (`cosine_similarity`, `triplet_margin_loss`, `gru_cell`, `tile`, every second spelling such as
`concat`) by a few lines of other ops, which eager runs one by one, forward and backward. So writing these lines out
changes no bit of the result, and the rules of the parts are all that is needed to split it. Random ops stay as they are,
since they have a switch for evaluation; so do composites that read values, that write into their results (`out=`), or
that cannot be traced: those stay whole, as any op without a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from passes.canonical_rewrite import op_name
from passes.rules import rule_of

aten = torch.ops.aten

# Composites that the passes after import read or write by name.
_KNOWN = frozenset(
    """
    view reshape flatten unflatten view_as reshape_as expand_as split chunk tensor_split unsafe_chunk hsplit vsplit unbind
    t numpy_T mT adjoint swapaxes swapdims movedim moveaxis narrow to type_as contiguous dropout alpha_dropout
    feature_dropout feature_alpha_dropout squeeze __and__ __or__ __xor__
    """.split()  # noqa: SIM905 - thirty short names, not thirty lines
)


def is_composite(node: fx.Node) -> bool:
    """True for a call of an op without a rule that ATen makes of others, and that is neither random nor changes its arguments."""
    target, value = node.target, node.meta.get("val")
    results = value if isinstance(value, (list, tuple)) else (value,)
    return (
        all(isinstance(result, torch.Tensor) for result in results)
        and isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and op_name(target) not in _KNOWN
        and rule_of(target) is None
        and torch._C.DispatchKey.CompositeImplicitAutograd not in target.py_kernels  # another way than eager's
        and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
    )


def parts(
    node: fx.Node, is_trainable: Callable[[fx.Node], bool], autocast: AbstractContextManager[Any] | None = None
) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The graph that an exported composite call stands for, and the nodes that its placeholders stand for; None if there
    is no such graph. Some composites take another way where no gradient is wanted, so `is_trainable` says of which
    arguments it is. `autocast`: the mode that it was called in."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    values = [source.meta.get("val") for source in inputs]
    fake = next((value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor)), None)
    if fake is None or any(isinstance(value, (list, tuple)) or value is None for value in values):
        return None
    target: Any = node.target

    wanted = [isinstance(value, torch.Tensor) and is_trainable(x) for x, value in zip(inputs, values, strict=True)]

    def run(*given: Any) -> Any:
        at = dict(zip(inputs, given, strict=True))
        args, kwargs = pytree.tree_unflatten([at.get(x, x) if isinstance(x, fx.Node) else x for x in leaves], spec)
        return target(*args, **kwargs)

    try:
        with fake, torch.enable_grad(), autocast or nullcontext():
            for k, value in enumerate(values):
                if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                    values[k] = value.detach().requires_grad_(wanted[k])
            module = make_fx(run, {target: target.decompose}, pre_dispatch=True)(*values)
    except Exception:
        return None  # whatever it was that cannot be written out, the op itself can still run whole
    if not all(_can_be_imported(inner, target) for inner in module.graph.nodes):
        return None
    for inner in module.graph.nodes:
        inner.meta.update({key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta})
    return module, inputs


def _can_be_imported(node: fx.Node, whole: Callable[..., Any]) -> bool:
    """True for calls of ordinary ops, in place where they have an ordinary form; no constants, no `out=`."""
    target = node.target
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem or getattr(target, "__module__", "") in ("_operator", "math", "torch")
    if target is whole or "out" in target._overloadname:
        return False
    return not target._schema.is_mutable or hasattr(aten, op_name(target).removesuffix("_"))
