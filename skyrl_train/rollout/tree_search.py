"""Monte-Carlo tree search over conversations: `generator.agent=skyrl_train.rollout.tree_search.TreeSearch`.

    select    down the tree by UCT, to a node that can go on
    expand    sample `width` answers after it: branches of one session, which share the keys of their path
    evaluate  what the environment has paid up to there, or at the end of a simulated rest of the conversation
    back up   to all nodes above

The trajectory that comes back is the best path found. Its `branches` are all nodes, one trajectory of one turn each,
with the backed-up value as reward: training compares those that answer the same prompt (see rollout/branches.py), so
each node has an advantage of its own over its siblings, and each sampled token is trained on once.

An environment is stepped by replaying its conversation from the start: it must answer the same actions in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from skyrl_train.data.chat import response_text
from skyrl_train.environments.base import StepOutput
from skyrl_train.errors import ConfigError
from skyrl_train.rollout.agent import Agent, finite, request_id, turn_sampling
from skyrl_train.rollout.hosted_environment import HostedEnvironment, numbers
from skyrl_train.rollout.search_tree import Node, back_up, best, select
from skyrl_train.types import (
    Completion,
    GenerateRequest,
    Message,
    Prompt,
    SamplingParams,
    SessionRef,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
    Turn,
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TreeSearch(Agent):
    """Settings are attributes of the class: one's own, with others, derives from this one.

    The search ends with `num_expansions`, or once `max_sampled_tokens` were sampled (the last expansion may go over).
    With `simulate` a new node is worth what a conversation that goes on from it earns in the end, and those further
    answers become nodes too; else it is worth what it has earned so far. Greedy sampling has one child a node: its
    siblings would be the same.
    """

    width: ClassVar[int] = 4
    num_expansions: ClassVar[int] = 16
    max_sampled_tokens: ClassVar[int | None] = None
    exploration: ClassVar[float] = 0.5
    simulate: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("width", "num_expansions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{type(self).__name__}.{name} must be >= 1, found {getattr(self, name)}")

    async def evaluate(self, node: Node) -> float:
        """What a node is worth, in the units of rewards; a value model of one's own would be asked here."""
        return node.earned

    async def run(
        self, trajectory_id: TrajectoryId, prompt: Prompt, prompt_token_ids: tuple[int, ...], sampling: SamplingParams
    ) -> Trajectory:
        """One search. What an environment raises comes out; `generator.agent` makes it a failed trajectory."""
        if self.sessions is None:
            return await self._search(trajectory_id, prompt, prompt_token_ids, sampling, None)
        async with self.sessions.one() as session:
            return await self._search(trajectory_id, prompt, prompt_token_ids, sampling, session)

    async def _search(
        self,
        trajectory_id: TrajectoryId,
        prompt: Prompt,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        session: SessionRef | None,
    ) -> Trajectory:
        search = _Search(agent=self, id=trajectory_id, prompt=prompt, sampling=sampling, session=session)
        root = await search.root(prompt_token_ids)
        width = 1 if sampling.temperature == 0 else self.width
        for _ in range(self.num_expansions):
            if self.max_sampled_tokens is not None and search.num_sampled_tokens >= self.max_sampled_tokens:
                break
            node = select(root, width=width, exploration=self.exploration)
            if node.is_closed(width) and width == 1:
                break  # greedy: another child of the root would be the same
            count = width - len(node.children) if len(node.children) < width else width
            children = await search.expand(node, count)
            ends = await search.simulate(children) if self.simulate else children
            for end in ends:
                back_up(end, await self.evaluate(end))
        return search.result(root)


