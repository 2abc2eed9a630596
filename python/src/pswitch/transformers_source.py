"""Models of the transformers library from configurations: architecture as published, weights random.

Nothing is fetched: a configuration is one of the library's own classes with its defaults and what the caller
overrides, or a `config.json` on disk.
"""

import dataclasses
import inspect
import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import masking_utils

from .errors import ExportError
from .export import Inputs, named_forward
from .sources import Sizes, Source

# Published models and small ones: (model type, overrides of the configuration's defaults, head).
NAMED = {
    "bert-base-uncased": ("bert", {}, None),
    "bert-base": ("bert", {}, None),
    "bert-large-uncased": (
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        None,
    ),
    "bert-2-layers": ("bert", {"num_hidden_layers": 2}, None),
    "distilbert-base-uncased": ("distilbert", {}, None),
    "roberta-base": (
        "roberta",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        None,
    ),
    "gpt2": ("gpt2", {}, "causal-lm"),
    "gpt2-4-layers": (
        "gpt2",
        {"n_layer": 4, "n_embd": 256, "n_head": 8, "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0},
        "causal-lm",
    ),
    "vit-base-patch16-224": ("vit", {}, "image-classification"),
}

HEADS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "none": "AutoModel",
}

# Outputs worth an answer, in the order in which a program returns those that its model has.
OUTPUTS = (
    "logits",
    "start_logits",
    "end_logits",
    "last_hidden_state",
    "pooler_output",
    "logits_per_image",
    "image_embeds",
    "text_embeds",
)

TEXT_AXES = {0: "batch", 1: "sequence"}


class Named(nn.Module):
    """Calls a transformers model with inputs of fixed names and returns a dictionary of plain tensors."""

    def __init__(self, model: nn.Module, input_names: tuple[str, ...], outputs: tuple[str, ...] = OUTPUTS):
        super().__init__()
        self.model = model
        self.input_names = input_names
        self.outputs = outputs
        self.forward = named_forward(self._call, input_names)

    def _call(self, *values):
        out = self.model(**dict(zip(self.input_names, values, strict=True)), return_dict=True)
        return {name: out[name] for name in self.outputs if isinstance(out.get(name), torch.Tensor)}


def leave_out_masks_of_ones() -> None:
    """Lets a model that is given no mask be exported without one, as it runs in eager mode.

    While it traces, transformers makes a mask of ones even so, and attention with a mask is another kernel: slower,
    and on a GPU not equal to the last bit.
    """
    leaves_out = masking_utils._ignore_bidirectional_mask_sdpa

    def also_while_tracing(padding_mask, kv_length, local_attention_size=None):
        if padding_mask is None and local_attention_size is None:
            return True
        return leaves_out(padding_mask, kv_length, local_attention_size)

    masking_utils._ignore_bidirectional_mask_sdpa = also_while_tracing


leave_out_masks_of_ones()


def config_source(name: str, head: str | None, inputs: tuple[str, ...] | None = None) -> Source:
    """`NAME` of the table above, `TYPE[,key=value...]` of the library, or `FILE.json`.

    `inputs` names inputs of shape (batch, sequence) to export with instead of the usual ones.
    """
    if name.endswith(".json"):
        config, automatic = _config_from_file(Path(name)), None
        stem = Path(name).parent.name if Path(name).name == "config.json" else Path(name).stem
    else:
        base, *assignments = name.split(",")
        model_type, overrides, automatic = NAMED.get(base, (base, {}, None))
        overrides = overrides | dict(_assignment(text) for text in assignments)
        if model_type not in transformers.CONFIG_MAPPING:
            raise ExportError(
                f"transformers has no configuration '{base}'; named here are {', '.join(NAMED)}; otherwise give a "
                "model type of the library such as 'bert,num_hidden_layers=2' or a FILE.json"
            )
        config, stem = transformers.AutoConfig.for_model(model_type, **overrides), base
    model = _model(config, head or automatic)
    return model_source(stem or config.model_type, model, inputs)


def model_source(name: str, model: nn.Module, inputs: tuple[str, ...] | None = None) -> Source:
    """A `Source` around a transformers model."""
    model.eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    axes = dict.fromkeys(inputs, TEXT_AXES) if inputs else _axes(model)
    return Source(name, Named(model, tuple(axes)), _example(model, axes), axes=axes)


