"""Schedules read from files: torch.distributed.pipelining's CSV, JSON, and what is said of files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import autopar
from costmodel.errors import BadArgument, BadSchedule
from passes.instructions import Forward
from passes.order import Lists, in_flight, order
from passes.schedules import SCHEDULES, schedule

# What torch 2.13 writes for two ranks with two stages each and four microbatches: `_dump_csv` of ScheduleZBVZeroBubble,
# ScheduleDualPipeV and ScheduleInterleaved1F1B, and of the first with communication.
TORCH = {
    "zb-v": """\
0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0F3,0I0,0W0,3F2,3I2,3W2,0I1,0W1,3F3,3I3,3W3,0I2,0W2,0I3,0W3
,1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,2W1,1F3,1I1,1W1,2F3,2I2,2W2,1I2,2I3,1I3,1W2,2W3,1W3
""",
    "dualpipe-v": """\
0F0,0F1,0F2,3F0,3I0,3W0,3F1,(0F3;3B1)OVERLAP_F_B,(3F2;0B0)OVERLAP_F_B,3B2,(3F3;0B1)OVERLAP_F_B,3B3,0I2,0W2,0I3,0W3
1F0,2F0,1F1,2F1,1F2,2B0,(2F2;1B0)OVERLAP_F_B,(1F3;2B1)OVERLAP_F_B,(2F3;1B1)OVERLAP_F_B,2B2,1B2,2I3,1I3,2W3,1W3
""",
    "interleaved-1f1b": """\
0F0,0F1,2F0,2F1,,,0F2,2B0,0F3,2B1,2F2,0B0,2F3,0B1,,2B2,,2B3,,0B2,,0B3
,1F0,1F1,,3F0,3B0,3F1,3B1,1F2,1B0,1F3,1B1,3F2,3B2,3F3,3B3,,1B2,,1B3
""",
    "zb-v with communication": """\
