"""TRL's GRPOTrainer, on transformers' generation.

Treated well: no gradient checkpointing, no reference model, no logging or saving inside a step, the fused AdamW of
transformers' Trainer, and on a GPU weights and optimizer in plain bfloat16 without float32 masters (which this
library keeps). TRL pads to the longest completion of the batch; what it generates beyond a sample's length is cut off
before it trains, as an end token would have done. The end token can't be sampled, so nothing has to suppress it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo.base import Gradient, Rollout
from benchmarks.grpo.work import EPS_CLIP, LEARNING_RATE, MAX_GRAD_NORM, StepWork, reward
from benchmarks.measure import PhaseClock, Timing
from benchmarks.models import to_text
from benchmarks.samplers.generate_batch import PAGE_SIZE_KEY

Generation = Literal["dynamic", "static", "continuous"]
PAGE_SIZE = 32


class TrlSide:
    """`generation`: `generate` with a dynamic or a static cache, or `generate_batch`; `micro_batch` counts samples."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        work: StepWork,
        *,
        device: str,
        generation: Generation,
        micro_batch: int,
        num_threads: int,
    ) -> None:
        self.name = f"TRL, {generation} generation, micro-batches of {micro_batch}, {num_threads} threads"
        self.num_threads = num_threads
        self._model = model
        self._tokenizer = tokenizer
        self._work = work
        self._device = device
        self._generation = generation
        self._micro_batch = micro_batch
        self._next_step = 0

    def run(self, num_steps: int) -> list[Timing]:
        clock = PhaseClock(self._device)
        timings: list[Timing] = []
        prompts = [self._work.prompts(self._next_step + i) for i in range(num_steps)]
        self._next_step += num_steps
        trainer = self._trainer(prompts, clock, fixed=None)
        trainer.add_callback(_StepEnds(clock, timings))
        trainer.train()
        assert len(timings) == num_steps, (len(timings), num_steps)
        return timings

    def gradient(self, rollout: Rollout) -> Gradient:
        trainer = self._trainer([rollout.prompts], PhaseClock(self._device), fixed=rollout.completions)
        trainer.train()
        (log,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return Gradient(loss=log["loss"], grad_norm=log["grad_norm"])

    def close(self) -> None:
        pass

    def _trainer(
        self, prompts: Sequence[Sequence[tuple[int, ...]]], clock: PhaseClock, fixed: list[tuple[int, ...]] | None
    ) -> _TimedTrainer:
        """On a fresh copy of the weights: TRL wraps a model's forward anew for each trainer."""
        work = self._work
        num_rows = work.num_prompts * work.num_samples
        config = GRPOConfig(
            **common_settings(self._device),
            max_steps=len(prompts),
            num_generations=work.num_samples,
            per_device_train_batch_size=self._micro_batch,
            gradient_accumulation_steps=num_rows // self._micro_batch,
            max_completion_length=work.max_completion_len,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            scale_rewards="group",
            cache_implementation="static" if self._generation == "static" else None,
            use_transformers_continuous_batching=self._generation == "continuous",
            transformers_continuous_batching_config=self._continuous() if self._generation == "continuous" else None,
            logging_strategy="no" if fixed is None else "steps",
            seed=work.seed,
        )
        rows = [{"prompt": to_text(prompt)} for step in prompts for prompt in step]
        return _TimedTrainer(
            model=copy.deepcopy(self._model).train(),
            reward_funcs=_reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=self._tokenizer,
            completion_lens=work.flat_lens,
            clock=clock,
            fixed=fixed,
        )

    def _continuous(self) -> dict[str, Any]:
        work = self._work
        num_rows = work.num_prompts * work.num_samples
        longest = max(work.prompt_lens) + work.max_completion_len
        return {
            PAGE_SIZE_KEY: PAGE_SIZE,
            "num_blocks": num_rows * (-(-longest // PAGE_SIZE) + 1),
            "max_batch_tokens": 2048,
            "max_requests_per_batch": num_rows,
        }


class _TimedTrainer(GRPOTrainer):
    """GRPOTrainer with its parts timed and its completions cut to `completion_lens`; `fixed` replaces them."""

    def __init__(
        self,
        *args: Any,
        completion_lens: Sequence[int],
        clock: PhaseClock,
        fixed: list[tuple[int, ...]] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self._lens = completion_lens
        self._clock = clock
        self._fixed = fixed
        if self.use_transformers_continuous_batching:
            self.model.generate_batch = self._generate_each_to_its_length

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self._fixed is not None:
            return [list(ids) for ids in self._fixed], None
        with self._clock.phase("generation"):
            completions, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return [ids[:length] for ids, length in zip(completions, self._lens, strict=True)], logprobs

    def _generate_each_to_its_length(
        self, inputs: list[list[int]], generation_config: Any, continuous_batching_config: Any, **_: Any
    ) -> dict[str, Any]:
        """`generate_batch` with a limit a request, so that continuous batching can do what it is for."""
        results: dict[str, Any] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=generation_config, continuous_batching_config=continuous_batching_config
        ) as manager:
            for i, (ids, length) in enumerate(zip(inputs, self._lens, strict=True)):
                manager.add_request(ids, request_id=str(i), max_new_tokens=length)
            while len(results) < len(inputs):
                result = manager.get_result(timeout=600)
                if result is None or result.error:
                    raise RuntimeError(f"continuous batching failed: {result and result.error}")
                if result.is_finished():
                    results[result.request_id] = result
        return {str(i): results[str(i)] for i in range(len(inputs))}

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self._clock.phase("generation and preparation"):
            return super()._generate_and_score_completions(inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._clock.phase("all but optimizer"):
            return super().training_step(*args, **kwargs)


def common_settings(device: str) -> dict[str, Any]:
    """The loss and the optimizer, and nothing beside them."""
    return {
        "output_dir": tempfile.gettempdir(),
        "use_cpu": device == "cpu",
        "beta": 0.0,
        "epsilon": EPS_CLIP,
        "loss_type": "dapo",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class _StepEnds(TrainerCallback):
    def __init__(self, clock: PhaseClock, timings: list[Timing]) -> None:
        self._clock = clock
        self._timings = timings

        self._optimizer = ExitStack()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._clock.end_step()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer.enter_context(self._clock.phase("optimizer"))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer.close()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._timings.append(self._clock.end_step(_split))


def _split(clock: PhaseClock) -> dict[str, float]:
    """Nested measurements to parts side by side. Gradient clipping is in "rest"."""
    prepared = clock.seconds("generation and preparation")
    return {
        "generation": clock.seconds("generation"),
        "preparation": prepared - clock.seconds("generation"),
        "forward and backward": clock.seconds("all but optimizer") - prepared,
        "optimizer": clock.seconds("optimizer"),
    }


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward(ids) for ids in completion_ids]
