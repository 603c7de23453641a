"""`calibrate`: the fit finds constants that made the times; a measured profile is a possible one, and works where a name does."""

import json
from dataclasses import replace

import pytest
import torch
from models import GPT, gpt_batch

import autopar
from autopar import calibrate as calibration
from autopar.cli import main
from costmodel.collectives import all_reduce_seconds
from costmodel.hardware import Hardware, Link, hardware


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real measurements, of little work."""
    monkeypatch.setattr(calibration, "_SECONDS", {"cpu": 0.005})
    monkeypatch.setattr(calibration, "_SHAPES", {"cpu": ((64, 64, 64), (128, 128, 64), (256, 64, 64), (128, 64, 128), (64, 128, 128))})
    monkeypatch.setattr(calibration, "_STREAM_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(calibration, "_COLLECTIVE_BYTES", {"cpu": (2**10, 2**16, 2**18)})


@pytest.mark.parametrize("link", [Link(8e-5, 3.5e9), Link(3.4e-6, 370e9), Link(1e-3, 1e8)])
def test_the_fit_finds_the_link_that_made_the_times(link: Link) -> None:
    points = [
        (2.0 * (size - 1), 2.0 * (size - 1) * num_bytes / size, all_reduce_seconds(num_bytes=num_bytes, axis_size=size, link=link))
        for size in (2, 4)
        for num_bytes in (2**10, 2**16, 2**20, 2**24)
    ]
    latency, per_byte = calibration.fitted(points)
    assert latency == pytest.approx(link.latency_seconds, rel=1e-6)
    assert 1 / per_byte == pytest.approx(link.bandwidth_bytes_per_second, rel=1e-6)


def test_a_term_below_the_noise_is_still_a_positive_number() -> None:
    latency, per_byte = calibration.fitted([(2.0, 1e3, 1e-3), (2.0, 1e6, 0.9e-3), (2.0, 1e7, 0.8e-3)])
    assert latency > 0 and per_byte > 0


def test_the_profile_is_of_this_machine_says_so_and_leaves_torch_as_it_was(quick: None) -> None:
    threads = torch.get_num_threads()
    profile = calibration.calibrate("cpu", name="here")
    assert torch.get_num_threads() == threads
    assert Hardware.from_json(profile.to_json()) == profile and profile.basis == "calibrated"
    assert 1e8 < profile.peak_flops["f32"] < 1e13 and 1e8 < profile.memory_bandwidth_bytes_per_second < 1e12
    assert 1e-7 < profile.launch_seconds < 1e-3 and 1e-7 < profile.inside.latency_seconds < 0.1
    for name in ("peak_flops", "memory_bandwidth_bytes_per_second", "launch_seconds", "inside"):
        assert "measured" in profile.sources[name] and torch.__version__ in profile.sources[name]
    assert "not measured" in profile.sources["across"]


def test_the_command_writes_a_profile_that_plan_takes(quick: None, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.json"
    assert main(["calibrate", "--out", str(path), "--device", "cpu", "--name", "here"]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    assert json.loads(path.read_text())["basis"] == "calibrated"
    assert main(["plan", "examples/mlp.py:example", "--tp", "2", "--hardware", str(path)]) == 0
    printed = capsys.readouterr().out
    assert ", 1f1b, here\n" in printed and "predicted from a calibrated profile" in printed


def test_the_command_names_what_cannot_be(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--out", str(tmp_path / "no" / "here.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["calibrate", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_ranks_that_share_cores_are_slower_and_a_profile_without_sharing_is_the_same() -> None:
    alone = replace(hardware("cpu"), shared_rate=0.6, sharing_ranks=4)
    assert alone.for_ranks(1) is alone and hardware("cpu").for_ranks(8) is hardware("cpu")
    rates = {ranks: alone.for_ranks(ranks).peak_flops["f32"] / alone.peak_flops["f32"] for ranks in (2, 4, 8)}
    assert rates == pytest.approx({2: 1 - 0.4 / 3, 4: 0.6, 8: 0.3})
    four = alone.for_ranks(4)
    assert four.launch_seconds == pytest.approx(alone.launch_seconds / 0.6) and four.for_ranks(4) is four
    model, batch = GPT(), gpt_batch()
    one, two = (autopar.parallelize(model, batch, tp=tp, hardware=alone).plan.stages[0].cost for tp in (1, 2))
    unshared = autopar.parallelize(model, batch, tp=2, hardware=hardware("cpu")).plan.stages[0].cost
    shared, free = (c.forward_seconds + c.backward_seconds - c.collective_seconds for c in (two, unshared))
    assert shared / free == pytest.approx(1 / rates[2], rel=0.02)
    assert one.forward_seconds == autopar.parallelize(model, batch, hardware=hardware("cpu")).plan.stages[0].cost.forward_seconds
