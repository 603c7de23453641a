"""A model and example arguments in, a canonical graph out. The user's model is left as it was found.

One front end: `torch.export.export(strict=False)`, which runs the user's own Python once on fake tensors and records
ATen ops. It exports a thin module that shares the model's parameters under their own names and takes the tensors of the
arguments as a flat list. So this file decides what an argument is called, nested structures and keyword-only tensors
need no special case, and a `loss_fn` joins the graph without a prefix on any name.

Sizes stay symbolic where the model lets them: dim 0 shared by the inputs is `B`, dim 1 of integer inputs is `T`
(further lengths `S1`, `S2`). Export gives each input dim a symbol of its own and keeps those the model does not pin;
dims of one role must stay symbolic together, else the role's size is fixed. A batch of one row is traced with two,
because export fixes sizes of one.

Traps that this file is about: example tensors that are one object would become one input (each is its own here); a
custom autograd.Function would lose its backward without a word (refused); modules that keep tensors in plain
attributes, as recurrent layers do, would keep fake ones (put back); a key-value cache is an output that is no tensor
(switched off unless asked for).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from autopar.held_model import without_values
from autopar.precision import PRECISIONS, Precision
from autopar.trace_arguments import Path, Signature, dotted, input_names
from autopar.trace_export import export, is_model_file, place
from autopar.trace_models import check_model, inner_model
from autopar.trace_precision import InDtype, autocast_device, computing, replacement, traceable
from autopar.trace_values import opened
from costmodel.errors import BadArgument, CaptureError
from passes.canonical_import import Imports, State
from passes.canonicalize import canonicalize
from passes.ir import TensorType, size_symbol, tensor_type

CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)  # leaves of an output that are no tensors


@dataclass(frozen=True)
class Input:
    """A tensor input: its type and its place among the arguments (a parameter of forward, then keys and indices)."""

    type: TensorType
    path: Path


@dataclass(frozen=True)
class Traced:
    """A traced model: the canonical graph and the way between real calls and its placeholders and outputs."""

    graph_module: fx.GraphModule
    inputs: dict[str, Input]
    sizes: dict[str, int]  # symbolic sizes and their values in the example
    limits: dict[str, tuple[int, int | None]]  # least and greatest value of a symbolic size, where the model bounds it
    state: Mapping[str, torch.Tensor]  # every parameter and buffer of the user's model, under its first name
    aliases: dict[str, tuple[str, ...]]  # further names of tied parameters and shared buffers, by the first name
    constants: dict[str, torch.Tensor]  # tensors the graph reads that are neither
    output_leaves: tuple[
        Any, ...
    ]  # per leaf of the model's output: the graph node that gives it, or its constant value
    output_spec: pytree.TreeSpec
    loss: fx.Node | None  # the scalar that a training step minimises
    baked: dict[Path, Any]  # arguments that are not tensors: the graph holds for these values only
    signature: Signature
    precision: Precision = PRECISIONS["fp32"]
    autocast_device: str = "cpu"  # whose list of casts a mixed precision's graph has

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call by placeholder name. BadArgument if the call is not of the traced form."""
        leaves = self.signature.leaves(args, kwargs)
        found: dict[str, torch.Tensor] = {}
        for name, value in self.inputs.items():
            if not isinstance(leaves.get(value.path), torch.Tensor):
                given = ", ".join(map(dotted, leaves)) or "nothing"
                raise BadArgument(
                    f"the argument {dotted(value.path)} is missing",
                    why=f"the model was traced with it; given: {given}",
                )
            found[name] = leaves.pop(value.path)
            if self.precision.state is not None and found[name].is_floating_point():
                found[name] = found[name].to(self.precision.state)
        for path, leaf in leaves.items():
            if isinstance(leaf, torch.Tensor):
                raise BadArgument(
                    f"unexpected argument {dotted(path)}", why=f"the model was traced with {', '.join(self.inputs)}"
                )
            if (leaf is not None and path not in self.baked) or leaf != self.baked.get(path):
                traced = self.baked.get(path)
                raise BadArgument(
                    f"the argument {dotted(path)} is {leaf!r}, and was {traced!r} when the model was traced",
                    why="values that are not tensors are part of the traced program",
                )
        return found

    def release(self, names: Collection[str]) -> None:
        """Keep no values of the parameters of these names."""
        state = self.state.held if isinstance(self.state, InDtype) else self.state
        assert isinstance(state, dict)
        released = {
            id(tensor): without_values(tensor)
            for name, tensor in state.items()
            if name in names and isinstance(tensor, nn.Parameter) and not tensor.is_meta
        }
        graph = self.graph_module
        tables: list[dict[str, Any]] = [state, *(each._parameters for each in graph.modules()), *(n.meta for n in graph.graph.nodes)]
        for table in tables:
            for name, tensor in table.items():
                if id(tensor) in released:
                    table[name] = released[id(tensor)]

    def size_values(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The symbolic sizes of these inputs. BadArgument where dtypes or shapes are not those of the traced form."""
        values: dict[str, int] = {}
        for name, value in self.inputs.items():
            tensor, kind = tensors[name], value.type
            if tensor.dim() != len(kind.shape) or tensor.dtype != kind.dtype:
                raise BadArgument(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, traced as {kind.dtype} {kind.shape}"
                )
            for dim, (size, expected) in enumerate(zip(tensor.shape, kind.shape, strict=True)):
                known = values.setdefault(str(expected), size) if isinstance(expected, sympy.Symbol) else expected
                if size != known:
                    raise BadArgument(
                        f"dim {dim} of {name} is {size}; {known} is needed", why=f"it was traced as {kind.shape}"
                    )
        for name, (least, greatest) in self.limits.items():
            if name in values and (values[name] < least or (greatest is not None and values[name] > greatest)):
                raise BadArgument(
                    f"{name} = {values[name]} is outside of {least}..{greatest}", why="the traced model branches there"
                )
        return values

    def unflatten(self, values: Mapping[fx.Node, Any]) -> Any:
        """The model's output, from the values of the nodes in `output_leaves`."""
        leaves = [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in self.output_leaves]
        return pytree.tree_unflatten(leaves, self.output_spec)


@dataclass
class _Output:
    """What forward returned while it was traced; the graph keeps only the tensors."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    loss: int | None  # position among the graph's outputs


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    loss_fn: Callable[..., Any] | None = None,
    precision: Precision = PRECISIONS["fp32"],
    device: torch.device | None = None,
) -> Traced:
    """Trace `model(*args, **kwargs)`, and `loss_fn(output, *targets)` if given, in a precision.

    `device`: where it will compute, which decides what autocast casts (None: where the model is).

    CaptureError if forward cannot be one graph, with the user's line; BadArgument if the arguments do not fit forward.
    """
    check_model(model)
    device = traceable(device)
    inner = inner_model(model)
    signature = Signature(inner, loss_fn)
    leaves = signature.leaves(args, kwargs)
    paths = [path for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)]
    examples = _own_tensors([leaves[path] for path in paths], model)
    roles, hints = _roles(examples)
    output: list[_Output] = []
    where = device if device is not None else next((tensor.device for tensor in model.parameters()), None)

    def run(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        bound, targets = signature.rebuild(args, kwargs, tensors)
        with computing(precision, where):
            result = inner(*bound.args, **bound.kwargs)
            loss = loss_fn(result, *targets.values()) if loss_fn is not None else None
        output[:] = [_described(result, loss)]
        tensor_leaves = [leaf for leaf in output[0].leaves if isinstance(leaf, (torch.Tensor, torch.SymInt))]
        return (*tensor_leaves, loss) if loss is not None else tuple(tensor_leaves)

    exported, roles = export(model, run, examples, roles, lambda: replacement(model, precision, device))
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    names = input_names(paths, set(hints))
    symbols, sizes = _symbols(module, roles, hints)
    state, aliases = _named_state(model, precision)
    states, constants = _states(model, module, state, aliases)
    _refuse_unknown_sizes(module, symbols)
    canonical = canonicalize(module, Imports(tuple(names), sizes, symbols, states))

    result = output[0]
    outputs = list(next(iter(reversed(canonical.graph.nodes))).args[0])
    given = iter(outputs)
    output_leaves = [next(given) if isinstance(leaf, (torch.Tensor, torch.SymInt)) else leaf for leaf in result.leaves]
    placeholders = [node for node in canonical.graph.nodes if node.op == "placeholder"]
    kinds = [tensor_type(node) for node in placeholders[: len(names)]]
    return Traced(
        graph_module=canonical,
        inputs={
            name: Input(kind, path) for name, kind, path in zip(names, kinds, paths, strict=True) if kind is not None
        },
        sizes=sizes,
        limits=_limits(exported, canonical, symbols),
        state=state,
        aliases=aliases,
        constants={name: tensor for name, tensor in constants.items() if _reads(canonical, name)},
        output_leaves=tuple(output_leaves),
        output_spec=result.spec,
        loss=outputs[result.loss] if result.loss is not None else None,
        baked={path: leaf for path, leaf in leaves.items() if not isinstance(leaf, torch.Tensor)},
        signature=signature,
        precision=precision,
        autocast_device=autocast_device(where),
    )


def _own_tensors(tensors: list[torch.Tensor], model: nn.Module) -> list[torch.Tensor]:
    """Example tensors that are no graph's and nobody else's, on the device of the model."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    own = []
    for tensor in tensors:
        fresh = tensor.detach()  # an object of its own, also where two arguments are one tensor
        if device is not None and device.type != fresh.device.type and "meta" in (device.type, fresh.device.type):
            fresh = torch.zeros_like(fresh, device=device)
        own.append(fresh)
    return own


def _roles(tensors: list[torch.Tensor]) -> tuple[dict[tuple[int, int], str], dict[str, int]]:
    """The symbolic size that each (input, dim) may become, and the example's value of each."""
    roles: dict[tuple[int, int], str] = {}
    first = [tensor.shape[0] for tensor in tensors if tensor.dim() > 0]
    lengths: dict[int, str] = {}
    for tensor in tensors:
        if tensor.dim() >= 2 and not tensor.is_floating_point() and tensor.shape[1] > 1:
            lengths.setdefault(tensor.shape[1], f"S{len(lengths)}" if lengths else "T")
    batch = max(first, key=first.count) if first else 0
    for index, tensor in enumerate(tensors):
        for dim, size in enumerate(tensor.shape):
            if dim == 0 and size == batch:
                roles[index, dim] = "B"
            elif size in lengths and (dim < 2 or not tensor.is_floating_point()):
                roles[index, dim] = lengths[size]
    hints = {"B": batch} if "B" in roles.values() else {}
    return roles, hints | {name: size for size, name in lengths.items()}


def _described(result: Any, loss: torch.Tensor | None) -> _Output:
    leaves, spec = pytree.tree_flatten(opened(result))
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, torch.SymInt, *CONSTANTS)):
            raise CaptureError(
                f"forward returns a {type(leaf).__name__}, which holds no tensor that a graph can give",
                use="tuples, lists, dicts and dataclasses of tensors, or a registered pytree; for a cache: use_cache=False",
            )
    outputs = [leaf for leaf in leaves if isinstance(leaf, (torch.Tensor, torch.SymInt))]
    if loss is not None:
        if not _is_loss(loss):
            raise BadArgument("loss_fn does not return a scalar floating tensor")
        return _Output(leaves, spec, len(outputs))
    candidate = result
    if isinstance(result, Mapping):
        candidate = result.get("loss")
    elif isinstance(getattr(result, "loss", None), torch.Tensor):
        candidate = result.loss
    elif isinstance(result, (tuple, list)):
        candidate = result[0] if result else None
    place = next((i for i, leaf in enumerate(outputs) if leaf is candidate), None)
    return _Output(leaves, spec, place if _is_loss(candidate) else None)


