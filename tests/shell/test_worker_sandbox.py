"""What a worker process that was taken over gets at: tried from inside a real one."""

import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.shell.support_prying import (
    NOBODY,
    SECRET,
    Findings,
    Try,
    pry,
    pry_as_nobody,
    state_folder,
)

from meshd_plugins import seccomp
from meshd_plugins.landlock import version, without

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
ROOT = Path(__file__).parents[2]
DATA_LIMIT = 256 * 1024 * 1024
LANDLOCK = version(ctypes.CDLL(None, use_errno=True))
needs_landlock = pytest.mark.skipif(LANDLOCK == 0, reason="this kernel has no Landlock")

TOUCHES_OTHERS: tuple[str, ...] = (
    "ptrace",
    "read_memory",
    "memory_file",
    "environment",
    "kill",
    "limit",
)
TOUCHES_SYSTEM: tuple[Try, ...] = (
    ("unshare", str(CLONE_NEWUSER)),
    ("unshare", str(CLONE_NEWNET)),
    ("unmount", "/"),
    ("mount", "/"),
    ("io_uring", ""),
    ("keyctl", ""),
    ("userfaultfd", ""),
    ("perf", ""),
    ("dumpable", ""),
    ("fork_bomb", ""),
    ("execute", "/bin/true"),
    ("datagram_pair", ""),
)


@dataclass(frozen=True)
class Case:
    """A worker that has tried everything."""

    found: Findings
    state: Path
    port: int
    socket: str


