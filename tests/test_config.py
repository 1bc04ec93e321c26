"""Configurations: typed, strict, overridden key by key."""

from pathlib import Path

import pytest

from sparqle_jax.config import read_config

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


def test_every_configuration_in_the_repository_is_valid():
    for file in TINY.parent.glob("*.py"):
        read_config(file)


def test_overrides_reach_any_depth_and_keep_their_types():
    config = read_config(
        TINY,
        [
            "stage2.optim.lr=1e-4",
            "stage1=null",
            "adapter.num_queries=8",
            'eval_languages=["fr"]',
            "run=elsewhere",
            'stage2.tasks={"transcribe": 1, "fr": 0.5}',
            "data.valid.mine=some/folder",
        ],
    )
    assert config.stage2.optim.lr == 1e-4
    assert config.stage1 is None
    assert config.adapter.num_queries == 8
    assert config.eval_languages == ("fr",)
    assert config.run == Path("elsewhere")
    assert config.stage2.tasks == {"transcribe": 1.0, "fr": 0.5}
    assert config.data.valid["mine"] == "some/folder"
    assert config.stage2.optim.warmup_steps == read_config(TINY).stage2.optim.warmup_steps


def test_a_folder_alone_is_an_encoder():
    encoder = read_config(TINY, ["encoder=somewhere", "encoder.layer_mix=true", "data.frames=null"]).encoder
    assert (encoder.folder, encoder.layer_mix) == (Path("somewhere"), True)
    with pytest.raises(ValueError, match="layer_mix it trains: set data"):
        read_config(TINY, ["encoder.layer_mix=true"])


def test_training_data_are_a_folder_or_a_mixture():
    assert read_config(TINY, ["data.train=gs://bucket/data"]).data.train["train"].folder == "gs://bucket/data"
    mixture = '{"a": {"folder": "A", "weight": 2}, "b": {"folder": "B", "weight": 1, "tasks": {"de": 1}}}'
    data = read_config(TINY, [f"data.train={mixture}", "data.buckets=[1.5, 3]"]).data
    assert (data.train["a"].weight, data.train["b"].tasks) == (2.0, {"de": 1.0})
    assert data.buckets == (1.5, 3.0)
    assert read_config(TINY, ["data.buckets=3"]).data.buckets == 3


def test_a_written_configuration_reads_back(tmp_path):
    config = read_config(TINY, ["seed=7"])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage2.optim.learning_rate=1", "no such key; valid here: lr, schedule"),
        ("stage3.steps=1", "no such key; valid here: run, mesh"),
        ("stage2.optim.lr=fast", "stage2.optim.lr: Input should be a valid number.*'fast'"),
        ("stage2.optim.lr=-1", "stage2.optim.lr: Input should be greater than 0"),
        ("stage2.steps=1.5", "stage2.steps"),
        ("seed.x=1", "seed has no keys"),
        ("seed", "write key=value"),
        ('stage1.losses=["stx"]', "stage1.losses.0"),
        ("stage1.losses=[]", "stage1.losses: Tuple should have at least 1 item"),
        ("stage2.tasks={}", "stage2.tasks: Dictionary should have at least 1 item"),
        ('stage2.steps="100"', "stage2.steps: Input should be a valid integer"),
        ("data.buckets=0", "data.buckets"),
        ("data.skip_corrupt=true", "with skip_corrupt, set frames to null"),
        ('data.train={"a": {"folder": "A", "weight": 1}, "b": {"folder": "B"}}', r"not for \['b'\]"),
        ("data.train={}", "data.train: Dictionary should have at least 1 item"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed=true", "seed: Input should be a valid integer"),
        ("stage2.optim.b1=2", "stage2.optim.b1: Input should be less than 1"),
        ("adapter.hidden=3", "no such key; valid here: hidden_size, num_hidden_layers"),
        ("adapter.num_queries=1.5", "adapter.*num_queries: Input should be a valid integer"),
        ("adapter.num_queries.x=1", "adapter.num_queries has no keys"),
        ("adapter.kind=telepathy", "adapter: Input tag 'telepathy' .* expected tags: .*'qformer'"),
        ("adapter.sizes.num_queries=3", "adapter.sizes: it is now the adapter's own fields"),
        ("adapter.start=x", "adapter.start: it is now init_from"),
        ("adapter.tokenizer=x", "it is now stage1.tokenizer"),
        ("adapter.features=3", "it is now stage1.embed_dim"),
        ("encoder.layer=3", "no such key; valid here: layer_mix, pad_to_window, folder"),
    ],
)
def test_an_override_that_is_not_right_says_what_is(override, message):
    with pytest.raises(ValueError, match=message):
        read_config(TINY, [override])


def test_a_run_that_would_train_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing would be trained"):
        read_config(TINY, ["stage1=null", "stage2=null"])
    with pytest.raises(ValueError, match=r"stage1\.tokenizer"):
        read_config(TINY, ["stage1.tokenizer=null"])
    with pytest.raises(FileNotFoundError):
        read_config("configs/none.py")


def test_a_file_without_a_configuration_says_what_it_needs(tmp_path):
    (tmp_path / "config.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"config\.py .* has no function get_config"):
        read_config(tmp_path / "config.py")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('DataConfig(train="x", test={"a": "b"})', "test: it is now data.valid"),
        ("OptimConfig(final_lr=0.1)", "final_lr: it is now stage1.optim.final_lr_factor"),
        ("Stage2Config(steps=1, batch_size=1, test_every=2)", "test_every: it is now stage1.eval_every"),
        ("AdapterConfig(start=1)", "the adapter is now one of adapters.Config"),
    ],
)
def test_old_names_in_a_file_are_refused_with_the_new_ones(old, new, tmp_path):
    name = old.partition("(")[0]
    file = tmp_path / "config.py"
    file.write_text(f"from sparqle_jax.config import {name}\n\n\ndef get_config():\n    return {old}\n")
    with pytest.raises(ValueError, match=new):
        read_config(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data.test={}", "data.test: it is now data.valid"),
        ("margin=1", "margin: it is now speech_pad"),
        ("stage2.test_every=5", "it is now stage2.eval_every"),
        ("stage1.optim.final_lr=5", "it is now stage1.optim.final_lr_factor"),
        ("test_languages=[]", "it is now eval_languages"),
    ],
)
def test_old_names_are_refused_with_the_new_ones(old, new):
    with pytest.raises(ValueError, match=new):
        read_config(TINY, [old])
