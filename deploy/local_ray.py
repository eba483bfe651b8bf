"""A Ray of the run's own on this machine, bound to the loopback address.

Ray replaces 127.0.0.1 by the machine's own address and then listens on every interface, unless it is
told that clusters are off, which is its default on Windows and macOS
(``ray._private.services.resolve_ip_for_localhost``). The switch is read from the environment by Ray's
processes and from a constant in this one.
"""

from __future__ import annotations

import logging
import os

import ray
from ray._private import ray_constants

from protocol.errors import RunFailed

SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class LocalRay:
    """Start with as many logical CPUs and GPUs as the run needs; ``close`` leaves nothing running.

    Raises:
        RunFailed: Ray did not start, or not on the loopback address.
    """

    def __init__(self, cpus: int, gpus: int) -> None:
        self._before = os.environ.get(SWITCH), ray_constants.ENABLE_RAY_CLUSTER
        os.environ[SWITCH] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init(
                num_cpus=cpus,
                num_gpus=gpus or None,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        except (RuntimeError, OSError, ValueError) as error:
            self.close()
            raise RunFailed(f"Ray did not start on this machine: {error}") from None
        bound: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        if bound != "127.0.0.1":
            self.close()
            raise RunFailed(f"Ray {ray.__version__} bound {bound} although it was told to stay on 127.0.0.1")

    def close(self) -> None:
        """Stop every process of this Ray."""
        ray.shutdown()
        value, constant = self._before
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(SWITCH)
        if value is not None:
            os.environ[SWITCH] = value
