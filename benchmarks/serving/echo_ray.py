"""The echo service on Ray Serve, as its documentation has a deployment with FastAPI ingress left out: a plain handler."""

from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=1000)
class Echo:
    async def __call__(self, request: Request) -> dict[str, str]:
        row = await request.json()
        return {"text": row["text"].strip()}


app = Echo.bind()
