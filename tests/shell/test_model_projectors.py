"""Projectors in the library: brought with their model, compared with it, and gone with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.shell.support_library import run, shelf, state_in
from tests.shell.support_models import (
    Asked,
    Honest,
    Hub,
    adapter,
    digest,
    encoder,
    head,
    model,
    projector,
    reading_model,
)

from meshd_plugins.api import BadRequest, Failed, Value

pytest.importorskip("llama_cpp", reason="adding needs llama-cpp-python, if only to be there")

WIDTH = 64
MODEL, PROJECTOR = reading_model(WIDTH, 50_000), projector(WIDTH)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return state_in(tmp_path, monkeypatch)


def serving(**files: bytes) -> Hub:
    """A hub with files by their stems."""

    def answer(asked: Asked) -> object:
        return Honest(files[asked.path.rsplit("/", 1)[-1].removesuffix(".gguf")])(asked)

    return Hub(answer)  # type: ignore[arg-type]


def test_a_model_comes_with_its_projector_and_both_go_together(state: Path) -> None:
    async def body() -> None:
        with serving(see=MODEL, mmproj=PROJECTOR) as hub:
            async with shelf(state) as here:
                wanted: dict[str, Value] = {
                    "source": f"{hub.url}/see.gguf",
                    "projector": f"{hub.url}/mmproj.gguf",
                    "allow_http": True,
                }
                done = await here.do("add", **wanted)
                assert (done["id"], done["modalities"]) == ("see", ["text", "image"])
                assert {"see", "mmproj"} == {str(item["id"]) for item in here.items[:-1]}
                rows = await here.rows()
                assert rows["mmproj"]["state"] == "projector of see"
                assert rows["mmproj"]["reason"] == ""
                [beside, entry] = here.library.entries()
                assert (beside.names, beside.served) == ((), False)
                assert entry.config.projector == str(state / "models" / "mmproj.gguf")
                assert entry.config.projector_sha256 == digest(PROJECTOR)
                assert "see" in await here.refused("remove", "in_use", id="mmproj")
                done = await here.do("verify")
                assert [row["sound"] for row in done["models"]] == [True, True]
            async with shelf(state) as again:
                [_, entry] = again.library.entries()
                assert entry.facts is not None
                assert entry.facts.modalities == ("text", "image")
                done = await again.do("remove", id="see")
                assert done["with"] == ["mmproj"]
                assert done["freed_bytes"] == len(MODEL) + len(PROJECTOR)
                assert (again.files, again.library.entries()) == ([], ())

    run(body)


def test_one_that_another_model_uses_stays(state: Path, tmp_path: Path) -> None:
    (tmp_path / "p.gguf").write_bytes(PROJECTOR)
    (tmp_path / "a.gguf").write_bytes(MODEL)
    (tmp_path / "b.gguf").write_bytes(MODEL + b"\0")

    async def body() -> None:
        async with shelf(state) as here:
            await here.do("add", source=str(tmp_path / "p.gguf"))
            row = (await here.rows())["p"]
            assert (row["kind"], row["modalities"]) == ("projector", ["text", "image"])
            assert "--projector p" in row["reason"]
            await here.do("add", source=str(tmp_path / "a.gguf"), projector="p")
            await here.do(
                "add", source=str(tmp_path / "b.gguf"), projector=str(tmp_path / "p.gguf")
            )
            assert [entry.id for entry in here.library.entries()] == ["a", "b", "p"]
            assert (await here.rows())["p"]["state"] == "projector of a, b"
            assert (await here.do("remove", id="a"))["with"] == []
            assert (await here.do("remove", id="b"))["with"] == ["p"]
            assert (tmp_path / "p.gguf").read_bytes() == PROJECTOR
            with pytest.raises(BadRequest, match="no projector 'p' here"):
                await here.do("add", source=str(tmp_path / "a.gguf"), projector="p")

    run(body)


def test_one_for_another_model_is_refused_and_leaves_what_was_fetched(state: Path) -> None:
    async def body() -> None:
        with serving(see=MODEL, wide=projector(2048), fits=PROJECTOR) as hub:
            async with shelf(state) as here:
                wanted: dict[str, Value] = {"source": f"{hub.url}/see.gguf", "allow_http": True}
                told = await here.refused(
                    "add", "projector_mismatch", **wanted, projector=f"{hub.url}/wide.gguf"
                )
                assert "for models with 2,048 values an embedding, and the model has 64" in told
                assert here.library.entries() == ()
                assert (await here.rows())["see"]["state"] == "stopped", "it need not come again"
                asked = len(hub.asked)
                await here.do("add", **wanted, projector=f"{hub.url}/fits.gguf")
                assert [each.path for each in hub.asked[asked:] if each.begin == 0] == [
                    "/fits.gguf"
                ]
                assert [entry.id for entry in here.library.entries()] == ["fits", "see"]

    run(body)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (model(), "no projector but a model of the architecture 'llama'"),
        (adapter(), "no projector but an adapter"),
        (b"MZ" * 99, "no GGUF"),
    ],
)
def test_another_file_is_found_before_the_model_is_fetched(
    state: Path, content: bytes, words: str
) -> None:
    async def body() -> None:
        with serving(see=MODEL, other=content) as hub:
            async with shelf(state) as here:
                with pytest.raises(Exception, match=words):
                    await here.do(
                        "add",
                        source=f"{hub.url}/see.gguf",
                        projector=f"{hub.url}/other.gguf",
                        allow_http=True,
                    )
                assert {each.path for each in hub.asked} == {"/other.gguf"}
                assert (here.files, here.library.entries()) == ([], ())

    run(body)


def test_a_model_that_makes_vectors_has_no_use_for_one(state: Path, tmp_path: Path) -> None:
    (tmp_path / "p.gguf").write_bytes(PROJECTOR)
    (tmp_path / "e.gguf").write_bytes(encoder(1))

    async def body() -> None:
        async with shelf(state) as here:
            both: dict[str, Value] = {
                "source": str(tmp_path / "e.gguf"),
                "projector": str(tmp_path / "p.gguf"),
            }
            assert "vectors" in await here.refused("add", "projector_mismatch", **both)
            assert here.library.entries() == ()
            told = await here.refused("add", "bad_request", **both, options={"split": ["b"]})
            assert "a split model reads text only" in told
            told = await here.refused("add", "bad_request", **both, options={"embeddings": True})
            assert "makes vectors" in told

    run(body)


def test_a_model_that_fails_to_come_leaves_its_projector_for_the_next_try(state: Path) -> None:
    def missing(_asked: Asked) -> list[bytes]:
        return [head(404, Content_Length=0)]

    async def body() -> None:
        with Hub(Honest(PROJECTOR), missing, Honest(MODEL)) as hub:
            wanted: dict[str, Value] = {
                "source": f"{hub.url}/see.gguf",
                "projector": f"{hub.url}/mmproj.gguf",
                "allow_http": True,
            }
            async with shelf(state) as here:
                with pytest.raises(Failed, match="404"):
                    await here.do("add", **wanted)
                assert set(await here.rows()) == {"mmproj"}
                done = await here.do("add", **wanted)
                assert done["modalities"] == ["text", "image"]
                assert [each.path for each in hub.asked] == ["/mmproj.gguf", *["/see.gguf"] * 2]

    run(body)


def test_the_digest_of_a_projector_is_compared(state: Path) -> None:
    async def body() -> None:
        with serving(see=MODEL, mmproj=PROJECTOR) as hub:
            async with shelf(state) as here:
                wanted: dict[str, Value] = {
                    "source": f"{hub.url}/see.gguf",
                    "sha256": digest(MODEL),
                    "projector": f"{hub.url}/mmproj.gguf",
                }
                assert "http is open" in await here.refused("add", "bad_request", **wanted)
                wrong: Value = {"projector_sha256": "00" * 32}
                await here.refused("add", "digest_mismatch", **wanted, options=wrong)
                assert here.files == []
                right: Value = {"projector_sha256": digest(PROJECTOR).upper()}
                await here.do("add", **wanted, options=right)

    run(body)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (encoder(1), "computation.gpt/embed"),
        (encoder(4), "computation.gpt/rerank"),
        (MODEL, "knowledge.gpt/general"),
    ],
)
def test_a_model_without_a_name_gets_that_of_its_kind(
    state: Path, tmp_path: Path, content: bytes, name: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(content)

    async def body() -> None:
        async with shelf(state) as here:
            source = str(tmp_path / "m.gguf")
            assert (await here.do("add", source=source))["names"] == [name]
            await here.do("remove", id="m")
            done = await here.do("add", source=source, names=["knowledge.gpt/x"])
            assert done["names"] == ["knowledge.gpt/x"]
            await here.do("remove", id="m")
            if content is MODEL:
                done = await here.do("add", source=source, options={"embeddings": True})
                assert done["names"] == ["computation.gpt/embed"]

    run(body)


def test_an_id_that_the_configuration_gets_later_is_told_and_can_be_given_up(
    state: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(reading_model(WIDTH, len(name)))

    async def body() -> None:
        async with shelf(state) as here:
            await here.do("add", source=str(tmp_path / "one" / "m.gguf"))
            assert here.library.shadowed() == ()
        table: Value = {"path": str(tmp_path / "two" / "m.gguf"), "names": ["knowledge.gpt/y"]}
        async with shelf(state, models=[table]) as again:
            assert again.library.shadowed() == ("m",)
            done = await again.do("list")
            states = {row["origin"]: (row["state"], row["reason"]) for row in done["models"]}
            assert states["configuration"] == ("cold", "")
            assert states["library"][0] == "quarantined"
            assert "another --id" in states["library"][1]
            await again.do("remove", id="m")
            assert again.residents.withdrawn == [], "the one of the configuration goes on"
            assert again.library.shadowed() == ()

    run(body)


@pytest.mark.parametrize("by", ["id", "source"])
def test_a_model_that_is_here_is_given_one_and_then_another(state: Path, by: str) -> None:
    other = projector(WIDTH) + b"\0"

    async def body() -> None:
        with serving(see=MODEL, mmproj=PROJECTOR, other=other) as hub:
            async with shelf(state) as here:
                model: dict[str, Value] = {"source": f"{hub.url}/see.gguf", "allow_http": True}
                done = await here.do("add", **model, names=["knowledge.gpt/x"])
                assert (done["id"], done["modalities"]) == ("see", ["text"])
                wanted: dict[str, Value] = {**model, "source": "see"} if by == "id" else model
                wanted["projector"] = f"{hub.url}/mmproj.gguf"
                done = await here.do("add", **wanted)
                assert (done["id"], done["modalities"]) == ("see", ["text", "image"])
                assert done["names"] == ["knowledge.gpt/x"]
                assert here.residents.withdrawn == ["see"], "it is served anew"
                rows = await here.rows()
                assert rows["mmproj"]["state"] == "projector of see"
                assert rows["see"]["modalities"] == ["text", "image"]
                done = await here.do("add", **{**wanted, "projector": f"{hub.url}/other.gguf"})
                assert done["options"]["projector_sha256"] == digest(other)
                assert set(await here.rows()) == {"see", "other"}, "the first goes"
                fetched = [each.path for each in hub.asked if each.begin == 0]
                assert fetched == ["/see.gguf", "/mmproj.gguf", "/other.gguf"]
            async with shelf(state) as again:
                [_, entry] = again.library.entries()
                assert entry.config.projector == str(state / "models" / "other.gguf")
                assert (await again.do("remove", id="see"))["with"] == ["other"]

    run(body)


def test_one_for_another_model_leaves_the_model_as_it_was(state: Path, tmp_path: Path) -> None:
    (tmp_path / "see.gguf").write_bytes(MODEL)
    (tmp_path / "wide.gguf").write_bytes(projector(2048))
    (tmp_path / "p.gguf").write_bytes(PROJECTOR)
    (tmp_path / "e.gguf").write_bytes(encoder(1))

    async def body() -> None:
        async with shelf(state) as here:
            await here.do("add", source=str(tmp_path / "see.gguf"))
            await here.do("add", source=str(tmp_path / "e.gguf"))
            before = here.library.entries()
            wide, fits = str(tmp_path / "wide.gguf"), str(tmp_path / "p.gguf")
            await here.refused("add", "projector_mismatch", source="see", projector=wide)
            await here.refused("add", "projector_mismatch", source="e", projector=fits)
            wrong: Value = {"projector_sha256": "00" * 32}
            await here.refused(
                "add", "digest_mismatch", source="see", projector=fits, options=wrong
            )
            told = await here.refused(
                "add", "bad_request", source="see", projector=fits, options={"context": 512}
            )
            assert "leave out context" in told
            await here.refused("add", "bad_request", source="see", projector="nothing")
            await here.refused("add", "bad_request", source="nobody", projector=fits)
            assert here.library.entries() == before
            assert here.residents.withdrawn == []

    run(body)
