"""Supervised fine-tuning: `python -m skyrl_train.recipes.sft [--config-path DIR --config-name NAME] [key=value ...]`.

    conversations ──► sequences, the assistant's tokens in the loss ──► pack ──► forward_backward, optim_step ──┐
         ▲                                                                                                      │
         └────────────── next step ◄── held-out loss, checkpoint, export where due ◄────────────────────────────┘

The keys are the main job's, those in APPLIES; setting another is refused. Rows (jsonl, json, parquet, a `datasets`
folder) have a column `messages`, or the one that data.prompt_key names, with a whole conversation. Without
data.train_data the built-in sums are shown with their answers. Checkpoints, resuming, Ctrl-C and exit codes are the
main job's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skyrl_train.algorithms.likelihood import negative_log_likelihood
from skyrl_train.config.keys import read
from skyrl_train.config.load import LoadedConfig, plain
from skyrl_train.config.schema import Config
from skyrl_train.data.chat import response_text
from skyrl_train.data.conversations import check_conversation, encode_conversation
from skyrl_train.data.pack import pack
from skyrl_train.data.rows import PromptRow, read_rows
from skyrl_train.data.stream import PromptStream
from skyrl_train.entrypoints.build import device_of, optimizer_settings
from skyrl_train.entrypoints.build_rollouts import load_tokenizer
from skyrl_train.entrypoints.run import DONE
from skyrl_train.entrypoints.run_log import RunFiles
from skyrl_train.entrypoints.run_state import RunState
from skyrl_train.environments.arithmetic import Split, arithmetic_rows
from skyrl_train.errors import DataError
from skyrl_train.observability.files import replace_file
from skyrl_train.observability.metrics import read_metrics
from skyrl_train.observability.phases import PhaseTimer
from skyrl_train.observability.progress import Progress
from skyrl_train.observability.report import write_report
from skyrl_train.recipes.command import run_recipe
from skyrl_train.recipes.interrupt import stop_on_interrupt
from skyrl_train.training.builtin_model import is_builtin, prepare_builtin
from skyrl_train.training.model import export_hf, load_model
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import Prompt, TrainingSample

logger = logging.getLogger(__name__)

APPLIES = (
    "data.train_data",
    "data.val_data",
    "data.prompt_key",
    "data.shuffle",
    "data.on_bad_row",
    "environment.arithmetic",
    "generator.chat_template_kwargs",
    "trainer.policy.model.path",
    "trainer.policy.model.dtype",
    "trainer.policy.optimizer_config",
    "trainer.placement.policy_num_gpus_per_node",
    "trainer.gradient_checkpointing",
    "trainer.seed",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.train_batch_size",
    "trainer.max_tokens_per_micro_batch",
    "trainer.eval_interval",
    "trainer.eval_before_train",
    "trainer.resume_mode",
    "trainer.resume_path",
    "trainer.run_name",
    "trainer.project_name",
    "trainer.run_path",
    "trainer.ckpt_path",
    "trainer.ckpt_interval",
    "trainer.max_ckpts_to_keep",
    "trainer.export_path",
    "trainer.hf_save_interval",
    "trainer.logger",
)
"""Keys, and groups of keys, that this recipe reads. train_batch_size counts conversations of one optimizer step."""

SAMPLES = "samples"
"""The entry of a row's extras that holds its encoded sequences."""


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Encoded rows of both splits; all of them fit one micro-batch."""

    train: list[PromptRow]
    held_out: list[PromptRow]


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune as the command line says; returns the exit code."""
    return run_recipe(
        argv, fine_tune, applies=APPLIES, recipe="supervised fine-tuning", manual=__doc__, warn=_warn_of_tiny_rate
    )


def _warn_of_tiny_rate(loaded: LoadedConfig) -> None:
    lr = "trainer.policy.optimizer_config.lr"
    if loaded.sources[lr].kind == "base.yaml" and not is_builtin(loaded.config.trainer.policy.model.path):
        print(f"warning: {lr}={read(loaded.config, lr)} is tuned for the built-in tiny model; set it", file=sys.stderr)


