"""Local processes: results, failures of every kind, and ranks that die in the middle of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_runtime import accumulated, batch_of, chain, chain_loss, chain_parameters

from autopar.launch import launch
from autopar.program import load_program
from autopar.runtime.worker import Worker
from autopar.runtime.world import World
from costmodel.errors import BadArgument, RankFailed, WorldSizeMismatch


def describe(word: str) -> tuple[Any, ...]:
    variables = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return word, int(os.environ["RANK"]), [os.environ[name] for name in variables], torch.get_num_threads()


def summed() -> torch.Tensor:
    dist.init_process_group("gloo")
    tensor = torch.full((3,), float(dist.get_rank()))
    dist.all_reduce(tensor)
    return tensor


def raise_on(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        raise ValueError("wrong on purpose")
    return 0


def die_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_forever() -> None:
    time.sleep(1000)


def raise_while_another_waits() -> None:
    raise_on(1)
    wait_forever()


class OddError(Exception):
    """Pickles, but cannot be loaded again: its arguments are not those of __init__."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def raise_odd() -> None:
    raise OddError(1, 2)


def steps(num_steps: int, die: tuple[int, str] | None = None, catch: bool = False) -> Any:
    """Some steps of the hand-made chain, one stage a process. `die` is a rank and a line it runs in microbatch 2."""
    rank, num_stages = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    program, parameters = chain(num_stages, "1f1b", 4)[rank], chain_parameters(num_stages)[rank]
    if die is not None and rank == die[0]:
        line = f"        p = self.p\n        if x.shape[0] == 2:\n            {die[1]}\n"
        program = load_program(program.source.replace("        p = self.p\n", line), "<dying>")
    world = World.from_environment(program.mesh, timeout_seconds=300)
    worker = Worker(program, world, parameters, {}, microbatches=4)
    losses = []
    for seed in range(num_steps):
        started = time.monotonic()
        try:
            losses.append(worker.step(batch_of(seed=seed)))
        except RankFailed as error:
            if not catch:
                raise
            return str(error), time.monotonic() - started
    world.close()
    return losses, {name: tensor.grad for name, tensor in parameters.items()}


def wrong_size() -> None:
    World.from_environment({"pp": 2, "tp": 2})


def two_worlds() -> float:
    """Two worlds of one job, of different meshes, used in turns."""
    rank = int(os.environ["RANK"])
    first, second = World.from_environment({"pp": 2, "tp": 1}), World.from_environment({"pp": 1, "tp": 2})
    one = first.axis("pp").all_reduce(torch.tensor([1.0 + rank]))
    two = second.axis("tp").all_reduce(one.clone())
    return float(first.axis("pp").all_reduce(two))


def test_results_come_back_by_rank_and_the_environment_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert launch(describe, 2, "hello") == [("hello", rank, [str(rank), "2", "2"], threads) for rank in range(2)]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch(describe, 1, "hello")[0][-1] == 3


def test_tensors_come_back_and_the_user_may_use_torch_distributed() -> None:
    torch.ones(2, requires_grad=True).sum().backward()  # a process that has run a backward cannot be forked itself
    assert all(torch.equal(result, torch.full((3,), 3.0)) for result in launch(summed, 3))


def test_sixteen_ranks_start_quickly() -> None:
    """All are forked from one process that has imported torch, which takes a process a second or more of its own."""
    assert len(set(launch(os.getppid, 16))) == 1
    assert max(launch(time.process_time, 16)) < 0.5


def test_a_rank_that_raises_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match="rank 1 failed: ValueError: wrong on purpose") as caught:
        launch(raise_on, 3, 1)
    assert 'raise ValueError("wrong on purpose")' in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_rank_that_takes_no_notice_is_stopped() -> None:
    with pytest.raises(RankFailed, match="rank 1 failed: ValueError: wrong on purpose"):
        launch(raise_while_another_waits, 2)


def test_an_error_that_does_not_pickle() -> None:
    with pytest.raises(RankFailed, match="OddError: 1 and 2"):
        launch(raise_odd, 1)


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(RankFailed, match="rank 1 was killed by SIGKILL"):
        launch(die_on, 2, 1)


def test_the_time_is_bounded() -> None:
    with pytest.raises(RankFailed, match=r"ranks 0, 1 had not ended after 1 seconds"):
        launch(wait_forever, 2, timeout_seconds=1.0)


def test_a_function_that_cannot_be_sent_is_refused_with_a_reason() -> None:
    if len(os.listdir("/proc/self/task")) > 1:
        with pytest.raises(BadArgument, match="cannot be sent to other processes"):
            launch(lambda: 1, 2)
    with pytest.raises(BadArgument, match="at least 1"):
        launch(describe, 0)


