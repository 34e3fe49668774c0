"""Every mistake in the configuration: one line that names the key, the value, what is allowed, the nearest name."""

import os

import pytest

from offtrail.platform.config.checkpoints import model_folder, run_folder
from offtrail.platform.config.compose import compose, to_yaml
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.engines.sglang import flags, versions


def message(*argv):
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# (argv, the key=value it begins with, what else it must say)
MISTAKES = [
    # unknown names
    (["batch.grups=8"], "batch.grups=8: unknown key", ["nearest: batch.groups"]),
    (["steps=10"], "steps=10: unknown key", ["learner.steps", "sft.steps"]),
    (["recipe=r2"], "recipe=r2: unknown option; options: cold_start", []),
    (["task=adition"], "task=adition: unknown option", ["addition, aime, chain", "nearest: addition"]),
    (["model=/data/qwen"], "model=/data/qwen: unknown option", ["options: pretrained, tiny", "model.path=/data/qwen"]),
    (["engine.name=vllm"], "engine.name=vllm: must be one of local, sglang", []),
    (["engine.servers=2"], "engine.servers=2: not a key of engine.name=local, but of engine.name=sglang", []),
    (["algo.name=gppo"], "algo.name=gppo: must be one of grpo", ["nearest: ppo, gspo, grpo"]),
    (["task.path=x.jsonl"], "task.path=x.jsonl: not a key of task.name=chain", ["of task.name=ifeval|jsonl|"]),
    (["correction=none", "correction.cap=3"], "correction.cap=3: not a key of correction.name=none", ["tis"]),
    (["batch=8"], "batch=8: is a section", ["batch.groups, batch.group_size"]),
    # wrong types
    (["batch.groups=many"], "batch.groups=many: must be a whole number", []),
    (["batch.groups=1.5"], "batch.groups=1.5: must be a whole number", []),
    (["batch.groups="], "batch.groups=: must be a whole number", []),
    (["sft.lr=fast"], "sft.lr=fast: must be a number", []),
    (["run.resume=maybe"], "run.resume=maybe: must be true or false", []),
    (["staleness.mode=exakt"], "staleness.mode=exakt: must be one of bound, exact", ["nearest: exact"]),
    (
        ["job=ppo"],
        "job=ppo: must be one of rl, sft, reward_model, prm, eval, sample, label, reject, prefer, distill",
        [],
    ),
    (["job=prm"], "prm.path=: job=prm needs a file of labelled steps: prm.path=FILE", []),
    (["job=reward_model"], "reward_model.path=: job=reward_model needs a file of pairs or judged answers", []),
    (["job=prm", "prm.path=/no/such"], "prm.path=/no/such: no such file or folder", []),
    (["prm.cut={by: word}"], "prm.cut.by=word: must be one of newline, sentence, separator, tag, tokens", []),
    (["prm.fields={text: a}"], "prm.fields.text=a: unknown; must be one of prompt, messages, answer", []),
    (["prm.reference=here"], "prm.reference=here: is read with prm.objective=implicit", []),
    (["job=prm", "prm.path=launch.py", "learner.lora.rank=4"], "learner.lora.rank=4: is for job=rl and job=sft", []),
    (["job=prm", "prm.path=launch.py", "learner.ranks=64"], "learner.ranks=64: an update has only prm.batch_size", []),
    (["job=prm", "prm.path=launch.py", "prm.steps=9"], "prm.warmup_steps=50: must be < prm.steps=9", []),
    (["sft.betas=0.9"], "sft.betas=0.9: must be [float, float]", ["sft.betas=[0.9, 0.98]"]),
    (["tracking.sinks=wandb"], "tracking.sinks=wandb: must be a list [text, …]", ["such as tracking.sinks=[A, B]"]),
    (["sft.betas=[0.9]"], "sft.betas=[0.9]: must be [float, float]", []),
    (["sft.betas=[0.9"], "sft.betas=[0.9: malformed", []),
    (["learner.steps=[3]"], "learner.steps=[3]: must be a whole number", []),
    (["task=mixture", "task.weights=2"], "task.weights=2: must be a mapping", ["{chain: 0.5, addition: 0.5}"]),
    (["task=mixture", "task.weights.chain=x"], "task.weights.chain=x: must be a number", []),
    (
        ["task=mixture", "task.settings.chain.max_operation=5"],
        "task.settings.chain.max_operation=5: unknown key",
        ["nearest: task.settings.chain.max_operations"],
    ),
    (
        ["task=mixture", "task.settings.chain.max_operations=2.5"],
        "task.settings.chain.max_operations=2.5: must be a whole number",
        [],
    ),
    (["task=mixture", "task.settings.chian.noise=.1"], "task.settings=chian: must be one of", ["nearest: chain"]),
    (["task=mixture", "task.settings.chain.styles=9"], "task.settings.chain.styles=9: must be in [1, 3]", []),
    (["task=mixture", "task.settings.chain.name=x"], "task.settings.chain.name=x: the family is named by its", []),
    (
        ["task=mixture", "task.weights={jsonl: 1}", "task.settings.jsonl.path=none.jsonl"],
        f"task.settings.jsonl.path={os.getcwd()}/none.jsonl: no such file",
        [],
    ),
    (["task=mixture", "task.weights={jsonl: 1}"], "task.settings.jsonl.path=: problems are needed", []),
    (["model.name=\udcff"], "model.name=\\udcff: must be UTF-8 text", []),
    # the command line itself
    (["learner.steps"], "learner.steps: neither key=value", ["nearest: learner.steps"]),
    (["learner.steps=3", "learner.steps=4"], "learner.steps=4: given twice", ["3"]),
    (["task=chain", "task=addition"], "task=addition: given twice", ["chain"]),
    (["no/such/file.yaml"], "no/such/file.yaml: no such file", []),
    # ranges
    (["batch.group_size=0"], "batch.group_size=0: must be in [1, 65536] (G, the samples of a group)", []),
    (["staleness.max=-1"], "staleness.max=-1: must be ≥ 0", []),
    (["learner.optim.lr=nan"], "learner.optim.lr=nan: must be a finite number", []),
    (["broker.port=70000"], "broker.port=70000: must be in [0, 65535]", []),
    (["learner.optim.betas=[0.9, 1.0]"], "learner.optim.betas=[0.9, 1.0]: each must be in [0, 1)", []),
    (["algo.clip_low=2"], "algo.clip_low=2.0: must", []),
    (["task.noise=3"], "task.noise=3.0: must", []),
    (["run.name=../x"], "run.name=../x: letters", ["run.dir"]),
    (["run.name=.hidden"], "run.name=.hidden: letters", []),
    (["generator.count=1000000"], "generator.count=1000000: must be in [1, 1024] (Generator processes)", []),
    (["broker.deadline_seconds=1e300"], "broker.deadline_seconds=1e+300: must be in (0, 1e9]", []),
    (["learner.optim.lr=1e300"], "learner.optim.lr=1e+300: must be in [0, 10]", []),
    (["learner.steps=9999999999"], "learner.steps=9999999999: must be ≤ 1,000,000,000 (Learner steps, each", []),
    (["sampling.growth_factor=1e308", "sampling.growth_step=1"], "sampling.growth_factor=1e+308: must be in [1, ", []),
    ([f"broker.lease_heartbeats={'9' * 400}"], f"broker.lease_heartbeats={'9' * 100}…(400 characters)…", ["≤ 1,000,"]),
    (["task=mixture", "task.weights.chain=inf"], "task.weights.chain=inf: must be a finite number", []),
    (["task=mixture", "task.settings.chain.noise=nan"], "task.settings.chain.noise=nan: must be a finite number", []),
    (
        ["task=mixture", "task.settings.chain.styles=9223372036854775808"],
        "task.settings.chain.styles=",
        ["≤ 9,223,372"],
    ),
    # names and paths
    (["model.name=../../../x"], "model.name=../../../x: letters, digits", ["a folder is named after it"]),
    (["model.name="], "model.name=: letters, digits", []),
    ([f"run.name={'é' * 200}"], f"run.name={'é' * 200}: has 400 bytes, at most 100: a folder", []),
    (["run.name=../x", "run.resume=true"], "run.name=../x: letters", ["run.dir"]),
    ([f"model.path=/{'a' * 256}"], f"model.path=/{'a' * 99}…(257 characters)", ["256 bytes", "255"]),
    ([f"run.dir={'a/' * 3000}"], "run.dir=", ["6,000 bytes", "4,095"]),
    (["checkpoint=a\0b", "job=chat"], "checkpoint=a\\x00b: must not hold NUL", []),
    (["prompt.template_kwargs={a: {b: a\0b}}"], "prompt.template_kwargs=", ["malformed"]),
    (["x" * 300], f"{'x' * 100}…(300 characters)…", ["neither key=value"]),
    (["/dev/null/x.yaml"], "/dev/null/x.yaml: cannot be read", []),
    (["task.settings" + ".a" * 40 + "=1"], "task.settings.a", ["32 parts"]),
    (["task.weights=" + "[" * 3000 + "]" * 3000], "task.weights=[[[", ["nested more than 32 deep"]),
    # rules between keys
    (["batch.groups=15"], "batch.groups=15: must be divisible by learner.minibatches=2", []),
    (["learner.ranks=65"], "learner.ranks=65", ["64 samples"]),
    (["sampling.temperature=0"], "sampling.temperature=0.0: must be > 0", ["eval.temperature"]),
    (["sampling.top_p=0.9"], "sampling.top_p=0.9: must be 1", ["bias the importance ratios"]),
    (["sampling.top_k=50"], "sampling.top_k=50: must be 0", ["bias the importance ratios"]),
    (["staleness.mode=exact", "generator.count=2"], "staleness.mode=exact: needs generator.count=1, not 2", ["timing"]),
    (["staleness.mode=exact", "staleness.on_violation=drop"], "staleness.on_violation=drop: not with", ["wait"]),
    (
        ["staleness.mode=exact", "generator.max_in_flight=15"],
        "generator.max_in_flight=15: must be ≥ batch.groups=16",
        ["exact"],
    ),
    (
        ["sampling.growth_step=39", "sampling.growth_factor=4"],
        "sampling.growth_factor=4.0: answers grow to 256 tokens at step 39",
        ["model.max_length=256"],
    ),
    (["algo=r1_zero", "algo.ref_refresh=24"], "algo.ref_refresh=24: counts optimizer updates", ["minibatches=16"]),
    (["algo=dapo", "batch.group_size=1"], "algo.filter_groups=accuracy: needs batch.group_size ≥ 2, not 1", []),
    (["batch.group_size=1"], "batch.group_size=1: algo.advantage=group measures", ["reinforce_pp", "algo=ppo"]),
    (["algo=rloo", "batch.group_size=1"], "batch.group_size=1: algo.advantage=rloo measures an answer by", []),
    (["algo=opmd", "correction=none", "batch.group_size=1"], "batch.group_size=1: algo.advantage=group", []),
    (
        ["algo=reinforce_pp", "batch.group_size=1", "batch.groups=1", "learner.minibatches=1"],
        "batch.groups=1: algo.advantage=reinforce_pp measures an answer by the others of its batch",
        ["algo.advantage=reward"],
    ),
    (
        ["reward.only={accuracy: {from_step: 60}, format: {from_step: 40}}"],
        "reward.only.format.from_step=40: learner.steps=40 ends before it",
        ["the reward is 0 throughout"],
    ),
    (["algo=ppo", "algo.critic.pretrain_steps=40"], "algo.critic.pretrain_steps=40: must be < learner.steps=40", []),
    (["algo=ppo", "algo.critic.path=/no/such"], "algo.critic.path=/no/such: no such folder", []),
    (["algo=ppo", "algo.critic.betas=[1, 0]"], "algo.critic.betas=[1.0, 0.0]: each must be in [0, 1)", []),
    (["sampling.max_new_tokens=256"], "sampling.max_new_tokens=256: must be < model.max_length=256", []),
    (["learner.tokens_per_microbatch=255"], "learner.tokens_per_microbatch=255: must be ≥ model.max_length=256", []),
    (["model.hidden_size=60"], "model.hidden_size=60: must be a multiple of 2·model.heads=8", []),
    (["model.kv_heads=3"], "model.kv_heads=3: must divide model.heads=4", []),
    (["reward.weights={accuracy: 0, format: 0}"], "reward.weights={accuracy: 0, format: 0}: at least one must not", []),
    (
        ["reward.weights.acuracy=1"],
        "reward.weights.acuracy: unknown; must be one of accuracy, code, format",
        ["nearest: accuracy"],
    ),
    (
        ["reward.weights={accuracy: 1, rm: 0.1}"],
        "reward.weights.rm: unknown; must be one of accuracy, code",
        ["or a model of scorer.models={NAME: {path: DIR}}"],
    ),
    (["scorer.models.rm=DIR"], "scorer.models={rm: DIR}: must be a mapping {name: {name: value}}", []),
    (["scorer.models.rm.of=answer"], "scorer.models.rm.path=: a model is needed: scorer.models.rm.path=DIR", []),
    (["scorer.models.rm.path=/no/such"], "scorer.models.rm.path=/no/such: no such folder", ["a run directory"]),
    (["scorer.models.rm={path: ., reads: all}"], "scorer.models.rm.reads=all: must be one of outcome, steps,", []),
    (["scorer.models.rm={path: ., red: 1}"], "scorer.models.rm.red=1: unknown; must be one of path, steps,", []),
    (["scorer.models.rm={path: ., closed: 1}"], "scorer.models.rm.closed=1: must be true or false", []),
    (["scorer.models.rm={path: ., empty: low}"], "scorer.models.rm.empty=low: must be a number", []),
    (["scorer.models.rm={path: ., steps: {by: line}}"], "scorer.models.rm.steps.by=line: must be one of newline", []),
    (
        ["scorer.models.format.path=."],
        "scorer.models.format: a name is letters, digits",
        ["none that means something already: accuracy"],
    ),
    (["scorer.models.a:b.path=."], "scorer.models.a:b: a name is letters, digits, - and _", []),
    (["scorer.device=tpu"], "scorer.device=tpu: must be cpu, cuda or cuda:N", []),
    (["scorer.address=myhost"], "scorer.address=myhost: must be an IP address", []),
    (["scorer.on_deadline=zero"], "scorer.on_deadline=zero: must be one of fail, refuse", []),
    (["scorer.refresh_every=2"], "scorer.refresh_every=2: there is no model to train; name one in scorer.models", []),
    (["scorer.refresh.method=search"], "scorer.refresh.method=search: must be one of outcome, rollouts, exact", []),
    (["scorer.refresh.updates=-1"], "scorer.refresh.updates=-1: must be ≥ 0", []),
    (["reward.weights.my_code:brevity=1"], "reward.weights=my_code:brevity: no module my_code", []),
    (["reward.weights.json:dunps=1"], "reward.weights=json:dunps: json has no dunps", ["dumps"]),
    (["reward.settings.brevity.longest=3"], "reward.settings.brevity: unknown; must be one of accuracy, format", []),
    (["reward.settings.format=3"], "reward.settings={format: 3}: must be a mapping", []),
    (["reward.only.format.from=3"], "reward.only.format.from: unknown; must be one of from_step, to_step", []),
    (["reward.only.format.from_step=-1"], "reward.only.format.from_step=-1: must be a learner step", []),
    (["reward.only.format={from_step: 5, to_step: 5}"], "reward.only.format.to_step=5: must be > from_step=5", []),
    (["reward.only.format.tasks=chain"], "reward.only.format.tasks=chain: must be a list of tasks", []),
    (["reward.only.format.tasks=[chian]"], "reward.only.format.tasks=[chian]: task=chain has chain", ["chain"]),
    (["sft.warmup_steps=1000"], "sft.warmup_steps=1000: must be < sft.steps=1000", []),
    (["learner.device=gpu"], "learner.device=gpu: must be cpu, cuda or cuda:N", []),
    (["learner.head_dtype=bfloat16"], "learner.head_dtype=bfloat16: needs learner.dtype=bfloat16, not float32", []),
    (["learner.liger=always"], "learner.liger=always: needs learner.device=cuda", ["learner.liger=auto"]),
    (["engine.device=tpu"], "engine.device=tpu: must be cpu, cuda or cuda:N", []),
    (["broker.address=myhost"], "broker.address=myhost: must be an IP address", ["127.0.0.1"]),
    (["broker.deadline_seconds=30"], "broker.deadline_seconds=30.0: must be > ", ["lease"]),
    (["algo.kl_coef=0.1"], "algo.kl_coef=0.1", ["algo.kl=none"]),
    (["task=mixture", "task.weights.sudoku=1"], "task.weights=sudoku", ["chain"]),
    # SGLang servers
    (["engine=sglang", "engine.servers=0"], "engine.servers=0: must be in [1, 1024] (Servers", []),
    (["engine=sglang", "engine.tensor_parallel=0"], "engine.tensor_parallel=0: must be in [1, 1024]", []),
    (["engine=sglang", "engine.prefix_tokens=-1"], "engine.prefix_tokens=-1: must be ≥ 0", []),
    (["engine=sglang", "engine.stream_interval=0"], "engine.stream_interval=0: must be ≥ 1", []),
    (["engine=sglang", "engine.start_seconds=0"], "engine.start_seconds=0.0: must be in (0, 1e9]", []),
    (["engine=sglang", "engine.hang_seconds=0"], "engine.hang_seconds=0.0: must be in (0, 1e9]", []),
    (["engine=sglang", "engine.max_restarts=-1"], "engine.max_restarts=-1: must be ≥ 0", []),
    (["engine=sglang", "engine.address=myhost"], "engine.address=myhost: must be an IP address", ["127.0.0.1"]),
    (["engine=sglang", "engine.tensor_parallel=2"], "engine.tensor_parallel=2: needs engine.device=cuda", []),
    (["engine=sglang", "engine.flags=--a 'b"], "engine.flags=--a 'b: malformed (No closing quotation)", ["shell"]),
    (["engine=sglang", "engine.flags=--log-level debug --port 1"], "engine.flags=--log-level", ["--port is", "free"]),
    (["engine=sglang", "engine.flags=--host=0.0.0.0"], "engine.flags=--host=0.0.0.0: --host", ["engine.address"]),
    (["engine=sglang", "engine.flags=--api-key x"], "engine.flags=--api-key x: --api-key is offtrail's own", []),
    (["engine=sglang", "engine.flags=--admin-a x"], "engine.flags=--admin-a x: --admin-api-key is offtrail's", []),
    (["engine=sglang", "engine.flags=--model x"], "engine.flags=--model x: --model", ["the run's"]),
    (["engine=sglang", "engine.flags=--tp 2"], "engine.flags=--tp 2: --t", ["engine.tensor_parallel"]),
    (["engine=sglang", "engine.urls=[localhost:3]"], "engine.urls=[localhost:3]: localhost:3 is no http(s)://", []),
    (["engine=sglang", "engine.urls=[http://a]"], "engine.urls=[http://a]: http://a is no http(s)://HOST:PORT", []),
    (["engine=sglang", "engine.urls=[http://a:1/v1]"], "engine.urls=[http://a:1/v1]: http://a:1/v1 is no", []),
    (["engine=sglang", "engine.urls=[http://a:x]"], "engine.urls=[http://a:x]: http://a:x is no", []),
    (["engine=sglang", "engine.urls=[http://me:pw@a:1]"], "engine.urls=[http://me:pw@a:1]: http://me:pw@a:1 is no", []),
    (["engine=sglang", "engine.urls=['http://a b:1']"], "engine.urls=[http://a b:1]: http://a b:1 is no", []),
    (["engine=sglang", "engine.urls=[http://a:65536]"], "engine.urls=[http://a:65536]: http://a:65536 is no", []),
    (["engine=sglang", f"engine.flags={'--x ' * 20000}"], "engine.flags=--x --x", ["has 80,000 characters", "65,536"]),
    (["engine=sglang", "engine.urls=[http://a:1, http://a:1/]"], "engine.urls=[", ["names a server twice"]),
    (["engine=sglang", "engine.urls=[http://a:1]", "engine.servers=2"], "engine.servers=2: is for servers that", []),
    (["engine=sglang", "engine.urls=[http://a:1]", "engine.router=true"], "engine.router=true: is for servers", []),
    (
        ["engine=sglang", "engine.urls=[http://a:1]", "engine.device=cuda", "engine.tensor_parallel=2"],
        "engine.tensor_parallel=2: is for servers that offtrail starts",
        [],
    ),
    (["engine=sglang", "engine.urls=[http://a:1]", "generator.count=2"], "generator.count=2: must be 1 with", []),
    (["engine=sglang", "engine.urls=[http://a:1]"], "eval.engine=same: must be local with engine.urls", []),
    # weight channels
    (["weights.full_every=0"], "weights.full_every=0: must be ≥ 1", []),
    (["weights.bucket_mb=0"], "weights.bucket_mb=0: must be in [1, 1048576]", []),
    (["weights.channel=distributed"], "weights.channel=distributed: needs engine=sglang, not local", ["shm or disk"]),
    (["weights.channel=ipc"], "weights.channel=ipc: needs engine=sglang, not local", ["shm or disk"]),
    (["engine=sglang", "weights.channel=ipc", "weights.delta=true"], "weights.delta=true: is for weights.channel=", []),
    (
        ["engine=sglang", "weights.channel=ipc", "engine.device=cuda"],
        "weights.channel=ipc: needs learner and engine on the same kind of device",
        ["learner.device=cpu", "engine.device=cuda"],
    ),
    (
        ["engine=sglang", "weights.channel=ipc", "engine.urls=[http://10.0.0.9:1]", "eval.engine=local"],
        "weights.channel=ipc: needs every server on this host, not at 10.0.0.9",
        ["distributed"],
    ),
    (
        ["engine=sglang", "weights.channel=distributed", "engine.kv_on_update=keep"],
        "engine.kv_on_update=keep: not with weights.channel=distributed: at the moment of a push a new prompt could",
        ["take recompute", "weights.channel=shm"],
    ),
    (
        ["engine=sglang", "weights.channel=distributed", "staleness.mode=exact"],
        "weights.channel=distributed: not with staleness.mode=exact: a push reaches servers when it is published",
        ["shm"],
    ),
    # job=serve, job=chat
    (["job=serve"], "checkpoint=: job=serve needs a run directory, a checkpoint", ["checkpoint=DIR"]),
    (["job=chat"], "checkpoint=: job=chat needs", ["checkpoint=DIR"]),
    (["checkpoint=runs/x"], "checkpoint=runs/x: job=rl does not read it", ["model.path=DIR"]),
    (["job=chat", "checkpoint=/no/such"], "checkpoint=/no/such: no such folder; give a run directory", []),
    (["job=serve", "checkpoint=nobody/model"], "checkpoint=nobody/model: neither a folder nor in the Hugging", ["hf "]),
    (["serve.port=65536"], "serve.port=65536: must be in [0, 65535]", []),
    (["serve.temperature=-1"], "serve.temperature=-1.0: must be in [0, 100]", []),
    (["serve.address=here"], "serve.address=here: must be an IP address", []),
    (["broker.address=224.0.0.1"], "broker.address=224.0.0.1: is of many hosts", ["0.0.0.0"]),
    (["serve.address=fe80::1%eth0"], "serve.address=fe80::1%eth0: must be an IP address without a zone", []),
    (["engine.device=cuda:٣"], "engine.device=cuda:٣: must be cpu, cuda or cuda:N", []),
    # paths
    (["model.path=/no/such/model"], "model.path=/no/such/model: no such folder", []),
    (["model=pretrained"], "model.path=: model=pretrained needs a Hugging Face folder or name: model.path=DIR", []),
    (["task=gsm8k"], "task.path=: problems are needed", ["task.path=FILE"]),
    (["task=gsm8k", "task.path=/no/such.jsonl"], "task.path=/no/such.jsonl: no such file", []),
    (["job=sft", "sft.path=/no/such.jsonl"], "sft.path=/no/such.jsonl: no such file", ["one example a row"]),
    # resume
    (["run.resume=true", "run.dir=/no/such"], "run.resume=true: needs run.name=NAME", []),
    (["run.resume=true", "run.name=lost", "run.dir=/no/such"], "run.name=lost: no run to resume in /no/such", []),
]


