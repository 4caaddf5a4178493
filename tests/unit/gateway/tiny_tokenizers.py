"""Small tokenisers of the kinds that models come with, written as Hugging Face folders."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "the quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs.",
    "Grüße aus Köln: naïve façade, 日本語テキスト, Привет мир, שלום, 👋🌍 and €uro signs.",
    "def main(argv):\n    return [int(word) for word in argv]\n\n\n" * 3,
]
SAMPLES = [
    *CORPUS,
    "hello",
    " leading space",
    "two  spaces and a tab\t.",
    "emoji 👩‍👩‍👧‍👦 family, flag 🇩🇪, combining é",
    "unseen ꙮ character \U0001f9ec and ",
    "\n\n",
    "<|end|> in the middle <|end|> and</s>",
]


def byte_level(folder: Path) -> Path:
    """Like GPT-2, Llama 3, Qwen and SmolLM2: every token is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # An added token that is not special, and is plain text rather than printable bytes.
    tokenizer.add_tokens([AddedToken("→ tool", special=False, normalized=False)])
    return _write(folder, tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def byte_fallback(folder: Path) -> Path:
    """Like Llama 2 and Mistral: pieces of text with ``▁`` for spaces, bytes for what is unknown."""
    bytes_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["the", "quick", "fox", ".", ",", "▁the", "▁dog", "▁", "a", "ü", "▁Köln", "\ufffd"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_tokens, *words]
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens += [letter for letter in letters if letter not in tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return _write(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(folder: Path) -> Path:
    """Like T5's relatives: a decoder that treats the first token differently."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _write(folder, tokenizer, eos_token="</s>")


ALL = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}


def _write(folder: Path, tokenizer: Tokenizer, **special_tokens: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
