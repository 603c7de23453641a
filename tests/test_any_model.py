"""Models in forms that few think of: wrappers, objects for arguments, Python beside tensor operations, hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.compare import Outcome, allow_rounding, compare_fixed
from costmodel.errors import AutoparError, BadArgument, CaptureError


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(6, 16, generator=generator), "y": torch.randn(6, 16, generator=generator)}


@dataclasses.dataclass
class Given:
    x: Tensor
    y: Tensor
    scale: float = 2.0


@dataclasses.dataclass
class Result:
    loss: Tensor
    parts: SimpleNamespace


class Objects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, given: Given) -> Result:
        hidden = self.net(given.x) * given.scale
        return Result(F.mse_loss(hidden, given.y), SimpleNamespace(hidden=hidden, kind="net"))


def test_objects_with_tensors_go_in_and_come_out() -> None:
    model, given = Objects(), Given(**_batch())
    assert autopar.verify(model, {"given": given}, tp=2, pp=2).ok
    par = autopar.parallelize(model, {"given": given}, tp=2)
    found, expected = par(given=given), model(given)
    assert type(found) is Result and found.parts.kind == "net"
    torch.testing.assert_close(found.parts.hidden, expected.parts.hidden)
    torch.testing.assert_close(found.loss, expected.loss)
    par.close()


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")], ids=["DataParallel", "compile"]
)
def test_a_wrapper_is_looked_through_and_keeps_its_names(wrap: Callable[[nn.Module], Any]) -> None:
    model, batch = wrap(_net()), tuple(_batch().values())
    assert autopar.verify(model, batch, loss_fn=F.mse_loss, tp=2, pp=2).ok
    par = autopar.parallelize(model, batch, loss_fn=F.mse_loss, tp=2)
    model.load_state_dict(par.full_state_dict(), strict=True)
    par.close()


class InForward(nn.Module):
    """Runs `what` on a hidden value."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.what = _net(), what

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.net(x)
        changed = self.what(hidden)
        return F.mse_loss(changed if isinstance(changed, Tensor) else hidden, y)


def _hooked(hidden: Tensor) -> None:
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: 2 * gradient)


def _branch(hidden: Tensor) -> Tensor:
    if hidden.mean() > 0:
        return 2 * hidden
    return hidden


def _checked(hidden: Tensor) -> None:
    assert hidden.isfinite().all() and not hidden.isnan().any(), "not finite"
    assert hidden.abs().max().item() < 1e9
    if hidden.isnan().any() or (hidden > 1e9).any():
        raise ValueError("too large")
    torch.distributions.Normal(hidden, hidden.exp()).log_prob(hidden)


def test_a_check_of_values_does_not_keep_a_model_from_being_captured() -> None:
    assert autopar.verify(InForward(_checked), _batch(), tp=2, pp=2).ok


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (_hooked, "gradient hook"),
        (_branch, "values of a tensor are read here"),
        (lambda hidden: torch.autograd.grad(hidden.sum(), hidden, create_graph=True)[0], "inside of forward"),
        (torch.vmap(lambda row: row * row.norm()), "vmap"),
        (lambda hidden: torch.cond(hidden.mean() > 0, torch.sin, torch.cos, (hidden,)), "cond"),
    ],
    ids=["hook", "branch", "grad", "vmap", "cond"],
)
def test_python_that_a_graph_cannot_hold_is_refused_with_its_line(what: Callable[[Tensor], Any], says: str) -> None:
    with pytest.raises(CaptureError, match=says) as caught:
        autopar.parallelize(InForward(what), _batch(), tp=2)
    assert "test_any_model.py:" in str(caught.value)


def _with_hook(kind: str) -> nn.Module:
    net = _net()
    if kind == "module":
        net[0].register_full_backward_hook(lambda module, inside, outside: None)
    elif kind == "parameter":
        net[0].weight.register_hook(lambda gradient: 2 * gradient)
    else:
        net[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return net


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: _with_hook("module"), "the module 0 has a gradient hook"),
        (lambda: _with_hook("parameter"), "0.weight has a gradient hook"),
        (lambda: _with_hook("accumulated"), "2.bias has a gradient hook"),
        (lambda: nn.Sequential(nn.LazyLinear(16)), "0.weight has no shape yet"),
        (lambda: torch.jit.trace(_net(), torch.zeros(1, 16)), "TorchScript"),
    ],
    ids=["module hook", "parameter hook", "accumulate hook", "lazy", "script"],
)
def test_a_model_that_no_graph_can_stand_for_is_refused_at_once(model: Callable[[], nn.Module], says: str) -> None:
    batch = tuple(_batch().values())
    for call in (autopar.parallelize, autopar.verify):
        with pytest.raises((CaptureError, BadArgument), match=says) as caught:
            call(model(), batch, loss_fn=F.mse_loss, tp=2)
        assert isinstance(caught.value, AutoparError)


def _outcome(factor: float, error: float) -> Outcome:
    weight = torch.linspace(0.1, 1.0, 10, dtype=torch.float64) * factor
    return Outcome(torch.tensor(1.0, dtype=torch.float64), {"weight": weight, "bias": torch.full((4,), error).double()})


@pytest.mark.parametrize(
    ("factor", "bias", "ok"),
    [
        (1.0, 2e-7, True),  # a bias before a norm: its gradient is rounding on both sides
        (1.0, 2e-5, False),  # far more than the untouched model's own rounding
        (1.1, 2e-7, False),  # a weight that is wrong
    ],
)
def test_rounding_is_measured_and_nothing_else_passes_for_it(factor: float, bias: float, ok: bool) -> None:
    untouched, exact = _outcome(1.0, -1e-7), _outcome(1.0 + 1e-7, 0.0)
    comparison = compare_fixed(_outcome(factor, bias), untouched, 1e-6, 1e-5)
    assert not comparison.ok
    assert allow_rounding(comparison, untouched, exact).ok is ok