def test_closures_are_forked_where_that_is_safe() -> None:
    script = "from autopar.launch import launch\nword = 'closure'\nprint(launch(lambda: word, 2))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert ended.stdout == "['closure', 'closure']\n", ended.stderr
    # OpenMP's threads are running: a fork would hang
    script = script.replace("word =", "import torch; torch.set_num_threads(2); torch.ones(999999).add(1); word =")
    ended = subprocess.run([*command[:-1], script], capture_output=True, text=True, timeout=240)
    assert "cannot be sent to other processes" in ended.stderr


def test_processes_train_as_one_process_does() -> None:
    results = launch(steps, 2, 2)
    parameters = chain_parameters(2)
    whole = {name: tensor for part in parameters for name, tensor in part.items()}
    wanted = [accumulated(chain_loss, whole, batch_of(seed=seed), 4) for seed in range(2)]
    for losses, gradients in results:
        assert all(torch.equal(loss, expected) for loss, expected in zip(losses, wanted, strict=True))
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name].grad, rtol=1e-6, atol=1e-7)


def test_several_worlds_in_one_job() -> None:
    assert launch(two_worlds, 2) == [12.0, 12.0]


def test_the_world_size_must_fit() -> None:
    with pytest.raises(RankFailed, match="2 ranks were launched, but pp=2 x tp=2 needs 4") as caught:
        launch(wrong_size, 2)
    assert isinstance(caught.value.__cause__, WorldSizeMismatch)


def test_a_rank_killed_in_a_step_is_named_with_its_instruction_by_the_launcher() -> None:
    with pytest.raises(RankFailed) as caught:
        launch(steps, 3, 2, (1, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert "rank 1 was killed by SIGKILL" in str(caught.value)
    assert "rank 1 (pp 1, tp 0) died in Forward(2)" in str(caught.value)


def survive(path: str, line: str) -> None:
    """The steps of a job in which rank 1 runs `line`; every other rank writes down what it was told, and when.

    No process ends before all are told, so that it is not the end of one that tells another.
    """
    failure = None
    try:
        told, seconds = steps(1, (1, line), catch=True)
        with open(os.path.join(path, os.environ["RANK"]), "w") as file:
            file.write(f"{seconds:.0f} {told}")
    except ValueError as error:
        failure = error
    deadline = time.monotonic() + 240
    while len(os.listdir(path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    if failure is not None:
        raise failure


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "rank 1 (pp 1, tp 0) died in Forward(2)"),
        ("raise ValueError('no')", "rank 1 (pp 1, tp 0) failed in Forward(2): ValueError: no"),
    ],
)
def test_every_other_rank_is_told_who_failed_and_where(tmp_path: Any, line: str, says: str) -> None:
    """Also rank 3, which has no transfer with rank 1, and before the timeout of 300 seconds."""
    with pytest.raises(RankFailed):
        launch(survive, 4, str(tmp_path), line)
    for rank in (0, 2, 3):
        seconds, told = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert told.startswith(says), told
        assert f"in rank {rank} (pp {rank}, tp 0), in " in told and "waiting for rank" in told
        assert int(seconds) < 200


def test_the_same_under_torchrun(tmp_path: Any) -> None:
    tests = os.path.dirname(os.path.abspath(__file__))
    (tmp_path / "job.py").write_text(
        f"import os, sys\nsys.path.insert(0, {tests!r})\nimport torch\nfrom test_launch import steps\n\n"
        "losses, _ = steps(2)\n"
        f"torch.save(losses, os.path.join({str(tmp_path)!r}, os.environ['RANK'] + '.pt'))\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(tmp_path / "job.py")], check=True, timeout=240)
    parameters = chain_parameters(2)
    whole = {name: tensor for part in parameters for name, tensor in part.items()}
    wanted = [accumulated(chain_loss, whole, batch_of(seed=seed), 4) for seed in range(2)]
    for rank in range(2):
        assert all(torch.equal(*pair) for pair in zip(torch.load(tmp_path / f"{rank}.pt"), wanted, strict=True))


def test_ctrl_c_stops_all_ranks(tmp_path: Any) -> None:
    (tmp_path / "job.py").write_text(
        "import os, time\nfrom autopar.launch import launch\n\n"
        "def work(path):\n    open(os.path.join(path, str(os.getpid())), 'w').close()\n    time.sleep(1000)\n\n"
        f"if __name__ == '__main__':\n    launch(work, 2, {str(tmp_path / 'pids')!r})\n"
    )
    (tmp_path / "pids").mkdir()
    job = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(tmp_path / "job.py")], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs begin with it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while len(os.listdir(tmp_path / "pids")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=240)
    assert "KeyboardInterrupt" in errors
    for pid in os.listdir(tmp_path / "pids"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
