"""Bodies of requests and answers, and what a service says of them: types checked, JSON and Arrow to columns and back, OpenAPI."""