@pytest.mark.parametrize(("argv", "begins", "says"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistake(argv, begins, says):
    text = message(*argv)
    assert text.startswith(begins)
    for part in says:
        assert part in text


ELSEWHERE = "where it is not looked for, so that every answer would be wrong; take reward.answer"
BOXED = "asks for the answer in \\boxed, " + ELSEWHERE
TAGGED = "asks for the answer in <answer>, " + ELSEWHERE


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["task=gsm8k"], ""),
        (["task=gsm8k", "reward.answer=last_number"], ""),
        (["task=gsm8k", "reward.answer=boxed"], f"task.template {TAGGED}=tags, or task.template=boxed"),
        (["task=math500", "reward.answer=boxed"], f"task.template {TAGGED}=tags, or task.template=boxed"),
        (["task=aime", "reward.answer=mark"], f"task.template {TAGGED}=tags, or a task.template that asks"),
        (["task=gpqa", "reward.answer=text"], f"task.template {TAGGED}=tags, or a task.template that asks"),
        (["task=gsm8k", "task.template=r1_zero", "reward.answer=boxed"], f"task.template {TAGGED}=tags, or"),
        (["task=gsm8k", "task.template=boxed"], f"task.template {BOXED}=boxed, or task.template=tags"),
        (["task=gsm8k", "task.template=boxed", "reward.answer=boxed"], ""),
        (["task=gsm8k", "task.template=boxed", "reward.answer=last_number"], ""),
        (["task=gsm8k", "task.template={prompt} Put \\fbox or \\boxed in <answer>.", "reward.answer=boxed"], ""),
        (["task=gsm8k", "task.template={prompt} No <answer>, end with Answer: N", "reward.answer=mark"], ""),
        (["task=gsm8k", "task.template={prompt} No <answer>, end with Answer: N", "reward.answer=mark",
          "reward.answer_mark=####"], f"task.template {TAGGED}=tags"),
        (["task=jsonl", "reward.answer=boxed"], ""),  # what its prompts ask for is the file's
        (["task=gsm8k", "task.template=boxed", "reward.weights={format: 1}"], ""),  # nothing reads an answer
        (["task=gsm8k", "task.template=boxed", "reward.weights={trl.rewards:accuracy_reward: 1}"], ""),
    ],
)  # fmt: skip
def test_the_answer_is_looked_for_where_the_template_asks_for_it(tmp_path, checkpoint, keys, says):
    line = [f"task.path={write(tmp_path / 'problems.jsonl', '')}", *keys]
    unread = ["job=sft"], ["job=reject", f"reject.paths=[{tmp_path / 'problems.jsonl'}]"]
    for job in ([], ["job=sample", checkpoint], ["job=eval", checkpoint]):
        if says:
            assert f": {says}" in message(*job, *line)
            assert message(*job, *line).startswith("reward.answer=")
        else:
            compose([*job, *line])
    for job in unread:
        compose([*job, *line])


