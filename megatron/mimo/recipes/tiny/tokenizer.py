"""A byte-level tokenizer of a few hundred tokens, made where it is needed: any text round-trips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["tiny_tokenizer"]


def tiny_tokenizer(
    special: Mapping[str, int],
    *,
    vocab_size: int,
    texts: Iterable[str],
    bos: str | None,
    eos: str,
    pad: str,
    names: Mapping[str, str] | None = None,
) -> Any:
    """A fast tokenizer of transformers that splits ``texts`` into few tokens.

    Args:
        special: special tokens and the ids that the model's configuration gives them.
        vocab_size: ids are below it.
        texts: what it is trained on; the same ones give the same tokenizer.
        bos: the special token that begins every text; None for none.
        eos: the one that ends an answer.
        pad: the one that fills.
        names: attributes of the tokenizer by which a processor finds special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = learner.get_vocab()
    free = (number for number in range(vocab_size) if number not in special.values())
    vocabulary = dict(zip(sorted(learned, key=learned.__getitem__), free, strict=False))
    merges = _merges(learner)
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, **special}, merges=merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special[bos])]
        )
    others = [token for token in special if token not in (bos, eos, pad)]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        **(
            {"additional_special_tokens": others}
            if names is None
            else {"extra_special_tokens": names}
        ),
    )


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]
