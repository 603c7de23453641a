"""What a stage allocates: its emitted program run on tensors without values, every storage counted.

Design note. The stage's class runs as on a rank, forward and backward through torch's own autograd, under FakeTensorMode: ops work out
shapes and storages and compute nothing. A dispatch mode sees each new storage and its end, so a view counts nothing, a tensor that two
ops save counts once, and what nobody keeps is gone, all by the rules of autograd itself. Collectives are the runtime's, on a group that
moves nothing. Two microbatches run: the first finds no gradients of parameters and makes them, the second adds to them.

The kernels are the CPU's: fused attention is the flash kernel there as on a GPU, and keeps the same tensors. A kernel's own workspace is
not seen, and recurrent layers (`aten.lstm` and its kin) are the plain ones: the fused kernel that runs with values keeps more.
"""

from __future__ import annotations

import ast
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autopar.program
from autopar.deferred import Product, add_deferred
from autopar.emit import emit_stage
from autopar.measure_replicas import ReplicasOfStage
from autopar.program import StageModule, freeing
from autopar.runtime.axis import GlooAxis, GroupAxis, LocalAxis
from costmodel.memory import MicrobatchBytes, Phase
from costmodel.mesh import REPLICA_AXIS
from passes.ir import is_state, is_trainable, tensor_type
from passes.localize import sharding
from passes.loss import SHARE, TOTAL
from passes.placement import local_shape, local_type, parse_type
from passes.recompute import Saves

if TYPE_CHECKING:
    from autopar.plan import Plan, StagePlan


# What a stage raises that cannot be run without values.
NEEDS_VALUES = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException, UnsupportedOperatorException,
)  # fmt: skip


class StorageCount(TorchDispatchMode):
    """Bytes of the storages that ops have made and that still live, and the most there were. Views make no storage."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.bytes_now = self.bytes_peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                address = storage._cdata
                if address not in self._sizes:
                    size = self._sizes[address] = storage.nbytes()
                    self.bytes_now += size
                    if self.bytes_now > self.bytes_peak:
                        self.bytes_peak = self.bytes_now
                    weakref.finalize(storage, self._gone, address)
        return result

    def _gone(self, address: int) -> None:
        self.bytes_now -= self._sizes.pop(address, 0)

    def bytes_of(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of the counted storages that these lie in."""
        addresses = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(self._sizes.get(address, 0) for address in addresses)

    def restart(self) -> int:
        """Begin a new peak; the bytes there are now."""
        self.bytes_peak = self.bytes_now
        return self.bytes_now