def test_a_set_of_an_evaluation_and_a_family_are_looked_at_as_well(tmp_path, checkpoint):
    path = write(tmp_path / "problems.jsonl", "")
    aime = f"eval.sets={{aime: {{eval_path: {path}}}}}"
    for job in ([], ["job=eval", checkpoint]):
        text = message(*job, "reward.answer=boxed", aime)
        assert text.startswith(
            "eval.sets.aime.reward.answer=boxed: eval.sets.aime.template asks for the answer in <answer>"
        )
        assert text.endswith("take eval.sets.aime.reward.answer=tags, or eval.sets.aime.template=boxed")
        compose([*job, "reward.answer=boxed", aime.replace("}}", ", template: boxed}}")])
    # the sets are asked, and not the task
    compose(["job=eval", checkpoint, "eval.sets={chain: {}}", "task=gsm8k", f"task.path={path}", "reward.answer=boxed"])
    within = f"task.settings={{jsonl: {{path: {path}, template: boxed}}}}"
    text = message("task=mixture", "task.weights={jsonl: 1, chain: 1}", within)
    assert text.startswith("reward.answer=tags: task.settings.jsonl.template asks for the answer in \\boxed")


def test_a_model_folder_needs_its_config(tmp_path):
    assert "holds no config.json" in message(f"model.path={tmp_path}")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    for given in (tmp_path, tmp_path / "small.gguf"):
        assert message(f"model.path={given}").startswith(f"model.path={given}: is a GGUF model; take the folder that")
    (tmp_path / "config.json").write_text("{}")
    assert compose([f"model.path={tmp_path}"]).model.path == str(tmp_path)


