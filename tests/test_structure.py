"""The shape of the house: imports point one way, no model is known by name, every number in a table has a source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autopar.schedules import SCHEDULES
from costmodel.hardware import HARDWARE
from passes.reshard import RESHARDS
from passes.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("costmodel", "passes", "autopar")
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "autopar", "passes", "costmodel", "tests", "examples"}
MADE_BY_TOOLS = re.compile(r"__pycache__|.*\.egg-info|build|dist")

# what each package may not import; the others of this repository are forbidden to all three
FORBIDDEN = {
    "costmodel": ("torch", "passes", "autopar"),
    "passes": ("torch.distributed", "autopar"),
    "autopar": (),
}
EVERYWHERE = ("examples", "tests", "pytest")

ARCHITECTURES = (
    "llama", "gpt2", "gpt_neox", "bert", "qwen", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "whisper", "deepseek",
    "c_attn", "q_proj", "lm_head", "t5", "vit", "phi3",
)  # fmt: skip
NAMED = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(ARCHITECTURES)})(?![A-Za-z0-9_])", re.IGNORECASE)


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside of functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"  # torch.distributed, reached through torch


def at_import(source: str) -> set[str]:
    """What is imported when the module is: not inside of functions."""
    found: set[str] = set()
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {name.partition(".")[0] for _, name in imported(ast.unparse(node))}
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack += ast.iter_child_nodes(node)
    return found


def wrong_imports(package: str, source: str) -> list[tuple[int, str]]:
    forbidden = (*FORBIDDEN[package], *EVERYWHERE)
    return sorted(
        {
            (line, name)
            for line, name in imported(source)
            if any(f"{name}.".startswith(f"{each}.") for each in forbidden)
        }
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = files_of(package)
    assert len(files) > 3
    assert {str(file): wrong for file in files if (wrong := wrong_imports(package, file.read_text()))} == {}


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("costmodel", "import torch"), ("costmodel", "from torch import nn"),
        ("costmodel", "from passes.ir import Size"),
        ("passes", "import autopar.plan"), ("passes", "import torch.distributed as dist"),
        ("passes", "def f():\n    from torch import distributed"),
        ("passes", "import torch\ntorch.distributed.barrier()"),
        ("autopar", "from tests.models import GPT"), ("autopar", "def f():\n    import pytest"),
    ],
)  # fmt: skip
def test_the_check_of_imports_catches(package: str, line: str) -> None:
    assert wrong_imports(package, line)
    assert not wrong_imports(
        "autopar", "import torch.distributed\nfrom passes import rules\nfrom costmodel import errors"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_installed_with_the_package(package: str) -> None:
    """transformers is an extra: only the code that builds a model with it imports it, when it does."""
    allowed = {"torch", "networkx", "sympy", "tabulate", *PACKAGES, *sys.stdlib_module_names}
    assert {str(file): more for file in files_of(package) if (more := at_import(file.read_text()) - allowed)} == {}
    assert at_import("import numpy.linalg\nif x:\n    import a.b\ndef f():\n    import c") == {"numpy", "a"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_model_is_known_by_name(package: str) -> None:
    named = {
        f"{file.relative_to(ROOT)}:{number}": line.strip()
        for file in files_of(package)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if NAMED.search(line)
    }
    assert named == {}
    assert (
        NAMED.search("if isinstance(x, Llama):") and NAMED.search('"lm_head"') and not NAMED.search("vitality fitted")
    )


def test_the_top_level_holds_what_it_should_and_nothing_else() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in found if not MADE_BY_TOOLS.fullmatch(name)} == TOP_LEVEL


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    silent = [
        str(file)
        for file in files_of(package)
        if file.read_text().strip() and not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert silent == []


def test_the_tables_have_rows() -> None:
    assert {"naive", "gpipe", "1f1b"} <= set(SCHEDULES)
    assert all(row.name == name for name, row in SCHEDULES.items())
    assert {"a100-40gb", "a100-80gb", "h100-sxm", "h200", "cpu"} <= set(HARDWARE)
    assert len(RULES) > 50 and len(RESHARDS) > 5
    assert all(row.op is op for op, row in RULES.items())


@pytest.mark.parametrize("name", HARDWARE)
def test_every_number_of_a_hardware_profile_has_a_source(name: str) -> None:
    profile = HARDWARE[name]
    numbers = {
        "peak_flops", "memory_bytes", "memory_bandwidth_bytes_per_second", "launch_seconds", "matmul_efficiency",
        "memory_efficiency", "inside", "across", "devices_per_node",
    }  # fmt: skip
    assert {field for field in numbers if not profile.sources.get(field, "").strip()} == set()
