"""The emitted folder: goldens of all programs, the same bytes twice, training where the model's source is not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import GPT, gpt_batch
from test_plan_text import gpt_plan

import autopar
from autopar.emit_files import emit_files, load_weights, rank_file, read_program, save_weights
from autopar.errors import BadArgument, BadPlan, WeightsMissing
from autopar.run_program import main, rank_tensors
from autopar.state import gather_whole, stage_of_parameter

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def plan():
    return gpt_plan()


def test_programs_are_the_goldens(golden, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = gpt_plan()
    for rank in range(plan.num_ranks):
        golden(f"gpt/rank_{rank}.py.txt", plan.source(rank))


def test_emitting_twice_gives_the_same_bytes(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        gpt_plan().emit(folder)  # traced and planned anew
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == ["plan.json", "rank_0.py", "rank_1.py", "rank_2.py", "rank_3.py", "run.py"]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_tensor_parallel_peers_differ_in_title_and_coords_alone(plan):
    for one, other in ((0, 1), (2, 3)):
        pairs = list(zip(plan.source(one).splitlines(), plan.source(other).splitlines(), strict=True))
        different = [first for first, second in pairs if first != second]
        assert [line.split()[0] for line in different] == ['"""Rank', "COORDS"]


def test_programs_do_not_tell_where_the_checkout_is(tmp_path):
    """The same model in two folders, each the working directory of its run, gives the same bytes."""
    source = (ROOT / "tests/models.py").read_text() + "\n\ndef example():\n    return GPT(), gpt_batch()\n"
    runs = []
    for name in ("one", "a/longer/other"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(source)
        command = [
            sys.executable,
            "-m",
            "autopar",
            "emit",
            "model.py:example",
            "--tp",
            "2",
            "--pp",
            "2",
            "--out",
            "out",
        ]
        runs.append((folder, subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)))
    for _, run in runs:
        _, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
    for name in ("rank_0.py", "rank_3.py", "plan.json", "run.py"):
        texts = [(folder / "out" / name).read_bytes() for folder, _ in runs]
        assert texts[0] == texts[1]
        assert str(tmp_path).encode() not in texts[0]


