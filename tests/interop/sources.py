# SPDX-License-Identifier: Apache-2.0
"""Sources to export: Hugging Face folders of small random models, and modules in a file of their own."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 61

MODULES = """
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.drop = nn.Embedding(10, 8), nn.Linear(8, 4), nn.Dropout(0.5)

    def forward(self, ids, mask=None, scale=1.0):
        x = self.embed(ids)
        if mask is not None:
            x = x * mask[..., None]
        return {"logits": self.head(self.drop(x)), "states": (x,)}


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.mean() > 0 else x - 1


class Noise(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


class Fixed(nn.Module):
    def forward(self, x):
        return x + torch.arange(12.0).reshape(2, 6)


class InPlace(nn.Module):
    def forward(self, x):
        x.mul_(2)
        return x + 1


def in_place():
    return InPlace(), torch.ones(3, 4)


class Nameless(nn.Module):
    def forward(self, *x):
        return x[0] + 1


def by_name():
    return Tagger(), {"mask": torch.rand(1, 6), "ids": torch.arange(6)[None]}


def by_place():
    return Tagger(), (torch.arange(12).reshape(2, 6) % 10,)


def alone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()), torch.ones(4, 6)


def half():
    return alone()[0].half(), torch.ones(4, 6).half()


def branch():
    return Branch(), torch.ones(2, 6)


def noise():
    return Noise(), torch.ones(2, 6)


def fixed():
    return Fixed(), torch.ones(2, 6)


def nameless():
    return Nameless(), torch.ones(2, 6)


def no_pair():
    return Branch()


def no_tensor():
    return Branch(), {"x": 3}


def misnamed():
    return Branch(), {"y": torch.ones(2)}


def broken():
    raise ValueError("no weights")
"""


def save_llama(folder: Path) -> Path:
    """A decoder of two layers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_t5(folder: Path, layers: int = 2, weak: tuple[int, ...] = ()) -> Path:
    """An encoder of two layers and a decoder, of which some layers add little."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=layers, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.shared.weight.normal_(0, 1)
        for number, block in enumerate(model.decoder.block):
            for name, parameter in block.named_parameters():
                if name.endswith((".o.weight", ".wo.weight")):
                    parameter.normal_(0, 0.02 if number in weak else 1.0)
    model.save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """An encoder of two layers with its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(folder / "vocab.txt").save_pretrained(folder)
    return folder
