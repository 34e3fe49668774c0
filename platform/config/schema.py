"""Every key of offtrail, its type, default and one line. No torch here: `launch.py --help` imports this.

Who calls whom: `compose.py` builds a Config out of these classes, configs/*.yaml, a file and the command line, and ends
with OmegaConf.to_object, so that each `__post_init__` below has run before anything starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from offtrail.algos.config import AlgoConfig, GrpoConfig
from offtrail.algos.correction_config import CorrectionConfig, TisConfig
from offtrail.core.settings import section, setting
from offtrail.platform.config.head_config import HeadConfig, PrmConfig, RewardModelConfig, SupervisedConfig
from offtrail.platform.config.scorer_config import ScorerConfig
from offtrail.rewards.config import RewardConfig
from offtrail.search.config import SearchConfig
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.data_config import LabelConfig, PreferConfig, RejectConfig, SampleConfig

SCHEMA_VERSION = 1


@dataclass
class RunConfig:
    """The run and its directory."""

    name: str = setting("", path="name", resumable=True)
    """Name of the run directory; empty = JOB-TASK-ALGO and the time."""
    dir: str = setting("runs", path="folder", resumable=True)
    """Folder that holds the run directories."""
    seed: int = setting(0, "[0, 4294967295]")
    """Keys everything that is drawn: start weights, data order, every sampled token."""
    resume: bool = setting(False, resumable=True)
    """Go on with the run of that name from its last checkpoint."""
    resume_from: str = setting("", resumable=True)
    """With run.resume: go on from this checkpoint, such as step_20 (step_0: the start model), in place of the newest.
    What was trained after it is trained again, from the same batches; later checkpoints are set aside."""
    memory_check: Literal["refuse", "warn", "off"] = setting("refuse", resumable=True)
    """Before a start the roles' memory is estimated: one that is larger than what is free is refused, or only told."""
    budget_flops: float = setting(0.0, "[0, 1e30]", resumable=True)
    """The run ends once all roles (and its cold start) have spent so many FLOPs; 0 = no limit."""
    budget_tokens: int = setting(0, "[0, 1e18]", resumable=True)
    """The run ends once its generators have made (without any: its learner has trained) so many tokens; 0 = no
    limit."""
    budget_seconds: float = setting(0.0, "[0, 1e9]", resumable=True)
    """The run ends after so many seconds of its broker's lives, all launches together; 0 = no limit."""

    def __post_init__(self) -> None:
        """Raise ValueError where run.resume_from names no checkpoint, or no run is resumed."""
        if self.resume_from and not re.fullmatch(r"step_(0|[1-9]\d{0,8})", self.resume_from):
            raise ValueError(f"run.resume_from={self.resume_from}: must be the name of a checkpoint, such as step_20")
        if self.resume_from and not self.resume:
            raise ValueError(f"run.resume_from={self.resume_from}: needs run.resume=true and run.name=NAME")


@dataclass
class RecipeConfig:
    """A list of stages, each an ordinary run in runs/NAME/stages/."""

    name: str = "none"
    """Label of the recipe; none = one job, that of `job`."""
    stages: dict[str, dict[str, Any]] = setting({})
    """Stage → its job, start_from and data_from (earlier stages), and the keys and options that it alone has, as
    {rl: {job: rl, start_from: sft, algo: cispo, learner: {steps: 20}}}."""
    compare: dict[str, list[str]] = setting({})
    """Two arms → the stages that are their models, one a seed: what is said of their difference at the end."""


@dataclass
class ModelConfig:
    """The model: `path`, or a small one that offtrail makes itself.

    It is of Qwen3's architecture, and cold-started by job=sft where answers are sampled.
    """

    name: str = setting("tiny", path="name")
    """Label of the model; with path it is pretrained, and learning rates are a large model's (configs/model)."""
    path: str = setting("", path="model")
    """A Hugging Face directory or name; empty = make the model below and cold-start it (job=sft), once per cache."""
    hidden_size: int = setting(64, "[1, 65536]")
    """Width of the made model; a multiple of 2·heads."""
    layers: int = setting(3, "[1, 1024]")
    """Its layers."""
    heads: int = setting(4, "[1, 1024]")
    """Its query heads."""
    kv_heads: int = setting(2, "[1, 1024]")
    """Its key and value heads; must divide heads."""
    mlp_size: int = setting(192, "[1, 1048576]")
    """Width of its MLP."""
    init_std: float = setting(0.05, "(0, 10]")
    """Standard deviation of its start weights."""
    max_length: int = setting(256, "[2, 16777216]")
    """Longest prompt + answer, in tokens, that the local engine and the learner hold."""
    characters: str = ""
    """What the made model's tokenizer knows beside digits, small letters and some signs, a token each, such as 故."""


