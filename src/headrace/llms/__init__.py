"""The LLM as a stage, and the engine under it: the only package that imports vllm."""

from headrace.llms.llm import LLM
from headrace.llms.sampling import Sampling

__all__ = ["LLM", "Sampling"]
