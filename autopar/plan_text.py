"""The printed plan: what a person reads to know who does what, how long it should take and why. And the same content
for machines.

Nothing is decided or predicted here. Every figure is a field of the Plan; the tables are at most 120 columns wide for
two stages and for hundreds.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from autopar.weight_rows import number_set, ranges, weight_rows
from costmodel.mesh import axis_stride
from costmodel.replicas import ReplicaTraffic
from passes.placement import local_shape
from passes.timeline import Timeline

if TYPE_CHECKING:
    from autopar.plan import Plan, StagePlan

WIDTH = 120
_LAYERS_WIDTH = 28
_TIMELINE_WIDTH = 100
_GAP = 2  # between the columns of a table


# ---- numbers ------------------------------------------------------------------------------------------------------


def count_text(count: float) -> str:
    """`1.33 M`, `8.03 B`, `512`."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size * 0.9995:
            return _three(count / size) + unit
    return f"{count:g}"


def bytes_text(num_bytes: float) -> str:
    """`708 KiB`, `71.5 GiB`."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= size:
            return f"{_three(num_bytes / size)} {unit}"
    return f"{_three(num_bytes / 2**10)} KiB"


def seconds_text(seconds: float) -> str:
    """`5.52 ms`, `1.2 s`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def _three(value: float) -> str:
    """Three digits that count, without an exponent: 1130, 113, 11.3, 1.13, 0.113."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}".replace(",", "") if digits < 7 else f"{value:.2e}"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole * 100:.0f}%" if whole else "0%"


# ---- the parts ----------------------------------------------------------------------------------------------------


def mesh_text(plan: Plan) -> str:
    """`pp=2 x tp=2`"""
    return " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())


def title(plan: Plan) -> list[str]:
    """Two lines: what is planned, and what one step should take."""
    predicted = plan.predicted
    split = f"{plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}"
    batch = ", ".join(f"{name} = {value}" for name, value in plan.sizes.items())
    rate, unit = (
        (predicted.tflops_per_gpu, "TFLOP/s")
        if predicted.tflops_per_gpu >= 0.1
        else (predicted.tflops_per_gpu * 1e3, "GFLOP/s")
    )
    return [
        f"{plan.model}: {count_text(plan.num_parameters)} parameters, {mesh_text(plan)}, {split}, {plan.schedule}, "
        f"{plan.hardware}{f', {plan.precision}' if plan.precision != 'fp32' else ''}",
        f"plan {plan.identity}: {seconds_text(predicted.step_seconds)} a step{f' of {batch}' if batch else ''}, "
        f"{predicted.bubble_fraction * 100:.0f}% bubble, "
        f"{seconds_text(predicted.communication_seconds)} communication, "
        f"{bytes_text(predicted.peak_bytes)} peak a rank, "
        f"{_three(rate)} {unit} a device ({predicted.mfu * 100:.1f}% of its peak); {predicted.basis}",
    ]


def stage_ranks(plan: Plan, stage: int) -> str:
    """The ranks of a stage: `4-7`."""
    stride = axis_stride(plan.mesh, "pp") if "pp" in plan.mesh else plan.num_ranks
    found = [rank for rank in range(plan.num_ranks) if rank // stride % plan.mesh.get("pp", 1) == plan.stage_ranks[stage]]
    if len(found) == 2 and found[1] == found[0] + 1:
        return f"{found[0]}-{found[1]}"
    return ",".join(ranges(found, "-"))


def stage_layers(stage: StagePlan) -> str:
    """The modules whose parameters a stage holds, in order, numbered lists folded: `wte, wpe, h.{0..5}`."""
    heads: dict[str, list[int] | None] = {}
    for name in stage.parameters:
        parts = name.split(".")
        number = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            heads.setdefault(parts[0] if len(parts) <= 2 else ".".join(parts[:2]), None)
        else:
            listed = heads.setdefault(".".join([*parts[:number], ""]), [])
            assert listed is not None
            if int(parts[number]) not in listed:
                listed.append(int(parts[number]))
    shown = []
    for head, numbers in heads.items():
        if numbers is None:
            shown.append(head)
        else:
            shown.append(head + (str(numbers[0]) if len(numbers) == 1 else number_set(sorted(numbers))))
    text = ", ".join(shown) or stage.layers
    if len(text) > _LAYERS_WIDTH and len(shown) > 3:
        text = f"{shown[0]}, ... {len(shown) - 2} more ..., {shown[-1]}"
    return text


def stage_table(plan: Plan) -> list[dict[str, Any]]:
    """The rows of STAGES, as numbers."""
    return [
        {
            "stage": stage.index,
            "ranks": stage_ranks(plan, stage.index),
            "layers": stage_layers(stage),
            "parameters_per_rank": stage.cost.parameter_count,
            "forward_seconds": stage.cost.forward_seconds,
            "backward_seconds": stage.cost.backward_seconds,
            "collective_seconds": stage.cost.collective_seconds,
            "send_seconds": stage.cost.send_seconds,
            "microbatches_in_flight": stage.cost.in_flight,
            "peak_bytes": stage.cost.peak_bytes,
            "memory": asdict(stage.cost.memory) if stage.cost.memory is not None else None,
            "recompute_seconds": stage.cost.recompute_seconds,
        }
        for stage in plan.stages
    ]


def _memory_text(plan: Plan) -> str:
    """The table of MEMORY: what a rank of each pipeline rank holds at its peak."""
    rows: dict[int, list[StagePlan]] = {}
    for stage in plan.stages:
        rows.setdefault(plan.stage_ranks[stage.index], []).append(stage)
    cells = []
    for held in dict(sorted(rows.items())).values():
        memory = held[0].cost.memory
        assert memory is not None
        cells.append(
            (
                ",".join(str(stage.index) for stage in held),
                *(bytes_text(value) for value in asdict(memory).values()),
                bytes_text(memory.peak_bytes),
            )
        )
    headers = ("stage", "parameters", "gradients", "optimizer", "activations", "buffers", "sum")
    return "MEMORY  (of one rank when it holds most; optimizer: AdamW, two f32 a parameter)\n" + _table(
        headers, cells, right=range(1, 7)
    )


_SHARED_OUT = {
    0: "gradients all-reduced once", 1: "gradients reduce-scattered once, parameters gathered once",
    2: "gradients reduce-scattered once, parameters gathered once",
    3: "parameters gathered in each forward and backward, gradients reduce-scattered once",
}  # fmt: skip


def _replicas_text(plan: Plan, traffic: ReplicaTraffic) -> str:
    """What replicas exchange."""
    return f"REPLICAS  (dp={plan.mesh['dp']}, ZeRO {plan.zero}; of one rank a step)\n" + _wrapped(
        f"{bytes_text(traffic.num_bytes)} sent ({_SHARED_OUT[plan.zero]}) in {seconds_text(traffic.seconds)}; "
        f"the step is {seconds_text(traffic.exposed_seconds)} longer for them"
    )


def transfer_table(plan: Plan) -> list[dict[str, Any]]:
    """The rows of TRANSFERS: each value once per stage it goes to, with the bytes one rank sends for the largest
    microbatch.
    """
    rows = []
    sizes = dict(plan.sizes)
    if "B" in sizes:
        sizes["B"] = -(-sizes["B"] // plan.microbatches)
    for stage in plan.stages:
        for name, send in stage.sends.items():
            dtype, shape = local_shape(send.type, sizes, plan.mesh)
            num_bytes = dtype.itemsize * math.prod(shape)
            rows += [
                {
                    "from": stage.index,
                    "to": to,
                    "value": name,
                    "type": send.type,
                    "bytes": num_bytes,
                    "gradient": send.gradient,
                }
                for to in send.to
            ]
    return rows


def timeline_text(plan: Plan) -> str:
    """The predicted schedule, a row per stage, under a legend; "" for a plan that predicts no time."""
    timeline = plan.simulated()
    text = timeline.text()
    columns = len(text.splitlines()[0].split()[-1]) if timeline.step_seconds and text else 0
    if not columns:
        return ""
    slice_text = seconds_text(timeline.step_seconds / columns)
    legend = f"{timeline.legend}; a column is {slice_text}"
    if plan.microbatches > 10:
        legend += "; counts start again after 9 and z"
    if columns == _TIMELINE_WIDTH and _shortest(timeline) < timeline.step_seconds / columns:
        legend += "; what is shorter than a column may not show"
    return _wrapped(legend) + "\n" + text


def _shortest(timeline: Timeline) -> float:
    return min((span.end_seconds - span.start_seconds for span in timeline.compute), default=0.0)


def _wrapped(text: str, indent: str = "", first: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), widths: Sequence[int | None] = ()
) -> str:
    """A table no wider than its `widths` ask for: longer cells go over several lines."""
    widths = widths or (None,) * len(headers)
    cells = [[_broken(cell, width) if width else cell for cell, width in zip(row, widths, strict=True)] for row in rows]
    align = ["right" if k in right else "left" for k in range(len(headers))]
    text = tabulate(cells, headers=headers, colalign=align if rows else None, disable_numparse=True, tablefmt="simple")
    return "\n".join(line.rstrip() for line in text.splitlines())


def _broken(cell: str, width: int) -> str:
    """A cell in lines of at most `width`: between words, then after the dots of a long name."""
    words = [
        piece for word in cell.split() for piece in ([word] if len(word) <= width else re.findall(r"[^.]+\.?", word))
    ]
    lines, joined = [""], True
    for word in words:
        space = "" if joined else " "
        if lines[-1] and len(lines[-1]) + len(space) + len(word) > width:
            lines.append("")
            space = ""
        lines[-1] += space + word
        joined = word.endswith(".")
    return "\n".join(lines)


def _weights_text(rows: Sequence[tuple[str, str, str]]) -> str:
    """The table of WEIGHTS: long names and meanings share what the placements leave of the page."""
    longest = [max((len(row[k]) for row in rows), default=0) for k in range(3)]
    placement = min(longest[1], 32)
    meaning = min(longest[2], max(38, WIDTH - 2 * _GAP - placement - longest[0]))
    name = WIDTH - 2 * _GAP - placement - meaning
    return "WEIGHTS\n" + _table(("parameter", "placement", "what it means"), rows, widths=(name, placement, meaning))


def plan_text(plan: Plan) -> str:
    """The partition plan: what `print(plan)` shows."""
    parts = ["\n".join(_wrapped(line, indent="  ") for line in title(plan))]
    stages = [
        (
            str(row["stage"]),
            row["ranks"],
            row["layers"],
            count_text(row["parameters_per_rank"]),
            _three(row["forward_seconds"] * 1e3),
            _three(row["backward_seconds"] * 1e3),
            _percent(row["collective_seconds"], row["forward_seconds"] + row["backward_seconds"]),
            bytes_text(row["peak_bytes"]),
        )
        for row in stage_table(plan)
    ]
    headers = ("stage", "ranks", "layers", "parameters", "forward ms", "backward ms", "of it tp", "peak memory")
    parts.append(
        "STAGES  (parameters and memory of one rank, times of one microbatch)\n"
        + _table(headers, stages, right=(3, 4, 5, 6, 7), widths=(None, 11, _LAYERS_WIDTH, *(None,) * 5))
    )
    if all(stage.cost.memory is not None for stage in plan.stages):
        parts.append(_memory_text(plan))
    if plan.predicted.replicas is not None:
        parts.append(_replicas_text(plan, plan.predicted.replicas))
    parts.append(_weights_text([(row.name, row.placement, row.meaning) for row in weight_rows(plan)]))
    transfers = transfer_table(plan)
    if transfers:
        crossings = [
            (
                str(t["from"]),
                str(t["to"]),
                t["value"],
                t["type"],
                _three(t["bytes"] / 1024),
                "yes" if t["gradient"] else "no",
            )
            for t in transfers
        ]
        columns = ("from", "to", "value", "type", "KiB a microbatch", "gradient back")
        parts.append(
            "TRANSFERS  (from stage to stage)\n"
            + _table(columns, crossings, right=(4,), widths=(None, None, 28, 44, None, None))
        )
    timeline = timeline_text(plan)
    if timeline:
        parts.append(f"TIMELINE  (predicted)\n{timeline}")
    if plan.notes:
        parts.append(
            "NOTES\n" + "\n".join(_wrapped(re.sub(r"\s+", " ", note), indent="  ", first="- ") for note in plan.notes)
        )
    return "\n\n".join(parts) + "\n"


def plan_json(plan: Plan) -> str:
    """The saved plan, and under "printed" the content of the tables as numbers. `Plan.from_json` reads it."""
    values = json.loads(plan.to_json())
    values["printed"] = {
        "title": title(plan),
        "stages": stage_table(plan),
        "weights": [asdict(row) for row in weight_rows(plan)],
        "transfers": transfer_table(plan),
        "timeline": [asdict(span) for span in plan.timeline()],
    }
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