def test_a_model_that_scores_is_named_where_it_is_weighed_and_served_where_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    rm = f"scorer.models.rm.path={tmp_path}"
    assert compose([rm, "reward.weights.rm=0.1"]).reward.scored == ("rm",)
    assert message(rm, "scorer.count=0").startswith("scorer.count=0: scorer.models names rm, which nobody would serve")
    assert message(rm, "reward.weights={rm: 1}").startswith("reward.weights={rm: 1}: needs a component of rules too")
    alone = message(rm, "reward.weights.rm=1", "reward.settings.rm.longest=3")
    assert alone == "reward.settings.rm: is a model that scores; its settings are scorer.models.rm"
    sets = message(rm, "reward.weights.rm=1", "eval.sets={addition: {reward: {weights: {acuracy: 1}}}}")
    assert sets.startswith("eval.sets.addition.reward.weights.acuracy: unknown; must be one of accuracy")
    monkeypatch.chdir(tmp_path)
    assert compose(["scorer.models.rm.path=."]).scorer.models == {"rm": {"path": str(tmp_path)}}


def test_a_model_name_must_be_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "hf download org/model-1" in message("model.path=org/model-1")
    snapshot = tmp_path / "models--org--model-1" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert compose(["model.path=org/model-1"]).model.path == "org/model-1"


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        ([], {"sglang"}),
        (["engine.router=true"], {"sglang_router"}),
        (["engine.router=true"], {"sglang", "sglang_router"}),
    ],
)
def test_sglang_must_be_installed(argv, missing, monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda name: None if name in missing else object())
    text = message("engine=sglang", *argv)
    assert text.startswith(f"engine.name=sglang: {' and '.join(sorted(missing))} not installed; make sglang-cpu")
    assert "pip install 'offtrail[sglang]'" in text