def test_training_without_the_model(tmp_path):
    """Real torchrun, from a checkpoint, where the model cannot be imported: the losses of the untouched model."""
    torch.manual_seed(0)
    model = GPT(vocab=256, dim=64, layers=4)
    with torch.no_grad():
        model.wte.weight.mul_(0.1)
    plan = gpt_plan()
    plan.emit(tmp_path / "out")
    batches = [gpt_batch(rows=8, vocab=256, seed=k) for k in range(3)]
    torch.save(batches, tmp_path / "batches.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    options = ["--data", "batches.pt", "--checkpoint", "model.pt", "--lr", "1e-3", "--save"]
    losses = trained(tmp_path, 4, ["out/run.py", *options])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    expected = []
    for batch in batches:
        loss, _ = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    after = model(**batches[0])[0].item()
    model.load_state_dict(whole_state(plan, tmp_path / "out") | {"head.weight": model.head.weight})
    assert model(**batches[0])[0].item() == pytest.approx(after, rel=1e-5)
    assert after < expected[0]


def trained(folder: Path, num_ranks: int, command: list[str]) -> list[float]:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('models') is not None)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=folder).returncode == 0, "the model's source is importable"
    result = subprocess.run(
        [*TORCHRUN, str(num_ranks), *command], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", result.stdout, re.MULTILINE)]


def whole_state(plan, folder: Path) -> dict[str, torch.Tensor]:
    """The model's parameters from the shards that the ranks saved, read as run.py reads them."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for rank in range(plan.num_ranks):
        program = read_program(folder, rank)
        parameters, _ = rank_tensors(folder, rank, program, checkpoint=None, random=False, seed=0)
        for name, piece in parameters.items():
            if plan.coords(rank)["pp"] == stage_of_parameter(plan)[name]:
                pieces.setdefault(name, []).append(piece.detach())
    return {name: gather_whole(plan, name, plan.parameter_notation[name], held) for name, held in pieces.items()}


# ---- folders ------------------------------------------------------------------------------------------------------


def test_programs_sort_by_rank():
    assert [rank_file(3, n) for n in (4, 10, 11, 101)] == ["rank_3.py", "rank_3.py", "rank_03.py", "rank_003.py"]


def test_a_folder_with_other_files_is_left_alone(plan, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadArgument, match=r"thesis\.tex"):
        emit_files(plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(BadArgument, match="is a file"):
        emit_files(plan, tmp_path / "thesis.tex")
    with pytest.raises(BadArgument, match="cannot write"):
        emit_files(plan, tmp_path / "thesis.tex" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_emitting_again_replaces_the_programs_and_keeps_the_rest(plan, tmp_path):
    folder = tmp_path / "out"
    emit_files(plan, folder)
    (folder / "losses.txt").write_text("mine")
    small = gpt_plan(pp=1, microbatches=1)
    emit_files(small, folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["losses.txt", "plan.json", "rank_0.py", "rank_1.py", "run.py"]
    assert (folder / "rank_1.py").read_text() == small.source(1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- weights ------------------------------------------------------------------------------------------------------


def random_tensors(plan, folder, rank):
    return rank_tensors(folder, rank, read_program(folder, rank), checkpoint=None, random=True, seed=0)


def test_random_weights_are_the_pieces_of_one_model(plan, tmp_path):
    emit_files(plan, tmp_path / "out")
    ranks = [random_tensors(plan, tmp_path / "out", rank)[0] for rank in range(4)]
    for one, other in ((0, 1), (2, 3)):
        for name, placement in plan.stages[one // 2].parameters.items():
            same = torch.equal(ranks[one][name], ranks[other][name])
            assert same == ("/tp" not in placement or ranks[one][name].ndim == 1), name
    for name in plan.stages[0].tied:
        assert torch.equal(ranks[0][name], ranks[2][name])
    assert torch.equal(ranks[0]["h.0.ln1.weight"], torch.ones(64)) and not ranks[0]["h.0.ln1.bias"].any()
    assert 0.015 < ranks[0]["h.0.up.weight"].std() < 0.025


def test_weights_are_read_back_and_never_into_another_plan(plan, tmp_path):
    emit_files(plan, tmp_path / "out")
    parameters, buffers = random_tensors(plan, tmp_path / "out", 1)
    path = save_weights(tmp_path / "out", 1, parameters, buffers)
    assert path.name == "weights_1.pt"
    read = load_weights(path, read_program(tmp_path / "out", 1))
    assert all(torch.equal(read[name], tensor) for name, tensor in parameters.items())
    with pytest.raises(BadPlan, match="another plan"):
        load_weights(path, read_program(tmp_path / "out", 0))
    with pytest.raises(BadArgument, match="other names"):
        save_weights(tmp_path / "out", 1, {"x": torch.zeros(1)}, {})
    (tmp_path / "out/weights_0.pt").write_bytes(b"nonsense")
    with pytest.raises(BadPlan, match="cannot read the weights"):
        load_weights(tmp_path / "out/weights_0.pt", read_program(tmp_path / "out", 0))


def test_missing_weights_and_checkpoints_of_other_models_are_named(plan, tmp_path):
    folder = tmp_path / "out"
    emit_files(plan, folder)
    program = read_program(folder, 0)
    with pytest.raises(WeightsMissing, match=r"weights_0\.pt"):
        rank_tensors(folder, 0, program, checkpoint=None, random=False, seed=0)
    state = GPT(vocab=256, dim=64, layers=1).state_dict()
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(WeightsMissing, match=r"h\.1"):
        rank_tensors(folder, 0, program, checkpoint=str(tmp_path / "short.pt"), random=False, seed=0)
    torch.save(GPT(vocab=256, dim=32, layers=4).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(autopar.errors.DifferentModel, match=r"wte\.weight"):
        rank_tensors(folder, 0, program, checkpoint=str(tmp_path / "narrow.pt"), random=False, seed=0)


def test_a_tied_weight_is_found_under_its_other_name(plan, tmp_path):
    emit_files(plan, tmp_path / "out")
    state = GPT(vocab=256, dim=64, layers=4).state_dict()
    del state["wte.weight"]
    torch.save(state, tmp_path / "model.pt")
    program = read_program(tmp_path / "out", 0)
    parameters, _ = rank_tensors(
        tmp_path / "out", 0, program, checkpoint=str(tmp_path / "model.pt"), random=False, seed=0
    )
    assert torch.equal(parameters["wte.weight"], state["head.weight"][: parameters["wte.weight"].shape[0]])


def test_running_alone_says_how_to_start(plan, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    emit_files(plan, tmp_path / "out")
    assert main(tmp_path / "out", ["--data", "none.pt", "--random"]) == 2
    assert "torchrun --nproc-per-node 4" in capsys.readouterr().err
