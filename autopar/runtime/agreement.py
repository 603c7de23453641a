"""What ranks tell each other before they run: that they have one plan; and replicas before a step, so that a batch that does not fit is
an error on all of them and a hang on none.

A replica whose batch is of another shape than its peers', that has none, or that refuses it for a reason of its own must not leave the
others waiting in the middle of a step; nor must one that accumulates or evaluates where they do not. So each brings a digest of its
batch's sizes and kind of step, its number of rows, and whether it refuses, of which the extremes over the replicas are taken: one small
reduction. Only when they disagree are words exchanged.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta

import torch
import torch.distributed as dist

from autopar.runtime.axis import Axis
from costmodel.errors import BadArgument

_WORDS_BYTES = 600


def agree_on_plan(
    store: dist.Store, rank: int, num_ranks: int, plan: str, refusal: str | None, timeout_seconds: float
) -> None:
    """Return once all ranks have come with the same plan. Of a rank that has none, `refusal` says why.

    BadArgument, on all ranks, if one refuses or has another plan than rank 0.
    """
    if rank == 0:
        store.set("plan", plan)
    elif refusal is None and store.get("plan").decode() not in ("", plan):
        refusal = "its plan is another than rank 0's: other arguments of parallelize, another model or example inputs of another form"
    if refusal is not None:
        store.set("refusal", f"rank {rank} cannot take part\n{refusal}")
    if store.add("have a plan", 1) == num_ranks:
        store.set("all came", "")
    store.wait(["all came"], timedelta(seconds=timeout_seconds))
    if store.check(["refusal"]):
        what, _, why = store.get("refusal").decode().partition("\n")
        raise BadArgument(what, why=why, use="the same model, options and kind of batch on every rank")


def agree(axis: Axis, shape: str, rows: int, refusal: str | None, device: torch.device) -> int:
    """The rows of the replica that has fewest.

    `shape`: the sizes of this replica's batch but for its rows, and the kind of step, in words; `refusal`: why this replica cannot run it.

    BadArgument, on all replicas, if one refuses, has no rows or another shape.
    """
    digest = int.from_bytes(hashlib.blake2b(shape.encode(), digest_size=7).digest(), "big")
    extremes = torch.tensor([digest, -digest, -rows, refusal is not None], dtype=torch.int64, device=device)
    greatest, least, fewest, refuses = axis.all_reduce(extremes, "max").tolist()
    if greatest == -least and fewest < 0 and not refuses:
        return -int(fewest)
    mine = torch.tensor([digest, rows, refusal is not None], dtype=torch.int64, device=device)
    found = axis.all_gather(mine).tolist()
    words = (refusal if refusal is not None else shape).encode()[:_WORDS_BYTES].ljust(_WORDS_BYTES, b"\0")
    said = axis.all_gather(torch.frombuffer(bytearray(words), dtype=torch.uint8).to(device)).cpu()
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in said]
    for coord, (_, _, refuses) in enumerate(found):
        if refuses:
            raise BadArgument(f"replica {coord} cannot run its batch", why=texts[coord], use="a batch that fits, on every replica")
    for coord, (_, count, _) in enumerate(found):
        if count < 1:
            raise BadArgument(f"replica {coord} gets no data", why="its batch has no rows", use="at least one row for each replica")
    other = next(coord for coord, one in enumerate(found) if one[0] != found[0][0])
    raise BadArgument(
        "the replicas' batches have different shapes or dtypes, or their steps are of different kinds",
        why=f"replica 0: {texts[0]}; replica {other}: {texts[other]}",
        use="steps that differ in rows alone (pad the rest to one size, with labels that are ignored)",
    )  # fmt: skip
