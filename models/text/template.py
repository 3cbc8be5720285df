"""Chat templates: a conversation to the prompt text that the model was trained on. Knows nothing of tokens.

Templates are untrusted programs. They are rendered by minijinja with fuel in a process of their own (`sandbox.py`), which
costs some 50 ms a turn and bounds time and memory whatever the template does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from offload.errors import BackendError, UsageError
from offload.models.checkpoint.reader import one_line

FUEL: Final = 5_000_000  # instructions; a long conversation through the longest template known takes 200,000
LIMIT_BYTES: Final = 192 * 1024 * 1024
MAX_TEMPLATE_BYTES: Final = 1024 * 1024
MAX_CONVERSATION_BYTES: Final = 16 * 1024 * 1024
TIMEOUT_S: Final = 10.0  # the process is stopped after half a second of computing; this is for a machine that is busy

_SANDBOX: Final = Path(__file__).with_name("sandbox.py")
_GENERATION: Final = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def render(
    template: str | None,
    messages: Sequence[Mapping[str, object]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, object]] | None = None,
    special_strings: Mapping[str, str] | None = None,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The prompt for `messages`, as Hugging Face's `apply_chat_template` gives it.

    Args:
        template: Jinja source, or None where the model has none.
        messages: `{"role", "content"}` each, and what else the template knows (`tool_calls`, `reasoning_content`).
        add_generation_prompt: end with the opening of the assistant's answer.
        tools: JSON schemas of the functions that the model may call.
        special_strings: `bos_token` and its like, from the tokenizer.
        variables: further names that the template knows, such as `enable_thinking`.

    Raises:
        UsageError: no template; or the template refused the conversation, failed, or took too much time or memory.
        BackendError: no process could be started to render in.
    """
    if template is None:
        raise UsageError("the model has no chat template: use `run` (or `generate`) with a raw prompt")
    context = {
        **(special_strings or {}),
        "tools": None if tools is None else list(tools),
        "documents": None,
        **(variables or {}),
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    return _answer_text(_ask_sandbox(_request(template, context)))


def _request(template: str, context: Mapping[str, object]) -> bytes:
    if len(template) > MAX_TEMPLATE_BYTES:
        raise UsageError(f"chat template: {len(template)} characters, at most {MAX_TEMPLATE_BYTES} allowed")
    # {% generation %} marks the assistant's words for training and prints nothing; minijinja does not know the tag
    plain = _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)
    request = {
        "template": plain,
        "context": context,
        "fuel": FUEL,
        "limit_bytes": LIMIT_BYTES,
        "limit_characters": 2 * MAX_CONVERSATION_BYTES,
    }
    try:
        data = json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"messages: only plain JSON values can go through a chat template ({error})") from error
    if len(data) > MAX_CONVERSATION_BYTES:
        raise UsageError(
            f"messages: {len(data)} bytes, at most {MAX_CONVERSATION_BYTES} allowed; shorten the conversation"
        )
    return data


def _ask_sandbox(request: bytes) -> bytes:
    spec = find_spec("minijinja")
    if spec is None or spec.origin is None:
        raise BackendError("minijinja cannot be found: install it with `pip install minijinja`")
    command = [sys.executable, "-I", "-S", str(_SANDBOX), str(Path(spec.origin).parent.parent)]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(f"chat template: not done after {TIMEOUT_S:g} s, stopped; use a raw prompt") from None
    except OSError as error:
        raise BackendError(f"chat template: no process to render it in ({error}); use a raw prompt") from error
    if done.returncode != 0:
        raise UsageError("chat template: it took too much time or memory and was stopped; use a raw prompt")
    return done.stdout


def _answer_text(data: bytes) -> str:
    answer = json.loads(data)
    if "refused" in answer:
        raise UsageError(f"chat template: {one_line(answer['refused'])}")
    if "failed" in answer:
        raise UsageError(f"chat template: it cannot render this conversation ({one_line(answer['failed'])})")
    return str(answer["text"])
