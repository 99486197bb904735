import pytest

from meshd_plugins.builtin.llama.prompt import template as template_module
from meshd_plugins.builtin.llama.prompt.template import ChatTemplate, TemplateError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render(source: str, content: str = "hi") -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        [{"role": "user", "content": content}]
    )


def test_a_conversation_is_rendered() -> None:
    assert render(CHATML, " hi {{ 1 }} ") == "<s><|user|>hi {{ 1 }}\n<|assistant|>"


def test_what_templates_of_the_field_use_is_there() -> None:
    source = "{% for m in messages %}{% if loop.first %}{{ m | tojson }}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
    assert render(source).startswith('{"role": "user", "content": "hi"}2')


def test_what_marks_an_answer_for_training_is_passed_over() -> None:
    marked = (
        "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}"
    )
    assert render(marked) == "<hi>"


def test_what_a_filter_yields_is_a_list_in_json() -> None:
    assert render("{{ messages | map(attribute='role') | tojson }}") == '["user"]'
    with pytest.raises(TemplateError, match="no value of JSON"):
        render("{{ cycler | tojson }}")


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 10 ** 10000000 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ range(10000000) | list }}",
        "{{ 1.5 | round(100000000, 'ceil') }}",
        "{{ 5 | round(-100000000) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.__init__.__globals__ }}",
        "{% import 'x' as y %}",
        "{% from '/etc/passwd' import y %}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum(n=100000) }}{{ lipsum(n=100000) }}{{ lipsum(n=100000) }}",
    ],
)
def test_a_hostile_or_broken_template_is_only_an_error(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''.format.__self__ }}",
        "{{ strftime_now('%9999999999d') }}",
    ],
)
def test_the_inside_of_things_is_empty(source: str) -> None:
    assert render(source) == ""


def test_a_number_is_rounded() -> None:
    assert render("{{ 2.345 | round(2) }} {{ 2.5 | round(method='floor') }}") == "2.35 2.0"


def test_a_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "RENDER_S", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="takes longer"):
        render(loops)


def test_a_huge_template_is_not_compiled() -> None:
    with pytest.raises(TemplateError, match="characters"):
        render("x" * 300_000)
