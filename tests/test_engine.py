"""The engine end to end: the same bits at every budget, as a stream, from threads, from asyncio, and after a cancel."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import FAMILIES, MIXTURES, reference_logits, tiny_checkpoint
from support.gguf_checkpoints import SIZES_FOR_K_QUANTS, gguf_checkpoint

import offload
from offload.demand import Demand
from offload.elements import element_type
from offload.engine import Engine
from offload.errors import BudgetError, ClosedError, ContextError, StorageError, UsageError
from offload.models.parts import movable_parts
from offload.plan import Plan
from offload.planning import full_budget, make_plan, minimum_budget, minimum_device_budget
from offload.shares import nbytes, ring_bytes
from offload.trace import write_trace

TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 90, 40)]


@pytest.fixture(scope="module")
def engine(demo: Path) -> Iterator[Engine]:
    with offload.load(demo, ram="minimum", ctx=512) as engine:
        yield engine


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def budget_at(share: float) -> Callable[[Demand, int, int | None], Plan]:
    """A planner that ignores the budget it is given for one at `share` of the way from the minimum to everything.

    Tiny checkpoints are smaller than the noise in what a Python process uses, so no `--ram` hits a given share of them.
    """
    return lambda demand, _, device: make_plan(demand, budget_at_share(demand, share, device), device)


def test_logits_and_tokens_are_the_same_bits_at_every_budget(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for share in (0, 0.3, 0.6, 1):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        with offload.load(tiny, ctx=64) as engine:
            answer = engine.generate(TOKENS[:17], max_tokens=12, temperature=0, ignore_eos=True)
            plan = engine.plan
            seen.append((plan.pinned_bytes + plan.bank_bytes, answer.tokens, engine.logits(TOKENS)))
    held = [nbytes for nbytes, _, _ in seen]
    assert held == sorted(set(held))
    assert plan.streamed_bytes_at(0) == 0
    for _, tokens, logits in seen[1:]:
        assert tokens == seen[0][1]
        assert np.array_equal(logits, seen[0][2])


@pytest.mark.parametrize("family", MIXTURES)
def test_no_bit_depends_on_what_is_read_ahead_or_on_who_goes_first(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(family, tmp_path)
    with offload.load(path, ctx=128) as engine:
        answer = engine.generate(TOKENS[:9], max_tokens=40, temperature=0, ignore_eos=True)
        expected = (answer.tokens, engine.logits(TOKENS))
    guesses = {"on": 0, "off": 0, "auto": 0}
    for share, prefetch, policy in (
        (0.7, "on", "lru"), (0.5, "off", "lfu"), (0.75, "on", "density"), (0.8, "on", "one-bit"), (0.85, "auto", "regret"),
    ):  # fmt: skip
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        with offload.load(path, ctx=128, prefetch=prefetch, expert_policy=policy) as engine:
            answer = engine.generate(TOKENS[:9], max_tokens=40, temperature=0, ignore_eos=True)
            guesses[prefetch] += engine._runner.telemetry.guesses
            assert np.array_equal(engine.logits(TOKENS), expected[1])
        assert answer.tokens == expected[0]
    assert guesses["on"] > 0 == guesses["off"]


@pytest.mark.parametrize("element", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_S", "MXFP4"])
def test_experts_of_every_kind_have_the_same_bits_in_few_slots_and_in_the_pass(
    element: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, where one expert gets many tokens and kernels work in tiles, and single tokens."""
    path = gguf_checkpoint("olmoe", tmp_path, element, **SIZES_FOR_K_QUANTS, num_experts=6)
    prompt = [3 + 7 * i % 300 for i in range(200)]
    seen = []
    for share in (0, 0.4, 1):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        with offload.load(path, ctx=256) as engine:
            answer = engine.generate(prompt, max_tokens=9, temperature=0)
            seen.append((engine.plan.bank_slots, answer.tokens, engine.logits(prompt)))
    assert seen[0][0] < seen[1][0] < seen[2][0] == (18,)
    for _, tokens, logits in seen[1:]:
        assert tokens == seen[0][1]
        assert np.array_equal(logits, seen[0][2])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_what_only_gguf_files_have_gives_the_same_bits_at_every_budget(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biased experts and sinks; unfolding matrices head by head, whose products stream too, and a cache without values."""
    path = gguf_checkpoint(family, tmp_path)
    seen = []
    for share in (0, 0.4, 1):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        with offload.load(path, ctx=64, kv_type="f32") as engine:
            seen.append((engine.generate(TOKENS, max_tokens=9, temperature=0).tokens, engine.logits(TOKENS)))
    with offload.load(path, ctx=64, device="torch:cpu", kv_type="f32") as engine:
        torch_logits = engine.logits(TOKENS)
    for tokens, logits in seen[1:]:
        assert tokens == seen[0][0]
        assert np.array_equal(logits, seen[0][1])
    assert np.abs(torch_logits - seen[0][1]).max() <= 1e-4 * np.ptp(torch_logits)


def test_matrices_in_parts_give_the_bits_of_whole_ones(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed in parts of 64 rows, pinned as whole matrices, and a mixture: prompts and single tokens."""
    monkeypatch.setattr("offload.models.assembly.movable_parts", lambda matrix: movable_parts(matrix, 1))
    seen = []
    for share in (0, 0.5, 1):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        with offload.load(demo, ctx=128) as engine:
            model = engine._runner.opened.model
            assert len(model.parts["blk.0.ffn_up.weight"]) == 1536 // 64
            seen.append((engine.generate(TOKENS, max_tokens=4, temperature=0).tokens, engine.logits(TOKENS)))
    for tokens, logits in seen[1:]:
        assert tokens == seen[0][0]
        assert np.array_equal(logits, seen[0][1])


def test_logits_agree_with_transformers(tiny: Path) -> None:
    with offload.load(tiny, ram="minimum", ctx=64, kv_type="f32") as engine:
        ours = engine.logits(TOKENS)
    theirs = reference_logits(tiny, TOKENS).numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * (theirs.max() - theirs.min())


PAIRS = [("f16", "f16"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0")]


@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_the_demo_model_has_llama_cpps_bits_for_every_cache_and_budget(
    demo: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the cache is lent at the smallest budget. F32 has no peer: llama.cpp makes it F16 before attention."""
    seen = []
    for share in (0, 1):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        with offload.load(demo, ctx=600, kv_type_k=key, kv_type=value) as engine:
            assert engine.plan.lends == (share == 0)
            prompt = engine.tokenize("The capital of France is")
            tokens = engine.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).tokens
            long = engine.generate([5 + 31 * n % 4000 for n in range(300)], max_tokens=3, temperature=0, logprobs=50)
            seen.append((tokens, engine.logits([*prompt, *tokens[:-1]])[-1], long.logprobs))
            threads = engine._runner.opened.threads
    assert seen[0][::2] == seen[1][::2] and np.array_equal(seen[0][1], seen[1][1])
    expected, logits = greedy_of_llama_cpp(demo, prompt, 12, key, value, threads)
    assert list(seen[0][0]) == expected
    assert np.array_equal(seen[0][1], logits)


def greedy_of_llama_cpp(
    path: Path, prompt: list[int], count: int, key: str, value: str, threads: int
) -> tuple[list[int], np.ndarray]:
    """Tokens, and the logits that the last one was chosen from."""
    import llama_cpp

    types = {"type_k": element_type(key).ggml_id, "type_v": element_type(value).ggml_id}
    peer = llama_cpp.Llama(str(path), n_ctx=600, n_threads=threads, flash_attn=True, verbose=False, **types)
    peer.eval(prompt)
    tokens: list[int] = []
    while True:
        logits = np.ctypeslib.as_array(peer._ctx.get_logits(), shape=(peer.n_vocab(),)).copy()
        tokens.append(int(logits.argmax()))
        if len(tokens) == count:
            peer.close()
            return tokens, logits
        peer.eval(tokens[-1:])


def test_cache_types_that_cannot_be_are_refused_in_one_line(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^kv_type_v='q6_K': choose f16, bf16, f32, q8_0 or q4_0$"):
        offload.load(demo, kv_type_v="q6_K")
    narrow = tiny_checkpoint("llama", tmp_path)
    said = "a head of them has 16 features \\(head_dim\\), not a multiple of 32; choose f16, bf16 or f32 by --kv-type"
    with pytest.raises(UsageError, match=f"^a KV cache with values of q4_0: {said}$"):
        offload.load(narrow, kv_type_v="q4_0")
    with pytest.raises(UsageError, match=r"^a KV cache with keys of q8_0: device cpu computes with f16, bf16 or f32;"):
        offload.load(demo, kv_type_k="q8_0", device="torch:cpu")


@pytest.mark.parametrize(("family", "value"), [("llama", "bf16"), ("deepseek_v2", "q8_0")])
def test_a_device_takes_keys_and_values_of_different_types(family: str, value: str, tmp_path: Path) -> None:
    """Latent attention keeps no values, so that theirs is any."""
    narrow = gguf_checkpoint(family, tmp_path)
    logits = []
    for options in ({}, {"device": "torch:cpu"}):
        with offload.load(narrow, ctx=64, kv_type="f32", kv_type_v=value, **options) as engine:
            logits.append(engine.logits(TOKENS))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-3 * np.ptp(logits[0])


def test_a_stream_says_what_generate_says(engine: Engine) -> None:
    whole = engine.generate("Once upon a time", max_tokens=12, temperature=0)
    with engine.stream("Once upon a time", max_tokens=12, temperature=0) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.tokens) == whole.tokens
    assert stream.result().finish_reason == whole.finish_reason == "length"


def test_asyncio_sees_the_same_chunks(engine: Engine) -> None:
    async def collect() -> str:
        return "".join([chunk.text async for chunk in engine.astream("Once upon a time", max_tokens=12, temperature=0)])

    assert asyncio.run(collect()) == engine.generate("Once upon a time", max_tokens=12, temperature=0).text


def test_chat_stops_at_the_end_of_the_turn(engine: Engine) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Explain in one sentence."}]
    answer = engine.chat(messages, max_tokens=40, temperature=0)
    assert answer.finish_reason == "stop"
    assert "Paris" in answer.text
    longer = [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And of Italy?"}]
    assert engine.chat(longer, max_tokens=4, temperature=0).cached_tokens > 20


def test_stop_strings_span_tokens_and_are_cut(engine: Engine) -> None:
    free = engine.generate("One, two, three,", max_tokens=16, temperature=0).text
    stop = free[5:8]
    answer = engine.generate("One, two, three,", max_tokens=16, temperature=0, stop=stop)
    assert (answer.text, answer.finish_reason) == (free[: free.index(stop)], "stop")


def test_a_json_schema_is_kept(engine: Engine) -> None:
    import json

    number = {"type": "integer", "maximum": 99}
    schema = json.dumps(
        {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    )
    answer = engine.generate("A number as JSON: ", max_tokens=30, temperature=0, json_schema=schema)
    assert isinstance(json.loads(answer.text)["n"], int)
    assert answer.finish_reason == "stop"


def test_logprobs_are_those_of_the_logits(engine: Engine) -> None:
    answer = engine.generate("The sky is", max_tokens=2, temperature=0, logprobs=3)
    assert len(answer.logprobs) == 2
    assert answer.logprobs[0].token == answer.tokens[0] == answer.logprobs[0].top[0].token
    assert answer.logprobs[0].logprob < 0


def test_the_same_seed_gives_the_same_text(engine: Engine) -> None:
    options = {"max_tokens": 12, "temperature": 1.5, "seed": 7, "top_k": 0}
    assert engine.generate("Once", **options).tokens == engine.generate("Once", **options).tokens
    assert engine.generate("Once", **options).tokens != engine.generate("Once", **{**options, "seed": 8}).tokens


def test_a_cancelled_stream_frees_the_engine_at_once(engine: Engine) -> None:
    stream = engine.stream("Tell me a very long story.", max_tokens=400, temperature=0, ignore_eos=True)
    next(stream)
    stream.cancel()
    answer = stream.result()
    assert answer.finish_reason == "cancelled"
    assert len(answer.tokens) < 400
    assert engine.generate("Hi", max_tokens=2, temperature=0).finish_reason == "length"


def test_two_threads_queue_up(engine: Engine) -> None:
    expected = {word: engine.generate(word, max_tokens=6, temperature=0).tokens for word in ("red", "green", "blue")}
    found: dict[str, tuple[int, ...]] = {}

    def ask(word: str) -> None:
        found[word] = engine.generate(word, max_tokens=6, temperature=0).tokens

    threads = [threading.Thread(target=ask, args=(word,)) for word in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_long_prompts_pass_in_chunks_and_match_the_short_way(engine: Engine) -> None:
    """A prompt that was cached and one computed afresh in the same micro-batches end in the same token."""
    words = engine.tokenize("word " * 300)
    seen = []
    engine.generate(words, max_tokens=1, temperature=0, on_prefill=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(words), len(words)) or seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("", {}, UsageError, "empty"),
        ([1] * 600, {}, ContextError, "512"),
        ([10**7], {}, UsageError, "token ids"),
        ("x", {"temperature": -1}, UsageError, "temperature"),
        ("x", {"tempreature": 1}, UsageError, "tempreature"),
        ("x", {"json_schema": "{"}, UsageError, "json_schema"),
        (3.5, {}, UsageError, "prompt"),
        ([1.5], {}, UsageError, "prompt"),
        ([2**70], {}, UsageError, "token ids"),
        ([{"role": "user"}, 5], {}, UsageError, "chat messages"),
        ("x", {"mirostat_tau": float("nan")}, UsageError, "mirostat_tau"),
        ("x", {"logit_bias": [1]}, UsageError, "logit_bias"),
        ("x", {"logit_bias": {1: "x"}}, UsageError, "logit_bias"),
        ("x", {"grammar": 5}, UsageError, "grammar"),
        ("x", {"seed": True}, UsageError, "seed"),
        (b"x", {}, UsageError, "bytes"),
        ("x", {"max_tokens": 2.5}, UsageError, "max_tokens=2.5: must be a whole number"),
        ("x", {"top_p": "much"}, UsageError, "top_p='much'"),
        ("x", {"stop": 5}, UsageError, "options"),
        ("x", {"stop": ["a", 5]}, UsageError, "stop"),
    ],
)
def test_a_wrong_request_is_one_clear_line_and_harms_nothing(
    engine: Engine, prompt: object, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        engine.generate([] if prompt == "" else prompt, **{"max_tokens": 1} | options)
    assert "\n" not in str(caught.value)
    assert engine.generate("Hi", max_tokens=1, temperature=0).tokens


def test_a_budget_below_the_minimum_names_one_that_works(demo: Path) -> None:
    """Between two runs of a command, as a person meets it: this process is far larger than a fresh one."""

    def run(ram: str) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("offload"), "run", str(demo), "-p", "Hi", "-n", "1", "--ctx", "512"]
        return subprocess.run([*command, "--ram", ram], capture_output=True, text=True, timeout=120, check=False)

    refused = run("20M")
    named = re.search(r"\((\d+) bytes\) would do", refused.stderr)
    assert refused.returncode != 0
    assert named is not None, refused.stderr
    accepted = run(named[1])
    assert accepted.returncode == 0, accepted.stderr


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    encode = engine._need_tokenizer().encode
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *a, **k: given.append(k["limit"]) or encode(*a, **k))
    for ask in (engine.generate, lambda text: engine.chat([{"role": "user", "content": text}])):
        with pytest.raises(ContextError, match="512"):
            ask("word " * 1_000_000)
    assert given == [512, 512]


def test_logits_take_what_generate_takes(engine: Engine) -> None:
    text = "The capital of France is"
    assert np.array_equal(engine.logits(text), engine.logits(engine.tokenize(text)))


def test_a_context_larger_than_the_machine_is_refused_at_once(demo: Path) -> None:
    with pytest.raises(BudgetError, match=r"--ctx 100000000: its KV cache needs .* lower --ctx"):
        offload.load(demo, ctx=100_000_000)


@pytest.mark.parametrize(
    "options",
    [{"ram": 1.5}, {"ctx": "a"}, {"ctx": 0}, {"ctx": 2**70}, {"threads": 2.5}, {"threads": 10**6}, {"ram": "9" * 5000}],
)
def test_a_wrong_load_option_is_a_usage_error(demo: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"ram|size|ctx|threads"):
        offload.load(demo, **options)


def test_what_a_chat_template_refuses_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "template", "{{ raise_exception('only users may speak') }}")
    with pytest.raises(UsageError, match="only users may speak"):
        engine.chat([{"role": "user", "content": "Hi"}])


def test_a_closed_engine_says_so(demo: Path) -> None:
    engine = offload.load(demo, ram="minimum", ctx=128)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        engine.generate("Hi")


def test_a_timeline_opens_as_a_chrome_trace(demo: Path, tmp_path: Path) -> None:
    import json

    with offload.load(demo, ram="minimum", ctx=128, trace=True) as engine:
        engine.generate("Hi", max_tokens=2, temperature=0)
        engine.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"compute", "wait", "read"} <= lanes
    assert "token rows" in {event["name"] for event in events if event.get("cat") == "wait"}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_a_trace_replaces_a_links_target_and_nothing_but_files(tmp_path: Path) -> None:
    (tmp_path / "old.json").touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "old.json")
    write_trace(tmp_path / "link.json", [])
    assert (tmp_path / "link.json").is_symlink()
    assert "traceEvents" in (tmp_path / "old.json").read_text()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a regular file"):
        write_trace(tmp_path / "pipe", [])
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(StorageError, match="is no earlier trace"):
        write_trace(tmp_path / "note.txt", [])
    assert (tmp_path / "note.txt").read_text() == "mine"
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("vram_share", [0.0, 0.5, 1.0])
def test_three_tiers_give_the_same_tokens_at_every_split(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, vram_share: float
) -> None:
    """torch:cpu stands in for a card: weights pinned there, in RAM, or on disk, in all mixtures."""
    with offload.load(tiny, ctx=64, kv_type="f32") as engine:
        reference = engine.logits(TOKENS)
        expected = engine.generate(TOKENS[:17], max_tokens=12, temperature=0, ignore_eos=True).tokens
    seen = []
    for ram_share in (0.0, 0.5, 1.0):
        monkeypatch.setattr("offload.opening.make_plan", split_at(ram_share, vram_share))
        with offload.load(tiny, ctx=64, device="torch:cpu", kv_type="f32") as engine:
            assert {placement.tier for placement in engine.plan.placements} <= {"vram", "ram", "nvme"}
            answer = engine.generate(TOKENS[:17], max_tokens=12, temperature=0, ignore_eos=True)
            plan = engine.plan
            seen.append((answer.tokens, engine.logits(TOKENS), plan.streamed_bytes_at(0)))
    for tokens, logits, _ in seen:
        assert tokens == expected
        assert np.array_equal(logits, seen[0][1])
        assert np.abs(logits - reference).max() <= 1e-4 * np.ptp(reference)
    assert (seen[0][2] > 0) == (vram_share < 1 or len(plan.bank_slots) > 0)  # experts are in RAM or on disk


def split_at(ram_share: float, vram_share: float) -> Callable[[Demand, int, int | None], Plan]:
    """A planner that takes these shares of the way from the minimum to everything, in RAM and on the device, if it may. The
    KV cache is on the device."""

    def plan(demand: Demand, _: int, device: int | None) -> Plan:
        assert demand.device_fixed is not None and device is not None
        demand = replace(demand, kv=None)  # whose keys and values are on the device
        every = range(len(demand.blocks))
        more = vram_share * (nbytes(demand, every) - ring_bytes(demand, every, 0.0))
        vram = minimum_device_budget(demand) + int(more)
        return make_plan(demand, budget_at_share(demand, ram_share), min(vram, device))

    return plan


def budget_at_share(demand: Demand, share: float, device: int | None = None) -> int:
    least = minimum_budget(demand, device)
    return least + int(share * (full_budget(demand) - minimum_budget(demand)))
