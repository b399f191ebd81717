"""generator: who samples the rollouts, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from skyrl_train.config.fields import Backend, Dtype, Fraction, Group, Ints, NonNegative, Positive, Strings
from skyrl_train.config.schema_engine import (
    CustomLogitProcessor,
    DeterministicInference,
    EngineLora,
    Metrics,
    Scheduling,
    Sessions,
    SpeculativeDecoding,
    StructuredOutput,
)
from skyrl_train.config.schema_server import (
    Attention,
    CpuOffload,
    CudaGraph,
    Disaggregation,
    HealthChecks,
    HierarchicalCache,
    KvCache,
    LoadBalancing,
    MultiNode,
    Quantization,
    TorchCompile,
)


class SamplingParams(Group):
    """How an answer is sampled. Off values: top_p 1, top_k 0, min_p 0, penalties 1 / 0 / 0."""

    max_generate_length: Positive = Field(description="Tokens of an answer at most.")
    temperature: float = Field(
        1.0,
        ge=0,
        description="Logits are divided by this; 0 is greedy. Training wants 1: the distribution that is trained.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the likeliest tokens up to this mass; 1 is off.")
    top_k: NonNegative = Field(0, description="Keep the k likeliest tokens; 0 is off.")
    min_p: Fraction = Field(0.0, description="Drop tokens below this times the likeliest; 0 is off.")
    repetition_penalty: float = Field(1.0, gt=0, description="Divides the logits of seen tokens; 1 is off.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted once from seen tokens; 0 is off.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted per occurrence; 0 is off.")
    min_new_tokens: NonNegative = Field(0, description="No end before this many tokens.")
    stop: Strings = Field(
        (), description="Texts that end an answer; kept in the text, the ids and the log-probabilities."
    )
    stop_token_ids: Ints = Field((), description="Token ids that end an answer; kept like stop.")
    ignore_eos: bool = Field(False, description="Go on after the end token.")
    logit_processor: str | None = Field(
        None,
        description="Dotted path of a function of your own that changes each next token's logits (docs/EXTENDING.md); "
        "with generator.custom_logit_processor.enabled.",
    )
    logit_processor_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Its further arguments, as {token_id: 13}."
    )


class EvalSamplingParams(SamplingParams):
    """As sampling_params, for evaluation."""

    temperature: float = Field(0.0, ge=0, description="0 is greedy.")


class ChatTemplate(Group):
    """Where the chat template comes from."""

    source: Literal["name", "file"] = Field("name", description="name: a template of the tokenizer's; file: a path.")
    name_or_path: str | None = Field(None, description="Its name or path; null is the tokenizer's own.")


class Generator(Group):
    """Rollouts: the engine, its size and its options."""

    backend: Backend = Field(
        "embedded", description="embedded runs in this process; sglang and vllm are servers of their own."
    )
    num_inference_engines: Positive = Field(
        1,
        description="Engines that share the load. Each takes tensor x pipeline x data parallel GPUs; colocated, "
        "together as many as the policy has.",
    )
    inference_engine_tensor_parallel_size: Positive = Field(
        1, description="GPUs that share every layer of one engine; must divide the model's attention heads."
    )
    inference_engine_pipeline_parallel_size: Positive = Field(
        1, description="GPUs that hold the layers of one engine in turn; does not go with speculative decoding."
    )
    inference_engine_data_parallel_size: Positive = Field(1, description="Copies of the model within one engine.")
    inference_engine_expert_parallel_size: Positive = Field(
        1, description="GPUs that share the experts of a mixture-of-experts model."
    )
    run_engines_locally: bool = Field(
        True, description="Start the engines here; false attaches to the servers in remote_inference_engine_urls."
    )
    remote_inference_engine_urls: Strings = Field(
        (), description="host:port of servers that somebody else runs, one for each of num_inference_engines."
    )
    engine_api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the key of the servers in remote_inference_engine_urls; null "
        "sends none. Servers that are started here listen on loopback and need none. The key is never printed.",
    )
    engine_python: str | None = Field(
        None,
        description="The Python interpreter that has SGLang or vLLM installed: servers pin their own torch and "
        "live in an environment of their own. null is the interpreter that runs this command.",
    )
    engine_environment: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables for the engine servers, beside our own, as {CUDA_MODULE_LOADING: LAZY}. Our "
        "PYTHONPATH is not passed on: one that the server needs stands here.",
    )
    engine_init_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments for the engine, by its own names; not one that a key here writes.",
    )
    model_dtype: Dtype | None = Field(
        None, description="Type of the engine's weights and activations; null is bfloat16 on GPUs and float32 on a CPU."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of GPU memory for weights and KV cache together; of free memory for the KV cache "
        "alone in the embedded engine. null is the backend's.",
    )
    max_num_batched_tokens: Positive | None = Field(
        None,
        description="Prompt tokens computed in one step at most; in the embedded engine, all tokens of a step. "
        "null is the backend's.",
    )
    max_num_seqs: Positive | None = Field(None, description="Requests that run at once at most; null is the backend's.")
    max_model_len: Positive | None = Field(
        None,
        description="Tokens of prompt and answer together; null is max_input_length plus the longer "
        "max_generate_length.",
    )
    enable_prefix_caching: bool = Field(
        True,
        description="Keep keys and values of prompts for later requests: the samples of one prompt then share its"
        " computation.",
    )
    weight_sync_backend: Literal["auto", "local", "nccl", "gloo", "cuda_ipc", "disk"] = Field(
        "auto",
        description="How new weights reach the engines: local shares the trainer's tensors (embedded), cuda_ipc "
        "hands over memory of the same GPU (colocated), nccl and gloo broadcast, disk goes through "
        "files. auto chooses by placement.",
    )
    use_overlapped_weight_sync: bool = Field(
        False,
        description="With weight_sync_backend disk: write the new weights while requests still run, so that the pause "
        "is the load alone. It shows in asynchronous training; elsewhere nothing runs then.",
    )
    n_samples_per_prompt: Positive = Field(description="Answers sampled for each prompt: the group that grpo compares.")
    eval_n_samples_per_prompt: Positive = Field(1, description="Answers sampled for each held-out prompt.")
    batched: bool = Field(
        False, description="Hand over a whole batch at once instead of one request per trajectory; single-turn only."
    )
    agent: str | None = Field(
        None,
        description="Dotted path of a class of your own that runs trajectories in the place of "
        "rollout.agent.Agent (docs/EXTENDING.md).",
    )
    max_turns: Positive = Field(1, description="Turns of one trajectory at most: answer, observation, answer, ….")
    step_wise_trajectories: bool = Field(
        False,
        description="Train on each turn as a sample of its own, with its history as the prompt; false makes one sample "
        "of a trajectory whose history was not edited.",
    )
    max_input_length: Positive = Field(
        description="Tokens of a prompt at most, history included. Longer prompts in the data are left out and "
        "counted; a trajectory whose history grows over it ends there."
    )
    use_conversation_multi_turn: bool = Field(
        True, description="Each turn is a chat message of its own; false appends observations to one message."
    )
    chat_history: Literal["exact", "template"] = Field(
        "exact",
        description="exact: a prompt begins with the tokens that were sampled. template: all messages are rendered "
        "anew each turn, for a template that rewrites earlier turns; each turn is then trained on its own.",
    )
    chat_template: ChatTemplate
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, as {enable_thinking: false}."
    )
    enable_http_endpoint: bool = Field(False, description="Serve the engines over OpenAI's protocol while training.")
    http_endpoint_host: str = Field("127.0.0.1", description="Interface of that endpoint; loopback unless you open it.")
    http_endpoint_port: int = Field(8000, ge=1, le=65_535, description="Port of that endpoint.")
    rope_scaling: dict[str, Any] | None = Field(None, description="Older name: now in json_model_override_args.")
    rope_theta: float | None = Field(None, gt=0, description="Older name: now in json_model_override_args.")
    json_model_override_args: dict[str, Any] | None = Field(
        None, description="Entries that replace those of the model's config.json, as {rope_scaling: {…}}."
    )
    trust_remote_code: bool | None = Field(None, description="Run Python code that comes with the model.")
    random_seed: NonNegative | None = Field(None, description="The server's seed; null is trainer.seed.")
    sampling_params: SamplingParams
    eval_sampling_params: EvalSamplingParams
    speculative_decoding: SpeculativeDecoding
    sessions: Sessions
    metrics: Metrics
    scheduling: Scheduling
    deterministic_inference: DeterministicInference
    kv_cache: KvCache
    hierarchical_cache: HierarchicalCache
    lora: EngineLora
    attention: Attention
    cuda_graph: CudaGraph
    torch_compile: TorchCompile
    quantization: Quantization
    structured_output: StructuredOutput
    custom_logit_processor: CustomLogitProcessor
    disaggregation: Disaggregation
    multi_node: MultiNode
    load_balancing: LoadBalancing
    health_checks: HealthChecks
    cpu_offload: CpuOffload
