"""A cluster of one device: an engine for prompts and one for decoding, over one pool and with shares of the device."""

from __future__ import annotations

from redraft import registry
from redraft.ops.format import PAGE
from redraft.sched.scheduler import Scheduler
from redraft.sim.cluster import LAST, Cluster, Journey
from redraft.sim.runner import Cost
from redraft.sim.shares import DECODE, LEAST, PROMPT, Controller, Device, SemiPD
from redraft.sim.worker import Worker


class SharedDevice(Cluster):
    """prompts, decoding: their schedulers."""

    def __init__(self, cost: Cost, controller: Controller, prompts: Scheduler, decoding: Scheduler, *, blocks: int) -> None:
        self.device = Device(cost, controller)
        first = Worker(0, self.device.part(PROMPT), prompts, blocks=blocks, context=PAGE * blocks, most=1)
        rest = Worker(1, self.device.part(DECODE), decoding, blocks=blocks, context=PAGE * blocks, most=1, stages=(LAST,), beside=first)
        super().__init__([first, rest], registry.create("route", "least-load").open())
        memory = first.engine.memory
        self.device.usage = lambda: memory.used() / memory.blocks
        self.device.busy = lambda stage: self.workers[stage].engine.has_work

    def _end(self, place: int) -> None:
        super()._end(place)
        self._free |= {worker.index for worker in self.workers if worker.ends is None}  # memory of one is memory of the other

    def _finish(self, journey: Journey, worker: Worker) -> None:
        super()._finish(journey, worker)
        if isinstance(self.device.controller, SemiPD):
            request = journey.request
            tokens = max(1, len(request.output) - 1)
            self.device.controller.load = self._load()
            self.device.controller.observe(journey.first - journey.arrived, (journey.last - journey.first) / tokens)

    def _load(self) -> float:
        """The share of the device that prompts needed so far."""
        return min(1 - LEAST, self.device.needed[PROMPT] / max(self.now, 1e-9))
