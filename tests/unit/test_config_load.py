"""The loader: which source wins, and that every mistake is one sentence that names what is right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshd.config import (
    BadValue,
    Config,
    ConfigError,
    ConfigSyntax,
    ConfigUnreadable,
    LogLevel,
    Machine,
    Preset,
    UnknownKey,
    describe,
    gossip_config,
    load,
    socket_candidates,
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """An ordinary user's, with nothing installed."""
    return Machine(
        environment={},
        host_name="Kitchen_Pi.local",
        user_id=4_000_000,
        home=tmp_path / "home",
        system_config=tmp_path / "etc" / "meshd.toml",
        system_state_dir=tmp_path / "absent" / "state",
        system_runtime_dir=tmp_path / "absent" / "run",
    )


def written(tmp_path: Path, text: str | bytes, name: str = "meshd.toml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def with_environment(machine: Machine, **variables: str) -> Machine:
    return dataclasses.replace(machine, environment=variables)


def test_nothing_configured_is_a_working_configuration(machine: Machine) -> None:
    config = load(machine=machine)
    assert config.node.name == "kitchen-pi"
    assert config.node.state_dir == machine.home / ".local" / "state" / "meshd"
    assert config.http.socket == config.node.state_dir / "meshd.sock"
    assert (config.listen.port, config.http.host, config.http.port) == (7946, "127.0.0.1", 8642)
    assert config.discovery.announce_models


def test_later_sources_win_and_every_value_knows_its_own(tmp_path: Path, machine: Machine) -> None:
    first = written(tmp_path, "[http]\nport = 1\nconnections_max = 7\n[log]\nlevel = 'debug'\n")
    second = written(tmp_path, "[http]\nport = 2\nkeep_alive_s = 5\n", "second.toml")
    config = load(
        [first, second],
        overrides={"http.port": "4", "node.labels": "gpu, roof"},
        machine=with_environment(machine, MESHD_HTTP_PORT="3", MESHD_LOG_LEVEL="error"),
    )
    assert config.http.port == 4
    assert config.http.keep_alive_s == 5.0
    assert config.http.connections_max == 7
    assert config.log.level is LogLevel.ERROR
    assert config.node.labels == ("gpu", "roof")
    assert config.origins["http.port"] == "command line"
    assert config.origins["http.keep_alive_s"] == str(second)
    assert config.origins["http.connections_max"] == str(first)
    assert config.origins["log.level"] == "environment variable MESHD_LOG_LEVEL"
    assert "limits.queue_max" not in config.origins


def test_system_file_is_read_unless_another_is_named(tmp_path: Path, machine: Machine) -> None:
    machine.system_config.parent.mkdir()
    machine.system_config.write_text("[node]\nzone = 'attic'\n")
    assert load(machine=machine).node.zone == "attic"
    named = written(tmp_path, "[node]\nname = 'named'\n")
    from_variable = load(machine=with_environment(machine, MESHD_CONFIG=str(named)))
    assert (from_variable.node.name, from_variable.node.zone) == ("named", "")
    given = written(tmp_path, "[node]\nname = 'given'\n", "given.toml")
    assert (
        load([given], machine=with_environment(machine, MESHD_CONFIG="/absent")).node.name
        == "given"
    )


def test_paths_are_relative_to_the_file_that_holds_them(tmp_path: Path, machine: Machine) -> None:
    path = written(tmp_path, "[node]\nstate_dir = 'state'\n")
    config = load([path], machine=machine)
    assert config.node.state_dir == tmp_path / "state"
    assert config.http.socket == tmp_path / "state" / "meshd.sock"
    assert config.origins["http.socket"] == "node.state_dir"


@pytest.mark.parametrize(
    ("environment", "state_dir", "socket"),
    [
        (
            {"STATE_DIRECTORY": "/s/meshd:/s/more", "RUNTIME_DIRECTORY": "/r/meshd"},
            "/s/meshd",
            "/r/meshd/meshd.sock",
        ),
        (
            {"XDG_STATE_HOME": "/x/state", "XDG_RUNTIME_DIR": "/x/run"},
            "/x/state/meshd",
            "/x/run/meshd.sock",
        ),
        ({"XDG_STATE_HOME": "/x/state"}, "/x/state/meshd", "/x/state/meshd/meshd.sock"),
    ],
)
def test_folders_follow_systemd_then_the_desktop(
    machine: Machine, environment: dict[str, str], state_dir: str, socket: str
) -> None:
    config = load(machine=dataclasses.replace(machine, environment=environment))
    assert (str(config.node.state_dir), str(config.http.socket)) == (state_dir, socket)


def test_root_and_the_service_user_share_the_system_folders(
    tmp_path: Path, machine: Machine
) -> None:
    as_root = dataclasses.replace(machine, user_id=0)
    assert load(machine=as_root).node.state_dir == machine.system_state_dir
    assert load(machine=as_root).http.socket == machine.system_runtime_dir / "meshd.sock"
    machine.system_state_dir.mkdir(parents=True)
    owner = dataclasses.replace(machine, user_id=machine.system_state_dir.stat().st_uid)
    assert load(machine=owner).node.state_dir == machine.system_state_dir


def test_a_client_looks_for_its_own_daemon_then_for_the_service(machine: Machine) -> None:
    user = with_environment(machine, XDG_RUNTIME_DIR="/x/run")
    service = machine.system_runtime_dir / "meshd.sock"
    assert socket_candidates(load(machine=user), user) == (Path("/x/run/meshd.sock"), service)
    chosen = load(overrides={"http.socket": "/elsewhere/m.sock"}, machine=user)
    assert socket_candidates(chosen, user) == (Path("/elsewhere/m.sock"),)


@pytest.mark.parametrize(
    ("toml", "key", "suggestion", "says"),
    [
        ("[htpp]\nport = 1", "htpp", "http", 'did you mean "http"?'),
        ("[http]\nprot = 1", "http.prot", "port", 'did you mean "port"?'),
        ("[http]\nkeep-alive-s = 1", "http.keep-alive-s", "keep_alive_s", "keep_alive_s"),
        ("[log]\ncolour = 1", "log.colour", "", "there are level, format"),
        ("[zzzz]", "zzzz", "", "there are node, listen, discovery"),
        ("port = 1", "port", "listen.port", "it belongs below [listen] or [http]"),
        ("[plugins]\nenabled = ['x']", "enabled", "enable", 'did you mean "enable"?'),
        (
            "[gossip.overrides]\nprobe_intervall_s = 1",
            "gossip.overrides.probe_intervall_s",
            "probe_interval_s",
            'did you mean "probe_interval_s"?',
        ),
        (
            "[gossip.overrides]\ndatagram_payload_bytes_max = 9",
            "gossip.overrides.datagram_payload_bytes_max",
            "",
            "unknown key",
        ),
    ],
)
def test_unknown_keys_name_the_nearest_valid_one(
    tmp_path: Path, machine: Machine, toml: str, key: str, suggestion: str, says: str
) -> None:
    path = written(tmp_path, toml)
    with pytest.raises(UnknownKey) as raised:
        load([path], machine=machine)
    assert raised.value.key == key
    if suggestion:
        assert raised.value.suggestion == suggestion
    assert says in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[http]\nport = '80'", "http.port = '80': expected a whole number from 0 to 65535"),
        ("[http]\nport = 65536", "http.port = 65536: expected a whole number from 0 to 65535"),
        ("[http]\nport = true", "http.port = True: expected a whole number from 0 to 65535"),
        ("[http]\nport = 1.0", "expected a whole number"),
        ("[http]\nkeep_alive_s = nan", "expected a number from 0 to 86400"),
        ("[http]\nhost = 'example.org'", "expected an IP address, such as 127.0.0.1 or 0.0.0.0"),
        ("[http]\nhost = '127.0.0.300'", "expected an IP address, such as 127.0.0.1 or 0.0.0.0"),
        ("[http]\ncertificate = 'a.pem'", "goes together with http.key: give both, or neither"),
        ("[http]\nkey = 'a.pem'", "goes together with http.certificate: give both, or neither"),
        ("[http]\nallowed_hosts = ['a b']", "expected a DNS name"),
        ("[http]\nsocket = 5", "expected a path in quotes"),
        (f"[http]\nsocket = '/{'s' * 120}'", "longer than 107 bytes"),
        ("[http]\nrequest_bytes_max = 16000000", "above limits.request_bytes_max (8519680)"),
        ("[limits]\ndeadline_s = 601", "above limits.deadline_max_s (600)"),
        ("[log]\nlevel = 'verbose'", "expected one of debug, info, warning, error"),
        ("[log]\nlevel = ['info']", "expected one of debug"),
        ("[discovery]\nmdns = 'yes'", "expected true or false"),
        ("[discovery]\nseeds = 'a:1'", "expected a list of texts"),
        ("[discovery]\nseeds = [1]", "expected a list of texts"),
        ("[discovery]\nseeds = ['host']", 'expected "host:port"'),
        ("[discovery]\nseeds = ['host:70000']", "expected a port from 1 to 65535"),
        ("[listen]\nhost = 'kitchen'", "expected an IP address"),
        ("[listen]\nadvertise = '1.2.3'", "expected an IP address"),
        ("[node]\nname = 'Kitchen Pi'", "expected 1 to 63 of a-z, 0-9"),
        (
            "[node]\nlabels = ['a','b','c','d','e','f','g','h','i','j','k','l','m','n','o','p','q']",
            "at most 16",
        ),
        ("[node]\nstate_dir = '~nobody-of-that-name/x'", "the user after ~ is not known"),
        ("http = 3", "http is a section: write [http]"),
        ("[gossip]\noverrides = 3", "expected a table"),
        ("[gossip.overrides]\nprobe_interval_s = 0", "expected a number above 0"),
        ("[gossip.overrides]\nindirect_probes = 1.5", "expected a whole number above 0"),
        ("[gossip.overrides]\nrumour_loss = 1", "above 0 and below 1"),
        ("[plugins.llama]\nwhen = 2020-01-01", "dates and times are not supported"),
    ],
)
def test_wrong_values_say_what_is_expected(
    tmp_path: Path, machine: Machine, toml: str, says: str
) -> None:
    path = written(tmp_path, toml)
    with pytest.raises(BadValue) as raised:
        load([path], machine=machine)
    assert says in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[http]\nport 80\n", "line 2, column 6"),
        (b'[http]\nport = "80', "line 2"),
        (b"[http]\nport = 1\nport = 2\n", "line 3"),
        (b'[node]\nzone = "\xff"\n', "not UTF-8 text (at line 2, column 9)"),
        (b"[limits]\nqueue_max = " + b"9" * 6000, "too long or too deep"),
        (b"[plugins.x]\na = " + b"[" * 5000, "TOML"),
    ],
)
def test_syntax_errors_name_the_place(
    tmp_path: Path, machine: Machine, content: bytes, says: str
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigSyntax) as raised:
        load([path], machine=machine)
    assert says in str(raised.value)


