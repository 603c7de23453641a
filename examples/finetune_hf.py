"""Trains a Hugging Face causal LM on bytes of the Python standard library: bf16-mixed, warm-up and cosine, clipping, evaluation.

  python examples/finetune_hf.py --tp 2 --pp 2 --dp 2                               ranks are threads of this process
  python examples/finetune_hf.py --tp 2 --pp 2 --launch --model gpt2                ... are local processes
  torchrun --nproc-per-node 8 examples/finetune_hf.py --tp 2 --dp 4 --model FOLDER  ... are the job's
"""

import argparse
import math
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import autopar


def the_model(source):
    """A checkpoint folder's model, or a new small one of a Hugging Face model type. Tokens are bytes: any vocabulary has room."""
    if Path(source).is_dir():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = AutoConfig.for_model(source, vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=352, bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def batches(text, rows, seq, seed):
    """Endless batches of `rows` random pieces of the text: input_ids and labels [rows, seq]."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - seq, (rows,), generator=draw).tolist()
        ids = torch.stack([text[start : start + seq] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def finetune(options):
    torch.manual_seed(0)
    model = the_model(options.model)
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    training, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]

    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    replicas = options.dp if num_ranks == 1 else 1  # whose batches this process gives: in a plain process, all
    example = next(batches(training, options.rows, options.seq, 0))
    par = autopar.parallelize(model, example, tp=options.tp, pp=options.pp, dp=options.dp, precision=options.precision)
    par.report(tensorboard=options.tensorboard)
    optimizer = torch.optim.AdamW(par.parameters(), lr=options.lr)
    warm_up = max(options.steps // 10, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / options.steps)))
    )
    own = batches(training, options.rows * replicas, options.seq, 1 + par.plan.coords(rank).get("dp", 0))
    for step in range(1, options.steps + 1):
        par.step(**next(own))
        par.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % options.evaluate == 0:
            par.eval()
            output = par(**next(batches(held_out, options.rows * replicas, options.seq, 0)))
            par.train()
            if rank == num_ranks - 1:  # of the last stage, which has the output
                print(f"{par.metrics}; held-out loss {output.loss.item():.4f}", flush=True)
    par.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tp": 1, "pp": 1, "dp": 1, "rows": 16, "seq": 128, "steps": 200, "evaluate": 20}
    for name, default in {"model": "llama", "precision": "bf16-mixed", "lr": 2e-3, **sizes}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default} if not given")
    parser.add_argument("--tensorboard", metavar="FOLDER")
    parser.add_argument("--launch", action="store_true", help="one local process a rank")
    options = parser.parse_args()
    num_ranks = options.tp * options.pp * options.dp
    autopar.launch(finetune, num_ranks, options) if options.launch else finetune(options)
