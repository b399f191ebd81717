"""An EAGLE-3 head: `python -m skyrl_train.recipes.eagle3 [--config-path DIR --config-name NAME] [key=value ...]`.

    prompts ──► the model answers ──┐
    or conversations as they are ───┴──► training-time test on the model's own hidden states ──► AdamW ──► the head

The model is only read. The keys are the main job's, those in APPLIES; setting another is refused. A row whose last
message is the assistant's is learned as it stands; any other is answered by the model first, sampled as
generator.sampling_params says. The head starts from generator.speculative_decoding.draft_model_path if that is given,
otherwise anew, for the words in generator.speculative_decoding.token_map or all. It is exported to trainer.export_path,
or `<run_path>/export`: a folder for generator.speculative_decoding.draft_model_path of every backend.
Checkpoints, resuming, Ctrl-C and exit codes are the main job's.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from skyrl_train.config.load import LoadedConfig, plain
from skyrl_train.config.schema import Config
from skyrl_train.data.chat import render_prompt, response_text
from skyrl_train.data.conversations import encode_conversation
from skyrl_train.data.rows import PromptRow, read_rows
from skyrl_train.data.stream import PromptStream
from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, Target
from skyrl_train.engines.embedded.drafts.eagle.layout import load_head, save_head
from skyrl_train.engines.embedded.drafts.eagle.source import load_token_map
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.embedded.uniforms import derived_seed
from skyrl_train.entrypoints.build import device_of, engine_over, optimizer_settings
from skyrl_train.entrypoints.build_rollouts import load_tokenizer, sampling_params
from skyrl_train.entrypoints.run import DONE
from skyrl_train.entrypoints.run_log import RunFiles
from skyrl_train.entrypoints.run_state import RunState
from skyrl_train.environments.arithmetic import arithmetic_rows
from skyrl_train.errors import ConfigError
from skyrl_train.observability.files import replace_file
from skyrl_train.observability.metrics import read_metrics
from skyrl_train.observability.phases import PhaseTimer
from skyrl_train.observability.progress import Progress
from skyrl_train.observability.report import write_report
from skyrl_train.recipes.command import run_recipe
from skyrl_train.recipes.interrupt import stop_on_interrupt
from skyrl_train.training.builtin_model import is_builtin, prepare_builtin
from skyrl_train.training.eagle3 import AnsweredSequence, Eagle3Settings, Eagle3Trainer
from skyrl_train.training.model import load_model
from skyrl_train.types import GenerateRequest, Prompt

APPLIES = (
    "data.train_data",
    "data.prompt_key",
    "data.shuffle",
    "data.on_bad_row",
    "environment.arithmetic",
    "generator.chat_template_kwargs",
    "generator.max_model_len",
    "generator.max_num_seqs",
    "generator.sampling_params",
    "generator.speculative_decoding.draft_model_path",
    "generator.speculative_decoding.num_steps",
    "generator.speculative_decoding.token_map",
    "trainer.policy.model.path",
    "trainer.policy.model.dtype",
    "trainer.policy.optimizer_config",
    "trainer.placement.policy_num_gpus_per_node",
    "trainer.seed",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.train_batch_size",
    "trainer.max_tokens_per_micro_batch",
    "trainer.resume_mode",
    "trainer.resume_path",
    "trainer.run_name",
    "trainer.project_name",
    "trainer.run_path",
    "trainer.ckpt_path",
    "trainer.ckpt_interval",
    "trainer.max_ckpts_to_keep",
    "trainer.export_path",
    "trainer.logger",
)
"""Keys, and groups of keys, that this recipe reads. train_batch_size counts rows of one optimizer step, num_steps the
unrolled steps of the training-time test."""

LEARNING_RATE = 1e-3
"""Where trainer.policy.optimizer_config.lr is not set: the policy's own rate is far too small for a head."""
UNROLLED = 4
SEEDS_PER_STEP = 1 << 32


def main(argv: Sequence[str] | None = None) -> int:
    """Train a head as the command line says; returns the exit code."""
    return run_recipe(argv, train_head, applies=APPLIES, recipe="training an EAGLE-3 head", manual=__doc__)


