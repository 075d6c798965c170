"""Configurations of both modes for files of short rows, and what is loaded through them."""

import datasets

from ebft_utils.config.data import EvalConfig, PromptDataConfig, TextDataConfig
from ebft_utils.config.modes import Config, StridedConfig, StructuredConfig
from ebft_utils.config.sections import ModelConfig, StridedEBFTConfig, StructuredEBFTConfig, TrainConfig
from ebft_utils.data.sources import load_table, training_sources
from ebft_utils.data.tables import load_documents


def strided(source="", *, ebft=None, train=None, evaluation=None, model=None, **data) -> StridedConfig:
    return StridedConfig(
        model=ModelConfig(**{"name_or_path": "unused", **(model or {})}),
        data=TextDataConfig(**{"dataset": str(source), "sequence_length": 64, **data}),
        ebft=StridedEBFTConfig(**{"context_length": 1, "stride": 2, "generate_max_len": 1, **(ebft or {})}),
        train=TrainConfig(**{"output_dir": "unused", "max_steps": 1, **(train or {})}),
        eval=EvalConfig(**{"num_documents": 0, **(evaluation or {})}),
    )


def structured(source="", *, ebft=None, train=None, evaluation=None, **data) -> StructuredConfig:
    return StructuredConfig(
        model=ModelConfig("unused"),
        data=PromptDataConfig(**{"dataset": str(source), "max_prompt_length": 64, **data}),
        ebft=StructuredEBFTConfig(**{"max_completion_length": 64, **(ebft or {})}),
        train=TrainConfig(**{"output_dir": "unused", "max_steps": 1, **(train or {})}),
        eval=EvalConfig(**{"num_documents": 0, **(evaluation or {})}),
    )


def table_of(config: Config, streaming: bool = False):
    (source,) = training_sources(config)
    return load_table(source, streaming=streaming)


def rows_of(config: Config, streaming: bool = False) -> list[dict]:
    return list(table_of(config, streaming))


def documents_of(config: Config, tokenizer) -> datasets.Dataset:
    return load_documents(config, tokenizer, *training_sources(config))


def texts_of(config: Config, tokenizer) -> list[str]:
    return [tokenizer.decode(tokens) for tokens in documents_of(config, tokenizer)["input_ids"]]
