"""The emitter: from a stage's graph to the program text that a person can read and a rank runs.

It decides nothing. Straight-line code, one statement an op; a blank line and the module path, file, line and source where the user's
line changes; every value's type in one column. The same plan gives the same bytes, and ranks that share a stage share the text but
for the title and COORDS.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopar.printers import PRINTERS, RANDOM
from passes.canonical_rewrite import is_random
from passes.instructions import Instruction
from passes.ir import DTYPE_NAMES, is_state, origin, size_expr, tensor_type
from passes.localize import sharding
from passes.loss import SHARE
from passes.placement import Shard, type_text
from passes.recompute import segment_inputs, segment_of, segment_results, segments_of
from passes.serialize import target_name
from passes.split_backward import deferrable, operands
from passes.step_casts import held_casts, is_held, is_leaf

if TYPE_CHECKING:
    from autopar.plan import Plan, StagePlan

TYPE_COLUMN = 84
_INFIX = {
    operator.mul: "*", operator.add: "+", operator.sub: "-", operator.floordiv: "//",
    operator.mod: "%", operator.truediv: "/", operator.pow: "**",
}  # fmt: skip


def _size_text(node: fx.Node, outer: bool = False) -> str:
    """A size as an expression over the size arguments."""
    if node.op == "placeholder":
        return node.name
    if node.target is int and not isinstance(node.args[0], fx.Node):
        return str(node.args[0])
    symbol = _INFIX.get(node.target)  # type: ignore[arg-type]
    parts = [_size_text(arg, outer=symbol is not None) if isinstance(arg, fx.Node) else repr(arg) for arg in node.args]
    if symbol is None:
        return f"{target_name(node.target).removeprefix('builtins.')}({', '.join(parts)})"
    text = f" {symbol} ".join(parts)
    return f"({text})" if outer else text


class _Body:
    """The statements of one graph."""

    def __init__(self, axes: Sequence[str], in_stage: bool, deferred: Collection[fx.Node] = ()) -> None:
        self.axes, self.in_stage, self.deferred = axes, in_stage, deferred
        self.functions: set[str] = set()
        self.lines: list[str] = []
        self.last_origin: tuple[str, int, str] | None = None

    def argument(self, arg: Any, inside: bool = False) -> str:
        if isinstance(arg, fx.Node):
            if size_expr(arg) is not None:
                return _size_text(arg, outer=not inside)
            if is_state(arg):
                return f'p("{arg.target}")'
            if is_held(arg) and is_leaf(arg):
                return _held_text(arg)
            return arg.name
        if isinstance(arg, (list, tuple)):
            return "[" + ", ".join(self.argument(item, inside=True) for item in arg) + "]"
        if isinstance(arg, torch.device):
            return "self.device" if self.in_stage else "device"
        if isinstance(arg, torch.dtype):
            return f"torch.{str(arg).removeprefix('torch.')}"
        if isinstance(arg, float) and (arg != arg or abs(arg) == float("inf")):
            return f'float("{arg}")'
        if isinstance(arg, str) and arg in self.axes:
            return f"self.{arg}"
        return repr(arg)

    def expression(self, node: fx.Node) -> str:
        if node in self.deferred:
            name = "deferred_linear" if node.target is torch.ops.aten.linear.default else "deferred_matmul"
            self.functions.add(name)
            return f"{name}({', '.join(self.argument(each) for each in operands(node) if each is not None)}, stage=self)"
        if is_held(node):
            self.functions.add("as_cast")
            return f"as_cast({self.argument(node.args[0])}, {_held_text(node)})"
        args = [self.argument(arg) for arg in node.args]
        kwargs = {
            key: self.argument(value)
            for key, value in node.kwargs.items()
            if value is not None
            and not (key == "pin_memory" and value is False)
            and not (key == "layout" and value == torch.strided)
        }
        if isinstance(node.target, torch._ops.OpOverload):
            printer = PRINTERS.get(node.target)
            sharded = any(isinstance(p, Shard) for p in sharding(node).values())
            if node.target not in RANDOM and is_random(node):
                self.functions.add("draw")
                kwargs |= {"stage": "self"} | ({"sharded": "True"} if sharded else {})
                return f"draw({', '.join([_op_text(node.target), *args, *(f'{k}={v}' for k, v in kwargs.items())])})"
            if printer is None:
                return f"{_op_text(node.target)}({', '.join([*args, *(f'{k}={v}' for k, v in kwargs.items())])})"
            if node.target in RANDOM:
                kwargs["sharded"] = str(sharded)
            text = printer(*args, **kwargs)
            for name in ("dropout", "attention_with_dropout"):
                if text.startswith(f"{name}("):
                    self.functions.add(name)
            return text
        name = target_name(node.target).partition(".")[2]
        self.functions.add(name)
        return f"{name}({', '.join([*args, *(f'{k}={v}' for k, v in kwargs.items())])})"

    def statement(self, node: fx.Node) -> None:
        if size_expr(node) is not None or node.target is operator.getitem or is_state(node) or (is_held(node) and is_leaf(node)):
            return
        where = origin(node)
        if str(where) and (where.file, where.line, where.path) != self.last_origin:
            self.lines += ["", f"# {where}"] if self.lines else [f"# {where}"]
            self.last_origin = (where.file, where.line, where.path)
        names = node.name
        kinds = [node]
        if tensor_type(node) is None:
            parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
            count = max((k for k in parts if isinstance(k, int)), default=-1) + 1
            total = max(count, len(node.meta.get("tensors", ())) or _num_results(node))
            names = ", ".join(parts[k].name if k in parts else "_" for k in range(total))
            kinds = [parts[k] for k in sorted(k for k in parts if isinstance(k, int))]
            names += "," if total == 1 else ""
        types = list(dict.fromkeys(self.type_of(kind) for kind in kinds))
        self.lines.append(_with_comment(f"{names} = {self.expression(node)}", "; ".join(types) + _remark(node)))

    @staticmethod
    def type_of(node: fx.Node) -> str:
        kind = tensor_type(node)
        return type_text(kind, sharding(node)) if kind is not None else ""


class _Method:
    """A segment that backward computes again: a method of the stage, and the statement of forward that calls it."""

    def __init__(self, name: str, graph: fx.Graph, axes: Sequence[str], deferred: Collection[fx.Node]) -> None:
        self.name, self.body = name, _Body(axes, in_stage=True, deferred=deferred)
        nodes = [node for node in graph.nodes if segment_of(node) == name]
        self.last = nodes[-1]
        self.inputs, sizes = segment_inputs(nodes)
        self.results = segment_results(nodes)
        self.arguments = [*(node.name for node in self.inputs), *(node.name for node in sizes)]
        self.random = any(is_random(node) for node in nodes)

    def lines(self) -> list[str]:
        """The method."""
        uses_state = any('p("' in line for line in self.body.lines)
        return [
            "", f"    def {self.name}({', '.join(['self', *self.arguments])}):",
            *(["        p = self.p"] if uses_state else []),
            *(("        " + line) if line else "" for line in self.body.lines),
            f"        return {', '.join(node.name for node in self.results)}",
        ]  # fmt: skip

    def call(self) -> str:
        """Its statement in forward."""
        random = ["random=True"] if self.random else []
        call = f"recompute({', '.join([f'self.{self.name}', *self.arguments, *random])})"
        types = "; ".join(dict.fromkeys(_Body.type_of(node) for node in self.results))
        kept = ", ".join(node.name for node in self.inputs) or "nothing"
        return _with_comment(f"{', '.join(node.name for node in self.results)} = {call}", f"{types}; kept: {kept}")


def _held_text(cast: fx.Node) -> str:
    """A cast that is made once a step, as a program asks for it."""
    source, dtype = cast.args
    return f'p("{source.target}", "{DTYPE_NAMES[dtype]}")'  # type: ignore[union-attr, index]


def _num_results(node: fx.Node) -> int:
    sizes = node.args[1] if len(node.args) > 1 else ()
    return len(sizes) if isinstance(sizes, (list, tuple)) else 0


def _remark(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", "")
    partial = node.kwargs.get("partial_gradient")
    if name == "copy_to":
        return "; its gradient is all-reduced"
    if name == "all_reduce":
        return "; its gradient is all-reduced too" if partial else ""
    if name == "pad_shard":
        return "; zeros behind what the rank holds"
    if name == "own_gradient":
        return "; rank 0's gradient counts"
    return ""


def _with_comment(statement: str, comment: str) -> str:
    if not comment:
        return statement
    return f"{statement:<{TYPE_COLUMN}}  # {comment}"


def _op_text(op: Any) -> str:
    name = str(op)
    return name if name.startswith("aten.") else f"torch.ops.{name}"


def _dict_lines(name: str, values: Mapping[str, str], indent: str = "    ") -> list[str]:
    if not values:
        return []
    one = f"{indent}{name} = {{{', '.join(f'{key!r}: {value}' for key, value in values.items())}}}".replace("'", '"')
    if len(one) <= 110:
        return [one]
    return [f"{indent}{name} = {{", *(f'{indent}    "{key}": {value},' for key, value in values.items()), f"{indent}}}"]


def _quoted(values: Mapping[str, str]) -> dict[str, str]:
    return {key: f'"{value}"' for key, value in values.items()}


def _wide_shares(graph: fx.Graph) -> dict[str, str]:
    """The types of the loss shares that are not f32, as those of f64 terms are."""
    shares = [node for node in graph.nodes if node.op == "placeholder" and node.name.startswith(SHARE)]
    types = {node.name: type_text(kind, {}) for node in shares if (kind := tensor_type(node)) is not None}
    return {name: text for name, text in types.items() if text != "f32[]"}


def emit_stage(stage: StagePlan, plan: Plan) -> tuple[str, set[str]]:
    """The class of a stage, and the runtime functions it calls."""
    graph = stage.graph_module.graph
    deferred = deferrable(graph) if plan.splits_backward else frozenset()
    body = _Body(tuple(plan.mesh), in_stage=True, deferred=deferred)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    received = [node.name for node in placeholders if "received" in node.meta]
    keywords = [node.name for node in placeholders if "received" not in node.meta]
    methods = {name: _Method(name, graph, tuple(plan.mesh), deferred) for name in segments_of(graph)}
    for node in graph.nodes:
        method = methods.get(segment_of(node))
        if method is not None:
            method.body.statement(node)
            if node is method.last:
                body.lines += ["", f"# {method.name}: computed again in backward", method.call()]
                body.last_origin = None
        elif node.op == "call_function":
            body.statement(node)
    output = next(node for node in graph.nodes if node.op == "output")
    results = output.args[0] if isinstance(output.args[0], (list, tuple)) else (output.args[0],)
    returned = [body.argument(value) for value in results]
    lines = [f"class Stage{stage.index}(StageModule):"]
    declarations = [
        _dict_lines("PARAMS", _quoted(stage.parameters)),
        _dict_lines("CASTS", _quoted(held_casts(graph))),
        _dict_lines("BUFFERS", _quoted(stage.buffers)),
        _dict_lines("INPUTS", _quoted(stage.inputs)),
        _dict_lines("RECEIVES", {
            name: f'Receive(source={value.source}, type="{value.type}"{"" if value.gradient else ", gradient=False"})'
            for name, value in stage.receives.items()
        }),
        _dict_lines("SENDS", {
            name: f'Send(to={value.to!r}, type="{value.type}"{"" if value.gradient else ", gradient=False"})'
            for name, value in stage.sends.items()
        }),
        _dict_lines("OUTPUTS", _quoted(stage.outputs)),
        _dict_lines("SHARES", _quoted(_wide_shares(graph))),
        [f"    PARTIAL_GRADIENTS = {_tuple_text(stage.partial_gradients)}"] if stage.partial_gradients else [],
        _dict_lines("TIED", {name: repr(stages) for name, stages in stage.tied.items()}),
        [f"    TIED_EXACT = {plan.tied_exact}"] if stage.tied and not plan.tied_exact else [],
        [f"    OWN_BUFFERS = {_tuple_text(own)}"] if (own := _own_buffers(stage, plan)) else [],
        [f"    UPDATED_BUFFERS = {_tuple_text(updated)}"] if (updated := _updated_buffers(stage, plan)) else [],
    ]  # fmt: skip
    for declaration in declarations:
        lines += declaration
    arguments = ["self", *received] + (["*", *keywords] if keywords else [])
    lines += ["", f"    def forward({', '.join(arguments)}):"]
    lines += ["        p = self.p"] if stage.parameters or stage.buffers else []
    for name in received:
        lines.append(
            "        "
            + _with_comment(f"# {name}: from stage {stage.receives[name].source}", stage.receives[name].type).strip()
        )
    lines += [("        " + line) if line else "" for line in body.lines]
    lines.append(f"        return {_returned(returned)}")
    for method in methods.values():
        lines += method.lines()
        body.functions |= {"recompute"} | method.body.functions
    return "\n".join(lines), body.functions


def _own_buffers(stage: StagePlan, plan: Plan) -> tuple[str, ...]:
    """The buffers that this stage updates and an earlier one of its rank as well: each has a copy, as on two ranks."""
    earlier = {
        name
        for other in plan.stages[: stage.index]
        if plan.stage_ranks[other.index] == plan.stage_ranks[stage.index]
        for name in other.buffers
    }
    nodes = stage.graph_module.graph.nodes if earlier else ()
    updated = {name for node in nodes for name in node.meta.get("mutates", ())}
    return tuple(name for name in stage.buffers if name in earlier and name in updated)


def _updated_buffers(stage: StagePlan, plan: Plan) -> tuple[str, ...]:
    """The buffers that replicas update, each by its own rows."""
    nodes = stage.graph_module.graph.nodes if plan.mesh.get("dp", 1) > 1 else ()
    updated = {name for node in nodes for name in node.meta.get("mutates", ())}
    return tuple(name for name in stage.buffers if name in updated)


def _returned(values: Sequence[str]) -> str:
    return "()" if not values else f"({values[0]},)" if len(values) == 1 else ", ".join(values)


def _tuple_text(values: Sequence[str]) -> str:
    return "(" + ", ".join(f'"{value}"' for value in values) + ("," if len(values) == 1 else "") + ")"


def emit_loss_weights(plan: Plan) -> tuple[str, set[str]]:
    """The function that weighs the loss terms of a microbatch."""
    module = plan.loss_weights
    if module is None:
        return "", set()
    body = _Body((), in_stage=False)
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    for node in module.graph.nodes:
        if node.op == "call_function":
            body.statement(node)
    output = next(node for node in module.graph.nodes if node.op == "output")
    returned = [body.argument(value, inside=True) for value in output.args[0]]
    # what stages have as self.p and self.device
    text = re.sub(r"#.*", "", "\n".join([*body.lines, *returned]))
    names += [name for name, use in (("p", 'p("'), ("device", "device=device")) if use in text]
    lines = [
        f"def loss_weights({'*, ' + ', '.join(names) if names else ''}):",
        '    """What each loss term of a microbatch counts in the batch\'s loss."""',
        *(("    " + line) if line else "" for line in body.lines),
        f"    return {_returned(returned)}",
    ]
    return "\n".join(lines), body.functions


