"""The embedding in headrace: the stages of examples/reviews.py, one replica with one thread."""

from embedding import Encoder, clean, tokenizer

import headrace as hr


@hr.stage(out={"text": str})
def tidy(text: hr.Column[str]):
    return {"text": [clean(one) for one in text]}


class Loaded:
    tokenizer = None


@hr.stage(out={"tokens": hr.Vector(dtype="int32")})
def tokenise(text: hr.Column[str]):
    if Loaded.tokenizer is None:
        Loaded.tokenizer = tokenizer()
    return {"tokens": [encoding.ids for encoding in Loaded.tokenizer.encode_batch(text)]}


@hr.stage(out={"vector": hr.Vector(384)}, batch=hr.tokens(1024, of="tokens"), replicas=1)
class Embed:
    def setup(self, device: str):
        self.encoder = Encoder()

    def __call__(self, tokens: hr.Column[hr.Vector]):
        return {"vector": self.encoder(tokens)}


reviews = hr.Pipeline("reviews", tidy, tokenise, Embed(), outputs=["text", "vector"])
