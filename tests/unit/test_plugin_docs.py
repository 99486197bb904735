"""docs/plugins.md tells the truth: its example runs, and every hook is in it."""

import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from meshd_plugins.api import PluginContext
from meshd_plugins.hookspecs import HOOKS, HookSpecs
from meshd_plugins.sources import OFF_BY_DEFAULT

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook: str) -> None:
    assert f"| `{hook}(context)` |" in PAGE
    assert inspect.getdoc(getattr(HookSpecs, hook))


def test_the_page_documents_no_hook_that_does_not_exist() -> None:
    assert set(re.findall(r"`(meshd_\w+)\(", PAGE)) == set(HOOKS)


def test_the_hooks_are_those_that_were_agreed() -> None:
    assert HOOKS == (
        "meshd_register",
        "meshd_background",
        "meshd_facts",
        "meshd_load",
        "meshd_operations",
        "meshd_complaints",
    )
    for hook in HOOKS:
        parameters = inspect.signature(getattr(HookSpecs, hook), eval_str=True).parameters
        assert {name: parameter.annotation for name, parameter in parameters.items()} == {
            "self": inspect.Parameter.empty,
            "context": PluginContext,
        }


def test_the_example_passes_its_own_test(tmp_path: Path) -> None:
    plugin, test, _ = (code for language, code in BLOCKS if language == "python")
    (tmp_path / "meshd_dice.py").write_text(plugin)
    (tmp_path / "test_meshd_dice.py").write_text(test)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_meshd_dice.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


def test_the_example_is_a_whole_plugin(tmp_path: Path) -> None:
    plugin = next(code for language, code in BLOCKS if language == "python")
    path = tmp_path / "meshd_dice.py"
    path.write_text(plugin)
    spec = importlib.util.spec_from_file_location("meshd_dice_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    from meshd_plugins.manager import PluginManager
    from meshd_plugins.sources import of_objects
    from meshd_plugins.testing import FakeLogger, fake_context

    manager = PluginManager(
        lambda name: fake_context(name, tmp_path),
        log=FakeLogger(),
        clock=lambda: 0.0,
        sources=of_objects({"dice": module}),
    )
    manager.load()
    manager.register()
    [row] = manager.status()
    assert (row["state"], row["capabilities"]) == ("active", ["computation.gpt/dice"])


def test_the_toml_on_the_page_is_toml() -> None:
    tables = [tomllib.loads(code) for language, code in BLOCKS if language == "toml"]
    assert tables == [
        {"project": {"entry-points": {"meshd": {"dice": "meshd_dice"}}}},
        {"plugins": {"dice": {"sides": 20}}},
    ]


def test_the_page_lists_the_plugins_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name in project["project"]["entry-points"]["meshd"]:
        off = " (off by default)" if name in OFF_BY_DEFAULT else ""
        assert f"| `{name}`{off} |" in PAGE