@dataclass
class PromptConfig:
    """How a problem is put to the model.

    The same in training, evaluation, chat and serving; saved with checkpoints.
    """

    chat: Literal["auto", "always", "never"] = "auto"
    """auto: through the tokenizer's chat template where it has one. never: the task's text as it stands."""
    system: str = ""
    """System prompt, for messages that bring none of their own; needs a chat template."""
    template_kwargs: dict[str, Any] = setting({})
    """Keywords of the chat template, as {enable_thinking: false}."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Before a plain prompt: auto as the tokenizer does when it adds special tokens; a chat template writes its own."""

    def __post_init__(self) -> None:
        """Raise ValueError for what no chat template can take."""
        for name in self.template_kwargs:
            if not name.isidentifier() or name in ("messages", "tools", "add_generation_prompt"):
                raise ValueError(f"prompt.template_kwargs.{name}: must be a keyword of the chat template")
        for key, given in (("system", self.system), ("template_kwargs", self.template_kwargs)):
            if given and self.chat == "never":
                raise ValueError(f"prompt.{key}={given}: needs a chat template, which prompt.chat=never leaves out")


@dataclass
class SftConfig(SupervisedConfig):
    """Supervised fine-tuning (job=sft; also the cold start of job=rl)."""

    path: str = setting("", path="file")
    """Rows to imitate (docs/sets.md), each a prompt or messages and an answer; empty = the task's worked answers."""
    prompt_field: str = "prompt"
    """Field of a line's prompt; a line without it may have `messages`, whose last is the assistant's answer."""
    answer_field: str = "answer"
    """Field of its answer."""
    long: Literal["refuse", "drop"] = "refuse"
    """What becomes of examples above model.max_length: an error, or they are left out and counted."""


@dataclass
class BatchConfig:
    """One learner step."""

    groups: int = setting(16, "[1, 1048576]")
    """B, the groups of a batch."""
    group_size: int = setting(8, "[1, 65536]")
    """G, the samples of a group."""


@dataclass
class SamplingConfig:
    """How training samples are drawn. top_p and top_k would bias the importance ratios and are refused in training."""

    temperature: float = setting(1.0, "[0, 100]")
    """Logits are divided by it; the learner divides its own by the same."""
    max_new_tokens: int = setting(64, "[1, 16777216]")
    """An answer is cut here, unfinished."""
    growth_step: int = setting(0, "[0, inf)")
    """From this learner step on answers may be growth_factor times as long; 0 = never."""
    growth_factor: float = setting(2.0, "[1, 1000]")
    """What max_new_tokens is multiplied by from growth_step on."""
    top_p: float = 1.0
    """1 = off."""
    top_k: int = 0
    """0 = off."""

    def longest_at(self, step: int) -> int:
        """Most tokens of an answer of the batch of this learner step."""
        grown = 0 < self.growth_step <= step
        return int(self.max_new_tokens * self.growth_factor) if grown else self.max_new_tokens


@dataclass
class StalenessConfig:
    """How old data may be, in weight versions (invariants I2, I2b, I3)."""

    max: int = setting(2, "[0, inf)")
    """η: no token older than this is trained; 0 = the synchronous loop."""
    mode: Literal["bound", "exact"] = "bound"
    """bound: as fresh as timing allows, up to η. exact: batch k wholly on version max(0, k−η), repeatable."""
    on_violation: Literal["wait", "drop"] = "wait"
    """wait: batch k is admission slots kB…(k+1)B−1, so η holds by construction. drop: stale groups are refused."""
    max_refusals: int = setting(10_000, "[1, inf)", resumable=True)
    """The run fails when so many groups are refused since the last learner step, and names the reason."""


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = setting(2e-4, "[0, 10]", resumable="noted")
    """Constant after the warm-up; with model.path 1e-6, unless algo says its own."""
    betas: tuple[float, float] = setting((0.9, 0.95), "[0, 1)")
    """Decay of the first and second moment."""
    eps: float = setting(1e-8, "(0, inf)")
    """Added to the root of the second moment."""
    weight_decay: float = setting(0.0, "[0, inf)")
    """Decoupled."""
    grad_clip: float = setting(1.0, "(0, inf)", resumable="noted")
    """Largest gradient norm."""
    warmup_updates: int = setting(0, "[0, inf)")
    """Optimizer updates of linear warm-up."""


