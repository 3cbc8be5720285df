"""The slash commands of a chat. Each takes the chat and the rest of the line, and says something or changes something."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from offload.cli.chat_files import chat_path, load_chat, save_chat
from offload.cli.chat_state import PARAMETERS, Conversation
from offload.cli.report import statistics_lines
from offload.cli.text import check_text
from offload.config import SamplingConfig
from offload.errors import UsageError
from offload.units import format_rate, format_size

if TYPE_CHECKING:
    from offload.engine import Engine


class Chat(Protocol):
    """What commands need of the chat they run in."""

    engine: Engine
    conversation: Conversation
    leaving: bool

    def say(self, text: str) -> None: ...
    def respond(self) -> None: ...


Command = Callable[[Chat, str], None]


def run_command(chat: Chat, line: str) -> None:
    """Run `/name rest`.

    Raises:
        UsageError: no such command, or a wrong argument. OffloadError: what the command met.
    """
    name, _, rest = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        raise UsageError(f"no command /{name}; /help lists them")
    command(chat, rest.strip())


def show_help(chat: Chat, rest: str) -> None:
    """/help                   this list"""
    del rest
    lines = [(command.__doc__ or "").strip() for command in COMMANDS.values()]
    keys = [
        '"""                     starts and ends a message of several lines',
        "Ctrl-C                  stops an answer",
    ]
    chat.say("\n".join([*lines, *keys]))


def set_system(chat: Chat, rest: str) -> None:
    """/system TEXT            set the system message; without TEXT, remove it"""
    chat.conversation.system = check_text("/system", rest)
    chat.say("system message set" if rest else "system message removed")


def set_parameter(chat: Chat, rest: str) -> None:
    """/set NAME VALUE         set a parameter, such as temperature 0.2; VALUE default resets it"""
    name, _, value = rest.removeprefix("parameter ").strip().partition(" ")
    if not name:
        show_parameters(chat)
    elif name == "system":
        set_system(chat, value.strip())
    elif not value.strip():
        raise UsageError(f"/set {name}: give a value, or default")
    else:
        new = chat.conversation.set(name, value.strip())
        chat.say(f"{name} = {'default' if new is None else new}")


def show(chat: Chat, rest: str) -> None:
    """/show WHAT              info, parameters, system, template or plan"""
    section = SECTIONS.get(rest or "info")
    if section is None:
        raise UsageError(f"/show {rest}: choose one of {', '.join(SECTIONS)}")
    section(chat)


def save(chat: Chat, rest: str) -> None:
    """/save NAME              save the chat under a name or a path"""
    if not rest:
        raise UsageError("/save: give a name or a path")
    path = chat_path(rest)
    replaces = path.exists()
    save_chat(path, chat.conversation.prompt(), model=chat.engine.model_name, options=chat.conversation.options)
    chat.say(f"saved to {path}{', in place of the chat that was there' if replaces else ''}")


def load(chat: Chat, rest: str) -> None:
    """/load NAME              go on with a saved chat"""
    if not rest:
        raise UsageError("/load: give a name or a path")
    chat.conversation.restore(*load_chat(chat_path(rest)))
    chat.say(f"{len(chat.conversation.messages)} messages loaded")


def regenerate(chat: Chat, rest: str) -> None:
    """/regen                  answer the last question anew"""
    del rest
    question = chat.conversation.take_back()
    if question is None:
        raise UsageError("/regen: there is no answer yet")
    chat.conversation.ask(question)
    chat.respond()


def clear(chat: Chat, rest: str) -> None:
    """/clear                  forget the conversation; the system message and the parameters stay"""
    del rest
    chat.conversation.messages.clear()
    chat.say("conversation cleared")


def statistics(chat: Chat, rest: str) -> None:
    """/stats                  speed, traffic and memory since the model was loaded"""
    del rest
    chat.say("\n".join(statistics_lines(chat.engine.statistics(), chat.engine.plan.model_bytes)))


def leave(chat: Chat, rest: str) -> None:
    """/bye                    leave; Ctrl-D does the same"""
    del rest
    chat.leaving = True


def show_info(chat: Chat) -> None:
    """Name, size and context of the model."""
    plan = chat.engine.plan
    chat.say(f"{chat.engine.model_name}: {format_size(plan.model_bytes)}, context {chat.engine.ctx} tokens")


def show_parameters(chat: Chat) -> None:
    """Every parameter with its value; those that were set are marked."""
    defaults = SamplingConfig()
    options = chat.conversation.options
    lines = []
    for name in PARAMETERS:
        default = getattr(defaults, name, None)
        value = f"{options[name]!r}  (set)" if name in options else "-" if default is None else default
        lines.append(f"{name:<22} {value}")
    chat.say("\n".join(lines))


def show_system(chat: Chat) -> None:
    """The system message."""
    chat.say(chat.conversation.system or "no system message")


def show_template(chat: Chat) -> None:
    """Source of the chat template."""
    tokenizer = chat.engine.tokenizer
    template = tokenizer.template if tokenizer is not None else None
    chat.say(template or "the model brings no chat template")


def show_plan(chat: Chat) -> None:
    """The plan in one line; `offload plan` draws it."""
    plan = chat.engine.plan
    rates = ", ".join(f"{edge} {format_rate(bps)}" for edge, bps in plan.edges.items())
    read = plan.streamed_bytes_at(0)
    place = "in memory" if plan.device_budget_bytes is None else "in memory or on the device"
    chat.say(
        f"budget {format_size(plan.budget_bytes)}: {format_size(max(0, plan.model_bytes - read))} "
        f"of {format_size(plan.model_bytes)} {place}, {format_size(read)} read from disk per token ({rates}); "
        f"about {plan.predicted_tps:.3g} tok/s, bound by {plan.bound}"
    )


SECTIONS: Final = {
    "info": show_info,
    "parameters": show_parameters,
    "system": show_system,
    "template": show_template,
    "plan": show_plan,
}
COMMANDS: Final[dict[str, Command]] = {
    "help": show_help,
    "system": set_system,
    "set": set_parameter,
    "show": show,
    "save": save,
    "load": load,
    "regen": regenerate,
    "clear": clear,
    "stats": statistics,
    "bye": leave,
}
ALIASES: Final = {"?": "help", "exit": "bye", "quit": "bye"}