class _Still:
    """The process group, and the board, of a rank that is alone: nothing moves."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


class _StillGloo(GlooAxis):
    def _wait(self, start: Callable[..., Any], *arguments: object) -> None:
        return


class _StillGroup(GroupAxis):
    def _wait(self, start: Callable[..., Any], *arguments: object) -> None:
        return


def _axis(name: str, size: int, on_cpu: bool) -> GroupAxis | LocalAxis:
    if size == 1:
        return LocalAxis(name)
    still: Any = _Still()
    return (_StillGloo if on_cpu else _StillGroup)(name, 0, tuple(range(size)), still, still, 0)


def stage_class(text: str, watch: Mapping[str, Any] | None = None) -> type[StageModule]:
    """The class of an emitted stage from its text. `watch`: names for the text besides those a program imports."""
    names: dict[str, Any] = {name: getattr(autopar.program, name) for name in autopar.program.__all__}
    names |= {"torch": torch, "F": torch.nn.functional, "aten": torch.ops.aten, "math": math, **(watch or {})}
    before = set(names)
    tree = ast.parse(text)
    exec(compile(freeing(tree) if watch is None else _watched(tree), "<stage>", "exec"), names)
    classes = (value for name, value in names.items() if name not in before and inspect.isclass(value))
    return next(value for value in classes if issubclass(value, StageModule))


@dataclass(frozen=True)
class FakeStage:
    """A stage that can run without values, and a microbatch for it. Made and used under `mode`."""

    mode: FakeTensorMode
    stage: StageModule
    parameters: Mapping[str, torch.Tensor]
    arguments: Sequence[torch.Tensor]
    keywords: Mapping[str, Any]
    known: Sequence[torch.Tensor]


def fake_stage(stage: StagePlan, plan: Plan, sizes: Mapping[str, int], kind: type[StageModule]) -> FakeStage:
    """A stage of a plan on its first tensor-parallel rank, for a microbatch of these sizes."""
    mode = FakeTensorMode()
    with mode:
        tensors: dict[str, torch.Tensor] = {}
        trained: dict[str, torch.Tensor] = {}
        for node in stage.graph_module.graph.nodes:
            value = tensor_type(node)
            if is_state(node) and value is not None:
                local = local_type(value, sharding(node), plan.mesh)
                tensor = torch.empty([int(size) for size in local.shape], dtype=local.dtype)
                tensors[str(node.target)] = tensor
                if node.meta.get("kind") == "parameter" and is_trainable(node):
                    trained[str(node.target)] = tensor.requires_grad_()
        axes = {name: _axis(name, size, plan.hardware == "cpu") for name, size in plan.mesh.items()}
        module = kind(tensors, axes, dict.fromkeys(plan.mesh, 0))
        arguments = [_empty(value.type, sizes, plan) for value in stage.receives.values()]
        keywords: dict[str, Any] = {}
        for name, parameter in inspect.signature(module.forward).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                if name.startswith((SHARE, TOTAL)):
                    keywords[name] = torch.empty(())
                else:
                    keywords[name] = _empty(plan.inputs[name], sizes, plan) if name in plan.inputs else sizes[name]
    given = [value for value in keywords.values() if isinstance(value, torch.Tensor)]
    return FakeStage(mode, module, trained, arguments, keywords, [*tensors.values(), *arguments, *given])


def _empty(text: str, sizes: Mapping[str, int], plan: Plan) -> torch.Tensor:
    dtype, shape = local_shape(text, sizes, plan.mesh)
    return torch.empty(shape, dtype=dtype)


def _is_float(text: str, plan: Plan) -> bool:
    return parse_type(text, tuple(plan.mesh))[0].dtype.is_floating_point


def measure(stage: StagePlan, plan: Plan, sizes: Mapping[str, int]) -> MicrobatchBytes:
    """What a microbatch of these sizes allocates on one rank of a stage."""
    fake = fake_stage(stage, plan, sizes, stage_class(emit_stage(stage, plan)[0]))
    run = _Run(fake, stage, plan, sizes)
    replicas = ReplicasOfStage(run) if plan.mesh.get(REPLICA_AXIS, 1) > 1 else None
    phases: dict[str, Phase] = {}
    reducing = None
    with fake.mode, StorageCount([*fake.known, *run.known, *(replicas.known if replicas is not None else ())]) as count:
        fake.stage.hold_casts(replicas.sums.ready if replicas is not None else None).make_all()
        for splits in (True, False) if plan.splits_backward else (False,):
            for _ in range(1 if replicas is None else replicas.runs):
                for parameter in fake.parameters.values():
                    parameter.grad = None
                first = run.microbatch(count, splits)
                if replicas is not None and plan.microbatches == 1:  # the second is the next step's
                    replicas.after_step()
                second = run.microbatch(count, splits)
                if replicas is not None:
                    replicas.after_step()
            gathered = second.gathered_bytes
            for name, seen in second.phases.items():
                made = first.phases[name]
                phases[name] = replace(
                    seen, peak_bytes=seen.peak_bytes - gathered, first_peak_bytes=made.peak_bytes - gathered,
                    gradient_bytes=made.gradient_bytes,
                )  # fmt: skip
        if replicas is not None and fake.parameters:
            reducing = replicas.last_microbatch(count, phases["backward"].change_bytes, second.gathered_bytes)
    return MicrobatchBytes(
        phases["forward"], phases["backward"], phases.get("input"), phases.get("weight"), second.sent_bytes,
        second.sent_saved_bytes, second.returned_bytes, run.keeps_received, run.keeps_gradients,
        reducing, second.gathered_bytes,
    )  # fmt: skip


@dataclass
class _Seen:
    """What one microbatch took. The peaks of its phases are with gathered parameters, what they change is without. `gathered_bytes`: of
    those that there are between forward and backward.
    """

    phases: dict[str, Phase]
    gathered_bytes: int = 0
    sent_bytes: int = 0
    sent_saved_bytes: int = 0
    returned_bytes: int = 0


class _Run:
    """Forward and backward of a microbatch, as the runtime does them (runtime/chunk.py)."""

    def __init__(self, fake: FakeStage, stage: StagePlan, plan: Plan, sizes: Mapping[str, int]) -> None:
        self.fake, self.stage, self.plan, self.sizes = fake, stage, plan, sizes
        self.takes_gradient = [value.gradient and _is_float(value.type, plan) for value in stage.receives.values()]
        self.loss = len(stage.sends) + list(stage.outputs).index("loss") if "loss" in stage.outputs else -1
        self.apart = [
            name
            for name, held in stage.tied.items()
            if name in fake.parameters and (plan.tied_exact or len({plan.stage_ranks[other] for other in held}) == 1)
        ]
        with fake.mode:  # what arrives is in a ring
            self.arriving = {
                name: [_empty(value.type, sizes, plan) for _ in value.to]
                for name, value in stage.sends.items()
                if value.gradient
            }
        self.keeps_received = self.keeps_gradients = False
        self.around_forward: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.gathered_bytes: Callable[[], int] = lambda: 0  # of whole parameters that are there now
        self.known = [piece for pieces in self.arriving.values() for piece in pieces]

    def microbatch(self, count: StorageCount, splits: bool, begins: Callable[[], None] | None = None) -> _Seen:
        """One microbatch there and back, in two halves if it `splits`. `begins` is called before its backward."""
        seen = _Seen({})
        arguments = [
            value.detach().requires_grad_(wanted)
            for value, wanted in zip(self.fake.arguments, self.takes_gradient, strict=True)
        ]
        before = self.begin(count)
        edges, gradients, outputs = self._forward(arguments)
        with_sends = count.bytes_now
        forward_peak = count.bytes_peak
        sent = count.bytes_of(outputs)
        del outputs
        seen.gathered_bytes = self.gathered_bytes()
        seen.phases["forward"] = Phase(forward_peak - before, 0, count.bytes_now - seen.gathered_bytes - before)
        seen.sent_bytes = with_sends - count.bytes_now
        seen.sent_saved_bytes = max(sent - seen.sent_bytes, 0)
        deferred: list[Product] = []
        start, existed = self.begin(count), self._gradient_bytes()
        for name in list(gradients):
            total, *others = self.arriving[name]
            for piece in others:
                total = total + piece
            gradients[name] = total.detach()
        self.fake.stage.deferred = deferred if splits else None
        if begins is not None:
            begins()
        if edges:
            torch.autograd.backward(list(edges.values()), [gradients[name] for name in edges])
        self.fake.stage.deferred = None
        peak = count.bytes_peak - start
        edges, gradients = {}, {}
        apart = self._take_apart()
        returned = [
            torch.zeros_like(value) if value.grad is None else value.grad
            for value, wanted in zip(arguments, self.takes_gradient, strict=True)
            if wanted
        ]
        arguments = []
        with_returned = count.bytes_now
        del returned
        seen.returned_bytes = with_returned - count.bytes_now
        made = self._gradient_bytes() - existed
        change = count.bytes_now - self.gathered_bytes() - start - made
        seen.phases["input" if splits else "backward"] = Phase(peak, 0, change, made, apart)
        if splits:
            self._note_kept(deferred)
            start, existed = self.begin(count), self._gradient_bytes()
            add_deferred(deferred)
            peak, apart = count.bytes_peak - start, self._take_apart()
            made = self._gradient_bytes() - existed
            change = count.bytes_now - self.gathered_bytes() - start - made
            seen.phases["weight"] = Phase(peak, 0, change, made, apart)
        return seen

    def begin(self, count: StorageCount) -> int:
        """Begin a new peak; the bytes there are now but for gathered parameters."""
        return count.restart() - self.gathered_bytes()

    def _forward(
        self, arguments: Sequence[torch.Tensor]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
        """Where backward begins, by name, the gradient of the loss, and what is sent on."""
        with self.around_forward():
            outputs = self.fake.stage.forward(*arguments, **self.fake.keywords)
        outputs = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
        edges: dict[str, Any] = {}
        gradients: dict[str, torch.Tensor] = {}
        if self.loss >= 0 and outputs[self.loss].requires_grad:
            edges["loss"] = get_gradient_edge(outputs[self.loss])
            gradients["loss"] = torch.ones_like(outputs[self.loss])
            self.arriving["loss"] = [gradients["loss"]]
        for output, (name, value) in zip(outputs, self.stage.sends.items(), strict=False):
            if value.gradient and output.requires_grad:
                edges[name] = get_gradient_edge(output)
                gradients[name] = self.arriving[name][0]
        return edges, gradients, outputs[: len(self.stage.sends)]

    def _note_kept(self, deferred: Sequence[Product]) -> None:
        """Whether what is put off keeps what came in."""
        kept = {tensor.untyped_storage()._cdata for product in deferred for tensor in (product.x, product.gradient)}
        self.keeps_received |= any(value.untyped_storage()._cdata in kept for value in self.fake.arguments)
        self.keeps_gradients |= any(value.untyped_storage()._cdata in kept for value in self.known)

    def _gradient_bytes(self) -> int:
        """Bytes of the gradients of parameters that there are."""
        held = {
            value.grad.untyped_storage()._cdata: value.grad.untyped_storage().nbytes()
            for value in self.fake.parameters.values()
            if value.grad is not None
        }
        return sum(held.values())

    def _take_apart(self) -> int:
        """Bytes of the gradients of tied parameters, which the runtime takes out of `.grad` and keeps."""
        taken = 0
        for name in self.apart:
            parameter = self.fake.parameters[name]
            if parameter.grad is not None:
                taken += parameter.grad.untyped_storage().nbytes()
                parameter.grad = None
        return taken


# ---- which call makes and saves what --------------------------------------------------------------------------------------


class _Watch(StorageCount):
    """Gives every storage a number, and notes which call of forward makes it and which ones autograd keeps it for."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__(known)
        self._given = set(self._sizes)
        self._numbers: dict[int, int] = {}
        self._call = ""
        self.num_bytes: dict[int, int] = {}
        self.storage: dict[str, int] = {}
        self.made: dict[str, set[int]] = {}
        self.saved: dict[str, set[int]] = {}

    def number(self, tensor: torch.Tensor) -> int | None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._given:
            return None
        if address not in self._numbers:
            number = self._numbers[address] = len(self.num_bytes)
            self.num_bytes[number] = storage.nbytes()
            self.made.setdefault(self._call, set()).add(number)
        return self._numbers[address]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.number(leaf)
        return result

    def _gone(self, address: int) -> None:
        super()._gone(address)
        self._numbers.pop(address, None)

    def at(self, call: str) -> None:
        """Forward begins a statement."""
        self._call = call

    def seen(self, values: Mapping[str, object]) -> None:
        """What the statement gave."""
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and (number := self.number(value)) is not None:
                self.storage[name] = number

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self.number(tensor)
        if number is not None:
            self.saved.setdefault(self._call, set()).add(number)
        return tensor


