"""A schedule read from a file: the CSV that torch.distributed.pipelining writes, or JSON.

Design note. A file is one size of a schedule: so many ranks, stages and microbatches. What is taken from it is each
rank's computes in their order; transfers are the order pass's work, so those in the file are left out, and what comes
of it is proved like every schedule. Which rank has which stage follows from who computes it.

- CSV: a line per rank, a field per action, as `_dump_csv` of torch.distributed.pipelining's schedules gives it with
  computes only or with communication: `2F0` is the forward of stage 2 for microbatch 0, `B` its backward, `I` and `W`
  the input and weight gradients. A pair that is run overlapped, `(0F3;7B1)OVERLAP_F_B`, is its parts in turn. Empty
  fields, sends, receives and the actions of FSDP are left out.
- JSON: a list per rank, of such strings or of instructions as a saved plan has them, `["Forward", 0]` or with the chunk
  `["Forward", 0, 1]`; or an object with these under "instructions", and with "stage_ranks", which says what a rank's
  chunks are where stages are not placed in a loop. So a saved plan can be read too.

Errors name the line and the column (a CSV's field, counted from 1), or the rank and the place in its list.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costmodel.errors import AutoparError, BadArgument, BadSchedule
from passes.flow import stages_of_ranks
from passes.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    instruction,
)
from passes.order import order
from passes.prove import in_flight
from passes.schedules import Schedule

ENDINGS = (".csv", ".json")

_COMPUTES: dict[str, type[Compute]] = {"F": Forward, "B": Backward, "I": BackwardInput, "W": BackwardWeight}
_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_LEFT_OUT = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_PAIR = re.compile(r"\(([^()]*)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True)
class _Action:
    """One compute of a file: of which stage, and where it stands."""

    cls: type[Compute]
    stage: int
    microbatch: int
    where: str


def read_schedule(path: str | Path, name: str | None = None) -> Schedule:
    """The schedule in a file, proved for the size it is of. `name` None: the file's name without its ending.

    BadArgument if the file cannot be read or says something else than a schedule, BadSchedule if the schedule is wrong.
    """
    path = Path(path)
    actions = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
    stage_ranks = _placement(path, actions)
    stages = stages_of_ranks(stage_ranks)
    chunk_of = {stage: chunk for listed in stages for chunk, stage in enumerate(listed)}
    computes = [[one.cls(one.microbatch, chunk_of[one.stage]) for one in listed] for listed in actions]
    num_ranks, virtual_stages = len(actions), len(stages[0])
    num_microbatches = 1 + max(one.microbatch for listed in computes for one in listed)
    size = (num_ranks, num_microbatches, virtual_stages)

    def generator(rank: int, *asked: int) -> Iterator[Compute]:
        if asked != size:
            names = ("pipeline ranks", "microbatches", "virtual stages")
            texts = [", ".join(f"{n} {what}" for n, what in zip(found, names, strict=True)) for found in (asked, size)]
            raise BadArgument(f"The schedule in {path} is not for {texts[0]}.", use=texts[1])
        return iter(computes[rank])

    row = Schedule(
        name=name or path.stem,
        generator=generator,
        description=f"read from {path.name}",
        max_in_flight=lambda rank, *_: in_flight(computes[min(rank, num_ranks - 1)]),
        source=str(path),
        virtual_stages=(virtual_stages,),
        placement=lambda stage, *_: stage_ranks[stage] if stage < len(stage_ranks) else stage % num_ranks,
        splits_backward=any(isinstance(one, BackwardInput) for listed in computes for one in listed),
    )
    try:
        order(row, num_ranks, num_microbatches, [(at, at + 1) for at in range(len(stage_ranks) - 1)])
    except BadSchedule as error:
        where = f"{path}, {error.where}" if error.where else str(path)
        raise BadSchedule(error.what, where=where, why=error.why, use=error.use) from error
    return row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadArgument(f"Cannot read the schedule {path}.", why=str(error)) from error


def _read_csv(path: Path) -> list[list[_Action]]:
    reader = csv.reader(_text(path).splitlines(), strict=True)
    ranks: list[list[_Action]] = []
    try:
        for fields in reader:
            places = ((f"{path}, line {reader.line_num}, column {at}", text) for at, text in enumerate(fields, 1))
            ranks.append([one for where, text in places for one in _actions(text, where)])
    except csv.Error as error:
        raise BadArgument(f"{path} is not CSV.", where=f"{path}, line {reader.line_num}", why=str(error)) from error
    while ranks and not ranks[-1]:
        del ranks[-1]
    return ranks


def _actions(text: str, where: str) -> list[_Action]:
    """What a field says, without what is left out."""
    text = text.strip()
    if not text or _LEFT_OUT.fullmatch(text):
        return []
    if pair := _PAIR.fullmatch(text):
        return [one for part in pair[1].split(";") for one in _actions(part, where)]
    if one := _ACTION.fullmatch(text):
        return [_Action(_COMPUTES[one[2]], int(one[1]), int(one[3]), where)]
    raise BadArgument(
        f"{text!r} is no action of a pipeline schedule.",
        where=where,
        use='a stage, one of F, B, I and W, and a microbatch, such as "2F0"; or the sends and receives of torch.distributed.pipelining',
    )


def _read_json(path: Path) -> list[list[_Action]]:
    content: Any
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise BadArgument(f"{path} is not JSON.", where=where, why=error.msg) from error
    declared: Any = None
    if isinstance(content, dict):
        content, declared = content.get("instructions"), content.get("stage_ranks")
    if not isinstance(content, list) or not content or not all(isinstance(listed, list) for listed in content):
        raise BadArgument(
            f"{path} holds no schedule.", use='a list per rank, or an object with these as "instructions"'
        )
    chunks = 1 + max((_chunk(item) for listed in content for item in listed), default=0)
    stage_ranks = [stage % len(content) for stage in range(len(content) * chunks)] if declared is None else declared
    plain = isinstance(stage_ranks, list) and all(type(rank) is int and rank >= 0 for rank in stage_ranks)
    if not plain or max(stage_ranks, default=0) >= len(content):
        raise BadArgument(f'"stage_ranks" in {path} is {declared!r}.', use="the pipeline rank of each stage")
    stages = stages_of_ranks(stage_ranks)
    return [
        [
            one
            for place, item in enumerate(listed)
            for one in _item(item, f"{path}, rank {rank}, item {place}", stages[rank] if rank < len(stages) else [])
        ]
        for rank, listed in enumerate(content)
    ]


def _chunk(item: object) -> int:
    """The chunk that an item names, without looking at whether it is an instruction: `_item` does that."""
    compute = isinstance(item, list) and item and item[0] in [cls.__name__ for cls in _COMPUTES.values()]
    number = item[2] if compute and isinstance(item, list) and len(item) > 2 else 0
    return number if isinstance(number, int) else 0


def _item(item: object, where: str, stages: Sequence[int]) -> list[_Action]:
    if item is None:
        return []
    if isinstance(item, str):
        return _actions(item, where)
    try:
        one = instruction(item)  # type: ignore[arg-type]
    except AutoparError as error:
        raise BadArgument(error.what, where=where) from error
    if not isinstance(one, Compute):
        return []
    if one.chunk >= len(stages):
        raise BadArgument(f"{one!r} is of stage {one.chunk} of its rank, which has {len(stages)}.", where=where)
    return [_Action(type(one), stages[one.chunk], one.microbatch, where)]


def _placement(path: Path, ranks: Sequence[Sequence[_Action]]) -> list[int]:
    """The rank of each stage: the one that computes it. BadSchedule if that is not one, or ranks have unlike numbers."""
    rank_of: dict[int, int] = {}
    for rank, listed in enumerate(ranks):
        for one in listed:
            if rank_of.setdefault(one.stage, rank) != rank:
                raise BadSchedule(
                    f"Stage {one.stage} is on rank {rank_of[one.stage]} and on rank {rank}.",
                    where=one.where,
                    why="a rank is a line of the file, and a stage is on one of them",
                )
    if not rank_of:
        raise BadArgument(f"{path} holds no schedule.", why="there is no compute in it")
    stages = range(max(rank_of) + 1)
    missing = [stage for stage in stages if stage not in rank_of]
    if missing:
        raise BadSchedule(f"The schedule in {path} has stages up to {max(rank_of)} and no stage {missing[0]}.")
    counts = [list(rank_of.values()).count(rank) for rank in range(len(ranks))]
    if len(set(counts)) > 1:
        raise BadSchedule(
            f"The ranks of the schedule in {path} have {counts} stages.", why="each rank has the same number of them"
        )
    return [rank_of[stage] for stage in stages]
