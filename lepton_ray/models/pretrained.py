"""Pretrained models of texts and images, through the library ``transformers``
(``lepton-ray[hf]``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lepton_ray.data.pretrained import Pretrained, Words
from lepton_ray.errors import nearest
from lepton_ray.models.low_rank import LowRank

BODY = "body"  # all that was pretrained, whatever its name in an architecture


class TextClassifier(nn.Module):
    """One of transformers' models, of one tensor."""

    def __init__(self, model: Any, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, classes] from the numbers of tokens [n, length], see `words.encode`."""
        numbers, there = words.long(), words != 0
        if self.padding:
            swapped = numbers.masked_fill(numbers == self.padding, 0)
            numbers = swapped.masked_fill(~there, self.padding)
        logits: Tensor = self.model(input_ids=numbers, attention_mask=there.long()).logits
        return logits


class ImageClassifier(nn.Module):
    """The same."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [n, classes] from images [n, channels, height, width]."""
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits

    def train(self, mode: bool = True) -> ImageClassifier:
        """What is frozen keeps the statistics that it came with, too."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            norm = isinstance(module, _BatchNorm)
            if norm and own and not any(p.requires_grad for p in own):
                module.eval()
        return self


def pretrained(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    starts_from: Pretrained,
    freeze: Sequence[str] = (),
    rank: int | None = None,
    alpha: float = 16.0,
    adapt: Sequence[str] = (BODY,),
) -> nn.Module:
    """A pretrained model with a head for these classes; all of it is trained unless some is frozen.

    Args:
        starts_from: given with the data, which were prepared for it.
        freeze: parts that stay as they are: runs of a parameter's dotted name, such as
            ``embeddings`` or ``encoder.layer.0``; ``body`` is all but the head.
        rank: of adapters: the body stays as it is, and they are trained with the head.
        alpha: over the rank, it is what an adapter's change is multiplied by.
        adapt: parts whose linear layers get an adapter, named as in ``freeze``.

    Raises:
        ValueError: for a model that cannot do this, and for names and numbers that do not fit it.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, but got {rank}: leave it out for no adapters")
    if rank is None and tuple(adapt) != (BODY,):
        raise ValueError("adapt says where adapters go, but there are none: set rank, or leave out")
    model = _load(starts_from, classes)
    if isinstance(starts_from.samples, Words):
        _check_texts(model, input_shape[0], starts_from.samples.tokenizer.get_vocab_size())
    else:
        _check_images(model, (input_shape[1], input_shape[2]))
    frozen = _matching(model, "freeze", freeze, dict(model.named_parameters()))
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    if rank is not None:
        frozen |= _matching(model, "freeze", [BODY], dict(model.named_parameters()))
        _adapt(model, _matching(model, "adapt", adapt, linear), rank, alpha)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze {list(freeze)} leaves nothing to train: take a name out")
    if isinstance(starts_from.samples, Words):
        return TextClassifier(model, starts_from.samples.padding).train()
    return ImageClassifier(model).train()


