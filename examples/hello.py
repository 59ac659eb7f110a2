"""The smallest pipeline: two functions, no model.

headrace run examples/hello.py --input examples/hello.csv --output hello-output --keep id
"""

import numpy as np

import headrace as hr


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


@hr.stage(out={"words": int, "shouting": float})
def measure(text: hr.Column[str]):
    capitals = np.array([sum(c.isupper() for c in t) for t in text])
    letters = np.array([sum(c.isalpha() for c in t) for t in text])
    return {"words": [len(t.split()) for t in text], "shouting": capitals / np.maximum(letters, 1)}


hello = hr.Pipeline("hello", clean, measure)
