from __future__ import annotations

import gzip
import json
from importlib.resources import files

from tafkir.data.corpus import Corpus
from tafkir.data.split import assign_clusters, cluster, gsm8k_split, normalized_words, own_split


def test_the_shipped_svamp_assignment_is_what_the_rule_gives() -> None:
    folder = files("tafkir") / "datasets" / "svamp"
    rows = [json.loads(line) for line in gzip.decompress((folder / "svamp.jsonl.gz").read_bytes()).splitlines()]
    clusters = cluster({f"svamp-{row['ID']}": f"{row['Body']} {row['Question']}" for row in rows})
    assert len(clusters) == 238 and sum(map(len, clusters)) == 1000
    shipped = json.loads((folder / "split.json").read_text("utf-8"))
    assert assign_clusters(clusters, num_test=300, num_validation=100) == shipped
    assert {part: len(ids) for part, ids in shipped.items()} == {"train": 600, "validation": 100, "test": 300}


def test_gsm8k_rows_keep_their_place() -> None:
    # ids whose part must never change: what a published result was measured on
    assert gsm8k_split("gsm8k-test-0", "test") == "test"
    validation = [i for i in range(7473) if gsm8k_split(f"gsm8k-train-{i}", "train") == "validation"]
    assert len(validation) == 290
    assert validation[:5] == [11, 44, 45, 68, 70]


def test_no_problem_stands_in_two_parts(corpus: Corpus) -> None:
    ids = [{problem.id for problem in corpus.part(part)} for part in ("train", "validation", "test")]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    for part in ("train", "validation", "test"):
        assert all(problem.split == part for problem in corpus.part(part))


def test_numbers_do_not_tell_texts_apart() -> None:
    assert normalized_words("Tom’s 1,234 pens, three-fold: 2.5!") == normalized_words("tom's 7 pens two fold 99")
    assert own_split("He has 3 cats and seven dogs.") == own_split("He has 17 cats and 2,000 dogs.")


def test_own_rows_fall_into_the_parts_in_the_stated_shares() -> None:
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(4000)]
    parts = [own_split(word) for word in words]
    assert 0.12 < parts.count("test") / 4000 < 0.18 and 0.03 < parts.count("validation") / 4000 < 0.07


def test_clusters_chain_through_shared_wording() -> None:
    shared = "one two cats sat on a mat in the big old house"
    texts = {"a": shared, "b": f"x {shared} y and so it went on and on until the end", "c": "z until z"}
    texts["d"] = "and so it went on and on until the end of the day"
    assert sorted(map(sorted, cluster(texts))) == [["a", "b", "d"], ["c"]]
