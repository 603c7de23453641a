"""The records of published measurements: read from JSON or CSV, checked one by one, written as CSV.

A record says what ran (the model's dimensions, degrees, batch, software), on what, and what was measured. What it leaves out or holds as
null gets the usual value (`checked`); what cannot be is an error of that record alone.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from costmodel.errors import BadArgument

Record = Mapping[str, Any]
COLUMNS = (
    "id", "suite", "model", "layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab", "mlp_matrices", "seq_len", "gpu", "gpu_mem_GB",
    "n_gpus", "gpus_per_node", "tp", "pp", "dp", "cp", "ep", "vpp", "zero", "micro_batch", "global_batch", "schedule", "recompute",
    "sequence_parallel", "precision", "attention", "activation_cpu_offload", "step_time_s", "peak_mem_GB", "oom", "mem_unit", "group",
    "notes", "table", "source",
)  # fmt: skip
NEEDED = ("layers", "hidden", "heads", "seq_len")
COUNTS = (
    *NEEDED, "ffn_hidden", "kv_heads", "vocab", "n_gpus", "gpus_per_node", "tp", "pp", "dp", "cp", "ep", "vpp", "micro_batch",
    "global_batch",
)  # fmt: skip
MEASURED = ("step_time_s", "peak_mem_GB", "gpu_mem_GB")


def records_of(path: Path) -> list[Record]:
    """The records of a JSON file (a list, or an object with one under "records") or a CSV file, measured values under their plain names.
    BadArgument if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadArgument(f"cannot read {path}", why=str(error)) from error
    if path.suffix == ".csv":
        return [{str(key): _value(text) for key, text in row.items()} for row in csv.DictReader(text.splitlines())]
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadArgument(f"{path} is not JSON", why=str(error)) from None
    if isinstance(found, Mapping):
        found = found.get("records")
    if not isinstance(found, list):
        raise BadArgument(f"{path} holds no list of records", use="[{...}, ...]")
    return [
        {"id": f"record {k}", **_flat(record)} if isinstance(record, Mapping) else {"id": f"record {k}", "not_a_record": record}
        for k, record in enumerate(found)
    ]


def _value(text: Any) -> Any:
    if text in (None, "", "True", "False"):
        return {"True": True, "False": False}.get(text)
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def _part(record: Record, name: str) -> Mapping[str, Any]:
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def _flat(record: Record) -> Record:
    measured, derived = _part(record, "measured"), _part(record, "derived")
    seconds = measured.get("step_time_s") or derived.get("step_time_s")
    rate = measured.get("tokens_per_s_per_gpu")
    if seconds is None and _is_positive(rate):
        tokens = [record.get(name) for name in ("global_batch", "seq_len")]
        if all(map(_is_positive, tokens)):
            seconds = tokens[0] * tokens[1] / rate / (record.get("n_gpus") or 1)
    return {**record, "step_time_s": seconds, "peak_mem_GB": measured.get("peak_mem_GB"), "oom": measured.get("oom")}


def write_csv(records: Sequence[Record], path: Path) -> None:
    """The columns that predictions and comparisons need, and where each row is from."""
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        rows.writerows({key: record.get(key) for key in COLUMNS} for record in records)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def checked(record: Record) -> Record:
    """The record with whole numbers where numbers count, and one for each degree it does not name but dp, which the GPUs leave over.
    BadArgument saying what is missing, no number, or cannot be.
    """
    if "not_a_record" in record:
        raise BadArgument(f"{record['not_a_record']!r} is no record", use="an object with layers, hidden, heads, seq_len, gpu, ...")
    found = dict(record)
    for name in COUNTS:
        value = found.get(name)
        if value is None and name not in NEEDED:
            continue
        if value is None:
            raise BadArgument(f"the record has no {name}", use="a positive whole number")
        if not _is_positive(value) or value != int(value):
            raise BadArgument(f"{name} is {value!r}", use="a positive whole number")
        found[name] = int(value)
    for name in MEASURED:
        if found.get(name) is not None and not _is_positive(found[name]):
            raise BadArgument(f"{name} is {found[name]!r}", use="a positive number, or null")
    for name in ("tp", "pp", "cp", "vpp", "micro_batch"):
        found[name] = found.get(name) or 1
    for whole, name in (("hidden", "heads"), ("heads", "kv_heads")):
        if found[whole] % (found.get(name) or 1):
            raise BadArgument(f"{whole} is {found[whole]}", why=f"{name} is {found[name]}, which does not divide it")
    if (found.get("ep") or 1) > 1:
        raise BadArgument(f"ep is {found['ep']}", why="a record says nothing of its experts, so the model cannot be built")
    if found.get("dp") is None:
        ranks = found["tp"] * found["pp"] * found["cp"]
        found["dp"] = max(1, (found.get("n_gpus") or ranks) // ranks)
    return found
