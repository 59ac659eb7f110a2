"""Guest reviews to sentence vectors, with headrace.

headrace run headrace_job.py --input reviews.parquet --output vectors --keep review_id --set embed.model=MODEL
"""

import headrace as hr


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    if not all(t.strip() for t in text):
        raise ValueError("empty review")
    return {"text": [" ".join(t.split()) for t in text]}


@hr.stage(out={"vector": hr.Vector(384)}, on=[hr.gpu(1), hr.cpu(1)], batch=64)
class Embed:
    model: str = "all-MiniLM-L6-v2"

    def setup(self, device: str):
        from sentence_transformers import SentenceTransformer

        self.encoder = SentenceTransformer(self.model, device=device)

    def __call__(self, text: hr.Column[str]):
        return {"vector": self.encoder.encode(text)}


reviews = hr.Pipeline("reviews", clean, Embed(), outputs=["vector"])
