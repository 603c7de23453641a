"""Names for values in emitted programs: those that the user's own code gives them.

Each node knows the stack of user statements it ran under, outermost first. A statement is *closed* when the next node
runs under another one; its last value is what it computed, and takes the name it is assigned to: `h` for `h =
F.gelu(self.up(x))`, and `q`, `k`, `v` by piece for `q, k, v = self.qkv(x).split(C, dim=2)`. The innermost assignment
wins. A value that a module returns takes the module's name in its parent (`attn` for `self.attn`), one that a function
returns the function's name, a value from a library module that module's name (`ln1`), and the rest are called after
their op. Names repeat over layers and get a numbered suffix, so one name is one value. Nothing here changes what is
computed.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import linecache
import operator
import re
from dataclasses import dataclass, field

import sympy
from torch import fx

from passes.canonical_rewrite import op_name
from passes.ir import origin, size_expr

Frame = tuple[str, int, str]  # file, line, function

_OP_NAMES = {
    "scaled_dot_product_attention": "attention", "split_with_sizes": "pieces", "slice": "part", "index": "indexed",
    "sum": "total", "pow": "power", "max": "largest", "min": "smallest", "abs": "absolute", "all": "every",
    "any": "some", "round": "rounded", "add": "added", "mul": "product", "mm": "product", "bmm": "product",
    "matmul": "product", "to": "cast", "_to_copy": "cast",
}  # fmt: skip
RESERVED = frozenset({"torch", "F", "aten", "self", "p", "device", "forward", "math", "operator"})  # in programs
_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)


@dataclass(frozen=True)
class _Statement:
    """A simple statement of the user's: where it begins, the names it assigns (one, or one per piece), whether it
    returns."""

    file: str
    line: int
    targets: tuple[str, ...] = ()
    is_tuple: bool = False
    returns: bool = False


@dataclass
class _Open:
    statement: _Statement
    function: str
    nodes: list[fx.Node] = field(default_factory=list)


class _Sources:
    """The statement at a line of a file, multi-line statements included."""

    def __init__(self) -> None:
        self._by_file: dict[str, dict[int, _Statement]] = {}

    def statement(self, frame: Frame) -> _Statement:
        file, line, _ = frame
        if file not in self._by_file:
            self._by_file[file] = self._read(file)
        return self._by_file[file].get(line, _Statement(file, line))

    @staticmethod
    def _read(file: str) -> dict[int, _Statement]:
        try:
            tree = ast.parse("".join(linecache.getlines(file)))
        except SyntaxError:  # a notebook cell with magics: lines are then statements without a target
            return {}
        found: dict[int, _Statement] = {}
        for part in ast.walk(tree):
            if isinstance(part, _SIMPLE):
                targets, is_tuple = _targets(part)
                statement = _Statement(file, part.lineno, targets, is_tuple, isinstance(part, ast.Return))
                found.update(dict.fromkeys(range(part.lineno, (part.end_lineno or part.lineno) + 1), statement))
        return found


def _targets(part: ast.stmt) -> tuple[tuple[str, ...], bool]:
    if isinstance(part, ast.Assign):
        target: ast.expr = part.targets[0]
    elif isinstance(part, (ast.AugAssign, ast.AnnAssign)):
        target = part.target
    else:
        return (), False
    if isinstance(target, (ast.Tuple, ast.List)):
        return tuple(_target_name(item) for item in target.elts), True
    name = _target_name(target)
    return ((name,) if name else ()), False


def _target_name(target: ast.expr) -> str:
    if isinstance(target, ast.Name):
        return "" if target.id == "_" else target.id
    if isinstance(target, ast.Attribute):
        return target.attr
    return _target_name(target.value) if isinstance(target, (ast.Subscript, ast.Starred)) else ""


def readable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A unique Python identifier for every node but the output; the same graph gives the same names."""
    wanted = _assigned_names(graph)
    names: dict[fx.Node, str] = {}
    taken = {*RESERVED, *keyword.kwlist, *dir(builtins)}
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = str(node.target)
            taken.add(names[node])
    last_of_module = {
        (node.meta.get("owner"), origin(node).path): node for node in graph.nodes if node.op == "call_function"
    }
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        base = _identifier(wanted.get(node) or _fallback(node, last_of_module))
        name = base
        while name in taken:
            counts[base] = counts.get(base, 0) + 1
            name = f"{base}_{counts[base]}"
        names[node] = name
        taken.add(name)
    return names


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"value_{name}" if not name or name[0].isdigit() else name


