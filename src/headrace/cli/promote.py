"""`headrace promote`: the version that is being brought in answers everything."""

from __future__ import annotations

from headrace.cli.options import Verbose
from headrace.cli.rollback import Address, Service
from headrace.cli.serve import tell


def promote(name: Service, address: Address = None, verbose: Verbose = False) -> None:
    """Let the version that is being brought in, a shadow or a canary, answer everything as soon as its replicas are ready, whatever its trial says."""
    from headrace.on_ray import service  # loads ray

    service.command(name, "promote", where=service.Where(address, verbose=verbose), tell=tell)