def train_head(loaded: LoadedConfig, run_dir: Path) -> int:
    """Train, resume or finish the run in `run_dir`."""
    config, keys = loaded.config, loaded.config.trainer
    torch.manual_seed(keys.seed)
    replace_file(run_dir / "config.yaml", loaded.to_yaml().encode())
    state = RunState(keys, plain(config))
    with Progress(keys.run_name, 0, model=keys.policy.model.path, engine="none: an EAGLE-3 head") as progress:
        path = keys.policy.model.path
        folder = prepare_builtin(path, seed=keys.seed, on_progress=progress.warm_start) if is_builtin(path) else path
        tokenizer = load_tokenizer(Path(folder))
        model = load_model(folder, dtype=getattr(torch, keys.policy.model.dtype or "float32"), device=device_of(config))
        model.requires_grad_(False)
        rows = load_rows(config)
        stream = PromptStream(rows, batch_size=keys.train_batch_size, seed=keys.seed, shuffle=config.data.shuffle)
        total_steps = min(stream.num_steps(keys.epochs), keys.max_steps or sys.maxsize)
        trainer = Eagle3Trainer(model, starting_head(config, model), _settings(loaded, total_steps))
        answers = _Answers(config, model, tokenizer)
        parts = {"head": (trainer.save, trainer.load)}
        step = first_step = state.restore(parts, stream)
        for change in state.changes:
            progress.message(f"changed since that checkpoint: {change}")
        progress.set_total(total_steps, first_step=first_step)
        if first_step:
            progress.message(f"resumed after step {first_step} from {state.resumed_from}")
            progress.restore(row for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] <= first_step)
        phases = PhaseTimer(on_start=progress.phase)
        export_path = Path(keys.export_path or run_dir / "export")
        with (
            RunFiles(
                config,
                run_dir,
                progress,
                phases,
                decode=lambda ids: tokenizer.decode(list(ids)),
                show=lambda ids: response_text(tokenizer, ids),
                resume_step=first_step or None,
                total_steps=total_steps,
            ) as log,
            stop_on_interrupt(progress) as stop,
        ):
            while step < total_steps and not stop:
                step += 1
                with phases("rollout"):
                    sequences = answers.to(stream.next_batch(), step)
                with phases("train"):
                    metrics = trainer.step(sequences)
                metrics["train/num_loss_tokens"] = float(sum(int(s.is_answer.sum()) for s in sequences))
                log.flush(step, metrics)
                last = step == total_steps
                if last:
                    save_head(trainer.head, export_path, num_layers=Target.of(model).num_layers)
                if last or stop or (keys.ckpt_interval > 0 and step % keys.ckpt_interval == 0):
                    state.save(step, parts, stream.state_dict())
        progress.message(f"report {write_report(run_dir)}")
        if step < total_steps:
            raise KeyboardInterrupt
        progress.message(f"head   {export_path}")
    return DONE


def load_rows(config: Config) -> list[PromptRow]:
    """The configured files, or the built-in sums."""
    if config.data.train_data:
        return read_rows(
            config.data.train_data,
            environment="",
            prompt_key=config.data.prompt_key,
            on_bad_row=config.data.on_bad_row,
        )
    return arithmetic_rows("train", config.environment.arithmetic.num_train_prompts)


def starting_head(config: Config, model: PreTrainedModel) -> Eagle3Head:
    """The configured one, or a new one. Raises ConfigError for one that doesn't fit the model."""
    keys = config.generator.speculative_decoding
    if keys.draft_model_path is None:
        words = None if keys.token_map is None else load_token_map(keys.token_map).tolist()
        return fresh_eagle3(model, seed=config.trainer.seed, word_ids=words)
    if keys.token_map is not None:
        raise ConfigError(
            "generator.speculative_decoding.token_map names the words of a new head, and draft_model_path one that has "
            "its own; leave one of them out"
        )
    head = load_head(keys.draft_model_path, "eagle3", Target.of(model), dtype=model.dtype)
    assert isinstance(head, Eagle3Head)
    return head.to(model.device)


def _settings(loaded: LoadedConfig, total_steps: int) -> Eagle3Settings:
    config, keys = loaded.config, loaded.config.trainer
    optimizer = keys.policy.optimizer_config
    if loaded.sources["trainer.policy.optimizer_config.lr"].kind == "base.yaml":
        optimizer = optimizer.model_copy(update={"lr": LEARNING_RATE})
    return Eagle3Settings(
        optimizer=optimizer_settings(config, optimizer, keys.train_batch_size, total_steps),
        num_unrolled=config.generator.speculative_decoding.num_steps or UNROLLED,
        **({} if keys.max_tokens_per_micro_batch is None else {"max_tokens": keys.max_tokens_per_micro_batch}),
    )


class _Answers:
    """Rows with the answers that they have, or with the model's. Equal steps get equal answers."""

    def __init__(self, config: Config, model: PreTrainedModel, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._options = config.generator.chat_template_kwargs
        self._sampling = sampling_params(config.generator.sampling_params)
        self._seed = config.trainer.seed
        # The recipe's own keys of the draft say nothing of an engine without one.
        self._engine: EmbeddedEngine = engine_over(model, config, tokenizer)

    def to(self, rows: Sequence[Prompt], step: int) -> list[AnsweredSequence]:
        return asyncio.run(self._answer(rows, step))

    async def _answer(self, rows: Sequence[Prompt], step: int) -> list[AnsweredSequence]:
        asked, sequences = [], []
        for number, row in enumerate(rows):
            if row.messages[-1]["role"] == "assistant":
                sequences += [
                    AnsweredSequence(token_ids=sample.token_ids, is_answer=sample.loss_mask)
                    for sample in encode_conversation(
                        self._tokenizer, row.messages, name=f"{step}-{number}", template_kwargs=self._options
                    )
                ]
            else:
                asked.append(self._sample(row, f"{step}-{number}", step * SEEDS_PER_STEP + number))
        return [*sequences, *await asyncio.gather(*asked)]

    async def _sample(self, row: Prompt, name: str, index: int) -> AnsweredSequence:
        prompt = render_prompt(self._tokenizer, row.messages, template_kwargs=self._options)
        sampling = replace(self._sampling, seed=derived_seed(self._seed, index))
        answer = await self._engine.generate(
            GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)
        )
        token_ids = torch.tensor((*prompt, *answer.token_ids))
        return AnsweredSequence(token_ids=token_ids, is_answer=torch.arange(len(token_ids)) >= len(prompt))


if __name__ == "__main__":
    sys.exit(main())