def test_sglang_that_runs_elsewhere_need_not_be_installed(monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    config = compose(["engine=sglang", "engine.urls=[http://a:1, https://10.0.0.2:2/]", "eval.engine=local"])
    assert config.engine.urls == ["http://a:1", "https://10.0.0.2:2/"]


def test_an_sglang_that_cannot_do_it_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: "0.5.18")
    assert compose(["engine=sglang"]).engine.pause_mode == "auto"
    assert message("engine=sglang", "engine.kv_on_update=keep").startswith("engine.kv_on_update=keep: SGLang 0.5.18")
    assert message("engine=sglang", "engine.pause_mode=retract").startswith("engine.pause_mode=retract: SGLang 0.5.18")
    monkeypatch.setattr(versions, "installed", lambda: "0.5.9")
    assert "install 0.5.17 … 0.5.21" in message("engine=sglang")


@pytest.fixture
def checkpoint(tmp_path):
    """A Hugging Face directory, as far as the rules look."""
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf" / "config.json", "{}")
    return f"checkpoint={tmp_path / 'hf'}"


def test_serving_implies_its_engine(checkpoint, tmp_path):
    config = compose(["job=serve", checkpoint, "engine.device=cuda:1", "serve.port=0"])
    assert (config.engine.name, config.engine.device) == ("sglang", "cuda:1")
    path = write(tmp_path / "config.yaml", to_yaml(config))
    assert compose([path]) == config
    assert compose(["job=chat", checkpoint]).engine.name == "local"
    assert message("job=serve", checkpoint, "engine=local").startswith("engine.name=local: job=serve needs sglang")
    text = message("job=serve", checkpoint, "engine.urls=[http://a:1]")
    assert text.startswith("engine.urls=[http://a:1]: job=serve starts its own server")


