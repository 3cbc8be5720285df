import json
from dataclasses import replace

import pytest
from support.fake_engine import ANSWER, FakeEngine, FakeStream

from offload.cli.chat_state import Conversation
from offload.errors import ContextError, StorageError, UsageError


def chat(invoke, model, lines, *arguments):
    return invoke("chat", model, *arguments, input=lines)


def test_a_piped_line_is_answered(invoke, engine_module, model):
    result = chat(invoke, model, "hi\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, ANSWER + "\n", "")
    assert engine_module.engine.prompts == [[{"role": "user", "content": "hi"}]]


def test_the_conversation_grows_and_clears(invoke, engine_module, model):
    chat(invoke, model, "one\ntwo\n/clear\nthree\n", "--system", "Be brief.")
    roles = [[message["role"] for message in prompt] for prompt in engine_module.engine.prompts]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]


def test_triple_quotes_join_lines(invoke, engine_module, model):
    chat(invoke, model, '"""first\n/bye is text here\nlast"""\n"""one line"""\n')
    asked = [prompt[-1]["content"] for prompt in engine_module.engine.prompts]
    assert asked == ["first\n/bye is text here\nlast", "one line"]


def test_bye_leaves_before_the_rest(invoke, engine_module, model):
    assert chat(invoke, model, "/bye\nnever asked\n").exit_code == 0
    assert engine_module.engine.prompts == []


def test_an_error_ends_a_piped_chat(invoke, engine_module, model):
    engine_module.engine.failure = StorageError("read failed")
    result = chat(invoke, model, "hi\nagain\n")
    assert result.exit_code == 1 and "offload: error: read failed" in result.stderr
    assert len(engine_module.engine.prompts) == 1


def test_a_full_context_is_told_in_the_words_of_a_chat(invoke, engine_module, model):
    engine = engine_module.engine
    engine.failure = ContextError("shorten the prompt or raise --ctx", needed_tokens=5000, available_tokens=4096)
    first = chat(invoke, model, "hi\n")
    assert first.exit_code == 2 and "message does not fit the context of 4096 tokens" in first.stderr
    engine.answers, engine.failure_at = ["short", "one two three"], 2
    later = chat(invoke, model, "hi\nagain\n")
    assert later.exit_code == 2 and "fills the context of 4096 tokens: /clear" in later.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("", "the context of 4096 tokens is full; /clear empties it"),
        ("/set max_tokens 99\n", "the context of 4096 tokens is full"),
        ("/set max_tokens 2\n", "the limit of 2 tokens is reached"),
    ],
)
def test_a_cut_answer_says_what_cut_it(invoke, engine_module, model, monkeypatch, setting, words):
    result = FakeStream.result
    monkeypatch.setattr(FakeStream, "result", lambda stream: replace(result(stream), finish_reason="length"))
    assert f"(cut: {words}" in chat(invoke, model, f"{setting}hi\n").stderr


def test_set_reaches_the_engine_and_default_resets(invoke, engine_module, model):
    chat(invoke, model, "/set temperature 0.5\n/set parameter top_k 3\nhi\n/set top_k default\nhi\n", "--temp", "0.1")
    first, second = engine_module.engine.options
    assert (first["temperature"], first["top_k"]) == (0.5, 3)
    assert second["temperature"] == 0.5 and "top_k" not in second


def test_regen_asks_the_same_again(invoke, engine_module, model):
    chat(invoke, model, "one\ntwo\n/regen\n")
    assert engine_module.engine.prompts[2] == engine_module.engine.prompts[1]