def with_labels(source: Source) -> Source:
    """The source of a training program: the model takes labels too and answers the loss that it computes itself."""
    model = source.module.model
    kind = type(model).__name__
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ExportError(f"{kind} takes no labels to compute a loss from: choose another --head")
    per_row = "SequenceClassification" in kind or "ImageClassification" in kind
    axes = source.axes | {"labels": {0: "batch"} if per_row else TEXT_AXES}
    classes = model.config.num_labels if "Classification" in kind else _text(model).vocab_size

    def example(sizes: Sizes, generator: torch.Generator) -> Inputs:
        shape = (sizes.batch,) if per_row else (sizes.batch, sizes.sequence)
        return source.example(sizes, generator) | {"labels": torch.randint(classes, shape, generator=generator)}

    return dataclasses.replace(source, module=Named(model, tuple(axes), ("loss",)), example=example, axes=axes)


def _model(config, head: str | None) -> nn.Module:
    if head is None:
        for architecture in getattr(config, "architectures", None) or ():
            if hasattr(transformers, architecture):
                return getattr(transformers, architecture)._from_config(config)
    classes = getattr(transformers, HEADS[head or "none"])._model_mapping
    if type(config) not in classes:
        raise ExportError(f"transformers has no {config.model_type} model with the head '{head or 'none'}'")
    chosen = classes[type(config)]
    # Where there are several, the first is the plain one.
    return (chosen[0] if isinstance(chosen, tuple) else chosen)._from_config(config)


def _config_from_file(path: Path):
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read the configuration {path}: {error}") from error
    model_type = fields.pop("model_type", None) if isinstance(fields, dict) else None
    if model_type not in transformers.CONFIG_MAPPING:
        raise ExportError(f"{path} has no 'model_type' that transformers {transformers.__version__} knows")
    return transformers.AutoConfig.for_model(model_type, **fields)


def _assignment(text: str) -> tuple[str, object]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ExportError(f"'{text}' is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _axes(model: nn.Module) -> dict[str, dict[int, str]]:
    """The inputs that a model is exported with, and which of their dimensions may be dynamic."""
    main = model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    if main == "pixel_values":
        return {"pixel_values": {0: "batch"}}
    if main != "input_ids":
        raise ExportError(
            f"{type(model).__name__} takes '{main}': hf-config exports models of text and of pictures; use "
            "module:function for others"
        )
    axes = {"input_ids": TEXT_AXES}
    if "pixel_values" in parameters:
        axes["pixel_values"] = {0: "batch"}
    axes["attention_mask"] = TEXT_AXES
    if getattr(model.config, "is_encoder_decoder", False):
        axes["decoder_input_ids"] = TEXT_AXES
    return axes


def _text(model: nn.Module):
    """The part of a configuration that is about text."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _example(model: nn.Module, axes):
    text = _text(model)
    vision = getattr(model.config, "vision_config", model.config)

    def one(name: str, sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
        if name == "pixel_values":
            side = getattr(vision, "image_size", 224)
            height, width = (side, side) if isinstance(side, int) else side
            channels = getattr(vision, "num_channels", 3)
            return torch.randn(sizes.batch, channels, height, width, generator=generator)
        if name == "attention_mask":
            return padding_mask(sizes)
        if name == "token_type_ids":
            return torch.randint(text.type_vocab_size, (sizes.batch, sizes.sequence), generator=generator)
        return torch.randint(3, text.vocab_size, (sizes.batch, sizes.sequence), generator=generator)

    def example(sizes: Sizes, generator: torch.Generator) -> Inputs:
        return {name: one(name, sizes, generator) for name in axes}

    return example


def padding_mask(sizes: Sizes) -> torch.Tensor:
    """A mask in which every row but the longest ends in padding, and a lone row too if there is room.

    Without any padding transformers leaves the mask out in eager mode and so runs other kernels than the program.
    """
    mask = torch.ones(sizes.batch, sizes.sequence, dtype=torch.int64)
    for row in range(sizes.batch):
        padding = min(1 + row, sizes.sequence - 1)
        mask[row, sizes.sequence - padding :] = 0
    return mask


class SentenceEmbedding(nn.Module):
    """Mean of the token embeddings under the mask, normalised: what sentence-transformers computes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(tokens.size()).to(tokens.dtype)
        mean = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return {"sentence_embedding": nn.functional.normalize(mean, p=2, dim=1)}


def sentence_embedding(name: str, folder: Path) -> Source:
    """A sentence-transformers model from its folder."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    axes = _axes(model)
    return Source(name, SentenceEmbedding(model), _example(model, axes), axes=axes)
