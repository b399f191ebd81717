"""EAGLE and EAGLE-3 heads: what the drafter guesses is what a slow forward over the whole sequence says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from skyrl_train.engines.embedded.attention import PagedBatch
from skyrl_train.engines.embedded.backends import native_or_warn
from skyrl_train.engines.embedded.drafts.base import Drafts, FollowedRows
from skyrl_train.engines.embedded.drafts.eagle.drafter import EagleDrafter, EagleSettings
from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.head import EagleHead, Head, Target, word_ids
from skyrl_train.engines.embedded.request import RequestState, Seats
from skyrl_train.engines.embedded.uniforms import uniforms
from skyrl_train.types import GenerateRequest, SamplingParams
from tests.tiny import EOS_ID, VOCAB_SIZE, make_model

SHAPE: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
NUM_SLOTS, CONTEXT = 400, 64


class Causal:
    """Attention over one whole sequence."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out[0].transpose(0, 1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3", seed=3, **SHAPE)


def make_head(model: PreTrainedModel, algorithm: str, *, words: Sequence[int] | None = None, seed: int = 0) -> Head:
    """Random, and far from indifferent."""
    if algorithm == "eagle3":
        head: Head = fresh_eagle3(model, seed=seed, word_ids=words)
    else:
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        )  # fmt: skip
        head = EagleHead(config, taps=(4,), fc_bias=True, qkv_bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() == 2:
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return head.eval()


def tapped(model: PreTrainedModel, head: Head, tokens: Sequence[int]) -> torch.Tensor:
    """Outputs of the tapped layers [T, G * H], or what the norm makes of the last one's."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, i=i: seen.__setitem__(i, out))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(
            input_ids=torch.tensor([tokens]), position_ids=torch.arange(len(tokens))[None], use_cache=False,
            attention_context=Causal(),
        )  # fmt: skip
        seen[-1] = model.model.embed_tokens(torch.tensor([tokens]))
        seen[len(model.model.layers)] = model.model.norm(seen[len(model.model.layers) - 1])
    for hook in hooks:
        hook.remove()
    return torch.cat([seen[tap][0] for tap in head.taps], dim=-1)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, head: Head, tokens: Sequence[int], guesses: Sequence[int]) -> torch.Tensor:
    """The head's logits [V] of what follows these guesses: every row computed anew, one whole sequence."""
    target = Target.of(model)
    hidden = head.fuse(tapped(model, head, tokens[:-1]))
    following = list(tokens[1:])
    for guess in [*guesses, None]:
        out, for_logits = head(
            embeds=target.embed(torch.tensor([following])),
            hidden=hidden[None],
            position_ids=torch.arange(len(following))[None],
            attention_context=Causal(),
        )
        if guess is not None:
            following.append(guess)
            hidden = torch.cat((hidden, out[0, -1:]))
    own = getattr(head, "lm_head", None)
    logits = (own or target.lm_head)(for_logits[0, -1])
    ids = word_ids(head)
    return logits if ids is None else torch.full((VOCAB_SIZE,), -torch.inf).scatter(0, ids, logits)


class Harness:
    """Seats whose tokens are given; the model's rows are computed by the slow forward and handed to `follow`."""

    def __init__(self, model: PreTrainedModel, head: Head, settings: EagleSettings, **options: Any) -> None:
        self.model, self.head = model, head
        self.seats = Seats(4, CONTEXT, [EOS_ID])
        native = native_or_warn(torch.device("cpu"))
        self.drafter = EagleDrafter(
            head, Target.of(model), settings=settings, num_slots=NUM_SLOTS, num_seats=4, native=native, **options
        )
        self._slots = np.random.default_rng(0).permutation(NUM_SLOTS).astype(np.int32)

    def seat(
        self, prompt: Sequence[int], known: Sequence[int], *, shared: np.ndarray | None = None, **sampling: Any
    ) -> int:
        """A request whose answer so far is `known`; its first slots are `shared`."""
        request = GenerateRequest(
            request_id=str(len(prompt)),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_new_tokens=30, **sampling),
        )
        state = RequestState(
            request=request, order=0, seed=11, tokens=np.asarray([*prompt, *known], dtype=np.int32),
            logprobs=np.zeros(len(prompt) + len(known), dtype=np.float32),
        )  # fmt: skip
        shared = np.empty(0, dtype=np.int32) if shared is None else shared
        seat = self.seats.take(state, shared)
        own, self._slots = self._slots[: CONTEXT - len(shared)], self._slots[CONTEXT - len(shared) :]
        self.seats.slots[seat, len(shared) :] = own
        self.compute(seat, len(shared), len(state.tokens) - 1)
        return seat

    def compute(self, seat: int, begin: int, end: int) -> None:
        """The model computes the rows of tokens [begin, end)."""
        self.seats.computed[seat] = end
        tokens = self.seats.tokens[seat, :end].tolist()
        positions = torch.arange(begin, end)
        self.drafter.follow(
            FollowedRows(
                token_ids=torch.tensor(tokens[begin:]),
                batch=PagedBatch(
                    row_slots=torch.from_numpy(self.seats.slots[seat, begin:end].astype(np.int64)),
                    row_positions=positions,
                    row_seats=torch.full((end - begin,), seat, dtype=torch.int32),
                    request_seats=[seat],
                    cu_rows=[0, end - begin],
                    slot_table=torch.from_numpy(self.seats.slots),
                ),
                hidden=tapped(self.model, self.head, tokens)[begin:],
            )
        )

    def append(self, seat: int, tokens: Sequence[int]) -> None:
        """The model computed the last token and all but the last of `tokens`, which are accepted."""
        begin, length = int(self.seats.length[seat]) - 1, int(self.seats.length[seat])
        self.seats.tokens[seat, length : length + len(tokens)] = tokens
        self.seats.length[seat] += len(tokens)
        self.compute(seat, begin, begin + len(tokens))

    def tokens(self, seat: int) -> list[int]:
        return self.seats.tokens[seat, : self.seats.length[seat]].tolist()

    def propose(self, *seats: int, room: int = 9) -> Drafts:
        return self.drafter.propose(self.seats, np.array(seats), np.full(len(seats), room, dtype=np.int32))


