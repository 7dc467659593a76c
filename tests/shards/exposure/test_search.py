"""Documents that share a text are found, all of them and no others, wherever the text was cut out."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import datasets
import pytest

from shards import ConfigError, DataConfig, ShardError, preparation, read_documents
from shards.exposure import grams, text_index
from shards.exposure.grams import MIN_WORDS, Overlap
from shards.exposure.passes import make_all
from shards.exposure.search import DocumentPlace, TextMatch, TextSearch
from shards.index.manifest import Shard
from shards.suites.normalization import comparable
from tests.shards.corpora import SAMPLE, config, record, words, write_shard
from tests.shards.exposure.test_grams import plain_overlap
from tests.shards.suites.test_decontaminate import plain_words


def shards_of(data: DataConfig) -> list[list[Shard]]:
    return [preparation.source_shards(data, source) for source in data.sources]


def searched(data: DataConfig) -> TextSearch:
    """Make all text indexes of a config's shards, in this process: `test_passes.py` makes them in others."""
    shards = shards_of(data)
    for source, listed in zip(data.sources, shards, strict=True):
        for shard in listed:
            text_index.obtain(data, source, shard)
    return TextSearch(data, shards)


Corpus = tuple[DataConfig, dict[DocumentPlace, str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Write two sources of real text, with copies in other spellings, bad and blank lines; return all documents."""
    folder = tmp_path_factory.mktemp("corpus")
    found = [d.text for d in islice(read_documents(SAMPLE / "pile-00.jsonl.zst"), 40)]
    found += [d.text for d in islice(read_documents(SAMPLE / "dolma-wikipedia-0000.json.gz"), 30)]
    found = [text[:2500] for text in found]
    chance = random.Random(2)
    chance.shuffle(found)
    found += [text.upper() for text in found[:5]] + ["…", "", found[7], f"Quoted: “{found[8]}”", found[9][:300]]
    names = ["a-0.jsonl.zst", "a-1.json.gz", "b-0.jsonl"]
    documents = {}
    for number, name in enumerate(names):
        lines = [b"\n", b'{"text": 3}\n']
        for text in found[number::3]:
            lines.append(record(text, id=f"id {len(lines)}"))
            documents[DocumentPlace(number // 2, number % 2, len(lines))] = text
        write_shard(folder / name, b"".join(lines), frames=3)
    sources = [{"name": name, "paths": [str(folder / f"{name}-*")]} for name in "ab"]
    return config(sources, on_bad_record="skip", index_dir=folder / "index"), documents


def questions(documents: list[str]) -> list[str]:
    """Cut excerpts out of documents, of any length and between any words, some respelled; also what is nowhere."""
    chance = random.Random(3)
    asked = [*documents[:20], *(" ".join(documents[i : i + 3]) for i in range(10)), words(5, 100)]
    for text in documents:
        parts = text.split()
        first = chance.randrange(max(1, len(parts)))
        asked.append(chance.choice(["  ", "\n", " ... "]).join(parts[first : first + chance.choice([40, 100, 999])]))
    return [text for text in asked if len(plain_words(*comparable([text]))) >= MIN_WORDS]


def test_texts_are_found_as_a_plain_search_of_all_documents_finds_them(corpus: Corpus) -> None:
    data, documents = corpus
    search = searched(data)
    asked = questions(list(documents.values()))
    split = {place: plain_words(*comparable([text])) for place, text in documents.items()}
    runs = {
        place: {tuple(found[i : i + MIN_WORDS]) for i in range(len(found) - MIN_WORDS + 1)}
        for place, found in split.items()
    }
    kinds = set()
    for text, matches in zip(asked, search.texts(asked), strict=True):
        text_words = plain_words(*comparable([text]))
        own = [tuple(text_words[i : i + MIN_WORDS]) for i in range(len(text_words) - MIN_WORDS + 1)]
        expected = {place for place, theirs in runs.items() if not theirs.isdisjoint(own)}
        assert [match.place for match in matches] == sorted(expected)
        for match in matches:
            assert match.overlap == plain_overlap(text_words, split[match.place])
            assert match.id == f"id {match.place.line - 1}"
            kinds.add((match.overlap.shared_words == len(text_words), *match.overlap[1:]))
    # Other runs of a text may lie in the document in another order, so that all words are shared without it
    assert kinds >= {(True, True, True), (True, True, False), (False, False, False)}


def test_together_and_alone_texts_are_found_alike(corpus: Corpus) -> None:
    data, documents = corpus
    search = searched(data)
    asked = questions(list(documents.values()))[::9]
    assert [search.texts([text])[0] for text in asked] == search.texts(asked)


def test_a_short_text_is_found_as_a_whole_document_or_said_to_be_too_short(tmp_path: Path) -> None:
    texts = ["Short, but whole.", words(1, MIN_WORDS + 3), "", "!", words(1, MIN_WORDS - 1)]
    shard = write_shard(tmp_path / "a.jsonl", b"".join(record(text) for text in texts))
    search = searched(config([{"name": "a", "paths": [str(shard)]}]))
    assert search.texts(["short but WHOLE"]) == [[TextMatch(DocumentPlace(0, 0, 1), None, Overlap(3, True, True))]]
    assert [match.place.line for match in search.texts([words(1, MIN_WORDS)])[0]] == [2]
    assert [match.place.line for match in search.texts([words(1, MIN_WORDS - 1)])[0]] == [5]
    assert search.texts([words(9, MIN_WORDS)]) == [[]]
    for text, count in (("but whole", 2), ("!", 0), (words(1, MIN_WORDS - 2), MIN_WORDS - 2)):
        with pytest.raises(ConfigError, match=f"has {count} words and is no whole document.* from {MIN_WORDS}"):
            search.texts([texts[1], text])


def test_what_is_found_does_not_depend_on_hashes_or_on_which_grams_are_indexed(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, documents = corpus
    asked = questions(list(documents.values()))[::9]
    search = searched(data)
    expected = search.texts(asked), search.ids(["id 5", "id 6"])
    monkeypatch.setattr(grams, "hash_of", lambda words: 1 << 60)
    monkeypatch.setattr(text_index, "hash_of_id", lambda identity: 1 << 60)
    monkeypatch.setattr(grams, "STRIDE", 3)
    other = data.model_copy(update={"index_dir": tmp_path})
    search = searched(other)
    assert (search.texts(asked), search.ids(["id 5", "id 6"])) == expected


def test_documents_are_found_by_their_ids(corpus: Corpus) -> None:
    data, documents = corpus
    search = searched(data)
    found = search.ids(["id 5", "no such id", "id 30"])
    for identity, places in zip((5, None, 30), found, strict=True):
        assert places == sorted(place for place in documents if place.line - 1 == identity)


def test_a_column_of_a_data_set_is_searched_too_and_token_ids_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [words(i, 60) for i in range(50)]
    rows = {"text": texts, "input_ids": [[1, 2]] * 50, "id": [f"d{i}" for i in range(50)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    source = {"name": "a", "dataset": str(tmp_path / "set")}
    search = searched(config([source], index_dir=tmp_path / "index"))
    places = [DocumentPlace(0, 0, line) for line in (17, 4)]
    excerpts = [" ".join(texts[place.line - 1].split()[9:50]) for place in places]
    assert [[match.place for match in matches] for matches in search.texts(excerpts)] == [[place] for place in places]
    assert search.ids(["d16", "d3"]) == [[place] for place in places]
    ids = config([source | {"input_ids_key": "input_ids"}], index_dir=tmp_path / "index")
    with pytest.raises(ShardError, match="source 'a' holds token ids, among which no text can be searched"):
        list(make_all(ids, shards_of(ids), workers=1))


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.jsonl", record(words(1, 50)))
    data = config([{"name": "a", "paths": [str(shard)]}])
    with pytest.raises(ShardError, match="a.jsonl: has no text index; make those of all shards first"):
        TextSearch(data, shards_of(data))
    search = searched(data)
    (path,) = tmp_path.glob("*.texts")
    whole = path.read_bytes()
    for damaged in (whole[:-4], b"", whole.replace(b'"key":', b'"kay":')):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"texts: .*; delete it, to have it made"):
            search.texts([words(1, 50)])
        with pytest.raises(ShardError, match=r"texts: .*; delete it, to have it made"):
            text_index.obtain(data, data.sources[0], shards_of(data)[0][0])
    path.write_bytes(whole)
    shard.write_bytes(record(words(2, 50)))
    with pytest.raises(ShardError, match="changed after it was indexed"):
        search.texts([words(1, 50)])
    with pytest.raises(ShardError, match="has no text index"):
        TextSearch(data, shards_of(data))
