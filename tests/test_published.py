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
    header = (tmp_path / "records.csv").read_text().splitlines()[0].split(",")
    assert all(a[key] == b.get(key) for a, b in zip(columns, records, strict=True) for key in header)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": None}, "has no layers"),
        ({"layers": "four"}, "layers is 'four'"),
        ({"heads": 7}, "heads is 7, which does not divide"),
        ({"gpu": "TPU v4"}, "no profile of the GPU 'TPU v4'"),
        ({"gpu": None}, "no profile of the GPU"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"recompute": "blocks"}, "recompute is 'blocks'"),
        ({"schedule": "best"}, "no schedule 'best'"),
        ({"schedule": "zb-h1", "vpp": 2}, "zb-h1"),
        ({"ep": 4}, "ep is 4"),
        ({"step_time_s": -1.0}, "step_time_s is -1.0"),
        ({"global_batch": 0}, "global_batch is 0"),
    ],
)
def test_what_is_wrong_with_a_record_is_its_own_error(published: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    row = published.row_of(record(**changes), published.Predictor(tmp_path))
    assert message in row["error"] and row["predicted_s"] is None
    figures = published.compared([row])
    assert (figures["n"], figures["timed"], figures["failed"]) == (1, 0, 1)


def test_other_words_for_the_same_job(published: Any, tmp_path: Path) -> None:
    predictor = published.Predictor(tmp_path)
    plain = published.row_of(record(), predictor)
    for changes in ({"schedule": None}, {"schedule": "1F1B"}, {"dp": None}, {"n_gpus": None}, {"layers": 6.0}, {"precision": "FP16 mixed"}):
        assert published.row_of(record(**changes), predictor) == plain, changes
    looped = published.row_of(record(vpp=2, schedule="interleaved"), predictor)
    assert looped["error"] is None and published.row_of(record(vpp=2), predictor) == looped
    assert published.row_of(record(global_batch=33), predictor)["predicted_s"] > plain["predicted_s"]


@pytest.mark.parametrize("gpu", ["H200", "B200 SXM", "GB200 NVL72", "GH200", "NVIDIA L40S", "GeForce RTX 4090", "V100-SXM2", "H100-SXM"])
def test_every_gpu_that_there_is_a_profile_of(published: Any, tmp_path: Path, gpu: str) -> None:
    row = record(gpu=gpu, mlp_matrices=3, kv_heads=2, gpus_per_node=4)
    profile = published.hardware_of(row)
    assert profile.name.split("-")[-1 if "4090" in gpu else 0] in gpu.lower()
    assert profile.devices_per_node == {"GB200 NVL72": 72, "GH200": 32}.get(gpu, 4)
    assert published.row_of(row, published.Predictor(tmp_path))["predicted_s"] > 0


def test_a_file_that_cannot_be_read_is_one_message(published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (("", "is not JSON"), ('[{"id":', "is not JSON"), ("{}", "no list of records")):
        (tmp_path / "broken.json").write_text(text)
        assert published.main([str(tmp_path / "broken.json")]) == 2
        assert message in capsys.readouterr().err
    assert published.main([str(tmp_path / "none.json")]) == 2
    (tmp_path / "mixed.json").write_text(json.dumps([None, {"id": 7}, record(suite="mine")]))
    assert published.main([str(tmp_path / "mixed.json"), "--json", "--cache", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert [row["error"] is None for row in json.loads(captured.out)["rows"]] == [False, False, True]
    assert "record 0" in captured.err and "7: BadArgument: the record has no layers" in captured.err
    assert published.main([str(tmp_path / "mixed.json"), "--suite", "yours"]) == 2


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
