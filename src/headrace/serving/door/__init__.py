"""The front door: HTTP on one side, replicas on the other. It knows no user code."""
