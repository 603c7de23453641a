"""One formula for symbols and numbers: a node's cost in batch and sequence, with numbers put in, is its numeric cost."""

import functools
import math

import numpy
import pytest
from models import GPT, gpt_batch

from autopar import Plan, parallelize
from autopar.errors import BadArgument
from autopar.trace import trace
from costmodel.hardware import hardware
from costmodel.ops import op_cost
from passes.costs import Pricing, op_name, symbolic_cost
from passes.ir import is_trainable, size_symbol, tensor_inputs, tensor_type
from passes.localize import sharding
from passes.module_cost import FIGURES, calls_under
from passes.patterns import call_of
from passes.placement import local_type
from passes.reshard import all_reduce, copy_to, own_gradient
from passes.values import is_call


@pytest.mark.parametrize("sizes", [{"B": 2, "T": 4}, {"B": 3, "T": 16}])
def test_symbolic_costs_with_numbers_are_the_numeric_costs(sizes):
    graph = trace(GPT(), (), gpt_batch()).graph_module.graph
    pricing, compared, found = Pricing(hardware("cpu"), sizes), 0, set()
    for node in filter(is_call, graph.nodes):
        call, trainable = call_of(node), tuple(is_trainable(n) for n in tensor_inputs(node))
        symbolic = symbolic_cost(call, trainable)
        found |= getattr(symbolic.forward_flops, "free_symbols", set())
        assert symbolic.at(sizes) == pricing.cost(call, trainable), node
        compared += 1
    assert compared > 20 and found == {size_symbol("B"), size_symbol("T")}


PATHS = ("h.0", "h.1.attn", "wte", "norm", "")


SPLIT = {"h.*.attn.qkv.weight": 0, "h.*.attn.out.weight": 1, "h.*.up.weight": 0, "h.*.down.weight": 1}


@functools.cache
def gpt_plan(tp: int, **sizes):
    """Megatron's placements, which at this size are not the cheapest."""
    overrides = {"placements": SPLIT} if tp > 1 else None
    return parallelize(GPT(**sizes), gpt_batch(), tp=tp, pp=2, microbatches=2, overrides=overrides).plan


def priced(plan, path: str) -> dict[str, int]:
    """The same figures op by op, from the shapes that one rank has."""
    sums = dict.fromkeys(FIGURES, 0)
    sizes = {**plan.sizes, "B": plan.sizes["B"] // plan.microbatches}
    pricing, parameters = Pricing(hardware("cpu"), sizes), {}
    for stage in plan.stages:
        for node in calls_under(stage.graph_module.graph, path):
            if tensor_type(node) is None:
                continue
            inputs = tensor_inputs(node)
            for each in inputs:
                if each.op == "get_attr" and each.meta.get("kind") == "parameter":
                    parameters[str(each.target)] = math.prod(local_type(tensor_type(each), sharding(each), plan.mesh).shape)
            if node.target in (copy_to, all_reduce, own_gradient):
                share = pricing.num_bytes(tensor_type(node)) * (plan.mesh["tp"] - 1) // plan.mesh["tp"]
                sums["communication_bytes"] += 0 if node.target is own_gradient else 2 * share  # an all_reduce, forward or backward
                continue
            shapes = [pricing.shape(local_type(tensor_type(n), sharding(n), plan.mesh)) for n in (*inputs, node)]
            causal = "attention" in str(node.target) and len(node.args) > 5 and bool(node.args[5])
            cost = op_cost(op_name(node.target), shapes[:-1], shapes[-1:], tuple(map(is_trainable, inputs)), causal)
            sums["forward_flops"] += cost.forward_flops
            sums["backward_flops"] += cost.backward_flops
            sums["read_bytes"] += cost.read_bytes + cost.backward_read_bytes
            sums["written_bytes"] += cost.written_bytes + cost.backward_written_bytes
    sums["parameters"] = sum(parameters.values())
    return sums


@pytest.mark.parametrize("path", PATHS)
def test_a_modules_expressions_give_what_its_ops_cost_one_by_one(path):
    for tp in (1, 2, 4):
        plan = gpt_plan(tp)
        expected = priced(plan, path)
        found = plan.cost(path).at()
        assert {name: found[name] for name in expected if name != "saved_bytes"} == {
            name: value for name, value in expected.items() if name != "saved_bytes"
        }


@pytest.mark.parametrize("path", PATHS)
def test_an_expression_at_another_tp_is_that_plans(path):
    two, four = gpt_plan(2), gpt_plan(4)
    assert two.cost(path).at(tp=4) == four.cost(path).at()


def test_expressions_take_arrays_and_are_those_of_a_loaded_plan(tmp_path):
    plan = gpt_plan(2)
    plan.save(tmp_path / "plan.json")
    cost, loaded = plan.cost("h.0"), Plan.load(tmp_path / "plan.json").cost("h.0")
    assert cost.expressions == loaded.expressions and str(cost) == str(loaded)
    batches = numpy.array([1, 2, 8])
    values = cost.at(B=batches)["forward_flops"]
    assert [cost.at(B=int(b))["forward_flops"] for b in batches] == values.tolist()
    assert set(cost.symbols) == {"B", "T", "tp"} and "tp" in str(cost) and "forward_flops" in str(cost)


def test_saved_bytes_of_the_modules_of_a_chain_add_up():
    plan = gpt_plan(2)
    whole, parts = plan.cost("").saved_bytes, [plan.cost(f"h.{k}").saved_bytes for k in range(2)]
    assert sum(parts).subs({"B": 2, "T": 16}) > 0 and (whole - sum(parts)).subs({s: 2 for s in whole.free_symbols}) > 0


def test_a_padded_dim_counts_the_padding():
    cost = gpt_plan(2, dim=24, heads=3).cost("h.0.attn")
    weights = 4 * 24 * 24 + 3 * 24  # of qkv and out; the bias of out is whole
    assert [cost.at(tp=tp)["parameters"] for tp in (1, 2, 3)] == [weights + 24, weights * 2 // 3 + 24, weights // 3 + 24]


def test_a_layer_of_torchs_own_is_found_by_its_parameters():
    cost = gpt_plan(2).cost("h.0.down")
    assert str(cost.parameters) == "32 + 4096/tp"  # the bias is whole
    rows = 2 * 16
    assert cost.at()["forward_flops"] == 2 * rows * 64 * 32 + rows * 32  # half of the 128, and the bias after the sum
    assert cost.at()["communication_bytes"] == rows * 32 * 4  # an all_reduce over two: 2 (2-1)/2 of the value


def test_a_path_without_ops_and_a_size_without_effect_are_errors():
    plan = gpt_plan(2)
    with pytest.raises(BadArgument, match=r"no op of the plan is under the module path 'h\.9'"):
        plan.cost("h.9")
    with pytest.raises(BadArgument, match="no size sp"):
        plan.cost("h.0").at(sp=2)
