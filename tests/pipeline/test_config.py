"""Recipes: composed, validated, and refused with the setting, what was expected and what to do."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import UserError
from vitscale.pipeline.config import Config
from vitscale.pipeline.recipe import load_recipe, to_yaml

SHIPPED = Path(__file__).parents[2] / "launch" / "recipes"
GOLDEN = Path(__file__).parents[1] / "golden" / "recipes"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_recipes_resolve_to_their_golden_files(recipe: str) -> None:
    """A change here is a change of somebody's results: `vitscale recipe show NAME > tests/golden/recipes/NAME.yaml`."""
    resolved = to_yaml(load_recipe(recipe, [], SHIPPED))
    assert resolved == (GOLDEN / f"{recipe}.yaml").read_text()


def test_a_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    config = load_recipe("digits-demo-finetune", ["engine.deepspeed.wall_clock_breakdown=true", "run.seed=3"], SHIPPED)
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    assert load_recipe(str(tmp_path / "recipe.yaml"), [], SHIPPED) == config


def test_overrides_win_over_the_recipe_and_the_recipe_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: {lr: 1, weight_decay: 2}\nrun: {seed: 5}")
    (tmp_path / "b.yaml").write_text("base: a\noptim: {lr: 3}")
    config = load_recipe(str(tmp_path / "b.yaml"), ["run.seed=7", "optim.beta1=1e-3"], SHIPPED)
    assert (config.optim.lr, config.optim.weight_decay, config.run.seed, config.optim.beta1) == (3, 2, 7, 1e-3)
    assert config.optim.beta2 == Config().optim.beta2


@pytest.mark.parametrize(
    ("override", "setting", "said"),
    [
        ("optim.lrr=1", "optim.lrr", "'optim.lr'"),
        ("modle.img_size=32", "modle.img_size", "'model.img_size'"),
        ("global_batch=32", "global_batch", "'train.global_batch'"),
        ("optim=3", "optim", "optim.SETTING=VALUE"),
        ("optim.lr=fast", "optim.lr", "Float"),
        ("optim.lr=-1", "optim.lr", "above 0"),
        ("optim.lr=null", "optim.lr", "None"),
        ("augment.crop=resize", "augment.crop", "'resized'"),
        ("model.img_size=33", "model.img_size", "32 or 36"),
        ("engine.zero_stage=4", "engine.zero_stage", "0, 1, 2 or 3"),
        ("engine.dtype=fp8", "engine.dtype", "bf16"),
        ("train.global_batch=0", "train.global_batch", "at least 1"),
        ("lr", "override", "optim.lr=1e-3"),
        ("=3", "override", "optim.lr=1e-3"),
        ("model.name=[", "override", "SETTING=VALUE"),
        ("run.dir=${oc.env:NOT_SET_ANYWHERE}", "run.dir", "NOT_SET_ANYWHERE"),
    ],
)
def test_refusals(override: str, setting: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("digits-demo", [override], SHIPPED)
    assert error.value.setting == setting
    assert said in str(error.value)


def test_nothing_behind_the_sign_is_an_empty_text() -> None:
    assert load_recipe("digits-demo", ["data.dev=2%", "data.dev=", "run.wandb="], SHIPPED).data.dev == ""
    assert load_recipe("digits-demo", ["data.dev=", "data.dev=2%"], SHIPPED).data.dev == "2%"
    with pytest.raises(UserError, match=r"^optim\.lr: got Value ''"):
        load_recipe("digits-demo", ["optim.lr="], SHIPPED)


def test_bf16_needs_partitioned_masters() -> None:
    with pytest.raises(UserError, match=r"engine.zero_stage=1"):
        load_recipe("digits-demo", ["engine.dtype=bf16", "engine.zero_stage=0"], SHIPPED)


def test_missing_and_broken_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'digits-demo'"):
        load_recipe("digit-demo", [], SHIPPED)
    (tmp_path / "loop.yaml").write_text("base: loop")
    with pytest.raises(UserError, match="loop → loop"):
        load_recipe(str(tmp_path / "loop.yaml"), [], SHIPPED)
    (tmp_path / "bad.yaml").write_text("optim: {lr: 1")
    with pytest.raises(UserError, match="a YAML file"):
        load_recipe(str(tmp_path / "bad.yaml"), [], SHIPPED)
    for text in ("- 1", "", " \n"):  # empty: what a full disk leaves
        (tmp_path / "list.yaml").write_text(text)
        with pytest.raises(UserError, match="sections"):
            load_recipe(str(tmp_path / "list.yaml"), [], SHIPPED)


@pytest.mark.parametrize(
    ("text", "setting", "got"),
    [
        ("optim: {lrr: 1}", "optim.lrr", "a setting that does not exist"),
        ("optim: {lr: high}", "optim.lr", "Value 'high'"),
        ("optim: {lr: -3}", "optim.lr", "-3.0"),
        ("optim: {lr: .inf}", "optim.lr", "inf"),
        ("optim: 3", "optim", "3"),
    ],
)
def test_the_file_that_is_wrong_is_named(tmp_path: Path, text: str, setting: str, got: str) -> None:
    (tmp_path / "under.yaml").write_text(text)
    (tmp_path / "over.yaml").write_text("base: under\noptim: {clip: 0.5}")
    with pytest.raises(UserError) as error:
        load_recipe(str(tmp_path / "over.yaml"), ["optim.clip=1"], SHIPPED)
    assert error.value.setting == setting
    assert str(error.value.got).startswith(got)
    assert str(error.value.got).endswith(f" in {tmp_path / 'under.yaml'}")


@given(st.text(max_size=30))
def test_no_override_ends_in_anything_but_a_refusal(text: str) -> None:
    with contextlib.suppress(UserError):
        assert load_recipe("digits-demo", [f"optim.lr={text}", text], SHIPPED).optim.lr > 0
