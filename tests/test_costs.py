"""One formula for symbols and numbers: a node's cost in batch and sequence, with numbers put in, is its numeric cost."""

import pytest
from models import GPT, gpt_batch

from autopar.trace import trace
from costmodel.hardware import hardware
from passes.costs import Pricing, symbolic_cost
from passes.ir import is_trainable, size_symbol, tensor_inputs
from passes.rules import call_of
from passes.shard import is_call


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
