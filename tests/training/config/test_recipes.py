"""Recipes: the published constants, deriving, and every way to mistype them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polyak.compare.config import CompareConfig
from polyak.compare.plan import make_plan
from polyak.errors import ConfigError, UnknownNameError
from polyak.nn.config import ModelConfig
from polyak.nn.cost import cost
from polyak.training.config import recipes
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig
from polyak.training.schedules import factor, in_decay

PAPER = ("paper-openwebtext", "paper-tinystories")
VARIANTS = ("adamw", "half-lr", "wsd", "sam", "sawd", "width-900", "depth-18")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(text, name)`: a recipe file in the test's folder; returns its path."""

    def make(text: str, name: str = "my.toml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return make


def test_all_recipes_are_there_and_load() -> None:
    expected = {*PAPER, *(f"{base}-{v}" for base in PAPER for v in VARIANTS), "quick", "small-owt"}
    assert set(recipes.names()) == expected
    for name in recipes.names():
        assert recipes.load(name).training.steps > 0


@pytest.mark.parametrize(
    ("name", "corpus", "steps", "muon_lr"),
    [
        ("paper-openwebtext", "openwebtext", 30_000, 0.004),
        ("paper-tinystories", "tinystories", 10_000, 0.02),
    ],
)
def test_the_papers_constants(name: str, corpus: str, steps: int, muon_lr: float) -> None:
    run = recipes.load(name)
    assert run == RunConfig(
        corpus=corpus,
        tokenizer="gpt2",
        model=ModelConfig(
            num_layers=12, num_heads=12, d_model=768, vocab_size=50_304, context_length=1024
        ),
        training=TrainingConfig(
            steps=steps,
            batch_size=480,
            micro_batch_size=12,
            muon_lr=muon_lr,
            adam_lr=6e-4,
            scalar_lr=3e-3,
            eval_every=100,
            eval_tokens=160 * 8 * 1024,
            seed=42,
        ),
    )
    assert run.training.warmup * steps == steps // 10
    assert factor(steps - 1, run.training) == pytest.approx(0.1, abs=1e-6)
    assert cost(run.model).total_parameters == 124_373_760


@pytest.mark.parametrize("base", PAPER)
def test_variants_change_only_what_they_are_named_for(base: str) -> None:
    plain = recipes.load(base)

    def changes(variant: str) -> dict[str, object]:
        run = recipes.load(f"{base}-{variant}")
        assert (run.corpus, run.tokenizer) == (plain.corpus, plain.tokenizer)
        return {
            field.name: getattr(new, field.name)
            for old, new in ((plain.model, run.model), (plain.training, run.training))
            for field in dataclasses.fields(old)
            if getattr(old, field.name) != getattr(new, field.name)
        }

    decay = {
        "schedule": "wsd",
        "decay_start": {30_000: 25 / 30, 10_000: 0.83}[plain.training.steps],
    }
    assert changes("adamw") == {"optimizer": "adamw", "scalar_lr": 6e-4}
    assert changes("half-lr") == {"muon_lr": plain.training.muon_lr / 2}
    assert changes("wsd") == decay
    assert changes("sam") == {"sam": "always"}
    assert changes("sawd") == {**decay, "sam": "decay"}
    assert changes("width-900") == {"d_model": 900}
    assert changes("depth-18") == {"num_layers": 18}
    assert plain.training.sam_rho == 0.05
    assert plain.model.rule == "gradient_descent"


@pytest.mark.parametrize(("base", "step"), [(PAPER[0], 25_000), (PAPER[1], 8_300)])
def test_wsd_decays_from_the_published_step_on(base: str, step: int) -> None:
    training = recipes.load(f"{base}-wsd").training
    assert not in_decay(step - 1, training)
    assert in_decay(step, training)


@pytest.mark.parametrize(
    ("variant", "parameters"), [("width-900", 162_857_700), ("depth-18", 166_850_304)]
)
def test_parameter_controls_have_the_published_size(variant: str, parameters: int) -> None:
    for base in PAPER:
        assert cost(recipes.load(f"{base}-{variant}").model).total_parameters == parameters


def test_quick_is_what_compare_trains(corpus: Path) -> None:
    plan = make_plan(CompareConfig(quick=True, corpus=str(corpus), device="cpu"))
    quick = recipes.load("quick")
    assert quick.training == plan.base.training
    assert quick.model == plan.entries[0].model
    assert (quick.corpus, quick.tokenizer) == (CompareConfig().corpus, CompareConfig().tokenizer)


def test_loading_a_recipe_imports_no_torch() -> None:
    program = (
        "import sys\nfrom polyak.training.config import recipes\n"
        "for name in recipes.names(): recipes.load(name)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "False"


# Deriving


def test_a_recipe_of_ones_own_derives_from_a_name_and_from_a_file_beside_it(
    write: Callable[..., str], tmp_path: Path
) -> None:
    write('base = "quick"\n[training]\nsteps = 7\nadam_betas = [0.8, 0.9]\n')
    second = write('base = "my.toml"\nthreads = 2\n[training]\nseed = 3\n', "second.toml")
    run = recipes.load(second)
    quick = recipes.load("quick")
    training = dataclasses.replace(quick.training, steps=7, seed=3, adam_betas=(0.8, 0.9))
    assert run == dataclasses.replace(quick, threads=2, training=training)


def test_the_vocabulary_follows_the_tokenizer_unless_it_is_set(write: Callable[..., str]) -> None:
    def load(text: str) -> int:
        return recipes.load(write(f'base = "quick"\n{text}')).model.vocab_size

    assert load("") == 256
    assert load('tokenizer = "bpe-1000"') == 1000
    assert load('tokenizer = "gpt2"') == 50_257
    assert load('tokenizer = "bpe-1000"\n[model]\nvocab_size = 1024') == 1024


def test_none_takes_back_what_a_base_sets(write: Callable[..., str]) -> None:
    text = 'base = "small-owt"\n[training]\nmicro_batch_size = "none"\n'
    assert recipes.load("small-owt").training.micro_batch_size == 24
    assert recipes.load(write(text)).training.micro_batch_size is None


def test_another_rule_takes_its_own_options_only(write: Callable[..., str]) -> None:
    base = write(
        'base = "quick"\n[model]\nrule = "triple_momentum"\nstream_start = "zeros"\n'
        '[model.rule_options]\nmu = 0.3\nfrozen = "mu"\n',
        "base.toml",
    )
    model = recipes.load(base).model
    assert model.rule_options == {"mu": 0.3, "frozen": "mu"}
    assert model.stream_start == "zeros"
    adam = recipes.load(write('base = "base.toml"\n[model]\nrule = "adam"\n')).model
    assert (adam.rule, adam.rule_options, adam.stream_start) == ("adam", {}, None)
    kept = recipes.load(write('base = "base.toml"\n[model.rule_options]\nmu = 0.4\n')).model
    assert kept.rule_options == {"mu": 0.4, "frozen": "mu"}


def test_a_preset_wins_over_the_base_and_loses_against_what_stands_beside_it(
    write: Callable[..., str],
) -> None:
    write('base = "quick"\n[model]\nnum_heads = 8\nnorm = "rms"\nbias = true\n', "base.toml")
    llama = recipes.load(write('base = "base.toml"\n[model]\nqk_norm = true\npreset = "llama"\n'))
    quick = recipes.load("quick").model
    shape = {n: getattr(quick, n) for n in ("num_layers", "d_model", "vocab_size")}
    length = {"context_length": quick.context_length}
    wanted = ModelConfig.preset("llama", num_heads=8, qk_norm=True, **shape, **length)
    assert llama.model == wanted
    assert llama.model.num_kv_heads == 2
    paper = recipes.load(write('base = "base.toml"\n[model]\npreset = "paper"\n')).model
    assert (paper.norm, paper.bias, paper.num_heads) == ("layer", False, 8)
    text = 'base = "base.toml"\n[model]\npreset = "momentum_transformer"\n'
    assert recipes.load(write(text)).model.rule.startswith("residual_momentum@attention+")
    assert recipes.load(write(text + 'rule = "adam"\n')).model.rule == "adam"
    write(HEAD + '[model]\nattention = "momentum"\nattention_options.mu = 0.3\n', "base.toml")
    for inside, kept in (("bias = true", {"mu": 0.3}), ('preset = "paper"', {})):
        model = recipes.load(write(f'base = "base.toml"\n[model]\n{inside}\n')).model
        assert (model.attention == "momentum") == bool(kept)
        assert model.attention_options == kept


# Mistakes

HEAD = 'base = "quick"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[model]\npreset = "lama"', "unknown model.preset 'lama'; did you mean 'llama'?"),
        ("[training]\nstep = 3", "unknown key 'training.step'; did you mean 'training.steps'?"),
        ("[training]\nmuonlr = 3", "did you mean 'training.muon_lr'?"),
        ("[training]\nd_model = 3", "did you mean 'model.d_model'?"),
        ("[model]\nnum_layer = 3", "did you mean 'model.num_layers'?"),
        ("[modle]\nnum_layers = 3", "unknown table 'modle'; did you mean 'model'?"),
        ("steps = 3", "unknown key 'steps'; did you mean 'training.steps'?"),
        ("copus = 'x'", "unknown key 'copus'; did you mean 'corpus'?"),
        ("[training]\nsteps = '600'", "training.steps='600' must be a whole number"),
        ("[training]\nsteps = 600.0", "training.steps=600.0 must be a whole number"),
        ("[training]\nsteps = true", "training.steps=True must be a whole number"),
        ("[training]\nmuon_lr = 'fast'", "training.muon_lr='fast' must be a number"),
        ("[training]\nadam_betas = 0.9", "training.adam_betas=0.9 must be a list of numbers"),
        ("[training]\nadam_betas = [0.9]", "adam_betas=(0.9,) must be two numbers"),
        ("[training]\nadam_betas = ['a']", "training.adam_betas='a' must be a number"),
        ("[training]\nskip_nonfinite = -1", "skip_nonfinite=-1 must be a whole number"),
        ("[training]\nschedule = 'cosin'", "'cosin'; did you mean 'cosine'?"),
        ("[training]\nschedule = 3", "training.schedule=3 must be text"),
        ("[training]\nsam = 'decay'", "sam='decay' needs a decay phase"),
        ("[training]\nmicro_batch_size = 3", "micro_batch_size=3 does not divide batch_size=8"),
        ("[model]\nnum_heads = 3", "num_heads=3 does not divide d_model=128"),
        ("[model]\nrule = 'adm'", "'adm'; did you mean 'adam"),
        ("[model]\nrule = 3", "model.rule=3 must be text"),
        ("[model]\nbias = 'yes'", "model.bias='yes' must be true or false"),
        ("[model.rule_options]\nmu = 0.3", "'mu'"),
        ("[model]\nrule_options = 3", "model.rule_options=3"),
        ("model = 3", "model=3 must be a table, [model]"),
        ("corpus = 3", "corpus=3 must be text"),
        ("tokenizer = 'bites'", "unknown tokenizer 'bites'; did you mean 'bytes'?"),
        ("device = 'gpu'", "unknown device 'gpu'"),
        ("[training\nsteps = 3", "not TOML: "),
        ("[training]\nsteps = 3\nsteps = 4", "not TOML: "),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_it(
    text: str, says: str, write: Callable[..., str]
) -> None:
    path = write(HEAD + text)
    with pytest.raises(ConfigError) as found:
        recipes.load(path)
    message = str(found.value)
    assert says in message
    assert message.startswith(f"recipe {path}: ")
    assert "\n" not in message


def test_unknown_recipes_and_bases_offer_the_nearest(write: Callable[..., str]) -> None:
    with pytest.raises(UnknownNameError, match="'quik'; did you mean 'quick'"):
        recipes.load("quik")
    with pytest.raises(UnknownNameError, match="there is no such file"):
        recipes.load("nowhere.toml")
    with pytest.raises(UnknownNameError, match=r"my.toml: base: .*did you mean 'small-owt'"):
        recipes.load(write('base = "smal-owt"'))
    with pytest.raises(UnknownNameError, match=r"my.toml: base: .*there is no such file"):
        recipes.load(write('base = "nowhere.toml"'))
    with pytest.raises(ConfigError, match="base=3 must be text"):
        recipes.load(write("base = 3"))


def test_a_mistake_in_a_base_names_both_files(write: Callable[..., str]) -> None:
    write("[training]\nstep = 3", "below.toml")
    with pytest.raises(UnknownNameError, match=r"my.toml: base: recipe below.toml: unknown key"):
        recipes.load(write('base = "below.toml"'))


def test_cycles_are_refused(write: Callable[..., str]) -> None:
    write('base = "b.toml"', "a.toml")
    path = write('base = "a.toml"', "b.toml")
    with pytest.raises(ConfigError, match=r"derives from itself \(b.toml → a.toml → b.toml\)"):
        recipes.load(path)
    own = write('base = "own.toml"', "own.toml")
    with pytest.raises(ConfigError, match=r"derives from itself \(own.toml → own.toml\)"):
        recipes.load(own)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        recipes.load(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b'corpus = "\xe9t\xe9"')
    with pytest.raises(ConfigError, match="not TOML"):
        recipes.load(str(tmp_path / "latin.toml"))


def test_a_file_without_the_ending_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text('base = "quick"')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"needs the ending .toml, or ./mine"):
        recipes.load("mine")
    assert recipes.load("./mine") == recipes.load("quick")
