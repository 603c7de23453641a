"""A model that returns logits, trained with a loss of one's own: `loss_fn(output, *targets)`.

`step` takes the model's arguments and the targets by keyword: those the model does not know go to the loss, in order.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import autopar


class Classifier(nn.Module):
    def __init__(self, width=256, classes=8):
        super().__init__()
        self.inp = nn.Linear(2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.out = nn.Linear(width, classes)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.hidden:
            x = x + torch.tanh(layer(x))
        return self.out(x)


def cross_entropy_with_small_logits(logits, labels):
    """Cross entropy, and a penalty that keeps the logits near zero."""
    return F.cross_entropy(logits, labels) + 1e-3 * logits.square().mean()


def points_by_sector(num_points):
    """Points of the plane, each labelled with the eighth of the circle that it lies in."""
    x = torch.randn(num_points, 2)
    sector = (torch.atan2(x[:, 1], x[:, 0]) / torch.pi + 1) * 4
    return {"x": x, "labels": sector.long().clamp(max=7)}


def main():
    torch.manual_seed(0)
    model = Classifier()
    par = autopar.parallelize(
        model, points_by_sector(64), tp=2, pp=2, microbatches=4, loss_fn=cross_entropy_with_small_logits
    )
    print(par.plan)
    optimizer = torch.optim.AdamW(par.parameters(), lr=1e-3)
    for step in range(100):
        loss = par.step(**points_by_sector(64))
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}")

    model.load_state_dict(par.full_state_dict())
    test = points_by_sector(1000)
    accuracy = (model(test["x"]).argmax(1) == test["labels"]).float().mean().item()
    print(f"accuracy of the gathered model: {accuracy:.0%}")


if __name__ == "__main__":
    main()
