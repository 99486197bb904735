"""Where `meshd` and `python -m meshd` begin.

Tiny on purpose: all else is imported once Ctrl-C has been seen to. Until a command runs it ends the process by the
signal, without a word: a KeyboardInterrupt in the middle of an import is a traceback, or is lost in a callback.
"""

from __future__ import annotations

_INTERRUPTED = 130  # what shells say of a program that SIGINT ended


def main() -> None:
    """The `meshd` command."""
    try:
        import signal

        # What a shell starts in its background ignores it, and goes on doing so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    from meshd.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
