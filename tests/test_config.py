"""Config: precedence, dotted keys, strict types, and sentences with a way out."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ssod.config import MODES, TrainConfig, cfg_folders, default_yaml, load_config, merge, parse_words, to_yaml
from ssod.errors import UserError


def train(*words: str) -> TrainConfig:
    return load_config("train", parse_words(words))


def test_precedence_is_defaults_base_cfg_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("batch: 2\nlr0: 0.1\nimgsz: 320\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nlr0: 0.2\nimgsz: 480\n")
    config = train(f"cfg={tmp_path / 'own.yaml'}", "imgsz=512")
    assert (config.momentum, config.batch, config.lr0, config.imgsz) == (0.9, 2, 0.2, 512)


def test_words_come_in_any_order_and_form() -> None:
    config = train("--batch", "4", "lr0=1e-3", "--verbose", "--max-det=7", "milestones=[0.5, 0.9]")
    assert (config.batch, config.lr0, config.verbose, config.max_det) == (4, 1e-3, True, 7)
    assert config.milestones == [0.5, 0.9]


def test_dotted_keys_reach_into_sections() -> None:
    config = train("strategy.tau=0.8", "augment.strong=strong_geo")
    assert config.strategy.name == "mean_teacher"
    assert config.strategy.options == {"tau": 0.8}
    assert config.augment.strong == "strong_geo"
    assert config.augment.weak == "weak"


@pytest.mark.parametrize("words", [["strategy=rpl", "strategy.g=1"], ["strategy.g=1", "strategy=rpl"]])
def test_name_and_options_of_a_component_come_in_any_order(words: list[str]) -> None:
    config = train(*words)
    assert (config.strategy.name, config.strategy.options) == ("rpl", {"g": 1})


def test_another_component_drops_the_options_of_the_old_one() -> None:
    low = {"strategy": {"name": "mean_teacher", "tau": 0.5}}
    assert merge(low, {"strategy": "supervised"})["strategy"] == {"name": "supervised"}
    assert merge(low, {"strategy": "mean_teacher"})["strategy"] == {"name": "mean_teacher", "tau": 0.5}


def test_the_later_of_iters_and_epochs_wins_and_both_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("iters: 180000\n")
    config = train(f"cfg={tmp_path / 'long.yaml'}", "epochs=3")
    assert (config.iters, config.epochs) == (None, 3)
    with pytest.raises(UserError, match="give one of them"):
        train("iters=5", "epochs=3")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("epoch=100", r"'epoch' is not a valid argument. Did you mean epochs\?"),
        ("augment.stron=x", r"'augment.stron' is not a valid argument. Did you mean augment.strong=strong\?"),
        ("batch=2.5", r"batch=2.5 does not fit: .*integer"),
        ("batch=eight", r"batch='eight' does not fit"),
        ("batch=true", r"batch=True does not fit"),
        ("batch=0", r"batch=0 does not fit: .*greater than or equal to 1"),
        ("lr0=-1", r"lr0=-1 does not fit: .*greater than 0"),
        ("optimizer=sdg", r"optimizer='sdg' does not fit: .*'sgd' or 'adamw'"),
        ("milestones=[0.9, 0.5]", r"rising shares"),
        ("nonsense", r"'nonsense' is not an argument"),
        ("=3", r"'=3' is not an argument"),
        ("cfg=coc10", r"there is no YAML 'coc10'"),
        ("cfg=dem.yaml", r"Did you mean 'demo.yaml'"),
    ],
)
def test_a_mistake_gets_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        train(word)
    assert "\n" not in str(caught.value)


def test_a_missing_value_names_its_meaning() -> None:
    with pytest.raises(UserError, match="'model' is missing: checkpoint"):
        load_config("predict", {"source": "x"})


@pytest.mark.fault(28)
def test_yaml_with_python_tags_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    evil, witness = tmp_path / "evil.yaml", tmp_path / "witness"
    evil.write_text(f"batch: !!python/object/apply:os.mkdir ['{witness}']\n")
    yaml.unsafe_load(evil.read_text())  # the file really does what it says it does
    assert witness.is_dir()
    witness.rmdir()
    with pytest.raises(UserError, match=r"evil.yaml line 1 is not plain YAML"):
        train(f"cfg={evil}")
    assert not witness.exists()


@pytest.mark.parametrize("text", ["a: [1\n", "- 1\n", "just text", "1: 2\n", "\x00", "a: 1\n\ta: 2\n"])
def test_broken_yaml_gets_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        train(f"cfg={tmp_path / 'broken.yaml'}")


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match=r"its own `base:` \(a.yaml -> b.yaml -> a.yaml\)"):
        train(f"cfg={tmp_path / 'a.yaml'}")


def test_the_default_yaml_is_what_the_code_says() -> None:
    path = cfg_folders()[-1] / "default.yaml"
    assert path.read_text() == default_yaml(), "write ssod.config.default_yaml() into cfg/default.yaml"
    assert train("cfg=default.yaml") == train()


@pytest.mark.parametrize("path", [p for d in cfg_folders()[:1] for p in d.glob("*.yaml")], ids=lambda p: p.name)
def test_every_yaml_of_the_package_is_a_valid_config(path: Path) -> None:
    load_config("train", {"cfg": str(path)})


def test_a_config_survives_its_own_yaml(tmp_path: Path) -> None:
    config = train("cfg=demo.yaml", "strategy.tau=0.3", "seed=7")
    (tmp_path / "args.yaml").write_text(to_yaml(config))
    assert train(f"cfg={tmp_path / 'args.yaml'}") == config


def test_a_training_recipe_also_serves_the_other_modes() -> None:
    config = load_config("val", {"cfg": "demo.yaml", "model": "x.pt"})
    assert config.data == "shapes"


@given(st.lists(st.text(max_size=20), max_size=4), st.sampled_from(list(MODES)))
def test_any_words_give_a_config_or_one_sentence(words: list[str], mode: str) -> None:
    with contextlib.suppress(UserError):  # anything else escapes and fails
        load_config(mode, parse_words(words))


@given(
    st.dictionaries(
        st.sampled_from(sorted(TrainConfig.model_fields)),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers())),
        max_size=5,
    )
)
def test_any_values_give_a_config_or_one_sentence(values: dict[str, object]) -> None:
    with contextlib.suppress(UserError):
        load_config("train", values)
