"""The client of services: `hr.Client`. Loaded when it is asked for."""

try:
    from headrace.client.remote import Client, Remote
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: hr.Client needs pip install 'headrace[client]'", name=error.name) from error

__all__ = ["Client", "Remote"]