def test_a_run_that_is_served_has_a_model(tmp_path):
    write(tmp_path / "config.yaml", to_yaml(compose([])))
    given = f"checkpoint={tmp_path}"
    assert "the run has neither a checkpoint nor a start model" in message("job=chat", given)
    for name in ("start", "checkpoints/step_9", "checkpoints/step_10", "checkpoints/.step_11.writing"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name / "config.json", "{}")
        newest = "step_10" if name.startswith("checkpoints/.") else name.rpartition("/")[2]
        assert model_folder(compose(["job=chat", given]).checkpoint) == tmp_path / name.replace(
            name.rpartition("/")[2], newest
        )
        assert run_folder(str(tmp_path / name)) == (None if name == "start" else tmp_path)
    assert run_folder(str(tmp_path)) == tmp_path


def test_flags_that_look_like_offtrails_own_are_the_users(tmp_path):
    text = "--model-loader-extra-config {} --log-level debug --tool-call-parser x --mem-fraction-static=.5"
    assert compose(["engine=sglang", f"engine.flags={text}"]).engine.flags == text


def test_a_held_out_file_must_exist(tmp_path):
    path = write(tmp_path / "p.jsonl", "")
    text = message("task=gsm8k", f"task.path={path}", f"task.eval_path={path}2")
    assert text.startswith(f"task.eval_path={path}2: no such file")


