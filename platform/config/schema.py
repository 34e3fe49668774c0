"""Every key of offtrail, its type, default and one line. No torch here: `launch.py --help` imports this.

Who calls whom: `compose.py` builds a Config out of these classes, configs/*.yaml, a file and the command line, and ends
with OmegaConf.to_object, so that each `__post_init__` below has run before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from offtrail.algos.config import AlgoConfig, CorrectionConfig, DecoupledConfig, GrpoConfig
from offtrail.rewards.config import RewardConfig
from offtrail.tasks.config import ChainConfig, TaskConfig

SCHEMA_VERSION = 1


@dataclass
class RunConfig:
    """The run and its directory."""

    name: str = ""
    """Name of the run directory; empty = JOB-TASK-ALGO and the time."""
    dir: str = "runs"
    """Folder that holds the run directories."""
    seed: int = 0
    """Keys everything that is drawn: start weights, data order, every sampled token."""
    resume: bool = False
    """Go on with the run of that name from its last checkpoint."""


@dataclass
class ModelConfig:
    """The policy: `path`, or the small Qwen3-architecture model that offtrail makes and cold-starts itself."""

    name: str = "tiny"
    """Label of the model."""
    path: str = ""
    """A Hugging Face directory or name; empty = make the model below and cold-start it (job=sft), once per cache."""
    hidden_size: int = 64
    """Width of the made model; a multiple of 2·heads."""
    layers: int = 3
    """Its layers."""
    heads: int = 4
    """Its query heads."""
    kv_heads: int = 2
    """Its key and value heads; must divide heads."""
    mlp_size: int = 192
    """Width of its MLP."""
    init_std: float = 0.05
    """Standard deviation of its start weights."""
    max_length: int = 256
    """Longest prompt + answer, in tokens, that the local engine and the learner hold."""


@dataclass
class SftConfig:
    """Supervised fine-tuning on the task's worked answers (job=sft; also the cold start of job=rl)."""

    seed: int = 0
    """Of the start weights and worked problems; apart from run.seed, so that runs of several seeds share a start."""

    steps: int = 1000
    """Optimizer updates."""
    batch_size: int = 32
    """Problems of an update, fresh in each."""
    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    warmup_steps: int = 50
    """Updates of linear warm-up."""
    final_lr_share: float = 0.1
    """Cosine decay ends at this share of lr."""


@dataclass
class BatchConfig:
    """One learner step."""

    groups: int = 16
    """B, the groups of a batch."""
    group_size: int = 8
    """G, the samples of a group."""


@dataclass
class SamplingConfig:
    """How training samples are drawn. top_p and top_k would bias the importance ratios and are refused in training."""

    temperature: float = 1.0
    """Logits are divided by it; the learner divides its own by the same."""
    max_new_tokens: int = 64
    """An answer is cut here, unfinished."""
    growth_step: int = 0
    """From this learner step on answers may be growth_factor times as long; 0 = never."""
    growth_factor: float = 2.0
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

    max: int = 2
    """η: no token older than this is trained; 0 = the synchronous loop."""
    mode: Literal["bound", "exact"] = "bound"
    """bound: as fresh as timing allows, up to η. exact: batch k wholly on version max(0, k−η), repeatable."""
    on_violation: Literal["wait", "drop"] = "wait"
    """wait: batch k is admission slots kB…(k+1)B−1, so η holds by construction. drop: stale groups are refused."""
    max_refusals: int = 10_000
    """The run fails when so many groups are refused since the last learner step, and names the reason."""


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 2e-4
    """Constant after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    warmup_updates: int = 0
    """Optimizer updates of linear warm-up."""


@dataclass
class LearnerConfig:
    """The training loop."""

    steps: int = 40
    """Learner steps, each one batch and one new version."""
    ranks: int = 1
    """Processes of the FSDP2 world; 1 trains the plain module."""
    minibatches: int = 2
    """K, optimizer updates of a learner step; B must be divisible by it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    tokens_per_microbatch: int = 16_384
    """Budget of prompt + answer tokens packed into one forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters in the forward pass."""
    head_dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the head's products; sums, logits and log-probabilities are float32 always."""
    activation_checkpointing: bool = False
    """Keep only each decoder layer's input and run the layer again in backward: less memory, a third more time."""
    liger: Literal["auto", "always", "never"] = "auto"
    """Liger's Triton kernels in the decoder; auto: where there is CUDA and liger-kernel is installed."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int = 1
    """torch threads of each rank."""
    checkpoint_every: int = 10
    """In learner steps; the last step is always saved."""
    keep_checkpoints: int = 2
    """The newest so many are kept."""


@dataclass
class GeneratorConfig:
    """The rollout processes."""

    count: int = 1
    """Generator processes."""
    max_in_flight: int = 64
    """Groups leased to all generators together."""
    threads: int = 1
    """torch threads of each generator."""


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
    """Of the weights and the KV cache."""
    max_running: int = 256
    """Samples that decode together."""
    kv_on_update: Literal["recompute", "keep"] = "recompute"
    """When weights change under unfinished samples: recompute their KV cache under the new weights, or keep the old."""


@dataclass
class LocalConfig(EngineConfig):
    """The local engine: continuous batching over Hugging Face weights with a KV cache, in the role's own process."""

    name: str = "local"


