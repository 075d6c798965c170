"""Multimodal checkpoints: read as their text decoder, and written so that transformers, peft and vLLM fit them."""

import json
import subprocess

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, Qwen3VLConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as WRAPPERS

from ebft_utils.config.modes import StructuredConfig, load_config
from ebft_utils.config.settings import UserError
from ebft_utils.models import Policy, load_feature_network, load_policy
from ebft_utils.run.distributed import prepare_accelerator
from ebft_utils.server.weight_sync import ServedPolicy
from ebft_utils.text_decoders import (
    PREFIXES,
    USUAL,
    card_of_adapter,
    read_decoder,
    save_adapter,
    served_name,
    with_saved_adapter,
)
from helpers import ROOT, end_of, forget_accelerator, tiny_tokenizer, weights
from real_vllm import prompts_file, vllm_python
from wrapped_models import FAMILIES, rename_weights, save_wrapped, whole_model

IDS = torch.arange(3, 30)[None]
BUILT = sorted(FAMILIES.keys() - {"gemma3n"})  # the wrapper of Gemma 3n needs timm
TRAINED = pytest.mark.parametrize("family", ["gemma3", "mistral3"])
LORA = dict(lora={"r": 4}, train__learning_rate=1e-2)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """wrapped(FAMILY): the folder of a tiny model, written once."""
    made = {}

    def folder(family: str):
        if family not in made:
            made[family] = save_wrapped(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def decoder(folder):
    config = AutoConfig.from_pretrained(folder)
    return read_decoder(config, "tiny", str(folder), dtype=torch.float32).eval()


def adapted(folder) -> PeftModel:
    """The decoder with an adapter that changes it much. (A router of Llama 4 cannot carry one.)"""
    layers = ["q_proj", "v_proj", "up_proj", "down_proj"]
    policy = get_peft_model(decoder(folder), LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    policy.peft_config["default"].base_model_name_or_path = str(folder)
    return policy.eval()


def with_a_head_of_its_own(folder):
    """A Mistral 3 whose files have a head and an embedding, which its config, as by default, calls one matrix."""
    save_wrapped("mistral3", folder, tie_word_embeddings=False)
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@torch.no_grad()
def gap(first, second) -> float:
    return (first(IDS).logits - second(IDS).logits).abs().max().item()


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_gives_the_numbers_of_the_whole_model(wrapped, family):
    model = decoder(wrapped(family))
    assert type(model).__name__.endswith("ForCausalLM") and model.config.get_text_config() is model.config
    assert gap(model, whole_model(family, wrapped(family))) < 1e-5


@pytest.mark.parametrize(
    "families, names",
    [
        (["qwen3_5", "qwen3_5_moe", "gemma4", "gemma3n"], {"model.language_model.layers"}),
        (["gemma3", "mistral3", "llama4", "internvl", "llava"], {"language_model.model.layers"}),
    ],
)
def test_the_folders_of_these_tests_have_the_names_of_the_hubs(wrapped, families, names):
    for family in families:
        found = load_file(wrapped(family) / "model.safetensors")
        starts = {name.partition(".layers.")[0] + ".layers" for name in found if ".self_attn.q_proj" in name}
        assert {start for start in starts if "vision" not in start} == names, family


@pytest.mark.parametrize("start", ["model.language_model.", "language_model.model.", "language_model."])
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_names_of_other_releases_are_read(wrapped, tmp_path, family, start):
    """transformers 4.52 to 4.57 wrote model.language_model.layers for Gemma 3 and Mistral 3."""
    folder = save_wrapped(family, tmp_path / "model")
    rename_weights(folder, lambda name: name.replace("language_model.model.", start))
    assert gap(decoder(folder), decoder(wrapped(family))) == 0.0


@pytest.mark.parametrize("lost", ["layers.2.mlp.up_proj.weight", "embed_tokens.weight"])
@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_a_lost_weight_is_named(tmp_path, family, lost):
    folder = save_wrapped(family, tmp_path / "model", tie_word_embeddings=False)
    rename_weights(folder, lambda name: None if name.endswith(f"language_model.{lost}") else name)
    rename_weights(folder, lambda name: None if name.endswith(f"language_model.model.{lost}") else name)
    with pytest.raises(UserError, match=f"'tiny' lacks [12] weights of its architecture, for example .*{lost}"):
        decoder(folder)


def test_a_head_of_its_own_stays_its_own(tmp_path):
    """Guards against an export, or a second tying, that believes the config."""
    folder = with_a_head_of_its_own(tmp_path / "model")
    model = decoder(folder)
    model.tie_weights()
    assert gap(model, whole_model("mistral3", folder)) < 1e-5 and not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "final")
    assert gap(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), model) == 0.0


