"""compose: who wins, which variant, what a file means, and that a saved configuration repeats itself."""

import dataclasses
import importlib.resources
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offtrail.core.plugins import OUTSIDE
from offtrail.core.settings import inside, limits_text
from offtrail.platform.config import keys as module
from offtrail.platform.config.compose import OPTIONS_DIR, compose, load_config, options_of, saved_tree, to_yaml
from offtrail.platform.config.errors import ConfigError, nearest
from offtrail.platform.config.files import as_text, read_file, read_text
from offtrail.platform.config.keys import GROUPS, VARIANTS, all_paths, flatten, variant_keys
from offtrail.platform.config.schema import Config
from offtrail.platform.config.validate import RULES
from offtrail.tasks.addition import AdditionConfig
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.mixture import MixtureConfig

ROOT = Path(__file__).parents[2]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_nothing_given_is_the_dataclass_defaults():
    assert compose([]) == Config()


def test_what_is_done_to_a_configuration_shows_in_no_other():
    first = compose(["task=mixture"])
    first.reward.weights["accuracy"] = 7.0
    first.task.weights.clear()
    first.learner.optim.lr = 9.0
    first.eval.sets["more"] = {"name": "addition"}
    assert compose(["task=mixture"]) == Config(task=MixtureConfig())


def test_values_get_their_declared_type():
    config = compose(["learner.steps=12", "sft.lr=1e-4", "tracking.tensorboard=false", "sft.betas=[0.5, 0.25]"])
    assert config.learner.steps == 12
    assert config.sft.lr == 0.0001
    assert config.tracking.tensorboard is False
    assert config.sft.betas == (0.5, 0.25)
    assert type(config.sft.betas) is tuple


@pytest.mark.parametrize("text", ["1e3", "0012", "true", "off", "null", "[a]", "{a: b}", "12:30", "a=b", "x#y", ""])
def test_a_text_is_taken_as_it_stands(text, tmp_path):
    assert compose([f"prompt.system={text}"]).prompt.system == text
    quoted = "'" + text + "'"
    assert compose([write(tmp_path / "a.yaml", f"prompt: {{system: {quoted}}}")]).prompt.system == text


def test_yaml_off_is_not_false(tmp_path):
    path = write(tmp_path / "a.yaml", "tracking: {progress: off}\nsft: {lr: 1e-4}\nmodel: {name: 0012}\n")
    config = compose([path])
    assert (config.tracking.progress, config.sft.lr, config.model.name) == ("off", 0.0001, "0012")


def test_the_variant_follows_the_option():
    assert type(compose([]).task) is ChainConfig
    assert type(compose(["task=addition"]).task) is AdditionConfig
    assert type(compose(["task.name=addition"]).task) is AdditionConfig
    assert compose(["task=addition", "task.max_digits=6"]).task == AdditionConfig(max_digits=6)


def test_every_option_composes(tmp_path):
    problems = write(tmp_path / "p.jsonl", '{"question": "1+1?", "answer": "#### 2"}\n')
    write(tmp_path / "config.json", "{}")
    for group in GROUPS:
        for option in options_of(group):
            file, model = [f"task.path={problems}"], [f"model.path={tmp_path}"]
            run = [*file, "reward=code"]
            extras = dict.fromkeys(("aime", "gpqa", "gsm8k", "ifeval", "jsonl", "math500", "xstest"), file)
            extras |= dict.fromkeys(("humaneval", "mbpp", "programs"), run)
            extra = (extras | {"pretrained": model}).get(option, [])
            section = getattr(compose([f"{group}={option}", *extra]), group)
            given = read_file(OPTIONS_DIR / group / f"{option}.yaml")
            assert section.name == given.get("name", option)


def _text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_options_hold_only_differences():
    for group in VARIANTS:
        for option in options_of(group):
            given = read_file(OPTIONS_DIR / group / f"{option}.yaml")
            name = given.pop("name", option)
            given.pop("with", None)
            keys = variant_keys()[group][name]
            assert [k for k, v in given.items() if _text(keys[f"{group}.{k}"].default) == _text(v)] == []


