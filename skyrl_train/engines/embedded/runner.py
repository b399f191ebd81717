"""Runs one planned step on the model: rows in, one token for each row that samples out.

A runner may lag: `launch` returns before its tokens are known to the host, and the next step is planned and launched
meanwhile. Here, on the CPU, nothing is gained by that, and the tokens are there at once.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.attention import AttentionBackend, PagedBatch, PagedContext, ShapeProbe
from skyrl_train.engines.embedded.backends import make_backend
from skyrl_train.engines.embedded.config import EmbeddedConfig, KVShape
from skyrl_train.engines.embedded.drafts.base import FollowedRows
from skyrl_train.engines.embedded.drafts.guesses import DecodeRows, Guesses, decode_rows, slot_lines
from skyrl_train.engines.embedded.drafts.speculation import Speculation
from skyrl_train.engines.embedded.drafts.taps import Taps
from skyrl_train.engines.embedded.drafts.verify import VerifiedTokens, verify
from skyrl_train.engines.embedded.invariant.attention import InvariantAttention
from skyrl_train.engines.embedded.invariant.sampling import InvariantSampler
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.native_decoder import NativeDecoder, native_decoder
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.sampler import Sampler
from skyrl_train.engines.embedded.scheduler import StepPlan
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.errors import ConfigError


class PendingTokens(Protocol):
    """Tokens of a launched step, for `seats` [n] as they were occupied at launch (`tenancy` [n])."""

    @property
    def seats(self) -> npt.NDArray[np.intp]: ...

    @property
    def tenancy(self) -> npt.NDArray[np.int64]: ...

    def result(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Tokens [n] and log-probabilities [n]; waits for the device if it must."""
        ...


class Runner(Protocol):
    """Computes planned steps. `lags`: tokens of step k are best taken in after step k + 1 was launched."""

    lags: bool

    def launch(self, plan: StepPlan) -> PendingTokens | None:
        """Start a step; marks its tokens as in flight. None if no row of it samples."""
        ...

    def must_settle(self) -> bool:
        """Whether the next step can't be planned before the tokens in flight are known."""
        ...

    def weights_changed(self) -> None:
        """The weights were updated in place, and submodules perhaps replaced. Nothing is in flight."""
        ...