@pytest.mark.parametrize("left", [0, 100, 30_000])
def test_a_damaged_file_is_named(tmp_path, left):
    file = save_wrapped("gemma3", tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match="model.name_or_path: 'tiny' cannot be loaded: "):
        decoder(tmp_path / "model")


def test_a_wrapper_without_a_causal_lm_is_refused(refused, tmp_path, write_config):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"]).save_pretrained(tmp_path / "model")
    file = write_config(model__name_or_path=str(tmp_path / "model"))
    expected = "(qwen3_vl) is multimodal, and transformers has no causal LM for its text part (qwen3_vl_text); take"
    assert expected in refused("--cfg", file) and expected in refused("--cfg", file, "--dry-run")


def test_where_every_wrapper_of_transformers_keeps_its_decoder():
    """Guards against a new family, or a renamed one, whose adapters and synced weights would have names of nobody."""
    checked = set()
    for family in WRAPPERS:
        try:
            config = CONFIG_MAPPING[family]()
            text = config.get_text_config()
            known = type(text) in AutoModelForCausalLM._model_mapping
            if text is config or not known or config.is_encoder_decoder:
                continue
            text.num_hidden_layers, text.pad_token_id = 1, 0
            if vars(text).get("layer_types"):
                text.layer_types = text.layer_types[:1]
            with torch.device("meta"):
                names = [name for name, _ in AutoModelForMultimodalLM.from_config(config).named_parameters()]
                own = [name for name, _ in AutoModelForCausalLM.from_config(text).named_parameters()]
        except (ImportError, ValueError, AttributeError, KeyError, AssertionError, TypeError):
            continue  # its defaults are no model
        inside, outside = PREFIXES.get(family, USUAL)
        lost = {outside + name.removeprefix(inside) for name in own if name.startswith(inside)} - set(names)
        assert not lost, (family, sorted(lost)[:3])
        checked.add(family)
    assert {"llava", "gemma3", "qwen3_5", "mistral3", "llama4", "blip-2"} <= checked and len(checked) > 30


# ----------------------------------------------------------------------------------------------------------------------
# What is written: the model, its adapter, the adapter merged in


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_one_of_text(wrapped, family, tmp_path):
    model = decoder(wrapped(family))
    model.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not found["missing_keys"] and not found["unexpected_keys"]
    assert gap(loaded.eval(), model) < 1e-5
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == [type(model).__name__] and "vision_config" not in settings
    written = load_file(tmp_path / "model.safetensors")
    assert {name.partition(".layers.")[0] for name in written if ".layers." in name} == {"model"}


@pytest.mark.parametrize("family", BUILT)
def test_an_adapter_fits_what_users_load(wrapped, family, tmp_path):
    """AutoModelForCausalLM gives the whole model of one family, the decoder of another, and refuses a third."""
    folder, policy = wrapped(family), adapted(wrapped(family))
    save_adapter(policy, policy.state_dict(), tmp_path / "adapter")
    save_adapter(policy, policy.state_dict(), tmp_path / "served", served=True)
    assert gap(policy, decoder(folder)) > 1e-2
    loads = policy.get_base_model().wrapper.loads
    auto = AutoModelForMultimodalLM if loads is None else AutoModelForCausalLM
    base = auto.from_pretrained(folder, dtype=torch.float32)
    assert (auto is AutoModelForMultimodalLM) == (family in ("mistral3", "internvl", "llava"))
    for loaded in (PeftModel.from_pretrained(base, tmp_path / "adapter"), auto.from_pretrained(tmp_path / "adapter")):
        assert gap(loaded.eval(), policy) < 1e-5
        assert not [name for name, _ in loaded.named_parameters() if "lora_" in name and "vision" in name]
    whole = PeftModel.from_pretrained(whole_model(family, folder), tmp_path / "served")
    assert gap(whole.eval(), policy) < 1e-5
    merged = with_saved_adapter(decoder(folder), tmp_path / "adapter", policy).merge_and_unload()
    assert gap(merged, policy) < 1e-4


