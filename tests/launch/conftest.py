"""A Slurm cluster for the tests of launching."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm_cluster import PACKAGES, SlurmCluster, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Three nodes of four CPUs. Skipped without Slurm's packages, unless VITSCALE_NEED_SLURM=1."""
    lacking = missing()
    if lacking:
        said = f"no Slurm here ({', '.join(lacking)} not found): install {PACKAGES}"
        assert os.environ.get("VITSCALE_NEED_SLURM") != "1", said
        pytest.skip(said)
    cluster = SlurmCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
