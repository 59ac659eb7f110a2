"""Ask a language model about guest reviews, and act on its answer: clean on CPUs, the model with a schema into typed columns, a rule on them.

The model comes from the hub; the variable MODEL names another one, or a folder.

headrace run examples/summarise.py --input ../shared/data/reviews.parquet --output judged --keep review_id --limit 500
"""

import os
from typing import Literal

import pydantic

import headrace as hr


class Verdict(pydantic.BaseModel):
    mood: Literal["happy", "mixed", "angry"]
    topic: Literal["room", "food", "staff", "place"]
    refund: bool


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


judge = hr.LLM(
    name="judge",
    model=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"),
    system="You read reviews of hotels. Answer in JSON.",
    prompt="How does this guest feel, about what, and is a refund asked for?\n\n{text}",
    schema=Verdict,  # mood, topic and refund become columns
    sampling=hr.Sampling(max_tokens=64),
    on=[hr.gpu(1), hr.cpu(2)],
    engine={"max_model_len": 2048},
)


@hr.stage(out={"urgent": bool})
def rule(mood: hr.Column[str], topic: hr.Column[str], refund: hr.Column[bool]):
    return {"urgent": [one == "angry" and (about == "staff" or back) for one, about, back in zip(mood, topic, refund, strict=True)]}


reviews = hr.Pipeline("reviews", clean, judge, rule)
