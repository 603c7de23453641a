"""A recorded step: the same gradients as any other, spans that fit what has to come after what, and time told apart rightly."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from models import GPT, gpt_batch
from torch import nn

import autopar
from autopar.errors import BadArgument
from autopar.launch import launch
from autopar.runtime.record import RankRecord, on_one_clock
from autopar.step_profile import StepProfile, measured_lane
from autopar.timeline_view import where_time_goes
from passes.timeline import Span


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(x, y)


def net_batch(rows: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, 64, generator=generator) for name in "xy"}


def made(**options: object) -> autopar.ParallelModel:
    torch.manual_seed(0)
    return autopar.parallelize(Net(), net_batch(), microbatches=4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 3, "schedule": "gpipe"}, {"pp": 2, "tp": 2}, {}])
def test_a_recorded_step_is_a_step(layout):
    """Loss and gradients to the bit; and afterwards nothing is recorded any more."""
    plain, recorded = made(**layout), made(**layout)
    for _ in range(2):
        loss = plain.step(**net_batch())
        profile = recorded.profile_step(**net_batch())
        assert torch.equal(profile.loss, loss)
    for one, other in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert torch.equal(recorded.step(**net_batch()), loss)
    plain.close()
    recorded.close()


@pytest.mark.parametrize("layout", [{"pp": 3}, {"pp": 2, "tp": 2, "schedule": "gpipe"}])
def test_spans_are_the_plans_and_come_after_what_they_need(layout):
    par = made(**layout)
    par.step(**net_batch())
    profile = par.profile_step(**net_batch())
    stages = layout["pp"]
    predicted = {(span.rank, span.kind, span.microbatch) for span in par.plan.simulated().compute}
    computes = {(s.rank, s.kind, s.microbatch): s for s in profile.spans if s.kind in ("forward", "backward")}
    assert set(computes) == predicted and len(computes) == 2 * 4 * stages
    for rank in range(stages):
        mine = sorted((s for s in computes.values() if s.rank == rank), key=lambda span: span.start_seconds)
        assert all(left.end_seconds <= right.start_seconds for left, right in pairwise(mine))
    for microbatch in range(4):
        for stage in range(stages - 1):
            down = computes[stage, "forward", microbatch], computes[stage + 1, "forward", microbatch]
            back = computes[stage + 1, "backward", microbatch], computes[stage, "backward", microbatch]
            for first, second in (down, back):
                assert first.end_seconds <= second.start_seconds
    assert ("collective" in {span.kind for span in profile.spans if span.microbatch >= 0}) == ("tp" in layout)
    assert all(0 <= s.start_seconds <= s.end_seconds <= profile.step_seconds + 1e-12 for s in profile.spans)
    for time in where_time_goes(profile.lane):
        assert time.step == pytest.approx(profile.step_seconds) and time.compute > 0
    par.close()


def test_profiles_are_saved_with_the_prediction_beside_them(tmp_path):
    par = made(pp=2)
    profile = par.profile_step(**net_batch())
    assert profile.text().startswith("measured ") and str(profile) == profile.text()
    both = profile.compare(par.plan)
    assert [lane.name for lane in both.lanes] == ["predicted", "measured"]
    profile.save_svg(tmp_path / "a.svg")
    profile.save_html(tmp_path / "a.html")
    profile.save_trace(tmp_path / "a.json")
    assert "measured" in (tmp_path / "a.svg").read_text() and "predicted" in (tmp_path / "a.html").read_text()
    assert len(json.loads((tmp_path / "a.json").read_text())["traceEvents"]) > 2 * 2 * 4
    par.close()


def test_a_model_without_a_loss_cannot_be_profiled():
    par = autopar.parallelize(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(BadArgument, match="no loss"):
        par.profile_step(torch.randn(2, 4))


def profiled() -> tuple[list[Span], float, float]:
    par = made(pp=2)
    par.step(**net_batch())
    profile = par.profile_step(**net_batch())
    par.close()
    return profile.spans, profile.step_seconds, profile.loss.item()


def test_processes_all_get_the_whole_jobs_spans():
    first, second = launch(profiled, 2)
    assert first == second
    spans, step_seconds, _ = first
    assert {span.rank for span in spans} == {0, 1}
    assert sum(span.kind == "forward" for span in spans) == 2 * 4
    forward = {(s.rank, s.microbatch): s for s in spans if s.kind == "forward"}
    # one clock: what a stage receives has been sent
    assert all(forward[0, k].end_seconds <= forward[1, k].start_seconds for k in range(4))
    assert max(span.end_seconds for span in spans) <= step_seconds + 1e-12


# ---- records made by hand: exact times -------------------------------------------------------------------------------


def records(host: str = "here", ahead: float = 0.0) -> list[RankRecord]:
    """Two stages, one microbatch. Stage 0: forward 1-3, sends; stage 1 asks for it from 0 on, has it at 4."""
    first = RankRecord(
        0, "here", 0.0, 12.0,
        (
            ("Forward(0)", 1.0, 3.0), ("SendActivation(0, to=1)", 3.0, 3.125), ("RecvGradient(0, source=1)", 3.125, 10.0),
            ("Backward(0)", 10.0, 11.5), ("SumGradients()", 11.5, 12.0),
        ),
        (),
    )  # fmt: skip
    second = RankRecord(
        1, host, 0.0, 11.0,
        (
            ("RecvActivation(0, source=0)", 0.0, 0.0), ("RecvActivation(0, source=0)", 0.0, 4.0),
            ("Forward(0)", 4.5, 6.0), ("Backward(0)", 6.0, 9.0),
            ("SendGradient(0, to=0)", 9.0, 9.25), ("SumGradients()", 9.25, 11.0),
        ),
        ((5.0, 5.5), (10.0, 10.5)),
    )  # fmt: skip
    return [first, second.moved(ahead)]


def one_microbatch_plan() -> autopar.Plan:
    plan = made(pp=2).plan.with_microbatches(1)
    listed = [[repr(one) for one in row] for row in plan.instructions]
    assert listed[0][1:3] == ["SendActivation(0, to=1)", "RecvGradient(0, source=1)"], "one run: the receive is posted with it"
    return plan


def test_waiting_moving_and_overhead_are_told_apart():
    lane = measured_lane(one_microbatch_plan(), records())
    found = {(span.rank, span.kind): (span.start_seconds, span.end_seconds) for span in lane.spans if span.kind != "overhead"}
    assert found == {
        (0, "forward"): (1.0, 3.0), (0, "send"): (3.0, 4.0), (0, "receive"): (9.0, 10.0), (0, "backward"): (10.0, 11.5),
        (0, "sum gradients"): (11.5, 12.0),
        (1, "receive"): (3.0, 4.0), (1, "forward"): (4.5, 6.0), (1, "collective"): (5.0, 5.5), (1, "backward"): (6.0, 9.0),
        (1, "send"): (9.0, 10.0), (1, "sum gradients"): (9.25, 11.0),
    }  # fmt: skip
    overhead = [(span.rank, span.start_seconds, span.end_seconds) for span in lane.spans if span.kind == "overhead"]
    assert overhead == [(0, 0.0, 1.0), (1, 4.0, 4.5)]
    first, second = where_time_goes(lane)
    assert (first.compute, first.collectives, first.transfers, first.overhead, first.bubble) == (3.5, 0.5, 2.0, 1.0, 5.0)
    # collectives: one inside of the forward, and the gradients' sum, part of which passes while the send goes on
    assert (second.compute, second.collectives, second.transfers, second.overhead, second.bubble) == (4.0, 2.25, 1.25, 0.5, 4.0)


def test_replayed_seconds_are_those_of_the_computes_alone():
    """Forwards of 2 and 1.5, backwards of 3 and 1.5, one after the other."""
    plan = one_microbatch_plan()
    assert StepProfile(plan, torch.zeros(()), measured_lane(plan, records())).replayed_seconds == 2.0 + 1.5 + 3.0 + 1.5
    par = made(pp=2)
    profile = par.profile_step(**net_batch())
    mine = [span for span in profile.spans if span.rank == 0 and span.kind in ("forward", "backward")]
    assert sum(span.end_seconds - span.start_seconds for span in mine) <= profile.replayed_seconds <= profile.step_seconds
    par.close()


def test_other_machines_clocks_are_moved_to_the_first_ones():
    plan = one_microbatch_plan()
    assert measured_lane(plan, records("there", ahead=1000.0)) == measured_lane(plan, records())
    # on one machine clocks are one: a rank that began later did begin later
    assert on_one_clock(records("here", ahead=2.0))[1].begin == 2.0
    assert dataclasses.replace(records()[1].moved(3.0).moved(-3.0)) == records()[1]


def test_a_transformer_with_tied_weights():
    par = autopar.parallelize(GPT(), gpt_batch(), pp=2, tp=2, microbatches=2)
    profile = par.profile_step(**gpt_batch())
    assert {"forward", "backward", "sum gradients", "collective"} <= {span.kind for span in profile.spans}
    par.close()
