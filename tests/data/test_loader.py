from __future__ import annotations

import pytest

from tafkir.data.corpus import Corpus
from tafkir.data.loader import (
    EpochOrder,
    PretrainStream,
    PromptStream,
    SftStream,
    heldout_conversations,
    heldout_documents,
    repeat_sources,
)
from tafkir.data.sources import Problem
from tafkir.data.tokenizer import THINK_START, Tokenizer
from tafkir.errors import DataError
from tafkir.recipe.schema import AugmentConfig

CONFIG = AugmentConfig()


def _pretrain(corpus: Corpus, tokenizer: Tokenizer, seed: int = 1, share: float = 0.25) -> PretrainStream:
    return PretrainStream(
        corpus.train, tokenizer, CONFIG, batch_problems=8, drill_share=share, story_share=share, seed=seed
    )


def test_an_epoch_visits_every_problem_once_in_an_order_of_its_own() -> None:
    order = EpochOrder(50, seed=3)
    epochs = [[order[epoch * 50 + i] for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [EpochOrder(50, seed=3)[i] for i in range(50)] != [EpochOrder(50, seed=4)[i] for i in range(50)]


def test_a_batch_depends_on_seed_and_step_alone(corpus: Corpus, tokenizer: Tokenizer) -> None:
    streams = (
        lambda seed: _pretrain(corpus, tokenizer, seed),
        lambda seed: SftStream(corpus.train, tokenizer, CONFIG, batch_problems=8, seed=seed),
        lambda seed: PromptStream(corpus.train, tokenizer, CONFIG, prompts_per_step=8, seed=seed),
    )
    for build in streams:
        walked = build(1)
        batches = [walked.batch_at(step) for step in range(5)]
        fresh = build(1)
        assert [fresh.batch_at(step) for step in (3, 0, 4)] == [batches[3], batches[0], batches[4]]
        assert build(2).batch_at(0) != batches[0]
        assert batches[0] != batches[1]


def test_prompts_mix_made_up_problems_of_the_length_asked_for(corpus: Corpus, tokenizer: Tokenizer) -> None:
    stream = PromptStream(corpus.train, tokenizer, CONFIG, prompts_per_step=100, story_share=0.5, max_steps=1, seed=0)
    examples = [example for example, _ in stream.batch_at(0)]
    stories = [example for example in examples if example.source == "stories"]
    assert 35 <= len(stories) <= 65
    assert [example for example, _ in stream.batch_at(0)] == examples
    answers = {example.answer for example in stories}
    assert len(answers) > 20


def test_pretraining_mixes_problems_stories_and_drills_in_the_shares_asked_for(
    corpus: Corpus, tokenizer: Tokenizer
) -> None:
    stream = _pretrain(corpus, tokenizer)
    documents = [ids for step in range(50) for ids, _ in stream.batch_at(step)]
    assert all(ids[-1] == tokenizer.document_end_id for ids in documents)
    think = tokenizer.special_id(THINK_START)
    drills = sum(think not in ids for ids in documents)
    assert 0.18 < drills / len(documents) < 0.32
    only = _pretrain(corpus, tokenizer, share=0.0)
    assert all(think in ids for step in range(5) for ids, _ in only.batch_at(step))


def test_only_training_problems_reach_a_stream(corpus: Corpus, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="only training problems"):
        SftStream(corpus.test, tokenizer, CONFIG, batch_problems=8, seed=0).batch_at(0)


def test_prompts_come_with_their_examples(corpus: Corpus, tokenizer: Tokenizer) -> None:
    stream = PromptStream(corpus.train, tokenizer, None, prompts_per_step=4, seed=0)
    for example, ids in stream.batch_at(2):
        assert example.split == "train"
        assert tokenizer.decode(ids, skip_special=False) == (
            f"<|im_start|>user\n{example.question}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_problems_without_equations_serve_rl_alone(tokenizer: Tokenizer) -> None:
    plain = [Problem("a", "own", "train", "What is two and two?", "4")]
    assert PromptStream(plain, tokenizer, CONFIG, prompts_per_step=1, seed=0).batch_at(0)[0][0].answer == "4"
    for build in (
        lambda: SftStream(plain, tokenizer, CONFIG, batch_problems=1, seed=0),
        lambda: heldout_documents(plain, tokenizer),
        lambda: heldout_conversations(plain, tokenizer),
    ):
        with pytest.raises(DataError, match="no problem has equations"):
            build()
    with pytest.raises(DataError, match="no problems to train on"):
        PromptStream([], tokenizer, CONFIG, prompts_per_step=1, seed=0)


def test_sources_repeat_as_often_as_asked() -> None:
    problems = [Problem("a", "x", "train", "q", "1"), Problem("b", "y", "train", "q", "1")]
    assert [problem.id for problem in repeat_sources(problems, {"x": 3})] == ["a", "a", "a", "b"]