def test_what_an_option_sets_beside_its_group_loses_to_every_given_key_and_goes_with_it(tmp_path):
    r1 = compose(["algo=r1_zero"])
    assert (r1.learner.minibatches, r1.learner.optim.lr, r1.batch.group_size) == (16, 3e-6, 16)
    assert (r1.algo.ref_refresh, r1.algo.clip_high, r1.batch.groups) == (400, 10.0, 16)
    assert compose(["algo=r1_zero", "learner.minibatches=8"]).learner.minibatches == 8
    path = write(tmp_path / "a.yaml", "algo: r1_zero\nlearner: {minibatches: 4}\n")
    assert compose([path]).learner.minibatches == 4
    assert compose([path]).batch.group_size == 16
    assert compose([path, "algo=grpo"]).batch.group_size == 8
    saved = write(tmp_path / "saved.yaml", to_yaml(r1))
    assert compose([saved]) == r1


def rates(argv):
    config = compose(argv)
    critic = config.algo.critic.lr if config.algo.name == "ppo" else None
    return config.model.name, config.learner.optim.lr, critic, config.sft.lr


def test_learning_rates_follow_the_model(tmp_path):
    model = [f"model.path={tmp_path}"]
    write(tmp_path / "config.json", "{}")
    assert rates(["algo=ppo"]) == ("tiny", 2e-4, 1e-3, 4e-3)
    assert rates([*model, "algo=ppo"]) == ("pretrained", 1e-6, 1e-5, 1e-5)
    assert rates([*model, "algo=grpo"]) == ("pretrained", 1e-6, None, 1e-5)  # which has no critic to be told
    assert rates([*model, "algo=r1_zero"]) == rates(["algo=r1_zero", *model]) == ("pretrained", 3e-6, None, 1e-5)
    assert rates([*model, "algo=ppo", "algo.critic.lr=3e-5", "sft.lr=1e-4"]) == ("pretrained", 1e-6, 3e-5, 1e-4)
    assert rates([*model, "model=tiny"]) == ("tiny", 2e-4, None, 4e-3)
    file = write(tmp_path / "a.yaml", f"model: {{path: {tmp_path}}}\nlearner: {{optim: {{lr: 2e-6}}}}\n")
    assert rates([file]) == ("pretrained", 2e-6, None, 1e-5)
    assert rates([file, "model.path="]) == ("tiny", 2e-6, None, 4e-3)
    saved = write(tmp_path / "saved.yaml", to_yaml(compose([*model, "algo=ppo"])))
    assert rates([saved]) == ("pretrained", 1e-6, 1e-5, 1e-5)
    assert compose([saved]) == compose([*model, "algo=ppo"])


def test_answers_grow_at_their_step():
    sampling = compose(["sampling.growth_step=3", "sampling.growth_factor=1.5", "learner.steps=4"]).sampling
    assert [sampling.longest_at(step) for step in (0, 2, 3, 9)] == [64, 64, 96, 96]
    assert compose([]).sampling.longest_at(10**6) == 64


def test_every_variant_has_an_option():
    for group, variants in VARIANTS.items():
        named = {read_file(OPTIONS_DIR / group / f"{o}.yaml").get("name", o) for o in options_of(group)}
        assert named == set(variants) - {OUTSIDE}


def test_the_command_line_wins_over_the_file_in_any_order(tmp_path):
    path = write(tmp_path / "a.yaml", "learner: {steps: 5, minibatches: 4}\nbatch: {groups: 8}\n")
    for argv in (["learner.steps=7", path], [path, "learner.steps=7"]):
        config = compose(argv)
        assert (config.learner.steps, config.learner.minibatches, config.batch.groups) == (7, 4, 8)


def test_an_option_on_the_command_line_replaces_the_files_group(tmp_path):
    path = write(tmp_path / "a.yaml", "task: {name: addition, max_digits: 9}\nlearner: {steps: 5}\n")
    assert compose([path]).task == AdditionConfig(max_digits=9)
    config = compose([path, "task=chain"])
    assert config.task == ChainConfig()
    assert config.learner.steps == 5