def test_unreadable_files_are_named(tmp_path: Path, machine: Machine) -> None:
    with pytest.raises(ConfigUnreadable, match=r"absent\.toml: cannot be read: No such file"):
        load([tmp_path / "absent.toml"], machine=machine)
    with pytest.raises(ConfigUnreadable, match="cannot be read: Is a directory"):
        load([tmp_path], machine=machine)
    with pytest.raises(ConfigUnreadable, match="larger than"):
        load([written(tmp_path, b"#" * 1_048_577)], machine=machine)


@pytest.mark.parametrize(
    ("variables", "error", "says"),
    [
        (
            {"MESHD_HTTP_PROT": "1"},
            UnknownKey,
            'variable MESHD_HTTP_PROT: unknown key "prot" in [http]; did you',
        ),
        ({"MESHD_HTPP_PORT": "1"}, UnknownKey, 'unknown section "htpp"; did you mean "http"?'),
        ({"MESHD_HTTP_PORT": "eighty"}, BadValue, "http.port = 'eighty': expected a whole number"),
        ({"MESHD_DISCOVERY_MDNS": "maybe"}, BadValue, "expected true or false"),
    ],
)
def test_environment_is_checked_like_a_file(
    machine: Machine, variables: dict[str, str], error: type[ConfigError], says: str
) -> None:
    with pytest.raises(error) as raised:
        load(machine=with_environment(machine, **variables))
    assert says in str(raised.value)


