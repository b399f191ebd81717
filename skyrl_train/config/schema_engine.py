"""Groups of generator that every backend can have: speculation, sessions, metrics, scheduling, adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skyrl_train.config.fields import Floats, Group, NonNegative, Positive, Strings, Words


class Ngram(Group):
    """Drafts from n-grams of the prompt and the text so far: no draft model."""

    max_trie_depth: Positive | None = Field(None, description="Length of the longest n-gram that is matched.")
    min_bfs_breadth: Positive | None = Field(None, description="Breadth of the draft tree at least.")
    max_bfs_breadth: Positive | None = Field(None, description="Breadth of the draft tree at most; 1 is a chain.")
    match_type: Literal["BFS", "PROB"] | None = Field(
        None, description="Which continuations become drafts: the most recent (BFS) or the most frequent (PROB)."
    )
    capacity: Positive | None = Field(None, description="Nodes of the n-gram store.")
    external_corpus_path: str | None = Field(None, description="A jsonl corpus that drafts may come from.")
    external_sam_budget: NonNegative | None = Field(
        None, description="Draft tokens reserved for that corpus; at most num_draft_tokens - 1."
    )
    external_corpus_max_tokens: Positive | None = Field(
        None, description="Refuse to start with a corpus of more tokens."
    )
    min_match_window_size: Positive | None = Field(None, description="Older releases: shortest match.")
    max_match_window_size: Positive | None = Field(None, description="Older releases: longest match.")
    branch_length: Positive | None = Field(None, description="Older releases: longest branch.")


class SpeculativeDecoding(Group):
    """Draft tokens that the model verifies: faster at small batches, the same distribution."""

    enabled: bool = Field(
        False, description="Draft tokens and verify them. Faster at small batches; at rollout batches measure first."
    )
    algorithm: Literal["ngram", "standalone", "eagle", "eagle3", "auto"] = Field(
        "ngram",
        description="ngram: drafts from repeated text, no draft model, works with LoRA. standalone: a small model"
        " of the same family. eagle, eagle3: a head trained for this model. auto: measures and turns "
        "drafts off where they lose.",
    )
    draft_model_path: str | None = Field(
        None, description="Folder or hub name of the draft model; needed but for ngram."
    )
    draft_model_revision: str | None = Field(None, description="Revision of the draft model, when it is a hub name.")
    draft_load_format: str | None = Field(None, description="Format of the draft's weight files.")
    draft_attention_backend: str | None = Field(None, description="Attention kernel of the draft model.")
    draft_model_quantization: str | None = Field(None, description="Quantization of the draft model.")
    num_steps: Positive | None = Field(
        None,
        description="Draft steps before each verification. Set together with eagle_topk and num_draft_tokens, or "
        "none of the three.",
    )
    eagle_topk: Positive | None = Field(
        None,
        description="Branches at each draft step; 1 is a chain, more is a tree, which not every attention kernel "
        "verifies.",
    )
    num_draft_tokens: Positive | None = Field(
        None, description="Draft tokens verified at once; with eagle_topk 1 it is num_steps + 1."
    )
    accept_threshold_single: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Accept a draft token whose probability exceeds this. Under 1.0 the distribution changes and "
        "rollouts become off-policy.",
    )
    accept_threshold_acc: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Raise a draft token's accept probability from p to min(1, p / this). Under 1.0 the "
        "distribution changes and rollouts become off-policy.",
    )
    use_rejection_sampling: bool | None = Field(
        None, description="Verify by rejection sampling: eagle and eagle3 with eagle_topk 1 only."
    )
    adaptive: bool | None = Field(None, description="Adapt num_steps to the acceptance that is seen.")
    adaptive_config: str | None = Field(None, description="JSON file with the steps that adaptive may choose.")
    draft_window_size: Positive | None = Field(None, description="Tokens of context that the draft model attends to.")
    token_map: str | None = Field(None, description="File with the draft's reduced vocabulary.")
    head_train_steps: NonNegative = Field(
        0,
        description="Optimizer steps of the eagle3 head after each update of the policy, on the same rollouts, so that "
        "drafts follow the policy; 0 leaves it as it is. In the embedded engine.",
    )
    head_lr: float = Field(1.0e-4, gt=0, description="Learning rate of these steps, of an AdamW of their own.")
    attention_mode: Literal["prefill", "decode"] | None = Field(
        None, description="Which of the two attention kernels verifies drafts."
    )
    ngram: Ngram


class Sessions(Group):
    """Multi-turn requests that carry only their new tokens."""

    enabled: bool = Field(
        False,
        description="Open an engine session for each trajectory, so that a turn sends only its new tokens. A turn "
        "whose history was rewritten starts again at the session's root.",
    )
    default_capacity: Positive = Field(
        32_768,
        description="Tokens that one session may hold; at least max_model_len. A trajectory that needs more (its "
        "history was rewritten) goes on with whole prompts.",
    )
    pool_sessions: bool = Field(
        False,
        description="Empty a session whose trajectory ended and use it for another one; false opens one for each.",
    )
    max_pool_size: Positive = Field(256, description="Sessions that wait for another trajectory at most.")


class MetricsBuckets(Group):
    """Bounds of the latency and token histograms."""

    time_to_first_token: Floats | None = Field(
        None, description="Bounds in seconds, rising, of the time to the first token."
    )
    inter_token_latency: Floats | None = Field(
        None, description="Bounds in seconds, rising, of the time between tokens."
    )
    e2e_request_latency: Floats | None = Field(None, description="Bounds in seconds, rising, of a whole request.")
    prompt_tokens: Words | None = Field(
        None,
        description="Rule for bounds on prompt tokens: [default], [tse, MIDDLE, BASE, COUNT] or [custom, N, N, …].",
    )
    generation_tokens: Words | None = Field(
        None,
        description="Rule for bounds on answer tokens: [default], [tse, MIDDLE, BASE, COUNT] or [custom, N, N, …].",
    )


class ExportToFile(Group):
    """One JSON line per request."""

    enabled: bool = Field(False, description="Write one JSON line for each request.")
    directory: str | None = Field(None, description="Folder for these lines; needed when enabled.")


class CustomLabels(Group):
    """Labels that requests bring along."""

    allowed: Strings | None = Field(None, description="Names of labels that a request may bring.")
    header: str | None = Field(None, description="HTTP header that carries them.")
    extra: dict[str, str] = Field(
        default_factory=dict, description="Labels on every series of these engines, as {team: math}."
    )


class Tracing(Group):
    """OpenTelemetry spans."""

    enabled: bool = Field(False, description="Send OpenTelemetry spans of requests.")
    otlp_endpoint: str = Field("localhost:4317", description="The collector, host:port, OTLP over gRPC.")
    modules: str | None = Field(None, description="What to trace, separated by commas.")
    service_name: str | None = Field(None, description="Name of the service in the spans.")


class RequestLogging(Group):
    """A log of requests."""

    enabled: bool = Field(False, description="Log each request.")
    level: int = Field(
        0,
        ge=0,
        le=3,
        description="0 metadata; 1 and sampling parameters; 2 and partial input and output; 3 all input and output.",
    )
    format: Literal["text", "json"] = Field("text", description="text for people, json for programs.")
    targets: Strings | None = Field(None, description="stdout and folders to write to, as [stdout, logs/requests].")


class Metrics(Group):
    """What the engine measures."""

    enabled: bool = Field(
        False,
        description="Serve Prometheus metrics: of the run and all its engines at one address on loopback, and at "
        "/metrics of each server.",
    )
    endpoint_port: int | None = Field(
        None,
        ge=1,
        le=65_535,
        description="Port of the run's /metrics; null is a free one, which the run shows when it starts.",
    )
    enable_for_all_schedulers: bool = Field(
        False, description="Every tensor-parallel rank reports, not just the first; for data-parallel attention."
    )
    collect_tokens_histogram: bool = Field(True, description="Histograms of prompt and answer lengths.")
    decode_log_interval: Positive | None = Field(None, description="Decode steps between two reports.")
    mfu: bool | None = Field(None, description="Report an estimate of the arithmetic done, for model FLOP utilization.")
    cache_report: bool | None = Field(None, description="Report cached prompt tokens in the usage of OpenAI answers.")
    expert_distribution: bool | None = Field(None, description="Report how evenly the experts of a mixture are used.")
    log_level: Literal["debug", "info", "warning", "error"] | None = Field(None, description="The server's log level.")
    buckets: MetricsBuckets
    export_to_file: ExportToFile
    custom_labels: CustomLabels
    tracing: Tracing
    logging: RequestLogging


class Scheduling(Group):
    """Which request runs next, and how much at once."""

    policy: (
        Literal[
            "fcfs",
            "lpm",
            "random",
            "dfs-weight",
            "lof",
            "priority",
            "routing-key",
            "hrrn",
            "shortest-prefill-first",
        ]
        | None
    ) = Field(
        None, description="Order of waiting requests: fcfs first come first served, lpm longest cached prefix first, …"
    )
    enable_priority: bool = Field(
        False,
        description="Serve requests by their priority, higher numbers first. A rollout's is the number of its turn: "
        "trajectories that are nearly done end first, while their history is in the cache.",
    )
    low_priority_values_first: bool = Field(False, description="With enable_priority: lower numbers first.")
    preemption_threshold: NonNegative | None = Field(
        None,
        description="With enable_priority: a waiting request preempts a running one whose priority is lower by this.",
    )
    disable_preemption: bool | None = Field(
        None, description="With enable_priority: order the queue only, never preempt."
    )
    default_priority: int | None = Field(
        None, description="With enable_priority: priority of requests that bring none."
    )
    conservativeness: float | None = Field(
        None, gt=0, description="Greater admits fewer requests at once; raise it when requests are often retracted."
    )
    chunked_prefill_size: int | None = Field(
        None, ge=-1, description="Long prompts are computed in chunks of this many tokens; -1 computes them whole."
    )
    enable_mixed_chunk: bool | None = Field(None, description="Prompt chunks and decoding share a step.")
    enable_dynamic_chunking: bool | None = Field(
        None, description="With pipeline parallelism: size chunks so that each takes the same time."
    )
    max_running_requests: Positive | None = Field(
        None, description="Requests that run at once; the same argument as generator.max_num_seqs: set one."
    )
    max_queued_requests: Positive | None = Field(None, description="Requests that may wait; further ones are refused.")
    max_total_tokens: Positive | None = Field(None, description="Tokens that the KV cache holds.")
    max_prefill_tokens: Positive | None = Field(
        None, description="Prompt tokens of one step; the same argument as generator.max_num_batched_tokens: set one."
    )
    max_prefill_requests: Positive | None = Field(None, description="Prompts computed in one step at most.")
    num_continuous_decode_steps: Positive | None = Field(
        None, description="Decode steps between two rounds of scheduling; more is faster and delays first tokens."
    )
    disable_overlap: bool | None = Field(None, description="Do not prepare the next step while the GPU computes.")
    recv_interval: Positive | None = Field(None, description="Steps between two looks at newly arrived requests.")
    stream_interval: Positive | None = Field(None, description="Tokens gathered before a streamed answer is sent on.")
    retraction_policy: Literal["length", "priority"] | None = Field(
        None,
        description="Which request gives way when the KV cache is full: the one that loses least work (length), "
        "or the lowest priority.",
    )


class EngineLora(Group):
    """Adapters that the engine serves."""

    enabled: bool | None = Field(
        None,
        description="Serve LoRA adapters; null is on when the policy trains one or paths names some. "
        "Off, a policy that is an adapter is served merged.",
    )
    paths: dict[str, str] = Field(default_factory=dict, description="Adapters loaded at start, as {name: folder}.")
    max_rank: Positive | None = Field(None, description="Greatest rank of an adapter that may be loaded.")
    target_modules: Strings | None = Field(None, description="Modules that adapters may change, as [q_proj, v_proj].")
    max_loras_per_batch: Positive | None = Field(
        None, description="Adapters in one batch at most, the base model counted as one."
    )
    max_loaded_loras: Positive | None = Field(
        None, description="Adapters in host memory at most; not under max_loras_per_batch."
    )
    eviction_policy: Literal["lru", "fifo"] | None = Field(None, description="Which adapter leaves the GPU first.")
    backend: Literal["triton", "csgmv", "ascend", "torch_native", "triton_v2"] | None = Field(
        None, description="Kernel of batched adapters."
    )
    max_chunk_size: Literal[16, 32, 64, 128] | None = Field(
        None, description="Chunk of the csgmv kernel; larger may be faster."
    )
    overlap_loading: bool | None = Field(
        None, description="Load adapters while the GPU computes; needs max_loaded_loras up to 2 x max_loras_per_batch."
    )
    strict_loading: bool | None = Field(None, description="Refuse an adapter with missing or unknown weights.")
    drain_wait_threshold_s: float | None = Field(
        None,
        ge=0,
        description="A request that waits this long for an adapter slot makes another adapter finish and leave.",
    )


class StructuredOutput(Group):
    """Answers that follow a grammar."""

    grammar_backend: Literal["xgrammar", "outlines", "llguidance", "none"] | None = Field(
        None, description="Library that holds answers to a JSON schema, regular expression or grammar."
    )
    whitespace_pattern: str | None = Field(
        None, description="Regular expression of the white space allowed in JSON answers."
    )
    disable_any_whitespace: bool | None = Field(None, description="Compact JSON: no white space between tokens.")


class CustomLogitProcessor(Group):
    """Functions of the user's on the logits."""

    enabled: bool = Field(
        False,
        description="Accept logit processors from requests: they are code that the engine runs, so a server only on a "
        "loopback endpoint.",
    )


class DeterministicInference(Group):
    """The same bits for a request alone or in any batch."""

    enabled: bool = Field(
        False,
        description="Use kernels whose result does not depend on the batch: a request gives the same bits alone "
        "or among others. Slower. Embedded: float32 on the CPU.",
    )
    rl_on_policy_target: Literal["fsdp"] | None = Field(
        None,
        description="Also match the arithmetic of this trainer, so that rollout and training log-probabilities agree; "
        "embedded: to the bit.",
    )
