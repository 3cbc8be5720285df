"""A conversation as data: messages, system message, and the options of the next answer. Knows no terminal and no engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Final

from offload.cli.chat_files import Messages
from offload.cli.options import flag_names, text_or_file
from offload.cli.text import check_text
from offload.config import GenerationConfig, SamplingConfig
from offload.errors import UsageError

_SAMPLING: Final = {
    f.name: f.type for f in fields(SamplingConfig) if f.name not in ("logit_bias", "dry_sequence_breakers")
}
_REQUEST: Final = {
    f.name: f.type for f in fields(GenerationConfig) if f.name in ("max_tokens", "stop", "json_schema", "grammar")
}
PARAMETERS: Final = {**_SAMPLING, **_REQUEST}
"""What `/set` accepts, with the annotation of its type."""
_OTHER: Final = {"json_schema": "grammar", "grammar": "json_schema"}  # an answer matches one of the two


@dataclass(slots=True)
class Conversation:
    """`messages` alternate user and assistant; the system message is apart. `options` go to the engine verbatim."""

    messages: Messages = field(default_factory=list)
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> Messages:
        """All messages, the system message first."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.messages

    def ask(self, text: str) -> None:
        """Append what the user said."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Append what the model said; without a text the question is taken back, lest two questions follow each other."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.take_back()

    def take_back(self) -> str | None:
        """Remove the last question and its answer. Returns the question, or None when there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def restore(self, messages: Messages, options: dict[str, Any]) -> None:
        """Take over a saved chat. Options are checked as if typed; unknown ones are refused.

        Raises:
            UsageError: an option that does not exist or has a wrong value. Nothing has changed then.
        """
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        check_options(options)
        self.system = "".join(m["content"] for m in messages[:1] if m["role"] == "system")
        self.messages = [dict(m) for m in messages if m["role"] != "system"]
        self.options = options

    def set(self, name: str, text: str) -> Any:
        """Set an option from text, by its name or the name of its flag; "default" removes it.

        Returns the new value or None.

        Raises:
            UsageError: no such option, or a value that it cannot have. Nothing has changed then.
        """
        name = parameter_name(name)
        if text == "default":
            self.options.pop(name, None)
            return None
        if (other := _OTHER.get(name)) in self.options:
            raise UsageError(
                f"{name}: {other} is set, and an answer matches one of the two; /set {other} default first"
            )
        value = _parse(name, text)
        options = {**self.options, name: value}
        check_options(options)
        self.options = options
        return value


def parameter_name(name: str) -> str:
    """The parameter that is called `name`, or whose flag is.

    Raises:
        UsageError: there is none; the message offers the nearest.
    """
    names = {parameter: parameter for parameter in PARAMETERS} | flag_names()
    plain = name.lstrip("-").replace("-", "_")
    if plain in names:
        return names[plain]
    near = get_close_matches(plain, names, n=1)
    raise UsageError(f"no parameter {name!r}; {f'did you mean {near[0]}?' if near else '/set lists them'}")


def check_options(options: dict[str, Any]) -> None:
    """Raises:
    UsageError: an unknown option, or a value out of its bounds.
    """
    if unknown := options.keys() - PARAMETERS.keys():
        raise UsageError(f"no parameter {min(unknown)!r}; there are {', '.join(PARAMETERS)}")
    sampling = {name: value for name, value in options.items() if name in _SAMPLING}
    request = {name: value for name, value in options.items() if name in _REQUEST}
    try:
        GenerationConfig(**request, sampling=SamplingConfig(**sampling))
    except TypeError as error:
        raise UsageError(f"a parameter has a value of the wrong type ({error})") from error
    try:
        json.loads(request.get("json_schema", "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"json_schema: not valid JSON ({error})") from error


def _parse(name: str, text: str) -> Any:
    kind = str(PARAMETERS[name])
    try:
        if kind.startswith(("int", "Literal")):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except ValueError:
        raise UsageError(f"{name}: {text!r} is not a number") from None
    return (check_text(name, text),) if kind.startswith("tuple") else text_or_file(f"/set {name}", text)
