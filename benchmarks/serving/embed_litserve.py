"""The embedding in LitServe, batched."""

import sys

import litserve as ls
from embedding import Encoder, clean, tokenizer


class Reviews(ls.LitAPI):
    def setup(self, device):
        self.tokenizer, self.encoder = tokenizer(), Encoder()

    def decode_request(self, request):
        return clean(request["text"])

    def batch(self, inputs):
        return inputs

    def predict(self, texts):
        return list(zip(texts, self.encoder([encoding.ids for encoding in self.tokenizer.encode_batch(texts)]), strict=True))

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"text": output[0], "vector": output[1].tolist()}


if __name__ == "__main__":
    api = Reviews(max_batch_size=32, batch_timeout=0.01, api_path="/reviews")
    ls.LitServer(api, accelerator="cpu").run(port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False, log_level="error")
