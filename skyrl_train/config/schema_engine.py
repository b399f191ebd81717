"""Groups of generator that every backend can have: speculation, sessions, metrics, scheduling, adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skyrl_train.config.fields import Floats, Group, NonNegative, Positive, Strings


class Ngram(Group):
    """Drafts from n-grams of the prompt and the text so far: no draft model."""

    max_trie_depth: Positive | None = Field(None, description="Longest n-gram kept in the trie.")
    min_bfs_breadth: Positive | None = Field(None, description="Least breadth of the draft tree.")
    max_bfs_breadth: Positive | None = Field(None, description="Greatest breadth of the draft tree.")
    match_type: Literal["BFS", "PROB"] | None = Field(
        None, description="Choose branches by recency (BFS) or frequency (PROB)."
    )
    capacity: Positive | None = Field(None, description="Entries that the trie holds.")
    external_corpus_path: str | None = Field(None, description="A jsonl corpus that drafts may come from.")
    external_sam_budget: NonNegative | None = Field(None, description="Draft nodes reserved for that corpus.")
    external_corpus_max_tokens: Positive | None = Field(None, description="Refuse a corpus longer than this.")
    min_match_window_size: Positive | None = Field(None, description="Older releases: shortest match.")
    max_match_window_size: Positive | None = Field(None, description="Older releases: longest match.")
    branch_length: Positive | None = Field(None, description="Older releases: longest branch.")


class SpeculativeDecoding(Group):
    """Draft tokens that the model verifies: faster at small batches, the same distribution."""

    enabled: bool = Field(False, description="Turn speculation on.")
    algorithm: Literal["ngram", "standalone", "eagle", "eagle3", "auto"] = Field(
        "ngram",
        description="ngram needs no draft model; standalone a small model of the family; eagle and eagle3 a trained "
        "head; auto measures and turns drafts off where they lose.",
    )
    draft_model_path: str | None = Field(None, description="Folder of the draft model; not for ngram.")
    draft_model_revision: str | None = Field(None, description="Its revision, when it is a hub name.")
    draft_load_format: str | None = Field(None, description="Its weight format; null is the target's.")
    draft_attention_backend: str | None = Field(None, description="Its attention kernel; null is the target's.")
    draft_model_quantization: str | None = Field(None, description="Its quantization; null is the target's.")
    num_steps: Positive | None = Field(None, description="Draft steps before each verification.")
    eagle_topk: Positive | None = Field(None, description="Branches at each draft step; 1 is a chain.")
    num_draft_tokens: Positive | None = Field(None, description="Draft tokens verified at once.")
    accept_threshold_single: float = Field(
        1.0, gt=0, le=1, description="Accept a draft token more probable than this; under 1 changes the distribution."
    )
    accept_threshold_acc: float = Field(
        1.0, gt=0, le=1, description="Raise accept probabilities to p / this; under 1 changes the distribution."
    )
    use_rejection_sampling: bool | None = Field(
        None, description="Verify by rejection sampling: eagle and eagle3 with eagle_topk 1 only."
    )
    adaptive: bool | None = Field(None, description="Change num_steps with the acceptance that is seen.")
    adaptive_config: str | None = Field(None, description="File with the bounds of that change.")
    draft_window_size: Positive | None = Field(None, description="Sliding window of the draft model.")
    token_map: str | None = Field(None, description="Table of the draft's reduced vocabulary.")
    attention_mode: Literal["prefill", "decode"] | None = Field(None, description="Kernel of the verification.")
    ngram: Ngram


class Sessions(Group):
    """Multi-turn requests that carry only their new tokens."""

    enabled: bool = Field(False, description="Open an engine session per trajectory.")
    default_capacity: Positive = Field(32_768, description="Tokens that a session may hold.")
    pool_sessions: bool = Field(False, description="Reuse sessions instead of opening one per trajectory.")
    max_pool_size: Positive = Field(256, description="Sessions that the pool keeps.")


class MetricsBuckets(Group):
    """Bounds of the latency and token histograms."""

    time_to_first_token: Floats | None = Field(None, description="Seconds to the first token.")
    inter_token_latency: Floats | None = Field(None, description="Seconds between tokens.")
    e2e_request_latency: Floats | None = Field(None, description="Seconds of a whole request.")
    prompt_tokens: Strings | None = Field(None, description="Tokens of prompts: default, tse M B N, or custom ….")
    generation_tokens: Strings | None = Field(None, description="Tokens of answers: default, tse M B N, or custom ….")


class ExportToFile(Group):
    """One JSON line per request."""

    enabled: bool = Field(False, description="Write each request's figures to a file.")
    directory: str | None = Field(None, description="Where; needed when enabled.")


class CustomLabels(Group):
    """Labels that requests bring along."""

    allowed: Strings | None = Field(None, description="Label names that a request may set.")
    header: str | None = Field(None, description="HTTP header that carries them.")
    extra: dict[str, str] = Field(default_factory=dict, description="Labels on every series of this engine.")


class Tracing(Group):
    """OpenTelemetry spans."""

    enabled: bool = Field(False, description="Send spans over OTLP.")
    otlp_endpoint: str = Field("localhost:4317", description="The collector, host:port.")
    modules: str | None = Field(None, description="Parts to trace, separated by commas.")
    service_name: str | None = Field(None, description="Name of the service in the spans.")


class RequestLogging(Group):
    """A log of requests."""

    enabled: bool = Field(False, description="Log requests.")
    level: int = Field(
        0, ge=0, le=3, description="0 metadata, 1 and parameters, 2 and partial input and output, 3 everything."
    )
    format: Literal["text", "json"] = Field("text", description="Form of a line.")
    targets: Strings | None = Field(None, description="stdout and folders to write to.")


class Metrics(Group):
    """What the engine measures."""

    enabled: bool = Field(False, description="Serve Prometheus metrics.")
    enable_for_all_schedulers: bool = Field(False, description="Every rank reports, not just the first.")
    collect_tokens_histogram: bool = Field(True, description="Histograms of prompt and answer lengths.")
    decode_log_interval: Positive | None = Field(None, description="Decode steps between log lines.")
    mfu: bool | None = Field(None, description="Estimate the fraction of peak arithmetic.")
    cache_report: bool | None = Field(None, description="Report cached tokens in OpenAI usage.")
    expert_distribution: bool | None = Field(None, description="Balance of a mixture of experts.")
    log_level: Literal["debug", "info", "warning", "error"] | None = Field(None, description="The server's log level.")
    buckets: MetricsBuckets
    export_to_file: ExportToFile
    custom_labels: CustomLabels
    tracing: Tracing
    logging: RequestLogging


class Scheduling(Group):
    """Which request runs next, and how much at once."""

    policy: Literal["fcfs", "lpm", "random", "dfs-weight", "lof", "priority", "routing-key"] | None = Field(
        None, description="fcfs is first come first served; lpm the longest cached prefix first; null is the backend's."
    )
    enable_priority: bool = Field(False, description="Serve requests by their priority.")
    low_priority_values_first: bool = Field(False, description="Lower numbers first instead of higher.")
    preemption_threshold: NonNegative | None = Field(None, description="Priority difference that preempts.")
    disable_preemption: bool | None = Field(None, description="Priorities order the queue only.")
    default_priority: int | None = Field(None, description="Priority of requests that bring none.")
    conservativeness: float | None = Field(None, gt=0, description="Greater admits fewer requests at once.")
    chunked_prefill_size: int | None = Field(
        None, ge=-1, description="Tokens of a prompt computed per step; -1 computes prompts whole."
    )
    enable_mixed_chunk: bool | None = Field(None, description="Mix prompt chunks and decoding in one step.")
    enable_dynamic_chunking: bool | None = Field(None, description="Adapt chunks to pipeline stages.")
    max_running_requests: Positive | None = Field(None, description="Requests that decode at once.")
    max_queued_requests: Positive | None = Field(None, description="Requests that may wait; more are refused.")
    max_total_tokens: Positive | None = Field(None, description="Tokens of the KV cache.")
    max_prefill_tokens: Positive | None = Field(None, description="Prompt tokens of one step.")
    max_prefill_requests: Positive | None = Field(None, description="Prompts of one step.")
    num_continuous_decode_steps: Positive | None = Field(None, description="Decode steps between scheduling.")
    disable_overlap: bool | None = Field(None, description="Schedule and compute one after the other.")
    recv_interval: Positive | None = Field(None, description="Steps between looks at the queue.")
    stream_interval: Positive | None = Field(None, description="Tokens of one streamed piece.")
    retraction_policy: Literal["length", "priority"] | None = Field(
        None, description="Which request goes back to the queue when the KV cache is full."
    )


class EngineLora(Group):
    """Adapters that the engine serves."""

    enabled: bool | None = Field(None, description="Serve adapters; null is on when the policy trains one.")
    paths: dict[str, str] = Field(default_factory=dict, description="Adapters to load at start: name to folder.")
    max_rank: Positive | None = Field(None, description="Greatest rank; null is the greatest among them.")
    target_modules: Strings | None = Field(None, description="Modules with adapters; null is what they have.")
    max_loras_per_batch: Positive | None = Field(None, description="Adapters in one batch, the base model included.")
    max_loaded_loras: Positive | None = Field(None, description="Adapters in host memory.")
    eviction_policy: Literal["lru", "fifo"] | None = Field(None, description="Which adapter leaves first.")
    backend: Literal["triton", "csgmv", "ascend", "torch_native"] | None = Field(None, description="Kernel.")
    max_chunk_size: Literal[16, 32, 64, 128] | None = Field(None, description="Chunk of the csgmv kernel.")
    overlap_loading: bool | None = Field(None, description="Load adapters while computing.")
    strict_loading: bool | None = Field(None, description="Refuse adapters with keys that do not match.")
    drain_wait_threshold_s: float | None = Field(
        None, ge=0, description="A request that waits this long for a slot makes another adapter leave."
    )


class StructuredOutput(Group):
    """Answers that follow a grammar."""

    grammar_backend: Literal["xgrammar", "outlines", "llguidance", "none"] | None = Field(
        None, description="Who enforces it."
    )
    whitespace_pattern: str | None = Field(None, description="Regular expression of white space in JSON.")
    disable_any_whitespace: bool | None = Field(None, description="Compact JSON only.")


class CustomLogitProcessor(Group):
    """Functions of the user's on the logits."""

    enabled: bool = Field(False, description="Accept them; code from requests runs in the server.")


class DeterministicInference(Group):
    """The same bits for a request alone or in any batch."""

    enabled: bool = Field(False, description="Batch-invariant kernels.")
    rl_on_policy_target: Literal["fsdp"] | None = Field(
        None, description="Match this trainer's log-probabilities to the bit."
    )