def test_saved_chat_is_loaded_again(invoke, engine_module, model, tmp_path):
    path = tmp_path / "talk.json"
    chat(invoke, model, f"one\n/set seed 7\n/save {path}\n", "--system", "Be brief.")
    assert path.stat().st_mode & 0o777 == 0o600
    saved = json.loads(path.read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"] and saved["options"] == {"seed": 7}
    chat(invoke, model, f"/load {path}\ntwo\n")
    chat(invoke, model, "two\n", "--load", path)
    prompts, options = engine_module.engine.prompts, engine_module.engine.options
    assert prompts[1] == prompts[2] == [*saved["messages"], {"role": "user", "content": "two"}]
    assert options[1]["seed"] == options[2]["seed"] == 7


def test_the_given_system_message_beats_the_saved_one_and_its_variable_does_not(invoke, engine_module, model, tmp_path):
    path = tmp_path / "talk.json"
    chat(invoke, model, f"/save {path}\n", "--system", "Be brief.")
    chat(invoke, model, "one\n", "--load", path, "--system", "Rhyme.")
    chat(invoke, model, "one\n", "--load", path, "--system", "")
    invoke("chat", model, "--load", path, input="one\n", env={"OFFLOAD_SYSTEM": "Sing."})
    invoke("chat", model, input="one\n", env={"OFFLOAD_SYSTEM": "Sing."})
    first = [prompt[0]["content"] for prompt in engine_module.engine.prompts]
    assert first == ["Rhyme.", "one", "Be brief.", "Sing."]


def test_a_line_that_is_no_utf8_is_bad_usage(invoke, engine_module, model):
    result = chat(invoke, model, b"caf\xe9\n")
    assert result.exit_code == 2 and "standard input is not UTF-8 text" in result.stderr
    assert result.stderr.count("\n") == 1 and engine_module.engine.prompts == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/help", ["/regen", "/save NAME", "Ctrl-C"]),
        ("/?", ["/bye"]),
        ("/set", ["temperature", "0.8", "json_schema"]),
        ("/show", ["fake-135M", "4096"]),
        ("/show parameters", ["min_p"]),
        ("/show system", ["no system message"]),
        ("/show template", ["{{ messages }}"]),
        ("/show plan", ["1.00 GiB of 4.00 GiB", "bound by disk"]),
        ("/stats", ["10 tokens in 12 passes", "waiting 73%", "25% of the weights resident"]),
    ],
)
def test_commands_say_what_they_know(invoke, engine_module, model, line, words):
    result = chat(invoke, model, line + "\n")
    assert result.exit_code == 0 and result.stdout == ""
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "/nonsense",
        "/set temperature hot",
        "/set temperature -1",
        "/set colour blue",
        "/set seed",
        "/show me",
        "/regen",
        "/save",
        "/save two words",
        "/load absent",
        "/load",
    ],
)
def test_wrong_commands_are_bad_usage(invoke, engine_module, model, line):
    result = chat(invoke, model, line + "\n")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_a_question_without_an_answer_is_taken_back():
    conversation = Conversation()
    conversation.ask("one")
    conversation.answer("")
    assert conversation.messages == []


def test_a_bad_option_changes_nothing():
    conversation = Conversation()
    conversation.set("json_schema", "{}")
    for name, value in (("top_p", "2"), ("grammar", "root ::= x"), ("json_schema", "{bad"), ("json_schema", "@absent")):
        with pytest.raises(UsageError, match=name):
            conversation.set(name, value)
    assert conversation.options == {"json_schema": "{}"}


def test_one_constraint_makes_way_for_the_other(tmp_path):
    (tmp_path / "rules").write_text("root ::= x")
    conversation = Conversation()
    conversation.set("json-schema", "{}")
    conversation.set("json_schema", "default")
    conversation.set("grammar", f"@{tmp_path / 'rules'}")
    assert conversation.options == {"grammar": "root ::= x"}


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("temp", "temperature"), ("--top-k", "top_k"), ("typical", "typical_p"), ("n", "max_tokens"), ("s", "seed")],
)
def test_a_parameter_has_the_names_of_its_flag(name, parameter):
    conversation = Conversation()
    conversation.set(name, "1")
    assert conversation.options == {parameter: 1}
    conversation.set(name, "default")
    assert conversation.options == {}


@pytest.mark.parametrize(
    ("name", "words"), [("tempertaure", "did you mean temperature?"), ("colour", "/set lists them")]
)
def test_an_unknown_parameter_is_met_with_the_nearest(name, words):
    with pytest.raises(UsageError, match=f"no parameter '{name}'; {words.rstrip('?')}"):
        Conversation().set(name, "1")


def test_what_is_not_set_shows_as_a_dash(invoke, engine_module, model):
    shown = chat(invoke, model, "/set\n").stderr
    assert "None" not in shown and f"{'seed':<22} -\n" in shown


def test_fake_engine_is_closed(invoke, engine_module, model):
    chat(invoke, model, "")
    assert isinstance(engine_module.engine, FakeEngine) and engine_module.engine.closed
