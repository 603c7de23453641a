"""Ops of the user's own (torch.library): whole and right without a rule, split with one; what cannot be done is an error
that names the line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.errors import CaptureError
from passes.rules import RULES


@torch.library.custom_op("autopar_tests::waves", mutates_args=())
def waves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.cos()


@torch.library.custom_op("autopar_tests::total", mutates_args=())
def total(parts: list[Tensor], scale: float) -> Tensor:
    return scale * torch.stack(parts).sum(0)


@torch.library.custom_op("autopar_tests::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@torch.library.custom_op("autopar_tests::grow", mutates_args=("x",))
def grow(x: Tensor) -> None:
    x.mul_(2)


def _keep_count(ctx, inputs, output) -> None:
    ctx.count, ctx.scale = len(inputs[0]), inputs[1]


waves.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))
waves.register_autograd(
    lambda ctx, sine, cosine: sine * ctx.saved_tensors[0].cos() - cosine * ctx.saved_tensors[0].sin(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
total.register_fake(lambda parts, scale: torch.empty_like(parts[0]))
total.register_autograd(lambda ctx, grad: ([grad * ctx.scale for _ in range(ctx.count)], None), setup_context=_keep_count)
centred.register_fake(lambda x: torch.empty_like(x))
centred.register_autograd(lambda ctx, grad: grad - grad.mean(-1, keepdim=True))
mine = torch.ops.autopar_tests

OPS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {  # what runs it, its rule, the placement that this allows
    "waves": (lambda h: torch.mul(*mine.waves(h)), "... -> ..., ...", "32/tp 16"),
    "total": (lambda h: mine.total([h, h.relu(), h.tanh()], 2.0), "..., ..., ... -> ...", "32/tp 16"),
    "centred": (lambda h: mine.centred(h), "... [d] -> ... [d]", "32 16/tp"),
}


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.function = nn.Linear(16, 32), nn.Linear(32, 16), function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(self.function(self.up(x))), y)


def batch() -> dict[str, Tensor]:
    return {name: torch.randn(4, 16, generator=torch.Generator().manual_seed(k)) for k, name in enumerate("xy")}


@pytest.fixture
def rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("name", OPS)
def test_without_a_rule_it_stays_whole_with_a_warning_and_right_numbers(name: str) -> None:
    function, _, _ = OPS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = autopar.parallelize(Of(function), batch(), tp=2).plan
    assert len([str(item.message) for item in caught if "stays whole" in str(item.message)]) == 1
    (note,) = [note for note in plan.notes if "has no rule and stays whole" in note]
    assert f"torch.ops.autopar_tests.{name}.default" in note and f"register_rule(torch.ops.autopar_tests.{name}" in note
    assert "test_custom_ops.py:" in note and "mine." in note
    with pytest.warns(UserWarning, match="stays whole"):
        report = autopar.verify(Of(function), batch(), tp=2)
    assert report.ok, report


@pytest.mark.parametrize("name", OPS)
def test_with_a_rule_it_is_split(name: str, rules: None) -> None:
    function, rule, expected = OPS[name]
    autopar.register_rule(getattr(mine, name).default, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = autopar.verify(Of(function), batch(), tp=2)
    assert report.ok, report
    assert str(report.plan.placements["up.weight"]) == expected


def test_a_wrong_rule_does_not_verify(rules: None) -> None:
    autopar.register_rule(mine.centred.default, "... -> ...")
    assert not autopar.verify(Of(OPS["centred"][0]), batch(), tp=2).ok


def grown(h: Tensor) -> Tensor:
    h = h.clone()
    mine.grow(h)
    return h


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (grown, ("changes its arguments", "mine.grow(h)")),
        (lambda h: h * h.sum().item(), ("cannot be captured", "h.sum().item()")),
        (lambda h: h * sum(h[0, :2].tolist()), ("cannot be captured", "tolist()")),
        (lambda h: h * h[h > 0].sum(), ("cannot be captured", "h[h > 0]")),
        (lambda h: h if h.sum() > 0 else -h, ("cannot be captured", "if h.sum() > 0")),
    ],
    ids=["changed argument", "item", "tolist", "chosen by a mask", "a branch on values"],
)
def test_what_cannot_be_planned_names_the_line_and_a_way_out(function: Callable[[Tensor], Tensor], says: tuple[str, ...]) -> None:
    with pytest.raises(CaptureError) as error:
        autopar.parallelize(Of(function), batch(), tp=2)
    assert all(text in str(error.value) for text in (*says, "test_custom_ops.py:", "use ")), error.value