0F0,0SEND_F0,0F1,0SEND_F1,3RECV_F0,0F2,0SEND_F2,3F0,3RECV_F1,3I0,3SEND_B0,3W0,3F1,3I1,3SEND_B1,0RECV_B0,3W1,0F3,\
0SEND_F3,3RECV_F2,0I0,0W0,3F2,3I2,3SEND_B2,0RECV_B1,3W2,0I1,3RECV_F3,0W1,3F3,3I3,3SEND_B3,0RECV_B2,3W3,0I2,0RECV_B3,\
0W2,0I3,0W3,3REDUCE_GRAD
1RECV_F0,1F0,1RECV_F1,2F0,2SEND_F0,1RECV_F2,1F1,2F1,2SEND_F1,2RECV_B0,2I0,2W0,1F2,2RECV_B1,1I0,1SEND_B0,1W0,1RECV_F3,\
2F2,2SEND_F2,2I1,2W1,1F3,2RECV_B2,1I1,1SEND_B1,1W1,2F3,2SEND_F3,2I2,2W2,2RECV_B3,1I2,1SEND_B2,2I3,1I3,1SEND_B3,1W2,\
2W3,1W3,1UNSHARD
""",
}
CHAIN = [(0, 1), (1, 2), (2, 3)]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def ours(name: str) -> Lists:
    return order(name, 2, 4, CHAIN)


@pytest.mark.parametrize("which", TORCH)
def test_the_csv_of_torch_is_the_schedule_of_the_table(which: str, tmp_path: Path) -> None:
    name = which.split(" ")[0]
    path = str(written(tmp_path, "theirs.csv", TORCH[which]))
    row = schedule(path)
    assert order(path, 2, 4, CHAIN) == ours(name)
    assert row.stage_ranks(2, 2) == schedule(name).stage_ranks(2, 2)
    assert row.splits_backward == schedule(name).splits_backward
    assert [row.max_in_flight(rank, 2, 4, 2) for rank in range(2)] == [in_flight(listed) for listed in ours(name)]


@pytest.mark.parametrize("name", ["zb-v", "interleaved-1f1b", "1f1b"])
def test_json_has_instructions_as_a_plan_has_them_or_actions(name: str, tmp_path: Path) -> None:
    num_stages = 2 * schedule(name).default_virtual_stages
    edges = CHAIN[: num_stages - 1]
    lists = order(name, 2, 4, edges)
    ranks = schedule(name).stage_ranks(2, num_stages // 2)
    plan = {"instructions": [[one.to_list() for one in listed] for listed in lists], "stage_ranks": list(ranks)}
    assert order(str(written(tmp_path, "plan.json", json.dumps(plan))), 2, 4, edges) == lists
    if name != "zb-v":  # without "stage_ranks": in a loop
        bare = written(tmp_path, "bare.json", json.dumps(plan["instructions"]))
        assert order(str(bare), 2, 4, edges) == lists
    if name == "zb-v":
        actions = [line.split(",") for line in TORCH[name].splitlines()]
        assert order(str(written(tmp_path, "actions.json", json.dumps(actions))), 2, 4, edges) == lists


def test_load_adds_a_row_and_other_sizes_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "theirs.csv", TORCH["zb-v"])
    try:
        row = autopar.schedules.load(path)
        assert (row.name, SCHEDULES["theirs"], row.virtual_stages) == ("theirs", row, (2,))
        assert order("theirs", 2, 4, CHAIN) == ours("zb-v")
        with pytest.raises(BadArgument, match="already"):
            autopar.schedules.load(path)
        assert autopar.schedules.load(path, name="mine").name == "mine"
        for p, m in ((2, 5), (4, 4), (1, 4)):
            with pytest.raises(BadArgument, match=f"not for {p} pipeline ranks, {m} microbatches(.|\n)*use 2 pipeline"):
                order("theirs", p, m, CHAIN[: 2 * p - 1])
        with pytest.raises(BadArgument, match=r"3 virtual stages(.|\n)*use 2"):
            order("theirs", 2, 4, CHAIN, virtual_stages=3)
    finally:
        SCHEDULES.pop("theirs", None)
        SCHEDULES.pop("mine", None)


def test_a_file_given_by_its_path_is_no_row_of_the_table(tmp_path: Path) -> None:
    path = str(written(tmp_path, "theirs.csv", TORCH["zb-v"]))
    assert schedule(path).name == path
    assert path not in SCHEDULES


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "0F0,0B0\n1F0,1Q0\n", r"'1Q0' is no action(.|\n)*a.csv, line 2, column 2(.|\n)*use .*2F0"),
        ("a.csv", "0F0,0F\n", r"'0F' is no action(.|\n)*line 1, column 2"),
        ("a.csv", "0F0,(0B0;1F0)OTHER\n", r"is no action(.|\n)*line 1, column 2"),
        ("a.csv", "0F0,(0B0;1X0)OVERLAP_F_B\n", r"'1X0' is no action(.|\n)*line 1, column 2"),
        ("a.csv", '0F0,"0B0\n', r"is not CSV(.|\n)*a.csv, line 1"),
        ("a.csv", "\n\n", "holds no schedule"),
        ("a.json", "[[1", r"is not JSON(.|\n)*a.json, line 1, column 4"),
        ("a.json", "{}", r"holds no schedule(.|\n)*a list per rank"),
        ("a.json", "[]", "holds no schedule"),
        ("a.json", "[[]]", "no compute in it"),
        ("a.json", '[["0F0"], ["1F0", ["Jump", 0]]]', r"no instruction 'Jump'(.|\n)*a.json, rank 1, item 1"),
        ("a.json", '[["0F0", "0G0"]]', r"'0G0' is no action(.|\n)*rank 0, item 1"),
        ("a.json", '[[["Forward", 0, -1]]]', r"integers from 0(.|\n)*rank 0, item 0"),
        ("a.json", '[[["Forward", 0, "x"]]]', r"integers from 0(.|\n)*rank 0, item 0"),
        ("a.json", '{"instructions": [[["Forward", 0]]], "stage_ranks": [1]}', "stage_ranks"),
        ("a.json", '{"instructions": [[["Forward", 0]]], "stage_ranks": "0"}', "stage_ranks"),
        (
            "a.json",
            '{"instructions": [[["Forward", 0, 1]], [["Forward", 0]]], "stage_ranks": [0, 1]}',
            r"which has 1(.|\n)*rank 0, item 0",
        ),
    ],
)
def test_a_file_that_is_no_schedule_is_refused_and_the_place_named(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises((BadArgument, BadSchedule), match=message):
        schedule(str(written(tmp_path, name, text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n0F1,0B1\n", r"Stage 0 is on rank 0 and on rank 1(.|\n)*line 2, column 1"),
        ("0F0,0B0\n2F0,2B0\n", "no stage 1"),
        ("0F0,1F0,1B0,0B0\n2F0,2B0\n", r"have \[2, 1\] stages"),
        ("0F0,0B0\n1F0\n", r"Stage 1 never runs Backward\(0\)(.|\n)*a.csv"),
        ("0B0,0F0\n1F0,1B0\n", r"Backward\(0\) before Forward\(0\)(.|\n)*a.csv, stage 0, instruction 0"),
        ("0F0,0F2,0B0,0B2\n", r"never runs Forward\(1\)"),
        ("0F0,0F1,0B1,0B0\n", "last bits"),
        ("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n", "in a circle"),
        ("0F0,0I0\n", r"never runs BackwardWeight\(0\)"),
    ],
)
def test_a_wrong_schedule_in_a_file_is_caught(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadSchedule, match=message):
        schedule(str(written(tmp_path, "a.csv", text)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"Cannot read .*none\.csv"):
        schedule(str(tmp_path / "none.csv"))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadArgument, match=r"Cannot read .*bytes\.csv"):
        schedule(str(tmp_path / "bytes.csv"))
    with pytest.raises(BadArgument, match=r'no schedule \'none\'(.|\n)*"zb-v".*\.csv or \.json file'):
        schedule("none")


def test_a_schedule_that_the_table_has_not_can_come_from_a_file(tmp_path: Path) -> None:
    """Two ranks, one stage each, with the weight gradients all at the end."""
    text = "0F0,0F1,0I0,0I1,0W0,0W1\n1F0,1I0,1F1,1I1,1W0,1W1\n"
    lists = order(str(written(tmp_path, "a.csv", text)), 2, 2, [(0, 1)])
    assert [one.microbatch for one in lists[1] if isinstance(one, Forward)] == [0, 1]
