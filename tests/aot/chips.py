"""TPUs that kernels are compiled for."""

from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


def first_chip(name: str) -> SingleDeviceSharding:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name])
    return SingleDeviceSharding(topology.devices[0])
