"""The harness that compares predictions with published measurements: its input, its arithmetic, and a record through all of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from passes.fold import fold
from passes.folded_json import folded_from_json, folded_to_json
from passes.layout import Layout
from passes.layout_evaluator import Evaluator

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def published() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("published")
    finally:
        sys.path.remove(str(BENCHMARKS))


def record(**changes: Any) -> dict[str, Any]:
    """A small job with as many nulls as a record may have."""
    null = dict.fromkeys(("kv_heads", "vocab", "zero", "attention", "precision", "recompute", "notes", "group", "mem_unit", "vpp", "cp"))
    sizes = {"layers": 6, "hidden": 128, "ffn_hidden": None, "heads": 4, "mlp_matrices": 2, "seq_len": 64, "gpu": "A100-SXM"}
    job = {"n_gpus": 8, "tp": 2, "pp": 2, "dp": 2, "micro_batch": 2, "global_batch": 32, "schedule": "1f1b", "gpus_per_node": 8}
    return {**null, **sizes, **job, "id": "small", "suite": "small", "step_time_s": 1.0, "peak_mem_GB": None, "oom": None, **changes}


def test_records_are_predicted(published: Any, tmp_path: Path) -> None:
    predictor = published.Predictor(tmp_path)
    plain = published.row_of(record(), predictor)
    assert plain["error"] is None and plain["predicted_s"] > 0 and plain["fits"] is True
    full = published.row_of(record(recompute="full"), predictor)
    assert full["predicted_s"] > plain["predicted_s"]
    assert len(list(tmp_path.iterdir())) == 1  # one model, traced once
    again = published.row_of(record(recompute="full"), published.Predictor(tmp_path))
    assert again == full  # from the cache
    gated = published.row_of(record(mlp_matrices=3, kv_heads=2, gpu="H100-SXM", precision="fp8", sequence_parallel=True, cp=2), predictor)
    assert gated["error"] is None
    wrong = published.row_of(record(schedule="best-of-all"), predictor)
    assert "best-of-all" in wrong["error"]


def test_both_forms_of_a_file_say_the_same(published: Any, tmp_path: Path) -> None:
    given = {**record(), "measured": {"step_time_s": 2.5, "peak_mem_GB": 7, "oom": False}}
    for key in ("step_time_s", "peak_mem_GB", "oom"):
        del given[key]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([given, {**given, "derived": {"step_time_s": 3.0}, "measured": {}}]))
    records = published.records_of(path)
    assert [each["step_time_s"] for each in records] == [2.5, 3.0]
    published.write_csv(records, tmp_path / "records.csv")
    columns = published.records_of(tmp_path / "records.csv")
    assert all(a[key] == b.get(key) for a, b in zip(columns, records, strict=True) for key in published.COLUMNS)


def test_the_arithmetic(published: Any) -> None:
    assert published.kendall([(1, 1), (2, 2), (3, 3)]) == 1 and published.kendall([(3, 1), (2, 2), (1, 3)]) == -1
    assert published.kendall([(1, 1), (2, 1)]) is None
    row = {"measured_GB": None, "predicted_GB": None, "oom": None, "fits": True, "group": "g", "error": None}
    rows = [{**row, "measured_s": 1.0, "predicted_s": 1.2}, {**row, "measured_s": 2.0, "predicted_s": 1.0, "oom": True}]
    figures = published.compared(rows)
    assert figures["time_mape"] == pytest.approx(0.35) and figures["time_bias"] == pytest.approx(-0.15)
    assert figures["regret_worst"] == pytest.approx(1.0) and figures["false_fits"] == 1 and figures["tau"] == -1


def test_layers_are_dealt_out(published: Any, tmp_path: Path) -> None:
    predictor = published.Predictor(tmp_path)
    folded = predictor.folded(published.shape_of(record()), 64)
    assert published.blocks_of(folded, 6, 2) == (4, 4)
    assert published.blocks_of(folded, 6, 4) == (2, 2, 2, 2)  # one fewer at both ends, beside embedding and head
    assert published.blocks_of(folded, 6, 1) is None
    assert published.blocks_of(folded, 7, 2) is None


def test_a_folded_graph_survives_json(published: Any, tmp_path: Path) -> None:
    shape = published.shape_of(record())
    from autopar.trace import trace
    from passes.loss import weigh_loss

    model, batch = published.built(shape, 64)
    traced = trace(model, (), batch)
    folded = fold(weigh_loss(traced.graph_module, traced.loss).module)
    back = folded_from_json(json.loads(json.dumps(folded_to_json(folded))))
    profile = published.HARDWARE["a100-80gb"]
    for layout in (Layout(), Layout(tp=2, pp=2, microbatches=4, sequence_parallel=True), Layout(cp=2, recompute="selective")):
        first, second = (Evaluator(each, {"B": 2, "T": 64}, profile).predict(layout) for each in (folded, back))
        assert second == first
