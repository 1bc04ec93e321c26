import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from sparqle_jax import pretrained, tables
from sparqle_jax.adapters.qformer import Adapter as QFormer
from sparqle_jax.encoders import hubert as hubert_module
from sparqle_jax.encoders.hubert import Config as HubertConfig
from sparqle_jax.llms import decoder
from sparqle_jax.llms.decoder import LLM as Decoder
from sparqle_jax.llms.decoder import Config as DecoderConfig
from sparqle_jax.published import sparqle as published
from sparqle_jax.sharding import make_mesh
from sparqle_jax.tensors import Tensor, open_checkpoint
from tests.conftest import assert_same_parameters, part_of
from tests.memory import measure


def write_folder(folder, config: dict, tensors: dict):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def stage1(tiny):
    return load_file(tiny.folder / "stage1_state_dict.safetensors")


@pytest.fixture(scope="module")
def stage2(tiny):
    return load_file(tiny.folder / "stage2_state_dict.safetensors")


@pytest.fixture
def hubert(tiny, stage2):
    """(config, tensors) of a HubertModel as transformers saves it."""
    return {"model_type": "hubert", **tiny.config["hubert"]}, part_of(stage2, "speech_encoder.")


@pytest.fixture
def llama(tiny, stage2):
    return tiny.config["llm"], part_of(stage2, "llama_model.")


