"""How long a full search takes: GPT-3 175B and a 1T model (Megatron SC'21, table 1) on 2,048 GPUs, after tracing.

    python tests/benchmarks/search_speed.py [--gpus 2048] [--hardware h100-sxm] [--json]

Prints per model the seconds of tracing and of the search, the layouts of the space and those priced, the seconds of one prediction over
10,000 of them, and the most memory the process ever held.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from autopar.search import _traced, search

MODELS = {"175B": dict(width=12288, depth=96, heads=96), "1T": dict(width=25600, depth=128, heads=160)}
ROWS, TOKENS, VOCABULARY = 1536, 2048, 51200


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (
            each.view(B, T, self.heads, C // self.heads).transpose(1, 2) for each in self.qkv(self.ln_1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


def measured(name: str, gpus: int, hardware: str) -> dict[str, float | str]:
    with torch.device("meta"):
        model = GPT(**MODELS[name])
        tokens = torch.zeros(2, TOKENS, dtype=torch.long)
    begin = time.perf_counter()
    traced, _ = _traced(model, {"idx": tokens, "targets": tokens.clone()}, "bf16", None)
    tracing, cpu = time.perf_counter() - begin, time.process_time()
    plans = search(traced, gpus=gpus, hardware=hardware, global_batch=ROWS, precision="bf16")
    cpu = time.process_time() - cpu
    layouts = [layout for group in plans.space.layouts(plans.evaluator.facts, plans.hardware) for layout in group]
    known = [found.layout for found in plans.predictions]
    count, begin = 10_000, time.perf_counter()
    for layout in itertools.islice(itertools.cycle(known), count):
        plans.evaluator.predict(layout)
    each = (time.perf_counter() - begin) / count
    best = plans.predictions[0]
    return {
        "model": name, "tracing_seconds": tracing, "search_seconds": plans.seconds, "search_cpu_seconds": cpu, "space": len(layouts),
        "priced": plans.evaluated, "fit": plans.fitting, "prediction_milliseconds": each * 1e3,
        "search_milliseconds_a_layout": plans.seconds / len(layouts) * 1e3,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "best_step_seconds": best.step_seconds, "best_mfu": best.mfu,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2048)
    parser.add_argument("--hardware", default="h100-sxm")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = [measured(name, arguments.gpus, arguments.hardware) for name in MODELS]
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for row in found:
        print(
            f"{row['model']:>5}: tracing {row['tracing_seconds']:.1f} s; search {row['search_seconds']:.1f} s "
            f"({row['search_cpu_seconds']:.1f} CPU) of {row['space']} layouts, {row['priced']} priced, {row['fit']} fit; "
            f"{row['search_milliseconds_a_layout']:.3f} ms a layout, "
            f"{row['prediction_milliseconds']:.3f} ms a prediction again; {row['peak_gib']:.2f} GiB"
        )


if __name__ == "__main__":
    main()
