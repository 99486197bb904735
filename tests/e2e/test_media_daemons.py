"""Real daemons: a picture goes from OpenAI's client to the node that takes pictures in, and arrives as it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.support_looker import NAME, install
from tests.support_daemons import HOST, Daemon, Mesh
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

MESHD = [sys.executable, "-m", "meshd"]
LOCAL = '[gossip]\npreset = "local"\n'
PHOTO = jpeg(5_000_000)


class Pair:
    """The one that is asked has a model for text only; the other one looks at pictures."""

    def __init__(self, mesh: Mesh) -> None:
        self.seeing = mesh.start("seeing", plugins=["looker"], sections=LOCAL)
        self.blind = mesh.start("blind", plugins=["arithmetic"], sections=LOCAL)
        mesh.wait_for_capability(self.blind, NAME)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("media")
    path = os.pathsep.join([str(install(folder / "plugins")), os.environ.get("PYTHONPATH", "")])
    with Mesh(folder, command=["env", f"PYTHONPATH={path}", *MESHD]) as mesh:
        yield Pair(mesh)


@pytest.fixture
def client(pair: Pair) -> Iterator[openai.OpenAI]:
    url = f"http://{HOST}:{pair.blind.http_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as asking:
        yield asking


def user(*parts: Any) -> Any:
    return [{"role": "user", "content": list(parts)}]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def meshd(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*MESHD, "--socket", str(daemon.socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("model", [NAME, "auto", "Looker"])
def test_pictures_arrive_as_they_were(pair: Pair, client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=user(text_part("What?"), image_part(png()), image_part(PHOTO, "jpeg")),
    )
    assert (answer.choices[0].message.content or "").split() == [digest(png()), digest(PHOTO)]
    told = pair.blind.log() + pair.seeing.log()
    assert "ask.finished" in told
    assert "image_url" not in told
    assert b64encode(PHOTO[:30]).decode() not in told


def test_what_nobody_takes_in_is_refused_with_what_there_is(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"takes in sound.*image, text") as caught:
        client.chat.completions.create(model=NAME, messages=user(audio_part(wav())))
    assert caught.value.code == "unsupported_modality"
    with pytest.raises(openai.BadRequestError, match=rf"images; what does: {NAME}") as refused:
        client.chat.completions.create(
            model="knowledge.gpt/arithmetic@blind",
            messages=user(image_part(png())),
        )
    assert refused.value.code == "unsupported_modality"


def test_nothing_is_fetched(pair: Pair, client: openai.OpenAI) -> None:
    part = {"type": "image_url", "image_url": {"url": f"http://{HOST}:{pair.blind.http_port}/"}}
    with pytest.raises(openai.BadRequestError, match="fetches nothing") as caught:
        client.chat.completions.create(model=NAME, messages=user(part))
    assert caught.value.param == "messages[0].content[0].image_url.url"


def test_the_command_line_sends_files_and_shows_who_takes_them(pair: Pair, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(PHOTO)
    asked = meshd(pair.blind, "ask", "auto", "What", "is", "it?", "--image", str(photo))
    assert (asked.returncode, asked.stdout.strip()) == (0, digest(PHOTO))
    photo.write_bytes(jpeg(7_000_000))  # more than http.request_bytes_max, in base64
    asked = meshd(pair.blind, "ask", "auto", "What is it?", "--image", str(photo))
    assert (asked.returncode, "(http.request_bytes_max)" in asked.stderr) == (2, True)
    [row] = [
        row for row in json.loads(meshd(pair.blind, "caps", "--json").stdout) if row["name"] == NAME
    ]
    assert row["modalities"] == ["text", "image"]
    assert "text, image" in meshd(pair.blind, "caps").stdout
    found = meshd(pair.blind, "resolve", f"{NAME}?modality=image")
    assert (found.returncode, "seeing" in found.stdout) == (0, True)
    assert meshd(pair.blind, "resolve", f"{NAME}?modality=audio").returncode != 0


def test_a_mesh_without_a_model_for_pictures_says_so(tmp_path: Path) -> None:
    with Mesh(tmp_path, command=MESHD) as mesh:
        alone = mesh.start("alone", plugins=["arithmetic"], sections=LOCAL)
        picture = tmp_path / "red.png"
        picture.write_bytes(png())
        asked = meshd(alone, "ask", "knowledge.gpt/arithmetic", "2+2", "--image", str(picture))
        assert "takes in images; the models of this mesh take in text" in asked.stderr
        assert asked.returncode == 2
