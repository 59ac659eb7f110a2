"""The edge of an OpenAI-compatible LLM service: who may use it, how much, in what order, and batches of requests."""