@dataclass
class LoraConfig:
    """Low-rank adapters in place of all weights (docs/lora.md); through PEFT, the extra `lora`."""

    rank: int = setting(0, "[0, 65536]")
    """r, the rank of each adapter; 0 = no adapters, all weights are trained."""
    alpha: float = setting(32.0, "(0, inf)")
    """α: an adapter's product counts α/r times."""
    dropout: float = setting(0.0, "[0, 1)")
    """Share of an adapter's inputs that is left out, in job=sft."""
    targets: list[str] = setting(["all-linear"])
    """The decoder's linear layers that get one, by the end of their names, as [q_proj, v_proj]; all-linear: all."""
    publish: Literal["merged", "adapter"] = "merged"
    """job=rl: what a version is. merged: W + (α/r)·B·A. adapter: A and B alone, which an SGLang server loads beside its
    start model under a name of their own; the embedded engine merges them as it reads them."""


@dataclass
class LearnerConfig:
    """The training loop."""

    steps: int = setting(40, "[1, inf)", resumable=True)
    """Learner steps, each one batch and one new version."""
    ranks: int = setting(1, "[1, 65536]")
    """Processes of the FSDP2 world; 1 trains the plain module."""
    minibatches: int = setting(2, "[1, inf)")
    """K, optimizer updates of a learner step; B must be divisible by it."""
    optim: OptimConfig = section(OptimConfig)
    lora: LoraConfig = section(LoraConfig)
    tokens_per_microbatch: int = setting(16_384, "[1, inf)")
    """Budget of prompt + answer tokens packed into one forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the parameters in the forward pass."""
    head_dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the head's products; sums, logits and log-probabilities are float32 always."""
    activation_checkpointing: bool = False
    """Keep only each decoder layer's input and run the layer again in backward: less memory, a third more time."""
    liger: Literal["auto", "always", "never"] = "auto"
    """Liger's Triton kernels in the decoder; auto: where there is CUDA and liger-kernel is installed."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int = setting(1, "[1, 1024]", resumable=True)
    """torch threads of each rank."""
    checkpoint_every: int = setting(10, "[1, inf)", resumable=True)
    """In learner steps; the last step is always saved."""
    keep_checkpoints: int = setting(2, "[1, inf)", resumable=True)
    """The newest so many are kept."""


@dataclass
class GeneratorConfig:
    """The rollout processes."""

    count: int = setting(1, "[1, 1024]", resumable=True)
    """Generator processes."""
    max_in_flight: int = setting(64, "[1, 1048576]", resumable=True)
    """Groups leased to all generators together."""
    threads: int = setting(1, "[1, 1024]", resumable=True)
    """torch threads of each generator."""
    max_restarts: int = setting(3, "[0, inf)", resumable=True)
    """A generator that dies is started again so often in one launch; then the run fails."""


@dataclass
class EngineConfig:
    """What every engine has."""

    rules: ClassVar[str] = ""
    """Module whose RULES validate a configuration with this engine; empty = none."""

    name: str = "local"
    """The engine."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights and the KV cache."""
    max_running: int = setting(256, "[1, 65536]")
    """Samples that decode together."""
    kv_on_update: Literal["recompute", "keep"] = "recompute"
    """When weights change under unfinished samples: recompute their KV cache under the new weights, or keep the old."""


@dataclass
class LocalConfig(EngineConfig):
    """The local engine: continuous batching over Hugging Face weights with a KV cache, in the role's own process."""

    name: str = "local"
    kv_cache_mb: int = setting(2048, "[1, inf)")
    """What the KV cache may grow to, in MiB: samples wait while those that run might fill it. One always runs."""


