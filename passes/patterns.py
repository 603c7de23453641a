"""The annotations of op rules that depend on the call: its ranks, its dims, its flags. Each function gives the text
for one call (contractions and losses: `passes.contraction_patterns`).

Written out, the annotations are those of `passes.annotation`; names are `d0 d1 ...` for the dims of the first argument.
A dim stays whole (`[d1]`) where the op looks across it, or where splitting it would need other arguments than the whole
op's (group counts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.annotation import factor
from passes.ir import Size, TensorType, output_types, size_expr, tensor_inputs, tensor_type

aten = torch.ops.aten
Op = Any  # torch._ops.OpOverload has no public name


@dataclass(frozen=True)
class Call:
    """One call as a rule sees it: arguments with tensors replaced by their types, sizes by their expressions."""

    op: Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def rank(self, index: int = 0) -> int:
        """Number of dims of a tensor argument."""
        return len(self.inputs[index].shape)


Text = (
    str | tuple[str, tuple[tuple[str, Size], ...]]
)  # an annotation, with the sizes of names that occur only inside others
Pattern = Callable[[Call], Text]


def call_of(node: fx.Node) -> Call:
    """The call of a node."""

    def plain(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return tensor_type(arg) if tensor_type(arg) is not None else size_expr(arg)
        if isinstance(arg, (list, tuple)):
            return tuple(plain(item) for item in arg)
        return arg

    inputs = tuple(value for value in map(tensor_type, tensor_inputs(node)) if value is not None)
    kwargs = {key: plain(value) for key, value in node.kwargs.items()}
    return Call(node.target, tuple(plain(arg) for arg in node.args), kwargs, inputs, output_types(node))


def dim_names(count: int, prefix: str = "d") -> list[str]:
    """d0 d1 d2 ..."""
    return [f"{prefix}{k}" for k in range(count)]


def _bracketed(names: Sequence[str], whole: Sequence[int] | set[int]) -> str:
    return " ".join(f"[{name}]" if k in whole else name for k, name in enumerate(names))


def _dims(given: Any, rank: int) -> set[int]:
    """A `dim` argument as positions: an int, several, or all where none are given."""
    if given is None or given == ():
        return set(range(rank))
    return {dim % rank if rank else 0 for dim in ((given,) if isinstance(given, int) else given)}


# ---- every dim alike, or none
# -----------------------------------------------------------------------------------------


def elementwise(call: Call) -> str:
    """Any dim may be split; arguments broadcast."""
    return ", ".join(["..."] * len(call.inputs)) + " -> " + ", ".join(["..."] * len(call.outputs))


def all_whole(call: Call) -> str:
    """Nothing may be split."""
    sides = [[" ".join(f"[{side}{k}_{d}]" for d in range(len(v.shape))) for k, v in enumerate(values)]
             for side, values in (("x", call.inputs), ("y", call.outputs))]  # fmt: skip
    return f"{', '.join(sides[0])} -> {', '.join(sides[1])}"


def like_first(call: Call) -> str:
    """Elementwise in the first argument; the others only say what type to make."""
    others = all_whole(call).partition(" -> ")[0].split(",")[1:]
    return ",".join(["... ", *others]) + " -> ..."


def per_channel(call: Call) -> str:
    """Elementwise, with a parameter that has one value, or one per dim 1."""
    names = dim_names(call.rank())
    second = "1" if call.inputs[1].shape == (1,) else names[1] if call.rank(1) else ""
    return f"{' '.join(names)}, {second} -> {' '.join(names)}"


# ---- views
# ------------------------------------------------------------------------------------------------------------


def reshape(call: Call) -> Text:
    """Names by matching factors of the two shapes."""
    return factor(call.inputs[0].shape, call.outputs[0].shape)


def squeeze(call: Call) -> str:
    """The dims of size 1 go. A dim that was named though it is longer must stay whole: a shard of it may be of size
    1."""
    shape = call.inputs[0].shape
    asked = _dims(call.argument(1, "dim", None), len(shape))
    names = [f"[{name}]" if k in asked else name for k, name in enumerate(dim_names(len(shape)))]
    left = ["1" if size == 1 and k in asked else name for k, (name, size) in enumerate(zip(names, shape, strict=True))]
    return f"{' '.join(left)} -> {' '.join(name for name in left if name != '1')}"


def permute(call: Call) -> str:
    """transpose, permute, t."""
    rank = call.rank()
    names, order = dim_names(rank), list(range(rank))
    if call.op is aten.permute.default:
        order = [dim % rank for dim in call.args[1]]
    elif call.op is aten.t.default:
        order = order[::-1]
    else:
        first, second = (dim % rank for dim in call.args[1:3])
        order[first], order[second] = order[second], order[first]
    return " ".join(names) + " -> " + " ".join(names[dim] for dim in order)


def expand(call: Call) -> str:
    """Dims that grow stay whole."""
    source, target = call.inputs[0].shape, call.outputs[0].shape
    names, offset = dim_names(len(target)), len(target) - len(source)
    grows = {k for k in range(len(target)) if k < offset or source[k - offset] != target[k]}
    left = ["1" if size == 1 else names[k + offset] for k, size in enumerate(source)]
    return f"{' '.join(left)} -> {_bracketed(names, grows)}"


def repeat(call: Call) -> Text:
    """A repeated dim is split inside each of its copies."""
    shape, repeats = call.inputs[0].shape, call.args[1]
    new, names = len(repeats) - len(shape), dim_names(len(shape))
    right, sizes = [f"[r{k}]" for k in range(new)], []
    for k, times in enumerate(repeats[new:]):
        right.append(names[k] if times == 1 else f"([r{k + new}] {names[k]})")
        sizes.append((f"r{k + new}", times))
    return f"{' '.join(names)} -> {' '.join(right)}", tuple(sizes)


def repeat_interleave(call: Call) -> Text:
    """Each element of one dim several times in a row."""
    times, dim = call.args[1], call.argument(2, "dim", None)
    if dim is None:
        return all_whole(call)
    names = dim_names(call.rank())
    right = [f"({name} [times])" if k == dim % call.rank() else name for k, name in enumerate(names)]
    return f"{' '.join(names)} -> {' '.join(right)}", (("times", times),)


def _concatenation(names: Sequence[str], dim: int, parts: Sequence[str]) -> tuple[str, list[str]]:
    """The pattern of the whole, whose `dim` is the concatenation of `parts`, and the patterns of the parts."""
    joined = f"({' + '.join(parts)})" if len(parts) > 1 else parts[0]
    patterns = [" ".join(part if k == dim else name for k, name in enumerate(names)) for part in (joined, *parts)]
    return patterns[0], patterns[1:]


def split(call: Call) -> str:
    """The blocks of one dim, split together, each in itself."""
    whole, parts = _concatenation(
        dim_names(call.rank()), call.argument(2, "dim", 0) % call.rank(), dim_names(len(call.outputs), "part")
    )
    return f"{whole} -> {', '.join(parts)}"


def cat(call: Call) -> str:
    """The inverse of split."""
    whole, parts = _concatenation(
        dim_names(call.rank()), call.argument(1, "dim", 0) % call.rank(), dim_names(len(call.inputs), "part")
    )
    return f"{', '.join(parts)} -> {whole}"


def glu(call: Call) -> Text:
    """Both halves of one dim, split together."""
    dim = call.argument(1, "dim", -1) % call.rank()
    whole, parts = _concatenation(dim_names(call.rank()), dim, ("half", "gate"))
    return f"{whole} -> {parts[0]}", (("gate", call.outputs[0].shape[dim]),)


def stack(call: Call) -> str:
    """A new dim, which stays whole."""
    names = dim_names(call.rank())
    dim = call.argument(1, "dim", 0) % (call.rank() + 1)
    return f"{', '.join([' '.join(names)] * len(call.inputs))} -> {' '.join([*names[:dim], '[new]', *names[dim:]])}"


# ---- some dims whole
# -----------------------------------------------------------------------------------------------------


def whole_dims(*positions: int, name: str = "dim", at: int = 1, default: Any = -1, resized: bool = False) -> Pattern:
    """The dims in the argument `name` stay whole (`positions` if there is no such argument), the others are free.

    `resized`: results have another size there.
    """

    def pattern(call: Call) -> str:
        whole = (
            {p % call.rank() for p in positions if -p <= call.rank()}
            if positions
            else _dims(call.argument(at, name, default), call.rank())
        )
        names = dim_names(call.rank())
        results = [
            [f"y{j}_{k}" if resized and k in whole else n for k, n in enumerate(names)]
            for j in range(len(call.outputs))
        ]
        return f"{_bracketed(names, whole)} -> {', '.join(_bracketed(result, whole) for result in results)}"

    return pattern


def sliced(call: Call) -> Text:
    """The sliced dim stays whole, unless it is every n-th entry of all: the dim is then made of n entries each."""
    dim, step = call.argument(1, "dim", 0) % call.rank(), call.argument(4, "step", 1)
    size, start, stop = call.inputs[0].shape[dim], call.argument(2, "start", None) or 0, call.argument(3, "end", None)
    numbers = isinstance(size, int) and all(isinstance(n, int) for n in (start, size if stop is None else stop, step))
    if numbers and step > 1 and size % step == 0 and 0 <= start < step and (stop is None or stop >= size):
        names = dim_names(call.rank())
        left = [f"({name} [step])" if k == dim else name for k, name in enumerate(names)]
        return f"{' '.join(left)} -> {' '.join(names)}", (("step", step),)
    return whole_dims(at=1, default=0, resized=True)(call)


def pad(call: Call) -> str:
    """Padded dims stay whole; `pad` counts from the last dim, two numbers each."""
    before_after = call.args[1]
    padded = {call.rank() - 1 - k // 2 for k, amount in enumerate(before_after) if amount != 0}
    names = dim_names(call.rank())
    longer = [f"y{k}" if k in padded else name for k, name in enumerate(names)]
    return f"{_bracketed(names, padded)} -> {_bracketed(longer, padded)}"


def select(call: Call) -> str:
    """One index of one dim."""
    names, dim = dim_names(call.rank()), call.argument(1, "dim", 0) % call.rank()
    return f"{_bracketed(names, {dim})} -> {' '.join(names[:dim] + names[dim + 1 :])}"


def select_scatter(call: Call) -> str:
    """One index of one dim, written."""
    names, dim = dim_names(call.rank()), call.argument(2, "dim", 0) % call.rank()
    return f"{_bracketed(names, {dim})}, {' '.join(names[:dim] + names[dim + 1 :])} -> {_bracketed(names, {dim})}"


def slice_scatter(call: Call) -> str:
    """A part of one dim, written."""
    names, dim = dim_names(call.rank()), call.argument(2, "dim", 0) % call.rank()
    part = [*names[:dim], "part", *names[dim + 1 :]]
    return f"{_bracketed(names, {dim})}, {_bracketed(part, {dim})} -> {_bracketed(names, {dim})}"


def by_index(call: Call) -> str:
    """gather, scatter and the like: the indexed dim is whole everywhere, the others where the sizes differ."""
    dim = call.argument(1, "dim", 0) % call.rank() if call.rank() else 0
    names = dim_names(call.rank())
    alike = [k for k in range(call.rank()) if k != dim and len({value.shape[k] for value in call.inputs}) == 1]
    values = (*call.inputs, *call.outputs)
    texts = [
        " ".join(name if k in alike else f"[x{j}_{k}]" for k, name in enumerate(names)) for j in range(len(values))
    ]
    return f"{', '.join(texts[: len(call.inputs)])} -> {', '.join(texts[len(call.inputs) :])}"


def index_select(call: Call) -> str:
    """Entries of one dim, by a list of indices."""
    names, dim = dim_names(call.rank()), call.args[1] % call.rank()
    chosen = " ".join([*names[:dim], "i", *names[dim + 1 :]])
    return f"{_bracketed(names, {dim})}, {'i' if call.rank(1) else ''} -> {chosen}"


def index(call: Call) -> str:
    """x[i, :, j]: dims that are indexed stay whole, dims of the indices and the other dims of x are free."""
    given = call.args[1]
    if any(isinstance(item, TensorType) and item.dtype in (torch.bool, torch.uint8) for item in given):
        return all_whole(call)  # how many entries a mask chooses depends on the data
    names, count = dim_names(call.rank()), max(len(value.shape) for value in call.inputs[1:])
    places = [k for k, item in enumerate(given) if item is not None]
    indexed = [f"i{k}" for k in range(count)]
    adjacent = places == list(range(places[0], places[-1] + 1))
    free = [(k, name) for k, name in enumerate(names) if k not in places]
    before = [name for k, name in free if adjacent and k < places[0]]
    after = [name for k, name in free if not adjacent or k > places[0]]
    indices = [
        " ".join("1" if s == 1 else n for n, s in zip(indexed[count - len(v.shape) :], v.shape, strict=True))
        for v in call.inputs[1:]
    ]
    sizes = [
        max(
            (v.shape[len(v.shape) - count + k] for v in call.inputs[1:] if len(v.shape) >= count - k),
            key=lambda s: s != 1,
        )
        for k in range(count)
    ]
    right = [*before, *("1" if size == 1 else name for name, size in zip(indexed, sizes, strict=True)), *after]
    return f"{', '.join([_bracketed(names, places), *indices])} -> {' '.join(right)}"


def embedding(call: Call) -> str:
    """Rows of a table. Scaling by frequency looks at all indices."""
    indices = " ".join(dim_names(call.rank(1), "i"))
    if call.argument(3, "scale_grad_by_freq", False) or call.argument(4, "sparse", False):
        indices = " ".join(f"[{name}]" for name in indices.split())
        return f"[v] c, {indices} -> {indices} c"
    return f"v c, {indices} -> {indices} c"


def one_hot(call: Call) -> str:
    """A new last dim, which stays whole."""
    return "... -> ... [classes]"


# ---- reductions
# -----------------------------------------------------------------------------------------------------------


def reduce(at: int = 1, name: str = "dim", default: Any = None) -> Callable[[Call], str]:
    """The dims in the argument at position `at` are looked across and vanish (size 1 where they are kept); None or ()
    means all."""

    def pattern(call: Call) -> str:
        rank = call.rank()
        given = call.argument(at, name, default) if at >= 0 else None
        reduced = _dims(given, rank)
        keep = len(call.outputs[0].shape) == rank and bool(reduced)
        names = dim_names(rank)
        right = [("1" if keep else "") if k in reduced else n for k, n in enumerate(names)]
        return f"{_bracketed(names, reduced)} -> " + ", ".join([" ".join(n for n in right if n)] * len(call.outputs))

    return pattern


def summed(call: Call) -> str:
    """A sum: the reduced dims may be split, which gives partial sums."""
    return reduce()(call).replace("[", "").replace("]", "")


def layer_norm(call: Call) -> str:
    """The normalised dims stay whole."""
    normalized = " ".join(f"[n{k}]" for k in range(len(call.args[1])))
    return ", ".join([f"... {normalized}"] + [normalized] * (len(call.inputs) - 1)) + f" -> ... {normalized}"


def layer_norm_with_statistics(call: Call) -> str:
    """The same with mean and reciprocal deviation of each row."""
    row = " ".join("1" for _ in call.args[1])
    return f"{layer_norm(call)}, ... {row}, ... {row}"


def channels(call: Call) -> str:
    """Rows and channels are free: each channel is treated as one."""
    names = dim_names(call.rank())
    text = _bracketed(names, set(range(2, call.rank())))
    return f"{text} -> {text}"


def group_norm(call: Call) -> Text:
    """Whole groups of channels may be split; space stays whole."""
    space = " ".join(f"[d{k}]" for k in range(2, call.rank()))
    channels = "(g [c])"
    text = ", ".join([f"n {channels} {space}"] + [channels] * (len(call.inputs) - 1)) + f" -> n {channels} {space}"
    return text, (("g", call.argument(1, "num_groups")),)


def batch_norm(call: Call) -> str:
    """Channels may be split. Running statistics are buffers that every rank holds whole: they have names of their
    own, see `local`."""
    space = " ".join(f"[d{k}]" for k in range(2, call.rank()))
    training = call.argument(5, "training", False)
    states = [
        call.argument(k, name) for k, name in ((1, "weight"), (2, "bias"), (3, "running_mean"), (4, "running_var"))
    ]
    given = [text for text, state in zip(("c", "c", "[mean]", "[var]"), states, strict=True) if state is not None]
    rows = "[n]" if training else "n"
    return ", ".join([f"{rows} c {space}", *given]) + f" -> {rows} c {space}"


def spatial(dims: int) -> Pattern:
    """Pooling, upsampling: the last `dims` dims stay whole and change their size."""

    def pattern(call: Call) -> str:
        sides = (" ".join(f"[{side}{k}]" for k in range(dims)) for side in "xy")
        left, right = (f"... {side}" for side in sides)
        return f"{left} -> {', '.join([right] * len(call.outputs))}"

    return pattern
