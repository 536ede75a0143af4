"""Settings: what they resolve to, and what is refused."""

import dataclasses
import re

import pytest

from tests.conftest import ROOT
from train_adam import AdamConfig
from train_sophiag import SophiaConfig
from training.config import TrainConfig, describe, load_config
from training.errors import UserError
from training.optimizers import FIRST_ORDER, SECOND_ORDER
from training.run import _accumulation

CONFIGS = sorted((ROOT / "config").glob("[!_]*.py"))


def config_class(path):
    """That of the script in the command of the file's header, which has to name this file."""
    scripts = set(re.findall(rf"(train_\w+)\.py config/{re.escape(path.name)}", path.read_text(encoding="utf-8")))
    assert len(scripts) == 1, f"{path}: {scripts or 'no command'}"
    return {"train_adam": AdamConfig, "train_sophiag": SophiaConfig}[scripts.pop()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_under_the_script_that_it_names(path, capsys):
    config = load_config(config_class(path), [str(path)])
    assert config.total_bs % config.batch_size == 0, "a config must run on one device as it is"
    assert not capsys.readouterr().err, "a setting that the run does not read"


@pytest.mark.parametrize(
    "ranks, argv",
    [  # the commands of the official README, with the file names they use
        (10, ["config/train_gpt2_small_sophiag.py", "--batch_size=8", "--gradient_accumulation_steps=6"]),
        (8, ["config/train_gpt2_small_sophiag.py", "--batch_size=12", "--gradient_accumulation_steps=5"]),
        (10, ["config/train_gpt2_small_adam.py", "--batch_size=8", "--gradient_accumulation_steps=6"]),
        (8, ["config/train_gpt2_medium_sophiag.py", "--batch_size=6", "--gradient_accumulation_steps=10"]),
        (8, ["config/train_gpt2_medium_adam.py", "--batch_size=6", "--gradient_accumulation_steps=10"]),
    ],
)
def test_official_commands_resolve_to_480_sequences(ranks, argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(config_class(ROOT / argv[0]), argv)
    assert config.batch_size * _accumulation(config, ranks) * ranks == 480
    assert config.total_bs * config.block_size == 491_520


@pytest.mark.parametrize(
    "size, shape, adam, sophia",
    [
        ("30m", (6, 6, 384), None, None),
        ("small", (12, 12, 768), 6e-4, (6e-4, 0.05)),
        ("medium", (24, 16, 1024), 3e-4, (7e-4, 0.08)),
        ("large", (36, 20, 1280), 2e-4, (3e-4, 0.05)),
        ("xl", (48, 25, 1600), None, None),
    ],
)
def test_published_settings(size, shape, adam, sophia):
    a = load_config(AdamConfig, [str(ROOT / f"config/train_gpt2_{size}_adam.py")])
    s = load_config(SophiaConfig, [str(ROOT / f"config/train_gpt2_{size}_sophiag.py")])
    for config in (a, s):
        assert (config.n_layer, config.n_head, config.n_embd) == shape
        assert (config.max_iters, config.warmup_iters, config.grad_clip) == (100_000, 2000, 1.0)
        assert config.min_lr == pytest.approx(0.05 * config.learning_rate)
    assert (a.beta1, a.beta2, a.weight_decay) == (0.9, 0.95, 0.1)
    assert (s.beta1, s.beta2, s.hess_interval) == (0.965, 0.99, 10)
    if adam:
        assert a.learning_rate == adam
        assert (s.learning_rate, s.rho) == sophia
        assert s.weight_decay == 0.2


def test_later_words_win_and_types_are_kept(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("import math\nfrom pathlib import Path\n_base = 4\nbatch_size = 2 * _base\nlearning_rate = 1\n")
    config = load_config(SophiaConfig, ["--batch_size=3", str(file), "--total_bs=16", "--interval=7", "--compile=true"])
    assert (config.batch_size, config.total_bs, config.hess_interval, config.compile) == (8, 16, 7, True)
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float
    assert config.hess_bs == 4, "a quarter of total_bs"


def test_eval_iters_keeps_nanogpts_meaning():
    assert load_config(AdamConfig, ["--eval_iters=200", "--batch_size=8"]).eval_tokens == 200 * 8 * 1024


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learnig_rate=1"], "learning_rate"),
        (["--batch_size=many"], "whole number"),
        (["--batch_size=1.5"], "whole number"),
        (["--batch_size=0"], "at least 1"),
        (["--learning_rate=fast"], "a number"),
        (["--learning_rate=nan"], "learning_rate"),
        (["--seed=" + "9" * 5000], "a whole number"),
        (["--max_iters=" + "9" * 30], "below 2**63"),
        (["--dropout=1.0"], "below 1.0"),
        (["--compile=yes"], "True or False"),
        (["--compile"], "--compile=VALUE"),
        (["--optimizer_name=adam"], "sophiag"),
        (["--rho=0"], "above 0.0"),
        (["--n_embd=100", "--n_head=3"], "n_embd=100 and n_head=3; change one of them"),
        (["--warmup_iters=10", "--max_iters=5"], "warmup_iters"),
        (["--hess_bs=481"], "total_bs = 480"),
        (["--init_from=import:ckpt.pt", "--sophia_start_iter=5"], "sophia_start_iter at 0"),
        (["no_such_file.py"], "no_such_file.py"),
        (["config"], "config is a folder, not a file with settings"),
        (["--optimizer_name=muon"], "one of sophiag, sophiah, sophia_muon; train_adam.py has it"),
        (["--lr=1e-3"], "the nearest is 'min_lr'"),
        (["--eval_tokens=999", "--eval_iters=2"], "leave one of them out, or add --eval_iters=None"),
        (["--hess_warmup=5"], "hess_warmup has no effect with sophia_start_iter = 0"),
        (["--optimizer_name=sophia_muon", "--beta2=0.9"], "beta2 has no effect"),
        (["--momentum=0.9"], "train_sophiag.py has no setting 'momentum'; its --help lists all"),
    ],
)
def test_bad_settings_are_one_sentence(argv, message):
    with pytest.raises(UserError) as error:
        load_config(SophiaConfig, argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["eigenbasis", "spectral"])
@pytest.mark.parametrize("cls", [AdamConfig, SophiaConfig])
def test_a_removed_setting_says_what_replaced_it_unless_it_is_off(cls, name, tmp_path):
    on, off = tmp_path / "on.py", tmp_path / "off.py"
    on.write_text(f"{name} = True\n")
    off.write_text(f"{name} = False\n")
    for word in (f"--{name}=True", f"--{name}", str(on)):
        with pytest.raises(UserError, match=rf"{name} was replaced by whitened_muon .* sophia_muon .* efa612d"):
            load_config(cls, [word])
    assert load_config(cls, [f"--{name}=False", str(off)]) == load_config(cls, [])
    with pytest.raises(UserError, match=r"sophiag_spectral.py was replaced by whitened_muon"):
        load_config(cls, ["config/train_gpt2_30m_sophiag_spectral.py"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("batch_sise = 4", "batch_size"),
        ("batch_size = 4.0", "wants int, got float"),
        ("compile = 1", "wants bool"),
        ("batch_size = [4]", "wants int"),
        ("batch_size = = 4", "SyntaxError"),
        ("batch_size = 1 // 0", "ZeroDivisionError"),
        ("max_iters = 10**5000", r"below 2\*\*63"),
        ("learning_rate = 10**400", r"below 2\*\*63"),
        ("max_iters = 1e3", r"c.py: max_iters = 1000.0: wants int"),
        ("batch_size: 8\nmax_iters = 9", "batch_size: assigns nothing"),
        ("batch_size: 8\nlearning_rate: 1e-3", "assigns nothing"),
        ("def learning_rate():\n    return 1", "learning_rate = <function"),
    ],
)
def test_bad_config_files_are_one_sentence(tmp_path, text, message):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(SophiaConfig, [str(file)])


def test_numbers_that_do_not_multiply_are_named():
    config = TrainConfig(total_bs=480, batch_size=8, gradient_accumulation_steps=5)
    with pytest.raises(UserError, match=r"batch_size 8 x gradient_accumulation_steps 5 x 10 ranks = 400.*=6"):
        _accumulation(config, 10)
    with pytest.raises(UserError, match="batch_size can be 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60"):
        _accumulation(TrainConfig(total_bs=480, batch_size=7), 8)
    with pytest.raises(UserError, match="multiple of 7"):
        _accumulation(TrainConfig(total_bs=480, batch_size=1), 7)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        load_config(SophiaConfig, ["--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name, *_ in describe(SophiaConfig)) and "torchrun" in printed


@pytest.mark.parametrize(
    "argv, culprit, remedy",
    [
        (["--momentum=0.8"], "momentum = 0.8 has no effect with optimizer_name = 'adamw'", "'sgd' or 'muon'"),
        (["--optimizer_name=muon", "--whiten_exponent=0.25"], "whiten_exponent", "to 'whitened_muon'."),
        (["--optimizer_name=sgd", "--beta2=0.9"], "beta2 = 0.9", "or 'muon' or 'whitened_muon'."),
        (["--wsd_decay=0.5"], "wsd_decay", "set lr_schedule to 'wsd' or 'wsd_sqrt'"),
        (["--lr_schedule=linear", "--restart_iters=5"], "restart_iters", "'cosine_restarts'"),
        (["--lr_schedule=constant", "--min_lr=1e-5"], "min_lr", "set lr_schedule to 'cosine' or 'linear'"),
        (["--decay_lr=False", "--lr_schedule=wsd"], "lr_schedule = 'wsd'", "set decay_lr to True"),
        (["--decay_lr=False", "--min_lr=1e-5"], "min_lr = 1e-05 has no effect with decay_lr", "set decay_lr to True"),
        (["--lr_schedule=constant", "--lr_decay_iters=9000"], "lr_decay_iters = 9000", "set lr_schedule to 'cosine'"),
        (["--fsdp_keep=all"], "fsdp_keep = 'all' has no effect with fsdp = False", "set fsdp to True"),
        (["--fsdp_shard=2"], "fsdp_shard = 2", "set fsdp to True"),
    ],
)
def test_a_setting_that_the_run_would_not_read_is_refused(argv, culprit, remedy):
    with pytest.raises(UserError) as error:
        load_config(AdamConfig, argv)
    assert culprit in str(error.value) and remedy in str(error.value)


def test_an_unread_setting_of_a_config_file_is_one_warning(tmp_path, capsys):
    (tmp_path / "config.py").write_text("optimizer_name = 'sgd'\nmomentum = 0.8\nbeta2 = 0.5\n")
    load_config(AdamConfig, [str(tmp_path / "config.py"), "--optimizer_name=adamw"])
    assert "momentum" in (warning := capsys.readouterr().err) and "beta2" not in warning
    load_config(AdamConfig, [str(tmp_path / "config.py")])
    assert "beta2" in (warning := capsys.readouterr().err) and "momentum" not in warning


def test_a_config_file_that_undoes_the_command_line_is_one_warning(tmp_path, capsys):
    (tmp_path / "config.py").write_text("batch_size = 8\ntotal_bs = 16\n")
    words = ["--batch_size=4", "--total_bs=16", str(tmp_path / "config.py")]
    config = load_config(AdamConfig, words)
    assert config.batch_size == 8 and config.given == set()
    warning = capsys.readouterr().err
    assert "config.py comes after --batch_size=4 and sets it to 8" in warning and warning.count("\n") == 1
    assert load_config(AdamConfig, words[::-1]).batch_size == 4 and not capsys.readouterr().err


@pytest.mark.parametrize("text, warnings", [('{"batch_size": 8}', 1), ("# batch_size = 8", 1), ("batch_size = 12", 0)])
def test_a_config_file_that_assigns_nothing_is_one_warning(tmp_path, capsys, text, warnings):
    (tmp_path / "config.json").write_text(text)
    assert load_config(AdamConfig, [str(tmp_path / "config.json")]).batch_size == 12
    assert capsys.readouterr().err.count("warning: ") == warnings


@pytest.mark.parametrize("key, before", [("out_dir", ""), ("init_from", "ckpt:"), ("init_from", "hf:")])
def test_a_tilde_is_the_home_folder_as_in_a_shell(tmp_path, monkeypatch, key, before):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(load_config(AdamConfig, [f"--{key}={before}~/x"]), key) == f"{before}{tmp_path}/x"
    assert load_config(AdamConfig, ["--init_from=resume", "--checkpoint=~/c.pt"]).checkpoint == f"{tmp_path}/c.pt"


@pytest.mark.parametrize(
    "argv, late",
    [
        (["--block_size_schedule=0:128,10:1024"], "block_size_schedule"),
        (["--sophia_start_iter=10"], "sophia_start_iter"),
        (["--lr_decay_iters=11"], ""),
        (["{file}"], "lr_decay_iters"),
        (["{file}", "--lr_schedule=constant"], ""),
        (["--block_size_schedule=0:128,9:1024", "--sophia_start_iter=9"], ""),
    ],
)
def test_a_change_that_the_run_never_reaches_is_one_warning(tmp_path, capsys, argv, late):
    (tmp_path / "config.py").write_text("lr_decay_iters = max_iters = 11\n")
    argv = [word.format(file=tmp_path / "config.py") for word in argv]
    load_config(SophiaConfig, [*argv, "--max_iters=10", "--warmup_iters=1"])
    warning = capsys.readouterr().err
    assert late in warning and warning.count("warning: the run ends at max_iters = 10") == bool(late)


def test_no_value_is_advised_that_the_script_does_not_have():
    with pytest.raises(UserError, match=r"optimizer_name = 'sophia_muon'; leave it out\.$"):
        load_config(SophiaConfig, ["--optimizer_name=sophia_muon", "--whiten_interval=3"])


def test_every_need_names_a_setting_and_possible_values():
    for cls in (AdamConfig, SophiaConfig):
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for field in fields.values():
            name, values = field.metadata.get("needs", ("optimizer_name", ()))
            choices = FIRST_ORDER + SECOND_ORDER if name == "optimizer_name" else fields[name].metadata.get("choices")
            assert all(value in (choices or (True, False)) for value in values), field.name


def test_no_name_for_out_dir_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="out_dir = ''"):
        load_config(SophiaConfig, ["--out_dir="])


@pytest.mark.parametrize("name", ["out_dir", "dataset", "wandb_run_name"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    (tmp_path / "config.py").write_text(f"{name} = 'a\\0b'")
    with pytest.raises(UserError, match=name):
        load_config(SophiaConfig, [str(tmp_path / "config.py")])