def fine_tune(loaded: LoadedConfig, run_dir: Path) -> int:
    """Train, resume or finish the run in `run_dir`."""
    config, keys = loaded.config, loaded.config.trainer
    torch.manual_seed(keys.seed)
    replace_file(run_dir / "config.yaml", loaded.to_yaml().encode())
    state = RunState(keys, plain(config))
    with Progress(keys.run_name, 0, model=keys.policy.model.path, engine="none: supervised") as progress:
        path = keys.policy.model.path
        folder = prepare_builtin(path, seed=keys.seed, on_progress=progress.warm_start) if is_builtin(path) else path
        tokenizer = load_tokenizer(Path(folder))
        model = load_model(folder, dtype=getattr(torch, keys.policy.model.dtype or "float32"), device=device_of(config))
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        data = load_conversations(config, tokenizer, max_positions=positions)
        stream = PromptStream(data.train, batch_size=keys.train_batch_size, seed=keys.seed, shuffle=config.data.shuffle)
        total_steps = min(stream.num_steps(keys.epochs), keys.max_steps or sys.maxsize)
        trainer = PolicyTrainer(
            model,
            optimizer_settings(config, keys.policy.optimizer_config, keys.train_batch_size, total_steps),
            gradient_checkpointing=keys.gradient_checkpointing,
        )
        parts = {"policy": (trainer.save, trainer.load)}
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
            if not first_step and keys.eval_before_train and keys.eval_interval > 0:
                log.flush(0, held_out_loss(trainer, data.held_out, keys.max_tokens_per_micro_batch))
            while step < total_steps and not stop:
                step += 1
                last = step == total_steps
                with phases("train"):
                    metrics = train_step(trainer, stream.next_batch(), keys.max_tokens_per_micro_batch)
                if keys.eval_interval > 0 and (last or step % keys.eval_interval == 0):
                    with phases("evaluate"):
                        metrics |= held_out_loss(trainer, data.held_out, keys.max_tokens_per_micro_batch)
                log.flush(step, metrics)
                # The checkpoint last: what a kill before it leaves undone is done again.
                if last or (keys.hf_save_interval > 0 and step % keys.hf_save_interval == 0):
                    export_hf(model, tokenizer, export_path if last else export_path / f"global_step_{step}")
                if last or stop or (keys.ckpt_interval > 0 and step % keys.ckpt_interval == 0):
                    state.save(step, parts, stream.state_dict())
        progress.message(f"report {write_report(run_dir)}")
        if step < total_steps:
            raise KeyboardInterrupt
        progress.message(f"model  {export_path}")
    return DONE


def train_step(
    trainer: PolicyTrainer, rows: Sequence[Prompt], max_tokens_per_micro_batch: int | None
) -> dict[str, float]:
    """One optimizer step on these conversations; all their tokens share one denominator."""
    samples = [sample for row in rows for sample in row.extras[SAMPLES]]
    batch = pack(samples, max_tokens_per_micro_batch=max_tokens_per_micro_batch)
    found = trainer.forward_backward(batch, negative_log_likelihood)
    version = trainer.optim_step()
    assert trainer.last_step is not None
    return {
        **{name: found[name] for name in ("policy/loss", "policy/nll", "policy/entropy")},
        "policy/grad_norm": trainer.last_step.grad_norm,
        "policy/lr": trainer.last_step.lr,
        "policy/version": version,
        "train/num_loss_tokens": batch.num_loss_tokens,
        "train/num_sequences": len(samples),
    }


def held_out_loss(
    trainer: PolicyTrainer, rows: Sequence[PromptRow], max_tokens_per_micro_batch: int | None
) -> dict[str, float]:
    """`eval/loss`: minus the mean log-probability of the held-out tokens; nothing where none are held out."""
    samples = [sample for row in rows for sample in row.extras[SAMPLES]]
    if not samples:
        return {}
    batch = pack(samples, max_tokens_per_micro_batch=max_tokens_per_micro_batch)
    total = sum(float(logprobs.double().sum()) for logprobs in trainer.forward(batch))
    return {"eval/loss": -total / batch.num_loss_tokens, "eval/num_tokens": batch.num_loss_tokens}


def load_conversations(config: Config, tokenizer: Any, *, max_positions: int | None = None) -> Conversations:
    """The configured files, or the built-in sums with their answers, encoded."""
    limit = min(config.trainer.max_tokens_per_micro_batch or sys.maxsize, max_positions or sys.maxsize)
    options = config.generator.chat_template_kwargs
    train = _encoded(_rows(config, config.data.train_data, "train"), tokenizer, options, limit, "train")
    held_out = _encoded(_rows(config, config.data.val_data, "eval"), tokenizer, options, limit, "eval")
    if not train:
        raise DataError(f"no training conversation is within {limit} tokens")
    return Conversations(train=train, held_out=held_out)


def _rows(config: Config, files: Sequence[str], split: Split) -> list[PromptRow]:
    if files:
        return read_rows(
            files,
            environment="",
            prompt_key=config.data.prompt_key if config.data.prompt_key != "prompt" else "messages",
            on_bad_row=config.data.on_bad_row,
            check=check_conversation,
        )
    if config.data.train_data:  # training files, and nothing held out
        return []
    sizes = config.environment.arithmetic
    rows = arithmetic_rows(split, sizes.num_train_prompts if split == "train" else sizes.num_eval_prompts)
    return [replace(row, messages=(*row.messages, {"role": "assistant", "content": row.target})) for row in rows]


def _encoded(
    rows: Sequence[PromptRow], tokenizer: Any, template_kwargs: dict[str, Any], limit: int, split: Split
) -> list[PromptRow]:
    """Each row with its sequences; those with one over the limit are left out and counted."""
    fits: list[PromptRow] = []
    for number, row in enumerate(rows):
        samples: list[TrainingSample] = encode_conversation(
            tokenizer, row.messages, name=f"{split}-{number}", template_kwargs=template_kwargs
        )
        if all(len(sample.token_ids) <= limit for sample in samples):
            fits.append(replace(row, extras={SAMPLES: samples}))
    if len(fits) < len(rows):
        logger.warning(
            "%d of %d %s conversations are longer than %d tokens (trainer.max_tokens_per_micro_batch, or the model's "
            "positions) and are left out",
            len(rows) - len(fits),
            len(rows),
            split,
            limit,
        )
    return fits


if __name__ == "__main__":
    sys.exit(main())
