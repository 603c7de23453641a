"""Predictions beside published measurements: `python tests/benchmarks/published.py [FILE] [--json] [--rows] [--suite NAME] [--cache DIR]`.

FILE is JSON (a list of records) or the CSV beside this script (the default), whose rows carry their sources. Every record's model is built
as an ordinary module on the meta device at full depth, traced once per distinct model (folded graphs are kept in the cache folder) and
predicted as any user's model is. Printed per suite: n, MAPE and bias of the step time, MAPE of memory, false "fits" and false "does not
fit"; over rows that share a `group`: Kendall's tau and the regret of the first choice.

What a record says of software becomes an option of the layout (`layout_of`), by the same rules for every suite.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from published_models import Shape, built
from published_records import Record, checked, records_of, write_csv

from autopar.trace import trace
from costmodel.errors import AutoparError, BadArgument
from costmodel.hardware import HARDWARE, Hardware
from passes.fold import Folded, fold
from passes.folded_json import folded_from_json, folded_to_json
from passes.layout import Layout, LayoutPrediction
from passes.layout_evaluator import Evaluator
from passes.loss import weigh_loss
from passes.schedules import schedule as schedule_named

HERE = Path(__file__).resolve().parent
# Words of records, in lower case, and what they are here.
SCHEDULES = {"none": "1f1b", "interleaved": "interleaved-1f1b", "zb-1p": "zb-h1", "zb-2p": "zb-h2", "zbv": "zb-v"}
RECOMPUTES = {"none": "none", "full": "full", "selective": "products", "selective(op)": "alternate"}
PRECISIONS = {"fp8": "fp8", "bf16": "bf16-master", "bfloat16": "bf16-master", "fp16": "fp16", "fp32": "fp32", "tf32": "fp32"}
RACKS = (32, 72)  # devices of a node of Grace-Hopper and Grace-Blackwell, whatever a record calls a node
GPUS = ("v100", "a100", "gb200", "gh200", "h100", "h200", "b200", "l40s", "4090")  # part of a record's name; none is in an earlier one
BEFORE_FLASH = ("v100", "a100")  # on other GPUs attention is taken to be fused where a record does not say
# Software, as sources name it, whose loss is by default one kernel over the 16-bit logits: llm-foundry's `loss_fn: fused_crossentropy`.
FUSED_LOSSES = ("llm-foundry",)
# Of the flat buffers of ZeRO 1 and 2. Source: DeepSpeed's defaults of reduce_bucket_size and allgather_bucket_size.
ZERO_BUCKET_ELEMENTS = 500_000_000


# ---- what a record means --------------------------------------------------------------------------------------------------


def _says(record: Record, *words: str) -> bool:
    text = " ".join(str(record.get(key) or "") for key in ("notes", "table", "gpu", "attention", "precision")).lower()
    return any(word in text for word in words)


def _from(record: Record, software: Sequence[str]) -> bool:
    return any(name in str(record.get("source") or "").lower() for name in software)


def shape_of(record: Record) -> Shape:
    """The model. Null dimensions get what is usual: 50,304 tokens of vocabulary, four times the width. Jobs of Megatron's kind
    (`layout_of`) pad the vocabulary as it does, to a multiple of 128 rows on every tensor-parallel rank (--make-vocab-size-divisible-by).
    """
    hidden, heads, vocab = record["hidden"], record["heads"], record.get("vocab") or 50304
    if record.get("zero") != 3:
        multiple = 128 * (record.get("tp") or 1)
        vocab = -(-vocab // multiple) * multiple
    gated = record.get("mlp_matrices") == 3
    flash = not _says(record, "unfused") and (
        _says(record, "flash", "sdpa", "cudnn", "fused") or gated or gpu_of(record) not in BEFORE_FLASH
    )
    fp16 = precision_of(record) == "fp16"
    return Shape(
        record["layers"], hidden, record.get("ffn_hidden") or 4 * hidden, heads, record.get("kv_heads") or heads,
        vocab, gated, flash, 0.0 if flash else 0.1, torch.float16 if fp16 else torch.bfloat16, not gated,
    )  # fmt: skip


def gpu_of(record: Record) -> str:
    """Which of GPUS a record's is. BadArgument if it is none of them."""
    text = str(record.get("gpu") or "").lower()
    found = next((name for name in GPUS if name in text), None)
    if found is None:
        raise BadArgument(f"there is no profile of the GPU {record.get('gpu')!r}", use=f"one of {', '.join(GPUS)}")
    return found


