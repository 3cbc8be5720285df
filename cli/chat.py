"""`offload chat`: a conversation on the terminal, or line by line through a pipe.

    read a message -> command?  run it
                   -> question? stream the answer; Ctrl-C stops the answer and keeps the chat

`run_chat` takes any engine, input and output, which is how it is tested.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from prompt_toolkit.history import History
from rich.console import Console
from rich.text import Text

from offload.cli.chat_commands import COMMANDS, run_command
from offload.cli.chat_files import chat_path, history_path, load_chat
from offload.cli.chat_input import Input, LineHistory, PlainInput, Quoted, TerminalInput, is_interactive
from offload.cli.chat_state import Conversation
from offload.cli.grouping import grouped
from offload.cli.interrupt import interrupt_calls, keys_unseen, signals_unwind
from offload.cli.load_options import LoadOptions
from offload.cli.loading import open_engine
from offload.cli.options import AnswerOptions, DebugOption, ModelArgument, QuietOption, SamplingOptions, was_typed
from offload.cli.progress import Bars, bars_wanted
from offload.cli.render import LiveView, PlainView, View
from offload.cli.status import StatusLine
from offload.cli.text import check_text, printable
from offload.errors import ClosedError, ContextError, OffloadError, UsageError

if TYPE_CHECKING:
    from offload.engine import Engine
    from offload.results import Completion

_STATUS_S: Final = 0.25  # the status line is asked of the engine this often

SystemOption = Annotated[
    str, typer.Option("--system", help="System message.", show_default=False, envvar="OFFLOAD_SYSTEM")
]
ResumeOption = Annotated[str | None, typer.Option("--load", help="Go on with a saved chat.", show_default=False)]


@grouped
def chat(
    load: LoadOptions,
    sampling: SamplingOptions,
    answer: AnswerOptions,
    context: typer.Context,
    model: ModelArgument = None,
    system: SystemOption = "",
    resume: ResumeOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Talk with a model."""
    del debug
    if sys.stdin is None:
        raise UsageError("no questions: standard input is closed")
    conversation = Conversation(system=check_text("--system", system), options={**sampling.given(), **answer.given()})
    if resume is not None:
        messages, options = load_chat(chat_path(resume))
        conversation.restore(messages, {**options, **conversation.options})
        if was_typed(context, "system"):  # its variable is a habit, which a saved chat may depart from
            conversation.system = system
    with Bars(enabled=bars_wanted(quiet=quiet)) as bars, open_engine(model, load, bars) as engine:
        check_template(engine)
        run_chat(engine, conversation, interactive=is_interactive(), quiet=quiet)


def check_template(engine: Engine) -> None:
    """
    Raises:
        UsageError: the model does not say how a conversation is written.
    """
    if engine.tokenizer is not None and engine.tokenizer.template is None:
        raise UsageError(
            f"{engine.model_name} has no chat template: it completes texts and does not converse; use `offload run`"
        )


def run_chat(engine: Engine, conversation: Conversation, *, interactive: bool, quiet: bool = False) -> None:
    """Chat with `engine` until the input ends or `/bye`.

    Interactive: an editing prompt, a live status line, and errors that do not end the chat unless they end the engine.
    Otherwise: one question a line, answers on stdout, and the first error is raised.
    """
    session = ChatSession(engine, conversation, interactive=interactive)
    if interactive and not quiet:
        session.say(f"{engine.model_name} · /help lists the commands")
    source = _terminal_input(session) if interactive else PlainInput(sys.stdin)
    with signals_unwind():
        session.converse(source)


class ChatSession:
    """One conversation with one engine. Implements `chat_commands.Chat`."""

    def __init__(self, engine: Engine, conversation: Conversation, *, interactive: bool) -> None:
        self.engine = engine
        self.conversation = conversation
        self.leaving = False
        self._interactive = interactive
        self._console = Console(highlight=False)

    def say(self, text: str) -> None:
        """A note of the program, apart from what the model says."""
        if self._interactive:
            self._console.print(Text(printable(text), style="dim"))
        else:
            typer.echo(text, err=True)

    def converse(self, source: Input) -> None:
        """Read and answer until the source ends or a command leaves."""
        while not self.leaving and (text := source.read()) is not None:
            if not text.strip():
                continue
            try:
                self._handle(text)
            except OffloadError as error:
                if not self._interactive or isinstance(error, ClosedError):
                    raise
                self.say(f"error: {error}")

    def _handle(self, text: str) -> None:
        if text.startswith("/") and "\n" not in text and not isinstance(text, Quoted):
            run_command(self, text)
        else:
            self.conversation.ask(check_text("the message", text))
            self.respond()

    def respond(self) -> None:
        """Answer the last question. On an error the question is taken back."""
        try:
            completion = self._stream()
        except BaseException as error:
            self.conversation.take_back()
            if isinstance(error, ContextError):
                raise self._overflow(error) from error
            raise
        self.conversation.answer(completion.text)
        if completion.finish_reason == "cancelled":
            self.say("(stopped)")
        elif completion.finish_reason == "length":
            self.say(f"(cut: {self._limit(completion)})")

    def _overflow(self, error: ContextError) -> ContextError:
        """`error` in the words of a chat, where a prompt is the conversation up to the question that was taken back."""
        place = f"the context of {self.engine.ctx} tokens"
        message = (
            f"the conversation fills {place}: /clear forgets it, or start again with a larger --ctx"
            if self.conversation.messages
            else f"the message does not fit {place}: shorten it, or start again with a larger --ctx"
        )
        return ContextError(message, needed_tokens=error.needed_tokens, available_tokens=error.available_tokens)

    def _limit(self, completion: Completion) -> str:
        most = self.conversation.options.get("max_tokens")
        if most is not None and len(completion.tokens) >= most:
            return f"the limit of {most} tokens is reached"
        return f"the context of {self.engine.ctx} tokens is full; /clear empties it"

    def _stream(self) -> Completion:
        view: View = LiveView(self._console) if self._interactive else PlainView(sys.stdout)
        status = StatusLine(self.engine)
        options: dict[str, Any] = dict(self.conversation.options)
        options["on_prefill"] = lambda done, total: view.status(status.prefill(done, total))
        stream = self.engine.stream(self.conversation.prompt(), **options)
        with keys_unseen(), view, stream, interrupt_calls(stream.cancel):
            shown_s = 0.0
            for chunk in stream:
                status.count(len(chunk.tokens))
                if self._interactive and time.monotonic() - shown_s > _STATUS_S:
                    shown_s = time.monotonic()
                    view.status(status.decode())
                view.write(chunk.text)
            return stream.result()


def _terminal_input(session: ChatSession) -> TerminalInput:
    history: History | None
    try:
        history = LineHistory(history_path(), session.say)
    except OSError as error:
        session.say(f"the input history is not kept: {error.strerror}")
        history = None
    return TerminalInput(history, COMMANDS, session.say)
