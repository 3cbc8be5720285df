"""Every chat command by its effect and its error line, and the conversation and the input behind them."""

import io
import json
import re
from copy import deepcopy

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.fake_engine import FakeEngine

from offload.cli.chat_commands import COMMANDS, run_command
from offload.cli.chat_input import PlainInput, Quoted, is_open
from offload.cli.chat_state import PARAMETERS, Conversation
from offload.errors import UsageError

TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
FLOATS = sorted(name for name, kind in PARAMETERS.items() if str(kind).startswith("float"))
TEXT = st.text(max_size=20)


class Chat:
    """What commands need, with what they did."""

    def __init__(self, *messages):
        self.engine = FakeEngine()
        self.conversation = Conversation(messages=deepcopy(list(messages)), system="Be brief.", options={"seed": 7})
        self.leaving = False
        self.said, self.answered = [], []

    def say(self, text):
        self.said.append(text)

    def respond(self):
        self.answered.append(deepcopy(self.conversation.messages))


def after(line, *messages):
    chat = Chat(*messages)
    run_command(chat, line)
    return chat


def test_help_lists_every_command_once_and_says_what_it_does():
    (text,) = after("/help").said
    listed = [re.match(r"/(\w+).* {2,}\w+", line) for line in text.splitlines() if line.startswith("/")]
    assert all(listed) and [match[1] for match in listed] == list(COMMANDS)


def test_a_parameter_is_set_under_any_name_and_reset_and_its_value_is_said():
    chat = Chat()
    for line in ("/set temperature 0.2", "/set parameter  top-k   3 ", "/set stop the end", "/set seed default"):
        run_command(chat, line)
    assert chat.said == ["temperature = 0.2", "top-k = 3", "stop = ('the end',)", "seed = default"]
    assert chat.conversation.options == {"temperature": 0.2, "top_k": 3, "stop": ("the end",)}


def test_the_system_message_is_set_shown_and_removed():
    chat = Chat(*TALK)
    for line in ("/system  You rhyme. ", "/show system", "/set system", "/show system"):
        run_command(chat, line)
    assert chat.said == ["system message set", "You rhyme.", "system message removed", "no system message"]
    assert chat.conversation.prompt() == TALK


def test_clear_forgets_the_messages_alone():
    conversation = after("/clear", *TALK).conversation
    assert (conversation.messages, conversation.system, conversation.options) == ([], "Be brief.", {"seed": 7})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/", "no command /; /help lists them"),
        ("/Help", "no command /Help; /help lists them"),
        ("/set seed", "/set seed: give a value, or default"),
        ("/set temperature hot", "temperature: 'hot' is not a number"),
        ("/set top_k 1.5", "top_k: '1.5' is not a number"),
        ("/set json_schema {", "json_schema: not valid JSON"),
        ("/set grammar @/no/such", "/set grammar @/no/such: cannot read it as UTF-8 text"),
        ("/set max_tokens -1", "max_tokens=-1: must lie between 0 and"),
        ("/set seed 4294967295", "seed=4294967295: must lie between 0 and 4294967294"),
        ("/set mirostat 3", "mirostat=3: must lie between 0 and 2"),
        ("/set top_p 1.01", "top_p=1.01: must lie between 0.0 and 1.0"),
        ("/show plans", "/show plans: choose one of info, parameters, system, template, plan"),
        ("/save", "/save: give a name or a path"),
        ("/save /no/such/chat", "no such folder /no/such"),
        ("/load", "/load: give a name or a path"),
        ("/load ./absent", "absent: no such chat"),
        ("/regen", "/regen: there is no answer yet"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_changes_nothing(line, words):
    chat = Chat()
    before = deepcopy(chat.conversation)
    with pytest.raises(UsageError) as caught:
        run_command(chat, line)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert (chat.conversation, chat.said, chat.answered, chat.leaving) == (before, [], [], False)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_can_be_set_and_no_other_is_set_with_it(name):
    conversation = Conversation()
    value = conversation.set(f"--{name.replace('_', '-')}", "1")
    assert conversation.options == {name: value} and value in (1, "1", ("1",))


@given(st.sampled_from(FLOATS), st.sampled_from(["nan", "inf", "-inf", "1e9", "-1e9", "1,5"]))
def test_no_fraction_is_without_bounds(name, text):
    with pytest.raises(UsageError, match=name):
        Conversation().set(name, text)


@given(st.one_of(st.sampled_from(sorted(PARAMETERS)), TEXT), TEXT)
def test_whatever_is_typed_the_options_stay_such_that_they_can_be_restored(name, text):
    assume("\0" not in text and not text.startswith("@"))
    conversation = Conversation(options={"seed": 7})
    try:
        conversation.set(name, text)
    except UsageError:
        assert conversation.options == {"seed": 7}
    again = Conversation()
    again.restore([], json.loads(json.dumps(conversation.options)))
    assert again.options == conversation.options


@given(st.lists(st.one_of(st.tuples(st.just("ask"), TEXT), st.just("take back"))))
def test_question_and_answer_alternate_whatever_happens(steps):
    conversation, asked = Conversation(), []
    for step in steps:
        if step == "take back":
            assert conversation.take_back() == (asked.pop() if asked else None)
            continue
        question = f"question {len(asked)}"
        conversation.ask(question)
        conversation.answer(step[1])
        asked += [question] if step[1] else []
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * len(asked)
    assert [message["content"] for message in conversation.messages[::2]] == asked


@given(st.text(st.sampled_from('ab \n"é漢/'), min_size=1, max_size=30))
def test_a_quoted_message_comes_whole_and_what_follows_is_the_next(text):
    assume('"""' not in text and text[0] not in ' \n"')
    source = PlainInput(io.StringIO(f'"""{text}"""\n/bye\n'))
    assert [source.read() for _ in range(3)] == [text.strip("\n"), "/bye", None]


@pytest.mark.parametrize(
    ("text", "opens"), [('"""  \n', True), ('"""\n\n\n', True), ('""""""', False), ('"""a"""\n', False)]
)
def test_blanks_do_not_close_triple_quotes(text, opens):
    assert is_open(text) == opens


def test_a_quoted_message_is_never_a_command():
    read = PlainInput(io.StringIO('"""/bye"""\n"""  \nhello\nthere\n"""\n/bye\n')).read
    messages = [read(), read(), read()]
    assert messages == ["/bye", "  \nhello\nthere", "/bye"]
    assert [isinstance(message, Quoted) for message in messages] == [True, True, False]
