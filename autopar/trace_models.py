"""What is handed to `parallelize`: wrappers are looked through, and what a graph cannot stand for is refused at once.

A wrapper that only runs the module it holds in another way (torch.compile, DataParallel, DistributedDataParallel) is
traced as that module; parameters keep the wrapper's names, so state dicts still load into it. Refused: TorchScript,
whose Python is gone; lazy modules without shapes; gradient hooks of modules and parameters, which a graph would forget
and which would run on a part of a gradient.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from costmodel.errors import BadArgument, CaptureError

_HOLDS: dict[type[nn.Module], str] = {
    OptimizedModule: "_orig_mod",
    DataParallel: "module",
    DistributedDataParallel: "module",
}


def inner_model(model: nn.Module) -> nn.Module:
    """The module whose forward a wrapper runs; the model itself if it is no wrapper."""
    while (name := _HOLDS.get(type(model))) is not None:
        model = getattr(model, name)
    return model


def check_model(model: nn.Module) -> None:
    """CaptureError or BadArgument for a model that no graph can stand for."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "a TorchScript module cannot be captured", why="it is compiled, without the Python it came from",
            use="the nn.Module that it was made from",
        )  # fmt: skip
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise BadArgument(
                f"{name} has no shape yet", why="its module is lazy and has seen no batch", use="one call of the model before"
            )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(
                f"{name} has a gradient hook", why="ranks hold parts of a parameter, and sum its gradient once a step",
                use="the same change of .grad after step()",
            )  # fmt: skip
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"the module {name or type(module).__name__} has a gradient hook",
                why="a hook is Python that a graph does not hold", use="torch.library.custom_op with register_autograd",
            )  # fmt: skip
