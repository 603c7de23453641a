"""The command line: what each command prints, and one clear message with exit status 2 for what cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.cli import main
from autopar.plan import Plan

ROOT = Path(__file__).parents[1]
MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, y)

    def example_inputs(self):
        return {"x": torch.randn(8, 16), "y": torch.randn(8, 16)}


class Branching(Net):
    def forward(self, x, y):
        if x.sum() > 0:
            return super().forward(x, y)
        return x.sum()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class WithFunction(Net):
    def forward(self, x, y):
        return super().forward(Doubled.apply(self.blocks[0](x)), y)


class NoExample(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)


net = Net()
number = 3


def example():
    model = Net()
    return model, model.example_inputs()


def reads_values():
    model = Net()
    assert float(model.blocks[0].up.weight.sum()) != 1e9
    return model, model.example_inputs()


def wrong():
    return Net()


def broken():
    return undefined_name
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "bad.py").write_text("import torch\n\nx = = 3\n")
    (tmp_path / "failing.py").write_text("import torch\n\nimport no_such_thing\n")
    (tmp_path / "plan.txt").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    return tmp_path


def run(capsys, *words):
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    "target", ["net.py:example", "net.py:Net", "net.py:net", "net.py:reads_values", "./net.py:example", "net:example"]
)
def test_every_form_of_target_gives_the_plan(folder, capsys, target):
    status, out, err = run(capsys, "plan", target, "--tp", "2", "--pp", "2")
    assert (status, err) == (0, "")
    assert out.startswith("net.py:Net: ") and "blocks.{0..3}.up.weight" in out


def test_hub_models_are_built_from_settings(capsys):
    words = [
        "--set",
        "hidden_size=32",
        "--set",
        "num_hidden_layers=2",
        "--set",
        "intermediate_size=64",
        "--set",
        "vocab_size=64",
    ]
    heads = ["--set", "num_attention_heads=4", "--set", "num_key_value_heads=2", "--batch", "4", "--seq", "8"]
    status, out, _ = run(capsys, "plan", "hf:llama", *words, *heads, "--tp", "2", "--pp", "2", "--json")
    assert status == 0
    plan = json.loads(out)
    assert plan["sizes"] == {"B": 4, "T": 8}
    assert plan["weights"]["model.layers.0.self_attn.k_proj.weight"] == "16/tp 32"


def test_a_saved_plan_is_emitted_without_the_model(folder, capsys):
    assert run(capsys, "plan", "net.py:example", "--tp", "2", "--pp", "2", "--save", "plan.json")[0] == 0
    (folder / "net.py").unlink()
    status, out, err = run(capsys, "emit", "--plan", "plan.json", "--out", "out")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"out/{name}" for name in ("rank_0.py", "rank_1.py", "rank_2.py", "rank_3.py", "plan.json", "run.py")
    ]
    assert (folder / "out/plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    assert (folder / "out/rank_2.py").read_text() == Plan.load("plan.json").source(2)


def test_emit_with_weights_writes_every_rank_its_shards(folder, capsys):
    assert run(capsys, "emit", "net.py:example", "--tp", "2", "--out", "out", "--weights")[0] == 0
    assert sorted(path.name for path in (folder / "out").glob("*.pt")) == ["weights_0.pt", "weights_1.pt"]


def test_verify_says_equal_or_exits_with_one(folder, capsys):
    status, out, _ = run(capsys, "verify", "net.py:example", "--tp", "2", "--pp", "2")
    assert status == 0 and "equal to the untouched model" in out
    status, out, err = run(capsys, "verify", "net.py:example", "--tp", "2", "--pp", "2", "--tolerance", "0")
    assert status == 1 and "DIFFERENT" in out and err == ""


def test_explain_marks_the_placement_of_the_plan(folder, capsys):
    status, out, _ = run(capsys, "explain", "net.py:example", "blocks.1.up.weight", "--tp", "2", "--json")
    assert status == 0
    (explanation,) = json.loads(out)
    chosen = [c for c in explanation["candidates"] if c["chosen"]]
    assert [c["placement"] for c in chosen] == ["64/tp 16"]
    costs = [c["objective_seconds"] for c in explanation["candidates"] if c["objective_seconds"] is not None]
    assert len(costs) > 1 and costs == sorted(costs) and costs[0] == chosen[0]["objective_seconds"]
    status, out, _ = run(capsys, "explain", "net.py:example", "blocks.1.up", "--tp", "2")
    assert status == 0 and "blocks.1.up.weight (64 16)" in out and "blocks.1.up.bias (64)" in out
    assert max(map(len, out.splitlines())) <= 120


def test_timeline_and_diff_read_saved_plans(folder, capsys):
    for schedule in ("1f1b", "gpipe"):
        assert (
            run(capsys, "plan", "net.py:example", "--pp", "2", "--schedule", schedule, "--save", f"{schedule}.json")[0]
            == 0
        )
    status, out, _ = run(capsys, "timeline", "--plan", "gpipe.json")
    assert status == 0 and "\nstage 0  " in out and "\nrank 1  " in out
    status, out, _ = run(capsys, "diff", "1f1b.json", "gpipe.json")
    assert status == 0 and "schedule" in out


def test_a_timeline_is_drawn_and_measured(folder, capsys):
    files = [word for kind in ("svg", "html", "trace") for word in (f"--{kind}", f"a.{kind}")]
    status, out, err = run(capsys, "timeline", "net.py:example", "--pp", "2", "--microbatches", "2", *files)
    assert (status, err) == (0, "") and out.endswith("wrote a.svg\nwrote a.html\nwrote a.trace\n")
    assert "predicted " in out and "measured " not in out
    assert (folder / "a.svg").read_text().startswith("<svg ")
    assert (folder / "a.html").read_text().startswith("<!doctype html>")
    assert "traceEvents" in json.loads((folder / "a.trace").read_text())
    status, out, err = run(capsys, "timeline", "net.py:example", "--pp", "2", "--microbatches", "2", "--measure", *files)
    assert (status, err) == (0, "") and "\nmeasured " in out and out.count("\nrank 1 ") == 2
    assert "measured" in (folder / "a.html").read_text() and "measured" in (folder / "a.svg").read_text()
    status, out, _ = run(capsys, "timeline", "net.py:example", "--pp", "2", "--measure", "--json")
    spans = json.loads(out)
    assert status == 0 and set(spans) == {"predicted", "measured"}
    assert {span["rank"] for span in spans["measured"]} == {0, 1}


BAD = {
    "measure a saved plan": (["timeline", "--plan", "p.json", "--measure"], "--measure needs a TARGET", "no weights"),
    "draw into no folder": (["timeline", "net.py:example", "--svg", "no/such.svg"], "no/such.svg", "no folder"),
    "degree 0": (["plan", "net.py:example", "--tp", "0"], "--tp", "positive"),
    "degree not an int": (["plan", "net.py:example", "--pp", "2.5"], "--pp", "'2.5'"),
    "no command": ([], "COMMAND", "--help"),
    "unknown command": (["paln", "net.py:example"], "paln", "plan"),
    "unknown option": (["plan", "net.py:example", "--tensor", "2"], "--tensor", "--help"),
    "more microbatches than rows": (["plan", "net.py:example", "--microbatches", "9"], "9 microbatches", "8 rows"),
    "too many stages": (["plan", "net.py:example", "--pp", "99"], "99 pipeline stages", "pp <="),
    "unknown schedule": (["plan", "net.py:example", "--schedule", "2f2b"], "2f2b", "1f1b"),
    "unknown hardware": (["plan", "net.py:example", "--hardware", "abacus"], "abacus", "h100-sxm"),
    "no hardware file": (["plan", "net.py:example", "--hardware", "abacus.json"], "abacus.json", "cannot read"),
    "uneven nodes": (["plan", "net.py:example", "--tp", "2", "--nodes", "3"], "3 nodes", "divisor"),
    "no such folder": (["plan", "models/net.py:example"], "no folder models", "path/to/file.py:name"),
    "no such file": (["plan", "nte.py:example"], "no file nte.py", "net.py"),
    "no such name": (["plan", "net.py:exampel"], "net.py has no exampel", "example"),
    "no name": (["plan", "net.py"], "has no", "path/to/file.py:name"),
    "no such module": (["plan", "no_such_package.models:net"], "no module no_such_package", "path/to/file.py:name"),
    "no submodule": (["plan", "json.models:net"], "no module json.models", "path/to/file.py:name"),
    "not a model": (["plan", "net.py:number"], "int", "nn.Module"),
    "a function of another form": (["plan", "net.py:wrong"], "returned Net", "(model, example_inputs)"),
    "a function that raises": (["plan", "net.py:broken"], "NameError", "net.py:"),
    "no example inputs": (["plan", "net.py:NoExample"], "without example inputs", "example_inputs"),
    "a file that is not Python": (["plan", "bad.py:x"], "SyntaxError", "bad.py:3"),
    "a file that fails": (["plan", "failing.py:x"], "no_such_thing", "failing.py:3"),
    "a data-dependent branch": (["plan", "net.py:Branching"], "cannot be captured", "net.py:"),
    "an autograd.Function": (["plan", "net.py:WithFunction"], "Doubled", "custom_op"),
    "hub options for a file": (["plan", "net.py:example", "--seq", "8"], "--seq", "hf:"),
    "no hub type": (["plan", "hf:lama"], "lama", "llama"),
    "no config key": (["plan", "hf:llama", "--set", "hiden_size=8"], "hiden_size", "hidden_size"),
    "no value": (["plan", "hf:llama", "--set", "hidden_size"], "--set hidden_size", "KEY=VALUE"),
    "a value of another kind": (["plan", "hf:llama", "--set", "hidden_size=wide"], "int", "wide"),
    "a config that cannot be": (["plan", "hf:llama", "--set", "hidden_size=31"], "hf:llama", "31"),
    "no plan file": (["emit", "--plan", "missing.json", "--out", "out"], "missing.json", "cannot read"),
    "a plan file that is none": (["emit", "--plan", "plan.txt", "--out", "out"], "plan", "format"),
    "target and plan": (["emit", "net.py:Net", "--plan", "plan.txt", "--out", "out"], "TARGET or --plan", "not both"),
    "neither target nor plan": (["emit", "--out", "out"], "TARGET or --plan", ""),
    "a saved plan and degrees": (["emit", "--plan", "plan.txt", "--tp", "2", "--out", "out"], "--tp", "saved plan"),
    "a folder with other files": (["emit", "net.py:example", "--out", "full"], "full holds files", "notes.txt"),
    "nowhere to write": (["plan", "net.py:example", "--save", "no/such/plan.json"], "no/such", "cannot write"),
    "nothing to explain": (["explain", "net.py:example", "blocks.0.up.weight"], "tp = 1", "tp of 2"),
    "no such parameter": (["explain", "net.py:example", "blocks.9.up", "--tp", "2"], "blocks.9.up", "blocks.0.up"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_message_and_status_two(folder, capsys, case):
    words, what, use = BAD[case]
    before = sorted(folder.rglob("*"))
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert what in err and use in err, err
    assert "Traceback" not in err and len(err.splitlines()) <= 6 and err.startswith("autopar: ")
    left = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
    assert left == [path for path in before if "__pycache__" not in path.parts], "something half-done is left"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda plan: plan["mesh"].update(tp=3), ""),
        (lambda plan: plan["weights"].update({"blocks.0.up.weight": "64 16/tp"}), "blocks.0.up.weight"),
        (lambda plan: plan["instructions"][0].pop(), ""),
        (lambda plan: plan.pop("stages"), "stages"),
        (lambda plan: plan["stages"].pop(), "stages"),
    ],
)
def test_an_edited_plan_that_is_inconsistent_is_refused(folder, capsys, edit, said):
    assert run(capsys, "plan", "net.py:example", "--tp", "2", "--pp", "2", "--save", "plan.json")[0] == 0
    plan = json.loads((folder / "plan.json").read_text())
    edit(plan)
    (folder / "plan.json").write_text(json.dumps(plan))
    status, out, err = run(capsys, "emit", "--plan", "plan.json", "--out", "out")
    assert (status, out) == (2, "")
    assert said in err and "plan.json" in err and not (folder / "out").exists()


def test_debug_shows_where(folder):
    with pytest.raises(Exception, match="has no exampel"):
        main(["plan", "net.py:exampel", "--debug"])


@pytest.mark.parametrize("command", ["plan", "emit", "verify", "explain", "timeline", "diff"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"autopar {command} " in capsys.readouterr().out.split("examples:")[1]


def test_as_a_process_it_is_quiet_in_a_pipe(folder):
    good = subprocess.run(
        [sys.executable, "-m", "autopar", "plan", "net.py:example", "--tp", "2"], capture_output=True, text=True
    )
    assert (good.returncode, good.stderr) == (0, "") and "STAGES" in good.stdout
    bad = subprocess.run([sys.executable, "-m", "autopar", "plan", "net.py:Branching"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "") and "Traceback" not in bad.stderr and "net.py" in bad.stderr
