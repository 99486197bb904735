"""Images and sound for servers that run already: passed on where their models take them in, and checked before."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.shell.support_adopt import adopting, ask, text_of
from tests.shell.support_adopt_servers import (
    LLAMA_SERVER_PROPS,
    FakeServer,
    Ollama,
    OllamaModel,
    answering,
    llama_server,
    vllm,
)
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

from meshd_plugins.api import BadRequest, Operation, PluginConfigError, Request, Value
from meshd_plugins.builtin.adopt.config import read_settings
from meshd_plugins.testing import make_request


def chat(*parts: Value, role: str = "user") -> Request:
    messages: list[Value] = [{"role": role, "content": list(parts)}]
    return make_request(Operation.CHAT, {"messages": messages})


def hearing() -> FakeServer:
    server = llama_server()
    told: dict[str, Value] = {"vision": True, "video": True, "audio": True}
    server.routes["GET /props"] = answering({**LLAMA_SERVER_PROPS, "modalities": told})
    return server


@pytest.mark.parametrize(
    ("server", "settings", "takes"),
    [
        (hearing(), {}, ("text", "image", "audio")),
        (Ollama(OllamaModel("llava:7b", capabilities=("completion", "vision"))), {}, None),
        (vllm("Qwen-VL-2B"), {"modalities": {"*-VL-*": ["image"]}}, None),
    ],
    ids=["llama-server", "ollama", "vllm"],
)
def test_a_picture_goes_on_as_it_came(
    tmp_path: Path,
    server: FakeServer,
    settings: dict[str, Value],
    takes: tuple[str, ...] | None,
) -> None:
    asked = chat(text_part("What is it?"), image_part(png()), image_part(jpeg(1_000_000), "jpeg"))

    async def main() -> None:
        async with adopting(server, tmp_path, **settings) as adopted:
            capability = adopted.only()
            assert capability.descriptor.model is not None
            assert capability.descriptor.model.modalities == (takes or ("text", "image"))
            assert text_of(await ask(capability, asked)) == "Hello"
            sent = server.last("POST /v1/chat/completions").body["messages"]
            assert sent == asked.body["messages"]

    trio.run(main)


def test_sound_goes_on_as_it_came(tmp_path: Path) -> None:
    server, asked = hearing(), chat(audio_part(wav()))

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            assert text_of(await ask(adopted.only(), asked)) == "Hello"
            sent = server.last("POST /v1/chat/completions").body["messages"]
            assert sent == asked.body["messages"]

    trio.run(main)


URL: Value = {"type": "image_url", "image_url": {"url": "http://192.168.1.1/admin"}}


@pytest.mark.parametrize(
    ("part", "words", "code"),
    [
        (URL, "fetches nothing", "unsupported_parameter"),
        ({"type": "file", "file": {"file_id": "x"}}, "a part is text", "unsupported_modality"),
        ({"type": "input_image", "image_url": "http://a"}, "a part is", "unsupported_modality"),
        (audio_part(wav()), "reads text and image only", "unsupported_modality"),
        (image_part(b"<svg/>"), "first bytes", "unsupported_parameter"),
        ("text", "a part is text", "unsupported_modality"),
    ],
)
def test_a_server_is_never_told_to_fetch_something(
    tmp_path: Path, part: Value, words: str, code: str
) -> None:
    server = Ollama(OllamaModel("llava:7b", capabilities=("completion", "vision")))

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            with pytest.raises(
                BadRequest, match=rf"messages\[0\].content\[1\].*{words}"
            ) as refused:
                await ask(adopted.only(), chat(text_part("What?"), part))
            assert refused.value.code == code
            with pytest.raises(BadRequest, match="more than 16"):
                await ask(adopted.only(), chat(*[image_part(png())] * 17))
            assert "POST /v1/chat/completions" not in server.lines()

    trio.run(main)


def test_what_is_no_base64_far_behind_is_not_sent(tmp_path: Path) -> None:
    server = Ollama(OllamaModel("llava:7b", capabilities=("completion", "vision")))
    whole = image_part(jpeg(1_000_000), "jpeg")["image_url"]
    assert isinstance(whole, dict)
    broken: Value = {"type": "image_url", "image_url": {"url": f'{str(whole["url"])[:-8]}"}},AAA'}}
    smuggled: Value = {
        "type": "image_url",
        "image_url": {"url": f"{str(whole['url'])[:-8]}\u0130AAAAAAA"},
    }

    async def main() -> None:
        async with adopting(server, tmp_path) as adopted:
            for part in (broken, smuggled):
                with pytest.raises(BadRequest, match=r"content\[1\].image_url.url: is not base64"):
                    await ask(adopted.only(), chat(text_part("What?"), part))
            assert "POST /v1/chat/completions" not in server.lines()

    trio.run(main)


@pytest.mark.parametrize("value", [["image"], {"*": "image"}, {"*": ["text"]}, {"*": [["image"]]}])
def test_a_wrong_setting_is_named(value: Value) -> None:
    with pytest.raises(PluginConfigError, match=r"servers\[0\].modalities"):
        read_settings({"servers": [{"url": "http://127.0.0.1:1", "modalities": value}]})
    none: Value = {"*": list[Value]()}
    [server] = read_settings(
        {"servers": [{"url": "http://127.0.0.1:1", "modalities": none}]}
    ).servers
    assert server.modalities_of("llava", ("text", "image")) == ("text",)
