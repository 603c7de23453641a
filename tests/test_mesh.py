"""Where the axes of a mesh lie, what plans say of it, and what replicas exchange, by the textbook."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from models import GPT, gpt_batch

import autopar
from autopar import options
from autopar.options import mesh_of
from autopar.planner import make_plan
from autopar.runtime.world import coords_of
from autopar.trace import Traced, trace
from costmodel.errors import BadArgument
from costmodel.hardware import HARDWARE, AxisLink, Link
from costmodel.mesh import axis_groups, axis_stride, nodes_spanned
from costmodel.replicas import BUCKET_BYTES, RankLoad, ReplicaAxis, ReplicaTraffic, beside, replica_traffic
from passes.overrides import Overrides

MESHES = [{"pp": 2, "dp": 3, "tp": 4}, {"tp": 2, "dp": 2, "pp": 3}, {"dp": 5, "tp": 1}, {"pp": 1}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_groups_are_the_ranks_that_differ_on_one_axis(mesh: Mapping[str, int]) -> None:
    coords = [coords_of(rank, mesh) for rank in range(math.prod(mesh.values()))]
    for axis, size in mesh.items():
        groups = axis_groups(mesh, axis)
        assert sorted(rank for group in groups for rank in group) == list(range(len(coords)))
        for group in groups:
            assert [coords[rank][axis] for rank in group] == list(range(size))
            assert len({tuple(c for name, c in coords[rank].items() if name != axis) for rank in group}) == 1
            assert all(b - a == axis_stride(mesh, axis) for a, b in itertools.pairwise(group))


def test_nodes_that_axes_span() -> None:
    mesh = {"pp": 2, "dp": 4, "tp": 2}
    assert [nodes_spanned(mesh, axis, 4) for axis in ("pp", "dp", "tp")] == [2, 2, 1]
    assert [nodes_spanned(mesh, axis, 16) for axis in ("pp", "dp", "tp", "cp")] == [1, 1, 1, 1]
    assert nodes_spanned({"dp": 2, "tp": 3}, "tp", 4) == 2, "ranks 3, 4, 5: one node and the next"


@pytest.fixture(scope="module")
def gpt() -> Traced:
    with torch.device("meta"):
        return trace(GPT(layers=2, dim=64, heads=8), (), gpt_batch(rows=4))


@pytest.mark.parametrize(
    ("mesh", "zero", "says"),
    [
        (mesh_of(pp=2, dp=1, tp=2), 0, ["4 ranks in one node, pp x tp from the outside in: pp=2 and tp=2 inside a node"]),
        (mesh_of(pp=2, dp=4, tp=2), 0, ["tp=2 inside a node; pp=2 and dp=4 over 2 nodes", "dp=4 crosses nodes: its traffic takes"]),
        (mesh_of(pp=1, dp=2, tp=8), 3, ["4 ranks a node, 4 nodes", "tp=8 crosses nodes: .* tp=4 stays inside", "dp=2 crosses nodes"]),
        (mesh_of(pp=2, dp=1, tp=4, order=("tp", "dp", "pp")), 0, ["tp=4 over 2 nodes", "as the last of mesh_order it stays inside"]),
        (mesh_of(pp=1, dp=2, tp=3), 0, ["tp=3 crosses nodes: some of its groups lie in 2 nodes"]),
    ],
    ids=str,
)  # fmt: skip
def test_plans_say_where_axes_lie_and_what_crossing_nodes_costs(gpt: Traced, mesh: dict[str, int], zero: int, says: list[str]) -> None:
    machine = replace(HARDWARE["a100-80gb"], devices_per_node=4)
    plan = make_plan(gpt, mesh=mesh, microbatches=2, schedule="1f1b", hardware=machine, model_name="gpt", zero=zero)
    notes = "\n".join(plan.notes)
    for text in says:
        assert re.search(text, notes), notes
    assert ("crosses nodes" in notes) == any("cross" in text or "over" in text for text in says)


def test_a_searched_plan_prints_what_replicas_exchange(gpt: Traced) -> None:
    plan = autopar.search(gpt, None, gpus=8, hardware="a100-80gb", dp=4, zero=1, tp=2, pp=1, top=1)[0]
    assert plan.predicted.replicas is not None and plan.predicted.replicas.num_bytes > 0
    assert "REPLICAS  (dp=4, ZeRO 1; of one rank a step)" in str(plan)


def test_an_axis_that_leaves_its_node_is_priced_by_the_network(gpt: Traced) -> None:
    machine = replace(HARDWARE["a100-80gb"], devices_per_node=2, across=Link(1e-3, 1e9))
    split = Overrides.of({"placements": {"h.*.up.weight": "256/tp 64", "h.*.down.weight": "64 256/tp"}})
    inside, across = (
        make_plan(gpt, mesh=mesh, microbatches=1, schedule="1f1b", hardware=machine, model_name="gpt", overrides=split).stages[0]
        for mesh in (mesh_of(pp=1, dp=2, tp=2), mesh_of(pp=1, dp=2, tp=2, order=("tp", "dp", "pp")))
    )
    assert across.cost.collective_seconds > 10 * inside.cost.collective_seconds > 0


def test_stages_are_neighbours_where_pp_is_the_innermost_axis(gpt: Traced) -> None:
    machine = replace(HARDWARE["a100-80gb"], devices_per_node=2, across=Link(1e-3, 1e9))
    outermost, innermost = (
        make_plan(gpt, mesh=mesh, microbatches=2, schedule="1f1b", hardware=machine, model_name="gpt").stages[0]
        for mesh in (mesh_of(pp=2, dp=2, tp=1), mesh_of(pp=2, dp=2, tp=1, order=("dp", "tp", "pp")))
    )
    assert outermost.cost.send_seconds > 10 * innermost.cost.send_seconds > 0


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that torchrun gives a rank of 2 nodes with 4 ranks each."""
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("hardware", [None, "a100-80gb"])
def test_a_job_on_several_nodes_is_planned_for_them(two_nodes: None, hardware: str | None) -> None:
    par = autopar.parallelize(GPT(layers=2), gpt_batch(rows=4), tp=2, dp=4, hardware=hardware)
    assert any("4 ranks a node, 2 nodes" in note and "dp=4 over 2 nodes" in note for note in par.plan.notes)


