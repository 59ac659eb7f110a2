"""A language model behind ray.serve.llm's OpenAI interface. BENCHMARK_LLM holds the model, vLLM's arguments, variables and the device, as JSON."""

import json
import os

from ray.serve.llm import LLMConfig, build_openai_app

given = json.loads(os.environ["BENCHMARK_LLM"])

app = build_openai_app(
    {
        "llm_configs": [
            LLMConfig(
                model_loading_config={"model_id": given["name"], "model_source": given["model"]},
                engine_kwargs=given["engine"],
                deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
                runtime_env={"env_vars": given["variables"]},
                **({"accelerator_config": {"kind": "cpu"}} if given["device"] == "cpu" else {}),
            )
        ]
    }
)
