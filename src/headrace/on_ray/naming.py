"""What the actors and applications of a service are called on a Ray cluster."""

from __future__ import annotations

from typing import Any

import ray

NAMESPACE = "headrace"

BACKSTAGE = "background"
"""The door without HTTP, through which a service's work in the background goes."""


def control_name(service: str) -> str:
    """The actor that knows the service."""
    return f"headrace-{service}"


def door_name(service: str, door: int | str) -> str:
    """One of its doors, by its number, or `BACKSTAGE`."""
    return f"headrace-{service}-door-{door}"


def application_name(service: str, version: int) -> str:
    """The application of Ray Serve that is one version of the service."""
    return f"{service}-{version}"


def control_of(service: str) -> Any:
    """The control actor of a service; raises ValueError when there is none."""
    return ray.get_actor(control_name(service), namespace=NAMESPACE)
