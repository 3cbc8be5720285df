"""Trains the small mixture of experts that policies are tested on, and writes it as a quantized GGUF file.

    python scripts/train_moe.py tests/assets/trained_moe/stdlib-olmoe-Q8_0.gguf     25 minutes on two cores

An OLMoE (Muennighoff et al., arXiv 2409.02060) of 6 layers with 32 experts each, 4 of them per token, learns Python's own
documentation and standard library, which every machine with this project has. A router with random weights chooses
uniformly; this one has learnt what real ones have: experts that specialise, and tokens that resemble their neighbours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
import zlib
from collections import Counter
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM

VOCAB = 4096
CONTEXT = 2048
WINDOW = 256  # tokens of a training sequence
BATCH = 8
PEAK_RATE = 2e-3
WARMUP_STEPS = 100
HELD_OUT = 20  # every so many documents, one is only evaluated on
END = "<|endoftext|>"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
}


def documents() -> tuple[list[str], list[str]]:
    """Texts to learn, and texts to evaluate on; which is which depends on a document's name only."""
    library = Path(sysconfig.get_paths()["stdlib"])
    named = dict(topics.topics)
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not {"site-packages", "test", "tests", "pydoc_data"}.intersection(parts):
            named["/".join(parts)] = path.read_text(encoding="utf-8", errors="replace")
    learnt: list[str] = []
    held_out: list[str] = []
    for name, text in named.items():
        (held_out if zlib.crc32(name.encode()) % HELD_OUT == 0 else learnt).append(text)
    return learnt, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """GPT-2's kind of byte-level pair encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], seed: int) -> torch.Tensor:
    """All texts as one sequence of tokens, in random order, each ended."""
    order = np.random.default_rng(seed).permutation(len(texts))
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch([texts[index] for index in order])
    return torch.tensor([token for one in encoded for token in (*one.ids, end)])


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Nats per token of a model that knows only how frequent each one is."""
    counts = np.array(list(Counter(tokens.tolist()).values()))
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def new_model() -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(vocab_size=VOCAB, max_position_embeddings=CONTEXT, output_router_logits=True, pad_token_id=None,
                         bos_token_id=None, eos_token_id=0, **SHAPE)  # fmt: skip
    config._experts_implementation = "grouped_mm"  # all experts by one call: twice as fast as one by one
    return OlmoeForCausalLM(config).float()


def loss_of(model: OlmoeForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, and the auxiliary loss that balances experts."""
    with torch.autocast("cpu", torch.bfloat16):
        result: torch.Tensor = model(input_ids=batch, labels=batch).loss
    return result


@torch.no_grad()
def evaluate(model: OlmoeForCausalLM, tokens: torch.Tensor, windows: int = 64) -> float:
    """Nats per token on the first windows of `tokens`, without the auxiliary loss."""
    losses = []
    for start in range(0, min(windows, len(tokens) // WINDOW) * WINDOW, WINDOW):
        batch = tokens[start : start + WINDOW][None]
        logits = model(input_ids=batch, output_router_logits=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, batch[0, 1:]).item())
    return sum(losses) / len(losses)


def train(model: OlmoeForCausalLM, tokens: torch.Tensor, minutes: float) -> int:
    """Trains for so long; returns the tokens seen. The learning rate follows the clock: up, then down along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    chooser = np.random.default_rng(0)
    start, step, mean = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = chooser.integers(0, len(tokens) - WINDOW, BATCH)
        loss = loss_of(model, torch.stack([tokens[first : first + WINDOW] for first in starts]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {mean:.3f}, {done:.0%} of the time", flush=True)
    return step * BATCH * WINDOW


def write_gguf(path: Path, model: OlmoeForCausalLM, tokenizer: Tokenizer) -> None:
    """Matrices as Q8_0, all else as float32, named as llama.cpp's converter names them."""
    writer = GGUFWriter(path, "olmoe")
    config = model.config
    writer.add_name("stdlib-olmoe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    write_vocabulary(writer, tokenizer)
    for name, values in named_tensors(model).items():
        if values.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([TokenType.CONTROL if token == END else TokenType.NORMAL for token, _ in vocabulary])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    end = tokenizer.token_to_id(END)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def named_tensors(model: OlmoeForCausalLM) -> dict[str, np.ndarray]:
    state = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    plain = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    }  # fmt: skip
    for layer in range(model.config.num_hidden_layers):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        for name, module in plain.items():
            tensors[f"{ours}{name}.weight"] = state[f"{theirs}{module}.weight"]
        gate, up = np.split(state[f"{theirs}mlp.experts.gate_up_proj"], 2, axis=1)
        down = state[f"{theirs}mlp.experts.down_proj"]
        for name, values in (("gate", gate), ("up", up), ("down", down)):
            tensors[f"{ours}ffn_{name}_exps.weight"] = np.ascontiguousarray(values)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the GGUF file to write; its recipe's figures go beside it as .json")
    parser.add_argument("--minutes", type=float, default=24, help="of training")
    options = parser.parse_args()

    learnt, held_out = documents()
    tokenizer = train_tokenizer(learnt)
    tokens, unseen = encode(tokenizer, learnt, 0), encode(tokenizer, held_out, 0)
    print(f"{len(tokens)} tokens to learn, {len(unseen)} held out", flush=True)
    model = new_model()
    seen = train(model, tokens, options.minutes)
    model.eval()
    loss, entropy = evaluate(model, unseen), unigram_entropy(unseen)
    options.path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(options.path, model, tokenizer)
    recipe = {
        "python": sys.version.split()[0], "torch": torch.__version__, "minutes": options.minutes,
        "tokens": len(tokens), "tokens_seen": seen, "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": round(loss, 3), "held_out_unigram_entropy": round(entropy, 3),
    }  # fmt: skip
    options.path.with_suffix(".json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