def _is_loss(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()


def _symbols(
    module: fx.GraphModule, roles: dict[tuple[int, int], str], hints: dict[str, int]
) -> tuple[dict[sympy.Symbol, sympy.Expr], dict[str, int]]:
    """Our expression for each of export's symbols, and the sizes that stayed symbolic with the example's values."""
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    symbols: dict[sympy.Symbol, sympy.Expr] = {}
    fixed: set[str] = set()
    for (index, dim), name in roles.items():
        size = values[index].shape[dim]
        expr = size.node.expr if isinstance(size, torch.SymInt) else None
        if isinstance(expr, sympy.Symbol):
            symbols.setdefault(expr, size_symbol(name))
        else:
            fixed.add(name)
            if (
                expr is not None and expr.free_symbols
            ):  # a multiple of a symbol of export's own: the model needs divisible sizes
                root = next(iter(expr.free_symbols))
                symbols[root] = next(iter(sympy.solve(expr - _traced_hint(name, hints), root)))
    for symbol, expr in symbols.items():
        if str(expr) in fixed:
            symbols[symbol] = sympy.Integer(_traced_hint(str(expr), hints))
    kept = {str(expr) for expr in symbols.values()}
    return symbols, {name: hint for name, hint in hints.items() if name in kept}


def _traced_hint(name: str, hints: dict[str, int]) -> int:
    return max(hints[name], 2)  # one row was traced as two


def _refuse_unknown_sizes(module: fx.GraphModule, symbols: Mapping[sympy.Symbol, sympy.Expr]) -> None:
    """CaptureError if a size or a number comes from a tensor's values (`.item()`, nonzero): export gives it a symbol of
    its own. What only checks read does not count."""
    needed: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op == "output" or node in needed or getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            needed.update((node, *node.all_input_nodes))
    for node in (node for node in module.graph.nodes if node in needed):
        value = node.meta.get("val")
        parts = [value] if not isinstance(value, (list, tuple)) else list(value)
        sizes = [size for part in parts for size in (part.shape if isinstance(part, torch.Tensor) else [part])]
        for size in sizes:
            if isinstance(size, (torch.SymInt, torch.SymFloat)) and not size.node.expr.free_symbols <= set(symbols):
                frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
                inner = [(file, int(line)) for file, line in frames if is_model_file(file)]
                raise CaptureError(
                    "forward cannot be captured as one graph",
                    where=place(*inner[-1]) if inner else None,
                    why="a number or a size is read from the values of a tensor here; they are not known before a step",
                    use="a tensor operation such as torch.where, or a number passed to forward",
                )


def _named_state(
    model: nn.Module, precision: Precision
) -> tuple[Mapping[str, torch.Tensor], dict[str, tuple[str, ...]]]:
    """Every parameter and buffer once, under its first name; and the further names."""
    first: dict[int, str] = {}
    state: dict[str, torch.Tensor] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in (pair for group in named for pair in group):
        if id(tensor) in first:
            aliases[first[id(tensor)]] = (*aliases.get(first[id(tensor)], ()), name)
        else:
            first[id(tensor)] = name
            state[name] = tensor
    return state if precision.state is None else InDtype(state, precision.state), aliases


def _states(
    model: nn.Module, module: fx.GraphModule, state: Mapping[str, torch.Tensor], aliases: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, State], dict[str, torch.Tensor]]:
    """What stands behind each get_attr target of the exported module; and the constants under names of their own."""
    first = {alias: name for name, others in aliases.items() for alias in others} | {name: name for name in state}
    transient = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in model.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    states: dict[str, State] = {}
    constants: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op != "get_attr" or target in states:
            continue
        if target in first:
            name = first[target]
            kind = "parameter" if name in parameters else "buffer"
            states[target] = State(name, kind, state[name], aliases.get(name, ()), name not in transient)
            continue
        tensor = _attribute(module, target)
        if not isinstance(tensor, torch.Tensor):
            continue  # the body of an inlined region
        if tensor.requires_grad:
            raise CaptureError(
                f"the tensor {target} requires a gradient but is no parameter of the model",
                why="no optimizer and no state_dict would see it",
                use="torch.nn.Parameter",
            )
        if id(tensor) not in names:
            counter = len(constants)
            while f"constant_{counter}" in first:
                counter += 1
            names[id(tensor)] = f"constant_{counter}"
            constants[f"constant_{counter}"] = tensor
        states[target] = State(names[id(tensor)], "constant", tensor)
    return states, constants


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _reads(module: fx.GraphModule, name: str) -> bool:
    return any(node.op == "get_attr" and node.target == name for node in module.graph.nodes)


def _limits(
    exported: torch.export.ExportedProgram, module: fx.GraphModule, symbols: Mapping[sympy.Symbol, sympy.Expr]
) -> dict[str, tuple[int, int | None]]:
    """Bounds of symbolic sizes: those that export found branches on, and those of folded masks."""
    limits: dict[str, tuple[int, int | None]] = {}

    def narrow(name: str, least: int, greatest: int | None) -> None:
        old_least, old_greatest = limits.get(name, (1, None))
        bounds = [bound for bound in (greatest, old_greatest) if bound is not None]
        limits[name] = (max(least, old_least), min(bounds) if bounds else None)

    for symbol, bounds in exported.range_constraints.items():
        expr = symbols.get(symbol)
        if isinstance(expr, sympy.Symbol):
            upper = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**62 else None
            least = (
                int(bounds.lower) if bounds.lower > 2 else 1
            )  # 2 is only export's own: it does not tell 1 from broadcasting
            narrow(str(expr), least, upper)
    for node in module.graph.nodes:
        for name, greatest in node.meta.get("size_limits", {}).items():
            narrow(name, 1, greatest)
    return {name: bound for name, bound in limits.items() if bound != (1, None)}
