"""Worker processes: started, watched, talked to, and ended with the daemon.

What is true of a worker, whatever the process does:

- Every call ends: with the worker's own end or error, or with `Failed` when the process dies, hangs,
  breaks the protocol or when its caller does not keep up. None waits for a process that is gone.
- A caller that does not read costs only its own call: stdout is always read, into bounded buffers.
- Leaving the context leaves no process behind: stdin is closed, then TERM, then KILL to its whole
  process group, then it is reaped.

The protocol is described in `meshd_plugins.workerkit`; why processes are started from this thread and
not through `trio.lowlevel.open_process` in decision 0010.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from meshd.shell.sandbox import Isolation, ProcessView, observe_isolation, worker_environment
from meshd.shell.worker_calls import PendingCall
from meshd.shell.worker_ends import describe_exit, error_from, oom_kills, open_pid, wide_pipe
from meshd_plugins.api import (
    BadRequest,
    Failed,
    Logger,
    Refused,
    Value,
    Worker,
    WorkerCall,
    WorkerSpec,
)
from meshd_plugins.workerkit import FrameDecoder, FrameError, pack_frame

READ_BYTES: Final = 256 * 1024
STDERR_LINE_BYTES_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """Deadlines and bounds for every worker."""

    hang_s: float = (
        30.0  # silence with calls open; raising it: slow devices with long steps, later notice
    )
    hang_steps: float = 25.0
    """A worker that says how long its longest step takes (`step_s` of its hello) may be silent for so many
    of these. Raising it: machines whose speed varies much, later notice."""
    hang_min_s: float = 10.0  # silence that is always allowed: a machine that does something else
    hang_max_s: float = 120.0  # silence that never is, whatever the worker says
    poll_s: float = 1.0  # how often silence and memory are looked at
    close_s: float = 1.0  # from closing stdin to TERM
    terminate_s: float = 2.0  # from TERM to KILL
    end_s: float = (
        10.0  # all of ending it; must exceed the two above. Beyond it the process is abandoned
    )
    calls_max: int = 256  # open at once; beyond it a call is refused
    outbox_frames_max: int = 512  # waiting to be read by the worker; beyond it a call is refused
    call_messages_max: int = 4096  # unread answers of one call; beyond it that call is cancelled
    call_bytes_max: int = 64 * 1024 * 1024  # the same, as bytes of their frames
    stderr_lines_max: int = 20  # kept for the message when it dies


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as `meshd status` shows it."""

    name: str
    pid: int
    ready: bool
    open_calls: int
    resident_bytes: int
    isolation: Isolation


class ProcessSupervisor:
    """Implements `meshd_plugins.api.Supervisor`."""

    def __init__(
        self,
        log: Logger,
        config: SupervisorConfig | None = None,
        *,
        hidden: Sequence[Path] = (),
    ) -> None:
        """Supervise nothing yet; `hidden` are the folders with keys, which no worker reads."""
        self._log = log
        self._hidden = tuple(hidden)
        self._config = config or SupervisorConfig()
        self._workers: dict[int, _ProcessWorker] = {}

    @asynccontextmanager
    async def worker(self, spec: WorkerSpec) -> AsyncGenerator[Worker, None]:
        """Start a process and wait for its hello; see `meshd_plugins.api.Supervisor.worker`."""
        environment = worker_environment(spec, self._hidden)
        worker = _ProcessWorker(spec, environment, self._config, self._log)
        self._workers[worker.pid] = worker
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.read_stdout)
                nursery.start_soon(worker.read_stderr)
                nursery.start_soon(worker.write_stdin)
                nursery.start_soon(worker.watch)
                nursery.start_soon(worker.reap)
                try:
                    await worker.wait_ready()
                    yield worker
                finally:
                    with trio.move_on_after(self._config.end_s, shield=True):
                        await worker.stop()
                    worker.abandon()
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The tasks above raise nothing: what one error there is came from the caller's block.
            error = group.exceptions[0] if len(group.exceptions) == 1 else group
            raise error from error.__cause__
        finally:
            del self._workers[worker.pid]
            with trio.move_on_after(self._config.close_s, shield=True):
                await worker.close()

    def statistics(self) -> tuple[WorkerStatus, ...]:
        """The running workers, oldest first."""
        return tuple(worker.status() for worker in self._workers.values())


