"""`parallelize`: the one line. From an unmodified model to a `ParallelModel` that trains it on all ranks.

The same programs run in three places: under torchrun and inside `autopar.launch` this process is one rank; in a plain process or a
notebook all ranks are threads of it. Ranks are made at the first use that needs them: a plan for a thousand ranks costs nothing to look at.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar.auto import decided, is_auto
from autopar.clipping import checked_max_norm, checked_norm_type
from autopar.held_model import HeldModel, give_back
from autopar.initialize import initialized
from autopar.metrics import Meter, Metrics, ProgressLine, TensorBoard
from autopar.options import MESH_ORDER, Options, call_arguments, checked_options, model_name
from autopar.plan import Plan
from autopar.planner import as_planned, fingerprint, make_plan
from autopar.process_rank import ProcessRank
from autopar.program import Program, load_program
from autopar.ranks import Ranks
from autopar.runtime.compiled import Compile
from autopar.runtime.world import World, check_world_size, launched, launched_ranks
from autopar.state import check_shape, full_value, stage_of_parameter
from autopar.step_profile import StepProfile, step_profile
from autopar.threaded_ranks import ThreadedRanks
from autopar.trace import CONSTANTS, Traced, trace
from autopar.trace_arguments import dotted
from costmodel.errors import AutoparError, BadArgument, BadPlan, DoesNotFit
from costmodel.hardware import Hardware
from passes.shard_problem import SequenceParallel

MOST_THREADS = 64  # ranks that one process may hold as threads


def parallelize(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    tp: int | str = 1,
    pp: int | str = 1,
    dp: int | str = 1,
    microbatches: int | str | None = None,
    schedule: str = "1f1b",
    virtual_stages: int | None = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    zero: int | str = 0,
    precision: str = "fp32",
    recompute: str | int = "none",
    sequence_parallel: SequenceParallel = False,
    hardware: str | Hardware | None = None,
    overrides: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    compile: Compile = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    mesh_order: Sequence[str] = MESH_ORDER,
) -> ParallelModel:
    """Split `model` over tp x pp x dp ranks. The model is traced, never modified.

    example_inputs: keyword arguments (dict) or positional ones (tuple) of one call, tensors of any device, of the batch that a step of
    one replica gets (its first dim is the batch). None: the first `step()` gives them. The loss is `loss_fn(output, *targets)` if
    given, targets being the arguments that forward does not take; else what the model returns: a scalar, the first of a tuple, `.loss`
    or `["loss"]`.

    microbatches: how many the batch is split into along the pipeline (None: four a stage, as far as there are rows). schedule: a name in
    `autopar.schedules.SCHEDULES`. virtual_stages: stages a pipeline rank, for schedules with several (None: the schedule's default).
    compile: torch.compile each stage's forward (True, a backend's name, or a dict of torch.compile's options). sequence_parallel:
    split norms, dropouts and residuals over tokens on the tp axis: False, "auto" (where
    the cost model finds it cheaper), True. recompute: what backward computes again instead of keeping it: "none", "selective" (what is
    cheap for the bytes it frees), "full" (layers keep only their inputs), or the most bytes that a rank may hold. hardware: a
    profile to plan for (None: this machine's kind). overrides: see `passes.overrides`.
    dp: replicas of the model, each with a batch of its own; zero: what they share out: 0 nothing, 1 optimizer state, 2 gradients too,
    3 parameters too (`parameters()` are then this replica's parts of them). mesh_order: the axes of the mesh, the outermost first.
    precision: "fp32" (whatever dtype the model has), "bf16-mixed", "fp16-mixed" or "bf16": see `autopar.precision`.
    "auto" as tp, pp, dp, microbatches, schedule, recompute or zero leaves that decision to `autopar.search` over the ranks of this job
    (those launched; in a plain process the GPUs, or the cores). plan: a saved plan of this model to use as it is.
    device: where ranks compute (None: where the model is). seed: for dropout.

    Errors: BadArgument, CaptureError (forward cannot be one graph), TooManyStages, NoLegalSharding, BadPlan, DoesNotFit (more
    bytes than `recompute` allows, whatever is computed again).
    """
    asked: dict[str, Any] = {
        "tp": tp, "pp": pp, "dp": dp, "microbatches": microbatches, "schedule": schedule, "virtual_stages": virtual_stages, "zero": zero,
        "precision": precision, "recompute": recompute, "sequence_parallel": sequence_parallel, "hardware": hardware,
    }  # fmt: skip
    if plan is None and is_auto(asked):
        asked = decided(model, example_inputs, asked, loss_fn=loss_fn, compile=compile)
    options = checked_options(
        model, **asked, loss_fn=loss_fn, overrides=overrides, plan=plan, compile=compile, device=device, seed=seed,
        mesh_order=mesh_order,
    )  # fmt: skip
    if launched():
        check_world_size(launched_ranks(), options.mesh)
    parallel = ParallelModel(model, options)
    if example_inputs is not None:
        parallel._trace(*call_arguments(example_inputs))
    return parallel


@dataclass(frozen=True)
class _Form:
    """One form of the model's call: its trace, its plan, the ranks that run it (made when first asked for), and for training or not."""

    traced: Traced
    plan: Plan
    ranks: Callable[[], Ranks]
    training: bool


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model as it is while `training` is its mode; else put in that mode, and back part by part."""
    modes = {part: part.training for part in model.modules()}
    if model.training != training:
        model.train(training)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class ParallelModel:
    """The model on all its ranks. Made by `autopar.parallelize`."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._held_model, self._options = HeldModel(model), options
        self._traced: Traced | None = None
        self._plan: Plan | None = None
        self._ranks_made: Ranks | None = None
        self._forms: dict[tuple[str, int, int], _Form] = {}  # further forms of the call, by what they are for
        self.training = self._traced_training = model.training
        self._apart: dict[str, torch.Tensor] | None = None
        self._meter = Meter()

    @property
    def _model(self) -> nn.Module:
        return self._held_model.get()

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def _trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
        options = self._options
        self._traced_training = self.training
        self._traced = self._trace_form(args, kwargs)
        if options.plan is not None:
            self._plan = options.plan.check_model(fingerprint(self._traced))
            if self._plan.precision != options.precision.name:
                raise BadPlan(
                    f"the plan was made for precision = {self._plan.precision!r}, not {options.precision.name!r}",
                    use=f"precision={self._plan.precision!r}, or a new plan",
                )
            if dict(self._plan.inputs) != {name: _type_text(value.type) for name, value in self._traced.inputs.items()}:
                raise BadPlan(
                    "the plan was made for other inputs",
                    why=f"it takes {dict(self._plan.inputs)}",
                    use="the arguments it was made with",
                )
        else:
            self._plan = make_plan(
                self._traced, mesh=options.mesh, microbatches=options.microbatches, schedule=options.schedule, hardware=options.hardware,
                model_name=model_name(self._model), overrides=options.overrides, sequence_parallel=options.sequence_parallel,
                recompute=options.recompute, virtual_stages=options.virtual_stages, zero=options.zero,
            )  # fmt: skip
        return self._traced

    def _trace_form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
        with _in_mode(self._model, self.training):
            options = self._options
            return trace(
                self._model, args, kwargs, loss_fn=options.loss_fn, precision=options.precision, device=options.device
            )

    @property
    def plan(self) -> Plan:
        """The plan; BadArgument before the first step if there were no example inputs."""
        if self._plan is None:
            raise BadArgument(
                "there is no plan yet",
                why="no example_inputs were given",
                use="example_inputs=..., or the first step()",
            )
        return self._plan

    def _ranks(self) -> Ranks:
        if self._ranks_made is None:
            plan = self.plan
            assert self._traced is not None
            self._ranks_made = self._make_ranks(plan, self._traced, None)
            self._release(self._traced)
        return self._ranks_made

    def _release(self, traced: Traced) -> None:
        """Keep no values of what the ranks hold."""
        held = {name for stage in self.plan.stages for name in stage.parameters}
        self._held_model.release(held)
        traced.release(held)
        if launched():
            give_back()

    def _make_ranks(self, plan: Plan, traced: Traced, like: Ranks | None) -> Ranks:
        """Ranks for a plan; with the parameters of `like`, if given."""
        if launched():
            assert like is None or isinstance(like, ProcessRank)
            return ProcessRank(plan, traced, self._options.device, self._options.seed, like, self._options.compile)
        if plan.num_ranks > MOST_THREADS:
            raise DoesNotFit(
                f"the plan needs {plan.num_ranks} ranks, too many for threads of one process",
                use=f"torchrun with {plan.num_ranks} ranks, or a smaller mesh to try it here",
            )
        assert like is None or isinstance(like, ThreadedRanks)
        return ThreadedRanks(plan, traced, self._options.device, self._options.seed, like, self._options.compile)

    def _form(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, trains: bool, accumulate: bool = False
    ) -> tuple[_Form, dict[str, torch.Tensor]]:
        """What runs this call, and its tensors by name. All replicas of a training step agree on it, or all raise."""
        alone = self._options.mesh.get("dp", 1) == 1 or (not trains and launched())
        try:
            form, batch, sizes = self._form_of(args, kwargs)
            empty = next((name for name, tensor in batch.items() if tensor.is_meta), None)
            if empty is not None:
                self._ranks()  # says so if there can be none here, whatever the batch
                raise BadArgument(
                    f"the input {empty!r} has no values", why="it is on the meta device",
                    use="a tensor with values (only example_inputs may be on meta)",
                )  # fmt: skip
            if trains and form.traced.loss is None:
                raise BadArgument(
                    "the model returns no loss to train on", why="its output is no scalar, has none first and no .loss",
                    use="loss_fn=..., or a forward that returns the loss (pass the labels)",
                )  # fmt: skip
        except AutoparError as error:
            with suppress(BadArgument):
                if not alone and self._plan is not None:
                    self._ranks().rows_of_all("", 0, str(error))
                elif self._plan is None and launched():
                    World.from_environment(self._options.mesh, device=self._options.device, refusal=str(error))
            raise
        rows = sizes.get("B", form.plan.microbatches)
        if not alone:
            given = (f"{name} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in batch.items())
            sized = (f"{name}={size}" for name, size in sizes.items() if name != "B")
            baked = (f"{dotted(path)}={value!r}" for path, value in form.traced.baked.items() if isinstance(value, CONSTANTS))
            shape = ", ".join([*given, *sized, *baked, "training" if self.training else "evaluation", *["accumulate"] * accumulate])
            rows = self._ranks().rows_of_all(shape, rows)
        return self._with_rows(form, rows), batch

    def _form_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Form, dict[str, torch.Tensor], dict[str, int]]:
        """What runs this call on batches of enough rows, its tensors by name, and its sizes.

        Programs are symbolic in the batch and, where the model allows it, in the sequence. A batch of fewer rows than microbatches
        gets a schedule of its own; a call of another form (a size that is baked in, other arguments) is traced anew, with every
        parameter where it is. Either is made once, and said in one line. So is the model in its other mode, training or evaluation,
        without a word: statistics, dropout and whatever else forward does differently there.
        """
        traced = self._traced or self._trace(args, kwargs)
        known = [_Form(traced, self.plan, self._ranks, self._traced_training), *self._forms.values()]
        misfit: BadArgument | None = None
        for form in known:
            if form.training == self.training:
                try:
                    batch = form.traced.flatten(args, kwargs)
                    sizes = form.traced.size_values(batch)
                    break
                except BadArgument as error:
                    misfit = misfit or error
        else:
            form, batch, sizes = self._other_form(args, kwargs, misfit)
        return form, batch, sizes

    def _with_rows(self, form: _Form, rows: int) -> _Form:
        """The form for a batch of `rows` rows, which may be fewer than its microbatches."""
        if 0 < rows < form.plan.microbatches:
            key = ("rows", id(form.plan), rows)
            if key not in self._forms:
                warnings.warn(
                    f"autopar: a batch of {rows} rows: {rows} microbatches instead of {form.plan.microbatches}",
                    stacklevel=5,
                )
                fewer = form.plan.with_microbatches(rows)
                self._forms[key] = _Form(form.traced, fewer, self._once(fewer, form.traced), self.training)
            form = self._forms[key]
        return form

    def _other_form(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], misfit: BadArgument | None
    ) -> tuple[_Form, dict[str, torch.Tensor], dict[str, int]]:
        """A new form: for a call that fits none of this mode (`misfit`), or the first call in this mode (None)."""
        try:
            traced = self._trace_form(args, kwargs)
            batch = traced.flatten(args, kwargs)
            sizes = traced.size_values(batch)
            if misfit is None and self._traced is not None and _same(traced, self._traced):
                form = self._forms["mode", 0, 0] = _Form(self._traced, self.plan, self._ranks, self.training)
                return form, batch, sizes
            rows = sizes.get("B", 1)
            plan = make_plan(
                traced, mesh=self._options.mesh, microbatches=max(1, min(self.plan.microbatches, rows)), schedule=self.plan.schedule,
                hardware=self._options.hardware, model_name=self.plan.model, overrides=as_planned(self.plan, traced),
                sequence_parallel=self._options.sequence_parallel, virtual_stages=self.plan.virtual_stages,
                recompute=self.plan.recompute, zero=self.plan.zero,
            )  # fmt: skip
            self._check_held(plan)
        except AutoparError as error:
            if misfit is None:
                raise
            why = misfit.why or (None if error.what == misfit.what else str(error))
            raise BadArgument(misfit.what, where=misfit.where, why=why, use=misfit.use) from error
        if misfit is not None:
            warnings.warn(f"autopar: programs rebuilt for another form of the call ({misfit.what})", stacklevel=5)
        form = _Form(traced, plan, self._once(plan, traced), self.training)
        self._forms["form", len(self._forms), 0] = form
        return form, batch, sizes

    def _check_held(self, plan: Plan) -> None:
        stages = (*plan.stages, *self.plan.stages)
        updated = {
            name for stage in stages for node in stage.graph_module.graph.nodes for name in node.meta.get("mutates", ())
        }
        for stage, main in zip(plan.stages, self.plan.stages, strict=True):
            for name, text in stage.parameters.items():
                if main.parameters.get(name) != text:
                    raise BadArgument(
                        f"this call needs {name} as {text!r} on stage {stage.index}, which holds {main.parameters.get(name)!r}"
                    )
            for name in updated.intersection(stage.buffers).difference(main.buffers):
                raise BadArgument(
                    f"this call updates or reads the buffer {name} on stage {stage.index}, which does not hold it",
                    why=f"the plan was made for {'training' if self._traced_training else 'evaluation'}",
                    use="the model in the other mode when it is given to parallelize"
                    if self.training != self._traced_training
                    else None,
                )

    def _once(self, plan: Plan, traced: Traced) -> Callable[[], Ranks]:
        """Ranks for a further plan, made at first use."""
        made: list[Ranks] = []

        def ranks() -> Ranks:
            if not made:
                made.append(self._make_ranks(plan, traced, self._ranks()))
                self._release(traced)
            return made[0]

        return ranks

    # ---- training ---------------------------------------------------------------------------------------------------

    def step(self, *args: Any, accumulate: bool = False, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one whole batch; gradients are added to `.grad`.

        Returns the loss as a 0-dim tensor, on every rank: what the single-device model gives for this batch. With replicas (dp > 1)
        each rank of a job gives its replica's batch, a plain process the rows of all; loss and gradients are of all replicas' batches
        together, whatever number of rows or of ignored labels each has. BadArgument, on all ranks, if the model returns no loss, a
        batch does not fit, or replicas' steps differ in more than their rows; RankFailed if another rank died or stalled.
        accumulate: more steps follow before the optimizer's. As on one device their gradients add up, each of its own batch's loss: for
        the mean over k steps divide the losses by k. Replicas sum once, in the last step, the one without it: until then `.grad` is not
        to be used (with zero=2 or 3 each step sums into the shards instead, so that no whole gradients are kept). A step that raises
        leaves sums as they were before it, and no parts.
        With precision="fp16-mixed" gradients are scaled and unscaled in here; after an overflow, on any rank, every `.grad` is None, so an
        optimizer's step changes nothing (see `autopar.runtime.scaling`).
        """
        with self._meter.step() as done:
            ranks, batch, plan = self._to_train(args, kwargs, accumulate)
            loss = ranks.step(batch, accumulate=accumulate)
            done(plan, batch, loss, self._options.device, None if ranks.loss_scale is None else ranks.loss_scale.value)
        return loss

    @property
    def metrics(self) -> Metrics:
        """Of the latest step: see `autopar.metrics`. BadArgument before the first."""
        if self._meter.latest is None:
            raise BadArgument("there are no metrics yet", why="no step was made", use="par.step(...) first")
        return self._meter.latest

    def report(self, *, progress: bool = True, tensorboard: str | None = None) -> None:
        """From now on show every step's metrics, on rank 0: on one line of the terminal (nothing in a pipe), and as scalars for
        TensorBoard in a folder. A step is shown when the next begins, the last one by `close`.

        BadArgument if tensorboard is asked for and not installed.
        """
        if int(os.environ.get("RANK", "0")) == 0 or not launched():
            if progress:
                self._meter.reporters.append(ProgressLine())
            if tensorboard is not None:
                self._meter.reporters.append(TensorBoard(tensorboard))

    def profile_step(self, *args: Any, **kwargs: Any) -> StepProfile:
        """`step`, recorded: what each rank did when, and where the step's time went.

        Gradients are added to `.grad` as ever; `.loss` of what is returned is the step's. The first step of a model is slower than
        the others. Every rank has to call it, and gets all ranks' times. On CUDA the ranks wait for the device after each instruction.
        """
        ranks, batch, plan = self._to_train(args, kwargs)
        return step_profile(plan, *ranks.profile(batch))

    def _to_train(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], accumulate: bool = False
    ) -> tuple[Ranks, dict[str, torch.Tensor], Plan]:
        form, batch = self._form(args, kwargs, trains=True, accumulate=accumulate)
        ranks = form.ranks()
        ranks.train(self.training)
        return ranks, batch, form.plan

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward only: the model's output on every rank of the last stage, None on the others (a plain process always gets it)."""
        with self._meter.apart():
            form, batch = self._form(args, kwargs, trains=False)
            ranks = form.ranks()
            ranks.train(self.training)
            outputs = ranks.forward(batch)
        if outputs is None:
            return None
        leaves = dict.fromkeys(leaf for leaf in form.traced.output_leaves if isinstance(leaf, torch.fx.Node))
        values = {leaf: outputs[name] for leaf, name in zip(leaves, form.plan.stages[-1].outputs, strict=False)}
        return form.traced.unflatten(values)

    def train(self, mode: bool = True) -> ParallelModel:
        """Dropout and the like on (or off)."""
        self.training = mode
        return self

    def eval(self) -> ParallelModel:
        """Dropout and the like off."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of this process's parameters."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before, the same on every rank.

        As torch.nn.utils.clip_grad_norm_ on the whole model: each parameter counts once whatever tp and pp: shards add up, copies on
        other ranks and stages are left out. norm_type: the order, above 0; math.inf for the largest. A gradient that is not finite, on
        whichever rank, is seen by all: NonFinite if error_if_nonfinite, with no gradient changed.
        """
        norm = self._ranks().clip_grad_norm_(checked_max_norm(max_norm), checked_norm_type(norm_type), error_if_nonfinite)
        self._meter.clipped(norm)
        return norm

    @property
    def loss_scale(self) -> float | None:
        """What precision="fp16-mixed" multiplies the next step's loss by (see `autopar.runtime.scaling`); None otherwise."""
        scale = self._ranks().loss_scale
        return None if scale is None else scale.value

    def loss_scale_state_dict(self) -> dict[str, float | int]:
        """What a job that resumes needs of the loss scale, beside `state_dict` and the optimizer's: the same on every rank, {} where
        the precision has none.
        """
        scale = self._ranks().loss_scale
        return {} if scale is None else scale.state_dict()

    def load_loss_scale_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the scale of `loss_scale_state_dict` (or of a GradScaler's state dict). BadArgument if it is not one, or if there is
        one and the precision scales no loss.
        """
        scale = self._ranks().loss_scale
        if scale is not None:
            scale.load_state_dict(state)
        elif state:
            raise BadArgument(
                f"precision = {self.plan.precision!r} has no loss scale to load", use='{}, or precision="fp16-mixed"'
            )

    def reductions(self) -> dict[str, int]:
        """How many times the last step summed each parameter's gradient over the replicas, by name: 1 each, whatever the microbatches;
        none where `accumulate` left that to a later step.

        Of this rank's parameters (a plain process: of all; a parameter that ranks count differently has the largest number).
        """
        return self._ranks().reductions()

    # ---- parameters -------------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's shards under the user's names. In a plain process with several ranks: all ranks' shards, `rank 2: name`; what ranks
        hold alike (without ZeRO they share its memory) once, so that any optimizer sees the whole model as on one device.

        With zero >= 1: of each trained parameter this replica's part, flat but for dims of size 1, to hand to an optimizer that treats
        every element by itself. What it changes is in the next step, output and state dict, which all ranks then have to ask for.
        """
        return self._ranks().named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's shards (a plain process: all ranks'): hand them to any optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """DTensors under the user's names, this rank's stage (a plain process: whole tensors, all of them).

        What forward does not use is with the first stage's. As in the model's own, buffers that are not persistent are left out.
        """
        ranks, known = self._ranks(), self._model.state_dict().keys()
        unheld = {name: value for name, value in self._unheld().items() if not value.is_meta}
        return {name: value for name, value in ranks.state_dict().items() if name in known} | ranks.replicated(unheld)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take values from DTensors or whole tensors under the user's names; `state_dict` may hold more stages than this rank's.

        DifferentModel if names are missing or unknown, or a shape differs; nothing is changed then.
        """
        ranks, unheld = self._ranks(), self._unheld()
        given = {name: full_value(state_dict[name]) for name in unheld if name in state_dict}
        for name, tensor in given.items():
            check_shape(name, tensor, unheld[name].shape)
        ranks.load_state_dict(state_dict)
        unheld.update({name: tensor.detach().to(unheld[name].dtype).clone() for name, tensor in given.items()})

    def initialize(self, seed: int = 0) -> None:
        """Values for a model built on the meta device, by its modules' own init functions (see `autopar.initialize`), shard by shard:
        those that the whole model has with this seed. Before an optimizer is given the parameters.

        WeightsMissing for parameters that no init function sets.
        """
        ranks, unheld = self._ranks(), self._unheld()

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            for name, value in initialized(self._model, seed) if self._held_model.on_meta else ():
                if name not in self._held_model.on_meta:
                    continue
                if name in unheld:
                    unheld[name] = value.detach().clone()
                yield name, value

        ranks.assign(values())

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Whole tensors on rank 0, loadable by the untouched model with strict=True; {} on the others."""
        found = self._ranks().whole_tensors()
        if found is None:
            return {}
        unheld = self._unheld()
        return {
            name: unheld[name].clone() if name in unheld else found[self._first_name(name)] for name in self._model.state_dict()
        }

    def _first_name(self, name: str) -> str:
        return self.plan.aliases.get(name, name)

    def _unheld(self) -> dict[str, torch.Tensor]:
        """What is in the model's state dict and no program reads, such as a parameter that forward does not use: kept here, whole."""
        if self._apart is None:
            held = stage_of_parameter(self.plan)
            known = self._model.state_dict().items()
            self._apart = {name: tensor.detach().clone() for name, tensor in known if self._first_name(name) not in held}
        return self._apart

    def close(self) -> None:
        """End the rank threads or leave the job's groups; a later step starts again."""
        self._meter.close()
        for form in self._forms.values():
            form.ranks().close()
        if self._ranks_made is not None:
            self._ranks_made.close()


def _same(one: Traced, other: Traced) -> bool:
    """True if two traces are one program."""

    def parts(traced: Traced) -> tuple[Any, ...]:
        nodes = [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in traced.graph_module.graph.nodes]
        return (
            nodes,
            list(traced.inputs.items()),
            traced.limits,
            traced.baked,
            traced.output_spec,
            list(traced.constants),
        )

    return parts(one) == parts(other) and all(
        torch.equal(tensor, other.constants[name]) for name, tensor in one.constants.items()
    )


def _type_text(value: Any) -> str:
    from passes.placement import type_text

    return type_text(value, {})


def programs(plan: Plan) -> list[Program]:
    """Every rank's program, loaded."""
    return [
        load_program(plan.source(rank), f"<autopar plan {plan.identity} rank {rank}>") for rank in range(plan.num_ranks)
    ]
