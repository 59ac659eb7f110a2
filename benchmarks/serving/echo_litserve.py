"""The echo service in LitServe."""

import sys

import litserve as ls


class Echo(ls.LitAPI):
    def setup(self, device):
        pass

    def decode_request(self, request):
        return request["text"]

    def predict(self, text):
        return text.strip()

    def encode_response(self, output):
        return {"text": output}


if __name__ == "__main__":
    ls.LitServer(Echo(api_path="/echo"), accelerator="cpu").run(port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False, log_level="error")
