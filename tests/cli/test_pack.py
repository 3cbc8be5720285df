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