class _ProcessWorker:
    """One process and the conversation with it; its methods are the tasks of one nursery."""

    def __init__(
        self,
        spec: WorkerSpec,
        environment: Mapping[str, str],
        config: SupervisorConfig,
        log: Logger,
    ) -> None:
        self._spec = spec
        self._config = config
        self._log = log
        self._hello: Mapping[str, Value] | None = None
        self._hello_or_death = trio.Event()
        self._died = trio.Event()
        self._output_drained = trio.Event()
        self._errors_drained = trio.Event()
        self._reaping = trio.CancelScope(shield=True)
        self._reason = ""  # why it is dead, or is to die
        self._code = "worker_died"
        self._isolation = Isolation()
        self._calls: dict[int, PendingCall] = {}
        self._last_id = 0
        self._outbox: deque[bytes] = deque()
        self._outbox_changed = trio.Event()
        self._closing = False
        self._silent_s = 0.0
        self._stderr: deque[str] = deque(maxlen=config.stderr_lines_max)
        self._oom_kills = oom_kills()
        self._start(environment)

    # -- the process -------------------------------------------------------------------------------

    def _start(self, environment: Mapping[str, str]) -> None:
        """Start it from this thread: PR_SET_PDEATHSIG means the thread, not the process."""
        child_in, our_in = wide_pipe()
        our_out, child_out = wide_pipe()
        our_err, child_err = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603  argv comes from a plugin, never from a request
                self._spec.argv,
                stdin=child_in,
                stdout=child_out,
                stderr=child_err,
                env=environment,
                cwd="/",
                close_fds=True,
                pass_fds=(*self._spec.files, *self._spec.sockets),
                start_new_session=True,
            )
            self._view = ProcessView(self._process.pid)
            self._pid_fd = open_pid(self._process)
        except OSError as error:
            for fd in (our_in, our_out, our_err):
                os.close(fd)
            raise Failed(
                f"worker {self._spec.name} does not start: {error}", code="worker_died"
            ) from None
        finally:
            for fd in (child_in, child_out, child_err):
                os.close(fd)
        self._stdin = trio.lowlevel.FdStream(our_in)
        self._stdout = trio.lowlevel.FdStream(our_out)
        self._errors = trio.lowlevel.FdStream(our_err)

    @property
    def pid(self) -> int:
        """Of the process; it leads a process group of the same number."""
        return self._process.pid

    async def reap(self) -> None:
        """Wait for its end, take what is left of its group along, and tell everybody."""
        with self._reaping:
            await trio.lowlevel.wait_readable(self._pid_fd)
            self._signal_group(signal.SIGKILL)  # not reaped yet: the number is still its own
            status = self._process.wait()
            with trio.move_on_after(self._config.close_s):  # its last words are in the pipes
                await self._output_drained.wait()
                await self._errors_drained.wait()
            self._bury(describe_exit(status, oom_kills() - self._oom_kills))

    def abandon(self) -> None:
        """Stop waiting for a process that even KILL did not end: it hangs within the kernel."""
        if not self._died.is_set():
            self._log.error("worker.not_ended", worker=self._spec.name, pid=self.pid)
            self._reaping.cancel()
            self._bury("the system cannot end it")

    def _bury(self, how: str) -> None:
        self._closing = True
        self._reason = self._reason or how
        self._died.set()
        self._hello_or_death.set()
        error = self._failure()
        for call in tuple(self._calls.values()):
            call.end(Failed(error.message, code=error.code))
        self._log.debug("worker.ended", worker=self._spec.name, pid=self.pid, reason=self._reason)

    async def stop(self) -> None:
        """End the process: politely, then not. The caller shields it."""
        self._closing = True
        if not self._died.is_set() and not self._reason:
            self._reason = "ended by the daemon"
        await self._stdin.aclose()
        with trio.move_on_after(self._config.close_s):
            await self._died.wait()
        if not self._died.is_set():
            self._signal_group(signal.SIGTERM)
            with trio.move_on_after(self._config.terminate_s):
                await self._died.wait()
        if not self._died.is_set():
            self._signal_group(signal.SIGKILL)
        await self._died.wait()

    async def close(self) -> None:
        """Give the descriptors back."""
        await self._stdout.aclose()
        await self._errors.aclose()
        os.close(self._pid_fd)
        self._view.close()

    def _kill(self, reason: str, code: str = "worker_died") -> None:
        """End it for a reason of ours; the first reason stays."""
        if not self._reason:
            self._reason, self._code = reason, code
            self._log.warning("worker.killed", worker=self._spec.name, pid=self.pid, reason=reason)
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _failure(self) -> Failed:
        tail = "; ".join(self._stderr)
        said = f"; last on stderr: {tail}" if tail else ""
        return Failed(f"worker {self._spec.name} died: {self._reason}{said}", code=self._code)

    # -- the tasks -----------------------------------------------------------------------------------

    async def read_stdout(self) -> None:
        """Decode frames and hand them on; anything else on stdout costs the process its life."""
        decoder = FrameDecoder()
        try:
            while data := await self._stdout.receive_some(READ_BYTES):
                for message in decoder.feed(data):
                    self._silent_s = 0.0
                    self._handle(message, decoder.frame_bytes)
            if not self._closing and decoder.pending_bytes:
                self._kill("its stdout ended within a frame")
        except FrameError as error:
            self._kill(f"it broke the protocol on stdout: {error}")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._output_drained.set()

    async def read_stderr(self) -> None:
        """Keep the last lines, and log each at debug."""
        rest = b""
        try:
            while data := await self._errors.receive_some(READ_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._note(line)
                rest = rest[-STDERR_LINE_BYTES_MAX:]
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._note(rest)
            self._errors_drained.set()

    def _note(self, line: bytes) -> None:
        if text := line[:STDERR_LINE_BYTES_MAX].decode("utf-8", "replace").rstrip():
            self._stderr.append(text)
            self._log.debug("worker.said", worker=self._spec.name, line=text)

    async def write_stdin(self) -> None:
        """Send what is in the outbox, in order."""
        try:
            while not self._closing:
                if not self._outbox:
                    self._outbox_changed = trio.Event()
                    await self._outbox_changed.wait()
                    continue
                await self._stdin.send_all(self._outbox.popleft())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the process ends, or is ended: `reap` says the rest

    async def watch(self) -> None:
        """Kill it when it hangs or takes too much memory.

        Each look counts as at most twice its interval, so that a daemon that was itself stopped (a
        suspended laptop) does not blame the worker.
        """
        interval = self._config.poll_s
        limit = self._spec.memory_bytes_max
        while not self._died.is_set():
            before = trio.current_time()
            await trio.sleep(interval)
            self._silent_s += min(trio.current_time() - before, 2 * interval)
            if not self._calls or self._hello is None:
                self._silent_s = 0.0
            elif self._silent_s > (hang_s := self._hang_s()):
                self._kill(f"no sign of life for {hang_s:.3g} s", "worker_hung")
            used = self._view.resident_bytes() if limit is not None else None
            if limit is not None and used is not None and used > limit:
                self._kill(f"it uses {used >> 20} MiB of memory; its limit is {limit >> 20} MiB")

    def _hang_s(self) -> float:
        """For how long it may be silent: as its plugin says, or by the length of its own steps."""
        if self._spec.hang_s is not None:
            return self._spec.hang_s
        step_s = self._hello.get("step_s") if self._hello is not None else None
        if isinstance(step_s, bool) or not isinstance(step_s, int | float) or not step_s > 0:
            return self._config.hang_s
        allowed_s = max(self._config.hang_steps * step_s, self._config.hang_min_s)
        return min(allowed_s, self._config.hang_max_s)

    # -- the conversation ----------------------------------------------------------------------------

    def _handle(self, message: Mapping[str, Value], frame_bytes: int) -> None:
        """Take one frame from the worker. Raises FrameError when it makes no sense."""
        kind = message["type"]
        if kind == "heartbeat":
            return
        if kind == "hello":
            if self._hello is not None:
                raise FrameError("a second hello")
            self._hello = message
            self._isolation = observe_isolation(self._view, message)
            self._hello_or_death.set()
            return
        call_id = message.get("id")
        if self._hello is None or not isinstance(call_id, int) or call_id > self._last_id:
            raise FrameError(f"unexpected {str(kind)[:20]!r}")
        call = self._calls.get(call_id)
        if call is None or call.ended:
            return  # it crossed with a cancel
        match kind:
            case "item":
                body = message.get("message")
                if not isinstance(body, Mapping):
                    raise FrameError("an item without a message")
                if not call.put(body, frame_bytes):
                    call.end(Failed("the answer was not read fast enough", code="slow_consumer"))
                    self._post({"type": "cancel", "id": call_id})
            case "end":
                call.end()
            case "error":
                call.end(error_from(message))
            case _:
                raise FrameError(f"unknown type {str(kind)[:20]!r}")

    def _post(self, message: Mapping[str, Value]) -> None:
        self._outbox.append(pack_frame(message))
        self._outbox_changed.set()

    async def wait_ready(self) -> None:
        """Return once the process said hello. Raises Failed(worker_died)."""
        with trio.move_on_after(self._spec.start_deadline_s):
            await self._hello_or_death.wait()
        if self._hello is None and not self._died.is_set():
            self._kill(f"it was not ready within {self._spec.start_deadline_s:g} s")
            await self._died.wait()
        if self._died.is_set():
            raise self._failure()

    @property
    def hello(self) -> Mapping[str, Value]:
        """What the process said when it was ready."""
        assert self._hello is not None, "nobody has the worker before its hello"
        return self._hello

    async def wait_died(self) -> str:
        """Return, when the process has ended, why."""
        await self._died.wait()
        return self._failure().message

    @asynccontextmanager
    async def call(self, message: Mapping[str, Value]) -> AsyncGenerator[WorkerCall, None]:
        """Send a request; see `meshd_plugins.api.Worker.call`. Raises Refused, BadRequest(too_large)."""
        if self._closing or self._reason:
            raise Refused(f"worker {self._spec.name} is not up", code="starting")
        if (
            len(self._calls) >= self._config.calls_max
            or len(self._outbox) >= self._config.outbox_frames_max
        ):
            raise Refused(f"worker {self._spec.name} has too many requests open", code="busy")
        call_id = self._last_id + 1
        try:
            self._post({"type": "call", "id": call_id, "message": message})
        except FrameError as error:
            raise BadRequest(str(error), code="too_large") from None
        self._last_id = call_id
        call = self._calls[call_id] = PendingCall(
            call_id, self._config.call_messages_max, self._config.call_bytes_max
        )
        try:
            yield call
        finally:
            if not call.ended:
                self._post({"type": "cancel", "id": call_id})
            call.close()
            del self._calls[call_id]

    def status(self) -> WorkerStatus:
        """For people."""
        return WorkerStatus(
            name=self._spec.name,
            pid=self.pid,
            ready=self._hello is not None and not self._died.is_set(),
            open_calls=len(self._calls),
            resident_bytes=self._view.resident_bytes() or 0,
            isolation=self._isolation,
        )