def test_the_card_of_an_adapter_says_what_loads_it(wrapped):
    card = "AutoModelForCausalLM.from_pretrained(folder)"
    cards = {family: card_of_adapter(adapted(wrapped(family)), card) for family in ("gemma3", "qwen3_5", "llava")}
    assert cards["gemma3"] == card and cards["qwen3_5"].startswith(f"{card}\nvLLM serves the whole multimodal")
    assert cards["llava"] == "AutoModelForMultimodalLM.from_pretrained(folder)"


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_dry_run_counts_the_decoder(wrapped, command, write_config):
    code, _ = command("--cfg", write_config(model__name_or_path=str(wrapped("gemma3"))), "--dry-run")
    assert code == 0


@TRAINED
def test_the_policy_and_the_feature_network_are_the_decoder(wrapped, family, write_config):
    config = load_config(str(write_config(model__name_or_path=str(wrapped(family)))))
    policy, whole = load_policy(config), whole_model(family, wrapped(family))
    assert gap(policy.eval(), whole) < 1e-5
    network = load_feature_network(policy, config, torch.device("cpu"))
    assert torch.equal(network.decoder.embed_tokens.weight, policy.get_input_embeddings().weight)


@TRAINED
def test_all_weights_are_trained_and_exported(wrapped, family, train):
    folder = train("run", f"model.name_or_path={wrapped(family)}")
    final = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert gap(final, whole_model(family, wrapped(family))) > 1e-3
    again = train("again", f"model.name_or_path={folder / 'final'}", "eval.only=true", eval__num_documents=4)
    assert (again / "eval-step-0.json").is_file()


@TRAINED
def test_an_adapter_alone_and_merged(wrapped, family, train):
    """The same numbers: merged, on its base in peft, and as the model card says."""
    alone = train("alone", f"model.name_or_path={wrapped(family)}", **LORA) / "final"
    merged = train("merged", f"model.name_or_path={wrapped(family)}", "lora.merge=true", **LORA) / "final"
    auto = "AutoModelForCausalLM" if family == "gemma3" else "AutoModelForMultimodalLM"
    assert f"{auto}.from_pretrained(folder)" in (alone / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(folder)" in (merged / "README.md").read_text()
    loaded = {"AutoModelForCausalLM": AutoModelForCausalLM}.get(auto, AutoModelForMultimodalLM).from_pretrained(alone)
    assert gap(loaded, whole_model(family, wrapped(family))) > 1e-2
    assert gap(AutoModelForCausalLM.from_pretrained(merged), loaded) < 1e-4
    if family == "gemma3":
        assert gap(AutoPeftModelForCausalLM.from_pretrained(merged / "adapter"), loaded) < 1e-5
    again = train("again", f"model.name_or_path={merged}", "eval.only=true", eval__num_documents=4)
    assert (again / "eval-step-0.json").is_file()


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_fsdp2_reads_and_writes_the_same_names(tmp_path, write_config, start, lora):
    """Guards against processes that differ in what they think is tied, and against a wrapper forgotten in sharding."""
    folder = with_a_head_of_its_own(tmp_path / "model")
    file = write_config(model__name_or_path=str(folder), lora=lora, train__max_steps=2, eval__num_documents=0)
    code, output = end_of(start("fsdp2", file, "train.per_device_batch_size=1"))
    assert code == 0, output[-3000:]
    written = weights(tmp_path / "run")
    if lora is None:
        assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    else:
        assert all(name.startswith("base_model.model.model.language_model.layers.") for name in written)


# ----------------------------------------------------------------------------------------------------------------------
# The server


class Recorder:
    """A server that keeps what it is sent."""

    url, dtype, received = "nowhere", "float32", None

    def load_adapter(self, name, folder):
        self.received = (load_file(f"{folder}/adapter_model.safetensors"), f"{folder}/adapter_config.json")

    def reload_weights(self, folder, name):
        self.received = (load_file(f"{folder}/model.safetensors"), None)


@TRAINED
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_what_is_sent_has_the_names_of_the_whole_model(wrapped, family, lora, tmp_path, write_config):
    data = {"dataset": str(prompts_file(tmp_path / "prompts.jsonl")), "max_prompt_length": 40}
    changes = dict(model__name_or_path=str(wrapped(family)), data=data, lora=lora, vllm={"sync_folder": str(tmp_path)})
    changes |= {"ebft": {"num_generations": 3, "max_completion_length": 16}}
    forget_accelerator()
    config = load_config(str(write_config(**changes)), [], StructuredConfig)
    accelerator, server = prepare_accelerator(config), Recorder()
    policy = Policy(load_policy(config))
    served = ServedPolicy(config, accelerator, policy, server, [5, 6, 7])
    served._send("0")
    sent, settings = server.received
    whole, own = dict(whole_model(family, wrapped(family)).state_dict()), policy.causal_lm.state_dict()
    if lora is None:
        assert sent.keys() == {name for name in whole if "lm_head" in name or "language_model" in name}
        assert all(torch.equal(weight, whole[name]) for name, weight in sent.items())
        return
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in sent}
    assert len(sent) == sum("lora_" in name for name in own) and {f"{layer}.weight" for layer in layers} <= whole.keys()
    with open(settings) as file:
        assert set(json.load(file)["target_modules"]) == layers


