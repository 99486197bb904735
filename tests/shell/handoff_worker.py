"""A worker process that hands sequences over, without a model: the real part of the protocol over a large state."""

import sys

from tests.shell.support_handoff_flow import LARGE, TOKENS, handing, kept_state

from meshd_plugins.workerkit import Call, Cancel, Closed, Link, main


def serve(link: Link) -> None:
    handoff, engine = handing(link, LARGE, 2 * LARGE.size_bytes(TOKENS))
    if sys.argv[1] == "holds":
        assert engine.adopt(kept_state(LARGE, TOKENS))
    link.hello({"kv_bytes_per_token": LARGE.bytes_per_token})
    while True:
        match link.receive(1.0):
            case Call(id=call_id, message={"operation": "kept"}):
                link.item(call_id, {"bytes": engine.kept_bytes, "room": engine.room_bytes})
                link.end(call_id)
            case Call(id=call_id, message=message):
                handoff.take(call_id, message)
            case Cancel(id=call_id):
                handoff.cancel(call_id)
            case Closed():
                return
            case None:
                pass
        handoff.step()
        link.flush()
        link.heartbeat()


if __name__ == "__main__":
    main(serve)
