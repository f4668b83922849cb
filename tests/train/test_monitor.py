"""The mismatch monitor: its numbers by hand, its lights, what it writes, and what red does to a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.errors import RecipeError, TrainingError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import linear_logprobs
from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rl import IcePop, MonitorConfig, NoAcceptance, RlvrConfig
from tafkir.records import Completion, Example, Verdict
from tafkir.runlog.metrics import Metric, read_jsonl
from tafkir.runlog.rundir import StageDir
from tafkir.train.loop import Trainer, fit
from tafkir.train.mismatch import EntropyProbe, mismatch_metrics
from tafkir.train.monitor import MismatchMonitor, SeenTokens, judge
from tafkir.train.rlvr import RlvrStep
from tafkir.train.rollout import Rollout, RolloutGroup

GREEN = {
    "mismatch/abs_logprob_diff_mean": 0.001,
    "mismatch/ess": 0.99,
    "mismatch/out_of_band": 0.0,
    "mismatch/nonfinite": 0.0,
}
MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_experts=0,
    head_dim=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    max_position_embeddings=64,
)


def group(*completions: tuple[list[int], list[float]], name: str = "p") -> RolloutGroup:
    rollouts = [
        Rollout(Completion("r", tuple(ids), tuple(logprobs), "stop"), "", Verdict("wrong", float(i % 2), None, ""))
        for i, (ids, logprobs) in enumerate(completions)
    ]
    return RolloutGroup(Example(name, "test", "train", "", ""), (1, 2, 3), tuple(rollouts))


def test_numbers_by_hand() -> None:
    train, sampling = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -1.1, -1.0])
    got = mismatch_metrics(train, sampling, torch.tensor([False, False, True]), torch.tensor([0, 0, 1]), 2)
    log_k = [0.0, 0.1, -2.0]
    k = [math.exp(x) for x in log_k]
    assert got["mismatch/abs_logprob_diff_mean"] == pytest.approx(0.7, abs=1e-6)
    assert got["mismatch/abs_logprob_diff_max"] == pytest.approx(2.0, abs=1e-6)
    assert got["mismatch/kl"] == pytest.approx(sum(a - 1 - b for a, b in zip(k, log_k, strict=True)) / 3, abs=1e-6)
    assert got["mismatch/ess"] == pytest.approx(sum(k) ** 2 / (3 * sum(x * x for x in k)), abs=1e-6)
    assert got["mismatch/masked_fraction"] == got["mismatch/out_of_band"] == pytest.approx(1 / 3)
    assert got["mismatch/masked_sequences"] == got["mismatch/out_of_band_sequences"] == 0.5
    # Small ratios of one sign add up over a completion: no token leaves the band, the product does.
    drift = mismatch_metrics(
        torch.full((20,), -1.0), torch.full((20,), -1.1), torch.zeros(20, dtype=torch.bool), torch.zeros(20).long(), 1
    )
    assert (drift["mismatch/out_of_band"], drift["mismatch/out_of_band_sequences"]) == (0.0, 1.0)


def test_effective_sample_size_of_the_verl_vector() -> None:
    """Weights 0, 0.8, 0 leave one of three; here ratios that differ as much do."""
    got = mismatch_metrics(
        torch.tensor([-60.0, 0.0, -60.0]), torch.tensor([-1.0, -1.0, -1.0]), torch.ones(3) > 0, torch.zeros(3).long(), 1
    )
    assert got["mismatch/ess"] == pytest.approx(1 / 3, abs=1e-6)


def test_what_is_not_finite_is_counted_and_out_of_the_band() -> None:
    sampling = torch.tensor([-1.0, -math.inf, math.nan])
    got = mismatch_metrics(torch.full((3,), -1.0), sampling, torch.ones(3) > 0, torch.tensor([0, 1, 2]), 3)
    assert got["mismatch/nonfinite"] == 2
    assert got["mismatch/out_of_band"] == got["mismatch/out_of_band_sequences"] == pytest.approx(2 / 3)
    assert got["mismatch/abs_logprob_diff_max"] == 0.0


def test_entropy_is_exact_and_apart_for_dropped_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(700, 8, generator=draw), torch.randn(50, 8, generator=draw)
    masked = torch.zeros(700, dtype=torch.bool)
    masked[[3, 500]] = True
    probe = EntropyProbe()
    probe.add(hidden, head, masked, 0.7)
    found = probe.metrics()
    probabilities = (hidden.double() @ head.double().T / 0.7).softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    assert found["mismatch/entropy_masked"] == pytest.approx(float(entropy[masked].mean()), abs=1e-5)
    places = torch.arange(256) * 700 // 256
    assert found["mismatch/entropy"] == pytest.approx(float(entropy[places].mean()), abs=1e-5)
    none = EntropyProbe()
    none.add(hidden, head, torch.zeros(700, dtype=torch.bool), 1.0)
    assert set(none.metrics()) == {"mismatch/entropy"}


@pytest.mark.parametrize(
    ("name", "value", "light"),
    [
        ("mismatch/abs_logprob_diff_mean", 0.02, "green"),
        ("mismatch/abs_logprob_diff_mean", 0.021, "yellow"),
        ("mismatch/abs_logprob_diff_mean", 0.05, "yellow"),
        ("mismatch/abs_logprob_diff_mean", 0.051, "red"),
        ("mismatch/ess", 0.29, "yellow"),
        ("mismatch/out_of_band", 0.011, "yellow"),
        ("mismatch/nonfinite", 1.0, "yellow"),
    ],
)
def test_lights(name: str, value: float, light: str) -> None:
    seen, reasons = judge(GREEN | {name: value}, MonitorConfig())
    assert seen == light and bool(reasons) == (light != "green")
    assert judge(GREEN, MonitorConfig()) == ("green", [])


def test_thresholds_come_from_the_recipe() -> None:
    strict = MonitorConfig(warn=1e-4, stop=5e-4, min_ess=1.0, max_out_of_band=0.0)
    assert judge(GREEN, strict)[0] == "red"
    lax = MonitorConfig(warn=1.0, stop=2.0, min_ess=0.0, max_out_of_band=1.0)
    bad = GREEN | {"mismatch/abs_logprob_diff_mean": 0.9, "mismatch/ess": 0.1, "mismatch/out_of_band": 0.5}
    assert judge(bad, lax)[0] == "green"


def seen_tokens(shift: float) -> SeenTokens:
    """Two completions of one problem; the engines differ by `shift` on the second token of the second one."""
    groups = [group(([5, 6], [-1.0, -1.0]), ([7, 8, 9], [-1.0, -1.0, -1.0]), name="sum")]
    sampling = torch.full((5,), -1.0)
    train = sampling.clone()
    train[3] += shift
    train[0] += 0.01
    return SeenTokens(groups, train, sampling, torch.tensor([False, False, False, True, False]))


def test_offending_tokens_are_written_with_their_text(tmp_path: Path) -> None:
    path = tmp_path / "mismatch.jsonl"
    words = {5: "a", 6: "b", 7: " seven", 8: " eight", 9: " nine"}
    config = MonitorConfig(dump_tokens=2)

    def monitor() -> MismatchMonitor:
        return MismatchMonitor(config, IcePop(), path=path, decode=lambda ids: "".join(words[i] for i in ids))

    first = monitor()
    assert first.observe(1, GREEN, seen_tokens(0.0)) == ({"mismatch/light": 0.0, "mismatch/protected": 0.0}, None)
    assert not path.exists()
    first.observe(2, GREEN, seen_tokens(-3.0))
    first.observe(3, GREEN | {"mismatch/nonfinite": 1.0}, seen_tokens(math.nan))
    rows = list(read_jsonl(path))
    assert [(row["step"], row["light"], len(row["reasons"])) for row in rows] == [(2, "green", 0), (3, "yellow", 1)]
    worst, second = rows[0]["tokens"]
    assert worst == {
        "example": "sum",
        "position": 1,
        "token_id": 8,
        "text": " eight",
        "before": " seven",
        "logprob_training": -4.0,
        "logprob_sampling": -1.0,
        "masked": True,
    }
    assert (second["token_id"], second["position"], second["masked"]) == (5, 0, False)
    assert rows[1]["tokens"][0]["logprob_training"] is None
    # A run that was killed after step 2 writes step 3 again, once.
    monitor().observe(3, GREEN, seen_tokens(-3.0))
    assert [row["step"] for row in read_jsonl(path)] == [2, 3]


RED = GREEN | {"mismatch/abs_logprob_diff_mean": 0.3}


def test_a_change_of_the_light_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = MismatchMonitor(MonitorConfig(), NoAcceptance())
    with caplog.at_level(logging.INFO, "tafkir"):
        for step, metrics in enumerate((GREEN, RED, RED, GREEN), start=1):
            assert monitor.observe(step, metrics, seen_tokens(0.0))[1] is None
    said = [record.getMessage() for record in caplog.records]
    assert said == ["mismatch is red at step 2: mean |Δ log p| 0.3 is above stop = 0.05", "mismatch is green at step 4"]


def test_protection_begins_after_the_red_step_and_survives_a_resume() -> None:
    config = MonitorConfig(on_red="protect", protection=IcePop(beta=3.0))
    monitor = MismatchMonitor(config, NoAcceptance())
    assert monitor.acceptance.kind == "none" and monitor.state() is None
    found, stop = monitor.observe(7, RED, seen_tokens(0.0))
    assert stop is None and found["mismatch/protected"] == 0.0
    assert monitor.state() == {"protected_since": 7}
    assert monitor.observe(8, GREEN, seen_tokens(0.0))[0]["mismatch/protected"] == 1.0
    resumed = MismatchMonitor(config, NoAcceptance())
    resumed.load_state({"protected_since": 7})
    assert resumed.acceptance == IcePop(beta=3.0)


class Source:
    """The same two tries every step; the sampling engine is `shift` nats off."""

    def __init__(self, decoder: Decoder, shift: float) -> None:
        self.decoder, self.shift = decoder, shift

    def __call__(self, step: int) -> list[RolloutGroup]:
        tries = [[4, 9, 2], [7, 7, 5, 2]]
        return [group(*((ids, self._logprobs(ids)) for ids in tries))]

    def _logprobs(self, ids: list[int]) -> list[float]:
        whole = torch.tensor([1, 2, 3, *ids])
        with torch.no_grad():
            out = self.decoder(whole, torch.arange(len(whole)), VarlenCausal(torch.tensor([0, len(whole)])))
            found = linear_logprobs(out.hidden_ND[2:-1], self.decoder.head_weight, whole[3:])
        return [float(x) + self.shift for x in found]

    def numbers(self) -> Mapping[str, Metric]:
        return {}

    def state(self) -> Any:
        return None

    def load_state(self, state: Any) -> None: ...


def train(stage: StageDir, config: RlvrConfig, shift: float = 0.8) -> tuple[Trainer, MismatchMonitor]:
    trainer = Trainer(build_decoder(MODEL, 0), config)
    monitor = MismatchMonitor(config.monitor, config.acceptance, path=stage.path / "mismatch.jsonl")
    step = RlvrStep(trainer, Source(trainer.decoder, shift), config, reference=None, monitor=monitor)
    fit(trainer, stage, step, carried={"monitor": monitor}, label="rlvr")
    return trainer, monitor


def config_of(**monitor: Any) -> RlvrConfig:
    keys = {"steps": 4, "save_every": 100, "log_every": 3, "learning_rate": 1e-3, "warmup_steps": 0}
    return RlvrConfig.model_validate({**keys, "acceptance": {"kind": "none"}, "monitor": monitor})


def test_the_run_stops_at_the_line_and_goes_on_from_there(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "stopped", "rlvr")
    with pytest.raises(TrainingError, match=r"step 1 .*disagree too much: mean .* above stop = 0.05.*on_red"):
        train(stage, config_of(on_red="stop"))
    rows = list(read_jsonl(stage.metrics_path))
    assert [row["step"] for row in rows] == [1] and rows[0]["mismatch/light"] == 2.0
    assert rows[0]["mismatch/abs_logprob_diff_mean"] == pytest.approx(0.8, abs=1e-4)
    assert rows[0]["train/grad_norm"] > 0 and rows[0]["mismatch/entropy"] > 0
    resumed, _ = train(stage, config_of(on_red="warn"))
    straight, _ = train(StageDir(tmp_path / "straight", "rlvr"), config_of(on_red="warn"))
    for name, value in straight.decoder.state_dict().items():
        assert torch.equal(value, resumed.decoder.state_dict()[name]), name
    assert [row["step"] for row in read_jsonl(stage.path / "mismatch.jsonl")] == [1, 2, 3, 4]


def test_protection_drops_the_tokens_from_the_next_step_on(tmp_path: Path) -> None:
    """Off by 0.8 nats every ratio is 0.45, below IcePop's band: a protected step learns nothing."""
    stage = StageDir(tmp_path / "run", "rlvr")
    config = config_of(on_red="protect").model_copy(update={"log_every": 1})
    _, monitor = train(stage, config)
    rows = list(read_jsonl(stage.metrics_path))
    assert [row["mismatch/protected"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert [row["mismatch/masked_fraction"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert rows[0]["train/grad_norm"] > 0 and rows[1]["train/grad_norm"] == 0
    assert "mismatch/entropy_masked" in rows[1] and "mismatch/entropy_masked" not in rows[0]
    assert monitor.state() == {"protected_since": 1}


def test_equal_engines_are_green_and_leave_no_file(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "run", "rlvr")
    train(stage, replace_monitor(config_of(), on_red="stop"), shift=0.0)
    assert all(row["mismatch/light"] == 0.0 for row in read_jsonl(stage.metrics_path))
    assert not (stage.path / "mismatch.jsonl").exists()


def replace_monitor(config: RlvrConfig, **keys: Any) -> RlvrConfig:
    return config.model_copy(update={"monitor": config.monitor.model_copy(update=keys)})


@pytest.mark.parametrize(
    ("override", "what"),
    [
        (["rlvr.monitor.warn=0.1"], "warn=0.1 is above stop=0.05"),
        (["rlvr.monitor.low=6.0"], "low=6 is above high=5"),
        (["rlvr.monitor.on_red=protect"], "protect changes nothing"),
        (["rlvr.acceptance.alpha=6.0"], "the band is empty"),
        (["rlvr.acceptance.kind=geo_rs", "rlvr.acceptance.low=2.0"], "the band is empty"),
        (["rlvr.overlong.buffer_tokens=500"], "longer than max_completion_tokens"),
    ],
)
def test_what_cannot_be_meant_is_refused(override: list[str], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        load_recipe(["smoke"], override)


def test_stopping_is_no_other_result_and_protecting_is() -> None:
    def fingerprint(*overrides: str) -> str:
        recipe = load_recipe(["smoke"], ["rlvr.acceptance.kind=none", *overrides]).recipe
        return fingerprint_stages(recipe, None)["rlvr"]

    assert fingerprint() == fingerprint("rlvr.monitor.on_red=stop") == fingerprint("rlvr.monitor.dump_tokens=3")
    assert fingerprint() == fingerprint("rlvr.monitor.protection.beta=4.0")
    protected = fingerprint("rlvr.monitor.on_red=protect")
    assert protected != fingerprint()
    assert protected != fingerprint("rlvr.monitor.on_red=protect", "rlvr.monitor.protection.beta=4.0")
    assert fingerprint("rlvr.monitor.stop=0.06") != fingerprint()
