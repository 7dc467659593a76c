"""The contenders of `benchmarks/loader.py`, one process each: raw shards -> int32 rows of seq_len + 1 tokens.

It starts them pinned to some cores and writes to stdin, one line per turn with the tokens and seconds to reach. The
answer, a line of JSON, gives the number of tokens and the CPU seconds of this process, which consumes the rows.
"""

from __future__ import annotations

import importlib.machinery
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import msgspec
import numpy as np
import sentencepiece
import zstandard

Numbers = Iterator[int]  # tokens of each batch

BATCH_ROWS = 64
MDS_TOKENS = 4_000_000  # converted once, then read repeatedly
VISION = {"datasets": "VisionDataset", "transforms": None, "transforms.functional": "to_tensor"}


class Settings(msgspec.Struct):
    """The settings given to every contender."""

    contender: str
    shards: list[str]  # .jsonl.zst; those of this process if the contender has several
    tokenizer: str
    seq_len: int
    workers: int  # processes besides this one; 0 = none
    index_dir: str


class Record(msgspec.Struct):
    text: str


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    batches: Numbers | None = None
    for line in sys.stdin:
        begin, cpu = time.monotonic(), time.process_time()
        if batches is None:  # the whole cost of starting belongs to the first answer
            batches = CONTENDERS[settings.contender](settings)
        tokens = 0
        wanted, seconds = json.loads(line)
        while tokens < wanted or time.monotonic() - begin < seconds:
            tokens += next(batches)
        answer = {"tokens": tokens, "seconds": time.monotonic() - begin, "consumer_cpu": time.process_time() - cpu}
        print(json.dumps(answer), flush=True)


def headrace(settings: Settings) -> Numbers:
    from shards import DataConfig, Loader

    config = DataConfig.parse(
        {
            "tokenizer": settings.tokenizer,
            "seq_len": settings.seq_len,
            "lanes": 16,
            "num_workers": settings.workers,
            "index_dir": settings.index_dir,
            "sources": [{"name": "corpus", "paths": settings.shards}],
        }
    )
    for batch in Loader(config, BATCH_ROWS):
        yield batch.tokens.size - batch.padding_tokens


def hugging_face(settings: Settings) -> Numbers:
    import torch
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    encode = numpy_encoder(settings)
    row_tokens = settings.seq_len + 1

    def tokenize(records: dict[str, list[str]]) -> dict[str, Any]:
        flat = np.concatenate([encode(text) for text in records["text"]])
        rows = len(flat) // row_tokens
        return {"input_ids": flat[: rows * row_tokens].reshape(rows, row_tokens)}

    data = load_dataset("json", data_files=settings.shards, split="train", streaming=True)
    columns = list(next(iter(data)))
    rows = data.map(tokenize, batched=True, batch_size=1000, remove_columns=columns).with_format("torch")
    while True:
        for batch in DataLoader(rows, batch_size=BATCH_ROWS, num_workers=settings.workers):
            yield batch["input_ids"].to(torch.int32).numel()


def bare_loop(settings: Settings) -> Numbers:
    for rows in packed(settings):
        yield rows.size


def encode_alone(settings: Settings) -> Numbers:
    processor = sentencepiece.SentencePieceProcessor(model_file=settings.tokenizer)
    all_texts = list(itertools.islice(texts(settings), 8000))
    for text in itertools.cycle(all_texts):
        yield len(processor.encode(text))


def mds_convert(settings: Settings) -> Numbers:
    streaming = import_streaming()
    folder = tempfile.mkdtemp(prefix="mds-")
    try:
        with mds_writer(streaming, folder, settings.seq_len) as writer:
            for rows in packed(settings):
                for row in rows.astype(np.uint16):
                    writer.write({"tokens": row})
                yield rows.size
    finally:
        shutil.rmtree(folder)


def mds_read(settings: Settings) -> Numbers:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    streaming = import_streaming()
    folder = tempfile.mkdtemp(prefix="mds-")
    try:
        converted = 0
        with mds_writer(streaming, folder, settings.seq_len) as writer:
            for rows in packed(settings):
                for row in rows.astype(np.uint16):
                    writer.write({"tokens": row})
                converted += rows.size
                if converted > MDS_TOKENS:
                    break
        data = streaming.StreamingDataset(local=folder, shuffle=True, batch_size=BATCH_ROWS)
        while True:
            loader = DataLoader(data, batch_size=BATCH_ROWS, num_workers=settings.workers, collate_fn=stack)
            for batch in loader:
                yield batch.numel()
    finally:
        shutil.rmtree(folder)


def stack(samples: list[dict[str, Any]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int32))


def mds_writer(streaming: Any, folder: str, seq_len: int) -> Any:
    return streaming.MDSWriter(out=folder, columns={"tokens": f"ndarray:uint16:{seq_len + 1}"}, exist_ok=True)


def import_streaming() -> Any:
    """Import mosaicml-streaming, which imports torchvision for image data sets; that need not be installed."""
    for name, attribute in [("", None), *VISION.items()]:
        name = f"torchvision.{name}".rstrip(".")
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if attribute:
            setattr(module, attribute, object)
    import streaming

    return streaming


def packed(settings: Settings) -> Iterator[np.ndarray]:
    """Yield int32 [BATCH_ROWS, seq_len + 1]: documents in one stream, cut into rows, repeating the corpus."""
    encode = numpy_encoder(settings)
    rest: list[np.ndarray] = []
    size, wanted = 0, BATCH_ROWS * (settings.seq_len + 1)
    for text in texts(settings):
        rest.append(encode(text))
        size += len(rest[-1])
        if size >= wanted:
            flat = np.concatenate(rest)
            whole = size // wanted * wanted
            for begin in range(0, whole, wanted):
                yield flat[begin : begin + wanted].reshape(BATCH_ROWS, -1)
            rest, size = [flat[whole:]], size - whole


def texts(settings: Settings) -> Iterator[str]:
    """Yield all texts, repeatedly."""
    decoder = msgspec.json.Decoder(Record)
    for shard in itertools.cycle(settings.shards):
        with open(shard, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as raw:
            for line in io.BufferedReader(raw, 1 << 20):
                yield decoder.decode(line).text


def numpy_encoder(settings: Settings) -> Callable[[str], np.ndarray]:
    """Return a function from text to int32 ids with BOS and EOS, by SentencePiece's fastest call."""
    processor = sentencepiece.SentencePieceProcessor(model_file=settings.tokenizer)
    return lambda text: processor.EncodeAsNumpy(text, add_bos=True, add_eos=True)


CONTENDERS: dict[str, Callable[[Settings], Numbers]] = {
    "headrace": headrace,
    "datasets": hugging_face,
    "bare_loop": bare_loop,
    "mds_convert": mds_convert,
    "mds_read": mds_read,
    "encode_alone": encode_alone,
}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
