"""What steps cost on a cluster: kernels by their work and the device's curves, messages by their routes."""

from __future__ import annotations

from collections.abc import Sequence

from counterpoint.cluster.cluster import Cluster, Resource
from counterpoint.cluster.device import Device
from counterpoint.kernels.kernel import Kernel, TensorSpec

DEVICE = "device"  # what schedules call the tier that kernels work in


def kernel_cost(device: Device, kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
    """(seconds, flops) of a kernel. A view takes no time: nothing is launched for it."""
    work = kernel.work(*inputs)
    if not work.flops and not work.nbytes and kernel.aliases:
        return 0.0, 0
    spec = inputs[0] if inputs else kernel.outputs()[0]
    return device.seconds(kernel.operator, work.flops, work.nbytes, spec.dtype), work.flops  # type: ignore[arg-type]


class Network:
    """Routes between the ranks of a schedule, numbered, over resources, numbered; each found once.

    places: the cluster's rank for every rank of the schedule. A route is asked for per pair of ranks; copies between
    the tiers of a device have routes too.
    """

    def __init__(self, cluster: Cluster, places: Sequence[int]) -> None:
        self.cluster, self.places = cluster, places
        self.capacity: list[float] = []
        self.at: list[int] = [0]
        self.resources: list[int] = []
        self._numbers: dict[Resource | tuple, int] = {}
        self._routes: dict[tuple, tuple] = {}
        self._costs: dict[tuple, tuple[int, float, float]] = {}

    def message(self, source: int, destination: int, nbytes: int) -> tuple[int, float, float]:
        """(route, latency in seconds, limit in bytes/s) of a message between two ranks."""
        key = (source, destination, nbytes)
        if key not in self._costs:
            ends = (source, destination)
            if ends not in self._routes:
                route = self.cluster.route(self.places[source], self.places[destination])
                found = [(r, r.bytes_per_second) for r in route.resources]
                self._routes[ends] = (self._add(found), route)
            number, route = self._routes[ends]
            self._costs[key] = (number, route.latency_seconds, route.flow_bytes_per_second(nbytes))
        return self._costs[key]

    def copy(self, rank: int, source: str, target: str, nbytes: int) -> tuple[int, float, float]:
        """The same for a copy between memory tiers; copies of one rank in one direction share that way."""
        device = self.cluster.device(self.places[rank])
        outer = target if source == DEVICE else source
        tier = device.memory[0] if outer == DEVICE else device.tier(outer)
        moved = nbytes if source != target else 2 * nbytes  # within a tier, read and written
        key = ("copy", rank, source, target)
        if key not in self._routes:
            self._routes[key] = (self._add([(key, tier.attained.maximum)]),)
        limit = tier.attained.at(moved) * nbytes / moved if moved else tier.attained.maximum
        return self._routes[key][0], device.launch_seconds, limit

    def _add(self, resources: list[tuple[Resource | tuple, float]]) -> int:
        for key, capacity in resources:
            if key not in self._numbers:
                self._numbers[key] = len(self.capacity)
                self.capacity.append(capacity)
            self.resources.append(self._numbers[key])
        self.at.append(len(self.resources))
        return len(self.at) - 2
