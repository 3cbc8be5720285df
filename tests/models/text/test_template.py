"""Templates written in the idioms of the families, and hostile ones. The oracle is transformers' own renderer."""

from __future__ import annotations

import time
from typing import Any

import pytest

from offload.errors import UsageError
from offload.models.text.template import render

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' + (call.function.arguments | tojson) + "}" }}
        {%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] in ["user", "assistant"] and "tool_calls" not in message %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message["content"] %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = """{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}
<|system|>
{{ message['content'] }}<|end|>
{% elif message['role'] in ('user', 'assistant') %}
<|{{ message['role'] }}|>
{{ message['content'] }}<|end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% else %}
{{ eos_token }}{% endif %}"""
QWEN3 = """{%- if tools %}
    {{- "<|im_start|>system\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" + (tool | tojson) }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and thought %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n' ~ (call.function | tojson) ~ '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
SMOLLM3 = """{%- set mode = "/think" if (enable_thinking | default(true)) else "/no_think" -%}
{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {% generation %}{{ turn("assistant", message.content) }}{% endgeneration %}
    {%- else -%}
        {%- set text = message.content.replace("/no_think", "").replace("/think", "").rstrip() -%}
        {{ turn(message.role, text ~ " " ~ mode) }}
    {%- endif -%}
    {%- if loop.index > 50 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\n" }}
{%- endif -%}
"""
GRANITE = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge Cutoff Date: April 2024.\nToday is 2026." %}
    {%- if tools and documents %}
        {%- set system_message = system_message + " Both." %}
    {%- elif tools %}
        {%- set system_message = system_message + " Tools." %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}
{%- if tools is iterable and tools | length > 0 %}
    {{- '<|start_of_role|>tools<|end_of_role|>' + tools|tojson(indent=4) + '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in loop_messages %}
    {%- for key, value in message.items() if key == 'content' %}
        {{- '<|start_of_role|>' ~ message['role'] ~ '<|end_of_role|>' ~ value ~ '<|end_of_text|>\n' }}
    {%- else %}
        {{- raise_exception('no content') }}
    {%- endfor %}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi3": PHI3,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
}

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "sums <é> & 'x'", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [True, None]}}}


def said(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


CONVERSATIONS: list[tuple[list[dict[str, object]], dict[str, Any]]] = [
    ([said("user", "Hi <b>&\n")], {}),
    ([said("system", "Be é brief. "), said("user", " Hi\n"), said("assistant", "Yo "), said("user", "2 /think")], {}),
    (
        [said("user", "a"), said("assistant", "<think>\nx\n</think>\n\nb"), said("user", "c")],
        {"enable_thinking": False},
    ),
    ([said("user", "a"), said("assistant", "b", reasoning_content="why")], {"enable_thinking": True}),
    ([said("user", "1+1"), said("assistant", "", tool_calls=[CALL]), said("user", "?")], {"tools": [TOOL]}),
    ([said("user", "a"), said("user", "b")], {}),
]


def reference(template: str, messages: list[dict[str, object]], prompt: bool, more: dict[str, Any]) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=prompt, **{"tools": None, **SPECIAL, **more}
        )
    except Exception:
        return None
    return str(texts[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
def test_parity_with_transformers(name: str, index: int) -> None:
    messages, more = CONVERSATIONS[index]
    prompt = index % 2 == 0
    expected = reference(TEMPLATES[name], messages, prompt, more)
    variables = {key: value for key, value in more.items() if key != "tools"}
    try:
        text = render(
            TEMPLATES[name],
            messages,
            add_generation_prompt=prompt,
            tools=more.get("tools"),
            special_strings=SPECIAL,
            variables=variables,
        )
    except UsageError:
        assert expected is None
    else:
        assert text == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 8589934592 }}",
        "{{ 'a' * 900000000 }}",
        "{{ ('a' * 100000000)|length }}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
        "{{ ('a' * 100000)|replace('a', 'b' * 100000)|length }}",
        "{{ range(10000)|join('a' * 100000)|length }}",
        "{{ '%9999999999d'|format(1)|length }}",
        "{{ range(10000000000)|list|length }}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 2) }}{% endmacro %}{{ f(0) }}",
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['sys'].exit() }}",
        "{{ messages|tojson(indent=999999999) }}",
        "{% for i in range(99) %}{% for m in messages %}{{ 'x' * 999999 }}{% endfor %}{% endfor %}",
        "{% unclosed",
        "x" * 2_000_000,
    ],
)
@pytest.mark.timeout(30)
def test_a_hostile_template_ends_in_one_line(template: str) -> None:
    with pytest.raises(UsageError, match=r"^chat template: [^\n]*$"):
        render(template, [said("user", "hi")])


def test_attributes_of_python_do_not_exist() -> None:
    assert render("[{{ ''.__class__ }}{{ raise_exception.__globals__ }}{{ messages.__class__ }}]", []) == "[]"


def test_a_refusal_is_in_the_words_of_the_template() -> None:
    with pytest.raises(UsageError, match=r"^chat template: roles must alternate$"):
        render("{{ raise_exception('roles must\nalternate') }}", [])


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('\x1b[2J' ~ 'x' * 999) }}", "{{ '\x1b[2J'|no_filter }}", "{% \x1b[2J %}"]
)
def test_its_words_cannot_write_over_the_screen(source: str) -> None:
    with pytest.raises(UsageError) as caught:
        render(source, [])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_without_a_template_the_error_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="no chat template: use `run`"):
        render(None, [])


def test_messages_must_be_plain_values() -> None:
    with pytest.raises(UsageError, match="plain JSON"):
        render(CHATML, [said("user", "x", image=object())])


def test_the_date_comes_from_the_clock() -> None:
    assert render("{{ strftime_now('%Y-%m') }}", []) == time.strftime("%Y-%m")


def test_a_long_conversation_fits_the_limits() -> None:
    messages = [said("user" if i % 2 == 0 else "assistant", "word " * 1000) for i in range(201)]
    text = render(QWEN3, messages)
    assert text == reference(QWEN3, messages, True, {})