def _watched(tree: ast.Module) -> ast.Module:
    """A stage's class whose forward tells `_watch_at` before each statement and `_watch_seen` after it."""
    for stage in tree.body:
        for function in stage.body if isinstance(stage, ast.ClassDef) else ():
            if isinstance(function, ast.FunctionDef) and function.name == "forward":
                body: list[ast.stmt] = []
                for statement in function.body:
                    names = [
                        part.id
                        for part in ast.walk(statement)
                        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id != "_"
                    ]
                    if names and isinstance(statement, ast.Assign):
                        listed = ", ".join(f"{name!r}: {name}" for name in names)
                        body += ast.parse(f"_watch_at({names[0]!r})").body
                        body += [statement, *ast.parse(f"_watch_seen({{{listed}}})").body]
                    else:
                        body.append(statement)
                function.body = body
    return ast.fix_missing_locations(tree)


def saves(stage: StagePlan, plan: Plan, sizes: Mapping[str, int]) -> Saves:
    """What each call of a stage's forward makes, and what autograd keeps for it, for a microbatch of these sizes."""
    watches: list[_Watch] = []
    kind = stage_class(
        emit_stage(stage, plan)[0],
        {"_watch_at": lambda call: watches[0].at(call), "_watch_seen": lambda values: watches[0].seen(values)},
    )
    fake = fake_stage(stage, plan, sizes, kind)
    takes_gradient = [value.gradient and _is_float(value.type, plan) for value in stage.receives.values()]
    with fake.mode:
        arguments = [
            value.detach().requires_grad_(wanted) for value, wanted in zip(fake.arguments, takes_gradient, strict=True)
        ]
        watches.append(_Watch([*fake.known, *fake.stage.hold_casts().make_all().of.values(), *arguments]))
        with watches[0], saved_tensors_hooks(watches[0].pack, lambda tensor: tensor):
            outputs = fake.stage.forward(*arguments, **fake.keywords)
    del outputs
    watch = watches[0]
    return Saves(
        watch.num_bytes, watch.storage,
        {name: frozenset(numbers) for name, numbers in watch.made.items()},
        {name: frozenset(numbers) for name, numbers in watch.saved.items()},
    )  # fmt: skip
