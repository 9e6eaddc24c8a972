"""Processes for tests: a server forks them that has imported what they need, which takes longer than most tests.

`ProcessPool` is a few that train together over gloo, kept alive between tests.
"""

from __future__ import annotations

import os
import random
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PATIENCE = 180  # seconds; starting two processes takes most of a minute on a busy machine


def forking_context() -> ForkServerContext:
    """Where to make a process: it shares nothing with this one, and starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mortal", "runs"])
    here = str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as environment:
        # the server has no other way to find them: `sys.path` is told to the processes alone
        environment.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()
    return context


class ProcessFailure(Exception):
    """An exception in one of the processes; `index` says which, `kind` its class, the message is its own."""

    def __init__(self, index: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"process {index}: {kind}: {message}\n{trace}")
        self.index, self.kind, self.message = index, kind, message


class ProcessPool:
    """`count` processes in one process group; after a failure they are started again.

    Args:
        count: how many.
        timeout: seconds that a collective waits for the other processes.
    """

    def __init__(self, count: int, timeout: float = 50.0) -> None:
        self.count, self.timeout = count, timeout
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` in every process; what each returned, in order. Raises the first failure."""
        outcomes = self.outcomes(function, *args)
        failures = [outcome for outcome in outcomes if isinstance(outcome, ProcessFailure)]
        if failures:
            raise failures[0]
        return outcomes

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `run`, but a failure stands among the results instead of being raised."""
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((function, args))
        outcomes = [self._answer(index) for index in range(self.count)]
        if any(isinstance(outcome, ProcessFailure) for outcome in outcomes):
            self.stop()
        return outcomes

    def _answer(self, index: int) -> Any:
        process, connection = self._workers[index]
        try:
            if connection.poll(PATIENCE):
                failed, value = connection.recv()
                return ProcessFailure(index, *value) if failed else value
            return ProcessFailure(index, "Hang", f"no answer within {PATIENCE} s", "")
        except EOFError:
            process.join(5)
            return ProcessFailure(index, "Exit", f"exit status {process.exitcode}", "")

    def _start(self) -> None:
        context = forking_context()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for index in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(index, self.count, port, self.timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def stop(self) -> None:
        """End all processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(index: int, count: int, port: int, timeout: float, connection: Connection) -> None:
    torch.set_num_threads(1)
    # what torchrun and `accelerate launch` set
    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        HF_HUB_OFFLINE="1",
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        random.seed(index)
        torch.manual_seed(index)
        try:
            connection.send((False, function(*args)))
        except Exception as error:
            connection.send((True, (type(error).__name__, str(error), traceback.format_exc())))