def reference_chain(model: PreTrainedModel, head: Head, tokens: Sequence[int], count: int) -> list[int]:
    guesses: list[int] = []
    for _ in range(count):
        guesses.append(int(reference_logits(model, head, tokens, guesses).argmax()))
    return guesses


@pytest.mark.parametrize("algorithm", ["eagle", "eagle3", "eagle3 of few words"])
def test_a_chain_is_what_the_whole_sequence_says(model: PreTrainedModel, algorithm: str) -> None:
    words = range(3, VOCAB_SIZE, 3) if "few" in algorithm else None
    head = make_head(model, algorithm.split()[0], words=words)
    harness = Harness(model, head, EagleSettings(num_steps=4, topk=1, max_guesses=4))
    first = harness.seat(range(40, 52), [60, 61, 62], temperature=0.0)
    second = harness.seat([7], [9], temperature=0.0)
    drafts = harness.propose(first, second)
    assert drafts.counts.tolist() == [4, 4] and drafts.parents.tolist() == [[-1, 0, 1, 2]] * 2
    for row, seat in enumerate((first, second)):
        assert drafts.tokens[row].tolist() == reference_chain(model, head, harness.tokens(seat), 4)
    harness.append(first, [*drafts.tokens[0, :2].tolist(), 77])
    harness.append(second, [78])
    drafts = harness.propose(second, first)
    for row, seat in enumerate((second, first)):
        assert drafts.tokens[row].tolist() == reference_chain(model, head, harness.tokens(seat), 4)


def test_a_prefix_that_another_request_brought_has_its_keys(model: PreTrainedModel) -> None:
    head = make_head(model, "eagle3")
    harness = Harness(model, head, EagleSettings(num_steps=3, topk=1, max_guesses=3))
    prompt = list(range(30, 50))
    one = harness.seat(prompt, [3, 4], temperature=0.0)
    harness.propose(one)
    shared = harness.seats.slots[one, : len(prompt)].copy()
    other = harness.seat(prompt, [8], shared=shared, temperature=0.0)
    sibling = harness.seat(prompt, [9, 10], shared=shared, temperature=0.0)
    drafts = harness.propose(one, other, sibling)
    for row, seat in enumerate((one, other, sibling)):
        assert drafts.tokens[row].tolist() == reference_chain(model, head, harness.tokens(seat), 3)


def test_siblings_that_come_together_compute_their_prompt_once(model: PreTrainedModel) -> None:
    head = make_head(model, "eagle3")
    for max_rows in (4096, 8):
        harness = Harness(model, head, EagleSettings(num_steps=2, topk=1, max_guesses=2), max_rows=max_rows)
        prompt = list(range(30, 50))
        one = harness.seat(prompt, [3], temperature=0.0)
        other = harness.seat(prompt, [4], shared=harness.seats.slots[one, : len(prompt)].copy(), temperature=0.0)
        drafts = harness.propose(one, other)
        for row, seat in enumerate((one, other)):
            assert drafts.tokens[row].tolist() == reference_chain(model, head, harness.tokens(seat), 2)