VLLM_NAMES = r"""
import importlib, importlib.machinery, json, sys
from unittest.mock import MagicMock
from vllm.model_executor.models.registry import _VLLM_MODELS
from vllm.lora.utils import parse_fine_tuned_lora_name


class Absent:  # packages that only the picture towers need
    @staticmethod
    def find_spec(name, path=None, target=None):
        absent = name.partition(".")[0] in ("torchvision", "timm", "torchaudio")
        return importlib.machinery.ModuleSpec(name, Absent) if absent else None

    @staticmethod
    def create_module(spec):
        module = MagicMock()
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    @staticmethod
    def exec_module(module):
        pass


sys.meta_path.append(Absent)
found = {}
for architecture, names in json.load(sys.stdin).items():
    module, name = _VLLM_MODELS[architecture]
    model = getattr(importlib.import_module("vllm.model_executor.models." + module), name)
    mapper = model.hf_to_vllm_mapper.get_rename_mapper() if hasattr(model, "hf_to_vllm_mapper") else None
    found[architecture] = [
        parse_fine_tuned_lora_name(name, mapper)[0] if "lora_" in name else mapper.map_name(name) if mapper else name
        for name in names
    ]
print("\n" + json.dumps(found))
"""


def test_vllm_finds_its_layers_by_what_is_sent(wrapped, tmp_path):
    """By vLLM's own tables: of the architecture that each checkpoint names, and of each exported model."""
    names, expected = {}, {}
    for family in FAMILIES:
        (architecture,) = json.loads((wrapped(family) / "config.json").read_text())["architectures"]
        policy = adapted(wrapped(family))
        save_adapter(policy, policy.state_dict(), tmp_path / family, served=True)
        model = policy.get_base_model()
        of_adapter = sorted(load_file(tmp_path / family / "adapter_model.safetensors"))
        own = sorted(name for name in decoder(wrapped(family)).state_dict())
        plain = decoder(wrapped(family))
        names[architecture] = [served_name(plain, name) for name in own] + of_adapter
        layers = [served_name(policy, f"base_model.model.{name}") for name, _ in model.named_modules()]
        assert {name.partition(".lora_")[0] for name in of_adapter} <= set(layers)
        starts = ("base_model.model.", "model.language_model.", "language_model.model.")
        inner = [name.partition(".lora_")[0] for name in of_adapter]
        for start in starts:
            inner = [name.removeprefix(start) for name in inner]
        expected[architecture] = [f"language_model.{name}" for name in own]
        expected[architecture] += [f"language_model.model.{name}" for name in inner]
        names[type(plain).__name__] = expected[type(plain).__name__] = own
    command = [str(vllm_python()), "-c", VLLM_NAMES]
    answer = subprocess.run(command, input=json.dumps(names), capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert json.loads(answer.stdout.splitlines()[-1]) == expected