_INSTRUCTION_WIDTH = 110


def _schedule_text(name: str, instructions: Sequence[Instruction]) -> str:
    lines, line = [f"{name} = ["], "   "
    for instruction in instructions:
        text = f" {instruction!r},"
        if len(line) + len(text) > _INSTRUCTION_WIDTH:
            lines.append(line)
            line = "   "
        line += text
    return "\n".join([*lines, line, "]"])


def emit_program(plan: Plan, rank: int) -> str:
    """The program of a rank: what `plan.source(rank)` returns."""
    coords, stages = plan.coords(rank), plan.rank_stages(rank)
    emitted = [emit_stage(stage, plan) for stage in stages]
    class_texts, functions = [text for text, _ in emitted], set().union(*(used for _, used in emitted))
    shares = any("loss_share" in node.meta for stage in stages for node in stage.graph_module.graph.nodes)
    weights_text, more = emit_loss_weights(plan) if shares else ("", set())
    lists = {"SCHEDULE": plan.instructions[coords["pp"]]}
    if len(stages) > 1:
        lists["EVALUATION"] = plan.evaluation[coords["pp"]]
    instructions = {type(instruction).__name__ for listed in lists.values() for instruction in listed}
    imports = sorted(
        functions | more | instructions | {"StageModule"}
        | ({"Receive"} if any(stage.receives for stage in stages) else set())
        | ({"Send"} if any(stage.sends for stage in stages) else set())
    )  # fmt: skip
    shard = "".join(
        f", {what} {coords[axis]} of {plan.mesh[axis]}"
        for axis, what in (("tp", "tensor shard"), ("dp", "replica"))
        if plan.mesh.get(axis, 1) > 1
    )
    numbers = " and ".join(str(stage.index) for stage in stages)
    text = re.sub(r"#.*", "", "\n".join((*class_texts, weights_text)))
    placed = f"\nSTAGE_RANKS = {plan.stage_ranks!r}" if len(stages) > 1 else ""
    zero = f"\nZERO = {plan.zero}" if plan.zero else ""
    parts = [
        f'"""Rank {rank} of {plan.num_ranks}: pipeline stage{"s" if len(stages) > 1 else ""} {numbers} of {len(plan.stages)}'
        f'{shard}. Emitted by autopar from {plan.model} (plan {plan.identity})."""',
        "\n".join(
            [
                *(["import math"] if "math." in text else []),
                *(["import torch"] if "torch." in text or "aten." in text else []),
                *(["import torch.nn.functional as F"] if " F." in text or "(F." in text else []),
                "",
                *_import_lines(imports),
                *(["", "aten = torch.ops.aten"] if "aten." in text else []),
            ]
        ).strip("\n"),
        f"MESH = {_json_dict(plan.mesh)}\nCOORDS = {_json_dict(coords)}\nBATCH = {_json_dict(plan.inputs)}{placed}{zero}",
    ]
    body = parts[0] + "\n" + parts[1] + "\n\n" + parts[2] + "\n"
    for class_text in (*class_texts, *([weights_text] if weights_text else [])):
        body += "\n\n" + class_text + "\n"
    body += "\n\n" + "\n\n".join(_schedule_text(name, listed) for name, listed in lists.items()) + "\n"
    return body


def _import_lines(names: Sequence[str]) -> list[str]:
    one = f"from autopar.program import {', '.join(names)}"
    if len(one) <= 110:
        return [one]
    return ["from autopar.program import (", *(f"    {name}," for name in names), ")"]


def _json_dict(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f'"{k}": ' + (f'"{v}"' if isinstance(v, str) else repr(v)) for k, v in values.items()) + "}"
