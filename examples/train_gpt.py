"""Trains a byte-level GPT on the source files of the Python standard library, tensor-parallel and pipeline-parallel.

The model below is written for one device and knows nothing of autopar. Three lines of `train` make it parallel:
`parallelize` instead of the model, `par.step(...)` instead of forward and backward, and `par.parameters()` for the
optimizer. It is trained until its loss on files it has never seen is well below that of a bigram model of the same
text, the best one can do from the previous byte alone.

The same file runs in three ways:
  python examples/train_gpt.py --tp 2 --pp 2                        all ranks as threads of this process
  python examples/train_gpt.py --tp 2 --pp 2 --launch               one local process a rank
  torchrun --nproc-per-node 4 examples/train_gpt.py --tp 2 --pp 2   one process a rank, started by torchrun

Others:
  python examples/train_gpt.py --steps 30 --check                   beside the untouched model: the losses are the same
  python examples/train_gpt.py --tp 4 --pp 1 --minutes 2            tensor-parallel alone
"""

import argparse
import copy
import functools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import autopar

VOCABULARY = 256  # a token is a byte

# ---------------------------------------------------------------- the model


class Size(NamedTuple):
    width: int
    depth: int
    heads: int
    seq: int
    learning_rate: float


SIZES = {
    "small": Size(width=160, depth=4, heads=4, seq=128, learning_rate=3e-3),  # 1.3 M parameters
    "medium": Size(width=512, depth=8, heads=8, seq=256, learning_rate=1e-3),  # 25 M
    "large": Size(width=1024, depth=24, heads=16, seq=1024, learning_rate=3e-4),  # 304 M
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, seq: int):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.wpe = nn.Embedding(seq, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight  # tied
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # what enters the residual stream is smaller, so that its variance does not grow with depth
                std = 0.02 / math.sqrt(2 * depth) if name.endswith(("proj.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        x = self.wte(idx) + self.wpe(torch.arange(T, device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.head(self.ln_f(x))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))
        return loss, logits


# ---------------------------------------------------------------- the text

# not the standard library; not in every installation of it; not source written by people, but tables and generated text
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
NOT_EVERYWHERE = {"test", "tests", "idle_test", "idlelib", "lib2to3"}
TABLES = {"encodings", "pydoc_data"}
SKIPPED_FOLDERS = NOT_LIBRARY | NOT_EVERYWHERE | TABLES


def read_text(max_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(training bytes, validation bytes), i64: the library's files by path, each tenth for validation."""
    root = Path(os.__file__).parent
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    paths = [p for p in paths if SKIPPED_FOLDERS.isdisjoint(Path(p).parts)]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    num_bytes = 0
    for i, path in enumerate(paths):
        if num_bytes >= max_bytes:
            break
        parts[i % 10 == 9].append((root / path).read_bytes())
        num_bytes += len(parts[i % 10 == 9][-1])
    if not parts[1]:
        sys.exit(f"train_gpt.py: no source files of the standard library below {root}")
    training, validation = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8).long() for p in parts)
    return training, validation


def bigram_loss(training: torch.Tensor, validation: torch.Tensor) -> float:
    """Nats per byte on `validation` of a bigram model counted on `training`, with add-one smoothing."""
    pairs = training[:-1] * VOCABULARY + training[1:]
    counts = torch.bincount(pairs, minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY).double() + 1
    log_probability = (counts / counts.sum(1, keepdim=True)).log()
    return -log_probability[validation[:-1], validation[1:]].mean().item()


def batches(text: torch.Tensor, batch: int, seq: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random windows of the text for ever. The same on every rank: the generator is seeded and its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(text) - seq - 1, (batch, 1), generator=generator)
        windows = text[start + torch.arange(seq + 1)]
        yield {"idx": windows[:, :-1].contiguous(), "targets": windows[:, 1:].contiguous()}


# ---------------------------------------------------------------- the ranks


def rank() -> int:
    """0 in a plain process: its ranks are threads, and this code runs once."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_rank(source: int, value: float) -> float:
    """`value` as rank `source` has it: what is decided from a clock, or known to one rank, is the same on all."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, source)
    return shared.item()


def validation_loss(par, text: torch.Tensor, batch: int, seq: int) -> float:
    """Mean over four batches, always the same ones. par(...) has an output on the last stage only: on the last rank."""
    par.eval()
    samples = batches(text, batch, seq, seed=1)
    outputs = [par(**next(samples)) for _ in range(4)]
    par.train()
    losses = [output[0].item() for output in outputs if output is not None]
    mean = sum(losses) / len(losses) if losses else math.nan
    return from_rank(dist.get_world_size() - 1 if dist.is_initialized() else 0, mean)


# ---------------------------------------------------------------- training

WARMUP_STEPS = 50
# later on, rounding differences grow as they do between any two orders of summation
CHECKED_STEPS, CHECK_TOLERANCE = 20, 2e-4


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up, then half a cosine down to a tenth of `peak` at progress 1."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class Untouched:
    """For --check: a copy of the model, trained on one device by the usual lines, the whole batch at once."""

    def __init__(self, model: GPT):
        self.model = copy.deepcopy(model)
        self.optimizer = adamw(self.model.parameters())
        self.checked_steps, self.largest_difference = 0, 0.0

    def compare(self, step: int, batch: dict[str, torch.Tensor], lr: float, parallel_loss: float) -> str:
        """Takes the step that the parallel model has just taken; says how far apart the two losses are."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, _ = self.model(**batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        difference = abs(parallel_loss - loss.item())
        if step <= CHECKED_STEPS:
            self.checked_steps = step
            self.largest_difference = max(self.largest_difference, difference)
        return f"step {step}: loss {parallel_loss:.6f}, untouched {loss.item():.6f}, difference {difference:.1e}"

    def verdict(self) -> tuple[bool, str]:
        ok = self.largest_difference <= CHECK_TOLERANCE
        found = f"losses of the first {self.checked_steps} steps differ by at most {self.largest_difference:.1e}"
        return ok, f"check {'ok' if ok else 'FAILED'}: {found}, {CHECK_TOLERANCE:.0e} allowed"


def train(args: argparse.Namespace) -> int:
    """Runs on every rank, or once where the ranks are threads of this process. Returns the exit status."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (args.tp * args.pp)))
    size = SIZES[args.size]
    seq = args.seq or size.seq
    training, validation = read_text(args.megabytes * 1_000_000)
    bigram = bigram_loss(training, validation)
    data = batches(training, args.batch, seq, args.seed)

    torch.manual_seed(args.seed)
    model = GPT(size.width, size.depth, size.heads, seq)
    par = autopar.parallelize(
        model, next(data), tp=args.tp, pp=args.pp, microbatches=args.microbatches, schedule=args.schedule
    )
    optimizer = adamw(par.parameters())
    say = print if rank() == 0 else lambda *_, **__: None
    say(par.plan)
    say(f"\ntext: {len(training):,} bytes to train on, {len(validation):,} to validate")
    say(f"bigram model: {bigram:.3f} nats per byte\n", flush=True)

    untouched = Untouched(model) if args.check and rank() == 0 else None
    on_terminal = sys.stdout.isatty()
    back = "\r" if on_terminal else ""
    start = reported = time.perf_counter()
    step, tokens, share_of_minutes, progress = 0, 0, 0.0, 0.0
    while progress < 1:
        batch = next(data)
        lr = learning_rate(args.lr or size.learning_rate, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = par.step(**batch)
        par.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens += batch["idx"].numel()
        if untouched is not None:
            say(untouched.compare(step, batch, lr, loss.item()), flush=True)

        if step % args.report == 0 or step == args.steps:
            seconds = time.perf_counter() - reported
            share_of_minutes = from_rank(0, (time.perf_counter() - start) / (60 * args.minutes))
        # the larger of the two shares: whatever ends the training, the learning rate has come down by then
        progress = max(step / args.steps, share_of_minutes)
        if step % args.report == 0 or progress >= 1:
            line = f"step {step}: loss {loss.item():.3f}, {tokens / seconds:,.0f} tokens/s"
            if step % (args.report * 5) == 0 or progress >= 1:
                valid = validation_loss(par, validation, args.batch, seq)
                say(f"{back}{line}; validation {valid:.3f}, bigram {bigram:.3f}", flush=True)
            else:
                say(f"{back}{line}", end="    " if on_terminal else "\n", flush=True)
            reported, tokens = time.perf_counter(), 0

    whole = par.full_state_dict()
    ok = True
    if rank() == 0:
        comparison = f"is {'' if valid < bigram else 'not '}below the bigram's {bigram:.3f}"
        print(f"\nvalidation loss {valid:.3f} {comparison} after {step} steps, {time.perf_counter() - start:.0f} s")
        if untouched is not None:
            ok, verdict = untouched.verdict()
            print(verdict)
        gathered = GPT(size.width, size.depth, size.heads, seq)
        gathered.load_state_dict(whole, strict=True)
        print("\nsampled from the gathered model:")
        print(sample(gathered, b"def ", num_bytes=300, seq=seq, seed=args.seed))
    return int(from_rank(0, not ok))


@torch.no_grad()
def sample(model: GPT, prompt: bytes, *, num_bytes: int, seq: int, seed: int, temperature: float = 0.7) -> str:
    generator = torch.Generator().manual_seed(seed)
    idx = torch.tensor([list(prompt)])
    for _ in range(num_bytes):
        probabilities = torch.softmax(model(idx[:, -seq:])[:, -1] / temperature, dim=-1)
        idx = torch.cat([idx, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return bytes(idx[0].tolist()).decode("utf-8", errors="replace")


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="ranks that share each layer (default 2)")
    parser.add_argument("--pp", type=int, default=2, help="pipeline stages (default 2)")
    parser.add_argument("--microbatches", type=int, default=4, help="microbatches of a step (default 4)")
    parser.add_argument("--schedule", default="1f1b", help="naive, gpipe or 1f1b (default 1f1b)")
    parser.add_argument("--steps", type=positive_int, default=1000, help="stop after this many steps (default 1000)")
    parser.add_argument("--minutes", type=float, default=4.5, help="stop after this many minutes (default 4.5)")
    parser.add_argument("--size", choices=SIZES, default="small", help="1.3, 25 or 304 M parameters (default small)")
    parser.add_argument("--batch", type=positive_int, default=16, help="sequences a step (default 16)")
    parser.add_argument("--seq", type=positive_int, help="bytes of a sequence (default 128; medium 256, large 1024)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: by size)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the sample (default 0)")
    parser.add_argument("--megabytes", type=positive_int, default=8, help="at most this much text (default 8)")
    parser.add_argument("--report", type=positive_int, default=10, help="steps a report, validation each fifth (10)")
    parser.add_argument("--check", action="store_true", help="train the untouched model beside it and compare")
    parser.add_argument("--launch", action="store_true", help="one local process a rank, instead of one thread")
    return parser.parse_args()


def run_rank(args: argparse.Namespace) -> int:
    """`train` on each rank; a problem that all ranks meet is told by one of them."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # for from_rank; autopar makes its own groups
    try:
        return train(args)
    except autopar.errors.AutoparError as error:
        if rank() == 0 or isinstance(error, autopar.errors.RankFailed):
            print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> int:
    args = parse_arguments()
    if not args.launch:
        return run_rank(args)
    try:
        return max(autopar.launch(functools.partial(run_rank, args), args.tp * args.pp))
    except autopar.errors.AutoparError as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
