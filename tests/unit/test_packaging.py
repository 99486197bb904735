"""What the wheel puts onto a system, pinned: a top-level name too many overwrites somebody else's."""

from __future__ import annotations

import tomllib
import zipfile
from email.parser import HeaderParser

import pytest
from tests.unit.support_wheel import ROOT, build_wheel

PACKAGES = {"meshd", "meshd_cms", "meshd_naming", "meshd_plugins"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


def metadata_folder(wheel: zipfile.ZipFile) -> str:
    (name,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    return name


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    names = {name.partition("/")[0] for name in wheel.namelist()}
    assert metadata_folder(wheel).startswith("edge_meshd-")
    assert names == PACKAGES | {metadata_folder(wheel)}


def test_everything_of_the_packages_is_in_it(wheel: zipfile.ZipFile) -> None:
    roots = [ROOT / "meshd", ROOT / "cms", ROOT / "naming", ROOT / "plugins"]
    sources = {
        path.relative_to(root).as_posix()
        for root in roots
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == sources
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_the_command_and_the_built_in_plugins(wheel: zipfile.ZipFile) -> None:
    entry_points = wheel.read(f"{metadata_folder(wheel)}/entry_points.txt").decode()
    assert "meshd = meshd.__main__:main" in entry_points
    for module in [
        line.partition(" = ")[2]
        for line in entry_points.partition("[meshd]")[2].split("\n")
        if " = " in line
    ]:
        path = module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & set(wheel.namelist()), module


def test_licence_and_python(wheel: zipfile.ZipFile) -> None:
    folder = metadata_folder(wheel)
    metadata = HeaderParser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()


def test_no_requirement_and_no_constraint_is_a_url(wheel: zipfile.ZipFile) -> None:
    metadata = HeaderParser().parsestr(wheel.read(f"{metadata_folder(wheel)}/METADATA").decode())
    assert not [
        line for line in metadata.get_all("Requires-Dist", []) if "@" in line or "://" in line
    ]
    constraints = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert constraints
    for line in constraints:
        name, separator, version = line.partition("==")
        assert separator, line
        assert name
        assert version
        assert "@" not in line


def test_every_direct_requirement_is_constrained() -> None:
    def canonical(name: str) -> str:
        return name.lower().replace("_", "-").replace(".", "-")

    pinned = {
        canonical(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    wanted = [
        *project["dependencies"],
        *(
            requirement
            for extra in project["optional-dependencies"].values()
            for requirement in extra
        ),
        *document["dependency-groups"]["dev"],
    ]
    names = {
        canonical(requirement.replace("[", "=").replace(">", "=").partition("=")[0])
        for requirement in wanted
    }
    assert names <= pinned, names - pinned


def test_no_file_names_a_place_of_one_machine() -> None:
    files = [
        ROOT / "constraints.txt",
        ROOT / "pyproject.toml",
        ROOT / "Makefile",
        *(ROOT / "deploy").iterdir(),
    ]
    for path in files:
        if path.is_file():
            assert str(ROOT) not in path.read_text(), path
