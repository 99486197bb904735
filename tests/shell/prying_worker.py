"""A worker process that was taken over: it tries what it is told and says how that went."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from meshd_plugins.workerkit import Call, Closed, Link, main

LIBC = ctypes.CDLL(None, use_errno=True)
ROOM = ctypes.create_string_buffer(4096)


def called(name: str, *arguments: object) -> str:
    """Call the C library; raise what it says."""
    answer = getattr(LIBC, name)(*arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "done"


def names_in(path: str) -> str:
    return " ".join(sorted(entry.name for entry in Path(path).iterdir()))


def read(path: str) -> str:
    return Path(path).read_bytes()[:100].decode("utf-8", "replace")


def signalled(pid: int, number: int) -> str:
    os.kill(pid, number)
    return "done"


def connect(port: str) -> str:
    socket.create_connection(("127.0.0.1", int(port)), timeout=5).close()
    return "connected"


def own_loopback(host: str) -> str:
    """Listen, and connect to that: on `host`."""
    with socket.socket() as listener, socket.socket() as caller:
        listener.bind((host, 0))
        listener.listen()
        caller.settimeout(5)
        caller.connect(("127.0.0.1", listener.getsockname()[1]))
    return "connected"


def open_socket(family: str) -> str:
    socket.socket(int(family), socket.SOCK_STREAM).close()
    return "opened"


def connect_unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(path)
    return "connected"


def fork_bomb(_text: str) -> str:
    for _ in range(200):
        if os.fork() == 0:
            os._exit(0)
    return "200 processes"


def thread(_: str) -> str:
    done: list[int] = []
    one = threading.Thread(target=done.append, args=(1,))
    one.start()
    one.join()
    return f"{len(done)} thread"


def pair(_: str) -> str:
    ours, theirs = socket.socketpair()
    ours.send(b"x")
    return str(theirs.recv(1))


def open_anew(number: str) -> str:
    return read(f"/proc/self/fd/{number}")


def allocate(size: str) -> str:
    try:
        return f"{len(bytearray(int(size)))} bytes"
    except MemoryError:
        return "MemoryError"


def execute(path: str) -> str:
    return subprocess.run([path], check=True, capture_output=True).stdout.decode().strip()


def undo_landlock(path: str) -> str:
    called("prctl", 4, 1, 0, 0, 0)  # dumpable again
    return read(path)


TRIES: dict[str, Callable[[str], str]] = {
    "read": read,
    "write": lambda path: str(Path(path).write_text("x")),
    "list": names_in,
    "connect": connect,
    "connect_unix": connect_unix,
    "own_loopback": own_loopback,
    "open_socket": open_socket,
    "datagram_pair": lambda _: str(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)),
    "pair": pair,
    "fork_bomb": fork_bomb,
    "execute": execute,
    "thread": thread,
    "allocate": allocate,
    "open_anew": open_anew,
    "kill": lambda pid: signalled(int(pid), 0),
    "signal_self": lambda _: signalled(os.getpid(), signal.SIGCONT),
    "limit": lambda pid: called("prlimit", int(pid), 7, None, ROOM),
    "ptrace": lambda pid: called("ptrace", 16, int(pid), 0, 0),
    "read_memory": lambda pid: called("process_vm_readv", int(pid), ROOM, 1, ROOM, 1, 0),
    "memory_file": lambda pid: read(f"/proc/{pid}/mem"),
    "environment": lambda pid: read(f"/proc/{pid}/environ"),
    "mount": lambda path: called("mount", b"none", path.encode(), b"tmpfs", 0, None),
    "unmount": lambda path: called("umount2", path.encode(), 0),
    "unshare": lambda flags: called("unshare", int(flags)),
    "io_uring": lambda _: called("syscall", 425, 8, ROOM),
    "keyctl": lambda _: called("syscall", 250 if os.uname().machine == "x86_64" else 219, 0, -3, 0),
    "userfaultfd": lambda _: called("syscall", 323 if os.uname().machine == "x86_64" else 282, 1),
    "perf": lambda _: called(
        "syscall", 298 if os.uname().machine == "x86_64" else 241, ROOM, 0, -1
    ),
    "dumpable": lambda _: called("prctl", 4, 1, 0, 0, 0),
    "open_files": lambda _: names_in("/proc/self/fd"),
    "variables": lambda _: " ".join(sorted(os.environ)),
}


def serve(link: Link) -> None:
    link.hello({"pid": os.getpid(), "uid": os.getuid()})
    while True:
        match link.receive(None):
            case Call(id=call_id, message=message):
                try:
                    answer = TRIES[str(message["try"])](str(message.get("with", "")))
                except OSError as error:
                    answer = f"denied: {error.strerror or error}"
                except RuntimeError as error:
                    answer = f"denied: {error}"
                link.item(call_id, {"answer": answer})
                link.end(call_id)
            case Closed():
                return
            case _:
                pass
        link.flush()


if __name__ == "__main__":
    main(serve)
    sys.exit()
