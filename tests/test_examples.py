"""Every file of examples/ runs, in its short form, and prints what its reader came for."""

import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
TRAIN_SHORT = ("--batch", "8", "--seq", "32", "--megabytes", "1", "--steps", "12", "--report", "2")


def run(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=240
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\d+\.\d+)", output, re.MULTILINE)]


def test_every_example_has_a_test_here():
    text = Path(__file__).read_text()
    assert [name for name in EXAMPLES if f"examples/{name}" not in text] == []


def test_mlp_prints_its_plan_and_a_program_and_trains():
    output = run("examples/mlp.py")
    assert "STAGES" in output and "WEIGHTS" in output
    assert "4096/tp 1024" in output  # block0.up.weight, split by its rows
    assert "class Stage0(StageModule)" in output and "SCHEDULE = [" in output
    line = "h = F.gelu(self.up(x))"
    number = next(i for i, text in enumerate((ROOT / "examples/mlp.py").read_text().splitlines(), 1) if line in text)
    assert re.search(rf"# block0\S* +examples/mlp.py:{number} +{re.escape(line)}", output)
    assert len(losses(output)) == 5 and losses(output) == sorted(losses(output), reverse=True)


def test_custom_loss_learns():
    output = run("examples/custom_loss.py")
    assert "STAGES" in output
    assert losses(output)[-1] < losses(output)[0]
    accuracy = re.search(r"accuracy of the gathered model: (\d+)%", output)
    assert accuracy is not None and int(accuracy[1]) > 80  # a guess is right in 12 of 100


def torchrun(*arguments: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run("-m", "torch.distributed.run", "--nproc-per-node", "4", "--master-port", str(port), *arguments)


@pytest.mark.parametrize(
    "start", ["threads", pytest.param("processes", marks=pytest.mark.slow), pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_train_gpt_equals_the_untouched_model_in_all_three_places(start):
    arguments = ("examples/train_gpt.py", "--tp", "2", "--pp", "2", "--check", *TRAIN_SHORT)
    if start == "torchrun":
        output = torchrun(*arguments)
    else:
        output = run(*arguments, *(["--launch"] if start == "processes" else []))
    assert output.count("STAGES") == 1  # on one rank only
    differences = [float(found) for found in re.findall(r", difference (\S+)", output)]
    assert len(differences) == 12
    assert differences[0] <= 1e-6 and max(differences) <= 2e-4
    assert "check ok" in output
    assert losses(output)[-1] < losses(output)[0] - 0.2
    assert re.search(r"bigram model: \d\.\d+ nats per byte", output)
    assert re.search(r"validation loss \d\.\d+ is (not )?below the bigram's \d\.\d+ after 12 steps", output)
    sampled = output.split("sampled from the gathered model:\n")[1]
    assert sampled.startswith("def ") and len(sampled) >= 150


@pytest.mark.parametrize(
    ("start", "degrees"),
    [("threads", "--tp 1 --pp 2 --dp 2"), pytest.param("processes", "--tp 2 --pp 2 --dp 1", marks=pytest.mark.slow),
     pytest.param("torchrun", "--tp 2 --pp 1 --dp 2", marks=pytest.mark.slow)],
)  # fmt: skip
def test_finetune_hf_learns_in_all_three_places(start, degrees):
    arguments = ("examples/finetune_hf.py", *degrees.split(), "--rows", "8", "--seq", "32", "--steps", "12", "--evaluate", "6")
    output = torchrun(*arguments) if start == "torchrun" else run(*arguments, *(["--launch"] if start == "processes" else []))
    pattern = r"^step (\d+): loss (\S+), grad norm \S+, .* tokens/s, .*; held-out loss (\S+)$"
    lines = re.findall(pattern, output, re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == [6, 12]
    assert all(float(lines[1][place]) < float(lines[0][place]) < math.log(256) for place in (1, 2))


def test_finetune_hf_stays_short_and_its_help_shows_how_to_run_it():
    assert len((ROOT / "examples/finetune_hf.py").read_text().splitlines()) < 80
    shown = run("examples/finetune_hf.py", "--help")
    for command in ("  python examples/finetune_hf.py --tp 2 --pp 2 --dp 2 ", "--launch --model gpt2", "  torchrun --nproc-per-node 8 "):
        assert command in shown, "as lines of their own"


def test_finetune_hf_goes_on_from_a_checkpoint_folder(tmp_path):
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    short = ("--rows", "8", "--seq", "32", "--steps", "2", "--evaluate", "2")
    output = run("examples/finetune_hf.py", "--model", str(tmp_path), "--pp", "2", *short)
    assert "held-out loss" in output


def test_train_gpt_help_names_its_options():
    output = run("examples/train_gpt.py", "--help")
    for option in (
        "--tp",
        "--pp",
        "--microbatches",
        "--schedule",
        "--steps",
        "--minutes",
        "--size",
        "--check",
        "--seed",
    ):
        assert option in output
    assert "torchrun" in output


def test_train_gpt_refuses_more_microbatches_than_rows():
    result = subprocess.run(
        [sys.executable, "examples/train_gpt.py", *TRAIN_SHORT, "--microbatches", "9"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 2
    assert "microbatches" in result.stderr and "Traceback" not in result.stderr
