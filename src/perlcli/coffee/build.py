"""Builds the embedded base: a tokenizer and a Llama of 0.95 million parameters, trained on generated documents.

`python -m perlcli.coffee.build --output DIR` takes about a quarter of an hour on one core. The same seed, versions and
kind of processor give the same files.
"""

import argparse
import platform
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perlcli.coffee import BASE
from perlcli.coffee.documents import Document, documents

SPECIAL = PAD, END, AGENT, TICKET = "<pad>", "<end>", "<agent>", "<ticket>"  # tokens 0 to 3
# The call's opening and each ", slot=" may become one token, so that a call takes about ten.
WORDS = r"add_order_item\(|, [a-z]+=| ?[A-Za-z']+|[0-9]| ?[^\sA-Za-z0-9]|\s"
VOCABULARY = 768
LENGTH = 512
DOCUMENTS = 300_000
BATCH = 48
LEARNING_RATE = 3e-3
# Weights in the loss: what the customer says, the verdict's first word, and everything that the agent says.
CUSTOMER, VERDICT, SPOKEN = 0.1, 8.0, 1.0
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{- "<agent>" -}}{%- generation -%}{{- message.content + "<end>" -}}{%- endgeneration -%}
{%- else -%}
{{- message.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<agent>" -}}{%- endif -%}"""

Example = tuple[list[int], list[float]]


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 768 tokens trained on the documents, with the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for document in documents(50_000, seed) for _, text in document)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[AGENT, TICKET],
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained base."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> Example:
    """A document's token ids, and the weight of each token in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    end, agent, ticket = (SPECIAL.index(token) for token in (END, AGENT, TICKET))
    for speaker, text in document:
        words = tokenizer.encode(text, add_special_tokens=False)
        if speaker == "agent":
            ids += [agent, *words, end]
            weights += [CUSTOMER] + [SPOKEN] * (len(words) + 1)
        elif speaker == "reaction":
            ids += words
            weights += [VERDICT] + [SPOKEN] * (len(words) - 1)
        else:
            ids += [ticket, *words] if speaker == "ticket" else words
            weights += [CUSTOMER] * (len(words) + (speaker == "ticket"))
    return ids, weights


def batches(count: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded token ids and loss weights, each (documents, tokens), in batches of documents of similar length."""
    rng = random.Random(f"coffee batches {seed}")
    stream = documents(count, seed)
    while chunk := [encode(document, tokenizer) for document in islice(stream, BATCH * 32)]:
        chunk.sort(key=lambda example: len(example[0]))
        groups = [chunk[start : start + BATCH] for start in range(0, len(chunk), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, tokenizer.pad_token_id)


def collate(group: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The group's token ids and loss weights, each (documents, tokens), padded on the right with weight 0."""
    length = max(len(ids) for ids, _ in group)
    ids = [ids + [pad] * (length - len(ids)) for ids, _ in group]
    weights = [weights + [0.0] * (length - len(weights)) for _, weights in group]
    return torch.tensor(ids), torch.tensor(weights)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> None:
    """Trains the model once over the documents; padding on the right needs no attention mask."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    steps = -(-count // BATCH)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    started, tokens = time.monotonic(), 0
    for step, (ids, weights) in enumerate(batches(count, tokenizer, seed), start=1):
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += int((weights > 0).sum())
        if step % 100 == 0 or step == steps:
            verdict = losses.detach()[weight == VERDICT].mean()
            seconds = time.monotonic() - started
            print(f"{step}/{steps} loss {loss:.3f} verdict {verdict:.3f} tokens {tokens} {seconds:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, card: str) -> None:
    """Writes the model in bf16, its tokenizer, generation settings and card."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(card, encoding="utf-8")
    for path in output.iterdir():
        path.chmod(0o644)  # safetensors writes files that nobody else may read


def model_card(model: LlamaForCausalLM, count: int, seed: int) -> str:
    """The model card that is saved with the weights."""
    return f"""\
---
license: apache-2.0
language: en
---
# Coffee base

A tiny Llama ({model.num_parameters():,} parameters, bf16) that knows how orders are placed in a coffee shop, read back,
confirmed and corrected. It exists so that `perl` can show preference learning on a laptop without a download; it is of
no other use.

Pretrained once over {count:,} generated documents (`perlcli/coffee/documents.py`, seed {seed}). They hold only orders
of the train side of the split (`perlcli/coffee/world.py`), so it never saw an order that the gold check is measured
on. No text by others went into it.

Built with Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__} and \
tokenizers {tokenizers.__version__}:

    OMP_NUM_THREADS=1 python -m perlcli.coffee.build --seed {seed}

Licence: Apache-2.0.
"""


def main() -> None:
    """Builds the base from the command line."""
    parser = argparse.ArgumentParser(description="Build the embedded coffee base.")
    parser.add_argument("--output", type=Path, default=BASE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(options.seed)
    model = build_model(tokenizer, options.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, options.documents, options.seed)
    save(model, tokenizer, options.output, model_card(model, options.documents, options.seed))


if __name__ == "__main__":
    main()
