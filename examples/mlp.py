"""A small MLP over four ranks: prints the plan and the program of one rank, then trains it.

python examples/mlp.py        autopar plan examples/mlp.py:example --tp 2 --pp 2
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import autopar


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        h = F.gelu(self.up(x))
        return x + self.down(h)


class Net(nn.Module):
    def __init__(self, width=1024):
        super().__init__()
        self.block0 = Block(width)
        self.block1 = Block(width)

    def forward(self, x, y):
        return F.mse_loss(self.block1(self.block0(x)), y)


def example():
    """(model, example inputs): what the command line takes as TARGET, examples/mlp.py:example."""
    return Net(), {"x": torch.randn(32, 1024), "y": torch.randn(32, 1024)}


def main():
    torch.manual_seed(0)
    model, batch = example()
    par = autopar.parallelize(model, batch, tp=2, pp=2, microbatches=4)
    print(par.plan)
    print(par.plan.source(0))
    optimizer = torch.optim.AdamW(par.parameters(), lr=1e-4)
    for step in range(5):
        loss = par.step(**batch)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
