"""What a service shows of itself: metrics, traces, logs, the live view."""
