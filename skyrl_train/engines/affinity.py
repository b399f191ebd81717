"""Which engine a request goes to: where its prefix is already, as long as that engine is not much busier than others.

first turn    with the other samples of its prompt: the shared prompt is computed once
later turns   where the trajectory's earlier turn ran: its history is cached there
all others    where the fewest requests are in flight; of equals the first
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping

_REQUEST_ID = re.compile(r"(?P<trajectory>(?P<prompt>.+)/\d+/\d+)(?:/t\d+)?")


def group_and_trajectory(request_id: str) -> tuple[str, str] | None:
    """Prompt and trajectory of a rollout's request: "7/2/0/t1" gives ("7", "7/2/0"). None for other names.

    Rollouts name requests as rollout.agent.request_id does: PROMPT/SAMPLE/BRANCH, with /tN from the second turn on.
    """
    match = _REQUEST_ID.fullmatch(request_id)
    return None if match is None else (match["prompt"], match["trajectory"])


class Affinity:
    """Remembers the last `max_remembered` groups and as many trajectories; who is forgotten is placed anew.

    A first turn leaves its group once the group's engine has more than `max_lead` requests more in flight than the
    least loaded one; the group's later samples follow it. So one prompt with many samples still uses all engines.
    """

    def __init__(self, *, max_lead: int = 32, max_remembered: int = 65536) -> None:
        self._max_lead = max_lead
        self._max_remembered = max_remembered
        self._groups: OrderedDict[str, int] = OrderedDict()
        self._trajectories: OrderedDict[str, int] = OrderedDict()

    def choose(self, request_id: str, loads: Mapping[int, int]) -> int:
        """One of the engines that `loads` names, with their requests in flight; at least one is there."""
        least = min(loads, key=lambda engine: (loads[engine], engine))
        names = group_and_trajectory(request_id)
        if names is None:
            return least
        group, trajectory = names
        chosen = self._trajectories.get(trajectory)
        if chosen is None or chosen not in loads:
            chosen = self._groups.get(group)
            if chosen is None or chosen not in loads or loads[chosen] - loads[least] > self._max_lead:
                chosen = least
        self._remember(self._groups, group, chosen)
        self._remember(self._trajectories, trajectory, chosen)
        return chosen

    def forget(self) -> None:
        """Prefixes are gone everywhere: the next request of each group and trajectory is placed by load."""
        self._groups.clear()
        self._trajectories.clear()

    def __len__(self) -> int:
        """Entries that are kept."""
        return len(self._groups) + len(self._trajectories)

    def _remember(self, table: OrderedDict[str, int], name: str, engine: int) -> None:
        table[name] = engine
        table.move_to_end(name)
        if len(table) > self._max_remembered:
            table.popitem(last=False)