def test_a_lora_adapter_is_no_model(tmp_path):
    write(tmp_path / "adapter_config.json", "{}")
    assert f"model.path={tmp_path}: is a LoRA adapter, not a model; merge it" in message(f"model.path={tmp_path}")


def test_an_alias_counts_as_all_that_it_stands_for(tmp_path):
    """Nine levels of ten: 260 bytes that stand for a billion values."""
    bomb = ["&a0 [x,x,x,x,x,x,x,x,x,x]"] + [f"&a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    text = message(write(tmp_path / "a.yaml", f"task: {{settings: [{', '.join(bomb)}]}}"))
    assert text.startswith(f"{tmp_path}/a.yaml, line 1: malformed YAML: holds more than 10,000 values")
    deep = ["&a0 [x]"] + [f"&a{i} [*a{i - 1}]" for i in range(1, 40)]
    assert "nested more than 32 deep" in message(write(tmp_path / "b.yaml", f"task: {{settings: [{', '.join(deep)}]}}"))
    shared = write(tmp_path / "c.yaml", "learner: {optim: {betas: &b [0.8, 0.9]}}\nsft: {betas: *b}\n")
    assert compose([shared]).sft.betas == (0.8, 0.9)


def test_a_file_of_settings_has_an_end(tmp_path):
    path = write(tmp_path / "a.yaml", "# long\n" * 200_000)
    assert message(path) == f"{path}: longer than 1 MiB, so that it can be no file of settings"
    os.mkfifo(tmp_path / "pipe.yaml")
    assert message(str(tmp_path / "pipe.yaml")) == f"{tmp_path}/pipe.yaml: not a file"


def test_malformed_yaml_names_file_and_line(tmp_path):
    path = write(tmp_path / "a.yaml", "learner:\n  steps: 3\n bad: [\n")
    assert message(path).startswith(f"{path}, line 3: malformed YAML")


def test_a_key_twice_in_a_file_names_the_line(tmp_path):
    path = write(tmp_path / "a.yaml", "learner:\n  steps: 3\n  steps: 4\n")
    assert message(path).startswith(f"{path}, line 3: malformed YAML: the key 'steps' is given twice")
    path = write(tmp_path / "b.yaml", "learner.steps: 3\nlearner: {steps: 4}\n")
    assert message(path).startswith("learner.steps=4: given twice, also as 3")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "? [a]\n: 1\n"])
def test_a_file_must_be_a_mapping(text, tmp_path):
    path = write(tmp_path / "a.yaml", text)
    assert message(path).startswith(path)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert message(str(path)).startswith(f"{path}: not a UTF-8 text")
    path.write_bytes(b"a: \x00")
    assert "malformed YAML" in message(str(path))
    assert "cannot be read" in message(str(tmp_path / "a.yaml" / "b.yaml"))


def test_an_unknown_key_in_a_file(tmp_path):
    path = write(tmp_path / "a.yaml", "learner: {stps: 3}\n")
    assert message(path).startswith("learner.stps=3: unknown key; nearest: learner.steps")


def test_a_yaml_that_holds_itself(tmp_path):
    path = write(tmp_path / "a.yaml", "batch: &b {groups: *b}\n")
    assert message(path).startswith(f"{path}, line 1: malformed YAML: found unconstructable recursive node")


def test_one_file_only(tmp_path):
    path = write(tmp_path / "a.yaml", "")
    assert "is given already" in message(path, path)


def test_a_run_directory_is_not_its_config(tmp_path):
    write(tmp_path / "config.yaml", to_yaml(compose([])))
    assert message(str(tmp_path)).endswith(f"give {tmp_path}/config.yaml")