def hardware_of(record: Record) -> Hardware:
    """The profile of the record's GPU and fabric. Its nodes have as many devices as the record says, but for racks that are one node."""
    gpu, memory = gpu_of(record), record.get("gpu_mem_GB") or 80
    fabric = "-omnipath" if _says(record, "omnipath", "omni-path", "opa") else "-roce" if _says(record, "roce") else ""
    if gpu == "v100":
        name = "v100-16gb" if memory <= 16 else "v100-32gb-omnipath" if record.get("gpus_per_node") == 4 else "v100-32gb"
    elif gpu == "a100":
        name = f"a100-{'40' if memory <= 40 else '80'}gb" + (fabric or ("-4nic" if _says(record, "800 gbps") else ""))
    elif gpu == "h100":
        name = "h100-96gb" if memory > 90 else "h100-sxm"
    else:
        name = "rtx-4090" if gpu == "4090" else gpu
    profile = HARDWARE[name if name in HARDWARE else name.rsplit("-", 1)[0]]
    devices = record.get("gpus_per_node") or profile.devices_per_node
    return profile if profile.devices_per_node in (devices, *RACKS) else replace(profile, devices_per_node=devices)


def precision_of(record: Record) -> str:
    """The first of PRECISIONS that the record names; fp16 where it says nothing. BadArgument if it names none."""
    text = str(record.get("precision") or "fp16").lower()
    places = {text.index(word): name for word, name in PRECISIONS.items() if word in text}
    if not places:
        raise BadArgument(f"precision is {record['precision']!r}", use=f"one of {', '.join(PRECISIONS)}")
    return places[min(places)]


def recompute_of(record: Record) -> str:
    """BadArgument for what is none of RECOMPUTES; none where a record does not say."""
    text = str(record.get("recompute") or "none").lower()
    if text not in RECOMPUTES:
        raise BadArgument(f"recompute is {record['recompute']!r}", use=f"one of {', '.join(RECOMPUTES)}")
    return RECOMPUTES[text]


def schedule_of(record: Record) -> tuple[str, int]:
    """(schedule, stages a rank). Of several stages a rank, 1f1b is the interleaved one; BadArgument for one that is not known."""
    pp, virtual = record.get("pp") or 1, record.get("vpp") or 1
    if pp == 1:
        return "1f1b", 1
    text = str(record.get("schedule") or "none").lower()
    row = schedule_named(SCHEDULES.get(text, text))
    if row.name == "1f1b" and virtual > 1:
        row = schedule_named("interleaved-1f1b")
    return row.name, row.checked_virtual_stages(virtual if virtual > 1 else None)


