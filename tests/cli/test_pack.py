from pathlib import Path

MODEL = Path(__file__).parents[1] / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"


def test_a_side_file_is_written_and_used(invoke, tmp_path):
    side = tmp_path / "side.gguf"
    result = invoke("pack", MODEL, "-o", side, "-q")
    assert result.exit_code == 0 and f"--expert-pack {side}" in result.stdout
    options = ["--expert-pack", side, "--coarse-experts-below", 0.2, "--skip-experts-below", 0.05]
    done = invoke("run", MODEL, "-p", "def main", "-n", 4, "--temperature", 0, "--ctx", 64, "-q", *options)
    assert done.exit_code == 0, done.stderr
    again = invoke("pack", MODEL, "-o", side, "-q")
    assert again.exit_code == 2 and "already" in again.stderr and again.stderr.count("\n") == 1


def test_a_model_without_experts_has_nothing_to_pack(invoke, demo, tmp_path):
    result = invoke("pack", demo, "-o", tmp_path / "side.gguf", "-q")
    assert result.exit_code == 2 and "no experts" in result.stderr


def test_what_was_traded_away_is_said(invoke, tmp_path):
    options = ["-p", "def main():", "-n", 8, "--temperature", 0, "--ctx", 64, "--ram", "minimum", "--stats"]
    plain = invoke("run", MODEL, *options)
    assert "% hit" in plain.stderr and "left out" not in plain.stderr
    skipped = invoke("run", MODEL, *options, "--skip-experts-below", 0.2)
    assert " left out" in skipped.stderr


def test_options_that_change_nothing_are_noted(invoke, demo, tmp_path):
    side = tmp_path / "side.gguf"
    invoke("pack", MODEL, "-o", side, "-q")
    options = ["-p", "def", "-n", 1, "--ctx", 64]
    done = invoke("run", MODEL, *options, "--expert-pack", side)
    assert "note: --expert-pack: nothing is read from it without --coarse-experts-below" in done.stderr
    done = invoke("run", demo, *options, "--prefetch", "on", "--skip-experts-below", 0.1)
    assert "note: --prefetch, --skip-experts-below: the model has no experts" in done.stderr


def test_a_model_without_a_chat_template_is_no_partner(invoke):
    result = invoke("chat", MODEL, "--ctx", 64, input="hello\n")
    assert result.exit_code == 2 and "does not converse; use `offload run`" in result.stderr


def test_values_out_of_range_are_told_by_their_flags(invoke):
    for flag, value in (("--workers", 0), ("--skip-experts-below", 1.5), ("--coarse-experts-below", -1)):
        result = invoke("run", MODEL, "-p", "x", flag, value)
        assert result.exit_code == 2 and flag in result.stderr and "Value error" not in result.stderr
