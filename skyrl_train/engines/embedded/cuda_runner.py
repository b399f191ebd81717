"""Steps on a GPU: decoding as one replayed CUDA graph, everything else launched op by op; one step ahead of the host.

    host     plan k+1, launch k+1 | take in tokens of k | plan k+2, launch k+2 | take in k+1 | ...
    device        step k ........ | step k+1 .......... | step k+2 ........... |

What a decode step needs to know of the step before it stays on the device: the last token of each seat. So nothing
waits for a token to reach the host; only requests with a rule, penalties, truncation or a minimal length do, because
the host samples for them (`must_settle`).

A graph is captured for each of a few batch sizes; a step is padded up to the next with rows of a seat and a slot
that belong to nobody. Weights are read where they lie, so a graph stays valid over in-place updates.

Shapes: T rows, S seats (one more than requests can have: the last is the padding's), C positions, n sampling rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.sampler import Sampler
from skyrl_train.engines.embedded.scheduler import StepPlan
from skyrl_train.engines.embedded.triton_attention import choose_num_splits, ragged_paged_attention, rows_per_block
from skyrl_train.engines.embedded.triton_sampler import sample_rows
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.engines.embedded.uniforms import uniforms

NUM_UPLOADS_IN_TURN = 3
"""Pinned buffers for a decode step's input: the device may still read those of the step before."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokensOnTheWay:
    """PendingTokens whose copy to the host has been queued."""

    seats: npt.NDArray[np.intp]
    tenancy: npt.NDArray[np.int64]
    copied: torch.cuda.Event
    tokens: torch.Tensor
    logprobs: torch.Tensor

    def result(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        self.copied.synchronize()
        n = len(self.seats)
        logprobs = self.logprobs[:n].numpy()
        if not np.isfinite(logprobs).all():
            seat = int(self.seats[np.nonzero(~np.isfinite(logprobs))[0][0]])
            raise FloatingPointError(f"the model's logits for the request in seat {seat} are not finite")
        return self.tokens[:n].numpy(), logprobs


@dataclass(frozen=True, kw_only=True, eq=False)
class CudaContext:
    """AttentionContext over the paged pool. `blocks` None: every row is of another request."""

    pool: KVPool
    slot_table: torch.Tensor  # [S, C] int32
    row_slots: torch.Tensor  # [T] int64
    row_seats: torch.Tensor  # [T] int32
    row_positions: torch.Tensor  # [T] int32
    blocks: tuple[torch.Tensor, torch.Tensor] | None
    num_splits: int

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
        keys, values = self.pool.keys[layer_idx], self.pool.values[layer_idx]
        keys.index_copy_(0, self.row_slots, key)
        values.index_copy_(0, self.row_slots, value)
        return ragged_paged_attention(
            query,
            keys,
            values,
            self.slot_table,
            self.row_seats,
            self.row_positions,
            blocks=self.blocks,
            num_splits=self.num_splits,
            scaling=scaling,
            sliding_window=sliding_window,
        )


class DecodeGraph:
    """One decode step of a fixed number of rows, captured.

    Input [5, rows] int64 on the device: seat, position, slot, the bits of uniform (float64) and of temperature
    (float32, as a float64's bits). Output: tokens and log-probabilities.
    """

    def __init__(self, runner: CudaRunner, num_rows: int) -> None:
        self.num_rows = num_rows
        self.input = torch.zeros(5, num_rows, dtype=torch.int64, device=runner.device)
        self.input[0] = runner.padding_seat
        self.input[2] = runner.pool.num_slots
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        # Kernels compile and libraries set themselves up outside the capture.
        with torch.cuda.stream(side):
            runner.decode_rows(self.input)
        torch.cuda.current_stream().wait_stream(side)
        # Only this thread is watched for calls that a capture forbids: a trainer may be working in another.
        with torch.cuda.graph(self._graph, pool=runner.graph_memory, capture_error_mode="thread_local"):
            self.tokens, self.logprobs = runner.decode_rows(self.input)

    def replay(self) -> None:
        self._graph.replay()


class CudaRunner:
    """Implements `runner.Runner` for a model on a CUDA device."""

    lags = True

    def __init__(self, model: InferenceModel, pool: KVPool, seats: Seats) -> None:
        self.device = next(model.original.parameters()).device
        self.pool = pool
        self.padding_seat = seats.num_seats
        self.graph_memory = torch.cuda.graph_pool_handle()
        self._model = model
        self._seats = seats
        self._slow_sampler = Sampler(None)
        self._graphs: dict[int, DecodeGraph] = {}
        self._sizes = graph_sizes(seats.num_seats)
        shape = next(iter(pool.layers.values()))
        self._num_kv_heads, self._group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
        self._num_processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        num_seats, context_len = seats.num_seats + 1, seats.slots.shape[1]
        self._slot_table = torch.full((num_seats, context_len), pool.num_slots, dtype=torch.int32, device=self.device)
        self._last_token = torch.zeros(num_seats, dtype=torch.int64, device=self.device)
        largest = self._sizes[-1]
        self._uploads = [
            torch.empty(5, largest, dtype=torch.int64, pin_memory=True) for _ in range(NUM_UPLOADS_IN_TURN)
        ]
        self._num_launched = 0

    # -- the Runner's side

    def weights_changed(self) -> None:
        if self._model.refresh():
            self._graphs.clear()  # they call the modules that are gone

    def must_settle(self) -> bool:
        seats = self._seats
        flying = seats.in_flight > 0
        if not flying.any():
            return False
        table = seats.sampling
        by_host = table.penalises | table.truncates | seats.has_rule | (seats.length < seats.min_len)
        return bool((flying & by_host).any())

    def launch(self, plan: StepPlan) -> TokensOnTheWay | None:
        chosen = plan.sample_seats
        seats, table = self._seats, self._seats.sampling
        by_host = (table.penalises | table.truncates | seats.has_rule | (seats.length < seats.min_len))[chosen].any()
        with torch.no_grad():
            if not plan.chunks and not by_host:
                tokens, logprobs = self._replay(plan.decode_seats)
            else:
                logits = self._eager_logits(plan)
                if not len(chosen):
                    return None
                tokens, logprobs = self._sample_by_host(logits, chosen) if by_host else self._sample(logits, chosen)
            pending = self._send(chosen, tokens, logprobs)
        seats.in_flight[chosen] += 1
        self._num_launched += 1
        return pending

    # -- decoding

    def decode_rows(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step of the rows in `packed` (see DecodeGraph), without a look at the host."""
        row_seats, positions, slots = packed[0], packed[1], packed[2]
        uniform = packed[3].view(torch.float64)
        temperature = packed[4].view(torch.float64).float()
        self._slot_table[row_seats, positions] = slots.int()
        num_rows = packed.shape[1]
        context = CudaContext(
            pool=self.pool,
            slot_table=self._slot_table,
            row_slots=slots,
            row_seats=row_seats.int(),
            row_positions=positions.int(),
            blocks=None,
            num_splits=choose_num_splits(num_rows, self._num_kv_heads, self._num_processors),
        )
        output = self._model(
            input_ids=self._last_token[row_seats][None],
            position_ids=positions[None],
            use_cache=False,
            attention_context=context,
        )
        tokens, logprobs = sample_rows(output.logits[0], temperature, uniform)
        self._last_token[row_seats] = tokens
        return tokens, logprobs

    def _replay(self, chosen: npt.NDArray[np.intp]) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(chosen)
        graph = self._graph(n)
        seats = self._seats
        upload = self._uploads[self._num_launched % NUM_UPLOADS_IN_TURN]
        host = upload.numpy()
        position = seats.computed[chosen] - 1
        host[0, :n] = chosen
        host[1, :n] = position
        host[2, :n] = seats.slots[chosen, position]
        host[3, :n] = self._uniforms(chosen).view(np.int64)
        host[4, :n] = seats.sampling.temperature[chosen].astype(np.float64).view(np.int64)
        host[0, n : graph.num_rows] = self.padding_seat
        host[1, n : graph.num_rows] = 0
        host[2, n : graph.num_rows] = self.pool.num_slots
        host[3:, n : graph.num_rows] = 0
        graph.input.copy_(upload[:, : graph.num_rows], non_blocking=True)
        graph.replay()
        return graph.tokens, graph.logprobs

    def _graph(self, num_rows: int) -> DecodeGraph:
        size = next(size for size in self._sizes if size >= num_rows)
        if size not in self._graphs:
            self._graphs[size] = DecodeGraph(self, size)
        return self._graphs[size]

    def _uniforms(self, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """For the token that each seat gets in the step being launched: all before it are computed by then."""
        seats = self._seats
        return uniforms(seats.sampling.key[chosen], seats.computed[chosen] - seats.prompt_len[chosen])

    # -- everything else

    def _eager_logits(self, plan: StepPlan) -> torch.Tensor:
        """[n, V] for the plan's sampling seats: prompt chunks and decoding rows in one forward pass."""
        seats, decoding = self._seats, plan.decode_seats
        n = len(decoding)
        position = seats.computed[decoding] - 1
        ids = [np.full(n, -1, dtype=np.int64)]
        positions, owners = [position.astype(np.int64)], [decoding.astype(np.int64)]
        block_row, block_len = [np.arange(n, dtype=np.int64)], [np.ones(n, dtype=np.int64)]
        sample_rows_ = [np.arange(n, dtype=np.int64)]
        step = rows_per_block(self._group)
        end = n
        for chunk in plan.chunks:
            begin, end = end, end + chunk.end - chunk.start
            ids.append(seats.tokens[chunk.seat, chunk.start : chunk.end].astype(np.int64))
            positions.append(np.arange(chunk.start, chunk.end))
            owners.append(np.full(end - begin, chunk.seat, dtype=np.int64))
            first = np.arange(begin, end, step)
            block_row.append(first)
            block_len.append(np.minimum(end - first, step))
            if chunk.samples:
                sample_rows_.append(np.array([end - 1]))
        row_positions, row_seats = np.concatenate(positions), np.concatenate(owners)
        row_slots = seats.slots[row_seats, row_positions].astype(np.int64)
        self._upload_slots([chunk.seat for chunk in plan.chunks], decoding, position)
        device_seats = self._to_device(row_seats)
        device_positions = self._to_device(row_positions)
        host_ids = self._to_device(np.concatenate(ids))
        # A decoding row's token may not have reached the host; the device has it.
        input_ids = torch.where(host_ids < 0, self._last_token[device_seats], host_ids)
        context = CudaContext(
            pool=self.pool,
            slot_table=self._slot_table,
            row_slots=self._to_device(row_slots),
            row_seats=device_seats.int(),
            row_positions=device_positions.int(),
            blocks=(
                self._to_device(np.concatenate(block_row)).int(),
                self._to_device(np.concatenate(block_len)).int(),
            ),
            num_splits=1,
        )
        output: Any = self._model(
            input_ids=input_ids[None],
            position_ids=device_positions[None],
            use_cache=False,
            attention_context=context,
            logits_to_keep=self._to_device(np.concatenate(sample_rows_)),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _upload_slots(
        self, chunk_seats: list[int], decoding: npt.NDArray[np.intp], position: npt.NDArray[np.int32]
    ) -> None:
        """Bring the device's slot table up to date for this step's rows: a prefilling seat's whole row so far."""
        seats = self._seats
        if chunk_seats:
            width = int(seats.allocated[chunk_seats].max())
            table = self._to_device(seats.slots[chunk_seats, :width])
            self._slot_table[self._to_device(np.asarray(chunk_seats)), :width] = table
        if len(decoding):
            slots = self._to_device(seats.slots[decoding, position])
            self._slot_table[self._to_device(decoding), self._to_device(position.astype(np.int64))] = slots

    def _sample(self, logits: torch.Tensor, chosen: npt.NDArray[np.intp]) -> tuple[torch.Tensor, torch.Tensor]:
        temperature = self._to_device(self._seats.sampling.temperature[chosen])
        tokens, logprobs = sample_rows(logits, temperature, self._to_device(self._uniforms(chosen)))
        self._last_token[self._to_device(chosen)] = tokens
        return tokens, logprobs

    def _sample_by_host(self, logits: torch.Tensor, chosen: npt.NDArray[np.intp]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rules, penalties, truncation, early end tokens: the CPU's sampler, on a copy of the logits. Slow, exact."""
        # Rows that don't need the host may have a token on its way; theirs is the one after it.
        known = self._seats.length[chosen] + self._seats.in_flight[chosen]
        tokens, logprobs = self._slow_sampler.sample(logits.float().cpu(), self._seats, chosen, known)
        on_device = self._to_device(tokens)
        self._last_token[self._to_device(chosen)] = on_device
        return on_device, self._to_device(logprobs)

    def _send(self, chosen: npt.NDArray[np.intp], tokens: torch.Tensor, logprobs: torch.Tensor) -> TokensOnTheWay:
        """Queue the copy to the host; the graph's outputs are overwritten by its next replay, after this copy."""
        n = len(chosen)
        host_tokens = torch.empty(n, dtype=torch.int64, pin_memory=True)
        host_logprobs = torch.empty(n, dtype=torch.float32, pin_memory=True)
        host_tokens.copy_(tokens[:n], non_blocking=True)
        host_logprobs.copy_(logprobs[:n], non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return TokensOnTheWay(
            seats=chosen,
            tenancy=self._seats.tenancy[chosen],
            copied=copied,
            tokens=host_tokens,
            logprobs=host_logprobs,
        )

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, 8, then steps of an eighth of the next power of two, and `max_rows`.

    20 gives 1 2 4 8 16 20.
    """
    sizes, size = [], 1
    while size < max_rows:
        sizes.append(size)
        size += size if size < 8 else max(8, (1 << size.bit_length()) // 8)
    return [*sizes, max_rows]