def test_a_job_on_one_node_is_planned_for_the_profiles_node(two_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert options.profile_for("a100-80gb", GPT()) == HARDWARE["a100-80gb"]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert options.profile_for("a100-80gb", GPT()) == HARDWARE["a100-80gb"]


@pytest.mark.parametrize("local", ["3", "16", "0", "-4", "four", ""])
def test_ranks_of_a_node_that_contradict_the_job_are_refused(two_nodes: None, monkeypatch: pytest.MonkeyPatch, local: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    with pytest.raises(BadArgument, match=f"LOCAL_WORLD_SIZE = '{local}' in a job of 8 ranks"):
        autopar.parallelize(GPT(), gpt_batch(rows=4), tp=2, dp=4)


# ---- replicas -------------------------------------------------------------------------------------------------------

LINK = Link(1e-6, 1e9)
GRADIENTS, PARAMETERS = 8e8, 4e8


def exchanged(zero: int, size: int = 4, microbatches: int = 3, backward: float = 10.0, **options: bool) -> ReplicaTraffic:
    axis = ReplicaAxis(size, AxisLink(LINK, LINK, size, 1), zero, **options)
    return replica_traffic([RankLoad(GRADIENTS, PARAMETERS, 5.0, backward)], axis, microbatches=microbatches)


def test_bytes_sent_are_the_textbooks() -> None:
    """Rajbhandari et al. 2020, section 7: twice the model for ZeRO 0 to 2, three times for ZeRO 3 with one microbatch."""
    assert exchanged(0).num_bytes == pytest.approx(2 * 3 / 4 * GRADIENTS)
    assert exchanged(1).num_bytes == exchanged(2).num_bytes == pytest.approx(3 / 4 * (GRADIENTS + PARAMETERS))
    assert exchanged(3, microbatches=1).num_bytes == pytest.approx(3 / 4 * (GRADIENTS + 2 * PARAMETERS))
    assert exchanged(3).num_bytes == pytest.approx(3 / 4 * (GRADIENTS + 6 * PARAMETERS))
    assert exchanged(0, size=1) == ReplicaTraffic()


def test_a_sum_is_hidden_by_the_last_backward_but_for_a_bucket() -> None:
    whole = exchanged(0).seconds
    assert exchanged(0).exposed_seconds == pytest.approx(whole * BUCKET_BYTES / GRADIENTS)
    assert exchanged(0, backward=0.3).exposed_seconds == pytest.approx(whole - 0.3)
    assert exchanged(0, overlaps=False).exposed_seconds == whole


def test_a_rank_that_stops_early_hides_its_sums_behind_later_ranks() -> None:
    axis = ReplicaAxis(4, AxisLink(LINK, LINK, 4, 1))
    small, large = RankLoad(1e6, 1e6, 1.0, 2.0), RankLoad(4e9, 4e9, 1.0, 2.0)
    first, last = (replica_traffic(ranks, axis, microbatches=4) for ranks in ([large, small], [small, large]))
    assert first.exposed_seconds - last.exposed_seconds == pytest.approx(2.0)
    assert first.seconds == last.seconds


def test_what_is_beside_compute() -> None:
    assert beside(2.0, 1.0, overlaps=False) == (3.0, 1.0)
    assert beside(2.0, 1.0, overlaps=True) == (2.0, 0.0)
    assert beside(2.0, 3.0, overlaps=True) == (3.0, 1.0)
    assert beside(2.0, 1.0, overlaps=True, slowdown=1.5) == (2.5, 0.5)
    assert beside(2.0, 1.0, overlaps=True, first=0.25) == (2.25, 0.25)