def test_a_file_may_choose_options_and_dotted_keys(tmp_path):
    path = write(tmp_path / "a.yaml", "task: addition\ntask.max_digits: 5\nlearner.steps: 3\nbatch:\n")
    config = compose([path])
    assert config.task == AdditionConfig(max_digits=5)
    assert config.learner.steps == 3


def test_key_order_never_matters():
    argv = ["task=mixture", "task.weights={chain: 1, addition: 3}", "task.weights.chain=2", "batch.groups=4"]
    assert compose(argv) == compose(argv[::-1])
    assert compose(argv).task.weights == {"chain": 2.0, "addition": 3.0}


def test_a_mapping_is_one_value(tmp_path):
    path = write(tmp_path / "a.yaml", "task: {name: mixture, weights: {countdown: 1}}\n")
    assert compose([path]).task.weights == {"countdown": 1.0}
    assert compose([path, "task.weights={chain: 1}"]).task.weights == {"chain": 1.0}
    assert compose([path, "task.weights.chain=1"]).task.weights == {"countdown": 1.0, "chain": 1.0}
    assert compose(["task=mixture", "task.weights.chain=2"]).task.weights == {"chain": 2.0, "addition": 0.5}


def test_family_settings_of_a_mixture_get_numbers():
    task = compose(["task=mixture", "task.settings.chain.max_operations=8", "task.settings.chain.noise=0.25"]).task
    assert task.settings == {"chain": {"max_operations": 8, "noise": 0.25}}


def test_dollar_braces_are_latex_not_interpolation(tmp_path):
    problems = write(tmp_path / "p.jsonl", "")
    for template in ("${prompt}$", r"\${prompt}", r"a\\${prompt}{prompt}", "${prompt", r"{prompt}\\"):
        given = [f"task.template={template}" if "{prompt}" in template else f"task.template={template}{{prompt}}"]
        config = compose(["task=gsm8k", f"task.path={problems}", *given])
        assert config.task.template == given[0].removeprefix("task.template=")


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/some/home")
    assert compose(["run.dir=~/runs"]).run.dir == "/some/home/runs"
    assert compose(["prompt.system=~/runs"]).prompt.system == "~/runs"


def test_saved_text_has_no_run_name():
    text = to_yaml(compose(["run.name=mine", "run.seed=7"]))
    assert "mine" not in text
    assert "name: tiny" in text
    assert "resume" not in text
    assert "seed: 7" in text


