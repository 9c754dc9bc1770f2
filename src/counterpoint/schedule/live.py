"""Live bytes of a schedule whose steps run in the order in which they are written: memory without a clock."""

from __future__ import annotations

from counterpoint.schedule.schedule import Compute, Copy, Schedule


def live_bytes(schedule: Schedule) -> list[int]:
    """Most bytes alive on the device at every step, from its results' coming into being on; first the inputs' bytes.

    The rules are those of both executors: results exist beside what a step reads, then what nothing else reads is
    freed. Values in host memory do not count.
    """
    memory, values = schedule.memory, schedule.values
    readers = dict(memory.readers)
    host: set[str] = set()
    live = sum(v.nbytes for v in schedule.inputs)
    found = [live]
    for step in schedule.steps:
        away = isinstance(step, Copy) and step.tier == "host"
        if isinstance(step, Compute) and step.inputs and step.kernel.aliases and step.inputs[0] in host:
            host.update(v.name for v in step.writes)  # a view of what lies in host memory
        made = [v.name for v in step.writes if memory.root[v.name] == v.name]
        if away:
            host.update(made)
        else:
            live += sum(values[name].nbytes for name in made)
        found.append(live)
        gone = [name for name in made if not readers[name] and name not in memory.kept]
        for root in {memory.root[name] for name in step.reads}:
            readers[root] -= 1
            if not readers[root] and root not in memory.kept:
                gone.append(root)
        live -= sum(values[root].nbytes for root in gone if root not in host)
    return found
