"""The embedding in BentoML, batched by a service of its own, as its documentation has it."""

import bentoml
from embedding import Encoder, clean, tokenizer


@bentoml.service(workers=1, traffic={"timeout": 60})
class Reviews:
    def __init__(self):
        self.tokenizer, self.encoder = tokenizer(), Encoder()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=60_000, route="/batch")
    def embed(self, texts: list[str]) -> list[list[float]]:
        return [vector.tolist() for vector in self.encoder([encoding.ids for encoding in self.tokenizer.encode_batch(texts)])]


@bentoml.service(workers=1, traffic={"timeout": 60})
class Front:
    model = bentoml.depends(Reviews)

    @bentoml.api(route="/reviews")
    async def reviews(self, text: str) -> dict:
        cleaned = clean(text)
        return {"text": cleaned, "vector": (await self.model.to_async.embed([cleaned]))[0]}