def test_a_guess_at_a_temperature_is_at_the_requests_own_number(model: PreTrainedModel) -> None:
    """The head of the model's own logits would guess what the model then draws."""
    head = make_head(model, "eagle3", words=range(0, VOCAB_SIZE, 2))
    harness = Harness(model, head, EagleSettings(num_steps=3, topk=1, max_guesses=3))
    seat = harness.seat(range(40, 52), [60, 61], temperature=0.7)
    drafts = harness.propose(seat)
    guesses: list[int] = []
    for index in range(3):
        number = uniforms(harness.seats.sampling.key[[seat]], np.array([2 + index]))[0]
        chances = (reference_logits(model, head, harness.tokens(seat), guesses) / 0.7).softmax(-1).double()
        guesses.append(int((chances.cumsum(-1) <= number * chances.sum()).sum()))
    assert drafts.tokens[0].tolist() == guesses


def reference_tree(
    model: PreTrainedModel, head: Head, tokens: Sequence[int], *, steps: int, topk: int, kept: int
) -> set[tuple[int, ...]]:
    """The paths that EAGLE-2 keeps, each node computed from the beginning."""
    candidates: dict[tuple[int, ...], float] = {}
    going_on: list[tuple[int, ...]] = [()]
    for _ in range(steps):
        level: dict[tuple[int, ...], float] = {}
        for path in going_on:
            best = reference_logits(model, head, tokens, path).log_softmax(-1).topk(topk)
            for score, word in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                level[*path, word] = candidates.get(path, 0.0) + score
        candidates |= level
        going_on = sorted(level, key=lambda path: -level[path])[:topk]
    return set(sorted(candidates, key=lambda path: -candidates[path])[:kept])


def paths_of(drafts: Drafts, row: int) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(drafts.tokens[row, : drafts.counts[row]], drafts.parents[row], strict=False):
        paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
    assert len(set(paths)) == len(paths), "guesses with one parent differ"
    return set(paths)


@pytest.mark.parametrize("algorithm", ["eagle", "eagle3 of few words"])
def test_a_tree_grows_where_the_head_is_surest(model: PreTrainedModel, algorithm: str) -> None:
    words = range(3, VOCAB_SIZE, 3) if "few" in algorithm else None
    head = make_head(model, algorithm.split()[0], words=words)
    harness = Harness(model, head, EagleSettings(num_steps=3, topk=3, max_guesses=7))
    first = harness.seat(range(40, 52), [60, 61, 62], temperature=0.0)
    second = harness.seat([7], [9], temperature=0.0)
    for _ in range(2):
        drafts = harness.propose(first, second)
        for row, seat in enumerate((first, second)):
            expected = reference_tree(model, head, harness.tokens(seat), steps=3, topk=3, kept=7)
            assert paths_of(drafts, row) == expected
        harness.append(first, [5, 6])
        harness.append(second, [17])


def test_no_more_is_guessed_than_there_is_room_for(model: PreTrainedModel) -> None:
    head = make_head(model, "eagle3")
    for settings in (
        EagleSettings(num_steps=4, topk=1, max_guesses=4),
        EagleSettings(num_steps=3, topk=3, max_guesses=7),
    ):
        harness = Harness(model, head, settings)
        seats = [harness.seat(range(40, 45), [k], temperature=0.0) for k in range(3)]
        room = np.array([0, 2, 9], dtype=np.int32)
        drafts = harness.drafter.propose(harness.seats, np.array(seats), room)
        assert drafts.counts.tolist() == [0, 2, settings.max_guesses]
        nothing = harness.drafter.propose(harness.seats, np.array(seats), np.zeros(3, dtype=np.int32))
        assert nothing.counts.tolist() == [0, 0, 0]


def test_after_new_weights_all_keys_are_computed_anew(model: PreTrainedModel) -> None:
    head = make_head(model, "eagle3")
    harness = Harness(model, head, EagleSettings(num_steps=3, topk=1, max_guesses=3))
    seat = harness.seat(range(40, 52), [60], temperature=0.0)
    harness.propose(seat)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1
    harness.drafter.weights_changed()
    harness.compute(seat, 0, 12)
    drafts = harness.propose(seat)
    assert drafts.tokens[0].tolist() == reference_chain(model, head, harness.tokens(seat), 3)