@dataclass(eq=False, kw_only=True)
class _Search:
    """One search: its engine's requests and its environments."""

    agent: TreeSearch
    id: TrajectoryId
    prompt: Prompt
    sampling: SamplingParams
    session: SessionRef | None
    num_nodes: int = 0
    num_sampled_tokens: int = 0
    nodes: list[Node] = field(default_factory=list)

    async def root(self, prompt_token_ids: tuple[int, ...]) -> Node:
        messages, _ = await self._replay([], None)
        if messages != self.prompt.messages:
            prompt_token_ids = self.agent.chat.first(messages)
        return Node(messages=messages, next_prompt=prompt_token_ids)

    async def expand(self, node: Node, count: int) -> list[Node]:
        """`count` further answers after `node`, in the order of their numbers whatever was sampled first."""
        begin, self.num_nodes = self.num_nodes, self.num_nodes + count
        children = await _all([self._child(node, number) for number in range(begin, begin + count)])
        node.children += children
        self.nodes += children
        return children

    async def simulate(self, nodes: Sequence[Node]) -> list[Node]:
        """Goes on from each with one answer after another; where these conversations end."""
        ends = list(nodes)
        while going := [place for place, node in enumerate(ends) if node.status is None]:
            begin, self.num_nodes = self.num_nodes, self.num_nodes + len(going)
            made = await _all([self._child(ends[place], begin + i) for i, place in enumerate(going)])
            for place, child in zip(going, made, strict=True):
                ends[place].children.append(child)
                ends[place] = child
            self.nodes += made
        return ends

    def result(self, root: Node) -> Trajectory:
        found = best(root)
        path = found.path()
        return Trajectory(
            id=self.id,
            turns=tuple(node.turn for node in path if node.turn is not None),
            rewards=tuple(node.reward for node in path),
            # The search ended before the conversation did.
            status=found.status or "truncated",
            metrics={
                **{name: value for node in path for name, value in node.metrics.items()},
                "search_nodes": len(self.nodes),
                "search_depth": max(node.depth for node in self.nodes),
                "search_sampled_tokens": self.num_sampled_tokens,
            },
            branches=tuple(self._branch(node) for node in sorted(self.nodes, key=lambda node: node.number)),
        )

    def _branch(self, node: Node) -> Trajectory:
        """Branch 0 is the best path; the nodes are numbered from 1."""
        assert node.turn is not None
        return Trajectory(
            id=replace(self.id, branch=node.number + 1),
            turns=(node.turn,),
            rewards=(node.value,),
            status=node.status or "completed",
        )

    # -- one node

    async def _child(self, parent: Node, number: int) -> Node:
        agent = self.agent
        completion = await agent.generate(
            GenerateRequest(
                request_id=request_id(self.id, number),
                prompt_token_ids=parent.next_prompt,
                sampling=turn_sampling(self.sampling, number),
                session=self.session,
                priority=parent.depth if agent.later_turns_first else 0,
            )
        )
        self.num_sampled_tokens += len(completion.token_ids)
        answer = response_text(agent.tokenizer, completion.token_ids)
        _, output = await self._replay(parent.path(), answer)
        assert output is not None
        node = Node(
            parent=parent,
            number=number,
            turn=Turn(prompt_token_ids=parent.next_prompt, completion=completion),
            reward=finite(output["reward"]),
            metrics=numbers(output.get("metadata")),
        )
        self._go_on(node, parent, completion, answer, output)
        return node

    def _go_on(self, node: Node, parent: Node, completion: Completion, answer: str, output: StepOutput) -> None:
        """The prompt of the node's children, or why it has none: as in `Agent`."""
        agent = self.agent
        over: TrajectoryStatus | None = None
        if completion.finish_reason != "stop":
            over = "truncated" if completion.finish_reason == "length" else "aborted"
        elif output["done"]:
            over = "completed"
        elif node.depth == agent.max_turns:
            over = "truncated"
        if over is not None:
            node.status = over
            return
        observations = list(output["observations"])
        rewritten = output.get("postprocessed_action")
        edited = rewritten if isinstance(rewritten, str) and rewritten != answer else None
        said: Message = {"role": "assistant", "content": answer if edited is None else edited}
        node.messages = (*parent.messages, said, *observations)
        node.next_prompt = agent.chat.following(
            parent.next_prompt, completion.token_ids, observations, messages=node.messages, edited=edited
        )
        if agent.max_input_length is not None and len(node.next_prompt) > agent.max_input_length:
            node.status = "truncated"

    async def _replay(self, path: Sequence[Node], answer: str | None) -> tuple[tuple[Message, ...], StepOutput | None]:
        """A fresh environment that has seen the answers of `path`, and then `answer`, if there is one.

        Returns what `init` made of the prompt, and what the last step returned.
        """
        agent, prompt = self.agent, self.prompt
        environment = HostedEnvironment(
            f"trajectory {self.id}, environment {prompt.environment!r}",
            agent.environments[prompt.environment],
            env_config=agent.environment_config,
            extras={"max_turns": agent.max_turns, **prompt.extras},
            pool=agent.pool,
        )
        output: StepOutput | None = None
        try:
            messages = tuple(await environment.init(prompt.messages))
            for node in path:
                assert node.turn is not None
                again = await environment.step(response_text(agent.tokenizer, node.turn.completion.token_ids))
                if finite(again["reward"]) != node.reward:
                    raise ValueError(
                        f"environment {prompt.environment!r} paid {node.reward} for an answer and {again['reward']} "
                        "for the same one when it was replayed; a search needs an environment that repeats itself"
                    )
            if answer is not None:
                output = await environment.step(answer)
            measured = await environment.finish()
        except BaseException:
            await environment.abandon()
            raise
        if output is not None and measured:
            output = {**output, "metadata": {**numbers(output.get("metadata")), **measured}}
        return messages, output


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first failure as it is (no group: callers tell an engine's from an environment's by type), with
    nothing left running.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