class TestFolders:
    def test_hubert(self, tmp_path, hubert, sparqle):
        loaded = pretrained.load_encoder(write_folder(tmp_path / "hubert", *hubert))
        assert_same_parameters(loaded, sparqle.encoder)

    def test_a_head_around_it_and_the_old_spelling_of_weight_norm(self, tmp_path, hubert, sparqle):
        config, tensors = hubert
        conv = "encoder.pos_conv_embed.conv."
        tensors[conv + "weight_g"] = tensors.pop(conv + "parametrizations.weight.original0")
        tensors[conv + "weight_v"] = tensors.pop(conv + "parametrizations.weight.original1")
        tensors = {f"hubert.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"lm_head.weight": np.zeros((3, 4)), "hubert.masked_spec_embed": np.zeros(4)}
        loaded = pretrained.load_encoder(write_folder(tmp_path / "hubert", config, tensors))
        assert_same_parameters(loaded, sparqle.encoder)

    def test_several_files(self, tmp_path, llama, sparqle):
        config, tensors = llama
        folder = write_folder(tmp_path / "llm", config, tensors)
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        index = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert_same_parameters(pretrained.load_llm(folder), sparqle.llm)
        (folder / "b.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"names files that are not there: \['b.safetensors'\]"):
            pretrained.load_llm(folder)

    def test_tied_embeddings(self, tmp_path, llama):
        config, tensors = llama
        config = {**config, "tie_word_embeddings": True}
        with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens"):
            pretrained.load_llm(write_folder(tmp_path / "untied", config, tensors))
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.copy()
        both = pretrained.load_llm(write_folder(tmp_path / "both", config, tensors))
        tensors.pop("model.embed_tokens.weight")
        head = pretrained.load_llm(write_folder(tmp_path / "head", config, tensors))
        tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
        neither = pretrained.load_llm(write_folder(tmp_path / "neither", config, tensors))
        assert_same_parameters(both, neither)
        assert_same_parameters(head, neither)
        assert neither.lm_head is None
        np.testing.assert_array_equal(neither.embeddings.embedding[...], table)

    def test_bfloat16_on_disk_and_in_memory(self, tmp_path, llama):
        config, tensors = llama
        rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
        folder = write_folder(tmp_path / "llm", config, rounded)
        wide, narrow = pretrained.load_llm(folder), pretrained.load_llm(folder, dtype=jnp.bfloat16)
        kernel = wide.layers.up.kernel[...]
        assert kernel.dtype == jnp.float32
        assert narrow.layers.up.kernel[...].dtype == jnp.bfloat16
        np.testing.assert_array_equal(kernel, narrow.layers.up.kernel[...].astype(jnp.float32))
        np.testing.assert_array_equal(kernel[1], rounded["model.layers.1.mlp.up_proj.weight"].T)

    def test_back_under_transformers_names(self, hubert, llama, sparqle):
        for module, table, tensors in (
            (sparqle.encoder, hubert_module.table(sparqle.encoder.config), hubert[1]),
            (sparqle.llm, decoder.table(sparqle.llm.config), llama[1]),
        ):
            saved = tables.export(nnx.state(module), table)
            assert saved.keys() == tensors.keys()
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(saved[name], tensor, name)


class TestPreprocessor:
    def test_as_the_folder_says(self, tmp_path, hubert):
        folder = write_folder(tmp_path / "hubert", *hubert)
        assert pretrained.encoder_config(folder)[1].normalize == "variance"  # as transformers, without a file
        settings = {"feature_extractor": {"do_normalize": False}}  # as transformers 5 saves a processor
        (folder / "processor_config.json").write_text(json.dumps(settings))
        assert pretrained.encoder_config(folder)[1].normalize is None
        (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
        assert pretrained.encoder_config(folder)[1].normalize == "variance"

    def test_other_sample_rate(self, tmp_path, hubert):
        folder = write_folder(tmp_path / "hubert", *hubert)
        (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
        with pytest.raises(ValueError, match="asks for 8000 Hz; this project works at 16000 Hz"):
            pretrained.load_encoder(folder)

    def test_options_that_it_does_not_have(self, tmp_path, hubert):
        folder = write_folder(tmp_path / "hubert", *hubert)
        assert pretrained.encoder_config(folder, normalize="peak")[1].normalize == "peak"
        with pytest.raises(ValueError, match=r"has no colour; it has compat, conv_bias"):
            pretrained.encoder_config(folder, colour=1)


class TestSharded:
    def test_placed_where_the_rules_say(self, tmp_path, llama, sparqle):
        config, tensors = llama
        folder = write_folder(tmp_path / "llm", config, tensors)
        mesh = make_mesh((2, 4, 1))
        loaded = pretrained.load_llm(folder, mesh=mesh)
        assert_same_parameters(loaded, sparqle.llm)
        kernel = loaded.layers.query.kernel[...]
        assert kernel.sharding.spec == jax.P(None, "fsdp", "model")
        assert kernel.addressable_shards[0].data.shape == (3, 16, 64)

    def test_a_dimension_that_does_not_divide(self, tmp_path, llama):
        folder = write_folder(tmp_path / "llm", *llama)
        mesh = make_mesh((1, 2, 4))
        with pytest.raises(
            ValueError, match=r"embeddings.embedding \(97, 64\): 97 is not a multiple of model=4"
        ):
            pretrained.load_llm(folder, mesh=mesh)

    def test_a_mesh_of_other_devices(self):
        with pytest.raises(ValueError, match="data=2, fsdp=2, model=3 needs 12 devices, but there are 8"):
            make_mesh((2, 2, 3))


class TestProblems:
    def test_no_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no config.json.*'hubert'"):
            pretrained.load_encoder(tmp_path)

    def test_model_type(self, tmp_path, hubert):
        folder = write_folder(tmp_path / "hubert", *hubert)
        with pytest.raises(
            ValueError, match=r"'hubert'; supported here: \['llama', 'mistral', 'qwen2', 'qwen3'\]"
        ):
            pretrained.load_llm(folder)

    def test_no_weights(self, tmp_path, llama):
        folder = write_folder(tmp_path / "llm", *llama)
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="holds no weights: looked for model"):
            pretrained.load_llm(folder)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_checkpoint(tmp_path / "absent.safetensors")

    def test_a_file_that_is_cut_off(self, tmp_path, llama):
        folder = write_folder(tmp_path / "llm", *llama)
        (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ValueError, match=r"is not a whole safetensors file(.|\n)*git lfs pull"):
            pretrained.load_llm(folder)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            published.qformer_config(folder / "model.safetensors")

    def test_all_that_does_not_fit_is_listed(self, tmp_path, llama):
        config, tensors = llama
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((63, 64), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        folder = write_folder(tmp_path / "llm", config, tensors)
        with pytest.raises(ValueError, match="does not fit the model") as error:
            pretrained.load_llm(folder)
        assert "(4 problems)" in str(error.value)
        for line in (
            "model.layers.1.mlp.up_proj.weight is missing (for layers.up.kernel)",
            "model.norm.weight is missing (for norm.scale)",
            "model.layers.0.self_attn.q_proj.weight has shape (63, 64), needed is (64, 64)",
            "model.layers.0.self_attn.q_proj.bias is unexpected",
        ):
            assert line in str(error.value)

    def test_other_sizes(self, tmp_path, hubert):
        config, tensors = hubert
        config = {**config, "hidden_size": 32, "num_hidden_layers": 2}
        folder = write_folder(tmp_path / "hubert", config, tensors)
        with pytest.raises(ValueError, match=r"same sizes and family") as error:
            pretrained.load_encoder(folder)
        assert "encoder.layers.2.attention.q_proj.weight is unexpected" in str(error.value)
        assert "has shape (48, 48), needed is (32, 32)" in str(error.value)

    @pytest.mark.parametrize(
        ("rules", "problem"),
        [
            (decoder.table(decoder.Config()).rules[1:], "no tensor sets embeddings.embedding"),
            (
                (*decoder.table(decoder.Config()).rules, decoder.table(decoder.Config()).rules[0]),
                "embeddings.embedding is set by 2 rules",
            ),
        ],
    )
    def test_a_table_that_is_not_one_to_one(self, llama, rules, problem):
        config, tensors = llama
        table = tables.Table(rules)
        tensors = {name: Tensor(array.shape, array.__getitem__) for name, array in tensors.items()}
        with pytest.raises(ValueError, match=problem):
            tables.load(
                lambda rngs: Decoder(DecoderConfig.from_dict(config), rngs=rngs), table, tensors, name="x"
            )


class TestPublished:
    def test_towers_given_apart(self, tmp_path, tiny, stage2, sparqle):
        """As for the published weights: the file has the adapter alone, under fairseq's and an older name."""
        tensors = {k: v for k, v in stage2.items() if not k.startswith(("speech_encoder.", "llama_model."))}
        tensors["llm_proj.weight"], tensors["llm_proj.bias"] = (
            tensors.pop(f"llama_proj.{name}") for name in ("weight", "bias")
        )
        save_file({f"module.{k}": v for k, v in tensors.items()}, tmp_path / "adapter.safetensors")
        loaded = published.load_speech_llm(
            tmp_path / "adapter.safetensors", sparqle.encoder, sparqle.llm, **tiny.qformer_values
        )
        assert_same_parameters(loaded, sparqle)

    def test_sizes_are_read_from_the_tensors(self, tiny):
        sizes = tiny.config["qformer"]
        heads = sizes["num_attention_heads"]
        file = tiny.folder / "stage1_state_dict.safetensors"
        config, vocab_size = published.qformer_config(file, num_attention_heads=heads)
        assert config.num_queries == sizes["num_query_tokens"]
        assert vocab_size == sizes["vocab_size"] == sizes["bos_token_id"] + 1
        for name in (
            "cross_attention_freq",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            assert getattr(config, name) == sizes[name], name
        with pytest.raises(ValueError, match="how many attention heads its Q-Former of width 32 has"):
            published.qformer_config(file)

    def test_what_we_save_says_it_all(self, tmp_path, aligner, sparqle):
        for model in (aligner, sparqle):
            published.save(model, tmp_path / "adapter.safetensors")
            saved = published.qformer_config(tmp_path / "adapter.safetensors")
            assert saved == (model.adapter.config, model.adapter.vocab_size)

    def test_stage_2_starts_from_a_stage_1_checkpoint(self, tmp_path, aligner, sparqle):
        file = tmp_path / "stage1.safetensors"
        published.save(aligner, file)
        started = published.load_speech_llm(file, sparqle.encoder, sparqle.llm, rngs=nnx.Rngs(0))
        assert_same_parameters(started.adapter.layers.query_mlp, aligner.adapter.layers.query_mlp)
        assert started.adapter.vocab_size is None
        assert 0.01 < np.std(started.projection.kernel[...]) < 0.03

    def test_other_files(self, tmp_path, tiny, stage1, sparqle):
        save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="is no SparQLe checkpoint: it has no query_tokens"):
            published.load_speech_llm(tmp_path / "other.safetensors", sparqle.encoder, sparqle.llm)
        with pytest.raises(ValueError, match=r"\(2 problems\)(.|\n)*llama_proj.weight is missing"):
            published.load_speech_llm(
                tiny.folder / "stage1_state_dict.safetensors",
                sparqle.encoder,
                sparqle.llm,
                **tiny.qformer_values,
            )

    def test_encoder_of_another_width(self, tiny, stage2):
        config = HubertConfig.from_dict({**tiny.config["hubert"], "hidden_size": 32})
        encoder = hubert_module.Encoder(config, rngs=nnx.Rngs(0))
        with pytest.raises(
            ValueError, match=r"crossattention.self.key.weight has shape \(32, 48\), needed is \(32, 32\)"
        ):
            published.load_speech_llm(
                tiny.folder / "stage2_state_dict.safetensors",
                encoder,
                DecoderConfig.from_dict(tiny.config["llm"]),
                **tiny.qformer_values,
            )

    def test_ending_of_a_saved_file(self, tmp_path, sparqle):
        with pytest.raises(ValueError, match=r"ends in .safetensors or .pt"):
            published.save(sparqle, tmp_path / "adapter.ckpt")


class TestBert:
    @pytest.fixture
    def bert(self, tiny, stage1):
        """A BertForMaskedLM made of the golden Q-Former's text half, without [DEC], in TensorFlow's names."""
        size = tiny.config["qformer"]
        tensors = part_of(stage1, "Qformer.")
        tensors = {k: v for k, v in tensors.items() if "_query" not in k and "crossattention" not in k}
        for name in [k for k in tensors if k.startswith("cls.predictions.decoder") or "word_emb" in k]:
            tensors[name] = tensors[name][:-1].copy()
        tensors["cls.predictions.bias"] = tensors["cls.predictions.bias"][:-1].copy()
        tensors = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in tensors.items()
        }
        tensors["bert.pooler.dense.weight"] = np.zeros((2, 2), np.float32)
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = {"model_type": "bert", "vocab_size": size["vocab_size"] - 1, "max_position_embeddings": 40}
        return {**config, **{name: size[name] for name in names}}, tensors

    def load(self, folder, seed=0, text=True) -> QFormer:
        config = published.qformer.Config(**published.bert_config(folder)[0], num_queries=6)
        return published.qformer_from_bert(folder, config, 48, text=text, rngs=nnx.Rngs(seed))

    def test_text_half_copied_query_half_started(self, tmp_path, bert, aligner):
        qformer = self.load(write_folder(tmp_path / "bert", *bert))
        ours, golden = qformer.layers, aligner.adapter.layers
        assert_same_parameters(ours.self_attention, golden.self_attention)
        assert_same_parameters(ours.text_mlp, golden.text_mlp)
        assert_same_parameters(ours.query_mlp, golden.text_mlp)  # a copy of the text one
        words, golden_words = (q.word_embeddings.embedding[...] for q in (qformer, aligner.adapter))
        assert words.shape == golden_words.shape
        np.testing.assert_array_equal(words[:-1], golden_words[:-1])
        assert 0.005 < np.std(words[-1]) < 0.05  # [DEC]
        np.testing.assert_array_equal(qformer.lm_bias[...][:-1], aligner.adapter.lm_bias[...][:-1])
        assert 0.015 < np.std(qformer.query_tokens[...]) < 0.025

    def test_other_sizes_than_the_berts(self, tmp_path, bert):
        folder = write_folder(tmp_path / "bert", *bert)
        with pytest.raises(ValueError, match=r"hidden_size=768 \(there: 32\), .* Set adapter's fields"):
            published.qformer_from_bert(folder, published.qformer.Config(), 48, text=True, rngs=nnx.Rngs(0))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"position_embedding_type": "relative_key"}))
        with pytest.raises(ValueError, match="relative_key"):
            published.bert_config(folder)

    def test_random_parts_depend_on_the_seed_alone(self, tmp_path, bert):
        folder = write_folder(tmp_path / "bert", *bert)
        first, again, other = self.load(folder), self.load(folder), self.load(folder, seed=1)
        assert_same_parameters(first, again)
        kernels = [q.cross_attentions.attention.key.kernel[...] for q in (first, other)]
        assert np.abs(kernels[0] - kernels[1]).max() > 1e-3

    def test_without_lm_head_or_without_text(self, tmp_path, bert, aligner):
        config, tensors = bert
        tensors = part_of(tensors, "bert.")  # a bare BertModel
        folder = write_folder(tmp_path / "bert", config, tensors)
        assert self.load(folder).lm_transform.kernel[...].shape == (32, 32)
        stage2_only = self.load(folder, text=False)
        assert_same_parameters(stage2_only.layers.query_mlp, aligner.adapter.layers.text_mlp)
        assert stage2_only.layers.text_mlp is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_peak_host_memory(tmp_path):
    """At most what stays and twice the largest tensor, which is large beside the 40 MB of a compiler."""
    size, width, layers = 80_000, 512, 6
    config = dict(
        model_type="llama",
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (size, width), "lm_head.weight": (size, width)}
    shapes["model.norm.weight"] = (width,)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{prefix}mlp.{n}_proj.weight": (2048, width) for n in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, 2048)
        shapes |= {f"{prefix}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    tensors = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    folder = write_folder(tmp_path / "llm", config, tensors)
    figures = measure(folder, "float32")
    assert figures["largest_tensor"] == 4 * size * width
    assert figures["peak"] > figures["parameters"]  # the measurement sees the parameters
    assert figures["peak"] <= figures["bound"], figures
