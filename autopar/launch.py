"""Run a function on several local processes, one per rank, without torchrun.

Design note. Starting a Python that imports torch takes seconds and hundreds of megabytes, so the ranks are forked
from one server process that has imported it (multiprocessing's forkserver). Forking the caller itself would be as
quick, but a process whose OpenMP pool or autograd engine has been used cannot be forked: the child hangs or raises.
It is done only for a function that cannot be pickled (a closure, a lambda), and only while the caller has a single
thread and has not run a backward.

The launcher keeps the store where the ranks meet, as torchrun's agent does: no port is guessed, and the store
outlives any rank. Results and errors come back over a pipe per rank. When a rank fails the others get a moment to
notice and to say what they saw, then they are stopped.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from costmodel.errors import BadArgument, RankFailed

_NOTICE_SECONDS = 5.0  # for the other ranks to say what they saw when one has failed
_TERMINATE_SECONDS = 2.0
_PRELOAD = ["torch", "torch.distributed", "autopar.launch", "autopar.runtime.threads"]


@dataclass
class _Rank:
    """One process as the launcher sees it."""

    rank: int
    process: Any
    pipe: Connection
    done: bool = False
    result: Any = None
    error: BaseException | None = None
    text: str = ""
    order: float = math.inf  # when it ended

    @property
    def consequence(self) -> bool:
        """True if it failed only because another did."""
        return isinstance(self.error, RankFailed)


def launch(fn: Callable[..., Any], num_ranks: int, *args: Any, timeout_seconds: float | None = None) -> list[Any]:
    """Run `fn(*args)` on `num_ranks` local processes and return what each rank's call returned, by rank.

    Each process has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under torchrun;
    torch gets its share of the cores unless OMP_NUM_THREADS says otherwise. RankFailed with the rank's traceback if
    one raises or dies (the others are stopped), or if the whole takes longer than `timeout_seconds`.
    """
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, int) or num_ranks < 1:
        raise BadArgument(f"The number of ranks is an integer of at least 1; got {num_ranks!r}.")
    context, payload = _way_to_start(fn, args)
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=300), wait_for_workers=False)
    environment = dict(os.environ)
    environment.update(
        WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks), GROUP_RANK="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    ranks: list[_Rank] = []
    try:
        for rank in range(num_ranks):
            receiving, sending = context.Pipe(duplex=False)
            variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=_rank_main, args=(payload, variables, sending), name=f"autopar rank {rank}"
            )
            process.start()
            sending.close()
            ranks.append(_Rank(rank, process, receiving))
        _wait(ranks, timeout_seconds)
    finally:
        _stop(ranks)
    failed = sorted((rank for rank in ranks if not rank.done), key=lambda rank: (rank.consequence, rank.order))
    if failed:
        raise _failure(failed, timeout_seconds)
    return [rank.result for rank in ranks]


def _way_to_start(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The multiprocessing context, and what the processes are given: pickled bytes, or the function itself for a plain
    fork.
    """
    main = sys.modules.get("__main__")
    interactive = getattr(fn, "__module__", None) == "__main__" and getattr(main, "__file__", None) is None
    problem = "it is defined in an interactive session" if interactive else ""
    if not interactive:
        try:
            payload = pickle.dumps((fn, args))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            problem = str(error)
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOAD)
            return context, payload
    if _num_threads() == 1:
        return multiprocessing.get_context("fork"), (fn, args)
    raise BadArgument(
        f"{getattr(fn, '__qualname__', fn)} cannot be sent to other processes.",
        why=f"{problem}; and this process has several threads, so that it cannot be forked",
        use="a function at the top level of a module; or autopar.parallelize here: ranks are then threads",
    )


def _num_threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count() + 1  # unknown: native threads cannot be counted here


# ---- in a rank's process ------------------------------------------------------------------------------------------


def _rank_main(payload: Any, variables: Mapping[str, str], pipe: Connection) -> None:
    os.environ.clear()
    os.environ.update(variables)
    threading.Thread(target=_end_with_parent, name="autopar launcher watch", daemon=True).start()
    num_ranks = int(variables["WORLD_SIZE"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS") or max(1, cores // num_ranks)))
    status = 0
    try:
        try:
            if isinstance(payload, bytes):
                fn, args = pickle.loads(payload)
            else:
                fn, args = payload
                _check_fork()
            message = pickle.dumps(("done", fn(*args), ""))
        except KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                message = pickle.dumps(("done", None, ""))
            else:
                message, status = _packed_error(error), 1
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(message)
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 0 and dist.is_initialized():
            dist.destroy_process_group()
    finally:
        if status:
            os._exit(status)  # the interpreter's own end may wait for threads that wait for lost peers


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _check_fork() -> None:
    try:
        torch.zeros(1, requires_grad=True).sum().backward()
    except RuntimeError as error:
        raise BadArgument(
            "The function cannot be pickled, and this process cannot be forked.",
            why="it has run a backward before",
            use="a function at the top level of a module",
        ) from error


def _packed_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        packed = pickle.dumps(("failed", error, text))
        pickle.loads(packed)  # exceptions with arguments of their own pickle, and then do not load
    except Exception:
        packed = pickle.dumps(("failed", None, text))
    return packed


# ---- in the launcher ----------------------------------------------------------------------------------------------


def _wait(ranks: list[_Rank], timeout_seconds: float | None) -> None:
    """Until every rank has ended, or a moment after the first has failed, or the time is over."""
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    running = list(ranks)
    while running:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        ready = wait([rank.pipe for rank in running], left)
        for rank in [rank for rank in running if rank.pipe in ready]:
            running.remove(rank)
            _read(rank)
            if not rank.done:
                notice = time.monotonic() + _NOTICE_SECONDS
                deadline = notice if deadline is None else min(deadline, notice)


def _read(rank: _Rank) -> None:
    rank.order = time.monotonic()
    try:
        kind, value, text = pickle.loads(rank.pipe.recv_bytes())
    except (EOFError, OSError):
        rank.process.join(_TERMINATE_SECONDS)
        code = rank.process.exitcode
        rank.text = (
            f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit status {code}"
        )
        return
    except Exception as error:
        rank.error, rank.text = error, f"returned what cannot be read here: {error}"
        return
    rank.done = kind == "done"
    rank.result, rank.error, rank.text = (value, None, "") if rank.done else (None, value, text)


def _stop(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.process.is_alive() and not rank.done:
            rank.process.terminate()
    deadline = time.monotonic() + _TERMINATE_SECONDS
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.pipe.close()
        rank.process.close()


def _failure(failed: list[_Rank], timeout_seconds: float | None) -> RankFailed:
    first = failed[0]
    if first.order == math.inf:
        names = ", ".join(str(rank.rank) for rank in failed)
        return RankFailed(
            f"rank{'s' if len(failed) > 1 else ''} {names} had not ended after {timeout_seconds:g} seconds"
        )
    # what the other ranks saw names the instruction that a dead rank was in
    seen = next((rank.error.what for rank in failed if isinstance(rank.error, RankFailed)), "")
    if "\n" in first.text:
        reason = f"rank {first.rank} failed: {first.text.strip().splitlines()[-1]}"
        failure = RankFailed(f"{reason}\n\n{first.text}")
    else:
        failure = RankFailed(f"rank {first.rank} {first.text}", why=f"the others saw: {seen}" if seen else None)
    failure.__cause__ = first.error
    return failure
