"""Seconds that planning takes beside tracing, for models nobody can hold on one machine: nothing is allocated.

Llama shapes on the meta device, bf16, a batch of 16 x 4096 tokens, tp=8 x pp=16 on h100-sxm. "Trace" is `autopar.trace.trace`: torch.export
and the normaliser. "After" is all the rest of what a person waits for: shard, cut, order, plan (`plan`), and the text of a program of
each of the 16 stages (`emit`; a stage's tp peers differ in title and coordinates only). The aim is after / trace < 1 and a peak below
2 GB. The ratio is given in wall time and in CPU seconds of the process, which others on the machine disturb
less. Each model runs in a process of its own, so that its peak resident memory is its own.

  python tests/benchmarks/compile_speed.py --models 8b,70b,405b
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from tabulate import tabulate

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "405b": (16384, 53248, 126, 128, 8, 128256),
}
ROWS, TOKENS, MESH, HARDWARE = 16, 4096, {"pp": 16, "tp": 8}, "h100-sxm"


def measure(name: str) -> dict[str, float | str]:
    """One model, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from autopar.planner import make_plan
    from autopar.trace import trace
    from costmodel.hardware import hardware

    hidden, intermediate, layers, heads, groups, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta")
    before = peak_megabytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    traced = trace(model, (), {"input_ids": ids, "labels": ids})
    after_trace, cpu_after_trace = time.perf_counter(), time.process_time()
    plan = make_plan(
        traced, mesh=MESH, microbatches=None, schedule="1f1b", hardware=hardware(HARDWARE), model_name=f"llama-{name}"
    )
    after_plan = time.perf_counter()
    characters = sum(len(plan.source(stage * MESH["tp"])) for stage in range(MESH["pp"]))
    end, cpu_end = time.perf_counter(), time.process_time()
    return {
        "model": f"llama-{name}", "layers": layers, "parameters_billion": sum(p.numel() for p in model.parameters()) / 1e9,
        "nodes": len(traced.graph_module.graph.nodes), "trace_seconds": after_trace - start, "plan_seconds": after_plan - after_trace,
        "emit_seconds": end - after_plan, "after_over_trace": (end - after_trace) / (after_trace - start),
        "trace_cpu_seconds": cpu_after_trace - cpu_start, "after_cpu_seconds": cpu_end - cpu_after_trace,
        "cpu_after_over_trace": (cpu_end - cpu_after_trace) / (cpu_after_trace - cpu_start),
        "imports_megabytes": before, "peak_megabytes": peak_megabytes(), "program_characters": characters,
    }  # fmt: skip


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8b,70b,405b", help="comma-separated, of 8b, 70b, 405b (default: all)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    if arguments.here:
        print(json.dumps(measure(names[0])))
        return
    rows = []
    for name in names:
        run = subprocess.run([sys.executable, __file__, "--here", "--models", name], capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"llama-{name}:\n{run.stderr}")
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    columns = {
        "model": "model", "layers": "layers", "parameters, 1e9": "parameters_billion", "nodes": "nodes", "trace s": "trace_seconds",
        "plan s": "plan_seconds", "emit 16 stages s": "emit_seconds", "after / trace": "after_over_trace",
        "trace CPU s": "trace_cpu_seconds", "after CPU s": "after_cpu_seconds", "CPU after / trace": "cpu_after_over_trace",
        "peak MB": "peak_megabytes",
    }  # fmt: skip
    mesh = " x ".join(f"{axis}={size}" for axis, size in MESH.items())
    print(f"{mesh}, batch {ROWS} x {TOKENS}, bf16, {HARDWARE}, meta device")
    print(
        tabulate(
            [[row[key] for key in columns.values()] for row in rows], headers=list(columns), floatfmt=".3g", intfmt=","
        )
    )


if __name__ == "__main__":
    main()