def test_load_config_is_what_was_saved(tmp_path):
    config = compose(["task=countdown", "run.seed=3"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


# For any valid overrides x: compose(dump(compose(x))) == compose(x)

FREE_TEXT = {"prompt.system", "task.prompt_field", "task.answer_field", "task.answer_after", "weights.dir", "run.dir"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["${x}", r"\${x}", r"\\", "off", "null", "1e-3", "0x1f", "~", "", " a ", "a\nb", "- a", "a: b", "#", "\x85\ufeff"]
)


def values_of(key):
    """Texts for one key, most of them within its limits."""
    if key.path in ("schema_version", "run.resume", "model.path", "task.path", "task.eval_path") or key.path.endswith(
        ".name"
    ):
        return None
    if key.path == "task.template":
        return TEXTS.map(lambda text: text + "{prompt}")
    if key.path in FREE_TEXT:
        return TEXTS.filter(lambda text: not text.startswith("~"))
    if key.type is bool:
        return st.sampled_from(["true", "false"])
    if key.type in (int, float):
        low, high = (float(end) for end in (key.limits or "[0, inf)")[1:-1].split(","))
        if key.type is int:
            return st.integers(int(low), int(min(high, low + 2000))).map(str)
        return st.floats(low, high if high < 1e300 else None, allow_nan=False, allow_infinity=False).map(repr)
    if "|" in key.type_text:
        return st.sampled_from(key.type_text.split("|"))
    if key.type_text == "[float, float]":
        return st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2).map(lambda pair: str(list(pair)))
    return None


@st.composite
def command_lines(draw):
    names = {group: draw(st.sampled_from(sorted(variants))) for group, variants in VARIANTS.items()}
    keys = {key.path: key for key in keys_for(names)}
    pool = {path: values for path, key in keys.items() if (values := values_of(key)) is not None}
    chosen = draw(st.lists(st.sampled_from(sorted(pool)), max_size=4, unique=True))
    return [f"{group}.name={name}" for group, name in names.items()] + [f"{p}={draw(pool[p])}" for p in chosen]


def keys_for(names):
    base = Config()
    for group, name in names.items():
        setattr(base, group, VARIANTS[group][name]())
    return module.keys_of(base).values()


def valid(argv):
    """What compose makes of ``argv`` without the settings that it refuses beside the others."""
    while True:
        try:
            return compose(argv)
        except ConfigError as error:
            kept = [setting for setting in argv if setting.partition("=")[0] not in str(error)]
            argv = kept if len(kept) < len(argv) else argv[:-1]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(argv=command_lines())
def test_a_saved_configuration_repeats_itself(argv, tmp_path_factory):
    check_that_it_repeats_itself(argv, tmp_path_factory)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(argv=command_lines())
def test_many_saved_configurations_repeat_themselves(argv, tmp_path_factory):
    check_that_it_repeats_itself(argv, tmp_path_factory)


def check_that_it_repeats_itself(argv, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "repeat"
    folder.mkdir(exist_ok=True)
    problems = folder / "problems.jsonl"
    problems.touch()
    if "task.name=jsonl" in argv:
        argv = [*argv, f"task.path={problems}"]
    config = valid(argv)
    assert as_text(saved_tree(config)) == read_text(to_yaml(config))
    saved = folder / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8", newline="")
    again = compose([str(saved)])
    assert again == config
    assert to_yaml(again) == to_yaml(config)


# The tables


def test_every_key_has_its_line_and_limits_name_real_keys():
    tables = [module.keys_of(Config()), *(keys for kinds in variant_keys().values() for keys in kinds.values())]
    lines = {path: key.line for keys in tables for path, key in keys.items()}
    assert set(lines) == all_paths()
    assert [path for path, line in lines.items() if not line] == []


def test_every_number_has_a_range_at_its_field():
    """A new number without a range is a mistake waiting."""
    tables = [module.keys_of(Config()), *(keys for variants in variant_keys().values() for keys in variants.values())]
    numbers = {path for keys in tables for path, key in keys.items() if key.type in (int, float) and not key.limits}
    # the first is compared with a constant, the others have a rule that says why training bounds them
    assert numbers == {"schema_version", "sampling.top_p", "sampling.top_k"}


def test_a_class_that_changes_a_default_keeps_the_range():
    keys = variant_keys()
    assert keys["algo"]["ppo"]["algo.dual_clip"].default == 3.0
    assert keys["algo"]["ppo"]["algo.dual_clip"].limits == "[0, inf)"
    assert keys["algo"]["cispo"]["algo.clip_high"].limits == "[1, inf)"


def test_intervals():
    assert inside(1, "[1, inf)")
    assert not inside(0, "[1, inf)")
    assert not inside(0, "(0, inf)")
    assert inside(1, "[0, 1]")
    assert not inside(1, "[0, 1)")
    assert limits_text("[1, inf)") == "≥ 1"
    assert limits_text("(0, inf)") == "> 0"
    assert limits_text("[0, 1]") == "in [0, 1]"


def test_rules_are_documented():
    assert all(rule.__doc__ for rule in RULES)


def test_nearest_knows_forgotten_sections_and_misspellings():
    paths = all_paths()
    assert nearest("steps", paths) == ["learner.steps", "sft.steps", "prm.steps"]
    assert nearest("batch.grups", paths)[0] == "batch.groups"
    assert nearest("learner.seed", paths)[0] == "run.seed"
    assert nearest("qqqqqq", paths) == []


def test_flatten_is_every_leaf():
    flat = flatten(compose(["task=mixture"]))
    assert flat["task.weights"] == MixtureConfig().weights
    assert flat["learner.optim.lr"] == Config().learner.optim.lr
    assert all(not dataclasses.is_dataclass(value) for value in flat.values())


# Where options are found


def test_options_are_package_data():
    """A wheel holds configs/ as data of the package: reached through a link here, and declared in pyproject.toml."""
    resources = importlib.resources.files("offtrail") / "configs"
    assert Path(str(resources)) == OPTIONS_DIR
    assert OPTIONS_DIR.resolve() == ROOT / "configs"
    assert {child.name for child in resources.iterdir()} == set(GROUPS)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "*.yaml" in build["package-data"]["*"]
    assert build["packages"]["find"] == {"where": ["src"], "namespaces": True}
    assert all(re.fullmatch(r"[a-z0-9_.-]+\.yaml", path.name) for path in OPTIONS_DIR.glob("*/*"))


def test_jsonl_is_chosen_with_its_own_keys(tmp_path):
    problems = write(tmp_path / "p.jsonl", "")
    task = compose(["task=gsm8k", f"task.path={problems}"]).task
    assert type(task) is JsonlConfig
    assert (task.prompt_field, task.answer_field, task.answer_after) == ("question", "answer", "####")


def test_a_saved_configuration_means_the_same_from_every_directory(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "model").mkdir(parents=True)
    there.mkdir()
    write(here / "model" / "config.json", "{}")
    for name in ("train.jsonl", "test.jsonl"):
        write(here / name, '{"question": "1+1?", "answer": "#### 2"}\n')
    monkeypatch.chdir(here)
    data = ["task=gsm8k", "task.path=train.jsonl", "task.eval_path=test.jsonl"]
    config = compose([*data, "model.path=model", "weights.dir=channel"])
    assert (config.task.path, config.task.eval_path) == (str(here / "train.jsonl"), str(here / "test.jsonl"))
    assert (config.model.path, config.weights.dir) == (str(here / "model"), str(here / "channel"))
    mixed = compose(
        ["task=mixture", "task.weights={jsonl: 1}", "task.settings={jsonl: {path: train.jsonl, held_out_share: 0.2}}"]
    )
    assert mixed.task.settings == {"jsonl": {"path": str(here / "train.jsonl"), "held_out_share": 0.2}}
    saved = write(tmp_path / "config.yaml", to_yaml(config))
    monkeypatch.chdir(there)
    assert compose([saved]) == config


def test_files_of_evaluation_sets_are_absolute_as_those_of_the_task_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "train.jsonl", '{"question": "1+1?", "answer": "#### 2"}\n')
    sets = {
        "mine": "{name: jsonl, path: train.jsonl, decontaminate: report, decontaminate_against: [train.jsonl]}",
        "jsonl": "{path: ./train.jsonl, prompt_field: path}",
        "both": "{name: mixture, weights: {jsonl: 1}, settings: {jsonl: {path: train.jsonl}}}",
    }
    found = compose([f"eval.sets.{name}={value}" for name, value in sets.items()]).eval.sets
    assert (found["mine"]["path"], found["mine"]["decontaminate_against"]) == (path, [path])
    assert (found["jsonl"]["path"], found["jsonl"]["prompt_field"]) == (path, "path")
    assert found["both"]["settings"] == {"jsonl": {"path": path}}


def test_where_the_next_run_goes_and_a_models_name_stay_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models--some--model" / "snapshots" / "1").mkdir(parents=True)
    write(tmp_path / "models--some--model" / "snapshots" / "1" / "config.json", "{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = compose(["run.dir=elsewhere", "model.path=some/model"])
    assert (config.run.dir, config.model.path, config.weights.dir) == ("elsewhere", "some/model", "")


def test_a_model_that_scores_is_saved_and_measured_less_often_unless_a_layer_says_otherwise(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    given = ["job=prm", f"prm.path={tmp_path / 'rows.jsonl'}"]
    assert compose(given).learner.checkpoint_every == 100
    assert compose([*given, "learner.checkpoint_every=7"]).learner.checkpoint_every == 7
    assert compose([]).learner.checkpoint_every == 10
