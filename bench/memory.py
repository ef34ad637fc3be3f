"""Peak memory of a step: the growth of the resident set in a process that has done nothing else.

torch is imported once, by a server that runs none of it; each measurement is a new process forked
from there. It takes some steps of a tiny case with every provider, so that what libraries set up
once is there; makes the module and the batches, gives free memory back to the system, resets the
kernel's high-water mark and takes :data:`STEPS` steps on different batches. The result is the
high-water mark minus the resident set before, minus the pages of files (code) that became resident
meanwhile: what activations, gradients, workspaces and caches came to, torch's and oneDNN's alike.

Small results scatter, by what a server's heap happens to look like (nn.LSTM on packed sequences of
B128 T29 H64: 13 to 19 MiB): below :data:`SMALL` the median of several servers is taken. Where the
high-water mark cannot be reset (not Linux), the growth of ``ru_maxrss`` is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import signal
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from bench.providers import Provider
from bench.sections import RAGGED
from bench.workloads import Batch, Batches, Case, Shape

STEPS = 3
SMALL = 32 * 2**20  # bytes

_TINY = Shape(3, 5, 4, 8)


class Servers:
    """Processes in which torch is imported; they are started when needed. A context manager.

    Args:
        most: whose median a small result is.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def peak_bytes(self, name: str, case: Case, threads: int) -> int:
        """Additional resident memory of a provider's steps at the peak.

        Args:
            name: of the provider.
            case: what it runs.
            threads: torch's.

        Raises:
            RuntimeError: the process failed, with what it said.
        """
        peaks = [self._ask(0, name, case, threads)]
        if peaks[0] < SMALL:
            peaks += [self._ask(index, name, case, threads) for index in range(1, self._most)]
        return sorted(peaks)[len(peaks) // 2]

    def _ask(self, index: int, name: str, case: Case, threads: int) -> int:
        if index == len(self._processes):
            self._start()
        connection = self._connections[index]
        try:
            connection.send((name, case, threads))
            result = connection.recv()
        except (EOFError, OSError):
            result = "the server ended without a result"
        if isinstance(result, str):
            raise RuntimeError(f"measuring the memory of {name} on {case.id} failed: {result}")
        return int(result)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))
        # Ctrl-C is for this process alone; the server and its children inherit that they ignore it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()
        self._connections.append(ours)
        self._processes.append(process)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.close()
            process.terminate()
            process.join()


def _serve(connection: Connection) -> None:
    """Answer each request by what a child measures, until there are none."""
    context = multiprocessing.get_context("fork")
    while True:
        try:
            name, case, threads = connection.recv()
        except EOFError:
            return
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_measure, args=(name, case, threads, send))
        child.start()
        send.close()
        try:
            connection.send(receive.recv())
        except EOFError:
            connection.send("the process ended without a result")
        child.join()


def method() -> str:
    """How, in words for the results."""
    how = "VmHWM, reset" if _reset_peak() else "ru_maxrss, growth over the earlier peak"
    return f"growth of the peak resident set over {STEPS} steps in a new process ({how})"


def _measure(name: str, case: Case, threads: int, send: Connection) -> None:
    try:
        torch.set_num_threads(threads)
        tiny = replace(case, shape=_TINY)
        for other in dict.fromkeys((*RAGGED, name)):
            _steps(Provider(other, tiny), _batches(tiny))
        provider, batches = Provider(name, case), _batches(case)
        gc.collect()
        _give_back()
        before = _resident() if _reset_peak() else _peak()
        code = _file_pages()
        _steps(provider, batches)
        send.send(_peak() - before - (_file_pages() - code))
    except Exception as error:
        send.send(f"{type(error).__name__}: {error}")


def _batches(case: Case) -> list[Batch]:
    batches = Batches(case)
    return [batches[index] for index in range(STEPS)]


def _steps(provider: Provider, batches: list[Batch]) -> None:
    for batch in batches:
        provider.run(batch)
        provider.clear(batch)


def _give_back() -> None:
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            found = [line for line in file if line.startswith(f"{field}:")]
    except OSError:
        found = []
    return int(found[0].split()[1]) * 1024 if found else None


def _resident() -> int:
    return _status("VmRSS") or 0


def _file_pages() -> int:
    return _status("RssFile") or 0


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