@dataclass
class SglangConfig(EngineConfig):
    """SGLang servers: started and watched by the generator that uses them, or running already (engine.urls)."""

    rules: ClassVar[str] = "offtrail.platform.engines.sglang.rules"

    name: str = "sglang"
    servers: int = setting(1, "[1, 1024]", resumable=True)
    """Servers that each generator starts; the evaluator has one of its own."""
    urls: list[str] = setting([], resumable=True)
    """Servers that run already, in place of started ones; their keys in $OFFTRAIL_SGLANG_KEY and …_ADMIN_KEY."""
    address: str = setting("127.0.0.1", resumable=True)
    """Where started servers listen."""
    tensor_parallel: int = setting(1, "[1, 1024]", resumable=True)
    """GPUs of a server."""
    flags: str = ""
    """Further flags of `sglang.launch_server`, as on its command line."""
    router: bool = setting(False, resumable=True)
    """Put sglang-router with its cache-aware policy before a generator's servers; else offtrail chooses."""
    pause_mode: Literal["auto", "retract", "abort"] = "auto"
    """How kv_on_update=recompute stops the server: hold its samples, or take them back and send them anew; auto: the
    first where the server's version can."""
    prefix_tokens: int = setting(64, "[0, inf)", resumable=True)
    """Of a prompt at least so long one sample goes ahead, and the others find it in the server's radix cache."""
    stream_interval: int = setting(32, "[1, inf)", resumable=True)
    """Tokens between two reports of a running sample; what a dead server had reported is counted as lost."""
    start_seconds: float = setting(600.0, "(0, 1e9]", resumable=True)
    """The longest that a server may take to start."""
    hang_seconds: float = setting(120.0, "(0, 1e9]", resumable=True)
    """A server that has work, or is asked for its health, and says nothing for so long is killed and started anew."""
    max_restarts: int = setting(10, "[0, inf)", resumable=True)
    """The role fails when one of its servers has died more often."""


@dataclass
class EvalConfig:
    """Held-out evaluation. Of published versions while training, and by job=eval."""

    name: str = "sampled"
    """Label of the settings."""
    every: int = setting(10, "[0, inf)")
    """In learner steps; 0 = only the first and the last version."""
    prompts: int = setting(512, "[1, inf)")
    """Held-out prompts, the same for every version; of each set."""
    samples: int = setting(1, "[1, 65536]")
    """Answers drawn for each prompt."""
    temperature: float = setting(1.0, "[0, 100]")
    """0 = greedy."""
    top_p: float = setting(1.0, "(0, 1]")
    """Tokens are drawn from the smallest set of the likeliest that holds this share; 1 = all."""
    sets: dict[str, dict[str, Any]] = setting({})
    """Name → a task's settings (which task: `name`, else the set's own name), its prompts, samples and reward; asked
    beside the task's own held-out prompts, and by job=eval in their place."""
    few_shot: int = setting(0, "[0, 256]")
    """job=eval: each set is asked twice, plainly and after so many worked examples, and both are compared question by
    question; 0 = plainly alone."""
    few_shot_path: str = setting("", path="file")
    """Rows with a prompt (or messages) and an answer, of which the examples are drawn by run.seed; empty = training
    problems of each set's task with worked answers."""
    few_shot_prompt_field: str = "prompt"
    """Field of such a row's prompt."""
    few_shot_answer_field: str = "answer"
    """Field of its answer."""
    vote_weight: str = "logprob"
    """job=eval: what an answer's vote weighs in wcons@k. logprob: the exponential of its mean log-probability; else the
    name of a reward component whose scores are at least 0."""
    threads: int = setting(1, "[1, 1024]", resumable=True)
    """torch threads of the evaluator."""
    nice: int = setting(19, "[0, 19]", resumable=True)
    """What the evaluator adds to its CPU niceness while the run trains: learner and generators come first where cores
    are few."""
    waiting_mb: int = setting(1024, "[0, 1048576]", resumable=True)
    """Versions that wait for their score keep at most so many MiB of weights, or are one; then the learner waits."""
    max_restarts: int = setting(3, "[0, inf)", resumable=True)
    """An evaluator that dies is started again so often in one launch; then the run fails."""
    engine: Literal["same", "local"] = "same"
    """same: the kind of engine that generates. local: the embedded one, also beside SGLang generators."""


@dataclass
class DistillConfig:
    """job=distill: a student learns from a teacher's samples. Its stages are sample, reject and sft, with their own
    sections; the student is model.*.
    """

    teacher: str = setting("", path="either")
    """A run directory, a checkpoint or a Hugging Face folder, which is sampled (sample.*); or rows that were sampled
    already, a file. Empty = what the servers of engine.urls serve."""


