"""The README tells the truth: its example runs, and what it says is printed is what is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def without_identity(text: str) -> str:
    """A plan's six digits change with every line of its model's file."""
    return re.sub(r"plan [0-9a-f]{6}", "plan ......", text)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def printed(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def mlp() -> str:
    return printed("examples/mlp.py")


def test_the_example_runs_as_it_stands():
    assert "equal to the untouched model" in printed("-c", blocks("python")[0])


def test_the_printed_plan_is_the_one_that_is_printed(mlp):
    plan = next(block for block in blocks("text") if "STAGES" in block)
    assert without_identity(plan.strip()) in without_identity(mlp)


def test_the_program_is_the_one_that_is_emitted(mlp):
    program = next(block for block in blocks("python") if "class Stage0" in block)
    assert program.strip() in mlp


def test_the_two_commands_use_the_tested_versions():
    commands = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv") and "-c .ci/constraints.txt" in command for command in commands)


def test_it_is_not_unfinished():
    assert "@" not in re.sub(r"```.*?```", "", README, flags=re.DOTALL)
