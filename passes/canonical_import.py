"""From the graph that torch.export makes to a typed graph: the first step of canonicalize, and the only one that sees
fake tensors.

- `wrap_with_set_grad_enabled` regions are inlined. A region without gradients is exactly its ops on detached arguments,
  so each trainable argument of such an op goes through one `detach`.
- `wrap_with_autocast` regions are inlined. Export records their ops with the dtypes that autocast gave, but without the
  casts. They are found again: torch's dispatcher knows which ops autocast has a kernel for on that kind of device, and
  such an op has had all of its floating arguments cast to the dtype of its result, whatever the list it is on (low
  precision, float32, widest). A composite without such a kernel is written out under autocast, so that the same holds
  of its parts; where that cannot be, its arguments were cast if its result is not what they give by themselves, or if
  they mix dtypes and it is made of ops that autocast casts for. Casts of parameters are shared inside a region, as
  autocast's own cache does, because gradients are then summed in the low precision before they are cast back. (One
  kind of op is more precise than under autocast: recurrent layers on a CPU, whose steps take turns between dtypes
  inside of one op, run in the dtype of what they get.)
- Size arithmetic becomes expressions over the symbolic sizes; assertions on metadata go.
- Module path and source line are taken from the node's stack: the innermost frame that is neither torch's nor Python's
  own.
"""

from __future__ import annotations

import functools
import operator
import os
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from costmodel.errors import CaptureError
from passes.canonical_composites import is_composite, parts
from passes.canonical_rewrite import Builder, op_name
from passes.ir import Origin, TensorType, output_types, size_symbol
from passes.sizes import simplified

aten = torch.ops.aten

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ([^\n]*)(?:\n    ([^\n]*))?')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep


@functools.cache
def is_user_file(file: str) -> bool:
    """True for code that a user wrote or chose, model libraries included: not torch, not Python's standard library."""
    if file.startswith("<") and not file.startswith("<ipython"):
        return False
    real = os.path.realpath(file)
    return not file.startswith(_TORCH) and (not real.startswith(_STDLIB) or "site-packages" in real)


def relative_file(file: str) -> str:
    """A path relative to the working directory if it lies below it."""
    below = os.path.relpath(file) if os.path.isabs(file) else file
    return file if below.startswith("..") else below


@dataclass(frozen=True)
class State:
    """What is known of a tensor the graph reads: its canonical name, its other names, and what kind of state it is."""

    name: str
    kind: str  # "parameter" | "buffer" | "constant"
    tensor: torch.Tensor
    aliases: tuple[str, ...] = ()
    persistent: bool = True


@dataclass(frozen=True)
class Imports:
    """What an exported module's graph alone does not say.

    Names of its inputs in order; the symbolic sizes with the example's values; our expression for each of export's
    symbols; the state under each of export's get_attr targets (a tied parameter has several targets and one State).
    """

    input_names: tuple[str, ...]
    sizes: Mapping[str, int]
    symbols: Mapping[sympy.Symbol, sympy.Expr]
    states: Mapping[str, State]


@dataclass(frozen=True)
class _Region:
    grad: bool = True
    autocast: torch.dtype | None = None
    device: str = ""  # the kind of device that autocast is for
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict)
    detached: dict[fx.Node, fx.Node] = field(default_factory=dict)


