"""The tree of a search: which node to go on from, and what is known of each. Knows nothing of engines.

            root                     each node is one answer of the policy, after its parent's conversation
           /    \\
        1 .5     2 .1     back up    visits and totals of every node up to the root
        /  \\
     3 .7   4 .3
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from skyrl_train.types import Message, TrajectoryStatus, Turn


@dataclass(eq=False, kw_only=True)
class Node:
    """`turn` is None at the root alone. `status` None: the conversation can go on, with the prompt `next_prompt`.

    `value` is the mean of what the node and all below it were found to be worth, `earned` the rewards up to here.
    """

    parent: Node | None = None
    number: int = -1
    turn: Turn | None = None
    reward: float = 0.0
    status: TrajectoryStatus | None = None
    messages: tuple[Message, ...] = ()
    next_prompt: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    num_visits: int = 0
    total: float = 0.0

    def path(self) -> list[Node]:
        """The nodes from the first answer to this one; the root is none."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    @property
    def depth(self) -> int:
        return len(self.path())

    @property
    def earned(self) -> float:
        return sum(node.reward for node in self.path())

    @property
    def value(self) -> float:
        return self.total / self.num_visits if self.num_visits else 0.0

    def is_closed(self, width: int) -> bool:
        """Nothing below is left to try: the conversation is over, or all of `width` ways on are closed."""
        if self.status is not None:
            return True
        return len(self.children) >= width and all(child.is_closed(width) for child in self.children)

    def all_below(self) -> Iterator[Node]:
        """All nodes but this one, in the order of their numbers within each level's parents."""
        for child in self.children:
            yield child
            yield from child.all_below()


def select(root: Node, *, width: int, exploration: float) -> Node:
    """The node to go on from: down by UCT to one that has fewer than `width` children.

    UCT (Kocsis and Szepesvári 2006): the child with the highest value + exploration * sqrt(ln N / n). Values are first
    scaled to [0, 1] over the tree, so `exploration` means the same whatever a task's rewards are. Where all of the tree
    is closed it is the root, which gets further children.
    """
    values = [node.value for node in root.all_below()]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = 1.0 / (high - low) if high > low else 0.0

    def uct(node: Node) -> tuple[float, int]:
        assert node.parent is not None
        bonus = exploration * math.sqrt(math.log(max(node.parent.num_visits, 1)) / max(node.num_visits, 1))
        return ((node.value - low) * scale + bonus, -node.number)

    node = root
    while len(node.children) >= width:
        ways = [child for child in node.children if not child.is_closed(width)]
        if not ways:
            return node
        node = max(ways, key=uct)
    return node


def back_up(node: Node, worth: float) -> None:
    """One more visit, of this worth, of the node and all above it."""
    step: Node | None = node
    while step is not None:
        step.num_visits += 1
        step.total += worth
        step = step.parent


def best(root: Node) -> Node:
    """The node that earned most; of equal ones one whose conversation is complete, then the earliest."""
    return max(root.all_below(), key=lambda node: (node.earned, node.status == "completed", -node.number))
