"""All ranks of a plan as threads of this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from autopar.clipping import clip_by_part, norm_part
from autopar.plan import Plan
from autopar.ranks import (
    Tensors,
    assign_piece,
    assigned,
    handed_out,
    loadable,
    loss_scale_for,
    model_norm_dtype,
    normed_gradients,
    rank_program,
    shared_buffers,
    tensors_of_rank,
    whole_output,
)
from autopar.runtime.compiled import Compile
from autopar.runtime.held_gradients import HeldGradients
from autopar.runtime.outputs import join
from autopar.runtime.parameter_shards import joined
from autopar.runtime.record import RankRecord
from autopar.runtime.threads import ThreadRanks
from autopar.shared_copies import SharedCopies
from autopar.state import (
    gather_whole,
    local_piece,
    require_values,
    split_axis,
    stage_of_parameter,
    text_of,
)  # fmt: skip
from autopar.trace import Traced


class ThreadedRanks:
    """All ranks as threads of this process."""

    def __init__(
        self, plan: Plan, traced: Traced, device: torch.device, seed: int, like: ThreadedRanks | None = None,
        compile: Compile = False,
    ) -> None:  # fmt: skip
        self.plan, self.traced, self.device, self.seed, self.compile = plan, traced, device, seed, compile
        if like is None:
            held = [tensors_of_rank(plan, traced, rank, device) for rank in range(plan.num_ranks)]
            self.parameters_of = [parameters for parameters, _, _ in held]
            self.buffers_of = [buffers for _, buffers, _ in held]
            self.shards_of = [shards for _, _, shards in held]
            self.copies = SharedCopies(plan, self.parameters_of)
            self.held_of = list(map(HeldGradients, self.parameters_of, self.shards_of))
        else:
            self.parameters_of, self.shards_of, self.held_of = like.parameters_of, like.shards_of, like.held_of
            self.copies = like.copies
            self.buffers_of = [
                shared_buffers(plan, traced, rank, device, shared) for rank, shared in enumerate(like.buffers_of)
            ]
        self.loss_scale = loss_scale_for(plan, like)
        self._threads: ThreadRanks | None = None
        self._training = True

    def _started(self) -> ThreadRanks:
        if self._threads is None:
            for parameters, buffers in zip(self.parameters_of, self.buffers_of, strict=True):
                require_values([*parameters.items(), *buffers.items()])
            programs = [rank_program(self.plan, rank) for rank in range(self.plan.num_ranks)]
            self._threads = ThreadRanks(
                programs,
                self.parameters_of,
                self.buffers_of,
                self.plan.mesh,
                self.plan.microbatches,
                device=self.device,
                seed=self.seed,
                compile=self.compile,
                held_per_rank=self.held_of,
                loss_scale=self.loss_scale,
            )
        return self._threads

    def rows_of_all(self, shape: str, rows: int, refusal: str | None = None) -> int:
        return rows // self.plan.mesh.get("dp", 1)

    def step(self, batch: Mapping[str, torch.Tensor], *, accumulate: bool) -> torch.Tensor:
        with self.copies.step(self.held_of), self._scaling(accumulate):
            return self._run("step", batch, accumulate=accumulate)

    def profile(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[RankRecord]]:
        with self.copies.step(self.held_of), self._scaling(False):
            return self._run("profile", batch)

    def _scaling(self, accumulate: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.loss_scale is None else self.loss_scale.step(self.held_of, self.device, accumulate=accumulate)

    def _run(self, method: str, batch: Mapping[str, torch.Tensor], **options: bool) -> Any:
        threads = self._started()
        threads.train(self._training)
        return getattr(threads, method)(batch, **options)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Tensors | None:
        self.copies.follow()
        results = self._run("forward", batch)
        outputs: Tensors = {}
        for name, text in self.plan.stages[-1].outputs.items():
            replicas = [
                whole_output(self.plan, text, [results[rank][name] for rank in self._ranks_of(len(self.plan.stages) - 1, replica)])
                for replica in range(self.plan.mesh.get("dp", 1))
            ]
            outputs[name] = join(name, text, replicas, self.plan.mesh)
        return outputs

    def _ranks_of(self, stage: int, replica: int = 0) -> list[int]:
        """The ranks of a stage in one replica, in order of their coords on tp."""
        held = [(rank, self.plan.coords(rank)) for rank in range(self.plan.num_ranks)]
        return [
            rank for rank, coords in held if coords["pp"] == self.plan.stage_ranks[stage] and coords.get("dp", 0) == replica
        ]

    def train(self, mode: bool) -> None:
        self._training = mode

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        alone = self.plan.num_ranks == 1
        for rank, parameters in enumerate(self.parameters_of):
            firsts = {name: parameter for name, parameter in parameters.items() if self.copies.is_first(rank, name)}
            for name, parameter in handed_out(self.plan, firsts, self.shards_of[rank], together=True):
                yield (name if alone else f"rank {rank}: {name}"), parameter

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        gradients = [
            pair for rank, held in enumerate(self.held_of) for pair in normed_gradients(self.plan, self.plan.coords(rank), held)
        ]
        part = norm_part(gradients, norm_type, self.device)
        parameters = (parameter for _, parameter in self.named_parameters())
        return clip_by_part(parameters, part, max_norm, norm_type, error_if_nonfinite, model_norm_dtype(self.traced))

    def reductions(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for worker in self._threads.workers if self._threads is not None else ():
            found |= worker.reductions
        return dict(found)

    def whole(self, name: str, of: str = "value") -> torch.Tensor | None:
        """A whole parameter or buffer (or with of="grad" its gradient) from its first stage's ranks; None for no gradient."""
        stage = stage_of_parameter(self.plan)[name]
        text, pieces = text_of(self.plan.stages[stage], name), []
        for place, rank in enumerate(self._ranks_of(stage)[: None if split_axis(text, self.plan) else 1]):
            tensor = {**self.parameters_of[rank], **self.buffers_of[rank]}[name]
            piece = tensor.grad if of == "grad" else tensor.detach()
            shards = [
                held.of[name] for replica in range(self.plan.mesh.get("dp", 1))
                if (held := self.shards_of[self._ranks_of(stage, replica)[place]]) is not None and name in held.of
            ]  # fmt: skip
            if shards and of == "grad":
                parts = [shard.grad for shard in shards if shard.grad is not None]
                piece = joined(parts, tensor.shape) if parts else None
            elif shards:
                piece = joined(shards, tensor.shape)
            if piece is None:
                return None
            pieces.append(piece)
        return gather_whole(self.plan, name, text, pieces).clone()

    def whole_tensors(self) -> Tensors | None:
        found = {name: self.whole(name) for name in stage_of_parameter(self.plan)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def state_dict(self) -> Tensors:
        whole = self.whole_tensors() or {}
        whole = {name: tensor for name, tensor in whole.items() if name in self.traced.state}
        return whole | {alias: whole[name] for alias, name in self.plan.aliases.items() if name in whole}

    def replicated(self, values: Tensors) -> Tensors:
        return {name: value.clone() for name, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        wanted = {
            name: text_of(stage, name) for stage in self.plan.stages for name in (*stage.parameters, *stage.buffers)
        }
        values = loadable(self.plan, self.traced, state_dict, wanted)
        for rank in range(self.plan.num_ranks):
            coords = self.plan.coords(rank)
            for tensors in (self.parameters_of[rank], self.buffers_of[rank]):
                for name in list(tensors):
                    if name in values:
                        piece = local_piece(values[name], wanted[name], self.plan, coords)
                        tensors[name] = assigned(tensors[name], piece, name, self.shards_of[rank])  # type: ignore[assignment]
        self.copies.share()

    def assign(self, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Each rank's piece of whole values of the model, one at a time."""
        for name, value in values:
            for rank in range(self.plan.num_ranks):
                placed, others = self.plan.rank_state(rank)
                assign_piece(
                    self.plan, self.plan.coords(rank), {**placed, **others}, name, value.to(self.device),
                    (self.parameters_of[rank], self.buffers_of[rank]), self.shards_of[rank],
                )  # fmt: skip
            self.copies.share(name)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()