@dataclass
class SglangConfig(EngineConfig):
    """SGLang servers: started and watched by the generator that uses them, or running already (engine.urls)."""

    rules: ClassVar[str] = "offtrail.platform.engines.sglang.rules"

    name: str = "sglang"
    servers: int = 1
    """Servers that each generator starts; the evaluator has one of its own."""
    urls: list[str] = field(default_factory=list)
    """Servers that run already, in place of started ones; their keys in $OFFTRAIL_SGLANG_KEY and …_ADMIN_KEY."""
    address: str = "127.0.0.1"
    """Where started servers listen."""
    tensor_parallel: int = 1
    """GPUs of a server."""
    flags: str = ""
    """Further flags of `sglang.launch_server`, as on its command line."""
    router: bool = False
    """Put sglang-router with its cache-aware policy before a generator's servers; else offtrail chooses."""
    pause_mode: Literal["auto", "retract", "abort"] = "auto"
    """How kv_on_update=recompute stops the server: hold its samples, or take them back and send them anew; auto: the
    first where the server's version can."""
    prefix_tokens: int = 64
    """Of a prompt at least so long one sample goes ahead, and the others find it in the server's radix cache."""
    stream_interval: int = 32
    """Tokens between two reports of a running sample; what a dead server had reported is counted as lost."""
    start_seconds: float = 600.0
    """The longest that a server may take to start."""
    hang_seconds: float = 120.0
    """A server that has work, or is asked for its health, and says nothing for so long is killed and started anew."""
    max_restarts: int = 10
    """The role fails when one of its servers has died more often."""


@dataclass
class EvalConfig:
    """Held-out evaluation of published versions: 0, every `every`-th, and the last."""

    every: int = 10
    """In learner steps; 0 = only the first and the last version."""
    prompts: int = 512
    """Held-out prompts, the same for every version."""
    samples: int = 1
    """Answers drawn for each prompt."""
    temperature: float = 1.0
    """0 = greedy."""
    threads: int = 1
    """torch threads of the evaluator."""
    engine: Literal["same", "local"] = "same"
    """same: the kind of engine that generates. local: the embedded one, also beside SGLang generators."""


@dataclass
class WeightsConfig:
    """How a published version reaches the engines."""

    channel: Literal["shm", "disk", "distributed", "ipc"] = "shm"
    """shm: shared memory, on one host. disk: the run directory, on any file system. distributed: broadcast from the
    learner to SGLang servers (gloo, NCCL). ipc: SGLang servers read the learner's memory (CUDA IPC), on one host."""
    dir: str = ""
    """Folder in which the channel makes its own, offtrail-…; empty = /dev/shm, or runs/NAME/weights for disk."""
    delta: bool = False
    """shm, disk: write only what changed since the version before; pays where most bytes stay (bfloat16, small lr)."""
    full_every: int = 10
    """With delta every so many versions are written whole, so that a reader can begin there."""
    bucket_mb: int = 512
    """distributed, ipc: tensors are sent together in buckets of about so many MiB."""
    probe_every: int = 5
    """Versions between two fixed-text probes of engine against learner; 0 = none."""
    probe_alarm: float = 0.05
    """The run fails when the probe differs by more, in nats a token (bfloat16: about .02); 0 = never."""


@dataclass
class BrokerConfig:
    """The broker's endpoint and patience."""

    address: str = "127.0.0.1"
    """Address to bind; any but loopback requires CURVE keys, made per run."""
    port: int = 0
    """0 = any free port."""
    heartbeat_seconds: float = 1.0
    """Period of every role's heartbeat."""
    lease_heartbeats: int = 30
    """A lease goes to another generator after so many lost heartbeats; never because an answer is long."""
    deadline_seconds: float = 600.0
    """The longest a role waits for another without progress before it fails and says for what (I4)."""


@dataclass
class ServeConfig:
    """job=serve and job=chat: a trained model behind SGLang's OpenAI-compatible API, or in the terminal."""

    address: str = "127.0.0.1"
    """Address to listen at; the API key is printed, or taken from $OFFTRAIL_SGLANG_KEY."""
    port: int = 30000
    """0 = any free port."""
    temperature: float = 0.6
    """job=chat: of the answers; 0 = greedy."""


@dataclass
class TrackingConfig:
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write runs/NAME/tb/."""
    sample_texts: int = 2
    """Sample groups whose texts are logged at each learner step."""
    gradient_cosine: bool = True
    """Log the cosine of consecutive gradients; a copy of one gradient is held for it."""
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    """Terminal view; auto = live on a terminal, plain lines elsewhere."""


@dataclass
class Config:
    """One resolved configuration: what runs/NAME/config.yaml holds."""

    schema_version: int = SCHEMA_VERSION
    """Version of these keys; a configuration of another one is refused."""
    job: Literal["rl", "sft", "serve", "chat"] = "rl"
    """rl: the asynchronous loop. sft: supervised fine-tuning on the task's worked answers. serve: a checkpoint behind
    an OpenAI-compatible API. chat: with a checkpoint, in the terminal."""
    checkpoint: str = ""
    """job=serve, chat: a run directory (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=ChainConfig)
    algo: AlgoConfig = field(default_factory=GrpoConfig)
    correction: CorrectionConfig = field(default_factory=DecoupledConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    engine: EngineConfig = field(default_factory=LocalConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
