"""Pipelines online, without an engine: what a front door and a replica do, whoever starts them."""
