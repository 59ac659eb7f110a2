"""`headrace stop`: end a service."""

from __future__ import annotations

from headrace.cli.options import Verbose
from headrace.cli.rollback import Address, Service
from headrace.cli.serve import tell


def stop(name: Service, address: Address = None, verbose: Verbose = False) -> None:
    """End a service. Requests that it has taken are answered first."""
    from headrace.on_ray import service  # loads ray

    service.stop(name, where=service.Where(address, verbose=verbose), tell=tell)
