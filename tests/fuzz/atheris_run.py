"""`python -m tests.fuzz.atheris_run`: fuzz with coverage as the guide (atheris, libFuzzer).

atheris is no dependency of this project. Make an environment of its own for it:

    python3.11 -m venv /path/to/venv
    /path/to/venv/bin/pip install atheris pytest hypothesis --editable .
    /path/to/venv/bin/python -m tests.fuzz.atheris_run --target wire --runs 1000000

It prints libFuzzer's lines (`cov`: edges reached, `ft`: features, `corp`: inputs kept). An input that breaks
something is saved and named; `python -m tests.fuzz.run --target T --input FILE` feeds its hex again. With
`--keep BYTES`, the inputs that reached something new, smallest first, are written to tests/fuzz/corpus for
the ordinary test run to replay.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

TARGETS: Final = (
    "member", "stranger", "wire", "sealed", "stream", "record", "snapshot", "storage", "announcement",
    "join", "token", "exchange", "certificate", "decree", "hello", "passport",
)  # fmt: skip
INPUT_BYTES_MAX: Final = 4_096
CORPUS: Final = Path(__file__).parent / "corpus"


def _atheris() -> Any:
    try:
        return importlib.import_module("atheris")
    except ImportError:
        sys.exit(f"atheris is not installed in {sys.prefix}.\n\n{__doc__}")


def _fuzz(name: str, runs: int, seconds: int, folder: Path) -> None:
    """Fuzz in this process; libFuzzer ends it."""
    atheris = _atheris()
    with atheris.instrument_imports(include=["meshd", "meshd_cms"]):
        targets = importlib.import_module("tests.fuzz.atheris_targets")
    targets.write_seeds(name, folder)
    options = [f"-runs={runs}", f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}"]
    crashes = f"-artifact_prefix={folder.parent}/broken-{name}-"
    arguments = [sys.argv[0], *options, crashes, "-print_final_stats=1", str(folder)]
    atheris.Setup(arguments, targets.TestOneInput(name))
    atheris.Fuzz()


def _keep(name: str, folder: Path, bytes_max: int) -> None:
    """Write the new inputs that libFuzzer kept, smallest first, as lines of hex."""
    found = [path for path in folder.iterdir() if not path.name.startswith("seed-")]
    found.sort(key=lambda path: (path.stat().st_size, path.name))
    lines: list[str] = []
    room = bytes_max
    for path in found:
        line = path.read_bytes().hex()
        if line and len(line) < room:
            lines.append(line)
            room -= len(line) + 1
    target = CORPUS / name / "inputs.hex"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} of {len(found)} inputs kept in {target}")


def main() -> int:
    """Fuzz one target in a child process, then keep what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.atheris_run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--runs", type=int, default=-1, help="inputs; -1: no end")
    parser.add_argument("--seconds", type=int, default=0, help="at most; 0: no end")
    parser.add_argument("--keep", type=int, metavar="BYTES", help="keep interesting inputs")
    options = parser.parse_args()
    _atheris()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-atheris-")) / "corpus"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        _fuzz(options.target, options.runs, options.seconds, folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if options.keep and status == 0:
        _keep(options.target, folder, options.keep)
    print(f"what was found lies in {folder.parent}")
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
