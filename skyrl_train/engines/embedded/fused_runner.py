"""Steps on a GPU with fused kernels (EmbeddedConfig.cuda_kernels "fused"): less to launch, less to wait for.

    cuda_runner      transformers' modules    sampling rules on the host    each request reads its own prefix
    here             FusedDecoder             on the device                 groups read a common one together

A decode step of a fixed number of rows is a graph, in up to four forms: with sampling rules (triton_rules) or without,
with shared prefixes (triton_shared_prefix) or without. Each is captured when it is first needed. What the host alone
can do (grammars, logit processors) waits for its tokens, as in cuda_runner.

On the CPU, under Triton's interpreter, the same steps run op by op: for tests.

Shapes: T rows, n sampling rows, V words.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded import triton_elementwise
from skyrl_train.engines.embedded.cuda_runner import NUM_UPLOADS_IN_TURN, CudaRunner, TokensOnTheWay, graph_sizes
from skyrl_train.engines.embedded.device_seats import DeviceSeats, Indices
from skyrl_train.engines.embedded.fused_context import FusedContext
from skyrl_train.engines.embedded.fused_decoder import FusedDecoder, NotThisForm, recognise
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.prefix_groups import (
    PrefixGroup,
    lay_out_tiles,
    max_tiles,
    num_saved_tokens,
    shared_prefixes,
)
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.runner import ReadyTokens, Runner
from skyrl_train.engines.embedded.sampler import Sampler
from skyrl_train.engines.embedded.scheduler import StepPlan
from skyrl_train.engines.embedded.triton_attention import choose_num_splits, rows_per_block
from skyrl_train.engines.embedded.triton_rules import NUM_RULES, RowRules, apply_rules
from skyrl_train.engines.embedded.triton_sampler import sample_and_summarise
from skyrl_train.engines.embedded.triton_shared_prefix import PrefixTiles, tile_rows
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.engines.embedded.uniforms import uniforms
from skyrl_train.errors import ConfigError

NUM_BASIC = 5
"""Rows of a step's packed input without rules: seat, position, slot, bits of uniform and of temperature (float64)."""

MIN_SAVED_BYTES = 16 * 2**20
"""A layer: what a shared prefix must save to be worth two more kernels, of about 3 microseconds each."""

Sampled = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """Which graph a decode step runs."""

    num_rows: int
    has_rules: bool
    shares: bool


class DecodeStep:
    """One decode step of a form: a captured graph, or op by op on the CPU."""

    def __init__(self, runner: FusedRunner, form: Form) -> None:
        device, rows = runner.device, form.num_rows
        self.form = form
        self.input = torch.zeros(NUM_BASIC + form.has_rules * NUM_RULES, rows, dtype=torch.int64, device=device)
        self.input[0] = runner.on_device.padding_seat
        self.input[2] = runner.pool.num_slots
        if form.has_rules:
            self.input[NUM_BASIC + 3 :] = torch.from_numpy(_NOTHING).to(device)[:, None]
        self.tiles: PrefixTiles | None = None
        self.groups: list[PrefixGroup] | None = None
        if form.shares:
            lengths, members, starts = lay_out_tiles([], rows, runner.tile_rows)
            tiles = max_tiles(rows)
            self.tiles = PrefixTiles(
                lengths=torch.from_numpy(lengths).to(device),
                rows=torch.from_numpy(members).to(device),
                row_starts=torch.from_numpy(starts).to(device),
                num_splits=runner.num_splits(tiles),
            )
        self._runner = runner
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        # Kernels compile and libraries set themselves up outside the capture.
        with torch.cuda.stream(side):
            self._runner.decode_rows(self)
        torch.cuda.current_stream().wait_stream(side)
        # Only this thread is watched for calls that a capture forbids: a trainer may be working in another.
        with torch.cuda.graph(self._graph, pool=self._runner.graph_memory, capture_error_mode="thread_local"):
            self._sampled = self._runner.decode_rows(self)

    def group(self, groups: list[PrefixGroup]) -> None:
        """Which rows of the next runs share what."""
        if self.tiles is None or self.groups == groups:
            return
        runner, tiles = self._runner, self.tiles
        lengths, rows, starts = lay_out_tiles(groups, self.form.num_rows, runner.tile_rows)
        for target, source in ((tiles.lengths, lengths), (tiles.rows, rows), (tiles.row_starts, starts)):
            target.copy_(torch.from_numpy(source), non_blocking=True)
        self.groups = groups

    def run(self) -> Sampled:
        """Tokens and log-probabilities of its rows; overwritten by the next run."""
        if self._graph is None:
            return self._runner.decode_rows(self)
        self._graph.replay()
        return self._sampled


