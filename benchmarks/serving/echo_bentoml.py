"""The echo service in BentoML."""

import bentoml


@bentoml.service(workers=1, traffic={"timeout": 60})
class Echo:
    @bentoml.api(route="/echo")
    async def echo(self, text: str) -> dict[str, str]:
        return {"text": text.strip()}
