"""Serve an application of this folder by Ray Serve: python ray_main.py MODULE PATH PORT. The mode is in the environment (RAY_SERVE_...)."""

import importlib
import signal
import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

module, path, port = sys.argv[1:]
ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(port)), logging_config=LoggingConfig(enable_access_log=False))
serve.run(importlib.import_module(module).app, name="benchmark", route_prefix=path)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
serve.shutdown()
ray.shutdown()