class FusedRunner:
    """Implements `runner.Runner` for a model of the form that FusedDecoder knows. Raises NotThisForm for another."""

    lags = True

    def __init__(self, model: InferenceModel, pool: KVPool, seats: Seats) -> None:
        self.device = next(model.original.parameters()).device
        self.pool = pool
        self._is_cuda = self.device.type == "cuda"
        self._model = model
        self._seats = seats
        context_len = seats.slots.shape[1]
        self.decoder: FusedDecoder = recognise(model.original, context_len)
        self._pointers = self._weight_pointers()
        shape = next(iter(pool.layers.values()))
        self._num_kv_heads, self._group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
        self._layer_bytes_per_token = shape.bytes_per_token
        self.tile_rows = tile_rows(self._group)
        self._num_processors = 1
        if self._is_cuda:
            self._num_processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            self.graph_memory = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()  # of the trial, and of matrices that moved
        vocab_size = self.decoder.num_words
        self.on_device = DeviceSeats(seats, no_slot=pool.num_slots, vocab_size=vocab_size, device=self.device)
        self._host_sampler = Sampler(None)
        self._steps: dict[Form, DecodeStep] = {}
        self._sizes = graph_sizes(seats.num_seats)
        self._uploads = [
            torch.empty((NUM_BASIC + NUM_RULES) * self._sizes[-1], dtype=torch.int64, pin_memory=self._is_cuda)
            for _ in range(NUM_UPLOADS_IN_TURN)
        ]
        self._num_launched = 0
        self._grouped: tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]] | None = None
        self._groups: list[PrefixGroup] = []

    # -- the Runner's side

    def weights_changed(self) -> None:
        """Raises ConfigError where modules were replaced by others that make a model of another form."""
        if self._model.refresh():
            try:
                self.decoder = recognise(self._model.original, self._seats.slots.shape[1])
            except NotThisForm as exc:
                raise ConfigError(
                    f"embedded engine: modules of the model were replaced, cuda_kernels 'fused' can't serve it now: "
                    f"{exc}; use 'plain'"
                ) from exc
            self._steps.clear()
        self.decoder.separate_what_moved()
        pointers = self._weight_pointers()
        if pointers != self._pointers:
            self._pointers = pointers
            self._steps.clear()  # they read where the weights were

    def _weight_pointers(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self._model.original.parameters())

    def must_settle(self) -> bool:
        flying = self._seats.in_flight > 0
        return bool((flying & self.on_device.needs_host()).any())

    def launch(self, plan: StepPlan) -> TokensOnTheWay | ReadyTokens | None:
        chosen = plan.sample_seats
        by_host = np.nonzero(self.on_device.needs_host()[chosen])[0]
        with torch.no_grad():
            if not plan.chunks and not len(by_host):
                tokens, logprobs = self._decode(plan.decode_seats)
            else:
                sampled = self._compute(plan, by_host)
                if sampled is None:
                    return None
                tokens, logprobs = sampled
            pending = self._send(chosen, tokens, logprobs)
        self._seats.in_flight[chosen] += 1
        self._num_launched += 1
        return pending

    # -- decoding

    def decode_rows(self, step: DecodeStep) -> Sampled:
        """One decode step of the rows in `step.input`, without a look at the host."""
        packed, seats = step.input, self.on_device
        hidden, row_seats, row_positions = triton_elementwise.start_decoding(
            packed[0],
            packed[1],
            packed[2],
            last_token=seats.last_token,
            embedding=self.decoder.embedding,
            slot_table=seats.slot_table,
        )
        context = FusedContext(
            pool=self.pool,
            slot_table=seats.slot_table,
            row_slots=packed[2],
            row_seats=row_seats,
            row_positions=row_positions,
            blocks=None,
            tiles=step.tiles,
            num_splits=self.num_splits(step.form.num_rows),
        )
        logits = self.decoder.logits(self.decoder.forward(hidden, context, triton_elementwise))
        rules = RowRules.unpacked(packed[NUM_BASIC:]) if step.form.has_rules else None
        return self._sample(logits, packed[3].view(torch.float64), packed[4], rules, row_seats, row_positions)

    def num_splits(self, num_blocks: int) -> int:
        """Of the keys of each of so many programs a head."""
        return choose_num_splits(num_blocks, self._num_kv_heads, self._num_processors)

    def _decode(self, chosen: Indices) -> Sampled:
        n, seats = len(chosen), self._seats
        groups = self._prefix_groups(chosen)
        num_rows = next(size for size in self._sizes if size >= n)
        has_rules = bool(self.on_device.has_rules()[chosen].any())
        step = self._step(Form(num_rows=num_rows, has_rules=has_rules, shares=bool(groups)))
        step.group(groups)
        height = len(step.input)
        # Contiguous whatever the form: a strided one would go through memory that is not pinned.
        upload = self._uploads[self._num_launched % NUM_UPLOADS_IN_TURN][: height * num_rows].view(height, num_rows)
        host = upload.numpy()
        position = seats.computed[chosen] - 1
        host[0, :n] = chosen
        host[1, :n] = position
        host[2, :n] = seats.slots[chosen, position]
        host[3:, :n] = self._packed_sampling(chosen, height - 3)
        host[0, n:] = self.on_device.padding_seat
        host[1, n:] = 0
        host[2, n:] = self.pool.num_slots
        host[3:, n:] = 0
        if has_rules:
            host[NUM_BASIC + 3 :, n:] = _NOTHING[:, None]
        step.input.copy_(upload, non_blocking=True)
        return step.run()

    def _step(self, form: Form) -> DecodeStep:
        if form not in self._steps:
            if form.has_rules:
                self.on_device.marks()
            self._steps[form] = DecodeStep(self, form)
        return self._steps[form]

    def _packed_sampling(self, chosen: Indices, num_lines: int) -> npt.NDArray[np.int64]:
        """[num_lines, n]: uniform, temperature, then what RowRules unpacks; bits of float64 but for three."""
        seats, table = self._seats, self._seats.sampling
        index = seats.computed[chosen] - seats.prompt_len[chosen]
        lines = [_bits(uniforms(table.key[chosen], index)), _bits(table.temperature[chosen])]
        if num_lines > len(lines):
            lines += [table.top_k[chosen].astype(np.int64), seats.prompt_len[chosen].astype(np.int64)]
            lines += [seats.min_len[chosen].astype(np.int64)]
            numbers = (table.top_p, table.min_p, table.repetition, table.presence, table.frequency)
            lines += [_bits(number[chosen]) for number in numbers]
        return np.stack(lines)

    def _prefix_groups(self, chosen: Indices) -> list[PrefixGroup]:
        """What the decoding rows share; found again when the rows are others than in the step before."""
        seats = self._seats
        tenancy = seats.tenancy[chosen]
        before = self._grouped
        if before is not None:
            if np.array_equal(before[0], chosen) and np.array_equal(before[1], tenancy):
                return self._groups
            # Rows that shared nothing share nothing when some of them are gone.
            if not self._groups and np.isin(chosen, before[0]).all():
                known = np.zeros(seats.num_seats, dtype=np.int64)
                known[before[0]] = before[1]
                if np.array_equal(known[chosen], tenancy):
                    return self._groups
        self._grouped = (chosen.copy(), tenancy)
        groups = shared_prefixes([owner for seat in chosen if (owner := seats.owners[seat]) is not None])
        saved = num_saved_tokens(groups, self.tile_rows) * self._layer_bytes_per_token
        self._groups = groups if saved >= MIN_SAVED_BYTES else []
        return self._groups

    # -- everything else

    def _compute(self, plan: StepPlan, by_host: Indices) -> Sampled | None:
        """Prompt chunks and decoding rows in one forward pass; None if no row samples.

        `by_host`: which of the sampling rows the host's sampler draws. None of those has a token on its way.
        """
        seats, decoding, device = self._seats, plan.decode_seats, self.on_device
        n = len(decoding)
        position = seats.computed[decoding] - 1
        ids = [np.full(n, -1, dtype=np.int64)]
        positions, owners = [position.astype(np.int64)], [decoding.astype(np.int64)]
        block_row, block_len = [np.arange(n, dtype=np.int64)], [np.ones(n, dtype=np.int64)]
        sampling = [np.arange(n, dtype=np.int64)]
        step, end = rows_per_block(self._group), n
        for chunk in plan.chunks:
            begin, end = end, end + chunk.end - chunk.start
            ids.append(seats.tokens[chunk.seat, chunk.start : chunk.end].astype(np.int64))
            positions.append(np.arange(chunk.start, chunk.end))
            owners.append(np.full(end - begin, chunk.seat, dtype=np.int64))
            first = np.arange(begin, end, step)
            block_row.append(first)
            block_len.append(np.minimum(end - first, step))
            if chunk.samples:
                sampling.append(np.array([end - 1]))
        row_positions, row_seats = np.concatenate(positions), np.concatenate(owners)
        device.bring_prompts([chunk.seat for chunk in plan.chunks])
        device.bring_slots(decoding, position)
        seats_there = device.to_device(row_seats)
        positions_there = device.to_device(row_positions)
        host_ids = device.to_device(np.concatenate(ids))
        blocks = (device.to_device(np.concatenate(block_row)).int(), device.to_device(np.concatenate(block_len)).int())
        context = FusedContext(
            pool=self.pool,
            slot_table=device.slot_table,
            row_slots=device.to_device(seats.slots[row_seats, row_positions].astype(np.int64)),
            row_seats=seats_there.int(),
            row_positions=positions_there.int(),
            blocks=blocks,
            tiles=None,
            num_splits=1,
        )
        # A decoding row's token may not have reached the host; the device has it.
        input_ids = torch.where(host_ids < 0, device.last_token[seats_there], host_ids)
        final = self.decoder.forward(self.decoder.embed(input_ids), context, triton_elementwise)
        if not len(plan.sample_seats):
            return None
        chosen_rows = device.to_device(np.concatenate(sampling))
        logits = self.decoder.logits(final[chosen_rows])
        last_seats, last_positions = seats_there[chosen_rows], positions_there[chosen_rows]
        has_rules = bool(device.has_rules()[plan.sample_seats].any())
        packed = device.to_device(self._packed_sampling(plan.sample_seats, 2 + has_rules * NUM_RULES))
        rules = RowRules.unpacked(packed[2:]) if has_rules else None
        sampled = self._sample(logits, packed[0].view(torch.float64), packed[1], rules, last_seats, last_positions)
        if len(by_host):
            there = device.to_device(by_host)
            drawn = self._host_sampler.sample(logits[there].float().cpu(), seats, plan.sample_seats[by_host])
            sampled[0][there], sampled[1][there] = device.to_device(drawn[0]), device.to_device(drawn[1])
            self._take(sampled[0], last_seats, last_positions)
        return sampled

    def _sample(
        self,
        logits: torch.Tensor,
        uniform: torch.Tensor,
        temperature_bits: torch.Tensor,
        rules: RowRules | None,
        row_seats: torch.Tensor,
        row_positions: torch.Tensor,
    ) -> Sampled:
        seats = self.on_device
        temperature = temperature_bits.view(torch.float64).float()
        tokens, logprobs, block_max, block_sum = sample_and_summarise(logits, temperature, uniform)
        if rules is not None:
            apply_rules(
                logits,
                temperature,
                uniform,
                rules,
                row_seats=row_seats,
                row_positions=row_positions,
                seat_tokens=seats.tokens,
                end_ids=seats.end_ids,
                marks=seats.marks(),
                block_max=block_max,
                block_sum=block_sum,
                tokens=tokens,
                logprobs=logprobs,
            )
        self._take(tokens, row_seats, row_positions)
        return tokens, logprobs

    def _take(self, tokens: torch.Tensor, row_seats: torch.Tensor, row_positions: torch.Tensor) -> None:
        triton_elementwise.take_tokens(
            tokens,
            row_seats=row_seats,
            row_positions=row_positions,
            last_token=self.on_device.last_token,
            seat_tokens=self.on_device.tokens,
        )

    def _send(self, chosen: Indices, tokens: torch.Tensor, logprobs: torch.Tensor) -> TokensOnTheWay | ReadyTokens:
        """Queue the copy to the host; a graph's outputs are overwritten by its next replay, after this copy."""
        n, tenancy = len(chosen), self._seats.tenancy[chosen]
        if not self._is_cuda:
            return ReadyTokens(seats=chosen, tenancy=tenancy, tokens=tokens[:n].numpy(), logprobs=logprobs[:n].numpy())
        host_tokens = torch.empty(n, dtype=torch.int64, pin_memory=True)
        host_logprobs = torch.empty(n, dtype=torch.float32, pin_memory=True)
        host_tokens.copy_(tokens[:n], non_blocking=True)
        host_logprobs.copy_(logprobs[:n], non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return TokensOnTheWay(seats=chosen, tenancy=tenancy, copied=copied, tokens=host_tokens, logprobs=host_logprobs)


def make_fused_runner(model: InferenceModel, pool: KVPool, seats: Seats) -> Runner:
    """The fused runner; with a warning the plain one, for a model of another form."""
    try:
        return FusedRunner(model, pool, seats)
    except NotThisForm as exc:
        if next(model.original.parameters()).device.type != "cuda":
            raise
        warnings.warn(
            f"embedded engine: cuda_kernels 'fused' can't serve this model, 'plain' does: {exc}", stacklevel=2
        )
        return CudaRunner(model, pool, seats)


def _bits(numbers: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    return numbers.astype(np.float64).view(np.int64)


_NOTHING = _bits(np.array([1.0, 0.0, 1.0, 0.0, 0.0]))
"""top_p, min_p, repetition, presence, frequency that do nothing: a padding row has no rules."""
