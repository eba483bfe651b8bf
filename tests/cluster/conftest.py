"""One Ray for all tests that need one, on the loopback address."""

import pytest
import ray

from deploy.local_ray import LocalRay


@pytest.fixture(scope="session")
def local_ray():
    started = LocalRay(cpus=5, gpus=0)
    yield ray
    started.close()