@dataclass
class WeightsConfig:
    """How a published version reaches the engines."""

    channel: Literal["shm", "disk", "distributed", "ipc"] = "shm"
    """shm: shared memory, on one host. disk: the run directory, on any file system. distributed: broadcast from the
    learner to SGLang servers (gloo, NCCL). ipc: SGLang servers read the learner's memory (CUDA IPC), on one host."""
    dir: str = setting("", path="file")
    """Folder in which the channel makes its own, offtrail-…; empty = /dev/shm, or runs/NAME/weights for disk."""
    delta: bool = False
    """shm, disk: write only what changed since the version before; pays where most bytes stay (bfloat16, small lr)."""
    full_every: int = setting(10, "[1, inf)")
    """With delta every so many versions are written whole, so that a reader can begin there."""
    bucket_mb: int = setting(512, "[1, 1048576]")
    """distributed, ipc: tensors are sent together in buckets of about so many MiB."""
    probe_every: int = setting(5, "[0, inf)")
    """Versions between two fixed-text probes of engine against learner; 0 = none."""
    probe_alarm: float = setting(0.05, "[0, inf)", resumable=True)
    """The run fails when the probe differs by more, in nats a token; with bfloat16 for each nat of the text's mean
    −log p; 0 = never."""


@dataclass
class BrokerConfig:
    """The broker's endpoint and patience."""

    address: str = "127.0.0.1"
    """Address to bind. Each asks for the run's secret, made at its start; any but loopback encrypts with CURVE."""
    port: int = setting(0, "[0, 65535]")
    """0 = any free port."""
    heartbeat_seconds: float = setting(1.0, "(0, 1e9]")
    """Period of every role's heartbeat."""
    lease_heartbeats: int = setting(30, "[1, inf)")
    """A lease goes to another generator after so many lost heartbeats; never because an answer is long."""
    deadline_seconds: float = setting(600.0, "(0, 1e9]")
    """The longest a role waits for another without progress before it fails and says for what (I4)."""


@dataclass
class ServeConfig:
    """job=serve, job=chat: a model behind an API, or in the terminal."""

    address: str = "127.0.0.1"
    """Address to listen at; the API key is printed, or taken from $OFFTRAIL_SGLANG_KEY."""
    port: int = setting(30000, "[0, 65535]")
    """0 = any free port."""
    max_requests: int = setting(1024, "[1, 65536]")
    """job=serve: requests that are answered at a time; further ones get status 429."""
    max_answers: int = setting(16, "[1, 1024]")
    """job=serve: the most answers of one request, its prompts times n."""
    temperature: float = setting(0.6, "[0, 100]")
    """job=chat: of the answers; 0 = greedy."""


SINKS = {
    "wandb": "offtrail.platform.tracking.sinks.to_wandb:WandbSink",
    "trackio": "offtrail.platform.tracking.sinks.to_trackio:TrackioSink",
    "mlflow": "offtrail.platform.tracking.sinks.to_mlflow:MlflowSink",
}
"""Tracker → its class; the key is also what its package is imported as."""