def test_text_of_variables_and_options_is_read_by_type(machine: Machine) -> None:
    config = load(
        machine=with_environment(
            machine,
            MESHD_DISCOVERY_MDNS="off",
            MESHD_LIMITS_DEADLINE_S="2.5",
            MESHD_DISCOVERY_SEEDS='["a:1", "[::1]:2"]',
            MESHD_EXTRA="not ours",
        ),
        overrides={
            "gossip.preset": "local",
            "gossip.overrides.probe_interval_s": "0.25",
            "plugins.llama.threads": "3",
            "plugins.llama.model": "small.gguf",
            "http.port": 0,
        },
    )
    assert not config.discovery.mdns
    assert config.limits.deadline_s == 2.5
    assert config.discovery.seeds == ("a:1", "[::1]:2")
    assert config.gossip.preset is Preset.LOCAL
    assert gossip_config(config.gossip).probe_interval_s == 0.25
    assert gossip_config(config.gossip).death_floor_s == 2.0
    assert config.plugins.tables["llama"] == {"threads": 3, "model": "small.gguf"}


def test_plugin_tables_pass_through_and_merge_key_by_key(tmp_path: Path, machine: Machine) -> None:
    first = written(
        tmp_path,
        "[plugins]\nenable = ['llama']\n[plugins.llama]\nthreads = 1\nmodels = [{ path = 'a' }]\n",
    )
    second = written(tmp_path, "[plugins.llama]\nthreads = 2\n", "second.toml")
    config = load([first, second], machine=machine)
    assert config.plugins.enable == ("llama",)
    assert config.plugins.tables == {"llama": {"threads": 2, "models": [{"path": "a"}]}}
    assert config.origins["plugins.llama.threads"] == str(second)


def test_announcing_models_is_off_where_strangers_listen(machine: Machine) -> None:
    announce = {
        preset: load(
            overrides={"gossip.preset": preset.value}, machine=machine
        ).discovery.announce_models
        for preset in Preset
    }
    assert announce == {
        Preset.LAN: True,
        Preset.LOCAL: True,
        Preset.WAN: False,
        Preset.CONSTRAINED: False,
    }
    stated = load(
        overrides={"gossip.preset": "wan", "discovery.announce_models": "true"}, machine=machine
    )
    assert stated.discovery.announce_models


def test_configuration_cannot_be_changed_afterwards(machine: Machine) -> None:
    config = load(machine=machine)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.http.port = 1  # type: ignore[misc]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
def test_noise_is_never_a_traceback(tmp_path: Path, machine: Machine, content: bytes) -> None:
    path = written(tmp_path, content)
    try:
        config = load([path], machine=machine)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert isinstance(config, Config)
        assert describe(config)