def _assigned_names(graph: fx.Graph) -> dict[fx.Node, str]:
    sources, names = _Sources(), dict[fx.Node, str]()
    stack: list[_Open] = []
    for node in graph.nodes:
        frames: tuple[Frame, ...] = node.meta.get("frames", ())
        if node.op != "call_function" or not frames or "size" in node.meta:
            continue
        statements = [sources.statement(frame) for frame in frames]
        same = 0
        while same < min(len(stack), len(statements)) and stack[same].statement == statements[same]:
            same += 1
        if 0 < same < min(len(stack), len(statements)) and _starts_again(stack[same], statements[same], node):
            same -= 1  # a loop: the statement above runs once more
        _close(stack, same, names)
        stack += [_Open(statement, frame[2]) for statement, frame in zip(statements[same:], frames[same:], strict=True)]
        for open_statement in stack:
            open_statement.nodes.append(node)
    _close(stack, 0, names)
    return names


def _starts_again(before: _Open, statement: _Statement, node: fx.Node) -> bool:
    """True if the same function is entered for another module: its lines begin anew under another path."""
    earlier = statement.file == before.statement.file and statement.line <= before.statement.line
    owner, last = node.meta.get("owner", ""), before.nodes[-1].meta.get("owner", "")
    return earlier and owner != last and not last.startswith(f"{owner}.")


def _close(stack: list[_Open], depth: int, names: dict[fx.Node, str]) -> None:
    """End the statements from `depth` on, innermost first, and name what they computed."""
    while len(stack) > depth:
        done = stack.pop()
        last, statement = done.nodes[-1], done.statement
        if statement.is_tuple:
            for node in done.nodes:
                index = _piece_index(node)
                if index is not None and index < len(statement.targets):
                    names.setdefault(node, statement.targets[index])
        elif statement.targets:
            names.setdefault(last, statement.targets[0])
        elif statement.returns:
            leaf = _leaf(last.meta.get("owner", "")) if done.function == "forward" else done.function.strip("<>")
            if leaf and stack:
                names.setdefault(last, leaf)


def _piece_index(node: fx.Node) -> int | None:
    """Which piece of a tuple a value is; also where an unbind took the piece's dim away."""
    piece = node.args[0] if op_name(node.target) == "squeeze" else node
    if not isinstance(piece, fx.Node) or piece.target is not operator.getitem:
        return None
    index = piece.args[1]
    return index if isinstance(index, int) else None


def _leaf(path: str) -> str:
    """The module's name in its parent; "" for the root and for members of a list, whose name is a number."""
    leaf = path.rpartition(".")[2]
    return "" if leaf.isdigit() else leaf


def _fallback(node: fx.Node, last_of_module: dict[tuple[str | None, str], fx.Node]) -> str:
    if node.op == "get_attr":
        return str(node.target).replace(".", "_")
    expr = size_expr(node)
    if expr is not None:
        return _size_name(expr)
    owner, path = node.meta.get("owner"), origin(node).path
    module = _leaf(path) or "_".join(path.split(".")[-2:])
    in_library_module = owner is not None and owner != path and path
    if in_library_module and node.meta.get("fused"):
        return f"{module}_out"
    last = last_of_module[owner, path]
    if in_library_module and (node is last or node.name == last.meta.get("bias_of")):
        return module
    if node.target is operator.getitem:
        return "piece"
    name = op_name(node.target) or getattr(node.target, "__name__", "value").partition(".")[0]
    return _OP_NAMES.get(name, name.strip("_"))


def _size_name(expr: sympy.Expr) -> str:
    words = {"//": "_over_", "*": "_times_", "+": "_plus_", "-": "_minus_", "/": "_over_", " ": "", "(": "", ")": ""}
    text = str(expr)
    for sign, word in words.items():
        text = text.replace(sign, word)
    return f"size_{text}" if text[:1].isdigit() or text.startswith("_") else text