def layout_of(record: Record, folded: Folded) -> Layout:
    """The record's layout. ZeRO 3 runs under FSDP, which overlaps its traffic and replays only what backward needs; other jobs are
    Megatron's kind: they replay whole layers, bring fused kernels for calls on elements (as torch.compile makes them) and, unless the
    record says so, overlap nothing; NeMo's recipes overlap what is data-parallel. Zero-bubble schedules come with their authors'
    optimizer, which does not wait for the other pipeline ranks.
    """
    tp, pp, cp = (record.get(key) or 1 for key in ("tp", "pp", "cp"))
    dp = record.get("dp") or max(1, (record.get("n_gpus") or 1) // (tp * pp * cp))
    schedule, virtual = schedule_of(record)
    zero = record.get("zero") or 0
    rows, batch = record.get("micro_batch") or 1, record.get("global_batch") or dp
    sharded = zero == 3
    overlap = {"dp", "cp"} if sharded or _says(record, "nemo") else set()
    overlap |= {"dp", "cp", "tp"} if _says(record, "overlap on", "overlap (user") else set()
    return Layout(
        tp=tp, cp=cp, dp=dp, pp=pp, virtual_stages=virtual, schedule=schedule, microbatch_rows=rows,
        microbatches=max(1, -(-batch // (rows * dp))), zero=zero, recompute=recompute_of(record), replay_all=not sharded,
        sequence_parallel=bool(record.get("sequence_parallel")), precision=precision_of(record), overlap=frozenset(overlap),
        blocks=blocks_of(folded, record["layers"], pp * virtual), offload=bool(record.get("activation_cpu_offload")),
        split_sends=tp > 1, sums_each_microbatch=True, barrier=not schedule.startswith("zb"),
        zero_bucket_elements=ZERO_BUCKET_ELEMENTS, gather_again=not sharded,
        fused=not sharded or _says(record, "compile"), fused_loss=_from(record, FUSED_LOSSES),
    )  # fmt: skip


def blocks_of(folded: Folded, layers: int, num_stages: int) -> tuple[int, ...] | None:
    """Layers dealt out as these jobs do: equal numbers; else one fewer for the first and last; else the last is short."""
    runs = [unit for unit in folded.units if unit.run is not None]
    if num_stages == 1 or sum(unit.count for unit in runs) != layers:
        return None
    if layers % num_stages == 0:
        dealt = [layers // num_stages] * num_stages
    elif (layers + 2) % num_stages == 0:
        each = (layers + 2) // num_stages
        dealt = [each - 1, *[each] * (num_stages - 2), each - 1]
    else:
        each = -(-layers // num_stages)
        dealt = [each] * (num_stages - 1) + [layers - each * (num_stages - 1)]
    first = folded.units.index(runs[0])
    dealt[0] += first
    dealt[-1] += len(folded.units) - first - len(runs)
    return tuple(dealt) if min(dealt) > 0 else None


# ---- predictions ------------------------------------------------------------------------------------------------------------


class Predictor:
    """Predictions of records; models are traced once and kept, folded, in `cache`."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        self._folded: dict[Shape, Folded] = {}
        self._evaluators: dict[Any, Evaluator] = {}

    def folded(self, shape: Shape, tokens: int) -> Folded:
        """The folded graph of a model, traced at full depth; its sequence length is symbolic."""
        if shape not in self._folded:
            source = (HERE / "published_models.py").read_bytes()
            key = hashlib.sha256(repr(astuple(shape)).encode() + source).hexdigest()[:20]
            path = self.cache / f"{key}.json"
            if not path.exists():
                model, batch = built(shape, tokens)
                traced = trace(model, (), batch)
                found = fold(weigh_loss(traced.graph_module, traced.loss).module)
                path.write_text(json.dumps(folded_to_json(found)))
            self._folded[shape] = folded_from_json(json.loads(path.read_text()))
        return self._folded[shape]

    def evaluator(self, record: Record) -> Evaluator:
        """The evaluator of the record's model on its device."""
        shape, profile = shape_of(record), hardware_of(record)
        key = (shape, profile.name, record["seq_len"])
        if key not in self._evaluators:
            self._evaluators[key] = Evaluator(self.folded(shape, record["seq_len"]), {"B": 2, "T": record["seq_len"]}, profile)
        return self._evaluators[key]

    def predict(self, record: Record) -> LayoutPrediction:
        """AutoparError where the record's layout cannot be."""
        found = self.evaluator(record)
        return found.predict(layout_of(record, found.folded), exact=True)

    def memory_GB(self, record: Record, found: LayoutPrediction) -> float:
        """The predicted memory in the terms of the record's unit. nvidia-smi shows the GPUs of one node: the first, unless the record
        names others. What frameworks report is that of the fullest rank.
        """
        unit = str(record.get("mem_unit") or "").lower()
        if "nvidia-smi" in unit:
            layout, ranks = found.layout, self.evaluator(record).memory_by_rank(found.layout)
            on_node = max(1, (record.get("gpus_per_node") or 8) // (layout.tp * layout.cp * layout.dp))
            seen = [*ranks[:on_node], *(ranks[-on_node:] if "last" in unit else ())]
            return max(memory.device_bytes for memory in seen) / 1000 / 2**20  # it prints MiB
        if "1e9" in unit:
            return found.memory.allocated_bytes / 1e9
        return (found.memory.reserved_bytes if unit == "gib" else found.memory.allocated_bytes) / 2**30


# ---- comparison ---------------------------------------------------------------------------------------------------------------


def kendall(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-a of (predicted, measured); None if no two differ."""
    signs = [
        ((a[0] > b[0]) - (a[0] < b[0])) * ((a[1] > b[1]) - (a[1] < b[1])) for a, b in itertools.combinations(pairs, 2) if a[1] != b[1]
    ]
    return sum(signs) / len(signs) if signs else None


def compared(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of some predicted rows."""
    timed = [(row["predicted_s"] / row["measured_s"] - 1) for row in rows if row["measured_s"] and row["predicted_s"]]
    held = [(row["predicted_GB"] / row["measured_GB"] - 1) for row in rows if row["measured_GB"] and row["predicted_GB"]]
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["group"] and row["measured_s"] and row["predicted_s"]:
            groups.setdefault(row["group"], []).append((row["predicted_s"], row["measured_s"]))
    choices = [pairs for pairs in groups.values() if len(pairs) > 1]
    taus = [tau for pairs in choices if (tau := kendall(pairs)) is not None]
    regrets = [min(pairs)[1] / min(measured for _, measured in pairs) - 1 for pairs in choices]
    return {
        "n": len(rows), "timed": len(timed), "time_mape": _mean(map(abs, timed)), "time_bias": _mean(timed), "with_memory": len(held),
        "memory_mape": _mean(map(abs, held)), "memory_bias": _mean(held),
        "false_fits": sum(bool(row["oom"]) and row["fits"] is True for row in rows),
        "false_misfits": sum(not row["oom"] and row["fits"] is False for row in rows),
        "groups": len(choices), "tau": _mean(taus), "regret_median": statistics.median(regrets) if regrets else None,
        "regret_worst": max(regrets, default=None), "failed": sum(row["error"] is not None for row in rows),
    }  # fmt: skip


def _mean(values: Any) -> float | None:
    listed = list(values)
    return statistics.fmean(listed) if listed else None


def row_of(record: Record, predictor: Predictor) -> dict[str, Any]:
    """One record beside its prediction."""
    row = {
        "id": record.get("id"), "suite": str(record.get("suite") or "-"), "measured_s": record.get("step_time_s"),
        "measured_GB": record.get("peak_mem_GB"), "oom": record.get("oom"), "group": str(record.get("group") or ""), "error": None,
        "predicted_s": None, "predicted_GB": None, "fits": None,
    }  # fmt: skip
    try:
        record = checked(record)
        found = predictor.predict(record)
    except Exception as error:  # of this record: the others are compared
        return {**row, "measured_s": None, "measured_GB": None, "error": f"{type(error).__name__}: {error}"}
    return {
        **row, "predicted_s": found.step_seconds, "predicted_GB": predictor.memory_GB(record, found), "fits": found.fits,
        "bubble": found.bubble_fraction, "exposed": dict(found.exposed_seconds), "optimizer_s": found.optimizer_seconds,
    }  # fmt: skip


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as text."""
    heads = ("suite", "n", "time MAPE", "bias", "memory MAPE", "false fits", "false misfits", "tau", "regret median", "worst", "failed")
    lines = [heads]
    for suite, each in figures.items():
        lines.append((
            suite, str(each["n"]), _percent(each["time_mape"]), _percent(each["time_bias"], "+"), _percent(each["memory_mape"]),
            str(each["false_fits"]), str(each["false_misfits"]), "" if each["tau"] is None else f"{each['tau']:.2f}",
            _percent(each["regret_median"]), _percent(each["regret_worst"]), str(each["failed"]),
        ))  # fmt: skip
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1%}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "published.csv")
    parser.add_argument("--json", action="store_true", help="figures and rows as JSON")
    parser.add_argument("--rows", action="store_true", help="every row")
    parser.add_argument("--suite", help="only this suite")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "autopar-published", help="folder of folded graphs")
    parser.add_argument("--write-csv", type=Path, help="write the records as CSV and stop")
    options = parser.parse_args(argv)
    try:
        records = records_of(options.file)
    except AutoparError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    names = dict.fromkeys(str(r.get("suite") or "-") for r in records)
    if options.suite not in (None, *names):
        print(f"no suite {options.suite!r} in {options.file}: {', '.join(names)}", file=sys.stderr)
        return 2
    records = [r for r in records if options.suite in (None, str(r.get("suite") or "-"))]
    if options.write_csv:
        write_csv(records, options.write_csv)
        return 0
    predictor = Predictor(options.cache)
    rows = []
    for index, record in enumerate(records):
        rows.append(row_of(record, predictor))
        if sys.stderr.isatty():
            print(f"\r{index + 1} of {len(records)}", end="", file=sys.stderr)
    for row in rows:
        if row["error"] is not None:
            print(f"{row['id']}: {row['error']}", file=sys.stderr)
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figures = {suite: compared([row for row in rows if row["suite"] == suite]) for suite in suites}
    figures["all"] = compared(rows)
    if options.json:
        print(json.dumps({"figures": figures, "rows": rows}, indent=1))
        return 0
    if options.rows:
        for row in rows:
            ratio = row["predicted_s"] / row["measured_s"] if row["predicted_s"] and row["measured_s"] else None
            held = f"{row['predicted_GB']:.1f} of {row['measured_GB']}" if row["measured_GB"] and row["predicted_GB"] else ""
            print(row["id"], "" if ratio is None else f"{ratio:.3f}", held, row["error"] or "", "OOM" if row["oom"] else "", row["fits"])
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
