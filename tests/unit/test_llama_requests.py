"""What a request may ask for, what a configuration may say, and when a worker starts again."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from meshd_plugins.api import BadRequest, Operation, PluginConfigError, Value
from meshd_plugins.builtin.llama.config import locate_model, read_config
from meshd_plugins.builtin.llama.running.restarts import CRASHES_MAX, RestartPolicy
from meshd_plugins.builtin.llama.sampling import SEEDS, Sampling, read_sampling
from meshd_plugins.builtin.llama.serving.requests import worker_message

MESSAGES = [{"role": "user", "content": "hi"}]


def test_nothing_given_means_the_defaults() -> None:
    assert read_sampling({}, default_seed=7) == Sampling(seed=7)
    assert read_sampling({"temperature": None, "stop": None}, 7) == Sampling(seed=7)


def test_everything_given_is_taken_and_survives_the_wire() -> None:
    body: dict[str, Value] = {
        "seed": -1,
        "max_completion_tokens": 9,
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "min_p": 0.5,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repeat_penalty": 1,
        "stop": ["a", "b"],
        "logit_bias": {"12": -100},
        "unheard_of": 1,
    }
    sampling = read_sampling(body, 7)
    assert sampling == Sampling(
        SEEDS - 1, 9, 0.0, 1.0, 0, 0.5, -2.0, 2.0, 1.0, ("a", "b"), ((12, -100.0),)
    )
    assert Sampling.from_wire(sampling.to_wire()) == sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 1.1),
        ("top_k", 1.5),
        ("min_p", -1),
        ("seed", 2**63),
        ("presence_penalty", 3),
        ("repeat_penalty", 0),
        ("stop", [""]),
        ("stop", 5),
        ("stop", ["x"] * 17),
        ("logit_bias", {"hello": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", [1]),
        ("n", 2),
        ("functions", [{"name": "f"}]),
        ("echo", True),
        ("logprobs", "yes"),
        ("logprobs", 21),
        ("top_logprobs", 3),
    ],
)
def test_a_bad_parameter_is_named(name: str, value: Value) -> None:
    with pytest.raises(BadRequest, match=name):
        read_sampling({name: value}, 7)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [1]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "wizard", "content": ""}]}, r"messages\[0\]\.role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
        ({"messages": MESSAGES * 1025}, "the most is 1024"),
    ],
)
def test_bad_messages_say_which(body: Mapping[str, Value], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        worker_message(Operation.CHAT, body)


def test_text_parts_are_joined_and_developer_means_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = worker_message(
        Operation.CHAT, {"messages": [{"role": "developer", "content": parts}]}
    )
    assert message["messages"] == [{"role": "system", "content": "ab"}]


def test_probabilities_are_asked_for_in_two_ways() -> None:
    assert read_sampling({"logprobs": True}, 7).logprobs == 0
    assert read_sampling({"logprobs": True, "top_logprobs": 5}, 7).logprobs == 5
    assert read_sampling({"logprobs": 3}, 7).logprobs == 3
    assert read_sampling({"logprobs": False, "top_logprobs": 0}, 7).logprobs is None


def test_repetition_is_not_punished_where_a_form_is_asked_for() -> None:
    assert read_sampling({}, 7).penalises
    assert not read_sampling({}, 7, structured=True).penalises
    assert read_sampling({"repeat_penalty": 1.2}, 7, structured=True).repeat_penalty == 1.2


def test_a_completion_needs_a_prompt() -> None:
    with pytest.raises(BadRequest, match="prompt"):
        worker_message(Operation.COMPLETE, {"prompt": ""})


def model(**changes: Value) -> dict[str, Value]:
    return {"models": [{"path": "/x.gguf", "names": ["knowledge.gpt/general"], **changes}]}


def test_a_model_needs_little() -> None:
    [config] = read_config(model())
    assert (config.path, config.names, config.slots) == ("/x.gguf", ("knowledge.gpt/general",), 0)
    assert read_config({}) == ()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"model": []}, "did you mean 'models'"),
        ({"models": "x"}, "must be a list"),
        ({"models": ["x"]}, r"models\[0\] must be a table"),
        (model(contxt=1), "did you mean 'context'"),
        (model(path="relative.gguf"), "absolute path"),
        (model(path=5), "absolute path"),
        (model(names="knowledge.gpt/x"), "give a list"),
        (model(names=[]), "give a list"),
        (model(names=["a", "a"]), "twice"),
        (model(slots=-1), "slots is -1"),
        (model(context=True), "context is True"),
        (model(threads="all"), "threads is 'all'"),
        (model(privacy="cloud"), "local, lan, mesh"),
        (model(family=1), "family"),
        (model(keep="always"), "keep is 'always': one of loaded, demand"),
        (model(flash_attention=True), "one of auto, on, off"),
        (model(lora="/a.gguf"), "must be a list of at most"),
        (model(lora=[{"path": "/a", "scal": 1}]), r"lora\[0\] has the unknown key 'scal'"),
        (model(lora=[{"path": "/a", "scale": "x"}]), "a number from -100 to 100"),
    ],
)
def test_a_bad_configuration_names_the_key(table: Mapping[str, Value], words: str) -> None:
    with pytest.raises(PluginConfigError, match=words):
        read_config(table)


def test_a_package_that_is_not_there_or_has_no_model() -> None:
    assert locate_model("/x.gguf") == Path("/x.gguf")
    with pytest.raises(PluginConfigError, match="pip install no-such-thing"):
        locate_model("pypi:no-such-thing")
    with pytest.raises(PluginConfigError, match="0 GGUF files"):
        locate_model("pypi:trio")


def test_restarts_back_off_up_to_a_minute() -> None:
    policy = RestartPolicy()
    waits = [policy.crashed(now_s=1000.0 * n, served_s=1.0) for n in range(8)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert policy.crashed(now_s=10_000.0, served_s=100.0) == 1.0


def test_a_crash_loop_is_given_up() -> None:
    policy = RestartPolicy()
    waits = [policy.crashed(now_s=10.0 * n, served_s=1.0) for n in range(CRASHES_MAX)]
    assert waits[:-1] == [1.0, 2.0, 4.0, 8.0]
    assert waits[-1] is None
