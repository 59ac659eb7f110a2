"""How many replicas: pure decisions from what was observed, without an engine and without a clock of their own."""
