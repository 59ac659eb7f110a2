"""Models of a few megabytes that vLLM can load, made up of random numbers in half a second; nothing is downloaded.

They write nonsense, but always the same: an LM with a chat template, an embedding model, and a LoRA adapter for the LM.

    python tests/tiny_llm.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import pydoc_data.topics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
_TEMPLATE = (
    "{%- if tools %}<|system|>tools: {{ tools | tojson }}<|end|>{% endif %}"
    "{%- for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}<|end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPACES = "\u0120\u010a\u0109\u010d "  # as a byte-level tokeniser writes them
_SPACE_BIAS = -9.0
_RANK = 8


@dataclass(frozen=True)
class Shape:
    """A Qwen3 so small that a CPU runs thousands of tokens a second; heads of 64 are the least that vLLM's kernels take."""

    hidden: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    inner: int = 512
    vocabulary: int = 2048
    length: int = 2048


@dataclass(frozen=True)
class Models:
    """Where the models lie."""

    folder: Path

    @property
    def lm(self) -> str:
        """The language model."""
        return str(self.folder / "tiny")

    @property
    def embedder(self) -> str:
        """The embedding model, whose vectors have 256 numbers."""
        return str(self.folder / "tiny-embed")

    @property
    def lora(self) -> str:
        """The adapter of the language model."""
        return str(self.folder / "tiny-lora")


def make(folder: Path) -> Models:
    """Write all three below a folder."""
    made = Models(folder)
    _language_model(Path(made.lm), Shape(), seed=0)
    _language_model(Path(made.embedder), Shape(), seed=2, embeds=True)
    _adapter(Path(made.lora), Shape(), seed=1)
    return made


def language_model(folder: Path, shape: Shape) -> str:
    """One of a shape of one's own; its folder."""
    _language_model(folder, shape, seed=0)
    return str(folder)


def _write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")


def _tokeniser(folder: Path, shape: Shape) -> dict[str, int]:
    """A byte-level BPE, trained on Python's own help texts; its vocabulary."""
    tokeniser = Tokenizer(models.BPE())
    tokeniser.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokeniser.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=shape.vocabulary, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokeniser.train_from_iterator((text for _, text in sorted(pydoc_data.topics.topics.items())), trainer)
    tokeniser.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "eos_token": "<|end|>", "chat_template": _TEMPLATE}
    _write(folder / "tokenizer_config.json", **settings, model_max_length=shape.length, clean_up_tokenization_spaces=False)
    return tokeniser.get_vocab()


def _projections(shape: Shape) -> dict[str, tuple[int, int]]:
    """The matrices of a layer: rows and columns."""
    queries, values = shape.heads * shape.head, shape.kv_heads * shape.head
    return {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (values, shape.hidden),
        "self_attn.v_proj": (values, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }


def _norms(shape: Shape) -> dict[str, int]:
    return {
        "input_layernorm": shape.hidden,
        "post_attention_layernorm": shape.hidden,
        "self_attn.q_norm": shape.head,
        "self_attn.k_norm": shape.head,
    }


def _language_model(folder: Path, shape: Shape, *, seed: int, embeds: bool = False) -> None:
    """A causal LM; or, if it `embeds`, the same without a head, whose vector is that of the last token."""
    folder.mkdir(parents=True, exist_ok=True)
    words = _tokeniser(folder, shape)
    shape = dataclasses.replace(shape, vocabulary=len(words))
    numbers = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int, scale: float | None = None) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=numbers) * (scale or columns**-0.5)).to(torch.bfloat16)

    weights = {"embed_tokens.weight": drawn(shape.vocabulary, shape.hidden, 1.0)}
    for layer in range(shape.layers):
        weights |= {f"layers.{layer}.{name}.weight": drawn(*size) for name, size in _projections(shape).items()}
        weights |= {f"layers.{layer}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in _norms(shape).items()}
    weights["norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    if not embeds:
        weights = {f"model.{name}": value for name, value in weights.items()}
        # Peaked, so that rounding seldom decides between two tokens.
        weights["lm_head.weight"] = drawn(shape.vocabulary, shape.hidden, 3 * shape.hidden**-0.5)
        _bias_against_spaces(weights, shape, words)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write(
        folder / "config.json",
        architectures=["Qwen3Model" if embeds else "Qwen3ForCausalLM"],
        model_type="qwen3",
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        attention_bias=False,
        torch_dtype="bfloat16",
        eos_token_id=1,
        pad_token_id=0,
    )
    if not embeds:
        _write(folder / "generation_config.json", eos_token_id=1, pad_token_id=0, do_sample=True, temperature=1.0)


def _bias_against_spaces(weights: dict[str, torch.Tensor], shape: Shape, words: dict[str, int]) -> None:
    """Keep feature 0 constant through all layers, which makes it a bias of the head: under a grammar of JSON white space would never end."""
    weights["model.embed_tokens.weight"][:, 0] = 3.0
    for layer in range(shape.layers):
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"][0] = 0
        weights[f"model.layers.{layer}.mlp.down_proj.weight"][0] = 0
    blank = [not word.strip(_SPACES) for word, _ in sorted(words.items(), key=lambda pair: pair[1])]
    weights["lm_head.weight"][:, 0] = torch.tensor(blank) * _SPACE_BIAS


def _adapter(folder: Path, shape: Shape, *, seed: int, scale: float = 0.5) -> None:
    """A LoRA adapter as peft saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, weights = torch.Generator().manual_seed(seed), {}
    targets = ("q_proj", "v_proj")
    for layer in range(shape.layers):
        for target in targets:
            rows, columns = _projections(shape)[f"self_attn.{target}"]
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            weights[f"{name}.lora_A.weight"] = torch.randn(_RANK, columns, generator=numbers) * scale * columns**-0.5
            weights[f"{name}.lora_B.weight"] = torch.randn(rows, _RANK, generator=numbers) * scale
    save_file(weights, str(folder / "adapter_model.safetensors"))
    _write(
        folder / "adapter_config.json",
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path="tiny",
        r=_RANK,
        lora_alpha=2 * _RANK,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(targets),
        inference_mode=True,
        fan_in_fan_out=False,
        modules_to_save=None,
    )


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
