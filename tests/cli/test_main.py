import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import offload
from offload.cli.main import COMMANDS

TESTS = str(Path(__file__).parents[1])
HEAVY = ("torch", "numpy", "llama_cpp", "prompt_toolkit", "transformers", "offload.engine")


def modules_after(code: str) -> set[str]:
    report = "import json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{report}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"sys.argv = ['offload', *{arguments}]; from offload.cli.main import main; main()"
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_help_of_a_command_does_not_load_the_engine(command):
    code = f"sys.argv = ['offload', '{command}', '--help']; from offload.cli.main import main; main()"
    assert modules_after(code).isdisjoint({"torch", "numpy", "offload.engine"})


def test_completion_of_command_names_loads_nothing_heavy():
    variables = "os.environ.update(_OFFLOAD_COMPLETE='complete_bash', COMP_WORDS='offload i', COMP_CWORD='1')"
    loaded = modules_after(f"import os; {variables}; from offload.cli.main import main; main()")
    assert loaded.isdisjoint(HEAVY) and "offload.cli.inspect" not in loaded


def test_completion_offers_commands_and_options():
    def complete(words: str, number: int) -> list[str]:
        variables = {"_OFFLOAD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        script = "from offload.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | variables, check=False
        )
        return done.stdout.split()

    assert complete("offload i", 1) == ["inspect"]
    assert "--ram" in complete("offload run --r", 2)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_loads_and_has_help(invoke, name):
    app = getattr(import_module(f"offload.cli.{name}"), "app", None)
    parts = [[command.name or command.callback.__name__] for command in app.registered_commands] if app else [[]]
    for part in parts:
        result = invoke(name, *part, "--help")
        assert result.exit_code == 0 and "--debug" in result.stdout


def test_every_listed_command_is_a_module_of_that_name():
    for name in COMMANDS:
        module = import_module(f"offload.cli.{name}")
        assert hasattr(module, "app") or callable(getattr(module, name))


def test_help_names_the_environment_variables(invoke):
    text = invoke("run", "--help", env={"COLUMNS": "200"}).stdout
    assert all(f"OFFLOAD_{name}" in text for name in ("RAM", "VRAM", "CTX", "DEVICE", "THREADS", "KV_TYPE", "MODEL"))


def test_a_bad_variable_is_bad_usage_and_named(invoke, engine_module, model):
    result = invoke("run", model, "-p", "x", env={"OFFLOAD_CTX": "many"})
    assert result.exit_code == 2 and "OFFLOAD_CTX" in result.stderr and "'many'" in result.stderr


def test_version_and_unknown_commands(invoke):
    assert invoke("--version").stdout == f"offload {offload.__version__}\n"
    result = invoke("rum")
    assert result.exit_code == 2 and "Did you mean 'run'" in result.stderr


def test_a_closed_pipe_is_quiet(model):
    script = (
        f"import sys; sys.path.insert(0, {TESTS!r}); from support.fake_engine import FakeEngine, FakeEngineModule\n"
        "sys.modules['offload.engine'] = FakeEngineModule(FakeEngine('word ' * 100_000))\n"
        "from offload.cli.main import main; main()"
    )
    arguments = [sys.executable, "-c", script, "run", str(model), "-p", "x"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["run", "MODEL", "-p", "x"], ["plan", "MODEL"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_named_in_one_line(model, arguments, unbuffered):
    script = (
        f"import sys; sys.path.insert(0, {TESTS!r}); from support.fake_engine import FakeEngine, FakeEngineModule\n"
        "sys.modules['offload.engine'] = FakeEngineModule(FakeEngine())\n"
        "from offload.cli.main import main; main()"
    )
    command = [sys.executable, "-c", script, *(str(model) if word == "MODEL" else word for word in arguments)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.stderr == "offload: error: standard output: No space left on device\n" and done.returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write")
def test_completion_that_cannot_be_installed_is_one_line():
    script = "from offload.cli.main import main; main()"
    command = [sys.executable, "-c", script, "--install-completion", "bash"]
    environment = os.environ | {"HOME": "/proc", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.startswith("offload: error: /proc/") and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_on_a_terminal_leaves_the_prompt_a_line_of_its_own(tmp_path, model):
    pytest.importorskip("pexpect")
    from support.terminal import CTRL_C, Terminal

    script = (
        "import sys; from support.fake_engine import FakeEngine, FakeEngineModule\n"
        "sys.modules['offload.engine'] = FakeEngineModule(FakeEngine('word ' * 1000, token_s=0.02))\n"
        "from offload.cli.main import main; main()"
    )
    screen = Terminal(sys.executable, "-c", script, "run", str(model), "-p", "x", home=tmp_path)
    screen.wait_for("word word")
    screen.type(CTRL_C)
    assert screen.leave() == 130 and screen.raw.endswith(b"\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_run_with_130_and_no_traceback(model):
    script = (
        f"import sys; sys.path.insert(0, {TESTS!r}); from support.fake_engine import FakeEngine, FakeEngineModule\n"
        "sys.modules['offload.engine'] = FakeEngineModule(FakeEngine('word ' * 1000, token_s=0.02))\n"
        "from offload.cli.main import main; main()"
    )
    arguments = [sys.executable, "-c", script, "run", str(model), "-p", "x"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4) == b"word"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert b"Traceback" not in process.stderr.read()
