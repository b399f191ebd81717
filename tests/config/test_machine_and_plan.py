"""The report of what a machine lacks, the GPU counts, and the sizes of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skyrl_train.config import load_config
from skyrl_train.config.explain import explain_tree, render_explain
from skyrl_train.config.machine import Gpu, Machine, _visible, capability_report, this_machine
from skyrl_train.config.model_shape import find_model_folder, shape_of
from skyrl_train.config.placement import count_gpus
from skyrl_train.config.plan import make_plan, plan_lines
from tests import tiny
from tests.config.test_checks import with_model
from tests.config.test_speculation import interpreter_with_sglang

LAPTOP = Machine(gpus=(), num_cpus=2, memory_bytes=16 * 2**30)
H200 = Gpu(name="NVIDIA H200", memory_bytes=140 * 2**30)
ONE_H200 = Machine(gpus=(H200,), num_cpus=16, memory_bytes=128 * 2**30)


def report(*argv: str, machine: Machine = LAPTOP) -> str:
    text = capability_report(load_config(list(argv)).config, machine=machine)
    assert text is not None
    return text


def test_the_quickstart_runs_on_a_laptop() -> None:
    assert capability_report(load_config([]).config, machine=LAPTOP) is None


def test_the_report_names_each_difference_and_what_closes_it() -> None:
    text = report(
        "generator.backend=sglang",
        "trainer.placement.policy_num_gpus_per_node=8",
        "generator.num_inference_engines=4",
        "generator.inference_engine_tensor_parallel_size=2",
        "trainer.policy.model.path=Qwen/Qwen2.5-7B-Instruct",
        "generator.engine_python=/no/such/python",
        "environment.env_class=gsm8k",
        "data.train_data=[data/gsm8k/train.parquet]",
    )
    for part in (
        "nothing was started",
        "Here: no GPU, 2 CPU cores, 16 GiB of memory",
        "needs 8 GPUs (policy 8, engines 8, sharing the same ones); here: 0",
        "trainer.placement.policy_num_gpus_per_node=0",
        "needs sglang in generator.engine_python=/no/such/python; here: no such program",
        'pip install "sglang==',
        "needs the model Qwen/Qwen2.5-7B-Instruct (trainer.policy.model.path)",
        "hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/Qwen2.5-7B-Instruct",
        "trainer.policy.model.path=models/Qwen2.5-7B-Instruct",
        "needs the data data/gsm8k/train.parquet (data.train_data)",
        "python examples/gsm8k/prepare.py --out data/gsm8k",
    ):
        assert part in text
    assert len(text.splitlines()) <= 24  # one screen


def test_a_machine_that_has_all_of_it_gets_no_report(tmp_path: Path) -> None:
    python = interpreter_with_sglang(tmp_path / "env", "0.5.23")
    loaded = load_config(
        [
            "generator.backend=sglang",
            "trainer.placement.policy_num_gpus_per_node=1",
            with_model(tmp_path),
            f"generator.engine_python={python}",
        ]
    )
    assert capability_report(loaded.config, machine=ONE_H200) is None


def test_more_gpus_than_here_says_how_many_there_are() -> None:
    text = report(
        "generator.backend=sglang",
        "trainer.placement.policy_num_gpus_per_node=4",
        "generator.num_inference_engines=4",
        machine=ONE_H200,
    )
    assert "needs 4 GPUs (policy 4, engines 4, sharing the same ones); here: 1" in text
    assert "trainer.placement.policy_num_gpus_per_node=1" in text
    assert "needs a trainer on 4 GPUs; here: this version trains on 1" in text


def test_a_missing_draft_and_reference_are_named() -> None:
    text = report(
        "generator.backend=sglang",
        "generator.speculative_decoding.enabled=true",
        "generator.speculative_decoding.algorithm=eagle3",
        "generator.speculative_decoding.draft_model_path=heads/e3",
        "trainer.algorithm.use_kl_loss=true",
        "trainer.ref.model.path=models/ref",
    )
    assert "needs the model heads/e3 (generator.speculative_decoding.draft_model_path)" in text
    assert "needs the model models/ref (trainer.ref.model.path)" in text


def test_a_model_in_the_hugging_face_cache_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert find_model_folder("org/name") is None
    (snapshot / "config.json").write_text("{}")
    assert find_model_folder("org/name") == snapshot


def test_visible_devices_limit_the_gpus() -> None:
    other = Gpu(name="other", memory_bytes=1)
    assert _visible((H200, other), None) == (H200, other)
    assert _visible((H200, other), "") == ()
    assert _visible((H200, other), "1") == (other,)
    assert _visible((H200, other), "1,7,0") == (other,)  # CUDA stops at the first device it does not know


def test_this_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.num_cpus >= 1
    assert machine.memory_bytes > 2**20


@pytest.mark.parametrize(
    ("overrides", "total"),
    [
        ((), 0),
        (("trainer.placement.policy_num_gpus_per_node=1",), 1),
        (
            (
                "generator.backend=sglang",
                "trainer.placement.policy_num_gpus_per_node=4",
                "trainer.placement.colocate_all=false",
                "generator.num_inference_engines=2",
                "generator.inference_engine_tensor_parallel_size=2",
            ),
            8,
        ),
        (
            (
                "generator.backend=sglang",
                "trainer.placement.policy_num_gpus_per_node=2",
                "trainer.placement.colocate_all=false",
                "trainer.placement.colocate_policy_ref=false",
                "trainer.algorithm.use_kl_loss=true",
                "trainer.placement.ref_num_gpus_per_node=1",
            ),
            4,
        ),
        (
            (
                "generator.backend=sglang",
                "trainer.placement.policy_num_nodes=2",
                "trainer.placement.policy_num_gpus_per_node=8",
                "generator.num_inference_engines=16",
            ),
            16,
        ),
    ],
)
def test_gpus_add_up(overrides: tuple[str, ...], total: int) -> None:
    assert count_gpus(load_config(list(overrides)).config).total == total


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_from_the_shape(arch: str, tied: bool) -> None:
    model = tiny.make_model(arch, hidden_size=128, tie_word_embeddings=tied, attn_implementation="eager")
    shape = shape_of(model.config.to_dict())
    assert shape is not None
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_parameters == pytest.approx(actual, rel=0.01)


def test_the_plan_of_a_half_billion_parameters_on_one_gpu(tmp_path: Path) -> None:
    model = with_model(tmp_path, tie_word_embeddings=True)
    config = load_config([model, "trainer.placement.policy_num_gpus_per_node=1"]).config
    plan = make_plan(config, ONE_H200)
    # By hand: 151936 x 896 embeddings + 24 x (896 x 64 x (2 x 14 + 2 x 2) + 3 x 896 x 4864 + 2 x 896) + 896.
    parameters = 151936 * 896 + 24 * (896 * 64 * 32 + 3 * 896 * 4864 + 2 * 896) + 896
    assert plan.memory["weights"] == 2 * parameters
    assert plan.memory["gradients"] == 4 * parameters
    assert plan.memory["optimizer"] == 12 * parameters
    # Keys and values: 2 x 24 layers x 2 heads x 64 numbers x 2 bytes = 12288 bytes a token; 512 requests x 72 tokens.
    assert plan.kv_cache_tokens == 512 * 72
    assert plan.memory["KV cache"] == 512 * 72 * 12288
    assert any("KV cache" in line for line in plan_lines(plan))


def test_the_plan_of_adapters_counts_them_instead_of_all_weights(tmp_path: Path) -> None:
    model = with_model(tmp_path, tie_word_embeddings=True)
    gpu, kl = "trainer.placement.policy_num_gpus_per_node=1", "trainer.algorithm.use_kl_loss=true"
    memory = make_plan(load_config([model, gpu, kl, "trainer.policy.model.lora.rank=16"]).config, ONE_H200).memory
    # By hand, 24 layers: q and o 896 + 896, k and v 896 + 128, gate, up and down 896 + 4864, each times the rank.
    adapters = 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    linear = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert memory["gradients"] == memory["adapters"] == 4 * adapters
    assert memory["optimizer"] == 8 * adapters
    assert memory["merged weights"] == 2 * linear
    assert memory["reference"] == 0, "the policy with its adapters off"


def test_a_plan_over_the_memory_says_so(tmp_path: Path) -> None:
    config = load_config([with_model(tmp_path, num_hidden_layers=2400), "generator.backend=sglang"]).config
    assert any("more than there is" in note for note in make_plan(config, LAPTOP).notes)


def test_explain_as_json_has_every_key_the_plan_and_the_commands() -> None:
    loaded = load_config(["--explain=json", "generator.backend=sglang", "trainer.seed=7"])
    tree = json.loads(render_explain(loaded, machine=LAPTOP))
    assert tree == explain_tree(loaded, LAPTOP)
    assert tree["keys"]["trainer.seed"] == {"value": 7, "source": "override trainer.seed=7", "kind": "override"}
    assert tree["keys"]["generator.gpu_memory_utilization"]["kind"] == "backend"
    assert tree["plan"]["gpus"]["total"] == 0
    assert "sglang.launch_server" in tree["engines"][0]
    assert "needs sglang" in tree["report"]


def test_explain_as_text_shows_values_sources_plan_engines_and_report() -> None:
    text = load_config(["--explain", "trainer.seed=7"]).render_explain()
    line = next(line for line in text.splitlines() if " trainer.seed " in line)
    assert line.split() == ["*", "trainer.seed", "7", "override", "trainer.seed=7"]
    for part in ("plan", "engines", "embedded, in the trainer's process", "can run it"):
        assert part in text


def test_help_is_the_usage() -> None:
    assert "--config-path" in load_config(["--help"]).render_explain()
