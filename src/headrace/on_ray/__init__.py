"""Lowering to Ray: the only package that imports ray."""