def test_a_configuration_of_another_version(tmp_path):
    path = write(tmp_path / "old.yaml", "schema_version: 0\nbatch: {size: 4}\n")
    text = message(path)
    assert text.startswith("schema_version=0: ")
    assert path in text
    assert message("schema_version=2").startswith("schema_version=2: ")


# Resume


@pytest.fixture
def saved(tmp_path):
    """A run `one` that was started with task=addition and five steps."""
    (tmp_path / "one").mkdir()
    config = compose(["task=addition", "learner.steps=5", f"run.dir={tmp_path}", "task.max_digits=6"])
    write(tmp_path / "one" / "config.yaml", to_yaml(config))
    return [f"run.dir={tmp_path}", "run.name=one", "run.resume=true"], config


def test_resume_takes_the_saved_configuration(saved):
    argv, config = saved
    resumed = compose(argv)
    assert (resumed.run.name, resumed.run.resume) == ("one", True)
    resumed.run.name, resumed.run.resume = "", False
    assert resumed == config


def test_resume_may_change_what_decides_no_number(saved):
    resumed = compose([*saved[0], "learner.steps=9", "generator.count=2", "tracking.progress=off", "broker.port=5555"])
    assert (resumed.learner.steps, resumed.generator.count, resumed.task.max_digits) == (9, 2, 6)


def test_resume_may_change_what_saves_a_diverged_run(saved):
    resumed = compose([*saved[0], "learner.optim.lr=1e-5", "learner.optim.grad_clip=0.1", "run.resume_from=step_3"])
    assert (resumed.learner.optim.lr, resumed.run.resume_from) == (1e-5, "step_3")
    assert "resume_from" not in to_yaml(resumed)
    assert message(*saved[0], "sft.lr=1e-5").startswith("sft.lr=1e-05: differs from 0.004")  # of its start model
    assert message(*saved[0], "learner.optim.eps=1e-5").startswith("learner.optim.eps=1e-05: differs from")


def test_resume_from_names_a_checkpoint_of_a_run_that_is_resumed(saved):
    for value in ("step_", "20", "step_-1", "step_01", "../step_1", "step_1/"):
        text = message(*saved[0], f"run.resume_from={value}")
        assert text == f"run.resume_from={value}: must be the name of a checkpoint, such as step_20"
    assert message("run.resume_from=step_2").startswith("run.resume_from=step_2: needs run.resume=true and run.name")


def test_resume_refuses_other_science(saved):
    text = message(*saved[0], "algo.clip_low=0.1", "batch.groups=8")
    assert text.startswith("algo.clip_low=0.1: differs from 0.2")
    assert "(also: batch.groups)" in text
    assert message(*saved[0], "task=chain").startswith("task.")
    assert message(*saved[0], "task.max_digits=7").startswith("task.max_digits=7: differs from 6")


def test_resume_over_a_saved_configuration_that_was_cut_takes_no_defaults_for_the_rest(saved, tmp_path):
    path = tmp_path / "one" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    for kept, words in ((6, "and "), (len(lines) - 1, "it was cut or edited; restore it, or start a new run")):
        write(path, "".join(lines[:kept]))
        text = message(*saved[0])
        assert f"=(absent): {path} lacks it" in text
        assert words in text


def test_resume_never_shortens(saved):
    assert message(*saved[0], "learner.steps=4").startswith("learner.steps=4: the run was started with 5")


def test_resume_names_the_runs_that_are_there(saved):
    where = saved[0][0]
    assert "one" in message(where, "run.resume=true")
    assert "nearest: one" in message(where, "run.resume=true", "run.name=ones")


def test_resume_names_the_newest_runs_first(tmp_path):
    for age, name in enumerate(["zeta", "alpha", "kappa", "beta", "omega", "delta"]):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "config.yaml", "")
        os.utime(tmp_path / name / "config.yaml", (1e9 - age, 1e9 - age))
    text = message(f"run.dir={tmp_path}", "run.resume=true")
    assert text.endswith(": zeta, alpha, kappa, beta, omega")


def test_resume_of_a_run_of_another_version(saved, tmp_path):
    write(tmp_path / "one" / "config.yaml", "schema_version: 0\n")
    assert message(*saved[0]).startswith("schema_version=0: ")


def test_a_run_directory_is_no_model_but_holds_one(tmp_path):
    write(tmp_path / "config.yaml", "job: sft")
    assert message(f"model.path={tmp_path}") == (
        f"model.path={tmp_path}: the run has neither a checkpoint nor a start model"
    )
    (tmp_path / "checkpoints" / "step_30").mkdir(parents=True)
    write(tmp_path / "checkpoints" / "step_30" / "config.json", "{}")
    where = tmp_path / "checkpoints" / "step_30"
    assert message(f"model.path={tmp_path}") == (
        f"model.path={tmp_path}: is a run directory; give the model in it: {where}"
    )


@pytest.mark.parametrize("task", ["ifeval", "xstest", "countdown"])
def test_what_no_gold_answer_decides_is_not_verified_by_one(tmp_path, task):
    rows = write(tmp_path / "rows.jsonl", '{"prompt": "1", "answer": "2", "gold": "2", "label": "safe"}\n')
    given = [] if task == "countdown" else [f"task.path={rows}"]
    with pytest.raises(ConfigError, match=f"^reject.unscored=verify: task={task} is judged by more than its gold"):
        compose(["job=reject", f"reject.paths=[{rows}]", "reject.unscored=verify", f"task={task}", *given])
