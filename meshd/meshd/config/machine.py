"""What defaults depend on: the environment, the user and the host name, as plain data."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM_CONFIG = Path("/etc/meshd/meshd.toml")
SYSTEM_STATE_DIR = Path("/var/lib/meshd")
SYSTEM_RUNTIME_DIR = Path("/run/meshd")


@dataclass(frozen=True, slots=True)
class Machine:
    """The process's surroundings. `Machine.here()` reads them; tests write them."""

    environment: Mapping[str, str]
    host_name: str
    user_id: int
    home: Path
    system_config: Path = SYSTEM_CONFIG
    system_state_dir: Path = SYSTEM_STATE_DIR
    system_runtime_dir: Path = SYSTEM_RUNTIME_DIR

    @classmethod
    def here(cls) -> Machine:
        """The surroundings of this process."""
        return cls(
            environment=dict(os.environ),
            host_name=platform.node(),
            user_id=os.geteuid(),
            home=Path(os.environ.get("HOME") or "/"),
        )

    def is_service_user(self, folder: Path) -> bool:
        """Whether this user is root or the one that the folder was made for."""
        if self.user_id == 0:
            return True
        try:
            return folder.stat().st_uid == self.user_id
        except OSError:
            return False

    def default_node_name(self) -> str:
        """The host name made a label; "node" where nothing is left of it."""
        first = self.host_name.lower().partition(".")[0]
        return re.sub(r"[^a-z0-9]+", "-", first)[:63].strip("-") or "node"

    def default_state_dir(self) -> tuple[Path, str]:
        """Folder, and where that comes from."""
        given = self.environment.get("STATE_DIRECTORY", "").partition(":")[0]
        if given:
            return Path(given), "STATE_DIRECTORY"
        if self.is_service_user(self.system_state_dir):
            return self.system_state_dir, "default"
        given = self.environment.get("XDG_STATE_HOME", "")
        if given:
            return Path(given) / "meshd", "XDG_STATE_HOME"
        return self.home / ".local" / "state" / "meshd", "default"

    def default_socket(self, state_dir: Path, state_dir_given: bool) -> tuple[Path, str]:
        """Path of the Unix socket, and where that comes from.

        A state folder that was given takes its socket along, so that several daemons of one user do
        not meet at one path.
        """
        given = self.environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        if given:
            return Path(given) / "meshd.sock", "RUNTIME_DIRECTORY"
        if state_dir_given:
            return state_dir / "meshd.sock", "node.state_dir"
        if self.is_service_user(self.system_runtime_dir):
            return self.system_runtime_dir / "meshd.sock", "default"
        given = self.environment.get("XDG_RUNTIME_DIR", "")
        if given:
            return Path(given) / "meshd.sock", "XDG_RUNTIME_DIR"
        return state_dir / "meshd.sock", "default"