def tries(state: Path, port: int, unix: str) -> list[Try]:
    others = [(name, str(os.getpid())) for name in TOUCHES_OTHERS]
    home = str(state.parent / "home/notes")
    return [
        ("open_files", ""),
        ("variables", ""),
        ("read", str(state / "identity/node.key")),
        ("list", str(state / "identity")),
        ("read", home),
        ("write", str(state.parent / "home/new")),
        ("read", "/etc/passwd"),
        ("open_anew", "GIVEN"),
        ("read", "/proc/self/statm"),
        ("connect", str(port)),
        ("connect_unix", unix),
        *others,
        *TOUCHES_SYSTEM,
        ("allocate", str(2 * DATA_LIMIT)),
        ("allocate", str(DATA_LIMIT // 4)),
        ("thread", ""),
        ("pair", ""),
        ("signal_self", ""),
    ]


@pytest.fixture(scope="module", params=["as it is", "nobody", "nobody, under a strict unit"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    who: str = request.param
    nobody = who.startswith("nobody")
    with state_folder(NOBODY if nobody else os.geteuid()) as root, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = int(listener.getsockname()[1])
        unix = str(root / "control.sock")
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(unix)
            control.listen()
            Path(unix).chmod(0o666)
            state = root / "state"
            wanted = tries(state, port, unix)
            if nobody:
                namespaces = "strict" not in who
                found = pry_as_nobody(
                    wanted, state, namespaces=namespaces, memory_bytes_max=DATA_LIMIT
                )
            else:
                found = pry(wanted, state, memory_bytes_max=DATA_LIMIT)
            yield Case(found, state, port, unix)


@needs_landlock
def test_it_reads_no_keys_and_nobodys_files(case: Case) -> None:
    home = case.state.parent / "home"
    assert case.found.denied("read", str(case.state / "identity/node.key"))
    assert case.found.denied("list", str(case.state / "identity"))
    assert case.found.denied("read", str(home / "notes"))
    assert case.found.denied("write", str(home / "new"))
    assert case.found.denied("read", "/etc/passwd")
    assert SECRET not in "".join(case.found.answers.values())


def test_it_inherits_nothing_but_what_it_was_given(case: Case) -> None:
    allowed = {"PATH", "HOME", "LANG", "LC_CTYPE", "PYTHONPATH"}
    assert set(case.found.answers["variables", ""].split()) <= allowed
    # 0 to 2, its two ends of the pipes to the daemon, the file it was given, and the listing itself
    assert len(case.found.answers["open_files", ""].split()) == 7
    assert case.found.answers["open_anew", "GIVEN"] == "given"


def test_it_reaches_no_network_and_no_socket_of_this_machine(case: Case) -> None:
    assert case.found.denied("connect", str(case.port))
    assert case.found.denied("connect_unix", case.socket)


@pytest.mark.parametrize("attempt", TOUCHES_OTHERS)
def test_it_touches_no_other_process(case: Case, attempt: str) -> None:
    assert case.found.denied(attempt, str(os.getpid()))


@pytest.mark.parametrize("attempt", TOUCHES_SYSTEM, ids=" ".join)
def test_it_changes_nothing_about_itself_or_the_system(case: Case, attempt: Try) -> None:
    assert case.found.denied(*attempt)


def test_it_does_what_a_worker_has_to(case: Case) -> None:
    answers = case.found.answers
    assert answers["allocate", str(DATA_LIMIT // 4)] == f"{DATA_LIMIT // 4} bytes"
    assert answers["allocate", str(2 * DATA_LIMIT)] == "MemoryError"
    assert answers["thread", ""] == "1 thread"
    assert answers["pair", ""] == "b'x'"
    assert answers["signal_self", ""] == "done"
    assert answers["read", "/proc/self/statm"].split()[0].isdecimal()


@needs_landlock
def test_the_daemon_says_which_steps_hold_and_how(case: Case) -> None:
    steps = case.found.steps
    assert not case.found.exposed
    assert steps["keys_out_of_reach"] == "Landlock"
    assert steps["system_calls"] == "yes"
    assert steps["memory"] == "256 MiB"
    assert "system calls" in steps["no_network"]
    assert not case.found.missing
    assert case.found.resident_bytes > 1024 * 1024
    assert set(steps) == {
        "parent_death",
        "first_to_go",
        "no_network",
        "no_new_privileges",
        "no_capabilities",
        "limits",
        "memory",
        "keys_out_of_reach",
        "not_dumpable",
        "system_calls",
    }


@needs_landlock
def test_what_a_plugin_asks_for_is_allowed_and_nothing_beside_it() -> None:
    with state_folder(os.geteuid()) as root, socket.create_server(("127.0.0.1", 0)) as listener:
        own, key = str(root / "state/plugins/x/own"), str(root / "state/identity/node.key")
        port = str(listener.getsockname()[1])
        new, beside = str(root / "state/plugins/x/new"), str(root / "home/new")
        wanted: list[Try] = [
            ("read", own),
            ("read", key),
            ("write", new),
            ("write", beside),
            ("connect", port),
            ("connect_unix", "/run/meshd/meshd.sock"),
            ("execute", "/usr/bin/id"),
            ("execute", str(root / "home/notes")),
            ("unshare", str(CLONE_NEWUSER)),
        ]
        found = pry(
            wanted,
            root / "state",
            network=True,
            processes=True,
            # The second holds keys: what lies within is allowed without them.
            read_paths=(root / "state/plugins/x", root / "state"),
            write_paths=(root / "state/plugins/x",),
        )
        assert found.answers["read", own] == "its own"
        assert found.denied("read", key)
        assert found.answers["write", new] == "1"
        assert found.denied("write", beside)
        assert found.answers["connect", port] == "connected"
        assert found.answers["connect_unix", "/run/meshd/meshd.sock"] == (
            "denied: Operation not permitted"
        )
        assert found.answers["execute", "/usr/bin/id"].startswith("uid=")
        assert found.denied("execute", str(root / "home/notes"))
        assert found.denied("unshare", str(CLONE_NEWUSER))
        assert found.exposed == ()
        assert found.missing == ("no_network: the worker asked for it",)


WITHOUT_LANDLOCK = """
import json, os, sys
from pathlib import Path
from meshd_plugins import workersandbox
workersandbox.restrict_files = lambda *_, **__: "no Landlock: so says the test"
given = os.open(sys.argv[1] + "/given", os.O_RDONLY)
order = workersandbox.Order(parent=os.getppid(), hidden=(sys.argv[1],))
report = workersandbox.apply_sandbox(order)
print(json.dumps([report["keys_out_of_reach"], sorted(os.listdir(sys.argv[1])),
                  Path(f"/proc/self/fd/{given}").read_text()]))
"""


@pytest.mark.parametrize("user", [(), ("setpriv", "--reuid=65534", "--clear-groups")])
def test_on_a_kernel_without_landlock_the_keys_are_covered(user: tuple[str, ...]) -> None:
    if user and os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with state_folder(NOBODY if user else os.geteuid()) as root:
        python = "/usr/bin/python3" if user else sys.executable
        path = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [*user, python, "-c", WITHOUT_LANDLOCK, str(root / "state")],
            env={"PYTHONPATH": path},
            capture_output=True,
            check=False,
        )
        if b"no mount namespace" in done.stdout:
            pytest.skip(f"the system allows no mount namespace: {done.stdout.decode()}")
        assert done.stdout.decode().strip() == '["mount namespace", [], "given"]', (
            done.stderr.decode()
        )


def test_a_folder_with_an_exception_is_what_else_lies_in_it(tmp_path: Path) -> None:
    for name in ("a/x", "a/keys/deep", "b"):
        (tmp_path / name).mkdir(parents=True)
    a, b = tmp_path / "a", tmp_path / "b"
    assert list(without(tmp_path, [a / "keys"])) == [a / "x", b]
    assert list(without(tmp_path, [])) == [tmp_path]
    assert list(without(a / "keys/deep", [a / "keys"])) == []
    assert list(without(b, [a / "keys"])) == [b]


def test_the_numbers_of_system_calls_are_those_of_libseccomp() -> None:
    library = pytest.importorskip("pyseccomp", reason="compares with libseccomp")
    for column, machine in enumerate((library.Arch.X86_64, library.Arch.AARCH64)):
        for name, numbers in seccomp.NUMBERS.items():
            theirs = library.resolve_syscall(machine, name)
            # Below zero: libseccomp's sign for a call that the machine does not have.
            assert (theirs if theirs is not None and theirs >= 0 else None) == numbers[column], name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("rules", [seccomp.FilterRules(7), seccomp.FilterRules(7, True, True)])
def test_every_jump_of_a_filter_stays_in_it_and_it_ends_in_an_answer(
    machine: str, rules: seccomp.FilterRules
) -> None:
    program = seccomp.build_filter(rules, machine)
    assert len(program) < 4096  # BPF_MAXINSNS
    for at, (code, if_true, if_false, _) in enumerate(program):
        if code & 0x07 == 0x05:
            assert at + 1 + max(if_true, if_false) < len(program)
            assert max(if_true, if_false) < 256
    assert program[-1][0] == 0x06


def test_an_unknown_machine_is_said() -> None:
    refused = seccomp.install_filter(None, seccomp.FilterRules(1), "riscv64")
    assert refused == "no list of system calls for riscv64"


def test_families_and_types_are_those_of_the_system() -> None:
    assert seccomp._FAMILIES == (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
    flags = (0, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK)
    both = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    assert (*(socket.SOCK_STREAM | flag for flag in flags), both) == seccomp._STREAM_PAIRS


REACHABLE = """
import json, os, sys
from tests.shell.prying_worker import TRIES
print(json.dumps([TRIES[name](argument) for name, argument in json.loads(sys.argv[1])]))
"""


def test_without_the_sandbox_the_same_tries_succeed() -> None:
    """The control: what is denied above is denied by the sandbox, and not for want of trying."""
    with state_folder(os.geteuid()) as root, socket.create_server(("127.0.0.1", 0)) as listener:
        wanted: list[Try] = [
            ("read", str(root / "state/identity/node.key")),
            ("list", str(root / "state/identity")),
            ("write", str(root / "home/new")),
            ("connect", str(listener.getsockname()[1])),
            ("datagram_pair", ""),
            ("kill", str(os.getpid())),
            ("environment", str(os.getpid())),
            ("limit", str(os.getpid())),
            ("fork_bomb", ""),
            ("execute", "/bin/true"),
            ("dumpable", ""),
            ("allocate", str(2 * DATA_LIMIT)),
        ]
        done = subprocess.run(
            [sys.executable, "-c", REACHABLE, json.dumps(wanted)],
            env={"PYTHONPATH": os.pathsep.join([*(p for p in sys.path if p), str(ROOT)])},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        answers = json.loads(done.stdout)
    assert answers[:2] == [SECRET, "node.key"]
    assert answers[3] == "connected"
    assert answers[-1] == f"{2 * DATA_LIMIT} bytes"
