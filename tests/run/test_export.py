"""The exported model and its card. (Under DDP and FSDP2: test_distributed.py.)"""

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_utils import model_files, models
from ebft_utils.config.modes import load_config
from ebft_utils.config.settings import UserError
from ebft_utils.run.export import merges, model_card
from helpers import tiny_model, weights

IDS = torch.arange(3, 30)[None]


@pytest.fixture
def gguf(tmp_path, monkeypatch, model_folder):
    """A model that is found as a GGUF file. (Reading one is test_real_model.py's business.)"""
    file = tmp_path / "elsewhere" / "tiny.gguf"
    file.parent.mkdir()
    file.write_text("packed")

    def plain_source(name, *key):
        return str(model_folder) if name == str(file) else model_files.plain_source(name, *key)

    monkeypatch.setattr(models, "plain_source", plain_source)
    return str(file)


def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_the_adapter_of_a_gguf_model_is_merged_and_travels(train, gguf, model_folder, tmp_path):
    """Guards against an export that names a path of this machine, or that nothing but this program can load."""
    folder = train("run", f"model.name_or_path={gguf}", lora={"r": 4}, train__learning_rate=1e-2)
    final = shutil.copytree(folder / "final", tmp_path / "copied")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "elsewhere")
    assert (logits(final) - logits(model_folder)).abs().max() > 1e-2
    AutoTokenizer.from_pretrained(final)("some text")
    kept = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == gguf  # as the configuration names it
    written = {path.name for path in final.iterdir()}
    assert {"adapter", "config.json", "model.safetensors", "README.md", "training_config.yaml"} <= written
    assert str(tmp_path) not in (final / "config.json").read_text()
    card = ModelCard.load(final / "README.md")
    assert card.data.base_model is None and card.data.library_name == "transformers" and "LoRA, merged" in card.text


def test_merging_is_the_adapter_on_its_base(train):
    """final/ is merged, and final/adapter on the base gives the same numbers."""
    folder = train("run", "lora.merge=true", lora={"r": 4}, train__learning_rate=1e-2) / "final"
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")(IDS).logits
    assert (logits(folder) - adapted).abs().max() < 1e-4
    alone = train("alone", lora={"r": 4}, train__learning_rate=1e-2)
    assert not (alone / "final" / "adapter").exists() and (alone / "final" / "adapter_model.safetensors").is_file()
    assert weights(alone).keys() and (logits(alone / "final") - adapted).abs().max() < 1e-6


def test_an_adapter_that_nothing_could_load_is_refused(write_config, gguf):
    config = load_config(str(write_config(lora={"r": 4})), [f"model.name_or_path={gguf}", "lora.merge=false"])
    with pytest.raises(UserError, match="lora.merge: false with the GGUF file of .*; leave lora.merge out"):
        merges(config)
    assert not merges(load_config(str(write_config())))


def test_a_gguf_model_is_unpacked_once(tmp_path, monkeypatch):
    """Guards against a server with other weights than the trainer, half a copy, and the copy of an older file."""
    file, model, reads = tmp_path / "tiny.gguf", tiny_model(tie_word_embeddings=True), []
    file.write_text("reading such files is test_real_model.py's business")

    def read(name, source, **how):
        reads.append(how["gguf_file"])
        return model

    monkeypatch.setattr(model_files, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "read_weights", read)
    folder = model_files.plain_source(str(file))
    assert model_files.plain_source(str(file)) == folder and reads == ["tiny.gguf"]
    assert torch.equal(logits(folder), model(IDS).logits)
    file.write_text("another file")
    assert model_files.plain_source(str(file)) != folder and len(reads) == 2
    monkeypatch.setattr(model, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
    file.write_text("a third file")
    for _ in range(2):  # nothing is left that looks whole
        with pytest.raises(UserError, match="model.name_or_path: .* could not be unpacked into .*: .*No space left"):
            model_files.plain_source(str(file))


# ----------------------------------------------------------------------------------------------------------------------
# The model card


def test_model_card(write_config):
    config = load_config(str(write_config(train__max_steps=7, train__learning_rate=2e-5, eval__num_documents=9)))
    results = {
        0: {"cross_entropy": 2.5, "cross_entropy_se": 0.25, "cfm_loss": 1.0, "cfm_loss_se": 0.125},
        7: {"cross_entropy": 2.25, "cross_entropy_se": 0.0625, "cfm_loss": 0.5, "cfm_loss_se": 0.03125},
    }
    results = {step: {f"eval/{name}": value for name, value in metrics.items()} for step, metrics in results.items()}
    for metrics in results.values():  # paired changes since step 0 are no metrics of their own
        metrics |= {"eval/cross_entropy_change": 0.5, "eval/cross_entropy_change_se": 0.5}
    text = model_card(config, results, 7, ["3 rows were left out."])
    settings = "rl_coef 1.0, ce_coef 0.1, learning rate 2e-05"
    facts = ("full fine-tuning", "7 steps", settings, "3 rows were left out.", "Held-out documents, mean", "hf upload")
    assert [fact for fact in facts if fact not in text] == []
    assert text.splitlines()[-4:] == [
        "| metric | step 0 | step 7 |",
        "| --- | --- | --- |",
        "| cross_entropy | 2.5000 ± 0.2500 | 2.2500 ± 0.0625 |",
        "| cfm_loss | 1.0000 ± 0.1250 | 0.5000 ± 0.0312 |",
    ]


@pytest.mark.parametrize(
    "lora, name, dataset, expected",
    [
        (None, "owner/model", "owner/data", {"base_model": "owner/model", "datasets": ["owner/data"]}),
        ({"r": 4}, "owner/model", "python_stdlib", {"base_model": "owner/model", "library_name": "peft"}),
        (None, "/models/mine", "rows.jsonl", {}),
    ],
)
def test_the_metadata_of_a_card_are_the_hubs(write_config, lora, name, dataset, expected):
    """Guards against a local path where the hub wants an id: it refuses such a card."""
    file = write_config(lora=lora, model__name_or_path=name, data__dataset=dataset)
    text = model_card(load_config(str(file)), {}, 3)
    metadata = yaml.safe_load(text.split("---")[1])
    always = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ebft"]}
    assert metadata == always | expected and ModelCard(text).data.to_dict() == metadata
    assert "/models" not in text
