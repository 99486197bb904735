"""A worker process for the supervisor's tests; what it does is named by its first argument."""

import os
import signal
import subprocess
import sys
import time

from meshd_plugins.api import Value
from meshd_plugins.workerkit import Call, Cancel, Closed, Link, main, pack_frame


def serve(link: Link) -> None:
    behaviour = sys.argv[1]
    if behaviour == "dies_at_start":
        print("no such model: café", file=sys.stderr, flush=True)
        os._exit(3)
    if behaviour == "never_ready":
        link.receive(None)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGSTOP) if "stopped" in sys.argv else None
    hello: dict[str, Value] = {
        "behaviour": behaviour,
        "variables": sorted(os.environ),
        "pid": os.getpid(),
    }
    if behaviour.startswith("step_s="):
        hello["step_s"] = float(behaviour.removeprefix("step_s="))
    link.hello(hello)
    open_calls: set[int] = set()
    while True:
        incoming = link.receive(0.05 if open_calls else None)
        link.heartbeat()
        match incoming:
            case Call(id=call_id, message=message):
                if act(link, call_id, dict(message)):
                    open_calls.add(call_id)
            case Cancel(id=call_id):
                print(f"cancelled {call_id}", file=sys.stderr, flush=True)
                open_calls.discard(call_id)
            case Closed():
                return
            case None:
                pass
        link.flush()


def act(link: Link, call_id: int, message: dict[str, object]) -> bool:
    """Handle one call; true when it stays open."""
    match message["do"]:
        case "echo":
            for word in str(message["text"]).split():
                link.item(call_id, {"word": word})
            link.end(call_id)
        case "wait":
            link.item(call_id, {"waiting": True})
            return True
        case "refuse":
            link.error(call_id, "refused", "busy", "not now")
        case "bad":
            link.error(call_id, "bad_request", "bad_thing", "thing is bad")
        case "die":
            for n in range(100):
                print(f"line {n}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(7)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(3600)
        case "garbage":
            os.write(link._write_fd, b"\x00\x00\x00\x04oops")
        case "huge":
            os.write(link._write_fd, b"\xff\xff\xff\xff")
        case "unasked":
            os.write(link._write_fd, pack_frame({"type": "item", "id": 999, "message": {}}))
        case "flood":
            for n in range(int(str(message["count"]))):
                link.item(call_id, {"n": n})
            link.end(call_id)
        case "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            link.item(call_id, {"pid": child.pid})
            link.end(call_id)
        case "memory":
            global hoard
            hoard = b"x" * int(str(message["bytes"]))
            return True
        case "connect":
            import socket

            try:
                socket.create_connection(
                    ("127.0.0.1", int(str(message["port"]))), timeout=5
                ).close()
                link.item(call_id, {"answer": "connected"})
            except OSError as error:
                link.item(call_id, {"answer": error.strerror or str(error)})
            link.end(call_id)
        case other:
            link.error(call_id, "failed", "unknown", str(other))
    return False


hoard = b""

if __name__ == "__main__":
    main(serve)
