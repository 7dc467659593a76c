"""Draw docs/batch.svg and docs/checkpoint.svg: `python docs/make_pictures.py`.

One follows a batch from a shard's bytes to the loss, the other a checkpoint from the save to a resume on other ranks.
The colours follow the reader's light or dark theme. `--check` writes nothing and exits with 1 if a picture is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent

# The modules behind each box. This is the only place of this script that names them.
MODULES = {
    # A batch
    "shard": ("shards/storage/files", "shards/formats/"),
    "index": ("shards/index/shard_index", "shards/index/splice_points"),
    "manifest": ("shards/preparation", "shards/index/manifest"),
    "plan": ("shards/plan/segments", "shards/source"),
    "lanes": ("shards/plan/mixing", "shards/lane"),
    "requests": ("shards/prefetch", "shards/windows/worker_pool"),
    "read": ("shards/index/decoders", "shards/records/json_lines"),
    "tokenize": ("shards/tokenize/tokenizer",),
    "pack": ("shards/windows/packing", "shards/windows/window"),
    "loader": ("shards/loader",),
    "batch": ("shards/batch",),
    "feed": ("pretrain/feed",),
    "model": ("pretrain/model/transformer",),
    "loss": ("pretrain/engine",),
    "record": ("pretrain/journal", "pretrain/run/metrics"),
    # A checkpoint
    "due": ("pretrain/loop", "pretrain/trainer"),
    "copy": ("pretrain/engine", "pretrain/checkpoint/staging"),
    "continue": ("pretrain/loop",),
    "write": ("pretrain/checkpoint/write",),
    "agree": ("pretrain/checkpoint/save",),
    "complete": ("pretrain/checkpoint/store",),
    "choose": ("pretrain/checkpoint/resume",),
    "verify": ("pretrain/checkpoint/resume",),
    "compare": ("pretrain/checkpoint/state",),
    "convert": ("pretrain/checkpoint/universal", "pretrain/checkpoint/zero_files"),
    "load": ("pretrain/engine",),
    "resume": ("pretrain/assembly", "shards/plan/cursor"),
}

COLUMNS = 3
BOX, GAP, MARGIN = 276, 48, 32  # widths in pixels: a box, the space between two, the margin
HEADING, DROP = 30, 44  # heights: a band's heading, the space between bands where arrows turn
TITLE_LINE, LINE, MODULE_LINE, PADDING = 22, 18, 16, 12
MAX_LETTERS = 38  # per line in a box; more would overflow it in a wide font
WIDTH = 2 * MARGIN + COLUMNS * BOX + (COLUMNS - 1) * GAP
TOP = 64  # height above the first band

STYLE = """
    .page { fill: #ffffff; stroke: #d0d7de }
    .box { fill: #f6f8fa; stroke: #57606a }
    .marked { fill: #ddf4ff; stroke: #0969da }
    .arrow { fill: none; stroke: #57606a; stroke-width: 1.5 }
    .later { stroke-dasharray: 5 4 }
    .head { fill: #57606a }
    text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px;
           fill: #1f2328 }
    .caption { font-size: 19px; font-weight: 600 }
    .band { font-size: 14px; font-weight: 600; fill: #0969da }
    .title { font-size: 15px; font-weight: 600 }
    .module { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 11.5px;
              fill: #57606a }
    .label { font-size: 12px; fill: #57606a }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; stroke: #3d444d }
      .box { fill: #161b22; stroke: #8b949e }
      .marked { fill: #0c2d4d; stroke: #58a6ff }
      .arrow { stroke: #8b949e }
      .head { fill: #8b949e }
      text { fill: #e6edf3 }
      .band { fill: #58a6ff }
      .module, .label { fill: #9da7b3 }
    }
"""


class Box(NamedTuple):
    """One stage; `name` is its key in MODULES."""

    name: str
    title: str
    lines: tuple[str, ...]
    marked: bool = False  # the picture's subject is created here


class Band(NamedTuple):
    """Stages that run at the same time and place, from left to right."""

    heading: str
    boxes: tuple[Box, ...]


class Link(NamedTuple):
    """An arrow from one stage to another."""

    start: str
    end: str
    label: str = ""  # shown on arrows to another band
    later: bool = False  # dashed: crosses into another process


class Picture(NamedTuple):
    """A picture: its caption, bands and links."""

    file: str
    caption: str
    bands: tuple[Band, ...]
    links: tuple[Link, ...]


BATCH = Picture(
    "batch.svg",
    "A batch, from a shard's bytes to the loss",
    (
        Band(
            "Once per shard: launch/index.py, or the first start of a run",
            (
                Box("shard", "Shard", ("a file of JSON lines, local or remote;", "zstd, gzip or plain")),
                Box("index", "Index", ("from one pass: size, content hash,", "record table, entries to decode from")),
                Box("manifest", "Manifest", ("all indexes of a source in one file,", "which every rank reads")),
            ),
        ),
        Band(
            "In the process of each rank: from the indexes, the config and the seed alone",
            (
                Box("plan", "Plan", ("segments, permuted each epoch, dealt", "to V lanes; windows in them")),
                Box("lanes", "Lanes", ("which source each row comes from,", "by weight; a cursor per lane")),
                Box("requests", "Requests", ("windows that lanes need next,", "the most urgent first")),
            ),
        ),
        Band(
            "In worker processes: one window at a time",
            (
                Box("read", "Documents", ("decoded from the nearest entry,", "compared with the index, parsed")),
                Box("tokenize", "Tokens", ("BOS + text + EOS", "of each document")),
                Box("pack", "Rows", ("documents shuffled and packed into", "seq_len + 1 tokens; rows shuffled")),
            ),
        ),
        Band(
            "In the process of each rank: one batch per step",
            (
                Box("loader", "Loader", ("row j comes from lane j mod V;", "lane v belongs to rank v mod dp_size")),
                Box(
                    "batch",
                    "Batch",
                    ("tokens and segment ids, int32", "[rows, seq_len + 1]; row hash; state"),
                    marked=True,
                ),
                Box("feed", "Feed", ("rows to the tensor-parallel group;", "one collective: targets N, hash, stop")),
            ),
        ),
        Band(
            "On the device",
            (
                Box("model", "Forward pass", ("negative log-likelihood of every", "valid target of a micro-batch")),
                Box(
                    "loss",
                    "Loss and step",
                    ("sum of nll * ranks / N, backward,", "clip, AdamW: DeepSpeed"),
                    marked=True,
                ),
                Box("record", "Record", ("metrics.jsonl, wandb: loss,", "batch_hash, tokens of each source")),
            ),
        ),
    ),
    (
        Link("shard", "index"),
        Link("index", "manifest"),
        Link("manifest", "plan"),
        Link("plan", "lanes"),
        Link("lanes", "requests"),
        Link("requests", "read", "task, through a pipe", later=True),
        Link("read", "tokenize"),
        Link("tokenize", "pack"),
        Link("pack", "loader", "rows, through a pipe", later=True),
        Link("loader", "batch"),
        Link("batch", "feed"),
        Link("feed", "model"),
        Link("model", "loss"),
        Link("loss", "record"),
    ),
)

CHECKPOINT = Picture(
    "checkpoint.svg",
    "A checkpoint, from the save to a resume on other ranks",
    (
        Band(
            "In the training loop, which waits for the copy alone",
            (
                Box(
                    "due",
                    "Step k is done",
                    ("checkpoint.every, a signal, or the end", "of the run or of the job's time"),
                ),
                Box("copy", "Copy", ("weights and optimizer state, in host", "memory; the cursors of all V lanes")),
                Box("continue", "Step k + 1", ("training goes on; it changes", "nothing that is being saved")),
            ),
        ),
        Band(
            "In the background, on every rank",
            (
                Box("write", "Files", ("each new, hashed as it is written,", "then fsync")),
                Box("agree", "All ranks done", ("told by the step's own collective;", "hashes go to rank 0")),
                Box(
                    "complete",
                    "COMPLETE",
                    ("names, sizes and hashes of all files,", "written last; then older ones go"),
                    marked=True,
                ),
            ),
        ),
        Band(
            "At the next start: after an exit, a kill or a crash, on any number of ranks",
            (
                Box("choose", "Choose", ("the newest step with a COMPLETE;", "a folder without one is no checkpoint")),
                Box("verify", "Verify", ("ranks share the hashing of its files;", "a damaged one is set aside")),
                Box("compare", "Layout", ("tp_size, dp_size and ZeRO stage,", "then and now")),
            ),
        ),
        Band(
            "Until training goes on",
            (
                Box("convert", "Convert", ("every weight put together from its", "shares and cut for the new tp_size")),
                Box("load", "Load", ("each rank takes its weights", "and optimizer state: DeepSpeed")),
                Box(
                    "resume",
                    "Resume at step k + 1",
                    ("lanes are dealt to the ranks anew;", "the journals are cut back to step k"),
                    marked=True,
                ),
            ),
        ),
    ),
    (
        Link("due", "copy"),
        Link("copy", "continue"),
        Link("copy", "write", "the copy"),
        Link("write", "agree"),
        Link("agree", "complete"),
        Link("complete", "choose", "any time later", later=True),
        Link("choose", "verify"),
        Link("verify", "compare"),
        Link("compare", "load", "the same layout"),
        Link("compare", "convert", "another layout"),
        Link("convert", "load"),
        Link("load", "resume"),
    ),
)

PICTURES = (BATCH, CHECKPOINT)


class Place(NamedTuple):
    """A box's position and height, in pixels."""

    band: int
    column: int
    x: int
    y: int
    height: int


def draw(picture: Picture) -> str:
    """Draw a picture as SVG."""
    places, headings, height = _layout(picture)
    summary = "; ".join(f"{band.heading}: {', '.join(box.title for box in band.boxes)}" for band in picture.bands)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img">',
        f"  <title>{escape(picture.caption)}</title>",
        f"  <desc>{escape(summary)}.</desc>",
        f"  <style>{STYLE}  </style>",
        '  <marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker>',
        f'  <rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        _text("caption", MARGIN, 40, picture.caption),
    ]
    for band, y in zip(picture.bands, headings, strict=True):
        parts.append(_text("band", MARGIN, y, band.heading))
        for box in band.boxes:
            parts += _box(box, places[box.name])
    for link in picture.links:
        parts += _link(link, places[link.start], places[link.end])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _layout(picture: Picture) -> tuple[dict[str, Place], list[int], int]:
    """Find the place of every box, the baseline of every band's heading, and the picture's height."""
    places, headings, y = {}, [], TOP
    for number, band in enumerate(picture.bands):
        headings.append(y + HEADING - 12)
        y += HEADING
        height = max(_height(box) for box in band.boxes)
        for column, box in enumerate(band.boxes):
            places[box.name] = Place(number, column, MARGIN + column * (BOX + GAP), y, height)
        y += height + DROP
    return places, headings, y - DROP + MARGIN


def _height(box: Box) -> int:
    return 2 * PADDING + TITLE_LINE + LINE * len(box.lines) + MODULE_LINE * len(MODULES[box.name])


def _box(box: Box, place: Place) -> Iterator[str]:
    kind = "marked" if box.marked else "box"
    assert max(map(len, box.lines)) <= MAX_LETTERS, box
    x, y = place.x + PADDING, place.y + PADDING + 14
    yield f'  <rect class="{kind}" x="{place.x}" y="{place.y}" width="{BOX}" height="{place.height}" rx="6"/>'
    yield _text("title", x, y, box.title)
    for number, line in enumerate(box.lines):
        yield _text("line", x, y + TITLE_LINE + number * LINE, line)
    first = y + TITLE_LINE + len(box.lines) * LINE + 2
    for number, module in enumerate(MODULES[box.name]):
        yield _text("module", x, first + number * MODULE_LINE, module if module.endswith("/") else f"{module}.py")


def _link(link: Link, start: Place, end: Place) -> Iterator[str]:
    """Draw an arrow: straight between neighbours, otherwise through the space between two bands.

    The arrow enters a band's first box from the left, where it crosses no heading, and other boxes from above.
    """
    if start.band == end.band:
        assert end.column == start.column + 1, link
        way = f"M{start.x + BOX} {start.y + start.height // 2} H{end.x}"
    else:
        assert end.band == start.band + 1, link
        turn = start.y + start.height + DROP // 2
        way = f"M{start.x + BOX // 2} {start.y + start.height} V{turn} "
        if end.column:
            way += f"H{end.x + BOX // 2} V{end.y}"
        else:
            way += f"H{MARGIN // 2} V{end.y + end.height // 2} H{end.x}"
        if link.label:
            yield _text("label", end.x + (BOX // 2 + 8 if end.column else 0), turn + 16, link.label)
    later = " later" if link.later else ""
    yield f'  <path class="arrow{later}" marker-end="url(#head)" d="{way}"/>'


def _text(kind: str, x: int, y: int, content: str) -> str:
    return f'  <text class="{kind}" x="{x}" y="{y}">{escape(content)}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a picture is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for picture in PICTURES:
        path, drawn = FOLDER / picture.file, draw(picture)
        if not check:
            path.write_text(drawn)
        elif not path.exists() or path.read_text() != drawn:
            stale.append(picture.file)
    if stale:
        print(f"{', '.join(stale)}: stale, run `python docs/make_pictures.py`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