@dataclass
class TrackingConfig:
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write runs/NAME/tb/."""
    sinks: list[str] = setting([])
    """Trackers beside it: wandb, trackio, mlflow, or module:class of your own (docs/trackers.md)."""
    sink_settings: dict[str, dict[str, Any]] = setting({})
    """Tracker → its keywords, as {wandb: {project: r1, mode: offline}}."""
    figures: bool = True
    """Draw runs/NAME/learning.png and hacking.png at the end."""
    sample_texts: int = setting(2, "[0, inf)")
    """Sample groups whose texts are logged at each learner step."""
    behaviour: bool = True
    """Count in every answer, where verifiers run, words of reflection, length, repetition, language and format."""
    gradient_cosine: bool = True
    """Log the cosine of consecutive gradients; a copy of one gradient is held for it."""
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    """Terminal view; auto = live on a terminal, plain lines elsewhere."""


@dataclass
class CostConfig:
    """What devices cost and can do (docs/cost.md). No price is assumed."""

    prices: dict[str, float] = setting({})
    """Price of a device's hour by its name, as {H100: 2.5}: the words of a name are looked for in the device's own."""
    currency: str = "USD"
    """Of the prices."""
    date: str = ""
    """The day of the prices, as 2026-11-01: without it a figure in money means little."""
    peaks: dict[str, dict[str, float]] = setting({})
    """Device → dtype → dense operations a second, as {EPYC: {float32: 2e12}}: before the table that offtrail has, which
    knows no CPU."""
    names: dict[str, str] = setting({})
    """Role → name of its devices, in place of the one that is found, as {generator: H20}."""

    def __post_init__(self) -> None:
        """Raise ValueError for a price without a date, and for what no price, peak or date can be."""
        if self.prices and not self.date:
            raise ValueError("cost.date=: cost.prices needs the day of its prices: cost.date=YYYY-MM-DD")
        if self.date and not re.fullmatch(r"\d{4}-\d\d-\d\d", self.date):
            raise ValueError(f"cost.date={self.date}: must be a day, such as 2026-11-01")
        for name, price in self.prices.items():
            if not price >= 0:
                raise ValueError(f"cost.prices.{name}={price}: must be ≥ 0")
        for name, by_dtype in self.peaks.items():
            for dtype, peak in by_dtype.items():
                if dtype not in ("float32", "bfloat16") or not peak > 0:
                    raise ValueError(
                        f"cost.peaks.{name}={{{dtype}: {peak}}}: must be operations a second > 0 of float32 or bfloat16"
                    )


@dataclass
class Config:
    """One resolved configuration: what runs/NAME/config.yaml holds."""

    schema_version: int = SCHEMA_VERSION
    """Version of these keys; a configuration of another one is refused."""
    job: Literal[
        "rl", "sft", "reward_model", "prm", "eval", "sample", "label", "reject", "prefer", "distill", "serve", "chat"
    ] = "rl"  # fmt: skip
    """rl: the asynchronous loop. sft: supervised fine-tuning. reward_model, prm: models that score. eval, sample: a
    checkpoint's answers. label: their steps. reject: which are kept. prefer: pairs of them. distill: sample, reject,
    sft. serve, chat: a checkpoint behind an API, in the terminal."""
    checkpoint: str = setting("", path="model")
    """job=eval, sample, label, serve, chat: a run directory (its newest checkpoint), a checkpoint, a model's folder."""
    run: RunConfig = section(RunConfig)
    recipe: RecipeConfig = section(RecipeConfig)
    model: ModelConfig = section(ModelConfig)
    task: TaskConfig = section(ChainConfig)
    prompt: PromptConfig = section(PromptConfig)
    algo: AlgoConfig = section(GrpoConfig)
    correction: CorrectionConfig = section(TisConfig)
    reward: RewardConfig = section(RewardConfig)
    engine: EngineConfig = section(LocalConfig)
    search: SearchConfig = section(SearchConfig)
    sft: SftConfig = section(SftConfig)
    reward_model: RewardModelConfig = section(RewardModelConfig)
    prm: PrmConfig = section(PrmConfig)
    batch: BatchConfig = section(BatchConfig)
    sampling: SamplingConfig = section(SamplingConfig)
    staleness: StalenessConfig = section(StalenessConfig)
    learner: LearnerConfig = section(LearnerConfig)
    generator: GeneratorConfig = section(GeneratorConfig)
    scorer: ScorerConfig = section(ScorerConfig)
    eval: EvalConfig = section(EvalConfig)
    sample: SampleConfig = section(SampleConfig)
    label: LabelConfig = section(LabelConfig)
    reject: RejectConfig = section(RejectConfig)
    prefer: PreferConfig = section(PreferConfig)
    distill: DistillConfig = section(DistillConfig)
    weights: WeightsConfig = section(WeightsConfig, resumable=True)
    broker: BrokerConfig = section(BrokerConfig, resumable=True)
    serve: ServeConfig = section(ServeConfig)
    tracking: TrackingConfig = section(TrackingConfig, resumable=True)
    cost: CostConfig = section(CostConfig, resumable=True)

    @property
    def head(self) -> HeadConfig | None:
        """The settings of a job that trains a model to score."""
        return {"reward_model": self.reward_model, "prm": self.prm}.get(self.job)

    @property
    def supervised(self) -> SupervisedConfig | None:
        """The settings of a job that learns from examples, under the job's name."""
        return self.sft if self.job == "sft" else self.head

    @property
    def steps_key(self) -> str:
        """The key that says how many learner steps the job has."""
        return f"{self.job}.steps" if self.supervised else "learner.steps"

    @property
    def steps(self) -> int:
        """Learner steps of the job."""
        return (self.supervised or self.learner).steps

    @property
    def publishes_adapters(self) -> bool:
        """Whether a version is the adapters alone."""
        lora = self.learner.lora
        return self.job == "rl" and lora.rank > 0 and lora.publish == "adapter"

    @property
    def seed(self) -> int:
        """What keys the job's randomness: runs of several run.seed share one cold start."""
        return (self.supervised or self.run).seed
