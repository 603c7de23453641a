"""autopar: tensor and pipeline parallelism for unmodified PyTorch models.

    par = autopar.parallelize(model, example_inputs, tp=2, pp=2)
    print(par.plan)
    loss = par.step(**batch)

Traced with torch.fx, placed and cut from costs, emitted as one readable program per rank, run on torch.distributed.
"""

from autopar import errors, schedules
from autopar.launch import launch
from autopar.parallelize import ParallelModel, parallelize
from autopar.plan import Plan
from autopar.search import search
from autopar.verify import verify
from costmodel.hardware import Hardware
from passes.rules import register as register_rule

__version__ = "0.1.0"

__all__ = [
    "Hardware",
    "ParallelModel",
    "Plan",
    "__version__",
    "errors",
    "launch",
    "parallelize",
    "register_rule",
    "schedules",
    "search",
    "verify",
]