class _Importer:
    def __init__(self, imports: Imports) -> None:
        self.imports = imports
        self.builder = Builder()
        self.by_symbol = {size_symbol(name): sympy.Integer(hint) for name, hint in imports.sizes.items()}
        self._exprs: dict[sympy.Expr, Any] = {}
        self._places: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, Any]] = {}

    def expr(self, size: Any) -> Any:
        """A size as an int or a sympy expression over our symbols."""
        if isinstance(size, (int, float)):
            return size
        raw = size.node.expr
        if raw not in self._exprs:
            mapped = simplified(raw.xreplace(self.imports.symbols))
            self._exprs[raw] = int(mapped) if mapped.is_Integer else mapped
        return self._exprs[raw]

    def type_of(self, value: torch.Tensor) -> TensorType:
        return TensorType(value.dtype, tuple(self.expr(size) for size in value.shape))

    def meta_of(self, node: fx.Node) -> dict[str, Any]:
        """The typed meta of a raw node, from its fake value and its stack."""
        value, meta = node.meta.get("val"), dict(self.place_of(node))
        if isinstance(value, torch.Tensor):
            meta["tensor"], meta["device"] = self.type_of(value), value.device
        elif isinstance(value, (list, tuple)):
            meta["tensors"] = tuple(self.type_of(item) for item in value if isinstance(item, torch.Tensor))
        elif isinstance(value, (torch.SymInt, torch.SymFloat)):
            meta["size"] = self.expr(value)
        return meta

    def origin_of(self, node: fx.Node) -> Origin:
        return self.place_of(node)["origin"]

    def place_of(self, node: fx.Node) -> dict[str, Any]:
        """meta: `origin`; `frames`, the user's statements (file, line, function) it ran under, outermost first;
        `owner`, the innermost module on its path that is no library module of torch: the module whose forward has the
        last of these statements."""
        stack = node.meta.get("stack_trace") or ""
        modules = tuple((path, str(kind)) for path, kind in (node.meta.get("nn_module_stack") or {}).values())
        if (stack, modules) not in self._places:
            found = [match for match in _FRAME.findall(stack) if is_user_file(match[0])]
            place = (relative_file(found[-1][0]), int(found[-1][1]), found[-1][3].strip()) if found else ()
            path = re.sub(r"@\d+", "", modules[-1][0]) if modules else ""
            owners = [path for path, kind in modules if not kind.startswith("torch.nn.")]
            self._places[stack, modules] = {
                "origin": Origin(path, *place),
                "frames": tuple((file, int(line), function) for file, line, function, _ in found),
                "owner": re.sub(r"@\d+", "", owners[-1]) if owners else "",
            }
        return self._places[stack, modules]

    def graph_of(self, module: fx.GraphModule) -> fx.Graph:
        graph, builder = module.graph, self.builder
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        values: dict[fx.Node, Any] = {}
        for node, name in zip(placeholders, self.imports.input_names, strict=True):
            values[node] = builder.placeholder(name, **self.meta_of(node), trainable=False)
        for name in self.imports.sizes:
            builder.placeholder(name, size=size_symbol(name), hint=self.imports.sizes[name], origin=Origin())
        by_name: dict[str, fx.Node] = {}
        for node in graph.nodes:
            if node.op != "get_attr" or node.target not in self.imports.states:
                continue
            state = self.imports.states[str(node.target)]
            if state.name not in by_name:
                value = node.meta["val"]
                by_name[state.name] = builder.state(
                    state.name,
                    kind=state.kind,
                    aliases=state.aliases,
                    persistent=state.persistent,
                    trainable=state.kind == "parameter" and state.tensor.requires_grad,
                    value=state.tensor,
                    device=value.device,
                    tensor=self.type_of(value),
                    origin=Origin(state.name.rpartition(".")[0]),
                )
            values[node] = by_name[state.name]
        outputs = self.inline(module, values, _Region())
        builder.graph.output(tuple(outputs))
        return builder.graph

    def inline(self, module: fx.GraphModule, values: dict[fx.Node, Any], region: _Region) -> list[Any]:
        """Emit a (sub)module's nodes, given the values of its placeholders; returns its outputs."""
        for node in module.graph.nodes:
            if node in values:
                continue
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], values.__getitem__)
                return list(result) if isinstance(result, (tuple, list)) else [result]
            if node.op == "get_attr":
                values[node] = module.get_submodule(str(node.target))
                continue
            assert node.op == "call_function", f"torch.export made a {node.op} node: {node.format_node()}"
            written_out = None
            if is_composite(node) and not (region.autocast and has_autocast(node.target, region.device)):
                written_out = parts(
                    node,
                    lambda source: bool(values[source].meta.get("trainable")) and region.grad,
                    torch.autocast(region.device, region.autocast) if region.autocast is not None else None,
                )
            if written_out is not None:
                body, inputs = written_out
                given = [values[source] for source in inputs]
                results = self.inline(body, dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True)), region)
                single = isinstance(node.meta.get("val"), torch.Tensor)
                values[node] = results[0] if single else _RegionOutputs(results)
                continue
            # an inlined region stands as the list of its outputs; getitem picks one
            args = tuple(fx.node.map_arg(arg, values.__getitem__) for arg in node.args)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = self.call(node, args, kwargs, region)
        raise AssertionError("a graph without output")

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], region: _Region) -> Any:
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self.call_region(node, args, region)
        if args and isinstance(args[0], _RegionOutputs):
            return args[0][args[1]]
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not isinstance(target, torch._ops.OpOverload) and target is not operator.getitem:
            raise CaptureError(
                f"{getattr(target, '__name__', target)} is no operation that a program can hold",
                where=str(self.origin_of(node)) or None,
                use="batched tensor operations in place of torch.vmap and the like",
            )
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            size = self.expr(value)
            if isinstance(size, sympy.Expr) and not size.free_symbols <= set(self.by_symbol):
                return None  # read from a tensor's values, by a check: the trace refuses any other use
            return self.builder.size(size, self.origin_of(node))
        if not isinstance(value, (torch.Tensor, list, tuple)) and not _mutates(target):
            return None  # assertions, the size comparisons that fed them, and the switches of regions
        meta = self.meta_of(node)
        if op_name(target) == "contiguous":
            meta["no_op"] = bool(node.args[0].meta["val"].is_contiguous())  # type: ignore[union-attr]
        if region.autocast is not None and not _mutates(target):
            args = self.autocast(target, args, kwargs, meta, region)
        if not region.grad:
            args = fx.node.map_arg(args, lambda arg: self.detach(arg, meta, region))
        return self.builder.emit(target, args, kwargs, meta, node.name)

    def call_region(self, node: fx.Node, args: tuple[Any, ...], region: _Region) -> Any:
        """Inline a higher-order call that only switches a mode, or only marks its ops."""
        name = str(getattr(node.target, "_name", node.target))
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *inputs = args
            inner = replace(region, grad=bool(enabled), detached={})
        elif name == "wrap_with_autocast":
            device, dtype, enabled, _, body, *inputs = args
            dtype = dtype or torch.get_autocast_dtype(device)
            inner = replace(region, autocast=dtype if enabled else None, device=device, casts={})
        elif name in ("wrap", "tag_activation_checkpoint", "wrap_activation_checkpoint"):
            body, *inputs = args
            inner = region
        else:
            raise CaptureError(
                f"the higher-order op {name} cannot be split over devices",
                where=str(self.origin_of(node)) or None,
                use="the same computation in ordinary tensor operations",
            )
        placeholders = [inside for inside in body.graph.nodes if inside.op == "placeholder"]
        return _RegionOutputs(self.inline(body, dict(zip(placeholders, inputs, strict=True)), inner))

    def detach(self, arg: Any, meta: dict[str, Any], region: _Region) -> Any:
        """The argument as an op under no_grad sees it."""
        if not isinstance(arg, fx.Node) or not arg.meta.get("trainable"):
            return arg
        if arg not in region.detached:
            same: dict[str, Any] = {key: arg.meta[key] for key in ("tensor", "tensors", "device") if key in arg.meta}
            region.detached[arg] = self.builder.emit(aten.detach.default, (arg,), {}, {**_place(meta), **same})
        return region.detached[arg]

    def autocast(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: dict[str, Any], region: _Region
    ) -> tuple[Any, ...]:
        """The arguments with the casts that autocast did, to the dtype of the result."""
        kinds = [meta["tensor"]] if "tensor" in meta else meta.get("tensors", ())
        recorded = next((kind.dtype for kind in kinds if kind.is_floating), None)
        if (
            recorded in (None, torch.float64)
            or not isinstance(target, torch._ops.OpOverload)
            or op_name(target) in ("to", "_to_copy", "detach")
            or not self.was_cast(target, args, kwargs, recorded, region)
        ):
            return args

        def cast(arg: Any) -> Any:
            kind = arg.meta.get("tensor") if isinstance(arg, fx.Node) else None
            if kind is None or not kind.is_floating or kind.dtype in (recorded, torch.float64):
                return arg
            key = (arg, recorded)
            if key in region.casts:
                return region.casts[key]
            to = {**_place(meta), "tensor": TensorType(recorded, kind.shape), "device": arg.meta.get("device")}
            new = self.builder.emit(aten.to.dtype, (arg, recorded), {}, to)
            if arg.op == "get_attr":
                region.casts[key] = new
            return new

        return fx.node.map_arg(args, cast)

    def was_cast(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recorded: torch.dtype, region: _Region
    ) -> bool:
        """Did autocast cast the floating arguments of this call?"""
        if has_autocast(target, region.device):
            named = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False)) | kwargs
            return named.get("dtype") is None  # a dtype that is asked for is the op's own business
        seen = _Calls()
        if self.natural_dtype(target, args, kwargs, seen) != recorded:
            return True
        leaves = pytree.tree_leaves((args, kwargs))
        kinds = [arg.meta["tensor"] for arg in leaves if isinstance(arg, fx.Node) and "tensor" in arg.meta]
        return len({kind.dtype for kind in kinds if kind.is_floating}) > 1 and any(
            has_autocast(called, region.device) for called in seen.targets if called is not target
        )

    def natural_dtype(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: _Calls
    ) -> torch.dtype | None:
        """The floating dtype an op gives outside of autocast, by running it on the meta device; None if it refuses."""

        def empty(arg: fx.Node) -> Any:
            if "size" in arg.meta:
                return int(arg.meta["size"].xreplace(self.by_symbol))
            tensors = [
                torch.empty(
                    [int(sympy.sympify(size).xreplace(self.by_symbol)) for size in kind.shape],
                    dtype=kind.dtype,
                    device="meta",
                )
                for kind in output_types(arg)
            ]
            return tensors[0] if "tensor" in arg.meta else tensors

        on_meta = {**fx.node.map_arg(kwargs, empty), **({"device": "meta"} if "device" in kwargs else {})}
        try:
            with torch.no_grad(), seen:
                result = target(*fx.node.map_arg(args, empty), **on_meta)
        except RuntimeError:
            return None
        results = result if isinstance(result, (tuple, list)) else (result,)
        return next(
            (item.dtype for item in results if isinstance(item, torch.Tensor) and item.is_floating_point()), None
        )


class _Calls(TorchDispatchMode):
    """What ops an op is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.targets.append(func)
        return func(*args, **(kwargs or {}))


def has_autocast(target: Any, device: str) -> bool:
    """Does autocast have a kernel for this op on that kind of device?"""
    return isinstance(target, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), f"Autocast{device.upper()}"
    )


class _RegionOutputs(list[Any]):
    """The outputs of an inlined region, in place of the tuple that its call gave."""


def _place(meta: dict[str, Any]) -> dict[str, Any]:
    return {key: meta[key] for key in ("origin", "frames", "owner")}


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def import_graph(module: fx.GraphModule, imports: Imports) -> fx.Graph:
    """The typed graph of an exported module."""
    return _Importer(imports).graph_of(module)
