"""Graphs as JSON: what a saved plan holds of its stages. Only names and numbers; loading one runs no code of its own.

Call targets are looked up by name: ATen and other registered ops, functions on sizes (`operator`, `builtins`, `math`), the collectives of
`passes.reshard` and the rewrites of `passes.local_ops`. BadPlan for anything else.
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from costmodel.errors import BadPlan
from passes import local_ops, reshard
from passes.ir import DTYPE_NAMES, DTYPES, Origin, is_state, origin, size_expr, tensor_type
from passes.localize import sharding
from passes.placement import local_type, parse_size, parse_type, type_text

_MODULES: Mapping[str, Any] = {
    "operator": operator,
    "builtins": builtins,
    "math": math,
    "reshard": reshard,
    "local_ops": local_ops,
}
_FUNCTIONS = {
    "operator": ("mul", "add", "sub", "floordiv", "mod", "truediv", "neg", "pow", "getitem"),
    "builtins": ("int", "float", "max", "min", "abs", "round"),
    "math": ("trunc", "ceil", "floor", "sqrt", "log", "log2", "exp"),
    "reshard": tuple(row.function.__name__ for row in reshard.RESHARDS),
    "local_ops": tuple(
        n
        for n, f in inspect.getmembers(local_ops, inspect.isfunction)
        if f.__module__ == local_ops.__name__ and n[0] != "_"
    ),
}


def target_name(target: Any) -> str:
    """The name of a call target in JSON: "aten.linear.default", "operator.mul", "reshard.all_reduce"."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for module, names in _FUNCTIONS.items():
        for name in names:
            if getattr(_MODULES[module], name, None) is target:
                return f"{module}.{name}"
    raise BadPlan(f"cannot save a call of {target}", why="it is neither a registered op nor one of autopar's functions")


def _target(name: str) -> Callable[..., Any]:
    module, _, rest = name.partition(".")
    if module in _FUNCTIONS and rest in _FUNCTIONS[module]:
        return getattr(_MODULES[module], rest)
    packet, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, module), packet), overload or "default")
    except AttributeError as error:
        raise BadPlan(f"the plan calls {name!r}, which this torch does not know") from error


def _arg_to_json(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return {"node": arg.name}
    if isinstance(arg, (list, tuple)):
        return [_arg_to_json(item) for item in arg]
    if isinstance(arg, torch.dtype):
        return {"dtype": DTYPE_NAMES[arg]}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    if isinstance(arg, torch.layout):
        return {"layout": str(arg)}
    if isinstance(arg, torch.memory_format):
        return {"memory_format": str(arg).removeprefix("torch.")}
    if isinstance(arg, float) and (arg != arg or abs(arg) == float("inf")):
        return {"float": str(arg)}
    if arg is None or isinstance(arg, (bool, int, float, str)):
        return arg
    if isinstance(arg, sympy.Integer):
        return int(arg)
    raise BadPlan(f"cannot save the argument {arg!r}")


def _arg_from_json(arg: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(arg, list):
        return [_arg_from_json(item, nodes) for item in arg]
    if not isinstance(arg, dict):
        return arg
    (kind, value), *rest = arg.items()
    readers: dict[str, Callable[[Any], Any]] = {
        "node": nodes.__getitem__, "dtype": DTYPES.__getitem__, "device": torch.device, "float": float,
        "layout": lambda text: getattr(torch, text.removeprefix("torch.")), "memory_format": lambda text: getattr(torch, text),
    }  # fmt: skip
    if rest or kind not in readers:
        raise BadPlan(f"cannot read the argument {arg!r}")
    return readers[kind](value)


_FLAGS = ("trainable", "loss", "kind", "loss_share", "received", "persistent", "mutates", "segment", "held")


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """One record per node, in order."""
    records = []
    for node in graph.nodes:
        record: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op in ("get_attr", "placeholder"):
            record["target"] = str(node.target)
        elif node.op == "call_function":
            record["target"] = target_name(node.target)
        if node.args and node.op != "placeholder":
            record["args"] = [_arg_to_json(arg) for arg in node.args]
        if node.kwargs:
            record["kwargs"] = {key: _arg_to_json(value) for key, value in node.kwargs.items()}
        kind, size, where = tensor_type(node), size_expr(node), origin(node)
        if kind is not None:
            record["type"] = type_text(kind, sharding(node))
        if "tensors" in node.meta:
            record["types"] = [type_text(value, {}) for value in node.meta["tensors"]]
        if size is not None:
            record["size"] = str(size)
        if where != Origin():
            record["origin"] = [node.meta.get("owner", where.path), where.file, where.line, where.source]
        record |= {
            flag: node.meta[flag] for flag in _FLAGS if node.meta.get(flag) is not None and node.meta[flag] is not False
        }
        records.append(record)
    return records


def graph_from_json(records: Sequence[Mapping[str, Any]], axis_sizes: Mapping[str, int]) -> fx.GraphModule:
    """The graph module, with meta-device tensors of this rank's shapes as its state. BadPlan if the records are no graph."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    state: dict[str, Any] = {}
    for record in records:
        try:
            op, name = record["op"], record["name"]
            args = tuple(_arg_from_json(arg, nodes) for arg in record.get("args", ()))
            kwargs = {key: _arg_from_json(value, nodes) for key, value in record.get("kwargs", {}).items()}
        except KeyError as error:
            raise BadPlan(
                f"the plan's node {record.get('name')!r} uses {error}, which is not defined before it"
            ) from error
        if op == "output":
            graph.output(tuple(args[0]) if args and isinstance(args[0], list) else args[0] if args else ())
            continue
        target: Any = _target(record["target"]) if op == "call_function" else record["target"]
        node = graph.create_node(op, target, args if op == "call_function" else (), kwargs, name=name)
        if "type" in record:
            kind, placements = parse_type(record["type"], axis_sizes)
            node.meta |= {"tensor": kind, "sharding": placements}
        if "size" in record:
            node.meta["size"] = sympy.sympify(parse_size(record["size"]))
        if "types" in record:
            node.meta["tensors"] = tuple(parse_type(text, ())[0] for text in record["types"])
        if "origin" in record:
            node.meta["origin"] = Origin(*record["origin"])
        node.meta |= {flag: record[flag] for flag in _FLAGS if flag in record}
        nodes[name] = node
        if is_state(node):
            state[str(target)] = _meta_state(node, axis_sizes)
    return fx.GraphModule(state, graph)


def _meta_state(node: fx.Node, axis_sizes: Mapping[str, int]) -> torch.Tensor:
    kind = tensor_type(node)
    if kind is None:
        raise BadPlan(f"the plan gives no type for {node.target}")
    local = local_type(kind, sharding(node), axis_sizes)
    tensor = torch.empty([int(size) for size in local.shape], dtype=local.dtype, device="meta")
    if node.meta.get("kind") == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=bool(node.meta.get("trainable")))
    return tensor
