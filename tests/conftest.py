"""What all tests share: goldens, one thread per op, and a garbage collector that leaves what stays alone.

Goldens are whole files that a test compares with; `pytest --update-goldens` rewrites them, and the diff is reviewed.
"""

import difflib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens with what the code gives now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` fails with a diff if `text` is not what the golden of that name holds."""

    def compare(name: str, text: str) -> None:
        path = GOLDENS / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"goldens/{name}", "now", lineterm=""
            )
            pytest.fail("\n".join(list(lines)[:60]) + "\nif this is meant: pytest --update-goldens", pytrace=False)

    return compare


@pytest.fixture(autouse=True, scope="session")
def one_thread_per_op() -> Iterator[None]:
    """The tensors here are small; rank threads that each have a pool of threads take more than twice the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_not_searched_for_garbage() -> Iterator[None]:
    """Libraries and their caches are most of the heap; going through them again and again took a seventh of the time."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    yield
    gc.set_threshold(*before)
