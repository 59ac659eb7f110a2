"""The embedding on Ray Serve, as its documentation has dynamic batching: `@serve.batch` with a fixed window."""

from embedding import Encoder, clean, tokenizer
from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Reviews:
    def __init__(self):
        self.tokenizer, self.encoder = tokenizer(), Encoder()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def embed(self, texts):
        cleaned = [clean(text) for text in texts]
        vectors = self.encoder([encoding.ids for encoding in self.tokenizer.encode_batch(cleaned)])
        return [{"text": text, "vector": vector.tolist()} for text, vector in zip(cleaned, vectors, strict=True)]

    async def __call__(self, request: Request):
        return await self.embed((await request.json())["text"])


app = Reviews.bind()
