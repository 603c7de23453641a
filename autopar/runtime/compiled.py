"""torch.compile for the forward of a stage.

Design note. What is compiled is the emitted forward, as it is. The functions that talk to other ranks, draw random numbers from the
stage's generators, put off weight gradients or compute again in backward have effects that a compiled graph cannot hold (a compiled
backward is one unit: it knows no later BackwardWeight). They stay eager: the graph breaks at them and what is between is compiled. So
every schedule runs compiled, those that split the backward too; there, matmuls with a deferred weight gradient are eager, and the
norms, activations, attention and losses between them are compiled.

Compiled results differ from eager ones in the last bits, as fused ops round less often.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autopar.program import FUNCTIONS, StageModule

Compile = bool | str | Mapping[str, Any]
"""True: torch.compile's defaults; a string: its backend; a dict: its options as keyword arguments."""


def compile_stage(stage: StageModule, compile: Compile) -> None:
    """Let the stage run its forward compiled."""
    options: dict[str, Any] = {}
    if isinstance(compile, str):
        options = {"backend": compile}
    elif isinstance(compile, Mapping):
        options = dict(compile)
    namespace = stage.forward.__globals__
    for function in FUNCTIONS:
        name = function.__name__
        if namespace.get(name) is function:
            namespace[name] = torch.compiler.disable(function)
    stage.forward = torch.compile(stage.forward, **options)