def make_runner(
    model: InferenceModel,
    native: ctypes.CDLL | None,
    config: EmbeddedConfig,
    layers: dict[int, KVShape],
    pool: KVPool,
    seats: Seats,
    max_rows: int,
) -> Runner:
    """The runner for the model's device; the plain one everywhere when the reference attention is asked for."""
    device = next(model.original.parameters()).device
    if config.cuda_kernels == "fused":
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(f"embedded engine: cuda_kernels 'fused' wants a model on a GPU, found one on {device}")
        from skyrl_train.engines.embedded.fused_runner import make_fused_runner

        return make_fused_runner(model, pool, seats)
    if device.type == "cuda" and config.attention_backend != "reference":
        # Triton is needed from here on, and only here.
        from skyrl_train.engines.embedded.cuda_runner import CudaRunner

        return CudaRunner(model, pool, seats)
    if config.deterministic:
        assert native is not None, "InvariantModel has refused"
        return ModelRunner(model, InvariantAttention(layers), InvariantSampler(native), pool, seats, max_rows)
    backend = make_backend(config.attention_backend, device, layers, native)
    return ModelRunner(model, backend, Sampler(native), pool, seats, max_rows, native=native)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadyTokens:
    """PendingTokens that are known already."""

    seats: npt.NDArray[np.intp]
    tenancy: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]

    def result(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        return self.tokens, self.logprobs


class ModelRunner:
    """Holds the step's persistent row buffers; T rows at most `max_rows`."""

    def __init__(
        self,
        model: InferenceModel,
        backend: AttentionBackend,
        sampler: Sampler,
        pool: KVPool,
        seats: Seats,
        max_rows: int,
        native: ctypes.CDLL | None = None,
    ) -> None:
        """`native`: for whole steps in C, where the model has the form (see native_decoder)."""
        self._model = model
        self._native = native
        self._sampler = sampler
        self._backend = backend
        self._pool = pool
        self._seats = seats
        self._input_ids = np.zeros(max_rows, dtype=np.int64)
        self._positions = np.zeros(max_rows, dtype=np.int64)
        self._row_slots = np.zeros(max_rows, dtype=np.int64)
        self._row_seats = np.zeros(max_rows, dtype=np.int32)
        self._slot_table = torch.from_numpy(seats.slots)
        self._speculation: Speculation | None = None
        self._taps: Taps | None = None
        self._decode_rows: DecodeRows | None = None
        self._find_direct()

    def speculate(self, speculation: Speculation) -> None:
        """Follow its drafter from now on; called once."""
        self._speculation = speculation
        self._taps = self._model.tap(speculation.drafter.taps) if speculation.drafter.taps else None

    lags = False

    def must_settle(self) -> bool:
        return False

    def weights_changed(self) -> None:
        if self._model.weights_changed():
            self._find_direct()

    def _find_direct(self) -> None:
        self._direct: NativeDecoder | None = native_decoder(
            self._model, self._native, self._backend, self._pool, context_len=self._seats.slots.shape[1]
        )

    def _direct_logits(self, batch: PagedBatch, sample_rows: torch.Tensor | int) -> torch.Tensor | None:
        if self._direct is None or self._taps is not None:
            return None
        ids = torch.from_numpy(self._input_ids[: len(batch.row_slots)])
        logits = self._direct.logits(ids, batch, sample_rows, self._model.form)
        if logits is not None:
            self._model.end_step()
        return logits

    def launch(self, plan: StepPlan) -> ReadyTokens | VerifiedTokens | None:
        logits = self.logits(plan)
        chosen = plan.sample_seats
        if not len(chosen):
            return None
        if plan.guesses is not None:
            return self._verify(plan, plan.guesses, logits)
        with torch.inference_mode():
            tokens, logprobs = self._sampler.sample(logits, self._seats, chosen)
        self._seats.in_flight[chosen] += 1
        tenancy = self._seats.tenancy[chosen]
        return ReadyTokens(seats=chosen, tenancy=tenancy, tokens=tokens, logprobs=logprobs)

    def _verify(self, plan: StepPlan, guesses: Guesses, logits: torch.Tensor) -> VerifiedTokens:
        seats, chosen, rows = self._seats, plan.sample_seats, self._decode_rows
        assert rows is not None
        others = chosen[len(plan.decode_seats) :]
        known = np.concatenate((rows.known, seats.length[others]))
        with torch.inference_mode():
            tokens, logprobs = self._sampler.sample(logits, seats, np.concatenate((rows.seats, others)), known)
        verified = verify(seats, chosen, guesses, rows, tokens, logprobs)
        seats.in_flight[chosen] += 1
        if self._speculation is not None:
            self._speculation.verified(guesses, verified)
        return verified

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """[n, V] for the plan's `sample_seats`, in their order, behind each one those of its guesses.

        Writes the rows' keys and values to the pool.
        """
        rows = decode_rows(self._seats, plan.decode_seats, plan.guesses)
        self._decode_rows = rows
        batch, sample_rows = self._lay_out(plan, rows)
        num_rows = plan.num_rows
        self._model.select_rows(self._row_seats[:num_rows])
        context = PagedContext(self._backend, self._pool, batch)
        with torch.inference_mode():
            logits = self._direct_logits(batch, sample_rows)
            if logits is None:
                output = self._model(
                    input_ids=torch.from_numpy(self._input_ids[:num_rows])[None],
                    position_ids=batch.row_positions[None],
                    use_cache=False,
                    attention_context=context,
                    logits_to_keep=sample_rows,
                )
                logits = output.logits[0]
            if self._speculation is not None:
                hidden = None if self._taps is None else self._taps.take()
                ids = torch.from_numpy(self._input_ids[:num_rows])
                self._speculation.follow(FollowedRows(token_ids=ids, batch=batch, hidden=hidden))
        return logits

    def _lay_out(self, plan: StepPlan, rows: DecodeRows) -> tuple[PagedBatch, torch.Tensor | int]:
        seats, decoding = self._seats, rows.seats
        n, total = len(decoding), plan.num_rows
        ids, positions, slots, owners = self._input_ids, self._positions, self._row_slots, self._row_seats
        positions[:n] = rows.positions
        ids[:n] = seats.tokens[decoding, rows.places]
        slots[:n] = seats.slots[decoding, rows.places]
        owners[:n] = decoding
        cu_rows = [0, *rows.ends]
        sample_rows = list(range(n))
        for chunk in plan.chunks:
            begin = cu_rows[-1]
            end = begin + chunk.end - chunk.start
            ids[begin:end] = seats.tokens[chunk.seat, chunk.start : chunk.end]
            positions[begin:end] = np.arange(chunk.start, chunk.end)
            slots[begin:end] = seats.slots[chunk.seat, chunk.start : chunk.end]
            owners[begin:end] = chunk.seat
            cu_rows.append(end)
            if chunk.samples:
                sample_rows.append(end - 1)
        table, request_seats = self._slot_table, [*rows.run_seats.tolist(), *(chunk.seat for chunk in plan.chunks)]
        if rows.paths is not None:
            table = slot_lines(seats, rows, request_seats, width=int(positions[:total].max()) + 1)
            request_seats = list(range(len(request_seats)))
        batch = PagedBatch(
            row_slots=torch.from_numpy(slots[:total]),
            row_positions=torch.from_numpy(positions[:total]),
            row_seats=torch.from_numpy(owners[:total]),
            request_seats=request_seats,
            cu_rows=cu_rows,
            slot_table=table,
        )
        # 0 keeps every row and spares the model a gather.
        return batch, 0 if len(sample_rows) == total else torch.tensor(sample_rows, dtype=torch.long)


def probe_layers(model: InferenceModel) -> dict[int, KVShape]:
    """What each attention layer caches, found by running one token through the model.

    Raises ConfigError where the model can't be served: another attention implementation, layers that keep state
    elsewhere.
    """
    original = model.original
    config: Any = original.config
    implementation = config.get_text_config()._attn_implementation
    if implementation != ATTENTION_NAME:
        raise ConfigError(
            f"embedded engine: the model was loaded with attn_implementation={implementation!r}; "
            f"load it with attn_implementation={ATTENTION_NAME!r}"
        )
    device = next(original.parameters()).device
    probe = ShapeProbe()
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.inference_mode():
        model(input_ids=token, position_ids=token, use_cache=False, attention_context=probe)
    expected = config.get_text_config().num_hidden_layers
    if len(probe.layers) != expected:
        raise ConfigError(
            f"embedded engine: {type(original).__name__} has {expected} layers, of which {len(probe.layers)} are "
            "standard attention; state-space and other recurrent layers can't be served"
        )
    return probe.layers