def _check_texts(model: Any, length: int, vocabulary: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary > rows:
        raise ValueError(
            f"its tokenizer has {vocabulary:,} tokens, but the model has vectors for {rows:,}: "
            "the two are not of one model"
        )
    positions = _positions(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"texts have up to {length} tokens, but it has positions for {positions}: set "
            f"data.preprocess.length to {positions} or less; longer texts are cut"
        )


def _check_images(model: Any, size: tuple[int, int]) -> None:
    """A transformer has a position for each part of an image of one size; others take any."""
    asked = getattr(model.config, "image_size", None)
    wanted = (asked, asked) if isinstance(asked, int) else tuple(asked or size)
    fixed = any(name.endswith("position_embeddings") for name, _ in model.named_parameters())
    if fixed and wanted != size:
        raise ValueError(
            f"it takes images of {wanted[0]} x {wanted[1]} (height, width), but these have "
            f"{size[0]} x {size[1]}: set data.preprocess.size to {list(wanted)}, for files in "
            "class folders"
        )


def _load(given: Pretrained, classes: int) -> Any:
    """The architecture's model for classification, with the weights it was given."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"it needs the library transformers, which is not here ({error}): pip install "
            "'lepton-ray[hf]', on every machine that trains"
        ) from error
    settings = dict(given.config)
    kind = settings.pop("model_type", None)
    texts = given.samples if isinstance(given.samples, Words) else None
    head = (
        transformers.AutoModelForSequenceClassification
        if texts
        else transformers.AutoModelForImageClassification
    )
    known = head._model_mapping
    try:
        config_class = transformers.AutoConfig.for_model(kind).__class__
    except (ValueError, KeyError):
        code = "; code that comes with a model is never run" if "auto_map" in settings else ""
        raise ValueError(
            f"config.json has model_type {kind!r}, which transformers {transformers.__version__} "
            f"does not know{code}: choose another model"
        ) from None
    # Labels are the experiment's, and the shape of the head follows from their number.
    for name in ("id2label", "label2id", "num_labels", "auto_map", "dtype", "torch_dtype"):
        settings.pop(name, None)
    if texts:
        settings |= {"pad_token_id": texts.padding, "use_cache": False}
    config = config_class.from_dict(settings)
    if config_class not in known or getattr(config, "is_encoder_decoder", False):
        what, such = (
            ("a text", "an encoder such as bert, distilbert, roberta or deberta-v2")
            if texts
            else ("an image", "one such as resnet, convnext, mobilenet_v2 or vit")
        )
        raise ValueError(
            f"the architecture {kind!r} has no head for the classes of {what} that can be served: "
            f"choose {such}"
        )
    config.num_labels = classes
    try:
        weights = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for content in given.weights.values()
            for name, tensor in safetensors.torch.load(content.tobytes()).items()
        }
        with _quiet():
            model, found = known[config_class].from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=torch.float32,
                attn_implementation="eager",  # the fused kernels' backward is not exact everywhere
                ignore_mismatched_sizes=True,  # of a head for other classes, see below
                output_loading_info=True,
            )
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"its weights cannot be loaded: {error}") from error
    _check_loaded(model, found)
    return model


def _check_loaded(model: Any, found: dict[str, Any]) -> None:
    """Only the head, and the pooler that some pretraining has none of, may start at random."""
    absent = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    body = _prefix(model)
    broken = sorted(n for n in absent if n.startswith(body) and ".pooler." not in n)
    if broken:
        raise ValueError(
            f"its weights lack {broken[0]!r} and {len(broken) - 1} more in the form config.json "
            "says: the two are not of one model"
        )


def _prefix(model: Any) -> str:
    return f"{model.base_model_prefix}."


def _positions(model: Any) -> int | None:
    """Tokens that a text may have; None for any number."""
    most = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # Where padding has a position of its own, a text's begin behind it.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return most if isinstance(most, int) and most > 0 else None


def _matching(
    model: Any, setting: str, parts: Sequence[str], among: dict[str, Any]
) -> dict[str, Any]:
    """Those of named things that are in one of the parts.

    Raises:
        ValueError: for a part that has none.
    """
    if isinstance(parts, str):
        raise ValueError(f"{setting} must be a list of names, but got {parts!r}: write [{parts}]")
    found: dict[str, Any] = {}
    for part in parts:
        prefix = _prefix(model)
        inside = {
            name: value
            for name, value in among.items()
            if (name.startswith(prefix) if part == BODY else f".{part}." in f".{name}.")
        }
        if not inside:
            ends = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
            known = nearest(part, {BODY, *(end for end in ends if not end.isdigit())})
            raise ValueError(
                f"{setting} names {part!r}, where there is nothing to {setting}, {known}"
            )
        found.update(inside)
    return found


def _adapt(model: Any, layers: dict[str, Any], rank: int, alpha: float) -> None:
    for name, layer in layers.items():
        most = min(layer.in_features, layer.out_features)
        if rank > most:
            raise ValueError(
                f"rank must be at most {most}, the width of {name}, but got {rank}: lower it"
            )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LowRank(layer, rank, alpha))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library shows bars and logs what it did not find; `_check_loaded` judges that."""
    from transformers.utils import logging as shown

    level, bars = shown.get_verbosity(), shown.is_progress_bar_enabled()
    shown.set_verbosity_error()
    shown.disable_progress_bar()
    try:
        yield
    finally:
        shown.set_verbosity(level)
        if bars:
            shown.enable_progress_bar()
