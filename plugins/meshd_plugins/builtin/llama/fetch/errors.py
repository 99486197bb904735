"""What can go wrong in bringing a file here.

FetchError
  FetchRefused    asking again would not help: the server says no, the file is too large or no model
  FetchBroken     the connection or the server: it is tried again, within a budget
"""

from __future__ import annotations


class FetchError(Exception):
    """Root. `code` is stable, the message is for people. State: what has arrived is kept, unless it says so."""

    code = "fetch_failed"

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


class FetchRefused(FetchError):
    """Asking again would not help.

    Codes: not_found, forbidden, redirected, insecure, tls, too_large, no_space, not_gguf, no_length,
    digest_mismatch, refused, no_package, bad_archive, bad_parts.
    """

    code = "refused"


class FetchBroken(FetchError):
    """It broke on the way.

    Codes: unreachable, stalled, cut_short, server_error, out_of_tries.
    """

    code = "unreachable"

    def __init__(self, message: str, code: str = "", *, wait_s: float = 0.0) -> None:
        super().__init__(message, code)
        self.wait_s = wait_s  # as the server asked for
